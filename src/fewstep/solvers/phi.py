r"""The moments of the kernels of exponential integrators, exact in float64 from ``h -> 0`` to ``h = inf``.

Between ``lam_s`` and ``lam_t = lam_s + h`` the sampling ODE has two exact forms (DPM-Solver, arXiv 2206.00927; ++, 2211.01095):

    x_t = sigma_t/sigma_s x_s + alpha_t  int_0^h e^{-(h - r)} D(lam_s + r) dr            (data)
    x_t = alpha_t/alpha_s x_s - alpha_t/alpha_s sigma_s  int_0^h e^{-r} eps(lam_s + r) dr    (noise)

so a solver is a choice of polynomial for ``D`` or ``eps``, and needs the moments of ``r^k / k!`` under either kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["data_moment", "divided_difference_weights", "interpolation_weights", "noise_moment", "phi", "plain_moment"]

_SERIES_BELOW = 1.0  # there the recursion below would lose digits, and 20 terms of the series have none left to lose


def phi(k: int, z: Tensor) -> Tensor:
    r"""Return ``phi_k(z) = sum_n z^n / (n + k)!``, where ``phi_0 = e^z`` and ``phi_{k+1} = (phi_k - 1/k!) / z``. Elementwise, float64."""
    small = z.abs() < _SERIES_BELOW
    tiny, safe = torch.where(small, z, 0.0), torch.where(small, 1.0, z)
    series = torch.zeros_like(tiny)
    for n in reversed(range(20)):
        series = series * tiny + 1 / math.factorial(n + k)
    value = torch.exp(safe)
    for j in range(k):
        value = torch.expm1(safe) / safe if j == 0 else (value - 1 / math.factorial(j)) / safe
    return torch.where(small, series, value)


def data_moment(k: int, h: Tensor) -> Tensor:
    r"""Return ``int_0^h e^{-(h-r)} r^k/k! dr = h^{k+1} phi_{k+1}(-h)``, elementwise; for ``k = 0`` it is 1 at ``h = inf``."""
    return -torch.expm1(-h) if k == 0 else h ** (k + 1) * phi(k + 1, -h)


def noise_moment(k: int, h: Tensor) -> Tensor:
    r"""Return ``int_0^h e^{-r} r^k/k! dr``, the regularised incomplete gamma function, elementwise; 1 at ``h = inf``."""
    return -torch.expm1(-h) if k == 0 else torch.special.gammainc(torch.full_like(h, k + 1.0), h)


def plain_moment(k: int, h: Tensor) -> Tensor:
    r"""Return ``int_0^h r^k/k! dr = h^{k+1}/(k+1)!``, elementwise: that of a method without a kernel."""
    return h ** (k + 1) / math.factorial(k + 1)


def interpolation_weights(offsets: list[Tensor], moments: list[Tensor]) -> Tensor:
    r"""Return weights ``[p, *E]`` that integrate the polynomial through ``p`` values.

    They solve ``sum_j w_j offset_j^k / k! = moment_k`` for ``k = 0 .. p-1``.

    Args:
        offsets: where the values are, in ``lam`` from the step's start, each ``[]``.
        moments: integrals of ``r^k/k!`` under the kernel, each ``[*E]``.
    """
    at, wanted = torch.stack(offsets), torch.stack(moments)
    rows = [at**k / math.factorial(k) for k in range(len(moments))]
    return torch.linalg.solve(torch.stack(rows), wanted.flatten(1) if wanted.ndim > 1 else wanted).reshape(wanted.shape)


def divided_difference_weights(offsets: list[Tensor], moments: list[Tensor]) -> Tensor:
    r"""Return weights ``[p, *E]`` with ``k!`` times the divided difference over the first ``k + 1`` points as the k-th derivative.

    Arguments are those of `interpolation_weights`.
    """
    weights = [torch.zeros_like(moments[0]) for _ in offsets]
    for k, moment in enumerate(moments):
        for j in range(k + 1):
            others = [offsets[j] - offsets[m] for m in range(k + 1) if m != j]
            weights[j] = weights[j] + math.factorial(k) * moment / math.prod(others, start=torch.ones_like(offsets[j]))
    return torch.stack(weights)
