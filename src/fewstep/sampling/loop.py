"""The one sampling loop.

`steps` drives every tableau of this library: sampling, benchmarks, teacher trajectories, fits, and loops of one's own iterate over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser, FlowMap
from fewstep.core.domain import domain_of
from fewstep.core.prediction import aligned
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, State, Tableau, advance
from fewstep.runtime.errors import ModelError, SolverError
from fewstep.runtime.front_door import checked, whole
from fewstep.sampling.brownian import NoisePath, noise_of
from fewstep.sampling.noise import seeds_of

__all__ = ["NETWORK", "Edit", "FiniteCheck", "Step", "check_schedule", "check_start", "jumps", "run", "steps"]


class Step(NamedTuple):
    """One network evaluation, with the state that the sampler made of it.

    Attributes:
        i: the number of the evaluation, ``0 .. N-1``.
        t: its time, ``[]``.
        x: the state it was made at, ``[B, *D]``.
        x0: the denoiser's answer, ``[B, *D]``.
        state: the sampler's state after it, for ``resume=(step.i + 1, step.state)``.
    """

    i: int
    t: Tensor
    x: Tensor
    x0: Tensor
    state: State

    def __repr__(self) -> str:
        return f"Step({self.i}, t = {float(self.t):.4g}, states of {tuple(self.x.shape)})"

    @property
    def x_next(self) -> Tensor:
        """The state of the next evaluation, ``[B, *D]``; the sample itself after the last."""
        return self.state.x


Edit = Callable[[Step], Tensor | None]


@checked
def steps(
    denoiser: Denoiser | FlowMap,
    tableau: Tableau,
    x: Tensor,
    cond: Cond = None,
    *,
    seeds: Iterable[int] | Tensor | None = None,
    noise: Callable[[int], Tensor] | None = None,
    path: NoisePath = "steps",
    resume: tuple[int, State] | None = None,
    edit: Edit | None = None,
) -> Iterator[Step]:
    """Run a tableau evaluation by evaluation, from ``x [B, *D]`` at its first time to its last.

    The state is kept in at least float32; the denoiser is called with it once per row of the tableau, at a float64 ``t []``. A first answer
    that the tableau foresees is not asked for.
    Gradients flow through everything; iterate under ``torch.no_grad()`` when none are wanted. The states of a reflected model may lie
    beyond a wall of its cube: its samples are the last ones, folded, ``model.domain.fold(step.x_next)[0]``.

    Args:
        denoiser: the model; its schedule must be the tableau's. A `FlowMap` takes each step by one call, and its tableau must be of first
            order (DDIM's), since there is nothing left for a solver to do.
        tableau: the numbers of a solver on a grid.
        x: the start, see `start_noise`.
        cond: handed to the denoiser unchanged.
        seeds: one per sample, for tableaux that add noise; others do not read them.
        noise: the same by evaluation, ``i -> standard normal [B, *D]``.
        path: how the seeds make noise: ``steps`` by the number of the evaluation, ``brownian`` as a function of the noise levels, so that
            another number of steps follows the same path of each seed (`BrownianPath`).
        resume: begin at this evaluation with this state instead of at 0 with ``x``, which then only says the shape and dtype.
        edit: may change the state after each step, ``step -> [B, *D]`` or None: guidance by projection, constraints, inpainting. A solver
            of several stages is asked after the last one of each step.

    Yields:
        A `Step` after each evaluation.

    Raises:
        ModelError: the denoiser's schedule is another, its output has another shape; the output, the start, the noise or what an edit
            answered is not finite (which, at which evaluation).
        SolverError: coefficients of samples of another shape, a stochastic tableau without noise, seeds of another number, a solver whose
            steps an edit does not reach, or one that a flow map or a student of few steps cannot take.
    """
    if not isinstance(tableau, Tableau):
        raise SolverError(f"the loop runs a Tableau, as sampler.tableau, not a {type(tableau).__name__}")
    check_start(x)
    nodes = tableau.nodes
    check_schedule(nodes, denoiser)
    if (check := getattr(denoiser, "check_own_steps", None)) is not None:  # a Model, which may know its own alone
        check(tableau)
    listed = seeds_of(tableau, x, seeds, needed=noise is None)
    for name, function, form in (("noise", noise, "i -> standard normal [B, *D]"), ("edit", edit, "step -> [B, *D] or None")):
        if function is not None and not callable(function):
            raise SolverError(f"{name} is a function, {form}, got a {type(function).__name__}")
    if noise is not None and path != "steps":
        raise SolverError(f"path={path!r} says how seeds make noise: pass seeds= with it, or noise= alone")
    drawn = noise_of(tableau, listed, x.shape[1:], path) if noise is None else noise
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    answer = jumps(denoiser, tableau) if isinstance(denoiser, FlowMap) else denoiser
    first, state = (0, tableau.start(x)) if resume is None else _resumed(resume, x, tableau)
    whole_steps = tableau.whole_steps
    if edit is not None and not whole_steps[-1]:
        raise SolverError(
            "this solver steps from a state before the one that it evaluates (UniPC's corrector), so an edit would be undone: use "
            "ddim, dpm-solver-pp-2m, deis-3, ipndm or unipc-2:corrector=false"
        )
    finite = FiniteCheck(nodes)
    finite.note("the start x has entries that are", first, state.x)
    for i, row in enumerate(tableau.rows(x)[first:], first):
        foreseen = tableau.first if i == 0 else None
        x0 = answer(state.x, nodes.t[i], cond) if foreseen is None else foreseen(state.x / nodes.sigma[0].to(x.dtype), cond)
        if x0.shape != x.shape:
            raise ModelError(f"the denoiser answered shape {tuple(x0.shape)} to a state of shape {tuple(x.shape)}")
        x0 = x0.to(x.dtype)
        finite.note(NETWORK, i, x0)
        xi = None
        if row.noise is not None:
            xi = drawn(i)
            _check_like(xi, x, "noise")
            xi = xi.to(x.dtype).to(x.device)
            if noise is not None:
                finite.note("the noise has entries that are", i, xi)
        before, state = state, advance(row, state, x0, xi)
        step = Step(i, nodes.t[i], before.x, x0, state)
        edited = None if edit is None or not whole_steps[i] else edit(step)
        if edited is not None:
            _check_like(edited, x, "edit")
            edited = edited.to(x.dtype)
            state = state._replace(x=edited, anchor=None if state.anchor is None else edited.clone())
            finite.note("edit answered entries that are", i, state.x)
            step = step._replace(state=state)
        yield step
    finite.done()


def _check_like(answer: object, x: Tensor, name: str) -> None:
    """Refuse what a caller's function answers in place of a tensor of the state's shape ``[B, *D]``."""
    if not isinstance(answer, Tensor) or answer.shape != x.shape:
        what = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise ModelError(f"{name} answered {what} for a state of shape {tuple(x.shape)}")
    if not answer.is_floating_point():
        raise ModelError(f"{name} answered in {str(answer.dtype).removeprefix('torch.')}: an answer is of floating point numbers")


def _resumed(resume: object, x: Tensor, tableau: Tableau) -> tuple[int, State]:
    """Return where to begin and with which state.

    Raises:
        SolverError: no evaluation has this number, or the state is not one of this solver at ``x``.
    """
    count = tableau.nodes.evaluations
    if not isinstance(resume, tuple) or len(resume) != 2 or not isinstance(resume[1], State):
        raise SolverError(f"resume is an evaluation and the state before it, as (step.i + 1, step.state), got {str(resume)[:80]}")
    first, state = whole(resume[0], "the evaluation to resume at", SolverError), resume[1]
    if not 0 <= first <= count:
        raise SolverError(f"resume at an evaluation from 0 to {count}, got {first}")
    fresh = tableau.start(x)
    if (state.anchor is None) != (fresh.anchor is None) or len(state.history) != len(fresh.history) or state.x.shape != x.shape:
        raise SolverError("the state to resume from is that of another solver, or of samples of another shape than x")
    return first, state


def check_start(x: object, shape: Sequence[int] | None = None) -> None:
    """Refuse what is no start ``[B, *D]``.

    Args:
        x: what was passed.
        shape: that of a sample, ``*D``, where it is known; a start may be of another size, not of other dimensions.

    Raises:
        ModelError: it is no tensor of floating point numbers with a batch.
    """
    if not isinstance(x, Tensor):
        raise ModelError(f"x is the start, a tensor [B, *D], not a {type(x).__name__}: for noise of the model's shape pass seeds= alone")
    if not x.is_floating_point():
        raise ModelError(f"x is the start, in floating point, not in {str(x.dtype).removeprefix('torch.')}")
    if x.layout != torch.strided:
        raise ModelError(f"x is the start, a dense tensor, not one of {str(x.layout).removeprefix('torch.')}: pass x.to_dense()")
    if not x.ndim or (shape is not None and x.ndim != len(shape) + 1):
        wanted = "[B, *D]" if shape is None else f"[B, {', '.join(map(str, shape))}]"
        raise ModelError(f"x is the start of a batch, {wanted}, got shape {tuple(x.shape)}")


def run(
    denoiser: Denoiser | FlowMap,
    tableau: Tableau,
    x: Tensor,
    cond: Cond = None,
    *,
    seeds: Sequence[int] | Tensor | None = None,
    path: NoisePath = "steps",
    edit: Edit | None = None,
    observe: Callable[[Step], None] | None = None,
) -> Tensor:
    """Run a tableau to its end and return the samples ``[B, *D]``, those of a reflected model folded into its cube.

    Arguments and errors are those of `steps`.

    Args:
        observe: called with every step.
    """
    end = x
    for step in steps(denoiser, tableau, x, cond, seeds=seeds, path=path, edit=edit):
        end = step.x_next
        if observe is not None:
            observe(step)
    domain = domain_of(denoiser)
    return end if domain is None else domain.fold(end)[0]


def jumps(flow_map: FlowMap, tableau: Tableau) -> Denoiser:
    """Return the denoiser whose first-order steps on this tableau land where the flow map does.

    Raises:
        SolverError: the tableau is not of first order, or has times that the map does not know.
    """
    nodes = tableau.nodes
    flow_map.check(nodes.t)
    ratio, gain = nodes.first_order()
    if tableau.stochastic or not _is_first_order(tableau, ratio, gain):
        raise SolverError("a flow map makes first-order steps alone: use the solver ddim, on a grid of as many steps as there are jumps")
    return _Jumps(flow_map, nodes, ratio, gain)


def _is_first_order(tableau: Tableau, ratio: Tensor, gain: Tensor) -> bool:
    """Return whether every step is ``x' = ratio x + gain x0``, by its unrolled coefficients."""
    made = tableau.unrolled()
    if made.start.ndim > 1:  # numbers per channel or element
        return False
    through = ratio.cumprod(0)  # from the start to each state
    answers = torch.tril(gain * through[:, None] / through, -1) + torch.diag(gain)  # the last ratio may be 0
    close = [torch.allclose(one, two, rtol=1e-9, atol=1e-12) for one, two in ((made.start, through), (made.answers, answers))]
    return all(close) and not bool(made.bias.any())


class _Jumps:
    """A flow map as a denoiser: its ``x0`` is the one with which a first-order step lands on the map's own ``x_t``."""

    def __init__(self, flow_map: FlowMap, nodes: Nodes, ratio: Tensor, gain: Tensor) -> None:
        self.flow_map, self.nodes, self.ratio, self.gain = flow_map, nodes, ratio, gain

    @property
    def schedule(self) -> NoiseSchedule:
        return self.flow_map.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        i = int((self.nodes.t == t).nonzero())
        landed = self.flow_map(x, t, self.nodes.t[i + 1], cond)
        return (landed - aligned(self.ratio[i], x) * x) / aligned(self.gain[i], x)


NETWORK = "the network's output is"


class FiniteCheck:
    """A check that all numbers from outside are finite: recorded as they come, read once at the end, so that no step waits for the device.

    Args:
        nodes: where the evaluations are made.
        during: more of when, for the error.
    """

    def __init__(self, nodes: Nodes, during: str = "") -> None:
        self.nodes, self.during, self.noted, self.extremes = nodes, during, list[tuple[str, int]](), list[Tensor]()

    def note(self, what: str, i: int, values: Tensor) -> None:
        """Record values ``[B, *D]`` by their least and greatest, which reads them once where ``isfinite`` writes three copies.

        Args:
            what: the subject and the verb of the error.
            i: the evaluation that they came with.
            values: from the network or from the caller.
        """
        if values.numel():
            self.noted.append((what, i))
            self.extremes.append(torch.stack(values.detach().aminmax()))

    def done(self) -> None:
        """Refuse values that were not finite.

        Raises:
            ModelError: some were not (the first).
        """
        if not self.extremes:
            return
        bad = (~torch.isfinite(torch.stack(self.extremes)).all(1)).nonzero()
        if len(bad):
            what, i = self.noted[int(bad[0])]
            mend = ": check its weights and dtype, or clip its inputs" if what == NETWORK else ""
            raise ModelError(
                f"{what} not finite (NaN or infinite) at evaluation {i + 1} of {self.nodes.evaluations}, "
                f"t = {self.nodes.t[i]:g}, sigma = {self.nodes.sigma[i]:g}{self.during}{mend}"
            )


def check_schedule(nodes: Nodes, denoiser: Denoiser | FlowMap) -> None:
    """Refuse nodes of another noise schedule than the denoiser's.

    Raises:
        ModelError: they are (where they differ), or its schedule is no noise law.
    """
    t, schedule = nodes.t.detach(), getattr(denoiser, "schedule", None)
    if not isinstance(schedule, NoiseSchedule):
        raise ModelError(f"a {type(denoiser).__name__} is no denoiser, since its schedule is no noise law: make a fewstep.Model of it")
    for name, ours, theirs in (("alpha", nodes.alpha, schedule.alpha(t)), ("sigma", nodes.sigma, schedule.sigma(t))):
        wrong = (~torch.isclose(ours.detach(), theirs, rtol=1e-6, atol=1e-9)).nonzero()
        if len(wrong):
            i = int(wrong[0])
            raise ModelError(
                f"the sampler was made for another noise schedule: at t = {t[i]:g} it has {name} = {ours[i]:g}, the model {theirs[i]:g}"
            )
