"""Samplers against each other on one model: the same noises, a tight reference trajectory, one row per sampler."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.tableau import Nodes, Solver
from fewstep.data.images import load_images
from fewstep.evaluate.benchmark.cost import PeakMemory, Timed, now
from fewstep.evaluate.benchmark.peers import LIBRARY, run_peer
from fewstep.evaluate.benchmark.plan import (
    OPTIMIZED,
    BenchmarkConfig,
    Key,
    grid_of,
    impossible,
    planned_keys,
    saved_samplers,
    solvers_of,
    steps_of,
)
from fewstep.evaluate.benchmark.rows import Row, has_errors, keep_samples, picture_file, read_errors, read_samples
from fewstep.evaluate.benchmark.third_party import load_third_party, run_third_party
from fewstep.evaluate.metrics.confidence import rms, rmse_interval, sample_errors
from fewstep.evaluate.metrics.distances import rmse
from fewstep.evaluate.metrics.quality import NOTHING, Quality
from fewstep.models.formats.folders import Model
from fewstep.models.networks.operator import OperatorDenoiser
from fewstep.models.zoo import load_model
from fewstep.runtime.artifact import check_writable, read_json, write_whole
from fewstep.runtime.entry import is_entry
from fewstep.runtime.errors import FewstepError, ModelError, SolverError
from fewstep.runtime.process import default_device
from fewstep.sampling.loop import aimed, sample
from fewstep.sampling.noise import start_noise
from fewstep.sampling.reference import REFERENCE_NFE, reference_sampler
from fewstep.sampling.sampler import Sampler

__all__ = ["Row", "benchmark", "picture_file", "read_errors", "read_samples"]


class _Run(NamedTuple):
    """What running a sampler gave: samples ``[num, *D]``, seconds in all and without the network, evaluations a sample, bytes, levels."""

    samples: Tensor
    seconds: float
    solver_seconds: float
    evaluations: int
    peak_memory: int | None
    levels: list[float | None]


def benchmark(
    model: Model, config: BenchmarkConfig, out: Path, *, command: str, observe: Callable[[int, str], None] | None = None
) -> dict[str, Any]:
    """Run all rows and keep them in ``out/results.json``, which is written after each row; rows already there are not run again.

    A sampler that fails, by an error or by samples that are not finite, is a row that says why; the others go on.

    ``observe`` is called with the number of rows done and the name of the next. Returns what ``results.json`` holds.

    Raises:
        FewstepError: as the solvers, grids and models it uses; also if no row could be run at all.
    """
    check_writable(out)
    saved = saved_samplers(model, config)
    planned = list(dict.fromkeys([*planned_keys(config), *saved]))
    solvers = solvers_of(model, config)
    skipped = {key: why for key in planned if key not in saved and (why := impossible(key, model, config, solvers))}
    if len(skipped) == len(planned):
        raise SolverError("; ".join(dict.fromkeys(skipped.values())))
    problem = _Problem(model, config, solvers, saved, out, observe)
    results = problem.results(command)
    results["skipped"] = [{"key": list(key), "why": why} for key, why in skipped.items()]  # said, and the others go on
    rows: dict[Key, Row] = {row.key: row for row in (Row(**r) for r in results["rows"])}
    problem.write(results)  # before any samples of another problem are overwritten
    for number, key in enumerate(planned):
        if observe is not None:
            observe(number, " ".join(map(str, key[1:])))
        if key in skipped or (key in rows and problem.is_up_to_date(rows[key])):
            continue
        rows[key] = problem.row(key)
        results["rows"] = [asdict(row) for row in rows.values()]
        problem.write(results)
    problem.write(results)
    if observe is not None:
        observe(len(planned), "")
    return results


def _teacher(model: Model) -> Model | None:
    """The teacher of a tuned model, whose exact trajectories it is measured against.

    Raises:
        ModelError: it is not to be found, or has other weights now.
    """
    if model.tuned is None:
        return None
    try:
        teacher = load_model(model.tuned.teacher)
    except ModelError as error:
        raise ModelError(f"{model.name} is measured against the teacher that it was tuned from: {error}") from error
    if teacher.fingerprint != model.tuned.fingerprint:
        raise ModelError(
            f"{model.name} was tuned from {model.tuned.teacher} with fingerprint {model.tuned.fingerprint}; that model now has "
            f"{teacher.fingerprint}: put the old weights back"
        )
    return teacher


class _Problem:
    """The noises, the conditions, the reference and the data of one benchmark."""

    def __init__(
        self,
        model: Model,
        config: BenchmarkConfig,
        solvers: dict[str, Solver | SolverError],
        saved: dict[Key, Sampler],
        out: Path,
        observe: Callable[[int, str], None] | None,
    ) -> None:
        self.model, self.config, self.saved, self.out = model, config, saved, out
        self.solvers = {name: solver for name, solver in solvers.items() if not isinstance(solver, SolverError)}
        self.device = default_device()
        model.to(self.device)
        self.denoiser = model.guided(config.guidance)
        teacher = _teacher(model)
        self.exact_denoiser = (
            self.denoiser if teacher is None or model.tuned is None else teacher.to(self.device).guided(model.tuned.guidance)
        )
        self.seeds = list(range(config.seed, config.seed + config.num))
        self.labels = model.labels(self.seeds)
        self.identity = {
            "fingerprint": model.fingerprint,
            "seed": config.seed,
            "num": config.num,
            "guidance": config.guidance,
            "batch": config.batch,
            "reference": {"solver": "unipc-3", "nfe": REFERENCE_NFE},
        }
        if teacher is not None:
            self.identity["reference"]["teacher"] = teacher.fingerprint
        self.third_parties = {(one.module, one.name): one for one in map(load_third_party, filter(is_entry, config.peers))}
        self.quality = self._quality(config.data or model.data or (None if teacher is None else teacher.data))
        self.exact, self.reference_error = self._reference(observe)

    def _quality(self, data: str | None) -> Quality | None:
        if data is None:
            if self.config.features is not None:
                raise FewstepError(
                    f"{self.model.name} does not know its data, so there is nothing to compare features with: name the data, or leave "
                    f"the features out"
                )
            return None
        images = load_images(data).x
        if images.shape[1:] != self.model.shape:
            raise FewstepError(f"{data} has images of shape {tuple(images.shape[1:])}, {self.model.name} makes {self.model.shape}")
        if self.config.data is not None:
            fingerprint = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]
            self.identity["data"] = {"name": Path(data).stem, "num": len(images), "fingerprint": fingerprint}
        default = "digits" if data == "digits" else "pixels"
        return Quality.of(images, default if self.config.features is None else self.config.features, self.device)

    # -- samples ----------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[tuple[list[int], Tensor | None]]:
        for start in range(0, len(self.seeds), self.config.batch):
            part = slice(start, start + self.config.batch)
            yield self.seeds[part], None if self.labels is None else self.labels[part].to(self.device)

    def row(self, key: Key) -> Row:
        """Run one sampler, measure it, and keep its first samples and its errors; a row that says why if that fails."""
        path = picture_file(self.out, key)
        try:
            made = self.run(key)
            measured = self.measure(made.samples)
        except Exception as error:
            if key[0] == "fewstep" and not isinstance(error, FewstepError | RuntimeError):
                raise  # not the sampler's failure but a mistake in this library
            path.unlink(missing_ok=True)
            why = str(error) if isinstance(error, FewstepError) else f"{type(error).__name__}: {error}"
            return self._row(key, {**NOTHING, "rmse": None, "seconds": None, "solver_seconds": None, "failed": why})
        errors = sample_errors(made.samples, self.exact)
        keep_samples(path, made.samples, errors)
        cost = {"seconds": made.seconds, "solver_seconds": made.solver_seconds, "peak_memory": made.peak_memory, "levels": made.levels}
        operator = self.model.denoiser.network if isinstance(self.model.denoiser, OperatorDenoiser) else None
        if operator is not None:
            cost["arithmetic"] = operator.arithmetic(self._sampler(key).grid.t)
        if made.evaluations != key[3]:
            cost |= {"nfe": made.evaluations, "planned": key[3]}
        return self._row(key, {**self.errors(errors), **measured, **cost})

    def _row(self, key: Key, fields: dict[str, Any]) -> Row:
        library, solver, grid, nfe = key
        known = {"library": library, "solver": solver, "grid": grid, "nfe": nfe, "num": self.config.num, "guidance": self.config.guidance}
        return Row(**{**known, "statistics": self.statistics(key), "artifact": self.artifact(key), **fields})

    def is_up_to_date(self, row: Row) -> bool:
        """Whether a row of this problem has not failed, was made of what it would be made of now, and its samples are there."""
        features = None if self.quality is None else self.quality.name
        made_of = (self.statistics(row.key), self.artifact(row.key), features)
        same = row.failed is None and (row.statistics, row.artifact, row.fd_features) == made_of
        return same and has_errors(picture_file(self.out, row.key))

    @staticmethod
    def errors(errors: Tensor) -> dict[str, Any]:
        """What a row says of its errors ``[num]``."""
        median, p95 = torch.quantile(errors, torch.tensor([0.5, 0.95], dtype=errors.dtype)).tolist()
        return {"rmse": rms(errors), "rmse_ci": rmse_interval(errors), "error_median": median, "error_p95": p95}

    def measure(self, samples: Tensor) -> dict[str, Any]:
        """What a row says of its samples as a set of images, if the model's data is known."""
        return NOTHING if self.quality is None else self.quality.measure(samples, self.labels)

    def statistics(self, key: Key) -> str | None:
        """The fingerprint of the statistics that a row's solver uses, if any."""
        used = getattr(self.solvers.get(key[1]), "statistics", None) if key[0] == "fewstep" and key not in self.saved else None
        return None if used is None else used.fingerprint

    def artifact(self, key: Key) -> str | None:
        """The fingerprint of the optimised grid, saved sampler or source of a row, if it has one; the version of a peer."""
        if key[0] == LIBRARY:
            return f"{LIBRARY}-{version(LIBRARY)}"
        if key[:2] in self.third_parties:
            return self.third_parties[key[:2]].fingerprint
        if key not in self.saved and key[2] != OPTIMIZED:
            return None
        if key in self.saved:
            tableau = self.saved[key].tableau
            tables = [tableau.nodes.t, tableau.update, tableau.record, tableau.bias]
        else:
            tables = [self.model.optimized(key[1], key[3], self.config.guidance).t]
        return hashlib.sha256(repr([table.tolist() for table in tables]).encode()).hexdigest()[:16]

    @torch.no_grad()
    def run(self, key: Key) -> _Run:
        """Run the sampler of one row.

        Raises:
            FewstepError: it cannot, or its samples are not finite or of another shape; whatever another library raises.
        """
        sampler = self._sampler(key) if key[0] == "fewstep" else None
        memory = PeakMemory(self.device)
        timed = Timed(self.denoiser if sampler is None else aimed(self.denoiser, sampler.tableau))
        begin, samples, times = now(self.device), [], []
        for seeds, cond in self._batches():
            made = self._theirs(timed, key, seeds, cond) if sampler is None else self._ours(timed, sampler, seeds, cond)
            if made.shape != (len(seeds), *self.model.shape):
                raise FewstepError(f"samples should have shape {(len(seeds), *self.model.shape)}, these have {tuple(made.shape)}")
            samples.append(made)
            times = times or list(timed.times)
        seconds, together = now(self.device) - begin, torch.cat(samples).cpu()
        peak = memory.bytes()
        bad = int((~torch.isfinite(together)).flatten(1).any(1).sum())
        if bad:
            raise FewstepError(f"{bad} of {len(together)} samples are not finite")
        grid = grid_of(key, self.model, self.config, steps_of(key, self.denoiser.schedule)) if sampler is None else sampler.grid
        levels = self._levels([*times, float(grid.t[-1])])
        return _Run(together, seconds, seconds - timed.seconds, -(-timed.evaluated // len(together)), peak, levels)

    def _levels(self, times: list[float]) -> list[float | None]:
        """``sigma/alpha`` at some times of the schedule; None where it is infinite."""
        schedule, t = self.denoiser.schedule, torch.tensor(times, dtype=torch.float64)
        levels = (schedule.sigma(t) / schedule.alpha(t)).tolist()
        return [level if math.isfinite(level) else None for level in levels]

    def _sampler(self, key: Key) -> Sampler:
        if key in self.saved:
            return self.saved[key]
        method = self.solvers[key[1]]
        schedule = self.denoiser.schedule
        return Sampler.build(method, grid_of(key, self.model, self.config, method.steps_on(schedule, key[3])), schedule)

    def _ours(self, denoiser: Denoiser, sampler: Sampler, seeds: list[int], cond: Cond) -> Tensor:
        x = start_noise(sampler.tableau.nodes, seeds, self.model.shape).to(self.device)
        return sample(denoiser, sampler, x, cond, seeds=seeds)

    def _theirs(self, denoiser: Denoiser, key: Key, seeds: list[int], cond: Cond) -> Tensor:
        grid = grid_of(key, self.model, self.config, steps_of(key, denoiser.schedule))
        x = start_noise(Nodes.at(denoiser.schedule, grid.t), seeds, self.model.shape).to(self.device)
        if key[:2] in self.third_parties:
            return run_third_party(self.third_parties[key[:2]], denoiser, grid, x, cond, seeds)
        return run_peer(key[1], denoiser, grid, x, cond)

    @torch.no_grad()
    def _reference(self, observe: Callable[[int, str], None] | None) -> tuple[Tensor, float]:
        """The reference samples, and how far they are from those of half as many evaluations; kept on disk."""
        path = self.out / "reference.safetensors"
        stamp = json.dumps(self.identity, sort_keys=True)
        if path.exists() and (self.out / "reference.json").exists():
            meta = read_json(self.out / "reference.json")
            if meta.get("stamp") == stamp:
                return read_samples(path), float(meta["error"])
        if observe is not None:
            observe(0, "reference trajectory")
        schedule = self.denoiser.schedule
        fine, coarse = reference_sampler(schedule), reference_sampler(schedule, REFERENCE_NFE // 2)
        exact, error = [], 0.0
        for k, (seeds, cond) in enumerate(self._batches()):
            exact.append(self._ours(self.exact_denoiser, fine, seeds, cond).cpu())
            if k == 0:
                error = rmse(self._ours(self.exact_denoiser, coarse, seeds, cond).cpu(), exact[0])
        samples = torch.cat(exact).contiguous()
        write_whole(path, lambda temporary: save_file({"x": samples}, temporary))
        write_whole(self.out / "reference.json", json.dumps({"stamp": stamp, "error": error}).encode())
        return samples, error

    # -- results ----------------------------------------------------------------------------------------------------

    def results(self, command: str) -> dict[str, Any]:
        """The results so far: those on disk if they are of this very problem, else an empty table."""
        path = self.out / "results.json"
        if path.exists():
            found = read_json(path)
            if (found.get("problem"), found.get("version"), found.get("machine")) == (self.identity, version("fewstep"), _machine()):
                commands = list(dict.fromkeys([*str(found["command"]).split(" && "), command]))  # all that made its rows
                reference, features = found["reference"], None if self.quality is None else self.quality.name
                if "recall" not in reference or reference["fd_features"] != features:
                    reference = self.reference()
                return {**found, "command": " && ".join(commands), "reference": reference}
        return {
            "version": version("fewstep"),
            "command": command,
            "model": self.model.name,
            "machine": _machine(),
            "problem": self.identity,
            "reference": self.reference(),
            "rows": [],
            "skipped": [],
        }

    def reference(self) -> dict[str, Any]:
        """The reference trajectory: how it was made, its own error, and how good the samples at its end are."""
        halves = None if self.quality is None else self.quality.halves
        return {**self.identity["reference"], "error": self.reference_error, **self.measure(self.exact), "fd_data_halves": halves}

    def write(self, results: dict[str, Any]) -> None:
        """Keep the table as it stands."""
        write_whole(self.out / "results.json", (json.dumps(results, indent=1) + "\n").encode())


def _machine() -> dict[str, Any]:
    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": device.type,
        "processor": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
