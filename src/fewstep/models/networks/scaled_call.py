"""Networks that are told their guidance scale (Meng et al., arXiv 2210.03142), which answer with one call where guidance makes two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond
from fewstep.models.networks.extra_embedding import ConditionedNetwork, scale_features

__all__ = ["SCALE", "ScaledCall"]

SCALE = "scale"  # the name of its embedding


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
        scale = torch.as_tensor(self.scale, dtype=torch.float64).expand(len(x))
        return network(x, time, cond, {SCALE: scale_features(scale, self.largest, self.features).to(x.dtype).to(x.device)})
