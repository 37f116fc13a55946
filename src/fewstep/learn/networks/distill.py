"""Distil a model: train a student that samples in one pass, or a few, on trajectories that the model makes itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.grid import TimeGrid
from fewstep.learn.networks.loop import check_checkpoint, forget_checkpoint
from fewstep.learn.networks.objectives import OBJECTIVES, DistillConfig
from fewstep.learn.networks.objectives.operator import OperatorObjective
from fewstep.learn.networks.trainer import Trained, dropout_as, may_write_model, teacher_name, train_student
from fewstep.learn.teacher.batches import TeacherData
from fewstep.learn.teacher.trajectories import Trajectories
from fewstep.models.carried import OPTIMIZED, Carried
from fewstep.models.formats.folders import load_folder
from fewstep.models.model import Model
from fewstep.models.networks.operator import OperatorStudent
from fewstep.models.problem import Problem, check_model
from fewstep.models.tuned import Tuned
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import ModelError, look_up
from fewstep.runtime.front_door import checked, config_of, scale_of
from fewstep.runtime.job import Job, Progress
from fewstep.sampling.grid_table import GridTable

__all__ = ["DistillConfig", "distill"]


@checked
def distill(
    model: Model,
    method: str = "dsno",
    *,
    guidance: float | None = None,
    out: str | Path | None = None,
    config: DistillConfig | None = None,
    trajectories: Trajectories | None = None,
    begin: Model | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str | None = None,
    command: str = "",
    on_progress: Progress | None = None,
) -> Model | None:
    """Distil a copy of a model's network into a student that samples in one pass, or a few.

    A killed run continues where it was and ends with the same weights; the processes of ``torchrun`` share trajectories and batches.

    Args:
        model: the teacher; its own weights are never changed.
        method: a key of `OBJECTIVES`: ``dsno``, ``slots`` or ``kd``.
        guidance: scale at which the teacher samples; by default the configuration's. The student takes labels but no scale.
        out: a folder, which becomes a model folder; by default the student stays in memory.
        config: how to distil.
        trajectories: stored ones to learn from, with the times of ``config.grid`` among theirs; by default they are made.
        begin: a student whose weights training begins with, where they fit; by default the teacher's.
        features: network of the loss ``features``, from pictures ``[B, *D]`` to ``[B, F]``.
        device: where to compute; the model is moved there.
        command: for the card.
        on_progress: called with the number of training steps done, and a note.

    Returns:
        The student; None in all processes but the first. Its ``card`` has ``curve`` (step and mean loss), ``slots``, ``passes`` and
        ``arithmetic`` (see `OperatorObjective.finish`) and the ``seconds`` of training.

    Raises:
        FewstepError: an unknown method; ``out`` holds a finished model; the loss ``features`` without any.
        ModelError: a network that the method cannot start from, or that could not be saved.
        ArtifactError: trajectories of another model or without the times of the grid; the folder is in use, holds another run, or cannot be
            written.
    """
    make, config = look_up(method, OBJECTIVES, "method"), config_of(config, DistillConfig)
    check_model(model)
    scale = scale_of(guidance, config.guidance)
    config = replace(config, guidance=scale)
    if begin is not None and not isinstance(begin.network, OperatorStudent):
        raise ModelError(f"{begin.name} is no operator student to begin with: name one of fewstep distill")
    with Job.open("distill", out, device=device or model.device, on_progress=on_progress, command=command) as job:
        may_write_model(model, out, "work/curve.json")  # in the job, which removes what a killed run left
        problem, work = Problem(model, scale, job.device), replace(job, folder=job.folder / "work")
        objective = make(problem, config, features)
        config = objective.config
        identity = f"{model.fingerprint} {asdict(replace(config, half=False))}"
        check_checkpoint(work.folder, identity)
        data = TeacherData(problem, objective.grid, config.trajectories, config.held_out, work, given=trajectories, fresh=config.fresh)
        student = objective.student()
        identity = f"{identity} {data.trajectories.identity}"
        if begin is not None:
            _take_over(student, begin.network)
            identity += f" from {begin.fingerprint}"
        note = lambda step, value: job.on_progress(step, f"loss {value:.3e}")  # noqa: E731
        trained = train_student(objective, student, data, config.loop, work.folder, identity=identity, on_step=note)
        if job.rank:
            return None
        figures = {"curve": trained.curve, **objective.finish(trained.student, data), "seconds": trained.seconds}
        return _result(objective, trained, figures, job)


def _take_over(student: nn.Module, theirs: Any) -> None:  # noqa: ANN401 - the network of a student
    """Copy all weights that fit from another student."""
    ours = student.state_dict()
    fitting = {name: value for name, value in theirs.state_dict().items() if name in ours and ours[name].shape == value.shape}
    student.load_state_dict(fitting, strict=False)


def _result(objective: OperatorObjective, trained: Trained, figures: dict[str, Any], job: Job) -> Model:
    """Return the student as a model that carries its passes, from its folder if it has one. ``tuned.json`` is written last."""
    model, config, student = objective.problem.model, objective.config, trained.student
    student.card.update(_facts(model, config, figures, job.command))
    dropout_as(student.operator.network, model.network)
    if config.half:
        student.operator.half()
    tuned = Tuned(teacher_name(model, None if job.in_memory else job.folder), model.fingerprint, config.guidance, "ddim", 1, "operator")
    if job.in_memory:
        made = replace(objective.model(student), name=f"{model.name}-student", data=model.data, folder=None)
        return replace(made, given=Carried(tuned=tuned, grids=[_passes(made, figures, job.command)]), card=figures)
    out, network = job.folder, student.operator.network
    if hasattr(network, "register_to_config"):
        network.register_to_config(_name_or_path=out.name)  # not a folder of this machine
    objective.save(student, out)
    _passes(load_folder(out, trust=True), figures, job.command).save(out / OPTIMIZED / "ddim")
    write_whole(out / "history.json", (json.dumps({"config": asdict(config), **figures}, indent=1) + "\n").encode())
    tuned.save(out)
    forget_checkpoint(out / "work")
    return replace(load_folder(out, trust=True), card=figures)


def _passes(student: Model, figures: Mapping[str, Any], command: str) -> GridTable:
    grids = {n: TimeGrid(torch.tensor(times, dtype=torch.float64)) for n, (times, _) in figures["passes"].items()}
    return GridTable("ddim", student.fingerprint, 1.0, student.schedule, grids, {"command": command})


def _facts(model: Model, config: DistillConfig, figures: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Return the student's own card."""
    return {
        "teacher": model.name,
        "fingerprint": model.fingerprint,
        "guidance": config.guidance,
        "trajectories": config.num,
        "sequential evaluations": list(figures["passes"]),
        "arithmetic, in evaluations of the teacher": [round(cost, 2) for cost in figures["arithmetic"].values()],
        "RMSE to the teacher on trajectories held out": [round(error, 4) for _, error in figures["passes"].values()],
        "command": command,
    }
