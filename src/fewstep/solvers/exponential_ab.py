r"""Exponential Adams-Bashforth methods in ``lam`` for ``x0`` (Hochbruck and Ostermann, Acta Numerica 2010, section 2.5)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.deis import weighted
from fewstep.solvers.phi import data_moment, interpolation_weights
from fewstep.solvers.stencil import NEVER, effective_order

__all__ = ["ExponentialAB"]


@dataclass(frozen=True)
class ExponentialAB(Solver):
    """Exponential Adams-Bashforth: ``x0`` is the polynomial in ``lam`` through past answers, integrated exactly.

    With 2 steps it is the multistep RES (arXiv 2308.02157), and DPM-Solver++(2M) with ``form=taylor``; with 3 DPM-Solver++(3M) with
    ``third_order=corrected`` too. They differ in how they end.

    Args:
        steps: number of evaluations that the polynomial passes through, 1 to 4; the order.
        lower_order_below: grids of fewer steps end with orders ..., 2, 1 (see `stencil.effective_order`); here by default none.

    Raises:
        SolverError: another number of steps.
    """

    steps: int = 2
    lower_order_below: int = NEVER
    references = ("2308.02157",)

    def __post_init__(self) -> None:
        if self.steps not in (1, 2, 3, 4):
            raise SolverError(f"an exponential Adams-Bashforth method has steps 1 to 4, got {self.steps}")

    @property
    def order(self) -> int:
        return self.steps

    @property
    def memory(self) -> int:
        return self.steps

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        p = effective_order(nodes, i, self.steps, self.lower_order_below)
        s, t = i, i + 1
        h = nodes.lam[t] - nodes.lam[s]
        weights = interpolation_weights([nodes.lam[s - k] - nodes.lam[s] for k in range(p)], [data_moment(k, h) for k in range(p)])
        x_t = nodes.sigma[t] / nodes.sigma[s] * x + nodes.alpha[t] * weighted(weights, history)
        return x_t, x_t
