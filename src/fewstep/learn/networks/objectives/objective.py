"""Define an `Objective`: what a student is, what its training minimises, and how it is measured and saved."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.core.grid import TimeGrid
from fewstep.learn.networks.loop import Companion, Selection
from fewstep.learn.teacher.batches import Batch, TeacherData
from fewstep.learn.teacher.trajectories import TrajectoryConfig
from fewstep.models.model import Model
from fewstep.models.problem import Problem
from fewstep.runtime.artifact import listed, write_whole
from fewstep.runtime.errors import ModelError

__all__ = ["Networks", "Objective", "StudentObjective", "write_card"]


class Networks(NamedTuple):
    """The networks of a training step.

    Attributes:
        student: the network in training. It may be wrapped (for several processes, or compiled), so only call it.
        averaged: its copy with averaged weights, without gradients, for targets; None where the objective asks for none.
    """

    student: nn.Module
    averaged: Any = None


class Objective(ABC):
    """One way to train a student on a teacher's trajectories: all that the trainer knows of it.

    To add one, write a subclass in a file of its own and name it in ``OBJECTIVES``.

    Attributes:
        averaged: whether its targets are made with averaged weights.
        problem: the teacher and its guidance.
        companion: a second network that is trained beside the student; by default none.
        selection: chooses among the weights that the student has on its way; by default the last are kept.
    """

    averaged: bool = False
    problem: Problem
    companion: Companion | None = None
    selection: Selection | None = None

    @abstractmethod
    def student(self) -> nn.Module:
        """Return a new student that begins with the teacher's weights."""

    def batch(self, data: Any, size: int, generator: torch.Generator) -> Batch:  # noqa: ANN401
        """Draw the data of one training step from `TeacherData`, or None, and return this process's share; by default trajectories."""
        return data.draw(size, generator)

    @abstractmethod
    def loss(self, networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the mean loss ``[]`` over the samples of a batch."""

    def mend(self) -> str | None:
        """Return how to mend a loss that is not finite; None where a lower learning rate may do."""
        return None

    @abstractmethod
    def finish(self, student: nn.Module, data: Any) -> dict[str, Any]:  # noqa: ANN401 - as of `batch`
        """Measure the trained student on held-out trajectories and return figures for its card, as plain JSON values."""

    @abstractmethod
    def model(self, student: nn.Module) -> Model:
        """Return the student as something to sample."""

    @abstractmethod
    def save(self, student: nn.Module, folder: Path) -> None:
        """Write the student as a model folder that `load_model` reads."""


class StudentObjective(Objective):
    """A method of `distill`: an objective that makes a new kind of model of a teacher.

    Attributes:
        kind: the word for it in ``tuned.json``.
        config: how to distil.
        grid: the times at which trajectories are stored.
    """

    kind: ClassVar[str]
    config: Any  # a `StudentConfig` of its own kind
    grid: TimeGrid

    def copied(self) -> Any:  # noqa: ANN401 - a network
        """Return a copy of the teacher's network to begin with, with the dropout of the configuration; what is new in it is seeded."""
        torch.manual_seed(self.config.seed)
        network: Any = copy.deepcopy(self.problem.model.network)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.config.dropout
        return network

    @property
    def trajectories(self) -> TrajectoryConfig | None:
        """The configuration of the stored trajectories, those to learn from followed by those that are held out; None without any."""
        return self.config.trajectories

    @property
    def identity(self) -> str:
        """A word for all that it learns from beside the teacher's trajectories, for checkpoints."""
        return ""

    def take_over(self, student: nn.Module, begin: Model) -> None:
        """Begin with the weights of another student: those of its network, and others where they fit.

        Raises:
            ModelError: it is no student of this kind, or its network has other weights.
        """
        theirs: Any = begin.network
        if type(theirs) is not type(student):
            raise ModelError(f"{begin.name} is no {self.kind} student to begin with: name one, or leave it out")
        ours, shapes = student.state_dict(), [{n: v.shape for n, v in self.network(one).state_dict().items()} for one in (student, theirs)]
        if shapes[0] != shapes[1]:
            name = next(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
            found = [list(one[name]) if name in one else "missing" for one in shapes]
            raise ModelError(
                f"the network of {begin.name} is another than that of {self.problem.name}: {name} is {found[1]} there and {found[0]} here; "
                "begin with a student of this teacher, or leave it out"
            )
        fitting = {name: value for name, value in theirs.state_dict().items() if name in ours and ours[name].shape == value.shape}
        student.load_state_dict(fitting, strict=False)

    def check_teacher(self, begin: Model, guidance: float | None) -> None:
        """Refuse a student to begin with that was made of another teacher, or at another guidance scale.

        Args:
            begin: the student.
            guidance: the scale; None of a student that is told it.

        Raises:
            ModelError: it was (of which).
        """
        tuned, problem = begin.tuned, self.problem
        if tuned is not None and (tuned.fingerprint, tuned.guidance) != (problem.fingerprint, guidance):
            theirs, ours = ("of any scale" if scale is None else f"{scale:g}" for scale in (tuned.guidance, guidance))
            raise ModelError(
                f"{begin.name} is a student of {tuned.teacher} ({tuned.fingerprint}) at guidance {theirs}, not of {problem.name} "
                f"({problem.fingerprint}) at {ours}: begin with one of the same teacher"
            )

    def check_data(self, data: TeacherData) -> None:  # noqa: B027 - there is nothing to refuse by default
        """Refuse trajectories that the student cannot learn from, beside what `TeacherData` refuses.

        Raises:
            ArtifactError: they are such (and why).
        """

    @abstractmethod
    def network(self, student: nn.Module) -> nn.Module:
        """Return the network inside a student that is of the teacher's kind."""

    def sampled_by(self, guidance: float) -> tuple[float | None, str | None, int | None]:
        """Return guidance scale, solver and evaluations that the student is made for, see `Tuned`: by default one first-order step.

        Args:
            guidance: the scale of the teacher's trajectories.
        """
        return guidance, "ddim", 1

    def grids(self, figures: Mapping[str, Any]) -> dict[int, TimeGrid]:
        """Return the times that the student is to be sampled at, by the number of passes; by default none of its own."""
        return {n: TimeGrid(torch.tensor(times, dtype=torch.float64)) for n, (times, _) in figures.get("passes", {}).items()}

    @abstractmethod
    def facts(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Return figures for the student's own card."""

    @abstractmethod
    def describe(self, student: nn.Module, facts: Mapping[str, Any]) -> None:
        """Give a student its card, plain JSON values."""


def write_card(folder: Path, about: str, facts: Mapping[str, Any], *, trust: bool) -> None:
    """Write the ``README.md`` of a student that is a network of the teacher's form, sampled by its own steps.

    Args:
        folder: of the student.
        about: a sentence or two on what it is.
        facts: its card, plain JSON values.
        trust: whether its folder names code to import, for the command.
    """
    text = f"""# {folder.name}

{about} Its guidance is in its weights.

{listed(facts)}

```
fewstep sample {folder.name}{" --trust" if trust else ""} --out runs/sample
```
"""
    write_whole(folder / "README.md", text.encode())
