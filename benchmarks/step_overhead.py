"""Time of one sampling step without the network: ours against diffusers' DPMSolverMultistepScheduler (2M), interleaved.

    python benchmarks/step_overhead.py --out benchmarks/results/step_overhead.json

Both turn a noise prediction into the next state, on the same levels. Ratios are medians over rounds that alternate the two.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler

from fewstep import DiscreteVP, Sampler, TimeGrid, advance, make_solver, to_x0

SHAPES = {(1, 4, 64, 64): 0.5, (16, 3, 256, 256): 1.0}  # shape -> the ratio to stay below
STEPS = 10


def ours(eps: torch.Tensor, start: torch.Tensor) -> float:
    schedule = DiscreteVP.linear()
    tableau = Sampler.build(make_solver("dpm-solver-pp-2m"), TimeGrid.linspace(schedule, STEPS), schedule).tableau
    rows, state, nodes = tableau.rows(start), tableau.start(start), tableau.nodes
    begin = time.perf_counter()
    for i, row in enumerate(rows):
        x0 = to_x0("epsilon", eps, state.x, nodes.alpha[i], nodes.sigma[i])
        state = advance(row, state, x0)
    return (time.perf_counter() - begin) / STEPS


def theirs(eps: torch.Tensor, start: torch.Tensor) -> float:
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(STEPS)
    x = start
    begin = time.perf_counter()
    for t in scheduler.timesteps:
        x = scheduler.step(eps, t, x, return_dict=False)[0]
    return (time.perf_counter() - begin) / STEPS


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, object]:
    """Medians over rounds in which the two take turns, after two rounds to warm up."""
    eps, start = torch.randn(shape), torch.randn(shape)
    pairs = [(ours(eps, start), theirs(eps, start)) for _ in range(rounds + 2)][2:]
    mine, other, ratio = (statistics.median(values) for values in zip(*((a, b, a / b) for a, b in pairs), strict=True))
    return {"shape": shape, "ours_us": mine * 1e6, "diffusers_us": other * 1e6, "ratio": ratio, "bound": SHAPES[shape]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [measure(shape, args.rounds) for shape in SHAPES]
    for row in rows:
        print("{shape}: ours {ours_us:.0f} us, diffusers {diffusers_us:.0f} us, ratio {ratio:.2f} (bound {bound})".format(**row))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
        args.out.write_text(
            json.dumps({"command": "python benchmarks/step_overhead.py", "machine": machine, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
