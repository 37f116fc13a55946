"""Learned rivals beside the fitted sampler: each fitted by its own recipe, all measured on the same fresh noises.

    python -m benchmarks.rivals.study --out benchmarks/results/rivals_study.json [--work runs/rivals] [--plan]
        [--model digits-edm] [--rival "bns;gs"] [--nfe 5] [--times 0.2] [--distance features]

Each row is written when it is there, and a killed run continues with the rival that it was at. Rows of other settings stay beside the new
ones. Remove the results to measure again. Samplers and whole loss curves stay in ``--work``.

A row has the columns of `fewstep bench` (errors against the exact ends, distances to the data), the mean error, the 99th
percentile, the share of samples that part (error above three times the median), a paired verdict on the fitted sampler's errors on the same
noises, the network evaluations of the fit with and without gradients, and a thinned loss curve.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.rivals.amed import AMED, PLUGIN
from benchmarks.rivals.bns import BNS
from benchmarks.rivals.drawn import LearnedSampler, fingerprint
from benchmarks.rivals.epd import EPD
from benchmarks.rivals.gits import GITS
from benchmarks.rivals.gs import GAS, GS
from benchmarks.rivals.ld3 import LD3
from benchmarks.rivals.oss import OSS
from benchmarks.rivals.rival import Found, Point, Rival
from benchmarks.rivals.s4s import S4S
from benchmarks.rivals.teacher import Cost, Teacher
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core.denoiser import Cond, FlowMap
from fewstep.core.grid import TimeGrid
from fewstep.core.tableau import Nodes
from fewstep.evaluate.benchmark.entries import Entry, SamplerEntry
from fewstep.evaluate.benchmark.plan import Setup
from fewstep.evaluate.benchmark.run import run_entries
from fewstep.evaluate.metrics.confidence import compare_errors, parted
from fewstep.evaluate.metrics.quality import feature_network
from fewstep.evaluate.rows import picture_file, read_errors
from fewstep.models.problem import Problem
from fewstep.models.zoo import load_model
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import FewstepError, SolverError, look_up
from fewstep.runtime.job import Job
from fewstep.runtime.process import default_device

RIVALS: dict[str, Rival] = {
    "gits": GITS(),
    "oss": OSS(),
    "ld3": LD3(),
    "ld3, ipndm": LD3(solver="ipndm"),
    "s4s": S4S(),
    "s4s-alt": S4S(alternations=8),
    "amed": AMED(),
    "amed, exact teacher": AMED(exact=64),
    "amed-plugin": PLUGIN,
    "amed-plugin, exact teacher": replace(PLUGIN, exact=64),
    "epd": EPD(),
    "epd, exact teacher": EPD(exact=64),
    "gs": GS(),
    "gas": GAS(),
    "bns": BNS(),
}
MODELS = {"digits-edm": (1024, "digits"), "assets/cifar10-16": (512, "benchmarks.cifar10.features:network")}  # noises, features
COUNTS = (3, 4, 5, 6, 8)
FITTED = "fitted"
COLUMNS = ("rmse", "rmse_ci", "error_median", "error_p95", "fd", "fd_ci", "kd", "kd_ci", "precision", "recall", "labels", "calls")
SHOWN = 60  # points of a loss curve in a row
WARM = 64  # samples at a time where a call of the network is timed


@dataclass(frozen=True, eq=False)
class RivalEntry(Entry):
    """A learned sampler of this folder as a row of a benchmark.

    Attributes:
        learned: the sampler.
    """

    _: KW_ONLY
    learned: LearnedSampler

    @property
    def library(self) -> str:
        return "rivals"

    @property
    def artifact(self) -> str:
        return fingerprint(self.learned)

    @property
    def stochastic(self) -> bool:
        return False  # all solve the sampling ODE

    @property
    def time_grid(self) -> TimeGrid:
        return TimeGrid(self.learned.ends)

    def why_not(self) -> str:
        return "a student jumps from time to time" if isinstance(self.problem.denoiser, FlowMap) else ""

    def samples(self, denoiser: Any, seeds: Sequence[int], cond: Cond, noise: Sequence[int] | None = None) -> Tensor:
        x = self.problem.start(seeds, Nodes.at(self.problem.schedule, self.learned.ends))
        return self.learned.samples(denoiser, x, cond)


class Bench:
    """A model with its noises, on which every sampler is measured alike.

    Args:
        name: of the model.
        num: noises.
        work: the folder of samples and errors.
        command: for the table beside them.
    """

    def __init__(self, name: str, num: int, work: Path, command: str) -> None:
        self.name, self.folder, self.command = name, work / "bench", command
        self.setup, self.problem = Setup(num=num), Problem(load_model(name), device=default_device())

    def fitted(self, nfe: int) -> Entry:
        """Return the entry of the sampler that the model carries.

        Raises:
            SolverError: it carries none of so many evaluations.
        """
        return SamplerEntry(self.problem, FITTED, "optimized", nfe, given=self.problem.model.fitted(nfe, self.problem.guidance))

    def measure(self, entry: Entry) -> tuple[dict[str, Any], Tensor]:
        """Run one sampler and return its figures, and the errors ``[num]`` of its samples.

        Raises:
            FewstepError: it failed (why).
        """
        with Job.open("measure rivals", self.folder, device=self.problem.device, command=self.command) as job:
            results = run_entries(self.problem, [entry], self.setup, job)
        row = next(
            one for one in results["rows"] if (one["library"], one["solver"], one["grid"]) == entry.key[:3] and one["nfe"] == entry.nfe
        )
        if row["failed"]:
            raise FewstepError(row["failed"])
        errors = read_errors(picture_file(self.folder, entry.key))
        return {**{key: row[key] for key in COLUMNS}, **figures(errors)}, errors


def figures(errors: Tensor) -> dict[str, float]:
    """Return the mean and the 99th percentile of errors ``[num]``, and the share of samples that part."""
    errors = errors.double()
    return {"mean_error": float(errors.mean()), "p99": float(errors.quantile(0.99)), "parted": parted(errors)}


def settings(rival: Rival) -> dict[str, Any]:
    """Return the hyper-parameters of a rival as JSON holds them."""
    return {"method": type(rival).__name__, **dataclasses.asdict(rival)}


def fit_once(rival: Rival, teacher: Teacher, nfe: int, folder: Path, note: Any) -> tuple[Found, dict[str, Any]]:
    """Fit a rival, and write its numbers, its whole loss curve and what it took into a folder.

    Returns:
        The sampler with its curve, and what it took.
    """
    begin, before = time.process_time(), teacher.cost
    found = rival.fit(teacher, nfe, note)
    spent = Cost(teacher.cost.forward - before.forward, teacher.cost.gradient - before.gradient)
    facts = {"settings": settings(rival), "seconds": time.process_time() - begin, "forward": spent.forward, "gradient": spent.gradient}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().contiguous().clone() for name, value in found.sampler.tensors().items()}
    write_whole(folder / "sampler.safetensors", lambda path: save_file(tensors, path))
    write_whole(folder / "curve.json", (json.dumps({**facts, "curve": found.curve}, indent=1) + "\n").encode())
    return found, facts


def thinned(curve: Sequence[Point]) -> list[list[float | None]]:
    """Return at most `SHOWN` points of a loss curve, those that were measured on held-out noises first, rounded to four digits."""
    known = [point for point in curve if point.held_out is not None] or list(curve)
    shown = known[:: max(1, -(-len(known) // SHOWN))]
    shown = shown if not known or shown[-1] == known[-1] else [*shown, known[-1]]

    def rounded(value: float | None) -> float | None:
        return None if value is None or value != value or value in (float("inf"), float("-inf")) else float(f"{value:.4g}")

    return [[point.iteration, rounded(point.loss), rounded(point.held_out)] for point in shown]


def rows(
    bench: Bench, names: Sequence[str], counts: Sequence[int], times: float, features: str | None, work: Path, done: set[tuple[Any, ...]]
) -> Iterator[dict[str, Any]]:
    """Yield the rows that are not there yet, the fitted sampler's first for each number of evaluations."""
    network = None if features is None else feature_network(features, bench.problem.shape, bench.problem.device)[0]
    for nfe in counts:
        about = {"model": bench.name, "nfe": nfe, "num": bench.setup.num}
        mine, baseline = bench.measure(bench.fitted(nfe))
        if key_of({**about, "rival": FITTED}) not in done:
            yield {**about, "rival": FITTED, **mine}
        for name in names:
            rival = RIVALS[name].longer(times)
            about = {"model": bench.name, "nfe": nfe, "num": bench.setup.num, "rival": name, "distance": "features" if features else "l2"}
            about["settings"] = settings(rival)
            if key_of(about) in done:
                continue
            if why := rival.why_not(nfe):
                yield {**about, "refused": why}
                continue
            begin = f"{bench.name}, {nfe} evaluations, {name}"
            folder = work / "fits" / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
            try:
                teacher = Teacher(bench.problem, network)
                found, facts = fit_once(rival, teacher, nfe, folder, lambda text, begin=begin: print(f"{begin}: {text}", flush=True))
                label = f"{name}-{folder.name}"
                measured, errors = bench.measure(RivalEntry(bench.problem, label, "own", nfe, learned=found.sampler))
            except FewstepError as error:
                yield {**about, "failed": str(error)}
                continue
            judged = compare_errors(errors, baseline)
            compared = {"verdict": judged.verdict, "difference": [judged.difference, judged.low, judged.high]}
            needs = {"paper": rival.paper, "needs": str(rival.needs)}
            yield {**about, **needs, **measured, **compared, **facts, "curve": thinned(found.curve)}


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells rows apart: the model, the noises, the evaluations, the rival, its settings and its distance."""
    return (*(row.get(key) for key in ("model", "num", "nfe", "rival", "distance")), json.dumps(row.get("settings"), sort_keys=True))


@torch.no_grad()
def seconds(problem: Problem) -> tuple[float, float]:
    """Return the seconds of processor time of one evaluation for one sample: without a gradient, and with one to the state."""
    x, cond, t, taken = problem.start(range(WARM)), problem.cond(range(WARM)), problem.schedule.ends[0] / 10, list[float]()
    problem.teacher(x, t, cond)
    for learning in (False, True):
        begin = time.process_time()
        with torch.set_grad_enabled(learning):
            answer = problem.teacher(x.requires_grad_(learning), t, cond).sum()
            if learning:
                answer.backward()
        taken.append((time.process_time() - begin) / WARM)
    return taken[0], taken[1]


def planned(problem: Problem, names: Sequence[str], counts: Sequence[int], times: float) -> str:
    """Return the plan of fits on a model: network evaluations, and hours of processor time at most."""
    plain, learning = seconds(problem)
    lines, total = [f"{problem.name}: {1e3 * plain:.2f} ms for an evaluation, {1e3 * learning:.2f} ms with a gradient"], 0.0
    for name in names:
        rival = RIVALS[name].longer(times)
        costs = [rival.cost(nfe) for nfe in counts if not rival.why_not(nfe)]
        cost = Cost(sum(one.forward for one in costs), sum(one.gradient for one in costs))
        hours = (cost.forward * plain + cost.gradient * learning) / 3600
        total += hours
        refused = [str(nfe) for nfe in counts if rival.why_not(nfe)]
        note = f", none of {', '.join(refused)} evaluations" if refused else ""
        lines.append(f"  {name}: {cost.forward:,} evaluations and {cost.gradient:,} with gradients, {hours:.1f} hours at most{note}")
    return "\n".join([*lines, f"  together {total:.1f} hours of one processor at most"])


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/rivals"))
    parser.add_argument("--model", action="append", choices=MODELS, help="by default both")
    parser.add_argument("--rival", type=lambda text: [name.strip() for name in text.split(";")], help="names, by ';'; by default all")
    parser.add_argument("--nfe", type=lambda text: [int(n) for n in text.split(",")], default=list(COUNTS))
    parser.add_argument("--times", type=float, default=1.0, help="as many times the iterations of every recipe")
    parser.add_argument("--distance", choices=("l2", "features"), default="l2", help="in what ends are compared while a rival learns")
    parser.add_argument("--plan", action="store_true", help="say what it would cost, and end")
    args = parser.parse_args(words)
    if args.times <= 0:
        parser.error(f"times is above 0, got {args.times:g}")
    names = list(RIVALS) if args.rival is None else args.rival
    for name in names:
        look_up(name, RIVALS, "rival", SolverError)
    command = f"python -m benchmarks.rivals.study --out {args.out}" + ("" if args.times == 1 else f" --times {args.times:g}")
    command += "" if args.distance == "l2" else f" --distance {args.distance}"
    results: dict[str, Any] = {"commands": [command], "rows": []}
    if args.out.exists():
        old = json.loads(args.out.read_text())
        results = {"commands": list(dict.fromkeys([*old["commands"], command])), "rows": old["rows"]}
    for name in args.model or MODELS:
        num, features = MODELS[name]
        work = args.work / Path(name).name
        bench = Bench(name, num, work, command)
        print(planned(bench.problem, names, args.nfe, args.times), flush=True)
        if args.plan:
            continue
        done = {key_of(row) for row in results["rows"]}
        for row in rows(bench, names, args.nfe, args.times, features if args.distance == "features" else None, work, done):
            results["rows"].append(row)
            write_whole(args.out, (json.dumps(results, indent=1) + "\n").encode())
            print(json.dumps({key: value for key, value in row.items() if key not in ("curve", "settings")}), flush=True)


if __name__ == "__main__":
    main()
