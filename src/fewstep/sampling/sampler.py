"""The `Sampler`: a solver on a grid as data, which can be saved, shared and run without the solver's code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.first_answer import FirstAnswer
from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule, schedule_from_config
from fewstep.core.spacings import make_grid
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Nodes, Solver, Tableau, tabulate
from fewstep.runtime.artifact import ArtifactRecord, Count, check_no_model, load_artifact, named_path, save_artifact, tensor_of
from fewstep.runtime.errors import ArtifactError, GridError, ModelError, SolverError, counted
from fewstep.runtime.front_door import checked, number, whole
from fewstep.runtime.hub import Shared, header
from fewstep.runtime.spec import parse_spec
from fewstep.sampling.start import begin as begin_at
from fewstep.sampling.start import spacing_from
from fewstep.solvers import SOLVERS, make_solver, spec_of, takes_statistics

__all__ = ["Sampler", "tableau_of"]

TABLES = ("record", "update", "bias", "noise")
SAME = 1e-6  # how far a node's alpha and sigma may be from its noise law's, on another machine
TAIL = "unipc-2"  # on the rest of a grid whose own formulas are not known here


@dataclass(frozen=True)
class SamplerRecord(ArtifactRecord):
    """The fields of ``sampler.json``, see `Sampler`."""

    FORMAT = "fewstep-sampler"

    solver: str
    options: dict[str, Any]
    nfe: Count
    schedule: dict[str, Any]
    card: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Sampler(Shared):
    """A solver on a grid as data: a tableau with its grid and its provenance.

    Running it needs the tableau alone. ``solver`` and ``options`` name the formulas for the reader, and for `tail`, `after` and
    `from_level`, which put them on other times.

    Attributes:
        tableau: the numbers.
        grid: its times, ``M`` intervals.
        schedule: the noise law that they are times of.
        solver: the class of the solver, or ``fitted``.
        options: of the solver.
        card: provenance, plain JSON values: model fingerprint, command, quality.

    Examples:
        >>> import fewstep
        >>> sampler = fewstep.Sampler.build("unipc-2", "angle", fewstep.VPLinear(), nfe=8)
        >>> sampler
        Sampler(unipc-2, 8 evaluations, noise levels 152 to 0.0105)
    """

    tableau: Tableau
    grid: TimeGrid
    schedule: NoiseSchedule
    solver: str
    options: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    formulas: Solver | None = None  # the solver itself, while it is in memory
    kind = "sampler"

    @classmethod
    @checked
    def build(
        cls,
        solver: Solver | str,
        grid: TimeGrid | str,
        schedule: NoiseSchedule,
        *,
        nfe: int | None = None,
        level: float | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> Sampler:
        """Put a solver on a grid.

        Args:
            solver: a `Solver`, or its name for `make_solver`.
            grid: a `TimeGrid`, or the name of a spacing for `make_grid`.
            schedule: the noise law of the model.
            nfe: network evaluations, where the grid is a name.
            level: the noise level ``sigma/alpha`` to begin at, for image to image; by default the grid's own. A spacing is laid below it, a
                `TimeGrid` re-spread (`TimeGrid.below`).
            card: facts to keep with the sampler.

        Raises:
            SolverError: an unknown solver, or one that cannot use exactly ``nfe`` evaluations.
            GridError: an unknown spacing; a name without ``nfe``, or a grid with one that it does not have; a level at which no step can
                begin.
            ModelError: something that is no noise law.
        """
        if not isinstance(solver, str | Solver):
            raise SolverError(f"a solver is a name or a Solver, got {_shown(solver)}")
        if not isinstance(grid, str | TimeGrid):
            raise GridError(f"a grid is the name of a spacing or a fewstep.TimeGrid(times), got {_shown(grid)}")
        if not isinstance(schedule, NoiseSchedule):
            raise ModelError(f"a sampler is made for a noise law, as fewstep.VPLinear() or model.schedule, got {_shown(schedule)}")
        if not isinstance(card, Mapping | None):
            raise SolverError(f"a card is facts by name, as card={{'of': 'my model'}}, got {_shown(card)}")
        solver = make_solver(solver) if isinstance(solver, str) else solver
        start = None if level is None or level == math.inf else begin_at(schedule, level)
        if isinstance(grid, str):
            if nfe is None:
                raise GridError(f"the spacing {grid!r} needs a number of evaluations: pass nfe=")
            steps = solver.steps_on(schedule, nfe)
            grid = make_grid(grid, schedule, steps) if start is None else spacing_from(grid, schedule, steps, start)
        elif start is not None:
            grid = grid.below(schedule, start)
        lam = schedule.lam(grid.t.detach())
        if grid.t[-1] < schedule.t_clean or not bool((lam[1:] > lam[:-1]).all()):
            raise GridError(
                f"the times {float(grid.t[0]):g} to {float(grid.t[-1]):g} leave the noise law, which runs from {schedule.t_max:g} to "
                f"{schedule.t_clean:g}: beyond pure noise or the clean image there are no levels"
            )
        options = {f.name: _plain(getattr(solver, f.name)) for f in fields(solver)} if is_dataclass(solver) else {}
        made = cls(tabulate(solver, solver.nodes(grid, schedule)), grid, schedule, type(solver).__name__, options, card or {}, solver)
        if nfe is not None and made.nfe != nfe:
            raise GridError(
                f"this grid makes {made.nfe} evaluations of {type(solver).__name__}, not {nfe}: leave nfe out, or name a spacing"
            )
        if start is not None and float(made.tableau.nodes.t[0]) != start:
            raise GridError(
                f"this {type(solver).__name__} moves the time {start:g} of this noise level to {float(made.tableau.nodes.t[0]):g}: "
                "use integrals=exact"
            )
        return made

    @property
    def nfe(self) -> int:
        """The number of network evaluations per sample."""
        return self.tableau.evaluations

    @property
    def name(self) -> str:
        """The name that tables show: the one on the card, else that of the solver."""
        return str(self.card.get("name") or spec_of(self.solver, self.options) or self.solver)

    @property
    def stages(self) -> int:
        """The number of rows in a step, counted in the first: later ones may have fewer, as the last one to ``sigma = 0``."""
        return (*self.begins, self.tableau.nodes.evaluations)[1]

    @property
    def begins(self) -> tuple[int, ...]:
        """The number of the row with which each step begins."""
        return self.tableau.nodes.begins(self.grid.t)

    def __repr__(self) -> str:
        first, last = torch.exp(-self.tableau.nodes.lam[[0, -1]]).tolist()
        return f"Sampler({self.name}, {counted(self.nfe, 'evaluation')}, noise levels {first:.3g} to {last:.3g})"

    # -- the rest of a grid -----------------------------------------------------------------------------------------

    def tail(self, begin: int, *, statistics: ModelStatistics | None = None) -> Sampler:
        """Return the sampler that starts at evaluation ``begin``: the solver put on the rest of the grid as on one of its own.

        Image to image starts there, from the noised image. What the solver would have read of earlier evaluations does not exist, so its
        first steps are of lower order, as everywhere. A fitted sampler continues with the hand-made solver that it was fitted from.

        Args:
            begin: evaluations left out, one of `begins`.
            statistics: for a sampler of DPM-Solver-v3 that was loaded from disk.

        Raises:
            SolverError: ``begin`` is inside a step or past the end, or the solver is not known here.
        """
        begin, rows = whole(begin, "the evaluation to begin at", SolverError), self.tableau.nodes.evaluations
        if begin == 0:
            return self
        begins = self.begins
        if begin not in begins:
            even = begins == tuple(range(0, rows, self.stages))
            where = f"a multiple of {self.stages} below that" if even else f"one of {', '.join(map(str, begins))}"
            raise SolverError(
                f"this solver makes {counted(self.stages, 'evaluation')} a step, {rows} in all: begin at {where}, not at evaluation {begin}"
            )
        solver = self.formulas if self.formulas is not None else self._rebuilt(statistics)
        grid = TimeGrid(self.grid.t[begins.index(begin) :])
        return Sampler.build(solver, grid, self.schedule, card={**self.card, "tail_from": begin})

    def after(self, level: float, *, statistics: ModelStatistics | None = None) -> Sampler:
        """Return the `tail` that starts at the first time whose noise level ``sigma/alpha`` is at most ``level``.

        Raises:
            SolverError: no step starts at so low a level.
        """
        level = number(level, "the noise level to begin at", SolverError)
        levels = torch.exp(-self.schedule.lam(self.grid.t[:-1]))
        below = (levels <= level).nonzero()
        if not len(below):
            raise SolverError(
                f"no step of this sampler starts at noise level {level:g} or below: the last starts at {float(levels[-1]):.3g}"
            )
        return self.tail(self.begins[int(below[0])], statistics=statistics)

    def from_level(self, level: float, *, statistics: ModelStatistics | None = None) -> Sampler:
        """Return the sampler of as many evaluations that starts at a noise level ``sigma/alpha``: its grid re-spread below that.

        For image to image from a strength, which is a level whatever the sampler: ``sampler.from_level(level_of(0.3))``. The steps keep
        their density (`TimeGrid.below`), and the solver's formulas are put on them as on a grid of one's own. Coefficients that were fitted
        belong to their own levels: a fitted sampler continues with the hand-made solver that it was fitted from, as in `tail`.

        Args:
            level: where to start, see `level_of`; infinite, or the sampler's own, for the sampler as it is.
            statistics: for a sampler of DPM-Solver-v3 that was loaded from disk.

        Raises:
            GridError: no step of its noise law can begin there, or its own grid lies below.
            SolverError: the solver is not known here, or the sampler was stopped.
        """
        level = number(level, "the noise level to begin at", GridError)
        if level == math.inf or begin_at(self.schedule, level) == float(self.grid.t[0]):
            return self
        if self.solver == "stopped":
            raise SolverError("a sampler that was stopped has no formulas to put on other levels: take from_level before stopped")
        card = {**self.card, "from_level": level}
        solver = self.formulas
        if solver is None:
            solver = self._rebuilt(statistics)
            card.pop("name", None)  # that of a fit, which this no longer is
        t = self.grid.t if self.tableau.first is None else torch.cat([self.grid.t[:1], self.grid.t[2:]])  # the network answers at the start
        return Sampler.build(solver, TimeGrid(t), self.schedule, nfe=self.nfe, level=level, card=card)

    def stopped(self, evaluations: int) -> Sampler:
        """Return the sampler that stops after some evaluations and returns the denoiser's last answer, see `Tableau.stopped`.

        It saves the others, which pays where the grid has spent evaluations at levels where the image is decided already.

        Raises:
            SolverError: fewer than 1 evaluation or more than there are, or a solver that does not record the answer.
        """
        made = self.tableau.stopped(evaluations, self.schedule)
        grid = TimeGrid(torch.unique(made.nodes.t).flip(0))  # a solver of several stages evaluates some times twice
        name = f"{self.name} stopped after {made.nodes.evaluations}"
        return Sampler(made, grid, self.schedule, "stopped", {"of": self.solver, **self.options}, {**self.card, "name": name})

    def _rebuilt(self, statistics: ModelStatistics | None) -> Solver:
        """Return the solver that can be put on the rest of the grid: its own, or the hand-made one that a fitted sampler began with."""
        names = [
            str(name) for name in (self.card.get("name"), self.options.get("parent"), spec_of(self.solver, self.options), TAIL) if name
        ]
        for name in names:
            if parse_spec(name, SolverError)[0] not in SOLVERS:
                continue
            if takes_statistics(name):
                if statistics is not None:
                    return make_solver(name, statistics=statistics)
                raise SolverError(f"a part of a {name} sampler needs the statistics of its model: pass statistics=")
            solver = make_solver(name)
            if solver.evaluations_on(self.grid, self.schedule)[0] == self.stages:
                return solver
        raise SolverError(f"none of {', '.join(names)} can be put on the rest of this sampler's times")

    # -- as a folder ------------------------------------------------------------------------------------------------

    def with_card(self, **facts: Any) -> Sampler:  # noqa: ANN401 - plain JSON values
        """Return the same sampler with more facts on its card, plain JSON values."""
        return replace(self, card={**self.card, **facts})

    def check_unbounded(self, taker: str) -> None:
        """Refuse a sampler of a reflected model, whose samples another program would not fold into their cube.

        Raises:
            SolverError: it is one (``taker`` names the program).
        """
        if self.card.get("domain") is not None:
            raise SolverError(
                f"this sampler is of a reflected model, whose samples {taker} would not fold into their cube: use fewstep.sample"
            )

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the numbers."""
        return self.tableau.fingerprint

    def save(self, folder: str | Path) -> Path:
        """Write ``sampler.json``, ``sampler.safetensors`` and a ``README.md`` card, each whole or not at all, and return the folder.

        Raises:
            ArtifactError: the folder cannot be written, or the options or the card are not JSON-able.
        """
        return self._write(named_path(folder), self._readme('load("path/to/this/folder")'))

    def _write(self, folder: Path, readme: str) -> Path:
        check_no_model(folder)
        tensors = {f"nodes.{name}": value for name, value in self.tableau.nodes._asdict().items()}
        tensors |= {name: getattr(self.tableau, name) for name in TABLES}
        tensors["grid"] = self.grid.t
        first = self.tableau.first
        if first is not None:
            tensors |= {"first.mean": first.mean, "first.response": first.response, "first.labelled": torch.tensor(float(first.labelled))}
        meta = {
            "solver": self.solver,
            "options": dict(self.options),
            "nfe": self.nfe,
            "schedule": self.schedule.to_config(),
            "card": dict(self.card),
        }
        return save_artifact(folder, "sampler", meta, tensors, readme)

    @classmethod
    def load(cls, folder: str | Path) -> Sampler:
        """Load a sampler that `save` wrote.

        Raises:
            ArtifactError: a file is missing or damaged, or of a newer version.
        """

        def build(meta: SamplerRecord, tensors: dict[str, Tensor]) -> Sampler:
            tableau, grid = _tableau(tensors, meta.nfe), TimeGrid(tensor_of(tensors, "grid", [None]))
            schedule, nodes = schedule_from_config(meta.schedule), tableau.nodes
            if grid.steps > nodes.evaluations:
                raise ArtifactError(f"its grid has {grid.steps} steps, more than its {meta.nfe} evaluations")
            for name, known in (("alpha", schedule.alpha(nodes.t)), ("sigma", schedule.sigma(nodes.t))):
                if not torch.allclose(getattr(nodes, name), known, rtol=SAME, atol=SAME):
                    raise ArtifactError(f"the tensor nodes.{name} is not that of its noise law at nodes.t")
            return cls(tableau, grid, schedule, meta.solver, meta.options, meta.card)

        return load_artifact(folder, "sampler", SamplerRecord, build)

    def _readme(self, load: str, pictures: Sequence[str] = ()) -> str:
        sigmas = ", ".join(f"{s:.4g}" for s in torch.exp(-self.tableau.nodes.lam).tolist())
        facts = "\n".join(f"- {key}: {value}" for key, value in self.card.items())
        shown = "".join(f"\n![{name}]({name})\n" for name in pictures)
        return f"""{header(self.card, "sampler")}# A fewstep sampler: {self.solver}, {counted(self.nfe, "evaluation")}

- options: {json.dumps(dict(self.options))}
- noise levels sigma/alpha: {sigmas}
{facts}
{shown}
```python
import fewstep

sampler = fewstep.Sampler.{load}
images = fewstep.sample(model, sampler, seeds=range(16))
```
"""


def _tableau(tensors: Mapping[str, Tensor], nfe: int) -> Tableau:
    """Return the tableau of a file, its tensors held to ``nfe`` evaluations and to each other.

    Raises:
        ArtifactError: a tensor is missing, or does not fit.
    """
    double, first = torch.float64, _first_answer(tensors)
    nfe += first is not None  # rows
    nodes = Nodes(*(tensor_of(tensors, f"nodes.{name}", [nfe + 1], finite=name != "lam", dtype=double) for name in Nodes._fields))
    if bool(torch.isnan(nodes.lam).any()):
        raise ArtifactError("the tensor nodes.lam has entries that are no numbers")
    fixed = {"record": (nfe, 2), "update": (nfe, 2, None), "bias": (nfe, 2), "noise": (nfe,)}
    elements = {name: [None] * (tensors[name].ndim - len(fixed[name])) for name in TABLES[:-1] if name in tensors}
    record, update, bias, noise = (tensor_of(tensors, name, (*fixed[name], *elements.get(name, ())), dtype=double) for name in TABLES)
    if update.shape[2] < 2:
        raise ArtifactError(f"the tensor update has shape {list(update.shape)}, without columns for the anchor and the state")
    if len({len(element) for element in elements.values()}) > 1:
        raise ArtifactError("the coefficients of its tensors are of different shapes")
    torch.broadcast_shapes(record.shape[2:], update.shape[3:], bias.shape[2:])  # refuses those that do not fit each other
    return Tableau(nodes, record, update, bias, noise, first)


def _first_answer(tensors: Mapping[str, Tensor]) -> FirstAnswer | None:
    """Return the first answer that a file foresees; None if it foresees none.

    Raises:
        ArtifactError: a part of it is missing, or does not fit.
    """
    if not any(name.startswith("first.") for name in tensors):
        return None
    labelled = bool(tensor_of(tensors, "first.labelled", []))
    mean = tensor_of(tensors, "first.mean", [None] * tensors["first.mean"].ndim if "first.mean" in tensors else [None])
    if mean.ndim < 2 or not len(mean) or (len(mean) > 1 and not labelled):
        raise ArtifactError(f"the tensor first.mean has shape {list(mean.shape)}, not [classes, ...]")
    channels, frequencies = mean.shape[1], math.prod(mean.shape[2:])
    return FirstAnswer(mean, tensor_of(tensors, "first.response", [frequencies, channels, channels]), labelled)


def _shown(value: object) -> str:
    """Return how an error shows a value that does not belong where it was passed."""
    return f"the class {value.__name__}: make one first" if isinstance(value, type) else f"{type(value).__name__} {str(value)[:80]}"


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Return a solver's option as JSON gives it back: its fingerprint if it has one, a function by its name, a tuple as a list."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return getattr(value, "fingerprint", None) or getattr(value, "__qualname__", value)


def tableau_of(sampler: object) -> Tableau:
    """Return the tableau of a sampler, or one that was passed as it is.

    Raises:
        SolverError: it is neither.
    """
    tableau = sampler.tableau if isinstance(sampler, Sampler) else sampler
    if not isinstance(tableau, Tableau):
        raise SolverError(f"this runs a Sampler or a Tableau, not a {type(sampler).__name__}")
    return tableau
