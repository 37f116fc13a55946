"""Distil a model into a generator of a few passes whose samples have the right distribution, as DMD2 does (arXiv 2405.14867)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.grid import TimeGrid
from fewstep.learn.networks.objectives.matching import MatchingObjective, Rows
from fewstep.learn.networks.objectives.matching_passes import SOLVER, Passes, Turn, even_levels
from fewstep.learn.networks.objectives.objective import write_card
from fewstep.models.formats.folders import imports_code, save_like
from fewstep.models.model import Model
from fewstep.runtime.errors import FewstepError

__all__ = ["FewPassObjective"]


class FewPassObjective(MatchingObjective):
    """Distribution matching of a generator of several passes: a denoiser of the teacher's form, right at the levels of its passes alone.

    One fake denoises the samples of all passes, in the proportions in which these are trained. Arguments and errors are those of
    `MatchingObjective`; beside them a level that the noise law does not have, and any student to begin with, are refused.

    Attributes:
        passes: its passes.
    """

    passes: Passes

    def times(self) -> TimeGrid:
        if self.begin is not None:
            raise FewstepError(
                f"several passes begin with the teacher's own network, not with {self.begin.name}: leave out the student to begin with "
                "(--from), or passes"
            )
        levels = self.config.levels or even_levels(self.start, self.config.passes)
        even = f"each of the default levels of {self.config.passes} passes (take fewer, or name levels)"
        name = "a level" if self.config.levels else even
        times = [self.time_of(level, name if k or self.config.levels else "start") for k, level in enumerate(levels)]
        if any(one <= other for one, other in itertools.pairwise(times)):
            shown = ", ".join(f"{level:.4g}" for level in levels)
            raise FewstepError(f"the network's table of times has no time of its own for each of the levels {shown}: take fewer passes")
        clean = torch.tensor(self.problem.schedule.t_clean, dtype=torch.float64)
        self.passes = Passes(self.problem.schedule, TimeGrid(torch.stack([*times, clean])))
        return self.passes.grid

    # -- training ---------------------------------------------------------------------------------------------------

    def student(self) -> nn.Module:
        return self.copied().to(self.problem.device)

    def turn(self, size: int, generator: torch.Generator) -> Turn:
        return self.passes.draw(size, self.problem.shape, generator, self.problem.device)

    def led(self, student: Any, rows: Rows) -> Rows:  # noqa: ANN401 - as of the base
        assert rows.turn is not None
        return rows._replace(turn=self.passes.lead(self.model_of(student), rows.turn, rows.cond))

    def made_of(self, student: Any, rows: Rows, z: Tensor) -> Tensor:  # noqa: ANN401 - as of the base
        assert rows.turn is not None
        return self.passes.answer(self.model_of(student), rows.turn, z, rows.cond)

    @torch.no_grad()
    def answers(self, student: nn.Module, seeds: Sequence[int]) -> list[Tensor]:
        problem = self.problem
        return self.passes.samples(self.model_of(student), seeds, problem.shape, problem.cond(seeds), problem.device)

    # -- the student ------------------------------------------------------------------------------------------------

    def network(self, student: nn.Module) -> nn.Module:
        return student

    def sampled_by(self, guidance: float) -> tuple[float | None, str | None, int | None]:
        return guidance, SOLVER, self.passes.count

    def describe(self, student: nn.Module, facts: Mapping[str, Any]) -> None:
        self._card = dict(facts)

    def model(self, student: nn.Module) -> Model:
        return self.problem.model.with_network(student)

    def save(self, student: nn.Module, folder: Path) -> None:
        about = f"A student of {self.passes.count} passes, each of which adds noise to the last one's samples and makes them anew."
        write_card(folder, about, self._card, trust=imports_code(self.problem.model))
        save_like(self.problem.model, student, folder)
