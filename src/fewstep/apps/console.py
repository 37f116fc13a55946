"""What the terminal shows: progress with rate and time left, and tables. Results go to stdout, progress to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["bench_table", "console", "distill_table", "finetune_table", "optimize_table", "print_json", "progress"]

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)

Report = Callable[..., None]


@contextmanager
def progress(title: str, total: int) -> Iterator[Report]:
    """A bar on stderr; ``report(done, note)`` moves it. Where stderr is no terminal, a line every 30 seconds instead."""
    if not sys.stderr.isatty():
        yield _lines(title, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda done, note="": bar.update(task, completed=done, note=note)


def _lines(title: str, total: int) -> Report:
    last = time.monotonic()
    begin: tuple[int, float] | None = None  # a resumed run does not start at 0

    def report(done: int, note: str = "") -> None:
        nonlocal last, begin
        now = time.monotonic()
        begin = (done, now) if begin is None or done == 0 else begin  # what comes before the first item tells nothing of the others
        if now - last < 30 and done < total:
            return
        last = now
        left = f" ({(now - begin[1]) * (total - done) / (done - begin[0]):.0f} s left)" if done > begin[0] else ""
        print(f"{title}: {done}/{total} {note}{left}", file=sys.stderr, flush=True)  # noqa: T201

    return report


def print_json(value: Any) -> None:  # noqa: ANN401
    """For machines."""
    print(json.dumps(value, indent=1, default=str))  # noqa: T201


def bench_table(results: dict[str, Any]) -> None:
    """RMSE to the reference trajectory and Frechet distance per solver and grid, columns evaluations, best RMSE of a column starred."""
    rows, reference = results["rows"], results["reference"]
    columns = sorted({row["nfe"] for row in rows})
    best = {n: min((row["rmse"] for row in rows if row["nfe"] == n and row["rmse"] is not None), default=None) for n in columns}
    title = f"{results['model']}, guidance {rows[0]['guidance']:g}, {rows[0]['num']} noises: RMSE (Frechet distance) by network evaluations"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for heading in ("solver", "grid"):
        table.add_column(heading, no_wrap=True)
    for n in columns:
        table.add_column(str(n), justify="right", no_wrap=True)
    cells = {(row["library"], row["grid"], row["solver"], row["nfe"]): row for row in rows}
    order = [list(dict.fromkeys(key[part] for key in cells)) for part in range(3)]
    lines = sorted({key[:3] for key in cells}, key=lambda line: [order[part].index(line[part]) for part in range(3)])
    for library, grid, solver in lines:
        name = solver if library == "fewstep" else f"{solver} ({library})"
        table.add_row(name, grid, *(_cell(cells.get((library, grid, solver, n)), best[n]) for n in columns))
    console.print(table)
    fd = ""
    if reference["fd"] is not None:
        fd = f"; its Frechet distance {reference['fd']:.2f}, that of two halves of the data {reference['fd_data_halves']:.2f}"
    console.print(f"* best. Reference: {reference['solver']} with {reference['nfe']} evaluations, own error {reference['error']:.1e}{fd}")
    for nfe, work in {row["nfe"]: row["arithmetic"] for row in rows if row.get("arithmetic") is not None}.items():
        passes = "1 pass" if nfe == 1 else f"{nfe} passes"
        console.print(f"{passes} of {results['model']}: the arithmetic of {work:.2f} evaluations of its network")
    for row in rows:
        if row.get("failed") is not None:
            console.print(f"failed: {row['solver']} ({row['library']}) on {row['grid']} with {row['nfe']}: {row['failed']}")
    for why in dict.fromkeys(skipped["why"] for skipped in results["skipped"]):
        console.print(f"no row: {why}")


def optimize_table(done: dict[str, Any]) -> None:
    """Errors on held-out noises of each optimised schedule beside the best standard grid, and where it came from."""
    title = f"{done['model']}: mean error on held-out noises (RMSE)"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for heading in ("solver", "evaluations", "optimized", "best standard grid", "ratio", "from"):
        table.add_column(heading, no_wrap=heading != "from", justify="left" if heading in ("solver", "from") else "right")
    for row in done["rows"]:
        (ours, theirs), (our_rmse, their_rmse) = row["error"], row["rmse"]
        standard = f"{theirs:.4f} ({their_rmse:.4f}) {row['best_standard_grid']}"
        table.add_row(row["solver"], str(row["nfe"]), f"{ours:.4f} ({our_rmse:.4f})", standard, f"{ours / theirs:.2f}", row["chosen"])
    console.print(table)


def fit_table(done: dict[str, Any]) -> None:
    """Errors on held-out noises of each fitted sampler beside the best hand-made one, where it came from and what it cost."""
    title = f"{done['model']}: mean error on held-out noises (RMSE)"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for heading in ("evaluations", "fitted", "best hand-made sampler", "ratio", "network evaluations", "from"):
        table.add_column(heading, no_wrap=heading != "from", justify="left" if heading == "from" else "right")
    for row in done["rows"]:
        (ours, theirs), (our_rmse, their_rmse) = row["error"], row["rmse"]
        rival = f"{theirs:.4f} ({their_rmse:.4f}) {row['best_hand_made']}"
        cost = f"{row['network_evaluations']:,}"
        table.add_row(str(row["nfe"]), f"{ours:.4f} ({our_rmse:.4f})", rival, f"{ours / theirs:.2f}", cost, row["chosen"])
    console.print(table)
    console.print(f"{done['seconds']:.0f} seconds; trajectories are kept, other numbers of evaluations begin with them")


def distill_table(done: dict[str, Any]) -> None:
    """What the student reaches by the number of passes, and what they cost."""
    title = f"{done['model']} distilled, on trajectories held out"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for heading in ("passes", "arithmetic (evaluations)", "RMSE to the teacher", "times"):
        table.add_column(heading, no_wrap=heading != "times", justify="left" if heading == "times" else "right")
    for n, (times, error) in done["passes"].items():
        table.add_row(str(n), f"{done['arithmetic'][n]:.2f}", f"{error:.4f}", ", ".join(f"{t:.4g}" for t in times))
    console.print(table)
    console.print(
        f"error in each slot of one pass: {', '.join(f'{error:.4f}' for error in done['slots'])}; {done['seconds']:.0f} s of training"
    )


def finetune_table(done: dict[str, Any]) -> None:
    """The bound and the error round by round."""
    table = Table(title=f"{done['model']} tuned for {done['nfe']} evaluations", box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for heading in ("round", "noise levels", "bound before", "after training", "best schedule then", "RMSE to the teacher", "seconds"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "noise levels" else "right")
    for row in done["history"]:
        levels = ", ".join(f"{level:.3g}" for level in row["noise_levels"])
        bounds = (f"{row[key]:.4f}" for key in ("bound_before", "bound_trained", "bound", "rmse"))
        table.add_row(str(row["number"]), levels, *bounds, f"{row['seconds']:.0f}")
    console.print(table)


def _cell(row: dict[str, Any] | None, best: float | None) -> str:
    if row is None:
        return "-"
    if row["rmse"] is None:
        return "failed"
    distance = "" if row["fd"] is None else f" ({row['fd']:.2f})"
    return f"{row['rmse']:.4f}{'*' if row['rmse'] == best else ' '}{distance}"
