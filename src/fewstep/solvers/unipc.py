r"""UniPC (Zhao et al., arXiv 2302.04867): a predictor, and a corrector that raises its order with no further evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.ddim import first_order
from fewstep.solvers.phi import data_moment
from fewstep.solvers.stencil import ALWAYS, effective_order

__all__ = ["UniPC"]


@dataclass(frozen=True)
class UniPC(Solver):
    """UniPC-p in data prediction (Zhao et al., arXiv 2302.04867): the evaluation at the predicted point also corrects the step to it.

    Both halves add to the first-order step a sum ``alpha_t B(h) sum_k rho_k (D_k - D_s)/r_k`` over past points (and, in the
    corrector, the new one) whose weights match the exact moments. Where there is a single such point the paper takes
    ``rho = 1/2``, and only there does ``B`` matter: ``bh1`` has ``B = h``, ``bh2`` has ``B = 1 - e^{-h}``;
    ``exact`` solves for that weight too.

    Args:
        steps: ``p``, the predictor's order.
        weights: ``bh1``, ``bh2`` or ``exact``.
        corrector: without it this is UniP.
        uncorrected: steps that are left as predicted, counted from 0 (diffusers' ``disable_corrector``: early ones, at large guidance).
        lower_order_below: grids of fewer steps end with orders ..., 2, 1 (see `stencil.effective_order`); here by default all.
    """

    steps: int = 2
    weights: Literal["bh1", "bh2", "exact"] = "bh2"
    corrector: bool = True
    lower_order_below: int = ALWAYS
    uncorrected: tuple[int, ...] = ()
    references = ("2302.04867",)

    def __post_init__(self) -> None:
        if not (isinstance(self.uncorrected, tuple | list) and all(type(i) is int and i >= 0 for i in self.uncorrected)):
            raise SolverError(f"uncorrected is a list of steps, counted from 0, got {self.uncorrected!r}")
        object.__setattr__(self, "uncorrected", tuple(self.uncorrected))
        if self.steps not in (1, 2, 3) or self.weights not in ("bh1", "bh2", "exact"):
            raise SolverError(f"UniPC has steps 1, 2, 3 and weights bh1, bh2 or exact; got {self}")

    @property
    def order(self) -> int:
        return self.steps + self.corrector

    @property
    def memory(self) -> int:
        return self.steps + self.corrector

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        if self.corrector and i > 0 and i - 1 not in self.uncorrected and bool(torch.isfinite(nodes.lam[i - 1])):
            p = effective_order(nodes, i - 1, self.steps, self.lower_order_below)
            past = {i - 1 - k: history[1 + k] for k in range(p)}
            x = self.step(nodes, i - 1, i, anchor, past, new=history[0])
        p = effective_order(nodes, i, self.steps, self.lower_order_below)
        return x, self.step(nodes, i, i + 1, x, {i - k: history[k] for k in range(p)})

    def step(self, nodes: Nodes, s: int, t: int, x: Tensor, past: dict[int, Tensor], new: Tensor | None = None) -> Tensor:
        """Return the state at node ``t`` from ``x`` at node ``s`` (eq. 3 and 9).

        Args:
            nodes: of the grid.
            s, t: start and end of the step.
            x: the state at ``s``.
            past: evaluations by node: ``s`` and earlier ones.
            new: the evaluation at ``t``, to correct a step.
        """
        x_t = first_order(nodes, s, t, x, past[s])
        h = nodes.lam[t] - nodes.lam[s]
        others = [(k, value) for k, value in past.items() if k != s] + ([] if new is None else [(t, new)])
        if not others:
            return x_t
        r = torch.stack([(nodes.lam[k] - nodes.lam[s]) / h for k, _ in others])
        if len(others) == 1 and self.weights != "exact":
            scale = -torch.expm1(-h) if self.weights == "bh2" else h
            rho = scale.reshape(1) / 2
        else:
            powers = torch.stack([r**n for n in range(len(r))])
            moments = torch.stack([data_moment(n, h) / h**n * math.factorial(n) for n in range(1, len(r) + 1)])
            rho = torch.linalg.solve(powers, moments)
        return x_t + nodes.alpha[t] * sum(rho[k] / r[k] * (value - past[s]) for k, (_, value) in enumerate(others))
