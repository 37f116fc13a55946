"""What a fitted sampler needs and what it stands: digits-edm, 1024 fresh noises.

python benchmarks/fit_study.py --out benchmarks/results/fit_study.json [--work runs/fit_study]

Most is fitted at 5 evaluations. Each row is written when it is there, and trajectories and samplers are kept in ``--work``: a killed run
continues. Remove the results to measure again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fewstep import Sampler, load_model, make_grid
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.distances import frechet_distance, load_features
from fewstep.learn.networks.finetune import FinetuneConfig, finetune
from fewstep.learn.samplers.fit import FitConfig, fit
from fewstep.learn.search.coefficients import FitForm
from fewstep.learn.search.endpoint import per_sample_rmse
from fewstep.learn.teacher.gram import fine_grid
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, generate_trajectories
from fewstep.models.generate import sample, solver_for
from fewstep.models.model import Model
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.reference import reference_sampler

SEEDS, NFE, PLAIN = range(1024), 5, FitConfig(num=1024, held_out=512, levels=64, noises=256, iterations=2, batch=128)
SCALAR = FitForm(pool="scalar", bias=False)
ONCE = replace(PLAIN, iterations=0)  # in sequence only
Row = tuple[str, str, int, Callable[[], dict[str, Any]]]  # table, row, evaluations, and what makes the figures


class Study:
    """A model at a guidance scale: the exact ends of fresh noises, and the samplers fitted to it from one set of trajectories."""

    def __init__(self, model: Callable[[], Model], work: Path, guidance: float = 1.0, seed: int = PLAIN.seed) -> None:
        self.make, self.work, self.guidance, self.seed = model, work, guidance, seed

    @cached_property
    def model(self) -> Model:
        return self.make()

    @cached_property
    def exact(self) -> torch.Tensor:
        return self.samples(reference_sampler(self.model.schedule))

    @cached_property
    def trajectories(self) -> Trajectories:
        config = TrajectoryConfig(1024 + 512, 64, seed=self.seed, guidance=self.guidance, batch=128)
        made = generate_trajectories(self.model, fine_grid(self.model.schedule, config.nfe), self.work / "trajectories", config=config)
        assert made is not None
        return made

    def samples(self, sampler: Sampler) -> torch.Tensor:
        parts = [SEEDS[start : start + 256] for start in range(0, len(SEEDS), 256)]
        return torch.cat([sample(self.model, sampler, seeds=part, guidance=self.guidance) for part in parts])

    def measure(self, sampler: Sampler) -> dict[str, Any]:
        made = self.samples(sampler)
        errors = per_sample_rmse(made - self.exact)
        return {
            "rmse": float(errors.square().mean().sqrt()),
            "mean_error": float(errors.mean()),
            "share_above_0.1": float((errors > 0.1).double().mean()),
            **distance(made),
        }

    def hand_made(self, solver: str, nfe: int) -> dict[str, Any]:
        """A solver on the angle grid."""
        made, schedule = solver_for(solver, self.model, guidance=self.guidance), self.model.schedule
        return self.measure(Sampler.build(made, make_grid("angle", schedule, nfe), schedule))

    def sampler(self, config: FitConfig, nfe: int) -> Sampler:
        """Whatever stage the fit chose; the row says which."""
        config = replace(config, seed=self.seed, noises=min(256, config.num or 256))
        folder = self.work / hashlib.sha256(repr(config).encode()).hexdigest()[:12]
        return fit(self.model, nfe, config=config, out=folder, guidance=self.guidance, trajectories=self.trajectories)[nfe]

    def fitted(self, config: FitConfig, nfe: int, measured: Study | None = None) -> dict[str, Any]:
        sampler = self.sampler(config, nfe)
        return {"chosen": sampler.card["chosen"], **(measured or self).measure(sampler)}


def distance(made: torch.Tensor) -> dict[str, float]:
    return {"fd": frechet_distance(made, load_images("digits").x, load_features("digits", tuple(made.shape[1:])))}


def rows(work: Path) -> Iterator[Row]:
    """In the order of the tables."""
    plain = Study(lambda: load_model("digits-edm"), work / "digits-edm")

    def fitted(table: str, row: str, config: FitConfig, nfe: int = NFE) -> Row:
        return table, row, nfe, lambda: plain.fitted(config, nfe)

    def bundled(table: str, row: str, nfe: int = NFE, study: Study = plain, scale: float = 1.0) -> Row:
        """The sampler in the model's folder, which has the default configuration."""
        return table, row, nfe, lambda: study.measure(plain.model.fitted(nfe, scale))

    def by_hand(table: str, row: str, solver: str, nfe: int = NFE, study: Study = plain) -> Row:
        return table, row, nfe, lambda: study.hand_made(solver, nfe)

    def formed(config: FitConfig, **changes: Any) -> FitConfig:  # noqa: ANN401
        return replace(config, form=replace(config.form, **changes))

    yield "reference", "exact trajectories", 128, lambda: distance(plain.exact)
    for solver in ("unipc-2", "dpm-solver-v3"):
        yield by_hand("reference", f"{solver} on angle", solver)
    for pool, form in (("scalar", SCALAR), ("element and bias", PLAIN.form)):
        for num in (32, 64, 128, 256, 512, 1024):
            yield fitted("trajectories", f"in sequence, {pool}, {num}", replace(ONCE, form=form, num=num))
        yield fitted("trajectories", f"swept, {pool}, 128", replace(PLAIN, form=form, num=128))
    yield bundled("trajectories", "swept, element and bias, 1024")
    for history in (1, 2, 3, 4):
        yield fitted("history", str(history), formed(PLAIN, history=history))
    for ridge in (0.0, 1e-8, 1e-6, 1e-4, 1e-2):
        yield fitted("ridge", f"{ridge:g}", formed(ONCE, ridge=ridge))
    for shrink in (1e-5, 1e-3, 1e-1, 10.0):
        yield fitted("shrink", f"{shrink:g}", formed(ONCE, shrink=shrink))
    for pool in ("scalar", "channel", "element"):
        for bias in (False, True):
            yield fitted("coefficients", f"{pool}{' and bias' if bias else ''}", formed(ONCE, pool=pool, bias=bias))
    for nfe in (3, 4, 5):
        for solver in ("unipc-2", "dpm-solver-v3"):
            yield by_hand("few", f"{solver} on angle", solver, nfe)
        yield fitted("few", "in sequence", ONCE, nfe)
        yield bundled("few", "swept", nfe)
    for nfe in (5, 8):
        yield by_hand("levers", "parent on angle", PLAIN.parent, nfe)
        yield fitted("levers", "in sequence, scalar, history 2", replace(ONCE, form=replace(SCALAR, history=2)), nfe)
        yield fitted("levers", "in sequence, scalar, all history", replace(ONCE, form=SCALAR), nfe)
        yield fitted("levers", "in sequence, element and bias", ONCE, nfe)
        yield fitted("levers", "swept, scalar", replace(PLAIN, form=SCALAR), nfe)
        yield fitted("levers", "swept without levels, element and bias", replace(PLAIN, move=False), nfe)
        yield bundled("levers", "swept, element and bias", nfe)
    guided = Study(lambda: load_model("digits-edm"), work / "digits-edm-guided", 2.0)
    for scale, study in ((1, plain), (2, guided)):
        for fitted_at in (1.0, 2.0):
            yield bundled("guidance", f"used at {scale}, fitted at {fitted_at:g}", NFE, study, fitted_at)
        yield by_hand("guidance", f"used at {scale}, unipc-2 on angle", "unipc-2", NFE, study)
    other = Study(lambda: load_model("digits-edm"), work / "digits-edm-seed", seed=5_000_000)
    yield bundled("seed", f"{PLAIN.seed}")
    yield "seed", "5000000", NFE, lambda: other.fitted(PLAIN, NFE, measured=plain)
    copy = Study(lambda: tuned_copy(plain.model, work), work / "copy")
    yield bundled("fine-tuned copy", "fitted to digits-edm", NFE, copy)
    yield "fine-tuned copy", "fitted to the copy", NFE, lambda: copy.fitted(PLAIN, NFE)
    yield by_hand("fine-tuned copy", "unipc-2 on angle", "unipc-2", NFE, copy)


def tuned_copy(model: Model, work: Path) -> Model:
    """Trained on by 300 steps of score matching."""
    folder = work / "fine-tuned"
    if not (folder / "tuned.json").exists():
        finetune(model, config=FinetuneConfig(nfe=NFE, form="score", steps=300, rounds=1), out=folder, images=load_images("digits"))
    return load_model(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/fit_study"))
    args = parser.parse_args()
    results = {"command": f"python benchmarks/fit_study.py --out {args.out}", "model": "digits-edm", "num": len(SEEDS), "rows": []}
    if args.out.exists():
        results["rows"] = json.loads(args.out.read_text())["rows"]
    made = {(row["table"], row["row"], row["nfe"]): row for row in results["rows"]}
    for table, name, nfe, make in rows(args.work):
        if (table, name, nfe) not in made:
            made[table, name, nfe] = {"table": table, "row": name, "nfe": nfe, **make()}
            print(made[table, name, nfe], flush=True)
            results["rows"] = list(made.values())
            write_whole(args.out, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
