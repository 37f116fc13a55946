r"""A learned solver as numbers: a tableau, and the times that the network is told where those are learned apart from the levels.

Most rivals are one more parametrisation of the same affine map. With ``x_T`` the start and ``D_j`` the denoiser's answers,

    x_{i+1} = start_i x_T + sum_{j<=i} answers_ij D_j,

which `tableau_of` writes as a `Tableau`, so that fewstep's loop and kernel run it. All of it is differentiable.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.first_answer import FirstAnswer
from fewstep.core.prediction import from_x0, to_x0
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Tableau, tabulate
from fewstep.models.problem import Problem
from fewstep.runtime.errors import SolverError
from fewstep.sampling.loop import steps
from fewstep.solvers import make_solver

Carried = Literal["epsilon", "sample"]


class Drawn(NamedTuple):
    """A solver as numbers that gradients reach.

    Attributes:
        tableau: the numbers.
        told: the time ``[]`` that the network is told at each evaluation, so that none but learned ones need a gradient; by default that of
            the tableau.
        carried: what of an answer at the told time holds at the tableau's own: the noise, or the clean image.
    """

    tableau: Tableau
    told: tuple[Tensor, ...] | None = None
    carried: Carried = "epsilon"


class LearnedSampler(Protocol):
    """A sampler that was learned, whether or not a tableau holds it."""

    @property
    def nfe(self) -> int:
        """Network evaluations of one sample."""
        ...

    @property
    def ends(self) -> Tensor:
        """The first and the last time, ``[2]``."""
        ...

    def samples(self, denoiser: Denoiser, x: Tensor, cond: Cond) -> Tensor:
        """Sample from ``x [B, *D]`` at the first time to the last, ``[B, *D]``."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return its numbers by name."""
        ...


class _Told:
    """A denoiser that is told other times than the loop's, for one run."""

    def __init__(self, denoiser: Denoiser, drawn: Drawn) -> None:
        self.denoiser, self.carried, self.told = denoiser, drawn.carried, drawn.told
        self.call = int(drawn.tableau.first is not None)  # the first answer is not asked for

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        assert self.told is not None  # `run_drawn` wraps those alone
        told, law = self.told[self.call], self.schedule
        self.call += 1
        answer = self.denoiser(x, told, cond)
        if self.carried == "sample":
            return answer
        eps = from_x0("epsilon", answer, x, law.alpha(told), law.sigma(told))
        return to_x0("epsilon", eps, x, law.alpha(t), law.sigma(t))


def run_drawn(denoiser: Denoiser, drawn: Drawn, x: Tensor, cond: Cond = None) -> Tensor:
    """Run a drawn solver by fewstep's loop from ``x [B, *D]`` and return the samples ``[B, *D]``; gradients reach its numbers and ``x``."""
    end = x
    told = denoiser if drawn.told is None else _Told(denoiser, drawn)
    for step in steps(told, drawn.tableau, x, cond):
        end = step.x_next
    return end


def tableau_of(nodes: Nodes, start: Tensor, answers: Tensor, first: FirstAnswer | None = None) -> Tableau:
    """Return the tableau of ``x_{i+1} = start_i x_T + sum_{j<=i} answers_ij D_j``.

    Its anchor is the start, and its history all answers.

    Args:
        nodes: of the ``N`` evaluations and the end.
        start: weights of the start, ``[N]``.
        answers: weights of the answers, ``[N, N]``, lower triangular.
        first: the first answer, if it is foreseen.
    """
    count = len(start)
    update = torch.zeros(count, 2, 2 + count, dtype=torch.float64)
    update[:, 0, 0] = 1
    rows = []
    for i in range(count):
        newest_first = answers[i, : i + 1].flip(0)
        rows.append(torch.cat([start[i : i + 1], torch.zeros(1, dtype=torch.float64), newest_first, torch.zeros(count - 1 - i).double()]))
    update = torch.stack([update[:, 0], torch.stack(rows)], 1)
    record = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(count, 2)
    zeros = torch.zeros(count, 2, dtype=torch.float64)
    return Tableau(nodes, record, update, zeros, torch.zeros(count, dtype=torch.float64), first)


def solver_on(name: str, schedule: NoiseSchedule, t: Tensor) -> Tableau:
    """Return a solver of this library, by name, on the times ``t [M+1]``; differentiable in them."""
    solver = make_solver(name)
    if solver.stages != 1:
        raise SolverError(f"{name} makes {solver.stages} evaluations in each step: name one that makes one")
    return tabulate(solver, Nodes.at(schedule, t))


def steps_of(tableau: Tableau) -> tuple[Tensor, Tensor]:
    """Return ``ratio [N]`` and ``weights [N, K]`` of a solver whose steps are ``x_{i+1} = ratio_i x_i + sum_k weights_ik D_{i-k}``.

    Raises:
        SolverError: the solver is of another form.
    """
    update, record = tableau.update, tableau.record
    plain = bool((record[:, 0] == 0).all()) and bool((record[:, 1] == 1).all())
    if not plain or bool((update[:, 1, 0] != 0).any()) or tableau.stochastic or tableau.element:
        raise SolverError("this solver does not step by its last state and the denoiser's answers alone: start from one of DPM-Solver++")
    return update[:, 1, 1], update[:, 1, 2:]


def unrolled(ratio: Tensor, weights: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``start [N]`` and ``answers [N, N]`` of steps ``x_{i+1} = ratio_i x_i + sum_k past_ik x_{i-1-k} + sum_k weights_ik D_{i-k}``.

    Args:
        ratio: weights of the last state, ``[N]``.
        weights: of the answers, newest first, ``[N, K]``.
        past: of the states before the last, newest first, ``[N, K - 1]``; by default none.
    """
    count = len(ratio)
    units = torch.eye(1 + count, dtype=torch.float64)
    states = [units[0]]
    for i in range(count):
        x = ratio[i] * states[i]
        for k in range(min(weights.shape[1], i + 1)):
            x = x + weights[i, k] * units[1 + i - k]
        for k in range(0 if past is None else min(past.shape[1], i)):
            assert past is not None
            x = x + past[i, k] * states[i - 1 - k]
        states.append(x)
    made = torch.stack(states[1:])
    return made[:, 0], made[:, 1:]


@dataclass(frozen=True, eq=False)
class DrawnSampler:
    """A drawn solver after it was learned.

    Attributes:
        drawn: its numbers.
    """

    drawn: Drawn

    @classmethod
    def of(cls, drawn: Drawn) -> DrawnSampler:
        """Return a sampler with the numbers as they are now."""
        table = drawn.tableau
        nodes = Nodes(*(part.detach().clone() for part in table.nodes))
        record, update, bias, noise = (part.detach().clone() for part in (table.record, table.update, table.bias, table.noise))
        told = None if drawn.told is None else tuple(time.detach().clone() for time in drawn.told)
        return cls(Drawn(Tableau(nodes, record, update, bias, noise, table.first), told, drawn.carried))

    @property
    def nfe(self) -> int:
        return self.drawn.tableau.evaluations

    @property
    def ends(self) -> Tensor:
        return self.drawn.tableau.nodes.t[[0, -1]]

    @torch.no_grad()
    def samples(self, denoiser: Denoiser, x: Tensor, cond: Cond) -> Tensor:
        return run_drawn(denoiser, self.drawn, x, cond)

    def tensors(self) -> dict[str, Tensor]:
        table = self.drawn.tableau
        made = {"t": table.nodes.t, "record": table.record.contiguous(), "update": table.update}
        return made if self.drawn.told is None else {**made, "told": torch.stack(self.drawn.told)}


def fingerprint(sampler: LearnedSampler) -> str:
    """Return the hash of a sampler's numbers."""
    digest = hashlib.sha256()
    for name, value in sorted(sampler.tensors().items()):
        digest.update(name.encode() + value.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def analytical_first(problem: Problem, t: Tensor) -> FirstAnswer:
    """Return the first answer of a unit Gaussian without its mean, ``D = x (1 - s / sqrt(1 + s^2)) / alpha``, for nothing.

    It is the "analytical first step" of AMED-Solver (arXiv 2312.00094), whose direction is ``x / sqrt(1 + s^2)``.
    """
    schedule, shape = problem.schedule, problem.shape
    channels, frequencies = shape[0], max(1, torch.Size(shape[1:]).numel())
    gain = unit_gain(schedule, t) * schedule.sigma(t)
    response = (gain * torch.eye(channels, dtype=torch.float64)).expand(frequencies, channels, channels)
    classes = problem.model.classes
    return FirstAnswer(torch.zeros(classes or 1, *shape, dtype=torch.float64), response, classes is not None)


def unit_gain(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Return the factor ``[]`` of the state in the answer of `analytical_first` at time ``t``."""
    level = torch.exp(-schedule.lam(t))
    return (1 - level / torch.sqrt(1 + level**2)) / schedule.alpha(t)
