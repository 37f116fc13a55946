"""What the parts of a distilled operator add: digits-edm, one pass, on trajectories that no training saw.

python benchmarks/dsno_study.py --out benchmarks/results/dsno_study.json [--work runs/dsno_study] [--only controls/0]

`controls` compares DSNO with its controls on three seeds, at equal iterations and at equal training time (by `pace`: a few steps of
each, side by side); `choices` changes one thing at a time. Rows are kept in ``--work`` one by one: a killed run continues, and two
processes may share the work by ``--only``, which names the beginning of a row. Remove the results to measure again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fewstep import (
    DistillConfig,
    Model,
    Sampler,
    TimeGrid,
    distill,
    generate_trajectories,
    load_model,
    make_solver,
)
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.distances import frechet_distance, rmse
from fewstep.evaluate.metrics.features import load_digits_features
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig
from fewstep.models.generate import sample
from fewstep.models.networks.operator import OperatorForm, OperatorStudent
from fewstep.models.networks.temporal_unet import Mixing
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.reference import reference_sampler

ROOT = Path(__file__).parents[1]
FRESH = range(1024)
NUM, HELD_OUT, SEED, STEPS, BATCH, CHOICE_STEPS = 12288, 1024, 6_000_000, 250, 64, 100
GRIDS = ("angle", "angle:power=2", "optimized")
BASE = DistillConfig(form=OperatorForm(anywhere=False), steps=STEPS, batch=BATCH, num=NUM, held_out=HELD_OUT)


def mixed(config: DistillConfig, *mixing: str) -> DistillConfig:
    """With slots that meet in another way: form, modes, insert_after, branch_at."""
    return replace(config, form=replace(config.form, mixing=Mixing(*mixing)))


def method_of(config: DistillConfig) -> str:
    """The method whose slots meet as the configuration says."""
    return "slots" if config.form.mixing.form == "none" else "dsno"


CONTROLS = {
    "dsno": BASE,
    "kd": mixed(replace(BASE, slots=1), "none"),
    "slots": mixed(BASE, "none"),
    "dsno one-way": mixed(BASE, "one-way"),
    "dsno inner": replace(BASE, form=replace(BASE.form, mixing=Mixing(insert_after="inner", branch_at="inner"))),
}

SHORT = replace(BASE, steps=CHOICE_STEPS)
CHOICES = {
    "as it is": SHORT,
    "output skip": replace(SHORT, form=replace(SHORT.form, output="skip")),
    "output state": replace(SHORT, form=replace(SHORT.form, output="state")),
    "time of the slot": replace(SHORT, form=replace(SHORT.form, time="slot")),
    "loss l1": replace(SHORT, loss="l1"),
    "loss l2": replace(SHORT, loss="l2"),
    "loss features": replace(SHORT, loss="features"),
    "weights snr": replace(SHORT, weights="snr"),
    "weights paper": replace(SHORT, weights="paper"),
    "grid angle:power=2": replace(SHORT, grid="angle:power=2"),
    "grid optimized": replace(SHORT, grid="optimized"),
    "2 slots": replace(SHORT, slots=2),
    "3 modes": replace(SHORT, form=replace(SHORT.form, mixing=Mixing(modes=3))),
    "lr 0.003": replace(SHORT, lr=3e-3),
    "dropout 0.1": replace(SHORT, dropout=0.1),
    "a quarter fresh": replace(SHORT, fresh=0.25),
    "starts anywhere": replace(SHORT, form=replace(SHORT.form, anywhere=True)),
    "as in the paper": replace(  # but for its own feature network
        *(SHORT,),
        **{"form": replace(SHORT.form, output="state", time="slot"), "grid": "angle:power=2", "weights": "paper", "loss": "l1"},
    ),
}


class Study:
    """A teacher, its trajectories, and the rows that are there."""

    def __init__(self, work: Path) -> None:
        self.work, self.model = work, load_model("digits-edm")
        self.features = load_digits_features()

    def trajectories(self) -> Trajectories:
        """Kept at the times of all grids."""
        model, times = self.model, set[float]()
        for grid in GRIDS:
            times |= set(model.trajectory_grid(grid, BASE.num_slots).t.tolist())
        config = TrajectoryConfig(NUM + HELD_OUT, BASE.teacher_nfe, seed=SEED)
        grid = TimeGrid(torch.tensor(sorted(times, reverse=True), dtype=torch.float64))
        made = generate_trajectories(
            model, grid, self.work / "trajectories", config=config, on_progress=lambda done, note: print(done, note, flush=True)
        )
        assert made is not None
        return made

    def row(self, name: str, config: DistillConfig, **where: Any) -> dict[str, Any]:  # noqa: ANN401
        """A student, trained or found, and what it reaches."""
        path, folder = self.work / "rows" / f"{name.replace('/', '--')}.json", self.work / "students" / name.replace("/", "--")
        if path.exists():
            return json.loads(path.read_text())
        given, features = self.trajectories(), self.features.smooth if config.loss == "features" else None
        if not (folder / "tuned.json").exists():
            distill(self.model, method_of(config), config=config, out=folder, trajectories=given, features=features, **where)
        history, student = json.loads((folder / "history.json").read_text()), load_model(folder)
        row = {"row": name, "steps": config.steps, **self.measure(student, given), "slots": history["slots"]}
        row["arithmetic"] = history["arithmetic"]["1"]
        write_whole(path, json.dumps(row).encode())
        print(row, flush=True)
        return row

    def pace(self) -> dict[str, float]:
        """Seconds of a training step of each control: medians over steps that take turns."""
        path, given = self.work / "rows" / "pace.json", self.trajectories()
        if not path.exists():
            seconds: dict[str, list[float]] = {name: [] for name in CONTROLS}
            for turn in range(3):
                for name, config in CONTROLS.items():
                    ticks: list[float] = []
                    with TemporaryDirectory() as scratch:
                        tick = lambda step, note, ticks=ticks: ticks.append(time.monotonic())  # noqa: E731
                        short = replace(config, steps=8, seed=turn)
                        distill(self.model, method_of(config), config=short, out=scratch, trajectories=given, on_progress=tick)
                    seconds[name] += [after - before for before, after in pairwise(ticks[1:])]
            write_whole(path, json.dumps({"row": "pace", **{name: median(found) for name, found in seconds.items()}}).encode())
        return json.loads(path.read_text())

    @torch.no_grad()
    def measure(self, student: Model, given: Trajectories) -> dict[str, float]:
        """One pass from noises that were held out."""
        network, index = student.network, range(NUM, NUM + HELD_OUT)
        assert isinstance(network, OperatorStudent)
        x, labels = given.states(index, at=[0, -1]), given.labels(index)
        assert labels is not None
        made = torch.cat([network.denoise_once(*part) for part in zip(x[:, 0].split(256), labels.split(256), strict=True)])
        return self.figures(made, x[:, 1], labels)

    def figures(self, made: Tensor, exact: Tensor, labels: Tensor) -> dict[str, float]:
        error = (made - exact).flatten(1).double().square().mean(1).sqrt()
        agree = float((self.features.labels(made) == labels).double().mean())
        fd = frechet_distance(load_images("digits").x, made, self.features)
        return {"rmse": rmse(made, exact), "mean_error": float(error.mean()), "fd": fd, "label_agreement": agree}

    @cached_property
    def exact(self) -> Tensor:
        """The teacher's ends from the noises of a benchmark."""
        return self.ends(self.model, reference_sampler(self.model.schedule))

    def ends(self, model: Model, sampler: Sampler) -> Tensor:
        return torch.cat([sample(model, sampler, seeds=part) for part in torch.tensor(FRESH).split(256)])

    def bundled(self, passes: int) -> dict[str, Any]:
        """digits-dsno, or for no passes its teacher, from the noises of a benchmark."""
        path = self.work / "rows" / f"bundled--{passes}.json"
        if not path.exists():
            student, labels = load_model(ROOT / "assets" / "digits-dsno"), self.model.labels(FRESH)
            assert labels is not None
            made = self.exact
            if passes:
                sampler = Sampler.build(make_solver("ddim"), student.optimized("ddim", passes), student.schedule)
                made = self.ends(student, sampler)
            write_whole(path, json.dumps({"row": f"bundled/{passes}", **self.figures(made, self.exact, labels)}).encode())
        return json.loads(path.read_text())


def rows(study: Study) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name, and what makes the row."""
    yield "pace", study.pace
    for seed in range(3):
        for name, config in CONTROLS.items():
            row = f"controls/{seed}/iterations/{name}"
            yield row, lambda row=row, config=config, seed=seed: study.row(row, replace(config, seed=seed))
        for name, config in CONTROLS.items():
            if name in ("kd", "slots"):
                row = f"controls/{seed}/time/{name}"
                yield row, lambda row=row, config=config, seed=seed, name=name: equal_time(study, row, config, seed, name)
    for name, config in CHOICES.items():
        row = f"choices/{name}"
        yield row, lambda row=row, config=config: study.row(row, config)
    for passes in range(5):
        yield f"bundled/{passes}", lambda passes=passes: study.bundled(passes)
    begin, row = "controls/0/iterations/dsno", "choices/kd from dsno"
    yield row, lambda: study.row(row, CONTROLS["kd"], begin=load_model(study.work / "students" / begin.replace("/", "--")))


def equal_time(study: Study, row: str, config: DistillConfig, seed: int, name: str) -> dict[str, Any]:
    """With as many iterations as take the time of DSNO's."""
    pace = study.pace()
    return study.row(row, replace(config, seed=seed, steps=round(config.steps * pace["dsno"] / pace[name])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/dsno_study"))
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    study = Study(args.work)
    found = {row["row"]: row for row in (json.loads(args.out.read_text())["rows"] if args.out.exists() else [])}
    for name, make in rows(study):
        if name.startswith(args.only) and name not in found:
            make()
    files = {name: args.work / "rows" / f"{name.replace('/', '--')}.json" for name, _ in rows(study)}
    kept = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    command = f"python benchmarks/dsno_study.py --out {args.out}"
    results = {"command": command, "model": "digits-edm", "trajectories": NUM, "held_out": HELD_OUT, "batch": BATCH}
    write_whole(args.out, (json.dumps({**results, "rows": [*{**found, **kept}.values()]}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
