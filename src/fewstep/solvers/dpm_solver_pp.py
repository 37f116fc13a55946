r"""DPM-Solver++, multistep, and its SDE form (Lu et al., arXiv 2211.01095): polynomials for ``D`` from past evaluations.

The same polynomials for ``eps`` make the multistep DPM-Solver, whose file imports them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.phi import data_moment, phi
from fewstep.solvers.stencil import effective_order
from fewstep.solvers.stochastic import added, carried, check_noise

__all__ = ["DPMSolverPP", "SDEDPMSolverPP2M", "multistep_integral"]

Form = Literal["midpoint", "taylor"]
ThirdOrder = Literal["published", "corrected"]


def multistep_integral(
    nodes: Nodes,
    i: int,
    p: int,
    values: list[Tensor],
    moment: Callable[[int, Tensor], Tensor],
    form: Form = "midpoint",
    third_order: ThirdOrder = "published",
) -> Tensor:
    """Return the integral over the step after evaluation ``i`` of a kernel times the polynomial through past values.

    Args:
        nodes: of the grid.
        i: number of the evaluation.
        p: number of values that the polynomial passes through.
        values: of past evaluations, newest first.
        moment: ``(k, h)`` -> integral of ``r^k/k!`` under the kernel, `data_moment` or `noise_moment`.
        form, third_order: as of `DPMSolverPP`.
    """
    h = nodes.lam[i + 1] - nodes.lam[i]
    total = moment(0, h) * values[0]
    if p == 1:
        return total
    r0 = (nodes.lam[i] - nodes.lam[i - 1]) / h
    slope = (values[0] - values[1]) / r0  # times h
    if p == 2:
        return total + (moment(0, h) / 2 if form == "midpoint" else moment(1, h) / h) * slope
    r1 = (nodes.lam[i - 1] - nodes.lam[i - 2]) / h
    second = (slope - (values[1] - values[2]) / r1) / (r0 + r1)  # a divided difference: half of h^2 times the second derivative
    factor = 2 if third_order == "corrected" else 1
    return total + moment(1, h) / h * (slope + r0 * second) + factor * moment(2, h) / h**2 * second


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """Multistep DPM-Solver++ of 1, 2 or 3 past evaluations (Lu et al., arXiv 2211.01095; 2M is algorithm 2 there).

    Args:
        steps: number of evaluations that the polynomial passes through, 1 to 3.
        form: ``midpoint`` weighs the slope of 2M by ``(1 - e^{-h})/2``, ``taylor`` exactly.
        third_order: the published 3M weighs its second divided difference as if it were half a derivative and so converges with
            order 2; ``corrected`` doubles that term. ``published`` is the default, for parity with every other library.
        lower_order_below: grids of fewer steps end with orders ..., 2, 1 (see `stencil.effective_order`).
        euler_at_final: make the last step of first order on every grid.

    Raises:
        SolverError: an option that is none of these.
    """

    steps: int = 2
    form: Form = "midpoint"
    third_order: ThirdOrder = "published"
    lower_order_below: int = 15
    euler_at_final: bool = False
    references = ("2211.01095",)

    def __post_init__(self) -> None:
        if self.steps not in (1, 2, 3) or self.form not in ("midpoint", "taylor") or self.third_order not in ("published", "corrected"):
            raise SolverError(f"DPM-Solver++ has steps 1, 2, 3, form midpoint or taylor, third_order published or corrected; got {self}")

    @property
    def order(self) -> int:
        return 2 if self.steps == 3 and self.third_order == "published" else self.steps

    @property
    def memory(self) -> int:
        return self.steps

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        p = effective_order(nodes, i, self.steps, self.lower_order_below, euler_at_final=self.euler_at_final)
        s, t = i, i + 1
        integral = multistep_integral(nodes, i, p, history, data_moment, self.form, self.third_order)
        x_t = nodes.sigma[t] / nodes.sigma[s] * x + nodes.alpha[t] * integral
        return x_t, x_t


@dataclass(frozen=True)
class SDEDPMSolverPP2M(Solver):
    """SDE-DPM-Solver++(2M) (Lu et al., arXiv 2211.01095): the polynomial of 2M in the reverse-time SDE, which adds noise.

    Its kernel is ``e^{-(1+eta)(h-r)}``.

    Args:
        form, lower_order_below, euler_at_final: as of `DPMSolverPP`.
        eta: share of noise: 0 is the ODE's 2M, 1 the SDE of the noising process.
        s_noise: a factor of the noise.

    Raises:
        SolverError: an option that is none of these.
    """

    form: Form = "midpoint"
    lower_order_below: int = 15
    euler_at_final: bool = False
    eta: float = 1.0
    s_noise: float = 1.0
    references = ("2211.01095",)
    order = 2
    memory = 2

    def __post_init__(self) -> None:
        check_noise("SDE-DPM-Solver++", self.s_noise, self.eta)
        if self.form not in ("midpoint", "taylor"):
            raise SolverError(f"SDE-DPM-Solver++ has form midpoint or taylor, got {self.form!r}")

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        s, t = i, i + 1
        h = nodes.lam[t] - nodes.lam[s]
        rate = 1 + self.eta
        gain = -nodes.alpha[t] * torch.expm1(-rate * h)
        x_t = carried(nodes, s, t, self.eta) * x + gain * history[0]
        if effective_order(nodes, i, 2, self.lower_order_below, euler_at_final=self.euler_at_final) == 2:
            slope = (history[0] - history[1]) * h / (nodes.lam[s] - nodes.lam[s - 1])
            weight = gain / 2 if self.form == "midpoint" else nodes.alpha[t] * rate * h * phi(2, -rate * h)
            x_t = x_t + weight * slope
        return x_t, x_t

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        return self.s_noise * added(nodes, i, i + 1, self.eta)
