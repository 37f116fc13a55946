r"""The coefficients of a fitted sampler: their form, the least squares that finds a row of them, and the sweep over all rows together.

On a grid a solver is ``x_{i+1} = a_i x_i + sum_k c_ik h_{i-k} (+ b_i)`` with ``h_j = D(x_j, t_j)``. `sequence.py` fits one step after the
other in closed form, by the `NormalEquations` of this file. Only the endpoint counts in the end, so `sweep` then adjusts all coefficients
and levels together (see `endpoint.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.pooling import Pool, pooled_shape
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Tableau
from fewstep.learn.search.endpoint import (
    CachedRun,
    EndpointError,
    Parameters,
    Perturbation,
    TableauPoint,
    levenberg_marquardt,
    mean_over_processes,
    per_sample_rmse,
)
from fewstep.learn.search.refine import Levels
from fewstep.runtime.errors import FewstepError, SolverError
from fewstep.runtime.front_door import at_least, check_fields, checked_class
from fewstep.runtime.process import sum_over_processes

__all__ = ["FitForm", "NormalEquations", "sweep", "widened"]

FOLDS = 4  # of cross-validation
SHRINKS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e9)  # penalties that it chooses from; the last is none but the common solution
RANK = 1e-14  # of the largest eigenvalue of normal equations: directions below it are left as they are
WEAKEST = 1e-1  # size of a direction of the features, relative to the features', below which a sweep does not move along it
DIFFERENCE = 0.5  # of the size of the errors: how far a coefficient moves a state for a difference
FINEST = 1e-4  # of the size of the states, at least
STEPS = 8  # with one Jacobian, at most, see `levenberg_marquardt`


@checked_class
@dataclass(frozen=True)
class FitForm:
    """The coefficients of a sampler that are fitted.

    Args:
        history: number of past outputs that a step reads; by default all.
        pool: which elements share a coefficient: element (none do), channel (those at one index of dimension 1 of the state, which
            are a token's features where the state is tokens), scalar (all do); by default element, and in a fit scalar for samples of more
            than 16,384 numbers.
        bias: also fit a constant picture to each step (a number, if the pool is scalar).
        ridge: strength of the ridge penalty towards the parent's coefficients, relative to features of unit size.
        shrink: strength of the penalty on differences between elements, and on the bias, likewise; by default chosen for each step by
            cross-validation.

    Raises:
        FewstepError: a number out of range, an unknown pool.
    """

    history: int | None = None
    pool: Pool | None = None
    bias: bool = True
    ridge: float = 1e-6
    shrink: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pool not in (None, *get_args(Pool)):
            raise FewstepError(f"coefficients are pooled by element, channel or scalar, got {self.pool!r}")
        at_least(self, history=1)
        for name, value in (("ridge", self.ridge), ("shrink", self.shrink)):
            if value is not None and not 0 <= value < 1e6:
                raise FewstepError(f"{name} lies between 0 and 1e6, got {value:g}")

    def memory(self, steps: int) -> int:
        """Return the number ``K`` of past outputs in a tableau of ``steps`` steps."""
        return steps if self.history is None else min(self.history, steps)

    def shape(self, sample: Sequence[int]) -> tuple[int, ...]:
        """Return the shape ``*E`` of one coefficient for samples ``*D``."""
        return pooled_shape(self.pool or "element", sample)


class NormalEquations:
    """The normal equations ``F F'`` and ``F y``, summed over samples and over the elements that share coefficients; float64, additive.

    The last feature is the constant 1, whose coefficient is the bias. Samples are summed in `FOLDS` parts, so that a penalty can be chosen
    by how well the other parts predict each.
    """

    def __init__(self, groups: int, features: int) -> None:
        self.gram = torch.zeros(FOLDS, groups, features + 1, features + 1, dtype=torch.float64)
        self.right = torch.zeros(FOLDS, groups, features + 1, dtype=torch.float64)
        self.rows = torch.zeros(FOLDS, dtype=torch.float64)

    def add(self, features: Tensor, target: Tensor, places: Sequence[int]) -> None:
        """Add ``features [c, B, *D]`` and their ``target [B, *D]``, of the samples at these ``places`` among all."""
        fold = torch.tensor(places) % FOLDS
        for k in fold.unique().tolist():
            at = (fold == k).nonzero().flatten().to(target.device)
            both = torch.cat([features[:, at], torch.ones_like(features[:1, at]), target[None, at]]).detach().cpu().double()
            grouped = both.reshape(len(both), len(at), self.gram.shape[1], -1).permute(2, 0, 1, 3).flatten(2)  # [groups, c+2, rows]
            product = grouped[:, :-1] @ grouped.mT
            self.gram[k] += product[..., :-1]
            self.right[k] += product[..., -1]
            self.rows[k] += grouped.shape[2]

    def over_processes(self) -> NormalEquations:
        """Return the sum over all processes (all-reduce)."""
        total = NormalEquations(self.gram.shape[1], self.gram.shape[2] - 1)
        total.gram, total.right, total.rows = map(sum_over_processes, (self.gram, self.right, self.rows))
        return total

    def solve(self, parent: Tensor, form: FitForm) -> Tensor:
        """Return weights and bias ``[groups, c+1]``: the common solution near the ``parent [c]``, then each group's near that."""
        everything = self.rows > 0
        if form.pool == "scalar" and not form.bias:
            return self._near(everything, parent, form, [0.0])[0]
        if form.shrink is not None:
            return self._near(everything, parent, form, [form.shrink])[0]
        if int(everything.sum()) < 2:
            return self._near(everything, parent, form, [max(SHRINKS)])[0]
        error = torch.zeros(len(SHRINKS), dtype=torch.float64)
        for fold in everything.nonzero().flatten().tolist():
            others = everything.clone()
            others[fold] = False
            for k, found in enumerate(self._near(others, parent, form, SHRINKS)):
                fit = torch.einsum("gi,gij,gj->", found, self.gram[fold], found)
                error[k] += fit - 2 * (found * self.right[fold]).sum()
        return self._near(everything, parent, form, [SHRINKS[int(error.argmin())]])[0]

    def _near(self, folds: Tensor, parent: Tensor, form: FitForm, shrinks: Sequence[float]) -> list[Tensor]:
        """Return the solution from some of the folds with each penalty."""
        gram, right = (part[folds].sum(0) / self.rows[folds].sum() for part in (self.gram, self.right))
        size = gram.mean(0).diagonal().sqrt()
        size = torch.where(size > 0, size, 1.0)
        common = torch.cat([parent, torch.zeros(1, dtype=torch.float64)])
        common[:-1] += _ridge(gram.mean(0)[:-1, :-1], right.mean(0)[:-1], common[:-1], size[:-1], [form.ridge])[0]
        if form.pool == "scalar" and not form.bias:
            return [common[None]]
        free, found = len(common) if form.bias else len(common) - 1, list[Tensor]()
        for correction in _ridge(gram[:, :free, :free], right[:, :free], common[:free], size[:free], shrinks):
            own = common.expand(len(gram), -1).clone()
            own[:, :free] += correction
            found.append(own)
        return found


def _ridge(gram: Tensor, right: Tensor, near: Tensor, size: Tensor, ridges: Sequence[float]) -> list[Tensor]:
    """Return the corrections to ``near [c]``, ``argmin |F w - y|^2 + ridge |size (w - near)|^2``, for each ridge and group."""
    values, vectors = torch.linalg.eigh(gram / size[:, None] / size)
    missing = vectors.mT @ ((right - (gram @ near[:, None]).squeeze(-1)) / size)[..., None]
    values = values.clamp_min(0)[..., None]
    least = values.amax(-2, keepdim=True) * RANK
    inverse = (torch.where(values + ridge > least, 1 / (values + ridge), 0.0) for ridge in ridges)
    return [(vectors @ (one * missing)).squeeze(-1) / size for one in inverse]


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
        features = torch.stack([run.states[i].x, *run.states[i + 1].history[:count]]).flatten(1).cpu().double()
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
    batches: Sequence[EndpointError],
    tableau: Tableau,
    schedule: NoiseSchedule | None,
    *,
    iterations: int,
    steps: int = STEPS,
    observe: Callable[[int, float], None] | None = None,
) -> Tableau:
    """Minimise the endpoint error over all coefficients of a tableau together, and over its inner levels if ``schedule`` is given.

    Args:
        batches: the noises.
        tableau: where to start.
        schedule: the noise law whose times the levels are; None to leave them where they are.
        iterations: largest number of Jacobians.
        steps: largest number of steps with each.
        observe: called after each iteration with its number and the objective.
    """
    if not iterations:
        return tableau
    begin = TableauPoint.at(batches, _Free(tableau, schedule))
    return levenberg_marquardt(begin, iterations=iterations, steps_each=steps, observe=observe).here.tableau
