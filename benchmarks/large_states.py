"""Memory, disk and time of the learners for large samples, with a network that costs next to nothing.

python benchmarks/large_states.py --out benchmarks/results/large_states.json

The shapes are those of SDXL at 1024 x 1024, Flux at 1024 x 1024, and Wan at 480 x 832 with 81 frames. Each row is a process of its own.
Rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import fewstep
from fewstep.runtime.artifact import write_whole

SHAPES = ((4, 128, 128), (16, 128, 128), (16, 21, 60, 104))
VERBS = ("fit", "optimize", "calibrate")
COUNTS, BUDGET = [5, 8], 3000
SPENT = {"seconds": 0.0, "evaluations": 0}  # by the network


class Cheap(nn.Module):
    """A network whose answer is not linear in the state, and which takes a few operations for each number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        begin = time.perf_counter()
        answer = 1.1 * torch.tanh(x * self.weight / (1 + t.reshape(-1, *(1,) * (x.ndim - 1))))
        answer = answer + 0.2 * torch.sin(3 * answer.roll(1, -1))
        SPENT["seconds"] += time.perf_counter() - begin
        SPENT["evaluations"] += len(x)
        return answer


def run(verb: str, shape: tuple[int, ...]) -> dict[str, Any]:
    model = fewstep.Model(Cheap(), fewstep.VarianceExploding(t_min=0.01, t_max=80.0), "sample", shape=shape, name="large")
    with TemporaryDirectory() as folder:
        most, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                most[0] = max(most[0], sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")))

        threading.Thread(target=watch, daemon=True).start()
        begin = time.perf_counter()
        if verb == "fit":
            fewstep.fit(model, COUNTS, config=fewstep.FitConfig(budget=BUDGET), out=folder)
        elif verb == "optimize":
            fewstep.optimize(model, "unipc-2", COUNTS, config=fewstep.OptimizeConfig(budget=BUDGET), out=folder)
        else:
            levels = 20
            batch = max(1, 2**18 // math.prod(shape))
            config = fewstep.CalibrationConfig(levels=levels, num=BUDGET // (2 * levels), batch=batch)
            fewstep.calibrate(model, config=config, out=folder)
        total = time.perf_counter() - begin
        done.set()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"total": total, "outside": total - SPENT["seconds"], "evaluations": SPENT["evaluations"], "memory": memory, "disk": most[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", nargs="+", help="a verb and a shape: this row alone, on stdout")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(run(args.row[0], tuple(map(int, args.row[1:])))))  # noqa: T201
        return
    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for shape in SHAPES:
        for verb in VERBS:
            if any(row["verb"] == verb and tuple(row["shape"]) == shape for row in rows):
                continue
            command = [sys.executable, __file__, "--row", verb, *map(str, shape)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append({"verb": verb, "shape": shape, **json.loads(answer.splitlines()[-1])})
            whole = {"command": "python benchmarks/large_states.py", "rows": rows}
            write_whole(args.out, (json.dumps(whole, indent=1) + "\n").encode())
            print(rows[-1], flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
