r"""Fit the coefficients of a tableau to a model by least squares, first in closed form, then on the endpoints of its samples.

On a grid a solver is ``x_{i+1} = a_i x_i + sum_k c_ik h_{i-k} (+ b_i)`` with ``h_j = D(x_j, t_j)``. Hand-made coefficients are exact on
polynomials. Over a few long steps a trajectory is not one, but a few hundred of a model's own show its shape. So `fit_in_sequence` chooses

    (a_i, c_i) = argmin |F_i w - y_{i+1}|^2,     F_i = [x_i, h_i, h_{i-1}, ..., h_{i-K+1}],     y_{i+1} the teacher's state at t_{i+1},

for one step after the other, from the student's own states, so that a step also corrects the errors of the steps before it. Only the
endpoint counts in the end, so `sweep` then adjusts all coefficients and levels together (see `endpoint.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, get_args

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.grid import TimeGrid
from fewstep.core.pooling import Pool, pooled_shape
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, State, Tableau, advance
from fewstep.learn.search.endpoint import (
    CachedRun,
    EndpointError,
    Parameters,
    Perturbation,
    levenberg_marquardt,
    mean_over_processes,
    per_sample_rmse,
)
from fewstep.learn.search.refine import Levels
from fewstep.runtime.errors import FewstepError, SolverError
from fewstep.runtime.front_door import at_least, check_fields, checked_class
from fewstep.runtime.process import sum_over_processes

__all__ = ["FitForm", "NormalEquations", "TeacherBatch", "fit_in_sequence", "sweep", "widened"]

WEAKEST = 1e-2  # size of a direction of the features, relative to the features', below which a sweep does not move along it
DIFFERENCE = 0.5  # of the size of the errors: how far a coefficient moves a state for a difference
FINEST = 1e-4  # of the size of the states, at least
STEPS = 4  # with one Jacobian, see `levenberg_marquardt`


@checked_class
@dataclass(frozen=True)
class FitForm:
    """The coefficients of a sampler that are fitted.

    Args:
        history: number of past outputs that a step reads; by default all.
        pool: which elements share a coefficient: element (none do), channel (those at one index of dimension 1 of the state, which
            are a token's features where the state is tokens), scalar (all do).
        bias: also fit a constant picture to each step (a number, if the pool is scalar).
        ridge: strength of the ridge penalty towards the parent's coefficients, relative to features of unit size.
        shrink: strength of the penalty on differences between elements, and on the bias, likewise.

    Raises:
        FewstepError: a number out of range, an unknown pool.
    """

    history: int | None = None
    pool: Pool = "element"
    bias: bool = True
    ridge: float = 1e-6
    shrink: float = 1e-3

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pool not in get_args(Pool):
            raise FewstepError(f"coefficients are pooled by element, channel or scalar, got {self.pool!r}")
        at_least(self, history=1)
        if not 0 <= self.ridge < 1e6 or not 0 <= self.shrink < 1e6:
            raise FewstepError(f"ridge and shrink lie between 0 and 1e6, got {self.ridge:g} and {self.shrink:g}")

    def memory(self, steps: int) -> int:
        """Return the number ``K`` of past outputs in a tableau of ``steps`` steps."""
        return steps if self.history is None else min(self.history, steps)

    def shape(self, sample: Sequence[int]) -> tuple[int, ...]:
        """Return the shape ``*E`` of one coefficient for samples ``*D``."""
        return pooled_shape(self.pool, sample)


class TeacherBatch(Protocol):
    """A batch of the teacher's trajectories at the times of a grid."""

    @property
    def cond(self) -> Cond: ...

    def state(self, i: int) -> Tensor:
        """Return the states ``[B, *D]`` at the ``i``-th time."""
        ...


class NormalEquations:
    """The normal equations ``F F'`` and ``F y``, summed over samples and over the elements that share coefficients; float64, additive.

    The last feature is the constant 1, whose coefficient is the bias.
    """

    def __init__(self, groups: int, features: int) -> None:
        self.gram = torch.zeros(groups, features + 1, features + 1, dtype=torch.float64)
        self.right = torch.zeros(groups, features + 1, dtype=torch.float64)
        self.rows = torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor, target: Tensor) -> None:
        """Add ``features [c, B, *D]`` and their ``target [B, *D]``."""
        both = torch.cat([features, torch.ones_like(features[:1]), target[None]]).detach().cpu().double()
        grouped = both.reshape(len(both), len(target), len(self.gram), -1).permute(2, 0, 1, 3).flatten(2)  # [groups, c+2, rows]
        product = grouped[:, :-1] @ grouped.mT
        self.gram += product[..., :-1]
        self.right += product[..., -1]
        self.rows += grouped.shape[2]

    def over_processes(self) -> NormalEquations:
        """Return the sum over all processes (all-reduce)."""
        total = NormalEquations(len(self.gram), self.gram.shape[1] - 1)
        total.gram, total.right, total.rows = map(sum_over_processes, (self.gram, self.right, self.rows))
        return total

    def solve(self, parent: Tensor, form: FitForm) -> Tensor:
        """Return weights and bias ``[groups, c+1]``: the common solution near the ``parent [c]``, then each group's near that."""
        gram, right = self.gram / self.rows, self.right / self.rows
        size = gram.mean(0).diagonal().sqrt()
        size = torch.where(size > 0, size, 1.0)
        common = torch.cat([parent, torch.zeros(1, dtype=torch.float64)])
        common[:-1] += _ridge(gram.mean(0)[:-1, :-1], right.mean(0)[:-1], common[:-1], size[:-1], form.ridge)
        free = len(common) if form.bias else len(common) - 1
        if form.pool == "scalar" and not form.bias:
            return common[None]
        own = common.expand(len(gram), -1).clone()
        own[:, :free] += _ridge(gram[:, :free, :free], right[:, :free], common[:free], size[:free], form.shrink)
        return own


def _ridge(gram: Tensor, right: Tensor, near: Tensor, size: Tensor, ridge: float) -> Tensor:
    """Return the ridge-regularised correction to ``near [c]``, ``argmin |F w - y|^2 + ridge |size (w - near)|^2``, for each group."""
    left = gram / size[:, None] / size + ridge * torch.eye(len(size), dtype=torch.float64)
    missing = (right - (gram @ near[:, None]).squeeze(-1)) / size
    return torch.linalg.lstsq(left, missing[..., None], driver="gelsd").solution.squeeze(-1) / size


def widened(parent: Tableau, form: FitForm, sample: Sequence[int]) -> Tableau:
    """Widen the parent's tableau to the coefficients of ``form``, for samples ``*D``: the same solver, to be fitted.

    Raises:
        SolverError: the parent is not of the form ``x' = a x + sum_k c_k h_k`` with ``K`` outputs.
    """
    n, memory = len(parent.update), form.memory(len(parent.update))
    one_state = torch.equal(parent.update[:, 0], parent.update[:, 1]) or not bool((parent.update[:, 1, 0] != 0).any())
    plain = bool((parent.record[:, 0] == 0).all() and (parent.record[:, 1] == 1).all())
    more = bool((parent.update[:, :, 2 + memory :] != 0).any()) or bool((parent.bias != 0).any())
    if not one_state or not plain or parent.stochastic or parent.update.ndim > 3 or more:
        raise SolverError(
            f"a fit starts from a solver that steps from where it evaluates, by at most {memory} outputs and without noise or bias: "
            "dpm-solver-pp-2m, dpm-solver-pp-3m or unipc-2:corrector=false with enough history; ddim with any"
        )
    shape = form.shape(sample)
    update = torch.zeros(n, 2, 2 + memory, *shape, dtype=torch.float64)
    known = min(memory, parent.memory)
    row = parent.update[:, 1].clone()
    row[:, 1] += row[:, 0]  # the anchor is the state itself
    update[:, 1, 1 : 2 + known] = row[:, 1 : 2 + known].reshape(n, 1 + known, *(1,) * len(shape))
    record = torch.zeros(n, 2, *(1,) * len(shape), dtype=torch.float64)
    record[:, 1] = 1
    return Tableau(parent.nodes, record, update, torch.zeros(n, 2, *shape, dtype=torch.float64), torch.zeros(n, dtype=torch.float64))


def fit_in_sequence(
    denoiser: Denoiser,
    start: Tableau,
    batches: Sequence[TeacherBatch],
    form: FitForm,
    *,
    rows: Collection[int] | None = None,
    cache: MutableMapping[str, Tensor] | None = None,
) -> Tableau:
    """Fit the rows of a tableau one after the other to the teacher's states, each from the states that the rows before it reach.

    Sums over samples are in memory, the student's states and outputs in ``cache``, a mapping that may store them elsewhere. With several
    processes each has batches of its own, and all get the same tableau.

    Args:
        denoiser: the model.
        start: the tableau to begin with, see `widened`; the fit is shrunk to its rows.
        batches: the teacher's states at the nodes of ``start``.
        form: which coefficients are fitted.
        rows: the rows to fit; by default all.
        cache: where the student's states and outputs are stored, ``x-{batch}`` and ``h-{evaluation}-{batch}``; by default in memory.

    Raises:
        ModelError: the denoiser refuses its inputs.
        FewstepError: no batches, a start without the coefficients of the form, or states that are not finite.
    """
    if not batches:
        raise FewstepError("a fit needs at least one batch of trajectories")
    sample = batches[0].state(0).shape[1:]
    if start.memory != form.memory(len(start.update)) or start.update.shape[3:] != form.shape(sample):
        raise FewstepError("the tableau to start from has not the coefficients of the form: make it with widened(parent, form, shape)")
    cache, rows = {} if cache is None else cache, range(len(start.update)) if rows is None else rows
    tableau, shape, device = start, start.update.shape[3:], batches[0].state(0).device
    for i in range(len(start.update)):
        equations = NormalEquations(shape.numel(), 1 + min(i + 1, start.memory))
        for k, batch in enumerate(batches):
            x = cache[f"x-{k}"].to(device) if i else batch.state(0)
            with torch.no_grad():
                cache[f"h-{i}-{k}"] = denoiser(x, start.nodes.t[i], batch.cond).to(x.dtype)
            if i in rows:
                equations.add(_features(x, _history(cache, i, k, start.memory)), batch.state(i + 1))
        if i in rows:
            tableau = _fitted(tableau, i, equations.over_processes(), form)
        for k, batch in enumerate(batches):
            x = cache[f"x-{k}"].to(device) if i else batch.state(0)
            newest, *past = (h.to(device) for h in _history(cache, i, k, start.memory))
            room = (torch.zeros_like(x) for _ in range(start.memory - len(past)))
            cache[f"x-{k}"] = advance(tableau.rows(x)[i], State(x, None, (*past, *room)), newest).x
    return tableau


def _history(cache: MutableMapping[str, Tensor], i: int, k: int, memory: int) -> list[Tensor]:
    """Return the outputs for one batch, newest first."""
    return [cache[f"h-{j}-{k}"] for j in range(i, max(-1, i - memory), -1)]


def _features(x: Tensor, history: Sequence[Tensor]) -> Tensor:
    return torch.stack([x, *(h.to(x.device) for h in history)])


def _fitted(tableau: Tableau, i: int, equations: NormalEquations, form: FitForm) -> Tableau:
    """Return the tableau with row ``i`` solved."""
    shape, count = tableau.update.shape[3:], equations.gram.shape[1] - 1
    parent = tableau.update[i, 1, 1 : 1 + count].reshape(count, -1).mean(1)
    if not all(bool(torch.isfinite(part).all()) for part in (equations.gram, equations.right)):  # lstsq crashes on these
        raise FewstepError(f"the states for evaluation {i} of a fit are not finite: check the network and the trajectories")
    solution = equations.solve(parent, form)
    update, bias = tableau.update.clone(), tableau.bias.clone()
    update[i, 1, 1 : 1 + count] = solution[:, :-1].T.reshape(count, *shape)
    bias[i, 1] = solution[:, -1].reshape(shape)
    return Tableau(tableau.nodes, tableau.record, update, bias, tableau.noise)


# -- all coefficients and levels together, on the endpoints --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Free:
    """A tableau with free coefficients, changed alike for all elements, and free inner levels unless ``schedule`` is None."""

    tableau: Tableau
    schedule: NoiseSchedule | None

    def parameters(self, runs: Sequence[CachedRun], size: float) -> Parameters:
        """Return every row's weights along the principal directions of its features, and every level, as free numbers."""
        tableau, perturb, places = self.tableau, list[Perturbation](), list[tuple[int, Tensor]]()
        far = max(DIFFERENCE * size, FINEST * _rms(runs))
        for i in range(len(tableau.update)):
            for direction in _directions(runs, i, min(i + 1, tableau.memory)):
                places.append((i, direction))
                perturb.append(lambda i=i, direction=direction: (_along(tableau, [(i, far * direction)]), far))
        levels = None if self.schedule is None else Levels(TimeGrid(tableau.nodes.t), self.schedule)
        for level in levels.perturbed() if levels is not None else []:
            perturb.append(lambda level=level: None if level is None else (self._on(tableau, level[0]), level[1]))

        def step(delta: Tensor) -> _Free | None:
            changes = [(i, amount * direction) for (i, direction), amount in zip(places, delta, strict=False)]
            grid = None if levels is None else levels.moved(delta[len(places) :])
            if levels is not None and grid is None:
                return None
            moved = _along(tableau, changes)
            return replace(self, tableau=moved if grid is None else self._on(moved, grid))

        return Parameters(perturb, step)

    def _on(self, tableau: Tableau, grid: TimeGrid) -> Tableau:
        """Return the same coefficients, evaluated at other levels."""
        assert self.schedule is not None
        return Tableau(Nodes.at(self.schedule, grid.t), tableau.record, tableau.update, tableau.bias, tableau.noise)


def _along(tableau: Tableau, changes: Sequence[tuple[int, Tensor]]) -> Tableau:
    """Return the tableau with the weights of state and outputs changed in some rows."""
    update = tableau.update.clone()
    for i, change in changes:
        update[i, 1, 1 : 1 + len(change)] += change.reshape(-1, *(1,) * (update.ndim - 3))
    return Tableau(tableau.nodes, tableau.record, update, tableau.bias, tableau.noise)


def _directions(runs: Sequence[CachedRun], i: int, count: int) -> list[Tensor]:
    """Return changes of the weights of row ``i``, each ``[1 + count]``, that move its next state by 1 (RMS), in orthogonal directions."""
    gram, rows = torch.zeros(1 + count, 1 + count, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for run in runs:
        features = _features(run.states[i].x, run.states[i + 1].history[:count]).flatten(1).cpu().double()
        gram += features @ features.T
        rows += features.shape[1]
    gram = sum_over_processes(gram) / sum_over_processes(rows)
    size = gram.diagonal().sqrt().clamp_min(1e-30)
    values, vectors = torch.linalg.eigh(gram / size[:, None] / size)
    vectors = torch.where(vectors[0] < 0, -vectors, vectors)  # else rounding decides which way each points, and differences are one-sided
    return [vector / value.sqrt() / size for value, vector in zip(values, vectors.T, strict=True) if float(value) > WEAKEST**2]


def _rms(runs: Sequence[CachedRun]) -> float:
    return mean_over_processes(torch.cat([per_sample_rmse(run.states[-1].x) for run in runs]).square()) ** 0.5


def sweep(
    windows: Sequence[Sequence[EndpointError]],
    tableau: Tableau,
    schedule: NoiseSchedule | None,
    *,
    iterations: int,
    observe: Callable[[int, float], None] | None = None,
) -> Tableau:
    """Minimise the endpoint error over all coefficients of a tableau together, and over its inner levels if ``schedule`` is given.

    Args:
        windows: batches of noises, see `levenberg_marquardt`.
        tableau: where to start.
        schedule: the noise law whose times the levels are; None to leave them where they are.
        iterations: largest number of iterations.
        observe: called after each iteration with its number and the objective.
    """
    return levenberg_marquardt(windows, _Free(tableau, schedule), iterations=iterations, steps_each=STEPS, observe=observe).tableau
