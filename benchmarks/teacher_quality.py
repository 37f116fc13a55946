"""How good the bundled models are: label agreement and Frechet distance of tightly sampled images.

    python benchmarks/teacher_quality.py --out benchmarks/results/teacher_quality.json

Samples with 200 Heun evaluations on the Karras grid, guidance 1. The label is asked for, and read back by the digits feature
network. The Frechet distance (32 digits features) is between the samples and all 1797 scans; the yardstick beside it is that of
one random half of the scans to the other, mean of ten splits.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from fewstep import Sampler, load_model, make_grid, make_solver
from fewstep.core.grid import TimeGrid
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.distances import frechet_distance, load_features
from fewstep.models.generate import sample
from fewstep.models.zoo import BUNDLED
from fewstep.runtime.process import default_device

NFE = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=1797)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    data, features = load_images("digits").x, load_features("digits", (1, 8, 8))
    halves = []
    for seed in range(10):
        first, second = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))].chunk(2)
        halves.append(frechet_distance(first, second, features))
    rows = []
    for name in BUNDLED:
        model = load_model(name)
        schedule, solver = model.schedule, make_solver("heun")
        discrete = schedule.times is not None  # 100 steps of a Karras grid are finer than its times: do not snap
        make = TimeGrid.karras if discrete else lambda schedule, steps: make_grid("karras", schedule, steps)
        sampler = Sampler.build(solver, make(schedule, solver.steps_for(NFE)), schedule)
        seeds = list(range(args.num))
        parts = [seeds[k : k + 256] for k in range(0, args.num, 256)]
        samples = torch.cat([sample(model.to(default_device()), sampler, seeds=p).cpu() for p in parts])
        asked = model.labels(seeds)
        agree = None if asked is None else (features.labels(samples) == asked).float().mean().item()
        fd = frechet_distance(data, samples, features)
        row = {"model": name, "num": args.num, "nfe": NFE, "label_agreement": agree, "fd": fd, "fd_data_halves": statistics.mean(halves)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"command": "python benchmarks/teacher_quality.py", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
