"""DDIM (Song, Meng, Ermon, arXiv 2010.02502), DDPM and LCM: the first-order step, deterministic or with noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.stochastic import check_noise

__all__ = ["DDIM", "DDPM", "LCM", "eta_noise", "first_order", "toward", "transfer"]


def first_order(nodes: Nodes, s: int, t: int, x: Tensor, x0: Tensor) -> Tensor:
    """Return the state ``x_t`` after a first-order step from node ``s`` to ``t``, see `Nodes.first_order`."""
    ratio, gain = nodes.first_order(s, t)
    return ratio * x + gain * x0


def transfer(nodes: Nodes, s: int, t: int, x: Tensor, answer: Tensor) -> Tensor:
    """Return the state at node ``t`` after a first-order step with this ``eps``, or with this ``x0`` where ``alpha_s = 0``."""
    if bool(nodes.alpha[s] == 0):
        return first_order(nodes, s, t, x, answer)
    return nodes.alpha[t] / nodes.alpha[s] * (x + nodes.sigma[s] * torch.expm1(nodes.lam[s] - nodes.lam[t]) * answer)


def toward(nodes: Nodes, s: int, t: int, sigma: Tensor, x: Tensor, x0: Tensor) -> Tensor:
    """Return ``alpha_t x0 + sigma eps``: the state after a first-order step from node ``s`` to ``alpha_t`` with another ``sigma`` there."""
    kept = sigma / nodes.sigma[s]
    return kept * x + (nodes.alpha[t] - kept * nodes.alpha[s]) * x0


def eta_noise(nodes: Nodes, s: int, t: int, eta: float) -> Tensor:
    """Return ``v = eta sigma_t sqrt(1 - e^{-2h})``, the standard deviation of DDIM's noise (arXiv 2010.02502, eq. 16)."""
    return eta * nodes.sigma[t] * torch.sqrt(-torch.expm1(-2 * (nodes.lam[t] - nodes.lam[s])))


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM, the first-order solver, deterministic or stochastic (Song, Meng, Ermon, arXiv 2010.02502, eq. 12 and 16).

    Its step is ``x_t = alpha_t x0 + sqrt(sigma_t^2 - v^2) eps + v xi`` with ``v = eta sigma_t sqrt(1 - e^{-2h})``.

    Args:
        eta: 0 is deterministic, 1 is DDPM's ancestral sampling.

    Raises:
        SolverError: ``eta`` outside [0, 1].
    """

    eta: float = 0.0
    references = ("2010.02502",)
    order = 1
    memory = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise SolverError(f"eta must lie between 0 (deterministic) and 1 (ancestral), got {self.eta}")

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        s, t = i, i + 1
        if self.eta == 0 or bool(nodes.sigma[t] == 0):  # no noise is left at the clean image, and the root below has no slope there
            x_t = first_order(nodes, s, t, x, history[0])
        else:
            x_t = toward(nodes, s, t, torch.sqrt(nodes.sigma[t] ** 2 - self.noise(nodes, i) ** 2), x, history[0])
        return x_t, x_t

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        return eta_noise(nodes, i, i + 1, self.eta)


@dataclass(frozen=True)
class DDPM(Solver):
    """DDPM, ancestral sampling (Ho, Jain, Abbeel, arXiv 2006.11239, eq. 7): the mean of ``q(x_t | x_s, x0)`` and noise.

    Args:
        variance: ``small`` is that of ``q(x_t | x_s, x0)``, so that it is DDIM of ``eta=1``; ``large`` is ``beta``, that of
            ``q(x_s | x_t)`` in the variance-preserving law of the same noise levels (section 3.2 there). They are diffusers'
            ``fixed_small`` and ``fixed_large``.

    Raises:
        SolverError: another variance.
    """

    variance: Literal["small", "large"] = "small"
    references = ("2006.11239",)
    order = 1
    memory = 1

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large"):
            raise SolverError(f"DDPM has variance small or large, got {self.variance!r}")

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        s, t = i, i + 1
        x_t = toward(nodes, s, t, nodes.sigma[t] * torch.exp(nodes.lam[s] - nodes.lam[t]), x, history[0])
        return x_t, x_t

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        s, t = i, i + 1
        if self.variance == "small" or bool(nodes.sigma[t] == 0):
            return eta_noise(nodes, s, t, 1.0)
        log_one, log_two = (torch.nn.functional.softplus(-2 * nodes.lam[k], threshold=1e9) for k in (t, s))  # log(1 + sigma^2/alpha^2)
        beta = -torch.expm1(log_one - log_two)
        return torch.hypot(nodes.alpha[t], nodes.sigma[t]) * torch.sqrt(beta)


@dataclass(frozen=True)
class LCM(Solver):
    """Multistep consistency sampling, of LCM too: the answer, noised to the next level (arXiv 2303.01469, algorithm 1; 2310.04378).

    It is for networks that answer with the end of a trajectory. On a denoiser it solves no equation: its order is 0.

    Args:
        s_noise: a factor of the noise.

    Raises:
        SolverError: an ``s_noise`` below 0.
    """

    s_noise: float = 1.0
    references = ("2303.01469", "2310.04378")
    order = 0
    memory = 1

    def __post_init__(self) -> None:
        check_noise("LCM", self.s_noise)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        x_t = nodes.alpha[i + 1] * history[0]
        return x_t, x_t

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        return self.s_noise * nodes.sigma[i + 1]
