"""Ways to train a student for any number of passes, or for any guidance scale, at equal training time: digits-edm.

python benchmarks/student_study.py --out benchmarks/results/student_study.json [--work runs/student_study] [--only targets/0]

`targets` trains a flow map by each of its targets, and plain knowledge distillation, for as long as `STEPS` steps of the target
`trajectory` take (by `pace`: a few steps of each, side by side), those of `AGAIN` with three seeds; `longer` does so for the best of them,
four times as long; `options` changes one thing at a time at equal steps; `states` teaches guided students at different states, `guided` by
other errors. Rows are written one by one, so a killed run continues, and two processes may share the work by ``--only``, which names the
beginning of a row. Remove the results to measure again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fewstep import (
    DistillConfig,
    FlowMapConfig,
    GuidedConfig,
    Model,
    Trajectories,
    TrajectoryConfig,
    distill,
    generate_trajectories,
    load_model,
    make_grid,
    sample,
)
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.distances import frechet_distance, rmse
from fewstep.evaluate.metrics.features import load_digits_features
from fewstep.models.networks.operator import OperatorForm
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.reference import reference_sampler

FRESH = range(1024)  # noises that rows are measured on
STEPS, BATCH, NUM, HELD_OUT, PASSES = 1000, 64, 16384, 512, (1, 2, 4)
SEEDS, AGAIN = 3, ("kd", "trajectory", "trajectory, own states")  # the targets that are trained with each seed; the others with one
COMMON = {"steps": STEPS, "batch": BATCH, "held_out": HELD_OUT}
MAP = FlowMapConfig(max_passes=4, num=NUM, **COMMON)
ONE = DistillConfig(slots=1, form=OperatorForm(anywhere=False), num=NUM, **COMMON)
GUIDED = GuidedConfig(slots=16, **COMMON)

TARGETS: dict[str, FlowMapConfig | DistillConfig] = {
    "kd": ONE,
    "trajectory": MAP,
    "trajectory, own states": replace(MAP, own=0.5),
    "eulerian": replace(MAP, target="eulerian"),
    "consistency": replace(MAP, target="consistency"),
    "semigroup": replace(MAP, target="semigroup"),
    "lagrangian": replace(MAP, target="lagrangian"),
    "lagrangian, noised": replace(MAP, target="lagrangian", states="noised"),
    "lagrangian-jvp": replace(MAP, target="lagrangian-jvp"),
    "eulerian-jvp": replace(MAP, target="eulerian-jvp"),
    "matching": replace(MAP, target="matching"),
}
OPTIONS: dict[str, FlowMapConfig] = {
    "own 0.25": replace(MAP, own=0.25),
    "own 0.5": replace(MAP, own=0.5),
    "own 1": replace(MAP, own=1.0),
    "first and last 0.7": replace(MAP, first=0.7, last=0.7),
    "a quarter of the trajectories": replace(MAP, num=NUM // 4),
    "half as many slots": replace(MAP, slots=8),
    "loss l2": replace(MAP, loss="l2"),
    "ema 0.9999": replace(MAP, ema=0.9999),
    "lr 0.002": replace(MAP, lr=2e-3),
}
STATES = {name: replace(GUIDED, states=name) for name in ("fresh", "guided", "data")}
LONGER = ("kd", "trajectory, own states"), 4  # times as long
ERRORS = {
    "loss l2": replace(GUIDED, loss="l2"),
    "weights equal": replace(GUIDED, weights="equal"),
    "weights equal, loss l2": replace(GUIDED, weights="equal", loss="l2"),
    "batch 128": replace(GUIDED, batch=128),
    "lr 0.001": replace(GUIDED, lr=1e-3),
    "lr 0.002": replace(GUIDED, lr=2e-3),
}
STATES |= {name: replace(GUIDED, states=name, num=NUM) for name in ("teacher", "noised")}


class Study:
    """A teacher, its trajectories, and the rows that are there."""

    def __init__(self, work: Path) -> None:
        self.work, self.model, self.features, self.images = work, load_model("digits-edm"), load_digits_features(), load_images("digits")

    @cached_property
    def trajectories(self) -> Trajectories:
        config = TrajectoryConfig(NUM + HELD_OUT, MAP.teacher_nfe, seed=MAP.seed)
        grid = make_grid("angle", self.model.schedule, MAP.slots)
        show = lambda done, note: print(done, note, flush=True)  # noqa: E731
        made = generate_trajectories(self.model, grid, self.work / "trajectories", config=config, on_progress=show)
        assert made is not None
        return made

    def train(self, config: Any, **options: Any) -> Model:  # noqa: ANN401 - any configuration of a student
        """Distil a student by a configuration, in memory."""
        method = {FlowMapConfig: "flow-map", DistillConfig: "kd", GuidedConfig: "guided"}[type(config)]
        pictures = (getattr(config, "target", None) == "matching") or (getattr(config, "states", None) == "data")
        stored = method != "guided" or config.states in ("teacher", "noised")
        given = {"trajectories": self.trajectories if stored and not pictures else None, "images": self.images if pictures else None}
        made = distill(self.model, method, config=config, **given, **options)
        assert made is not None
        return made

    def pace(self) -> dict[str, Any]:
        """Measure the seconds of a training step of each target: medians over steps that take turns."""
        seconds: dict[str, list[float]] = {name: [] for name in TARGETS}
        for _turn in range(3):
            for name, config in TARGETS.items():
                ticks: list[float] = []
                tick = lambda step, note, ticks=ticks: ticks.append(time.monotonic())  # noqa: E731
                self.train(replace(config, steps=8, held_out=4, num=NUM, seed=config.seed), on_progress=tick)
                seconds[name] += [after - before for before, after in pairwise(ticks[-8:])]
        return {name: median(found) for name, found in seconds.items()}

    def student(self, config: Any) -> dict[str, Any]:  # noqa: ANN401
        """Train a student, and measure its passes on noises that nothing was chosen with."""
        made = self.train(config)
        found = {"steps": config.steps, "seconds": made.card["seconds"], "trained_on": made.card.get("trained_on")}
        for n in PASSES if isinstance(config, FlowMapConfig) else (1,):
            found |= {f"{key}-{n}": value for key, value in self.figures(made, n).items()}
        return found

    def figures(self, student: Model, nfe: int) -> dict[str, float]:
        """Measure so many passes: RMSE to the teacher's exact ends, mean error, Frechet distance, labels as asked."""
        made = torch.cat([sample(student, nfe=nfe, seeds=part) for part in torch.tensor(FRESH).split(256)])
        labels = self.model.labels(FRESH)
        assert labels is not None
        error = (made - self.exact).flatten(1).double().square().mean(1).sqrt()
        agree = float((self.features.labels(made) == labels).double().mean())
        return {
            "rmse": rmse(made, self.exact),
            "mean": float(error.mean()),
            "fd": frechet_distance(self.images.x, made, self.features),
            "labels": agree,
        }

    @cached_property
    def exact(self) -> Tensor:
        """The ends of the teacher's exact trajectories."""
        sampler = reference_sampler(self.model.schedule)
        return torch.cat([sample(self.model, sampler, seeds=part) for part in torch.tensor(FRESH).split(256)])

    def guided(self, config: GuidedConfig) -> dict[str, Any]:
        """Train a guided student, and measure one call of it against the guided teacher's two."""
        made = self.train(config)
        return {"steps": config.steps, "seconds": made.card["seconds"], "calls": made.card["calls"]}


def rows(study: Study, known: dict[str, Any]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the name of each row, and what makes it."""
    yield "pace", study.pace

    def timed(name: str, seed: int, times: int = 1) -> dict[str, Any]:
        config, pace = TARGETS[name], known["pace"]
        steps = round(times * STEPS * pace["trajectory"] / pace[name])
        return study.student(replace(config, steps=steps, seed=config.seed + seed))  # of training: the trajectories stay

    for seed in range(SEEDS):
        for name in TARGETS if seed == 0 else AGAIN:
            yield f"targets/{seed}/{name}", partial(timed, name, seed)
    for name in LONGER[0]:
        yield f"longer/{name}", partial(timed, name, 0, LONGER[1])
    for name, config in OPTIONS.items():
        yield f"options/{name}", partial(study.student, config)
    for name, config in STATES.items():
        yield f"states/{name}", partial(study.guided, config)
    for name, config in ERRORS.items():
        yield f"guided/{name}", partial(study.guided, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/student_study"))
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    study = Study(args.work)
    about = {"command": f"python benchmarks/student_study.py --out {args.out}", "model": "digits-edm", "num": NUM, **COMMON}
    known: dict[str, Any] = {}
    if args.out.exists():
        known = {row["row"]: row for row in json.loads(args.out.read_text())["rows"]}
    for name, make in rows(study, known):
        if name not in known and (name.startswith(args.only) or name == "pace"):
            made = {"row": name, **make()}
            print(made, flush=True)
            if args.out.exists():  # another process may have written rows since
                known |= {row["row"]: row for row in json.loads(args.out.read_text())["rows"]}
            known[name] = made
            write_whole(args.out, (json.dumps({**about, "rows": list(known.values())}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
