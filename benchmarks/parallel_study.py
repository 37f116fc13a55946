"""Rounds, evaluations and errors of sampling in parallel, against the sequential sampler on the same noises.

    python benchmarks/parallel_study.py --out benchmarks/results/parallel_study.json

Four noises of each model, tolerance 0.001; and for a network that waits 100 ms in each call, the wall-clock and what was expected of it
(``--only clock`` makes these rows alone: they want a machine that does nothing else). About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
from fewstep.core.denoiser import Cond, Denoiser
from fewstep.models.guidance import Wrapped
from fewstep.models.parallel_plan import plan_parallel
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.loop import run
from fewstep.sampling.noise import start_noise
from fewstep.sampling.parallel import ParallelConfig, Round, sample_in_parallel
from fewstep.sampling.parareal import Iterate, parareal

ASSETS = Path(__file__).parents[1] / "assets"
CIFAR = str(ASSETS / "cifar10-16")
CASES = (
    ("digits-edm", "ddim", "karras", 64),
    ("digits-edm", "unipc-3", "karras", 64),
    (CIFAR, "ddim", "karras", 64),
    ("digits-ddpm", "ddim", "uniform", 100),
    ("digits-ddpm", "unipc-3", "uniform", 25),
    ("digits-edm", "ddim:eta=1", "karras", 100),
    ("digits-edm", "sde-dpm-solver-pp-2m", "karras", 25),
    ("digits-edm", "unipc-3", "karras", 10),
)
SETTINGS = ((4, 1), (8, 1), (16, 3), (10**6, 3))  # window and memory; the last is all steps at once
BATCH, WAIT = 4, 0.1


def model_and_sampler(name: str, solver: str, grid: str, nfe: int) -> tuple[fewstep.Model, fewstep.Sampler, Tensor, Tensor | None]:
    model = fewstep.load_model(name)
    sampler = fewstep.Sampler.build(solver, grid, model.schedule, nfe=nfe)
    return model, sampler, start_noise(sampler.tableau.nodes, range(BATCH), model.need_shape()), model.labels(range(BATCH))


def rms(one: Tensor, other: Tensor) -> float:
    return float((one - other).double().square().mean().sqrt())


def picard_rows() -> list[dict[str, Any]]:
    rows = []
    for case in CASES:
        model, sampler, x, labels = model_and_sampler(*case)
        exact = run(model, sampler.tableau, x, labels, seeds=range(BATCH))
        for window, memory in SETTINGS:
            seen, config = list[Round](), ParallelConfig(window=min(window, sampler.nfe), memory=memory)
            made = sample_in_parallel(model, sampler, x, labels, seeds=range(BATCH), config=config, observe=seen.append)
            about = dict(zip(("model", "solver", "grid", "nfe"), (Path(case[0]).name, *case[1:]), strict=True))
            evaluations = sum(one.last - one.first for one in seen)
            whole = window >= sampler.nfe
            rows.append({**about, "window": "all" if whole else window, "memory": memory, "rounds": len(seen)})
            rows[-1] |= {"evaluations": evaluations / sampler.nfe, "rmse": rms(made, exact)}
            print(json.dumps(rows[-1]), flush=True)
    return rows


def parareal_rows() -> list[dict[str, Any]]:
    rows, model = [], fewstep.load_model("digits-edm")
    coarse = fewstep.make_grid("karras", model.schedule, 8)
    for solver in ("ddim", "dpm-solver-pp-2m", "unipc-3"):
        fine = fewstep.Sampler.build(solver, coarse.stretched(model.schedule, 64), model.schedule)
        x, labels, seen = start_noise(fine.tableau.nodes, range(BATCH), model.need_shape()), model.labels(range(BATCH)), list[Iterate]()
        exact = run(model, fine.tableau, x, labels)
        outer = fewstep.Sampler.build("ddim", coarse, model.schedule)
        parareal(model, fine, outer, x, labels, tol=0, iterations=4, observe=seen.append)
        rows += [{"solver": solver, "iteration": one.i, "rounds": one.rounds, "rmse": rms(one.x, exact)} for one in seen[1:]]
    return rows


def waiting(model: fewstep.Model) -> Denoiser:
    """A model whose call takes as long for a batch of eight as for one."""

    def answer(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        time.sleep(WAIT)
        return model(x, t, cond)

    return Wrapped(model.schedule, answer)


def clock_rows() -> list[dict[str, Any]]:
    rows = []
    for name in ("digits-edm", "digits-ddpm"):
        model = fewstep.load_model(name)
        sampler, denoiser = fewstep.Sampler.build("ddim", "angle", model.schedule, nfe=64), waiting(model)
        x, labels = start_noise(sampler.tableau.nodes, [0], model.need_shape()), model.labels([0])
        plan = plan_parallel(denoiser, sampler, x, labels)
        begin = time.perf_counter()
        run(denoiser, sampler.tableau, x, labels)
        middle = time.perf_counter()
        sample_in_parallel(denoiser, sampler, x, labels)
        sequential, parallel = middle - begin, time.perf_counter() - middle
        rows.append({"model": name, "faster": sequential / parallel, "expected": plan.seconds[8] / parallel})
    return rows


PARTS = {"picard": picard_rows, "parareal": parareal_rows, "clock": clock_rows}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=list(PARTS), help="parts to make anew")
    args = parser.parse_args()
    stored = json.loads(args.out.read_text()) if args.out.exists() else {}
    made = {**stored, "command": "python benchmarks/parallel_study.py", **{name: PARTS[name]() for name in args.only}}
    write_whole(args.out, (json.dumps(made, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
