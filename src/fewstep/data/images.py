"""Data sets of images as tensors in [-1, 1]: the digits that every install has, or the user's own folder or array.

A pixel has 256 values, and is read as what it shows: a picture turned by its EXIF tag is turned, a palette is looked up, and of 16 bits the
upper 8 count. A picture whose meaning is not certain is refused: with transparent pixels, in other colours than grey and RGB, of floats.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fewstep.runtime.artifact import check_file, named_path
from fewstep.runtime.errors import FewstepError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DIGIT_LEVELS", "Images", "load_images", "read_image", "read_picture"]

DIGIT_LEVELS = 17  # grey values 0..16 of scikit-learn's digits
LEVELS = 256
CHANNELS = 4  # at most
MOST_LABELS = 1 << 31
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


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

    @property
    def identity(self) -> str:
        """Name, shape and mean of the data, for work that belongs to it alone."""
        return f" on {self.name} {tuple(self.x.shape)}, mean {float(self.x.double().mean()):.12f}"


def load_images(source: str | Path) -> Images:
    """Load a data set of images.

    Args:
        source: ``digits`` (scikit-learn's 1797 scans, 8x8); an ``.npz`` with ``images``, uint8 ``[n, H, W]`` or ``[n, H, W, C]``, and
            optional ``labels [n]``; or a folder of pictures, whose sub-folders, if any, are its classes.

    Raises:
        FewstepError: nothing readable there, pictures of different sizes (which), or one whose meaning is not certain (which, and why).
    """
    if str(source) == "digits":
        from sklearn.datasets import load_digits

        pixels, target = load_digits(return_X_y=True)
        x = (torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) + 0.5) * (2 / DIGIT_LEVELS) - 1
        return Images(x, torch.from_numpy(target).long(), DIGIT_LEVELS, "digits")
    path = named_path(source)
    if path.suffix == ".npz" and path.is_file():
        images, labels = _read_npz(path)
    elif path.is_dir():
        images, labels = _read_folder(path)
    else:
        raise FewstepError(f"no images at {source!s}: name 'digits', an .npz file, or a folder of pictures")
    images = images[..., None] if images.ndim == 3 else images
    return Images(_centred(images), None if labels is None else torch.as_tensor(labels).long(), LEVELS, path.stem)


def _centred(pixels: np.ndarray) -> Tensor:
    """Return pixels ``[n, H, W, C]``, uint8, as images ``[n, C, H, W]`` in [-1, 1]: each pixel the middle of its cell."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() + 0.5) * (2 / LEVELS) - 1


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the images and the labels of an archive, each of the right type and shape."""
    check_file(path)
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            found = {name: arrays[name] for name in ("images", "labels") if name in arrays}
            names = ", ".join(arrays.files)
    except Exception as error:  # a damaged archive makes zipfile and numpy raise almost anything; pickled objects are refused
        raise FewstepError(f"{path} is not an npz archive of plain arrays: {first_line(error)}") from error
    images, labels = found.get("images"), found.get("labels")
    if images is None:
        raise FewstepError(f"{path} needs an array 'images' of uint8, it has {names}")
    if images.dtype != np.uint8:
        how = "; images in [-1, 1] are made so by ((x + 1) * 127.5).round()" if images.dtype.kind == "f" else ""
        raise FewstepError(f"images in {path} are {images.dtype}, they should be uint8 from 0 to 255{how}")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise FewstepError(f"images in {path} should be [n, H, W] or [n, H, W, C], they have shape {images.shape}")
    if images.ndim == 4 and (images.shape[3] > CHANNELS or (images.shape[1] in (1, 3) and images.shape[3] not in (1, 3))):
        raise FewstepError(
            f"images in {path} should be [n, H, W, C] with at most {CHANNELS} channels, they have shape {images.shape}: if those are "
            "[n, C, H, W], transpose them"
        )
    if labels is not None and (
        labels.shape != (len(images),) or labels.dtype.kind not in "iu" or min(labels) < 0 or max(labels) >= MOST_LABELS
    ):
        raise FewstepError(f"labels in {path} should be one whole number from 0 for each of the {len(images)} images")
    return images, labels


def _read_folder(path: Path) -> tuple[np.ndarray, list[int] | None]:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise FewstepError(f"no pictures ({', '.join(suffix[1:] for suffix in SUFFIXES)}) below {path}")
    arrays = []
    for file in files:
        arrays.append(read_picture(file))
        if arrays[-1].shape != arrays[0].shape:
            raise FewstepError(f"{file} has shape {arrays[-1].shape}, {files[0]} has {arrays[0].shape}: make all pictures one size")
    classes = sorted({file.parent for file in files})
    return np.stack(arrays), [classes.index(file.parent) for file in files] if len(classes) > 1 else None


def read_image(file: Path, shape: Sequence[int], wanted_by: str = "the model's samples are") -> Tensor:
    """Read a picture as one image ``[C, H, W]`` in [-1, 1], of the shape that a model's samples have.

    A picture in RGB all of whose pixels are grey is one in grey too: pictures of grey samples are written so. One in grey is one in RGB.

    Args:
        file: the picture.
        shape: ``C, H, W``, with 1 or 3 channels.
        wanted_by: the subject and the verb of the error, before the shape.

    Raises:
        FewstepError: as `read_picture`; another size or other colours (both shapes).
    """
    pixels = read_picture(file)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if tuple(shape[:1]) == (1,) and bool((pixels == pixels[..., :1]).all()):
        pixels = pixels[..., :1]
    elif tuple(shape[:1]) == (3,) and pixels.shape[-1] == 1:
        pixels = pixels.repeat(3, -1)
    height, width, channels = pixels.shape
    if (channels, height, width) != tuple(shape):
        colours = {1: "grey", 3: "RGB"}
        wanted = (
            f"{shape[1]} x {shape[2]} in {colours[shape[0]]}"
            if len(shape) == 3 and shape[0] in colours
            else f"of shape {tuple(shape)}, which are no pictures"
        )
        raise FewstepError(f"{file} is {height} x {width} in {colours[channels]}, and {wanted_by} {wanted} (height x width)")
    return _centred(pixels[None].copy())[0]  # Pillow's pixels are read-only


def read_picture(file: Path) -> np.ndarray:
    """Read a picture as uint8, ``[H, W]`` in grey or ``[H, W, 3]`` in RGB, the right way up.

    Raises:
        FewstepError: it cannot be read, is too large to be decoded, or its meaning is not certain (why).
    """
    from PIL import Image, ImageOps

    check_file(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                if (frames := getattr(opened, "n_frames", 1)) > 1:
                    raise FewstepError(f"{file} has {frames} pictures in one file: write each to a file of its own")
                sixteen = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PNG")
                picture = ImageOps.exif_transpose(opened)
                pixels = np.asarray(picture) if sixteen else _plain(picture, file)
    except FewstepError:
        raise
    except Exception as error:  # a damaged picture makes Pillow raise almost anything
        raise FewstepError(f"{file} is not a readable picture: {first_line(error)}") from error
    if 0 in pixels.shape:
        raise FewstepError(f"{file} has no pixels: its shape is {pixels.shape}")
    return (pixels >> 8).astype(np.uint8) if sixteen else pixels


def _plain(picture: Image, file: Path) -> np.ndarray:
    """Return the pixels of a picture in grey or RGB, whose alpha and palette, if any, change nothing or are looked up."""
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        if np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
            raise FewstepError(f"{file} has transparent pixels: lay it on a background first")
        return np.asarray(picture.convert("L" if picture.mode in ("L", "LA") else "RGB"))
    if picture.mode not in ("1", "L", "P", "RGB"):
        raise FewstepError(f"{file} is in mode {picture.mode}, whose values are not those of grey or RGB: convert it to one of them first")
    return np.asarray(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))
