"""Measure distances: to the exact solution of the sampling ODE, and between sets of images in the features of some network.

All sums are in float64, so these distances agree with torchmetrics on the same features; here the moments of the data are
taken once for all rows of a benchmark and the matrix square root is that of a symmetric matrix, fast enough to resample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.evaluate.metrics.features import FEATURES, load_features
from fewstep.runtime.errors import FewstepError

__all__ = [
    "FEATURES",
    "Gaussian",
    "Kernel",
    "Manifold",
    "features_of",
    "frechet_distance",
    "kernel_distance",
    "load_features",
    "precision_recall",
    "rmse",
]

BATCH = 256  # images, through the network
BLOCK = 2**22  # numbers of a matrix of pairs in memory at once
NEIGHBOURS = 3


def rmse(samples: Tensor, exact: Tensor) -> float:
    """Return the root mean square of ``samples - exact`` over all samples and elements ``[B, *D]``."""
    return float((samples.double() - exact.double()).square().mean().sqrt())


@torch.no_grad()
def features_of(images: Tensor, network: nn.Module, device: torch.device | None = None) -> Tensor:
    """Compute a network's features ``[B, F]``, float64 on the CPU, of images ``[B, *D]``.

    Raises:
        FewstepError: the images or the features are not finite, or the network does not answer one vector for each image.
    """
    if not bool(torch.isfinite(images).all()):
        raise FewstepError("images that are not finite have no features")
    parts = [network(part if device is None else part.to(device)).double().cpu() for part in images.float().split(BATCH)]
    found = torch.cat(parts) if parts else torch.zeros(0, 0, dtype=torch.float64)
    if found.ndim != 2 or len(found) != len(images):
        raise FewstepError(f"features should have shape [{len(images)}, F], {type(network).__name__} answered {tuple(found.shape)}")
    if not bool(torch.isfinite(found).all()):
        raise FewstepError(f"{type(network).__name__} answers features that are not finite to finite images")
    return found


@dataclass(frozen=True, eq=False)
class Gaussian:
    """The normal distribution with the mean ``[F]`` and covariance ``[F, F]`` of some features; ``root`` is the latter's square root."""

    mean: Tensor
    root: Tensor
    trace: float

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Fit it to features ``[B, F]``.

        Raises:
            FewstepError: fewer than 2.
        """
        _need_two(features)
        mean = features.mean(0)
        centred = features - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / (len(features) - 1))
        values = values.clamp(min=0)
        return cls(mean, (vectors * values.sqrt()) @ vectors.T, float(values.sum()))

    def distance(self, features: Tensor) -> float:
        """Return the Frechet distance ``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))`` to the normal distribution of features ``[B, F]``
        (Heusel et al., arXiv 1706.08500).

        The trace of the root is the sum of the singular values of ``Y C^(1/2)``, ``Y`` the centred features over ``sqrt(B - 1)``.

        Raises:
            FewstepError: fewer than 2.
        """
        _need_two(features)
        mean, scale = features.mean(0), len(features) - 1
        centred = features - mean
        overlap = float(torch.linalg.svdvals(centred @ self.root).sum()) / scale**0.5
        own = float(centred.square().sum()) / scale
        return max(0.0, float((self.mean - mean).square().sum()) + self.trace + own - 2 * overlap)


def _need_two(*sets: Tensor) -> None:
    if min(map(len, sets)) < 2:
        raise FewstepError(f"a distance between sets of images needs at least 2 a side, got {' and '.join(str(len(one)) for one in sets)}")


def frechet_distance(real: Tensor, fake: Tensor, features: nn.Module) -> float:
    """Return the Frechet distance between two sets of images ``[B, *D]`` in named features, see `Gaussian.distance`.

    Raises:
        FewstepError: fewer than 2 images on a side, or images that are not finite.
    """
    return Gaussian.of(features_of(real, features)).distance(features_of(fake, features))


def _affinity(a: Tensor, b: Tensor) -> Tensor:
    """Return ``k(x, y) = (x.y/F + 1)^3`` of all pairs, ``[A, F], [B, F] -> [A, B]``."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, columns))
    return (slice(k, k + step) for k in range(0, rows, step))


@dataclass(frozen=True, eq=False)
class Kernel:
    """The squared maximum mean discrepancy to some features ``[B, F]`` with the kernel of `_affinity` (KID; Binkowski et al.,
    arXiv 1801.01401), without bias. Over all pairs; the usual mean over subsets of 1000 estimates the same.
    """

    features: Tensor
    own: float  # mean of k over its pairs of different features

    @classmethod
    def of(cls, features: Tensor) -> Kernel:
        """Precompute it for features ``[B, F]``.

        Raises:
            FewstepError: fewer than 2.
        """
        _need_two(features)
        every = torch.ones(1, len(features), dtype=torch.float64)
        return cls(features, float(_pair_means(features, every)))

    def distance(self, features: Tensor) -> float:
        """Return the distance to features ``[B, F]``; it may be a little below zero.

        Raises:
            FewstepError: fewer than 2.
        """
        _need_two(features)
        return float(self.distances(features, torch.arange(len(features))[None]))

    def distances(self, features: Tensor, subsets: Tensor) -> Tensor:
        """Return the distance to each of the subsets ``[S, m]`` of features ``[B, F]``, ``[S]``."""
        chosen = torch.zeros(len(subsets), len(features), dtype=torch.float64)
        chosen.scatter_(1, subsets, 1.0)
        across = torch.zeros(len(features), dtype=torch.float64)
        for rows in _row_blocks(len(features), len(self.features)):
            across[rows] = _affinity(features[rows], self.features).mean(1)
        return self.own + _pair_means(features, chosen) - 2 * across[subsets].mean(1)


def _pair_means(features: Tensor, chosen: Tensor) -> Tensor:
    """Return the kernel's mean ``[S]`` over pairs of different features ``[B, F]`` in each subset, given by ones in ``chosen [S, B]``."""
    total = torch.zeros(len(chosen), dtype=torch.float64)
    for rows in _row_blocks(len(features), len(features)):
        block = _affinity(features[rows], features)
        block.diagonal(rows.start).zero_()
        total += (chosen[:, rows] * (chosen @ block.T)).sum(1)
    count = chosen.sum(1)
    return total / (count * (count - 1))


def kernel_distance(real: Tensor, fake: Tensor, features: nn.Module) -> float:
    """Return the kernel distance between two sets of images ``[B, *D]`` in named features, see `Kernel`.

    Raises:
        FewstepError: fewer than 2 images on a side, or images that are not finite.
    """
    return Kernel.of(features_of(real, features)).distance(features_of(fake, features))


@dataclass(frozen=True, eq=False)
class Manifold:
    """Features ``[B, F]`` and the distance of each to its third nearest neighbour among them, ``[B]``."""

    features: Tensor
    radius: Tensor

    @classmethod
    def of(cls, features: Tensor, neighbours: int = NEIGHBOURS) -> Manifold:
        """Precompute it for features ``[B, F]``.

        Raises:
            FewstepError: not more of them than neighbours.
        """
        if len(features) <= neighbours:
            raise FewstepError(f"{neighbours} neighbours need more features than {len(features)}")
        blocks = _row_blocks(len(features), len(features))
        return cls(features, torch.cat([_distances(features[rows], features).kthvalue(neighbours + 1).values for rows in blocks]))

    def share_inside(self, features: Tensor) -> float:
        """Return the share of features ``[A, F]`` that are no farther from some feature here than its radius."""
        blocks = _row_blocks(len(features), len(self.features))
        inside = [(_distances(features[rows], self.features) <= self.radius).any(1) for rows in blocks]
        return float(torch.cat(inside).double().mean())


def precision_recall(real: Tensor | Manifold, fake: Tensor) -> tuple[float, float]:
    """Return the share of the fakes in the manifold of the real features, and of the real ones in that of the fakes, ``[A, F]`` and
    ``[B, F]`` (Kynkaanniemi et al., arXiv 1904.06991).

    Raises:
        FewstepError: not more features than neighbours on a side.
    """
    real = real if isinstance(real, Manifold) else Manifold.of(real)
    return real.share_inside(fake), Manifold.of(fake).share_inside(real.features)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the distances of all pairs, by differences: by products a feature would not be at distance 0 from itself."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
