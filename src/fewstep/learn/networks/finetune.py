"""Tune a network and its schedule for the few steps that it will take (few-step schedule optimisation, Huang, arXiv 2412.10786).

Phase 1 chooses the schedule for which the outputs ``D(z_i; s_i)`` are nearest to the means ``Dbar_i`` of the teacher's output over each
step. Phase 2 lowers the same bound over the weights (see `objectives.steps`). The two alternate until a round gains too little.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import nn

from fewstep.core.grid import TimeGrid
from fewstep.core.tableau import Nodes
from fewstep.data.images import Images
from fewstep.learn.networks.loop import LoopConfig, check_precision, forget_checkpoint
from fewstep.learn.networks.objectives.steps import LandingObjective, ScoreObjective, StepsObjective
from fewstep.learn.networks.score_matching import check_images
from fewstep.learn.networks.trainer import (
    NO_STUDENT,
    check_one_scale,
    dropout_as,
    halve,
    may_write_model,
    teacher_name,
    train_student,
)
from fewstep.learn.search.bound import Bound
from fewstep.learn.teacher.batches import TeacherData
from fewstep.learn.teacher.gram import GramConfig, collect_gram, fine_grid
from fewstep.learn.teacher.trajectories import TrajectoryConfig
from fewstep.models.carried import OPTIMIZED, Carried
from fewstep.models.formats.folders import imports_code, load_folder
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_model
from fewstep.models.tuned import Tuned
from fewstep.runtime.artifact import Number, digest_of, held_to, read_file, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError, GridError, first_line
from fewstep.runtime.front_door import at_least, check_fields, checked, checked_class, config_of, scale_of
from fewstep.runtime.job import Job, Progress
from fewstep.runtime.process import from_first, share, wait_for_all
from fewstep.sampling.grid_table import GridTable
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import DDIM

__all__ = ["FinetuneConfig", "Round", "finetune"]


@checked_class
@dataclass(frozen=True)
class FinetuneConfig:
    """Configure the tuning of a network for ``nfe`` first-order steps.

    Args:
        nfe: network evaluations that it is tuned for.
        rounds: rounds of training and schedule search, at most; fewer if one gains less than ``enough``.
        steps: training steps in a round.
        batch: trajectories in a step.
        lr: learning rate at its peak.
        form: mean regresses onto the teacher's interval means; score is denoising score matching, which needs images.
        states: where the regression looks: the student's own states, or the teacher's.
        guidance: scale at which the teacher samples; the tuned model is sampled without.
        num: teacher trajectories to learn from.
        held_out: held-out trajectories, on which the tuned network is measured.
        levels: cells between the noise levels at which their states are stored, and schedules sought.
        teacher_nfe: network evaluations of the teacher per trajectory.
        seed: seed of the first trajectory; far from those that benchmarks start with.
        enough: relative gain of a round below which it is the last.
        half: save the weights in float16.

    Raises:
        FewstepError: a number out of range, an unknown form.
    """

    nfe: int = 4
    rounds: int = 3
    steps: int = 200
    batch: int = 128
    lr: float = 3e-4
    form: Literal["mean", "score"] = "mean"
    states: Literal["own", "teacher"] = "own"
    guidance: float = 1.0
    num: int = 4096
    held_out: int = 512
    levels: int = 32
    teacher_nfe: int = 64
    seed: int = 1_000_000
    enough: float = 0.01
    half: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, nfe=1, rounds=1, num=1, held_out=2, levels=1, teacher_nfe=1, seed=0)
        if self.form not in ("mean", "score") or self.states not in ("own", "teacher"):
            raise FewstepError(f"the form is mean or score and the states are own or teacher, got {self.form!r} and {self.states!r}")
        if self.form == "score" and self.guidance != 1:
            raise FewstepError("score matching learns the data, not what guidance makes of it: use the form mean, or guidance 1")
        _ = self.loop
        if self.nfe > self.levels:
            raise GridError(f"{self.nfe} steps need at least as many levels, got {self.levels}: ask for more levels or fewer steps")

    @property
    def loop(self) -> LoopConfig:
        """The configuration of the training loop of one round."""
        warmup = min(50, self.steps // 4)
        return LoopConfig(self.steps, self.batch, self.lr, warmup=warmup, seed=self.seed, checkpoint_every=100)


@dataclass(frozen=True)
class Round:
    """The outcome of one round.

    Attributes:
        number: number of the round, from 1.
        noise_levels: noise levels of the schedule that was trained on.
        bound_before, bound_trained: error bound of that schedule before and after training.
        bound: error bound of the schedule that is best after training.
        rmse: RMSE to the teacher's endpoints on that best schedule, on held-out trajectories.
        next_times: times of that best schedule, on which the next round trains.
        seconds: duration of the round.
    """

    number: int
    noise_levels: list[float]
    bound_before: Number
    bound_trained: Number
    bound: Number
    rmse: Number
    next_times: list[Number]
    seconds: Number


@dataclass(frozen=True)
class _Finished(Round):
    """The fields of ``round.json``: those of the round, the tuning that it is of, and the checksum of the network's weights."""

    identity: str
    sha256: str


@checked
def finetune(
    model: Model,
    nfe: int | None = None,
    *,
    guidance: float | None = None,
    out: str | Path | None = None,
    config: FinetuneConfig | None = None,
    images: Images | None = None,
    device: torch.device | str | None = None,
    command: str = "",
    on_progress: Progress | None = None,
) -> Model | None:
    """Tune a copy of a model's network, and its schedule, for a few first-order steps.

    A killed run continues where it was; the processes of ``torchrun`` share trajectories and batches. The teacher's own weights are never
    changed.

    Args:
        model: the teacher.
        nfe: network evaluations to tune for; by default the configuration's.
        guidance: scale at which the teacher samples; by default the configuration's. The tuned model is sampled without.
        out: a folder, which becomes a model folder with a sampler; by default the tuned model stays in memory.
        config: how to tune.
        images: the data that the model was trained on, for the form ``score``.
        device: where to compute; the model is moved there.
        command: for the card.
        on_progress: called with the number of training steps done in all rounds, and a note.

    Returns:
        The tuned model, which carries its schedule; ``card["history"]`` has the rounds. None in all processes but the first.

    Raises:
        FewstepError: ``out`` holds a finished model, there are no images to match scores on, or there are more processes than samples in a
            batch.
        ModelError: a network that could not be saved, or a model without a shape.
        ArtifactError: the folder is in use, holds the work of another configuration, or cannot be written.
    """
    config = config_of(config, FinetuneConfig)
    config = replace(config, nfe=config.nfe if nfe is None else nfe, guidance=scale_of(guidance, config.guidance))
    check_model(model)
    model.need_unbounded("finetune", NO_STUDENT)
    check_one_scale(model.need_denoiser(), "finetune")
    if config.form == "score" and images is None:
        raise FewstepError("the form score matches scores on images: pass the data that the model was trained on, or use the form mean")
    if config.form == "score" and images is not None:
        check_images(images, model)
    for count in (config.batch, config.held_out):
        share(range(count))
    check_precision(config.loop)
    with Job.open("finetune", out, device=device or model.device, on_progress=on_progress, command=command, makes_model=True) as job:
        may_write_model(model, out, "work")  # in the job, which removes what a killed run left
        tuning = _Tuning(Problem(model, config.guidance, job.device), config, images, job)
        history = tuning.alternate()
        return None if job.rank else _result(tuning, history, job)


class _Tuning:
    """A student, its teacher's trajectories, and the alternation of schedule and weights."""

    def __init__(self, problem: Problem, config: FinetuneConfig, images: Images | None, job: Job) -> None:
        self.problem, self.config, self.images, self.job = problem, config, images, job
        self.student: Any = None  # the tuned network, once it is
        self.work = replace(job, folder=job.folder / "work")
        self.grid = self._levels()
        wanted = TrajectoryConfig(config.num + config.held_out, config.teacher_nfe, seed=config.seed, guidance=config.guidance)
        self.data = TeacherData(problem, self.grid, wanted, config.held_out, self.work)
        self.nodes = Nodes.at(problem.schedule, self.grid.t)
        self.identity = f"{problem.fingerprint} {asdict(replace(config, rounds=1, enough=0.0, half=False))}"
        if config.form == "score" and images is not None:
            self.identity += images.identity

    def _levels(self) -> TimeGrid:
        """Return the times of the teacher's own best schedule of many first-order steps: close together where it changes."""
        fine = GramConfig(num=128)
        note = lambda done, text: self.job.on_progress(0, f"{done} of {fine.num} trajectories for the levels")  # noqa: E731
        gram = collect_gram(self.problem, fine, replace(self.work, on_progress=note))
        levels = fine_grid(self.problem.schedule, fine.levels)
        count = min(self.config.levels, levels.steps)
        return TimeGrid(levels.t[from_first(Bound(gram).best(count)[count])])

    def objective(self, index: list[int]) -> StepsObjective:
        """Return the objective of a schedule, given by its places among the stored times."""
        if self.config.form == "score":
            assert self.images is not None  # checked at the beginning
            return ScoreObjective(self.problem, self.grid, index, self.images)
        return LandingObjective(self.problem, self.grid, index, own_states=self.config.states == "own")

    def alternate(self) -> list[Round]:
        """Improve schedule, weights, schedule, ... until a round gains too little."""
        config, nfe = self.config, self.config.nfe
        student = self.objective(list(range(len(self.grid.t)))).student()
        bound = self._bound(student)
        index, history = from_first(bound.best(nfe)[nfe]), list[Round]()
        reached = from_first(bound(index))
        for number in range(1, config.rounds + 1):
            folder, identity = self.work.folder / f"round-{number}", f"{self.identity} {number}"
            made = self._resumed(student, folder, identity)
            if made is None:
                made, student = self._round(number, student, index, reached, folder)
                if self.job.rank == 0:
                    self._store(student, folder, identity, made)
                wait_for_all()
            history.append(made)
            index = self._places(made.next_times)
            if made.bound > reached and number > 1:  # worse than the round before: back to that
                history.pop()
                self._resumed(student, self.work.folder / f"round-{number - 1}", f"{self.identity} {number - 1}")
                break
            gained, reached = 1 - made.bound / reached, made.bound
            if gained < config.enough:
                break
        self.student = student
        return history

    def _round(self, number: int, student: nn.Module, index: list[int], reached: float, folder: Path) -> tuple[Round, nn.Module]:
        begin, before, objective = time.monotonic(), (number - 1) * self.config.steps, self.objective(index)
        note = lambda step, value: self.job.on_progress(before + step, f"loss {value:.2e}")  # noqa: E731
        identity = f"{self.identity} {index}"
        how = {"identity": identity, "on_step": note, "in_memory": self.job.in_memory}
        trained = train_student(objective, student, self.data, self.config.loop, folder, **how).student
        bound = self._bound(trained)
        best = from_first(bound.best(self.config.nfe)[self.config.nfe])
        levels, rmse = torch.exp(-self.nodes.lam[index]).tolist(), self.objective(best).finish(trained, self.data)["rmse"]
        times, seconds = self.grid.t[best].tolist(), time.monotonic() - begin
        return from_first(Round(number, levels, reached, bound(index), bound(best), rmse, times, seconds)), trained

    def _bound(self, student: nn.Module) -> Bound:
        return Bound(self.objective([0, -1]).gram(student, self.data))

    # -- rounds on disk ---------------------------------------------------------------------------------------------

    def _store(self, student: nn.Module, folder: Path, identity: str, made: Round) -> None:
        weights = {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
        write_whole(folder / "student.safetensors", lambda path: save_file(weights, path))
        meta = _Finished(**asdict(made), identity=identity, sha256=digest_of(weights))
        write_whole(folder / "round.json", (json.dumps(asdict(meta), indent=1) + "\n").encode())
        forget_checkpoint(folder)

    def _resumed(self, student: nn.Module, folder: Path, identity: str) -> Round | None:
        """Return a round that was finished before, and load its weights; None if there is none."""
        path, weights = folder / "round.json", folder / "student.safetensors"
        if not from_first(self.job.rank == 0 and path.exists()):
            return None
        meta = held_to(read_file(path), _Finished, path)
        if meta.identity != identity:
            raise ArtifactError(f"{folder} is a round of another tuning: remove {self.work.folder}, or use another folder")
        try:
            places, tensors = self._places(meta.next_times), load_tensors(read_file(weights))
            if len(places) != self.config.nfe + 1 or places != sorted({0, *places, len(self.grid.t) - 1}):
                raise ValueError(f"next_times are no {self.config.nfe} steps on the levels")
            if digest_of(tensors) != meta.sha256:
                raise ValueError("the checksum of the weights is another")
            student.load_state_dict(tensors)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{folder} is damaged ({first_line(error)}): remove it and run the same command again") from error
        student.to(self.problem.device).eval()
        return Round(**{one.name: getattr(meta, one.name) for one in fields(Round)})

    def _places(self, times: list[float]) -> list[int]:
        """Return where times are among the levels."""
        return [self.grid.t.tolist().index(t) for t in times]


def _result(tuning: _Tuning, history: list[Round], job: Job) -> Model:
    """Return the tuned model with what it carries, from its folder if it has one. ``tuned.json`` is written last."""
    model, config, network = tuning.problem.model, tuning.config, tuning.student
    grid = TimeGrid(torch.tensor(history[-1].next_times, dtype=torch.float64))
    objective = tuning.objective([0, -1])
    network.requires_grad_(False)
    dropout_as(network, model.network)
    if config.half:
        halve(network, in_memory=job.in_memory)
    tuned = Tuned(
        teacher_name(model, None if job.in_memory else job.folder), model.fingerprint, config.guidance, "ddim", config.nfe, config.form
    )
    figures: dict[str, Any] = {"history": [asdict(made) for made in history]}

    def grids(student: Model) -> tuple[GridTable, dict[str, Any]]:
        card = {"name": "ddim", "of": student.name, "model": student.fingerprint, "guidance": 1.0, "rmse": history[-1].rmse}
        card = {**card, "command": job.command}
        return GridTable("ddim", student.fingerprint, 1.0, student.schedule, {config.nfe: grid}, card), card

    if job.in_memory:
        made = replace(objective.model(network.eval()), name=f"{model.name}-{config.nfe}step", folder=None, given=None)
        return replace(made, given=Carried(tuned=tuned, grids=[grids(made)[0]]), card=figures)
    out: Path = job.folder
    named: Any = network
    if hasattr(named, "register_to_config"):
        named.register_to_config(_name_or_path=out.name)  # not a folder of this machine
    objective.save(network, out)
    student = load_folder(out, trust=True)
    table, card = grids(replace(student, name=out.name))
    Sampler.build(DDIM(), grid, student.schedule, card=card).save(out / "sampler")
    table.save(out / OPTIMIZED / "ddim")
    write_whole(out / "history.json", (json.dumps(figures["history"], indent=1) + "\n").encode())
    write_whole(out / "README.md", _card(model, config, history, out.name, job.command).encode())
    tuned.save(out)
    return replace(load_folder(out, trust=True), card=figures)


def _card(model: Model, config: FinetuneConfig, history: list[Round], name: str, command: str) -> str:
    rows = "\n".join(
        f"| {r.number} | {', '.join(f'{s:.4g}' for s in r.noise_levels)} | {r.bound_before:.4f} | {r.bound_trained:.4f} | {r.bound:.4f} | "
        f"{r.rmse:.4f} |"
        for r in history
    )
    made_by = f" Made by\n\n```\n{command}\n```" if command else ""
    options = "\n".join(f"| {key} | {value} |" for key, value in asdict(config).items())
    trust = " --trust" if imports_code(model) else ""
    return f"""# {name}

`{model.name}` (fingerprint {model.fingerprint}) tuned to sample in {config.nfe} first-order steps: its network lands where the
teacher would be after each step.{made_by}

| round | noise levels trained on | bound before | after training | on the schedule that is best then | RMSE to the teacher |
|---|---|---|---|---|---|
{rows}

RMSE on {config.held_out} held-out trajectories.

| option | value |
|---|---|
{options}

```
fewstep sample {name}{trust} --out runs/sample
fewstep bench {name}{trust} --nfe {config.nfe} --out runs/bench
```
"""
