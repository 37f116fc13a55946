"""The errors for users. Each message says what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

__all__ = ["ArtifactError", "FewstepError", "GridError", "ModelError", "SolverError", "counted", "first_line", "look_up", "nearest"]

LONGEST = 1800  # bytes of a message; what is longer loses its middle
T = TypeVar("T")


class FewstepError(Exception):
    """An error that the caller can mend. The command line prints it in one line and exits with 2.

    A message quotes what was found, of whatever length: one above `LONGEST` bytes is shortened in its middle.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message).encode("utf-8", "backslashreplace")  # a name in a damaged file may hold half a character
        if len(text) > LONGEST:
            half = LONGEST // 2
            text = text[:half] + b" [...] " + text[-half:]
        super().__init__(text.decode("utf-8", "ignore"))


class GridError(FewstepError):
    """A time grid that no solver could run on: not decreasing, duplicate or non-finite times."""


class SolverError(FewstepError):
    """An unknown solver, an option it does not have, or a number of evaluations it cannot use."""


class ModelError(FewstepError):
    """A network or its inputs that do not fit: wrong shapes, a non-finite output, a prediction undefined at this time."""


class ArtifactError(FewstepError):
    """A file or folder that is damaged, incomplete, of another version, or cannot be written."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of another library says, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, in the plural but for 1, as it is formed of ``step``, ``pass`` and ``trajectory``."""
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}{'es' if noun.endswith('s') else 's'}"
    return f"{count:,} {noun if count == 1 else many}"


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
