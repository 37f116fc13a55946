"""Methods for inverse problems on CIFAR-10 test pictures, which the network has not seen.

    python benchmarks/restoration_study.py

restores the first 512 at 16x16 by `assets/cifar10-16` and adds a row for each method to benchmarks/results/restoration/results.json. Rows
that are there already are not made again, so a run that was killed goes on. The pictures are those of `python -m benchmarks.cifar10.data`.

`--picture docs/restoration.png` draws some of them from the pictures that a run leaves beside its rows.

All rows have one sample of each picture. Those of at most 24 evaluations have 19 samples of the first 32 pictures too, for the mean and the
coverage. The first method of a task is what the others are compared with, picture by picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import fewstep
from fewstep.apps.console import progress
from fewstep.evaluate.pictures import save_comparison
from fewstep.evaluate.restoration.plan import RestorationBenchConfig, planned_restorations, restoration_cost
from fewstep.evaluate.restoration.rows import PSEUDO_INVERSE, by_task, read_restorations, read_row_file, row_file
from fewstep.evaluate.restoration.run import bench_restorations
from fewstep.models.problem import Problem

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "restoration"
TASKS = ("upscale", "inpaint:box=8", "deblur", "clip")
ACROSS = 4  # pictures of a cell
FEW = 24  # evaluations up to which rows have several samples of a picture

Rows = Sequence[tuple[str, str, int]]  # method, solver, evaluations

MAIN: Rows = [
    ("projection", "ddim:eta=1", 100),  # DDNM's form
    ("moments", "ddim", 10),
    ("moments", "ddim", 16),
    ("moments", "ddim", 50),
    ("spectral", "ddim", 5),
    ("spectral", "ddim", 10),
    ("spectral", "ddim:eta=1", 5),
    ("spectral", "ddim", 24),
    ("projection", "ddim", 5),
    ("projection", "ddim", 10),
]
MORE: Rows = [
    ("projection", "ddim", 24),
    ("moments:steps=2", "ddim", 24),
    ("moments", "ddim:eta=1", 10),
    ("moments", "ddim:eta=1", 16),
    ("moments", "unipc-2", 16),
    ("constrained", "ddim", 55),
    ("moments", "ddim", 100),
    ("pigdm", "ddim", 8),
]
SLOW: Rows = [
    ("pigdm", "ddim:eta=1", 24),
    ("proximal", "ddim:eta=1", 100),  # DiffPIR's form
    ("dps", "ddim:eta=1", 50),
]


SHOWN = {
    ("projection", "ddim:eta=1", 100): "projection, 100",
    ("pigdm", "ddim:eta=1", 24): "PiGDM, 24 + 24 back",
    ("constrained", "ddim", 55): "constrained, 55",
    ("spectral", "ddim", 5): "spectral, 5",
    ("moments", "ddim", 10): "moments, 10",
    ("moments", "ddim", 100): "moments, 100",
}


def draw(folder: Path, path: Path) -> None:
    """Draw the truth, what was measured and what methods made of it, a column for each task."""
    cells = dict[tuple[str, str], tuple[Tensor, str]]()
    for task, rows in by_task(read_restorations(folder / "results.json").rows).items():
        column = task.split(":")[0]
        found = {(row.method, row.solver, row.planned): read_row_file(row_file(folder, row)) for row in rows}
        zero = found[PSEUDO_INVERSE, "", 0]
        assert zero is not None, "no pictures: run the study first"
        y = torch.nn.functional.interpolate(zero["y"], size=zero["truth"].shape[-2:])
        cells |= {("truth", column): (zero["truth"], ""), ("measured", column): (y, "")}
        for key, name in {(PSEUDO_INVERSE, "", 0): "pseudo-inverse", **SHOWN}.items():
            if (kept := found.get(key)) is not None:
                cells[name, column] = (kept["x"], f"{float(kept['psnr'][:ACROSS].mean()):.1f} dB")
    save_comparison(cells, path, title="CIFAR-10 test pictures at 16x16: one sample of each method", across=ACROSS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=str(ROOT / "runs" / "cifar10" / "cifar10-16-test.npz"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--picture", type=Path, help="draw rows that are there, and make none")
    parser.add_argument("--num", type=int, default=512, help="pictures")
    args = parser.parse_args()
    if args.picture is not None:
        draw(args.out, args.picture)
        return
    sys.path.insert(0, str(ROOT))
    problem = Problem(fewstep.load_model(ROOT / "assets" / "cifar10-16"))
    for rows in (MAIN, MORE, SLOW):
        for task in TASKS:
            for method, solver, nfe in rows:
                config = RestorationBenchConfig(
                    (task,),
                    (method,),
                    (solver,),
                    (nfe,),
                    num=args.num,
                    samples=19 if nfe <= FEW else 1,
                    data=args.data,
                    features="benchmarks.cifar10.features:network",
                )
                total, _ = restoration_cost(planned_restorations(problem, config)[0], config)
                with progress(f"{task}, {method} {solver} {nfe}", total) as report:
                    bench_restorations(problem, config, args.out, command="python benchmarks/restoration_study.py", on_progress=report)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
