"""The `Sampler` artifact: a solver on a grid as data, in a folder that can be shared and runs without the solver's code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule, schedule_from_config
from fewstep.core.tableau import Nodes, Solver, Tableau, tabulate
from fewstep.runtime.artifact import load_artifact, save_artifact
from fewstep.runtime.hub import Shared, header

__all__ = ["Sampler"]

TABLES = ("record", "update", "bias", "noise")


@dataclass(frozen=True, eq=False)
class Sampler(Shared):
    """A tableau with its grid and where it came from.

    ``solver`` and ``options`` name the formulas, for the reader and for whoever rebuilds it on another grid;
    running it needs the tableau alone. ``card`` holds provenance: model fingerprint, command, quality rows.
    """

    tableau: Tableau
    grid: TimeGrid
    schedule: NoiseSchedule
    solver: str
    options: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    kind = "sampler"

    @classmethod
    def build(cls, solver: Solver, grid: TimeGrid, schedule: NoiseSchedule, **card: Any) -> Sampler:  # noqa: ANN401
        """Put a solver on a grid."""
        options = {f.name: _plain(getattr(solver, f.name)) for f in fields(solver)} if is_dataclass(solver) else {}
        return cls(tabulate(solver, solver.nodes(grid, schedule)), grid, schedule, type(solver).__name__, options, card)

    @property
    def nfe(self) -> int:
        """Network evaluations per sample."""
        return self.tableau.nodes.evaluations

    def save(self, folder: str | Path) -> Path:
        """Write ``sampler.json``, ``sampler.safetensors`` and a ``README.md`` card; each appears whole or not at all.

        Raises:
            ArtifactError: the folder cannot be written, or the options or the card are not JSON-able.
        """
        return self._write(Path(folder), self._readme('load("path/to/this/folder")'))

    def _write(self, folder: Path, readme: str) -> Path:
        tensors = {f"nodes.{name}": value for name, value in self.tableau.nodes._asdict().items()}
        tensors |= {name: getattr(self.tableau, name) for name in TABLES}
        tensors["grid"] = self.grid.t
        meta = {
            "solver": self.solver,
            "options": dict(self.options),
            "nfe": self.nfe,
            "schedule": self.schedule.to_config(),
            "card": dict(self.card),
        }
        return save_artifact(folder, "sampler", meta, tensors, readme)

    @classmethod
    def load(cls, folder: str | Path) -> Sampler:
        """Read what `save` wrote.

        Raises:
            ArtifactError: a file is missing or damaged, or of a newer version.
        """

        def build(meta: dict[str, Any], tensors: dict[str, Tensor]) -> Sampler:
            nodes = Nodes(*(tensors[f"nodes.{name}"] for name in Nodes._fields))
            tableau = Tableau(nodes, *(tensors[name] for name in TABLES))
            schedule = schedule_from_config(meta["schedule"])
            return cls(tableau, TimeGrid(tensors["grid"]), schedule, meta["solver"], dict(meta["options"]), dict(meta["card"]))

        return load_artifact(Path(folder), "sampler", build)

    def _readme(self, load: str, pictures: Sequence[str] = ()) -> str:
        sigmas = ", ".join(f"{s:.4g}" for s in torch.exp(-self.tableau.nodes.lam).tolist())
        facts = "\n".join(f"- {key}: {value}" for key, value in self.card.items())
        shown = "".join(f"\n![{name}]({name})\n" for name in pictures)
        return f"""{header(self.card, "sampler")}# A fewstep sampler: {self.solver}, {self.nfe} evaluations

- options: {json.dumps(dict(self.options))}
- noise levels sigma/alpha: {sigmas}
{facts}
{shown}
```python
import fewstep

sampler = fewstep.Sampler.{load}
images = fewstep.sample(denoiser, sampler, x_T)
```
"""


def _plain(value: Any) -> Any:  # noqa: ANN401
    """A solver's option as JSON will give it back: what has a fingerprint by that, a function by its name, a tuple as a list."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return getattr(value, "fingerprint", None) or getattr(value, "__qualname__", value)
