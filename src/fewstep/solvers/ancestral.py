r"""Ancestral samplers: a deterministic step to less noise than the next level has, and noise up to it (k-diffusion, ComfyUI).

The step leads to ``alpha_t x0 + sigma_d eps`` with ``sigma_d < sigma_t``, and ``sqrt(sigma_t^2 - sigma_d^2) xi`` is added. Two rules
say how low it goes, both functions of the noise level alone, so that they hold for any law:

* ``law="eps"``: ``sigma_d^2 = sigma_t^2 - v^2``, ``v = eta sigma_t sqrt(1 - e^{-2h})``, the variance of DDIM (arXiv 2010.02502, eq. 16).
* ``law="flow"``: ``w_d = w_t (1 + (w_t/w_s - 1) eta)`` for ``w = sigma/(alpha + sigma)``, the time of a flow: ComfyUI's for flow models.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.ddim import eta_noise, first_order, toward
from fewstep.solvers.phi import phi
from fewstep.solvers.stages import stage_nodes
from fewstep.solvers.stochastic import check_noise

__all__ = ["DPM2Ancestral", "DPMSolverPP2SAncestral", "EulerAncestral", "RESAncestral", "ancestral_down"]

Law = Literal["eps", "flow"]


def _flow_time(nodes: Nodes, i: int) -> Tensor:
    return nodes.sigma[i] / (nodes.alpha[i] + nodes.sigma[i])


def ancestral_down(nodes: Nodes, s: int, t: int, eta: float, law: Law = "eps") -> Tensor:
    """Return ``sigma_d``: the noise that the deterministic step from node ``s`` leaves at ``alpha_t``."""
    if law == "flow":
        w = _flow_time(nodes, t) * (1 + (_flow_time(nodes, t) / _flow_time(nodes, s) - 1) * eta)
        return nodes.alpha[t] * w / (1 - w)
    h = nodes.lam[t] - nodes.lam[s]
    if eta == 1:
        return nodes.sigma[t] * torch.exp(-h)
    return nodes.sigma[t] * torch.sqrt((1 - eta**2) + eta**2 * torch.exp(-2 * h))


@dataclass(frozen=True)
class _Ancestral(Solver):
    """The options of ancestral samplers.

    Args:
        eta: how much of the noise is new: 0 is deterministic, 1 all that the rule allows.
        s_noise: a factor of the noise.
        law: the rule for the lower level: ``eps``, or ``flow`` as ComfyUI has it for flow models.

    Raises:
        SolverError: ``eta`` outside [0, 1], ``s_noise`` below 0, or another law.
    """

    eta: float = 1.0
    s_noise: float = 1.0
    law: Law = "eps"
    memory = 1

    def __post_init__(self) -> None:
        check_noise("an ancestral sampler", self.s_noise, self.eta, most=1)
        if self.law not in ("eps", "flow"):
            raise SolverError(f"an ancestral sampler has law eps or flow, got {self.law!r}")

    def down(self, nodes: Nodes, s: int, t: int) -> Tensor:
        """Return `ancestral_down` with these options."""
        return ancestral_down(nodes, s, t, self.eta, self.law)

    def raised(self, nodes: Nodes, s: int, t: int) -> Tensor:
        """Return the standard deviation of the noise that a step from ``s`` to ``t`` adds."""
        if self.law == "eps" or self.eta == 0:
            return self.s_noise * eta_noise(nodes, s, t, self.eta)
        down = self.down(nodes, s, t)
        return self.s_noise * torch.sqrt((nodes.sigma[t] - down) * (nodes.sigma[t] + down))


@dataclass(frozen=True)
class EulerAncestral(_Ancestral):
    """Euler ancestral of k-diffusion: with ``law="eps"`` it is DDIM of the same ``eta`` (arXiv 2010.02502), and DDPM of ``eta=1``.

    Args:
        eta: how much of the noise is new: 0 is deterministic, 1 all that the rule allows.
        s_noise: a factor of the noise.
        law: the rule for the lower level: ``eps``, or ``flow`` as ComfyUI has it for flow models.

    Raises:
        SolverError: ``eta`` outside [0, 1], ``s_noise`` below 0, or another law.
    """

    references = ("2010.02502",)
    order = 1

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        x_t = toward(nodes, i, i + 1, self.down(nodes, i, i + 1), x, history[0])
        return x_t, x_t

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        return self.raised(nodes, i, i + 1)


@dataclass(frozen=True)
class RESAncestral(_Ancestral):
    """ComfyUI's ``res_multistep_ancestral``: the line through two answers in `phi` (arXiv 2308.02157) down to the lower level, and noise.

    The older answer is taken to lie as far back as the last step went down, not as far as the level has come since, which is what weak
    order 2 needs: of the SDE both are twice as long.

    Args:
        eta: how much of the noise is new: 0 is deterministic, 1 all that the rule allows.
        s_noise: a factor of the noise.
        law: the rule for the lower level: ``eps``, or ``flow`` as ComfyUI has it for flow models.

    Raises:
        SolverError: ``eta`` outside [0, 1], ``s_noise`` below 0, or another law.
    """

    references = ("2308.02157",)
    order = 2
    memory = 2

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        down = self.down(nodes, i, i + 1)
        x_t = toward(nodes, i, i + 1, down, x, history[0])
        if i and bool(torch.isfinite(nodes.lam[i - 1])) and bool(down > 0):
            h, before = self._drop(nodes, i), self._drop(nodes, i - 1)
            x_t = x_t + nodes.alpha[i + 1] * h * phi(2, -h) * h / before * (history[0] - history[1])
        return x_t, x_t

    def _drop(self, nodes: Nodes, i: int) -> Tensor:
        """Return the length in ``lam`` of the step down after evaluation ``i``."""
        return torch.log(nodes.alpha[i + 1] / self.down(nodes, i, i + 1)) - nodes.lam[i]

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        return self.raised(nodes, i, i + 1)


class _TwoStage(_Ancestral):
    """Ancestral samplers whose deterministic step is a midpoint method; one to ``sigma = 0`` is of first order."""

    stages = 2
    order = 2  # weak: the step down is, and noise up is exact

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        ends = Nodes.at(schedule, grid.t)
        return stage_nodes(grid, schedule, [(self.share(ends, k),) for k in range(grid.steps)])

    def share(self, ends: Nodes, s: int) -> Tensor:
        """Return where the second evaluation lies: half-way in ``lam`` to the lower level, as a share of the step (see `stage_nodes`)."""
        t, down = s + 1, self.down(ends, s, s + 1)
        if bool(ends.alpha[s] == 0):
            return torch.clamp(ends.sigma[t] / (2 * down), max=1)
        return (torch.log(ends.alpha[t] / down) - ends.lam[s]) / (2 * (ends.lam[t] - ends.lam[s]))

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        if i % 2 == 0:
            return x, first_order(nodes, i, i + 1, x, history[0])
        x_t = self.second(nodes, i - 1, i + 1, anchor, x, history[0])
        return x_t, x_t

    @abstractmethod
    def second(self, nodes: Nodes, s: int, t: int, x_s: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        """Return the state at the lower level by the answer ``x0`` at the state ``x`` between."""

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        return torch.zeros((), dtype=torch.float64) if i % 2 == 0 else self.raised(nodes, i - 1, i + 1)


@dataclass(frozen=True)
class DPM2Ancestral(_TwoStage):
    """DPM2 ancestral of k-diffusion: the midpoint rule of DPM-Solver-2 (arXiv 2206.00927) down to the lower level, and noise.

    With ``law="flow"`` it is the midpoint rule of the flow's own time. From ``alpha = 0`` with ``law="eps"`` the step is that of `stages`,
    evaluated no later than at its end.

    Args:
        eta: how much of the noise is new: 0 is deterministic, 1 all that the rule allows.
        s_noise: a factor of the noise.
        law: the rule for the lower level: ``eps``, or ``flow`` as ComfyUI has it for flow models.

    Raises:
        SolverError: ``eta`` outside [0, 1], ``s_noise`` below 0, or another law.
    """

    references = ("2206.00927",)

    def share(self, ends: Nodes, s: int) -> Tensor:
        if self.law == "eps":
            return super().share(ends, s)
        t, down = s + 1, self.down(ends, s, s + 1)
        middle = torch.sqrt(_flow_time(ends, s) * down / (ends.alpha[t] + down))
        ratio = (1 - middle) / middle
        if bool(ends.alpha[s] == 0):
            return ratio * ends.sigma[t] / ends.alpha[t]
        return (torch.log(ratio) - ends.lam[s]) / (ends.lam[t] - ends.lam[s])

    def second(self, nodes: Nodes, s: int, t: int, x_s: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        (alpha_s, alpha_m, alpha_t), (sigma_s, sigma_m) = nodes.alpha[s : t + 1], nodes.sigma[s:t]
        down = self.down(nodes, s, t)
        if self.law == "flow":
            w = down / (alpha_t + down)
            velocity = (x - (alpha_m + sigma_m) * x0) / sigma_m  # (y - x0)/w of y = x/(alpha + sigma)
            return alpha_t / (1 - w) * (x_s / (alpha_s + sigma_s) + (w - _flow_time(nodes, s)) * velocity)
        if bool(alpha_s == 0):
            return down / sigma_s * x_s + alpha_t * x0
        return alpha_t / alpha_s * x_s + (down - alpha_t * sigma_s / alpha_s) * (x - alpha_m * x0) / sigma_m


@dataclass(frozen=True)
class DPMSolverPP2SAncestral(_TwoStage):
    """DPM-Solver++(2S) ancestral of k-diffusion: the midpoint rule in ``x0`` (arXiv 2211.01095) down to the lower level, and noise.

    Args:
        eta: how much of the noise is new: 0 is deterministic, 1 all that the rule allows.
        s_noise: a factor of the noise.
        law: the rule for the lower level: ``eps``, or ``flow`` as ComfyUI has it for flow models.

    Raises:
        SolverError: ``eta`` outside [0, 1], ``s_noise`` below 0, or another law.
    """

    references = ("2211.01095",)

    def second(self, nodes: Nodes, s: int, t: int, x_s: Tensor, x: Tensor, x0: Tensor) -> Tensor:  # noqa: ARG002
        return toward(nodes, s, t, self.down(nodes, s, t), x_s, x0)
