"""Guidance by the gradient of a classifier or loss, as a request: what to climb, how far, and whether it is split from the model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser, FlowMap
from fewstep.core.tableau import Tableau
from fewstep.models.guidance import Wrapped, classifier_guided
from fewstep.models.identity import digest, parts
from fewstep.models.problem import Problem
from fewstep.runtime.errors import ModelError
from fewstep.sampling.loop import run
from fewstep.sampling.splitting import LogProb, Splitting, sample_split

__all__ = ["GradientGuidance"]


@dataclass(frozen=True)
class GradientGuidance:
    """Guide a model by the gradient of ``log_prob``.

    Attributes:
        log_prob: what to climb, see `sample_split`.
        scale: how far.
        splitting: how it is split from the model; None to add it to the denoiser's answer (`classifier_guided`).
        classes: labels that ``log_prob`` knows; None where it takes none.
        name: for people.
    """

    log_prob: LogProb
    scale: float
    splitting: Splitting | None
    classes: int | None
    name: str

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ModelError(f"the scale of guidance is a finite number, got {self.scale:g}")

    @property
    def identity(self) -> str:
        """A hash of all that the samples depend on."""
        facts = (digest(parts(self.log_prob, "log_prob")), self.scale, self.splitting)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def labels(self, seeds: Sequence[int], label: int | None) -> Tensor | None:
        """Return what each sample is guided to: ``label``, or the seed modulo the number of classes; None where there are no classes.

        Raises:
            ModelError: a label that it does not know.
        """
        if label is not None and not 0 <= label < (self.classes or 0):
            none = "takes no labels (its attribute classes would say how many)"
            known = none if self.classes is None else f"has labels 0 to {self.classes - 1}"
            raise ModelError(f"the classifier {self.name} {known}, got {label}")
        if self.classes is None:
            return None
        return torch.tensor([seed % self.classes if label is None else label for seed in seeds], dtype=torch.int64)

    def run(self, problem: Problem, tableau: Tableau, x: Tensor, seeds: Sequence[int], label: int | None = None) -> Tensor:
        """Sample ``[len(seeds), *D]`` from their start ``x``: the model without its condition where it can be, guided to each label.

        Raises:
            ModelError, SolverError: as `sample_split`; a student.
        """
        if isinstance(problem.denoiser, FlowMap):
            raise ModelError(f"{problem.name} is a student, whose jumps cannot be guided on their way: guide its teacher")
        tableau.check_asks("a gradient guides that one too")
        problem.model.need_unbounded("--classifier", "a gradient's kicks push through them; use classifier-free guidance")
        guide, cond = self.labels(seeds, label), problem.unconditional(seeds)
        guide = None if guide is None else guide.to(x.device)
        if self.splitting is not None:
            return sample_split(
                problem.denoiser, tableau, x, self.log_prob, self.scale, cond, guide=guide, splitting=self.splitting, seeds=list(seeds)
            )
        joint = classifier_guided(_at(problem.denoiser, cond), self.log_prob, self.scale)
        return run(joint, tableau, x, guide, seeds=list(seeds))


def _at(denoiser: Denoiser, cond: Cond) -> Denoiser:
    """Return the denoiser at a condition of its own, so that another may be handed to what wraps it."""
    function: Callable[[Tensor, Tensor, Cond], Tensor] = lambda x, t, guide: denoiser(x, t, cond)  # noqa: E731
    return Wrapped(denoiser.schedule, function)
