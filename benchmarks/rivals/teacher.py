"""What rivals learn from: a teacher's answers, ends and trajectories, with every network evaluation counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Tableau
from fewstep.learn.teacher.trajectories import TrajectorySolver
from fewstep.models.problem import Problem
from fewstep.sampling.loop import run, steps
from fewstep.sampling.reference import reference_sampler
from fewstep.solvers import UniPC

FIRST = 8_000_000  # seed of the first noise to learn from; far from those of benchmarks and of fits
HELD_OUT = 8_900_000  # of the first that a learner never sees


class Cost(NamedTuple):
    """Network evaluations, counted singly: without gradients, and with a gradient through the network, each about 2.5 times as long."""

    forward: int = 0
    gradient: int = 0

    def plus(self, other: Cost) -> Cost:
        """Return the sum."""
        return Cost(self.forward + other.forward, self.gradient + other.gradient)

    @property
    def evaluations(self) -> int:
        """All of them."""
        return self.forward + self.gradient


@dataclass(eq=False)
class Counted:
    """A denoiser that counts its evaluations."""

    denoiser: Denoiser
    cost: Cost = Cost()

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        learning = torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)
        self.cost = self.cost.plus(Cost(gradient=len(x)) if learning else Cost(len(x)))
        return self.denoiser(x, t, cond)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Starts and the ends of their trajectories.

    Attributes:
        x: starts ``[n, *D]``.
        ends: ``[n, *D]``.
        cond: of each, ``[n]``, or None.
    """

    x: Tensor
    ends: Tensor
    cond: Cond

    def __len__(self) -> int:
        return len(self.x)

    def at(self, index: Tensor) -> Pairs:
        """Return some of them."""
        return Pairs(self.x[index], self.ends[index], None if self.cond is None else self.cond[index])


@dataclass(eq=False)
class Teacher:
    """A model to learn a sampler of.

    Attributes:
        problem: the model at its guidance scale.
        features: a network in whose features errors are measured; by default they are measured in pixels.
        batch: samples at a time where no gradient is kept.
    """

    problem: Problem
    features: nn.Module | None = None
    batch: int = 256
    denoiser: Counted = field(init=False)

    def __post_init__(self) -> None:
        self.denoiser = Counted(self.problem.teacher)

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise law."""
        return self.problem.schedule

    @property
    def cost(self) -> Cost:
        """What was spent so far."""
        return self.denoiser.cost

    def distance(self, made: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean square error of each sample ``[B]``, over its numbers or over those of its features."""
        if self.features is not None:
            with torch.no_grad():
                wanted = self.features(wanted)
            made = self.features(made)
        return (made - wanted).square().flatten(1).mean(1)

    def start(self, seeds: Sequence[int]) -> tuple[Tensor, Cond]:
        """Return the starts and the conditions of seeds."""
        return self.problem.start(seeds), self.problem.cond(seeds)

    @torch.no_grad()
    def pairs(self, num: int, nfe: int, first: int = FIRST) -> Pairs:
        """Solve ``num`` trajectories from seeds ``first, ...`` by UniPC-3 of ``nfe`` evaluations on EDM's levels."""
        tableau = reference_sampler(self.schedule, nfe).tableau
        parts = []
        for begin in range(first, first + num, self.batch):
            x, cond = self.start(range(begin, min(begin + self.batch, first + num)))
            parts.append((x, run(self.denoiser, tableau, x, cond), cond))
        cond = None if parts[0][2] is None else torch.cat([part[2] for part in parts])
        return Pairs(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), cond)

    @torch.no_grad()
    def states(self, x: Tensor, cond: Cond, tableau: Tableau, begins: Sequence[int]) -> list[Tensor]:
        """Return the states ``[B, *D]`` before the evaluations ``begins`` of a tableau, and at its end."""
        made, end = [], x
        for step in steps(self.denoiser, tableau, x, cond):
            if step.i in begins:
                made.append(step.x)
            end = step.x_next
        return [*made, end]

    @torch.no_grad()
    def exact_states(self, x: Tensor, cond: Cond, t: Tensor, nfe: int) -> list[Tensor]:
        """Return the states ``[B, *D]`` at the times ``t [M+1]`` on trajectories solved by UniPC-3 of at least ``nfe`` evaluations."""
        solver = TrajectorySolver(self.denoiser, UniPC(steps=3), TimeGrid(t.detach()), nfe)
        return [x, *(state.to(x.device) for state in solver.run(x, cond).unbind(1))]
