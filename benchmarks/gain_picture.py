"""The README's picture: error over evaluations on CIFAR-10 at 16x16, and the same seeds at 5 evaluations.

    python benchmarks/gain_picture.py --out docs/gain.png

The lines are rows of benchmarks/results/cifar10-16/standard/results.json; the images are sampled from assets/cifar10-16. Beside the picture
lies a JSON file with every number in it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import fewstep
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.reference import reference_sampler

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cifar10-16" / "standard" / "results.json"
MODEL = ROOT / "assets" / "cifar10-16"
SHOWN = 5  # evaluations of the images
SEEDS = range(4)
AMPLIFIED = 8  # the differences to the exact images, to be seen
COUNTS = (4, 5, 6, 8, 10)
HAND_MADE = {
    "ddim": "DDIM",
    "dpm-solver-pp-2m": "DPM-Solver++ 2M",
    "unipc-2": "UniPC-2",
    "dpm-solver-v3": "DPM-Solver-v3",
    "ipndm": "iPNDM",
}
OPTIMISED = {"unipc-2": "UniPC-2", "dpm-solver-v3": "DPM-Solver-v3"}
INK, SOFT, PALE, BEST, ORANGE, BLUE = "#1f2328", "#6e7781", "#a3abb4", "#57606a", "#d9730d", "#0b62d6"
DPI = 180
GAP = 0.052  # between two labels, of the height of the axis


Line = dict[int, dict[str, Any]]  # rows by evaluations


def line(rows: Sequence[dict[str, Any]], solver: str, *, optimised: bool) -> Line:
    """The least error of a solver on its optimised grid, or on any standard one, for each number of evaluations."""
    made: Line = {}
    for nfe in COUNTS:
        found = [
            row
            for row in rows
            if (row["solver"], row["nfe"], row["grid"] == "optimized") == (solver, nfe, optimised) and row["rmse"] is not None
        ]
        if found:
            made[nfe] = min(found, key=lambda row: row["rmse"])
    return made


def lines() -> dict[str, Line]:
    """Every line of the plot, by its label."""
    rows = [row for row in json.loads(ROWS.read_text())["rows"] if row["library"] == "fewstep"]
    made = {label: line(rows, solver, optimised=False) for solver, label in HAND_MADE.items()}
    made |= {f"{label}, optimised": line(rows, solver, optimised=True) for solver, label in OPTIMISED.items()}
    return made | {"fitted": line(rows, "fitted", optimised=True)}


def images(made: dict[str, Line]) -> dict[str, tuple[Tensor, float | None]]:
    """The samples ``[n, 3, 16, 16]`` and the error of each row of images, by its label."""
    model = fewstep.load_model(MODEL)
    by_hand = {label: made[label][SHOWN] for label in HAND_MADE.values()}
    best = min(by_hand, key=lambda label: by_hand[label]["rmse"])
    own = {label: made[f"{label}, optimised"][SHOWN] for label in OPTIMISED.values()}
    optimised = min(own, key=lambda label: own[label]["rmse"])

    def sampled(row: dict[str, Any]) -> tuple[Tensor, float]:
        return fewstep.sample(model, row["solver"], nfe=SHOWN, grid=row["grid"], seeds=SEEDS), row["rmse"]

    return {
        "exact": (fewstep.sample(model, reference_sampler(model.schedule), seeds=SEEDS), None),
        "fitted": sampled(made["fitted"][SHOWN]),
        f"{optimised}, optimised": sampled(own[optimised]),
        f"{best}": sampled(by_hand[best]),
        **{label: sampled(by_hand[label]) for label in ("DPM-Solver++ 2M", "DDIM")},
    }


def colour(label: str, best: str) -> tuple[str, float]:
    """Colour and width of a line."""
    if label == "fitted":
        return BLUE, 2.8
    if label.endswith("optimised"):
        return ORANGE, 1.8
    return (BEST, 1.8) if label == best else (PALE, 1.4)


def spread(wanted: dict[str, float], gap: float) -> dict[str, float]:
    """Heights of labels near those wanted, at least a gap apart."""
    order = sorted(wanted, key=wanted.__getitem__)
    groups = [[wanted[label], [label]] for label in order]  # middle, labels
    while True:
        for k in range(len(groups) - 1):
            (low, below), (high, above) = groups[k], groups[k + 1]
            if high - low < gap * (len(below) + len(above)) / 2 - 1e-12:
                both = [*below, *above]
                middle = sum(wanted[label] for label in both) / len(both)
                groups[k : k + 2] = [[middle, both]]
                break
        else:
            break
    return {label: middle + gap * (k - (len(labels) - 1) / 2) for middle, labels in groups for k, label in enumerate(labels)}


def plot(axis: Axes, made: dict[str, Line]) -> None:
    by_hand = [label for label in made if label in HAND_MADE.values()]
    best = min(by_hand, key=lambda label: made[label][SHOWN]["rmse"])
    axis.set(yscale="log", xlim=(3.8, 10), ylim=(0.0042, 0.24), xticks=COUNTS)
    axis.set_xlabel("network evaluations", color=INK, fontsize=10)
    low, high = (math.log(value) for value in axis.get_ylim())
    ends = {label: (math.log(rows[COUNTS[-1]]["rmse"]) - low) / (high - low) for label, rows in made.items()}
    for label, height in spread(ends, GAP).items():
        shade, width = colour(label, best)
        counts, errors = list(made[label]), [row["rmse"] for row in made[label].values()]
        axis.plot(counts, errors, color=shade, lw=width, marker="o", ms=3.5 if width < 2 else 5, solid_capstyle="round", clip_on=False)
        text = {"color": SOFT if shade == PALE else shade, "fontsize": 9.5, "va": "center"}
        axis.text(1.025, height, label, transform=axis.transAxes, weight="bold" if label == "fitted" else "normal", **text)
    ours, enough = made["fitted"][SHOWN]["rmse"], min(n for n in made[best] if made[best][n]["rmse"] <= made["fitted"][SHOWN]["rmse"])
    arrow = {"arrowstyle": "<|-", "color": INK, "lw": 1.2, "shrinkA": 5, "shrinkB": 5}
    axis.annotate("", (SHOWN, ours), (enough, ours), arrowprops=arrow)
    text = f"with {SHOWN} evaluations the error\nthat {best}, the best by hand,\nhas with {enough}"
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axis.text(4.0, 0.0096, text, va="top", color=INK, fontsize=9, linespacing=1.35, bbox=clear, zorder=1)
    axis.set_yticks([0.01, 0.1], ["0.01", "0.1"])
    axis.set_yticks([0.005, 0.02, 0.05, 0.2], ["0.005", "0.02", "0.05", "0.2"], minor=True)
    axis.tick_params(colors=INK, labelsize=9, which="both", length=0)
    axis.grid(axis="y", which="both", color="#e6e9ed", lw=0.8)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_visible(False)


def error_maps(samples: Tensor, exact: Tensor) -> Tensor:
    """How far each pixel is off, ``[n, 3, 16, 16]``: white where it is not."""
    off = (samples - exact).square().mean(1, keepdim=True).sqrt()
    ink = torch.tensor([0.12, 0.14, 0.16]).reshape(3, 1, 1)
    return torch.lerp(torch.ones(3, 1, 1), ink, (AMPLIFIED * off / 2).clamp(0, 1))


def show(axis: Axes, pictures: dict[str, tuple[Tensor, float | None]], best: str) -> None:
    """One row for each sampler: its images, and their differences to the exact ones."""
    size, between, apart, exact = 16, 1, 5, pictures["exact"][0]
    step, right = size + between, len(SEEDS) * (size + between) - between + apart
    canvas = torch.ones(len(pictures) * step - between, right + len(SEEDS) * step - between, 3)
    for row, (samples, error) in enumerate(pictures.values()):
        parts = {0: (samples.clamp(-1, 1) + 1) / 2, right: error_maps(samples, exact)}
        for begin, part in parts.items():
            for column, image in enumerate(part if begin == 0 or error is not None else []):
                x = begin + column * step
                canvas[row * step : row * step + size, x : x + size] = image.permute(1, 2, 0)
    axis.imshow(canvas.numpy(), interpolation="nearest", extent=(0, canvas.shape[1], canvas.shape[0], 0))
    axis.set_axis_off()
    heading = {"color": SOFT, "fontsize": 9, "va": "bottom"}
    axis.text(0, -1.6, "images", **heading)
    axis.text(right, step - 1.6, f"their errors, times {AMPLIFIED}", **heading)
    for row, (label, (_, error)) in enumerate(pictures.items()):
        shade, height = (INK if error is None else colour(label, best)[0]), row * step + size / 2
        name, _, kind = label.partition(", ")
        under = f"error {error:.3f}" if error is not None else "128 evaluations"
        bold = "bold" if label in ("exact", "fitted") else "normal"
        axis.text(-2.5, height - 2.6, name, color=SOFT if shade == PALE else shade, fontsize=9.5, ha="right", va="center", weight=bold)
        axis.text(-2.5, height + 2.8, f"{kind}, {under}" if kind else under, color=SOFT, fontsize=8.5, ha="right", va="center")


def figure(made: dict[str, Line], pictures: dict[str, tuple[Tensor, float | None]]) -> Figure:
    whole = plt.figure(figsize=(11.2, 4.4), facecolor="white", dpi=DPI)
    left, right = whole.add_axes((0.048, 0.118, 0.29, 0.69)), whole.add_axes((0.635, 0.015, 0.36, 0.87))
    plot(left, made)
    by_hand = {label: made[label][SHOWN]["rmse"] for label in HAND_MADE.values()}
    show(right, pictures, min(by_hand, key=by_hand.__getitem__))
    title = {"color": INK, "fontsize": 11, "weight": "bold", "va": "top"}
    whole.text(0.012, 0.98, "Error to the exact images, CIFAR-10 at 16x16", **title)
    whole.text(0.635, 0.98, f"The same noises, {SHOWN} evaluations", **title)
    x = 0.012
    for text, shade in (("hand-made, best standard grid", SOFT), ("optimised grid", ORANGE), ("fitted to the model", BLUE)):
        drawn = whole.text(x, 0.905, text, color=shade, fontsize=9.5, va="top")
        x = whole.transFigure.inverted().transform(drawn.get_window_extent(whole.canvas.get_renderer()))[1][0] + 0.018  # type: ignore[attr-defined]
    return whole


def numbers(made: dict[str, Line]) -> dict[str, Any]:
    """Every number of the picture, and where it is from."""
    shown = {label: {str(n): {"grid": row["grid"], "rmse": row["rmse"]} for n, row in rows.items()} for label, rows in made.items()}
    return {"rows": str(ROWS.relative_to(ROOT)), "model": MODEL.name, "seeds": list(SEEDS), "evaluations": SHOWN, "lines": shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the picture; its numbers go beside it, as .json")
    args = parser.parse_args()
    made = lines()
    pictures = images(made)
    buffer = io.BytesIO()
    figure(made, pictures).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_whole(args.out, buffer.getvalue())
    write_whole(args.out.with_suffix(".json"), (json.dumps(numbers(made), indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
