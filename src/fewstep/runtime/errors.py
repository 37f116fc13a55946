"""The errors for users. Each message says what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

__all__ = ["ArtifactError", "FewstepError", "GridError", "ModelError", "SolverError", "look_up", "nearest"]


T = TypeVar("T")


class FewstepError(Exception):
    """An error that the caller can mend. The command line prints it in one line and exits with 2."""


class GridError(FewstepError):
    """A time grid that no solver could run on: not decreasing, duplicate or non-finite times."""


class SolverError(FewstepError):
    """An unknown solver, an option it does not have, or a number of evaluations it cannot use."""


class ModelError(FewstepError):
    """A network or its inputs that do not fit: wrong shapes, a non-finite output, a prediction undefined at this time."""


class ArtifactError(FewstepError):
    """A file or folder that is damaged, incomplete, of another version, or cannot be written."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return a hint for the message of an error: the names in ``choices`` nearest to ``name``, else all of them."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(choices)}"


def look_up(name: str, table: Mapping[str, T], kind: str, error: type[FewstepError] = FewstepError) -> T:
    """Return ``table[name]``.

    Args:
        name: the key.
        table: where to look.
        kind: what the error calls such a key, as ``solver``.
        error: the class of the error.

    Raises:
        error: there is no such key; the message names the nearest ones.
    """
    if not isinstance(name, str) or name not in table:
        raise error(f"unknown {kind} {name!r}: {nearest(str(name), table)}")
    return table[name]
