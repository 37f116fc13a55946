"""The two protocols of models: a `Denoiser` estimates the clean image, a `FlowMap` jumps along the sampling trajectory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

from torch import Tensor

from fewstep.core.schedule import NoiseSchedule

__all__ = ["Cond", "Denoiser", "FlowMap"]

Cond = Any  # whatever the network is conditioned on: labels [B], a dict of tensors [B, ...], or None


class Denoiser(Protocol):
    """A model with its noise schedule that estimates the clean image: ``(x [B, *D], t [] or [B], cond) -> x0 [B, *D]``."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor: ...


class FlowMap(ABC):
    """A map along the sampling trajectory: ``(x [B, *D], s [], t [], cond) -> x_t [B, *D]``, from time ``s`` to a later ``t``.

    A denoiser needs a solver to get from one time to another; a flow map gets there in one call, so its sampler is a grid alone. Subclass
    it and define `schedule` and `__call__`; sample it by ``Model(network, schedule, prediction, flow_map=...)``.
    """

    @property
    @abstractmethod
    def schedule(self) -> NoiseSchedule:
        """The noise law of its trajectories."""

    @property
    def definition(self) -> tuple[Any, ...]:
        """Plain values that the map depends on beside the network's weights, for the model's fingerprint."""
        return ()

    @abstractmethod
    def __call__(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the states ``[B, *D]`` at time ``t`` on the trajectories through ``x`` at time ``s``.

        Args:
            x: states ``[B, *D]`` at time ``s``.
            s: a time of the schedule, ``[]`` float64.
            t: a later time, nearer to the image, ``[]`` float64.
            cond: the condition, as the network takes it.
        """

    def check(self, t: Tensor) -> None:  # noqa: B027 - a map that can jump anywhere has nothing to refuse
        """Refuse times ``t [N+1]`` between which the map cannot jump; by default none.

        Raises:
            SolverError: it cannot (which times it knows).
        """
