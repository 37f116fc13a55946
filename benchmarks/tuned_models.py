"""Phase 2 at 2, 3 and 4 steps, in both of its forms, against phase 1 alone: digits-edm, 1024 fresh noises.

python benchmarks/tuned_models.py --out benchmarks/results/tuned_models [--work runs/tuned]

Each model is tuned by `fewstep finetune digits-edm --nfe N [--form score --data digits --steps 100]` unless ``--work`` has it already.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fewstep import Sampler, load_model, make_solver
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.distances import frechet_distance, load_features, rmse
from fewstep.learn.networks.finetune import FinetuneConfig, finetune
from fewstep.models.generate import sample
from fewstep.models.model import Model
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.reference import reference_sampler

STEPS, FORMS, SEEDS = (2, 3, 4), ("mean", "score"), range(1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/tuned"))
    args = parser.parse_args()
    teacher, problem = load_model("digits-edm"), Problem()
    rows = []
    for nfe in STEPS:
        rows.append({"form": "phase 1 alone", "nfe": nfe, **problem.measure(teacher, nfe)})
        for form in FORMS:
            folder = args.work / (f"digits-edm-{nfe}step" + ("-score" if form == "score" else ""))
            if not (folder / "tuned.json").exists():
                images = load_images("digits") if form == "score" else None
                finetune(
                    teacher, config=FinetuneConfig(nfe=nfe, form=form, steps=100 if form == "score" else 200), out=folder, images=images
                )
            rows.append({"form": form, "nfe": nfe, **problem.measure(load_model(folder), nfe), **alternation(folder)})
    rows.append({"form": "digits-edm-3step", "nfe": 3, **problem.measure(load_model("digits-edm-3step"), 3)})
    results = {
        "command": f"python benchmarks/tuned_models.py --out {args.out}",
        "fd_of_teacher": problem.distance(problem.exact),
        "rows": rows,
    }
    write_whole(args.out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    for row in rows:
        print(row)


class Problem:
    """The teacher's exact trajectories, and the data."""

    def __init__(self) -> None:
        self.data, self.features = load_images("digits").x, load_features("digits", (1, 8, 8))
        teacher = load_model("digits-edm")
        self.exact = self.samples(teacher, reference_sampler(teacher.schedule))

    def samples(self, model: Model, sampler: Sampler) -> torch.Tensor:
        return sample(model, sampler, seeds=SEEDS)

    def distance(self, samples: torch.Tensor) -> float:
        return frechet_distance(self.data, samples, self.features)

    def measure(self, model: Model, nfe: int) -> dict[str, Any]:
        """First-order steps of a model on its own optimised grid."""
        grid = model.optimized("ddim", nfe)
        samples = self.samples(model, Sampler.build(make_solver("ddim"), grid, model.schedule))
        levels = torch.exp(-model.schedule.lam(grid.t)).tolist()
        return {"rmse": rmse(samples, self.exact), "fd": self.distance(samples), "noise_levels": levels}


def alternation(folder: Path) -> dict[str, Any]:
    history = json.loads((folder / "history.json").read_text())
    bounds = [history[0]["bound_before"], *(value for made in history for value in (made["bound_trained"], made["bound"]))]
    return {"bounds": bounds, "seconds_of_rounds": sum(made["seconds"] for made in history)}


if __name__ == "__main__":
    main()
