"""Which step of a sampler makes its error: single steps from exact states and exact history, carried exactly to the end.

python benchmarks/local_errors.py --out benchmarks/results/local_errors.json

On digits-ddpm, grid logsnr, 64 noises. Row i is the RMSE at the end of a trajectory that was exact but for step i.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.spacings import make_grid
from fewstep.core.tableau import Nodes, Solver, advance
from fewstep.evaluate.metrics.distances import rmse
from fewstep.models.formats.folders import Model
from fewstep.models.generate import sample, solver_for
from fewstep.models.zoo import load_model
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.noise import start_noise
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import UniPC

SOLVERS = ("ddim", "unipc-2", "deis-3", "dpm-solver-v3:steps=1:corrector=none", "dpm-solver-v3:steps=2:predictor=true", "dpm-solver-v3")
MODEL, GRID, NFE, SEEDS = "digits-ddpm", "logsnr", (5, 8), range(64)
FINE = 8  # exact steps per unit of lam


def exactly(model: Model, x: Tensor, t: Tensor) -> Tensor:
    """From time ``t[0]`` to ``t[1]`` by many small steps."""
    schedule = model.schedule
    first, last = schedule.lam(t).tolist()
    if first == last:
        return x
    lam = torch.linspace(first, last, max(4, round(FINE * (last - first))) + 1, dtype=torch.float64)
    return sample(model, Sampler.build(UniPC(3), TimeGrid(schedule.t_of_lam(lam)), schedule), x)


def one_step(solver: Solver, nodes: Nodes, states: list[Tensor], clean: list[Tensor], i: int) -> Tensor:
    """The solver's step ``i`` from exact states and evaluations up to it."""
    tableau = Sampler.build(solver, TimeGrid(nodes.t), load_model(MODEL).schedule).tableau
    blank = tableau.start(states[i])
    past = [solver.record(nodes, k, states[k].double(), clean[k].double()).float() for k in reversed(range(i))][: tableau.memory]
    anchor = None if blank.anchor is None else states[max(i - 1, 0)]
    state = blank._replace(anchor=anchor, history=(*past, *blank.history[len(past) :]))
    return advance(tableau.rows(states[i])[i], state, clean[i]).x


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, rows = load_model(MODEL), []
    for nfe in NFE:
        grid = make_grid(GRID, model.schedule, nfe)
        nodes = Nodes.at(model.schedule, grid.t)
        states = [start_noise(nodes, SEEDS, model.shape)]
        for i in range(nfe):
            states.append(exactly(model, states[-1], grid.t[i : i + 2]))
        clean = [model(states[i], nodes.t[i]) for i in range(nfe)]
        for name in SOLVERS:
            solver = solver_for(name, model)
            ends = [exactly(model, one_step(solver, nodes, states, clean, i), grid.t[[i + 1, nfe]]) for i in range(nfe)]
            rows.append({"solver": name, "nfe": nfe, "rmse": [rmse(end, states[-1]) for end in ends]})
            print(f"{nfe} {name:40}", *(f"{value:.4f}" for value in rows[-1]["rmse"]), flush=True)
    about = {"command": "python benchmarks/local_errors.py", "model": MODEL, "grid": GRID, "noises": len(SEEDS)}
    write_whole(args.out, (json.dumps({**about, "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
