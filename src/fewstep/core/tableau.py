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

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fewstep.core.first_answer import FirstAnswer
from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.errors import SolverError, counted
from fewstep.runtime.front_door import check_size, is_count, plain, whole

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Nodes", "Row", "Solver", "State", "Tableau", "Unrolled", "advance", "tabulate"]


def _scales(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return t, schedule.alpha(t), schedule.sigma(t), schedule.lam(t)


class Nodes(NamedTuple):
    """The times at which the network is evaluated, and the end, with their scales: each ``[N+1]`` float64.

    Attributes:
        t: times of the schedule.
        alpha: signal scales.
        sigma: noise scales.
        lam: ``log(alpha/sigma)``; infinite at pure noise and at the clean image.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    lam: Tensor

    @classmethod
    def at(cls, schedule: NoiseSchedule, t: Tensor) -> Nodes:
        """Return the nodes at the times ``t [N+1]``. An end whose ``lam`` is infinite is fixed: no gradient reaches it."""
        if t.requires_grad:
            finite = torch.isfinite(schedule.lam(t.detach()))
            parts = [_scales(schedule, value if keep else value.detach()) for value, keep in zip(t, finite, strict=True)]
            return cls(*map(torch.stack, zip(*parts, strict=True)))
        return cls(*_scales(schedule, t))

    @property
    def evaluations(self) -> int:
        """The number of network evaluations ``N``."""
        return len(self.t) - 1

    def begins(self, t: Tensor) -> tuple[int, ...]:
        """Return the evaluation with which each interval of the grid ``t [M+1]`` begins, the first with 0.

        A solver may evaluate at an interval's start earlier, too: the last such evaluation is the one that it steps from. A solver that
        moves the times evaluates equally often in each, the last perhaps excepted, and one that raises the noise there (churn) steps from
        the next.
        """
        found = [(self.t[:-1] == start).nonzero() for start in t[1:-1]]
        if self.evaluations == len(t) - 1 or not all(len(places) for places in found):
            stages = -(-self.evaluations // (len(t) - 1))
            return tuple(range(0, stages * (len(t) - 1), stages))
        last = [int(places[-1]) for places in found]
        return (0, *(k + int(self.t[k + 1] > self.t[k]) for k in last))

    def __repr__(self) -> str:
        return f"Nodes({counted(self.evaluations, 'evaluation')}, t = {float(self.t[0]):.4g} to {float(self.t[-1]):.4g})"

    def first_order(self, s: int | slice = slice(None, -1), t: int | slice = slice(1, None)) -> tuple[Tensor, Tensor]:
        """Return ``r, g`` of the step ``x_t = r x_s + g x0`` from node ``s`` to ``t``; by default of all steps.

        It is exact for a constant ``x0``: the step of DDIM, of first-order DPM-Solver and DPM-Solver++, and of Euler's method in
        ``sigma/alpha`` (arXiv 2010.02502, 2206.00927).
        """
        return self.sigma[t] / self.sigma[s], -self.alpha[t] * torch.expm1(self.lam[s] - self.lam[t])


class Solver(ABC):
    """The formulas of a sampler, in the notation of its paper: no state, no loop, no order logic.

    Subclass it as a frozen dataclass, whose fields are the options. Define `order`, `memory` and `update`; a method that evaluates at
    other places than the start of each interval defines `nodes` too.

    Attributes:
        order: the claimed order of convergence, a whole number; the test suite holds a solver to it.
        memory: ``K``, the number of recorded evaluations that the formulas read.
        stages: the number of evaluations in each grid interval; where intervals differ (`evaluations`), the most.
        references: arXiv ids.

    Raises:
        SolverError: at construction, where one of the three is missing (which), or an option is of another type than its default.
    """

    order: Any  # int, as a class attribute or a property of the options, and so of the next two
    memory: Any
    stages: Any = 1
    references: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: Any, **options: Any) -> Self:  # noqa: ANN401, ARG004 - the subclass's own options
        missing = [*sorted(cls.__abstractmethods__), *(name for name in ("order", "memory") if not hasattr(cls, name))]
        if missing:
            raise SolverError(f"{cls.__name__} is no solver yet: define {' and '.join(missing)} in it (docs/extending.md has a whole one)")
        return super().__new__(cls)

    def __init_subclass__(cls, **options: Any) -> None:  # noqa: ANN401 - of other bases
        super().__init_subclass__(**options)
        check = cls.__dict__.get("__post_init__")
        if check is not None:  # the types first, so that a check of values can compare them

            def typed(self: Solver, *given: Any) -> None:  # noqa: ANN401 - InitVars
                Solver.__post_init__(self)
                check(self, *given)

            cls.__post_init__ = typed

    def __post_init__(self) -> None:
        """Refuse options of another type than their defaults, and make numbers of other libraries plain ones."""
        described: Any = self
        for field in fields(described) if is_dataclass(self) else ():
            kind, value = type(field.default), getattr(self, field.name)
            if kind in (bool, int, float, str) and not callable(value):  # a word may stand for a function
                made = plain(value, kind, f"option {field.name} of {type(self).__name__}", SolverError)
                object.__setattr__(self, field.name, made)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape ``*E`` of one coefficient: ``()`` unless the solver carries numbers per channel or per element."""
        return ()

    def evaluations(self, steps: int, *, to_clean: bool = False) -> list[int]:
        """Return the number of evaluations in each of ``steps`` grid intervals; by default `stages`.

        Args:
            steps: intervals.
            to_clean: whether the grid ends at ``sigma = 0``, where a solver of several stages takes one evaluation for the last interval
                (as EDM does).
        """
        return [self.stages] * (steps - 1) + [1 if to_clean else self.stages]

    def evaluations_on(self, grid: TimeGrid, schedule: NoiseSchedule) -> list[int]:
        """Return `evaluations` in each interval of a grid."""
        return self.evaluations(grid.steps, to_clean=bool(schedule.sigma(grid.t[-1]) == 0))

    def steps_for(self, nfe: int, *, to_clean: bool = False) -> int:
        """Return the number of grid intervals that use exactly ``nfe`` evaluations.

        Args:
            nfe: network evaluations.
            to_clean: whether the grid ends at ``sigma = 0``, see `evaluations`.

        Raises:
            SolverError: if ``nfe`` is below 1 or of an absurd size, or this solver cannot use exactly that many.
        """
        if not is_count(nfe):
            raise SolverError(f"nfe must be a whole number of at least 1, got {nfe}")
        check_size("nfe", nfe, SolverError)
        below, steps = 0, 1  # every interval adds evaluations
        while (most := sum(self.evaluations(steps, to_clean=to_clean))) < nfe:
            below, steps = most, steps + 1
        if most > nfe:
            use = f"{below} or {most}" if below else str(most)
            several = (
                f"{self.stages} evaluations a step" if len({*self.evaluations(9)}) == 1 else "a different number of evaluations by step"
            )
            raise SolverError(f"{type(self).__name__} takes {several} and cannot use exactly {nfe}: use {use}")
        return steps

    def steps_on(self, schedule: NoiseSchedule, nfe: int) -> int:
        """Return `steps_for` on a grid that ends at the schedule's ``t_min``, as the grids by name do."""
        return self.steps_for(nfe, to_clean=schedule.ends_clean)

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        """Return the nodes at which to evaluate on this grid; by default once per interval, at its start."""
        return Nodes.at(schedule, grid.t)

    def record(self, nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
        """Return the quantity to record of evaluation ``i``, linear in ``x`` and ``x0``; by default ``x0``."""
        return x0

    @abstractmethod
    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return ``(anchor', x')`` after evaluation ``i``, affine in the tensors given.

        Args:
            nodes: of the grid.
            i: number of the evaluation.
            anchor: the state to step from.
            x: the state of the evaluation.
            history: ``K`` recorded evaluations, newest first: ``history[0]`` is evaluation ``i`` itself.
        """

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        """Return the standard deviation ``[]`` of the noise added to ``x'`` after evaluation ``i``; 0 for an ODE solver."""
        return torch.zeros((), dtype=torch.float64)


class State(NamedTuple):
    """The state of a sampler between two evaluations.

    Attributes:
        x: where to evaluate next, ``[B, *D]``.
        anchor: the state to step from, ``[B, *D]``; None where no row of the tableau reads it.
        history: ``K`` recorded evaluations ``[B, *D]``, newest first.
    """

    x: Tensor
    anchor: Tensor | None
    history: tuple[Tensor, ...]


class Unrolled(NamedTuple):
    """A whole tableau as one linear map: ``x_{i+1} = start_i x_T + sum_{j<=i} (answers_ij x0_j + noise_ij xi_j) + bias_i``.

    Attributes:
        start: weights of the start in each state, ``[N, *E]``.
        answers: weights of the denoiser's answers, ``[N, N, *E]``, lower triangular.
        noise: weights of the noises, ``[N, N, *E]``, lower triangular; zero for ODE solvers.
        bias: constants, ``[N, *E]``.
    """

    start: Tensor
    answers: Tensor
    noise: Tensor
    bias: Tensor


class Row(NamedTuple):
    """One row of a tableau, ready for a device and dtype. ``None`` stands for a coefficient that is zero in every row."""

    record: tuple[Tensor | None, ...] | None  # None: remember x0 as it is
    anchor: tuple[Tensor | None, ...] | None  # None: nothing reads the anchor
    x: tuple[Tensor | None, ...]
    bias: tuple[Tensor | None, ...]  # of the anchor, of x
    noise: Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class Tableau:
    """A solver on a grid, as numbers: `advance` runs it anywhere, without the solver's code.

    Attributes:
        nodes: where the network is evaluated, ``N`` evaluations and the end.
        record: weights of x and x0 in the quantity that is recorded, ``[N, 2, *E]``.
        update: rows anchor', x'; columns anchor, x, history: ``[N, 2, 2+K, *E]``.
        bias: constants of anchor' and x', ``[N, 2, *E]``.
        noise: standard deviations of the noise added to x', ``[N]``.
        first: the answer at the start, where the sampler foresees it and does not ask the network.
    """

    nodes: Nodes
    record: Tensor  # [N, 2, *E]        weights of x and x0 in what is remembered
    update: Tensor  # [N, 2, 2+K, *E]   rows anchor', x'; columns anchor, x, history
    bias: Tensor  # [N, 2, *E]
    noise: Tensor  # [N]
    first: FirstAnswer | None = None

    @property
    def evaluations(self) -> int:
        """The number of network evaluations: one for each row, but for a first answer that is foreseen."""
        return self.nodes.evaluations - (self.first is not None)

    @property
    def memory(self) -> int:
        """The number ``K`` of recorded evaluations that its rows read."""
        return self.update.shape[2] - 2

    @property
    def element(self) -> tuple[int, ...]:
        """The shape ``*E`` that all its coefficients broadcast to: ``()`` where all elements of a sample share them."""
        return tuple(torch.broadcast_shapes(self.record.shape[2:], self.update.shape[3:], self.bias.shape[2:]))

    @cached_property
    def fingerprint(self) -> str:
        """The hash of all its numbers."""
        digest = hashlib.sha256()
        foreseen = () if self.first is None else (self.first.mean, self.first.response)
        for value in (*self.nodes, self.record, self.update, self.bias, self.noise, *foreseen):
            digest.update(value.detach().numpy().tobytes())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        coefficients = f", coefficients {self.element}" if self.element else ""
        foreseen = "" if self.first is None else ", the first answer foreseen"
        return f"Tableau({counted(self.evaluations, 'evaluation')}, memory {self.memory}{coefficients}{foreseen})"

    @property
    def stochastic(self) -> bool:
        """Whether any row adds noise."""
        return bool((self.noise != 0).any())

    @cached_property
    def _used(self) -> tuple[list[bool], list[list[bool]], list[bool], bool]:
        """The coefficients that any row has, as nested bools, so that the kernel branches on no number."""

        def used(table: Tensor, dims: int) -> Any:  # noqa: ANN401 - nested lists of bools, as deep as dims
            """Return which entries are not zero in every row and element; all of a table that is learned, where a zero may change."""
            shape = table.shape[1 : 1 + dims]
            if table.requires_grad and table.is_leaf:
                return torch.ones(shape, dtype=torch.bool).tolist()
            return (table.detach() != 0).reshape(len(table), *shape, -1).any(-1).any(0).tolist()

        return used(self.record, 1), used(self.update, 2), used(self.bias, 1), self.stochastic

    @cached_property
    def whole_steps(self) -> tuple[bool, ...]:
        """Whether a step is complete after each evaluation, so that the next one begins at the state ``x`` alone: always where no row reads
        the anchor, after the last stage of Heun's, with or without noise, and never where a corrector returns to the anchor (UniPC's).
        """
        reads_anchor = self._used[1][0][0] or self._used[1][1][0]
        if not reads_anchor:
            return (True,) * len(self.record)
        pairs = torch.cat([self.update, self.bias[:, :, None]], 2).detach().flatten(2)
        noisy = self.noise.detach() != 0
        same = torch.isclose(pairs[:, 0], pairs[:, 1], rtol=1e-9, atol=1e-12).all(1) & ~noisy
        unread = ~(self.update[1:, :, 0].detach() != 0).flatten(1).any(1)  # the next row begins at x alone
        same[:-1] |= noisy[:-1] & unread
        same[-1] |= bool(same.any()) or len(same) == 1  # where a last step to the clean image has fewer stages, nothing reads the anchor
        return tuple(same.tolist())

    @cached_property
    def noise_intervals(self) -> tuple[tuple[int, int], ...]:
        """The nodes between which the noise of each row acts, as ``(first, last)``: it begins where the last step or noise ended."""
        found, begin = list[tuple[int, int]](), 0
        for i, ends in enumerate((torch.tensor(self.whole_steps) | (self.noise.detach() != 0)).tolist()):
            found.append((begin, i + 1))
            begin = i + 1 if ends else begin
        return tuple(found)

    def rows(self, x: Tensor) -> list[Row]:
        """Return all rows in the dtype and on the device of ``x [B, *D]``: one transfer, and nothing left to do in the loop."""

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
        """Return the state before the first evaluation, at ``x [B, *D]``.

        No tensor appears in it twice: a compiled `advance` would be specialised to that.

        Raises:
            SolverError: samples to which the coefficients do not broadcast, or which they would broadcast.
        """
        pairs = zip(reversed(self.element), reversed(x.shape[1:]), strict=False)
        if len(self.element) >= x.ndim or any(one not in (1, size) for one, size in pairs):
            shape = tuple(x.shape[1:])
            raise SolverError(
                f"this sampler has coefficients for samples of shape {self.element}, which {shape} is not: fit one to this model"
            )
        reads_anchor = self._used[1][0][0] or self._used[1][1][0]
        return State(x, x.clone() if reads_anchor else None, tuple(torch.zeros_like(x) for _ in range(self.memory)))

    def check_asks(self, why: str) -> None:
        """Refuse a tableau that foresees its first answer, where that would leave something out.

        Raises:
            SolverError: it does (``why`` not).
        """
        if self.first is not None:
            raise SolverError(f"this sampler foresees its first answer, and {why}: fit one without first")

    def stopped(self, evaluations: int, schedule: NoiseSchedule) -> Tableau:
        """Return the tableau that stops after some evaluations, and returns the denoiser's last answer: a step to the clean image.

        It is of first order (the ODE-jump of Chen et al., arXiv 2305.19947), and saves the rest. The last noise is dropped.

        Args:
            evaluations: how many are made, 1 to ``N``.
            schedule: the noise law, whose clean image is the end.

        Raises:
            SolverError: another number, or a solver that does not record the answer there.
        """
        count = whole(evaluations, "the evaluations to stop after", SolverError)
        if not 1 <= count <= self.evaluations:
            raise SolverError(f"this sampler makes {self.evaluations} evaluations: stop after 1 to {self.evaluations}, not {count}")
        count += self.first is not None  # rows
        last = count - 1
        by_x, by_x0 = self.record[last]
        if not bool((by_x0 != 0).all()) or not self.memory:
            raise SolverError(f"this solver does not record the denoiser's answer at evaluation {last}, so there is nothing to return")
        answer = torch.zeros_like(self.update[last, 0])  # x0 = (h - by_x x) / by_x0, of what is kept
        answer[1], answer[2] = -by_x / by_x0, 1 / by_x0
        update, bias, noise = self.update[:count].clone(), self.bias[:count].clone(), self.noise[:count].clone()
        update[last], bias[last], noise[last] = answer, 0, 0
        clean = torch.tensor([schedule.t_clean], dtype=torch.float64)
        return Tableau(Nodes.at(schedule, torch.cat([self.nodes.t[:count], clean])), self.record[:count], update, bias, noise, self.first)

    def unrolled(self) -> Unrolled:
        """Return every state as a linear function of the start, of the denoiser's answers and of the noise, in float64.

        The weights are found by running the rows on unit vectors: one sample is all zero, one has the start alone, and one each answer and
        each noise.
        """
        count = self.nodes.evaluations
        element = self.element
        units = torch.eye(1 + 2 * count, dtype=torch.float64).reshape(1 + 2 * count, 1 + 2 * count, *(1,) * len(element))
        probes = torch.cat([torch.zeros_like(units[:1]), units]).expand(-1, -1, *element)  # [2+2N, 1+2N, *E]
        state, states = self.start(probes[:, 0].contiguous()), []
        for i, row in enumerate(self.rows(probes)):
            state = advance(row, state, probes[:, 1 + i].contiguous(), probes[:, 1 + count + i])
            states.append(state.x)
        response = torch.stack(states)  # [N, 2+2N, *E]
        bias, response = response[:, 0], response[:, 1:] - response[:, :1]
        return Unrolled(response[:, 0], response[:, 1 : 1 + count], response[:, 1 + count :], bias)


def _combine(coefficients: tuple[Tensor | None, ...], tensors: tuple[Tensor | None, ...], bias: Tensor | None = None) -> Tensor:
    total = None
    for coefficient, tensor in zip(coefficients, tensors, strict=True):
        if coefficient is not None and tensor is not None:
            total = coefficient * tensor if total is None else total.addcmul_(coefficient, tensor)
    if total is None:
        raise SolverError("a tableau with an output that depends on nothing cannot be run")
    return total if bias is None else total.add_(bias)


def advance(row: Row, state: State, x0: Tensor, noise: Tensor | None = None) -> State:
    """Take one step of any solver, from the network's answer at ``state.x`` to the state at which it is evaluated next.

    Args:
        row: of the tableau, see `Tableau.rows`.
        state: before the step.
        x0: the network's answer, ``[B, *D]``.
        noise: standard normal ``[B, *D]``, needed where ``row.noise`` is not None.

    Raises:
        SolverError: noise is missing.
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
    """Return the solver's numbers on these nodes: its own formulas, run on the origin and the unit vectors in float64.

    They are differentiable in the nodes, so that a grid can be learned through them.

    Args:
        solver: the formulas.
        nodes: where they are evaluated, see `Solver.nodes`.

    Raises:
        SolverError: a coefficient that is not finite (which evaluation, between which times), or a constant in `Solver.record`.
    """
    width, dims = 2 + solver.memory, (1,) * len(solver.shape)
    probes = torch.cat([torch.zeros(1, width, dtype=torch.float64), torch.eye(width, dtype=torch.float64)])
    anchor, x, *history = (column.reshape(-1, *dims) for column in probes.unbind(1))  # each [3+K, *1]
    unit_x, unit_x0 = (column.reshape(3, *dims) for column in UNITS.unbind(1))
    constant, record, update, bias, noise = [], [], [], [], []
    for i in range(nodes.evaluations):
        outputs = torch.stack([o.expand(len(probes), *solver.shape) for o in solver.update(nodes, i, anchor, x, history)])
        remembered = solver.record(nodes, i, unit_x, unit_x0).expand(3, *solver.shape)
        constant.append(remembered[0])
        record.append(remembered[1:])
        update.append(outputs[:, 1:] - outputs[:, :1])
        bias.append(outputs[:, 0])
        noise.append(solver.noise(nodes, i))
    finite = [torch.isfinite(torch.stack(table)).flatten(1).all(1) for table in (record, update, bias)]
    bad = (~torch.stack([*finite, torch.isfinite(torch.stack(noise))]).all(0)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise SolverError(
            f"{type(solver).__name__} has no finite coefficients at evaluation {i}, from t = {nodes.t[i]:g} to {nodes.t[i + 1]:g}"
        )
    constants = torch.stack(constant).reshape(len(constant), -1).any(1).nonzero()
    if len(constants):
        i = int(constants[0])
        raise SolverError(f"{type(solver).__name__}.record must be linear in x and x0, but remembers a constant at evaluation {i}")
    if any(bool((row[:, 0] != 0).any()) for row in update[1:]):  # the anchor is read later: at the start it is x, so read it alone there
        first = update[0]
        update[0] = torch.cat([first[:, :1] + first[:, 1:2], torch.zeros_like(first[:, 1:2]), first[:, 2:]], 1)
    return Tableau(nodes, torch.stack(record), torch.stack(update), torch.stack(bias), torch.stack(noise))
