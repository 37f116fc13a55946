"""Ways to match distributions, at equal steps: curves of distance, precision, recall, labels and RMSE on a ring and on digits-edm.

python benchmarks/matching_study.py --out benchmarks/results/matching_study.json [--work runs/matching_study] [--only digits/0]

Each row is a run, with its figures at 20 steps and the seconds at each: the number of Langevin steps, cancelled noise, where it starts and
how often the fake is updated. Rows are written one by one, and a killed row continues from its checkpoint. Two processes may share the work
by ``--only``, which names the beginning of a row. Remove the results, and the folder of the work, to measure again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from benchmarks.ring import Ring, ring_data, ring_model
from torch import Tensor

from fewstep import DistillConfig, EMConfig, FlowMapConfig, MatchingConfig, Model, distill, load_model, sample
from fewstep.evaluate.metrics.distances import rmse
from fewstep.evaluate.metrics.judge import Judge
from fewstep.learn.networks.objectives.matching import ABOVE
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.reference import reference_sampler

SEEDS = 3
RINGS = {"ring-6": 6, "ring-25": 25}
STEPS = {"ring-6": 2000, "ring-25": 2000, "digits": 2000}
ON_RING: dict[str, Any] = {"batch": 128, "start": 1.0, "lr": 2e-3, "p_mean": -1.0}  # of small networks, and noise that leaves modes apart
ON_DIGITS: dict[str, Any] = {"batch": 64, "start": 2.5}
COUNTED = range(10_000)  # noises whose samples are counted, mode by mode
REGRESSION = {"steps": 1000, "batch": 64, "num": 16384, "held_out": 512}


@dataclass(frozen=True)
class Watch:
    """A judge that also measures the distance to the ends of the teacher's exact trajectories of the same noises."""

    judge: Judge
    exact: Tensor

    @property
    def identity(self) -> str:
        """That of the judge."""
        return self.judge.identity

    def __call__(self, samples: Tensor, requested: Tensor | None) -> Mapping[str, Any]:
        """Return the judge's figures, and ``rmse``."""
        return {**self.judge(samples, requested), "rmse": rmse(samples, self.exact)}


class Case:
    """A teacher, what judges its students, and students of regression to begin with."""

    def __init__(self, name: str, work: Path, num: int, options: Mapping[str, Any]) -> None:
        self.name, self.work, self.num, self.options = name, work / name, num, options
        self.model = ring_model(RINGS[name]) if name in RINGS else load_model("digits-edm")

    @cached_property
    def watch(self) -> Watch:
        """The judge of all rows."""
        judge = Judge.of(ring_data(RINGS[self.name])) if self.name in RINGS else Judge.of_model(self.model)
        seeds = torch.arange(ABOVE, ABOVE + self.num)
        sampler = reference_sampler(self.model.schedule)
        return Watch(judge, torch.cat([sample(self.model, sampler, seeds=part) for part in seeds.split(256)]))

    @cached_property
    def kd(self) -> Model:
        """A student of plain regression."""
        return self._begin("kd", DistillConfig(**{**REGRESSION, **self.options}))

    @cached_property
    def flow_map(self) -> Model:
        """A flow map."""
        return self._begin("flow-map", FlowMapConfig(max_passes=1, **{**REGRESSION, **self.options}))

    def _begin(self, method: str, config: Any) -> Model:  # noqa: ANN401
        folder = self.work / method
        if (folder / "tuned.json").exists():
            return load_model(folder)
        made = distill(self.model, method, config=config, out=folder)
        assert made is not None
        return made

    def row(self, name: str, config: MatchingConfig, begin: Callable[[], Model] | None) -> dict[str, Any]:
        """Train one student and return its curves; a killed one continues."""
        method = "em" if isinstance(config, EMConfig) else "dmd"
        given = {} if begin is None else {"begin": begin()}
        out = None if self.name in RINGS else self.work / name.replace("/", "-").replace(" ", "-")
        if out is not None and (out / "tuned.json").exists():  # killed after it was saved, and before its row was
            card = json.loads((out / "history.json").read_text())
        else:
            made = distill(self.model, method, config=config, out=out, judge=self.watch, **given)
            assert made is not None
            card = {**made.card, **self.counted(made)}
        keys = ("step", "fd", "precision", "recall", "labels", "rmse", "fake", "teacher")
        curves = {key: [one[key] for one in card["scores"]] for key in keys}
        curves["seconds"] = [card["seconds"] * step / config.steps for step in curves["step"]]
        modes = {key: card[key] for key in ("masses", "near") if key in card}
        return {"method": method, "config": asdict(config), "seconds": card["seconds"], "kept": card["kept"], "curves": curves, **modes}

    def counted(self, student: Model) -> dict[str, Any]:
        """Return the least and the largest mass of a mode of a ring, in those that it should have, and the share of samples near one."""
        if self.name not in RINGS:
            return {}
        ring = self.model.network
        assert isinstance(ring, Ring)
        share, near = ring.counted(sample(student, nfe=1, seeds=COUNTED))
        return {"masses": [float(share.min()) * len(share), float(share.max()) * len(share)], "near": near}


def variants(case: str, steps: int) -> Iterator[tuple[str, MatchingConfig, str | None]]:
    """Yield the name of each run, its configuration, and the student that it begins with."""
    common = {"steps": steps, **(ON_RING if case in RINGS else ON_DIGITS)}
    dmd, em = MatchingConfig(**common), EMConfig(**common)
    yield "dmd", dmd, None
    for langevin in (2, 4, 8):
        yield f"langevin {langevin}", replace(em, langevin=langevin), None
    yield "langevin 4, z stays", replace(em, step_z=0.0), None
    yield "langevin 4, all noise kept", replace(em, cancel=False), None
    for updates in (1, 5):
        yield f"updates {updates}", replace(dmd, updates=updates), None
    for start in (0.5, 2.0) if case in RINGS else (1.0, 5.0):
        yield f"start {start:g}", replace(dmd, start=start), None
    if case == "digits":
        yield "from kd", replace(dmd, start=None), "kd"
        yield "from a flow map", replace(dmd, start=None), "flow_map"


def rows(cases: Mapping[str, Case], steps: Mapping[str, int], seeds: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the name of each row, and what makes it."""
    for key, case in cases.items():
        for seed in range(seeds):
            for name, config, begin in variants(key, steps[key]):
                seeded = replace(config, seed=config.seed + seed, **({"held_out": case.num}))
                first = None if begin is None else lambda case=case, begin=begin: getattr(case, begin)
                row = f"{key}/{seed}/{name}"
                yield row, lambda case=case, row=row, config=seeded, first=first: case.row(row, config, first)


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/matching_study"))
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, help="fewer training steps, to try the study out")
    parser.add_argument("--num", type=int, default=1024, help="held-out noises")
    args = parser.parse_args()
    steps = STEPS if args.steps is None else dict.fromkeys(STEPS, args.steps)
    quick = {} if args.steps is None else {"steps": args.steps, "num": 32, "held_out": 8, "teacher_nfe": 8}
    cases = {name: Case(name, args.work, args.num, quick) for name in STEPS}
    about = {"command": f"python benchmarks/matching_study.py --out {args.out}", "models": list(STEPS), "steps": steps, "num": args.num}
    known: dict[str, Any] = {}
    if args.out.exists():
        known = {row["row"]: row for row in json.loads(args.out.read_text())["rows"]}
    for name, make in rows(cases, steps, SEEDS):
        if name in known or not name.startswith(args.only):
            continue
        made = {"row": name, **make()}
        print(name, made["kept"], flush=True)
        if args.out.exists():  # another process may have written rows since
            known |= {row["row"]: row for row in json.loads(args.out.read_text())["rows"]}
        known[name] = made
        write_whole(args.out, (json.dumps({**about, "rows": list(known.values())}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
