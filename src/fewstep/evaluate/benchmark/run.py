"""Run a benchmark: the same noises, a tight reference trajectory, one row per sampler."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core.denoiser import FlowMap
from fewstep.evaluate.benchmark.bench import Bench, check_some_run, compared_with, on_path, one_machine, paths_differ, run_rows
from fewstep.evaluate.benchmark.comparison import Comparison
from fewstep.evaluate.benchmark.entries import Entry
from fewstep.evaluate.benchmark.exact import exact_problem, exact_samples
from fewstep.evaluate.benchmark.plan import BenchmarkConfig, Setup, planned_entries
from fewstep.evaluate.metrics.confidence import parted, rms, rmse_interval, sample_errors
from fewstep.evaluate.metrics.distances import rmse
from fewstep.evaluate.metrics.quality import NO_METRICS
from fewstep.evaluate.rows import REFERENCE, Row, has_errors, picture_file, read_results, read_samples, save_samples
from fewstep.models.model import Model
from fewstep.models.problem import Problem
from fewstep.runtime.artifact import Number, held_to, read_file, write_whole
from fewstep.runtime.errors import SolverError
from fewstep.runtime.job import Job
from fewstep.runtime.process import default_device, from_first, gather
from fewstep.sampling.reference import REFERENCE_NFE

__all__ = ["benchmark", "run_entries"]

WORK = "benchmark"
NO_TRAJECTORY = (
    "{} adds noise, so its samples follow no trajectory and have no error to one: compare it by the distance to the data, "
    "with fewstep bench --stochastic"
)


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

    A sampler that fails, by an exception or by samples that are not finite, is a row that says why; the others go on. One that adds noise
    is not run: it has no error to a trajectory. The processes of ``torchrun`` share the rows, and all of them get the result.

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
    """Run the entries of a benchmark, in their order, and return what ``results.json`` then holds, see `run_rows`.

    Raises:
        SolverError: none of them can run (and why).
        FewstepError: the reference or the data cannot be had, or the processes are on machines of different kinds.
    """
    skipped = {entry.key: why for entry in entries if (why := _why_not(entry))}
    check_some_run(entries, skipped)
    machine = one_machine(problem)
    return run_rows(_TrajectoryBench(problem, setup, job), entries, machine, skipped)


def _why_not(entry: Entry) -> str:
    """Say why an entry cannot be a row; empty if it can."""
    return entry.why_not() or (NO_TRAJECTORY.format(entry.solver) if entry.stochastic else "")


@dataclass(frozen=True)
class _Stamp:
    """The fields of ``reference.json``: what the reference depends on, and its own error."""

    stamp: str
    error: Number


class _TrajectoryBench(Bench[Row]):
    """A benchmark of errors to exact trajectories, and the reference that its rows share."""

    row_class = Row

    def __init__(self, problem: Problem, setup: Setup, job: Job) -> None:
        exact = exact_problem(problem)
        teacher = None if exact is problem else exact.model
        own = problem.model.data or (None if teacher is None else teacher.data)
        super().__init__(problem, setup, job, compared_with(problem, setup, own))
        self.identity["reference"] = {"solver": "unipc-3", "nfe": REFERENCE_NFE}
        if teacher is not None:
            self.identity["reference"]["teacher"] = teacher.fingerprint
        self.reference_guidance = exact.guidance
        self.exact, self.reference_error = self._reference(exact)

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

        parts, error = list[Tensor](), 0.0
        for seeds, cond in self.batches(slice(rank, None, world)):
            parts.append(exact_samples(exact, seeds, cond))
            if seeds[0] == self.seeds[0]:
                error = rmse(exact_samples(exact, seeds, cond, REFERENCE_NFE // 2), parts[0])
        shares, error = gather(parts), from_first(error)
        rounds = [part for round_ in itertools.zip_longest(*shares) for part in round_ if part is not None]
        samples = torch.cat(rounds).contiguous()
        if rank == 0:
            write_whole(path, lambda temporary: save_file({"x": samples}, temporary))
            write_whole(about, json.dumps({"stamp": stamp, "error": error}).encode())
        return samples, error

    def row(self, entry: Entry) -> Row:
        """Run one sampler, measure it, and save its first samples and its errors; return a row that says why if that fails."""
        path = picture_file(self.job.folder, entry.key)
        try:
            if entry.stochastic is None and self._adds_noise(entry):
                raise SolverError(NO_TRAJECTORY.format(entry.solver))
            made = self.run(entry)
            measured = self.measure(made.samples)
        except Exception as error:
            why = self.why_failed(entry, error)
            path.unlink(missing_ok=True)
            return Row(**{**self.named(entry), **NO_METRICS, "rmse": None, "seconds": None, "solver_seconds": None, "failed": why})
        errors = sample_errors(made.samples, self.exact)
        save_samples(path, made.samples, errors)
        cost = self.cost(entry, made)
        if isinstance(self.problem.denoiser, FlowMap):
            cost["arithmetic"] = self.problem.denoiser.arithmetic(entry.time_grid.t)
        return Row(**{**self.named(entry), **self.errors(errors), **measured, **cost})

    @torch.no_grad()
    def _adds_noise(self, entry: Entry) -> bool:
        """Return whether the samples of somebody else's function depend on more than their start: by two of them, made twice."""
        seeds = self.seeds[:2]
        cond = self.problem.cond(seeds)
        try:
            first, second = (entry.samples(self.problem.denoiser, seeds, cond, on_path(seeds, path)) for path in (0, 1))
        except Exception:  # its row says why
            return False
        return paths_differ(first, second)

    def is_up_to_date(self, entry: Entry, row: Row) -> bool:
        """Return whether a row has not failed, was made of what its entry is made of, and its samples are there."""
        if row.failed is not None or not has_errors(picture_file(self.job.folder, row.key)):
            return False
        features = None if self.quality is None else self.quality.name
        return (row.statistics, row.artifact, row.fd_features) == (entry.statistics, entry.artifact, features)

    @staticmethod
    def errors(errors: Tensor) -> dict[str, Any]:
        """Summarise the errors ``[num]`` of a row's samples."""
        median, p95, p99 = torch.quantile(errors, torch.tensor([0.5, 0.95, 0.99], dtype=errors.dtype)).tolist()
        quantiles = {"error_median": median, "error_p95": p95, "error_p99": p99}
        whole = {"rmse": rms(errors), "rmse_ci": rmse_interval(errors), "error_mean": float(errors.mean())}
        return {**whole, **quantiles, "parted": parted(errors)}

    def measure(self, samples: Tensor) -> dict[str, Any]:
        """Compare samples with the data as sets of images, if the data is known."""
        return NO_METRICS if self.quality is None else self.quality.measure(samples, self.labels)

    def read(self, path: Path) -> dict[str, Any]:
        return read_results(path)

    def shared(self, old: Mapping[str, Any]) -> dict[str, Any]:
        reference, features = old.get("reference") or {}, None if self.quality is None else self.quality.name
        if "recall" not in reference or reference.get("fd_features") != features:
            reference = self.reference()
        return {"reference": {**reference, "guidance": self.reference_guidance}}  # which older versions did not write

    def reference(self) -> dict[str, Any]:
        """Describe the reference trajectory: its solver, guidance and own error, and the quality of the samples at its end."""
        halves = None if self.quality is None else self.quality.halves
        known = {**self.identity["reference"], "guidance": self.reference_guidance, "error": self.reference_error}
        return {**known, **self.measure(self.exact), "fd_data_halves": halves}
