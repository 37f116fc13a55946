"""Compare students with the samplers of their teacher, at equal calls of the network and at equal arithmetic.

A student and its teacher are models of their own, and their rows are in groups of their own. Their errors are distances to the same exact
trajectories all the same, where the teacher sampled at the same guidance scale and on the same noises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from fewstep.evaluate.report import plots
from fewstep.evaluate.report.findings import (
    DISTANCES,
    Format,
    Name,
    Number,
    ResultsFolder,
    RowGroup,
    Sentence,
    described,
    grouped,
    listed,
    network_calls,
    prepared,
    reference_of,
    tie_limit,
)
from fewstep.evaluate.report.verdict import JsonRow, Verdict, Version, key_of, verdict
from fewstep.models.carried import FITTED, OPTIMIZED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ARITHMETIC", "CALLS", "Cell", "Cost", "Family", "Line", "Priced", "families", "family_table", "family_view", "payoff"]

SAME_ERROR = 0.05  # how far the own errors of references may be apart that are one reference, computed on two machines


class Priced(NamedTuple):
    """A row with its origin, and what one sample costs: calls of the network, and arithmetic in such calls."""

    version: Version
    calls: int
    arithmetic: float

    @property
    def row(self) -> JsonRow:
        """The row."""
        return self.version.row


class Cost(NamedTuple):
    """A way to count what a sample costs: the cost of a row, and how a sentence begins that counts so."""

    of: Callable[[Priced], float]
    begin: str = ""

    def amount(self, value: float) -> Sentence:
        """Name an amount: ``1 call``, ``that of 4.35 calls``."""
        number = Number(value, f"{value:.2f}".removesuffix(".00"), "count" if value == int(value) else "value")
        return ("that of " if self.begin else "", number, " call" if value == 1 else " calls")

    def sentence(self, *parts: str | Number | Name) -> Sentence:
        """Return a sentence of these parts, the first of which is a word."""
        first = str(parts[0])
        return (f"{self.begin}{first}" if self.begin else f"{first[0].upper()}{first[1:]}", *parts[1:], ".")


CALLS = Cost(lambda one: one.calls)
ARITHMETIC = Cost(lambda one: one.arithmetic, "By arithmetic: ")


@dataclass(frozen=True)
class Line:
    """The rows of a student, or of its teacher's samplers of one kind.

    Attributes:
        name: the student's, or ``teacher, prepared`` for all that was made for the teacher, or ``teacher, by hand`` for all else.
        student: whether they are of a student.
        rows: those that did not fail.
    """

    name: str
    student: bool
    rows: Sequence[Priced]

    @property
    def has_arithmetic(self) -> bool:
        """Whether the arithmetic of some row is not its calls."""
        return any(one.arithmetic != one.calls for one in self.rows)

    def best(self, cost: Cost = CALLS, measure: str = "rmse") -> dict[float, Priced]:
        """Return the row of the least error, or other measure, at each cost, the least cost first."""
        found: dict[float, Priced] = {}
        for one in sorted((one for one in self.rows if one.row.get(measure) is not None), key=cost.of):
            known = found.get(cost.of(one))
            if known is None or one.row[measure] < known.row[measure]:
                found[cost.of(one)] = one
        return found


@dataclass(frozen=True)
class Family:
    """A teacher's rows and those of its students, all measured against the same exact trajectories.

    Attributes:
        teacher: its rows.
        students: the rows of each.
    """

    teacher: RowGroup
    students: Sequence[RowGroup]

    @cached_property
    def lines(self) -> list[Line]:
        """The students, then the teacher's samplers that were made for it, and those that take no preparation."""
        names = [group.runs[-1].model for group in self.students]
        made = []
        for name, group in zip(names, self.students, strict=True):
            own = f"{name} ({group.runs[-1].name})" if names.count(name) > 1 and group.runs[-1].name else name
            made.append(Line(own, True, [self._priced(row, group, student=True) for row in group.good]))
        for name, made_for_it in (("teacher, prepared", True), ("teacher, by hand", False)):
            rows = [row for row in self.teacher.good if prepared(row) is made_for_it]
            made.append(Line(name, False, [self._priced(row, self.teacher, student=False) for row in rows]))
        return [line for line in made if line.rows]

    def costs(self, cost: Cost = CALLS) -> list[float]:
        """Return all costs that some row has, ascending."""
        return sorted({cost.of(one) for line in self.lines for one in line.rows})

    def _priced(self, row: JsonRow, group: RowGroup, *, student: bool) -> Priced:
        """Price a row, and leave out distances to other data or in other features than the teacher's."""
        calls, version = network_calls(row, student=student), group.version(row)
        alike = _data_of(group) == _data_of(self.teacher) and (row.get("fd_features") in (None, self.teacher.features))
        arithmetic = float(calls if row.get("arithmetic") is None else row["arithmetic"])
        return Priced(version if alike else version._replace(row={**row, **dict.fromkeys(DISTANCES)}), calls, arithmetic)


def _data_of(group: RowGroup) -> Any:  # noqa: ANN401 - of JSON
    """Return what samples were compared with, where it was not the model's own data."""
    return group.runs[-1].results.get("problem", {}).get("data")


def families(runs: Sequence[ResultsFolder]) -> list[Family]:
    """Return the teachers among these runs that have students there, measured against the same exact trajectories."""
    made = []
    for trajectories in dict.fromkeys(run.trajectories for run in runs if run.student):
        same = [run for run in runs if run.trajectories == trajectories and None not in trajectories]
        teachers = [run for run in same if not run.student]
        students = [run for run in same if run.student and not any(_contradicts(run, teacher) for teacher in teachers)]
        family = Family(RowGroup(teachers), grouped(students)) if teachers and students else None
        if family is not None and len({line.student for line in family.lines}) == 2:
            made.append(family)
    return made


def _contradicts(student: ResultsFolder, teacher: ResultsFolder) -> bool:
    """Return whether a student's file of an older version, silent on its teacher's scale, has a reference of another own error."""
    mine, theirs = (run.results.get("reference") or {} for run in (student, teacher))
    batches = {run.results.get("problem", {}).get("batch") for run in (student, teacher)}  # the own error is that of the first
    if mine.get("guidance") is not None or len(batches) > 1 or None in (mine.get("error"), theirs.get("error")):
        return False
    return not math.isclose(mine["error"], theirs["error"], rel_tol=SAME_ERROR)


# -- words ------------------------------------------------------------------------------------------------------------


def payoff(family: Family, student: Line, cost: Cost = CALLS) -> Sentence:
    """State up to which cost a student has less error than its teacher's samplers, and from which on they have less.

    At a cost each side has its best row of that cost or less. A difference that chance explains is no difference.
    """
    mine = student.best(cost)
    theirs = Line("", False, [one for line in family.lines if not line.student for one in line.rows]).best(cost)
    costs = sorted({*mine, *(value for value in theirs if value >= min(mine))})
    said: list[Verdict] = [_judged(_affordable(mine, value), _affordable(theirs, value)) for value in costs]
    ahead, behind = _run_of("better", said), _run_of("worse", reversed(said))
    middle, name = said[ahead : len(said) - behind], Name(student.name)
    unsure = "the difference may be chance" if set(middle) == {"equal"} else "now one has less and now the other"
    untried = ("; with less than ", *cost.amount(min(theirs)), " no sampler of its teacher was tried") if min(theirs) > min(mine) else ()
    if not ahead and not behind:
        which = "the difference between " if set(said) == {"equal"} else "now one has less error and now the other of "
        return cost.sentence(which, name, " and the samplers of its teacher", " may be chance" if set(said) == {"equal"} else "", *untried)
    won = [_affordable(theirs, value) for value in costs[len(said) - behind :]]
    names = list(dict.fromkeys(described(one.row) for one in won if one is not None))
    less = (*listed(names, 2), " has less" if len(names) == 1 else " have less")
    if not ahead:
        below = ("; with less, ", unsure) if middle else ()
        return cost.sentence("from ", *cost.amount(costs[-behind]), " on, ", *less, " error than ", name, *below, *untried)
    most = ", the most that were tried" if ahead == len(said) else ""
    begin = ("up to ", *cost.amount(costs[ahead - 1]), f"{most}, ", name, " has less error than the samplers of its teacher")
    if not behind:
        return cost.sentence(*begin, *(("; with more, ", unsure) if middle else ()), *untried)
    between = ("; between, ", unsure) if middle else ()
    return cost.sentence(*begin, "; from ", *cost.amount(costs[-behind]), " on, ", *less, *between, *untried)


def _affordable(best: Mapping[float, Priced], cost: float) -> Priced | None:
    """Return the row of the least error that costs no more; None if all cost more."""
    return min((one for value, one in best.items() if value <= cost), key=lambda one: one.row["rmse"], default=None)


def _judged(mine: Priced | None, theirs: Priced | None) -> Verdict:
    """Judge a student's row; better where its teacher has none."""
    return "better" if mine is None or theirs is None else verdict(mine.version, theirs.version)


def _run_of(what: Verdict, said: Iterable[Verdict]) -> int:
    return len(list(takewhile(lambda one: one == what, said)))


# -- what a page shows --------------------------------------------------------------------------------------------------


def family_view(family: Family, number: int) -> dict[str, Any]:
    """Return everything that the page shows of a family. ``figures`` are its plots by name, for files of their own."""
    form, run = Format(one.row for line in family.lines for one in line.rows), family.teacher.runs[-1]
    slug = f"s{number}-students"
    told = [(line, cost) for line in family.lines if line.student for cost in (CALLS, ARITHMETIC)]
    figures = [
        {"name": f"{slug}.{kind}", "svg": plots.svg(figure, f"{slug}-{kind}"), "png": plots.png(figure), "caption": caption}
        for kind, figure, caption in _figures(family)
    ]
    return {
        "id": slug,
        "name": run.model,
        "guidance": form("guidance", run.guidance),
        "summary": [payoff(family, line, cost) for line, cost in told if cost is CALLS or line.has_arithmetic],
        "figures": figures,
        "counts": [Number(cost, f"{cost}", "count") for cost in family.costs()],
        "lines": [
            {"name": line.name, "student": line.student, "cells": [_cell(cell, form, line) for cell in cells]}
            for line, cells in family_table(family)
        ],
        "arithmetic": any(line.has_arithmetic for line in family.lines),
    }


class Cell(NamedTuple):
    """A line's best row with so many calls, if it has one; ``best`` of all lines, but for rounding."""

    priced: Priced | None
    best: bool


def family_table(family: Family, calls: Sequence[float] | None = None) -> list[tuple[Line, list[Cell]]]:
    """Tabulate the best row of each line by calls of the network.

    Args:
        family: the students and their teacher.
        calls: the columns; by default all numbers that some row has.
    """
    best = [line.best() for line in family.lines]
    columns = family.costs() if calls is None else calls
    limits = {cost: tie_limit(one[cost].row["rmse"] for one in best if cost in one) for cost in columns}
    made = []
    for line, own in zip(family.lines, best, strict=True):
        found = [(cost, own.get(cost)) for cost in columns]
        made.append((line, [Cell(one, one is not None and one.row["rmse"] <= limits[cost]) for cost, one in found]))
    return made


def _cell(cell: Cell, form: Format, line: Line) -> dict[str, Any]:
    """Return a cell's numbers, and its sampler where the line is not of one student with one sampler."""
    if cell.priced is None:
        return {"error": None, "best": False}
    row, arithmetic = cell.priced.row, cell.priced.arithmetic
    one, fit = len({key_of(other.row)[:3] for other in line.rows}) == 1, (row["solver"], row["grid"]) == (FITTED, OPTIMIZED)
    library = "" if row["library"] == "fewstep" else row["library"]
    shown: dict[str, Any] = {"sampler": [] if line.student and one else [row["solver"], library, "" if fit else row["grid"]]}
    shown |= {"error": form("rmse", row["rmse"]), "fd": form("fd", row.get("fd")), "best": cell.best}
    return {**shown, "arithmetic": None if arithmetic == cell.priced.calls else form("arithmetic", arithmetic)}


def _figures(family: Family) -> Iterator[tuple[str, Figure, str]]:
    """Draw the error and the distance by calls, and the error by arithmetic where that is another number."""
    lines = sorted(family.lines, key=lambda line: line.student)  # the teacher's keep their colours, however many students there are
    floor = reference_of(family.teacher).get("fd")
    floor = floor if floor is not None and floor > 0 else None

    def series(cost: Cost, measure: str) -> dict[str, list[plots.Point]]:
        found = {line.name: [(at, one.row) for at, one in line.best(cost, measure).items() if one.row[measure] > 0] for line in lines}
        return {name: [plots.point_of(row, measure, at) for at, row in rows] for name, rows in found.items() if rows}

    if errors := series(CALLS, "rmse"):
        yield "error", plots.work_precision(errors, cost="network calls"), "Error: distance to the end of the exact trajectory (RMSE)"
    if distances := series(CALLS, "fd"):
        figure = plots.work_precision(distances, floor=floor, cost="network calls")
        yield "distance", figure, "Frechet distance of the samples to the data"
    if any(line.has_arithmetic for line in lines) and (errors := series(ARITHMETIC, "rmse")):
        yield "arithmetic", plots.work_precision(errors, cost="arithmetic, in network calls"), "Error by arithmetic"
