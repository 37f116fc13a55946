"""What tables are made of: rows, their least, and how a cell is written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

STANDARD = ("karras", "logsnr", "uniform", "quadratic", "angle")

Row = dict[str, Any]

Table = Callable[[Sequence[Row], argparse.Namespace], None]  # prints the rows of some files


def rows_of(results: Sequence[Row], args: argparse.Namespace, *, library: str | None = "fewstep") -> list[Row]:
    """Return the rows of all files that a command asks for, without those that failed."""
    return [
        row
        for file in results
        for row in file["rows"]
        if row["rmse"] is not None
        and library in (None, row["library"])
        and (not args.solver or row["solver"] in args.solver)
        and (not args.grid or row["grid"] in args.grid)
        and (not args.nfe or row["nfe"] in args.nfe)
    ]


def least(rows: Sequence[Row]) -> dict[int, Row]:
    """Return the row of the least error for each number of evaluations."""
    counts = sorted({row["nfe"] for row in rows})
    return {n: min((row for row in rows if row["nfe"] == n), key=lambda row: row["rmse"]) for n in counts}


def heading(first: Sequence[str], columns: Sequence[object]) -> None:
    """Print the first two lines of a table."""
    print("| " + " | ".join([*first, *map(str, columns)]) + " |\n|" + "---|" * (len(first) + len(columns)))


def figures(row: Row, best: float | None, grid: str = "") -> str:
    """Return one cell: error, and the Frechet distance if it is known; the best of a column in bold."""
    if row["rmse"] is None:
        return "failed"
    distance = "" if row["fd"] is None else f" ({row['fd']:.2f})"
    text = f"{row['rmse']:.4f}{distance}" + (f" `{grid}`" if grid else "")
    return f"**{text}**" if row["rmse"] == best else text


def pair(row: Row) -> str:
    """Return a solver and its grid as a cell names them."""
    return f"`{row['solver']}` `{row['grid']}`"


def spread(found: Sequence[float | None], form: str = ".4f") -> str:
    """Write the mean of the seeds with least and largest, or nothing of what has no such figure."""
    known = [value for value in found if value is not None]
    if not known:
        return ""
    between = f" ({min(known):{form}} to {max(known):{form}})" if len(known) > 1 else ""
    return f"{mean(known):{form}}{between}"
