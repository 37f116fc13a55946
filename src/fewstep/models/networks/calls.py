"""Calls of networks: their own time, labels, dtype and device, and the errors that they raise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fewstep.core.denoiser import Cond
from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.errors import ModelError, first_line, look_up

__all__ = [
    "NetworkTime",
    "answer_of",
    "check_evaluating",
    "computes",
    "edm_time",
    "image_size",
    "is_offloaded",
    "network_device",
    "network_dtype",
    "plain_call",
    "refusals",
    "same_time",
    "unet_call",
    "unwrapped",
    "unwritten",
    "whole_times",
]

WHOLE = 1e-3  # how far a whole time may be from one

_DTYPES: WeakKeyDictionary[nn.Module, tuple[torch.dtype, torch.dtype | None]] = WeakKeyDictionary()  # of first weight, of most


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


def whole_times(time: Tensor, dtype: torch.dtype, name: str = "the network") -> Tensor:
    """Return whole times rounded, still as floats; times of a floating dtype as they are. ``[*] -> [*]``.

    Raises:
        ModelError: a fraction, or one that the dtype does not hold.
    """
    if dtype.is_floating_point:
        return time
    found = time.round()
    if bool(((time - found).abs() > WHOLE).any()):
        raise ModelError(
            f"{name} takes whole times, but is asked at {time.flatten()[0]:g}: use a law of its own times, as DiscreteVP, a grid of "
            "them, and a solver that evaluates at the times of its grid alone"
        )
    if bool((found != found.to(dtype)).any()):
        kept = str(dtype).removeprefix("torch.")
        raise ModelError(f"{name} is asked at {time.flatten()[0]:g}, which {kept} does not hold: make it with a larger time_dtype")
    return found


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


def unwrapped(network: nn.Module) -> nn.Module:
    """Return a module without the shells that ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` put around it."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if inner is None and isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = network.module
        if not isinstance(inner, nn.Module):
            return network
        network = inner


def network_dtype(network: object, default: torch.dtype) -> torch.dtype:
    """Return the dtype that a network computes in.

    It is what the network says (``network.dtype``), else that of most of its weights; never one that weights are only stored in, as whole
    numbers or floats of 8 bits are. ``default`` where there is none.
    """
    if not isinstance(network, nn.Module):
        return default
    network = unwrapped(network)
    said = vars(network).get("dtype")
    if computes(said):
        return said
    first = next(network.parameters(), None)
    if first is None:
        return default
    known = _DTYPES.get(network)
    if known is None or known[0] != first.dtype:  # it was made another's since
        said, count = getattr(network, "dtype", None), Counter[torch.dtype]()  # a property: diffusers' reads every weight
        for parameter in network.parameters():
            count[parameter.dtype] += parameter.numel()
        found = said if computes(said) else next((dtype for dtype, _ in count.most_common() if computes(dtype)), None)
        known = _DTYPES[network] = first.dtype, found
    return known[1] or default


def computes(dtype: object) -> TypeGuard[torch.dtype]:
    """Return whether a value is a dtype that networks compute in, not one that weights are only stored in."""
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1


def network_device(network: object) -> torch.device:
    """Return the device that a network computes on: where accelerate runs it, or its first weight lies; the CPU where it has none."""
    if not isinstance(network, nn.Module):
        return torch.device("cpu")
    for module in network.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
        if next(module.parameters(recurse=False), None) is not None:
            break
    parameter = next(network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def is_offloaded(network: nn.Module) -> bool:
    """Return whether accelerate moves the weights of a network to where it runs, so that nobody else must."""
    return any(hasattr(module, "_hf_hook") for module in network.modules())


def check_evaluating(network: object) -> None:
    """Refuse a network in training mode whose answers are then random, or depend on the batch, and one whose weights have no values.

    Raises:
        ModelError: it has dropout or batch normalisation in that mode, or weights on the device meta that nobody loads.
    """
    if not isinstance(network, nn.Module):
        return
    if any(one.is_meta for one in network.parameters()) and not is_offloaded(network):
        raise ModelError(
            "the network has weights on the device meta, which have no values: load them first, as by network.to_empty(device='cpu') and "
            "network.load_state_dict(weights)"
        )
    for module in network.modules():
        if module.training and (isinstance(module, _BatchNorm) or (isinstance(module, _DropoutNd) and module.p > 0)):
            raise ModelError(f"the network has a {type(module).__name__} in training mode, so its answers vary: call network.eval() first")


def answer_of(output: object, x: Tensor, times: str = "t") -> Tensor:
    """Return the tensor in what a network answered: the answer itself, its ``sample``, or the only one of a tuple.

    Args:
        output: what it answered.
        x: the state that it was asked at, ``[B, *D]``.
        times: the names of the times that it was told, for the error.

    Raises:
        ModelError: there is none, or it is not of the state's shape and real.
    """
    answer = getattr(output, "sample", output) if not isinstance(output, Tensor) else output
    if isinstance(answer, tuple | list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, Tensor):
        what = type(answer).__name__ + (f" of {len(answer)}" if isinstance(answer, tuple | list | dict) else "")
        raise ModelError(
            f"the network answered a {what}, not a tensor: pass call=lambda net, x, {times}, cond: net(x, {times})[0], or alike"
        )
    if not answer.is_floating_point():
        raise ModelError(f"the network answered in {str(answer.dtype).removeprefix('torch.')}: an answer is of floating point numbers")
    if answer.shape != x.shape:
        twice = answer.shape == (*x.shape[:1], 2 * x.shape[1], *x.shape[2:]) if x.ndim > 1 else False
        hint = f": it predicts a variance too, so pass call=lambda net, x, {times}, cond: net(x, {times})[:, :C], or alike" if twice else ""
        raise ModelError(f"the network answered shape {tuple(answer.shape)} to a state of shape {tuple(x.shape)}{hint}")
    return answer


@contextmanager
def unwritten(x: Tensor, times: str = "t") -> Iterator[None]:
    """Refuse a network that writes into the state ``x [B, *D]`` that it is given, which the sampler still needs.

    Raises:
        ModelError: it does.
    """
    before = None if x.is_inference() else x._version  # noqa: SLF001 - the only record of it
    yield
    if before is not None and x._version != before:  # noqa: SLF001
        raise ModelError(f"the network writes into its input: pass call=lambda net, x, {times}, cond: net(x.clone(), {times}), or alike")


@contextmanager
def refusals(x: Tensor) -> Iterator[None]:
    """Turn what a network raises at the state ``x [B, *D]`` into a `ModelError`."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelError(f"the network refused a state of shape {tuple(x.shape)}: {first_line(error)}") from error
