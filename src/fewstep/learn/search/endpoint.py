r"""Least squares on the endpoints of samples: Levenberg-Marquardt on any numbers of a tableau, its levels or its coefficients.

With ``R(theta) [B, *D]`` the samples from fixed noises minus the ends of their exact trajectories, Levenberg-Marquardt minimises the size
of ``R`` over the free numbers ``theta``. A column of the Jacobian is a difference, and costs only the evaluations after the row that
changed: half a run on average. Everything it stores is a sum over noises, so they may come in batches and from several processes.
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
from fewstep.runtime.process import gather, sum_over_processes
from fewstep.sampling.loop import steps

__all__ = [
    "Adjustable",
    "CachedRun",
    "EndpointError",
    "Parameters",
    "Perturbation",
    "levenberg_marquardt",
    "mean_over_processes",
    "per_sample_rmse",
    "rms",
]

DAMPING = 0.1  # to begin with, relative to the Jacobian; ten times more after a step that failed, less after one that did not
TRIALS = 5  # lengths tried for a step with a new Jacobian
ENOUGH = 0.003  # relative gain, of as many iterations as there are windows, below which they were the last


def per_sample_rmse(residual: Tensor) -> Tensor:
    """Return the root mean square of each sample's error, ``[B, *D] -> [B]`` float64 on the CPU."""
    return residual.double().cpu().flatten(1).square().mean(1).sqrt()


def rms(residual: Tensor) -> float:
    """Return the RMSE over all samples."""
    return float(per_sample_rmse(residual).square().mean().sqrt())


@dataclass(eq=False)
class CachedRun:
    """Cached states and outputs of one run, so that a run sharing its prefix need not recompute it."""

    tableau: Tableau
    states: list[State]
    outputs: list[Tensor]

    def shared(self, other: Tableau) -> int:
        """Return how many evaluations another tableau makes at the same states before it differs."""
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
class EndpointError:
    """The error of a tableau's samples against the endpoints of the exact trajectories from the same noises.

    Attributes:
        denoiser: the model.
        x: the start ``[B, *D]``.
        exact: the exact endpoints ``[B, *D]``.
        cond: handed to the denoiser.
        evaluations: network evaluations so far, in samples.
    """

    denoiser: Denoiser
    x: Tensor
    exact: Tensor
    cond: Cond = None
    evaluations: int = 0

    @torch.no_grad()
    def run(self, tableau: Tableau, base: CachedRun | None = None) -> tuple[Tensor, CachedRun]:
        """Run a tableau and return samples minus exact endpoints ``[B, *D]``, and the run.

        Args:
            tableau: the sampler.
            base: a run whose states and outputs are reused, up to where the two tableaus differ.

        Raises:
            ModelError: an output of the network, or a sample, is not finite.
        """
        done = 0 if base is None else base.shared(tableau)
        states = [tableau.start(self.x)] if base is None or not done else base.states[:done]
        outputs = [] if base is None else base.outputs[:done]
        if done:  # the output at the last state that both have is known too
            states.append(advance(tableau.rows(self.x)[done - 1], states[-1], outputs[-1]))
        for step in steps(self.denoiser, tableau, self.x, self.cond, resume=(done, states[-1])):
            outputs.append(step.x0)
            states.append(step.state)
            self.evaluations += len(self.x)
        end = states[-1].x
        if not bool(torch.isfinite(end).all()):
            grid = [round(t, 4) for t in tableau.nodes.t.tolist()]
            raise ModelError(f"the samples on the grid {grid} are not finite, though the network's outputs are: too large coefficients")
        return end - self.exact, CachedRun(tableau, states, outputs)


@dataclass(frozen=True)
class _Objective:
    """Mean over samples of ``sqrt(|R_b|^2 + c^2)``, with the weights of its least squares.

    A few samples that lie between two pictures have errors many times the others' on any schedule, and would dominate a sum of squares.
    """

    c: float

    def __call__(self, errors: Tensor) -> float:
        """Return the mean over all processes, from the errors ``[B]`` of this one's samples."""
        return mean_over_processes((errors**2 + self.c**2).sqrt())

    def weights(self, residual: Tensor) -> Tensor:
        """Return the weight of each number of a residual, ``[B, *D] -> [B * dim]``."""
        return ((per_sample_rmse(residual) ** 2 + self.c**2) ** -0.5).repeat_interleave(residual[0].numel())


def mean_over_processes(values: Tensor) -> float:
    """Return the mean of the numbers ``[n]`` of all processes (all-reduce)."""
    total, count = sum_over_processes(torch.stack([values.sum().double(), torch.tensor(len(values)).double()])).tolist()
    return total / count


Perturbation = Callable[[], tuple[Tableau, float] | None]


@dataclass(frozen=True)
class Parameters:
    """The free numbers of a tableau, each in a unit of its own in which a step of 1 is a large one.

    Attributes:
        perturb: for each number, the tableau with it alone changed, and by how much; None if it cannot change.
        step: the tableau with all numbers changed by ``delta [P]``, as an `Adjustable`; None if the result is infeasible.
    """

    perturb: Sequence[Perturbation]
    step: Callable[[Tensor], Any]


class Adjustable(Protocol):
    """A tableau with free numbers."""

    @property
    def tableau(self) -> Tableau: ...

    def parameters(self, runs: Sequence[CachedRun], size: float) -> Parameters:
        """Return the free numbers, from the runs of some noises and the RMS ``size`` of their errors."""
        ...


A = TypeVar("A", bound=Adjustable)


def levenberg_marquardt(
    windows: Sequence[Sequence[EndpointError]],
    start: A,
    *,
    iterations: int,
    evaluations: int = 10**12,
    steps_each: int = 1,
    observe: Callable[[int, float], None] | None = None,
) -> A:
    """Minimise the endpoint error by Levenberg-Marquardt, starting from ``start``.

    Args:
        windows: groups of batches of noises: each iteration computes its Jacobian on the next group, and judges its trials on all.
        start: the tableau to improve.
        iterations: largest number of iterations.
        evaluations: number of network evaluations, in samples, after which no iteration begins.
        steps_each: number of steps with one Jacobian, each on the residuals that the one before it left.
        observe: called after each iteration with its number and the objective.

    Raises:
        ModelError: the network is not finite at the start.
    """

    def spent() -> float:
        return float(sum_over_processes(torch.tensor(float(sum(batch.evaluations for window in windows for batch in window)))))

    def measure(trial: Adjustable, window: int) -> tuple[float, Tensor, list[tuple[Tensor, CachedRun]]]:
        """Return the objective, the errors of this process's samples, and the runs of one window."""
        found, cached = [], []
        try:
            for number, group in enumerate(windows):
                runs = [batch.run(trial.tableau) for batch in group]
                found += [per_sample_rmse(residual) for residual, _ in runs]
                cached = runs if number == window else cached
        except ModelError:
            if trial is start:
                raise
            found = [torch.full((len(batch.x),), torch.inf) for group in windows for batch in group]  # too far
        made = torch.cat(found)
        return objective(made), made, cached

    objective = _Objective(0.0)
    _, made, cached = measure(start, 0)
    objective = _Objective(float(torch.cat(gather(made)).median()) + 1e-30)  # without errors its weights are finite too
    here, best, damping, limit = start, objective(made), DAMPING, spent() + evaluations
    past = list[float]()
    for iteration in range(iterations):
        past.append(best)
        window = iteration % len(windows)
        free, jacobians = _jacobians(windows[window], cached, here)
        if not free.perturb:
            break
        delta = torch.zeros(len(free.perturb), dtype=torch.float64)
        for number in range(steps_each):
            normal, slope = _equations(jacobians, [residual for residual, _ in cached], objective)
            scale = torch.diag(normal.diagonal().clamp_min(1e-12 * float(normal.diagonal().max()) + 1e-30))
            before = best
            for _ in range(TRIALS if number == 0 else 1):
                step = torch.linalg.solve(normal + damping * scale, -slope)
                trial = free.step(delta + step)
                value, _, runs = (best, made, cached) if trial is None else measure(trial, window)
                if trial is not None and value < best:
                    here, best, cached, delta = trial, value, runs, delta + step
                    damping /= 10
                    break
                damping *= 10
            if best > before * (1 - ENOUGH):
                break
        if len(windows) > 1:
            cached = [batch.run(here.tableau) for batch in windows[(iteration + 1) % len(windows)]]
        if observe is not None:
            observe(iteration + 1, best)
        if (len(past) >= len(windows) and best > past[-len(windows)] * (1 - ENOUGH)) or spent() > limit:
            break
    return here


def _jacobians(
    window: Sequence[EndpointError], cached: Sequence[tuple[Tensor, CachedRun]], here: Adjustable
) -> tuple[Parameters, list[Tensor]]:
    """Return the free numbers, and ``dR/dtheta [B * dim, P]`` of each batch, zero for a number that cannot change."""
    size = mean_over_processes(torch.cat([per_sample_rmse(residual) for residual, _ in cached]).square()) ** 0.5
    free = here.parameters([run for _, run in cached], size)
    made = []
    for batch, (residual, run) in zip(window, cached, strict=True):
        jacobian = torch.zeros(residual.numel(), len(free.perturb), dtype=torch.float64)
        for k, perturb in enumerate(free.perturb):
            perturbed = perturb()
            if perturbed is not None:
                changed, _ = batch.run(perturbed[0], run)
                jacobian[:, k] = ((changed - residual) / perturbed[1]).double().cpu().flatten()
        made.append(jacobian)
    return free, made


def _equations(jacobians: Sequence[Tensor], residuals: Sequence[Tensor], objective: _Objective) -> tuple[Tensor, Tensor]:
    """Return ``J' W J`` and ``J' W R``, summed over batches and processes."""
    normal, slope = 0, 0
    for jacobian, residual in zip(jacobians, residuals, strict=True):
        weighted = objective.weights(residual)[:, None] * jacobian
        normal = normal + weighted.T @ jacobian
        slope = slope + weighted.T @ residual.double().cpu().flatten()
    assert isinstance(normal, Tensor) and isinstance(slope, Tensor)  # a window has a batch
    return sum_over_processes(normal), sum_over_processes(slope)
