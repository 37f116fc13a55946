"""What a report's page shows of one problem, ready for the template: numbers with how they are shown, plots, strips of samples."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.evaluate.benchmark.plan import OPTIMIZED
from fewstep.evaluate.benchmark.rows import has_errors, picture_file, read_errors, read_samples
from fewstep.evaluate.report import plots
from fewstep.evaluate.report.findings import (
    Change,
    Format,
    Number,
    Problem,
    Run,
    Sampler,
    interval_of,
    pivot,
    reference_of,
    sampler_of,
    summary,
    title_of,
)
from fewstep.evaluate.report.verdict import Row, has_error, key_of
from fewstep.models.formats.folders import FITTED

__all__ = ["problem_view"]

COLUMNS = {
    "rmse": "error",
    "error_median": "median",
    "error_p95": "95th percentile",
    "fd": "Frechet",
    "kd": "kernel",
    "precision": "precision",
    "recall": "recall",
    "labels": "labels as asked",
    "arithmetic": "arithmetic",
    "seconds": "seconds",
    "solver_seconds": "without network",
    "peak_memory": "peak MB",
}
GROUPS, ROWS, ACROSS = 4, 6, 12  # of sample grids: numbers of evaluations, samplers, samples
PIXELS = 500_000  # of all sample grids together


def problem_view(problem: Problem, number: int) -> dict[str, Any]:
    """All that the page shows of a problem. ``figures`` are its plots by name, for files of their own."""
    rows = list(problem.rows.values())
    form, name, guidance = Format(rows), problem.runs[-1].problem[0], problem.runs[-1].problem[2]
    slug = re.sub(r"[^a-zA-Z0-9]+", "-", f"p{number}-{name}{f'-guidance-{guidance:g}' if guidance != 1 else ''}").strip("-")
    figures: list[dict[str, Any]] = []

    def keep(kind: str, figure: Any, caption: str) -> dict[str, Any]:  # noqa: ANN401 - a figure of matplotlib's
        figures.append({"name": f"{slug}.{kind}", "svg": plots.svg(figure, f"{slug}-{kind}"), "png": plots.png(figure), "caption": caption})
        return figures[-1]

    failed = [row for row in rows if not has_error(row)]
    skipped = {str(one["why"]): None for run in problem.runs for one in run.results.get("skipped", [])}
    return {
        "id": slug,
        "name": name,
        "guidance": form("guidance", guidance),
        "noises": [Number(num, f"{num}") for num in dict.fromkeys(row["num"] for row in rows if row.get("num") is not None)],
        "summary": summary(problem, form),
        "picks": [_pick(problem, form, nfe) for nfe in problem.counts],
        "precision": _work_precision(problem, keep),
        "needs": _needs(problem, form),
        "counts": problem.counts if problem.counts else [],
        "pivot_counts": sorted({row["nfe"] for row in rows}),
        "pivot": pivot(problem, form, sorted({row["nfe"] for row in rows})),
        "samples": _samples(problem, form),
        "histograms": _histograms(problem, keep),
        "schedules": _schedules(problem, keep),
        "changes": [_change(change, form) for change in _worst_first(problem.changes)],
        "compared": len(problem.changes),
        "details": _details(problem, form),
        "failed": [{**_named(row), "nfe": _whole(row["nfe"]), "why": _why(row)} for row in failed],
        "skipped": list(skipped),
        "runs": _origins(problem.runs),
        "again": _again(problem),
        "figures": figures,
    }


def _whole(value: int) -> Number:
    return Number(value, f"{value}")


def _named(row: Row) -> dict[str, str]:
    return {"name": title_of(sampler_of(row)), "grid": row["grid"]}


def _why(row: Row) -> str:
    return str(row["failed"]) if row.get("failed") is not None else "its samples are not finite"


def _pick(problem: Problem, form: Format, nfe: int) -> dict[str, Any]:
    """What to use at one number of evaluations: the best, the best without preparation, and who equals it first."""
    won, first = problem.winners(nfe), problem.first_equal(nfe)
    least = next(iter(problem.plain(nfe)), None)
    return {
        "nfe": _whole(nfe),
        "best": [_picked(row, form) for row in won],
        "none": "not tried" if least is None else "the same",
        "plain": None if least is None or key_of(least) in map(key_of, won) else _picked(least, form),
        "first": None if first is None else {**_named(first), "nfe": _whole(first["nfe"])},
    }


def _picked(row: Row, form: Format) -> dict[str, Any]:
    return {**_named(row), "error": form("rmse", row["rmse"]), "interval": interval_of(form, "rmse", row)}


def _needs(problem: Problem, form: Format) -> dict[str, Any]:
    """The evaluations that each sampler needs to be as good as the best at each number."""
    goals = [(nfe, problem.winners(nfe)) for nfe in problem.counts]
    heads = [{"nfe": _whole(nfe), **_picked(won[0], form), "more": len(won) > 1} for nfe, won in goals]
    lines, never = [], []
    for sampler in problem.samplers:
        needs = [problem.needs(sampler, won[0]) for _, won in goals]
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


def _details(problem: Problem, form: Format) -> dict[str, Any]:
    """All rows with all that is known of them."""
    rows = sorted(problem.good, key=lambda row: (row["nfe"], row["rmse"]))
    rows += [row for row in problem.rows.values() if not has_error(row)]
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
    return {"heads": [COLUMNS[name] for name in fields], "lines": lines, "several": len(problem.runs) > 1}


# -- pictures ---------------------------------------------------------------------------------------------------------

Keep = Callable[[str, Any, str], dict[str, Any]]


def _alike(problem: Problem) -> dict[Sampler, str]:
    """Samplers to draw, best first, with names; those whose errors cannot be told apart in a plot are one line."""
    groups: list[list[Sampler]] = []
    errors = {
        sampler: {nfe: row["rmse"] for (other, nfe), row in problem.lowest.items() if other == sampler} for sampler in problem.samplers
    }
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


def _points(problem: Problem, measure: str) -> dict[str, list[plots.Point]]:
    """Of each sampler the least of a measure over its grids, by evaluations; best first."""
    series: dict[str, list[plots.Point]] = {}
    for sampler, name in _alike(problem).items():
        found: dict[int, Row] = {}
        for row in problem.good:
            value = row.get(measure) if sampler_of(row) == sampler else None
            if value is not None and value > 0 and (row["nfe"] not in found or value < found[row["nfe"]][measure]):
                found[row["nfe"]] = row
        if found:
            series[name] = [_point(found[nfe], measure) for nfe in sorted(found)]
    return series


def _point(row: Row, measure: str) -> plots.Point:
    ends, value = row.get(f"{measure}_ci"), row[measure]
    return plots.Point(row["nfe"], value, None if ends is None else (ends[0] if ends[0] > 0 else value, ends[1]))


def _work_precision(problem: Problem, keep: Keep) -> list[dict[str, Any]]:
    made = []
    errors, distances = _points(problem, "rmse"), _points(problem, "fd")
    if errors:
        made.append(keep("error", plots.work_precision(errors), "Error: distance to the end of the exact trajectory (RMSE)"))
    if distances:
        floor = reference_of(problem).get("fd")
        figure = plots.work_precision(distances, floor=floor if floor is not None and floor > 0 else None)
        made.append(keep("distance", figure, "Frechet distance of the samples to the data"))
    return made


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, with both ends."""
    return [values[k] for k in dict.fromkeys(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))] if values else []


def _ranked(problem: Problem, nfe: int) -> list[Row]:
    """Rows to draw, best first; of samplers that are alike one."""
    drawn = _alike(problem)
    return sorted((row for (one, n), row in problem.lowest.items() if n == nfe and one in drawn), key=lambda row: row["rmse"])


def _histograms(problem: Problem, keep: Keep) -> list[dict[str, Any]]:
    """The errors of single samples at the fewest and at the most evaluations of which they were kept."""
    kept: dict[int, dict[str, np.ndarray]] = {}
    for nfe in problem.counts:
        for row in _ranked(problem, nfe):
            path = picture_file(problem.homes[key_of(row)].folder, key_of(row))
            if len(kept.get(nfe, {})) < ROWS and has_errors(path):
                errors = read_errors(path).double().numpy()
                if (errors > 0).any():
                    kept.setdefault(nfe, {})[title_of(sampler_of(row))] = errors
    return [keep(f"errors-{nfe}", plots.histograms(kept[nfe], nfe), "") for nfe in _spread(list(kept), 2)]


def _samples(problem: Problem, form: Format) -> list[dict[str, Any]]:
    """Strips of the same seeds: the exact trajectory's ends, then the best samplers, at a few numbers of evaluations."""
    home = next((run for run in problem.runs if (run.folder / "reference.safetensors").exists()), None)
    seed = (home or problem.runs[-1]).noises[0]
    groups: list[tuple[int, list[tuple[Row, Tensor]]]] = []
    for nfe in problem.counts:
        found = []
        for row in _ranked(problem, nfe):
            run = problem.homes[key_of(row)]
            path = picture_file(run.folder, key_of(row))
            if run.noises[0] == seed and path.exists() and len(found) < ROWS:
                found.append((row, read_samples(path)))
        if any(x.ndim == 4 for _, x in found):
            groups.append((nfe, [(row, x) for row, x in found if x.ndim == 4]))
    chosen = [groups[k] for k in _spread(range(len(groups)), GROUPS)]
    if not chosen:
        return []
    height, width = (min(plots.SIDE, size) for size in chosen[0][1][0][1].shape[-2:])
    across = max(2, min(ACROSS, PIXELS // (height * width * sum(len(found) + 1 for _, found in chosen))))
    exact = None if home is None else read_samples(home.folder / "reference.safetensors")
    return [{"nfe": _whole(nfe), "strips": _strips(found, exact, across, form)} for nfe, found in chosen]


def _strips(found: Sequence[tuple[Row, Tensor]], exact: Tensor | None, across: int, form: Format) -> list[dict[str, Any]]:
    def uri(x: Tensor) -> str:
        return plots.data_uri(plots.strip(x, across), "image/png")

    first = [] if exact is None else [{"name": "exact trajectory", "grid": "", "error": None, "uri": uri(exact)}]
    return first + [{**_named(row), "error": form("rmse", row["rmse"]), "uri": uri(x)} for row, x in found]


# -- schedules --------------------------------------------------------------------------------------------------------


def _schedules(problem: Problem, keep: Keep) -> list[dict[str, Any]]:
    """Where samplers evaluate, at the fewest and at the most evaluations; nothing of rows that do not say."""
    found = {nfe: levels for nfe in problem.counts if (levels := _levels(problem, nfe))}
    return [keep(f"schedules-{nfe}", plots.schedules(found[nfe], nfe), "") for nfe in _spread(list(found), 2)]


def _levels(problem: Problem, nfe: int) -> dict[str, list[float]]:
    """Noise levels of the grids of our own rows, the best first."""
    found = dict[str, list[float]]()
    for row in sorted((row for row in problem.good if row["nfe"] == nfe and row["library"] == "fewstep"), key=lambda row: row["rmse"]):
        special = row["solver"] if row["solver"] == FITTED else f"opt. {row['solver']}"
        name = special if row["grid"] == OPTIMIZED else row["grid"]
        if name not in found and len(found) < ROWS + 1 and row.get("levels") is not None:
            found[name] = [level for level in row["levels"] if level is not None]
    return found


# -- how it was made --------------------------------------------------------------------------------------------------


def _origins(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each run; what is as in the run before is left out."""
    made = [_provenance(run) for run in runs]
    return [{**one, "facts": [] if k and one["facts"] == made[k - 1]["facts"] else one["facts"]} for k, one in enumerate(made)]


def _provenance(run: Run) -> dict[str, Any]:
    """Versions, machine, command; a value is shown as it stands in ``results.json``."""
    results, known = run.results, run.results.get("problem", {})
    machine, reference = results.get("machine") or {}, results.get("reference") or {}
    facts: list[tuple[str, list[Any]]] = [("fewstep", [results.get("version")]), ("torch", [machine.get("torch")])]
    facts += [("Python", [machine.get("python")]), ("machine", [machine.get("device"), machine.get("processor")])]
    facts += [("threads", [machine.get("threads")]), ("model", [results.get("model"), known.get("fingerprint")])]
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


def _again(problem: Problem) -> str | None:
    """The command that makes one row again: the best with fewest evaluations."""
    if not problem.counts:
        return None
    row = problem.winners(problem.counts[0])[0]
    run, library = problem.homes[key_of(row)], row["library"]
    words = str(run.results.get("command") or "").split()
    model = words[2] if words[:2] == ["fewstep", "bench"] and len(words) > 2 else run.problem[0]
    peers = library if library == "diffusers" else f"{library}:{row['solver']}"
    which = ["--solver", row["solver"]] if library == "fewstep" else ["--peers", peers]
    which = ["--sampler", row["grid"]] if "/" in row["grid"] else [*which, "--grid", row["grid"]]
    seed, num = run.noises
    options = [*which, "--nfe", str(key_of(row)[3]), *(["--num", str(num)] if num is not None else [])]
    options += ["--seed", str(seed)] if seed is not None else []
    options += ["--guidance", f"{run.problem[2]:g}"] if run.problem[2] != 1 else []
    return shlex.join(["fewstep", "bench", model, *options, "--out", "runs/again"])
