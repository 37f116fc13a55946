"""The models of the page: those that ship, those saved below its folder, and the one that its command named.

The person who starts the page trusts code; the browser cannot. So it chooses from a list, and what is imported or read from elsewhere was
named on the command line.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from fewstep.apps.models import model_words, open_model
from fewstep.apps.pipelines import prompted, prompted_pipeline, takes_prompts
from fewstep.integrations.diffusers.latents import decode_latents
from fewstep.integrations.diffusers.pipeline_folders import is_pipeline
from fewstep.models.model import Model
from fewstep.models.problem import Problem
from fewstep.models.zoo import BUNDLED
from fewstep.runtime.entry import is_entry
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.front_door import number
from fewstep.runtime.process import default_device
from fewstep.runtime.spec import as_typed

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
        self._held: OrderedDict[tuple[str, str], Model] = OrderedDict()  # by name and prompt
        self._pipes: dict[str, Any] = {}  # of those that take prompts
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

    def open(self, name: str, prompt: str = "") -> Model:
        """Return a model of the list.

        Args:
            name: of the list.
            prompt: of a text pipeline; other models take none, see `takes_prompt`.

        Raises:
            FewstepError: it is none of the list, or cannot be read.
        """
        self._check(name)
        with self._lock:
            key = (name, prompt)
            if key not in self._held:
                self._held[key] = self._prompted(*key) if takes_prompts(name) else open_model(name, trust=self.trust and name == self.named)
                while len(self._held) > HELD:
                    self._held.popitem(last=False)
                names = {name for name, _ in self._held}
                self._pipes = {name: pipe for name, pipe in self._pipes.items() if name in names}
            self._held.move_to_end(key)
            return self._held[key]

    def _prompted(self, name: str, prompt: str) -> Model:
        return prompted(self._pipe(name), prompt)

    def _pipe(self, name: str) -> Any:  # noqa: ANN401 - a diffusers pipeline
        if name not in self._pipes:
            self._pipes[name] = prompted_pipeline(name)
        return self._pipes[name]

    def takes_prompt(self, name: str) -> bool:
        """Return whether a model of the list is a pipeline that takes a prompt."""
        self._check(name)
        return takes_prompts(name)

    def pictures(self, name: str, latents: Tensor) -> Tensor:
        """Return the pictures ``[B, 3, H, W]`` of samples of a text pipeline."""
        self._check(name)
        with self._lock:
            pipe = self._pipe(name)
        return decode_latents(pipe, latents)

    def problem(self, name: str, guidance: float, prompt: str | None = None) -> Problem:
        """Return a model at a guidance scale on the device that commands compute on.

        Raises:
            FewstepError: a text pipeline without a prompt: no command of the page says one.
        """
        if prompt is None:
            self._check_commanded(name)
        return Problem(self.open(name, prompt or ""), number(guidance, "guidance"), default_device())

    def _check(self, name: str) -> None:
        """Refuse a name that is none of the list."""
        if name != self.named and name not in self.names:
            raise FewstepError(
                f"no model {str(name)[:80]!r} here: choose one of the list; start the page as 'fewstep ui MODEL' to add one, or put its "
                f"folder into {self.out}"
            )

    def _check_commanded(self, name: str) -> None:
        """Refuse a text pipeline, of which commands take a file of prompts."""
        if self.takes_prompt(name):
            raise FewstepError(
                f"{name} takes prompts, which the tab Sample alone does: type fewstep fit {name} --prompts FILE, one prompt on each line; "
                "calibrate and optimize take them too"
            )

    def words(self, name: str, guidance: float | None = None) -> list[str]:
        """Return what names a model on the command line, with its guidance scale.

        Raises:
            FewstepError: a text pipeline.
        """
        self._check_commanded(name)
        return [name, *model_words(self.open(name), guidance)]

    def python(self, name: str, prompt: str = "", guidance: float = 1.0) -> list[str]:
        """Return the lines of Python that load a model as ``model``, a text pipeline with its prompt and guidance scale."""
        if name == self.named and is_entry(name) and not Path(name).exists():
            module, _, function = name.partition(":")
            return [f"from {module} import {function.partition('.')[0]}", "", f"model = {function}()"]
        if takes_prompts(name):
            return [
                "from diffusers import DiffusionPipeline",
                "from fewstep.integrations.diffusers.latents import decode_latents",
                "",
                f"pipe = DiffusionPipeline.from_pretrained({quoted(name)})",
                f"model = fewstep.from_pipeline(pipe, [{quoted(prompt)}], guidance_scale={as_typed(guidance)})",
            ]
        if is_pipeline(name):
            return [
                "from diffusers import DiffusionPipeline",
                "",
                f"model = fewstep.from_pipeline(DiffusionPipeline.from_pretrained({quoted(name)}), guidance_scale=1.0)",
            ]
        trusted = ", trust=True" if self.open(name).needs_trust else ""
        return [f"model = fewstep.load_model({quoted(name)}{trusted})"]
