"""Networks of whole times, asked between them: their output is interpolated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fewstep.core.denoiser import Cond
from fewstep.core.prediction import aligned
from fewstep.models.networks.calls import WHOLE, answer_of

__all__ = ["BetweenTimes"]


@dataclass(frozen=True)
class BetweenTimes:
    """A call of a network of whole times at any time: between two of them its output is interpolated linearly, from two evaluations.

    Attributes:
        call: the call at whole times.
        dtype: of those.
        low, high: the first and the last of them.
    """

    call: Callable[..., Any]
    dtype: torch.dtype
    low: float
    high: float

    def __call__(self, network: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Return the output ``[B, *D]`` at the times ``[B]``, which may be differentiated: one evaluation where they are whole."""

        def at(whole: Tensor) -> Tensor:
            return answer_of(self.call(network, x, whole.to(self.dtype), cond), x)

        nearest = time.detach().round()
        if not _differentiated(time) and bool(((time - nearest).abs() <= WHOLE).all()):
            return at(nearest)
        below = time.detach().floor().clamp(self.low, max(self.low, self.high - 1))
        weight = aligned(time - below, x)
        return (1 - weight) * at(below) + weight * at((below + 1).clamp(max=self.high))


def _differentiated(time: Tensor) -> bool:
    """Return whether a derivative with respect to the time is being taken."""
    return time.requires_grad or forward_ad.unpack_dual(time).tangent is not None
