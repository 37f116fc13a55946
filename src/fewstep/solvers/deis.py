r"""DEIS and iPNDM (Zhang and Chen, arXiv 2204.13902): Adams-Bashforth methods on the noise form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.ddim import first_order
from fewstep.solvers.phi import interpolation_weights, noise_moment
from fewstep.solvers.stencil import effective_order, noise_or_data

__all__ = ["ADAMS_BASHFORTH", "DEIS", "IPNDM", "NoiseMultistep", "weighted"]


def weighted(weights: Sequence[Any] | Tensor, values: Sequence[Tensor]) -> Tensor:
    """Return the sum of the first values by their weights."""
    return sum((weights[k] * values[k] for k in range(1, len(weights))), weights[0] * values[0])


class NoiseMultistep(Solver):
    """A multistep solver in ``eps``, whose step is ``x_t = alpha_t/alpha_s (x_s - sigma_s integral)``.

    The integral estimates ``int_0^h e^{-r} eps dr`` from past evaluations. From ``alpha = 0`` the step is of first order.
    """

    steps: Any  # int, as a field or a class attribute
    references = ("2204.13902",)

    def __post_init__(self) -> None:
        if self.steps not in (1, 2, 3, 4):
            raise SolverError(f"{type(self).__name__} has steps 1 to 4, got {self.steps}")

    @property
    def memory(self) -> int:
        return self.steps

    def record(self, nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
        return noise_or_data(nodes, i, x, x0)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        s, t = i, i + 1
        if bool(nodes.alpha[s] == 0):
            x_t = first_order(nodes, s, t, x, history[0])
        else:
            x_t = nodes.alpha[t] / nodes.alpha[s] * (x - nodes.sigma[s] * self.integral(nodes, i, history))
        return x_t, x_t

    def usable(self, nodes: Nodes, i: int) -> int:
        """Return how many of ``steps`` evaluations there are of ``eps``: at ``alpha = 0`` it is not known."""
        return min(self.steps, i if bool(nodes.alpha[0] == 0) else i + 1)

    @abstractmethod
    def integral(self, nodes: Nodes, i: int, eps: list[Tensor]) -> Tensor:
        """Return the estimate of ``int_0^h e^{-r} eps(lam_s + r) dr`` over the step after evaluation ``i``; ``eps`` newest first."""


@dataclass(frozen=True)
class DEIS(NoiseMultistep):
    """tAB-DEIS: ``eps`` is the polynomial through the last ``steps`` evaluations, integrated exactly (arXiv 2204.13902, eq. 14 and 15).

    The polynomial is in ``lam``, the choice that diffusers calls ``logrho``.

    Args:
        steps: number of evaluations that the polynomial passes through, 1 to 4; the order.
        lower_order_below: grids of fewer steps end with orders ..., 2, 1 (see `stencil.effective_order`).

    Raises:
        SolverError: another number of steps.
    """

    steps: int = 3
    lower_order_below: int = 15

    @property
    def order(self) -> int:
        return self.steps

    def integral(self, nodes: Nodes, i: int, eps: list[Tensor]) -> Tensor:
        p = effective_order(nodes, i, self.steps, self.lower_order_below)
        h = nodes.lam[i + 1] - nodes.lam[i]
        weights = interpolation_weights([nodes.lam[i - k] - nodes.lam[i] for k in range(p)], [noise_moment(k, h) for k in range(p)])
        return weighted(weights, eps)


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class IPNDM(NoiseMultistep):
    """iPNDM: DDIM's step with ``eps`` replaced by the Adams-Bashforth mean of the last ``steps`` evaluations (arXiv 2204.13902).

    The weights are those of equal steps whatever the grid, so on a smooth grid the order is 2 however many are used.

    Args:
        steps: number of evaluations in the mean, 1 to 4.

    Raises:
        SolverError: another number of steps.
    """

    steps: int = 4
    references = ("2204.13902", "2202.09778")

    @property
    def order(self) -> int:
        return min(self.steps, 2)

    def integral(self, nodes: Nodes, i: int, eps: list[Tensor]) -> Tensor:
        mean = weighted(ADAMS_BASHFORTH[self.usable(nodes, i) - 1], eps)
        return noise_moment(0, nodes.lam[i + 1] - nodes.lam[i]) * mean
