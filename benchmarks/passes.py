"""Whether a student's error falls from pass to pass: bootstrap draws of the noises of a benchmark.

python benchmarks/passes.py digits-flow-map digits-edm --out benchmarks/results/passes.json

For each number of passes the RMSE to the teacher's exact ends, its interval over draws of the noises, and the share of draws in which it is
below that of the number of passes before, and of one pass.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import Model, load_model, sample
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.reference import reference_sampler

FRESH, PASSES, DRAWS = range(1024), (1, 2, 3, 4, 5, 6, 8), 2000


def made(model: Model, **options: Any) -> Tensor:  # noqa: ANN401 - of `sample`
    return torch.cat([sample(model, **options, seeds=part) for part in torch.tensor(FRESH).split(256)])


def passes(student: Model, teacher: Model) -> list[dict[str, Any]]:
    """Measure a student's passes on the same noises, drawn again and again."""
    exact = made(teacher, what=reference_sampler(teacher.schedule))
    squares = torch.stack([(made(student, nfe=n) - exact).double().square().flatten(1).mean(1) for n in PASSES])  # [passes, noises]
    drawn = torch.randint(len(FRESH), (DRAWS, len(FRESH)), generator=torch.Generator().manual_seed(0))
    errors = squares[:, drawn].mean(2).sqrt()  # [passes, draws]
    low, high = torch.quantile(errors, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)
    rows = [
        {"passes": n, "rmse": float(square.mean().sqrt()), "interval": [float(low[k]), float(high[k])]}
        for k, (n, square) in enumerate(zip(PASSES, squares, strict=True))
    ]
    for (k, _), (later, _) in pairwise(enumerate(PASSES)):
        rows[later]["below the one before"] = float((errors[later] < errors[k]).double().mean())
        rows[later]["below one pass"] = float((errors[later] < errors[0]).double().mean())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = passes(load_model(args.student), load_model(args.teacher))
    about = {"command": f"python benchmarks/passes.py {args.student} {args.teacher} --out {args.out}", "draws": DRAWS}
    write_whole(args.out, (json.dumps({**about, "rows": rows}, indent=1) + "\n").encode())
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
