"""Methods with evaluations inside the step: their places, and the bookkeeping of their stages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Solver
from fewstep.solvers.ddim import first_order
from fewstep.solvers.deis import weighted

__all__ = ["RungeKutta", "stage_nodes"]


def stage_nodes(grid: TimeGrid, schedule: NoiseSchedule, inside: Sequence[Sequence[float | Tensor]], *, in_level: bool = False) -> Nodes:
    """Return the nodes of methods that evaluate inside a step: at its start, and at shares of it.

    Shares are of ``lam``, or of ``sigma/alpha`` with ``in_level``. A step from ``alpha = 0``, where neither is finite, has shares of
    ``alpha/sigma``; a step to ``sigma = 0`` is evaluated at its start alone.

    Args:
        grid: ends of the steps.
        schedule: the noise law.
        inside: for each step, the shares of its stages after the first.
        in_level: lay them in ``sigma/alpha``.
    """
    ends = Nodes.at(schedule, grid.t)
    times = []
    for k, shares in enumerate(inside):
        s, t = k, k + 1
        times.append(ends.t[s])
        for f in () if bool(ends.sigma[t] == 0) else shares:
            if f == 1:
                times.append(ends.t[t])
                continue
            if bool(ends.alpha[s] == 0):
                lam = torch.log(f * ends.alpha[t] / ends.sigma[t])
            elif in_level:
                lam = -torch.log(torch.lerp(torch.exp(-ends.lam[s]), torch.exp(-ends.lam[t]), f))
            else:
                lam = ends.lam[s] + f * (ends.lam[t] - ends.lam[s])
            times.append(schedule.t_of_lam(lam))
    return Nodes.at(schedule, torch.stack([*times, ends.t[-1]]))


class RungeKutta(Solver):
    """A Runge-Kutta method: its answers are combined by rows of weights, the last of which leads to the step's end.

    A step from ``alpha = 0`` is the classical method of the rows at ``h = 0``, in ``v = alpha/sigma``, where ``d(x/sigma)/dv = D``. A step
    to ``sigma = 0`` is one evaluation of first order.
    """

    in_level = False

    @property
    def memory(self) -> int:
        return self.stages

    @property
    @abstractmethod
    def c(self) -> tuple[float, ...]:
        """The places of the stages after the first, as shares of the step."""

    @abstractmethod
    def row(self, stage: int, h: Tensor) -> Sequence[Any]:
        """Return the weights of the first ``stage`` answers, oldest first, in the state after them, as shares of a step of length ``h``."""

    @abstractmethod
    def forward(self, nodes: Nodes, s: int, t: int, end: int, x_s: Tensor, answers: list[Tensor]) -> Tensor:
        """Return the state at node ``t`` of a step from ``s`` to ``end``, by what was recorded so far, oldest first."""

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        return stage_nodes(grid, schedule, [self.c] * grid.steps, in_level=self.in_level)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        stage = i % self.stages + 1
        s, t = i + 1 - stage, i + 1
        end = s + self.stages
        x_s, answers = x if stage == 1 else anchor, history[:stage][::-1]
        if end > nodes.evaluations:
            return x, self.to_clean(nodes, s, x, history[0])
        if bool(nodes.alpha[s] == 0):
            v, row = nodes.alpha[end] / nodes.sigma[end], self.row(stage, torch.zeros_like(nodes.lam[end]))
            x_t = nodes.sigma[t] * (x_s / nodes.sigma[s] + v * weighted(row, answers))
        else:
            x_t = self.forward(nodes, s, t, end, x_s, answers)
        return (x_t if t == end else x_s), x_t

    def to_clean(self, nodes: Nodes, s: int, x: Tensor, answer: Tensor) -> Tensor:
        """Return the clean image after a step of first order, from what was recorded; by default ``x0``."""
        return first_order(nodes, s, s + 1, x, answer)
