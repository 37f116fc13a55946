"""The `Comparison`: the rows of a benchmark, ready to be read, shown in a notebook and written as a page."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from fewstep.evaluate.report.findings import ResultsFolder
from fewstep.evaluate.report.table import html_table, plain_table
from fewstep.evaluate.report.write import report_page, to_csv
from fewstep.evaluate.rows import Row
from fewstep.runtime.artifact import named_path, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError

__all__ = ["Comparison", "TemporaryFolder"]


class TemporaryFolder:
    """A folder that is removed with the object that owns it, at the latest when the program ends.

    Attributes:
        path: where it is.
    """

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="fewstep-"))
        self.remove = weakref.finalize(self, rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Samplers compared on one model. ``print`` shows a table, and so does a notebook.

    Attributes:
        results: everything that is known, as ``results.json`` holds it (docs/benchmarks.md has the fields).
        folder: where samples and errors are stored.
        temporary: the owner of the folder, where no other was named.
    """

    results: Mapping[str, Any]
    folder: Path
    temporary: TemporaryFolder | None = None

    @cached_property
    def rows(self) -> list[Row]:
        """One row for each sampler, grid and number of evaluations, also for those that failed."""
        return [Row(**row) for row in self.results["rows"]]

    def best(self, nfe: int) -> Row:
        """Return the row with the least error with so many network evaluations.

        Raises:
            FewstepError: no sampler made so many without failing (and how many were made).
        """
        good = [row for row in self.rows if row.rmse is not None]
        rows = [row for row in good if row.nfe == nfe]
        if not rows:
            known = ", ".join(map(str, sorted({row.nfe for row in good}))) or "none"
            raise FewstepError(f"no sampler here made {nfe} evaluations; there are rows with: {known}")
        return min(rows, key=lambda row: row.rmse or 0.0)

    def __str__(self) -> str:
        return plain_table(self.results)

    def __repr__(self) -> str:
        counts = sorted({row.nfe for row in self.rows})
        failed = sum(row.rmse is None for row in self.rows)
        rows = f"{len(self.rows)} row{'' if len(self.rows) == 1 else 's'}" + (f", {failed} failed" if failed else "")
        return f"Comparison({self.results['model']}, {rows}, evaluations {', '.join(map(str, counts))})"

    def _repr_html_(self) -> str:
        return html_table(self._run)

    @property
    def _run(self) -> ResultsFolder:
        return ResultsFolder.of(self.results, self.folder)

    def to_html(self, path: str | Path, *, title: str | None = None) -> Path:
        """Write the whole report as one page that needs nothing but itself: findings, plots, pictures, all rows. Return its path.

        Raises:
            FewstepError: matplotlib or jinja2 is missing.
            ArtifactError: the page cannot be written, or a file of samples is damaged.
        """
        return _written(path, report_page(self._run, title=title), "report.html")

    def to_csv(self, path: str | Path) -> Path:
        """Write the rows for a spreadsheet, numbers as exact as in `results`. Return the path.

        Raises:
            ArtifactError: the file cannot be written.
        """
        return _written(path, to_csv(self.results), "results.csv")


def _written(path: str | Path, text: str, name: str) -> Path:
    path = named_path(path)
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder: name a file in it, as {path / name}")
    write_whole(path, text.encode())
    return path
