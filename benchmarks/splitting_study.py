"""Errors of guidance by a classifier, joint and split, in few evaluations.

    python benchmarks/splitting_study.py --out benchmarks/results/splitting_study.json

``digits-edm`` without its labels, 32 noises, guided by two classifiers of noisy digits: the bundled one, trained at all levels, and one
trained for 1500 steps at EDM's levels, of which hardly any is above 10. The error is the median RMSE to 120 evaluations of Heun's method
on the jointly guided ODE. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fewstep
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.features import load_digits_features
from fewstep.models.classifier import NoisyClassifier, load_classifier
from fewstep.models.guidance import Wrapped
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.loop import run
from fewstep.sampling.noise import start_noise

NUM, COUNTS, SCALES, STEPS = 32, (5, 8), (2.0, 10.0), 1500


def of_usual_levels() -> NoisyClassifier:
    """Train a classifier as people do, at the levels that the model was trained at."""
    torch.manual_seed(0)
    digits, generator, network = load_images("digits"), torch.Generator().manual_seed(0), NoisyClassifier()
    assert digits.labels is not None
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(STEPS):
        index = torch.randint(len(digits.x), (128,), generator=generator)
        s = torch.exp(-1.2 + 1.2 * torch.randn(128, generator=generator))
        x = digits.dequantised(index, generator)
        loss = cross_entropy(network(x + s[:, None, None, None] * torch.randn(x.shape, generator=generator), s), digits.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


@torch.no_grad()
def rows_of(name: str, network: NoisyClassifier, scale: float) -> list[dict[str, Any]]:
    model, features = fewstep.load_model("digits-edm"), load_digits_features()
    law, labels, null = model.schedule, torch.arange(NUM) % 10, torch.full((NUM,), model.null_label or 0)
    denoiser, log_prob = Wrapped(law, lambda x, t, cond: model(x, t, null)), network.log_prob(model.schedule)
    joint = fewstep.classifier_guided(denoiser, log_prob, scale)
    sampler = lambda solver, nfe: fewstep.Sampler.build(solver, "angle", law, nfe=nfe)  # noqa: E731
    x = start_noise(sampler("ddim", 5).tableau.nodes, range(NUM), model.need_shape())
    exact = run(joint, fewstep.Sampler.build("heun", "karras", law, nfe=120).tableau, x, labels)

    def as_asked(made: Tensor) -> float:
        return float((features.labels(made) == labels).float().mean())

    def split(solver: str | fewstep.Sampler, nfe: int, **options: str) -> Tensor:
        made = sampler(solver, nfe) if isinstance(solver, str) else solver
        return fewstep.sample_split(denoiser, made, x, log_prob, scale, guide=labels, splitting=fewstep.Splitting(**options))

    ways: dict[str, Callable[[int], Tensor]] = {
        "joint, ddim": lambda nfe: run(joint, sampler("ddim", nfe).tableau, x, labels),
        "joint, dpm-solver-pp-2m": lambda nfe: run(joint, sampler("dpm-solver-pp-2m", nfe).tableau, x, labels),
        "joint, unipc-2": lambda nfe: run(joint, sampler("unipc-2", nfe).tableau, x, labels),
        "Lie, ddim, frozen kick": lambda nfe: split("ddim", nfe, form="frozen"),
        "Lie, ddim": lambda nfe: split("ddim", nfe),
        "Lie, dpm-solver-pp-2m": lambda nfe: split("dpm-solver-pp-2m", nfe),
        "Strang, dpm-solver-pp-2m": lambda nfe: split("dpm-solver-pp-2m", nfe, scheme="strang"),
        "Lie, fitted": lambda nfe: split(model.fitted(nfe, 1.0), nfe),
    }
    rows = [{"classifier": name, "scale": scale, "way": "exact", "nfe": None, "error": 0.0, "as_asked": as_asked(exact)}]
    for way, make in ways.items():
        for nfe in COUNTS:
            made = make(nfe)
            error = float((made - exact).square().flatten(1).mean(1).sqrt().median())
            rows.append({"classifier": name, "scale": scale, "way": way, "nfe": nfe, "error": error, "as_asked": as_asked(made)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    classifiers = {"all levels": load_classifier(), "usual levels": of_usual_levels()}
    rows = [row for name, network in classifiers.items() for scale in SCALES for row in rows_of(name, network, scale)]
    write_whole(args.out, (json.dumps({"command": "python benchmarks/splitting_study.py", "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
