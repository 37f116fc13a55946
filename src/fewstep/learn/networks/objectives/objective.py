"""Define an `Objective`: what a student is, what its training minimises, and how it is measured and saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.learn.teacher.batches import Batch, TeacherData
from fewstep.models.model import Model

__all__ = ["Objective"]


class Objective(ABC):
    """One way to train a student on a teacher's trajectories: all that the trainer knows of it.

    To add one, write a subclass in a file of its own and name it in ``OBJECTIVES``.
    """

    @abstractmethod
    def student(self) -> nn.Module:
        """Return a new student that begins with the teacher's weights."""

    def batch(self, data: TeacherData, size: int, generator: torch.Generator) -> Batch:
        """Draw the data of one training step, and return this process's share; by default teacher trajectories."""
        return data.draw(size, generator)

    @abstractmethod
    def loss(self, student: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the mean loss ``[]`` over the samples of a batch.

        ``student`` may be wrapped (for several processes, or compiled), so only call it.
        """

    @abstractmethod
    def finish(self, student: nn.Module, data: TeacherData) -> dict[str, Any]:
        """Measure the trained student on held-out trajectories and return figures for its card, as plain JSON values."""

    @abstractmethod
    def model(self, student: nn.Module) -> Model:
        """Return the student as something to sample."""

    @abstractmethod
    def save(self, student: nn.Module, folder: Path) -> None:
        """Write the student as a model folder that `load_model` reads."""
