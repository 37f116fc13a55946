"""Phase 2 at 2, 3 and 4 steps, in both of its forms, against phase 1 alone: digits-edm, 1024 fresh noises.

python benchmarks/tuned_models.py --out benchmarks/results/tuned_models [--work runs/tuned]

Each model is tuned by `fewstep finetune digits-edm --nfe N [--form score --data digits]` unless ``--work`` has it already.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fewstep import load_model
from fewstep.core.artifact import write_whole
from fewstep.evaluate.benchmark import benchmark
from fewstep.evaluate.plan import BenchmarkConfig
from fewstep.learn.finetune import FinetuneConfig, finetune
from fewstep.models.data import load_images

STEPS, FORMS = (2, 3, 4), ("mean", "score")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/tuned"))
    args = parser.parse_args()
    rows = []
    for form in FORMS:
        for nfe in STEPS:
            folder = args.work / (f"digits-edm-{nfe}step" + ("-score" if form == "score" else ""))
            if not (folder / "tuned.json").exists():
                images = load_images("digits") if form == "score" else None
                finetune(load_model("digits-edm"), FinetuneConfig(nfe=nfe, form=form, half=nfe == 3), folder, images=images)
            rows.append(row(folder, form, nfe))
            print(rows[-1])
    for nfe in STEPS:
        rows.append(untuned(args.work, nfe))
        print(rows[-1])
    results = {"command": f"python benchmarks/tuned_models.py --out {args.out}", "rows": rows}
    write_whole(args.out / "results.json", (json.dumps(results, indent=1) + "\n").encode())


def row(folder: Path, form: str, nfe: int) -> dict[str, Any]:
    results = benchmark(load_model(folder), BenchmarkConfig(("ddim",), ("optimized",), (nfe,)), folder / "bench", command="")
    (found,) = results["rows"]
    history = json.loads((folder / "history.json").read_text())
    return {
        "form": form,
        "nfe": nfe,
        "rmse": found["rmse"],
        "fd": found["fd"],
        "fd_of_teacher": results["reference"]["fd"],
        "bounds": [history[0]["bound_before"], *(value for made in history for value in (made["bound_trained"], made["bound"]))],
        "noise_levels": history[-1]["noise_levels"],
        "seconds_of_rounds": sum(made["seconds"] for made in history),
    }


def untuned(work: Path, nfe: int) -> dict[str, Any]:
    """Phase 1 alone: first-order steps of the teacher on its optimised grid."""
    config = BenchmarkConfig(("ddim",), ("optimized",), (nfe,))
    found = next(r for r in benchmark(load_model("digits-edm"), config, work / "untuned", command="")["rows"] if r["nfe"] == nfe)
    return {"form": "phase 1 alone", "nfe": nfe, "rmse": found["rmse"], "fd": found["fd"]}


if __name__ == "__main__":
    main()
