"""Show progress with rate and time left, tables, and what to type next. Results go to stdout, progress to stderr."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = [
    "NO_PLOTS",
    "Watch",
    "aside",
    "console",
    "duration",
    "next_command",
    "pipeline_line",
    "print_json",
    "progress",
    "show_table",
    "watched",
]

NO_PLOTS = "none: pip install 'fewstep[report]'"

console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)

Report = Callable[..., None]
Watch = Callable[[str, int, int, str], None]  # a title, the units done and in all, a note

_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)
_bar: ContextVar[Progress | None] = ContextVar("bar", default=None)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Hand the progress of what runs inside to a function, in place of the bar."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


@contextmanager
def progress(title: str, total: int) -> Iterator[Report]:
    """Show a bar on stderr; ``report(done, note)`` moves it. Where stderr is no terminal, print a line every 30 seconds instead."""
    if (watch := _watch.get()) is not None:
        watch(title, 0, total, "")
        yield lambda done, note="": watch(title, done, total, note)
        return
    if not sys.stderr.isatty():
        yield _lines(title, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, note="")
        token = _bar.set(bar)
        try:
            yield lambda done, note="": bar.update(task, completed=done, note=note)
        finally:
            _bar.reset(token)


@contextmanager
def aside() -> Iterator[None]:
    """Take the bar off the terminal for what is printed inside, which would begin in the bar's line."""
    if (bar := _bar.get()) is None:
        yield
        return
    bar.live.transient = True
    bar.stop()
    try:
        yield
    finally:
        bar.live.transient = False
        bar.start()


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


def duration(seconds: float) -> str:
    """Return a duration in words, in the unit that fits it."""
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 2 else f"{seconds:.1f} seconds"


def print_json(value: Any) -> None:  # noqa: ANN401
    """Print a result for machines."""
    print(json.dumps(value, indent=1, default=str))  # noqa: T201


def next_command(*words: object, begin: str = "next") -> str:
    """Return the line that shows a command to type, as ``next: fewstep bench digits-edm``."""
    return f"{begin + ':':5} {shlex.join(['fewstep', *map(str, words)])}"


def pipeline_line(method: str, folder: object) -> str:
    """Return the line of Python that comes next where the model is a pipeline's: its scheduler, with samplers or with statistics."""
    given = f'"{folder}", pipe.scheduler.config'
    if method == "from_config":
        given = f'pipe.scheduler.config, solver="dpm-solver-v3", statistics="{folder}"'
    return f"next: pipe.scheduler = fewstep.integrations.diffusers.FewstepScheduler.{method}({given})"


def show_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()) -> None:
    """Print a table; columns are aligned to the right but for those in ``left``, of which the last one may wrap."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for heading in headings:
        table.add_column(heading, no_wrap=heading not in left[-1:], justify="left" if heading in left else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
