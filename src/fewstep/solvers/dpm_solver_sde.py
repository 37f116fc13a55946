r"""DPM-Solver++ for the reverse-time SDE, of k-diffusion: of three past evaluations, and of two stages (Lu et al., arXiv 2211.01095)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.ancestral import ancestral_down
from fewstep.solvers.ddim import eta_noise, first_order, toward
from fewstep.solvers.dpm_solver_pp import ThirdOrder, multistep_integral
from fewstep.solvers.stages import stage_nodes
from fewstep.solvers.stencil import NEVER, effective_order
from fewstep.solvers.stochastic import added, carried, check_noise, sde_moment

__all__ = ["DPMSolverPPSDE", "SDEDPMSolverPP3M"]


@dataclass(frozen=True)
class SDEDPMSolverPP3M(Solver):
    """DPM-Solver++(3M) SDE of k-diffusion: the polynomial through three past evaluations in the reverse-time SDE, see `stochastic`.

    Args:
        eta: share of noise: 0 is the ODE's 3M with exact weights, 1 the SDE of the noising process.
        s_noise: a factor of the noise.
        third_order: ``published`` weighs the second divided difference as if it were half a derivative, as `DPMSolverPP` does;
            ``corrected`` doubles that term.
        lower_order_below, euler_at_final: as of `DPMSolverPP`.

    Raises:
        SolverError: an option that is none of these.
    """

    eta: float = 1.0
    s_noise: float = 1.0
    third_order: ThirdOrder = "published"
    lower_order_below: int = NEVER
    euler_at_final: bool = False
    references = ("2211.01095",)
    order = 2
    memory = 3

    def __post_init__(self) -> None:
        check_noise("SDE-DPM-Solver++", self.s_noise, self.eta)
        if self.third_order not in ("published", "corrected"):
            raise SolverError(f"SDE-DPM-Solver++ has third_order published or corrected, got {self.third_order!r}")

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        p = effective_order(nodes, i, 3, self.lower_order_below, euler_at_final=self.euler_at_final)
        integral = multistep_integral(nodes, i, p, history, sde_moment(self.eta), "taylor", self.third_order)
        x_t = carried(nodes, i, i + 1, self.eta) * x + nodes.alpha[i + 1] * integral
        return x_t, x_t

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        return self.s_noise * added(nodes, i, i + 1, self.eta)


@dataclass(frozen=True)
class DPMSolverPPSDE(Solver):
    """DPM-Solver++ SDE of k-diffusion, of two stages: each an ancestral step from the step's start, with noise of one path.

    The noise of the whole step is ``c_1 xi_1 + c_2 xi_2``, where ``xi_1`` is that of the first stage. A step from ``alpha = 0`` has its
    second evaluation at a share of ``alpha/sigma``, one to ``sigma = 0`` is of first order.

    Args:
        r: the place of the second evaluation, a share of the step in ``lam`` above 0, below 1.
        eta: share of noise, that of `ancestral`.
        s_noise: a factor of the noise.
        correlation: of the two noises: ``level`` is k-diffusion's, ``c_1^2`` the first stage's share of the step in ``sigma/alpha``;
            ``exact`` is that of the SDE, by which the noise of the first stage decays over the rest of the step.

    Raises:
        SolverError: an option that is none of these.
    """

    r: float = 0.5
    eta: float = 1.0
    s_noise: float = 1.0
    correlation: Literal["level", "exact"] = "level"
    references = ("2211.01095",)
    stages = 2
    order = 2
    memory = 2

    def __post_init__(self) -> None:
        check_noise("DPM-Solver++ SDE", self.s_noise, self.eta, most=1)
        if not 0 < self.r < 1 or self.correlation not in ("level", "exact"):
            raise SolverError(
                f"DPM-Solver++ SDE has r between 0 and 1 and correlation level or exact, got {self.r} and {self.correlation!r}"
            )

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        return stage_nodes(grid, schedule, [(self.r,)] * grid.steps)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        if i % 2 == 0:
            at_end = i + 1 == nodes.evaluations
            return x, first_order(nodes, i, i + 1, x, history[0]) if at_end else self._stage(nodes, i, x, history[0])
        s, t = i - 1, i + 1
        middle, start = history[0], history[1]
        x0 = start + (middle - start) / (2 * self.r)
        x_t = toward(nodes, s, t, ancestral_down(nodes, s, t, self.eta), anchor, x0)
        if self.eta > 0:
            first = (x - self._stage(nodes, s, anchor, start)) / eta_noise(nodes, s, i, self.eta)  # s_noise xi_1
            x_t = x_t + self._shares(nodes, s)[0] * eta_noise(nodes, s, t, self.eta) * first
        return x_t, x_t

    def _stage(self, nodes: Nodes, s: int, x: Tensor, x0: Tensor) -> Tensor:
        """Return the state of the second evaluation, but for its noise."""
        return toward(nodes, s, s + 1, ancestral_down(nodes, s, s + 1, self.eta), x, x0)

    def _shares(self, nodes: Nodes, s: int) -> tuple[Tensor, Tensor]:
        """Return ``c_1`` and ``c_2`` of the step from node ``s``."""
        m, t = s + 1, s + 2
        if self.correlation == "exact":
            one = ancestral_down(nodes, m, t, self.eta) / nodes.sigma[m] * eta_noise(nodes, s, m, 1.0) / eta_noise(nodes, s, t, 1.0)
            return one, torch.sqrt((1 - one) * (1 + one))
        if bool(nodes.alpha[s] == 0):
            return torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        r_s, r_m, r_t = (nodes.sigma / nodes.alpha)[s : t + 1]
        return torch.sqrt((r_s - r_m) / (r_s - r_t)), torch.sqrt((r_m - r_t) / (r_s - r_t))

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        if i % 2 == 0:
            return self.s_noise * eta_noise(nodes, i, i + 1, self.eta)
        return self.s_noise * self._shares(nodes, i - 1)[1] * eta_noise(nodes, i - 1, i + 1, self.eta)
