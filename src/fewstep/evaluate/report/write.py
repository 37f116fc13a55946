"""The rows of benchmarks for people: one page that works from the disk, a table for a spreadsheet, one for a README.

What the rows say is in `findings`, what is drawn in `plots`, what the page shows in `page`, and how in
``report.html.j2``.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fewstep.evaluate.report import plots
from fewstep.evaluate.report.findings import Format, Name, Number, Problem, Run, pivot, problems_of, read_runs
from fewstep.evaluate.report.page import problem_view
from fewstep.evaluate.report.verdict import Row
from fewstep.runtime.artifact import check_writable, write_whole
from fewstep.runtime.errors import FewstepError

__all__ = ["check_packages", "to_csv", "to_markdown", "write_report"]

FIELDS = ("model", "run", "library", "solver", "grid", "nfe", "num", "guidance", "rmse", "rmse_ci", "error_median", "error_p95", "fd")
FIELDS += ("fd_ci", "fd_features", "kd", "kd_ci", "precision", "recall", "labels", "seconds", "solver_seconds", "peak_memory")
FIELDS += ("statistics", "artifact", "arithmetic", "planned", "levels", "failed")
INTERVALS = ("rmse_ci", "fd_ci", "kd_ci")


def check_packages() -> None:
    """See that reports can be made, before long work whose result one should be.

    Raises:
        FewstepError: matplotlib or jinja2 is missing.
    """
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise FewstepError(f"a report needs {' and '.join(missing)}: pip install 'fewstep[report]'")


def write_report(folders: Sequence[Path], out: Path, *, title: str | None = None) -> Path:
    """Write ``report.html``, ``results.csv``, ``results.md`` and ``plots/`` into ``out``, from the ``results.json`` of benchmarks.

    Runs of the same model, weights and guidance scale are merged: of a row in several of them the last is shown, and compared with
    that of the first.

    Args:
        folders: as ``fewstep bench`` made them; earlier runs first.

    Returns:
        The page.

    Raises:
        FewstepError: matplotlib or jinja2 is missing.
        ArtifactError: a folder holds no rows, a file in it is damaged, or ``out`` cannot be written.
    """
    check_packages()
    check_writable(out)
    runs = read_runs(folders)
    problems = problems_of(runs)
    views = [problem_view(problem, number) for number, problem in enumerate(problems)]
    for view in views:
        for figure in view.pop("figures"):
            name = figure["name"] if len(problems) > 1 else figure["name"].split(".")[1]
            write_whole(out / "plots" / f"{name}.svg", plots.svg_file(figure["svg"]))
            write_whole(out / "plots" / f"{name}.png", figure["png"])
    merged = {"rows": [row for problem in problems for row in _merged(problem, several=len(runs) > 1)]}
    write_whole(out / "results.csv", to_csv(merged).encode())
    write_whole(out / "results.md", "\n".join(_markdown(problem) for problem in problems).encode())
    names = list(dict.fromkeys(problem.runs[-1].problem[0] for problem in problems))
    files_within = [("results.csv", plots.data_uri(to_csv(merged).encode(), "text/csv"))]
    for run in runs:
        name = "results.json" if len(runs) == 1 else f"{run.name.replace('/', '-')}.json"
        files_within.append((name, plots.data_uri(json.dumps(run.results, indent=1).encode(), "application/json")))
    page = _render({"title": title, "names": names, "problems": views, "files": files_within, "light": plots.LIGHT, "dark": plots.DARK})
    write_whole(out / "report.html", page.encode())
    return out / "report.html"


def _merged(problem: Problem, *, several: bool) -> list[dict[str, Any]]:
    return [
        {**({"model": problem.homes[key].problem[0], "run": problem.homes[key].name} if several else {}), **row}
        for key, row in problem.rows.items()
    ]


def _render(page: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.tests |= {"number": lambda value: isinstance(value, Number), "name": lambda value: isinstance(value, Name)}
    text = (files("fewstep.evaluate.report") / "report.html.j2").read_text(encoding="utf-8")
    return made.from_string(text).render(page)


# -- tables as text ---------------------------------------------------------------------------------------------------


def to_csv(results: Mapping[str, Any]) -> str:
    """The rows of a ``results.json`` for a spreadsheet, numbers as exact as there; an interval is two columns."""
    rows: list[Row] = results["rows"]
    known = dict.fromkeys(name for row in rows for name in row)
    names = [*(name for name in FIELDS if name in known), *(name for name in known if name not in FIELDS)]
    flat = [_flat(row) for row in rows]
    columns = [column for name in names for column in ((f"{name}_low", f"{name}_high") if name in INTERVALS else (name,))]
    made = io.StringIO()
    table = csv.DictWriter(made, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
    return made.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name in INTERVALS:
            flat[f"{name}_low"], flat[f"{name}_high"] = value if value is not None else (None, None)
        elif isinstance(value, list):
            flat[name] = " ".join("" if one is None else repr(one) for one in value)
        else:
            flat[name] = value
    return {name: repr(value) if isinstance(value, float) else value for name, value in flat.items()}


def to_markdown(results: Mapping[str, Any]) -> str:
    """A table for a README: one line a sampler, each cell on the best of its grids, the best of a column in bold."""
    return _markdown(Problem([Run(Path(), "", results)]))


def _markdown(problem: Problem) -> str:
    form, rows = Format(problem.rows.values()), list(problem.rows.values())
    noises = {row.get("num") for row in rows} - {None}
    features = next((row["fd_features"] for row in rows if row.get("fd_features")), None)
    distance = "" if features is None else f" (Frechet distance to the data in the features {_code(features)})"
    count = f", {noises.pop()} noises" if len(noises) == 1 else ""
    head = f"{_code(problem.runs[-1].problem[0])}, guidance {problem.runs[-1].problem[2]:g}{count}. RMSE to the end of the exact trajectory"
    counts = sorted({row["nfe"] for row in rows})
    lines = [f"{head}{distance} by network evaluations, each sampler on its best grid; the best of a column in bold.", ""]
    lines += ["| sampler | " + " | ".join(map(str, counts)) + " |", "|---|" + "---|" * len(counts)]
    for line in pivot(problem, form, counts):
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
    """A name as Markdown shows it whatever it holds."""
    fence = "``" if "`" in text else "`"
    inner = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return f"{fence} {inner} {fence}" if fence == "``" else f"{fence}{inner}{fence}"
