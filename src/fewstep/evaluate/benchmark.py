"""Samplers against each other on one model: the same noises, a tight reference trajectory, one row per sampler."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.core.artifact import check_writable, read_json, write_whole
from fewstep.core.errors import ArtifactError, ModelError, SolverError
from fewstep.core.grid import TimeGrid
from fewstep.core.process import default_device
from fewstep.core.sampler import Sampler
from fewstep.core.sampling import Cond, Denoiser, aimed, sample, start_noise
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Solver
from fewstep.evaluate.metrics import frechet_distance, load_features, rmse
from fewstep.evaluate.peers import peer_steps, run_peer
from fewstep.evaluate.plan import OPTIMIZED, BenchmarkConfig, Key, grid_of, impossible, planned_keys, saved_samplers, solvers_of
from fewstep.models.data import load_images
from fewstep.models.loaders import Model
from fewstep.models.operators.student import OperatorDenoiser
from fewstep.models.zoo import load_model
from fewstep.solvers.reference import REFERENCE_NFE, reference_sampler

__all__ = ["Row", "benchmark", "picture_file", "read_samples"]

KEPT = 16  # samples of each row kept for pictures


@dataclass(frozen=True)
class Row:
    """One sampler on one model. ``rmse`` is the distance to the reference trajectory's end, ``fd`` the Frechet distance to the data."""

    solver: str
    library: str
    grid: str
    nfe: int
    num: int
    guidance: float
    rmse: float
    fd: float | None
    fd_features: str | None
    seconds: float
    solver_seconds: float  # without the network
    statistics: str | None = None  # the fingerprint of those that the solver used
    artifact: str | None = None  # that of an optimised grid or a saved sampler
    arithmetic: float | None = None  # of an operator student: its operations, in evaluations of its network alone

    @property
    def key(self) -> Key:
        """What tells rows of one benchmark apart."""
        return self.library, self.solver, self.grid, self.nfe


class _Timed:
    """A denoiser that knows how long it took."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.seconds = denoiser, 0.0

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        begin = _now(x.device)
        x0 = self.denoiser(x, t, cond)
        self.seconds += _now(x.device) - begin
        return x0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def benchmark(
    model: Model, config: BenchmarkConfig, out: Path, *, command: str, observe: Callable[[int, str], None] | None = None
) -> dict[str, Any]:
    """Run all rows and keep them in ``out/results.json``, which is written after each row; rows already there are not run again.

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
    for number, key in enumerate(planned):
        if observe is not None:
            observe(number, " ".join(map(str, key[1:])))
        made_of = (problem.statistics(key), problem.artifact(key)) if key not in skipped else None
        if made_of is None or (key in rows and (rows[key].statistics, rows[key].artifact) == made_of and picture_file(out, key).exists()):
            continue
        rows[key] = problem.row(key)
        results["rows"] = [asdict(row) for row in rows.values()]
        problem.write(results)
    problem.write(results)
    if observe is not None:
        observe(len(planned), "")
    return results


def picture_file(out: Path, key: Key) -> Path:
    """Where the first samples of a row are kept."""
    return out / "samples" / f"{re.sub('[:/]', '_', '-'.join(map(str, key)))}.safetensors"


def read_samples(path: Path) -> Tensor:
    """Samples that a benchmark kept, ``[n, *D]``.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        return load_file(path)["x"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): remove it and run the benchmark again") from error


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
        data = model.data or (None if teacher is None else teacher.data)
        self.data = load_images(data).x if data else None
        self.features_name = "digits" if data == "digits" else "pixels"
        self.features = load_features(self.features_name, model.shape) if self.data is not None else None
        self.exact, self.reference_error = self._reference(observe)

    # -- samples ----------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[tuple[list[int], Tensor | None]]:
        for start in range(0, len(self.seeds), self.config.batch):
            part = slice(start, start + self.config.batch)
            yield self.seeds[part], None if self.labels is None else self.labels[part].to(self.device)

    def row(self, key: Key) -> Row:
        """Run one sampler, measure it, and keep its first samples."""
        samples, seconds, solver_seconds = self.run(*key)
        library, solver, grid, nfe = key
        num, guidance, fd = self.config.num, self.config.guidance, self.frechet(samples)
        features = None if fd is None else self.features_name
        first = {"x": samples[:KEPT].contiguous()}
        write_whole(picture_file(self.out, key), lambda temporary: save_file(first, temporary))
        error = rmse(samples, self.exact)
        made_of = (self.statistics(key), self.artifact(key))
        operator = self.model.denoiser.network if isinstance(self.model.denoiser, OperatorDenoiser) else None
        work = None if operator is None else operator.arithmetic(self._sampler(key).grid.t)
        return Row(solver, library, grid, nfe, num, guidance, error, fd, features, seconds, solver_seconds, *made_of, work)

    def statistics(self, key: Key) -> str | None:
        """The fingerprint of the statistics that a row's solver uses, if any."""
        used = getattr(self.solvers.get(key[1]), "statistics", None) if key[0] == "fewstep" and key not in self.saved else None
        return None if used is None else used.fingerprint

    def artifact(self, key: Key) -> str | None:
        """The fingerprint of the optimised grid or saved sampler of a row, if it has one."""
        if key not in self.saved and key[2] != OPTIMIZED:
            return None
        if key in self.saved:
            tableau = self.saved[key].tableau
            tables = [tableau.nodes.t, tableau.update, tableau.record, tableau.bias]
        else:
            tables = [self.model.optimized(key[1], key[3], self.config.guidance).t]
        return hashlib.sha256(repr([table.tolist() for table in tables]).encode()).hexdigest()[:16]

    @torch.no_grad()
    def run(self, library: str, solver: str, grid_name: str, nfe: int) -> tuple[Tensor, float, float]:
        """Samples ``[num, *D]`` of one row, its seconds, and its seconds without the network."""
        key, sampler, denoiser = (library, solver, grid_name, nfe), None, self.denoiser
        if library == "fewstep":
            sampler = self._sampler(key)
            denoiser = aimed(denoiser, sampler.tableau)
        timed, begin = _Timed(denoiser), _now(self.device)
        if sampler is not None:
            samples = [self._ours(timed, sampler, seeds, cond) for seeds, cond in self._batches()]
        else:
            grid = grid_of(key, self.model, self.config, peer_steps(solver, nfe))
            samples = [self._theirs(timed, solver, grid, seeds, cond) for seeds, cond in self._batches()]
        seconds = _now(self.device) - begin
        return torch.cat(samples).cpu(), seconds, seconds - timed.seconds

    def _sampler(self, key: Key) -> Sampler:
        if key in self.saved:
            return self.saved[key]
        method = self.solvers[key[1]]
        schedule = self.denoiser.schedule
        return Sampler.build(method, grid_of(key, self.model, self.config, method.steps_on(schedule, key[3])), schedule)

    def _ours(self, denoiser: Denoiser, sampler: Sampler, seeds: list[int], cond: Cond) -> Tensor:
        x = start_noise(sampler.tableau.nodes, seeds, self.model.shape).to(self.device)
        return sample(denoiser, sampler, x, cond, seeds=seeds)

    def _theirs(self, denoiser: Denoiser, name: str, grid: TimeGrid, seeds: list[int], cond: Cond) -> Tensor:
        x = start_noise(Nodes.at(denoiser.schedule, grid.t), seeds, self.model.shape).to(self.device)
        return run_peer(name, denoiser, grid, x, cond)

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

    def frechet(self, samples: Tensor) -> float | None:
        """Frechet distance of samples to the model's data, if that is known."""
        if self.data is None or self.features is None:
            return None
        return frechet_distance(self.data, samples, self.features)

    # -- results ----------------------------------------------------------------------------------------------------

    def results(self, command: str) -> dict[str, Any]:
        """The results so far: those on disk if they are of this very problem, else an empty table."""
        path = self.out / "results.json"
        if path.exists():
            found = read_json(path)
            if (found.get("problem"), found.get("version"), found.get("machine")) == (self.identity, version("fewstep"), _machine()):
                commands = list(dict.fromkeys([*str(found["command"]).split(" && "), command]))  # all that made its rows
                return {**found, "command": " && ".join(commands)}
        exact_fd = self.frechet(self.exact)
        halves = None
        if self.data is not None and self.features is not None:
            order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))
            first, second = self.data[order].chunk(2)
            halves = frechet_distance(first, second, self.features)
        return {
            "version": version("fewstep"),
            "command": command,
            "model": self.model.name,
            "machine": _machine(),
            "problem": self.identity,
            "reference": {**self.identity["reference"], "error": self.reference_error, "fd": exact_fd, "fd_data_halves": halves},
            "rows": [],
            "skipped": [],
        }

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
