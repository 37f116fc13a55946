"""Which sample is being stepped: a scheduler of diffusers is told a state and a time, and has to know that state's history."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fewstep.core.tableau import Row, State

__all__ = ["Chain", "Chains", "Plan"]

MOST = 32  # samples half-way at once; beyond that the one that has waited longest is forgotten


@dataclass(frozen=True, eq=False)
class Plan:
    """A tableau from evaluation ``begin`` on, ready for a dtype and device: nothing is left to be moved in a step."""

    begin: int
    start: Callable[[Tensor], State]
    rows: list[Row]
    a: list[Tensor]  # x0 = a x + b output
    b: list[Tensor]


@dataclass(eq=False)
class Chain:
    """A sample on its way."""

    plan: Plan
    at: int  # the next evaluation, counted from that of the whole grid
    state: State
    output: Callable[[], Tensor | None] = lambda: None  # what the last step returned, by which the sample is recognised


class Chains:
    """The samples on their way, the one that has waited longest first."""

    def __init__(self) -> None:
        self.waiting: list[Chain] = []

    def find(self, sample: Tensor, places: list[int] | None) -> Chain | None:
        """Whose next evaluation may be at one of these places (anywhere, if None; none, if the time was rounded on its way): that whose
        last output ``sample`` is, or else, since a callback may have put another tensor in its place, the nearest: a loop that was
        abandoned may wait at the same place.
        """
        same = next((chain for chain in self.waiting if chain.output() is sample and (not places or chain.at in places)), None)
        here = [chain for chain in self.waiting if places is None or chain.at in places]
        fitting = [chain for chain in here if chain.state.x.shape == sample.shape and chain.state.x.device == sample.device]
        if same is not None or len(fitting) < 2:
            return same or (fitting[0] if fitting else None)
        return min(fitting, key=lambda chain: float((chain.state.x - sample).abs().mean()))  # the only look at numbers

    def begin(self, plan: Plan, sample: Tensor) -> Chain:
        """A new one."""
        chain = Chain(plan, plan.begin, plan.start(sample.to(plan.a[0].dtype)))
        self.waiting = [*self.waiting, chain][-MOST:]
        return chain

    def step_done(self, chain: Chain, output: Tensor, *, last: bool) -> None:
        """It goes to the end of the queue, or leaves."""
        chain.output = weakref.ref(output)
        self.waiting = [other for other in self.waiting if other is not chain] + ([] if last else [chain])
