"""Denoisers that split their batch over devices, or over the processes of ``torchrun``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from fewstep.core.condition import moved, part_of
from fewstep.core.denoiser import Cond, Denoiser, FlowMap
from fewstep.core.domain import Cube, domain_of
from fewstep.core.schedule import NoiseSchedule
from fewstep.models.model import Model
from fewstep.runtime.errors import ModelError
from fewstep.runtime.process import computing_device, gather, process

__all__ = ["OverDevices", "OverProcesses", "over_devices"]


def _shares(count: int, parts: int) -> list[slice]:
    """Split ``count`` rows into parts, in order, whose sizes differ by one at most."""
    return [slice(first, last) for first, last in pairwise(count * k // parts for k in range(parts + 1))]


def _answered(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond, rows: slice, device: torch.device) -> Tensor:
    """Return the answers to some rows of a batch, on ``device``."""
    return denoiser(x[rows].to(device), (t[rows] if t.ndim else t), moved(part_of(cond, rows), device))


class OverDevices:
    """A denoiser that is copied to several devices, each of which computes a part of the batch.

    Args:
        denoisers: the same one on each device.
        devices: where each is.
    """

    def __init__(self, denoisers: Sequence[Denoiser], devices: Sequence[torch.device]) -> None:
        self.denoisers, self.devices = denoisers, devices

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoisers[0].schedule

    @property
    def domain(self) -> Cube | None:
        """The cube that samples of a reflected model are folded into."""
        return domain_of(self.denoisers[0])

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        made = [
            _answered(denoiser, x, t, cond, rows, device)
            for denoiser, device, rows in zip(self.denoisers, self.devices, _shares(len(x), len(self.devices)), strict=True)
            if rows.start < rows.stop
        ]  # none waits for the one before: a device computes behind our back
        return torch.cat([one.to(x.device) for one in made]) if made else x


def over_devices(model: Model, guidance: float, devices: Sequence[str]) -> Denoiser:
    """Copy a model's network to several devices, and return the guided denoiser that splits its batch over them.

    Raises:
        FewstepError: a device that cannot be used here.
        ModelError: a student, or a model whose network is no module that can be copied.
    """
    if model.flow_map is not None:
        raise ModelError(f"{model.name} is a student, whose few jumps need one device: leave devices out")
    made, found = list[Denoiser](), [computing_device(device) for device in devices]
    for device in found:
        try:
            network = model.network if device == model.device else copy.deepcopy(model.network)
            if not isinstance(network, nn.Module) or type(model) is not Model:
                raise ModelError(f"{model.name} is no model of a torch.nn.Module, which can be copied to {device}: leave devices out")
            guided = replace(model, network=network.to(device)).guided(guidance)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"the network of {model.name} cannot be copied to {device}: leave devices out") from error
        assert not isinstance(guided, FlowMap)  # see above
        made.append(guided)
    return OverDevices(made, found)


class OverProcesses:
    """A denoiser that all processes of ``torchrun`` call together with the same batch: each computes its part, and all get the answers."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    @property
    def domain(self) -> Cube | None:
        """The cube that samples of a reflected model are folded into."""
        return domain_of(self.denoiser)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        rank, world = process()
        rows = _shares(len(x), world)[rank]
        mine = _answered(self.denoiser, x, t, cond, rows, x.device).cpu() if rows.start < rows.stop else x[:0].cpu()
        return torch.cat([one.to(x.device) for one in gather(mine)])
