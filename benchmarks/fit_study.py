"""What a fitted sampler needs and what it stands: digits-edm, 1024 fresh noises.

python benchmarks/fit_study.py --out benchmarks/results/fit_study.json [--work runs/fit_study]

Everything is fitted at 5 evaluations but for the last tables. Trajectories and samplers are kept in ``--work``; a killed run continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep import Sampler, load_model, make_grid, make_solver
from fewstep.core.artifact import write_whole
from fewstep.evaluate.generation import generate, solver_for
from fewstep.evaluate.metrics import frechet_distance, load_features
from fewstep.learn.ends import sizes
from fewstep.learn.finetune import FinetuneConfig, finetune
from fewstep.learn.fit import fit
from fewstep.learn.fit_search import FitConfig
from fewstep.learn.fit_solver import FitForm
from fewstep.learn.gram import fine_grid
from fewstep.learn.trajectories import Trajectories, generate_trajectories
from fewstep.models.data import load_images
from fewstep.models.loaders import Model
from fewstep.solvers.reference import reference_sampler

SEEDS, NFE, PLAIN = range(1024), 5, FitConfig()
SCALAR = FitForm(pool="scalar", bias=False)


class Problem:
    """The exact ends of a model's trajectories from fresh noises, and the distances to them and to the data."""

    def __init__(self, model: Model, guidance: float = 1.0) -> None:
        self.model, self.guidance = model, guidance
        self.data, self.features = load_images("digits").x, load_features("digits", model.shape)
        self.exact = self.samples(reference_sampler(model.denoiser.schedule))

    def samples(self, sampler: Sampler) -> torch.Tensor:
        parts = [SEEDS[start : start + 256] for start in range(0, len(SEEDS), 256)]
        denoiser, device = self.model.guided(self.guidance), torch.device("cpu")
        return torch.cat([generate(denoiser, sampler, part, self.model.shape, self.model.labels(part), device) for part in parts])

    def measure(self, sampler: Sampler) -> dict[str, Any]:
        made = self.samples(sampler)
        errors = sizes(made - self.exact)
        return {
            "rmse": float(errors.square().mean().sqrt()),
            "mean_error": float(errors.mean()),
            "share_above_0.1": float((errors > 0.1).double().mean()),
            "fd": frechet_distance(made, self.data, self.features),
        }

    def named(self, solver: str, grid: str, nfe: int) -> Sampler:
        made, schedule = solver_for(solver, self.model, guidance=self.guidance), self.model.denoiser.schedule
        return Sampler.build(made, make_grid(grid, schedule, nfe), schedule)


class Fits:
    """Samplers fitted to one model, from one set of trajectories."""

    def __init__(self, model: Model, work: Path, guidance: float = 1.0, seed: int = PLAIN.seed) -> None:
        self.model, self.work, self.guidance, self.seed = model, work, guidance, seed
        config = replace(PLAIN, seed=seed).trajectories
        config = replace(config, guidance=guidance)
        made = generate_trajectories(model, fine_grid(model.denoiser.schedule, PLAIN.levels), config, work / "trajectories")
        assert made is not None
        self.trajectories: Trajectories = made

    def sampler(self, config: FitConfig, nfe: int = NFE) -> Sampler:
        """Whatever stage the fit chose; the row says which."""
        config = replace(config, seed=self.seed, noises=min(config.noises, config.num))
        folder = self.work / hashlib.sha256(repr(config).encode()).hexdigest()[:12]
        made = fit(self.model, [nfe], config, folder, guidance=self.guidance, trajectories=self.trajectories)
        return made[nfe].sampler


def rows(work: Path) -> Iterator[dict[str, Any]]:
    """One after the other, each with the table that it is for."""
    model = load_model("digits-edm")
    problem, fits = Problem(model), Fits(model, work / "digits-edm")
    yield {"table": "reference", "row": "exact trajectories", "fd": frechet_distance(problem.exact, problem.data, problem.features)}
    for solver in ("unipc-2", "dpm-solver-v3"):
        yield {"table": "reference", "row": f"{solver} on angle", **problem.measure(problem.named(solver, "angle", NFE))}

    def study(table: str, row: str, config: FitConfig, nfe: int = NFE) -> dict[str, Any]:
        sampler = fits.sampler(config, nfe)
        return {"table": table, "row": row, "nfe": nfe, "chosen": sampler.card["chosen"], **problem.measure(sampler)}

    def with_form(config: FitConfig, **changes: Any) -> FitConfig:  # noqa: ANN401
        return replace(config, form=replace(config.form, **changes))

    once, plain = replace(PLAIN, iterations=0), model.fitted(NFE)
    for pool, form in (("scalar", SCALAR), ("element and bias", PLAIN.form)):
        for num in (32, 64, 128, 256, 512, 1024):
            yield study("trajectories", f"in sequence, {pool}, {num}", replace(once, form=form, num=num))
        yield study("trajectories", f"swept, {pool}, 128", replace(PLAIN, form=form, num=128))
    yield {"table": "trajectories", "row": "swept, element and bias, 1024", "nfe": NFE, **problem.measure(plain)}
    for history in (1, 2, 3, 4):
        yield study("history", str(history), with_form(PLAIN, history=history))
    for ridge in (0.0, 1e-8, 1e-6, 1e-4, 1e-2):
        yield study("ridge", f"{ridge:g}", with_form(once, ridge=ridge))
    for shrink in (1e-5, 1e-3, 1e-1, 10.0):
        yield study("shrink", f"{shrink:g}", with_form(once, shrink=shrink))
    for pool in ("scalar", "channel", "element"):
        for bias in (False, True):
            yield study("coefficients", f"{pool}{' and bias' if bias else ''}", with_form(once, pool=pool, bias=bias))
    for nfe in (3, 4, 5):
        for solver in ("unipc-2", "dpm-solver-v3"):
            yield {"table": "few", "row": f"{solver} on angle", "nfe": nfe, **problem.measure(problem.named(solver, "angle", nfe))}
        yield study("few", "in sequence", once, nfe)
        yield {"table": "few", "row": "swept", "nfe": nfe, **problem.measure(model.fitted(nfe))}
    for nfe in (5, 8):
        parent = Sampler.build(make_solver(PLAIN.parent), make_grid("angle", model.denoiser.schedule, nfe), model.denoiser.schedule)
        yield {"table": "levers", "row": "parent on angle", "nfe": nfe, **problem.measure(parent)}
        yield study("levers", "in sequence, scalar, history 2", replace(once, form=replace(SCALAR, history=2)), nfe)
        yield study("levers", "in sequence, scalar, all history", replace(once, form=SCALAR), nfe)
        yield study("levers", "in sequence, element and bias", once, nfe)
        yield study("levers", "swept, scalar", replace(PLAIN, form=SCALAR), nfe)
        yield study("levers", "swept without levels, element and bias", replace(PLAIN, move=False), nfe)
        yield {"table": "levers", "row": "swept, element and bias", "nfe": nfe, **problem.measure(model.fitted(nfe))}

    guided = Problem(model, 2.0)
    for scale, measured in ((1, problem), (2, guided)):
        yield {"table": "guidance", "row": f"used at {scale}, fitted at 1", "nfe": NFE, **measured.measure(plain)}
        yield {"table": "guidance", "row": f"used at {scale}, fitted at 2", "nfe": NFE, **measured.measure(model.fitted(NFE, 2.0))}
        by_hand = measured.named("unipc-2", "angle", NFE)
        yield {"table": "guidance", "row": f"used at {scale}, unipc-2 on angle", "nfe": NFE, **measured.measure(by_hand)}

    other = Fits(model, work / "digits-edm-seed", seed=5_000_000)
    yield {"table": "seed", "row": f"{PLAIN.seed}", "nfe": NFE, **problem.measure(plain)}
    yield {"table": "seed", "row": "5000000", "nfe": NFE, **problem.measure(other.sampler(PLAIN))}
    copy = Problem(tuned_copy(model, work))
    yield {"table": "fine-tuned copy", "row": "fitted to digits-edm", "nfe": NFE, **copy.measure(plain)}
    own = Fits(copy.model, work / "copy").sampler(PLAIN)
    yield {"table": "fine-tuned copy", "row": "fitted to the copy", "nfe": NFE, **copy.measure(own)}
    yield {"table": "fine-tuned copy", "row": "unipc-2 on angle", "nfe": NFE, **copy.measure(copy.named("unipc-2", "angle", NFE))}


def tuned_copy(model: Model, work: Path) -> Model:
    """Trained on by 300 steps of score matching."""
    folder = work / "fine-tuned"
    if not (folder / "tuned.json").exists():
        finetune(model, FinetuneConfig(nfe=NFE, form="score", steps=300, rounds=1), folder, images=load_images("digits"))
    return load_model(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/fit_study"))
    args = parser.parse_args()
    made = []
    for row in rows(args.work):
        print(row, flush=True)
        made.append(row)
    results = {"command": f"python benchmarks/fit_study.py --out {args.out}", "model": "digits-edm", "num": len(SEEDS), "rows": made}
    write_whole(args.out, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
