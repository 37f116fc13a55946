r"""Refine a schedule by the error that it really makes: least squares on the endpoints of a few sampled trajectories.

Bounds rank schedules of first-order steps. A multistep solver also amplifies the errors of its past outputs, which no bound
along the exact trajectory sees, so its schedule is judged by running it, and its inner levels ``lam_1 .. lam_{N-1}`` are the free numbers
of `levenberg_marquardt`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Solver, Tableau, tabulate
from fewstep.learn.search.endpoint import CachedRun, EndpointError, Parameters, TableauPoint, levenberg_marquardt, rms
from fewstep.runtime.errors import GridError, SolverError

__all__ = ["Levels", "SolverEndpointError", "check_deterministic", "refine"]

DIFFERENCE = 0.1  # of the smaller gap beside a level: how far it moves for a difference
STEPS = 4  # with one Jacobian, at most
REACH = 0.4  # of the gap: how far it may move in one iteration, so that no two levels meet


def check_deterministic(tableau: Tableau, name: str) -> None:
    """Refuse a sampler that adds noise.

    Raises:
        SolverError: it does (``name`` says which).
    """
    if tableau.stochastic:
        raise SolverError(f"{name} adds noise, and has no exact ends to compare with: use a deterministic solver")


class SolverEndpointError(EndpointError):
    """The endpoint error of a solver's samples from fixed noises, as a function of its grid."""

    def __init__(self, denoiser: Denoiser, solver: Solver, x: Tensor, exact: Tensor, cond: Cond = None) -> None:
        super().__init__(denoiser, x, exact, cond)
        self.solver = solver

    def tableau(self, grid: TimeGrid) -> Tableau:
        """Put the solver on a grid.

        Raises:
            SolverError: the solver adds noise, or cannot run on this grid.
        """
        tableau = tabulate(self.solver, self.solver.nodes(grid, self.denoiser.schedule))
        check_deterministic(tableau, type(self.solver).__name__)
        return tableau

    def residual(self, grid: TimeGrid, base: CachedRun | None = None) -> tuple[Tensor, CachedRun]:
        """Run the solver on a grid, see `run`."""
        return self.run(self.tableau(grid), base)

    def rmse(self, grid: TimeGrid) -> float:
        """Return the root mean square error of all samples on a grid."""
        return rms(self.residual(grid)[0])


@dataclass(frozen=True, eq=False)
class Levels:
    """The inner levels ``lam`` of a grid as free numbers, each in units of the smaller gap beside it. The ends stay.

    Times of a discrete model move among its own times.
    """

    grid: TimeGrid
    schedule: NoiseSchedule

    @cached_property
    def lam(self) -> Tensor:
        """All levels, an infinite one at an end as the level 2 beyond its neighbour."""
        lam = self.schedule.lam(self.grid.t).clone()
        inner = lam[torch.isfinite(lam)]
        if not len(inner):
            return lam  # one step from pure noise to clean data, and no level to move
        if not bool(torch.isfinite(lam[0])):
            lam[0] = inner[0] - 2
        if not bool(torch.isfinite(lam[-1])):
            lam[-1] = inner[-1] + 2
        return lam

    @cached_property
    def gap(self) -> Tensor:
        """The smaller gap beside each inner level, ``[N-1]``."""
        return torch.minimum(torch.diff(self.lam)[:-1], torch.diff(self.lam)[1:])

    def moved(self, step: Tensor) -> TimeGrid | None:
        """Return the grid with every level moved by ``step [N-1]`` gaps, at most `REACH`; None if two levels meet."""
        if self.grid.steps == 1:
            return self.grid
        return self._at(self.lam[1:-1] + self.gap * step.clamp(-REACH, REACH))

    def perturbed(self) -> list[tuple[TimeGrid, float] | None]:
        """Return for each level the grid with that level alone moved a little, and by how many gaps; None if it cannot move."""
        return [self._move(k) for k in range(self.grid.steps - 1)]

    def _at(self, inner: Tensor) -> TimeGrid | None:
        t = self.grid.t
        try:
            return TimeGrid(torch.cat([t[:1], self.schedule.t_of_lam(inner), t[-1:]])).known_to(self.schedule)
        except GridError:
            return None

    def _move(self, k: int) -> tuple[TimeGrid, float] | None:
        gap = float(self.gap[k])
        for far in (1, -1, 2, -2, 4, -4):  # a discrete time moves by at least one
            inner = self.lam[1:-1].clone()
            inner[k] += far * DIFFERENCE * gap
            moved = self._at(inner)
            if moved is not None and bool(moved.t[k + 1] != self.grid.t[k + 1]):
                return moved, float(Levels(moved, self.schedule).lam[k + 1] - self.lam[k + 1]) / gap
        return None


@dataclass(frozen=True, eq=False)
class _OnGrid:
    """A solver whose grid is free."""

    error: SolverEndpointError
    levels: Levels
    tableau: Tableau

    @classmethod
    def at(cls, error: SolverEndpointError, grid: TimeGrid) -> _OnGrid:
        return cls(error, Levels(grid, error.denoiser.schedule), error.tableau(grid))

    def parameters(self, runs: Sequence[CachedRun], size: float) -> Parameters:
        """Return every inner level as a free number."""

        def perturb(level: tuple[TimeGrid, float] | None) -> tuple[Tableau, float] | None:
            return None if level is None else (self.error.tableau(level[0]), level[1])

        def step(delta: Tensor) -> _OnGrid | None:
            grid = self.levels.moved(delta)
            return None if grid is None else self.at(self.error, grid)

        return Parameters([partial(perturb, level) for level in self.levels.perturbed()], step)


def refine(
    batches: Sequence[SolverEndpointError],
    start: TimeGrid,
    *,
    iterations: int = 6,
    evaluations: int = 30_000,
    observe: Callable[[int, float], None] | None = None,
) -> TimeGrid:
    """Refine a schedule by `levenberg_marquardt` on some batches of noises, starting from ``start``. Arguments as there.

    The processes of ``torchrun`` have batches of their own, and get the same schedule.
    """
    begin = TableauPoint.at(batches, _OnGrid.at(batches[0], start))
    found = levenberg_marquardt(begin, iterations=iterations, steps_each=STEPS, evaluations=evaluations, observe=observe)
    return found.here.levels.grid
