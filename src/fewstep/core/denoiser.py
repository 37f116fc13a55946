"""The `Denoiser` protocol: what every sampler, learner and benchmark of this library evaluates."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fewstep.core.schedule import NoiseSchedule

__all__ = ["Cond", "Denoiser"]

Cond = Any  # whatever the network is conditioned on: labels [B], a dict of tensors [B, ...], or None


class Denoiser(Protocol):
    """A model with its noise schedule: ``(x [B, *D], t [] or [B], cond) -> x0 [B, *D]``, the posterior mean of the clean image.

    A model whose answer depends on where the step leads has a method ``aimed(tableau) -> Denoiser``, which `sample` calls first.
    """

    @property
    def schedule(self) -> NoiseSchedule: ...

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor: ...
