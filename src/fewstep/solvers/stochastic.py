r"""The reverse-time SDE with a share ``eta`` of noise, exact for a constant ``x0``: what solvers of it have in common.

In ``lam`` it is ``dx = (dlog sigma/dlam - eta) x dlam + (1 + eta) alpha D dlam + sigma sqrt(2 eta) dW`` (arXiv 2305.14267, 2309.05019), so

    x_t = sigma_t/sigma_s e^{-eta h} x_s + alpha_t (1 + eta) int_0^h e^{-(1+eta)(h-r)} D(lam_s + r) dr + sigma_t sqrt(1 - e^{-2 eta h}) xi

``eta = 0`` is the sampling ODE in its data form, `phi`; ``eta = 1`` the SDE of which time reversal gives the noising process.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.core.tableau import Nodes
from fewstep.runtime.errors import SolverError
from fewstep.solvers.phi import phi

__all__ = ["added", "carried", "check_noise", "sde_moment"]


def carried(nodes: Nodes, s: int, t: int, eta: float) -> Tensor:
    """Return ``sigma_t/sigma_s e^{-eta h}``, what is left of the state at node ``s`` in that at ``t``."""
    ratio = nodes.sigma[t] / nodes.sigma[s]
    return ratio if eta == 0 else ratio * torch.exp(-eta * (nodes.lam[t] - nodes.lam[s]))


def added(nodes: Nodes, s: int, t: int, eta: float) -> Tensor:
    """Return ``sigma_t sqrt(1 - e^{-2 eta h})``, the standard deviation of the noise between the nodes ``s`` and ``t``."""
    if eta == 0 or s == t:
        return torch.zeros((), dtype=torch.float64)
    return nodes.sigma[t] * torch.sqrt(-torch.expm1(-2 * eta * (nodes.lam[t] - nodes.lam[s])))


def sde_moment(eta: float) -> Callable[[int, Tensor], Tensor]:
    r"""Return ``(k, h) -> (1 + eta) int_0^h e^{-(1+eta)(h-r)} r^k/k! dr``; for ``k = 0`` it is 1 at ``h = inf``."""
    rate = 1 + eta

    def moment(k: int, h: Tensor) -> Tensor:
        return -torch.expm1(-rate * h) if k == 0 else rate * h ** (k + 1) * phi(k + 1, -rate * h)

    return moment


def check_noise(name: str, s_noise: float, eta: float = 1.0, most: float = math.inf) -> None:
    """Refuse shares of noise that mean nothing.

    Raises:
        SolverError: ``eta`` outside 0 to ``most``, or an ``s_noise`` below 0.
    """
    if not (0 <= eta <= most and eta < math.inf and 0 <= s_noise < math.inf):
        upto = "of at least 0" if most == math.inf else f"between 0 (deterministic) and {most:g}"
        raise SolverError(f"{name} has an eta {upto} and an s_noise of at least 0, got eta={eta} and s_noise={s_noise}")
