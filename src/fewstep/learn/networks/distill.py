"""Distil a model: train a student that samples in one pass, or a few, or that is told its guidance scale."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.images import Images
from fewstep.learn.networks.loop import check_checkpoint, forget_checkpoint
from fewstep.learn.networks.objectives import OBJECTIVES, DistillConfig, FlowMapConfig, Given, StudentConfig
from fewstep.learn.networks.objectives.objective import StudentObjective
from fewstep.learn.networks.trainer import Trained, dropout_as, may_write_model, teacher_name, train_student
from fewstep.learn.teacher.batches import TeacherData
from fewstep.learn.teacher.trajectories import Trajectories
from fewstep.models.carried import OPTIMIZED, Carried
from fewstep.models.formats.folders import load_folder
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_model
from fewstep.models.tuned import Tuned
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import FewstepError, look_up
from fewstep.runtime.front_door import checked, config_of, scale_of
from fewstep.runtime.job import Job, Progress
from fewstep.sampling.grid_table import GridTable

__all__ = ["DistillConfig", "FlowMapConfig", "distill"]


@checked
def distill(
    model: Model,
    method: str = "dsno",
    *,
    guidance: float | None = None,
    out: str | Path | None = None,
    config: StudentConfig | None = None,
    trajectories: Trajectories | None = None,
    begin: Model | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    images: Images | None = None,
    device: torch.device | str | None = None,
    command: str = "",
    on_progress: Progress | None = None,
) -> Model | None:
    """Distil a copy of a model's network into a student that samples in one pass, or a few.

    A killed run continues where it was and ends with the same weights; the processes of ``torchrun`` share trajectories and batches.

    Args:
        model: the teacher; its own weights are never changed.
        method: a key of `OBJECTIVES`: ``flow-map``, ``dsno``, ``slots`` or ``kd``.
        guidance: scale at which the teacher samples; by default the configuration's. The student takes labels but no scale.
        out: a folder, which becomes a model folder; by default the student stays in memory.
        config: how to distil: a `FlowMapConfig` of flow-map, a `DistillConfig` of dsno, slots and kd.
        trajectories: stored ones to learn from, with the times of ``config.grid`` among theirs; by default they are made.
        begin: a student whose weights training begins with, where they fit; by default the teacher's.
        features: network of the loss ``features``, from pictures ``[B, *D]`` to ``[B, F]``.
        images: pictures to learn from, for targets of a flow map that take some.
        device: where to compute; the model is moved there.
        command: for the card.
        on_progress: called with the number of training steps done, and a note.

    Returns:
        The student; None in all processes but the first. Its ``card`` has ``curve`` (step and mean loss), the ``seconds`` of training, and
        what the method measures, as ``passes`` (see ``finish`` of its objective).

    Raises:
        FewstepError: an unknown method; ``out`` holds a finished model; the loss ``features`` without any.
        ModelError: a network that the method cannot start from, or that could not be saved.
        ArtifactError: trajectories of another model or without the times of the grid; the folder is in use, holds another run, or cannot be
            written.
    """
    chosen = look_up(method, OBJECTIVES, "method")
    options = config_of(config, chosen.config)
    check_model(model)
    given = Given(features, images)
    for name in given._fields:
        if getattr(given, name) is not None and name not in chosen.takes:
            raise FewstepError(f"the method {method} learns nothing from {name}: leave that out")
    scale = scale_of(guidance, options.guidance)
    with Job.open("distill", out, device=device or model.device, on_progress=on_progress, command=command) as job:
        may_write_model(model, out, "work/curve.json")  # in the job, which removes what a killed run left
        problem, work = Problem(model, scale, job.device), replace(job, folder=job.folder / "work")
        objective = chosen.make(problem, replace(options, guidance=scale), given)
        options = objective.config
        identity = f"{model.fingerprint} {asdict(replace(options, half=False))}{objective.identity}"
        check_checkpoint(work.folder, identity)
        student = objective.student()
        if begin is not None:
            objective.take_over(student, begin)  # what cannot be begun with is refused before long work
        wanted = objective.trajectories
        data = TeacherData(problem, objective.grid, wanted, options.held_out, work, given=trajectories, fresh=options.fresh)
        identity = f"{identity} {data.trajectories.identity}"
        if begin is not None:
            identity += f" from {begin.fingerprint}"
        note = lambda step, value: job.on_progress(step, f"loss {value:.3e}")  # noqa: E731
        trained = train_student(objective, student, data, options.loop, work.folder, identity=identity, on_step=note)
        if job.rank:
            return None
        figures = {"curve": trained.curve, **objective.finish(trained.student, data), "seconds": trained.seconds}
        return _result(objective, trained, figures, job)


def _result(objective: StudentObjective, trained: Trained, figures: dict[str, Any], job: Job) -> Model:
    """Return the student as a model that carries its passes, from its folder if it has one. ``tuned.json`` is written last."""
    model, config, student = objective.problem.model, objective.config, trained.student
    about = {"teacher": model.name, "fingerprint": model.fingerprint, "guidance": config.guidance, "trajectories": config.num}
    objective.describe(student, {**about, **objective.facts(figures), "command": job.command})
    network: Any = objective.network(student)
    dropout_as(network, model.network)
    if config.half:
        student.half()
    tuned = Tuned(teacher_name(model, None if job.in_memory else job.folder), model.fingerprint, config.guidance, "ddim", 1, objective.kind)
    grids = objective.grids(figures)

    def table(made: Model) -> GridTable:
        return GridTable("ddim", made.fingerprint, 1.0, made.schedule, grids, {"command": job.command})

    if job.in_memory:
        made = replace(objective.model(student), name=f"{model.name}-student", data=model.data, folder=None)
        return replace(made, given=Carried(tuned=tuned, grids=[table(made)] if grids else []), card=figures)
    out = job.folder
    if hasattr(network, "register_to_config"):
        network.register_to_config(_name_or_path=out.name)  # not a folder of this machine
    objective.save(student, out)
    if grids:
        table(load_folder(out, trust=True)).save(out / OPTIMIZED / "ddim")
    write_whole(out / "history.json", (json.dumps({"config": asdict(config), **figures}, indent=1) + "\n").encode())
    tuned.save(out)
    forget_checkpoint(out / "work")
    return replace(load_folder(out, trust=True), card=figures)
