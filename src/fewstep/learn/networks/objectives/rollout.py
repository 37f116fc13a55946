"""Fresh trajectories for ever: each training step learns at one time of every trajectory in its batch, and moves all of them on by one.

Nothing is stored, and nothing is solved beside the training: the answers that move a trajectory on are those that its training step has
computed anyway. A batch has trajectories at all times, since each row starts anew at another step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond
from fewstep.core.tableau import Nodes
from fewstep.learn.teacher.batches import FIRST_FRESH
from fewstep.models.problem import Problem
from fewstep.runtime.process import share
from fewstep.sampling.noise import seeded_scales

__all__ = ["Rollout", "Rows"]


class Rows(NamedTuple):
    """The trajectories of a batch at a training step.

    Attributes:
        x: states ``[b, *D]``.
        i: the place of each among the times, ``[b]``.
        cond: conditions, or None.
        scale: the guidance scale of each, ``[b]`` float64.
        before: what `move` answered for the step before, ``[b, *D]``; 0 at the start of a trajectory.
    """

    x: Tensor
    i: Tensor
    cond: Cond
    scale: Tensor
    before: Tensor


Move = Callable[[Rows], tuple[Tensor, Tensor]]  # rows -> their states at the next times, and what to remember


class Rollout:
    """Trajectories that go on from training step to training step, each at a guidance scale of its own.

    What they are at a step depends on that step alone: a run that continues moves those of the steps before again, and has the same.

    Args:
        problem: gives starts and conditions.
        nodes: the times ``[M+1]``; a trajectory is at the first ``M`` of them.
        size: trajectories in a batch, over all processes.
        scales: the least and the largest guidance scale, between which they are drawn uniformly.
        move: moves trajectories on by one time; it has to answer alike whenever it is asked.
        seed: of the trajectories.
    """

    def __init__(self, problem: Problem, nodes: Nodes, size: int, scales: tuple[float, float], move: Move, seed: int = 0) -> None:
        self.problem, self.nodes, self.size, self.scales, self.move, self.seed = problem, nodes, size, scales, move, seed
        self.rows = torch.tensor(share(range(size)))
        self.step: int | None = None
        self.now: Rows | None = None

    @property
    def times(self) -> int:
        """The number of times ``M`` at which a trajectory is learned from."""
        return self.nodes.evaluations

    def at(self, step: int) -> Rows:
        """Return the trajectories at a training step, this process's share of them."""
        if self.step != step or self.now is None:
            self._replay(step)
        assert self.now is not None  # just made
        return self.now

    def advance(self, x: Tensor, remember: Tensor) -> None:
        """Go to the next training step.

        Args:
            x: the states of the rows of this step at their next times, ``[b, *D]``.
            remember: what `move` answers beside them.
        """
        assert self.step is not None and self.now is not None  # `at` comes first
        self.step += 1
        self._begin(x.detach(), remember.detach())

    def _begin(self, x: Tensor, before: Tensor) -> None:
        """Take states for those of the present step, where no new trajectory begins."""
        assert self.step is not None  # set by the callers
        phase = self.step + self.rows
        i, number = phase % self.times, phase // self.times
        seeds = (FIRST_FRESH + self.seed * 2**20 + number * self.size + self.rows).tolist()
        new = (i == 0).nonzero()[:, 0]
        scale, cond = seeded_scales(seeds, self.scales), self.problem.cond(seeds)
        if len(new):
            begun = new.to(x.device)
            x, before = x.clone(), before.clone()
            x[begun], before[begun] = self.problem.start([seeds[k] for k in new.tolist()], self.nodes), torch.zeros_like(before[begun])
        self.now = Rows(x, i, cond, scale, before)

    @torch.no_grad()
    def _replay(self, step: int) -> None:
        """Move trajectories on from as far back as any of those at a step has begun."""
        self.step = step - self.times
        empty = torch.zeros(len(self.rows), *self.problem.shape, device=self.problem.device)
        self._begin(empty, empty)
        while self.step < step:
            assert self.now is not None  # begun
            self.advance(*self.move(self.now))
