r"""Least squares on where samples end: any numbers of a tableau, its levels or its coefficients, made better by running it.

With ``R(theta) [B, *D]`` the samples from fixed noises minus the ends of their exact trajectories, Levenberg-Marquardt descends the size
of ``R`` in the free numbers ``theta``. A column of the Jacobian is a difference, and costs only the evaluations after the row that
changed: half a run on average. Everything that is kept is a sum over noises, so they may come in batches and from several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.tableau import State, Tableau, advance
from fewstep.runtime.errors import ModelError
from fewstep.runtime.process import sum_over_processes

__all__ = ["Ends", "Movable", "Move", "Moves", "Run", "descend", "mean_over_processes", "rms", "sizes"]

DAMPING = 0.1  # to begin with, relative to the Jacobian; ten times more after a step that failed, less after one that did not
TRIALS = 5  # lengths tried for a step with a new Jacobian
ENOUGH = 0.003  # relative gain, of as many iterations as there are windows, below which they were the last


def sizes(residual: Tensor) -> Tensor:
    """The RMS of each sample's error, ``[B]``."""
    return residual.double().cpu().flatten(1).square().mean(1).sqrt()


def rms(residual: Tensor) -> float:
    """That of all samples."""
    return float(sizes(residual).square().mean().sqrt())


@dataclass(eq=False)
class Run:
    """The states and outputs of a run, kept for others that begin like it."""

    tableau: Tableau
    states: list[State]
    outputs: list[Tensor]

    def shared(self, other: Tableau) -> int:
        """How many evaluations another tableau begins with at the same states."""
        mine, nodes = self.tableau, self.tableau.nodes
        begun = other.start(self.states[0].x[:0])
        if other.memory != mine.memory or (begun.anchor is None) != (self.states[0].anchor is None):
            return 0  # its states hold something else
        for i in range(len(mine.update)):
            if nodes.t[i] != other.nodes.t[i]:
                return i
            if any(not torch.equal(getattr(mine, name)[i], getattr(other, name)[i]) for name in ("record", "update", "bias")):
                return i + 1
        return len(mine.update)


@dataclass(eq=False)
class Ends:
    """Noises with the ends of their exact trajectories.

    Args:
        x: the start ``[B, *D]``.
        exact: the ends of the exact trajectories, ``[B, *D]``.
        evaluations: of the network so far, in samples.
    """

    denoiser: Denoiser
    x: Tensor
    exact: Tensor
    cond: Cond = None
    evaluations: int = 0

    @torch.no_grad()
    def run(self, tableau: Tableau, base: Run | None = None) -> tuple[Tensor, Run]:
        """Samples minus exact ends ``[B, *D]``, and the run; the part that it shares with ``base`` is not run again.

        Raises:
            ModelError: the network is not finite.
        """
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
            raise ModelError(f"the samples on the grid {[round(t, 4) for t in tableau.nodes.t.tolist()]} are not finite: check the network")
        return end - self.exact, Run(tableau, states, outputs)


@dataclass(frozen=True)
class Objective:
    """Mean over samples of ``sqrt(|R_b|^2 + c^2)``, with the weights of its least squares.

    A few samples that lie between two pictures have errors many times the others' on any schedule; squares would be about them alone.
    """

    c: float

    def __call__(self, sizes: Tensor) -> float:
        """``sizes [B]`` are those of this process; the mean is over all processes."""
        return mean_over_processes((sizes**2 + self.c**2).sqrt())

    def weights(self, residual: Tensor) -> Tensor:
        """``[B * dim]``."""
        return ((sizes(residual) ** 2 + self.c**2) ** -0.5).repeat_interleave(residual[0].numel())


def mean_over_processes(values: Tensor) -> float:
    """Of the numbers ``[n]`` of all processes."""
    total, count = sum_over_processes(torch.stack([values.sum().double(), torch.tensor(len(values)).double()])).tolist()
    return total / count


Move = Callable[[], tuple[Tableau, float] | None]


@dataclass(frozen=True)
class Moves:
    """How a tableau may change, number by number, each in a unit of its own in which a step of 1 is a large one.

    Attributes:
        each: gives the tableau with one number moved, and how far; None if it cannot move.
        together: all numbers moved, so far each; None if that is no tableau.
    """

    each: Sequence[Move]
    together: Callable[[Tensor], Any]


class Movable(Protocol):
    """A tableau with free numbers."""

    @property
    def tableau(self) -> Tableau: ...

    def moves(self, runs: Sequence[Run], size: float) -> Moves:
        """From here; ``runs`` are those of the noises looked at, ``size`` the RMS of their errors."""
        ...


M = TypeVar("M", bound=Movable)


def descend(
    windows: Sequence[Sequence[Ends]],
    start: M,
    *,
    iterations: int,
    evaluations: int = 10**12,
    steps: int = 1,
    observe: Callable[[int, float], None] | None = None,
) -> M:
    """Where Levenberg-Marquardt gets to from ``start``.

    Args:
        windows: batches of noises, in windows: each iteration looks at the next window for its Jacobian, and at all for its trials.
        evaluations: no iteration begins after so many, in samples.
        steps: with one Jacobian, the later ones on its residuals where the earlier led.
        observe: called after each iteration with its number and the objective.
    """

    def spent() -> float:
        return float(sum_over_processes(torch.tensor(float(sum(batch.evaluations for window in windows for batch in window)))))

    def measure(trial: Movable, window: int) -> tuple[float, Tensor, list[tuple[Tensor, Run]]]:
        """The objective, the sizes of the errors of this process, and the runs of one window."""
        found, kept = [], []
        try:
            for number, group in enumerate(windows):
                runs = [batch.run(trial.tableau) for batch in group]
                found += [sizes(residual) for residual, _ in runs]
                kept = runs if number == window else kept
        except ModelError:
            if trial is start:
                raise
            found = [torch.full((len(batch.x),), torch.inf) for group in windows for batch in group]  # too far
        made = torch.cat(found)
        return objective(made), made, kept

    objective = Objective(0.0)
    _, made, kept = measure(start, 0)
    objective = Objective(mean_over_processes(made.median().expand(len(made))) + 1e-30)  # without errors its weights are finite too
    here, best, damping, limit = start, objective(made), DAMPING, spent() + evaluations
    past = list[float]()
    for iteration in range(iterations):
        past.append(best)
        window = iteration % len(windows)
        moves, jacobians = _jacobians(windows[window], kept, here)
        if not moves.each:
            break
        far = torch.zeros(len(moves.each), dtype=torch.float64)
        for number in range(steps):
            normal, slope = _equations(jacobians, [residual for residual, _ in kept], objective)
            scale = torch.diag(normal.diagonal().clamp_min(1e-12 * float(normal.diagonal().max()) + 1e-30))
            before = best
            for _ in range(TRIALS if number == 0 else 1):
                step = torch.linalg.solve(normal + damping * scale, -slope)
                trial = moves.together(far + step)
                value, _, runs = (best, made, kept) if trial is None else measure(trial, window)
                if trial is not None and value < best:
                    here, best, kept, far = trial, value, runs, far + step
                    damping /= 10
                    break
                damping *= 10
            if best > before * (1 - ENOUGH):
                break
        if len(windows) > 1:
            kept = [batch.run(here.tableau) for batch in windows[(iteration + 1) % len(windows)]]
        if observe is not None:
            observe(iteration + 1, best)
        if (len(past) >= len(windows) and best > past[-len(windows)] * (1 - ENOUGH)) or spent() > limit:
            break
    return here


def _jacobians(window: Sequence[Ends], kept: Sequence[tuple[Tensor, Run]], here: Movable) -> tuple[Moves, list[Tensor]]:
    """What can be moved, and ``dR/dtheta [B * dim, P]`` of each batch, zero where nothing moves."""
    size = mean_over_processes(torch.cat([sizes(residual) for residual, _ in kept]).square()) ** 0.5
    moves = here.moves([run for _, run in kept], size)
    made = []
    for batch, (residual, run) in zip(window, kept, strict=True):
        jacobian = torch.zeros(residual.numel(), len(moves.each), dtype=torch.float64)
        for k, move in enumerate(moves.each):
            moved = move()
            if moved is not None:
                changed, _ = batch.run(moved[0], run)
                jacobian[:, k] = ((changed - residual) / moved[1]).double().cpu().flatten()
        made.append(jacobian)
    return moves, made


def _equations(jacobians: Sequence[Tensor], residuals: Sequence[Tensor], objective: Objective) -> tuple[Tensor, Tensor]:
    """``J' W J`` and ``J' W R``."""
    normal, slope = 0, 0
    for jacobian, residual in zip(jacobians, residuals, strict=True):
        weighted = objective.weights(residual)[:, None] * jacobian
        normal = normal + weighted.T @ jacobian
        slope = slope + weighted.T @ residual.double().cpu().flatten()
    assert isinstance(normal, Tensor) and isinstance(slope, Tensor)  # a window has a batch
    return sum_over_processes(normal), sum_over_processes(slope)
