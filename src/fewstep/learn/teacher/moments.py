r"""Moments that calibration accumulates, and the statistics that are fitted to them.

In ``X = x/alpha`` along a trajectory, with ``D' = dD/dlam`` and Rademacher ``v``, the statistics at each ``lam`` are (Zheng et al.,
arXiv 2310.13268)

    l = 1 - E[v (dD/dX) v],        F = (1 - l) X - D,        s, b = the regression of F' on F

and ``F`` and ``F'`` are linear in ``X, D, D'`` with coefficients that depend on ``l`` alone. So four means and five second moments
are enough, no datum is stored, and any pooling over elements is fitted afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

import torch
from torch import Tensor

from fewstep.core.pooling import Pool, shared_axes

__all__ = ["POOLS", "Moments"]

POOLS: dict[str, tuple[Pool, Pool]] = {  # how l and s are shared, and how b is
    **{pool: (pool, pool) for pool in get_args(Pool)},
    "channel/element": ("channel", "element"),
    "scalar/element": ("scalar", "element"),
    "scalar/channel": ("scalar", "channel"),
}
MEANS = ("X", "D", "dD", "vJv")
SECOND = ((0, 0), (1, 1), (0, 1), (0, 2), (1, 2))  # pairs of them: XX, DD, XD, XD', DD'
LEAST_VARIANCE = 1e-12  # of F, relative to its mean over elements
LARGEST_SLOPE = 4.0  # of s; beyond it lies only noise


class Moments:
    """Means and centred second moments of ``X, D, D'`` and ``v J v`` at every level: float64, additive over batches and processes."""

    def __init__(self, levels: int, shape: Sequence[int]) -> None:
        self.count = 0
        self.mean = torch.zeros(levels, len(MEANS), *shape, dtype=torch.float64)
        self.second = torch.zeros(levels, len(SECOND), *shape, dtype=torch.float64)  # sums of products of deviations

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], count: int) -> Moments:
        """Rebuild moments from their `tensors`."""
        mean, second = tensors["mean"], tensors["second"]
        made = cls(len(mean), mean.shape[2:])
        made.mean, made.second, made.count = mean, second, count
        return made

    def tensors(self) -> dict[str, Tensor]:
        """Return everything except `count`, for serialisation."""
        return {"mean": self.mean, "second": self.second}

    @classmethod
    def of(cls, batch: Iterable[Tensor], levels: int, shape: Sequence[int], axes: tuple[int, ...] = ()) -> Moments:
        """Take the moments of one batch: at each level ``[4, B, *D]`` in the order of `MEANS`.

        Elements along ``axes``, counted from the last, are data of one kind: they share a mean, and their second moments are averaged.
        That is all that a fit needs whose numbers they share, and ``shape`` is 1 there.
        """
        made = cls(levels, shape)
        for k, values in enumerate(batch):
            values = values.cpu().double()
            made.count, made.mean[k] = values.shape[1], _mean(values.mean(1), axes)
            off = values - made.mean[k][:, None]
            made.second[k] = torch.stack([_mean((off[one] * off[two]).sum(0), axes) for one, two in SECOND])
        return made

    def merge(self, other: Moments) -> None:
        """Merge the moments of other data (Chan, Golub and LeVeque, 1979)."""
        total = self.count + other.count
        gap = other.mean - self.mean
        between = torch.stack([gap[:, one] * gap[:, two] for one, two in SECOND], 1)
        self.second += other.second + between * (self.count * other.count / total)
        self.mean += gap * (other.count / total)
        self.count = total

    def fit(self, lam: Tensor, pool: str) -> tuple[Tensor, Tensor, Tensor]:
        """Fit ``l, s, b [S+1, *E]`` by the least squares of the paper's section 3.1, all together and each shared as ``pool`` says."""
        shared, shared_b = (shared_axes(words, self.mean.ndim - 2) for words in POOLS[pool])
        X, D, dD, vJv = self.mean.unbind(1)
        XX, DD, XD, XdD, DdD = (self.second / self.count).unbind(1)
        l = _mean(1 - vJv, shared)
        (dl,) = torch.gradient(l, spacing=(lam,), dim=0)
        c = 1 - l
        d = c + dl
        f, df = c * X - D, -dD + c * D - d * X  # E[F], E[F']
        var = c**2 * XX - 2 * c * XD + DD
        cov = c * (-XdD + c * XD - d * XX) - (-DdD + c * DD - d * XD)
        f_b, df_b = _mean(f, shared_b), _mean(df, shared_b)
        var, cov = var + (f - f_b) ** 2, cov + (f - f_b) * (df - df_b)  # elements with one b spread around its own mean
        terms = (c**2 * XX + DD).mean(tuple(range(1, var.ndim)), keepdim=True)  # var itself may cancel to nothing, or below
        floor = (LEAST_VARIANCE * terms).clamp_min(1e-30)
        s = (_mean(cov, shared) / _mean(var, shared).clamp_min(floor)).clamp(-LARGEST_SLOPE, LARGEST_SLOPE)
        b = _mean(df_b - s * f_b, shared_b)
        return l, s, b


def _mean(value: Tensor, axes: tuple[int, ...]) -> Tensor:
    return value.mean(axes, keepdim=True) if axes else value
