"""Teacher trajectories as a data set on disk: solved once on many steps, stored at a few times, read at random by a student.

The start ``x_T`` is not stored, since its seed gives it; the class label is, where the model takes one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.domain import Cube
from fewstep.core.grid import RHO, TimeGrid
from fewstep.core.schedule import NoiseSchedule, VPLinear, schedule_from_config
from fewstep.core.tableau import Nodes, Solver, Tableau, tabulate
from fewstep.learn.teacher.dense import interpolation
from fewstep.models.analytic import GaussianDenoiser
from fewstep.models.guidance import scale_range
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_model
from fewstep.runtime.artifact import (
    Count,
    Number,
    Record,
    Whole,
    alike,
    check_file,
    digest_of,
    held_to,
    named_path,
    read_record,
    write_whole,
)
from fewstep.runtime.errors import ArtifactError, FewstepError, SolverError, look_up
from fewstep.runtime.front_door import at_least, check_fields, checked, checked_class, config_of
from fewstep.runtime.job import Job, Progress
from fewstep.runtime.process import wait_for_all
from fewstep.sampling.loop import Step, steps
from fewstep.sampling.noise import seeded_scales, start_noise
from fewstep.sampling.parallel import ParallelConfig, rounds
from fewstep.solvers import make_solver, takes_statistics

__all__ = ["Trajectories", "TrajectoryConfig", "TrajectorySolver", "generate_trajectories", "teacher_grid"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
AGAIN = "remove it and run the same command again"


@dataclass(frozen=True)
class ShardRecord:
    """The entry of a shard in the manifest: its file in the same folder, its number of trajectories, and the checksum of its tensors."""

    file: str
    count: Count
    sha256: str


@dataclass(frozen=True)
class TrajectoriesRecord(Record):
    """The fields of ``manifest.json``: those of `TrajectoryConfig`, of the teacher, and the shards."""

    FORMAT = "fewstep-trajectories"

    num: Count
    nfe: Count
    solver: str
    seed: Whole
    guidance: Number
    label: Whole | None
    batch: Count
    dtype: str
    times: list[Number]
    shape: list[Count]
    classes: Count | None
    schedule: dict[str, Any]
    model: str
    identity: str
    shards: list[ShardRecord]
    card: dict[str, Any]
    scales: tuple[Number, Number] | None = None
    domain: dict[str, Number] | None = None


@checked_class
@dataclass(frozen=True)
class TrajectoryConfig:
    """How to make teacher trajectories.

    Args:
        num: number of trajectories.
        nfe: least number of network evaluations per trajectory: the stored intervals are divided into steps by their length.
        solver: name of a solver that adds no noise, needs no statistics and starts every step at a time of the grid.
        seed: seed of the first trajectory; the next has the next seed.
        guidance: classifier-free guidance scale at which the teacher samples.
        label: one class for all; by default the seed modulo the number of classes.
        batch: number of trajectories solved at a time, and stored in a file.
        dtype: dtype of the stored states: float32, float16 or bfloat16.
        scales: the least and the largest guidance scale, between which each trajectory has one of its own, drawn by its seed; by default
            all have that of ``guidance``.

    Raises:
        FewstepError: a number out of range, both scales and a guidance, an unknown dtype or solver, or a solver that adds noise or needs
            statistics.
    """

    num: int = 8192
    nfe: int = 128
    solver: str = "unipc-3"
    seed: int = 0
    guidance: float = 1.0
    label: int | None = None
    batch: int = 256
    dtype: str = "float32"
    scales: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, num=1, nfe=1, batch=1)
        if self.scales is not None:
            object.__setattr__(self, "scales", scale_range(self.scales))
            if self.guidance != 1:
                raise FewstepError(
                    f"trajectories have one guidance, or scales of their own, not {self.guidance:g} and {self.scales}: leave one out"
                )
        if not math.isfinite(self.guidance):
            raise FewstepError(f"guidance is a finite scale, got {self.guidance}")
        if self.seed < 0 or self.seed + self.num > 2**63:
            raise FewstepError(f"seeds must lie between 0 and 2^63, got {self.seed} and the {self.num - 1} after it: choose another seed")
        look_up(self.dtype, DTYPES, "dtype of trajectories")
        if takes_statistics(self.solver):
            raise SolverError(f"{self.solver} is for few steps and needs statistics of its model: let a solver like unipc-3 be the teacher")
        law, solver = VPLinear(), make_solver(self.solver)
        if tabulate(solver, solver.nodes(TimeGrid.logsnr(law, 4), law)).stochastic:
            raise SolverError(f"{self.solver} adds noise, and a trajectory is the solution of the ODE: use a solver like unipc-3")

    def shards(self, folder: Path) -> dict[Path, range]:
        """Return the files to be made, and the seeds in each."""
        seeds, starts = range(self.seed, self.seed + self.num), range(0, self.num, self.batch)
        return {folder / f"shard-{k:05d}.safetensors": seeds[start : start + self.batch] for k, start in enumerate(starts)}


def teacher_grid(schedule: NoiseSchedule, grid: TimeGrid, nfe: int, evaluations_per_step: int = 1) -> TimeGrid:
    """Divide the intervals of a grid into steps spaced as those of `reference_sampler`, the fewest that make at least ``nfe`` evaluations.

    They are equal within an interval, and as equal as can be between intervals, in ``(sigma/alpha)^(1/7)`` down to the network's last
    level, or in the angle ``arctan(sigma/alpha)`` where the grid starts at ``alpha = 0``. The times of ``grid`` stay as they are, bit for
    bit.
    """
    saved = evaluations_per_step - 1 if bool(schedule.sigma(grid.t[-1]) == 0) else 0  # a last step to sigma = 0 is one evaluation
    steps = max(grid.steps, -(-(nfe + saved) // evaluations_per_step))
    sigma, alpha = schedule.sigma(grid.t), schedule.alpha(grid.t)
    rooted = bool(alpha[0] > 0)
    level = sigma / alpha
    lowest = torch.exp(-schedule.lam(torch.tensor(schedule.t_last, dtype=torch.float64))).minimum(level[level > 0].min())
    place = level.clamp(min=lowest) ** (1 / RHO) if rooted else torch.atan2(sigma, alpha)
    length, parts = -torch.diff(place), torch.ones(grid.steps, dtype=torch.int64)
    for _ in range(steps - grid.steps):
        parts[(length / parts).argmax()] += 1
    times = [grid.t[:1]]
    for k, count in enumerate(parts.tolist()):
        inner = torch.lerp(place[k], place[k + 1], torch.arange(1, count, dtype=torch.float64) / count)
        level = inner**RHO if rooted else torch.tan(inner)
        times += [schedule.t_of_lam(-torch.log(level)), grid.t[k + 1 : k + 2]]
    return TimeGrid(torch.cat(times))


class TrajectorySolver:
    """A solver on the fine grid that returns its states at the stored times: of a predictor-corrector the corrected ones."""

    def __init__(self, denoiser: Denoiser, solver: Solver, grid: TimeGrid, nfe: int, parallel: ParallelConfig | None = None) -> None:
        self.parallel = parallel
        self.denoiser, self.solver, self.grid = denoiser, solver, grid
        self.fine = teacher_grid(denoiser.schedule, grid, nfe, solver.stages)
        self.tableau = tabulate(solver, solver.nodes(self.fine, denoiser.schedule))
        begins = torch.tensor(self.tableau.nodes.begins(self.fine.t))
        starts = begins[torch.isin(self.fine.t[:-1], grid.t[:-1])]  # the evaluations at the grid's times
        if not torch.equal(self.tableau.nodes.t[:-1][starts], grid.t[:-1]):
            raise SolverError(f"{type(solver).__name__} does not start each of its steps at a time of the grid: use a solver like unipc-3")
        corrected = _in_anchor(self.tableau, denoiser.schedule)
        self.from_anchor = {i: corrected[i] for i in starts.tolist() if i}

    def told(self, denoiser: Denoiser) -> TrajectorySolver:
        """Return the same solver of another denoiser of the same noise law."""
        other = copy.copy(self)
        other.denoiser = denoiser
        return other

    @torch.no_grad()
    def run(self, x: Tensor, cond: Cond, observe: Callable[[float], None] | None = None) -> Tensor:
        """Return the states ``[B, T-1, *D]`` at all stored times but the first, on the CPU.

        Args:
            x: the start ``[B, *D]``.
            cond: handed to the denoiser.
            observe: called with the noise level of each stored time.
        """
        stored, end = [], x
        for step in self._steps(x, cond):
            if step.i in self.from_anchor:
                corrected = step.state.anchor if self.from_anchor[step.i] else None
                stored.append((step.x if corrected is None else corrected).cpu())
                if observe is not None:
                    observe(float(torch.exp(-self.tableau.nodes.lam[step.i])))
            end = step.x_next
        return torch.stack([*stored, end.cpu()], 1)

    def _steps(self, x: Tensor, cond: Cond) -> Iterator[Step]:
        if self.parallel is None:
            return steps(self.denoiser, self.tableau, x, cond)
        made = rounds(self.denoiser, self.tableau, x, cond, config=self.parallel)
        return chain.from_iterable(one.steps for one in made)

    def error(self, start: Tensor, cond: Cond, states: Tensor) -> dict[str, float | None]:
        """Return the RMSE between ``states`` and a solution with half the steps: at the last time, and the largest at any stored time.

        Where half the steps are fewer than the stored intervals, every second stored time is left out.
        """
        t, steps = self.grid.t, self.fine.steps // 2
        if not steps:
            return {"teacher_error": None, "teacher_error_largest": None}
        if steps < len(t) - 1:
            t = t[::2] if len(t) % 2 else torch.cat([t[:1], t[1::2]])
        half = TrajectorySolver(self.denoiser, self.solver, TimeGrid(t), (steps - 1) * self.solver.stages + 1)
        gap = states[:, torch.isin(self.grid.t[1:], t[1:])] - half.run(start, cond)
        rmse = gap.double().square().transpose(0, 1).flatten(1).mean(1).sqrt()
        return {"teacher_error": float(rmse[-1]), "teacher_error_largest": float(rmse.max())}


def _in_anchor(tableau: Tableau, schedule: NoiseSchedule) -> list[bool]:
    """Return for each evaluation whether the anchor is the state at its time: for data that are 0 it is then a multiple of sigma."""
    zero, sigma = GaussianDenoiser(schedule, torch.zeros(1), torch.zeros(())), tableau.nodes.sigma
    anchors = [step.state.anchor for step in steps(zero, tableau, sigma[:1, None].clone())]
    return [one is not None and bool(torch.isclose(one, now, rtol=1e-6, atol=0)) for one, now in zip(anchors, sigma, strict=False)]


@checked
def generate_trajectories(
    model: Model,
    grid: TimeGrid,
    out: str | Path,
    *,
    guidance: float | None = None,
    config: TrajectoryConfig | None = None,
    parallel: ParallelConfig | None = None,
    device: torch.device | str | None = None,
    command: str = "",
    on_progress: Progress | None = None,
) -> Trajectories | None:
    """Solve the sampling ODE from seeded noise and store the states at the times of ``grid``; None in all processes but the first.

    Each batch is a file of its own, so a killed run continues and ends with the same numbers, a finished folder is only read, and more
    trajectories can be added to one whose last shard is whole. The processes of ``torchrun`` share the batches. The card has
    ``teacher_error``: over the first batch, the RMSE at the last time between the trajectories and a solution with half the steps.

    Args:
        model: the teacher.
        grid: the stored times ``[T]``, from the noise at ``t_max`` to the last.
        out: the folder.
        guidance: scale at which the teacher samples; by default the configuration's.
        config: how to solve, and how many.
        parallel: evaluate several steps of each trajectory at once, to a tolerance: for batches that leave the device idle.
        device: where to compute; the model is moved there.
        command: the command line, for the card.
        on_progress: called with the number of trajectories done and a note.

    Raises:
        ModelError: no such label or guidance, or an output that is not finite (where).
        ArtifactError: the folder cannot be written, is in use, or holds trajectories of another request.
    """
    config = config_of(config, TrajectoryConfig)
    config = config if guidance is None else replace(config, guidance=guidance)
    check_model(model)
    if not isinstance(parallel, ParallelConfig | None):
        raise FewstepError(f"parallel is a fewstep.ParallelConfig, got {str(parallel)[:80]!r}")
    if parallel is not None and (parallel.rounds is not None or parallel.devices):
        raise FewstepError("trajectories are solved to their end, on the model's device: leave rounds and devices out")
    if parallel is not None and config.scales is not None:
        raise FewstepError("trajectories at scales of their own are solved step after step: leave parallel out")
    with Job.open("make trajectories", out, device=device or model.device, on_progress=on_progress, command=command) as job:
        scale = config.guidance if config.scales is None else model.default_guidance
        made = trajectories_of(Problem(model, scale, job.device), grid, config, job, parallel=parallel)
        return None if job.rank else made


def trajectories_of(
    problem: Problem,
    grid: TimeGrid,
    config: TrajectoryConfig,
    job: Job,
    *,
    checked: int | None = None,
    parallel: ParallelConfig | None = None,
) -> Trajectories:
    """Make or complete the trajectories of a problem in a job's folder, see `generate_trajectories`, and read them in all processes.

    ``checked`` says of how many the error is estimated; by default of the first batch.
    """
    teacher = TrajectorySolver(problem.teacher, make_solver(config.solver), grid, config.nfe, parallel)
    scales = config.scales
    if scales is not None:
        problem.teacher_at(torch.tensor(scales, dtype=torch.float64))  # scales that it does not have are refused before anything else
    left_out = ("num",) if scales is not None else ("num", "scales")
    about = {name: value for name, value in asdict(config).items() if name not in left_out} | {
        "nfe": teacher.tableau.nodes.evaluations,
        "guidance": problem.guidance if scales is None else config.guidance,
        "times": grid.t.tolist(),
        "shape": list(problem.shape),
        "classes": problem.model.classes,
        "schedule": problem.schedule.to_config(),
        "model": problem.fingerprint,
    }
    about |= {} if problem.model.domain is None else {"domain": problem.model.domain.to_config()}
    how = {} if parallel is None else {"parallel": asdict(parallel)}
    asked = about | how | {"fine": teacher.fine.t.tolist()}
    about["identity"] = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    wanted, done = config.shards(job.folder), 0
    problem.labels([config.seed], config.label)  # an unknown label is refused before anything else
    present = _survey(job.folder, about["identity"], wanted)
    for number, (path, seeds) in list(enumerate(wanted.items()))[job.rank :: job.world]:
        if path not in present:
            x, cond = problem.start(seeds, teacher.tableau.nodes), problem.cond(seeds, config.label)
            first, one = seeds[:checked], teacher
            if scales is not None:
                teacher, one = (teacher.told(problem.teacher_at(seeded_scales(some, scales))) for some in (seeds, first))
            states = teacher.run(x, cond, lambda level, done=done: job.on_progress(done, f"noise level {level:.3g}"))
            error = {} if number else one.error(x[:checked], problem.cond(first, config.label), states[:checked])
            labels = problem.labels(seeds, config.label)
            _write_shard(path, about["identity"], seeds, states.to(DTYPES[config.dtype]), labels, error)
        done = seeds[-1] + 1 - config.seed
        job.on_progress(done, f"shard {number + 1} of {len(wanted)}")
    wait_for_all()
    if job.rank == 0:
        _finish(job.folder, about, wanted, {"of": problem.name, **how}, {"command": job.command})
    wait_for_all()  # the first process writes the manifest last
    return Trajectories.load(job.folder)


@dataclass(frozen=True)
class _ShardHeader:
    """The fields of ``about`` in a shard's header: the request, its first seed and number of trajectories, and what `_finish` shows."""

    identity: str
    first: Whole
    count: Count
    sha256: str
    error: dict[str, Number | None]


def _write_shard(path: Path, identity: str, seeds: range, states: Tensor, labels: Tensor | None, error: dict[str, float | None]) -> None:
    if not bool(torch.isfinite(states).all()):
        raise FewstepError(f"the states do not fit in {states.dtype}, or are not finite: store them as float32 or bfloat16")
    tensors = {"x": states.contiguous()} | ({} if labels is None else {"labels": labels})
    about = {"identity": identity, "first": seeds[0], "count": len(seeds), "sha256": digest_of(tensors), "error": error}
    write_whole(path, save_tensors(tensors, {"about": json.dumps(about)}))


def _read_shard(path: Path, identity: str) -> tuple[_ShardHeader, dict[str, Tensor]]:
    """Return the description of a shard and its tensors, mapped rather than read."""
    if not path.exists():
        raise ArtifactError(f"{path} is missing: run the same command again")
    check_file(path)
    try:
        with safe_open(path, "pt") as file:
            text, tensors = file.metadata()["about"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "x" not in tensors:
            raise KeyError("x")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): {AGAIN}") from error
    about = held_to(text, _ShardHeader, path)
    if about.identity != identity:
        raise ArtifactError(f"{path} is of another teacher or request (solver, times, seed, ...): {AGAIN}, or use another folder")
    return about, tensors


def _survey(folder: Path, identity: str, wanted: dict[Path, range]) -> set[Path]:
    """Return the shards that are there already, and refuse any that is not wanted."""
    found = set(folder.glob("shard-*.safetensors"))
    for path in sorted(found):
        about, _ = _read_shard(path, identity)
        first, count, seeds = about.first, about.count, wanted.get(path, range(0))
        if (first, count) != (seeds.start, len(seeds)):
            raise ArtifactError(
                f"{path} holds {count} trajectories from seed {first}, not {len(seeds)}: ask for as many or more, or {AGAIN}"
            )
    return found


def _finish(folder: Path, about: dict[str, Any], wanted: dict[Path, range], of: dict[str, Any], by: dict[str, str]) -> None:
    """Write the card, and the manifest last of all."""
    shards = {path.name: _read_shard(path, about["identity"])[0] for path in wanted}
    listed = [{"file": name, "count": shard.count, "sha256": shard.sha256} for name, shard in shards.items()]
    card = {**of, "solver": about["solver"], "nfe": about["nfe"], **next(iter(shards.values())).error, **by}
    num = sum(map(len, wanted.values()))
    whole = {
        "format": TrajectoriesRecord.FORMAT,
        "version": TrajectoriesRecord.VERSION,
        "num": num,
        **about,
        "shards": listed,
        "card": card,
    }
    scales = about.get("scales")
    guidance = about["guidance"] if scales is None else f"{scales[0]:g} to {scales[1]:g}, each its own"
    facts = [f"- {key}: {value}" for key, value in {"guidance": guidance, **card}.items()]
    readme = [f"# {num} fewstep teacher trajectories at {len(about['times'])} times", "", *facts]
    readme += ["", "Read them with `fewstep.learn.teacher.trajectories.Trajectories.load`.", ""]
    write_whole(folder / "README.md", "\n".join(readme).encode())
    write_whole(folder / "manifest.json", (json.dumps(whole, indent=1) + "\n").encode())


class Trajectories(torch.utils.data.Dataset[dict[str, Any]]):
    """A folder of trajectories: the states ``x [T, *D]`` of each at the times ``t [T]``, from the noise of its seed to the last.

    ``shape`` is ``*D``; ``model`` (its fingerprint), ``schedule`` and ``guidance`` are the teacher's, or ``scales`` the range of their own
    guidance scales; ``card`` has provenance. Those of a reflected model begin in its ``domain``, and go on past its walls.
    Shards are mapped, not read, so memory does not grow with them; each is checked when it is first used.
    """

    def __init__(self, folder: Path, meta: TrajectoriesRecord) -> None:
        self.folder, self.num, self.identity, self.shards = folder, meta.num, meta.identity, meta.shards
        self.t, self.shape = TimeGrid(torch.tensor(meta.times, dtype=torch.float64)).t, tuple(meta.shape)
        self.schedule, self.model, self.guidance = schedule_from_config(meta.schedule), meta.model, meta.guidance
        self.classes, self.card, self.first, self.batch = meta.classes, meta.card, meta.seed, meta.batch
        self.scales = None if meta.scales is None else scale_range(meta.scales)
        self.domain = None if meta.domain is None else Cube(**meta.domain)
        starts = range(0, self.num, self.batch)
        if len(self.shards) != len(starts) or any(
            shard.count != min(self.batch, self.num - start) for shard, start in zip(self.shards, starts, strict=True)
        ):
            raise ArtifactError(f"its shards do not hold {self.num} trajectories, {self.batch} in each but the last")
        if any(Path(shard.file).name != shard.file for shard in self.shards):
            raise ArtifactError("a shard is not in the same folder")
        self._nodes, self._open = Nodes.at(self.schedule, self.t), dict[int, dict[str, Tensor]]()

    @classmethod
    def load(cls, folder: str | Path) -> Trajectories:
        """Read the manifest of a folder that `generate_trajectories` has finished.

        Raises:
            ArtifactError: it is missing, unfinished, damaged or of another version.
        """
        path = named_path(folder) / "manifest.json"
        if not path.exists() and any(path.parent.glob("shard-*.safetensors")):
            raise ArtifactError(f"{folder} holds unfinished trajectories: run the same command again, it continues")
        if path.parent.is_dir() and not path.exists():
            raise ArtifactError(f"{folder} holds no trajectories: name a folder that fewstep trajectories or generate_trajectories made")
        meta = read_record(path, TrajectoriesRecord)
        try:
            return cls(path.parent, meta)
        except FewstepError as error:
            raise ArtifactError(f"{path} is damaged ({error}): {AGAIN}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return self.num

    def __repr__(self) -> str:
        return f"Trajectories({self.num} of {self.card.get('of')}, {len(self.t)} times, samples of {self.shape})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``x [T, *D]`` float32, ``seed``, and ``label`` if the model takes any."""
        x, seeds, labels = self.states([index]), self.seeds([index]), self.labels([index])
        return {"x": x[0], "seed": int(seeds[0])} | ({} if labels is None else {"label": int(labels[0])})

    def states(self, index: Sequence[int] | Tensor | slice, at: Sequence[int] | None = None) -> Tensor:
        """Return trajectories ``[n, T, *D]``, float32, in the order of ``index``; an `ArtifactError` names a shard that cannot be used.

        ``at`` picks some of the ``T`` times, by index; no others are read.
        """
        places, seeds = self._places(index), self.seeds(index)
        if at is not None:
            times = [range(len(self.t))[k] for k in at]  # counted from the end if negative
            return torch.stack([self._gather("x", places, torch.float32, k - 1) if k else self._starts(seeds) for k in times], 1)
        return torch.cat([self._starts(seeds)[:, None], self._gather("x", places, torch.float32)], 1)

    def _starts(self, seeds: Tensor) -> Tensor:
        """Return the starts ``[n, *D]`` of the seeds, which are not stored; of a reflected model folded into its cube."""
        x = start_noise(self._nodes, seeds, self.shape)
        return x if self.domain is None else self.domain.fold(x)[0]

    def state(self, index: Sequence[int] | Tensor | slice, t: Tensor) -> Tensor:
        """Return the states ``[n, *D]``, float32, at any time ``t []`` between the first stored one and the last, by `interpolation`."""
        places, weights = interpolation(self.schedule, self.t, t)
        states = self.states(index, at=places)
        return sum((weight * states[:, k] for k, weight in enumerate(weights)), torch.zeros_like(states[:, 0]))

    def seeds(self, index: Sequence[int] | Tensor | slice) -> Tensor:
        """Return the seeds ``[n]`` of the starts."""
        return torch.tensor(self._places(index), dtype=torch.int64) + self.first

    def labels(self, index: Sequence[int] | Tensor | slice) -> Tensor | None:
        """Return class labels ``[n]``, or None if the model takes none."""
        return None if self.classes is None else self._gather("labels", self._places(index), torch.int64)

    def scale(self, index: Sequence[int] | Tensor | slice) -> Tensor | None:
        """Return the guidance scale of each, ``[n]`` float64, or None if all have that of ``guidance``."""
        return None if self.scales is None else seeded_scales(self.seeds(index), self.scales)

    def check(self, problem: Problem, scales: tuple[float, float] | None = None) -> None:
        """Refuse another problem than the one these trajectories are of.

        Args:
            problem: whose they should be.
            scales: the range of guidance scales that they should have, in place of the problem's own scale.

        Raises:
            ArtifactError: the schedule, sample shape, model (by fingerprint) or guidance is another (both sides are named).
        """
        guidance, wanted = (one if few is None else few for one, few in ((self.guidance, self.scales), (problem.guidance, scales)))
        ours = {"schedule": self.schedule.to_config(), "sample shape": self.shape, "model": self.model, "guidance": guidance}
        theirs = (problem.schedule.to_config(), problem.shape, problem.fingerprint, wanted)  # the fingerprint holds the schedule
        for (what, mine), other in zip(ours.items(), theirs, strict=True):
            if not alike(mine, other):
                one, two = (json.dumps(side)[:200] for side in (mine, other))
                raise ArtifactError(f"{self.folder} has trajectories of {what} {one}, but they are used with {what} {two}: make them again")

    def _places(self, index: Sequence[int] | Tensor | slice) -> list[int]:
        if isinstance(index, Tensor):
            index = (index.nonzero().flatten() if index.dtype == torch.bool else index).tolist()
        places = range(self.num)
        return list(places[index]) if isinstance(index, slice) else [places[i] for i in index]

    def _gather(self, name: str, places: list[int], dtype: torch.dtype, time: int | None = None) -> Tensor:
        """Return rows of a tensor that is cut into shards, whole or at one of the stored times."""
        rows: dict[int, list[int]] = {}  # of the result, by shard
        for row, place in enumerate(places):
            rows.setdefault(place // self.batch, []).append(row)
        times = (len(self.t) - 1,) if time is None else ()
        result = torch.empty(len(places), *((*times, *self.shape) if name == "x" else ()), dtype=dtype)
        for number, mine in rows.items():
            stored = self._shard(number)[name]
            result[mine] = (stored if time is None else stored[:, time])[[places[row] % self.batch for row in mine]].to(dtype)
        return result

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._open:
            listed = self.shards[number]
            path = self.folder / listed.file
            _, tensors = _read_shard(path, self.identity)
            shapes = {"x": (listed.count, len(self.t) - 1, *self.shape)} | ({} if self.classes is None else {"labels": (listed.count,)})
            fits = {name: tensor.shape for name, tensor in tensors.items()} == shapes
            fits = fits and all(tensor.is_floating_point() == (name == "x") for name, tensor in tensors.items())
            if not fits or digest_of(tensors) != listed.sha256:
                raise ArtifactError(f"{path} is damaged: its tensors or their checksum are not those in manifest.json; {AGAIN}")
            self._open[number] = tensors
        return self._open[number]
