"""Plots: something is drawn where it should be, in the colour it should have."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import VarianceExploding
from fewstep.apps.plots import BLUE, GREEN, ORANGE, save_schedules, save_statistics
from fewstep.core.statistics import ModelStatistics

LEVELS = torch.logspace(1.5, -1.5, 20, dtype=torch.float64)
ERROR = 0.1 / (1 + LEVELS)


@pytest.mark.slow
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


def drawn(path: Path, counts: list[int], ends: tuple[float, float] = (30.0, 0.03), error: tuple | None = None) -> dict[str, np.ndarray]:
    """Where the picture of schedules of so many steps has each colour, ``[H, W]``."""
    schedules, candidates = {}, {}
    for n in counts:
        levels = np.geomspace(max(ends[1], 0.03), min(ends[0], 30.0), n + 1)[::-1].tolist()
        levels[0], levels[-1] = ends
        schedules[n] = {"optimized": levels, "angle": [value * 0.8 for value in levels], "karras": levels}
        candidates[n] = [(1 / n, 0.5 / n), (2 / n, 0.7 / n)]
    made = save_schedules(path, "ddim on a model", schedules, error or (LEVELS, ERROR), candidates)
    picture = np.asarray(Image.open(made).convert("RGB")).astype(int)
    assert made == path and not list(path.parent.glob(".*")) and 2 < picture.shape[1] / picture.shape[0] < 5
    exact = {
        name: [int(value[k : k + 2], 16) for k in (1, 3, 5)] for name, value in {"orange": ORANGE, "green": GREEN, "blue": BLUE}.items()
    }
    found = {name: abs(picture - colour).max(2) < 12 for name, colour in exact.items()}
    return found | {"bluish": picture[..., 2] - picture[..., 0] > 30}  # candidates are more or less transparent


@pytest.mark.parametrize(
    "counts",
    [[5, 6, 8, 10], *(pytest.param(more, marks=pytest.mark.slow) for more in ([1], [5], [1, 2], [*range(2, 11)], [2, 4, 6, 7, 9, 11, 12]))],
    ids=str,
)
def test_schedules_have_marks_in_every_panel(tmp_path: Path, counts: list[int]) -> None:
    colour = drawn(tmp_path / "schedules.png", counts)
    width = colour["orange"].shape[1]
    left, right = slice(0, int(0.4 * width)), slice(int(0.75 * width), width)
    assert colour["orange"][:, left].sum() > 30 * (min(counts) + 1)  # a mark is 30 points^2, 70 pixels at this resolution
    assert colour["green"][:, left].sum() > 10 * (min(counts) + 1)
    assert colour["blue"][:, int(0.4 * width) : int(0.72 * width)].sum() > 200  # the line of the local error
    assert colour["bluish"][:, right].sum() > 20  # candidates


@pytest.mark.slow
def test_more_steps_are_more_marks(tmp_path: Path) -> None:
    few, many = (drawn(tmp_path / f"{n}.png", [n])["orange"] for n in (2, 12))
    left = slice(0, int(0.4 * few.shape[1]))
    assert many[:, left].sum() > 2 * few[:, left].sum()  # 13 marks and 3


@pytest.mark.slow
def test_of_many_numbers_of_steps_some_are_shown(tmp_path: Path) -> None:
    rows = {}
    for counts in ([3, 5, 8], list(range(2, 13))):
        orange = drawn(tmp_path / f"{len(counts)}.png", counts)["orange"]
        marked = orange[:, : int(0.4 * orange.shape[1])].sum(1) > 5
        marked = marked[: int(0.83 * len(marked))]  # without the legend below
        rows[len(counts)] = int((np.diff(marked.astype(int)) == 1).sum())
    assert rows == {3: 3, 11: 4}  # of 2 .. 12 these are drawn: 3, 5, 8, 10


@pytest.mark.slow
def test_levels_of_pure_noise_and_pure_signal_are_left_out(tmp_path: Path) -> None:
    level = torch.cat([torch.tensor([math.inf]), LEVELS, torch.zeros(1)]).double()
    colour = drawn(tmp_path / "flow.png", [4], (math.inf, 0.0), (level, torch.full_like(level, 0.1)))
    assert colour["orange"].sum() > 60 and colour["blue"].sum() > 100
