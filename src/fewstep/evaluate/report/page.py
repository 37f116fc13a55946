"""Prepare one group of rows for the template of the page: numbers with how they are shown, plots, strips of samples."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.evaluate.report import plots
from fewstep.evaluate.report.findings import (
    Change,
    Format,
    Number,
    ResultsFolder,
    RowGroup,
    SamplerName,
    interval_of,
    pivot,
    reference_of,
    sampler_of,
    summary,
    timed_by,
    title_of,
)
from fewstep.evaluate.report.verdict import JsonRow, has_error, key_of
from fewstep.evaluate.rows import REFERENCE, has_errors, picture_file, read_errors, read_samples
from fewstep.models.carried import FITTED, OPTIMIZED
from fewstep.runtime.spec import as_typed

__all__ = ["group_view", "sample_strips"]

COLUMNS = {
    "rmse": "error",
    "error_median": "median",
    "error_mean": "mean",
    "error_p95": "95th percentile",
    "error_p99": "99th percentile",
    "parted": "parted",
    "fd": "Frechet",
    "kd": "kernel",
    "precision": "precision",
    "recall": "recall",
    "labels": "labels as requested",
    "outside": "outside before the fold",
    "calls": "calls",
    "arithmetic": "arithmetic",
    "seconds": "seconds",
    "solver_seconds": "without network",
    "peak_memory": "peak MB",
}
GROUPS, ROWS, ACROSS = 4, 6, 12  # of sample grids: numbers of evaluations, samplers, samples
PIXELS = 500_000  # of all sample grids together


def group_view(group: RowGroup, number: int) -> dict[str, Any]:
    """Return everything that the page shows of a group. ``figures`` are its plots by name, for files of their own."""
    rows = list(group.rows.values())
    form, name, guidance = Format(rows), group.runs[-1].model, group.runs[-1].guidance
    slug = re.sub(r"[^a-zA-Z0-9]+", "-", f"p{number}-{name}{f'-guidance-{guidance:g}' if guidance != 1 else ''}").strip("-")
    figures: list[dict[str, Any]] = []

    def keep(kind: str, figure: Any, caption: str) -> dict[str, Any]:  # noqa: ANN401 - a figure of matplotlib's
        figures.append({"name": f"{slug}.{kind}", "svg": plots.svg(figure, f"{slug}-{kind}"), "png": plots.png(figure), "caption": caption})
        return figures[-1]

    failed = [row for row in rows if not has_error(row)]
    skipped = {str(one["why"]): None for run in group.runs for one in run.results.get("skipped", [])}
    return {
        "id": slug,
        "name": name,
        "guidance": form("guidance", guidance),
        "noises": [Number(num, f"{num}") for num in dict.fromkeys(row["num"] for row in rows if row.get("num") is not None)],
        "summary": summary(group, form),
        "picks": [_pick(group, form, nfe) for nfe in group.counts],
        "precision": _work_precision(group, keep),
        "needs": _needs(group, form),
        "counts": group.counts if group.counts else [],
        "pivot_counts": sorted({row["nfe"] for row in rows}),
        "pivot": pivot(group, form, sorted({row["nfe"] for row in rows})),
        "samples": sample_strips(group, form),
        "histograms": _histograms(group, keep),
        "schedules": _schedules(group, keep),
        "changes": [_change(change, form) for change in _worst_first(group.changes)],
        "compared": len(group.changes),
        "details": _details(group, form),
        "failed": [{**_named(row), "nfe": _whole(row["nfe"]), "why": _why(row)} for row in failed],
        "skipped": list(skipped),
        "runs": _origins(group.runs),
        "again": _again(group),
        "figures": figures,
    }


def _whole(value: int) -> Number:
    return Number(value, f"{value}")


def _named(row: JsonRow) -> dict[str, str]:
    return {"name": title_of(sampler_of(row)), "grid": row["grid"]}


def _why(row: JsonRow) -> str:
    return str(row["failed"]) if row.get("failed") is not None else "its samples are not finite"


def _pick(group: RowGroup, form: Format, nfe: int) -> dict[str, Any]:
    """Recommend a sampler at one number of evaluations: the best, the best without preparation, and the first to equal it."""
    won, first = group.winners(nfe), group.first_equal(nfe)
    least = next(iter(group.plain(nfe)), None)
    return {
        "nfe": _whole(nfe),
        "best": [_picked(row, form) for row in won],
        "none": "not tried" if least is None else "the same",
        "plain": None if least is None or key_of(least) in map(key_of, won) else _picked(least, form),
        "first": None if first is None else {**_named(first), "nfe": _whole(first["nfe"])},
    }


def _picked(row: JsonRow, form: Format) -> dict[str, Any]:
    return {**_named(row), "error": form("rmse", row["rmse"]), "interval": interval_of(form, "rmse", row)}


def _needs(group: RowGroup, form: Format) -> dict[str, Any]:
    """Tabulate the evaluations that each sampler needs to be as good as the best at each number."""
    goals = [(nfe, group.winners(nfe)) for nfe in group.counts]
    heads = [{"nfe": _whole(nfe), **_picked(won[0], form), "more": len(won) > 1} for nfe, won in goals]
    lines, never = [], []
    for sampler in group.samplers:
        needs = [group.needs(sampler, won[0]) for _, won in goals]
        cells = [{"nfe": _whole(need.nfe), "more": need.more, "best": need.best} for need in needs]
        if all(need.more for need in needs):
            never.append(title_of(sampler))
        else:
            lines.append({"name": title_of(sampler), "cells": cells})
    return {"heads": heads, "lines": lines, "never": never, "samplers": len(lines) + len(never)}


def _worst_first(changes: Sequence[Change]) -> list[Change]:
    order = ("worse", "better")
    return sorted((change for change in changes if change.verdict in order), key=lambda change: order.index(change.verdict))


def _change(change: Change, form: Format) -> dict[str, Any]:
    before, after = (form("rmse", row["rmse"]) if has_error(row) else None for row in change[:2])
    ratio = (
        None
        if before is None or after is None or not before.value
        else Number((after.value, before.value), f"{after.value / before.value:.2f}", "ratio")
    )
    shown = {"before": before, "after": after, "ratio": ratio, "runs": change.runs, "verdict": change.verdict}
    return {**_named(change.after), "nfe": _whole(change.after["nfe"]), **shown}


def _details(group: RowGroup, form: Format) -> dict[str, Any]:
    """Tabulate all rows with all their figures."""
    rows = sorted(group.good, key=lambda row: (row["nfe"], row["rmse"]))
    rows += [row for row in group.rows.values() if not has_error(row)]
    fields = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = [
        {
            **_named(row),
            "nfe": _whole(row["nfe"]),
            "failed": not has_error(row),
            "cells": [(form(name, row.get(name)) if has_error(row) else None, interval_of(form, name, row)) for name in fields],
        }
        for row in rows
    ]
    return {"heads": [COLUMNS[name] for name in fields], "lines": lines, "several": len(group.runs) > 1}


# -- pictures ---------------------------------------------------------------------------------------------------------

Keep = Callable[[str, Any, str], dict[str, Any]]


def _alike(group: RowGroup) -> dict[SamplerName, str]:
    """Name the samplers to draw, best first; samplers whose errors cannot be told apart in a plot are one line."""
    groups: list[list[SamplerName]] = []
    errors = {sampler: {nfe: row["rmse"] for (other, nfe), row in group.lowest.items() if other == sampler} for sampler in group.samplers}
    for sampler, mine in errors.items():
        same = (group for group in groups if _close(mine, errors[group[0]]))
        found = next(same, None)
        groups.append([sampler]) if found is None else found.append(sampler)
    names = {}
    for first, *others in groups:
        same = f" (+ {others[0][0]})" if others and others[0][1] == first[1] else f" = {title_of(others[0])}" if others else ""
        names[first] = title_of(first) + same
    return names


def _close(mine: dict[int, float], theirs: dict[int, float]) -> bool:
    return set(mine) == set(theirs) and all(abs(mine[nfe] - theirs[nfe]) <= 1e-3 * theirs[nfe] for nfe in mine)


def _points(group: RowGroup, measure: str) -> dict[str, list[plots.Point]]:
    """Return the least of a measure over the grids of each sampler, by evaluations; best first."""
    series: dict[str, list[plots.Point]] = {}
    for sampler, name in _alike(group).items():
        found: dict[int, JsonRow] = {}
        for row in group.good:
            value = row.get(measure) if sampler_of(row) == sampler else None
            if value is not None and value > 0 and (row["nfe"] not in found or value < found[row["nfe"]][measure]):
                found[row["nfe"]] = row
        if found:
            series[name] = [plots.point_of(found[nfe], measure, nfe) for nfe in sorted(found)]
    return series


def _work_precision(group: RowGroup, keep: Keep) -> list[dict[str, Any]]:
    made = []
    errors, distances = _points(group, "rmse"), _points(group, "fd")
    if errors:
        made.append(keep("error", plots.work_precision(errors), "Error: distance to the end of the exact trajectory (RMSE)"))
    if distances:
        floor = reference_of(group).get("fd")
        figure = plots.work_precision(distances, floor=floor if floor is not None and floor > 0 else None)
        made.append(keep("distance", figure, "Frechet distance of the samples to the data"))
    return made


def _spread(values: Sequence[int], most: int) -> list[int]:
    """Choose at most so many of the values, evenly and with both ends."""
    return [values[k] for k in dict.fromkeys(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))] if values else []


def _ranked(group: RowGroup, nfe: int) -> list[JsonRow]:
    """Return the rows to draw, best first, one of samplers that are alike."""
    drawn = _alike(group)
    return sorted((row for (one, n), row in group.lowest.items() if n == nfe and one in drawn), key=lambda row: row["rmse"])


def _histograms(group: RowGroup, keep: Keep) -> list[dict[str, Any]]:
    """Plot the errors of single samples at the fewest and at the most evaluations for which they were saved."""
    saved: dict[int, dict[str, np.ndarray]] = {}
    for nfe in group.counts:
        for row in _ranked(group, nfe):
            path = picture_file(group.homes[key_of(row)].folder, key_of(row))
            if len(saved.get(nfe, {})) < ROWS and has_errors(path):
                errors = read_errors(path).double().numpy()
                if (errors > 0).any():
                    saved.setdefault(nfe, {})[title_of(sampler_of(row))] = errors
    return [keep(f"errors-{nfe}", plots.histograms(saved[nfe], nfe), "") for nfe in _spread(list(saved), 2)]


def sample_strips(group: RowGroup, form: Format, *, counts: int = GROUPS, samplers: int = ROWS) -> list[dict[str, Any]]:
    """Draw strips of the same seeds: the ends of exact trajectories, then the best samplers, at a few numbers of evaluations.

    Args:
        counts: the most numbers of evaluations.
        samplers: the most samplers at each.
    """
    home = next((run for run in group.runs if (run.folder / REFERENCE).exists()), None)
    seed = (home or group.runs[-1]).noises[0]
    drawable: list[tuple[int, list[tuple[JsonRow, Tensor]]]] = []
    for nfe in group.counts:
        found = []
        for row in _ranked(group, nfe):
            run = group.homes[key_of(row)]
            path = picture_file(run.folder, key_of(row))
            if run.noises[0] == seed and path.exists() and len(found) < samplers:
                found.append((row, read_samples(path)))
        if any(x.ndim == 4 for _, x in found):
            drawable.append((nfe, [(row, x) for row, x in found if x.ndim == 4]))
    chosen = [drawable[k] for k in _spread(range(len(drawable)), counts)]
    if not chosen:
        return []
    height, width = (min(plots.SIDE, size) for size in chosen[0][1][0][1].shape[-2:])
    across = max(2, min(ACROSS, PIXELS // (height * width * sum(len(found) + 1 for _, found in chosen))))
    exact = None if home is None else read_samples(home.folder / REFERENCE)
    return [{"nfe": _whole(nfe), "strips": _strips(found, exact, across, form)} for nfe, found in chosen]


def _strips(found: Sequence[tuple[JsonRow, Tensor]], exact: Tensor | None, across: int, form: Format) -> list[dict[str, Any]]:
    def uri(x: Tensor) -> str:
        return plots.data_uri(plots.strip(x, across), "image/png")

    first = [] if exact is None else [{"name": "exact trajectory", "grid": "", "error": None, "uri": uri(exact)}]
    return first + [{**_named(row), "error": form("rmse", row["rmse"]), "uri": uri(x)} for row, x in found]


# -- schedules --------------------------------------------------------------------------------------------------------


def _schedules(group: RowGroup, keep: Keep) -> list[dict[str, Any]]:
    """Plot where samplers evaluate, at the fewest and at the most evaluations; rows without levels are left out."""
    found = {nfe: levels for nfe in group.counts if (levels := _levels(group, nfe))}
    return [keep(f"schedules-{nfe}", plots.schedules(found[nfe], nfe), "") for nfe in _spread(list(found), 2)]


def _levels(group: RowGroup, nfe: int) -> dict[str, list[float]]:
    """Return the noise levels of the grids of this library's rows, the best first."""
    found = dict[str, list[float]]()
    for row in sorted((row for row in group.good if row["nfe"] == nfe and row["library"] == "fewstep"), key=lambda row: row["rmse"]):
        special = row["solver"] if row["solver"] == FITTED else f"opt. {row['solver']}"
        name = special if row["grid"] == OPTIMIZED else row["grid"]
        if name not in found and len(found) < ROWS + 1 and row.get("levels") is not None:
            found[name] = [level for level in row["levels"] if level is not None]
    return found


# -- how it was made --------------------------------------------------------------------------------------------------


def _origins(runs: Sequence[ResultsFolder]) -> list[dict[str, Any]]:
    """Describe how each run was made, leaving out facts that equal those of the run before."""
    made = [_provenance(run) for run in runs]
    return [{**one, "facts": [] if k and one["facts"] == made[k - 1]["facts"] else one["facts"]} for k, one in enumerate(made)]


def _provenance(run: ResultsFolder) -> dict[str, Any]:
    """Describe how a run was made: versions, machine, command. Values are shown as they stand in ``results.json``."""
    results, known = run.results, run.results.get("problem", {})
    machine, reference = results.get("machine") or {}, results.get("reference") or {}
    facts: list[tuple[str, list[Any]]] = [("fewstep", [results.get("version")]), ("torch", [machine.get("torch")])]
    facts += [("Python", [machine.get("python")]), ("machine", [machine.get("device"), machine.get("processor")])]
    facts += [
        ("threads", [machine.get("threads")]),
        ("times", [timed_by(results["rows"])]),
        ("model", [results.get("model"), known.get("fingerprint")]),
    ]
    facts += [("noises", [known.get("num")]), ("first seed", [known.get("seed")]), ("batch", [known.get("batch")])]
    facts += [
        ("reference", [reference.get("solver")]),
        ("its evaluations", [reference.get("nfe")]),
        ("its own error", [reference.get("error")]),
    ]
    facts += [("its Frechet distance", [reference.get("fd")]), ("that of two halves of the data", [reference.get("fd_data_halves")])]
    shown = [(label, [_fact(value) for value in values if value is not None]) for label, values in facts]
    commands = str(results.get("command") or "").split(" && ")
    return {"name": run.name, "facts": [one for one in shown if one[1]], "commands": [command for command in commands if command]}


def _fact(value: Any) -> Number | str:  # noqa: ANN401 - of JSON
    return Number(value, f"{value:.3g}" if isinstance(value, float) else f"{value}") if isinstance(value, int | float) else str(value)


def _again(group: RowGroup) -> str | None:
    """Return the command that makes one row again, the best with fewest evaluations; None where no command made it."""
    if not group.counts:
        return None
    row = group.winners(group.counts[0])[0]
    run, library = group.homes[key_of(row)], row["library"]
    words = str(run.results.get("command") or "").split()
    if words and words[0].startswith("fewstep."):  # a call in Python, of objects that have no names
        return None
    model = words[2] if words[:2] == ["fewstep", "bench"] and len(words) > 2 else run.model
    peers = library if library == "diffusers" else f"{library}:{row['solver']}"
    which = ["--solver", row["solver"]] if library == "fewstep" else ["--peers", peers]
    which = ["--sampler", row["grid"]] if "/" in row["grid"] else [*which, "--grid", row["grid"]]
    seed, num = run.noises
    options = [*which, "--nfe", str(key_of(row)[3]), *(["--num", str(num)] if num is not None else [])]
    options += ["--seed", str(seed)] if seed is not None else []
    options += ["--guidance", as_typed(run.guidance)] if run.guidance != 1 else []
    return shlex.join(["fewstep", "bench", model, *options, "--out", "runs/again"])
