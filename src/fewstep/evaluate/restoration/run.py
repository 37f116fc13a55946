"""Run a benchmark of restorations: the same pictures, measurements and noises for all rows, each written as soon as it is made."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, FlowMap
from fewstep.data.images import Images, load_images
from fewstep.evaluate.benchmark.cost import TimedDenoiser, machine_of, now
from fewstep.evaluate.metrics.quality import feature_network
from fewstep.evaluate.metrics.restoration import check_ssim, coverage, feature_distance, mean_and_error, misfit, psnr, ssim
from fewstep.evaluate.restoration.plan import STRIDE, RestorationBenchConfig, RestorationEntry, planned_restorations
from fewstep.evaluate.restoration.rows import (
    PICTURES,
    PSEUDO_INVERSE,
    RestorationKey,
    RestorationResults,
    RestorationRow,
    as_json,
    by_task,
    read_restorations,
    read_row_file,
    row_file,
    save_row_file,
)
from fewstep.inverse.posterior import sample_posterior
from fewstep.inverse.start import pseudo_inverse
from fewstep.inverse.tasks import Task
from fewstep.models.problem import Problem
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError, ModelError
from fewstep.runtime.job import Job, Progress

__all__ = ["RestorationBench", "bench_restorations"]

log = logging.getLogger("fewstep")
ENOUGH = 19  # samples for an interval of 90 %


def bench_restorations(
    problem: Problem, config: RestorationBenchConfig, out: str | Path, *, command: str = "", on_progress: Progress | None = None
) -> RestorationResults:
    """Restore the same pictures by each method, and write a row for each to ``out/results.json``.

    All rows of a task see the same measurements, and all rows start from the same noises: sample ``s`` of picture ``i`` has a seed of its
    own. The model is sampled without classes, at its null label; one that has classes and no null label is told the true labels of the
    pictures. Rows that are there already are not made again, and rows of other configurations of the same pictures stay beside them.

    Args:
        problem: the prior.
        config: the rows.
        out: the folder.
        command: the command line, for the results.
        on_progress: called with the network evaluations done, of `restoration_cost`, and what comes next.

    Returns:
        What ``results.json`` then holds.

    Raises:
        ModelError: as `planned_restorations`; a model with classes, neither a null label nor labels of the pictures.
        FewstepError: no data, fewer pictures than asked for or of another shape, features that cannot be had, torchmetrics is missing.
        ArtifactError: another job works in the folder, it cannot be written, or a file in it is damaged.

    Examples:
        >>> import tempfile, fewstep
        >>> from fewstep.evaluate.restoration.plan import RestorationBenchConfig
        >>> from fewstep.evaluate.restoration.run import bench_restorations
        >>> from fewstep.models.problem import Problem
        >>> config = RestorationBenchConfig(("upscale",), ("projection",), nfe=(2,), num=2, samples=1, several=0)
        >>> problem = Problem(fewstep.load_model("digits-edm"))
        >>> with tempfile.TemporaryDirectory() as out:
        ...     [row.method for row in bench_restorations(problem, config, out).rows]
        ['pseudo-inverse', 'projection']
    """
    return RestorationBench.of(problem, config).run(out, command=command, on_progress=on_progress)


class _Made(NamedTuple):
    """Samples, ``[num, *D]`` one of each picture and ``[S, several, *D]`` all of the first ones, with what they cost."""

    first: Tensor
    all_of_few: Tensor
    evaluations: float
    seconds: float


@dataclass(frozen=True, eq=False)
class RestorationBench:
    """Hold a benchmark of restorations that can be run: its rows, the pictures that they share, and what measures them.

    Attributes:
        problem: the prior.
        config: the rows by name.
        entries: the rows, in their order.
        left_out: what cannot be a row, with the reason.
        truth: the pictures, ``[num, C, H, W]``.
        labels: what the model is told of them, ``[num]``; None is its null label, or nothing.
        network: that makes features.
        shared: what all rows depend on.
    """

    problem: Problem
    config: RestorationBenchConfig
    entries: list[RestorationEntry]
    left_out: list[str]
    truth: Tensor
    labels: Tensor | None
    network: torch.nn.Module
    shared: dict[str, Any]

    @classmethod
    def of(cls, problem: Problem, config: RestorationBenchConfig) -> RestorationBench:
        """Plan the rows, and load the pictures and the features; nothing is written yet.

        Arguments and errors are those of `bench_restorations`.
        """
        check_ssim()
        entries, left_out = planned_restorations(problem, config)
        model = problem.model
        source = config.data or model.data
        if source is None:
            raise FewstepError(f"{model.name} does not know its data: name pictures to be restored, data=, best ones that it has not seen")
        images = load_images(source)
        if tuple(images.x.shape[1:]) != problem.shape:
            raise FewstepError(f"{source} has pictures of shape {tuple(images.x.shape[1:])}, {model.name} makes {problem.shape}")
        if len(images.x) < config.num:
            raise FewstepError(f"{source} has {len(images.x)} pictures, not {config.num}: ask for fewer")
        default = "digits" if source == "digits" else "pixels"
        network, name = feature_network(default if config.features is None else config.features, problem.shape, problem.device)
        truth = images.x[: config.num]
        labels = _labels(problem, images, config.num)
        shared = {
            "fingerprint": problem.fingerprint,
            "guidance": problem.guidance,
            "data": images.name,
            "pictures": hashlib.sha256(truth.numpy().tobytes()).hexdigest()[:16],
            "labels": "null" if labels is None else "true",
            "num": config.num,
            "seed": config.seed,
            "batch": config.batch,
            "features": name,
        }
        return cls(problem, config, entries, left_out, truth.to(problem.device), labels, network, shared)

    def run(self, out: str | Path, *, command: str = "", on_progress: Progress | None = None) -> RestorationResults:
        """Make the rows that are not there. Arguments, result and errors are those of `bench_restorations`."""
        with Job.open("bench", out, device=self.problem.device, on_progress=on_progress, command=command, alone=True) as job:
            return _Table(self, job).run()

    def request(self, entry: RestorationEntry) -> str:
        """Return a hash of all that a row depends on."""
        sampler = None if entry.sampler is None else entry.sampler.tableau.fingerprint
        facts = (self.shared, entry.key, repr(entry.method), sampler, *self._counts(entry), version("fewstep"))
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]

    def measured(self, task: Task) -> Tensor:
        """Return what is measured of all pictures, ``[num, *Y]``."""
        return task.measure(self.truth, range(self.config.seed, self.config.seed + self.config.num))

    def row(self, entry: RestorationEntry, path: Path, note: Callable[[int], None]) -> RestorationRow:
        """Make one row, and write its pictures; a method that fails gives one that says why."""
        task, row = entry.task, self.named(entry)
        y = self.measured(task)
        try:
            made = self._made(entry, y, note)
            bad = int((~torch.isfinite(made.first)).flatten(1).any(1).sum()) + int((~torch.isfinite(made.all_of_few)).any())
            if bad:
                raise FewstepError(f"{bad} of its samples are not finite")
            figures = self._figures(made, task, y)
        except (FewstepError, RuntimeError) as error:
            path.unlink(missing_ok=True)
            return replace(row, failed=str(error if isinstance(error, FewstepError) else f"{type(error).__name__}: {error}"))
        decibels = psnr(made.first, self.truth)
        kept = {"x": made.first[:PICTURES], "psnr": decibels}
        if entry.method is None:
            kept |= {"truth": self.truth[:PICTURES], "y": y[:PICTURES]}
        save_row_file(path, kept)
        value, error = mean_and_error(decibels)
        return replace(row, psnr=value, psnr_error=error, nfe=made.evaluations, seconds=made.seconds, **figures)

    def named(self, entry: RestorationEntry) -> RestorationRow:
        """Return the row of an entry without figures."""
        task, name, solver, grid, nfe = entry.key
        counts = (self.config.num, *self._counts(entry))
        return RestorationRow(task, name, solver, grid, nfe, nfe, entry.products, *counts, self.request(entry))

    def _counts(self, entry: RestorationEntry) -> tuple[int, int]:
        """Return how many samples are made of each of the first pictures, and of how many: 1 and 0 where no picture has several."""
        samples, several = self.config.samples, self.config.several
        return (1, 0) if entry.method is None or samples == 1 or several == 0 else (samples, several)

    def _figures(self, made: _Made, task: Task, y: Tensor) -> dict[str, float]:
        """Measure samples, as fields of the row."""
        network, device = self.network, self.problem.device
        figures = {
            "ssim": float(ssim(made.first, self.truth).mean()),
            "features": feature_distance(made.first, self.truth, network, device),
            "misfit": float(misfit(made.first, task.measurement, y, task.noise).mean()),
        }
        if made.all_of_few.numel():
            few = self.truth[: self.config.several]
            figures |= {
                "mean": float(psnr(made.all_of_few.mean(0), few).mean()),
                "alone": float(psnr(made.first[: len(few)], few).mean()),
                "spread": float(made.all_of_few.std(0).mean()),
            }
            if len(made.all_of_few) >= ENOUGH and (share := coverage(made.all_of_few, few)) is not None:
                figures["coverage"] = share
        if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
            raise FewstepError(f"its {' and '.join(bad)} cannot be measured: the samples are too large")
        return figures

    def _made(self, entry: RestorationEntry, y: Tensor, note: Callable[[int], None]) -> _Made:
        """Make the samples of a row."""
        problem, config, task = self.problem, self.config, entry.task
        none = self.truth.new_zeros(0)
        if entry.method is None or entry.sampler is None:
            begin = now(problem.device)
            first = pseudo_inverse(task.measurement, y, task.noise, problem.shape)
            return _Made(first, none, 0.0, (now(problem.device) - begin) / config.num)
        inner = problem.denoiser
        assert not isinstance(inner, FlowMap)  # a student is refused
        tableau, denoiser = entry.sampler.tableau, TimedDenoiser(inner)
        parts, seconds, done = list[Tensor](), 0.0, 0
        method = entry.method.prepared(inner, problem.shape, self._cond(torch.tensor([0])))
        for pictures, seeds in self._batches():
            cond, x = self._cond(pictures), problem.start(seeds, tableau.nodes)
            begin = now(problem.device)
            parts.append(
                sample_posterior(denoiser, tableau, x, task.measurement, y[pictures], task.noise, cond, method=method, seeds=seeds).detach()
            )
            seconds, done = seconds + now(problem.device) - begin, done + len(seeds)
            note(done * entry.nfe)
        samples = torch.cat(parts)
        first, rest = samples[: config.num], samples[config.num :]
        few = none
        if len(rest):
            few = torch.cat([first[None, : config.several], rest.reshape(config.samples - 1, config.several, *problem.shape)])
        return _Made(first, few, denoiser.evaluated / len(samples), seconds / len(samples))

    def _batches(self) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield numbers of pictures and the seeds of their samples: one of each picture, then the further ones of the first."""
        config = self.config
        every = [(i, 0) for i in range(config.num)] + [(i, s) for s in range(1, config.samples) for i in range(config.several)]
        for start in range(0, len(every), config.batch):
            part = every[start : start + config.batch]
            yield torch.tensor([i for i, _ in part], device=self.truth.device), [config.seed + i + STRIDE * s for i, s in part]

    def _cond(self, pictures: Tensor) -> Cond:
        labels = None if self.labels is None else self.labels[pictures.cpu()]
        return self.problem.conditions(range(len(pictures)), labels)


def _labels(problem: Problem, images: Images, num: int) -> Tensor | None:
    """Return the true labels of the pictures, ``[num]``, where the model cannot do without; None where it can.

    Raises:
        ModelError: it cannot, and the pictures have none that it knows.
    """
    model = problem.model
    if model.classes is None or model.null_label is not None:
        return None
    if images.labels is None:
        raise ModelError(
            f"{model.name} has classes and no null label, and {images.name} has no labels: give pictures with the labels that it knows"
        )
    return model.condition(images.labels[:num], num)  # which says which label it does not know


class _Table:
    """The rows of a folder."""

    def __init__(self, bench: RestorationBench, job: Job) -> None:
        self.bench, self.job = bench, job
        self.path = job.folder / "results.json"
        self.results = replace(self._there(), left_out=bench.left_out)
        self.rows: dict[RestorationKey, RestorationRow] = {row.key: row for row in self.results.rows}

    def _there(self) -> RestorationResults:
        """Return the results on disk if they are of these very pictures, this model and version, else an empty table; others are set
        aside.
        """
        job, shared, machine = self.job, self.bench.shared, machine_of(self.job.device)
        if self.path.exists():
            old = read_restorations(self.path)
            if (old.problem, old.version) == (shared, version("fewstep")):
                commands = [one for one in dict.fromkeys([*old.command.split(" && "), job.command]) if one]
                return replace(old, command=" && ".join(commands), machine=machine)
            if old.rows:
                aside = self.path.with_name(f"results-{hashlib.sha256(self.path.read_bytes()).hexdigest()[:8]}.json")
                self.path.replace(aside)
                log.warning(
                    "%s was of another model, other pictures, another --batch, --features or version; its rows are in %s now",
                    self.path,
                    aside.name,
                )
        return RestorationResults(version("fewstep"), job.command, self.bench.problem.name, machine, shared, [])

    def run(self) -> RestorationResults:
        """Make the rows that are not there, and return all."""
        done, each = 0, self.bench.config.made
        for entry in self.bench.entries:
            named = self.bench.named(entry)
            if not self._is_up_to_date(named):
                words = f"{entry.task.name.split(':')[0]}, {entry.name} {entry.solver} {entry.nfe or ''}".rstrip()
                self.job.on_progress(done, words)
                path, before = row_file(self.job.folder, named), done
                row = self.bench.row(entry, path, lambda more, before=before, words=words: self.job.on_progress(before + more, words))
                self.rows[entry.key] = row
                self._write()
            done += entry.nfe * each
        self._write()
        self.job.on_progress(done, "")
        return self.results

    def _is_up_to_date(self, named: RestorationRow) -> bool:
        there = self.rows.get(named.key)
        if there is None or there.failed is not None or there.request != named.request:
            return False
        return self._kept(there) is not None

    def _kept(self, row: RestorationRow) -> dict[str, Tensor] | None:
        """Return what a row keeps; None where it is not there, or damaged."""
        try:
            return read_row_file(row_file(self.job.folder, row))
        except ArtifactError:
            return None

    def _write(self) -> None:
        rows = [row for mine in by_task(self.rows.values()).values() for row in self._compared(mine)]
        self.rows = {row.key: row for row in rows}
        self.results = replace(self.results, rows=rows)
        write_whole(self.path, (json.dumps(as_json(self.results), indent=1) + "\n").encode())

    def _compared(self, rows: list[RestorationRow]) -> list[RestorationRow]:
        """Return the rows of a task with their differences to its first method, as far as every picture's figures are there."""
        first = next((row for row in rows if row.method != PSEUDO_INVERSE and row.failed is None), None)
        base = None if first is None else self._kept(first)
        if first is None or base is None:
            return rows
        compared = list[RestorationRow]()
        for row in rows:
            own = None if row.failed is not None else self._kept(row)
            if own is None:
                compared.append(row)
                continue
            gain, error = mean_and_error(own["psnr"] - base["psnr"])
            compared.append(replace(row, gain=gain, gain_error=error))
        return compared
