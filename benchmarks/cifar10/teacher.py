"""How good the teacher is: its exact samples and its training pictures, both against the test pictures.

    python -m benchmarks.cifar10.teacher assets/cifar10-16 --out benchmarks/results/cifar10-16/teacher.json --picture docs/teacher.png

Samples end exact trajectories (64 evaluations). Frechet distances are of as many pictures each, in the features of the study's own
classifier: those of training pictures are what a perfect model would have.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.cifar10.features import load_cifar_features
from torch import Tensor, nn

from fewstep import load_model
from fewstep.data.images import Images, load_images
from fewstep.evaluate.metrics.quality import Quality
from fewstep.evaluate.pictures import save_grid
from fewstep.models.generate import sample
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.process import default_device
from fewstep.sampling.reference import reference_sampler

MEASURES = ("fd", "fd_ci", "kd", "precision", "recall", "labels")
BATCH = 256
EVALUATIONS = 64
QUALITY = "## Quality\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"), help="the folder with the pictures")
    parser.add_argument("--num", type=int, default=2048)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    args = parser.parse_args()
    model, device = load_model(args.teacher), default_device()
    network = model.network
    assert isinstance(network, nn.Module)
    size = model.need_shape()[-1]
    train, test = (load_images(args.work / f"cifar10-{size}-{split}.npz") for split in ("train", "test"))
    quality = Quality.of(test.x, load_cifar_features(args.teacher / "features"), device)
    seeds, sampler = range(args.num), reference_sampler(model.schedule, EVALUATIONS)
    rows: list[dict[str, Any]] = [measured("training pictures", train.x[: args.num], labels_of(train, args.num), quality)]
    parts = [seeds[start : start + BATCH] for start in range(0, args.num, BATCH)]
    model.to(device)
    samples = torch.cat([sample(model, sampler, seeds=part).cpu() for part in parts])
    rows.append(measured("exact samples", samples, model.labels(seeds), quality))
    save_grid(samples[:100], args.picture)
    made = {
        "command": shlex.join(["python", "-m", "benchmarks.cifar10.teacher", *sys.argv[1:]]),
        "model": model.fingerprint,
        "parameters": sum(p.numel() for p in network.parameters()),
        "features": quality.name,
        "features_accuracy": json.loads((args.teacher / "features" / "features.json").read_text())["accuracy"],
        "num": args.num,
        "rows": rows,
    }
    write_whole(args.out, (json.dumps(made, indent=1) + "\n").encode())
    card = args.teacher / "README.md"
    write_whole(card, (card.read_text().split(QUALITY)[0].rstrip() + "\n\n" + QUALITY + quality_of(made)).encode())


def quality_of(made: dict[str, Any]) -> str:
    """What the card of the teacher says of its quality and its data."""
    lines = "\n".join(f"| {row['row']} | {row['fd']:.2f} | {row['kd']:.3f} | {row['labels']:.2f} |" for row in made["rows"])
    return f"""
{made["num"]} pictures each against the 10,000 test pictures, in the features of the classifier in `features/` (test accuracy
{made["features_accuracy"]:.1%}), by `{made["command"]}`:

| | Frechet distance | kernel distance | labels as asked |
|---|---|---|---|
{lines}

## Data

CIFAR-10 (Krizhevsky, Nair and Hinton, 2009), re-encoded as JPEG of quality 75 before it came here and, for 16x16, averaged over 2x2
pixels: distances to it are comparable with one another only. The authors offer CIFAR-10 for research and ask to be cited; they
state no licence. The weights are published for research in the same spirit; the code that made them is Apache-2.0.
"""


def labels_of(images: Images, num: int) -> Tensor:
    """Those of the first pictures."""
    assert images.labels is not None
    return images.labels[:num]


def measured(name: str, pictures: Tensor, asked: Tensor | None, quality: Quality) -> dict[str, Any]:
    """One row."""
    found = quality.measure(pictures, asked)
    return {"row": name, **{measure: found[measure] for measure in MEASURES}}


if __name__ == "__main__":
    main()
