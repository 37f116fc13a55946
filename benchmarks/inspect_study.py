"""Check what ``fewstep inspect`` recommends against a benchmark of all solvers and grids, on other noises.

    pip install --no-deps galaxygrad==0.1.5   # for the two networks of galaxies, which are left out without it
    python benchmarks/inspect_study.py --out benchmarks/results/inspect_study.json

Eight evaluations. The inspection takes its 32 noises, the benchmark 128 others. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import foreign_networks
import torch

import fewstep
from fewstep.core.spacings import GRIDS
from fewstep.evaluate.inspection import CANDIDATES, inspect_model, reference_of
from fewstep.models.generate import default_grid, solver_for
from fewstep.models.problem import Problem
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.loop import run

ASSETS = Path(__file__).parents[1] / "assets"
MODELS = ("digits-edm", "digits-ddpm", str(ASSETS / "cifar10-16"))
NFE, NUM, FIRST = 8, 128, 10_000


def models() -> list[fewstep.Model]:
    found = [fewstep.load_model(name) for name in MODELS]
    return found + [foreign_networks.load(name) for name in foreign_networks.STUDIED if foreign_networks.place(name) is not None]


@torch.no_grad()
def benchmark(problem: Problem) -> dict[tuple[str, str], float]:
    """Return the RMSE of every pair of a solver and a grid that starts and ends where the noise law does."""
    seeds, reference, errors = range(FIRST, FIRST + NUM), reference_of(problem.schedule), dict[tuple[str, str], float]()
    exact = run(problem.teacher, reference.tableau, problem.start(seeds, reference.tableau.nodes), problem.cond(seeds))
    for name in CANDIDATES:
        for grid in GRIDS:
            with suppress(fewstep.GridError, fewstep.SolverError):
                solver = solver_for(name, problem.model)
                made = fewstep.Sampler.build(solver, grid, problem.schedule, nfe=NFE)
                if (float(made.grid.t[0]), float(made.grid.t[-1])) != (problem.schedule.t_max, problem.schedule.t_min):
                    continue
                end = run(problem.denoiser, made.tableau, problem.start(seeds, made.tableau.nodes), problem.cond(seeds))
                error = float((end - exact).double().square().mean().sqrt())
                errors[name, grid] = error if math.isfinite(error) else math.inf
    return errors


def row_of(model: fewstep.Model) -> dict[str, Any]:
    problem, present = Problem(model), fewstep.Sampler.build("unipc-2", default_grid(model), model.schedule, nfe=NFE)
    found, errors = inspect_model(problem, present), benchmark(problem)
    ranked = sorted(errors, key=errors.__getitem__)
    pick = (found.best.solver, found.best.grid)
    shown = [{"solver": name, "grid": grid, "rmse": errors[name, grid]} for name, grid in (pick, ranked[0])]
    place = ranked.index(pick) + 1
    about = {"model": model.name, "recommended": shown[0], "best": shown[1], "place": place, "tried": len(ranked)}
    return about | {"decided": found.decided(), **{f"geometry_{key}": value for key, value in found.geometry.summary().items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for model in models():
        rows.append(row_of(model))
        print(json.dumps(rows[-1]), flush=True)
    write_whole(args.out, (json.dumps({"command": "python benchmarks/inspect_study.py", "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
