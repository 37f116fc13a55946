"""A reflected model beside an EDM model of the same network that trained equally long: what keeps pixels inside at guidance 1 to 8.

python benchmarks/reflected_study.py --out benchmarks/results/reflected_study.json [--work runs/reflected_study] [--steps 10000]

Both models of the digits are trained first and kept in the work folder (some hours on one core; a killed run continues). A row is one way
to sample at one guidance scale, by unipc-2 on karras with 20 evaluations: the Frechet distance of the samples in the digits' features, the
share that shows the label that was asked for, and the share of pixels outside [-1, 1] before the last fold or clip. The ways:

reflected              the network mirrored at the walls, folded at the end
reflected, as it is    the same network from the same folded starts, asked at the state itself, wherever that is, and folded at the end
edm, clipped           clipped at the end
edm, static            each answer clipped to [-1, 1], and the sample at the end
edm, dynamic           dynamic thresholding of each answer at its 99.5 % quantile, and clipped at the end

Rows of ``grids`` are the reflected model's on other grids, by fewer and by many evaluations.

Rows are written one by one, so a killed run continues. Remove the results, or name others, to measure with other options.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import Cube, Denoiser, Model, Sampler, dynamic_threshold, load_model, static_threshold, steps
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.quality import Quality
from fewstep.learn.networks.loop import LoopConfig
from fewstep.learn.networks.train import TrainConfig, train
from fewstep.models.problem import Problem
from fewstep.runtime.artifact import write_whole

SCALES, NFE, SOLVER, GRID, BATCH = (1.0, 2.0, 4.0, 8.0), 20, "unipc-2", "karras", 256
GRIDS, COUNTS, UNDER = ("karras", "logsnr", "angle"), (8, 20, 100), (1.0, 4.0)  # of the reflected model; guidance scales
CUBE, KINDS = Cube(), ("reflected", "edm")


def plain(denoiser: Denoiser) -> Denoiser:
    return denoiser


WAYS: dict[str, tuple[str, bool, Callable[[Denoiser], Denoiser]]] = {  # model, whether it keeps its walls, around the guided denoiser
    "reflected": ("reflected", True, plain),
    "reflected, as it is": ("reflected", False, plain),
    "edm, clipped": ("edm", True, plain),
    "edm, static": ("edm", True, static_threshold),
    "edm, dynamic": ("edm", True, dynamic_threshold),
}


def trained(kind: str, work: Path, channels: tuple[int, ...], loop: LoopConfig) -> Model:
    """The model of a kind, loaded from its folder; trained first if it is not there."""
    folder = work / kind
    if not (folder / "unet").exists():

        def say(step: int, loss: float) -> None:
            print(f"{kind}: step {step} of {loop.steps}, loss {loss:.4f}", flush=True)

        command = f"benchmarks/reflected_study.py --steps {loop.steps}"
        train(load_images("digits"), TrainConfig(kind, conditional=True, channels=channels), loop, folder, command=command, observe=say)
    return replace(load_model(folder), name=kind, data="digits")


@torch.no_grad()
def last_states(denoiser: Denoiser, problem: Problem, num: int, folded: bool, grid: str, nfe: int) -> Tensor:
    """The states ``[num, *D]`` after the last evaluation, before they are folded or clipped; from ``folded`` starts or free ones."""
    tableau, made = Sampler.build(SOLVER, grid, problem.schedule, nfe=nfe).tableau, list[Tensor]()
    for first in range(0, num, BATCH):
        seeds = list(range(first, min(first + BATCH, num)))
        x = problem.start(seeds, tableau.nodes)
        x = CUBE.fold(x)[0] if folded else x
        for step in steps(denoiser, tableau, x, problem.cond(seeds), seeds=seeds):
            x = step.x_next
        made.append(x.cpu())
    return torch.cat(made)


def row_of(way: str, scale: float, model: Model, num: int, quality: Quality, grid: str = GRID, nfe: int = NFE) -> dict[str, Any]:
    """One way to sample at one scale, measured."""
    kind, walls, around = WAYS[way]
    asked = model if walls else replace(model, domain=None)
    problem = Problem(asked, scale)
    denoiser: Any = around(problem.denoiser)  # type: ignore[arg-type] - no student
    states = last_states(denoiser, problem, num, kind == "reflected", grid, nfe)
    samples = CUBE.fold(states)[0] if kind == "reflected" else states.clamp(CUBE.low, CUBE.high)
    measured = quality.measure(samples, problem.labels(list(range(num))))
    found = {key: measured[key] for key in ("fd", "fd_ci", "kd", "labels")}
    return {"way": way, "guidance": scale, "grid": grid, "nfe": nfe, "num": num, "outside": CUBE.outside(states), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/reflected_study"))
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--channels", default="48,64")
    parser.add_argument("--num", type=int, default=1024, help="samples of each row")
    args = parser.parse_args()
    channels = tuple(int(width) for width in args.channels.split(","))
    about = {"steps": args.steps, "batch": args.batch, "seed": args.seed, "channels": list(channels), "num": args.num}
    about |= {"solver": SOLVER, "grid": GRID}
    results: dict[str, Any] = {"about": about, "rows": [], "grids": []}
    if args.out.exists():
        results = json.loads(args.out.read_text())
        if results["about"] != about:
            raise SystemExit(f"{args.out} was measured with other options, {results['about']}: name another --out, or remove it")
    loop = LoopConfig(steps=args.steps, batch=args.batch, seed=args.seed)
    models = {kind: trained(kind, args.work, channels, loop) for kind in KINDS}
    quality = Quality.of(load_images("digits").x, "digits", torch.device("cpu"))
    results["data_halves"] = quality.halves
    planned = [("rows", way, scale, GRID, NFE) for way in WAYS for scale in SCALES]
    planned += [("grids", KINDS[0], scale, grid, nfe) for scale in UNDER for grid in GRIDS for nfe in COUNTS]
    done = {(part, row["way"], row["guidance"], row.get("grid", GRID), row["nfe"]) for part in ("rows", "grids") for row in results[part]}
    for part, way, scale, grid, nfe in planned:
        if (part, way, scale, grid, nfe) in done:
            continue
        row = row_of(way, scale, models[WAYS[way][0]], args.num, quality, grid, nfe)
        print(f"{way}, guidance {scale:g}, {nfe} on {grid}: Frechet {row['fd']:.2f}, outside {row['outside']:.2%}", flush=True)
        results[part].append(row)
        write_whole(args.out, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
