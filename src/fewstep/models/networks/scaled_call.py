"""Networks that are told their guidance scale (Meng et al., arXiv 2210.03142), which answer with one call where guidance makes two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond
from fewstep.models.networks.extra_embedding import ConditionedNetwork, scale_features
from fewstep.runtime.errors import ModelError

__all__ = ["SCALE", "ScaledCall", "each_scale"]

SCALE = "scale"  # the name of its embedding


def each_scale(scale: float | Tensor, count: int) -> Tensor:
    """Return the guidance scale of each of ``count`` samples, ``[count]``: a number as float64, a tensor in its own dtype.

    Args:
        scale: one for all, or one for each.
        count: the samples ``B``.

    Raises:
        ModelError: there are as many as for another number of samples.
    """
    found = scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64)
    if found.numel() not in (1, count):
        raise ModelError(f"guidance has {found.numel()} scales for {count} samples: pass one scale, or one for each sample")
    return found.expand(count)


@dataclass(frozen=True)
class ScaledCall:
    """A call of a `ConditionedNetwork` that tells it the guidance scale.

    Attributes:
        largest: the largest scale that it was taught.
        features: number of features of a scale.
        scale: the scale, or one for each sample ``[B]``.
    """

    largest: float
    features: int = 16
    scale: float | Tensor = 1.0

    def __call__(self, network: ConditionedNetwork, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Return the output ``[B, *D]``."""
        scale = each_scale(self.scale, len(x)).double()
        return network(x, time, cond, {SCALE: scale_features(scale, self.largest, self.features).to(x.dtype).to(x.device)})
