"""Read the findings off the rows of benchmarks: the best sampler, what others need to be as good, what got worse since an earlier run.

Nothing is measured here: every statement is a number of the rows, or which of them is least.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.evaluate.metrics.confidence import ROUNDING
from fewstep.evaluate.report.verdict import JsonRow, Verdict, Version, has_error, key_of, verdict
from fewstep.evaluate.rows import OWN_FORMULAS, Key, read_results
from fewstep.models.carried import FITTED, OPTIMIZED
from fewstep.runtime.errors import FewstepError

__all__ = [
    "DISTANCES",
    "Change",
    "Format",
    "Name",
    "Need",
    "Number",
    "ResultsFolder",
    "RowGroup",
    "SamplerName",
    "Sentence",
    "described",
    "grouped",
    "interval_of",
    "listed",
    "network_calls",
    "pivot",
    "prepared",
    "read_folders",
    "reference_of",
    "sampler_of",
    "summary",
    "tie_limit",
    "timed_by",
    "title_of",
]

SamplerName = tuple[str, str]  # library, solver
DISTANCES = ("fd", "fd_ci", "fd_features", "kd", "kd_ci", "precision", "recall", "labels")


class Number(NamedTuple):
    """A number of the rows and how it is shown. ``kind``: value, ratio of two values, or count of rows."""

    value: Any
    shown: str
    kind: str = "value"


class Name(NamedTuple):
    """A name or a command, set in another type."""

    text: str


class Need(NamedTuple):
    """Evaluations that a sampler needs to be as good as another; ``more`` than this many if it never is. ``best``: it is that other."""

    nfe: int
    more: bool
    best: bool


class Change(NamedTuple):
    """A row in an earlier run and a later one; ``verdict`` worse, better or equal."""

    before: JsonRow
    after: JsonRow
    runs: tuple[str, str]
    verdict: Verdict


Sentence = tuple[str | Number | Name, ...]


@dataclass(frozen=True)
class ResultsFolder:
    """The results of one benchmark, and the folder that holds its samples.

    Attributes:
        folder: where ``samples/`` lies.
        name: a short name that tells it from the others of a report.
        results: what its ``results.json`` holds.
    """

    folder: Path
    name: str
    results: Mapping[str, Any]

    @classmethod
    def of(cls, results: Mapping[str, Any], folder: Path = Path()) -> ResultsFolder:
        """Wrap results in memory."""
        return cls(folder, folder.name, results)

    @property
    def model(self) -> str:
        """The name of the model."""
        return str(self.results.get("model"))

    @property
    def guidance(self) -> float:
        """The guidance scale."""
        rows = self.results["rows"]
        return float(self.results.get("problem", {}).get("guidance", rows[0].get("guidance", 1.0) if rows else 1.0))

    @property
    def identity(self) -> tuple[str, str, float]:
        """The model, its weights and the guidance scale: only errors of the same three can be compared."""
        return self.model, str(self.results.get("problem", {}).get("fingerprint")), self.guidance

    @property
    def student(self) -> bool:
        """Whether the model is a student, whose exact trajectories are its teacher's."""
        return self.trajectories[0] != self.identity[1]

    @property
    def trajectories(self) -> tuple[str, float, Any, Any]:
        """The exact trajectories that errors are distances to: the fingerprint and guidance scale of their model, and the noises.

        Files of older versions do not say the scale at which a student's teacher sampled: it is taken to be that of the rows.
        """
        known = {**(self.results.get("problem", {}).get("reference") or {}), **(self.results.get("reference") or {})}
        guidance = self.guidance if known.get("guidance") is None else float(known["guidance"])
        return str(known.get("teacher") or self.identity[1]), guidance, *self.noises

    @property
    def features(self) -> str | None:
        """The features in which samples were compared with the data, if they were."""
        return next((row["fd_features"] for row in self.results["rows"] if row.get("fd_features")), None)

    @property
    def noises(self) -> tuple[Any, Any]:
        """The first seed and the number of noises."""
        known = self.results.get("problem", {})
        return known.get("seed"), known.get("num")


@dataclass
class RowGroup:
    """All rows of one model at one guidance scale; of a row in several runs the last, and how it changed.

    Attributes:
        runs: the benchmarks, earlier ones first.
        rows: by key.
        homes: the benchmark that each row is from.
        changes: rows that are in several.
    """

    runs: list[ResultsFolder]
    rows: dict[Key, JsonRow] = field(default_factory=dict)
    homes: dict[Key, ResultsFolder] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        first: dict[Key, tuple[JsonRow, ResultsFolder]] = {}
        for run in self.runs:
            for whole in run.results["rows"]:
                row = whole if whole.get("fd_features") in (None, self.features) else {**whole, **dict.fromkeys(DISTANCES)}
                first.setdefault(key_of(row), (row, run))
                self.rows[key_of(row)], self.homes[key_of(row)] = row, run
        for key, (row, run) in first.items():
            if self.homes[key] is not run:
                names = (run.name, self.homes[key].name)
                said = verdict(self.version(self.rows[key]), Version(row, run.folder, run.noises))
                self.changes.append(Change(row, self.rows[key], names, said))

    def version(self, row: JsonRow) -> Version:
        """Return a row with its origin."""
        home = self.homes[key_of(row)]
        return Version(row, home.folder, home.noises)

    @property
    def features(self) -> str | None:
        """The features of the last run that compared samples with the data; distances in others are not comparable and left out."""
        return next((named for run in reversed(self.runs) if (named := run.features) is not None), None)

    @cached_property
    def good(self) -> list[JsonRow]:
        """The rows that did not fail."""
        return [row for row in self.rows.values() if has_error(row)]

    @cached_property
    def counts(self) -> list[int]:
        """All numbers of evaluations that some sampler made without failing."""
        return sorted({row["nfe"] for row in self.good})

    @cached_property
    def lowest(self) -> dict[tuple[SamplerName, int], JsonRow]:
        """The row of each sampler at each number of evaluations on its best grid, by its error."""
        found: dict[tuple[SamplerName, int], JsonRow] = {}
        for row in self.good:
            at = sampler_of(row), row["nfe"]
            if at not in found or row["rmse"] < found[at]["rmse"]:
                found[at] = row
        return found

    @cached_property
    def samplers(self) -> list[SamplerName]:
        """The samplers, best first, by the geometric mean of the ratio of their error to the least with as many evaluations."""
        least = {nfe: min(row["rmse"] for (_, n), row in self.lowest.items() if n == nfe) for nfe in self.counts}
        scores: dict[SamplerName, list[float]] = {}
        for (sampler, nfe), row in self.lowest.items():
            scores.setdefault(sampler, []).append(math.log(max(row["rmse"], 1e-300) / max(least[nfe], 1e-300)))
        mean = {sampler: round(sum(found) / len(found), 3) for sampler, found in scores.items()}
        return sorted(mean, key=lambda sampler: (mean[sampler], sampler[0] != "fewstep", sampler))

    def others(self, nfe: int) -> list[JsonRow]:
        """Return the row of each sampler with so many evaluations on its best grid, best first, without the winners."""
        won = set(map(sampler_of, self.winners(nfe)))
        rows = [row for (sampler, n), row in self.lowest.items() if n == nfe and sampler not in won]
        return sorted(rows, key=lambda row: row["rmse"])

    def uncertain(self, nfe: int) -> list[JsonRow]:
        """Return the `others` that may be as good as the winner, since chance explains the difference."""
        least = self.version(self.winners(nfe)[0])
        sure = least.row.get("rmse_ci") is not None
        return [row for row in self.others(nfe) if sure and row.get("rmse_ci") and verdict(self.version(row), least) != "worse"]

    def winners(self, nfe: int) -> list[JsonRow]:
        """Return the rows with the least error with so many evaluations; several if they are equal but for rounding."""
        return tied([self.lowest[sampler, nfe] for sampler in self.samplers if (sampler, nfe) in self.lowest])

    def plain(self, nfe: int) -> list[JsonRow]:
        """Return the winners among the rows that need nothing made for this model; none if there are no such rows."""
        found: dict[SamplerName, JsonRow] = {}
        for row in self.good:
            known = found.get(sampler_of(row))
            if row["nfe"] == nfe and not prepared(row) and (known is None or row["rmse"] < known["rmse"]):
                found[sampler_of(row)] = row
        return tied([found[sampler] for sampler in self.samplers if sampler in found])

    def needs(self, sampler: SamplerName, goal: JsonRow) -> Need:
        """Return the fewest evaluations, of those tried, with which a sampler on its best grid has no more error than a row."""
        tried = {nfe: row["rmse"] for (other, nfe), row in self.lowest.items() if other == sampler}
        enough = [nfe for nfe, error in tried.items() if error <= goal["rmse"] * (1 + ROUNDING)]
        best = sampler in map(sampler_of, self.winners(goal["nfe"]))
        return Need(min(enough), False, best) if enough else Need(max(tried), True, best)

    def first_equal(self, nfe: int) -> JsonRow | None:
        """Return the row with which another sampler first has no more error than the winner at this number of evaluations."""
        goal, won = self.winners(nfe)[0], set(map(sampler_of, self.winners(nfe)))
        needs = [(self.needs(other, goal), other) for other in self.samplers if other not in won]
        reached = [(need.nfe, other) for need, other in needs if not need.more]
        enough, other = min(reached, key=lambda pair: pair[0], default=(0, ("", "")))
        return self.lowest.get((other, enough))


# -- rows -------------------------------------------------------------------------------------------------------------


def sampler_of(row: JsonRow) -> SamplerName:
    """Return the sampler of a row: rows of one sampler differ in the grid and the evaluations."""
    return row["library"], row["solver"]


def network_calls(row: JsonRow, *, student: bool) -> int:
    """Return how many calls of the network a row made for one sample.

    Rows of older versions do not say it. It is as many as evaluations without guidance, and twice as many with it, except for a student:
    until rows said their calls, students were sampled without guidance.

    Args:
        row: one that did not fail.
        student: whether it is of a student.
    """
    if row.get("calls") is not None:
        return row["calls"]
    return row["nfe"] * (1 if student or row.get("guidance", 1.0) == 1 else 2)


def title_of(sampler: SamplerName) -> str:
    """Return what a table calls a sampler: its name, with the library where that is another one."""
    return sampler[1] if sampler[0] == "fewstep" else f"{sampler[1]} ({sampler[0]})"


def tied(rows: Sequence[JsonRow]) -> list[JsonRow]:
    """Return the rows with the least error; several if they are equal but for rounding."""
    limit = tie_limit(row["rmse"] for row in rows)
    return [row for row in rows if row["rmse"] <= limit]


def tie_limit(errors: Iterable[float]) -> float:
    """Return the largest error that is equal to the least of these but for rounding."""
    return min(errors, default=0.0) * (1 + ROUNDING)


def timed_by(rows: Iterable[JsonRow]) -> str | None:
    """Say under what conditions rows were timed; None if by one process that was alone, or if it is not known."""
    found: dict[tuple[int, int], int] = {}
    for row in rows:
        if row.get("processes") and row.get("threads"):
            at = row["processes"], row["threads"]
            found[at] = found.get(at, 0) + 1
    if not found or [processes for processes, _ in found] == [1]:
        return None
    said = []
    for (processes, threads), count in sorted(found.items()):
        by = "1 process alone" if processes == 1 else f"1 of {processes} processes at work"
        said.append(f"{count} row{'s' * (count > 1)} by {by}, with {threads} thread{'s' * (threads > 1)}")
    return "; ".join(said) + ("; do not compare one kind with another" if len(said) > 1 else "")


def prepared(row: JsonRow) -> bool:
    """Return whether a row needs something that was made for this very model: statistics, an optimised grid, a fit, a saved sampler."""
    ours = row["library"] == "fewstep" and not str(row.get("artifact") or OWN_FORMULAS).startswith(OWN_FORMULAS)
    return ours or row["grid"] == OPTIMIZED or row["solver"] == FITTED or row.get("statistics") is not None


def read_folders(folders: Sequence[Path]) -> list[ResultsFolder]:
    """Read the results in these folders, each once, with the shortest names that tell them apart.

    Raises:
        ArtifactError: a folder holds no rows of a benchmark.
    """
    paths = list(dict.fromkeys(folder.resolve() for folder in folders))
    runs = []
    for path in paths:
        results = read_results(path / "results.json")
        depth = next(k for k in range(1, len(path.parts) + 1) if sum(other.parts[-k:] == path.parts[-k:] for other in paths) == 1)
        runs.append(ResultsFolder(path, "/".join(path.parts[-depth:]), results))
    if not runs:
        raise FewstepError("a report needs at least one folder of fewstep bench")
    return runs


def grouped(runs: Sequence[ResultsFolder]) -> list[RowGroup]:
    """Group runs by model, weights and guidance scale: only errors within a group can be compared."""
    return [RowGroup([run for run in runs if run.identity == identity]) for identity in dict.fromkeys(run.identity for run in runs)]


# -- words ------------------------------------------------------------------------------------------------------------


def digits(values: Iterable[float | None], least: int) -> int:
    """Return the decimals that show two digits of the smallest value, at least ``least``."""
    known = [abs(value) for value in values if value and math.isfinite(value)]
    return max(least, min(9, 1 - math.floor(math.log10(min(known))))) if known else least


class Format:
    """Format the numbers of a group: all errors with the same decimals, so that they can be read down a column."""

    def __init__(self, rows: Iterable[JsonRow]) -> None:
        rows = list(rows)
        self.decimals = {"rmse": digits((row["rmse"] for row in rows), 4), "fd": digits((row.get("fd") for row in rows), 2)}
        self.decimals |= {"kd": digits((row.get("kd") for row in rows), 3), "precision": 2, "recall": 2, "labels": 3}
        self.decimals |= {
            "seconds": 1,
            "solver_seconds": digits((row.get("solver_seconds") for row in rows), 2),
            "arithmetic": 2,
            "calls": 0,
            "outside": 4,
            "parted": 4,
        }
        self.decimals |= dict.fromkeys(("error_median", "error_mean", "error_p95", "error_p99"), self.decimals["rmse"])

    def __call__(self, field: str, value: float | None) -> Number | None:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return None
        if field == "peak_memory":
            return Number(value, f"{value / 1e6:.1f}", "mega")
        return Number(value, f"{value:.{self.decimals[field]}f}" if field in self.decimals else f"{value:g}")


def listed(names: Sequence[Sentence], most: int = 3) -> Sentence:
    """Join names as ``a``, ``a and b``, ``a, b and c`` or ``a, b, c and more``."""
    shown: list[Sentence] = [*names[:most], *([("more",)] if len(names) > most else [])]
    parts: list[str | Number | Name] = []
    for k, one in enumerate(shown):
        parts += ([] if k == 0 else [" and "] if k == len(shown) - 1 else [", "]) + list(one)
    return tuple(parts)


def described(row: JsonRow) -> Sentence:
    """Name the sampler and the grid of a row; a fitted sampler has a grid of its own."""
    name = Name(title_of(sampler_of(row)))
    return (name,) if (row["solver"], row["grid"]) == (FITTED, OPTIMIZED) else (name, " on ", Name(row["grid"]))


def evaluations(nfe: int) -> Sentence:
    """Count evaluations: ``1 evaluation``, ``5 evaluations``."""
    return (Number(nfe, f"{nfe}"), " evaluation" if nfe == 1 else " evaluations")


def headline(group: RowGroup, form: Format) -> list[Sentence]:
    """State the winner at the number of evaluations at which it saves most, or else at the fewest."""
    first = {nfe: row for nfe in group.counts if (row := group.first_equal(nfe)) is not None and row["nfe"] > nfe}
    at = max(first, key=lambda nfe: (first[nfe]["nfe"] / nfe, -nfe), default=group.counts[0])
    won, error = group.winners(at), form("rmse", group.winners(at)[0]["rmse"])
    begin: Sentence = ("With ", *evaluations(at), ", ", *listed([described(row) for row in won]))
    begin += (" have the least error, " if len(won) > 1 else " has the least error, ", *([error] if error else []))
    if at in first:
        begin += (
            "; the first of the others to equal it is ",
            *described(first[at]),
            ", with ",
            Number(first[at]["nfe"], f"{first[at]['nfe']}"),
        )
    elif len(group.samplers) > len(won):
        begin += ("; no other sampler here equals it",)
    return [(*begin, "."), *asides(group, form, at, won)]


def asides(group: RowGroup, form: Format, at: int, won: Sequence[JsonRow]) -> list[Sentence]:
    """State how certain the order is, what is best without preparation, and the samples' distance to the data."""
    said: list[Sentence] = []
    close = group.uncertain(at)
    if close:
        said.append(("That order is not certain: with other noises ", *listed([described(row) for row in close]), " may be as good."))
    plain = [row for row in group.good if row["nfe"] == at and not prepared(row)]
    if all(map(prepared, won)) and plain:
        least = min(plain, key=lambda row: row["rmse"])
        error = form("rmse", least["rmse"])
        said.append(
            ("With nothing made for this model beforehand, ", *described(least), " is best", *((": ", error) if error else ()), ".")
        )
    distance, floor = form("fd", won[0].get("fd")), form("fd", reference_of(group).get("fd"))
    if distance is not None:
        exact = () if floor is None else ("; exact samples are ", floor, " away")
        features = (" in the features ", Name(won[0]["fd_features"])) if won[0].get("fd_features") else ()
        said.append(("Its samples are at a Frechet distance of ", distance, " from the data", *features, *exact, "."))
    return said


def reference_of(group: RowGroup) -> Mapping[str, Any]:
    """Return the exact trajectory's figures from the last run with the group's features; empty if there is none."""
    found = (run.results.get("reference", {}) for run in reversed(group.runs) if run.features == group.features)
    return next(found, {})


def count(number: int) -> Number:
    """Wrap a number of rows."""
    return Number(number, f"{number}", "count")


def summary(group: RowGroup, form: Format) -> list[Sentence]:
    """Summarise the rows in sentences, which are true whatever the rows are."""
    failed = [row for row in group.rows.values() if not has_error(row)]
    if not group.rows:
        return [("There are no rows.",)]
    if not group.good:
        return [("No sampler could be measured: all rows failed.",)]
    said = headline(group, form)
    if failed:
        said.append((count(len(failed)), " of ", count(len(group.rows)), " rows failed."))
    if group.changes:
        worse, better = (sum(change.verdict == what for change in group.changes) for what in ("worse", "better"))
        noun = " row; " if len(group.changes) == 1 else " rows; "
        said.append(("In two runs: ", count(len(group.changes)), noun, count(worse), " got worse, ", count(better), " better."))
    return said


def pivot(group: RowGroup, form: Format, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Tabulate one line per sampler, best first and always failed last, with one cell per number of evaluations."""
    every = [*group.samplers, *(sampler_of(row) for row in group.rows.values())]
    tried = {(sampler_of(row), row["nfe"]) for row in group.rows.values()}
    changed = {key_of(change.after): change.verdict for change in group.changes}
    won = {(sampler_of(row), nfe) for nfe in group.counts for row in group.winners(nfe)}
    lines = []
    for sampler in dict.fromkeys(every):
        cells = []
        for nfe in counts:
            row, at = group.lowest.get((sampler, nfe)), (sampler, nfe)
            cell = {"error": None, "fd": None, "grid": "", "best": at in won, "failed": at in tried, "change": "", "interval": None}
            if row is not None:
                cell |= {"error": form("rmse", row["rmse"]), "fd": form("fd", row.get("fd")), "grid": row["grid"]}
                cell |= {"interval": interval_of(form, "rmse", row), "change": changed.get(key_of(row), "")}
            cells.append(cell)
        lines.append({"name": title_of(sampler), "cells": cells})
    return lines


def interval_of(form: Format, name: str, row: JsonRow) -> tuple[Number | None, Number | None] | None:
    """Return the ends of the interval of a measure, if it has one."""
    ends = row.get(f"{name}_ci")
    return None if ends is None else (form(name, ends[0]), form(name, ends[1]))
