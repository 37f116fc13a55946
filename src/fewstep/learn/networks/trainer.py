"""Train a student of any kind: an objective, its teacher's trajectories and the training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.learn.networks.loop import LoopConfig, LossCurve, run_loop
from fewstep.learn.networks.objectives.objective import Networks, Objective
from fewstep.learn.teacher.batches import TeacherData
from fewstep.models.formats.folders import check_savable, holds_model, write_model
from fewstep.models.model import Model
from fewstep.models.networks.calls import network_device
from fewstep.models.tuned import Tuned
from fewstep.runtime.artifact import written_apart
from fewstep.runtime.errors import FewstepError, ModelError
from fewstep.runtime.job import folder_of

__all__ = ["NO_STUDENT", "STEPS", "Trained", "check_one_scale", "dropout_as", "halve", "may_write_model", "teacher_name", "train_student"]

NO_STUDENT = "students are taught between free states, and nothing would fold theirs; make a sampler of it with fewstep fit"
STEPS = "steps"  # the folder of the students before the last of progressive distillation, below that of the last
WORK = "work"  # the folder of a run's trajectories and checkpoint, below its student's
TEACHER = "teacher"  # the folder of a teacher that has none of its own, below its student's


@dataclass(frozen=True)
class Trained:
    """A student after training.

    Attributes:
        student: its network, with averaged weights.
        curve: ``(step, mean loss since the step before it)``.
        seconds: training time of all runs together.
    """

    student: Any
    curve: list[tuple[int, float]]
    seconds: float


def train_student(
    objective: Objective,
    student: nn.Module,
    data: TeacherData | None,
    loop: LoopConfig,
    folder: Path,
    *,
    identity: str,
    on_step: Callable[[int, float], None],
    in_memory: bool = False,
) -> Trained:
    """Train a student for an objective; a killed run continues from its checkpoint in ``folder`` and ends with the same weights.

    Args:
        objective: gives the loss of a batch.
        student: the network to train.
        data: the teacher's trajectories, where the objective learns from some.
        loop: the options of the training loop.
        folder: for the checkpoint and the loss curve.
        identity: what is trained on what; a checkpoint of anything else is refused.
        on_step: called with the step and the mean loss since the last call.
        in_memory: whether the folder goes with the run.

    Raises:
        ArtifactError: the folder holds a checkpoint of another run.
    """
    curve = LossCurve(folder / "curve.json", identity)

    averaged = copy.deepcopy(student).eval().requires_grad_(False) if objective.averaged else None

    def loss(network: nn.Module, size: int, generator: torch.Generator) -> Tensor:
        batch = objective.batch(data, size, generator).to(network_device(network))  # that of the loop, which may be another
        return objective.loss(Networks(network, averaged), batch, generator)

    def observe(step: int, value: float) -> None:
        curve.add(step, value)
        on_step(step, value)

    student.requires_grad_(True)
    beside = {"averaged": averaged, "companion": objective.companion, "selection": objective.selection}
    beside |= {"in_memory": in_memory, "mend": objective.mend}
    trained: Any = run_loop(student, loss, loop, folder, identity=identity, observe=observe, **beside).to(objective.problem.device)
    return Trained(trained.requires_grad_(False), curve.points, curve.seconds)


def halve(network: nn.Module, *, in_memory: bool) -> None:
    """Round weights to float16, for a folder; a student in memory computes in float32 with them, and can be saved so."""
    network.half()
    if in_memory:
        network.float()


def dropout_as(student: nn.Module, teacher: Any) -> None:  # noqa: ANN401 - a network
    """Give a trained network the dropout of its teacher's again, which objectives change: it is a setting that the network is known by."""
    for ours, theirs in zip(student.modules(), teacher.modules(), strict=False):
        if isinstance(ours, nn.Dropout) and isinstance(theirs, nn.Dropout):
            ours.p = theirs.p


def may_write_model(model: Model, out: str | Path | None, begun: str) -> None:
    """Refuse a student that could not be saved, or that would overwrite a model.

    Args:
        model: the teacher.
        out: where the student's folder will be; None to keep it in memory.
        begun: a path below ``out`` that shows an unfinished run of the same kind.

    Raises:
        ModelError: the teacher is a student itself, no module or of half precision, or its student could not be saved (and how to mend it).
        FewstepError: the folder holds a finished model, or an unfinished run of another kind.
    """
    model = model.need_denoiser()
    if not isinstance(model.network, nn.Module):
        raise ModelError(f"{model.name} is a function, which cannot be trained: make the Model of a torch.nn.Module")
    if (kept := next((one.dtype for one in model.network.parameters() if one.dtype.itemsize < 4), None)) is not None:
        raise ModelError(
            f"{model.name} has weights in {str(kept).removeprefix('torch.')}, in which the small steps of training are lost: make them "
            "float32, as by model.network.float(); mixed_precision='bf16' then computes in half precision"
        )
    if out is None:
        return
    folder = folder_of(out)
    try:
        check_savable(model)
    except ModelError as error:
        raise ModelError(f"{error}; or leave out=... away to keep the student in memory") from error
    if Tuned.in_folder(folder):
        raise FewstepError(f"{folder} already holds a finished student: choose another folder, or remove it")
    if holds_model(folder) and not (folder / begun).exists():  # with it, a run was killed while it saved
        raise FewstepError(f"{folder} already holds a model, which would be lost: choose another folder")
    chained = model.folder is not None and model.folder.resolve().parent == (folder / STEPS).resolve()  # the next after one of those
    other = WORK if begun == STEPS else STEPS
    if (folder / other).exists() and not ((folder / STEPS).exists() if begun == STEPS else chained):
        raise FewstepError(
            f"{folder} holds an unfinished run of another kind, in {other}: continue that by its own command, remove it, or choose "
            "another folder"
        )


def check_one_scale(model: Model, method: str) -> None:
    """Refuse a model that is told its guidance scale, for a method whose student has one.

    Raises:
        ModelError: it is told (and how to mend it).
    """
    if model.scales is not None:
        raise ModelError(
            f"{model.name} is told its guidance scale, and {method} makes a student of one scale: name its teacher with guidance=..., or "
            "use the method flow-map of distill, whose student is told the scale, too"
        )


def teacher_name(model: Model, folder: Path | None = None) -> str:
    """Return how `load_model` finds a teacher again: its bundled name, or its folder.

    Args:
        model: the teacher. One that has no folder is saved below that of its student, where benchmarks find it.
        folder: the student's; None if it stays in memory.

    Raises:
        ArtifactError: it cannot be written.
    """
    if model.folder is not None:
        return model.address if model.address == model.name else str(model.folder.resolve())
    if folder is None:
        return model.name
    place = folder / TEACHER
    if not place.exists():
        with written_apart(folder, last=TEACHER) as scratch:
            write_model(model, scratch / TEACHER)
    return str(place.resolve())
