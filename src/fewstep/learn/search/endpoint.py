r"""Least squares on the endpoints of samples: Levenberg-Marquardt on any numbers of a sampler, its levels or its coefficients.

With ``R(theta) [B, *D]`` the samples from fixed noises minus the ends of their exact trajectories, Levenberg-Marquardt minimises the size
of ``R`` over the free numbers ``theta``. A column of the Jacobian ``J`` is a difference, and costs only the evaluations after the row that
changed: half a run on average. A Jacobian serves several steps: each run corrects it by the change that it really saw,

    J <- J + (R(theta + d) - R(theta) - J d) m' / (m' d),      m = diag(J'WJ) d       (Broyden, 1965),

without an evaluation more. Least squares reads ``J'WJ`` and ``J'WR`` alone, sums over noises, which may come in batches and from several
processes; of large samples it reads a random part of their numbers, so that memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
    "Point",
    "TableauPoint",
    "levenberg_marquardt",
    "mean_over_processes",
    "per_sample_rmse",
    "rms",
]

DAMPING = 0.1  # to begin with, relative to the Jacobian; ten times more after a step that failed, less after one that did not
LEAST = 1e-4  # damping
FAILURES = 3  # steps in a row without a gain, after which a Jacobian is given up
ENOUGH = 0.003  # relative gain of a Jacobian below which it was the last; of a step, below which it counts as a failure
NUMBERS = 2**25  # of a Jacobian in memory, at most


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
    _first: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False)  # outputs at the start, by time: all runs share them

    @torch.no_grad()
    def run(self, tableau: Tableau, base: CachedRun | None = None) -> tuple[Tensor, CachedRun]:
        """Run a tableau and return samples minus exact endpoints ``[B, *D]``, and the run.

        Args:
            tableau: the sampler.
            base: a run whose states and outputs are reused, up to where the two tableaus differ.

        Raises:
            ModelError: an output of the network, or a sample, is not finite.
        """
        begin, done = float(tableau.nodes.t[0]), 0 if base is None else base.shared(tableau)
        states = [tableau.start(self.x)] if base is None or not done else base.states[:done]
        outputs = [] if base is None else base.outputs[:done]
        if not done and begin in self._first:
            done, outputs = 1, [self._first[begin]]
        if done:  # the output at the last state that both have is known too
            states.append(advance(tableau.rows(self.x)[done - 1], states[-1], outputs[-1]))
        for step in steps(self.denoiser, tableau, self.x, self.cond, resume=(done, states[-1])):
            outputs.append(step.x0)
            states.append(step.state)
            self.evaluations += len(self.x)
        self._first[begin] = outputs[0]
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

    def weights(self, errors: Tensor) -> Tensor:
        """Return the weight of each sample, ``[B]``."""
        return (errors**2 + self.c**2) ** -0.5


def mean_over_processes(values: Tensor) -> float:
    """Return the mean of the numbers ``[n]`` of all processes (all-reduce)."""
    total, count = sum_over_processes(torch.stack([values.sum().double(), torch.tensor(len(values)).double()])).tolist()
    return total / count


class Point(Protocol):
    """Samples from fixed noises as a function of free numbers, each in a unit in which a step of 1 is a large one, at one value of them."""

    @property
    def residuals(self) -> Sequence[Tensor]:
        """Samples minus exact endpoints of each batch of this process's noises, ``[b, *D]``."""
        ...

    @property
    def evaluations(self) -> int:
        """The network evaluations of this process so far, in samples, of all points that began with the same noises."""
        ...

    @property
    def size(self) -> int:
        """The number of free numbers."""
        ...

    def columns(self) -> Iterator[Sequence[Tensor] | None]:
        """Yield the derivative of the residuals by each free number; None for one that cannot change."""
        ...

    def moved(self, delta: Tensor) -> Any:  # noqa: ANN401 - a point of the same kind
        """Return the point with all numbers changed by ``delta [size]``; None where that is infeasible.

        Raises:
            ModelError: its samples are not finite.
        """
        ...


P = TypeVar("P", bound=Point)


def levenberg_marquardt(
    start: P,
    *,
    iterations: int,
    steps_each: int = 1,
    evaluations: int = 10**12,
    observe: Callable[[int, float], None] | None = None,
) -> P:
    """Minimise the endpoint error by Levenberg-Marquardt, starting from ``start``.

    Args:
        start: the point to improve.
        iterations: largest number of Jacobians.
        steps_each: largest number of steps with one Jacobian, which each of them corrects.
        evaluations: number of network evaluations, in samples, after which no iteration begins.
        observe: called after each iteration with its number and the objective.

    Raises:
        ModelError: the network is not finite at the start.
    """

    def spent() -> float:
        return float(sum_over_processes(torch.tensor(float(start.evaluations))))

    errors = _errors(start)
    objective = _Objective(float(torch.cat(gather(errors)).median()) + 1e-30)  # without errors its weights are finite too
    here: P = start
    best, damping, limit = objective(errors), DAMPING, spent() + evaluations
    for iteration in range(iterations):
        if not here.size:
            break
        before, origin, delta = best, here, torch.zeros(here.size, dtype=torch.float64)
        jacobian, failures = _Jacobian(origin), 0
        for _ in range(steps_each):
            step, slope = jacobian.step(objective, _errors(here), damping)
            trial, value = _tried(origin, delta + step, objective)
            if trial is not None:
                jacobian.correct(trial, step, slope, keep=value < best)
            if trial is not None and value < best:
                failures = 0 if value < best * (1 - ENOUGH) else failures + 1
                here, best, delta, damping = trial, value, delta + step, max(damping / 10, LEAST)
            else:
                failures, damping = failures + 1, damping * 10
            if failures >= FAILURES:
                break
        if observe is not None:
            observe(iteration + 1, best)
        if best > before * (1 - ENOUGH) or spent() > limit:
            break
    return here


def _errors(point: Point) -> Tensor:
    """Return the errors of this process's samples, ``[n]``."""
    return torch.cat([per_sample_rmse(residual) for residual in point.residuals])


def _tried(origin: P, delta: Tensor, objective: _Objective) -> tuple[P | None, float]:
    """Return a trial and its objective; infinite in all processes where a sample of one is not finite or the step is infeasible."""
    try:
        trial = origin.moved(delta)
        errors = None if trial is None else _errors(trial)
    except ModelError:  # too far
        trial = errors = None
    failed = float(sum_over_processes(torch.tensor(float(errors is None))))
    return (None, torch.inf) if failed or errors is None else (trial, objective(errors))


class _Jacobian:
    """The Jacobian of this process's residuals at some of their numbers, ``[n, m, P]``, and those residuals ``[n, m]``."""

    def __init__(self, point: Point) -> None:
        count, dim = sum(map(len, point.residuals)), point.residuals[0][0].numel()
        most = NUMBERS // (point.size * int(sum_over_processes(torch.tensor(float(count))))) + 1
        generator = torch.Generator().manual_seed(0)
        self.places = None if most >= dim else torch.randperm(dim, generator=generator)[:most].sort().values
        self.residual = self._at(point.residuals)
        self.matrix = torch.zeros(*self.residual.shape, point.size, dtype=torch.float64)
        for k, column in enumerate(point.columns()):
            if column is not None:
                self.matrix[..., k] = self._at(column)

    def _at(self, values: Sequence[Tensor]) -> Tensor:
        flat = [value.flatten(1) for value in values]
        chosen = flat if self.places is None else [value[:, self.places.to(value.device)] for value in flat]
        return torch.cat([value.double().cpu() for value in chosen])

    def step(self, objective: _Objective, errors: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """Return the step of damped least squares ``[P]``, and the metric's product ``m [P]`` with it."""
        weights, across = objective.weights(errors), self.matrix.mT
        normal = sum_over_processes(torch.einsum("n,npq->pq", weights, across @ self.matrix))
        slope = sum_over_processes(torch.einsum("n,np->p", weights, (across @ self.residual[..., None]).squeeze(-1)))
        scale = normal.diagonal().clamp_min(1e-12 * float(normal.diagonal().max()) + 1e-30)
        step = torch.linalg.solve(normal + damping * torch.diag(scale), -slope)
        return step, scale * step

    def correct(self, trial: Point, step: Tensor, metric: Tensor, *, keep: bool) -> None:
        """Correct the matrix by the residuals of a trial (Broyden), and go on from them if they are the better ones."""
        residual, along = self._at(trial.residuals), float(metric @ step)
        if along > 0:
            missed = residual - self.residual - self.matrix @ step
            self.matrix.baddbmm_(missed[..., None], (metric / along).expand(len(missed), 1, -1))
        if keep:
            self.residual = residual


# -- the free numbers of a tableau ------------------------------------------------------------------------------------

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


@dataclass(eq=False)
class TableauPoint:
    """An adjustable tableau as a `Point`, run on batches of noises."""

    batches: Sequence[EndpointError]
    here: Any  # an Adjustable
    residuals: Sequence[Tensor]
    runs: Sequence[CachedRun]
    _free: Parameters | None = None

    @classmethod
    def at(cls, batches: Sequence[EndpointError], here: Adjustable) -> TableauPoint:
        """Run a tableau.

        Raises:
            ModelError: an output of the network, or a sample, is not finite.
        """
        made = [batch.run(here.tableau) for batch in batches]
        return cls(batches, here, [residual for residual, _ in made], [run for _, run in made])

    @property
    def evaluations(self) -> int:
        """The network evaluations so far, in samples."""
        return sum(batch.evaluations for batch in self.batches)

    @property
    def free(self) -> Parameters:
        """The free numbers here."""
        if self._free is None:
            free: Parameters = self.here.parameters(self.runs, mean_over_processes(_errors(self).square()) ** 0.5)
            self._free = free
        return self._free

    @property
    def size(self) -> int:
        """The number of free numbers."""
        return len(self.free.perturb)

    def columns(self) -> Iterator[Sequence[Tensor] | None]:
        """Yield differences of the residuals, from runs that share their prefix with the one here."""
        for perturb in self.free.perturb:
            changed = perturb()
            if changed is None:
                yield None
            else:
                ends = [batch.run(changed[0], run)[0] for batch, run in zip(self.batches, self.runs, strict=True)]
                yield [(end - residual) / changed[1] for end, residual in zip(ends, self.residuals, strict=True)]

    def moved(self, delta: Tensor) -> TableauPoint | None:
        """Run the tableau with all numbers changed."""
        moved = self.free.step(delta)
        return None if moved is None else self.at(self.batches, moved)
