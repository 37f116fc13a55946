"""Draw curves: what an inspection shows over the noise level, from much noise to little, and what restorations show over evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fewstep.evaluate.report.plots import (
    COLOURS,
    LIGHT,
    MARKS,
    Point,
    evaluation_axis,
    figure_of,
    log_ticks,
    name_lines,
    new_axes,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["change_along", "distances", "over_evaluations", "stops"]

SIDES = ((6, "bottom", "left"), (-6, "top", "right"))  # of a curve, where its name is
HEIGHT, MARGINS = 280, {"left": 64, "right": 12, "bottom": 44, "top": 12}


def distances(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Draw distances to the end over the noise level, log-log, each named beside its line.

    Args:
        curves: levels and distances by name.
    """
    with style():
        axes = new_axes(HEIGHT, **MARGINS)
        for (name, (levels, values)), colour, (apart, vertical, horizontal) in zip(curves.items(), COLOURS, SIDES, strict=False):
            x, y = _positive(levels, values)
            axes.plot(x, y, color=LIGHT[colour], linewidth=1.8)
            point = (x[len(x) * 2 // 5], y[len(x) * 2 // 5])
            named = axes.annotate(name, point, (apart, apart), textcoords="offset points", color=LIGHT[colour], size=10)
            named.set(va=vertical, ha=horizontal)
        axes.set_yscale("log")
        _over_levels(axes)
        low, high = axes.get_ylim()
        log_ticks(axes.yaxis, low, high, 6)
        axes.set_ylabel("RMS distance to the end")
    return figure_of(axes)


def change_along(levels: Sequence[float], change: Sequence[float], grids: Mapping[str, Sequence[float]]) -> Figure:
    """Draw how much the denoised image changes along the way, and above it where samplers evaluate.

    Args:
        levels: noise levels.
        change: of the image, for a factor e in the level.
        grids: levels at which samplers evaluate, by name.
    """
    with style():
        axes = new_axes(HEIGHT + 22 * len(grids), **{**MARGINS, "top": 14 + 22 * len(grids)})
        x, y = _positive(levels, change)
        axes.fill_between(x, 0, y, color=LIGHT["c1"], alpha=0.25, linewidth=0)
        axes.plot(x, y, color=LIGHT["c1"], linewidth=1.8)
        _over_levels(axes)
        top = max(y) * 1.06
        axes.set_ylim(0, top)
        axes.set_ylabel("change of the image")
        for row, (name, values) in enumerate(grids.items()):
            inside, _ = _positive(values, values)
            height, colour = 1 + (len(grids) - row - 0.5) * 22 / (HEIGHT - MARGINS["bottom"] - 14), LIGHT[COLOURS[row + 1]]
            axes.plot(
                inside,
                [height] * len(inside),
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                color=colour,
                marker=MARKS[row + 1],
                markersize=5,
                linewidth=0.7,
            )
            axes.text(0, height + 0.035, name, transform=axes.transAxes, color=colour, size=9, va="bottom", clip_on=False)
    return figure_of(axes)


def stops(errors: Sequence[float]) -> Figure:
    """Draw the error of a sampler that is stopped after each evaluation, and of the whole one (the last), as a dashed line."""
    from matplotlib.ticker import MaxNLocator

    with style():
        axes = new_axes(HEIGHT, **MARGINS)
        *stopped, whole = errors
        axes.plot(range(1, len(stopped) + 1), stopped, color=LIGHT["c1"], marker="o", markersize=4, linewidth=1.8)
        axes.axhline(whole, color=LIGHT["muted"], linewidth=1, linestyle=(0, (3, 3)))
        axes.annotate("the whole sampler", (1, whole), (0, 4), textcoords="offset points", color=LIGHT["muted"], size=10)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        log_ticks(axes.yaxis, low, high, 6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("evaluations made")
        axes.set_ylabel("RMSE")
    return figure_of(axes)


def over_evaluations(series: Mapping[str, Sequence[tuple[float, float]]], label: str, floor: tuple[str, float] | None = None) -> Figure:
    """Draw a figure over the network evaluations, each line named at its end; the first five in colours, the others grey.

    Args:
        series: evaluations and values by name, ascending; the most important first.
        label: what the figure is.
        floor: the name and the value of a row without evaluations, as a dashed line.
    """
    counts = sorted({round(nfe) for points in series.values() for nfe, _ in points})
    with style():
        axes = new_axes(HEIGHT + 14 * max(0, len(series) - 12), left=52, right=150, bottom=44, top=12)
        ends = list[tuple[Point, str, str]]()
        for rank, (name, points) in reversed(list(enumerate(series.items()))):
            front = rank < len(COLOURS)
            colour, mark, size, width = (COLOURS[rank], MARKS[rank], 5, 1.7) if front else ("rest", "o", 4, 1)
            x, y = [nfe for nfe, _ in points], [value for _, value in points]
            axes.plot(x, y, color=LIGHT[colour], marker=mark, markersize=size, linewidth=width, zorder=40 - rank)
            ends.append((Point(round(x[-1]), y[-1], None), name, colour))
        axes.set_xscale("log")
        evaluation_axis(axes, counts)
        if floor is not None:
            axes.axhline(floor[1], color=LIGHT["muted"], linewidth=1, linestyle=(0, (3, 3)), zorder=1)
            ends.append((Point(counts[-1], floor[1], None), floor[0], "muted"))
        values = [value for points in series.values() for _, value in points] + ([] if floor is None else [floor[1]])
        room = 0.06 * (max(values) - min(values)) or 0.5
        axes.set_ylim(min(values) - room, max(values) + room)
        name_lines(axes, ends, counts[-1])
        axes.set_xlabel("network evaluations")
        axes.set_ylabel(label)
    return figure_of(axes)


def _positive(levels: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the points that a logarithmic axis has a place for."""
    kept = [(x, y) for x, y in zip(levels, values, strict=True) if 0 < x < math.inf and 0 < y < math.inf]
    return [x for x, _ in kept], [y for _, y in kept]


def _over_levels(axes: Axes) -> None:
    """Make the horizontal axis that of the noise level, from much to little."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(high, low)
    log_ticks(axes.xaxis, low, high, 6)
    axes.set_xlabel("noise level sigma/alpha")
