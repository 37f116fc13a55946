"""Show samples as pictures: plain grids, and samplers side by side on the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import FewstepError

__all__ = ["save_comparison", "save_grid", "save_singles", "to_uint8"]

INK, PAPER, MUTED = (24, 24, 27), (255, 255, 255), (113, 113, 122)


def to_uint8(images: Tensor) -> np.ndarray:
    """Convert ``[B, C, H, W]`` in [-1, 1] to uint8 ``[B, H, W, 3]``; without three channels the first is shown in grey."""
    if images.ndim != 4:
        raise FewstepError(f"pictures need samples of shape [B, C, H, W], these have {tuple(images.shape)}")
    images = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def _tile(images: np.ndarray, columns: int, scale: int, gap: int = 2) -> Image.Image:
    """Lay images out in reading order, each pixel enlarged ``scale`` times."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height * scale + gap) - gap, columns * (width * scale + gap) - gap, 3), PAPER, np.uint8)
    for k, image in enumerate(images):
        top, left = (k // columns) * (height * scale + gap), (k % columns) * (width * scale + gap)
        sheet[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(sheet)


def _scale(height: int) -> int:
    return -(-40 // height)  # tiles are at least 40 pixels high


def save_grid(images: Tensor, path: Path, *, columns: int | None = None) -> Path:
    """Write one PNG of all samples ``[B, C, H, W]``, as square as it gets."""
    columns = columns or max(1, round(len(images) ** 0.5))
    picture = _tile(to_uint8(images), columns, _scale(images.shape[-2]))
    write_whole(path, lambda temporary: picture.save(temporary, format="PNG"))
    return path


def save_singles(images: Tensor, folder: Path, seeds: Sequence[int]) -> Path:
    """Write one PNG per sample, named by its seed."""
    for seed, pixels in zip(seeds, to_uint8(images), strict=True):
        write_whole(folder / f"{seed:06d}.png", lambda temporary, pixels=pixels: Image.fromarray(pixels).save(temporary, format="PNG"))
    return folder


def save_comparison(cells: Mapping[tuple[str, str], tuple[Tensor, str]], path: Path, *, title: str, across: int = 6) -> Path:
    """Write samplers side by side: rows and columns named by the keys ``(row, column)``, in order of appearance.

    A cell is the first of its samples ``[B, C, H, W]`` and a caption; one that is missing stays empty.
    """
    rows, columns = list(dict.fromkeys(r for r, _ in cells)), list(dict.fromkeys(c for _, c in cells))
    tiles = {key: _tile(to_uint8(images[:across]), across, _scale(images.shape[-2])) for key, (images, _) in cells.items()}
    width, height = next(iter(tiles.values())).size
    font, small = ImageFont.load_default(17), ImageFont.load_default(13)
    margin, gap, head, caption = 24 + max(int(font.getlength(r)) for r in rows), 14, 74, 18
    step_x, step_y = width + gap, height + caption + gap // 2
    sheet = Image.new("RGB", (margin + len(columns) * step_x, head + len(rows) * step_y), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 12), title, INK, font)
    for j, column in enumerate(columns):
        draw.text((margin + j * step_x, 46), column, INK, small)
    for i, row in enumerate(rows):
        top = head + i * step_y
        draw.text((12, top + height / 2), row, INK, font, anchor="lm")
        for j, column in enumerate(columns):
            if (row, column) in tiles:
                sheet.paste(tiles[row, column], (margin + j * step_x, top))
                draw.text((margin + j * step_x, top + height + 1), cells[row, column][1], MUTED, small)
    write_whole(path, lambda temporary: sheet.save(temporary, format="PNG"))
    return path
