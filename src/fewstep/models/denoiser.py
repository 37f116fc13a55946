"""From a network to a `Denoiser`: its noise schedule, what it predicts, and how it wants its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.core.prediction import Prediction, aligned, prediction, to_x0
from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.errors import ModelError

__all__ = ["AdaptedDenoiser", "edm_time", "image_size", "refusals", "unet_call"]


@dataclass(frozen=True, eq=False)
class AdaptedDenoiser:
    """Any network as a denoiser.

    Args:
        network: the module. It is called as ``call(network, x, time, cond)`` in its own dtype.
        schedule: the noise law it was trained with.
        prediction: what it predicts: ``epsilon``, ``sample``, ``v``, ``score``, ``flow``, ``edm(sigma_data)``.
        time: the network's own time from the schedule's ``t``; by default ``t`` itself.
        call: how to call it; by default ``network(x, time)``, and ``network(x, time, cond)`` when there is a condition.

    Example:
        >>> import torch, fewstep
        >>> net = torch.nn.Module(); net.forward = lambda x, t: 0 * x
        >>> denoiser = fewstep.AdaptedDenoiser(net, fewstep.DiscreteVP.linear(), "epsilon")
        >>> denoiser(torch.ones(2, 3), torch.tensor(0.0)).shape
        torch.Size([2, 3])
    """

    network: Callable[..., Tensor]
    schedule: NoiseSchedule
    prediction: str | Prediction
    time: Callable[[Tensor], Tensor] = lambda t: t
    call: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prediction", prediction(self.prediction))

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """``x0 [B, *D]`` at the state ``x [B, *D]`` and time ``t`` (``[]`` or ``[B]``).

        Raises:
            ModelError: the network refused its inputs (what it said), or the prediction is undefined at ``t``.
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        kind = prediction(self.prediction)  # resolved at birth
        dtype = _dtype(self.network, x.dtype)
        scaled = x if kind.input_scale is None else x * aligned(kind.input_scale(alpha, sigma), x)
        time = self.time(t).to(torch.promote_types(dtype, torch.float32)).to(x.device).expand(len(x))
        call = self.call or _plain_call
        with refusals(x):
            output = call(self.network, scaled.to(dtype), time, cond)
        if not isinstance(output, Tensor):
            what = type(output).__name__
            raise ModelError(f"the network answered a {what}, not a tensor: pass call=lambda net, x, t, cond: net(x, t).sample, or alike")
        if output.shape != x.shape:
            raise ModelError(f"the network answered shape {tuple(output.shape)} to a state of shape {tuple(x.shape)}")
        return to_x0(kind, output, x, alpha, sigma)


@contextmanager
def refusals(x: Tensor) -> Iterator[None]:
    """What a network says that it cannot take the state ``x [B, *D]``, as a `ModelError`."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the network refused a state of shape {tuple(x.shape)}: {reason}") from error


def edm_time(t: Tensor) -> Tensor:
    """EDM's ``c_noise = log(sigma) / 4`` (arXiv 2206.00364, table 1)."""
    return torch.log(t) / 4


def unet_call(network: nn.Module, x: Tensor, time: Tensor, cond: Cond = None) -> Tensor:
    """How diffusers' ``UNet2DModel`` is called; ``cond`` are class labels ``[B]``."""
    labels = {} if cond is None else {"class_labels": cond}
    return network(x, time, return_dict=False, **labels)[0]


def image_size(unet: Any) -> tuple[int, int]:  # noqa: ANN401 - diffusers is not always there
    """Height and width of the images of a ``UNet2DModel``, as its configuration says."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _plain_call(network: Callable[..., Tensor], x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    return network(x, time) if cond is None else network(x, time, cond)


def _dtype(network: object, default: torch.dtype) -> torch.dtype:
    """The dtype the network computes in: that of its first parameter; the state's own where it has none."""
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return default if parameter is None else parameter.dtype
