"""Tasks by name: standard measurements of pictures, as ``upscale:factor=2:noise=0.05``, to compare methods on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.inverse.measurements import Average, CircularBlur, Clip, Grayscale, Mask, Measurement
from fewstep.models.model import Model
from fewstep.runtime.errors import ModelError, look_up
from fewstep.runtime.front_door import checked, is_count, number
from fewstep.runtime.spec import check_options, parse_spec
from fewstep.sampling.noise import seeded_noise

__all__ = ["TASKS", "Task", "gaussian_kernel", "make_task", "picture_shape"]

STREAM = 1 << 40  # of the noise of measurements: no step of a sampler that adds noise to the same seed has this one


@dataclass(frozen=True, eq=False)
class Task:
    """A measurement of pictures, to be undone.

    Attributes:
        name: with all options, those that were left out too.
        measurement: the operator.
        noise: the standard deviation of its noise; pictures lie in [-1, 1].
    """

    name: str
    measurement: Measurement
    noise: float

    def measure(self, x0: Tensor, seeds: Sequence[int]) -> Tensor:
        """Measure the pictures ``x0 [B, C, H, W]`` with noise, ``[B, *Y]``; that of a picture depends on its seed alone."""
        y = self.measurement(x0)
        if not self.noise:
            return y
        return y + self.noise * seeded_noise(seeds, y.shape[1:], stream=STREAM).to(y)


@checked
def make_task(spec: str, shape: Sequence[int]) -> Task:
    """Make a task by its name with options, for pictures of a shape.

    =============================  ==================================================================================
    ``upscale:factor=2``           means of blocks of 2 x 2 pixels
    ``inpaint:box=8``              all but a box of 8 x 8 pixels in the middle, no noise; by default half of the shorter side
    ``inpaint:keep=0.3:seed=0``    a random 30 % of the pixels
    ``deblur:sd=1.2:size=5``       blurred by a Gaussian of so many pixels, the borders joined
    ``denoise:noise=0.3``          the picture with noise
    ``colorize``                   the grey picture, no noise
    ``clip:gain=2``                brightened until it saturates
    =============================  ==================================================================================

    Each has ``noise``, 0.05 where nothing else is said.

    Args:
        spec: the name with options.
        shape: of a picture, ``(C, H, W)``.

    Raises:
        ModelError: no picture's shape; an unknown name or option, or a value that it cannot have for such pictures.

    Examples:
        >>> from fewstep.inverse.tasks import make_task
        >>> make_task("upscale", (3, 16, 16)).name
        'upscale:factor=2:noise=0.05'
    """
    name, options = parse_spec(spec, ModelError)
    kind = look_up(name, TASKS, "task", ModelError)
    check_options(options, kind, f"task {name!r}", ModelError, hidden=("shape",))
    if len(shape) != 3 or not all(map(is_count, shape)):
        raise ModelError(f"tasks are for pictures (C, H, W), not for shape {tuple(shape)}")
    return kind(tuple(int(side) for side in shape), **options)


def picture_shape(model: Model) -> tuple[int, int, int]:
    """Return the shape ``(C, H, W)`` of the pictures that a model makes.

    Raises:
        ModelError: it makes none, as one of latents.
    """
    shape = model.need_shape()
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ModelError(
            f"{model.name} makes samples of shape {shape}, no pictures of 1 or 3 channels: where they are latents, measure through their "
            "decoder in Python, fewstep.restore(model, Compose(operator, Nonlinear(decode)), y, noise)"
        )
    return shape[0], shape[1], shape[2]


def gaussian_kernel(size: int, sd: float) -> Tensor:
    """Return a Gaussian of standard deviation ``sd`` pixels on ``[size, size]``, with sum 1."""
    line = torch.exp(-0.5 * ((torch.arange(size) - (size - 1) / 2) / sd) ** 2)
    kernel = line[:, None] * line
    return kernel / kernel.sum()


# -- the tasks: functions of the shape of a picture and of their options ----------------------------------------------

Shape = tuple[int, ...]


def _upscale(shape: Shape, factor: int = 2, noise: float = 0.05) -> Task:
    measurement = Average(_count(factor, "factor"))
    measurement(torch.zeros(1, *shape))  # which says what does not divide the sides
    return _task("upscale", measurement, _noise(noise), factor=factor)


def _inpaint(shape: Shape, box: int | None = None, keep: float | None = None, noise: float | None = None, seed: int = 0) -> Task:
    _, height, width = shape
    if keep is None:
        if seed != 0:
            raise ModelError("inpaint:seed is of the pixels that inpaint:keep=0.3 keeps: leave it out with a box")
        side = max(min(height, width) // 2, 1) if box is None else _count(box, "box")
        if side > min(height, width) or side**2 == height * width:
            raise ModelError(
                f"a box of {side} x {side} pixels leaves nothing of pictures of {height} x {width} to be seen: say inpaint:box=N"
            )
        mask, (top, left) = torch.ones(1, height, width), ((height - side) // 2, (width - side) // 2)
        mask[:, top : top + side, left : left + side] = 0
        return _task("inpaint", Mask(mask), _noise(0.0 if noise is None else noise), box=side)
    if box is not None:
        raise ModelError("inpaint takes away a box, or all but a share of the pixels: say inpaint:box=8 or inpaint:keep=0.3")
    share = number(keep, "inpaint:keep, the share of the pixels that is kept,", ModelError)
    if not 0 < share < 1 or round(share * height * width) < 1:
        raise ModelError(f"inpaint:keep is the share of the pixels that is kept, between 0 and 1, and at least one, got {keep!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ModelError(f"inpaint:seed is a whole number from 0, got {seed!r}")
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(height * width)
    mask[order[: round(share * height * width)]] = 1
    return _task("inpaint", Mask(mask.reshape(1, height, width)), _noise(0.05 if noise is None else noise), keep=keep, seed=seed)


def _deblur(shape: Shape, sd: float = 1.2, size: int = 5, noise: float = 0.05) -> Task:
    width = number(sd, "deblur:sd, the width of the blur in pixels,", ModelError)
    if not 0 < width < float("inf"):
        raise ModelError(f"deblur:sd is the width of the blur in pixels, a positive number, got {sd!r}")
    if _count(size, "size") > max(shape[1:]):
        raise ModelError(f"a kernel of {size} x {size} pixels is larger than pictures of {shape[1]} x {shape[2]}: say deblur:size=N")
    measurement = CircularBlur(gaussian_kernel(int(size), width))
    measurement(torch.zeros(1, *shape))
    return _task("deblur", measurement, _noise(noise), sd=sd, size=size)


def _denoise(shape: Shape, noise: float = 0.3) -> Task:
    level = _noise(noise)
    if not level:
        raise ModelError("denoise wants noise, as denoise:noise=0.3")
    return _task("denoise", Mask(torch.ones(1, *shape[1:])), level)


def _colorize(shape: Shape, noise: float = 0.0) -> Task:
    if shape[0] != 3:
        raise ModelError(f"colorize is for pictures of three colours, these have {shape[0]} channel{'s' if shape[0] > 1 else ''}")
    return _task("colorize", Grayscale(), _noise(noise))


def _clip(shape: Shape, gain: float = 2, noise: float = 0.05) -> Task:
    del shape
    return _task("clip", Clip(number(gain, "clip:gain", ModelError)), _noise(noise), gain=gain)


TASKS: dict[str, Callable[..., Task]] = {
    "upscale": _upscale,
    "inpaint": _inpaint,
    "deblur": _deblur,
    "denoise": _denoise,
    "colorize": _colorize,
    "clip": _clip,
}


def _task(name: str, measurement: Measurement, noise: float, **options: Any) -> Task:  # noqa: ANN401 - as typed
    written = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in {**options, "noise": noise}.items()]
    return Task(":".join([name, *written]), measurement, noise)


def _count(value: Any, name: str) -> int:  # noqa: ANN401 - as typed
    if not is_count(value):
        raise ModelError(f"{name} is a whole number of pixels from 1, got {value!r}")
    return int(value)


def _noise(value: float) -> float:
    level = number(value, "the noise of a task", ModelError)
    if not 0 <= level < float("inf"):
        raise ModelError(f"the noise of a task is a standard deviation, a finite number from 0, got {value!r}")
    return level
