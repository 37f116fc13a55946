"""docs/results.md with its tables and its picture of samplers, from ``page.md`` and the rows of the study.

    python -m benchmarks.cifar10.tables benchmarks/results/cifar10-16 --docs docs/results.md --picture docs/cifar10-16-samplers.png

In ``page.md`` a line ``TABLE name`` stands for a table, and LABEL for the name of the folder of rows. A table whose rows are not there
says so.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.tables import STANDARD, best_grids, fitted, optimized_grids

from fewstep.core.artifact import write_whole
from fewstep.evaluate.benchmark import picture_file, read_samples
from fewstep.evaluate.pictures import save_comparison

Row = dict[str, Any]
PAGE = Path(__file__).with_name("page.md")
SHOWN = 5  # evaluations of the picture


def read(path: Path) -> list[Row]:
    """The rows of a results.json that did not fail.

    Raises:
        FileNotFoundError: the stage was not run.
    """
    return [row for row in json.loads(path.read_text())["rows"] if row["rmse"] is not None]


def standard(rows: list[Row]) -> list[Row]:
    """Rows of this library on standard grids, which need no fit."""
    return [row for row in rows if row["library"] == "fewstep" and row["grid"] in STANDARD and "statistics=" not in row["solver"]]


def by_solver(rows: list[Row]) -> None:
    """Each solver on its best grid."""
    rows = standard(rows)
    columns = sorted({row["nfe"] for row in rows})
    best_grids(rows, columns, {n: min(row["rmse"] for row in rows if row["nfe"] == n) for n in columns})


def against(rows: list[Row]) -> None:
    """DPM-Solver-v3 beside DPM-Solver++ 2M and 3M and UniPC 2 and 3 on the same grid."""
    rivals = ("dpm-solver-pp-2m", "dpm-solver-pp-3m", "unipc-2", "unipc-3")
    cells = {(row["grid"], row["nfe"], row["solver"]): row["rmse"] for row in standard(rows)}
    columns = sorted({nfe for _, nfe, _ in cells})
    print("| grid | " + " | ".join(map(str, columns)) + " |\n|---|" + "---|" * len(columns))
    for grid in dict.fromkeys(grid for grid, _, _ in cells):
        line = []
        for nfe in columns:
            ours, theirs = cells.get((grid, nfe, "dpm-solver-v3")), [cells[grid, nfe, one] for one in rivals if (grid, nfe, one) in cells]
            line.append("" if ours is None or not theirs else f"{ours:.4f} : {min(theirs):.4f} = **{ours / min(theirs):.2f}**")
        print(f"| `{grid}` | " + " | ".join(line) + " |")


def peers(rows: list[Row]) -> None:
    """The schedulers of diffusers, each on its best grid of those that all were run on."""
    rows = [row for row in rows if row["library"] == "diffusers"]
    columns = sorted({row["nfe"] for row in rows})
    best_grids(rows, columns, {n: min(row["rmse"] for row in rows if row["nfe"] == n) for n in columns})


def optimised(rows: list[Row]) -> None:
    """The teacher's own grids beside the best standard one."""
    rows = [row for row in rows if row["library"] == "fewstep" and row["solver"] != "fitted"]
    optimized_grids(rows, sorted({row["nfe"] for row in rows if row["grid"] == "optimized"}))


def pooling(rows: list[Row]) -> None:
    """What statistics cost and what they are worth."""
    rows = [row for row in rows if "statistics=" in row["solver"]]
    columns = sorted({row["nfe"] for row in rows})
    print("| levels | data | pooling | " + " | ".join(map(str, columns)) + " |\n|---|---|---|" + "---|" * len(columns))
    for solver in dict.fromkeys(row["solver"] for row in rows):
        match = re.search(r"statistics-(\d+)-(\d+)-(\w+)", solver)
        assert match is not None
        cells = {row["nfe"]: row for row in rows if row["solver"] == solver}
        print(f"| {' | '.join(match.groups())} | " + " | ".join(f"{cells[n]['rmse']:.4f} ({cells[n]['fd']:.2f})" for n in columns) + " |")


def teacher(made: dict[str, Any]) -> None:
    """How good the teacher is."""
    print(f"| {made['num']} of | Frechet distance | 95 % interval | kernel distance | precision | recall | labels as asked |")
    print("|---|---|---|---|---|---|---|")
    for row in made["rows"]:
        low, high = row["fd_ci"]
        shares = " | ".join(f"{row[name]:.2f}" for name in ("precision", "recall", "labels"))
        print(f"| {row['row']} | {row['fd']:.2f} | {low:.2f} to {high:.2f} | {row['kd']:.3f} | {shares} |")


def tuned(own: list[Row], rows: list[Row]) -> None:
    """The network tuned for few evaluations, beside its teacher with as many."""
    best = {row["nfe"]: min((one for one in rows if one["nfe"] == row["nfe"]), key=lambda one: one["rmse"]) for row in own}
    print("| evaluations | tuned | the teacher by the best of all samplers here | ratio |\n|---|---|---|---|")
    for row in own:
        other = best[row["nfe"]]
        text = f"{other['rmse']:.4f} ({other['fd']:.2f}) `{other['solver']}` `{other['grid']}`"
        print(f"| {row['nfe']} | **{row['rmse']:.4f}** ({row['fd']:.2f}) | {text} | {row['rmse'] / other['rmse']:.2f} |")


def cost(stages: dict[str, Any]) -> None:
    """What each stage took."""
    print("| stage | command | minutes |\n|---|---|---|")
    for name, stage in stages.items():
        print(f"| {name} | `{stage['command']}` | {stage['seconds'] / 60:.0f} |")


def tables(folder: Path) -> dict[str, Callable[[], None]]:
    """What prints each table."""
    rows, json_of = folder / "standard" / "results.json", lambda name: json.loads((folder / name).read_text())
    return {
        "teacher": lambda: teacher(json_of("teacher.json")),
        "by-solver": lambda: by_solver(read(rows)),
        "v3": lambda: against(read(rows)),
        "diffusers": lambda: peers(read(rows)),
        "guidance-2": lambda: by_solver(read(folder / "guidance-2" / "results.json")),
        "pooling": lambda: pooling(read(folder / "pooling" / "results.json")),
        "optimized": lambda: optimised(read(rows)),
        "fitted": lambda: fitted(read(rows)),
        "tuned": lambda: tuned(read(folder / "tuned" / "results.json"), read(rows)),
        "cost": lambda: cost(json_of("stages.json")),
    }


def filled(page: str, folder: Path) -> str:
    """The page with every table that has rows."""
    known = tables(folder)

    def table(match: re.Match[str]) -> str:
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                known[match[1]]()
        except FileNotFoundError:
            return "(This part of the study was not run.)"
        return printed.getvalue().rstrip()

    return re.sub(r"^TABLE ([\w-]+)$", table, page, flags=re.MULTILINE).replace("LABEL", folder.name)


def picture(folder: Path, path: Path) -> None:
    """The same seeds by the best samplers of each kind at `SHOWN` evaluations, below the ends of exact trajectories."""
    rows = [row for row in read(folder / "standard" / "results.json") if row["nfe"] == SHOWN and row["library"] == "fewstep"]
    cells = {("exact trajectory", ""): (read_samples(folder / "standard" / "reference.safetensors"), "128 evaluations")}
    for solver in dict.fromkeys(("fitted", "dpm-solver-v3", *(row["solver"] for row in sorted(rows, key=lambda row: row["rmse"])))):
        row = min((row for row in rows if row["solver"] == solver), key=lambda row: row["rmse"], default=None)
        if row is not None:
            kept = picture_file(folder / "standard", ("fewstep", solver, row["grid"], SHOWN))
            cells[f"{solver}, {row['grid']}", ""] = (read_samples(kept), f"rmse {row['rmse']:.3f}, Frechet {row['fd']:.2f}")
    save_comparison(cells, path, title=f"The same seeds, {SHOWN} evaluations", across=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    write_whole(args.docs, filled(PAGE.read_text(encoding="utf-8"), args.results).encode())
    if args.picture is not None:
        picture(args.results, args.picture)


if __name__ == "__main__":
    main()
