"""Decide whether two rows differ by more than chance: by their paired errors on the same noises, else by their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from fewstep.evaluate.metrics.confidence import compare_errors, rms
from fewstep.evaluate.rows import Key, has_errors, picture_file, read_errors

__all__ = ["JsonRow", "Verdict", "Version", "has_error", "key_of", "verdict"]

JsonRow = Mapping[str, Any]  # of a results.json, of whatever version
Verdict = Literal["better", "worse", "equal"]
WORSE = 1.02  # of rows without intervals
FLOAT32 = 1e-4  # how far errors saved in float32 may be from their row's RMSE, relatively


class Version(NamedTuple):
    """A row and its origin: the folder, and the first seed and the number of its noises."""

    row: JsonRow
    folder: Path
    noises: tuple[Any, Any]


def key_of(row: JsonRow) -> Key:
    """Return the identifier of a row within its table."""
    return row["library"], row["solver"], row["grid"], row["nfe"] if row.get("planned") is None else row["planned"]


def has_error(row: JsonRow) -> bool:
    """Return whether a row did not fail."""
    return row.get("failed") is None and row["rmse"] is not None and math.isfinite(row["rmse"])


def verdict(one: Version, other: Version) -> Verdict:
    """Judge whether the first row is better or worse than the other by more than chance.

    By `compare_errors` if both have the same noises and their errors were saved. Else by more than both intervals allow; without intervals,
    on the same noises, by more than 2 percent.
    """
    if not has_error(one.row) or not has_error(other.row):
        return "equal" if has_error(one.row) == has_error(other.row) else ("better" if has_error(one.row) else "worse")
    same_noises = one.noises == other.noises
    if same_noises and (mine := _errors(one)) is not None and (theirs := _errors(other)) is not None and len(mine) == len(theirs):
        return compare_errors(mine, theirs).verdict
    new, old = one.row.get("rmse_ci"), other.row.get("rmse_ci")
    if old is not None and new is not None:
        return "worse" if new[0] > old[1] else "better" if new[1] < old[0] else "equal"
    if not same_noises:
        return "equal"  # other noises, no intervals: nothing can be said
    mine, theirs = one.row["rmse"], other.row["rmse"]
    return "worse" if mine > WORSE * theirs else "better" if WORSE * mine < theirs else "equal"


def _errors(version: Version) -> Tensor | None:
    """Read the errors of a row's samples; None if they were not saved or are those of another run."""
    path = picture_file(version.folder, key_of(version.row))
    errors = read_errors(path) if has_errors(path) else None
    return errors if errors is not None and math.isclose(rms(errors), version.row["rmse"], rel_tol=FLOAT32) else None
