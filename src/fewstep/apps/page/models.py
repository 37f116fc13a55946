"""The models of the page: those that ship, those saved below its folder, and the one that its command named.

The person who starts the page trusts code; the browser cannot. So it chooses from a list, and what is imported or read from elsewhere was
named on the command line.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from threading import Lock

from fewstep.apps.models import model_words, open_model
from fewstep.integrations.diffusers.pipeline_folders import is_pipeline
from fewstep.models.model import Model
from fewstep.models.problem import Problem
from fewstep.models.zoo import BUNDLED
from fewstep.runtime.entry import is_entry
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.front_door import number
from fewstep.runtime.process import default_device

__all__ = ["Models", "quoted"]

HELD = 3  # models in memory
MARKS = ("fewstep.json", "model_index.json")  # of a model's folder
DEPTH = 3  # folders below that of the page where models are looked for


def quoted(text: str) -> str:
    """Return a string as Python writes it, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


class Models:
    """The models that the page may open, the last few of them in memory.

    Args:
        out: the folder of the page.
        named: the model that the command named, if any.
        trust: whether its code may be imported.
    """

    def __init__(self, out: Path, named: str | None = None, *, trust: bool = False) -> None:
        self.out, self.named, self.trust = out, named, trust
        self._held: OrderedDict[str, Model] = OrderedDict()
        self._lock = Lock()
        if named is not None:
            self.open(named)  # what is no model is refused before the page is there

    @property
    def names(self) -> list[str]:
        """The names to choose from, the command's first."""
        patterns = [f"{'*/' * depth}{mark}" for depth in range(1, DEPTH + 1) for mark in MARKS]
        found = (path.parent for pattern in patterns for path in self.out.glob(pattern))
        below = sorted(str(path) for path in found if not path.relative_to(self.out).parts[0].startswith("."))
        return list(dict.fromkeys([*([] if self.named is None else [self.named]), *BUNDLED, *below]))

    def open(self, name: str) -> Model:
        """Return a model of the list.

        Raises:
            FewstepError: it is none of the list, or cannot be read.
        """
        if name != self.named and name not in self.names:
            raise FewstepError(
                f"no model {str(name)[:80]!r} here: choose one of the list; start the page as 'fewstep ui MODEL' to add one, or put its "
                f"folder into {self.out}"
            )
        with self._lock:
            if name not in self._held:
                self._held[name] = open_model(name, trust=self.trust and name == self.named)
                while len(self._held) > HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(name)
            return self._held[name]

    def problem(self, name: str, guidance: float) -> Problem:
        """Return a model at a guidance scale on the device that commands compute on."""
        return Problem(self.open(name), number(guidance, "guidance"), default_device())

    def words(self, name: str, guidance: float | None = None) -> list[str]:
        """Return what names a model on the command line, with its guidance scale."""
        return [name, *model_words(self.open(name), guidance)]

    def python(self, name: str) -> list[str]:
        """Return the lines of Python that load a model as ``model``."""
        if name == self.named and is_entry(name) and not Path(name).exists():
            module, _, function = name.partition(":")
            return [f"from {module} import {function.partition('.')[0]}", "", f"model = {function}()"]
        if is_pipeline(name):
            return [
                "from diffusers import DiffusionPipeline",
                "",
                f"model = fewstep.from_pipeline(DiffusionPipeline.from_pretrained({quoted(name)}), guidance_scale=1.0)",
            ]
        trusted = ", trust=True" if self.open(name).needs_trust else ""
        return [f"model = fewstep.load_model({quoted(name)}{trusted})"]
