"""Calls of networks: their own time, labels, dtype and device, and the errors that they raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.errors import ModelError, look_up

__all__ = ["NetworkTime", "edm_time", "image_size", "network_device", "network_dtype", "plain_call", "refusals", "same_time", "unet_call"]


def same_time(t: Tensor) -> Tensor:
    """Return the schedule's own time. ``[*] -> [*]``."""
    return t


def edm_time(t: Tensor) -> Tensor:
    """Return EDM's ``c_noise = log(sigma) / 4`` (arXiv 2206.00364, table 1). ``[*] -> [*]``."""
    return torch.log(t) / 4


@dataclass(frozen=True)
class NetworkTime:
    """The own time of a network as data: ``scale`` times ``t``, ``log(factor t)`` or ``sigma(t)``. ``[*] -> [*]``.

    Attributes:
        form: ``t``, ``log`` or ``sigma``.
        scale: of the result.
        factor: of ``t`` under the logarithm.
        schedule: for ``sigma``, the law whose noise scale it is.

    Raises:
        ModelError: an unknown form.
    """

    form: str = "t"
    scale: float = 1.0
    factor: float = 1.0
    schedule: NoiseSchedule | None = None

    def __post_init__(self) -> None:
        look_up(self.form, dict.fromkeys(("t", "log", "sigma")), "form of a network's time", ModelError)

    def __call__(self, t: Tensor) -> Tensor:
        if self.form == "log":
            return self.scale * torch.log(self.factor * t)
        return self.scale * (t if self.schedule is None else self.schedule.sigma(t))


def plain_call(network: Callable[..., Tensor], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Call ``network(x, time)``, or ``network(x, time, cond)`` when there is a condition."""
    return network(x, time) if cond is None else network(x, time, cond)


def unet_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond = None) -> Tensor:
    """Call diffusers' ``UNet2DModel``; ``cond`` are class labels ``[B]``."""
    labels = {} if cond is None else {"class_labels": cond}
    return network(x, time, return_dict=False, **labels)[0]


def image_size(unet: Any) -> tuple[int, int]:  # noqa: ANN401 - diffusers is not always there
    """Return height and width of the images of a ``UNet2DModel``, as its configuration says."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def network_dtype(network: object, default: torch.dtype) -> torch.dtype:
    """Return the dtype that a network computes in: that of its first parameter; ``default`` where it has none."""
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return default if parameter is None else parameter.dtype


def network_device(network: object) -> torch.device:
    """Return the device that a network's first parameter lies on; the CPU where it has none."""
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def refusals(x: Tensor) -> Iterator[None]:
    """Turn what a network raises at the state ``x [B, *D]`` into a `ModelError`."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the network refused a state of shape {tuple(x.shape)}: {reason}") from error
