"""Quantiles of the beta distribution, without a library of special functions."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["beta_quantiles"]

HALVINGS = 54  # of [0, 1], so that a quantile is met to its last bit


def beta_quantiles(p: Tensor, alpha: float, beta: float) -> Tensor:
    """Return the quantiles of the distribution Beta(alpha, beta) by bisection of its distribution function.

    Args:
        p: probabilities ``[N]`` from 0 to 1.
        alpha: first parameter, above 0 and up to 1000.
        beta: second parameter, above 0 and up to 1000.

    Returns:
        The quantiles ``[N]``, float64, to the rounding of ``p``.
    """
    wanted = p.detach().double().numpy()
    low, high = np.zeros_like(wanted), np.ones_like(wanted)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = _distribution(middle, alpha, beta) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    found = np.where(wanted <= 0, 0.0, np.where(wanted >= 1, 1.0, (low + high) / 2))
    return torch.from_numpy(found)


def _distribution(x: npt.NDArray[np.float64], alpha: float, beta: float) -> npt.NDArray[np.float64]:
    """Return the regularized incomplete beta function ``I_x(alpha, beta) [N]`` at ``x [N]`` (DLMF 8.17.22)."""
    mirrored = x > (alpha + 1) / (alpha + beta + 2)  # where the fraction converges fast for 1 - x, I_x(a, b) = 1 - I_(1-x)(b, a)
    a, b, z = np.where(mirrored, beta, alpha), np.where(mirrored, alpha, beta), np.where(mirrored, 1 - x, x)
    m = np.arange(1.0, 31 + 4 * math.isqrt(int(max(alpha, beta))))[:, None]  # terms: of the order of the larger parameter's root
    even = m * (b - m) * z / ((a + 2 * m - 1) * (a + 2 * m))
    odd = -(a + m - 1) * (a + b + m - 1) * z / ((a + 2 * m - 2) * (a + 2 * m - 1))
    fraction = np.ones_like(z)
    for i in range(len(m) - 1, -1, -1):
        fraction = 1 + odd[i] / (1 + even[i] / fraction)
    log_beta = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
    tiny = np.finfo(np.float64).tiny
    power = np.exp(a * np.log(np.maximum(z, tiny)) + b * np.log1p(-np.minimum(z, 1 - 1e-16)) - log_beta)
    share = power / (a * fraction)
    return np.where(mirrored, 1 - share, share)
