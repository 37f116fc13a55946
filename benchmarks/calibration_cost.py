"""What statistics cost and what they are worth: levels x data x pooling against the error of DPM-Solver-v3 on digits-edm.

python benchmarks/calibration_cost.py --out benchmarks/results/calibration_cost.json [--table]

Moments are kept in runs/calibration_cost, rows in the file: a killed run continues.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fewstep.core.artifact import write_whole
from fewstep.core.errors import GridError
from fewstep.core.grid import make_grid
from fewstep.core.sampler import Sampler
from fewstep.core.schedule import NoiseSchedule
from fewstep.evaluate.benchmark import reference_sampler
from fewstep.evaluate.generation import generate
from fewstep.evaluate.metrics import rmse
from fewstep.learn.calibrate import CalibrationConfig, calibrate
from fewstep.models.zoo import load_model
from fewstep.solvers import DPMSolverV3

MODEL = "digits-edm"
LEVELS, DATA, NFE = (8, 15, 30, 120), (32, 128, 256, 1024), (5, 6, 8, 10)
POOLS = ("element", "scalar/element", "channel")
CASES = (*((pool, "angle", "exact") for pool in POOLS), ("element", "logsnr", "exact"), ("element", "logsnr", "trapezoid"))
NOISES = range(512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown and stop")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"command": "python benchmarks/calibration_cost.py", "rows": []}
    if args.table:
        table(results["rows"])
        return
    cpu, model = torch.device("cpu"), load_model(MODEL)
    schedule, labels = model.denoiser.schedule, model.labels(NOISES)

    def samples(sampler: Sampler) -> torch.Tensor:
        return torch.cat([generate(model.denoiser, sampler, part, model.shape, labels[part], cpu) for part in (NOISES[:256], NOISES[256:])])

    exact = samples(reference_sampler(schedule))
    results |= {"model": MODEL, "fingerprint": model.fingerprint, "noises": len(NOISES), "torch": torch.__version__}
    done = {(row["levels"], row["data"], row["pool"], row["grid"], row["integrals"]) for row in results["rows"]}
    for levels in LEVELS:
        for data in DATA:
            for pool in POOLS:
                config = CalibrationConfig(levels, data, pool, batch=32)
                begin = time.perf_counter()
                statistics = calibrate(model, config, Path("runs/calibration_cost") / str(levels))
                seconds = time.perf_counter() - begin
                for grid, rule in [case[1:] for case in CASES if case[0] == pool and (levels, data, *case) not in done]:
                    errors = row(DPMSolverV3(statistics, integrals=rule), grid, schedule, samples, exact)
                    results["rows"].append(
                        {
                            "levels": levels,
                            "data": data,
                            "pool": pool,
                            "grid": grid,
                            "integrals": rule,
                            "points": (levels + 1) * data,
                            "rmse": errors,
                        }
                    )
                    write_whole(args.out, (json.dumps(results, indent=1) + "\n").encode())
                print(f"{levels} levels, {data} data, {pool}: {seconds:.1f} s more", flush=True)
    table(results["rows"])


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


if __name__ == "__main__":
    main()
