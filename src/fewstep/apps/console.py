"""What the terminal shows: progress with rate and time left, and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["progress"]


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr; ``report(done, loss)`` moves it. Where stderr is no terminal, a line every 30 seconds instead."""
    if not sys.stderr.isatty():
        yield _lines(title, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, note="")

        def report(done: int, loss: float | None = None) -> None:
            bar.update(task, completed=done, note="" if loss is None else f"loss {loss:.4f}")

        yield report


def _lines(title: str, total: int) -> Callable[..., None]:
    last = time.monotonic()
    begin: tuple[int, float] | None = None  # a resumed run does not start at 0

    def report(done: int, loss: float | None = None) -> None:
        nonlocal last, begin
        now = time.monotonic()
        begin = begin or (done, now)
        if now - last < 30 and done < total:
            return
        last = now
        note = "" if loss is None else f", loss {loss:.4f}"
        left = (now - begin[1]) * (total - done) / max(1, done - begin[0])
        print(f"{title}: {done}/{total}{note}, {left:.0f} s left", file=sys.stderr, flush=True)  # noqa: T201

    return report
