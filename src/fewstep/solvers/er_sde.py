r"""ER-SDE-Solvers (Cui et al., arXiv 2309.06169): extended reverse-time SDEs, in ``r = sigma/alpha`` for ``x0``.

With a scale ``phi(r) = r g(r)`` of the noise, exact for a constant ``x0`` (proposition 5 there):

    x_t = alpha_t (phi_t/phi_s x_s/alpha_s + (1 - phi_t/phi_s) x0 + sqrt(r_t^2 - (r_s phi_t/phi_s)^2) xi)

and the derivatives of ``x0`` in ``r``, which the last evaluations give, add ``alpha_t (r_t - r_s + phi_t int dr/phi) x0'``, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.ddim import toward
from fewstep.solvers.stencil import effective_order
from fewstep.solvers.stochastic import check_noise

__all__ = ["ERSDE"]

POINTS = 200  # of the published sum
GAUSS = 32  # points of the quadrature, exact to rounding for these smooth integrands


@dataclass(frozen=True)
class ERSDE(Solver):
    """ER-SDE-Solver of 1 to 3 past evaluations (arXiv 2309.06169, algorithms 1 to 3, of the authors and ComfyUI's ``er_sde``).

    Args:
        steps: evaluations that give the derivatives of ``x0``, 1 to 3.
        scale: of the noise, ``g``: ``er-sde`` is ``exp(r^0.3) + 10``, the paper's best; ``sde`` is ``r^eta``, the reverse-time SDE.
        eta: of the scale ``sde``: 0 is the ODE, 1 the SDE of the noising process. The other scale has none.
        s_noise: a factor of the noise.
        integrals: ``exact``, or ``sum``: the authors' sum over 200 points.

    Raises:
        SolverError: an option that is none of these, or an ``eta`` where it means nothing.
    """

    steps: int = 3
    scale: Literal["er-sde", "sde"] = "er-sde"
    eta: float = 1.0
    s_noise: float = 1.0
    integrals: Literal["exact", "sum"] = "exact"
    references = ("2309.06169",)

    def __post_init__(self) -> None:
        check_noise("ER-SDE-Solver", self.s_noise, self.eta)
        if self.steps not in (1, 2, 3) or self.scale not in ("er-sde", "sde") or self.integrals not in ("exact", "sum"):
            raise SolverError(f"ER-SDE-Solver has steps 1 to 3, scale er-sde or sde, integrals exact or sum, got {self}")
        if self.scale == "er-sde" and self.eta != 1:
            raise SolverError("the scale er-sde has no eta: leave it out, or take scale=sde")

    @property
    def order(self) -> int:
        return self.steps if self.scale == "sde" and self.eta == 0 else min(self.steps, 2)

    @property
    def memory(self) -> int:
        return self.steps

    def _g(self, r: Tensor) -> Tensor:
        return torch.exp(r**0.3) + 10 if self.scale == "er-sde" else r**self.eta

    def _share(self, nodes: Nodes, i: int) -> Tensor:
        """Return ``g_t/g_s``, which is 0 from pure noise."""
        r_s, r_t = (torch.exp(-nodes.lam[k]) for k in (i, i + 1))
        if self.scale == "sde" and self.eta == 0:
            return torch.ones_like(r_t)
        return torch.zeros_like(r_t) if bool(torch.isinf(r_s)) else self._g(r_t) / self._g(r_s)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        x_t = toward(nodes, i, i + 1, nodes.sigma[i + 1] * self._share(nodes, i), x, history[0])
        p = effective_order(nodes, i, self.steps)
        if p > 1:
            r = torch.exp(-nodes.lam[i + 1 - p : i + 2]).flip(0)  # newest first: r_t, r_s, ...
            step, phi_t = r[0] - r[1], r[0] * self._g(r[0])
            first = (history[0] - history[1]) / (r[1] - r[2])
            x_t = x_t + nodes.alpha[i + 1] * (step + phi_t * self._integral(r[0], r[1], lambda u: torch.ones_like(u))) * first
            if p > 2:
                second = (first - (history[1] - history[2]) / (r[2] - r[3])) / ((r[1] - r[3]) / 2)
                weight = step**2 / 2 + phi_t * self._integral(r[0], r[1], lambda u: u - r[1])
                x_t = x_t + nodes.alpha[i + 1] * weight * second
        return x_t, x_t

    def _integral(self, low: Tensor, high: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the integral of ``of(r)/phi(r)`` between two levels."""
        if self.integrals == "sum":
            r = low + torch.arange(POINTS, dtype=torch.float64) * ((high - low) / POINTS)
            return (of(r) / (r * self._g(r))).sum() * (high - low) / POINTS
        places, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(GAUSS))
        span = torch.log(high / low)  # in log r, where the integrand is smooth: dr/phi = dlog r/g
        r = low * torch.exp(span * (places + 1) / 2)
        return (of(r) / self._g(r) * weights).sum() * span / 2

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        share = self._share(nodes, i)
        return self.s_noise * nodes.sigma[i + 1] * torch.sqrt((1 - share) * (1 + share))
