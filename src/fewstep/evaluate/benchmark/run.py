"""Run a benchmark: the same noises, a tight reference trajectory, one row per sampler."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core.denoiser import Cond, FlowMap
from fewstep.data.images import load_images
from fewstep.evaluate.benchmark.comparison import Comparison
from fewstep.evaluate.benchmark.cost import PeakMemory, machine_of, now, timed
from fewstep.evaluate.benchmark.entries import Entry
from fewstep.evaluate.benchmark.plan import BenchmarkConfig, Setup, planned_entries
from fewstep.evaluate.metrics.confidence import rms, rmse_interval, sample_errors
from fewstep.evaluate.metrics.distances import rmse
from fewstep.evaluate.metrics.quality import NO_METRICS, Quality
from fewstep.evaluate.rows import REFERENCE, Key, Row, has_errors, picture_file, read_results, read_samples, save_samples
from fewstep.models.formats.folders import imports_code
from fewstep.models.guidance import calls_of
from fewstep.models.model import Model
from fewstep.models.problem import Problem
from fewstep.models.tuned import Tuned
from fewstep.models.zoo import load_model
from fewstep.runtime.artifact import Number, held_to, read_file, write_whole
from fewstep.runtime.errors import FewstepError, ModelError, SolverError
from fewstep.runtime.job import Job
from fewstep.runtime.process import default_device, from_first, gather
from fewstep.sampling.loop import run
from fewstep.sampling.reference import REFERENCE_NFE, reference_sampler
from fewstep.sampling.sampler import Sampler

__all__ = ["benchmark", "run_entries"]

log = logging.getLogger("fewstep")
WORK = "benchmark"


def benchmark(
    model: Model,
    config: BenchmarkConfig,
    out: Path,
    *,
    command: str = "",
    device: torch.device | None = None,
    on_progress: Callable[[int, str], None] | None = None,
) -> Comparison:
    """Run all rows of a benchmark by names and write them to ``out/results.json``, after each row; rows already there are not run again.

    A sampler that fails, by an exception or by samples that are not finite, is a row that says why; the others go on. The processes of
    ``torchrun`` share the rows, and all of them get the result.

    Args:
        command: the command line, for the results.
        device: where to compute; by default the accelerator, if there is one.
        on_progress: called with the number of rows done and the name of the next.

    Raises:
        FewstepError: as the solvers, grids and models it uses; no row could be run at all; or processes on machines of different kinds.
    """
    with Job.open(WORK, out, device=device or default_device(), on_progress=on_progress, command=command) as job:
        problem = Problem(model, config.guidance, job.device)
        return Comparison(run_entries(problem, planned_entries(problem, config), config.setup, job), job.folder)


def run_entries(problem: Problem, entries: Sequence[Entry], setup: Setup, job: Job) -> dict[str, Any]:
    """Run the entries of a benchmark, in their order, and return what ``results.json`` then holds.

    Each process runs whole rows, so that its times are those of one process. The first one writes the table, after each round of rows.

    Raises:
        SolverError: none of them can run (and why).
        FewstepError: the reference or the data cannot be had, or the processes are on machines of different kinds.
    """
    skipped = {entry.key: why for entry in entries if (why := entry.why_not())}
    if len(skipped) == len(entries):
        raise SolverError("; ".join(dict.fromkeys(skipped.values())))
    machine, *others = gather(machine_of(problem.device))
    if any(other != machine for other in others):
        raise FewstepError(f"rows are timed, and processes of this run are on different machines: {_differences([machine, *others])}")
    bench = _Bench(problem, setup, job)
    results = from_first(bench.results(machine) if job.rank == 0 else {})
    results["skipped"] = [{"key": list(key), "why": why} for key, why in skipped.items()]
    known = {field.name for field in fields(Row)}
    rows: dict[Key, Row] = {row.key: row for row in (Row(**{name: one[name] for name in known & set(one)}) for one in results["rows"])}
    bench.write(results)  # before any samples of another problem are overwritten
    left = [
        number
        for number, entry in enumerate(entries)
        if job.rank == 0 and entry.key not in skipped and not (entry.key in rows and bench.is_up_to_date(entry, rows[entry.key]))
    ]
    left = from_first(left)
    for begin in range(0, len(left), job.world):
        found: list[tuple[Key, Row]] = []
        for number in left[begin : begin + job.world][job.rank : job.rank + 1]:  # one, or none in the last round
            job.on_progress(number, " ".join(map(str, entries[number].key[1:])))
            found.append((entries[number].key, bench.row(entries[number])))
        for made in gather(found):
            rows |= made
        results["rows"] = [asdict(row) for row in rows.values()]
        bench.write(results)
    bench.write(results)
    job.on_progress(len(entries), "")
    return results


def _teacher(model: Model) -> Model | None:
    """Return the teacher of a tuned model, whose exact trajectories it is measured against; None if it has none.

    Raises:
        ModelError: the teacher is not to be found or has other weights now, or the model is a student without one.
    """
    if model.tuned is None:
        if model.flow_map is not None:
            raise ModelError(
                f"{model.name} is a student that does not say who its teacher was, so it has no trajectories to be measured against: "
                "measure its samples as a set, by fewstep.evaluate.metrics.judge.Judge.of(images)(samples)"
            )
        return None
    try:
        teacher = load_model(model.tuned.teacher, trust=imports_code(model))  # who trusts a student's code trusts its teacher's
    except ModelError as error:
        mend = "; make the student with out=..., which saves a teacher in memory beside it" if model.folder is None else ""
        raise ModelError(f"{model.name} is measured against the teacher that it was tuned from: {error}{mend}") from error
    if teacher.fingerprint != model.tuned.fingerprint:
        raise ModelError(
            f"{model.name} was tuned from {model.tuned.teacher} with fingerprint {model.tuned.fingerprint}; that model now has "
            f"{teacher.fingerprint}: put the old weights back"
        )
    return teacher


def _scale_of(tuned: Tuned, problem: Problem) -> float:
    """Return the scale at which the teacher of a tuned model sampled; where the model is told its scale, that one."""
    return problem.guidance if tuned.guidance is None else tuned.guidance


class _Run(NamedTuple):
    """The samples ``[num, *D]`` of a sampler, and what they cost: seconds in all and without the network, evaluations of each, bytes.

    ``levels`` are the noise levels of the evaluations and of the end; ``outside`` is the share of a reflected model's pixels that lay
    beyond its cube before they were folded.
    """

    samples: Tensor
    seconds: float
    solver_seconds: float
    evaluations: int
    peak_memory: int | None
    levels: list[float | None]
    outside: float | None = None


@dataclass(frozen=True)
class _Stamp:
    """The fields of ``reference.json``: what the reference depends on, and its own error."""

    stamp: str
    error: Number


class _Bench:
    """The noises, the conditions, the reference and the data that the rows of one benchmark share."""

    def __init__(self, problem: Problem, setup: Setup, job: Job) -> None:
        self.problem, self.setup, self.job = problem, setup, job
        self.seeds = list(range(setup.seed, setup.seed + setup.num))
        self.labels = problem.labels(self.seeds)
        teacher, tuned = _teacher(problem.model), problem.model.tuned
        self.identity: dict[str, Any] = {
            "fingerprint": problem.fingerprint,
            "seed": setup.seed,
            "num": setup.num,
            "guidance": problem.guidance,
            "batch": setup.batch,
            "reference": {"solver": "unipc-3", "nfe": REFERENCE_NFE},
        }
        if teacher is not None:
            self.identity["reference"]["teacher"] = teacher.fingerprint
        self.quality = self._quality(setup.data or problem.model.data or (None if teacher is None else teacher.data))
        exact = problem if teacher is None or tuned is None else Problem(teacher, _scale_of(tuned, problem), problem.device)
        self.reference_guidance = exact.guidance
        self.exact, self.reference_error = self._reference(exact)

    def _quality(self, data: str | None) -> Quality | None:
        """Return what samples are compared with; None if the model's data is not known.

        Raises:
            FewstepError: features without data, or images of another shape than the model's.
        """
        features, name = self.setup.features, self.problem.name
        if data is None:
            if features is not None:
                raise FewstepError(
                    f"{name} does not know its data, so there is nothing to compare features with: name the data, or leave the features out"
                )
            return None
        images = load_images(data).x
        if images.shape[1:] != self.problem.shape:
            raise FewstepError(f"{data} has images of shape {tuple(images.shape[1:])}, {name} makes {self.problem.shape}")
        if self.setup.data is not None:
            fingerprint = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]
            self.identity["data"] = {"name": Path(data).stem, "num": len(images), "fingerprint": fingerprint}
        default = "digits" if data == "digits" else "pixels"
        return Quality.of(images, default if features is None else features, self.problem.device)

    # -- samples ----------------------------------------------------------------------------------------------------

    def _batches(self, every: slice = slice(None)) -> Iterator[tuple[list[int], Cond]]:
        """Yield the batches of noises, or some of them, with their conditions."""
        for start in range(0, len(self.seeds), self.setup.batch)[every]:
            seeds = self.seeds[start : start + self.setup.batch]
            yield seeds, self.problem.cond(seeds)

    @torch.no_grad()
    def _reference(self, exact: Problem) -> tuple[Tensor, float]:
        """Return the reference samples of a problem, and their distance to those of half as many evaluations.

        They are cached on disk; the processes share their batches, which are the same whatever the number of processes.
        """
        path, about, (rank, world) = self.job.folder / REFERENCE, self.job.folder / "reference.json", (self.job.rank, self.job.world)
        stamp, known = json.dumps(self.identity, sort_keys=True), None
        if rank == 0 and path.exists() and about.exists():
            meta = held_to(read_file(about), _Stamp, about)
            known = meta.error if meta.stamp == stamp else None
        known = from_first(known)
        if known is not None:
            return read_samples(path), known
        self.job.on_progress(0, "reference trajectory")

        def ends(sampler: Sampler, seeds: list[int], cond: Cond) -> Tensor:
            return run(exact.teacher, sampler.tableau, exact.start(seeds, sampler.tableau.nodes), cond, seeds=seeds).cpu()

        fine, coarse = reference_sampler(exact.schedule), reference_sampler(exact.schedule, REFERENCE_NFE // 2)
        parts, error = list[Tensor](), 0.0
        for seeds, cond in self._batches(slice(rank, None, world)):
            parts.append(ends(fine, seeds, cond))
            if seeds[0] == self.seeds[0]:
                error = rmse(ends(coarse, seeds, cond), parts[0])
        shares, error = gather(parts), from_first(error)
        rounds = [part for round_ in itertools.zip_longest(*shares) for part in round_ if part is not None]
        samples = torch.cat(rounds).contiguous()
        if rank == 0:
            write_whole(path, lambda temporary: save_file({"x": samples}, temporary))
            write_whole(about, json.dumps({"stamp": stamp, "error": error}).encode())
        return samples, error

    @torch.no_grad()
    def run(self, entry: Entry) -> _Run:
        """Run the sampler of an entry on all noises.

        Raises:
            FewstepError: it cannot, or its samples are not finite or of another shape; whatever another library raises.
        """
        problem, sampler = self.problem, entry.sampler
        memory, denoiser = PeakMemory(problem.device), timed(problem.denoiser)
        begin, samples, times = now(problem.device), [], []
        for seeds, cond in self._batches():
            made = entry.samples(denoiser, seeds, cond)
            if made.shape != (len(seeds), *problem.shape):
                raise FewstepError(f"samples should have shape {(len(seeds), *problem.shape)}, these have {tuple(made.shape)}")
            samples.append(made)
            times = times or list(denoiser.times)
        seconds, together = now(problem.device) - begin, torch.cat(samples).cpu()
        peak = memory.bytes()
        if denoiser.evaluated == 0:
            raise FewstepError("it made no network evaluation")
        bad = int((~torch.isfinite(together)).flatten(1).any(1).sum())
        if bad:
            raise FewstepError(f"{bad} of {len(together)} samples are not finite")
        end = (entry.time_grid if sampler is None else sampler.grid).t[-1]
        levels, domain, outside = self._levels([*times, float(end)]), problem.model.domain, None
        if domain is not None:
            outside, together = domain.outside(together), domain.fold(together)[0]
        return _Run(together, seconds, seconds - denoiser.seconds, -(-denoiser.evaluated // len(together)), peak, levels, outside)

    def _levels(self, times: list[float]) -> list[float | None]:
        """Return ``sigma/alpha`` at some times of the schedule; None where it is infinite."""
        schedule, t = self.problem.schedule, torch.tensor(times, dtype=torch.float64)
        levels = (schedule.sigma(t) / schedule.alpha(t)).tolist()
        return [level if math.isfinite(level) else None for level in levels]

    # -- rows -------------------------------------------------------------------------------------------------------

    def row(self, entry: Entry) -> Row:
        """Run one sampler, measure it, and save its first samples and its errors; return a row that says why if that fails."""
        path = picture_file(self.job.folder, entry.key)
        try:
            made = self.run(entry)
            measured = self.measure(made.samples)
        except Exception as error:
            if entry.trusted and not isinstance(error, FewstepError | RuntimeError):
                raise  # a mistake in this library, not a failure of the sampler
            path.unlink(missing_ok=True)
            why = str(error if isinstance(error, FewstepError) else FewstepError(f"{type(error).__name__}: {error}"))
            return self._row(entry, {**NO_METRICS, "rmse": None, "seconds": None, "solver_seconds": None, "failed": why})
        errors = sample_errors(made.samples, self.exact)
        save_samples(path, made.samples, errors)
        cost = {"seconds": made.seconds, "solver_seconds": made.solver_seconds, "peak_memory": made.peak_memory, "levels": made.levels}
        cost |= {"outside": made.outside, "processes": self.job.world, "threads": torch.get_num_threads()}
        if isinstance(self.problem.denoiser, FlowMap):
            cost["arithmetic"] = self.problem.denoiser.arithmetic(entry.time_grid.t)
        cost["calls"] = made.evaluations * calls_of(self.problem.denoiser)
        if made.evaluations != entry.nfe:
            cost |= {"nfe": made.evaluations, "planned": entry.nfe}
        return self._row(entry, {**self.errors(errors), **measured, **cost})

    def _row(self, entry: Entry, fields: dict[str, Any]) -> Row:
        known = {"library": entry.library, "solver": entry.solver, "grid": entry.grid, "nfe": entry.nfe}
        known |= {"num": self.setup.num, "guidance": self.problem.guidance, "statistics": entry.statistics}
        return Row(**{**known, "artifact": entry.artifact, **fields})

    def is_up_to_date(self, entry: Entry, row: Row) -> bool:
        """Return whether a row has not failed, was made of what its entry is made of, and its samples are there."""
        if row.failed is not None or not has_errors(picture_file(self.job.folder, row.key)):
            return False
        features = None if self.quality is None else self.quality.name
        return (row.statistics, row.artifact, row.fd_features) == (entry.statistics, entry.artifact, features)

    @staticmethod
    def errors(errors: Tensor) -> dict[str, Any]:
        """Summarise the errors ``[num]`` of a row's samples."""
        median, p95 = torch.quantile(errors, torch.tensor([0.5, 0.95], dtype=errors.dtype)).tolist()
        return {"rmse": rms(errors), "rmse_ci": rmse_interval(errors), "error_median": median, "error_p95": p95}

    def measure(self, samples: Tensor) -> dict[str, Any]:
        """Compare samples with the data as sets of images, if the data is known."""
        return NO_METRICS if self.quality is None else self.quality.measure(samples, self.labels)

    # -- results ----------------------------------------------------------------------------------------------------

    def results(self, machine: dict[str, Any]) -> dict[str, Any]:
        """Return the results on disk if they are of this very problem, version and machine, else an empty table; others are set aside.

        A row says itself how many threads and processes there were, which follow from how a run was started.
        """
        path, command = self.job.folder / "results.json", self.job.command
        if path.exists():
            old = read_results(path)
            theirs = {**(old.get("machine") or {}), "threads": machine["threads"]}
            if (old.get("problem"), old.get("version"), theirs) == (self.identity, version("fewstep"), machine):
                commands = [
                    one for one in dict.fromkeys([*str(old.get("command", "")).split(" && "), command]) if one
                ]  # all that made its rows
                reference, features = old.get("reference") or {}, None if self.quality is None else self.quality.name
                if "recall" not in reference or reference.get("fd_features") != features:
                    reference = self.reference()
                reference = {**reference, "guidance": self.reference_guidance}  # which older versions did not write
                return {**old, "machine": machine, "command": " && ".join(commands), "reference": reference}
            if old.get("rows"):
                aside = path.with_name(f"results-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.json")
                path.replace(aside)
                log.warning("%s was of another problem, version or machine; its rows are in %s now", path, aside.name)
        return {
            "version": version("fewstep"),
            "command": command,
            "model": self.problem.name,
            "machine": machine,
            "problem": self.identity,
            "reference": self.reference(),
            "rows": [],
            "skipped": [],
        }

    def reference(self) -> dict[str, Any]:
        """Describe the reference trajectory: its solver, guidance and own error, and the quality of the samples at its end."""
        halves = None if self.quality is None else self.quality.halves
        known = {**self.identity["reference"], "guidance": self.reference_guidance, "error": self.reference_error}
        return {**known, **self.measure(self.exact), "fd_data_halves": halves}

    def write(self, results: dict[str, Any]) -> None:
        """Write the results as they stand, in the first process."""
        if self.job.rank:
            return
        write_whole(self.job.folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())


def _differences(machines: Sequence[dict[str, Any]]) -> str:
    """Return what is not the same on all machines."""
    found = [f"{key} {' and '.join(sorted({str(one[key]) for one in machines}))}" for key in machines[0]]
    return ", ".join(text for text in found if " and " in text) + "; use machines of one kind, and start all processes alike"
