"""The two protocols of models: a `Denoiser` estimates the clean image, a `FlowMap` jumps along the sampling trajectory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.errors import ModelError, SolverError

__all__ = ["Cond", "Denoiser", "FlowMap", "check_denoiser", "check_jump"]

Cond = Any  # whatever the network is conditioned on: labels [B], a dict of tensors [B, ...], or None


class Denoiser(Protocol):
    """A model with its noise schedule that estimates the clean image: ``(x [B, *D], t [] or [B], cond) -> x0 [B, *D]``."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor: ...


def check_denoiser(model: object, taker: str) -> None:
    """Refuse what is neither a denoiser nor a flow map.

    Args:
        model: what was passed.
        taker: the function that it was passed to, for the error.

    Raises:
        ModelError: it is not, and how to make a model of it.
    """
    if callable(model) and isinstance(getattr(model, "schedule", None), NoiseSchedule):
        return
    if isinstance(model, str | PathLike):
        raise ModelError(f"{taker} takes a fewstep.Model, not a name: load it first, as in fewstep.load_model({str(model)!r})")
    raise ModelError(
        f"{taker} takes a fewstep.Model, not a {type(model).__name__}: wrap a network with its noise law and what it predicts, as in "
        'fewstep.Model(net, fewstep.DiscreteVP.scaled_linear(), "epsilon", shape=(4, 64, 64))'
    )


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

    @property
    def called(self) -> object:
        """The network that it calls, which has to be that of its model; by default it is not known."""
        return None

    @property
    def anywhere(self) -> bool:
        """Whether it starts at any of its times, so that a noised image can be put in; by default at the noise alone."""
        return False

    def at(self, scale: float | Tensor) -> FlowMap:
        """Return the map at a guidance scale; by default there is but one, and its guidance is in its weights.

        Raises:
            ModelError: the map has no such scale.
        """
        if isinstance(scale, Tensor) or scale != 1:
            raise ModelError(f"a flow map has its guidance in its weights: use guidance 1, not {scale}")
        return self

    def arithmetic(self, t: Tensor) -> float | None:
        """Return the cost of jumping through the times ``t [N+1]``, in evaluations of the network alone; None where that is not known."""
        return None

    @abstractmethod
    def __call__(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the states ``[B, *D]`` at time ``t`` on the trajectories through ``x`` at time ``s``.

        Args:
            x: states ``[B, *D]`` at time ``s``.
            s: a time of the schedule, ``[]`` float64.
            t: a later time, nearer to the image, ``[]`` float64.
            cond: the condition, as the network takes it.

        Raises:
            ModelError, SolverError: times that it cannot jump between, see `check_jump`.
        """

    def check(self, t: Tensor) -> None:  # noqa: B027 - a map that can jump anywhere has nothing to refuse
        """Refuse times ``t [N+1]`` between which the map cannot jump; by default none.

        Raises:
            SolverError: it cannot (which times it knows).
        """


def check_jump(flow_map: FlowMap, x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the times of a jump, both ``[]`` or both ``[B]``, and refuse those between which a flow map does not lead.

    Their values are read on the CPU alone, where times belong: elsewhere each jump would wait for the device.

    Args:
        flow_map: the map.
        x: the states ``[B, *D]``.
        s, t: the times, ``[]`` or ``[B]``.

    Raises:
        ModelError: they are no tensors of floating point numbers, or not one for each sample.
        SolverError: one is not a number, or none that the map knows, or the second is the noisier one.
    """
    for name, time in (("s", s), ("t", t)):
        if not isinstance(time, Tensor) or not time.is_floating_point():
            what = str(time.dtype).removeprefix("torch.") if isinstance(time, Tensor) else type(time).__name__
            raise ModelError(f"{name} is a time of the jump, a tensor [] or [B], not a {what}: pass torch.tensor(1.0, dtype=torch.float64)")
        if time.shape not in ((), (len(x),)):
            raise ModelError(f"{name} is a time of the jump, [], or one for each of {len(x)} samples, got shape {tuple(time.shape)}")
    s, t = torch.broadcast_tensors(s, t)
    if s.device.type != "cpu" or t.device.type != "cpu" or not s.numel():
        return s, t
    if not bool((s >= t).all()):  # which NaN is not, either
        k = int((~(s >= t)).flatten().nonzero()[0])
        raise SolverError(
            f"a flow map leads from s to a time t nearer to the image, not from {s.flatten()[k]:g} to {t.flatten()[k]:g}: swap them, or "
            "check where they come from"
        )
    for ends in ((s.max(), t.min()), (s.min(), t.max()))[: 1 + bool(s.ndim)]:
        flow_map.check(torch.stack(ends))
    return s, t
