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


BLOCKS = 16

Move = Callable[[Rows], tuple[Tensor, Tensor]]  # rows -> their states at the next times, and what to remember


class Rollout:
    """Trajectories that go on from training step to training step, each at a guidance scale of its own.

    They are in blocks of one batch, which take turns: so the states of consecutive steps have nothing to do with each other. What a
    trajectory is at a step depends on that step alone: a run that continues moves those of the steps before again, and has the same.

    Args:
        problem: gives starts and conditions.
        nodes: the times ``[M+1]``; a trajectory is at the first ``M`` of them.
        size: trajectories in a batch, over all processes.
        scales: the least and the largest guidance scale, between which they are drawn uniformly.
        move: moves trajectories on by one time; it has to answer alike whenever it is asked.
        seed: of the trajectories.
        blocks: number of blocks.
    """

    def __init__(
        self, problem: Problem, nodes: Nodes, size: int, scales: tuple[float, float], move: Move, seed: int = 0, blocks: int = BLOCKS
    ) -> None:
        self.move, first = move, FIRST_FRESH + seed * 2**20
        self.blocks = [_Block(problem, nodes, size, scales, move, first + k * size, blocks * size) for k in range(blocks)]
        self.present = self.blocks[0]

    def at(self, step: int) -> Rows:
        """Return the trajectories at a training step, this process's share of them."""
        self.present = self.blocks[step % len(self.blocks)]
        return self.present.at(step // len(self.blocks))

    @torch.no_grad()
    def finite(self) -> bool:
        """Return whether all trajectories are finite where they are and where they come to next, both by the teacher."""
        present = [block.now for block in self.blocks if block.now is not None]
        return all(bool(torch.isfinite(x).all()) for rows in present for x in (rows.x, self.move(rows)[0]))

    def advance(self, x: Tensor, remember: Tensor) -> None:
        """Move the trajectories of this training step on.

        Args:
            x: their states at their next times, ``[b, *D]``.
            remember: what `move` answers beside them.
        """
        self.present.advance(x, remember)


class _Block:
    """The trajectories of one batch. A row's first seed is ``first`` plus its number, and grows by ``every`` with each trajectory."""

    def __init__(self, problem: Problem, nodes: Nodes, size: int, scales: tuple[float, float], move: Move, first: int, every: int) -> None:
        self.problem, self.nodes, self.scales, self.move, self.first, self.every = problem, nodes, scales, move, first, every
        self.rows = torch.tensor(share(range(size)))
        self.turn: int | None = None
        self.now: Rows | None = None

    def at(self, turn: int) -> Rows:
        if self.turn != turn or self.now is None:
            self._replay(turn)
        assert self.now is not None  # just made
        return self.now

    def advance(self, x: Tensor, remember: Tensor) -> None:
        assert self.turn is not None and self.now is not None  # `at` comes first
        self.turn += 1
        self._begin(x.detach(), remember.detach())

    def _begin(self, x: Tensor, before: Tensor) -> None:
        """Take states for those of the present turn, where no new trajectory begins."""
        assert self.turn is not None  # set by the callers
        phase, times = self.turn + self.rows, self.nodes.evaluations
        i, number = phase % times, phase // times
        seeds = (self.first + number * self.every + self.rows).tolist()
        new = (i == 0).nonzero()[:, 0]
        scale, cond = seeded_scales(seeds, self.scales), self.problem.cond(seeds)
        if len(new):
            begun = new.to(x.device)
            x, before = x.clone(), before.clone()
            x[begun], before[begun] = self.problem.start([seeds[k] for k in new.tolist()], self.nodes), torch.zeros_like(before[begun])
        self.now = Rows(x, i, cond, scale, before)

    @torch.no_grad()
    def _replay(self, turn: int) -> None:
        """Move trajectories on from as far back as any of those at a turn has begun."""
        self.turn = turn - self.nodes.evaluations
        empty = torch.zeros(len(self.rows), *self.problem.shape, device=self.problem.device)
        self._begin(empty, empty)
        while self.turn < turn:
            assert self.now is not None  # begun
            self.advance(*self.move(self.now))
