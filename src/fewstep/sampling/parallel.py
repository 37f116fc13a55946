r"""Parallel-in-time sampling: the sample of the sequential sampler, to a tolerance, in fewer rounds of calls and more evaluations.

Given the denoiser's answers at all states, a tableau is a linear recurrence without the network, `advance`. So write :math:`\Phi` for:
evaluate the denoiser at all states at once, then run `advance` through all rows with these answers. Its fixed point is the sequential run,
and it is strictly triangular: after p rounds the first p states are exact, whatever the guess (Picard iteration; Shih et al., arXiv
2305.16317). Anderson mixing by row (Tang et al., arXiv 2402.09970) needs fewer rounds. Nothing in it knows the solver: history, anchors,
biases, per-element coefficients and noise are all inside `advance`. `parareal` (Selvam et al., arXiv 2412.08292) corrects a coarse sampler
by a fine one instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.condition import repeated
from fewstep.core.denoiser import Cond, Denoiser, FlowMap
from fewstep.core.domain import domain_of
from fewstep.core.tableau import Row, Tableau, advance
from fewstep.runtime.errors import ModelError, SolverError
from fewstep.runtime.front_door import checked, checked_class, number, whole
from fewstep.sampling.brownian import NoisePath, noise_of
from fewstep.sampling.loop import NETWORK, FiniteCheck, Step, check_schedule, check_start
from fewstep.sampling.noise import seeds_of
from fewstep.sampling.sampler import Sampler, tableau_of

__all__ = ["Noises", "ParallelConfig", "Round", "evaluated", "opened", "rounds", "sample_in_parallel"]


@checked_class
@dataclass(frozen=True)
class ParallelConfig:
    """Configure parallel-in-time sampling.

    Args:
        tol: largest RMS change of a state from round to round at which it is accepted, relative to its size ``(alpha^2 + sigma^2)^(1/2)``.
        window: states that are evaluated in one round, for each sample.
        memory: iterates that Anderson mixing combines; 1 is plain Picard iteration. 3 saves a tenth of the rounds on windows of 16 and
            more, nothing on 8.
        ridge: strength of the ridge penalty of the mixing, relative to the trace of its Gram matrix.
        rounds: stop after so many, with the sample as it stands.
        devices: devices that share each round, as ``("cuda:0", "cuda:1")``, with a copy of the network on each; by default the model's own
            alone. For `fewstep.sample`, which knows the network.

    Raises:
        SolverError: a number out of range (which), something else than names of devices.
    """

    tol: float = 1e-3
    window: int = 8
    memory: int = 1
    ridge: float = 1e-6
    rounds: int | None = None
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("memory", 1), ("rounds", 1)):
            value = getattr(self, name)
            if (value is not None or name != "rounds") and whole(value, name, SolverError) < least:
                raise SolverError(f"{name} is at least {least}, got {value}")
        for name in ("tol", "ridge"):
            value = number(getattr(self, name), name, SolverError)
            if not (math.isfinite(value) and value >= 0):
                raise SolverError(f"{name} is a finite number of at least 0, got {value:g}")
        if isinstance(self.devices, str) or not isinstance(self.devices, Sequence) or not all(isinstance(one, str) for one in self.devices):
            raise SolverError(f'devices are names of devices, as ("cuda:0", "cuda:1"), got {self.devices!r}')
        object.__setattr__(self, "devices", tuple(self.devices))


class Round(NamedTuple):
    """One round: one call of the denoiser, on several states of each sample.

    Attributes:
        i: its number, from 1.
        first: the evaluations that it made are ``first .. last - 1``.
        last: see ``first``.
        steps: those that were accepted, in their order, as `steps` yields them.
        accepted: the evaluations that are accepted so far.
        residual: the largest RMS change of a state in it, relative to its size; infinite in a round of one state.
        x: the clean image as it stands, ``[B, *D]``: the newest answer; the sample itself after the last round.
    """

    i: int
    first: int
    last: int
    steps: tuple[Step, ...]
    accepted: int
    residual: float
    x: Tensor

    def __repr__(self) -> str:
        return f"Round({self.i}, evaluations {self.first} to {self.last - 1}, {self.accepted} accepted, residual {self.residual:.2g})"


@checked
def sample_in_parallel(
    denoiser: Denoiser,
    sampler: Sampler | Tableau,
    x: Tensor,
    cond: Cond = None,
    *,
    seeds: Iterable[int] | Tensor | None = None,
    path: NoisePath = "steps",
    config: ParallelConfig | None = None,
    observe: Callable[[Round], None] | None = None,
) -> Tensor:
    """Run a sampler in parallel from ``x [B, *D]``, and return the samples ``[B, *D]``: those of `steps`, to a tolerance.

    Args:
        denoiser: the model; it is called with ``x [w B, *D]``, ``t [w B]`` and the condition ``w`` times over.
        sampler: a sampler or tableau.
        x: the start.
        cond: the condition of the batch.
        seeds: one per sample, for samplers that add noise.
        path: how they make noise, see `steps`.
        config: how.
        observe: called with each `Round`, whose ``x`` is an early preview.

    Raises:
        ModelError: as `steps`; a flow map, or a denoiser that cannot be called at several times at once.
        SolverError: as `steps`.
    """
    if observe is not None and not callable(observe):
        raise SolverError(f"observe is a function that is called with each Round, got {observe!r}")
    config = ParallelConfig() if config is None else config
    if not isinstance(config, ParallelConfig):
        raise SolverError(f"config is a fewstep.ParallelConfig, got a {type(config).__name__}")
    if config.devices:
        raise SolverError("a denoiser is where it is: leave devices out, or pass a Model to fewstep.sample(..., parallel=...)")
    end = x
    for made in rounds(denoiser, sampler, x, cond, seeds=seeds, path=path, config=config):
        end = made.x
        if observe is not None:
            observe(made)
    domain = domain_of(denoiser)
    return end if domain is None else domain.fold(end)[0]


def rounds(
    denoiser: Denoiser,
    sampler: Sampler | Tableau,
    x: Tensor,
    cond: Cond = None,
    *,
    seeds: Iterable[int] | Tensor | None = None,
    path: NoisePath = "steps",
    config: ParallelConfig,
) -> Iterator[Round]:
    """Run a sampler round by round. Arguments and errors are those of `sample_in_parallel`.

    Yields:
        A `Round` after each call of the denoiser.
    """
    tableau, listed = opened(denoiser, sampler, x, seeds)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    nodes, rows, count = tableau.nodes, tableau.rows(x), tableau.nodes.evaluations
    size = torch.hypot(nodes.alpha, nodes.sigma).to(x.dtype).to(x.device).reshape(-1, *(1,) * x.ndim)  # of a state
    mixing, noise = _Anderson(config.memory, config.ridge), Noises(noise_of(tableau, listed, x.shape[1:], path), x)
    lo, hi, state, guess, i = 0, 1, tableau.start(x), [x], 0
    while lo < count:
        i += 1
        states = torch.stack(guess)  # [w, B, *D], at the nodes lo .. hi - 1
        answers = evaluated(denoiser, states, nodes.t[lo:hi], cond)
        finite = FiniteCheck(nodes, f", in round {i}")
        made = [state]  # at the nodes lo .. hi, by these answers
        for j, answer in enumerate(answers, lo):
            finite.note(NETWORK, j, answer)
            made.append(advance(rows[j], made[-1], answer, noise(rows[j], j)))
        residuals = ((torch.stack([one.x for one in made[:-1]]) - states) / size[lo:hi])[1:]  # the state that begins it is accepted
        changes = _changes(residuals)
        finite.done()
        done = next((j for j, change in enumerate(changes, lo + 1) if not change <= config.tol), hi)
        stop, last = i == config.rounds, min(count, done + config.window)
        taken = tuple(Step(j, nodes.t[j], states[j - lo], answers[j - lo], made[j - lo + 1]) for j in range(lo, done))
        mixed = mixing(lo + 1, states[1:] / size[lo + 1 : hi], residuals) * size[lo + 1 : hi]
        guess, newest = [made[done - lo].x, *mixed[done - lo :]], made[-1]
        for j in range(hi, count if stop else last):  # rows that there is no answer for take the newest
            guess = [*guess, newest.x] if j > done else guess
            newest = advance(rows[j], newest, answers[-1], noise(rows[j], j))
        sample = newest.x if stop else made[-1].x if done == count else answers[-1]
        yield Round(i, lo, hi, taken, done, max(changes, default=math.inf), sample)
        if stop:
            return
        lo, hi, state = done, last, made[done - lo]
        noise.forget(done)


def opened(denoiser: Denoiser, sampler: object, x: Tensor, seeds: Iterable[int] | Tensor | None) -> tuple[Tableau, list[int]]:
    """Check the arguments of a run in parallel, and return its tableau and its seeds.

    Raises:
        SolverError, ModelError: as `steps`; a flow map.
    """
    tableau = tableau_of(sampler)
    if isinstance(denoiser, FlowMap):
        raise ModelError("a flow map makes each of its few jumps by one call, and there is nothing to run in parallel: use fewstep.sample")
    if tableau.first is not None:
        raise SolverError("a sampler that foresees its first answer is one of few evaluations, and runs in sequence: leave parallel out")
    check_start(x)
    check_schedule(tableau.nodes, denoiser)
    return tableau, seeds_of(tableau, x, seeds)


def evaluated(denoiser: Denoiser, states: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Call the denoiser once, at the states ``[w, B, *D]`` of times ``t [w]``, and return its answers ``[w, B, *D]``.

    Raises:
        ModelError: answers of another shape, or a denoiser that takes one time alone.
    """
    width, batch = states.shape[:2]
    x, times = states.flatten(0, 1), t.repeat_interleave(batch)
    try:
        answers = denoiser(x, times, repeated(cond, width))
    except (RuntimeError, TypeError, ValueError) as error:
        try:
            denoiser(states[0], t[0], cond)
        except Exception:  # noqa: BLE001 - then times are not what is wrong
            raise error from None
        raise ModelError(
            "this denoiser cannot be called at several times t [B] at once, and so not in parallel: use fewstep.sample without parallel"
        ) from error
    if answers.shape != x.shape:
        raise ModelError(f"the denoiser answered shape {tuple(answers.shape)} to states of shape {tuple(x.shape)}")
    return answers.to(x.dtype).unflatten(0, (width, batch))


def _changes(residuals: Tensor) -> list[float]:
    """Return the largest RMS over the batch of each state's residual ``[w, B, *D]``."""
    if not residuals.numel():
        return [0.0] * len(residuals)
    made: list[float] = residuals.flatten(2).square().mean(2).sqrt().amax(1).tolist()
    return made


class Noises:
    """The noise of each row, drawn once: the very one that `steps` adds."""

    def __init__(self, noise: Callable[[int], Tensor], x: Tensor) -> None:
        self.noise, self.x, self.drawn = noise, x, dict[int, Tensor]()

    def __call__(self, row: Row, j: int) -> Tensor | None:
        if row.noise is None:
            return None
        if j not in self.drawn:
            self.drawn[j] = self.noise(j).to(self.x.dtype).to(self.x.device)
        return self.drawn[j]

    def forget(self, before: int) -> None:
        """Drop the noises of rows that are done."""
        self.drawn = {j: made for j, made in self.drawn.items() if j >= before}


LEAST_RIDGE = 1e-12  # without any, iterates that agree make the mixing singular


class _Iterate(NamedTuple):
    """States ``first, first + 1, ...`` of one round and their residuals, ``[w, B, *D]`` each, relative to the size of a state."""

    first: int
    x: Tensor
    residual: Tensor


class _Anderson:
    """Triangular Anderson mixing: each state is mixed by the residuals of the states up to it, which alone determine it.

    With the differences ``dX``, ``dR`` of the last iterates and of their residuals, for each sample and each state ``j``,

        gamma_j = (G_j + ridge tr(G_j)/q I)^-1 h_j,   G_j = sum_{k<=j} dR_k dR_k^T,   h_j = sum_{k<=j} dR_k R_k,
        x_j <- x_j + R_j - gamma_j . (dX_j + dR_j).
    """

    def __init__(self, memory: int, ridge: float) -> None:
        self.memory, self.ridge, self.past = memory, max(ridge, LEAST_RIDGE), list[_Iterate]()

    def __call__(self, first: int, x: Tensor, residual: Tensor) -> Tensor:
        """Return the next iterate ``[w, B, *D]`` of the states ``first, first + 1, ...``, from this one and its residuals."""
        plain, here = x + residual, _Iterate(first, x, residual)
        if self.memory == 1:
            return plain
        self.past = [*self.past, here][-self.memory :]
        if len(self.past) == 1 or not x.numel():
            return plain
        changes = [_difference(here, new, old) for old, new in zip(self.past, self.past[1:], strict=False)]
        gram, slope = [], []
        for k, value in enumerate(residual):
            rows = torch.stack([change.residual[k] for change in changes]).flatten(2).double()  # [q, B, n]
            gram.append(torch.einsum("qbn,pbn->bqp", rows, rows))
            slope.append(torch.einsum("qbn,bn->bq", rows, value.flatten(1).double()))
        normal, right = torch.stack(gram).cumsum(0), torch.stack(slope).cumsum(0)  # [w, B, q, q], [w, B, q]
        trace = normal.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]  # zero where no state has two residuals yet, or none changed
        ridge = torch.where(trace > 0, self.ridge * trace, 1) * torch.eye(len(changes), dtype=normal.dtype, device=normal.device)
        gamma = torch.linalg.solve(normal + ridge, right).to(x.dtype).reshape(*x.shape[:2], len(changes), *(1,) * (x.ndim - 2))
        for q, change in enumerate(changes):
            plain = plain - gamma[:, :, q] * (change.x + change.residual)
        return plain


def _difference(here: _Iterate, new: _Iterate, old: _Iterate) -> _Iterate:
    """Return the difference of two iterates at the states of ``here``; zero for those that are not in both."""
    begin, end = max(one.first for one in (here, new, old)), min(one.first + len(one.x) for one in (here, new, old))
    change = _Iterate(here.first, torch.zeros_like(here.x), torch.zeros_like(here.x))
    if begin < end:
        for made, theirs, before in zip(change[1:], new[1:], old[1:], strict=True):
            made[begin - here.first : end - here.first] = (
                theirs[begin - new.first : end - new.first] - before[begin - old.first : end - old.first]
            )
    return change
