"""Times as free numbers: the shares of a coordinate that runs from the first level to the last, and shifts of what the network is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmarks.rivals.levels import levels_of, times_at
from torch import Tensor, nn

from fewstep.core.schedule import NoiseSchedule

WINDOW = 0.5  # of the smallest step: how far the told times may be from the levels (LD3's win_rate)


@dataclass(frozen=True)
class Coordinate:
    """A coordinate of noise levels ``s``, in which steps are shared out.

    Attributes:
        of: ``s -> u``, monotone.
        level: its inverse.
    """

    of: Callable[[Tensor], Tensor]
    level: Callable[[Tensor], Tensor]


LOG = Coordinate(torch.log, torch.exp)
FLOW = Coordinate(lambda s: s / (1 + s), lambda u: u / (1 - u))  # the time of a rectified flow with the same level


class LearnedTimes(nn.Module):
    """Times ``[N+1]`` of increasing clearness by construction: a softmax gives the shares of a coordinate between fixed ends.

    Args:
        schedule: the noise law.
        t: the times to begin with, ``[N+1]``.
        coordinate: in which they are shares.
    """

    def __init__(self, schedule: NoiseSchedule, t: Tensor, coordinate: Coordinate = LOG) -> None:
        super().__init__()
        self.schedule, self.coordinate, self.ends = schedule, coordinate, t[[0, -1]].clone()
        u = coordinate.of(torch.exp(-schedule.lam(t)))
        self.shares = nn.Parameter(torch.log(torch.diff(u) / (u[-1] - u[0])))
        self.shifts = nn.Parameter(torch.zeros(len(t) - 1, dtype=torch.float64))

    def along(self) -> Tensor:
        """Return the times in the coordinate, ``[N+1]``."""
        first, last = self.coordinate.of(levels_of(self.schedule))
        inner = torch.cumsum(torch.softmax(self.shares, 0), 0)[:-1]
        return torch.cat([first[None], first + (last - first) * inner, last[None]])

    def times(self) -> Tensor:
        """Return the times ``[N+1]``; the ends are those of the beginning, to the bit."""
        return self._at(self.along()[1:-1])

    def told(self) -> tuple[Tensor, ...]:
        """Return the ``N`` times that the network is told: shifted by `WINDOW` of the smallest step at most, the first not at all."""
        u = self.along()
        most = WINDOW * float(torch.diff(u.detach()).abs().min())
        shifted = u[1:-1] + self.shifts[1:].clamp(-most, most)
        return (self.ends[0], *self._inner(shifted))

    def plain(self) -> tuple[Tensor, ...]:
        """Return the first ``N`` times as they are, where the network is told no others."""
        return (self.ends[0], *self._inner(self.along()[1:-1]))

    def _at(self, inner: Tensor) -> Tensor:
        return torch.cat([self.ends[:1], self._inner(inner), self.ends[1:]])

    def _inner(self, inner: Tensor) -> Tensor:
        return times_at(self.schedule, self.coordinate.level(inner))
