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
from fewstep.learn.networks.loop import check_checkpoint, check_precision, forget_checkpoint
from fewstep.learn.networks.objectives import (
    OBJECTIVES,
    DistillConfig,
    EMConfig,
    FlowMapConfig,
    Given,
    GuidedConfig,
    MatchingConfig,
    ProgressiveConfig,
    StudentConfig,
)
from fewstep.learn.networks.objectives.matching import JudgeOfSamples
from fewstep.learn.networks.objectives.objective import StudentObjective
from fewstep.learn.networks.trainer import (
    NO_STUDENT,
    STEPS,
    Trained,
    check_one_scale,
    dropout_as,
    halve,
    may_write_model,
    teacher_name,
    train_student,
)
from fewstep.learn.teacher.batches import TeacherData
from fewstep.learn.teacher.trajectories import Trajectories
from fewstep.models.carried import OPTIMIZED, Carried
from fewstep.models.formats.folders import load_folder
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_model
from fewstep.models.tuned import Tuned
from fewstep.runtime.artifact import named_path, read_json, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError, ModelError, look_up
from fewstep.runtime.front_door import checked, config_of, scale_of
from fewstep.runtime.job import Job, Progress
from fewstep.runtime.process import from_first, process, wait_for_all
from fewstep.sampling.grid_table import GridTable

__all__ = ["DistillConfig", "EMConfig", "FlowMapConfig", "GuidedConfig", "MatchingConfig", "ProgressiveConfig", "distill"]

HALVED = ("guided", "progressive")  # students whose own students are measured against their teacher


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
    judge: JudgeOfSamples | None = None,
    device: torch.device | str | None = None,
    command: str = "",
    on_progress: Progress | None = None,
) -> Model | None:
    """Distil a copy of a model's network into a student that samples in one pass, or a few.

    A killed run continues where it was and ends with the same weights; the processes of ``torchrun`` share trajectories and batches.

    Args:
        model: the teacher; its own weights are never changed.
        method: a key of `OBJECTIVES`: ``flow-map``, ``guided``, ``progressive``, ``dmd``, ``em``, ``dsno``, ``slots`` or ``kd``.
        guidance: scale at which the teacher samples; by default the configuration's. The student takes labels but no scale, but for those
            that are told it: of guided, of flow-map with ``scales``, and of flow-map and progressive where the teacher is told it.
        out: a folder, which becomes a model folder; by default the student stays in memory.
        config: how to distil: a `FlowMapConfig` of flow-map, a `MatchingConfig` of dmd, an `EMConfig` of em, a `DistillConfig` of dsno,
            slots and kd.
        trajectories: stored ones to learn from, with the times of ``config.grid`` among theirs; by default they are made.
        begin: a student of the same teacher and kind, whose weights training begins with; by default the teacher's.
        features: network of the loss ``features``, from pictures ``[B, *D]`` to ``[B, F]``.
        images: pictures to learn from, for targets of a flow map that take some.
        judge: measures samples, for dmd and em, which keep the weights that it finds best: ``fewstep.evaluate.metrics.judge.Judge``.
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
    if type(options) is not chosen.config and any(type(options) is other.config for other in OBJECTIVES.values()):
        raise FewstepError(  # EM's options are those of dmd, and more
            f"config is a {type(options).__name__}, of another method than {method}: pass a {chosen.config.__name__}, or name its method"
        )
    check_model(model)
    model.need_unbounded("distillation", NO_STUDENT)
    check_precision(options.loop, pair=isinstance(options, MatchingConfig))
    given = Given(features, images, judge, begin)
    for name in ("features", "images", "judge"):
        if getattr(given, name) is not None and name not in chosen.takes:
            raise FewstepError(f"the method {method} learns nothing from {name}: leave that out")
    scale = scale_of(guidance, options.guidance)
    if model.need_denoiser().scales is not None:
        scale = _every_scale(model, method, scale)
    if not isinstance(images, Images | None) or not isinstance(begin, Model | None):
        raise FewstepError("images are fewstep.data.images.load_images(...), and begin is a Model, as fewstep.load_model(folder)")
    if isinstance(options, ProgressiveConfig) and (begin is not None or trajectories is not None):
        raise FewstepError(
            "progressive distillation begins with the model that it halves, and fresh noise: leave begin and trajectories out"
        )
    if not (isinstance(options, ProgressiveConfig) and model.tuned is not None and model.tuned.halved):
        model.need_trajectories()
    if isinstance(options, ProgressiveConfig) and len(options.nfe) > 1:
        return _halved(model, replace(options, guidance=scale), out, on_progress, device=device, command=command)
    with Job.open("distill", out, device=device or model.device, on_progress=on_progress, command=command, makes_model=True) as job:
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
        data = None
        if wanted is not None:
            data = TeacherData(problem, objective.grid, wanted, options.held_out, work, given=trajectories, fresh=options.fresh)
            objective.check_data(data)
            identity = f"{identity} {data.trajectories.identity}"
        elif trajectories is not None:
            raise FewstepError(f"the method {method} learns from no stored trajectories with these options: leave trajectories out")
        if begin is not None:
            identity += f" from {begin.fingerprint}"
        note = lambda step, value: job.on_progress(step, f"loss {value:.3e}")  # noqa: E731
        how = {"identity": identity, "on_step": note, "in_memory": job.in_memory}
        trained = train_student(objective, student, data, options.loop, work.folder, **how)
        if job.rank:
            return None
        figures = {"curve": trained.curve, **objective.finish(trained.student, data), "seconds": trained.seconds}
        return _result(objective, trained, figures, job)


def _every_scale(model: Model, method: str, scale: float) -> float:
    """Return the guidance scale by which a model is named that is told one, for a method whose student is told it, too.

    Raises:
        ModelError: the method makes a student of one scale, or one scale was asked for.
    """
    if method == "guided":
        raise ModelError(f"{model.name} is told its guidance scale already: there is nothing to distil; name its teacher")
    if not OBJECTIVES[method].every_scale:
        check_one_scale(model, method)
    if scale not in (1.0, model.default_guidance) and model.scales is not None:
        low, high = model.scales
        raise ModelError(
            f"{model.name} is told its guidance scale, from {low:g} to {high:g}, and so is its student by {method}: leave guidance out, "
            f"and sample the student at guidance {scale:g}"
        )
    return model.default_guidance


def _halved(model: Model, config: ProgressiveConfig, out: str | Path | None, on_progress: Progress | None, **how: Any) -> Model | None:  # noqa: ANN401
    """Make one student after the other, each of half as many steps; those before the last lie in ``steps`` below ``out``.

    Raises:
        FewstepError: processes that have no folder to hand students on by.
        ArtifactError: a folder below ``out`` holds a student of other options.
    """
    if out is None and process()[1] > 1:
        raise FewstepError("several processes hand students on by a folder: say out=...")
    may_write_model(model, out, STEPS)
    first = model.name
    for number, count in enumerate(config.nfe):
        one = replace(config, nfe=(count,), start=config.begins)
        below = out if out is None or count == config.nfe[-1] else named_path(out) / STEPS / f"{count:02d}"
        done = number * config.steps
        note = None if on_progress is None else lambda step, text, done=done: on_progress(done + step, text)
        if below not in (None, out) and from_first(process()[0] == 0 and Tuned.in_folder(named_path(below))):
            _check_made(named_path(below), model, one)
            made: Model | None = load_folder(below, trust=True)
        else:
            made = distill(model, "progressive", config=one, guidance=one.guidance, out=below, on_progress=note, **how)
        if count == config.nfe[-1]:
            return made
        wait_for_all()
        model = replace(load_folder(str(below), trust=True) if made is None else made, name=f"{first} in {count} steps")
        config = replace(config, guidance=1.0) if model.scales is None else config  # the guidance is in the student's weights
    return None


def _check_made(folder: Path, model: Model, config: ProgressiveConfig) -> None:
    """Refuse a finished student of other options, or of another model."""
    history = read_json(folder / "history.json")
    if history.get("of") != model.fingerprint or history.get("config") != json.loads(json.dumps(asdict(config))):
        raise ArtifactError(f"{folder} holds a student of another model or with other options: remove it, or use another folder")


def _result(objective: StudentObjective, trained: Trained, figures: dict[str, Any], job: Job) -> Model:
    """Return the student as a model that carries its passes, from its folder if it has one. ``tuned.json`` is written last."""
    model, config, student = objective.problem.model, objective.config, trained.student
    network: Any = objective.network(student)
    dropout_as(network, model.network)
    if config.half:
        halve(student, in_memory=job.in_memory)
    known = model.tuned
    if known is not None and known.form in HALVED:  # it is measured against what that was
        named, fingerprint, guidance = known.teacher, known.fingerprint, config.guidance if known.guidance is None else known.guidance
    else:
        named, fingerprint, guidance = teacher_name(model, None if job.in_memory else job.folder), model.fingerprint, config.guidance
    tuned = Tuned(named, fingerprint, *objective.sampled_by(guidance), objective.kind)
    about = {"teacher": model.name, "fingerprint": model.fingerprint, "guidance": "told" if tuned.guidance is None else tuned.guidance}
    about |= {} if objective.trajectories is None else {"trajectories": config.num}
    objective.describe(student, {**about, **objective.facts(figures), "command": job.command})
    grids, solver = objective.grids(figures), tuned.solver or "ddim"

    def table(made: Model) -> GridTable:
        return GridTable(solver, made.fingerprint, None if tuned.guidance is None else 1.0, made.schedule, grids, {"command": job.command})

    if job.in_memory:
        made = replace(objective.model(student), name=f"{model.name}-student", data=model.data, folder=None)
        return replace(made, given=Carried(tuned=tuned, grids=[table(made)] if grids else []), card=figures)
    out = job.folder
    if hasattr(network, "register_to_config"):
        network.register_to_config(_name_or_path=out.name)  # not a folder of this machine
    objective.save(student, out)
    if grids:
        table(load_folder(out, trust=True)).save(out / OPTIMIZED / solver)
    write_whole(
        out / "history.json", (json.dumps({"config": asdict(config), "of": model.fingerprint, **figures}, indent=1) + "\n").encode()
    )
    tuned.save(out)
    forget_checkpoint(out / "work")
    return replace(load_folder(out, trust=True), card=figures)
