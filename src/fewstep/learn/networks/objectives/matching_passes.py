"""Make samples by several passes of one denoiser, each of which begins at the last one's samples, noised anew to a lower level.

So consistency models sample (arXiv 2303.01469, algorithm 1), and DMD2 (arXiv 2405.14867): by the solver ``lcm``. A training step trains
one pass of each row. The passes before it make its state (DMD2's backward simulation, section 4.5), so that it learns from the states that
it will meet, and not from noised data, which it never sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import add_noise
from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.process import share
from fewstep.sampling.loop import run
from fewstep.sampling.noise import start_noise
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import LCM

__all__ = ["SOLVER", "Passes", "Turn", "even_levels"]

SOLVER = "lcm"  # the name of the solver whose steps the passes are


def even_levels(start: float, passes: int) -> tuple[float, ...]:
    """Return the noise levels ``sigma/alpha`` of passes that divide the way from ``start`` to the clean image evenly.

    Steps are even in the angle ``arctan(sigma/alpha)``, the length of the way where a noise law preserves the variance.
    """
    angle = math.atan(start)
    return (start, *(math.tan(angle * (passes - k) / passes) for k in range(1, passes)))


class Turn(NamedTuple):
    """The passes that the rows of a training step train.

    Attributes:
        k: the number of each row's pass, ``[b]`` int64 on the CPU, from 0.
        noises: those of the passes before, ``[K-1, b, *D]``.
        before: the samples ``[b, *D]`` that these made; 0 where there is none.
    """

    k: Tensor
    noises: Tensor
    before: Tensor


@dataclass(frozen=True)
class Passes:
    """Several passes of a denoiser, between the times of a grid.

    Attributes:
        schedule: the noise law.
        grid: the times at which they begin, and that of the clean image.
    """

    schedule: NoiseSchedule
    grid: TimeGrid

    @property
    def count(self) -> int:
        """The number ``K`` of passes."""
        return self.grid.steps

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler whose steps they are."""
        return Sampler.build(LCM(), self.grid, self.schedule)

    def draw(self, size: int, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Turn:
        """Draw the pass of each row, uniformly, and return this process's share, before any pass has been made."""
        mine = torch.tensor(share(range(size)))
        k = torch.randint(self.count, (size,), generator=generator)[mine]
        noises = torch.randn(self.count - 1, size, *shape, generator=generator)[:, mine].to(device)
        return Turn(k, noises, torch.zeros(len(mine), *shape, device=device))

    @torch.no_grad()
    def lead(self, denoiser: Denoiser, turn: Turn, cond: Cond) -> Turn:
        """Return rows with the samples that the passes before theirs make, without gradient.

        Args:
            denoiser: the student.
            turn: the rows.
            cond: their labels ``[b]``, or None.
        """
        before = turn.before
        for j, noise in enumerate(turn.noises):
            later = (turn.k > j).nonzero().flatten().to(before.device)
            if len(later):
                labels = None if cond is None else cond[later]
                made = self._answer(denoiser, torch.full((len(later),), j), before[later], noise[later], labels)
                before = before.index_copy(0, later, made.to(before.dtype))
        return turn._replace(before=before)

    def answer(self, denoiser: Denoiser, turn: Turn, z: Tensor, cond: Cond) -> Tensor:
        """Return the samples ``[b, *D]`` of each row's pass, with gradients.

        Args:
            denoiser: the student.
            turn: the rows, led to their passes.
            z: the noise ``[b, *D]`` that the samples before are noised with, or that the first pass begins with.
            cond: labels ``[b]``, or None.
        """
        return self._answer(denoiser, turn.k, turn.before, z, cond)

    def _answer(self, denoiser: Denoiser, k: Tensor, before: Tensor, z: Tensor, cond: Cond) -> Tensor:
        nodes = self.sampler.tableau.nodes
        return denoiser(add_noise(before, z, nodes.alpha[k], nodes.sigma[k]), nodes.t[k], cond)

    @torch.no_grad()
    def samples(self, denoiser: Denoiser, seeds: Sequence[int], shape: Sequence[int], cond: Cond, device: torch.device) -> list[Tensor]:
        """Return the samples ``[len(seeds), *D]`` after each pass, as `fewstep.sample` makes them: a seed has its own noises."""
        tableau, made = self.sampler.tableau, list[Tensor]()
        start = start_noise(tableau.nodes, seeds, shape).to(device)
        run(denoiser, tableau, start, cond, seeds=seeds, observe=lambda step: made.append(step.x0))
        return made
