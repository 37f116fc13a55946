r"""A solver is a formula; a formula on a grid is a tableau; one kernel runs every tableau.

Every few-step solver on a fixed grid is affine in what it keeps: the state to evaluate next ``x``, the state it steps from
(``anchor``), and what it recorded of past evaluations (``history``, newest first). One row per network evaluation says

    h       = r0 x + r1 x0                                          what to remember of this evaluation
    anchor' = sum_k A[0,k] (anchor, x, h_0, ..., h_{K-1})_k + bias_0
    x'      = sum_k A[1,k] (anchor, x, h_0, ..., h_{K-1})_k + bias_1 + noise * xi

which is a general linear method (Butcher, 1966). `tabulate` finds the numbers by running the solver's formulas on the
unit vectors, once, in float64; `advance` is the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.errors import SolverError

__all__ = ["Nodes", "Row", "Solver", "State", "Tableau", "advance", "tabulate"]


def _scales(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return t, schedule.alpha(t), schedule.sigma(t), schedule.lam(t)


class Nodes(NamedTuple):
    """Where the network is evaluated, and the end: each ``[N+1]`` float64. ``lam`` may be infinite at either end."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    lam: Tensor

    @classmethod
    def at(cls, schedule: NoiseSchedule, t: Tensor) -> Nodes:
        """The nodes at the times ``t [N+1]``. An end whose ``lam`` is infinite is fixed: no gradient reaches it."""
        if t.requires_grad:
            finite = torch.isfinite(schedule.lam(t.detach()))
            parts = [_scales(schedule, value if keep else value.detach()) for value, keep in zip(t, finite, strict=True)]
            return cls(*map(torch.stack, zip(*parts, strict=True)))
        return cls(*_scales(schedule, t))

    @property
    def evaluations(self) -> int:
        """``N``."""
        return len(self.t) - 1


class Solver(Protocol):
    """What an author writes: hyper-parameters and formulas, in the paper's notation. No state, no loop, no order logic.

    Subclass it explicitly as a frozen dataclass; a multistep solver needs to define `update` alone.
    """

    references: ClassVar[tuple[str, ...]] = ()  # arXiv ids
    stages: ClassVar[int] = 1  # evaluations per grid interval

    @property
    def order(self) -> int:
        """The claimed order of convergence; the test suite holds the solver to it."""
        ...

    @property
    def memory(self) -> int:
        """``K``, how many recorded evaluations the formulas read."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """``*E``, the shape of one coefficient: ``()`` unless the solver carries per-channel or per-element numbers."""
        return ()

    def steps_for(self, nfe: int, *, to_clean: bool = False) -> int:
        """Grid intervals that use exactly ``nfe`` evaluations; ``to_clean`` if the grid ends at ``sigma = 0``, where a
        solver of several stages takes one evaluation for the last interval (as EDM does).

        Raises:
            SolverError: if ``nfe`` is below 1, or this solver cannot use exactly that many.
        """
        if nfe != int(nfe) or nfe < 1:
            raise SolverError(f"nfe must be a whole number of at least 1, got {nfe}")
        extra = 1 if to_clean and self.stages > 1 else 0
        steps, left = divmod(int(nfe) - extra, self.stages)
        if left or steps + extra < 1:
            near = sorted({max(s, 1 - extra) * self.stages + extra for s in (steps, steps + 1)})
            use = " or ".join(map(str, near))
            raise SolverError(f"{type(self).__name__} takes {self.stages} evaluations a step and cannot use exactly {nfe}: use {use}")
        return steps + extra

    def steps_on(self, schedule: NoiseSchedule, nfe: int) -> int:
        """`steps_for` on a grid that ends at the schedule's ``t_min``, as the named ones do."""
        end = torch.tensor(schedule.t_min, dtype=torch.float64)
        return self.steps_for(nfe, to_clean=bool(schedule.sigma(end) == 0))

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        """Where to evaluate on this grid; by default once per interval, at its start."""
        return Nodes.at(schedule, grid.t)

    def record(self, nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
        """What to remember of evaluation ``i``; by default ``x0``."""
        return x0

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        """``(anchor', x')`` after evaluation ``i``, affine in the tensors given; ``history[0]`` is evaluation ``i`` itself."""
        ...

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        """Standard deviation of the noise added to ``x'`` after evaluation ``i``; 0 for an ODE solver."""
        return torch.zeros((), dtype=torch.float64)


class State(NamedTuple):
    """``x [B, *D]`` is where to evaluate next. ``anchor`` is ``None`` where no row of the tableau reads it."""

    x: Tensor
    anchor: Tensor | None
    history: tuple[Tensor, ...]  # K tensors [B, *D], newest first


class Row(NamedTuple):
    """One row of a tableau, ready for a device and dtype. ``None`` stands for a coefficient that is zero in every row."""

    record: tuple[Tensor | None, ...] | None  # None: remember x0 as it is
    anchor: tuple[Tensor | None, ...] | None  # None: nothing reads the anchor
    x: tuple[Tensor | None, ...]
    bias: tuple[Tensor | None, ...]  # of the anchor, of x
    noise: Tensor | None


@dataclass(frozen=True, eq=False)
class Tableau:
    """A solver on a grid, as numbers. It runs anywhere `advance` runs, without the solver's code."""

    nodes: Nodes
    record: Tensor  # [N, 2, *E]        weights of x and x0 in what is remembered
    update: Tensor  # [N, 2, 2+K, *E]   rows anchor', x'; columns anchor, x, history
    bias: Tensor  # [N, 2, *E]
    noise: Tensor  # [N]

    @property
    def memory(self) -> int:
        """``K``."""
        return self.update.shape[2] - 2

    @property
    def stochastic(self) -> bool:
        """Whether any row adds noise."""
        return bool((self.noise != 0).any())

    @cached_property
    def _used(self) -> tuple[list[bool], list[list[bool]], list[bool], bool]:
        """Which coefficients are zero in no row at all: known before the loop, so the kernel has no branches on numbers."""

        def used(table: Tensor, dims: int) -> Any:  # noqa: ANN401 - nested lists of bools, as deep as dims
            """Over rows and elements; everything while the table is being learned, when a zero may become something."""
            shape = table.shape[1 : 1 + dims]
            if table.requires_grad and table.is_leaf:
                return torch.ones(shape, dtype=torch.bool).tolist()
            return (table.detach() != 0).reshape(len(table), *shape, -1).any(-1).any(0).tolist()

        return used(self.record, 1), used(self.update, 2), used(self.bias, 1), self.stochastic

    def rows(self, x: Tensor) -> list[Row]:
        """All rows in the dtype and on the device of ``x [B, *D]``: one transfer, nothing left to do in the loop."""

        def ready(table: Tensor) -> Tensor:
            return table.to(x.dtype).to(x.device)

        record, update, bias, noise = map(ready, (self.record, self.update, self.bias, self.noise))
        used_record, used_update, used_bias, used_noise = self._used
        plain = used_record == [False, True] and bool((self.record.detach()[:, 1] == 1).all())
        reads_anchor = used_update[0][0] or used_update[1][0]

        def pick(values: Tensor, used: list[bool]) -> tuple[Tensor | None, ...]:
            return tuple(value if keep else None for value, keep in zip(values.unbind(0), used, strict=True))

        return [
            Row(
                record=None if plain else pick(record[i], used_record),
                anchor=pick(update[i, 0], used_update[0]) if reads_anchor else None,
                x=pick(update[i, 1], used_update[1]),
                bias=pick(bias[i], used_bias),
                noise=noise[i] if used_noise else None,
            )
            for i in range(len(record))
        ]

    def start(self, x: Tensor) -> State:
        """The state before the first evaluation, at ``x [B, *D]``. No tensor twice: a compiled `advance` would be specialised to that."""
        reads_anchor = self._used[1][0][0] or self._used[1][1][0]
        return State(x, x.clone() if reads_anchor else None, tuple(torch.zeros_like(x) for _ in range(self.memory)))


def _combine(coefficients: tuple[Tensor | None, ...], tensors: tuple[Tensor | None, ...], bias: Tensor | None = None) -> Tensor:
    total = None
    for coefficient, tensor in zip(coefficients, tensors, strict=True):
        if coefficient is not None and tensor is not None:
            total = coefficient * tensor if total is None else total.addcmul_(coefficient, tensor)
    if total is None:
        raise SolverError("a tableau with an output that depends on nothing cannot be run")
    return total if bias is None else total.add_(bias)


def advance(row: Row, state: State, x0: Tensor, noise: Tensor | None = None) -> State:
    """One step of any solver: from the network's answer ``x0 [B, *D]`` at ``state.x`` to where it is evaluated next.

    ``noise`` is standard normal ``[B, *D]``, wanted where ``row.noise`` is not ``None``.
    """
    h = x0 if row.record is None else _combine(row.record, (state.x, x0))
    history = (h, *state.history[:-1]) if state.history else ()
    basis = (state.anchor, state.x, *history)
    x = _combine(row.x, basis, row.bias[1])
    if row.noise is not None:
        if noise is None:
            raise SolverError("this tableau adds noise: pass advance standard normal noise, for example seeded_noise")
        x = torch.addcmul(x, row.noise, noise)
    anchor = None if row.anchor is None else _combine(row.anchor, basis, row.bias[0])
    return State(x, anchor, history)


UNITS = torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=torch.float64)  # the origin, x and x0


def tabulate(solver: Solver, nodes: Nodes) -> Tableau:
    """The solver's numbers on these nodes: its own formulas, run on the origin and the unit vectors in float64.

    Differentiable in the nodes, so that a grid can be learned through it.

    Raises:
        SolverError: a coefficient that is not finite (which evaluation, between which times), or a constant in `Solver.record`.
    """
    width, dims = 2 + solver.memory, (1,) * len(solver.shape)
    probes = torch.cat([torch.zeros(1, width, dtype=torch.float64), torch.eye(width, dtype=torch.float64)])
    anchor, x, *history = (column.reshape(-1, *dims) for column in probes.unbind(1))  # each [3+K, *1]
    record, update, bias, noise = [], [], [], []
    for i in range(nodes.evaluations):
        unit_x, unit_x0 = (column.reshape(3, *dims) for column in UNITS.unbind(1))
        outputs = torch.stack([o.expand(len(probes), *solver.shape) for o in solver.update(nodes, i, anchor, x, history)])
        remembered = solver.record(nodes, i, unit_x, unit_x0).expand(3, *solver.shape)
        record.append(remembered[1:])
        update.append(outputs[:, 1:] - outputs[:, :1])
        bias.append(outputs[:, 0])
        noise.append(solver.noise(nodes, i))
        if not all(bool(torch.isfinite(table[-1]).all()) for table in (record, update, bias, noise)):
            raise SolverError(
                f"{type(solver).__name__} has no finite coefficients at evaluation {i}, from t = {nodes.t[i]:g} to {nodes.t[i + 1]:g}"
            )
        if bool((remembered[0] != 0).any()):
            raise SolverError(f"{type(solver).__name__}.record must be linear in x and x0, but remembers a constant at evaluation {i}")
    if any(bool((row[:, 0] != 0).any()) for row in update[1:]):  # the anchor is read later: at the start it is x, so read it alone there
        first = update[0]
        update[0] = torch.cat([first[:, :1] + first[:, 1:2], torch.zeros_like(first[:, 1:2]), first[:, 2:]], 1)
    return Tableau(nodes, *map(torch.stack, (record, update, bias, noise)))
