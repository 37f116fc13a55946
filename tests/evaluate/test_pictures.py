"""Pictures: the right pixels in the right places."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import FewstepError, VarianceExploding
from fewstep.core.statistics import ModelStatistics
from fewstep.evaluate.pictures import save_comparison, save_grid, save_statistics, to_uint8


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


def test_comparison_keeps_missing_cells_empty(tmp_path: Path) -> None:
    dark = torch.full((10, 1, 8, 8), -1.0)
    cells = {("a", "5"): (dark, "x"), ("b", "5"): (dark, "y"), ("b", "6"): (dark, "z")}
    picture = np.asarray(Image.open(save_comparison(cells, tmp_path / "c.png", title="t")))
    right = picture[:, picture.shape[1] // 2 + 40 :, 0] < 10
    assert right[: picture.shape[0] // 2].mean() < 0.05 < right[picture.shape[0] // 2 :].mean()


def test_statistics_are_lines_with_a_band_where_elements_differ(tmp_path: Path) -> None:
    lam = torch.linspace(-3, 3, 7, dtype=torch.float64)
    line = torch.sigmoid(-lam).reshape(7, 1, 1, 1)
    coloured = {}
    for name, values in {"scalar": line, "element": line + torch.linspace(-0.3, 0.3, 64).reshape(1, 8, 8)}.items():
        statistics = ModelStatistics(lam, values, values - 1, 0.1 * values, (1, 8, 8), VarianceExploding())
        picture = np.asarray(Image.open(save_statistics(statistics, tmp_path / f"{name}.png")).convert("RGB")).astype(int)
        height, width, _ = picture.shape
        assert 600 <= width <= 3000 and 2 < width / height < 5
        panels = np.array_split(picture[..., 2] - picture[..., 0] > 30, 3, axis=1)  # bluish
        coloured[name] = [panel.mean() for panel in panels]
    assert min(coloured["scalar"]) > 0.002  # a line in each of the three panels
    assert all(band > 5 * plain for band, plain in zip(coloured["element"], coloured["scalar"], strict=True))
