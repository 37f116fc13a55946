"""Samplers with churn (Karras et al., arXiv 2206.00364, algorithm 2): noise that raises the level, and a deterministic step down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import to_x0
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.ddim import first_order
from fewstep.solvers.dpm_solver import DPMSolver2S
from fewstep.solvers.heun import trapezoid
from fewstep.solvers.stages import stage_nodes
from fewstep.solvers.stencil import noise_or_data
from fewstep.solvers.stochastic import check_noise

__all__ = ["DPM2Churn", "EulerChurn", "HeunChurn", "RaisedHeun"]


def _raising(sigma: Tensor, drop: Tensor) -> Tensor:
    """Return the standard deviation of noise that raises the level to ``sigma``, where ``lam`` is lower by ``drop``."""
    return sigma * torch.sqrt(-torch.expm1(-2 * drop))


@dataclass(frozen=True)
class _Churn(Solver):
    """The options of samplers with churn.

    Args:
        s_churn: how much noise, over all steps.
        s_tmin, s_tmax: the noise levels ``sigma/alpha`` between which it is added.
        s_noise: a factor of the noise.

    Raises:
        SolverError: a negative ``s_churn`` or ``s_noise``, or levels that are none.
    """

    s_churn: float = 40.0
    s_tmin: float = 0.05
    s_tmax: float = 50.0
    s_noise: float = 1.003
    references = ("2206.00364",)

    def __post_init__(self) -> None:
        check_noise("a sampler with churn", self.s_noise)
        if not (0 <= self.s_churn < math.inf and 0 <= self.s_tmin <= self.s_tmax):
            raise SolverError(f"a sampler with churn has an s_churn of at least 0, and s_tmin of at least 0 up to s_tmax, got {self}")

    def raised(self, grid: TimeGrid, schedule: NoiseSchedule) -> list[Tensor]:
        """Return the times ``[1]`` at which the steps of a grid begin, with the noise that was added there."""
        gamma, times = min(self.s_churn / grid.steps, math.sqrt(2) - 1), [grid.t[:1]]
        highest = schedule.lam(schedule.ends[0])  # beyond which the network knows no level
        for k in range(1, grid.steps):
            t = grid.t[k : k + 1]
            lam = schedule.lam(t)  # of inner times alone: at an infinite one there is no slope
            churned = gamma > 0 and self.s_tmin <= float(torch.exp(-lam.detach())) <= self.s_tmax
            times.append(schedule.t_of_lam((lam - math.log1p(gamma)).clamp(min=float(highest))) if churned else t)
        return times


class _Raised(Nodes):
    """Nodes at raised levels, which the levels where the steps end are no part of."""

    ends: Nodes  # of the grid

    @classmethod
    def of(cls, schedule: NoiseSchedule, t: Tensor, grid: TimeGrid) -> _Raised:
        made = cls(*Nodes.at(schedule, t))
        made.ends = Nodes.at(schedule, grid.t)
        return made

    def step(self, s: int, t: int, k: int) -> Nodes:
        """Return the nodes ``s`` to ``t`` of step ``k``, and its end."""
        return Nodes(*(torch.cat([own[s : t + 1], end[k + 1 : k + 2]]) for own, end in zip(self, self.ends, strict=True)))


class _OffGrid(_Churn):
    """Samplers with churn that never evaluate where a step ends, but where noise has raised its level."""

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        times = []
        for k, start in enumerate(self.raised(grid, schedule)):
            pair = TimeGrid(torch.cat([start, grid.t[k + 1 : k + 2]]))
            times.append(stage_nodes(pair, schedule, [(0.5,) * (self.stages - 1)]).t[:-1])
        return _Raised.of(schedule, torch.cat([*times, grid.t[-1:]]), grid)

    def arrived(self, nodes: Nodes, i: int, x: Tensor) -> Tensor:
        """Return the state at the end of a step as one at the level that noise raises it to, in the scale of node ``i + 1``."""
        return nodes.alpha[i + 1] / _own(nodes).ends.alpha[i // self.stages + 1] * x

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        k, ends = i // self.stages + 1, _own(nodes).ends
        inside = i % self.stages < self.stages - 1 or i + 1 == nodes.evaluations
        if inside or bool(nodes.t[i + 1] == ends.t[k]):
            return torch.zeros((), dtype=torch.float64)
        return self.s_noise * _raising(nodes.sigma[i + 1], ends.lam[k] - nodes.lam[i + 1])


def _own(nodes: Nodes) -> _Raised:
    if not isinstance(nodes, _Raised):
        raise SolverError("a sampler with churn knows its steps by the nodes that it made itself: use its own nodes(grid, schedule)")
    return nodes


@dataclass(frozen=True)
class EulerChurn(_OffGrid):
    """Euler's method with churn: k-diffusion's ``sample_euler`` (EDM, arXiv 2206.00364, algorithm 2 without its correction).

    Noise is added as in `HeunChurn`, by default less of it: a step of first order down from much more noise ends with too little.

    Args:
        s_churn: how much noise, over all steps.
        s_tmin, s_tmax: the noise levels ``sigma/alpha`` between which it is added.
        s_noise: a factor of the noise.

    Raises:
        SolverError: a negative ``s_churn`` or ``s_noise``, or levels that are none.
    """

    s_churn: float = 5.0
    order = 1
    memory = 1

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        x_t = self.arrived(nodes, i, first_order(_own(nodes).step(i, i, i), 0, 1, x, history[0]))
        return x_t, x_t


@dataclass(frozen=True)
class DPM2Churn(_OffGrid):
    """DPM2 with churn, k-diffusion's ``sample_dpm_2``: the midpoint step of `DPMSolver2S` from a raised level (arXiv 2206.00364).

    Noise is added as in `HeunChurn`.

    Args:
        s_churn: how much noise, over all steps.
        s_tmin, s_tmax: the noise levels ``sigma/alpha`` between which it is added.
        s_noise: a factor of the noise.

    Raises:
        SolverError: a negative ``s_churn`` or ``s_noise``, or levels that are none.
    """

    stages = 2
    order = 2
    memory = 2

    def record(self, nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
        return noise_or_data(nodes, i, x, x0)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        stage, one_call = i % 2, i + 1 == nodes.evaluations and i % 2 == 0
        local = _own(nodes).step(i - stage, i - stage + (not one_call), i // 2)
        x_s, x_t = DPMSolver2S().at_stage(local, stage, stage, anchor, x, history)
        if stage or one_call:
            x_t = self.arrived(nodes, i, x_t)
        return (x_t if stage else x_s), x_t


class RaisedHeun(Solver):
    """Heun's step from any level to the next node, and noise that raises the state where the node after that is at a higher level."""

    s_noise: Any  # float, as a field
    order = 2
    memory = 2

    def record(self, nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
        return noise_or_data(nodes, i, x, x0)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        if i % 2 == 0:
            x0 = history[0] if bool(nodes.alpha[i] == 0) else to_x0("epsilon", history[0], x, nodes.alpha[i], nodes.sigma[i])
            return x, first_order(nodes, i, i + 1, x, x0)
        x_t = nodes.alpha[i + 1] / nodes.alpha[i] * trapezoid(nodes, i - 1, i, anchor, x, history)
        return x_t, x_t

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        if i % 2 == 0 or bool(nodes.t[i] == nodes.t[i + 1]):
            return torch.zeros((), dtype=torch.float64)
        return self.s_noise * _raising(nodes.sigma[i + 1], nodes.lam[i] - nodes.lam[i + 1])


@dataclass(frozen=True)
class HeunChurn(RaisedHeun, _Churn):
    """Heun's method with churn (EDM, arXiv 2206.00364, algorithm 2), for any law in ``r = sigma/alpha``.

    Before a step from a level ``r`` in ``[s_tmin, s_tmax]`` noise raises it to ``(1 + gamma) r``, where ``gamma`` is the lesser of
    ``s_churn/N``, on a grid of ``N`` steps, and ``sqrt(2) - 1``. The first step is not churned: its start is noise of the level that it
    begins at. No level is raised above the model's first. Defaults are those of EDM's Table 5 for ImageNet.

    Args:
        s_churn: how much noise, over all steps.
        s_tmin, s_tmax: the noise levels ``sigma/alpha`` between which it is added.
        s_noise: a factor of the noise.

    Raises:
        SolverError: a negative ``s_churn`` or ``s_noise``, or levels that are none.
    """

    stages = 2

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        first, *raised = self.raised(grid, schedule)
        times, end = [first, *(both for k, up in enumerate(raised, 1) for both in (grid.t[k : k + 1], up))], grid.t[-1:]
        return Nodes.at(schedule, torch.cat([*times, end] if bool(schedule.sigma(end[0]) == 0) else [*times, end, end]))
