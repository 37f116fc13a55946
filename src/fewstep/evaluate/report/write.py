"""Write the rows of benchmarks for people: a page that works from the disk, a table for a spreadsheet, one for a README.

The findings are in `findings`, the drawings in `plots`, the contents of the page in `page`, and its looks in ``report.html.j2``.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.evaluate.report import plots
from fewstep.evaluate.report.findings import Format, ResultsFolder, RowGroup, grouped, pivot, read_folders
from fewstep.evaluate.report.page import group_view
from fewstep.evaluate.report.students import families, family_view
from fewstep.evaluate.report.template import check_packages, rendered
from fewstep.evaluate.report.verdict import JsonRow
from fewstep.runtime.artifact import check_writable, write_whole

__all__ = ["check_packages", "report_page", "to_csv", "to_markdown", "write_report"]

FIELDS = ("model", "run", "library", "solver", "grid", "nfe", "num", "guidance", "rmse", "rmse_ci")
FIELDS += ("error_median", "error_mean", "error_p95", "error_p99", "parted", "fd", "fd_ci", "fd_features", "kd", "kd_ci")
FIELDS += ("precision", "recall", "labels", "seconds", "solver_seconds", "peak_memory")
FIELDS += ("statistics", "artifact", "calls", "arithmetic", "planned", "levels", "outside", "failed")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # how a spreadsheet's formulas begin
INTERVALS = ("rmse_ci", "fd_ci", "kd_ci")


class _Report(NamedTuple):
    """The page, the two tables, and the plots by name, as SVG and PNG."""

    page: str
    csv: str
    markdown: str
    plots: dict[str, tuple[bytes, bytes]]


def _report(runs: Sequence[ResultsFolder], title: str | None) -> _Report:
    check_packages()
    groups = grouped(runs)
    views, drawn = [group_view(group, number) for number, group in enumerate(groups)], dict[str, tuple[bytes, bytes]]()
    students = [family_view(family, number) for number, family in enumerate(families(runs))]
    for view in [*views, *students]:
        for figure in view["figures"]:
            name = figure["name"] if len(groups) > 1 else figure["name"].split(".")[1]
            drawn[name] = plots.svg_file(figure["svg"]), figure["png"]
    table = to_csv({"rows": [row for group in groups for row in _merged(group, several=len(runs) > 1)]})
    names = list(dict.fromkeys(group.runs[-1].model for group in groups))
    files_within = [("results.csv", plots.data_uri(table.encode(), "text/csv"))]
    for run in runs:
        name = "results.json" if len(runs) == 1 else f"{run.name.replace('/', '-')}.json"
        files_within.append((name, plots.data_uri(json.dumps(run.results, indent=1).encode(), "application/json")))
    page = rendered("report.html.j2", {"title": title, "names": names, "groups": views, "families": students, "files": files_within})
    return _Report(page, table, "\n".join(_markdown(group) for group in groups), drawn)


def report_page(run: ResultsFolder, *, title: str | None = None) -> str:
    """Return the page of one benchmark as HTML, complete in itself.

    Raises:
        FewstepError: matplotlib or jinja2 is missing.
        ArtifactError: a file of samples is damaged.
    """
    return _report([run], title).page


def write_report(folders: Sequence[Path], out: Path, *, title: str | None = None) -> Path:
    """Write ``report.html``, ``results.csv``, ``results.md`` and ``plots/`` into ``out``, from the ``results.json`` of benchmarks.

    Runs of the same model, weights and guidance scale are merged: of a row in several of them the last is shown, and compared with
    that of the first. Students are set beside the samplers of their teacher, where its runs are among these.

    Args:
        folders: as ``fewstep bench`` made them; earlier runs first.

    Returns:
        The path of the page.

    Raises:
        FewstepError: matplotlib or jinja2 is missing.
        ArtifactError: a folder holds no rows, a file in it is damaged, or ``out`` cannot be written.
    """
    check_packages()
    check_writable(out)
    made = _report(read_folders(folders), title)
    for name, (svg, png) in made.plots.items():
        write_whole(out / "plots" / f"{name}.svg", svg)
        write_whole(out / "plots" / f"{name}.png", png)
    write_whole(out / "results.csv", made.csv.encode())
    write_whole(out / "results.md", made.markdown.encode())
    write_whole(out / "report.html", made.page.encode())
    return out / "report.html"


def _merged(group: RowGroup, *, several: bool) -> list[dict[str, Any]]:
    return [
        {**({"model": group.homes[key].model, "run": group.homes[key].name} if several else {}), **row} for key, row in group.rows.items()
    ]


# -- tables as text ---------------------------------------------------------------------------------------------------


def to_csv(results: Mapping[str, Any]) -> str:
    """Return the rows of a ``results.json`` for a spreadsheet, numbers as exact as there; an interval is two columns."""
    rows: list[JsonRow] = results["rows"]
    known = dict.fromkeys(name for row in rows for name in row)
    names = [*(name for name in FIELDS if name in known), *(name for name in known if name not in FIELDS)]
    flat = [_flat(row) for row in rows]
    columns = [column for name in names for column in ((f"{name}_low", f"{name}_high") if name in INTERVALS else (name,))]
    made = io.StringIO()
    table = csv.DictWriter(made, columns, lineterminator="\n")
    table.writerow({name: _cell(name) for name in columns})
    table.writerows(flat)
    return made.getvalue()


def _flat(row: JsonRow) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name in INTERVALS:
            flat[f"{name}_low"], flat[f"{name}_high"] = value if value is not None else (None, None)
        elif isinstance(value, list):
            flat[name] = " ".join("" if one is None else repr(one) for one in value)
        else:
            flat[name] = value
    return {name: repr(value) if isinstance(value, float) else _cell(value) for name, value in flat.items()}


def _cell(value: Any) -> Any:  # noqa: ANN401 - of JSON
    """Return a value for a spreadsheet, which would take a word that begins like a formula for one."""
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ")  # which Python's writer does not quote
    return f"'{text}" if value.startswith(FORMULA) else text


def to_markdown(results: Mapping[str, Any]) -> str:
    """Return a table for a README: one line per sampler, each cell on the best of its grids, the best of a column in bold."""
    return _markdown(RowGroup([ResultsFolder.of(results)]))


def _markdown(group: RowGroup) -> str:
    form, rows = Format(group.rows.values()), list(group.rows.values())
    noises = {row.get("num") for row in rows} - {None}
    features = next((row["fd_features"] for row in rows if row.get("fd_features")), None)
    distance = "" if features is None else f" (Frechet distance to the data in the features {_code(features)})"
    count = f", {noises.pop()} noises" if len(noises) == 1 else ""
    head = f"{_code(group.runs[-1].model)}, guidance {group.runs[-1].guidance:g}{count}. RMSE to the end of the exact trajectory"
    counts = sorted({row["nfe"] for row in rows})
    lines = [f"{head}{distance} by network evaluations, each sampler on its best grid; the best of a column in bold.", ""]
    lines += ["| sampler | " + " | ".join(map(str, counts)) + " |", "|---|" + "---|" * len(counts)]
    for line in pivot(group, form, counts):
        cells = [_markdown_cell(cell) for cell in line["cells"]]
        lines.append(f"| {_code(line['name'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _markdown_cell(cell: Mapping[str, Any]) -> str:
    if cell["error"] is None:
        return "failed" if cell["failed"] else ""
    error = f"**{cell['error'].shown}**" if cell["best"] else cell["error"].shown
    distance = "" if cell["fd"] is None else f" ({cell['fd'].shown})"
    return f"{error}{distance} {_code(cell['grid'])}"


def _code(text: str) -> str:
    """Set a name as code so that Markdown shows it whatever it holds: by character references where it has marks of Markdown's tables."""
    inner = re.sub(r"\s+", " ", text).strip()
    if inner and not set(inner) & set("`|\\"):
        return f"`{inner}`"
    return f"<code>{''.join(one if one.isalnum() or one == ' ' else f'&#{ord(one)};' for one in inner)}</code>"
