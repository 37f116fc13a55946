"""The form of a rival: hyper-parameters with the authors' defaults, a cost known beforehand, and a fit that keeps its loss curve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from benchmarks.rivals.drawn import LearnedSampler
from benchmarks.rivals.teacher import Cost, Teacher

if TYPE_CHECKING:
    from typing_extensions import Self

Note = Callable[[str], None]


def _silent(text: str) -> None:
    """Show nothing."""


class Point(NamedTuple):
    """A point of a loss curve: the iteration, the loss of its batch, and that on held-out noises where it was measured."""

    iteration: int
    loss: float
    held_out: float | None = None


class Found(NamedTuple):
    """A learned sampler, and its loss curve; empty where nothing is descended."""

    sampler: LearnedSampler
    curve: list[Point]


class Needs(NamedTuple):
    """What a method depends on beside the network's answers. None of these depends on data.

    Attributes:
        backpropagation: gradients through the network.
        features: activations inside the network.
        per_image: its numbers differ between samples, so that no table holds them.
        critic: a second network is trained against the sampler.
    """

    backpropagation: bool = True
    features: bool = False
    per_image: bool = False
    critic: bool = False

    def __str__(self) -> str:
        names = {"backpropagation": "gradients", "features": "features", "per_image": "per image", "critic": "critic"}
        return ", ".join(text for name, text in names.items() if getattr(self, name)) or "answers alone"


@dataclass(frozen=True)
class Rival(ABC):
    """A learned sampler of another paper, as hyper-parameters.

    Attributes:
        paper: its arXiv id.
        needs: what it depends on.
        iterations: of its descent; where nothing is descended, 0.
    """

    paper: ClassVar[str]
    needs: ClassVar[Needs]
    iterations: int = 0

    @abstractmethod
    def cost(self, nfe: int) -> Cost:
        """Return the network evaluations of a fit, at most."""

    @abstractmethod
    def fit(self, teacher: Teacher, nfe: int, note: Note = _silent) -> Found:
        """Learn a sampler of ``nfe`` evaluations.

        Args:
            teacher: the model.
            nfe: network evaluations of one sample.
            note: called with a line on where it stands.
        """

    def why_not(self, nfe: int) -> str:
        """Say why it has no sampler of so many evaluations; empty if it has."""
        return ""

    def longer(self, times: float) -> Self:
        """Return the same method with as many times its iterations, at least one; a method without iterations as it is."""
        changed: Any = {"iterations": max(1, round(times * self.iterations))} if self.iterations else {}
        return replace(self, **changed)
