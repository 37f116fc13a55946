"""The tables of the README and the docs, from the rows in benchmarks/results.

A page names the command that makes a table in a comment before it, and ends it with another:

    <!-- python -m benchmarks.tables best benchmarks/results/digits-edm/results.json -->
    | solver | 5 | 6 |
    ...
    <!-- end of table -->

`python -m benchmarks.tables fill README.md docs/*.md docs/results/*.md` writes all of them anew; the tests compare them with the rows.
What a table prints is in ``benchmarks/topics``, each topic with its tables by name.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks.topics import costs, fits, inverse, networks, solvers, students
from benchmarks.topics.rows import Table

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- python -m benchmarks\.tables (.*?) -->\n)(.*?)(<!-- end of table -->)", re.S)
TABLES: dict[str, Table] = {}
for topic in (solvers, fits, students, inverse, networks, costs):
    TABLES |= topic.TABLES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "fill"])
    parser.add_argument("files", nargs="+", help="results.json, or for fill the pages")
    args, rest = parser.parse_known_args()
    if args.table != "fill":
        print(printed([args.table, *args.files, *rest]), end="")
        return
    for page in map(Path, args.files):
        text = page.read_text(encoding="utf-8")
        if (made := filled(text)) != text:
            page.write_text(made, encoding="utf-8")
            print(f"{page} has new tables")


def filled(text: str) -> str:
    """Return a page with every table made anew from its rows."""
    return BLOCK.sub(lambda found: f"{found[1]}{printed(shlex.split(found[2]))}{found[4]}", text)


def printed(words: Sequence[str]) -> str:
    """Return what a table's command prints, by its words."""
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--solver", type=lambda text: text.split(","))
    parser.add_argument("--grid", type=lambda text: text.split(","))
    parser.add_argument("--nfe", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--part", help="one part of a study")
    args = parser.parse_args(list(words))
    output = io.StringIO()
    with redirect_stdout(output):
        TABLES[args.table]([json.loads((ROOT / path).read_text()) for path in args.files], args)
    return output.getvalue()


if __name__ == "__main__":
    main()
