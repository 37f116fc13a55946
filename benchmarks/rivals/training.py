r"""Descend the distance between a solver's samples and the teacher's ends: the loop that most rivals share.

LD3 and S4S descend the relaxed objective ``min |Psi(x') - Phi(x_T)|^2`` over ``x'`` in a small ball around ``x_T`` too: a solver of few
numbers cannot carry every noise to its own end, but a near one (arXiv 2405.15506, eq. 8; 2502.17423, eq. 9). `Ball` keeps these ``x'``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from benchmarks.rivals.drawn import Drawn, run_drawn
from benchmarks.rivals.rival import Note, Point
from benchmarks.rivals.teacher import FIRST, HELD_OUT, Cost, Pairs, Teacher
from torch import Tensor, nn
from torch.optim import Optimizer

from fewstep.runtime.errors import FewstepError

CHECKS = 50  # on the held-out noises during one descent
SETTLED = 1e-3  # relative gain on the held-out noises below which nothing was gained
PATIENCE = 5  # checks without a gain, after which a plateau begins
QUIET = 0.25  # of the iterations without a gain, after which a descent ends


class Family(nn.Module):
    """Solvers by free numbers: its parameters are learned, and `drawn` is the solver that they stand for."""

    def drawn(self) -> Drawn:
        """Return the solver here."""
        raise NotImplementedError


@dataclass(eq=False)
class Ball:
    """The starts that the relaxed objective moves, each within ``radius`` of its own noise.

    Attributes:
        near: where they are now, ``[n, *D]``.
        origin: the noises, ``[n, *D]``.
        radius: the largest distance, in units of the noise; 0 moves nothing.
        unit: the size of the noise, ``sigma_T``.
    """

    near: Tensor
    origin: Tensor
    radius: float
    unit: float

    @classmethod
    def around(cls, pairs: Pairs, radius: float, teacher: Teacher) -> Ball:
        """Return balls around the starts of some pairs."""
        unit = float(teacher.schedule.sigma(teacher.schedule.ends[0]))
        return cls(pairs.x.clone(), pairs.x, radius, unit)

    def moved(self, index: Tensor, slope: Tensor) -> Tensor:
        """Return trial starts ``[b, *D]``: half a radius down the slope, and back into the ball."""
        length = slope.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(-1, *[1] * (slope.ndim - 1))
        trial = self.near[index] - 0.5 * self.radius * self.unit * slope / length
        shift = trial - self.origin[index]
        size = shift.flatten(1).norm(dim=1).reshape(length.shape)
        return self.origin[index] + shift * (self.radius * self.unit / size.clamp_min(1e-30)).clamp_max(1)


@dataclass(frozen=True)
class Descent:
    """How a family is descended.

    Attributes:
        iterations: at most.
        batch: pairs of each.
        num, held_out: pairs to learn from, and to choose the best numbers by.
        nfe: evaluations of the teacher's own solver, see `Teacher.pairs`.
        radius: of the relaxed objective's ball, in units of the noise.
        clip: the largest norm of a gradient; None for any.
        average: decay of the running average of the numbers, which then are the ones that are kept; 0 for none.
        plateau: factor of the learning rates where five checks gained nothing, by which the best numbers are put back too; None for a
            cosine to zero.
        told_first: whether the time that the network is told first is learned too.
        seed: of the batches.
    """

    iterations: int
    batch: int
    num: int
    held_out: int
    nfe: int = 64
    radius: float = 0.0
    clip: float | None = None
    average: float = 0.0
    plateau: float | None = None
    told_first: bool = False
    seed: int = 0

    @property
    def every(self) -> int:
        """The iterations between two checks on held-out pairs."""
        return max(1, self.iterations // CHECKS)

    @property
    def checks(self) -> int:
        """The checks on held-out pairs, at most: one before anything, one after everything."""
        return -(-self.iterations // self.every) + 1

    def cost(self, nfe: int) -> Cost:
        """Return the network evaluations with a solver of ``nfe`` evaluations, at most."""
        trials = self.iterations * self.batch * nfe if self.radius else 0
        teacher = (self.num + self.held_out) * self.nfe
        learned = nfe if self.radius or self.told_first else nfe - 1  # the first evaluation depends on nothing that is learned
        noises = self.iterations * self.batch
        return Cost(teacher + self.checks * self.held_out * nfe + trials + noises * (nfe - learned), noises * learned)


@dataclass(eq=False)
class Progress:
    """The best numbers on held-out noises so far, and the curve.

    Attributes:
        curve: the loss of every iteration.
        best: the least loss on held-out noises.
        gained: the iteration that last gained more than a rounding.
        kept: the numbers of the least loss.
    """

    curve: list[Point] = field(default_factory=list)
    best: float = math.inf
    gained: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)

    def check(self, value: float, iteration: int, numbers: nn.Module) -> bool:
        """Keep the numbers if they are the best, and return whether they gained; the first check begins the curve."""
        if not self.curve:
            self.curve.append(Point(0, math.nan, value))
        gained = value < math.inf == self.best or value < self.best - SETTLED * abs(self.best)  # of a logarithm too
        if value < self.best or not self.kept:
            self.best, self.kept = value, copy.deepcopy(numbers.state_dict())
        if gained:
            self.gained = iteration
        return gained


@dataclass(eq=False)
class _Loop:
    """A descent under way."""

    family: Family
    teacher: Teacher
    descent: Descent
    optimizers: Sequence[Optimizer]
    objective: Callable[[Tensor], Tensor]
    extra: Callable[[Tensor, Pairs], Tensor] | None
    pairs: Pairs
    ball: Ball

    def iterate(self, index: Tensor, active: Sequence[Optimizer]) -> float:
        """Take one step of the numbers on some pairs, and one of their starts in the balls.

        Returns:
            The loss before; NaN of a step too far, of which nothing is learned.
        """
        for one in self.optimizers:
            one.zero_grad(set_to_none=True)
        pairs = self.pairs.at(index)
        x = self.ball.near[index].requires_grad_(bool(self.descent.radius))
        try:
            made = self._run(x, pairs)
        except FewstepError:  # samples or coefficients that are not finite: the best numbers are kept, and a plateau puts them back
            return math.nan
        distances = self.teacher.distance(made, pairs.ends)
        loss = self.objective(distances)
        total = loss if self.extra is None else loss + self.extra(made, pairs)
        if not bool(torch.isfinite(total)):
            return math.nan
        total.backward()
        for one in active:
            if self.descent.clip is not None:
                nn.utils.clip_grad_norm_([weight for group in one.param_groups for weight in group["params"]], self.descent.clip)
            one.step()
        if x.grad is not None:
            self._move(index, x.grad, pairs, distances.detach())
        return float(loss.detach())

    def rated(self, share: float, rates: Sequence[Sequence[float]]) -> None:
        """Set the learning rates to a share of the first ones."""
        for one, first in zip(self.optimizers, rates, strict=True):
            for group, rate in zip(one.param_groups, first, strict=True):
                group["lr"] = share * rate

    def _run(self, x: Tensor, pairs: Pairs) -> Tensor:
        return run_drawn(self.teacher.denoiser, self.family.drawn(), x, pairs.cond)

    @torch.no_grad()
    def _move(self, index: Tensor, slope: Tensor, pairs: Pairs, before: Tensor) -> None:
        """Move the starts down their slopes where that brings them closer, judged with the new numbers."""
        trial = self.ball.moved(index, slope)
        try:
            closer = self.teacher.distance(self._run(trial, pairs), pairs.ends) < before
        except FewstepError:
            return
        self.ball.near[index[closer]] = trial[closer]


def descend(
    family: Family,
    teacher: Teacher,
    descent: Descent,
    optimizers: Sequence[Optimizer],
    *,
    active: Callable[[int], Sequence[Optimizer]] | None = None,
    objective: Callable[[Tensor], Tensor] = torch.mean,
    extra: Callable[[Tensor, Pairs], Tensor] | None = None,
    note: Note = lambda text: None,
) -> list[Point]:
    """Descend the distance to the teacher's ends, leave the family at its best numbers on held-out noises, and return the loss curve.

    Args:
        family: the solvers.
        teacher: the model.
        descent: how.
        optimizers: of the family's numbers.
        active: which of them step in an iteration, counted from 1; by default all.
        objective: the loss, of the distances ``[B]`` of a batch.
        extra: another term of the loss, of samples and pairs.
        note: called with a line at every check.
    """
    pairs, others = (teacher.pairs(count, descent.nfe, seed) for count, seed in ((descent.num, FIRST), (descent.held_out, HELD_OUT)))
    loop = _Loop(family, teacher, descent, optimizers, objective, extra, pairs, Ball.around(pairs, descent.radius, teacher))
    average, generator, order = copy.deepcopy(family), torch.Generator().manual_seed(descent.seed), list[int]()
    measured, every = average if descent.average else family, descent.every
    rates = [[group["lr"] for group in one.param_groups] for one in optimizers]
    progress, worse, share = Progress(), 0, 1.0
    progress.check(held_out_loss(measured, teacher, others, objective), 0, measured)
    for i in range(1, descent.iterations + 1):
        while len(order) < descent.batch:
            order += torch.randperm(len(pairs), generator=generator).tolist()
        index, order = torch.tensor(order[: descent.batch]), order[descent.batch :]
        if descent.plateau is None:
            share = 0.5 * (1 + math.cos(math.pi * (i - 1) / descent.iterations))
        loop.rated(share, rates)
        loss, value = loop.iterate(index, optimizers if active is None else active(i)), None
        if descent.average:
            _average(average, family, descent.average, i)
        if i % every == 0 or i == descent.iterations:
            value = held_out_loss(measured, teacher, others, objective)
            worse = 0 if progress.check(value, i, measured) else worse + 1
            note(f"iteration {i} of {descent.iterations}: {value:.4g} on held-out noises")
            if descent.plateau is not None and worse >= PATIENCE:
                worse, share = 0, share * descent.plateau
                family.load_state_dict(progress.kept)
        progress.curve.append(Point(i, loss, value))
        if i - progress.gained > max(QUIET * descent.iterations, PATIENCE * every):
            break
    family.load_state_dict(progress.kept)
    return progress.curve


def _average(average: nn.Module, family: nn.Module, decay: float, i: int) -> None:
    """Move the running average of the numbers towards those of now, faster in the beginning."""
    decay = min(decay, (1 + i) / (10 + i))
    with torch.no_grad():
        for old, new in zip(average.parameters(), family.parameters(), strict=True):
            old.lerp_(new, 1 - decay)


@torch.no_grad()
def held_out_loss(family: Family, teacher: Teacher, pairs: Pairs, objective: Callable[[Tensor], Tensor] = torch.mean) -> float:
    """Return the loss of all of some pairs, at their own starts; infinite where samples are not finite."""
    try:
        drawn, parts = family.drawn(), list[Tensor]()
        for begin in range(0, len(pairs), teacher.batch):
            part = pairs.at(torch.arange(begin, min(begin + teacher.batch, len(pairs))))
            parts.append(teacher.distance(run_drawn(teacher.denoiser, drawn, part.x, part.cond), part.ends))
    except FewstepError:
        return math.inf
    value = float(objective(torch.cat(parts)))
    return value if math.isfinite(value) else math.inf
