"""The `GridTable` artifact: optimised time grids of one solver on one model, by number of evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule, schedule_from_config
from fewstep.runtime.artifact import Number, Record, named_path, read_record, write_whole
from fewstep.runtime.errors import ArtifactError, GridError, ModelError

__all__ = ["GridTable"]


@dataclass(frozen=True)
class GridsRecord(Record):
    """The fields of ``grids.json``, see `GridTable`."""

    FORMAT = "fewstep-grids"

    solver: str
    model: str
    guidance: Number | None
    schedule: dict[str, Any]
    times: dict[str, list[Number]]
    card: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class GridTable:
    """Optimised time grids of one solver on one model at one guidance scale, by number of evaluations.

    Attributes:
        solver: the name of the solver.
        model: the fingerprint of the model.
        guidance: its guidance scale; None where they are for any, as those of a student that is told its scale.
        schedule: its noise law.
        grids: number of evaluations -> grid.
        card: provenance and figures, plain JSON values.
    """

    solver: str
    model: str
    guidance: float | None
    schedule: NoiseSchedule
    grids: Mapping[int, TimeGrid]
    card: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"GridTable({self.solver}, {min(self.grids)} to {max(self.grids)} evaluations, guidance {self.scale})"

    @property
    def scale(self) -> str:
        """The guidance scale in words."""
        return "of any scale" if self.guidance is None else f"{self.guidance:g}"

    def grid(self, nfe: int) -> TimeGrid:
        """Return the grid for ``nfe`` evaluations.

        Between two numbers that the table has, the nearer one's grid is stretched to as many steps.

        Raises:
            GridError: there is none; the message names those that exist.
        """
        if nfe in self.grids:
            return self.grids[nfe]
        if min(self.grids) < nfe < max(self.grids):
            nearest = min(self.grids, key=lambda n: abs(math.log(n / nfe)))
            if self.grids[nearest].steps == nearest:  # one evaluation a step
                return self.grids[nearest].stretched(self.schedule, nfe)
        known = ", ".join(map(str, sorted(self.grids)))
        raise GridError(f"no optimized grid of {nfe} evaluations for {self.solver} here, only of {known}: run fewstep optimize")

    def save(self, folder: Path) -> Path:
        """Write ``grids.json``, whole or not at all, and return the folder.

        Raises:
            ArtifactError: it cannot be written.
        """
        meta = {
            "format": GridsRecord.FORMAT,
            "version": GridsRecord.VERSION,
            "solver": self.solver,
            "model": self.model,
            "guidance": self.guidance,
            "schedule": self.schedule.to_config(),
            "times": {str(nfe): self.grids[nfe].t.tolist() for nfe in sorted(self.grids)},
            "card": dict(self.card),
        }
        write_whole(folder / "grids.json", (json.dumps(meta, indent=1) + "\n").encode())
        return folder

    @classmethod
    def load(cls, folder: Path) -> GridTable:
        """Load a table that `save` wrote.

        Raises:
            ArtifactError: it is missing, damaged, or of another version.
        """
        path = named_path(folder) / "grids.json"
        meta = read_record(path, GridsRecord)
        try:
            grids = {int(nfe): TimeGrid(torch.tensor(times, dtype=torch.float64)) for nfe, times in meta.times.items()}
            if min(grids) < 1:
                raise ValueError(f"a grid for {min(grids)} evaluations")
            return cls(meta.solver, meta.model, meta.guidance, schedule_from_config(meta.schedule), grids, meta.card)
        except (ValueError, GridError, ModelError) as error:
            raise ArtifactError(f"{path} is damaged: {error}; fetch or make it again") from error
