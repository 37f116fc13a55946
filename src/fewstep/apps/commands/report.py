"""``fewstep report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.apps.console import console, print_json
from fewstep.apps.options import AsJson
from fewstep.evaluate.report.write import write_report
from fewstep.runtime.job import Job

__all__ = ["report"]


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of fewstep bench; earlier runs first.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for report.html, results.csv, results.md and plots/.")],
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    json: AsJson = False,
) -> None:
    """Show benchmarks as one page.

    A row that is in several runs is compared, and marked if it got worse. Students are set beside their teacher, where both are there.
    """
    with Job.open("report", out, alone=True):
        page = write_report(folders, out, title=title)
    print_json({"report": str(page)}) if json else console.print(f"report: {page}\nnext: open it in a browser; it needs no network")
