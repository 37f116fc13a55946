"""Draw what a report shows: work-precision plots, histograms and schedules as SVG and PNG, and strips of samples.

A plot is drawn once, in the colours of `LIGHT`. Its SVG names each of them as a CSS variable, so that a page can show it light or dark.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from fewstep.evaluate.metrics.confidence import PARTED
from fewstep.evaluate.pictures import to_uint8
from fewstep.runtime.errors import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "DARK",
    "LIGHT",
    "MARKS",
    "Point",
    "data_uri",
    "evaluation_axis",
    "figure_of",
    "histograms",
    "log_ticks",
    "name_lines",
    "new_axes",
    "png",
    "point_of",
    "schedules",
    "strip",
    "style",
    "svg",
    "svg_file",
    "work_precision",
]

LIGHT = {"ink": "#1b1f24", "muted": "#667079", "rule": "#e2e5e9", "paper": "#ffffff"}
LIGHT |= {"c1": "#0072b2", "c2": "#d55e00", "c3": "#009e73", "c4": "#cc79a7", "c5": "#e69f00", "rest": "#b4bbc3"}  # Okabe and Ito's
DARK = {"ink": "#e7e9ec", "muted": "#9aa4ae", "rule": "#2b3138", "paper": "#14171b"}
DARK |= {"c1": "#56b4e9", "c2": "#e8743b", "c3": "#1fb58c", "c4": "#d98fb8", "c5": "#e69f00", "rest": "#59636d"}
COLOURS, MARKS = ("c1", "c2", "c3", "c4", "c5"), "osD^v"
WIDTH, FONT = 400, 11  # in CSS pixels; a phone shows them about as large as they are
LABELLED = 12  # lines that get a name
SIDE = 64  # pixels of a picture's longer side, at most


class Point(NamedTuple):
    """A number at so many evaluations, or at another cost, and its interval if it has one."""

    nfe: float
    value: float
    interval: tuple[float, float] | None


def point_of(row: Mapping[str, Any], measure: str, cost: float) -> Point:
    """Return a measure of a row, with its interval if it has one; its low end, where a logarithmic axis has none, is the measure."""
    ends, value = row.get(f"{measure}_ci"), row[measure]
    return Point(cost, value, None if ends is None else (ends[0] if ends[0] > 0 else value, ends[1]))


# -- plots ------------------------------------------------------------------------------------------------------------


def work_precision(series: Mapping[str, Sequence[Point]], *, floor: float | None = None, cost: str = "network evaluations") -> Figure:
    """Draw lines over evaluations on log axes, with intervals and the names beside the lines; the first five in colours, the others grey.

    Args:
        series: by name; the best first.
        floor: what cannot be beaten, as a dashed line.
        cost: the name of the horizontal axis, along which points have their ``nfe``.
    """
    counts = sorted({point.nfe for points in series.values() for point in points})
    dodge = np.log(counts[-1] / counts[0] or 1) * 0.012  # intervals beside each other
    with style():
        axes = new_axes(300, left=48, right=132, bottom=40, top=12)
        ends, edges = [], [] if floor is None else [floor]
        for rank, (name, points) in reversed(list(enumerate(series.items()))):
            front = rank < len(COLOURS)
            colour, mark, size, width = (COLOURS[rank], MARKS[rank], 5, 1.7) if front else ("rest", "o", 2.5, 1)
            x = [point.nfe * np.exp(dodge * (rank - 2) if front else 0) for point in points]
            y, look = [point.value for point in points], {"color": LIGHT[colour], "zorder": 40 - rank}
            axes.plot(x, y, marker=mark, markersize=size, linewidth=width, **look)
            for place, point in zip(x, points, strict=True):
                if point.interval is not None and front:
                    axes.plot([place, place], point.interval, linewidth=1, **look)
            edges += [edge for point in points for edge in ((point.interval if front else None) or [point.value])]
            ends.append((points[-1], name, colour))
        axes.loglog()
        _limits(axes, counts, edges)
        shown = ends if len(ends) <= LABELLED else [end for end in ends if end[2] != "rest"]
        if floor is not None:
            axes.axhline(floor, color=LIGHT["muted"], linewidth=1, linestyle=(0, (3, 3)), zorder=1)
            shown.append((Point(counts[-1], floor, None), "exact samples", "muted"))
        name_lines(axes, shown, counts[-1])
        axes.set_xlabel(cost)
    return figure_of(axes)


def histograms(errors: Mapping[str, np.ndarray], nfe: int) -> Figure:
    """Draw the distribution of the errors of single samples: one row per sampler, on one axis; a sample right of its line has parted."""
    with style():
        rows = len(errors)
        figure = _new(34 * rows + 46)
        low, high = (float(bound(values[values > 0])) for bound, values in ((np.min, _together(errors)), (np.max, _together(errors))))
        edges = np.geomspace(low / 1.02, max(high, low * 1.5) * 1.02, 49)
        for rank, (name, values) in enumerate(errors.items()):
            height = 34 / (34 * rows + 46)
            axes = figure.add_axes((0.34, 1 - (rank + 1) * height, 0.64, height * 0.86))
            colour = LIGHT[COLOURS[rank] if rank < len(COLOURS) else "rest"]
            axes.hist(values[values > 0], edges.tolist(), color=colour, alpha=0.85)
            axes.axvline(PARTED * float(np.median(values)), color=LIGHT["ink"], linewidth=1, linestyle=":")
            axes.set_xscale("log")
            axes.set_xlim(edges[0], edges[-1])
            axes.set_yticks([])
            axes.spines[["left", "top", "right"]].set_visible(False)
            axes.text(-0.04, 0.3, _short(name, 21), transform=axes.transAxes, ha="right", va="center", color=LIGHT["ink"], size=10)
            log_ticks(axes.xaxis, edges[0], edges[-1], 6)
            if rank < rows - 1:
                axes.tick_params(axis="x", length=0, labelbottom=False)
            else:
                axes.set_xlabel(f"error of a sample, {counted(nfe, 'evaluation')}")
    return figure


def schedules(levels: Mapping[str, Sequence[float]], nfe: int) -> Figure:
    """Draw the noise levels ``sigma/alpha`` at which grids evaluate, one row per grid. Pure noise and the clean image have no place."""
    with style():
        height = 24 * len(levels) + 52
        axes = new_axes(height, left=134, right=10, bottom=44, top=6)
        for row, values in enumerate(levels.values()):
            inside = [value for value in values if 0 < value < float("inf")]
            colour = LIGHT[COLOURS[row] if row < len(COLOURS) else "muted"]
            axes.plot(inside, [row] * len(inside), color=colour, marker=MARKS[row % len(MARKS)], markersize=5, linewidth=0.7)
        every = [value for values in levels.values() for value in values if 0 < value < float("inf")]
        axes.set_xscale("log")
        axes.set_xlim(max(every) * 1.4, min(every) / 1.4)
        axes.set_ylim(len(levels) - 0.5, -0.5)
        axes.set_yticks(range(len(levels)), [_short(name, 21) for name in levels])
        axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        log_ticks(axes.xaxis, min(every), max(every), 6)
        axes.set_xlabel(f"noise level sigma/alpha, {counted(nfe, 'evaluation')}")
    return figure_of(axes)


def _together(errors: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate(list(errors.values()))


def _new(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH / 72, height / 72))


def figure_of(axes: Axes) -> Figure:
    """Return the figure of axes."""
    from matplotlib.figure import Figure

    figure = axes.figure
    assert isinstance(figure, Figure)  # no sub-figures here
    return figure


def new_axes(height: float, *, left: float, right: float, bottom: float, top: float) -> Axes:
    """Make axes in a new figure, with margins in pixels."""
    box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (bottom + top) / height)
    return _new(height).add_axes(box)


def _limits(axes: Axes, counts: Sequence[float], values: Sequence[float]) -> None:
    """Set limits and ticks: evaluations as `evaluation_axis`; values at 1, 2 and 5."""
    evaluation_axis(axes, counts)
    inside = [value for value in values if value > 0]
    if inside:
        axes.set_ylim(min(inside) / 1.25, max(inside) * 1.25)
        log_ticks(axes.yaxis, min(inside), max(inside), 7)


def evaluation_axis(axes: Axes, counts: Sequence[float]) -> None:
    """Set the limits and ticks of a logarithmic axis of evaluations: those that were run, ascending, as many as have room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = counts[0] / 1.08, counts[-1] * 1.08
    room, ticks = np.log(high / low) / 9, [counts[0]]
    for count in counts[1:-1]:
        if min(np.log(count / ticks[-1]), np.log(counts[-1] / count)) >= room:
            ticks.append(count)
    ticks.append(counts[-1])
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value == int(value) else f"{value:.3g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def log_ticks(axis: Any, low: float, high: float, most: int) -> None:  # noqa: ANN401 - matplotlib's
    """Set ticks at 1, 2, 5 in each decade, or fewer, so that there are no more than ``most``."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 2)
    ticks: list[float] = []
    for steps, stride in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 6)):
        ticks = [step * 10.0**decade for decade in decades if decade % stride == 0 for step in steps]
        ticks = [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]
        if len(ticks) <= most:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def name_lines(axes: Axes, ends: Sequence[tuple[Point, str, str]], last: float) -> None:
    """Write names to the right of the lines' ends, moved apart where they would overlap."""
    to_pixels, box = axes.transData.transform, axes.bbox
    scale = 72 / figure_of(axes).dpi
    wanted = sorted((float(to_pixels((last, point.value))[1] - box.y0) * scale, name, colour, point) for point, name, colour in ends)
    gap, places = 13.0, [height for height, *_ in wanted]
    for _ in range(200):  # relax: push neighbours apart, keep all beside the axes
        for k in range(len(places) - 1):
            lack = gap - (places[k + 1] - places[k])
            if lack > 0:
                places[k], places[k + 1] = places[k] - lack / 2, places[k + 1] + lack / 2
        if places:
            shift = max(0.0, 5 - places[0]) - max(0.0, places[-1] - (box.height * scale - 5))
            places = [place + shift / 2 for place in places]
    right, pixels = box.width * scale, _pixels(axes)
    for place, (height, name, colour, point) in zip(places, wanted, strict=True):
        begin = float(to_pixels((point.nfe, point.value))[0] - box.x0) * scale
        dashes = (0, (1, 2)) if point.nfe < last else "solid"
        leader = ([begin + 5, right + 2, right + 12], [height, height, place])
        axes.plot(*leader, transform=pixels, color=LIGHT[colour], linewidth=0.8, linestyle=dashes, clip_on=False)
        ink = LIGHT["ink" if colour in COLOURS else "muted"]
        axes.text(right + 15, place, _short(name, 21), transform=pixels, va="center", color=ink, size=10)


def _pixels(axes: Axes) -> Any:  # noqa: ANN401 - a transform of matplotlib's
    """Return the transform to CSS pixels from the lower left corner of the axes."""
    from matplotlib.transforms import Affine2D, ScaledTranslation

    figure, corner = figure_of(axes), axes.get_position()
    width, height = figure.get_size_inches()
    to_corner = ScaledTranslation(corner.x0 * width, corner.y0 * height, figure.dpi_scale_trans)
    return Affine2D().scale(1 / 72) + figure.dpi_scale_trans + to_corner


def _short(name: str, most: int) -> str:
    """Shorten a long name by leaving out its middle."""
    return name if len(name) <= most else f"{name[: most - 10]}…{name[-9:]}"


# -- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def style() -> Iterator[None]:
    """Set matplotlib up: the same figure gives the same bytes, and names are never formulas."""
    from matplotlib import rc_context

    settings: dict[Any, Any] = {
        "axes.edgecolor": LIGHT["rule"],
        "axes.labelcolor": LIGHT["muted"],
        "text.color": LIGHT["ink"],
        "axes.linewidth": 1,
    }
    settings |= {"xtick.color": LIGHT["rule"], "ytick.color": LIGHT["rule"], "xtick.labelcolor": LIGHT["muted"]}
    settings |= {"ytick.labelcolor": LIGHT["muted"], "axes.grid": True, "grid.color": LIGHT["rule"], "grid.linewidth": 0.8}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "text.parse_math": False}
    settings |= {"font.size": FONT, "axes.labelsize": FONT, "xtick.labelsize": FONT, "ytick.labelsize": FONT}
    settings |= {"axes.facecolor": "none", "figure.facecolor": LIGHT["paper"], "svg.fonttype": "none", "svg.hashsalt": "fewstep"}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that matplotlib's font lacks; browsers have others
        yield


def png(figure: Figure) -> bytes:
    """Return the plot on white as a PNG."""
    made = io.BytesIO()
    with style():
        figure.savefig(made, format="png", dpi=160, metadata={"Software": None})
    return made.getvalue()


def svg(figure: Figure, name: str) -> str:
    """Return the plot for the inside of a page: no outer references, colours from CSS variables, ids that begin with ``name``."""
    made = io.StringIO()
    with style():
        figure.savefig(made, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = made.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.S)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans, sans-serif)", text.replace("font: ", "font-family: "))
    for variable, colour in LIGHT.items():
        text = re.sub(rf"(?<=[: ]){colour}\b", f"var(--{variable}, {colour})", text)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', text, count=1)


def svg_file(inner: str) -> bytes:
    """Return the plot as a file of its own, which follows its reader's light or dark setting."""
    rule = "{ --%s }"
    light, dark = (rule % "; --".join(f"{key}: {value}" for key, value in palette.items()) for palette in (LIGHT, DARK))
    style = f"<style>:root {light} @media (prefers-color-scheme: dark) {{ :root {dark} }} svg {{ background: var(--paper) }}</style>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" '
    return re.sub(r"<svg ([^>]*)>", lambda found: f"{head}{found[1]}>{style}", inner, count=1).encode()


def strip(images: Tensor, count: int, side: int = SIDE) -> bytes:
    """Return the first ``count`` of samples ``[B, C, H, W]`` side by side as a PNG, made smaller beyond ``side`` pixels."""
    pixels = to_uint8(images[:count])
    shrink = max(1, -(-max(pixels.shape[1:3]) // side))
    size = (max(1, pixels.shape[2] // shrink), max(1, pixels.shape[1] // shrink))
    shown = [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BOX)) for one in pixels]
    picture = Image.fromarray(np.concatenate(shown, 1))
    if all((one[..., 0] == one[..., 1]).all() and (one[..., 0] == one[..., 2]).all() for one in shown):
        picture = picture.convert("L")
    made = io.BytesIO()
    picture.save(made, format="PNG", optimize=True)
    return made.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Return the address of a file inside a page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
