r"""Refine a schedule by the error that it really makes: least squares on the ends of a few sampled trajectories.

Bounds rank schedules of first-order steps. A multistep solver also amplifies what is wrong with its past outputs, which no bound
along the exact trajectory sees, so its schedule is judged by running it: with ``R(lam) [B, *D]`` the samples minus the exact ends, as
functions of the inner levels ``lam_1 .. lam_{N-1}``, Levenberg-Marquardt descends its size. A column of the Jacobian is a difference,
and costs only the evaluations after the level that moved: half a run on average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.errors import GridError, ModelError, SolverError
from fewstep.core.grid import TimeGrid
from fewstep.core.sampling import Cond, Denoiser
from fewstep.core.schedule import DiscreteVP
from fewstep.core.tableau import Solver, State, Tableau, advance, tabulate

__all__ = ["EndError", "refine", "sizes"]

DIFFERENCE = 0.1  # of the smaller gap beside a level: how far it moves for a difference
REACH = 0.4  # of the gap: how far it may move in one iteration, so that no two levels meet
DAMPING = 0.1  # to begin with, relative to the Jacobian; ten times more after a move that failed, less after one that did not
TRIALS = 5  # moves tried with one Jacobian
ENOUGH = 0.003  # relative gain below which an iteration is the last


@dataclass(eq=False)
class EndError:
    """The error of a solver's samples from fixed noises, as a function of its grid.

    Args:
        x: the start ``[B, *D]``.
        exact: the ends of the exact trajectories, ``[B, *D]``.
        evaluations: of the network so far, in samples.
    """

    denoiser: Denoiser
    solver: Solver
    x: Tensor
    exact: Tensor
    cond: Cond = None
    evaluations: int = 0

    def rmse(self, grid: TimeGrid) -> float:
        """The root mean square error of all samples on a grid."""
        return rms(self.residual(grid)[0])

    def first(self, count: int) -> EndError:
        """The same problem with its first noises only."""
        cond = self.cond[:count] if isinstance(self.cond, Tensor) else self.cond
        return EndError(self.denoiser, self.solver, self.x[:count], self.exact[:count], cond)

    def typical(self, grid: TimeGrid) -> float:
        """The mean over samples of each one's root mean square error."""
        return float(sizes(self.residual(grid)[0]).mean())

    @torch.no_grad()
    def residual(self, grid: TimeGrid, base: _Run | None = None) -> tuple[Tensor, _Run]:
        """Samples minus exact ends ``[B, *D]``, and the run; the part that it shares with ``base`` is not run again.

        Raises:
            SolverError: the solver adds noise, or cannot run on this grid.
            ModelError: the network is not finite.
        """
        tableau = tabulate(self.solver, self.solver.nodes(grid, self.denoiser.schedule))
        if tableau.stochastic:
            raise SolverError(f"{type(self.solver).__name__} adds noise, and has no exact ends to compare with: use a deterministic solver")
        done = 0 if base is None else base.shared(tableau)
        states = [tableau.start(self.x)] if base is None or not done else base.states[:done]
        outputs = [] if base is None else base.outputs[:done]
        for i, row in enumerate(tableau.rows(self.x)):
            if i + 1 < len(states):
                continue
            if i >= len(outputs):
                outputs.append(self.denoiser(states[i].x, tableau.nodes.t[i], self.cond))
                self.evaluations += len(self.x)
            states.append(advance(row, states[i], outputs[i]))
        end = states[-1].x
        if not bool(torch.isfinite(end).all()):
            raise ModelError(f"the samples on the grid {[round(t, 4) for t in grid.t.tolist()]} are not finite: check the network")
        return end - self.exact, _Run(tableau, states, outputs)


@dataclass(eq=False)
class _Run:
    """The states and outputs of a run, kept for others that begin like it."""

    tableau: Tableau
    states: list[State]
    outputs: list[Tensor]

    def shared(self, other: Tableau) -> int:
        """How many evaluations another tableau begins with at the same states."""
        mine, nodes = self.tableau, self.tableau.nodes
        for i in range(len(mine.update)):
            if nodes.t[i] != other.nodes.t[i]:
                return i
            if any(not torch.equal(getattr(mine, name)[i], getattr(other, name)[i]) for name in ("record", "update", "bias")):
                return i + 1
        return len(mine.update)


@dataclass(frozen=True)
class _Objective:
    """Mean over samples of ``sqrt(|R_b|^2 + c^2)``, with the weights of its least squares.

    A few samples that lie between two pictures have errors many times the others' on any schedule; squares would be about them alone.
    """

    c: float

    def __call__(self, residual: Tensor) -> float:
        return float((sizes(residual) ** 2 + self.c**2).sqrt().mean())

    def weights(self, residual: Tensor) -> Tensor:
        """``[B * dim]``."""
        return ((sizes(residual) ** 2 + self.c**2) ** -0.5).repeat_interleave(residual[0].numel())


def sizes(residual: Tensor) -> Tensor:
    """The RMS of each sample's error, ``[B]``."""
    return residual.double().cpu().flatten(1).square().mean(1).sqrt()


def rms(residual: Tensor) -> float:
    """That of all samples."""
    return float(sizes(residual).square().mean().sqrt())


def refine(
    error: EndError,
    start: TimeGrid,
    *,
    iterations: int = 6,
    evaluations: int = 30_000,
    observe: Callable[[int, float], None] | None = None,
) -> TimeGrid:
    """The schedule that Levenberg-Marquardt reaches from ``start`` on the noises of ``error``.

    Times of a discrete model are moved in steps of its own. The ends stay.

    Args:
        evaluations: no iteration begins after so many, in samples.
        observe: called after each iteration with its number and the objective.
    """
    schedule = error.denoiser.schedule
    place = _Place(start, schedule.lam, schedule.t_of_lam, schedule.times if isinstance(schedule, DiscreteVP) else None)
    residual, run = error.residual(start)
    objective = _Objective(float(sizes(residual).median()))
    grid, best, damping, limit = start, objective(residual), DAMPING, error.evaluations + evaluations
    for iteration in range(iterations if start.steps > 1 else 0):
        lam, before = place.lam(grid), best
        gap = torch.minimum(torch.diff(lam)[:-1], torch.diff(lam)[1:])
        jacobian = torch.stack([_column(error, place, grid, k, float(gap[k]), residual, run) for k in range(len(gap))], 1)
        weighted = objective.weights(residual)[:, None] * jacobian  # [B * dim, N - 1], per gap
        normal, slope = weighted.T @ jacobian, weighted.T @ residual.double().cpu().flatten()
        scale = torch.diag(normal.diagonal().clamp_min(1e-12 * float(normal.diagonal().max()) + 1e-30))
        for _ in range(TRIALS):
            move = torch.linalg.solve(normal + damping * scale, -slope).clamp(-REACH, REACH)
            trial = place.grid(lam[1:-1] + gap * move)
            found, made = (residual, run) if trial is None else error.residual(trial)
            if trial is not None and objective(found) < best:
                grid, best, residual, run = trial, objective(found), found, made
                damping /= 10
                break
            damping *= 10
        if observe is not None:
            observe(iteration + 1, best)
        if best > before * (1 - ENOUGH) or error.evaluations > limit:
            break
    return grid


@dataclass
class _Place:
    """Between inner levels ``lam`` and grids with the ends of ``start``."""

    start: TimeGrid
    of_t: Callable[[Tensor], Tensor]
    to_t: Callable[[Tensor], Tensor]
    table: Tensor | None

    def lam(self, grid: TimeGrid) -> Tensor:
        """All levels of a grid; an infinite one at an end as far out as the gap beside it is wide."""
        lam = self.of_t(grid.t).clone()
        inner = lam[torch.isfinite(lam)]
        if not bool(torch.isfinite(lam[0])):
            lam[0] = inner[0] - 2
        if not bool(torch.isfinite(lam[-1])):
            lam[-1] = inner[-1] + 2
        return lam

    def grid(self, inner: Tensor) -> TimeGrid | None:
        """The grid with these inner levels, or None if two of them meet."""
        try:
            grid = TimeGrid(torch.cat([self.start.t[:1], self.to_t(inner), self.start.t[-1:]]))
            return grid if self.table is None else grid.snap(self.table)
        except GridError:
            return None


def _column(error: EndError, place: _Place, grid: TimeGrid, k: int, gap: float, residual: Tensor, run: _Run) -> Tensor:
    """``dR/dlam_{k+1}`` times the gap, by moving that level alone; zero if it cannot move."""
    lam = place.lam(grid)
    for way in (1, -1):
        for far in (1, 2, 4):  # a discrete time moves by at least one
            inner = lam[1:-1].clone()
            inner[k] += way * far * DIFFERENCE * gap
            moved = place.grid(inner)
            if moved is not None and bool(moved.t[k + 1] != grid.t[k + 1]):
                size = float(place.lam(moved)[k + 1] - lam[k + 1]) / gap
                return ((error.residual(moved, run)[0] - residual) / size).double().cpu().flatten()
    return torch.zeros(residual.numel(), dtype=torch.float64)
