"""Data sets of images as tensors in [-1, 1]: the digits that every install has, or the user's own folder or array."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.runtime.errors import FewstepError

__all__ = ["DIGIT_LEVELS", "Images", "load_images"]

DIGIT_LEVELS = 17  # grey values 0..16 of scikit-learn's digits


@dataclass(frozen=True, eq=False)
class Images:
    """A data set of images, with 256 or fewer values for each pixel.

    Attributes:
        x: images ``[n, C, H, W]``, float32 in [-1, 1]; each pixel is the middle of a cell of width ``2/levels``.
        labels: class labels ``[n]``, or None.
        levels: number of values that a pixel can have.
        name: of the data set.
    """

    x: Tensor
    labels: Tensor | None
    levels: int
    name: str

    def dequantised(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images at ``index [b]``, each pixel drawn uniformly from its cell, so that the data has a density to learn.

        Args:
            index: numbers of the images.
            generator: of the draws.
        """
        x = self.x[index]
        return x + (torch.rand(x.shape, generator=generator) - 0.5) * (2 / self.levels)


def load_images(source: str | Path) -> Images:
    """Load a data set of images.

    Args:
        source: ``digits`` (scikit-learn's 1797 scans, 8x8); an ``.npz`` with ``images``, uint8 ``[n, H, W]`` or ``[n, H, W, C]``, and
            optional ``labels [n]``; or a folder of pictures, whose sub-folders, if any, are its classes.

    Raises:
        FewstepError: nothing readable there, or pictures of different sizes (which).
    """
    if str(source) == "digits":
        from sklearn.datasets import load_digits

        pixels, target = load_digits(return_X_y=True)
        x = (torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) + 0.5) * (2 / DIGIT_LEVELS) - 1
        return Images(x, torch.from_numpy(target).long(), DIGIT_LEVELS, "digits")
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        with _opened(path) as arrays:
            if "images" not in arrays or arrays["images"].dtype != np.uint8:
                raise FewstepError(f"{path} needs an array 'images' of uint8, it has {', '.join(arrays.files)}")
            images, labels = arrays["images"], arrays.get("labels")
    elif path.is_dir():
        images, labels = _read_folder(path)
    else:
        raise FewstepError(f"no images at {source!s}: name 'digits', an .npz file, or a folder of pictures")
    if images.ndim not in (3, 4) or len(images) == 0:
        raise FewstepError(f"images in {path} should be [n, H, W] or [n, H, W, C], they have shape {images.shape}")
    if labels is not None and (len(labels) != len(images) or min(labels) < 0):
        raise FewstepError(f"labels in {path} should be one number from 0 for each of the {len(images)} images")
    if images.ndim == 3:
        images = images[..., None]
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() + 0.5) * (2 / 256) - 1
    return Images(x, None if labels is None else torch.as_tensor(labels).long(), 256, path.stem)


def _opened(path: Path) -> Any:  # noqa: ANN401 - numpy's lazy archive
    try:
        return np.load(path)
    except (OSError, ValueError) as error:
        raise FewstepError(f"{path} is not an npz archive: {error}") from error


def _read_folder(path: Path) -> tuple[np.ndarray, list[int] | None]:
    from PIL import Image

    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp", ".bmp"})
    if not files:
        raise FewstepError(f"no pictures (png, jpg, webp, bmp) below {path}")
    arrays = []
    for file in files:
        try:
            with Image.open(file) as picture:
                arrays.append(np.asarray(picture.convert("L" if picture.mode in {"1", "L", "I;16"} else "RGB")))
        except OSError as error:
            raise FewstepError(f"{file} is not a readable picture: {error}") from error
        if arrays[-1].shape != arrays[0].shape:
            raise FewstepError(f"{file} has shape {arrays[-1].shape}, {files[0]} has {arrays[0].shape}: make all pictures one size")
    classes = sorted({file.parent for file in files})
    return np.stack(arrays), [classes.index(file.parent) for file in files] if len(classes) > 1 else None
