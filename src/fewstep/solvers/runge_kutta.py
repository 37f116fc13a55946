r"""Runge-Kutta methods: exponential ones in ``lam`` for ``x0``, and classical ones in ``r = sigma/alpha`` for ``eps``.

Exponential (Hochbruck and Ostermann, Acta Numerica 2010, section 2.3): stage ``i`` lies at ``lam_s + c_i h``, and

    x_i = sigma_i/sigma_s x_s + alpha_i h sum_j a_ij D_j

with ``a_ij`` made of ``phi_k(-c_i h)``. Classical, which DEIS calls rhoRK: ``z_i = z_s + (r_t - r_s) sum_j a_ij eps_j``, ``z = x/alpha``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.core.prediction import to_x0
from fewstep.core.tableau import Nodes
from fewstep.runtime.errors import SolverError
from fewstep.solvers.ddim import first_order
from fewstep.solvers.deis import weighted
from fewstep.solvers.phi import phi
from fewstep.solvers.stages import RungeKutta
from fewstep.solvers.stencil import noise_or_data

__all__ = ["ETDRK4", "RES2S", "RES3S", "RhoRK3", "RhoRK4"]


class _ExponentialRK(RungeKutta):
    references = ("2308.02157",)

    def forward(self, nodes: Nodes, s: int, t: int, end: int, x_s: Tensor, answers: list[Tensor]) -> Tensor:
        h = nodes.lam[end] - nodes.lam[s]
        return nodes.sigma[t] / nodes.sigma[s] * x_s + nodes.alpha[t] * h * weighted(self.row(len(answers), h), answers)


@dataclass(frozen=True)
class RES2S(_ExponentialRK):
    """RES of 2 stages: exponential Runge-Kutta of order 2 (Zhang et al., arXiv 2308.02157; Hochbruck and Ostermann 2010, section 2.3).

    With ``c2=1`` it is ETD2RK (Cox and Matthews 2002, eq. 22).

    Args:
        c2: the place of the second evaluation, above 0 to 1.

    Raises:
        SolverError: another place.
    """

    c2: float = 0.5
    stages = 2
    order = 2

    def __post_init__(self) -> None:
        if not 0 < self.c2 <= 1:
            raise SolverError(f"the second stage of RES lies at c2 above 0 to 1, got {self.c2}")

    @property
    def c(self) -> tuple[float, ...]:
        return (self.c2,)

    def row(self, stage: int, h: Tensor) -> list[Tensor]:
        if stage == 1:
            return [self.c2 * phi(1, -self.c2 * h)]
        b2 = phi(2, -h) / self.c2
        return [phi(1, -h) - b2, b2]


@dataclass(frozen=True)
class RES3S(_ExponentialRK):
    """RES of 3 stages: exponential Runge-Kutta of order 3 (Zhang et al., arXiv 2308.02157; Hochbruck and Ostermann 2010, section 2.3).

    Args:
        c2, c3: the places of the second and third evaluation, above 0 to 1.

    Raises:
        SolverError: other places, ``c2 = 2/3``, or ``c2 = c3``, for which the conditions of order have no answer.
    """

    c2: float = 0.5
    c3: float = 1.0
    stages = 3
    order = 3

    def __post_init__(self) -> None:
        if not (0 < self.c2 <= 1 and 0 < self.c3 <= 1) or abs(self.c2 - 2 / 3) < 1e-6 or abs(self.c2 - self.c3) < 1e-6:
            raise SolverError(f"the stages of RES lie at two places above 0 to 1, c2 not at 2/3, got c2={self.c2} and c3={self.c3}")

    @property
    def c(self) -> tuple[float, ...]:
        return (self.c2, self.c3)

    def row(self, stage: int, h: Tensor) -> list[Tensor]:
        c2, c3 = self.c2, self.c3
        gamma = (3 * c3**2 - 2 * c3) / (c2 * (2 - 3 * c2))  # 2 (gamma c2 + c3) = 3 (gamma c2^2 + c3^2)
        if stage == 1:
            return [c2 * phi(1, -c2 * h)]
        if stage == 2:
            a32 = gamma * c2 * phi(2, -c2 * h) + c3**2 / c2 * phi(2, -c3 * h)
            return [c3 * phi(1, -c3 * h) - a32, a32]
        b3 = phi(2, -h) / (gamma * c2 + c3)
        return [phi(1, -h) - (gamma + 1) * b3, gamma * b3, b3]


@dataclass(frozen=True)
class ETDRK4(_ExponentialRK):
    """ETD Runge-Kutta of 4 stages and order 4 (Cox and Matthews, J. Comput. Phys. 176, 2002, eq. 26-29; Krogstad, 203, 2005).

    Args:
        form: ``cox-matthews`` or ``krogstad``, whose inner stages are of higher order.

    Raises:
        SolverError: another form.
    """

    form: Literal["cox-matthews", "krogstad"] = "cox-matthews"
    stages = 4
    order = 4

    def __post_init__(self) -> None:
        if self.form not in ("cox-matthews", "krogstad"):
            raise SolverError(f"ETDRK4 has form cox-matthews or krogstad, got {self.form!r}")

    @property
    def c(self) -> tuple[float, ...]:
        return (0.5, 0.5, 1.0)

    def row(self, stage: int, h: Tensor) -> list[Tensor]:
        one, two, half = phi(1, -h), phi(2, -h), phi(1, -h / 2)
        zero = torch.zeros_like(h)
        if stage == 1:
            return [half / 2]
        if stage == 4:
            three = phi(3, -h)
            middle = 2 * two - 4 * three
            return [one - 3 * two + 4 * three, middle, middle, 4 * three - two]
        if self.form == "krogstad":
            inner = phi(2, -h / 2)
            return [half / 2 - inner, inner] if stage == 2 else [one - 2 * two, zero, 2 * two]
        return [zero, half / 2] if stage == 2 else [half / 2 * torch.expm1(-h / 2), zero, half]


class _LevelRK(RungeKutta):
    references = ("2204.13902",)
    in_level = True
    rows: ClassVar[tuple[tuple[float, ...], ...]]

    @property
    def c(self) -> tuple[float, ...]:
        return tuple(sum(row) for row in self.rows[:-1])

    def row(self, stage: int, h: Tensor) -> Sequence[float]:  # noqa: ARG002
        return self.rows[stage - 1]

    def record(self, nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
        first = bool(nodes.alpha[0] == 0) and i < self.stages  # the whole step from alpha = 0 goes by x0
        return x0 if first else noise_or_data(nodes, i, x, x0)

    def forward(self, nodes: Nodes, s: int, t: int, end: int, x_s: Tensor, answers: list[Tensor]) -> Tensor:
        r = nodes.sigma / nodes.alpha
        return nodes.alpha[t] * (x_s / nodes.alpha[s] + (r[end] - r[s]) * weighted(self.rows[len(answers) - 1], answers))

    def to_clean(self, nodes: Nodes, s: int, x: Tensor, answer: Tensor) -> Tensor:
        if bool(nodes.alpha[s] > 0):
            answer = to_x0("epsilon", answer, x, nodes.alpha[s], nodes.sigma[s])
        return first_order(nodes, s, s + 1, x, answer)


@dataclass(frozen=True)
class RhoRK3(_LevelRK):
    """rho3Kutta-DEIS: Kutta's method of 3 stages in ``r = sigma/alpha`` for ``eps`` (Zhang and Chen, arXiv 2204.13902)."""

    stages = 3
    order = 3
    rows = ((1 / 2,), (-1.0, 2.0), (1 / 6, 2 / 3, 1 / 6))


@dataclass(frozen=True)
class RhoRK4(_LevelRK):
    """rho4RK-DEIS: the classical method of 4 stages in ``r = sigma/alpha`` for ``eps`` (Zhang and Chen, arXiv 2204.13902)."""

    stages = 4
    order = 4
    rows = ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
