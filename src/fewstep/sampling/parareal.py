r"""Parareal sampling: a coarse sampler, corrected by a fine one that runs on all blocks at once (SRDS; Selvam et al., arXiv 2412.08292).

The blocks are the intervals of the coarse sampler. With :math:`F_b` the fine sampler over block b from a whole state, and :math:`G_b` one
row of the coarse one,

.. math:: x_{b+1}^{p+1} = F_b(S_b^p).x + G_b(x_0 .. x_b^{p+1}) - G_b(x_0 .. x_b^p),

which is exact after as many iterations as there are blocks. It pays for samplers of one step (DDIM); where a sampler reads its history,
that of the block before is an iteration old, and `sample_in_parallel` takes fewer rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.domain import domain_of
from fewstep.core.tableau import State, Tableau, advance
from fewstep.runtime.errors import SolverError
from fewstep.runtime.front_door import checked, number, whole
from fewstep.sampling.brownian import noise_of
from fewstep.sampling.loop import NETWORK, FiniteCheck
from fewstep.sampling.parallel import Noises, evaluated, opened
from fewstep.sampling.sampler import Sampler

__all__ = ["Iterate", "parareal"]


class Iterate(NamedTuple):
    """The end of one iteration.

    Attributes:
        i: its number; 0 is the coarse sample.
        rounds: calls of the denoiser so far.
        evaluations: evaluations of each sample so far.
        residual: the largest RMS change of a state since the iteration before, relative to its size; infinite in the first.
        x: the sample as it stands, ``[B, *D]``.
    """

    i: int
    rounds: int
    evaluations: int
    residual: float
    x: Tensor


@checked
def parareal(
    denoiser: Denoiser,
    sampler: Sampler | Tableau,
    coarse: Sampler | Tableau,
    x: Tensor,
    cond: Cond = None,
    *,
    tol: float = 1e-3,
    seeds: Iterable[int] | Tensor | None = None,
    iterations: int | None = None,
    observe: Callable[[Iterate], None] | None = None,
) -> Tensor:
    """Run a sampler on all blocks of a coarse one at once, and return the samples ``[B, *D]``: those of `steps`, to a tolerance.

    The iterations are pipelined: a block begins as soon as its start is known. So p of them take ``B + p (L - 1)`` calls of the denoiser,
    with B blocks of L evaluations.

    Args:
        denoiser: the model, called as by `sample_in_parallel`.
        sampler: the fine sampler.
        coarse: the coarse one, of one evaluation a step and without noise (``ddim``), whose times are some of the fine one's:
            ``grid.stretched(schedule, L * B)`` is a fine grid.
        x: the start ``[B, *D]``.
        cond: the condition of the batch.
        tol: largest RMS change of a state from iteration to iteration at which the samples are returned, relative to its size.
        seeds: one per sample, for a sampler that adds noise.
        iterations: the most; by default as many as there are blocks, which is exact.
        observe: called with each `Iterate`.

    Raises:
        ModelError: as `sample_in_parallel`.
        SolverError: as `steps`; times of the coarse sampler that the fine one does not have (the first), numbers out of range.
    """
    fine, listed = opened(denoiser, sampler, x, seeds)
    outer, _ = opened(denoiser, coarse, x, range(len(x)))
    tol, most = number(tol, "tol", SolverError), outer.nodes.evaluations
    if not (math.isfinite(tol) and tol >= 0):
        raise SolverError(f"tol is a finite number of at least 0, got {tol:g}")
    if iterations is not None:
        most = min(most, whole(iterations, "iterations", SolverError))
        if most < 1:
            raise SolverError(f"iterations is at least 1, got {iterations}")
    if observe is not None and not callable(observe):
        raise SolverError(f"observe is a function that is called with each Iterate, got {observe!r}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    end = _Blocks(denoiser, fine, outer, x, cond, listed).run(most, tol, observe or (lambda made: None))
    domain = domain_of(denoiser)
    return end if domain is None else domain.fold(end)[0]


class _Run:
    """The fine sampler on block ``b`` in iteration ``p``, at its row ``j``. Without a history, that of its first answer is taken."""

    def __init__(self, p: int, b: int, j: int, state: State, has_history: bool) -> None:
        self.p, self.b, self.j, self.state, self.has_history = p, b, j, state, has_history


class _Blocks:
    """The blocks of a run: what is known of each in each iteration, by ``(p, b)``."""

    def __init__(self, denoiser: Denoiser, fine: Tableau, coarse: Tableau, x: Tensor, cond: Cond, seeds: list[int]) -> None:
        self.denoiser, self.fine, self.cond = denoiser, fine, cond
        self.rows, self.coarse_rows, self.noise = fine.rows(x), coarse.rows(x), Noises(noise_of(fine, seeds, x.shape[1:]), x)
        self.places, self.count = _places(fine, coarse), coarse.nodes.evaluations
        self.size = torch.hypot(fine.nodes.alpha, fine.nodes.sigma)
        self.ratios, self.coarse_ratios = _anchors(fine, x), _anchors(coarse, x)
        self.start = coarse.start(x)
        self.x: dict[tuple[int, int], Tensor] = {(0, 0): x}  # where block b begins, or the sample ends
        self.jumped: dict[tuple[int, int], State] = {}  # after the coarse row
        self.solved: dict[tuple[int, int], State] = {}  # after the fine rows
        self.runs = [_Run(0, 0, 0, fine.start(x), has_history=True)]
        self.rounds = self.evaluations = 0

    def run(self, most: int, tol: float, observe: Callable[[Iterate], None]) -> Tensor:
        """Run until an iteration changes no state by more than ``tol``, or ``most`` of them are done."""
        seen = 0
        while True:
            self._round()
            self._begin()
            while (seen, self.count) in self.x:
                end, change = self.x[seen, self.count], self._change(seen)
                observe(Iterate(seen, self.rounds, self.evaluations, change, end))
                if seen == most or change <= tol:
                    return end
                seen += 1
                for known in (self.x, self.jumped, self.solved):  # nothing reads what is two iterations old
                    for key in [key for key in known if key[0] < seen - 1]:
                        del known[key]

    def _round(self) -> None:
        """Evaluate the denoiser at all states that are known, once."""
        self.rounds, self.evaluations = self.rounds + 1, self.evaluations + len(self.runs)
        states, t = torch.stack([run.state.x for run in self.runs]), self.fine.nodes.t[[run.j for run in self.runs]]
        answers, finite = evaluated(self.denoiser, states, t, self.cond), FiniteCheck(self.fine.nodes, f", in round {self.rounds}")
        for run, answer in zip(self.runs, answers, strict=True):
            finite.note(NETWORK, run.j, answer)
            if run.j == self.places[run.b]:  # the coarse sampler evaluates here too
                self.jumped[run.p, run.b] = advance(self.coarse_rows[run.b], self._coarse_state(run.p, run.b), answer)
            row = self.rows[run.j]
            if not run.has_history and run.state.history:
                newest = advance(row, run.state, answer, self.noise(row, run.j)).history[0]
                run.state, run.has_history = run.state._replace(history=tuple(newest.clone() for _ in run.state.history)), True
            run.state, run.j = advance(row, run.state, answer, self.noise(row, run.j)), run.j + 1
            if run.j == self.places[run.b + 1]:
                self.solved[run.p, run.b] = run.state
        finite.done()
        self.runs = [run for run in self.runs if run.j < self.places[run.b + 1]]

    def _coarse_state(self, p: int, b: int) -> State:
        """Return the coarse sampler's state before its row ``b``, at this iteration's ``x_b``; blocks before ``p`` are exact already."""
        if b == 0:
            return self.start
        return _moved(self.jumped[min(p, b - 1), b - 1], self.x[p, b], self.coarse_ratios[b])

    def _begin(self) -> None:
        """Begin the blocks whose start has become known; those before ``p`` are exact, and not run again in iteration ``p``."""
        for p in range(self.count + 1):
            for b in range(max(p, 1), self.count + 1):
                if (p, b) not in self.x and self._known(p, b):
                    self._begin_at(p, b)

    def _known(self, p: int, b: int) -> bool:
        if p == 0:
            return (0, b - 1) in self.jumped
        return (p - 1, b - 1) in self.solved and (p == b or (p, b - 1) in self.jumped)

    def _begin_at(self, p: int, b: int) -> None:
        if p == 0:
            state, history = self.fine.start(self.jumped[0, b - 1].x), False
            state = _moved(state, state.x, self.ratios[self.places[b]], fresh=True)
        else:
            solved, history = self.solved[p - 1, b - 1], True
            corrected = solved.x if p == b else solved.x + self.jumped[p, b - 1].x - self.jumped[p - 1, b - 1].x
            state = _moved(solved, corrected, self.ratios[self.places[b]])
        self.x[p, b] = state.x
        if b < self.count:
            self.runs.append(_Run(p, b, self.places[b], state, history))

    def _change(self, p: int) -> float:
        """Return the largest RMS change of a state in iteration ``p``, relative to its size."""
        if p == 0:
            return math.inf
        changes = [
            float((self.x[p, b] - self.x[p - 1, b]).flatten(1).square().mean(1).sqrt().max() / self.size[self.places[b]])
            for b in range(p, self.count + 1)
            if len(self.x[p, b])
        ]
        return max(changes, default=0.0)


def _moved(state: State, x: Tensor, ratio: Tensor, *, fresh: bool = False) -> State:
    """Return a state at another ``x``, its anchor moved with it: by ``ratio`` for each unit. A fresh one's anchor is all from ``x``."""
    if state.anchor is None:
        return state._replace(x=x)
    return state._replace(x=x, anchor=ratio * x if fresh else state.anchor + ratio * (x - state.x))


def _anchors(tableau: Tableau, x: Tensor) -> list[Tensor]:
    """Return how far the anchor at each node moves with ``x``: their responses to the start alone, one divided by the other."""
    unit = torch.ones(1, *(tableau.element or (1,)), dtype=torch.float64)
    probes = torch.cat([unit, 0 * unit])
    state, found = tableau.start(probes), [torch.ones((), dtype=torch.float64)]
    for row in tableau.rows(probes):
        state = advance(row, state, torch.zeros_like(probes), torch.zeros_like(probes))
        anchor = state.x if state.anchor is None else state.anchor
        ratio = (anchor[0] - anchor[1]) / (state.x[0] - state.x[1])
        found.append(torch.where(torch.isfinite(ratio), ratio, 1.0).reshape(tableau.element))
    return [ratio.to(x.dtype).to(x.device) for ratio in found]


def _places(fine: Tableau, coarse: Tableau) -> list[int]:
    """Return the fine sampler's evaluation at the start of each block, and its end.

    Raises:
        SolverError: a coarse sampler that adds noise, that evaluates more than once a step, or at a time that the fine one has not.
    """
    if coarse.stochastic:
        raise SolverError("the coarse sampler adds noise: take one without, as ddim")
    times, t = fine.nodes.t, coarse.nodes.t
    if bool((torch.diff(t) >= 0).any()):
        raise SolverError("the coarse sampler evaluates more than once a step: take one that does not, as ddim")
    places = []
    for one in t:
        near = (times - one).abs() <= 1e-9 * times.abs().max()
        if not bool(near.any()):
            raise SolverError(
                f"the coarse sampler evaluates at t = {float(one):g}, and the fine one does not: make its grid by "
                "coarse_grid.stretched(schedule, steps), with a multiple of the coarse one's steps"
            )
        places.append(int(near.nonzero()[-1]))  # the last one: there a solver of several stages has its whole step
    if places[0] or places[-1] != fine.nodes.evaluations:
        raise SolverError("the coarse sampler begins or ends at another time than the fine one")
    return places
