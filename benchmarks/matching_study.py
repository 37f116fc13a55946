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
from torch import Tensor, nn

from fewstep import DistillConfig, EMConfig, FlowMapConfig, MatchingConfig, Model, VarianceExploding, distill, load_model, sample
from fewstep.evaluate.metrics.distances import rmse
from fewstep.evaluate.metrics.judge import Judge
from fewstep.learn.networks.objectives.matching import ABOVE
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.reference import reference_sampler

SEEDS, MODES, WIDTH = 3, 6, 0.1
STEPS = {"ring": 2000, "digits": 2000}
BATCH = {"ring": 128, "digits": 64}
REGRESSION = {"steps": 1000, "batch": 64, "num": 16384, "held_out": 512}


class Ring(nn.Module):
    """The exact denoiser of six narrow modes on a ring, plus a small network that begins at 0 and can be trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        angle = torch.arange(MODES) * 2 * torch.pi / MODES
        self.register_buffer("modes", torch.stack([angle.cos(), angle.sin()], 1))
        last = nn.Linear(64, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.more = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return ``x0 [B, 2]`` of states ``x [B, 2]`` at noise levels ``t [B]``."""
        level, modes = t[:, None].float(), self.get_buffer("modes")
        spread = level.square() + WIDTH**2
        mean = (-(x[:, None] - modes).square().sum(2) / (2 * spread)).softmax(1) @ modes
        exact = mean + WIDTH**2 / spread * (x - mean)
        return exact + level / (1 + level) * self.more(torch.cat([x / (1 + level), level.log() / 4], 1))


def ring_model() -> Model:
    """Return six modes on a ring as a model to distil."""
    return Model(Ring().eval(), VarianceExploding(0.02, 20.0), "sample", shape=(2,), name="ring")


def ring_data(num: int = 1200) -> Tensor:
    """Return points of the ring, ``[num, 2]``, as many of each mode."""
    modes = Ring().get_buffer("modes")
    return modes[torch.arange(num) % MODES] + WIDTH * torch.randn(num, 2, generator=torch.Generator().manual_seed(1))


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
        self.model = ring_model() if name == "ring" else load_model("digits-edm")

    @cached_property
    def watch(self) -> Watch:
        """The judge of all rows."""
        judge = Judge.of(ring_data()) if self.name == "ring" else Judge.of_model(self.model)
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
        out = None if self.name == "ring" else self.work / name.replace("/", "-").replace(" ", "-")
        if out is not None and (out / "tuned.json").exists():  # killed after it was saved, and before its row was
            card = json.loads((out / "history.json").read_text())
        else:
            made = distill(self.model, method, config=config, out=out, judge=self.watch, **given)
            assert made is not None
            card = dict(made.card)
        keys = ("step", "fd", "precision", "recall", "labels", "rmse", "fake", "teacher")
        curves = {key: [one[key] for one in card["scores"]] for key in keys}
        curves["seconds"] = [card["seconds"] * step / config.steps for step in curves["step"]]
        return {"method": method, "config": asdict(config), "seconds": card["seconds"], "kept": card["kept"], "curves": curves}


def variants(case: str, steps: int) -> Iterator[tuple[str, MatchingConfig, str | None]]:
    """Yield the name of each run, its configuration, and the student that it begins with."""
    common: dict[str, Any] = {"steps": steps, "batch": BATCH[case], "start": 1.0 if case == "ring" else 2.5}
    dmd, em = MatchingConfig(**common), EMConfig(**common)
    yield "dmd", dmd, None
    for langevin in (2, 4, 8):
        yield f"langevin {langevin}", replace(em, langevin=langevin), None
    yield "langevin 4, z stays", replace(em, step_z=0.0), None
    yield "langevin 4, all noise kept", replace(em, cancel=False), None
    for updates in (1, 5):
        yield f"updates {updates}", replace(dmd, updates=updates), None
    for start in (0.5, 2.0) if case == "ring" else (1.0, 5.0):
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
