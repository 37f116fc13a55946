"""The page of an inspection: what a model's trajectories look like, which sampler suits it, and what to run next."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.evaluate.inspection import Inspection, Pick
from fewstep.evaluate.report import curves, plots
from fewstep.evaluate.report.template import check_packages, rendered
from fewstep.models.carried import FITTED
from fewstep.runtime.artifact import check_writable, write_whole
from fewstep.sampling.sampler import Sampler

__all__ = ["inspection_page", "write_inspection"]

SHOWN = 5  # samplers in the table


def write_inspection(found: Inspection, best: Sampler, out: Path, commands: Sequence[str]) -> Path:
    """Write ``inspect.html`` and ``inspect.json`` into ``out``, and return the path of the page.

    Args:
        found: the inspection.
        best: the sampler by hand that it recommends.
        out: the folder.
        commands: to type next.

    Raises:
        FewstepError: matplotlib or jinja2 is missing.
        ArtifactError: the folder cannot be written.
    """
    check_packages()
    check_writable(out)
    write_whole(out / "inspect.json", (json.dumps(_plain(found.facts()), indent=1) + "\n").encode())
    write_whole(out / "inspect.html", inspection_page(found, best, commands).encode())
    return out / "inspect.html"


def inspection_page(found: Inspection, best: Sampler, commands: Sequence[str]) -> str:
    """Return the page as HTML, complete in itself."""
    geometry, summary = found.geometry, found.geometry.summary()
    high, low = found.decided()
    levels, density = geometry.density()
    best_levels = _levels(best)
    pick = found.best
    grids = {f"in use: {found.present.name}": found.levels}
    if not _same(found.levels, best_levels):
        grids[f"best by hand: {pick.solver} on {pick.grid}"] = best_levels
    curve = {
        "sampling trajectory z": (geometry.levels.tolist(), geometry.distance.mean(1).tolist()),
        "denoised image D": (geometry.levels[:-1].tolist(), geometry.denoised_distance.mean(1).tolist()),
    }
    figures = {
        "distances": curves.distances(curve),
        "change": curves.change_along(levels.tolist(), density.tolist(), grids),
        "stops": curves.stops(found.stops),
    }
    facts = json.dumps(_plain(found.facts()), indent=1)
    return rendered(
        "inspect.html.j2",
        {
            "found": found,
            "summary": {name: _number(value) for name, value in summary.items()},
            "high": f"{high:.3g}",
            "low": f"{low:.3g}",
            "plots": {name: plots.svg(figure, name) for name, figure in figures.items()},
            "strips": _strips(found),
            "picks": [_row(one, found) for one in found.picks[:SHOWN]],
            "pick": pick,
            "pick_error": f"{pick.error:.4f}",
            "own_error": f"{found.stops[-1]:.4f}",
            "ratio": f"{found.stops[-1] / pick.error:.2f}" if pick.error else "",
            "fitted": next((f"{one.error:.4f}" for one in found.picks if one.solver == FITTED), None),
            "here": found.evaluations_within(found.levels),
            "there": found.evaluations_within(best_levels),
            "lost": [(k, f"{found.stops[-2 - k] / found.stops[-1]:.2f}") for k in (1, 2, 3) if k < found.present.nfe and found.stops[-1]],
            "without_idle": f"{found.stops[-2 - found.idle] / found.stops[-1]:.2f}" if found.stops[-1] else "",
            "straight": _straight(summary),
            "commands": commands,
            "files": [("inspect.json", plots.data_uri(facts.encode(), "application/json"))],
        },
    )


def _levels(sampler: Sampler) -> list[float]:
    nodes = sampler.tableau.nodes
    return [float(value) for value in (nodes.sigma / nodes.alpha)[:-1]]


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(one, other, strict=True))


def _number(value: float) -> str:
    return "never" if math.isnan(value) else f"{value:.3g}" if value < 0.99 or value >= 1.0005 else f"{value:.5f}"


def _row(one: Pick, found: Inspection) -> dict[str, str]:
    return {
        "solver": one.solver,
        "grid": one.grid,
        "error": f"{one.error:.4f}",
        "ratio": f"{one.error / found.stops[-1]:.2f}" if found.stops[-1] else "",
    }


def _straight(summary: dict[str, float]) -> str:
    """Say in words how straight the denoised image goes."""
    turning = summary["turning"]
    if turning < 1.15:
        return "It goes nearly straight: solvers of low order do well in few steps."
    if turning < 1.7:
        return "It bends: solvers that read past evaluations (UniPC, DPM-Solver++, iPNDM) gain, and so do levels of the model's own."
    return "It turns a lot: high orders overshoot in few steps. Spend evaluations where it changes most, or let a fit choose."


def _strips(found: Inspection) -> dict[str, Any]:
    """Return the levels that are shown, and a strip of images for each seed."""
    if found.pictures is None:
        return {"levels": [], "seeds": []}
    images, levels = found.pictures
    rows = [plots.data_uri(plots.strip(row, len(row)), "image/png") for row in images.transpose(0, 1)]
    return {"levels": [f"{level:.3g}" for level in levels[:-1]], "seeds": rows}


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return JSON values with null for what is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
