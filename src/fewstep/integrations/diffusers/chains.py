"""The trajectories of samples that a scheduler is stepping: diffusers passes it a state and a time, and it has to find the history."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.prediction import Prediction, aligned, x0_coefficients
from fewstep.core.tableau import Row, State, Tableau

__all__ = ["Chain", "Chains", "Plan"]

MOST = 32  # active trajectories at once; beyond that the one that has waited longest is dropped


@dataclass(frozen=True, eq=False)
class Plan:
    """A tableau from evaluation ``begin`` on, ready for a dtype and device, so that a step transfers nothing.

    Attributes:
        begin: the number of its first evaluation on the whole grid.
        start: makes the state before the first evaluation from a sample ``[B, *D]``.
        rows: one for each evaluation.
        a, b: coefficients ``[]`` of ``x0 = a x + b output``, one for each evaluation.
        alpha: signal scales ``[]`` at the nodes, one more, where the pipeline's state is ``x / alpha``; else None.
    """

    begin: int
    start: Callable[[Tensor], State]
    rows: list[Row]
    a: list[Tensor]
    b: list[Tensor]
    alpha: list[Tensor] | None = None

    @classmethod
    def of(cls, tableau: Tableau, prediction: Prediction, begin: int, *, like: Tensor, grows: bool = False) -> Plan:
        """Return the plan of a tableau that begins at evaluation ``begin``, for a network of this prediction.

        Args:
            tableau: the rest of the grid.
            prediction: what the network answers.
            begin: the number of its first evaluation on the whole grid.
            like: a tensor of the dtype and on the device that it is for.
            grows: whether the pipeline's state is ``x / alpha``.
        """
        alpha, sigma = tableau.nodes.alpha[:-1], tableau.nodes.sigma[:-1]
        a, b = (list(aligned(value, like).flatten().unbind()) for value in x0_coefficients(prediction, alpha, sigma))
        scales = list(aligned(tableau.nodes.alpha, like).flatten().unbind()) if grows else None
        return cls(begin, tableau.start, tableau.rows(like), a, b, scales)

    def entered(self, sample: Tensor, at: int) -> Tensor:
        """Return the solver's state ``[B, *D]`` for a pipeline's ``sample [B, *D]`` before evaluation ``at``, in the plan's dtype."""
        x = sample.to(self.a[0].dtype)
        return x if self.alpha is None else x * self.alpha[at - self.begin]

    def returned(self, x: Tensor, at: int, dtype: torch.dtype) -> Tensor:
        """Return the pipeline's sample ``[B, *D]`` for a solver's state ``x [B, *D]`` before evaluation ``at``, in the pipeline's dtype."""
        return (x if self.alpha is None else x / self.alpha[at - self.begin]).to(dtype)


@dataclass(eq=False)
class Chain:
    """The trajectory of one sample, between two steps.

    Attributes:
        plan: the rows that it runs.
        at: the next evaluation, counted on the whole grid.
        state: the sampler's state.
        output: returns the tensor that the last step returned, by which the sample is recognised, while it exists.
    """

    plan: Plan
    at: int
    state: State
    output: Callable[[], Tensor | None] = lambda: None

    def enter(self, sample: Tensor) -> Tensor:
        """Return the state of the next evaluation for this sample ``[B, *D]``: what was lost by rounding comes back, changes stay."""
        x = self.plan.entered(sample, self.at)
        if x.dtype == sample.dtype and self.plan.alpha is None:
            return x
        return self.state.x + (x - self.plan.entered(self.plan.returned(self.state.x, self.at, sample.dtype), self.at))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "output": self.output()}  # a weak reference cannot be pickled, its tensor can

    def __setstate__(self, state: dict[str, Any]) -> None:
        output = state["output"]
        self.__dict__.update(state, output=(lambda: None) if output is None else weakref.ref(output))


class Chains:
    """The active trajectories of a scheduler, the one that has waited longest first."""

    def __init__(self) -> None:
        self.waiting: list[Chain] = []

    def find(self, sample: Tensor, places: list[int] | None) -> Chain | None:
        """Return the active trajectory that this sample continues; None if there is none.

        Match by identity of the last output; otherwise by nearest state, since a callback may have put another tensor in its place, and
        an abandoned loop may wait at the same evaluation.

        Args:
            sample: the state ``[B, *D]``.
            places: evaluations that may come next; any if None, and an empty list if the time was rounded on its way.
        """
        same = next((chain for chain in self.waiting if chain.output() is sample and (not places or chain.at in places)), None)
        here = [chain for chain in self.waiting if places is None or chain.at in places]
        fitting = [chain for chain in here if chain.state.x.shape == sample.shape and chain.state.x.device == sample.device]
        if same is not None or len(fitting) < 2:
            return same or (fitting[0] if fitting else None)
        return min(fitting, key=lambda chain: float((chain.state.x - chain.plan.entered(sample, chain.at)).abs().mean()))  # the only look

    def begin(self, plan: Plan, sample: Tensor) -> Chain:
        """Begin a trajectory at this sample ``[B, *D]``."""
        chain = Chain(plan, plan.begin, plan.start(plan.entered(sample, plan.begin)))
        self.waiting = [*self.waiting, chain][-MOST:]
        return chain

    def step_done(self, chain: Chain, output: Tensor, *, last: bool) -> None:
        """Move the trajectory to the back of the queue; drop it if it was the last step."""
        chain.output = weakref.ref(output)
        self.waiting = [other for other in self.waiting if other is not chain] + ([] if last else [chain])
