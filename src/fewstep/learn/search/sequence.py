r"""Fit a sampler to a teacher's trajectories one step after the other, and choose the levels on which such a fit ends best.

Hand-made coefficients are exact on polynomials. Over a few long steps a trajectory is not one, but a few of a model's own show its shape.
So `fit_in_sequence` chooses

    (a_i, c_i) = argmin |F_i w - y_{i+1}|^2,     F_i = [x_i, h_i, h_{i-1}, ..., h_{i-K+1}],     y_{i+1} the teacher's state at t_{i+1},

for one step after the other, from the student's own states, so that a step also corrects the errors of the steps before it. All that is
left to choose are the levels. `LevelsInSequence` makes the endpoint error a function of them alone: the coefficients follow (variable
projection; Golub and Pereyra, 1973), and `levenberg_marquardt` descends in ``n - 1`` numbers instead of ``n (n + 5) / 2``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.grid import TimeGrid
from fewstep.core.tableau import State, Tableau, advance
from fewstep.learn.search.coefficients import FitForm, NormalEquations
from fewstep.learn.search.refine import Levels
from fewstep.runtime.errors import FewstepError

__all__ = ["LevelsInSequence", "Sequenced", "Sequences", "TeacherBatch", "fit_in_sequence"]


class TeacherBatch(Protocol):
    """A batch of the teacher's trajectories at the times of a grid."""

    @property
    def cond(self) -> Cond: ...

    @property
    def places(self) -> Sequence[int]:
        """The places of these samples among all that are fitted to."""
        ...

    def state(self, i: int) -> Tensor:
        """Return the states ``[B, *D]`` at the ``i``-th time."""
        ...


@dataclass(eq=False)
class Sequenced:
    """A tableau fitted in sequence, with the states and outputs that its rows were fitted from.

    Attributes:
        tableau: the sampler.
        states: the student's states at each node, one tensor ``[b, *D]`` for each batch.
        outputs: the network's answers at each evaluation, likewise.
        evaluations: network evaluations that this fit made, in samples.
    """

    tableau: Tableau
    states: list[list[Tensor]]
    outputs: list[list[Tensor]]
    evaluations: int

    def shared(self, start: Tableau) -> tuple[int, int]:
        """Return how many rows, and how many evaluations, a fit that begins with another tableau has in common with this one."""
        mine, other = self.tableau, start
        pairs = zip(mine.nodes.t, other.nodes.t, strict=False)
        alike = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine.nodes.t), len(other.nodes.t)))
        if (mine.memory, mine.update.shape[3:]) != (other.memory, other.update.shape[3:]):
            return 0, min(alike, 1)  # of another form: only the answers at the start are the same
        return max(0, alike - 1), min(alike, len(mine.update), len(other.update))


def fit_in_sequence(
    denoiser: Denoiser,
    start: Tableau,
    batches: Sequence[TeacherBatch],
    form: FitForm,
    *,
    rows: Collection[int] | None = None,
    base: Sequenced | None = None,
) -> Sequenced:
    """Fit the rows of a tableau one after the other to the teacher's states, each from the states that the rows before it reach.

    With several processes each has batches of its own, and all get the same tableau.

    Args:
        denoiser: the model.
        start: the tableau to begin with, see `widened`; the fit is shrunk to its rows.
        batches: the teacher's states at the nodes of ``start``.
        form: which coefficients are fitted.
        rows: the rows to fit; by default all.
        base: an earlier fit of all rows to the same trajectories, whose rows and answers are reused up to where it differs; with ``rows``,
            its answers at the start.

    Raises:
        ModelError: the denoiser refuses its inputs.
        FewstepError: no batches, a start without the coefficients of the form, or states that are not finite.
    """
    if not batches:
        raise FewstepError("a fit needs at least one batch of trajectories")
    sample, device = batches[0].state(0).shape[1:], batches[0].state(0).device
    if start.memory != form.memory(len(start.update)) or start.update.shape[3:] != form.shape(sample):
        raise FewstepError("the tableau to start from has not the coefficients of the form: make it with widened(parent, form, shape)")
    known, answered = (0, 0) if base is None else base.shared(start)
    if rows is not None:
        known, answered = 0, min(answered, 1)
    tableau, evaluations = _with_rows_of(start, base, known), 0
    states = [[batch.state(0).cpu() for batch in batches]] if base is None else base.states[: known + 1]
    outputs = [] if base is None else base.outputs[: min(answered, known + 1)]
    fitted = range(len(start.update)) if rows is None else rows
    for i in range(known, len(start.update)):
        if i == len(outputs):
            with torch.no_grad():
                at = [(x.to(device), batch.cond) for x, batch in zip(states[i], batches, strict=True)]
                outputs = [*outputs, [denoiser(x, start.nodes.t[i], cond).to(x.dtype).cpu() for x, cond in at]]
            evaluations += sum(map(len, states[i]))
        features = [_features(states[i][k], outputs, i, k, start.memory) for k in range(len(batches))]
        if i in fitted:
            equations = NormalEquations(start.update.shape[3:].numel(), len(features[0]))
            for batch, read in zip(batches, features, strict=True):
                equations.add(read.to(device), batch.state(i + 1), batch.places)
            tableau = _fitted(tableau, i, equations.over_processes(), form)
        states = [*states, [_advanced(tableau, i, read) for read in features]]
    return Sequenced(tableau, states, outputs, evaluations)


def _with_rows_of(start: Tableau, base: Sequenced | None, count: int) -> Tableau:
    """Return a tableau whose first rows are those of an earlier fit."""
    if base is None or not count:
        return start
    update, bias = (torch.cat([getattr(base.tableau, name)[:count], getattr(start, name)[count:]]) for name in ("update", "bias"))
    return Tableau(start.nodes, start.record, update, bias, start.noise)


def _features(x: Tensor, outputs: Sequence[Sequence[Tensor]], i: int, k: int, memory: int) -> Tensor:
    """Return the state of one batch and the answers that row ``i`` reads, newest first."""
    return torch.stack([x, *(outputs[j][k] for j in range(i, max(-1, i - memory), -1))])


def _advanced(tableau: Tableau, i: int, features: Tensor) -> Tensor:
    """Return the states after row ``i``."""
    x, newest, *past = features
    room = (torch.zeros_like(x) for _ in range(tableau.memory - len(past)))
    return advance(tableau.rows(x)[i], State(x, None, (*past, *room)), newest).x


def _fitted(tableau: Tableau, i: int, equations: NormalEquations, form: FitForm) -> Tableau:
    """Return the tableau with row ``i`` solved."""
    shape, count = tableau.update.shape[3:], equations.gram.shape[-1] - 1
    parent = tableau.update[i, 1, 1 : 1 + count].reshape(count, -1).mean(1)
    if not all(bool(torch.isfinite(part).all()) for part in (equations.gram, equations.right)):
        raise FewstepError(f"the states for evaluation {i} of a fit are not finite: check the network and the trajectories")
    solution = equations.solve(parent, form)
    update, bias = tableau.update.clone(), tableau.bias.clone()
    update[i, 1, 1 : 1 + count] = solution[:, :-1].T.reshape(count, *shape)
    bias[i, 1] = solution[:, -1].reshape(shape)
    return Tableau(tableau.nodes, tableau.record, update, bias, tableau.noise)


# -- the levels ---------------------------------------------------------------------------------------------------------


class Sequences(Protocol):
    """Fits in sequence of one model to the same trajectories, on any levels."""

    evaluations: int

    def at(self, t: Tensor, base: Sequenced | None = None) -> Sequenced:
        """Return the fit on the times ``t [n+1]``, from the first to the last of the trajectories."""
        ...

    def residuals(self, found: Sequenced) -> list[Tensor]:
        """Return samples minus exact endpoints, for each batch."""
        ...

    def levels(self, t: Tensor) -> Levels:
        """Return the levels of some times as free numbers."""
        ...


@dataclass(eq=False)
class LevelsInSequence:
    """The endpoint error of a fit in sequence, as a function of its inner levels: a `Point`."""

    sequences: Sequences
    found: Sequenced

    @property
    def evaluations(self) -> int:
        """The network evaluations of all fits so far, in samples."""
        return self.sequences.evaluations

    @property
    def size(self) -> int:
        """The number of inner levels."""
        return len(self.found.tableau.update) - 1

    @property
    def residuals(self) -> list[Tensor]:
        """Samples minus exact endpoints, for each batch."""
        return self._residuals

    @cached_property
    def _residuals(self) -> list[Tensor]:
        return self.sequences.residuals(self.found)

    @cached_property
    def levels(self) -> Levels:
        """The levels as free numbers."""
        return self.sequences.levels(self.found.tableau.nodes.t)

    def columns(self) -> Iterator[list[Tensor] | None]:
        """Yield differences of the residuals, from fits that share their first rows with the one here."""
        for moved in self.levels.perturbed():
            if moved is None:
                yield None
            else:
                ends = self.sequences.residuals(self.sequences.at(moved[0].t, self.found))
                yield [(end - residual) / moved[1] for end, residual in zip(ends, self.residuals, strict=True)]

    def moved(self, delta: Tensor) -> LevelsInSequence | None:
        """Fit on the levels moved by ``delta`` gaps; None if two of them meet."""
        grid: TimeGrid | None = self.levels.moved(delta)
        return None if grid is None else LevelsInSequence(self.sequences, self.sequences.at(grid.t, self.found))
