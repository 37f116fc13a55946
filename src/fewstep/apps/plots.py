"""Plots of learned artifacts: statistics along the noise level, schedules and the errors that led to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.core.statistics import ModelStatistics
from fewstep.runtime.artifact import write_whole

__all__ = ["save_schedules", "save_statistics"]

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#71717A"  # safe for the colour-blind
LEVEL = "noise level sigma/alpha"
STANDARD = {"angle": (GREEN, "v"), "karras": (PURPLE, "s"), "logsnr": (GREY, "d")}


def save_statistics(statistics: ModelStatistics, path: Path) -> Path:
    """Plot ``l``, ``s`` and ``b`` along the noise level: the mean over elements, and the band that holds nine tenths of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    level = np.exp(-statistics.lam.numpy())
    about = {"l": "linear part", "s": "slope of what is left", "b": "its drift"}
    for axes, (name, what) in zip(figure.subplots(1, 3), about.items(), strict=True):
        values = getattr(statistics, name).flatten(1).numpy()
        if values.shape[1] > 1:
            axes.fill_between(level, *np.quantile(values, (0.05, 0.95), axis=1), color=BLUE, alpha=0.25, linewidth=0)
        axes.plot(level, values.mean(1), color=BLUE, linewidth=1.8)
        axes.set_xscale("log")
        axes.invert_xaxis()
        _dress(axes, f"{name}: {what}", LEVEL)
    return _write(figure, path)


def save_schedules(
    path: Path,
    title: str,
    schedules: Mapping[int, Mapping[str, Sequence[float]]],
    local_error: tuple[Tensor, Tensor],
    candidates: Mapping[int, Sequence[tuple[float, float]]],
) -> Path:
    """Optimised schedules beside standard ones; the local error along the noise level; the bound against the measured error.

    Args:
        schedules: for each number of evaluations the noise levels of ``optimized`` and of standard grids.
        local_error: noise levels ``[n]`` and the first-order local error of a short step at each.
        candidates: for each number of evaluations ``(bound, measured error)`` of all schedules that were tried.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    shown = list(schedules) if len(schedules) <= 6 else [n for n in (3, 5, 8, 10, 15, 20) if n in schedules] or list(schedules)[:6]
    for row, nfe in enumerate(shown):
        names = [name for name in STANDARD if name in schedules[nfe]]
        for k, name in enumerate(["optimized", *names]):
            levels = np.array(schedules[nfe][name])
            colour, mark = STANDARD.get(name, (ORANGE, "o"))
            y = np.full(len(levels), row + 0.2 * k - 0.3)
            left.plot(levels, y, color=colour, linewidth=0.8, alpha=0.4)
            left.scatter(levels, y, s=30 if k == 0 else 12, color=colour, marker=mark, label=name if row == 0 else None, zorder=3)
    left.set_yticks(range(len(shown)), [f"{n}" for n in shown])
    left.invert_yaxis()
    left.set_ylabel("evaluations")
    left.legend(loc="lower left", fontsize=8, frameon=False, ncols=4, bbox_to_anchor=(-0.02, -0.28))
    middle.plot(*(value.numpy() for value in local_error), color=BLUE, linewidth=1.8)
    for level in schedules[shown[-1]]["optimized"]:
        middle.axvline(level, color=ORANGE, linewidth=0.8, alpha=0.6)
    for axes in (left, middle):
        axes.set_xscale("log")
        axes.invert_xaxis()
    for k, (nfe, pairs) in enumerate(candidates.items()):
        shade = 0.25 + 0.75 * (k + 1) / len(candidates)
        right.scatter(*zip(*pairs, strict=True), s=14, color=BLUE, alpha=shade, label=f"{nfe}" if nfe in shown else None)
    ends = [min(min(p) for pairs in candidates.values() for p in pairs), max(max(p) for pairs in candidates.values() for p in pairs)]
    right.plot(ends, ends, color=GREY, linewidth=1, linestyle="--")
    right.loglog()
    bounds = [bound for pairs in candidates.values() for bound, _ in pairs]
    right.set_xlim(0.8 * min(bounds), 1.25 * max(bounds))
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    right.legend(loc="lower right", fontsize=8, frameon=False, title="evaluations", title_fontsize=8)
    right.set_ylabel("measured error")
    _dress(left, title, LEVEL)
    _dress(middle, f"local error of a short step; lines: {shown[-1]} steps", LEVEL)
    _dress(right, "first-order bound and measured error", "bound")
    return _write(figure, path)


def _dress(axes: Any, title: str, below: str) -> None:  # noqa: ANN401 - matplotlib's
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(below)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _write(figure: Any, path: Path) -> Path:  # noqa: ANN401 - matplotlib's
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    return path
