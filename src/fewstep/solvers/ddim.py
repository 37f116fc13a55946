"""DDIM (Song, Meng, Ermon, arXiv 2010.02502): the first-order step, deterministic or with noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError

__all__ = ["DDIM", "first_order", "transfer"]


def first_order(nodes: Nodes, s: int, t: int, x: Tensor, x0: Tensor) -> Tensor:
    """Return the state ``x_t`` after a first-order step from node ``s`` to ``t``, see `Nodes.first_order`."""
    ratio, gain = nodes.first_order(s, t)
    return ratio * x + gain * x0


def transfer(nodes: Nodes, s: int, t: int, x: Tensor, answer: Tensor) -> Tensor:
    """Return the state at node ``t`` after a first-order step with this ``eps``, or with this ``x0`` where ``alpha_s = 0``."""
    if bool(nodes.alpha[s] == 0):
        return first_order(nodes, s, t, x, answer)
    return nodes.alpha[t] / nodes.alpha[s] * (x + nodes.sigma[s] * torch.expm1(nodes.lam[s] - nodes.lam[t]) * answer)


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
            kept = torch.sqrt(nodes.sigma[t] ** 2 - self.noise(nodes, i) ** 2) / nodes.sigma[s]
            x_t = kept * x + (nodes.alpha[t] - kept * nodes.alpha[s]) * history[0]
        return x_t, x_t

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        h = nodes.lam[i + 1] - nodes.lam[i]
        return self.eta * nodes.sigma[i + 1] * torch.sqrt(-torch.expm1(-2 * h))
