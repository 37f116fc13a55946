"""The artifacts that a model carries beside its weights: statistics, optimised grids, fitted samplers, and its tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fewstep.core.statistics import ModelStatistics
from fewstep.models.tuned import Tuned
from fewstep.sampling.grid_table import GridTable
from fewstep.sampling.sampler import Sampler

__all__ = ["FITTED", "OPTIMIZED", "Carried"]

FITTED = "fitted"  # the name of fitted samplers, where a solver's would stand, and of their folder
OPTIMIZED = "optimized"  # the name of the grids that a model carries, where a spacing's would stand, and of their folder

T = TypeVar("T")


class Carried:
    """The artifacts of one model: those below its folder, or those given in memory.

    A file is read when it is first needed, and again once it has changed; so what a learner writes into the folder is there at once.

    Args:
        folder: the model's folder, or None.
        tuned: the facts about what the model was tuned for, in place of those in the folder.
        grids: tables of optimised grids, in place of those below ``optimized*/``.
        samplers: fitted samplers, in place of those below ``fitted*/``.
        statistics: statistics of the model, in place of those below ``statistics*/``.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        tuned: Tuned | None = None,
        grids: Sequence[GridTable] = (),
        samplers: Sequence[Sampler] = (),
        statistics: Sequence[ModelStatistics] = (),
    ) -> None:
        self.folder, self._tuned = folder, tuned
        self._grids, self._samplers, self._statistics = list(grids), list(samplers), list(statistics)
        self._known: dict[Path, tuple[object, Any]] = {}  # folder of an artifact -> state of its files, artifact

    def _read(self, pattern: str, load: Callable[[Path], T]) -> list[T]:
        """Return the artifacts in the folders that hold a file of this pattern, in the order of their paths."""
        folders = [] if self.folder is None else [path.parent for path in sorted(self.folder.glob(pattern))]
        for folder in folders:
            state = sorted((path.name, (stat := path.stat()).st_mtime_ns, stat.st_size) for path in folder.iterdir())
            if self._known.get(folder, (None,))[0] != state:
                self._known[folder] = (state, load(folder))
        return [self._known[folder][1] for folder in folders]

    @property
    def tuned(self) -> Tuned | None:
        """The record of what the model was tuned for; None if it was not.

        Raises:
            ArtifactError: ``tuned.json`` is damaged or of another version.
        """
        return self._tuned if self.folder is None or self._tuned is not None else Tuned.load(self.folder)

    @property
    def statistics(self) -> list[ModelStatistics]:
        """All statistics of the model, one for each guidance scale.

        Raises:
            ArtifactError: one is damaged.
        """
        return self._statistics or self._read("statistics*/statistics.json", ModelStatistics.load)

    @property
    def grids(self) -> list[GridTable]:
        """All tables of optimised grids, one for each solver and guidance scale.

        Raises:
            ArtifactError: one is damaged.
        """
        return self._grids or self._read(f"{OPTIMIZED}*/*/grids.json", GridTable.load)

    @property
    def samplers(self) -> list[Sampler]:
        """All samplers that were fitted to the model.

        Raises:
            ArtifactError: one is damaged.
        """
        return self._samplers or self._read(f"{FITTED}*/nfe-*/sampler.json", Sampler.load)
