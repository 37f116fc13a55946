"""The page of a benchmark of restorations: for each task a table, plots over evaluations, and the pictures side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.evaluate.report import curves, plots
from fewstep.evaluate.report.template import rendered, write_page
from fewstep.evaluate.restoration.rows import (
    PSEUDO_INVERSE,
    RestorationResults,
    RestorationRow,
    as_json,
    by_task,
    read_row_file,
    row_file,
)
from fewstep.runtime.errors import FewstepError

__all__ = ["restoration_page", "write_restorations"]

MARKED: dict[str, Callable[..., float]] = {"psnr": max, "mean": max, "ssim": max, "features": min}  # what is best in a column


def write_restorations(results: RestorationResults, out: Path) -> Path:
    """Write ``report.html`` of a benchmark in ``out``, and return its path.

    Args:
        results: of that folder.
        out: the folder, where the pictures of its rows lie.

    Raises:
        FewstepError: matplotlib or jinja2 is missing, or no row has figures.
        ArtifactError: the folder cannot be written, or pictures in it are damaged.
    """
    return write_page(lambda: restoration_page(results, out), out)


def restoration_page(results: RestorationResults, out: Path) -> str:
    """Return the page as HTML, complete in itself; rows whose pictures are not in the folder ``out`` any more are shown without them."""
    tasks = [_task(name, rows, out, number) for number, (name, rows) in enumerate(by_task(results.rows).items())]
    tasks = [task for task in tasks if task["rows"]]
    if not tasks:
        raise FewstepError(f"no row in {out} has figures, so there is nothing to show")
    page = {
        "results": results,
        "tasks": tasks,
        "num": results.problem["num"],
        "data": results.problem["data"],
        "features": results.problem["features"],
        "labels": results.problem["labels"],
        "coverage": any(row.coverage is not None for row in results.rows),
        "files": [("results.json", plots.data_uri(json.dumps(as_json(results), indent=1).encode(), "application/json"))],
    }
    return rendered("restoration.html.j2", page)


def _task(name: str, rows: Sequence[RestorationRow], out: Path, number: int) -> dict[str, Any]:
    """Return what the page shows of a task."""
    made = [row for row in rows if row.failed is None]
    best = dict[str, float]()
    for field, pick in MARKED.items():
        values = [value for row in made if (value := getattr(row, field)) is not None]
        best |= {field: pick(values)} if values else {}
    first = next((row for row in made if row.method != PSEUDO_INVERSE), None)
    figures = {} if first is None else _figures(made, number)
    kept = {row.key: found for row in made if (found := read_row_file(row_file(out, row))) is not None}
    return {
        "name": name,
        "first": None if first is None else f"{first.method} {first.sampler}",
        "rows": [_row(row, best) for row in made],
        "failed": [(f"{row.method} {row.sampler}", row.failed) for row in rows if row.failed is not None],
        "plots": figures,
        "strips": _strips(made, kept),
        "several": max((row.several for row in made), default=0),
    }


def _row(row: RestorationRow, best: dict[str, float]) -> dict[str, Any]:
    def shown(field: str, pattern: str) -> tuple[str, bool]:
        value = getattr(row, field)
        return ("", False) if value is None else (pattern.format(value), field in best and value == best[field])

    return {
        "method": row.method,
        "solver": row.solver,
        "nfe": f"{row.nfe:.0f}" if row.nfe else "",
        "products": str(row.products or ""),
        "psnr": shown("psnr", "{:.2f}"),
        "psnr_error": "" if row.psnr_error is None else f"± {row.psnr_error:.2f}",
        "gain": "" if row.gain is None else f"{row.gain:+.2f}",
        "gain_error": "" if not row.gain_error else f"± {row.gain_error:.2f}",
        "mean": shown("mean", "{:.2f}"),
        "alone": "" if row.alone is None else f"one: {row.alone:.2f}",
        "ssim": shown("ssim", "{:.3f}"),
        "features": shown("features", "{:.3f}"),
        "misfit": shown("misfit", "{:.2f}")[0],
        "coverage": "" if row.coverage is None else f"{row.coverage:.0%}",
        "spread": "" if row.spread is None else f"{row.spread:.2f}",
        "seconds": "" if row.seconds is None or not row.nfe else f"{row.seconds:.2g}",
    }


def _figures(rows: Sequence[RestorationRow], number: int) -> dict[str, str]:
    """Draw PSNR and the distance in features over the evaluations, the lines of the best PSNR first."""
    lines = dict[str, list[RestorationRow]]()
    for row in rows:
        if row.method != PSEUDO_INVERSE:
            lines.setdefault(f"{row.method} {row.solver}", []).append(row)
    ranked = sorted(lines, key=lambda name: -max(row.psnr or 0 for row in lines[name]))
    zero = next((row for row in rows if row.method == PSEUDO_INVERSE), None)
    drawn = dict[str, str]()
    for field, label in {"psnr": "PSNR, dB", "features": "distance in features"}.items():
        series = {name: sorted((row.nfe, getattr(row, field)) for row in lines[name]) for name in ranked}
        floor = None if zero is None else (PSEUDO_INVERSE, getattr(zero, field))
        drawn[field] = plots.svg(curves.over_evaluations(series, label, floor), f"{field}{number}")
    return drawn


def _strips(rows: Sequence[RestorationRow], kept: dict[Any, dict[str, Tensor]]) -> list[dict[str, str]]:
    """Return the strips of pictures: the truth, what was measured, and what each row made of it."""
    zero = next((kept[row.key] for row in rows if row.method == PSEUDO_INVERSE and row.key in kept), None)
    strips = list[tuple[str, str, str, Tensor]]()
    if zero is not None:
        truth = zero["truth"]
        strips += [("truth", "", "", truth), ("measured", "", "", _as_picture(zero["y"], truth))]
    for row in rows:
        if row.key in kept:
            some = kept[row.key]
            strips.append((row.method, row.sampler, f"{float(some['psnr'][: len(some['x'])].mean()):.1f} dB", some["x"]))
    return [
        {"name": name, "sampler": sampler, "figure": figure, "uri": plots.data_uri(plots.strip(x, len(x)), "image/png")}
        for name, sampler, figure, x in strips
    ]


def _as_picture(y: Tensor, truth: Tensor) -> Tensor:
    """Return what was measured, ``[B, C, h, w]``, as large as the pictures."""
    channels = y if y.shape[1] in (1, 3) else y[:, :1]
    return torch.nn.functional.interpolate(channels, size=truth.shape[-2:], mode="nearest")
