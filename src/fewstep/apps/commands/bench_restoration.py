"""``fewstep bench --task``: compare ways to restore pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.apps.console import console, print_json, progress, show_table
from fewstep.apps.models import open_model
from fewstep.evaluate.report.restoration_page import write_restorations
from fewstep.evaluate.restoration.plan import RestorationBenchConfig, restoration_cost
from fewstep.evaluate.restoration.rows import RestorationRow, as_json, by_task
from fewstep.evaluate.restoration.run import RestorationBench
from fewstep.models.problem import Problem
from fewstep.runtime.process import default_device

__all__ = ["bench_tasks"]

HEADINGS = ("method", "nfe", "back", "PSNR", "difference", "SSIM", "features", "misfit", "mean", "coverage")


def bench_tasks(model: str, typed: Mapping[str, Any], out: Path, command: str, *, report: bool, trust: bool, json: bool) -> None:
    """Run a benchmark of restorations as it was typed, and show its rows.

    Args:
        model: as typed.
        typed: fields of `RestorationBenchConfig`; one that is None was not typed.
        out: the folder.
        command: the command line.
        report: whether to write the page.
        trust: see `open_model`.
        json: whether to print the results for machines.

    Raises:
        FewstepError: as `RestorationBench`; nothing is written then.
    """
    config = RestorationBenchConfig(**{name: value for name, value in typed.items() if value is not None})
    opened = open_model(model, trust=trust)
    bench = RestorationBench.of(Problem(opened, 1.0, default_device()), config)
    evaluations, products = restoration_cost(bench.entries, config)
    if not json:
        passes = f" and {products:,} backward passes" if products else ""
        pictures = f"{config.num} pictures"
        if config.several and config.samples > 1:
            pictures += f", {config.samples} samples of {config.several} of them"
        console.print(f"{opened.name}: {len(bench.entries)} rows, {pictures}: at most {evaluations:,} network evaluations{passes}")
        for one in bench.left_out:
            console.print(f"left out: {one}")
    with progress(f"restoring pictures with {opened.name}", evaluations) as on_progress:
        results = bench.run(out, command=command, on_progress=on_progress)
    page = write_restorations(results, out) if report else None
    if json:
        print_json(as_json(results))
        return
    for task, rows in by_task(results.rows).items():
        first = next((f"{row.method} {row.sampler}" for row in rows if row.gain == 0 and row.solver), "")
        title = f"{task}: PSNR in dB" + (f", difference to {first}" if first else "")
        show_table(title, HEADINGS, [_cells(row) for row in rows if row.failed is None], left=("method",))
        for row in rows:
            if row.failed is not None:
                console.print(f"{row.method} {row.solver} {row.planned} failed: {row.failed}")
    console.print(f"rows: {out / 'results.json'}")
    console.print("report: the same command with --report" if page is None else f"report: {page}")


def _cells(row: RestorationRow) -> list[str]:
    """Return a row as the console's table shows it."""

    def shown(value: float | None, pattern: str, error: float | None = None) -> str:
        if value is None:
            return ""
        return pattern.format(value) + (f" ± {error:.2f}" if error else "")

    counts = [f"{row.nfe:.0f}" if row.nfe else "", str(row.products or "")]
    errors = [shown(row.psnr, "{:.2f}", row.psnr_error), shown(row.gain, "{:+.2f}", row.gain_error)]
    sharp = [shown(row.ssim, "{:.3f}"), shown(row.features, "{:.3f}"), shown(row.misfit, "{:.2f}")]
    honest = [shown(row.mean, "{:.2f}"), shown(row.coverage, "{:.0%}")]
    return [f"{row.method} {row.solver}".rstrip(), *counts, *errors, *sharp, *honest]
