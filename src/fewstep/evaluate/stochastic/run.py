"""Run a benchmark of stochastic samplers: the same starts for all rows, several noise paths from each, measured against the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from fewstep.core.denoiser import FlowMap
from fewstep.evaluate.benchmark.bench import (
    NEXT_PATH,
    Bench,
    Compared,
    Sampled,
    check_some_run,
    compared_with,
    one_machine,
    paths_differ,
    run_rows,
)
from fewstep.evaluate.benchmark.entries import Entry
from fewstep.evaluate.benchmark.plan import BenchmarkConfig, planned_entries
from fewstep.evaluate.metrics.quality import NO_METRICS, Quality
from fewstep.evaluate.rows import picture_file
from fewstep.evaluate.stochastic.rows import MEASURES, NoiseRow, read_noise_results, save_paths
from fewstep.models.problem import Problem
from fewstep.runtime.errors import FewstepError, ModelError, SolverError
from fewstep.runtime.front_door import at_least, checked_class
from fewstep.runtime.job import Job, Progress

__all__ = ["StochasticBench", "StochasticBenchConfig", "bench_stochastic"]


@checked_class
@dataclass(frozen=True)
class StochasticBenchConfig(BenchmarkConfig):
    """The rows of a benchmark of stochastic samplers by name, and what they share.

    Attributes:
        solvers, grids, nfe, num, seed, guidance, peers, batch, statistics, any_statistics, samplers, features, data: see `BenchmarkConfig`;
            ``num`` is the number of samples of each path.
        paths: noise paths from each start, of a sampler that adds noise.

    Raises:
        FewstepError: as `BenchmarkConfig`, or fewer than two paths.
    """

    paths: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, paths=2)
        if self.num > NEXT_PATH:
            raise FewstepError(f"num is at most {NEXT_PATH}, so that each path has a seed of its own, got {self.num}")


def bench_stochastic(
    problem: Problem, config: StochasticBenchConfig, out: str | Path, *, command: str = "", on_progress: Progress | None = None
) -> dict[str, Any]:
    """Compare stochastic and deterministic samplers at equal evaluations, by the distance of their samples to the data.

    All rows start from the same noises. A sampler that adds noise is run on several noise paths from each; each path is measured by
    itself, as a set of ``num`` samples, so that a row's distances have the same bias as those of a sampler that adds none. The table,
    ``out/results.json``, is written after each row; rows that are there already are not run again. A sampler that fails is a row that
    says why. The processes of ``torchrun`` share the rows.

    Args:
        problem: the model, and its guidance scale.
        config: the rows.
        out: the folder.
        command: the command line, for the results.
        on_progress: called with the number of rows done and the name of the next.

    Returns:
        What ``results.json`` then holds: ``rows`` are `NoiseRow`, ``data`` what they are compared with.

    Raises:
        ModelError: the model is a student, which jumps and follows no SDE.
        FewstepError: as `BenchmarkConfig`; no data, or too few samples or data for the features; processes on machines of different kinds.
        SolverError: no sampler can be run, or none of those that can adds noise.
        ArtifactError: another job works in the folder, it cannot be written, or a file in it is damaged.

    Examples:
        >>> import tempfile, fewstep
        >>> from fewstep.evaluate.stochastic.run import StochasticBenchConfig, bench_stochastic
        >>> from fewstep.models.problem import Problem
        >>> config = StochasticBenchConfig(("ddim", "ddim:eta=1"), ("karras",), nfe=(3,), num=40, paths=2)
        >>> with tempfile.TemporaryDirectory() as out:
        ...     rows = bench_stochastic(Problem(fewstep.load_model("digits-edm")), config, out)["rows"]
        >>> [(row["solver"], row["paths"]) for row in rows]
        [('ddim', 1), ('ddim:eta=1', 2)]
    """
    return StochasticBench.of(problem, config).run(out, command=command, on_progress=on_progress)


@dataclass(frozen=True, eq=False)
class StochasticBench:
    """Hold a benchmark of stochastic samplers that can be run.

    Attributes:
        problem: the model.
        config: the rows by name.
        entries: the rows, in their order.
        skipped: why some of them cannot be run, by key.
        quality: the data that samples are compared with.
        named: how the results name the data, where it was named.
    """

    problem: Problem
    config: StochasticBenchConfig
    entries: list[Entry]
    skipped: dict[Any, str]
    quality: Quality
    named: dict[str, Any] | None

    @classmethod
    def of(cls, problem: Problem, config: StochasticBenchConfig) -> StochasticBench:
        """Plan the rows, and load the data and the features; nothing is written yet.

        Arguments and errors are those of `bench_stochastic`.
        """
        name = problem.name
        if isinstance(problem.denoiser, FlowMap):
            raise ModelError(f"{name} is a student, which jumps from time to time and follows no SDE: compare samplers of its teacher")
        entries = planned_entries(problem, config)
        skipped = {entry.key: why for entry in entries if (why := entry.why_not())}
        check_some_run(entries, skipped)
        able = [entry for entry in entries if entry.key not in skipped]
        if all(entry.stochastic is False for entry in able):
            known = ", ".join(dict.fromkeys(entry.solver for entry in able))
            raise SolverError(
                f"none of {known} adds noise, so there is nothing stochastic to compare: name a solver that does, as ddim:eta=1 or "
                "sa-solver, or leave --stochastic out"
            )
        setup = config.setup
        if setup.data is None and problem.model.data is None:
            raise FewstepError(
                f"{name} does not know its data, and samplers that add noise are judged by their distance to it: name the data, as "
                "--data PICTURES"
            )
        quality, named = compared_with(problem, setup, problem.model.data)
        assert quality is not None  # there is data
        _check_counts(quality, config.num)
        return cls(problem, config, entries, skipped, quality, named)

    @property
    def cost(self) -> int:
        """The network evaluations that all rows take together, at most."""
        able = [entry for entry in self.entries if entry.key not in self.skipped]
        return self.config.num * sum(entry.nfe * (1 if entry.stochastic is False else self.config.paths) for entry in able)

    def run(self, out: str | Path, *, command: str = "", on_progress: Progress | None = None) -> dict[str, Any]:
        """Make the rows that are not there. Arguments, result and errors are those of `bench_stochastic`."""
        device = self.problem.device
        with Job.open("bench", out, device=device, on_progress=on_progress, command=command) as job:
            return run_rows(_NoiseBench(self, job), self.entries, one_machine(self.problem), self.skipped)


def _check_counts(quality: Quality, num: int) -> None:
    """Refuse fewer samples or data than a covariance of the features needs.

    Raises:
        FewstepError: there are.
    """
    width, images = quality.gaussian.mean.numel(), len(quality.kernel.features)
    for count, what, mend in (
        (num, "samples", f"make {width + 1} or more (--num)"),
        (images, "images of the data", "name more of them (--data)"),
    ):
        if count <= width:
            raise FewstepError(
                f"a Frechet distance in the {width} features {quality.name} needs more than {width} {what}, got {count}: {mend}, or name "
                "features of fewer numbers (--features)"
            )


class _NoiseBench(Bench[NoiseRow]):
    """A benchmark of distances to the data, over noise paths."""

    row_class = NoiseRow

    def __init__(self, planned: StochasticBench, job: Job) -> None:
        super().__init__(planned.problem, planned.config.setup, job, Compared(planned.quality, planned.named))
        self.data, self.paths = planned.quality, planned.config.paths
        self.identity["paths"] = self.paths

    def row(self, entry: Entry) -> NoiseRow:
        """Run one sampler on its noise paths, measure each, and save the first samples; return a row that says why if that fails."""
        try:
            runs = self._runs(entry)
            of_paths = [self.data.measure(made.samples, self.labels) for made in runs]
        except Exception as error:
            why = self.why_failed(entry, error)
            picture_file(self.job.folder, entry.key).unlink(missing_ok=True)
            return NoiseRow(**self._known(entry, entry.stochastic, 1), failed=why)
        samples = torch.stack([made.samples for made in runs])
        save_paths(self.job.folder, entry.key, samples)
        known = self._known(entry, len(runs) > 1, len(runs)) | self.cost(entry, runs[0])
        known |= {name: mean(getattr(made, name) for made in runs) for name in ("seconds", "solver_seconds")}
        return NoiseRow(**{**known, **_summary(of_paths), "spread": _spread(samples)})

    def _runs(self, entry: Entry) -> list[Sampled]:
        """Run a sampler on all its paths; a function of somebody else's whose second path is the first adds no noise."""
        runs = [self.run(entry)]
        if entry.stochastic is not False:
            runs.append(self.run(entry, 1))
            if entry.stochastic is None and not paths_differ(runs[0].samples, runs[1].samples):
                return runs[:1]
            runs += [self.run(entry, path) for path in range(2, self.paths)]
        return runs

    def _known(self, entry: Entry, stochastic: bool | None, paths: int) -> dict[str, Any]:
        return self.named(entry) | {"stochastic": stochastic, "paths": paths, "options": entry.options}

    def is_up_to_date(self, entry: Entry, row: NoiseRow) -> bool:
        """Return whether a row has not failed, and was made of what its entry is made of; its pictures need not be there."""
        made_of = entry.statistics, entry.artifact, self.data.name
        return row.failed is None and (row.statistics, row.artifact, row.fd_features) == made_of

    def read(self, path: Path) -> dict[str, Any]:
        return read_noise_results(path)

    def shared(self, old: Mapping[str, Any]) -> dict[str, Any]:
        images = len(self.data.kernel.features)
        return {"data": {"num": images, "features": self.data.name, "fd_halves": self.data.halves}}


def _summary(of_paths: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of a row from those of its paths."""
    made: dict[str, Any] = dict.fromkeys(NO_METRICS)
    for name in MEASURES:
        values = [one[name] for one in of_paths]
        made[name] = None if None in values else mean(values)
    for name in ("fd_ci", "kd_ci"):
        ends = [one[name] for one in of_paths]
        made[name] = None if None in ends else [mean(side) for side in zip(*ends, strict=True)]
    made["fd_features"] = of_paths[0]["fd_features"]
    made["fd_spread"] = stdev(one["fd"] for one in of_paths) if len(of_paths) > 1 else None
    return made | {"of_paths": [{name: one[name] for name in MEASURES} for one in of_paths]}


def _spread(samples: Tensor) -> float | None:
    """Return the root mean square over samples of their standard deviation over paths, of ``[paths, num, *D]``; None of one path."""
    return None if len(samples) == 1 else float(samples.double().var(0).mean().sqrt())
