"""What the rows of benchmarks say: which sampler is best, what others need to be as good, what got worse since an earlier run.

Nothing is measured here: all that is said are numbers of the rows, and which of them is least.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.evaluate.benchmark.plan import OPTIMIZED, Key
from fewstep.evaluate.metrics.confidence import ROUNDING
from fewstep.evaluate.report.verdict import Row, Verdict, Version, has_error, key_of, verdict
from fewstep.models.formats.folders import FITTED
from fewstep.runtime.artifact import read_json
from fewstep.runtime.errors import ArtifactError, FewstepError

__all__ = ["Change", "Format", "Name", "Need", "Number", "Problem", "Run", "Sampler", "Sentence", "described", "interval_of", "pivot"]
__all__ += ["problems_of", "read_runs", "reference_of", "sampler_of", "summary", "title_of"]

Sampler = tuple[str, str]  # library, solver
DISTANCES = ("fd", "fd_ci", "fd_features", "kd", "kd_ci", "precision", "recall", "labels")
NEEDED = {"library", "solver", "grid", "nfe", "rmse"}


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

    before: Row
    after: Row
    runs: tuple[str, str]
    verdict: Verdict


Sentence = tuple[str | Number | Name, ...]


@dataclass(frozen=True)
class Run:
    """One folder of a benchmark."""

    folder: Path
    name: str
    results: Mapping[str, Any]

    @property
    def problem(self) -> tuple[str, str, float]:
        """What errors are of: a model, its weights and a guidance scale."""
        known, rows = self.results.get("problem", {}), self.results["rows"]
        guidance = known.get("guidance", rows[0].get("guidance", 1.0) if rows else 1.0)
        return str(self.results.get("model")), str(known.get("fingerprint")), float(guidance)

    @property
    def features(self) -> str | None:
        """Those in which samples were compared with the data, if they were."""
        return next((row["fd_features"] for row in self.results["rows"] if row.get("fd_features")), None)

    @property
    def noises(self) -> tuple[Any, Any]:
        """The first seed and how many."""
        known = self.results.get("problem", {})
        return known.get("seed"), known.get("num")


@dataclass
class Problem:
    """All rows of one model at one guidance scale; of a row in several runs the last, and how it changed."""

    runs: list[Run]
    rows: dict[Key, Row] = field(default_factory=dict)
    homes: dict[Key, Run] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        first: dict[Key, tuple[Row, Run]] = {}
        for run in self.runs:
            for whole in run.results["rows"]:
                row = whole if whole.get("fd_features") in (None, self.features) else {**whole, **dict.fromkeys(DISTANCES)}
                first.setdefault(key_of(row), (row, run))
                self.rows[key_of(row)], self.homes[key_of(row)] = row, run
        for key, (row, run) in first.items():
            if self.homes[key] is not run:
                names = (run.name, self.homes[key].name)
                said = verdict(self._version(self.rows[key]), Version(row, run.folder, run.noises))
                self.changes.append(Change(row, self.rows[key], names, said))

    def _version(self, row: Row) -> Version:
        home = self.homes[key_of(row)]
        return Version(row, home.folder, home.noises)

    @property
    def features(self) -> str | None:
        """Those of the last run that compared samples with the data: distances in others are not comparable and left out."""
        return next((named for run in reversed(self.runs) if (named := run.features) is not None), None)

    @cached_property
    def good(self) -> list[Row]:
        """Rows that did not fail."""
        return [row for row in self.rows.values() if has_error(row)]

    @cached_property
    def counts(self) -> list[int]:
        """All numbers of evaluations that some sampler made without failing."""
        return sorted({row["nfe"] for row in self.good})

    @cached_property
    def lowest(self) -> dict[tuple[Sampler, int], Row]:
        """Of each sampler at each number of evaluations the row on its best grid, by its error."""
        found: dict[tuple[Sampler, int], Row] = {}
        for row in self.good:
            at = sampler_of(row), row["nfe"]
            if at not in found or row["rmse"] < found[at]["rmse"]:
                found[at] = row
        return found

    @cached_property
    def samplers(self) -> list[Sampler]:
        """Best first: by how many times the least error theirs is, on average over their numbers of evaluations."""
        least = {nfe: min(row["rmse"] for (_, n), row in self.lowest.items() if n == nfe) for nfe in self.counts}
        scores: dict[Sampler, list[float]] = {}
        for (sampler, nfe), row in self.lowest.items():
            scores.setdefault(sampler, []).append(math.log(max(row["rmse"], 1e-300) / max(least[nfe], 1e-300)))
        mean = {sampler: round(sum(found) / len(found), 3) for sampler, found in scores.items()}
        return sorted(mean, key=lambda sampler: (mean[sampler], sampler[0] != "fewstep", sampler))

    def others(self, nfe: int) -> list[Row]:
        """The row of each sampler with so many evaluations on its best grid, best first, but for the winners."""
        won = set(map(sampler_of, self.winners(nfe)))
        rows = [row for (sampler, n), row in self.lowest.items() if n == nfe and sampler not in won]
        return sorted(rows, key=lambda row: row["rmse"])

    def uncertain(self, nfe: int) -> list[Row]:
        """Those of the `others` that may be as good as the winner: the difference is not more than chance explains."""
        least = self._version(self.winners(nfe)[0])
        sure = least.row.get("rmse_ci") is not None
        return [row for row in self.others(nfe) if sure and row.get("rmse_ci") and verdict(self._version(row), least) != "worse"]

    def winners(self, nfe: int) -> list[Row]:
        """The rows with the least error with so many evaluations; several if they are equal but for rounding."""
        return tied([self.lowest[sampler, nfe] for sampler in self.samplers if (sampler, nfe) in self.lowest])

    def plain(self, nfe: int) -> list[Row]:
        """The same of rows that need nothing made for this model; none if there are none."""
        found: dict[Sampler, Row] = {}
        for row in self.good:
            known = found.get(sampler_of(row))
            if row["nfe"] == nfe and not prepared(row) and (known is None or row["rmse"] < known["rmse"]):
                found[sampler_of(row)] = row
        return tied([found[sampler] for sampler in self.samplers if sampler in found])

    def needs(self, sampler: Sampler, goal: Row) -> Need:
        """The fewest evaluations, among those tried, with which a sampler on its best grid has no more error than a row."""
        tried = {nfe: row["rmse"] for (other, nfe), row in self.lowest.items() if other == sampler}
        enough = [nfe for nfe, error in tried.items() if error <= goal["rmse"] * (1 + ROUNDING)]
        best = sampler in map(sampler_of, self.winners(goal["nfe"]))
        return Need(min(enough), False, best) if enough else Need(max(tried), True, best)

    def first_equal(self, nfe: int) -> Row | None:
        """Of the samplers that do not win at this number of evaluations the row that first has no more error than the winner."""
        goal, won = self.winners(nfe)[0], set(map(sampler_of, self.winners(nfe)))
        needs = [(self.needs(other, goal), other) for other in self.samplers if other not in won]
        reached = [(need.nfe, other) for need, other in needs if not need.more]
        enough, other = min(reached, key=lambda pair: pair[0], default=(0, ("", "")))
        return self.lowest.get((other, enough))


# -- rows -------------------------------------------------------------------------------------------------------------


def sampler_of(row: Row) -> Sampler:
    """Rows of one sampler differ in the grid and the evaluations."""
    return row["library"], row["solver"]


def title_of(sampler: Sampler) -> str:
    """How a sampler is called where the reader knows that they are ours."""
    return sampler[1] if sampler[0] == "fewstep" else f"{sampler[1]} ({sampler[0]})"


def tied(rows: Sequence[Row]) -> list[Row]:
    """Those with the least error; several if they are equal but for rounding."""
    least = min((row["rmse"] for row in rows), default=0.0)
    return [row for row in rows if row["rmse"] <= least * (1 + ROUNDING)]


def prepared(row: Row) -> bool:
    """Whether a row needs something that was made for this very model: statistics, an optimised grid, a fit, a saved sampler."""
    ours = row["library"] == "fewstep" and row.get("artifact") is not None
    return ours or row["grid"] == OPTIMIZED or row["solver"] == FITTED or row.get("statistics") is not None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each once, with the shortest names that tell them apart.

    Raises:
        ArtifactError: a folder holds no rows of a benchmark.
    """
    paths = list(dict.fromkeys(folder.resolve() for folder in folders))
    runs = []
    for path in paths:
        results = read_json(path / "results.json")
        rows = results.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) >= NEEDED for row in rows):
            raise ArtifactError(f"{path / 'results.json'} does not hold the rows of a benchmark: name a folder of fewstep bench")
        depth = next(k for k in range(1, len(path.parts) + 1) if sum(other.parts[-k:] == path.parts[-k:] for other in paths) == 1)
        runs.append(Run(path, "/".join(path.parts[-depth:]), results))
    if not runs:
        raise FewstepError("a report needs at least one folder of fewstep bench")
    return runs


def problems_of(runs: Sequence[Run]) -> list[Problem]:
    """Runs of the same model, weights and guidance scale together: only their errors can be compared."""
    return [Problem([run for run in runs if run.problem == problem]) for problem in dict.fromkeys(run.problem for run in runs)]


# -- words ------------------------------------------------------------------------------------------------------------


def digits(values: Iterable[float | None], least: int) -> int:
    """Decimals that show two digits of the smallest, at least ``least``."""
    known = [abs(value) for value in values if value and math.isfinite(value)]
    return max(least, min(9, 1 - math.floor(math.log10(min(known))))) if known else least


class Format:
    """How the numbers of a problem are shown: all errors with the same decimals, so that they can be read down a column."""

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self.decimals = {"rmse": digits((row["rmse"] for row in rows), 4), "fd": digits((row.get("fd") for row in rows), 2)}
        self.decimals |= {"kd": digits((row.get("kd") for row in rows), 3), "precision": 2, "recall": 2, "labels": 3}
        self.decimals |= {"seconds": 1, "solver_seconds": digits((row.get("solver_seconds") for row in rows), 2), "arithmetic": 2}
        self.decimals |= dict.fromkeys(("error_median", "error_p95"), self.decimals["rmse"])

    def __call__(self, field: str, value: float | None) -> Number | None:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return None
        if field == "peak_memory":
            return Number(value, f"{value / 1e6:.1f}", "mega")
        return Number(value, f"{value:.{self.decimals[field]}f}" if field in self.decimals else f"{value:g}")


def listed(names: Sequence[Sentence], most: int = 3) -> Sentence:
    """``a``, ``a and b``, ``a, b and c``, ``a, b, c and more``."""
    shown: list[Sentence] = [*names[:most], *([("more",)] if len(names) > most else [])]
    parts: list[str | Number | Name] = []
    for k, one in enumerate(shown):
        parts += ([] if k == 0 else [" and "] if k == len(shown) - 1 else [", "]) + list(one)
    return tuple(parts)


def described(row: Row) -> Sentence:
    """A sampler and its grid; a fitted one has levels of its own."""
    name = Name(title_of(sampler_of(row)))
    return (name,) if (row["solver"], row["grid"]) == (FITTED, OPTIMIZED) else (name, " on ", Name(row["grid"]))


def evaluations(nfe: int) -> Sentence:
    """``1 evaluation``, ``5 evaluations``."""
    return (Number(nfe, f"{nfe}"), " evaluation" if nfe == 1 else " evaluations")


def headline(problem: Problem, form: Format) -> list[Sentence]:
    """What is to be said of the number of evaluations at which the best saves most, or else of the fewest."""
    first = {nfe: row for nfe in problem.counts if (row := problem.first_equal(nfe)) is not None and row["nfe"] > nfe}
    at = max(first, key=lambda nfe: (first[nfe]["nfe"] / nfe, -nfe), default=problem.counts[0])
    won, error = problem.winners(at), form("rmse", problem.winners(at)[0]["rmse"])
    begin: Sentence = ("With ", *evaluations(at), ", ", *listed([described(row) for row in won]))
    begin += (" have the least error, " if len(won) > 1 else " has the least error, ", *([error] if error else []))
    if at in first:
        begin += (
            "; the first of the others to equal it is ",
            *described(first[at]),
            ", with ",
            Number(first[at]["nfe"], f"{first[at]['nfe']}"),
        )
    elif len(problem.samplers) > len(won):
        begin += ("; no other sampler here equals it",)
    return [(*begin, "."), *asides(problem, form, at, won)]


def asides(problem: Problem, form: Format, at: int, won: Sequence[Row]) -> list[Sentence]:
    """How sure that is, what is best without preparation, and how far from the data the samples are."""
    said: list[Sentence] = []
    close = problem.uncertain(at)
    if close:
        said.append(("That order is not certain: with other noises ", *listed([described(row) for row in close]), " may be as good."))
    plain = [row for row in problem.good if row["nfe"] == at and not prepared(row)]
    if all(map(prepared, won)) and plain:
        least = min(plain, key=lambda row: row["rmse"])
        error = form("rmse", least["rmse"])
        said.append(
            ("With nothing made for this model beforehand, ", *described(least), " is best", *((": ", error) if error else ()), ".")
        )
    distance, floor = form("fd", won[0].get("fd")), form("fd", reference_of(problem).get("fd"))
    if distance is not None:
        exact = () if floor is None else ("; exact samples are ", floor, " away")
        features = (" in the features ", Name(won[0]["fd_features"])) if won[0].get("fd_features") else ()
        said.append(("Its samples are at a Frechet distance of ", distance, " from the data", *features, *exact, "."))
    return said


def reference_of(problem: Problem) -> Mapping[str, Any]:
    """What the last run with these features says of the exact trajectory; nothing if there is none."""
    found = (run.results.get("reference", {}) for run in reversed(problem.runs) if run.features == problem.features)
    return next(found, {})


def count(number: int) -> Number:
    """A number of rows."""
    return Number(number, f"{number}", "count")


def summary(problem: Problem, form: Format) -> list[Sentence]:
    """What the rows say, in sentences; true whatever the rows are."""
    failed = [row for row in problem.rows.values() if not has_error(row)]
    if not problem.rows:
        return [("There are no rows.",)]
    if not problem.good:
        return [("No sampler could be measured: all rows failed.",)]
    said = headline(problem, form)
    if failed:
        said.append((count(len(failed)), " of ", count(len(problem.rows)), " rows failed."))
    if problem.changes:
        worse, better = (sum(change.verdict == what for change in problem.changes) for what in ("worse", "better"))
        noun = " row; " if len(problem.changes) == 1 else " rows; "
        said.append(("In two runs: ", count(len(problem.changes)), noun, count(worse), " got worse, ", count(better), " better."))
    return said


def pivot(problem: Problem, form: Format, counts: Sequence[int]) -> list[dict[str, Any]]:
    """One line a sampler, best first and those that always failed last; one cell a number of evaluations."""
    every = [*problem.samplers, *(sampler_of(row) for row in problem.rows.values())]
    tried = {(sampler_of(row), row["nfe"]) for row in problem.rows.values()}
    changed = {key_of(change.after): change.verdict for change in problem.changes}
    won = {(sampler_of(row), nfe) for nfe in problem.counts for row in problem.winners(nfe)}
    lines = []
    for sampler in dict.fromkeys(every):
        cells = []
        for nfe in counts:
            row, at = problem.lowest.get((sampler, nfe)), (sampler, nfe)
            cell = {"error": None, "fd": None, "grid": "", "best": at in won, "failed": at in tried, "change": "", "interval": None}
            if row is not None:
                cell |= {"error": form("rmse", row["rmse"]), "fd": form("fd", row.get("fd")), "grid": row["grid"]}
                cell |= {"interval": interval_of(form, "rmse", row), "change": changed.get(key_of(row), "")}
            cells.append(cell)
        lines.append({"name": title_of(sampler), "cells": cells})
    return lines


def interval_of(form: Format, name: str, row: Row) -> tuple[Number | None, Number | None] | None:
    """The ends of the interval of a measure, if it has one."""
    ends = row.get(f"{name}_ci")
    return None if ends is None else (form(name, ends[0]), form(name, ends[1]))
