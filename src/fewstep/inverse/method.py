"""The measured `Data`, and the interface of a `Method` of posterior sampling."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.tableau import Tableau
from fewstep.inverse.measurements import Measurement
from fewstep.runtime.errors import ModelError
from fewstep.runtime.front_door import number
from fewstep.sampling.loop import Step

__all__ = ["UNBOUNDED", "Asked", "Data", "Method", "positive"]

UNBOUNDED = "its answers are means of mirror images, and no images that could be measured; take an ordinary model of such pictures"


@dataclass(frozen=True, eq=False)
class Data:
    """Hold a measurement: its operator, values and noise.

    Attributes:
        measurement: the operator.
        y: its values, ``[B, *Y]``, or ``[*Y]`` for all samples.
        noise: the standard deviation of their noise.
    """

    measurement: Measurement
    y: Tensor
    noise: float

    def residual(self, x0: Tensor) -> Tensor:
        """Return ``y - A x0``, ``[B, *Y]``.

        Raises:
            ModelError: the measurement has another shape than its operator answers.
        """
        answer: object = self.measurement(x0)
        if not isinstance(answer, Tensor) or not answer.ndim or len(answer) != len(x0):
            what = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
            raise ModelError(f"the operator answers {what} to images of shape {tuple(x0.shape)}: it keeps the batch, [B, *D] -> [B, *Y]")
        y = self.y.to(answer)
        if y.shape not in (answer.shape, answer.shape[1:]):
            raise ModelError(
                f"y has shape {tuple(y.shape)}, and the operator answers {tuple(answer.shape)} to images of shape {tuple(x0.shape)}: it is "
                f"one measurement, {list(answer.shape[1:])}, or one for each sample"
            )
        return y - answer


class Asked(NamedTuple):
    """The posterior samples that a method is asked for.

    Attributes:
        tableau: of the sampler.
        x: the start, ``[B, *D]``.
        data: what was measured.
        cond: for the denoiser.
        seeds: one per sample, for samplers that add noise.
        observe: called with each `Step`.
    """

    tableau: Tableau
    x: Tensor
    data: Data
    cond: Cond
    seeds: Sequence[int] | None
    observe: Callable[[Step], None] | None


class Method(ABC):
    """A way from a denoiser and a measurement to posterior samples.

    Attributes:
        references: arXiv ids.
    """

    references: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def cost(self) -> tuple[int, int]:
        """The network evaluations and the products by back-propagation of one step of a first-order sampler, at most."""

    @property
    def preparation(self) -> int:
        """The network evaluations of single samples that are made before the first step."""
        return 0

    def check(self, tableau: Tableau) -> None:  # noqa: B027 - a correction takes any sampler
        """Refuse a sampler that the method cannot run with; by default none.

        Raises:
            SolverError: it cannot (and which can).
        """

    def prepared(self, denoiser: Denoiser, shape: Sequence[int], cond: Cond) -> Method:
        """Return the method with all that it measures of a model before the first step; by default nothing.

        Args:
            denoiser: the prior.
            shape: of a sample, ``*D``.
            cond: of the samples.
        """
        del denoiser, shape, cond
        return self

    @abstractmethod
    def sample(self, denoiser: Denoiser, asked: Asked) -> Tensor:
        """Sample what was asked for, ``[B, *D]``."""


def positive(value: float, name: str) -> None:
    """Refuse what is no positive number.

    Raises:
        ModelError: it is none.
    """
    if not (number(value, name, ModelError) > 0 and math.isfinite(value)):
        raise ModelError(f"{name} is a positive number, got {value!r}")
