"""EDM's stochastic sampler (Karras et al., arXiv 2206.00364, algorithm 2): noise that raises the level, and Heun's step down."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import to_x0
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.ddim import first_order
from fewstep.solvers.heun import trapezoid
from fewstep.solvers.stencil import noise_or_data
from fewstep.solvers.stochastic import check_noise

__all__ = ["HeunChurn"]


@dataclass(frozen=True)
class HeunChurn(Solver):
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

    s_churn: float = 40.0
    s_tmin: float = 0.05
    s_tmax: float = 50.0
    s_noise: float = 1.003
    references = ("2206.00364",)
    stages = 2
    order = 2
    memory = 2

    def __post_init__(self) -> None:
        check_noise("Heun with churn", self.s_noise)
        if not (0 <= self.s_churn < math.inf and 0 <= self.s_tmin <= self.s_tmax):
            raise SolverError(f"Heun with churn has an s_churn of at least 0, and s_tmin of at least 0 up to s_tmax, got {self}")

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        gamma, times = min(self.s_churn / grid.steps, math.sqrt(2) - 1), [grid.t[:1]]
        highest = schedule.lam(schedule.ends[0])  # beyond which the network knows no level
        for k in range(1, grid.steps):
            t = grid.t[k : k + 1]
            lam = schedule.lam(t)  # of inner times alone: at an infinite one there is no slope
            churned = gamma > 0 and self.s_tmin <= float(torch.exp(-lam.detach())) <= self.s_tmax
            times += [t, schedule.t_of_lam((lam - math.log1p(gamma)).clamp(min=float(highest))) if churned else t]
        end = grid.t[-1:]
        return Nodes.at(schedule, torch.cat([*times, end] if bool(schedule.sigma(end[0]) == 0) else [*times, end, end]))

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
        return self.s_noise * nodes.sigma[i + 1] * torch.sqrt(-torch.expm1(2 * (nodes.lam[i + 1] - nodes.lam[i])))
