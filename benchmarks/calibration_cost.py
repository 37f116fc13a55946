"""What statistics cost and what they are worth: levels x data x pooling, and the states they come from, against the error of DPM-Solver-v3
of two past evaluations.

python benchmarks/calibration_cost.py --out benchmarks/results/calibration_cost.json [--table]

Moments are kept in runs/calibration_cost, rows in the file: a killed run continues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fewstep.core.schedule import NoiseSchedule
from fewstep.core.spacings import make_grid
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.distances import rmse
from fewstep.learn.samplers.calibrate import CalibrationConfig, calibrate
from fewstep.models.generate import sample
from fewstep.models.model import Model
from fewstep.models.zoo import load_model
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import GridError
from fewstep.sampling.reference import reference_sampler
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import DPMSolverV3

TWO = partial(DPMSolverV3, steps=2, predictor="true")
LEVELS, DATA, NFE = (8, 15, 30, 120), (32, 128, 256, 1024), (5, 6, 8, 10)
POOLS = ("element", "scalar/element", "channel")
CASES = (*((pool, "angle", "exact") for pool in POOLS), ("element", "logsnr", "exact"), ("element", "logsnr", "trapezoid"))
STATES = (  # model, guidance, states: the model's own trajectories, those but the network unguided, or diffused digits
    *(("digits-edm", 1.0, states) for states in ("own", "digits")),
    *(("digits-ddpm", 1.0, states) for states in ("own", "digits")),
    *(("digits-edm", 2.0, states) for states in ("own", "own, unguided", "digits")),
)
NOISES = range(512)
KEPT = Path("runs/calibration_cost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown and stop")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"command": "python benchmarks/calibration_cost.py", "rows": []}
    results |= {"noises": len(NOISES), "torch": torch.__version__}
    if not args.table:
        cost(results, args.out)
        sources(results, args.out)
    table(results["rows"])
    table_of_states(results["states"])


def cost(results: dict[str, Any], out: Path) -> None:
    """Levels x data x pooling, on digits-edm."""
    model, samples, exact = problem("digits-edm", 1.0)
    results |= {"model": model.name, "fingerprint": model.fingerprint}
    done = {(row["levels"], row["data"], row["pool"], row["grid"], row["integrals"]) for row in results["rows"]}
    for levels, data, pool in product(LEVELS, DATA, POOLS):
        cases = [case[1:] for case in CASES if case[0] == pool and (levels, data, *case) not in done]
        if not cases:
            continue
        statistics = calibrate(model, config=CalibrationConfig(levels, data, pool, batch=32), out=KEPT / str(levels))
        for grid, rule in cases:
            errors = row(TWO(statistics, integrals=rule), grid, model.schedule, samples, exact)
            about = {"levels": levels, "data": data, "pool": pool, "grid": grid, "integrals": rule, "points": (levels + 1) * data}
            results["rows"].append({**about, "rmse": {str(nfe): error for nfe, error in errors.items()}})
            write_whole(out, (json.dumps(results, indent=1) + "\n").encode())
        print(f"{levels} levels, {data} data, {pool}", flush=True)


def sources(results: dict[str, Any], out: Path) -> None:
    """Default calibrations from different states."""
    rows = results.setdefault("states", [])
    for name, guidance, states in STATES:
        if any((row["model"], row["guidance"], row["states"]) == (name, guidance, states) for row in rows):
            continue
        model, samples, exact = problem(name, guidance)
        images = load_images("digits") if states == "digits" else None
        folder = KEPT / f"{name} {guidance:g} {states}"
        options: dict[str, Any] = {"images": images, "guidance": guidance, "unguided": "unguided" in states}
        solver = TWO(calibrate(model, out=folder, **options))
        errors = {grid: row(solver, grid, model.schedule, samples, exact) for grid in ("angle", "logsnr")}
        rows.append({"model": name, "guidance": guidance, "states": states, "rmse": errors})
        write_whole(out, (json.dumps(results, indent=1) + "\n").encode())
        print(f"{name}, guidance {guidance:g}, {states}", flush=True)


def problem(name: str, guidance: float) -> tuple[Model, Callable[[Sampler], torch.Tensor], torch.Tensor]:
    """A model, how to sample it from the noises, and where the exact trajectories end."""
    model = load_model(name)

    def samples(sampler: Sampler) -> torch.Tensor:
        parts = [slice(start, start + 256) for start in range(0, len(NOISES), 256)]
        return torch.cat([sample(model, sampler, seeds=NOISES[p], guidance=guidance) for p in parts])

    return model, samples, samples(reference_sampler(model.schedule))


def row(
    solver: DPMSolverV3, grid: str, schedule: NoiseSchedule, samples: Callable[[Sampler], torch.Tensor], exact: torch.Tensor
) -> dict[int, float | None]:
    """The error by evaluations; None where snapping to the statistics' grid puts two times on one level."""
    errors: dict[int, float | None] = {}
    for nfe in NFE:
        try:
            errors[nfe] = rmse(samples(Sampler.build(solver, make_grid(grid, schedule, nfe), schedule)), exact)
        except GridError:
            errors[nfe] = None
    return errors


def table(rows: list[dict[str, Any]]) -> None:
    """One line a row, with the error relative to the costliest of its kind."""
    print("| levels | data | states visited | pooling | grid | integrals | " + " | ".join(map(str, NFE)) + " |")
    print("|---|---|---|---|---|---|" + "---|" * len(NFE))
    for pool, grid, rule in CASES:
        kind = [r for r in rows if (r["pool"], r["grid"], r["integrals"]) == (pool, grid, rule)]
        best = max(kind, key=lambda r: r["points"])
        for r in sorted(kind, key=lambda r: (r["levels"], r["data"])):
            ours, theirs = ({int(n): v for n, v in one["rmse"].items()} for one in (r, best))
            cells = [f"{ours[n]:.4f} ({ours[n] / theirs[n]:.2f})" if ours[n] else "" for n in NFE]
            print(f"| {r['levels']} | {r['data']} | {r['points']} | {pool} | `{grid}` | {rule} | " + " | ".join(cells) + " |")


def table_of_states(rows: list[dict[str, Any]]) -> None:
    print("\n| model | guidance | states | grid | " + " | ".join(map(str, NFE)) + " |")
    print("|---|---|---|---|" + "---|" * len(NFE))
    for r in rows:
        for grid, errors in r["rmse"].items():
            cells = [f"{value:.4f}" for value in errors.values()]
            print(f"| `{r['model']}` | {r['guidance']:g} | {r['states']} | `{grid}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
