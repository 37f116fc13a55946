"""The parts that all rows of a benchmark share, whatever they measure: noises, conditions and data, a table that grows row by row."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond
from fewstep.data.images import load_images
from fewstep.evaluate.benchmark.cost import PeakMemory, machine_of, now, timed
from fewstep.evaluate.benchmark.entries import Entry
from fewstep.evaluate.benchmark.plan import Setup
from fewstep.evaluate.metrics.quality import Quality
from fewstep.evaluate.rows import Key
from fewstep.models.guidance import calls_of
from fewstep.models.problem import Problem
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import FewstepError, SolverError
from fewstep.runtime.job import Job
from fewstep.runtime.process import from_first, gather

__all__ = [
    "NEXT_PATH",
    "Bench",
    "Compared",
    "Sampled",
    "check_some_run",
    "compared_with",
    "on_path",
    "one_machine",
    "paths_differ",
    "run_rows",
]

log = logging.getLogger("fewstep")
NEXT_PATH = 1 << 20  # from the seed of a noise path to that of the same sample's next one
SAME = 1e-3  # relative: by how much samples may differ that should be the same


class HasKey(Protocol):
    """A row of a table."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> Key: ...


R = TypeVar("R", bound=HasKey)


class Sampled(NamedTuple):
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


class Compared(NamedTuple):
    """The data that samples are compared with as a set, and how ``results.json`` names it where it was named; None if it is not known."""

    quality: Quality | None
    named: dict[str, Any] | None


def compared_with(problem: Problem, setup: Setup, own: str | None) -> Compared:
    """Load the data and the features that samples are compared with.

    Args:
        problem: the model.
        setup: the features, and the data where it was named.
        own: the model's own data, as `load_images` takes them; None if they are not known. To name them is to name nothing.

    Raises:
        FewstepError: features without data, or images of another shape than the model's.
    """
    features, name, data = setup.features, problem.name, setup.data or own
    if data is None:
        if features is not None:
            raise FewstepError(
                f"{name} does not know its data, so there is nothing to compare features with: name the data, or leave the features out"
            )
        return Compared(None, None)
    images = load_images(data).x
    if images.shape[1:] != problem.shape:
        raise FewstepError(f"{data} has images of shape {tuple(images.shape[1:])}, {name} makes {problem.shape}")
    named = None
    if data != own:
        fingerprint = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]
        named = {"name": Path(data).stem, "num": len(images), "fingerprint": fingerprint}
    default = "digits" if data == "digits" else "pixels"
    return Compared(Quality.of(images, default if features is None else features, problem.device), named)


class Bench(ABC, Generic[R]):
    """The noises, the conditions and the data that the rows of one benchmark share.

    Attributes:
        problem, setup, job: what is sampled, how, and where the table lies.
        quality: what samples are compared with, if it is known.
        identity: what all rows depend on, ``problem`` of ``results.json``.
    """

    row_class: ClassVar[type[Any]]

    def __init__(self, problem: Problem, setup: Setup, job: Job, compared: Compared) -> None:
        self.problem, self.setup, self.job = problem, setup, job
        self.seeds = list(range(setup.seed, setup.seed + setup.num))
        self.labels = problem.labels(self.seeds)
        self.quality = compared.quality
        self.identity: dict[str, Any] = {
            "fingerprint": problem.fingerprint,
            "seed": setup.seed,
            "num": setup.num,
            "guidance": problem.guidance,
            "batch": setup.batch,
        }
        if compared.named is not None:
            self.identity["data"] = compared.named

    # -- what a benchmark is ----------------------------------------------------------------------------------------

    @abstractmethod
    def row(self, entry: Entry) -> R:
        """Run one sampler and measure it; return a row that says why if that fails."""

    @abstractmethod
    def is_up_to_date(self, entry: Entry, row: R) -> bool:
        """Return whether a row has not failed, and was made of what its entry is made of."""

    @abstractmethod
    def read(self, path: Path) -> dict[str, Any]:
        """Read ``results.json``.

        Raises:
            ArtifactError: it is damaged, or of another benchmark.
        """

    @abstractmethod
    def shared(self, old: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of ``results.json`` that are measured once for all rows; ``old`` holds those that are there already."""

    # -- samples ----------------------------------------------------------------------------------------------------

    def batches(self, every: slice = slice(None)) -> Iterator[tuple[list[int], Cond]]:
        """Yield the batches of noises, or some of them, with their conditions."""
        for start in range(0, len(self.seeds), self.setup.batch)[every]:
            seeds = self.seeds[start : start + self.setup.batch]
            yield seeds, self.problem.cond(seeds)

    @torch.no_grad()
    def run(self, entry: Entry, path: int = 0) -> Sampled:
        """Run the sampler of an entry on all noises.

        Args:
            entry: the sampler.
            path: which of the paths of the noise that it adds: the first is that of `fewstep.sample` from the same seeds.

        Raises:
            FewstepError: it cannot, or its samples are not finite or of another shape; whatever another library raises.
        """
        problem, sampler = self.problem, entry.sampler
        memory, denoiser = PeakMemory(problem.device), timed(problem.denoiser)
        begin, samples, times = now(problem.device), [], []
        for seeds, cond in self.batches():
            made = entry.samples(denoiser, seeds, cond, on_path(seeds, path))
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
        return Sampled(together, seconds, seconds - denoiser.seconds, -(-denoiser.evaluated // len(together)), peak, levels, outside)

    def _levels(self, times: list[float]) -> list[float | None]:
        """Return ``sigma/alpha`` at some times of the schedule; None where it is infinite."""
        schedule, t = self.problem.schedule, torch.tensor(times, dtype=torch.float64)
        levels = (schedule.sigma(t) / schedule.alpha(t)).tolist()
        return [level if math.isfinite(level) else None for level in levels]

    # -- rows -------------------------------------------------------------------------------------------------------

    def named(self, entry: Entry) -> dict[str, Any]:
        """Return the fields of a row that say which one it is, and what it is made of."""
        known = {"library": entry.library, "solver": entry.solver, "grid": entry.grid, "nfe": entry.nfe}
        known |= {"num": self.setup.num, "guidance": self.problem.guidance, "statistics": entry.statistics}
        return {**known, "artifact": entry.artifact}

    def cost(self, entry: Entry, made: Sampled) -> dict[str, Any]:
        """Return the fields of a row that say what its samples cost, and at which noise levels they were made."""
        cost = {"seconds": made.seconds, "solver_seconds": made.solver_seconds, "peak_memory": made.peak_memory, "levels": made.levels}
        cost |= {"outside": made.outside, "processes": self.job.world, "threads": torch.get_num_threads()}
        cost["calls"] = made.evaluations * calls_of(self.problem.denoiser)
        if made.evaluations != entry.nfe:
            cost |= {"nfe": made.evaluations, "planned": entry.nfe}
        return cost

    @staticmethod
    def why_failed(entry: Entry, error: Exception) -> str:
        """Return what a row says of the exception that its sampler ended with.

        Raises:
            Exception: that one, where it is a mistake in this library and no failure of the sampler.
        """
        if entry.trusted and not isinstance(error, FewstepError | RuntimeError):
            raise error
        return str(error if isinstance(error, FewstepError) else FewstepError(f"{type(error).__name__}: {error}"))

    # -- results ----------------------------------------------------------------------------------------------------

    def results(self, machine: dict[str, Any]) -> dict[str, Any]:
        """Return the results on disk if they are of this very problem, version and machine, else an empty table; others are set aside.

        A row says itself how many threads and processes there were, which follow from how a run was started.
        """
        path, command = self.job.folder / "results.json", self.job.command
        if path.exists():
            old = self.read(path)
            theirs = {**(old.get("machine") or {}), "threads": machine["threads"]}
            if (old.get("problem"), old.get("version"), theirs) == (self.identity, version("fewstep"), machine):
                commands = [
                    one for one in dict.fromkeys([*str(old.get("command", "")).split(" && "), command]) if one
                ]  # all that made its rows
                return {**old, "machine": machine, "command": " && ".join(commands), **self.shared(old)}
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
            **self.shared({}),
            "rows": [],
            "skipped": [],
        }

    def write(self, results: dict[str, Any]) -> None:
        """Write the results as they stand, in the first process."""
        if self.job.rank:
            return
        write_whole(self.job.folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())


def on_path(seeds: Sequence[int], path: int) -> list[int]:
    """Return the seeds of the noise that is added on the way, of one path of each sample."""
    return [seed + path * NEXT_PATH for seed in seeds]


def paths_differ(one: Tensor, other: Tensor) -> bool:
    """Return whether samples ``[B, *D]`` from the same starts on two noise paths differ, by more than arithmetic can explain."""
    return float((one.double() - other.double()).abs().max()) > SAME * float(one.double().abs().max())


def run_rows(bench: Bench[R], entries: Sequence[Entry], machine: dict[str, Any], skipped: Mapping[Key, str]) -> dict[str, Any]:
    """Run the entries of a benchmark that are not skipped, in their order, and return what ``results.json`` then holds.

    Each process runs whole rows, so that its times are those of one process. The first one writes the table, after each round of rows.
    """
    job = bench.job
    results = from_first(bench.results(machine) if job.rank == 0 else {})
    results["skipped"] = [{"key": list(key), "why": why} for key, why in skipped.items()]
    known = {field.name for field in fields(bench.row_class)}
    found: list[R] = [bench.row_class(**{name: one[name] for name in known & set(one)}) for one in results["rows"]]
    rows: dict[Key, R] = {row.key: row for row in found if row.key not in skipped}
    results["rows"] = [asdict(row) for row in rows.values()]
    bench.write(results)  # before any samples of another problem are overwritten
    left = [
        number
        for number, entry in enumerate(entries)
        if job.rank == 0 and entry.key not in skipped and not (entry.key in rows and bench.is_up_to_date(entry, rows[entry.key]))
    ]
    left = from_first(left)
    for begin in range(0, len(left), job.world):
        made: list[tuple[Key, R]] = []
        for number in left[begin : begin + job.world][job.rank : job.rank + 1]:  # one, or none in the last round
            job.on_progress(number, " ".join(map(str, entries[number].key[1:])))
            made.append((entries[number].key, bench.row(entries[number])))
        for some in gather(made):
            rows |= some
        results["rows"] = [asdict(row) for row in rows.values()]
        bench.write(results)
    bench.write(results)
    job.on_progress(len(entries), "")
    return results


def check_some_run(entries: Sequence[Entry], why_not: Mapping[Key, str]) -> None:
    """Refuse a benchmark of which no row can be run.

    Raises:
        SolverError: none can (and why).
    """
    if len(why_not) == len(entries):
        raise SolverError("; ".join(dict.fromkeys(why_not.values())))


def one_machine(problem: Problem) -> dict[str, Any]:
    """Return what times depend on, the same in all processes.

    Raises:
        FewstepError: the processes are on machines of different kinds.
    """
    machine, *others = gather(machine_of(problem.device))
    if any(other != machine for other in others):
        raise FewstepError(f"rows are timed, and processes of this run are on different machines: {_differences([machine, *others])}")
    return machine


def _differences(machines: Sequence[dict[str, Any]]) -> str:
    """Return what is not the same on all machines."""
    found = [f"{key} {' and '.join(sorted({str(one[key]) for one in machines}))}" for key in machines[0]]
    return ", ".join(text for text in found if " and " in text) + "; use machines of one kind, and start all processes alike"
