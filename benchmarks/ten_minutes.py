"""The guide "your own network in ten minutes", run as a reader would run it, with the wall time of every step.

python benchmarks/ten_minutes.py --out benchmarks/results/ten_minutes.json

The blocks of docs/own-network-in-ten-minutes.md are taken in their order, in an empty folder: the block that begins with the name of a
file is that file, other blocks of Python are run, and every line of the other blocks is typed as a command. So the guide cannot say
anything else than what was run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.runtime.artifact import write_whole

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "own-network-in-ten-minutes.md"
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.S)
FILE = re.compile(r"# (\w+\.py)\n")
SHOWN = (4, 5, 8)  # evaluations whose errors are kept


@dataclass(frozen=True)
class Step:
    """One thing that a reader does: write a file, type a command, or run a piece of Python.

    Attributes:
        name: of the file, the words of the command, or ``python``.
        text: of the file or the piece.
    """

    name: str
    text: str = ""

    @property
    def is_file(self) -> bool:
        """Whether it is a file to write."""
        return self.name.endswith(".py") and " " not in self.name

    def words(self, python: str = sys.executable) -> list[str]:
        """Return the words of a command, by default for this very Python."""
        if self.text:
            return [python, "-c", self.text]
        first, *rest = shlex.split(self.name)
        return [python, *(["-m", "fewstep"] if first == "fewstep" else []), *rest]


def steps(text: str) -> Iterator[Step]:
    """Return what the blocks of a guide say to do, in their order.

    Raises:
        ValueError: a line that is no command.
    """
    for language, block in FENCE.findall(text):
        if language == "python":
            found = FILE.match(block)
            yield Step(found[1] if found else "python", block)
            continue
        for line in block.strip().splitlines():
            if line.split()[0] not in ("fewstep", "python"):
                raise ValueError(f"the guide has a line that is no command: {line}")
            yield Step(line)


def run(folder: Path, text: str, change: Callable[[Step], Step] = lambda step: step, *, python: str | None = None) -> list[dict[str, Any]]:
    """Do all steps of a guide in an empty folder, and return what each took.

    Args:
        folder: the folder.
        text: of the guide.
        change: what is done in place of a step, as a short one for tests.
        python: of an environment with fewstep in it; by default this very Python, with the code of this clone.

    Raises:
        RuntimeError: a command failed (what it said).
    """
    code = [] if python else [str(ROOT / "src"), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(code)}
    rows = []
    for step in map(change, steps(text)):
        if step.is_file:
            (folder / step.name).write_text(step.text, encoding="utf-8")
            continue
        begin = time.perf_counter()
        done = subprocess.run(step.words(python or sys.executable), cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{step.name} failed: {done.stderr[-2000:]}")
        rows.append({"step": step.name, "seconds": round(time.perf_counter() - begin, 1)})
        print(f"{rows[-1]['seconds']:6.1f} s  {step.name}", flush=True)
    return rows


def figures(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the guide's benchmarks that its table shows: the best hand-made sampler, the fitted one and the students."""
    kept = []

    def rows(name: str) -> list[dict[str, Any]]:
        found = json.loads((folder / "runs" / name / "results.json").read_text())["rows"]
        return [row for row in found if row["rmse"] is not None]

    def keep(what: str, row: dict[str, Any]) -> None:
        kept.append({"what": what, **{key: row[key] for key in ("solver", "grid", "nfe", "rmse", "fd")}})

    for nfe in SHOWN:
        here = [row for row in rows("bench") if row["nfe"] == nfe]
        by_hand, fitted = ([row for row in here if (row["solver"] == "fitted") == own] for own in (False, True))
        if by_hand:
            keep("best by hand", min(by_hand, key=lambda row: row["rmse"]))
        for row in fitted:
            keep("fitted", row)
    for name, what in (("tuned", "tuned"), ("one-pass", "distilled")):
        for row in rows(name):
            keep(what, row)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where to work; by default a folder that is removed at the end")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if args.folder is None else args.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"{folder} is not empty: the steps are those of a reader who begins")
        rows = run(folder, GUIDE.read_text(encoding="utf-8"))
        about = {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        found = {"machine": about, "minutes": round(sum(row["seconds"] for row in rows) / 60, 1), "rows": rows, "figures": figures(folder)}
    write_whole(args.out, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
