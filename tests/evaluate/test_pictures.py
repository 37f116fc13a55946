"""Pictures: the right pixels in the right places."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import FewstepError
from fewstep.evaluate.pictures import save_comparison, save_grid, to_uint8


def test_pixels() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0]).reshape(1, 1, 2, 2)
    assert to_uint8(images)[0, :, :, 0].tolist() == [[0, 0], [128, 255]]
    assert to_uint8(torch.zeros(1, 3, 2, 2)).shape == (1, 2, 2, 3)
    with pytest.raises(FewstepError, match=r"\[B, C, H, W\]"):
        to_uint8(torch.zeros(4, 2))


def test_grid_is_in_reading_order(tmp_path: Path) -> None:
    images = torch.linspace(-1, 1, 4).reshape(4, 1, 1, 1).expand(4, 1, 8, 8)
    picture = np.asarray(Image.open(save_grid(images, tmp_path / "grid.png")))
    assert picture.shape == (82, 82, 3)
    assert [int(picture[y, x, 0]) for y in (10, 70) for x in (10, 70)] == [0, 85, 170, 255]


@pytest.mark.parametrize(("size", "shown"), [(8, 40), (16, 48), (32, 64), (64, 64)])
def test_small_pictures_are_enlarged_by_whole_pixels(size: int, shown: int, tmp_path: Path) -> None:
    picture = np.asarray(Image.open(save_grid(torch.zeros(1, 3, size, size), tmp_path / "grid.png")))
    assert picture.shape == (shown, shown, 3)


def test_comparison_keeps_missing_cells_empty(tmp_path: Path) -> None:
    dark = torch.full((10, 1, 8, 8), -1.0)
    cells = {("a", "5"): (dark, "x"), ("b", "5"): (dark, "y"), ("b", "6"): (dark, "z")}
    picture = np.asarray(Image.open(save_comparison(cells, tmp_path / "c.png", title="t")))
    right = picture[:, picture.shape[1] // 2 + 40 :, 0] < 10
    assert right[: picture.shape[0] // 2].mean() < 0.05 < right[picture.shape[0] // 2 :].mean()
