"""Ways to match distributions: curves of distance, precision, recall, labels and RMSE over training time, on two rings and on digits-edm.

python -m benchmarks.matching_study --out benchmarks/results/matching_study.json [--work runs/matching_study] [--only digits/dmd]

A row is one training: its figures at 20 steps, and the seconds at each. Varied are the Langevin steps, cancelled noise, where the generator
starts, how often the fake is updated and how its rate falls, the average of the weights and the length. On the digits there are also
students of regression, to begin with and to compare with: `kd` and `flow map`, `kd, longer` of as much time as `kd` and then matching, and
the teacher itself.
Of a ring the last figures are the masses of its modes, by which its weights are chosen; of the digits, how samples are spread over clusters
within the classes.

Rows are written one by one, and a killed row continues from its checkpoint. Two processes may share the work by ``--only``, which names
the beginning of a row; what several begin with is made first by ``--only digits/kd``. Remove the results, and the folder of the work, to
measure again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.ring import Ring, ring_data, ring_model
from torch import Tensor

from fewstep import (
    DistillConfig,
    EMConfig,
    FlowMapConfig,
    MatchingConfig,
    Model,
    Trajectories,
    TrajectoryConfig,
    distill,
    generate_trajectories,
    load_model,
    make_grid,
    sample,
)
from fewstep.data.images import Images, load_images
from fewstep.evaluate.metrics.distances import features_of, rmse
from fewstep.evaluate.metrics.judge import Judge
from fewstep.learn.networks.objectives.matching import ABOVE
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.reference import reference_sampler

SEEDS = 3  # of the main rows; the others have one
RINGS: dict[str, dict[str, int]] = {"ring-6": {"modes": 6}, "ring-25": {"modes": 25, "hidden": 192, "octaves": 5, "steps": 12000}}
STEPS = {"ring-6": 4000, "ring-25": 4000, "digits": 400}
ON_RING: dict[str, Any] = {"batch": 1024, "start": 1.0, "lr": 1e-3, "ema": 0.999, "updates": 5}  # of small networks
LEVELS: dict[str, dict[str, Any]] = {"ring-6": {"p_mean": -0.5}, "ring-25": {"p_mean": -2.0, "p_std": 1.2}}  # narrow modes: low noise
ON_DIGITS: dict[str, Any] = {"batch": 64, "start": 2.5}
CONTINUED: dict[str, Any] = {"start": None, "lr": 5e-5}  # of a student that is good already
COUNTED = range(400_000)  # noises whose samples are counted, mode by mode: a mass of one in 25 is known to 0.8 %
CLUSTERS = 5  # within each class of the digits
NUM, HELD_OUT, SLOTS, LONGER = 16384, 512, 16, 2.3  # of regression; how many times as long as ``kd`` it takes with matching behind it
REGRESSION = {"steps": 1000, "batch": 64, "num": NUM, "held_out": HELD_OUT}
FIGURES = ("fd", "precision", "recall", "labels", "rmse", "near", "clusters", "diversity")


class Clusters:
    """How samples of the digits are spread within their classes, in the features of the judge."""

    def __init__(self, judge: Judge, data: Images) -> None:
        from sklearn.cluster import KMeans  # the digits are scikit-learn's

        assert data.labels is not None
        self.judge, found = judge, features_of(data.x, judge.network)
        self.members = [found[data.labels == label] for label in range(int(data.labels.max()) + 1)]
        fits = [KMeans(CLUSTERS, n_init=10, random_state=0).fit(rows.numpy()) for rows in self.members]
        self.centres = torch.stack([torch.from_numpy(fit.cluster_centers_) for fit in fits])
        self.shares = torch.stack([self.share(rows, label) for label, rows in enumerate(self.members)])

    def share(self, rows: Tensor, label: int) -> Tensor:
        """Return the share of rows ``[n, F]`` of a label in each of its clusters."""
        return torch.bincount(torch.cdist(rows, self.centres[label].to(rows)).argmin(1), minlength=CLUSTERS) / len(rows)

    def __call__(self, samples: Tensor, requested: Tensor) -> dict[str, float]:
        """Measure samples.

        Returns:
            ``clusters``: the share of samples that would have to lie in other clusters of their class to have the data's proportions;
            ``diversity``: the mean distance of two samples of one label, in that of two of the data.
        """
        found = features_of(samples, self.judge.network)
        apart, ratios = list[float](), list[float]()
        for label, data in enumerate(self.members):
            rows = found[requested == label]
            apart.append(float((self.share(rows, label) - self.shares[label]).abs().sum() / 2))
            ratios.append(float(torch.pdist(rows).mean() / torch.pdist(data).mean()))
        return {"clusters": sum(apart) / len(apart), "diversity": sum(ratios) / len(ratios)}


@dataclass(frozen=True)
class Modes:
    """How samples are spread over the modes of a ring."""

    ring: Ring

    def __call__(self, samples: Tensor, requested: Tensor | None) -> dict[str, float]:
        """Measure samples.

        Returns:
            ``near``: the share of samples near a mode; ``clusters``: the share that would have to lie nearer to another one for all modes
            to have as many; ``value``, by which weights are chosen, since a Frechet distance sees no modes: how much of both is wrong.
        """
        share, near = self.ring.counted(samples)
        apart = float((share - 1 / len(share)).abs().sum() / 2)
        return {"near": near, "clusters": apart, "value": 1 - near + apart}


@dataclass(frozen=True)
class Watch:
    """A judge that also measures how samples are spread, and how far they are from the ends of the teacher's exact trajectories."""

    judge: Judge
    exact: Tensor
    spread: Clusters | Modes

    @property
    def identity(self) -> str:
        """That of the judge."""
        return self.judge.identity

    def __call__(self, samples: Tensor, requested: Any) -> Mapping[str, Any]:  # noqa: ANN401 - labels, of the digits
        """Return the judge's figures, ``rmse``, and those of the spread."""
        return {**self.judge(samples, requested), "rmse": rmse(samples, self.exact), **self.spread(samples, requested)}


class Case:
    """A teacher, what judges its students, and students of regression to begin with."""

    def __init__(self, name: str, work: Path, num: int, options: Mapping[str, Any]) -> None:
        self.name, self.work, self.num, self.options = name, work / name, num, {**REGRESSION, **options}
        self.seeds = range(ABOVE, ABOVE + num)

    @cached_property
    def model(self) -> Model:
        """The teacher; that of a ring is trained first."""
        return ring_model(**RINGS[self.name]) if self.name in RINGS else load_model("digits-edm")

    @cached_property
    def watch(self) -> Watch:
        """The judge of all rows."""
        sampler, ring = reference_sampler(self.model.schedule), self.model.network
        exact = torch.cat([sample(self.model, sampler, seeds=part) for part in torch.tensor(self.seeds).split(256)])
        if isinstance(ring, Ring):
            return Watch(Judge.of(ring_data(RINGS[self.name]["modes"])), exact, Modes(ring))
        judge = Judge.of_model(self.model)
        return Watch(judge, exact, Clusters(judge, load_images("digits")))

    @cached_property
    def trajectories(self) -> Trajectories:
        """What the students of regression learn from."""
        config = TrajectoryConfig(self.options["num"] + self.options["held_out"], self.options.get("teacher_nfe", 24))
        grid = make_grid("angle", self.model.schedule, SLOTS)
        note = lambda done, text: print(f"{done} trajectories: {text}", flush=True)  # noqa: E731
        made = generate_trajectories(self.model, grid, self.work / "trajectories", config=config, on_progress=note)
        assert made is not None
        return made

    def kd(self, times: float = 1.0, seed: int = 0) -> Model:
        """Return a student of plain regression."""
        config = DistillConfig(**{**self.options, "steps": round(times * self.options["steps"])})
        return self._regression("kd", f"kd-{times:g}-{seed}", replace(config, seed=config.seed + seed))

    def flow_map(self) -> Model:
        """Return a flow map."""
        return self._regression("flow-map", "flow-map", FlowMapConfig(max_passes=1, **self.options))

    def _regression(self, method: str, name: str, config: Any) -> Model:  # noqa: ANN401
        folder = self.work / name
        if (folder / "tuned.json").exists():
            return load_model(folder)
        made = distill(self.model, method, config=config, out=folder, trajectories=self.trajectories)
        assert made is not None
        return made

    def figures(self, samples: Tensor) -> dict[str, Any]:
        """Measure samples of the held-out noises."""
        found = self.watch(samples, self.model.labels(self.seeds))
        return {key: found[key] for key in FIGURES if key in found}

    def teacher(self) -> dict[str, Any]:
        """Return the figures of the teacher's exact trajectories, and of a ring the masses of its modes."""
        return {**self.figures(self.watch.exact), **self.counted(self.model, 32)}

    def alone(self, student: Model) -> dict[str, Any]:
        """Return the figures of a student of regression."""
        made = torch.cat([sample(student, nfe=1, seeds=part) for part in torch.tensor(self.seeds).split(256)])
        history = json.loads((self.work / student.name / "history.json").read_text())
        return {"seconds": history["seconds"], **self.figures(made)}

    def match(self, row: str, config: MatchingConfig, begin: Callable[[], Model] | None) -> dict[str, Any]:
        """Train one student and return its curves; a killed one continues."""
        method = "em" if isinstance(config, EMConfig) else "dmd"
        given: dict[str, Any] = {} if begin is None else {"begin": begin()}
        if config.pair:
            given["trajectories"] = self.trajectories
        out = None if self.name in RINGS else self.work / row.replace("/", "-").replace(" ", "-").replace(",", "")
        if out is not None and (out / "tuned.json").exists():  # killed after it was saved, and before its row was
            card = json.loads((out / "history.json").read_text())
        else:
            made = distill(self.model, method, config=config, out=out, judge=self.watch, **given)
            assert made is not None
            card = {**made.card, **self.counted(made, 1)}
        keys = ("step", *(key for key in FIGURES if key in card["kept"]), "fake", "teacher")
        curves = {key: [one[key] for one in card["scores"]] for key in keys}
        curves["seconds"] = [card["seconds"] * step / config.steps for step in curves["step"]]
        modes = {key: card[key] for key in ("masses", "near") if key in card}
        return {"method": method, "config": asdict(config), "seconds": card["seconds"], "kept": card["kept"], "curves": curves, **modes}

    def counted(self, model: Model, nfe: int) -> dict[str, Any]:
        """Return the least and the largest mass of a mode of a ring, in those that it should have, and the share of samples near one."""
        if self.name not in RINGS:
            return {}
        ring = self.model.network
        assert isinstance(ring, Ring)
        what = None if nfe == 1 else "unipc-2"
        share, near = ring.counted(torch.cat([sample(model, what, nfe=nfe, seeds=part) for part in torch.tensor(COUNTED).split(20_000)]))
        return {"masses": [float(share.min()) * len(share), float(share.max()) * len(share)], "near": near}


def variants(case: Case, steps: int) -> Iterator[tuple[str, int, MatchingConfig, Callable[[], Model] | None]]:
    """Yield the name of each training, its number of seeds, its configuration, and the student that it begins with."""
    on_ring = case.name in RINGS
    common = {"steps": steps, "held_out": case.num, **(ON_RING | LEVELS[case.name] if on_ring else ON_DIGITS)}
    dmd, em = MatchingConfig(**common), EMConfig(**common)
    yield "dmd", SEEDS, dmd, None
    yield "langevin 4", SEEDS, em, None
    for langevin in (2, 8):
        yield f"langevin {langevin}", 1, replace(em, langevin=langevin), None
    yield "langevin 4, z stays", 1, replace(em, step_z=0.0), None
    yield "langevin 4, all noise kept", 1, replace(em, cancel=False), None
    yield "fake at one rate", 1, replace(dmd, fake_end=1.0), None
    yield "updates 1", 1, replace(dmd, updates=1), None
    yield "updates 2" if on_ring else "updates 5", SEEDS, replace(dmd, updates=2 if on_ring else 5), None
    for start in (0.5, 2.0) if on_ring else (1.0, 5.0):
        yield f"start {start:g}", 1, replace(dmd, start=start), None
    yield "four times as long", 1, replace(dmd, steps=4 * steps), None
    if on_ring:
        yield "langevin 4, four times as long", 1, replace(em, steps=4 * steps), None
    else:
        yield "average 0.999", 1, replace(dmd, ema=0.999), None
        after = replace(dmd, **CONTINUED)
        yield "after kd", SEEDS, after, case.kd
        yield "after kd, paired", SEEDS, replace(after, pair=1.0, num=case.options["num"] + case.options["held_out"] - case.num), case.kd
        yield "after a flow map", 1, after, case.flow_map


def rows(cases: Mapping[str, Case], steps: Mapping[str, int]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the name of each row, and what makes it."""
    for key, case in cases.items():
        yield f"{key}/teacher/0", case.teacher
        if key not in RINGS:
            yield f"{key}/kd/0", lambda case=case: case.alone(case.kd())
            for seed in range(SEEDS):
                yield f"{key}/kd, longer/{seed}", lambda case=case, seed=seed: case.alone(case.kd(LONGER, seed))
            yield f"{key}/flow map/0", lambda case=case: case.alone(case.flow_map())
        for name, seeds, config, begin in variants(case, steps[key]):
            for seed in range(seeds):
                row = f"{key}/{name}/{seed}"
                yield row, partial(case.match, row, replace(config, seed=config.seed + seed), begin)


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/matching_study"))
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, help="fewer training steps, to try the study out")
    parser.add_argument("--num", type=int, default=1024, help="held-out noises")
    args = parser.parse_args()
    steps = STEPS if args.steps is None else dict.fromkeys(STEPS, args.steps)
    quick = {} if args.steps is None else {"steps": args.steps, "num": 32, "held_out": 8, "teacher_nfe": 16}
    planned = dict(rows({name: Case(name, args.work, args.num, quick) for name in STEPS}, steps))
    if not any(name.startswith(args.only) for name in planned):
        parser.error(f"no row begins with {args.only!r}: there are {', '.join(planned)}")
    about = {"command": f"python -m benchmarks.matching_study --out {args.out}", "models": list(STEPS), "steps": steps, "num": args.num}
    known: dict[str, Any] = {}
    if args.out.exists():
        known = {row["row"]: row for row in json.loads(args.out.read_text())["rows"]}
    for name, make in planned.items():
        if name in known or not name.startswith(args.only):
            continue
        made = {"row": name, **make()}
        print(name, made.get("kept", made), flush=True)
        if args.out.exists():  # another process may have written rows since
            known |= {row["row"]: row for row in json.loads(args.out.read_text())["rows"]}
        known[name] = made
        write_whole(args.out, (json.dumps({**about, "rows": list(known.values())}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
