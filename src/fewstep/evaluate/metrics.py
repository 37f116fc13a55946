"""Distances: to the exact solution of the sampling ODE, and between sets of images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep.core.errors import FewstepError, look_up
from fewstep.models.features import load_digits_features

__all__ = ["FEATURES", "frechet_distance", "load_features", "rmse"]


class _Pixels(nn.Module):
    """The image itself as its features, ``[B, C*H*W]``."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.num_features = int(torch.Size(shape).numel())

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).clamp(-1, 1)


FEATURES: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {"digits": lambda shape: load_digits_features(), "pixels": _Pixels}


def load_features(name: str, shape: tuple[int, ...]) -> nn.Module:
    """A feature network by name, for samples of one shape.

    Raises:
        FewstepError: an unknown name, or digits features for images that are not 8x8 grey.
    """
    if name == "digits" and tuple(shape) != (1, 8, 8):
        raise FewstepError(f"the digits features are for shape (1, 8, 8), these samples have {tuple(shape)}; use pixels")
    return look_up(name, FEATURES, "features", FewstepError)(shape)


def rmse(samples: Tensor, exact: Tensor) -> float:
    """Root mean square of ``samples - exact`` over all samples and elements ``[B, *D]``."""
    return float((samples.double() - exact.double()).square().mean().sqrt())


def frechet_distance(real: Tensor, fake: Tensor, features: nn.Module) -> float:
    """Frechet distance between two sets of images ``[B, *D]`` in named features (Heusel et al., arXiv 1706.08500).

    Raises:
        FewstepError: fewer than 2 images on a side, or images that are not finite.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(real), len(fake)) < 2 or not bool(torch.isfinite(fake).all()):
        raise FewstepError(f"a Frechet distance needs at least 2 finite images a side, got {len(real)} and {len(fake)}")
    metric = FrechetInceptionDistance(feature=features)  # sums in float64
    with torch.no_grad():
        for images, is_real in ((real, True), (fake, False)):
            for batch in images.float().split(1024):
                metric.update(batch, real=is_real)
        return max(0.0, float(metric.compute()))
