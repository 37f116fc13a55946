"""Show the rows of a benchmark as one table: as plain text, and as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from fewstep.evaluate.report.findings import (
    Format,
    Number,
    ResultsFolder,
    RowGroup,
    interval_of,
    network_calls,
    sampler_of,
    tie_limit,
    timed_by,
    title_of,
)
from fewstep.evaluate.report.page import sample_strips
from fewstep.evaluate.report.verdict import JsonRow, has_error
from fewstep.evaluate.rows import REFERENCE, read_samples

__all__ = ["html_table", "plain_table"]

STRIPS = 4  # samplers whose samples a notebook shows


class _Cell(NamedTuple):
    """A sampler with a number of evaluations: its row, or None where there is none."""

    row: JsonRow | None
    best: bool


class _Table(NamedTuple):
    """One line per sampler and grid, one column per number of evaluations, and notes below."""

    title: str
    counts: list[int]
    lines: list[tuple[str, str, list[_Cell]]]  # sampler, grid, cells
    form: Format
    notes: list[str]


def _table(results: Mapping[str, Any]) -> _Table:
    rows: Sequence[JsonRow] = results["rows"]
    run = ResultsFolder.of(results)
    counts = sorted({row["nfe"] for row in rows})
    limits = {nfe: tie_limit(row["rmse"] for row in rows if row["nfe"] == nfe and has_error(row)) for nfe in counts}
    cells = {(row["library"], row["grid"], row["solver"], row["nfe"]): row for row in rows}
    order = [list(dict.fromkeys(key[part] for key in cells)) for part in range(3)]
    lines = []
    for library, grid, solver in sorted({key[:3] for key in cells}, key=lambda key: [order[part].index(key[part]) for part in range(3)]):
        found = [cells.get((library, grid, solver, nfe)) for nfe in counts]
        line = [_Cell(row, row is not None and has_error(row) and row["rmse"] <= limits[row["nfe"]]) for row in found]
        lines.append((title_of((library, solver)), grid, line))
    distance = " (Frechet distance to the data)" if run.features else ""
    noises = "" if run.noises[1] is None else f", {run.noises[1]} noises"
    title = f"{run.model}, guidance {run.guidance:g}{noises}: RMSE to the exact trajectory{distance} by network evaluations"
    form = Format(rows)
    return _Table(title, counts, lines, form, _notes(results, form))


def _notes(results: Mapping[str, Any], form: Format) -> list[str]:
    """Say what the reference is, what evaluations and a student's passes cost, and which samplers failed or were not run."""
    reference, rows, notes = results.get("reference") or {}, results["rows"], []
    if reference:
        own, distance = "", ""
        if reference.get("error") is not None:
            own = f", own error {reference['error']:.1e}"
        if (known := form("fd", reference.get("fd"))) is not None:
            distance = f"; its Frechet distance {known.shown}"
            halves = form("fd", reference.get("fd_data_halves"))
            distance += "" if halves is None else f", that of two halves of the data {halves.shown}"
        notes.append(f"reference: {reference['solver']} with {reference['nfe']} evaluations{own}{distance}")
    run = ResultsFolder.of(results)
    for calls in sorted({network_calls(row, student=run.student) / row["nfe"] for row in rows if has_error(row)} - {1.0}):
        guided = "" if run.guidance == 1 else f"at guidance {run.guidance:g} "
        notes.append(f"{guided}each evaluation is {calls:g} calls of the network")
    beyond = [row["outside"] for row in rows if row.get("outside") is not None]
    if beyond:
        most = f"{max(beyond):.2%} or less" if len(beyond) > 1 else f"{beyond[0]:.2%}"
        notes.append(f"of the samples' numbers {most} lay beyond the cube before the last fold")
    for nfe, work in {row["nfe"]: row["arithmetic"] for row in rows if row.get("arithmetic") is not None}.items():
        passes = "1 pass" if nfe == 1 else f"{nfe} passes"
        notes.append(f"{passes} of {results['model']}: the arithmetic of {work:.2f} evaluations of its network")
    notes += [] if (said := timed_by(rows)) is None else [f"times: {said}"]
    for row in rows:
        if not has_error(row):
            why = row.get("failed") or "its samples are not finite"
            notes.append(f"failed: {title_of(sampler_of(row))} on {row['grid']} with {row['nfe']}: {why}")
    notes += [f"no row: {why}" for why in dict.fromkeys(one["why"] for one in results.get("skipped", []))]
    return notes


# -- plain text ---------------------------------------------------------------------------------------------------------


def plain_table(results: Mapping[str, Any]) -> str:
    """Return what a ``results.json`` holds as a table in plain text; the best of a column has a star."""
    table = _table(results)
    texts = [["solver", "grid", *(f"{nfe} " for nfe in table.counts)]]
    texts += [[name, grid, *(_plain_cell(cell, table.form) for cell in cells)] for name, grid, cells in table.lines]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = [
        "  ".join(text.ljust(width) if k < 2 else text.rjust(width) for k, (text, width) in enumerate(zip(line, widths, strict=True)))
        for line in texts
    ]
    body = [lines[0], "-" * len(lines[0]), *lines[1:]] if table.lines else ["no rows"]
    starred = ["* best of its column"] if any(cell.best for *_, cells in table.lines for cell in cells) else []
    return "\n".join(line.rstrip() for line in [table.title, "", *body, "", *starred, *table.notes])


def _plain_cell(cell: _Cell, form: Format) -> str:
    if cell.row is None:
        return "- "
    error, distance = form("rmse", cell.row["rmse"]), form("fd", cell.row.get("fd"))
    if error is None or not has_error(cell.row):
        return "failed "
    return f"{error.shown}{'*' if cell.best else ' '}" + ("" if distance is None else f" ({distance.shown})")


# -- HTML ---------------------------------------------------------------------------------------------------------------


LEFT, RIGHT, MUTED = "text-align:left", "text-align:right;white-space:nowrap", "opacity:.65"
BEST = f"{RIGHT};font-weight:bold;background:rgba(0,158,115,.18)"


def html_table(run: ResultsFolder) -> str:
    """Return a benchmark as HTML for a notebook: the best of a column highlighted, intervals as tooltips, and pictures of the same seeds.

    Pictures are of the best samplers with the fewest evaluations, where samples are pictures and lie in the folder.
    """
    table = _table(run.results)
    heads = "".join(f'<th style="{RIGHT}">{nfe}</th>' for nfe in table.counts)
    made = [f"<div><p><b>{escape(table.title)}</b></p>"]
    made.append(f'<table><thead><tr><th style="{LEFT}">solver</th><th style="{LEFT}">grid</th>{heads}</tr></thead><tbody>')
    for name, grid, cells in table.lines:
        names = f'<td style="{LEFT}"><code>{escape(name)}</code></td><td style="{LEFT}"><code>{escape(grid)}</code></td>'
        made.append(f"<tr>{names}{''.join(_html_cell(cell, table.form) for cell in cells)}</tr>")
    made.append("</tbody></table>")
    made += _pictures(run)
    made += [f'<p style="{MUTED};margin:2px 0"><small>{escape(note)}</small></p>' for note in table.notes]
    return "\n".join([*made, "</div>"])


def _html_cell(cell: _Cell, form: Format) -> str:
    if cell.row is None:
        return f'<td style="{RIGHT};{MUTED}">-</td>'
    error = form("rmse", cell.row["rmse"])
    if error is None or not has_error(cell.row):
        why = escape(str(cell.row.get("failed") or "its samples are not finite"))
        return f'<td style="{RIGHT};{MUTED}" title="{why}">failed</td>'
    distance = form("fd", cell.row.get("fd"))
    below = "" if distance is None else f'<br><small style="{MUTED};font-weight:normal">{distance.shown}</small>'
    return f'<td style="{BEST if cell.best else RIGHT}" title="{escape(_tooltip(cell.row, form))}">{error.shown}{below}</td>'


SINGLE = (  # figures of the errors of single samples
    ("error_median", "median error"),
    ("error_mean", "mean error"),
    ("error_p95", "95th percentile"),
    ("error_p99", "99th percentile"),
    ("parted", "share above three medians"),
)


def _tooltip(row: JsonRow, form: Format) -> str:
    """Return the figures of a row that its cell does not show."""
    ends = interval_of(form, "rmse", row)
    facts = ["RMSE" if ends is None else f"RMSE 95 %: {_ends(ends)}"]
    for field, name in SINGLE:
        if (number := form(field, row.get(field))) is not None:
            facts.append(f"{name} {number.shown}")
    if (distance := form("fd", row.get("fd"))) is not None:
        ends = interval_of(form, "fd", row)
        facts.append(f"Frechet distance {distance.shown}" + ("" if ends is None else f", 95 %: {_ends(ends)}"))
    if (seconds := form("seconds", row.get("seconds"))) is not None:
        facts.append(f"{seconds.shown} s")
    return "; ".join(facts)


def _ends(ends: tuple[Number | None, Number | None]) -> str:
    return " to ".join("?" if end is None else end.shown for end in ends)


def _pictures(run: ResultsFolder) -> list[str]:
    """Return strips of the same seeds: the exact trajectories' ends and the best samplers with the fewest evaluations."""
    exact = run.folder / REFERENCE
    if not exact.is_file() or (x := read_samples(exact)).ndim != 4 or x.shape[1] not in (1, 3):
        return []
    group = RowGroup([run])
    made = []
    for shown in sample_strips(group, Format(group.rows.values()), counts=1, samplers=STRIPS):
        made.append(f"<p><small>the same seeds, evaluations: {shown['nfe'].shown}</small></p><table><tbody>")
        for strip in shown["strips"]:
            name, grid = escape(strip["name"]), escape(strip["grid"])
            image = f'<img src="{strip["uri"]}" alt="samples of {name}" style="image-rendering:pixelated;height:48px">'
            made.append(f'<tr><td style="{LEFT}"><code>{name}</code> <small>{grid}</small></td><td>{image}</td></tr>')
        made.append("</tbody></table>")
    return made
