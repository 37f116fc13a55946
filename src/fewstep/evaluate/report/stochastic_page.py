"""The page of a benchmark of stochastic samplers: whether noise helps, distances over evaluations, all rows, samples on two noise paths."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.evaluate.report import plots
from fewstep.evaluate.report.template import rendered, write_page
from fewstep.evaluate.stochastic.rows import NoiseRow, read_paths
from fewstep.evaluate.stochastic.verdict import Contest, contests, ranked_rows
from fewstep.runtime.errors import FewstepError

__all__ = ["stochastic_page", "write_stochastic"]

SAID = {
    "noise": "With {} evaluations noise helps: the best sampler that adds it is closer to the data than the best that does not.",
    "no noise": "With {} evaluations noise hurts: the best sampler that adds none is closer to the data than the best that does.",
    "not apart": "With {} evaluations the best of both kinds are not apart: their intervals meet.",
}
ACROSS = 12  # pictures of a strip
SHOWN = {"precision": "{:.2f}", "recall": "{:.2f}", "labels": "{:.3f}", "spread": "{:.3f}"}
MOST = ("precision", "recall", "labels")  # of which more is better


def write_stochastic(results: Mapping[str, Any], out: Path) -> Path:
    """Write ``report.html`` of a benchmark of stochastic samplers in ``out``, and return its path.

    Args:
        results: of that folder.
        out: the folder, where the pictures of its rows lie.

    Raises:
        FewstepError: matplotlib or jinja2 is missing, or no row has figures.
        ArtifactError: the folder cannot be written, or pictures in it are damaged.
    """
    return write_page(lambda: stochastic_page(results, out), out)


def stochastic_page(results: Mapping[str, Any], out: Path) -> str:
    """Return the page as HTML, complete in itself; rows whose pictures are not in the folder ``out`` any more are shown without them."""
    rows = [NoiseRow(**{name: row[name] for name in NoiseRow.__dataclass_fields__ if name in row}) for row in results["rows"]]
    ranked, found = ranked_rows(rows), contests(rows)
    if not ranked:
        raise FewstepError(f"no row in {out} has figures, so there is nothing to show")
    page = {
        "results": results,
        "said": [SAID[one.verdict].format(one.nfe) for one in found if one.verdict is not None],
        "contests": [{"nfe": one.nfe, "noisy": _named(one.stochastic), "plain": _named(one.deterministic)} for one in found],
        "counts": [_count(nfe, [row for row in ranked if row.nfe == nfe]) for nfe in dict.fromkeys(row.nfe for row in ranked)],
        "figure": plots.svg(plots.work_precision(_series(ranked)), "distance"),
        "strips": [one for contest in found for one in _strips(contest, out)],
        "labels": any(row.labels is not None for row in ranked),
        "failed": [(f"{row.solver} on {row.grid}", row.nfe, row.failed) for row in rows if row.failed is not None],
        "skipped": list(dict.fromkeys(one["why"] for one in results["skipped"])),
        "files": [("results.json", plots.data_uri(json.dumps(results, indent=1).encode(), "application/json"))],
    }
    return rendered("stochastic.html.j2", page)


def _named(row: NoiseRow | None) -> dict[str, str] | None:
    """Return a row's sampler and its distance with the interval."""
    if row is None:
        return None
    interval = "" if row.fd_ci is None else f"{row.fd_ci[0]:.2f} to {row.fd_ci[1]:.2f}"
    return {"solver": row.solver, "grid": row.grid, "fd": f"{row.fd:.2f}", "interval": interval}


def _count(nfe: int, rows: Sequence[NoiseRow]) -> dict[str, Any]:
    """Return the table of one number of evaluations, the least distance first; the best of a column is marked."""
    best = {name: max(values) for name in MOST if (values := [value for row in rows if (value := getattr(row, name)) is not None])}
    lines = []
    for row in rows:
        cells = {name: (getattr(row, name), pattern) for name, pattern in SHOWN.items()}
        figures = {
            name: ("" if value is None else pattern.format(value), value is not None and value == best.get(name))
            for name, (value, pattern) in cells.items()
        }
        paths = f"± {row.fd_spread:.2f} over {row.paths}" if row.stochastic and row.fd_spread is not None else ""
        about = {"noise": row.stochastic, "paths": paths, "calls": row.calls, "best": row is rows[0]}
        lines.append({**(_named(row) or {}), **about, **figures})
    return {"nfe": nfe, "lines": lines}


def _series(ranked: Sequence[NoiseRow]) -> dict[str, list[plots.Point]]:
    """Return the distance of each solver over evaluations, on the best of its grids; the best at most evaluations first."""
    found = dict[str, dict[int, NoiseRow]]()
    for row in ranked:
        found.setdefault(row.solver, {}).setdefault(row.nfe, row)
    last = max(row.nfe for row in ranked)
    order = sorted(found, key=lambda name: (last not in found[name], [row.fd for row in ranked if row.solver == name][-1]))
    return {name: [plots.point_of(vars(row), "fd", nfe) for nfe, row in sorted(found[name].items()) if row.fd] for name in order}


def _strips(contest: Contest, out: Path) -> list[dict[str, Any]]:
    """Return the samples of the best of each kind from the same starts, of one that adds noise on its first two paths."""
    made = []
    for row in (contest.deterministic, contest.stochastic):
        samples = None if row is None else read_paths(out, row.key)
        if row is None or samples is None or samples.ndim != 5 or samples.shape[2] not in (1, 3):
            continue
        for number, one in enumerate(samples[:2]):
            path = f"path {number + 1}" if row.stochastic else "no noise"
            uri = plots.data_uri(plots.strip(one, min(ACROSS, len(one))), "image/png")
            made.append({"nfe": contest.nfe, "solver": row.solver, "path": path, "uri": uri})
    return made
