"""Measured pictures: the files that a task of ``fewstep restore`` names, as an operator and what it has measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.data.images import read_image, read_picture
from fewstep.inverse.measurements import Average, CircularBlur, Grayscale, Mask, Measurement, checked_kernel
from fewstep.inverse.restore import Restoration
from fewstep.inverse.tasks import picture_shape
from fewstep.models.model import Model
from fewstep.runtime.artifact import check_file
from fewstep.runtime.errors import FewstepError, ModelError, first_line, look_up

__all__ = ["BLIND", "TASKS", "MeasuredPicture", "measured_picture", "side_by_side"]

BLIND = "blind-deblur"
TASKS = {  # what each takes beside the picture, and the noise where none is said
    "inpaint": (("mask",), 0.0),
    "upscale": (("factor",), None),
    "deblur": (("kernel",), None),
    "denoise": ((), None),
    "colorize": ((), 0.0),
}
WHITE = 128  # of 256 grey values: pixels from here on are white in a mask


@dataclass(frozen=True, eq=False)
class MeasuredPicture:
    """A picture as a measurement.

    Attributes:
        measurement: the operator.
        y: what was measured, ``[*Y]``.
        noise: the standard deviation of its noise.
        shown: the measured picture in the size of the images, ``[*D]``, to be shown beside them.
    """

    measurement: Measurement
    y: Tensor
    noise: float
    shown: Tensor


def measured_picture(
    task: str, picture: Path, model: Model, *, mask: Path | None, factor: int | None, kernel: Path | None, noise: float | None
) -> MeasuredPicture:
    """Read what a task has measured.

    Args:
        task: one of `TASKS`.
        picture: the measured picture.
        model: of the images.
        mask: for ``inpaint``: a picture that is white where pixels are to be filled in.
        factor: for ``upscale``: how much smaller the picture is than the model's images.
        kernel: for ``deblur``: an array ``.npy [h, w]``, or a picture that is as bright as the kernel.
        noise: the standard deviation of the noise, of pixels in [-1, 1].

    Raises:
        FewstepError: an unknown task, a file that it lacks or does not take, pictures that do not fit the model.
    """
    wanted, usual = look_up(task, TASKS, "task", FewstepError)
    given = {"mask": mask, "factor": factor, "kernel": kernel}
    missing = [f"--{name}" for name in wanted if given[name] is None]
    beside = [f"--{name}" for name, value in given.items() if value is not None and name not in wanted]
    if missing:
        raise FewstepError(f"{task} needs {' and '.join(missing)}")
    if beside:
        raise FewstepError(f"{task} takes no {' and '.join(beside)}: leave it out")
    if noise is None and usual is None:
        raise FewstepError(f"{task} needs --noise, the standard deviation of the picture's noise, of pixels in [-1, 1], as --noise 0.05")
    level = (usual or 0.0) if noise is None else noise
    channels, height, width = picture_shape(model)
    if mask is not None:
        known = Mask(_mask(mask, height, width))
        y = known(read_image(picture, (channels, height, width))[None])[0]
        return MeasuredPicture(known, y, level, y)
    if factor is not None:
        average = Average(factor)
        if height % factor or width % factor:
            raise ModelError(f"{model.name} makes pictures of {width} x {height} pixels, whose sides are no multiples of {factor}")
        y = read_image(picture, (channels, height // factor, width // factor), f"{model.name} with a factor of {factor} takes pictures of")
        return MeasuredPicture(average, y, level, average.transpose(y[None])[0] / average.gain)
    if task == "colorize":
        if channels != 3:
            raise ModelError(f"{model.name} makes grey pictures, which have no colours to find")
        y = read_image(picture, (1, height, width), f"{model.name} colours pictures of")
        return MeasuredPicture(Grayscale(), y, level, y.expand(3, -1, -1))
    y = read_image(picture, (channels, height, width))
    if kernel is not None:
        blur = CircularBlur(read_kernel(kernel))
        blur(y[None])  # refuses a kernel larger than the picture
        return MeasuredPicture(blur, y, level, y)
    return MeasuredPicture(Mask(torch.ones(1, height, width)), y, level, y)


def side_by_side(shown: Tensor, made: Restoration) -> Tensor:
    """Return pictures ``[3 + S, *D]``: what was measured, the mean, the spread (white is the largest), and the samples."""
    spread = made.spread.mean(0, keepdim=True).expand_as(made.mean)
    grey = 2 * spread / spread.max().clamp_min(torch.finfo(spread.dtype).tiny) - 1
    return torch.cat([torch.stack([shown.cpu(), made.mean, grey]), made.samples])


def read_kernel(path: Path) -> Tensor:
    """Return the kernel ``[h, w]`` in a file, with sum 1: an array ``.npy``, or a picture that is as bright as the kernel.

    Raises:
        FewstepError: it is none, or has even sides.
    """
    if path.suffix == ".npy":
        check_file(path)
        try:
            found = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        except Exception as error:  # a damaged array makes numpy raise almost anything
            raise FewstepError(f"{path} is not a readable array: {first_line(error)}") from error
    else:
        pixels = read_picture(path)
        if pixels.ndim != 2:
            raise FewstepError(f"{path} is in colour, and a kernel is a grey picture: convert it")
        found = torch.from_numpy(pixels.copy()).float()
    try:
        kernel = checked_kernel(found)
        if kernel.ndim != 2 or not float(kernel.sum()) > 0:
            raise ModelError("a kernel is [h, w], of a positive sum")
    except ModelError as error:
        raise FewstepError(f"{path}: {error}") from None
    return kernel / kernel.sum()


def _mask(path: Path, height: int, width: int) -> Tensor:
    """Return 1 where a picture is black (measured) and 0 where it is white (to be filled in), ``[1, H, W]``."""
    pixels = read_picture(path)
    grey = pixels if pixels.ndim == 2 else pixels.max(-1)
    if grey.shape != (height, width):
        raise FewstepError(f"the mask {path} has {grey.shape[1]} x {grey.shape[0]} pixels, and the pictures have {width} x {height}")
    if bool(((grey > 15) & (grey < 240)).any()):
        raise FewstepError(f"the mask {path} has grey pixels: make them white, where to fill in, or black, where the picture is known")
    known = torch.from_numpy(grey < WHITE)[None].float()
    if not bool(known.any()) or bool(known.all()):
        all_of_it = "black: nothing is left to fill in" if bool(known.all()) else "white: nothing of the picture is known"
        raise FewstepError(f"the mask {path} is all {all_of_it}")
    return known
