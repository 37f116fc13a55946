"""The tables of the README and the docs, from the rows in benchmarks/results.

A page names the command that makes a table in a comment before it, and ends it with another:

    <!-- python benchmarks/tables.py best benchmarks/results/digits-edm/results.json -->
    | solver | 5 | 6 |
    ...
    <!-- end of table -->

`python benchmarks/tables.py fill README.md docs/*.md docs/results/*.md` writes all of them anew; the tests compare them with the rows.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fewstep.evaluate.report.findings import ResultsFolder
from fewstep.evaluate.report.students import families, family_table
from fewstep.runtime.errors import FewstepError

ROOT = Path(__file__).parents[1]
STANDARD = ("karras", "logsnr", "uniform", "quadratic", "angle")
BLOCK = re.compile(r"(<!-- python benchmarks/tables\.py (.*?) -->\n)(.*?)(<!-- end of table -->)", re.S)
OWN = ("dpm-solver-v3", "unipc-2")  # solvers that are shown on their optimised grids
PLAIN = ("ddim", "dpm-solver-pp-2m", "dpm-solver-pp-3m", "unipc-2", "unipc-3", "deis-3")  # solvers without statistics or Adams' history

Row = dict[str, Any]


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
    """Return what a table's command prints, by its words after ``tables.py``."""
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


def all_rows(rows: list[Row]) -> None:
    """Print one line for each solver and grid."""
    cells, best = {(row["grid"], row["solver"], row["nfe"]): row for row in rows}, least(rows)
    heading(["solver", "grid"], list(best))
    for grid, solver in sorted(dict.fromkeys(key[:2] for key in cells), key=lambda line: line[0]):
        found = [cells.get((grid, solver, n)) for n in best]
        line = ["" if row is None else figures(row, best[row["nfe"]]["rmse"]) for row in found]
        print(f"| `{solver}` | `{grid}` | " + " | ".join(line) + " |")


def pair(row: Row) -> str:
    """Return a solver and its grid as a cell names them."""
    return f"`{row['solver']}` `{row['grid']}`"


def gain(rows: list[Row]) -> None:
    """Print fitted samplers, solvers on their optimised grids, and the best pair of a solver and a standard grid."""
    lines = {"fitted": least([row for row in rows if row["solver"] == "fitted"])}
    for solver in OWN:
        lines[f"`{solver}`, optimised grid"] = least([row for row in rows if (row["solver"], row["grid"]) == (solver, "optimized")])
    by_hand = least([row for row in rows if row["grid"] in STANDARD])
    columns = list(lines["fitted"])
    heading([""], columns)
    smallest = {n: min(row["rmse"] for row in (by_hand[n], *(line[n] for line in lines.values()))) for n in columns}
    for name, line in lines.items():
        cells = [f"**{line[n]['rmse']:.4f}**" if line[n]["rmse"] == smallest[n] else f"{line[n]['rmse']:.4f}" for n in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("| best solver on a standard grid | " + " | ".join(f"{by_hand[n]['rmse']:.4f} {pair(by_hand[n])}" for n in columns) + " |")
    enough = {n: [k for k, row in by_hand.items() if row["rmse"] <= lines["fitted"][n]["rmse"]] for n in columns}
    needed = [str(min(enough[n])) if enough[n] else f"more than {max(by_hand)}" for n in columns]
    print("| evaluations that this pair needs for the error of the fitted sampler | " + " | ".join(needed) + " |")


def versus(named: dict[str, list[Row]]) -> None:
    """Print DPM-Solver-v3 beside the best other hand-made solver, of this library or diffusers', for each model."""
    counts = sorted({row["nfe"] for rows in named.values() for row in rows})
    heading(["model", ""], counts)
    for name, rows in named.items():
        rows = [row for row in rows if row["grid"] != "optimized"]
        ours = least([row for row in rows if row["solver"] == "dpm-solver-v3"])
        other = least([row for row in rows if not row["solver"].startswith(("dpm-solver-v3", "fitted"))])
        print(f"| {name} | v3 | " + " | ".join(f"**{ours[n]['rmse']:.4f}** `{ours[n]['grid']}`" for n in counts) + " |")
        print("| | best other | " + " | ".join(f"{other[n]['rmse']:.4f} {pair(other[n])}" for n in counts) + " |")
        print("| | ratio | " + " | ".join(f"{ours[n]['rmse'] / other[n]['rmse']:.2f}" for n in counts) + " |")


def one_grid(named: dict[str, list[Row]]) -> None:
    """Print DPM-Solver-v3 beside the best of the plain solvers on the same grid."""
    counts = sorted({row["nfe"] for rows in named.values() for row in rows})
    heading(["model", ""], counts)
    for name, rows in named.items():
        ours, other = (least([row for row in rows if row["solver"] in names]) for names in (("dpm-solver-v3",), PLAIN))
        cells = [f"{ours[n]['rmse']:.4f} ({ours[n]['fd']:.2f})" for n in counts]
        print(f"| {name} | v3 | " + " | ".join(cells) + " |")
        cells = [f"{other[n]['rmse']:.4f} ({other[n]['fd']:.2f}) `{other[n]['solver']}`" for n in counts]
        print("| | best of DDIM, DPM-Solver++, UniPC, DEIS | " + " | ".join(cells) + " |")
        print("| | ratio | " + " | ".join(f"{ours[n]['rmse'] / other[n]['rmse']:.2f}" for n in counts) + " |")


def relative(named: dict[str, list[Row]]) -> None:
    """Print the error of DPM-Solver-v3 with each of its options relative to that of its default, by model and grid."""
    cells = {(name, row["grid"], row["solver"], row["nfe"]): row["rmse"] for name, rows in named.items() for row in rows}
    problems, solvers = list(dict.fromkeys(key[:2] for key in cells)), list(dict.fromkeys(key[2] for key in cells))
    counts = sorted({key[3] for key in cells})
    heading(["options"], [f"{name}, `{grid}`" for name, grid in problems])
    for solver in solvers:
        if solver != "dpm-solver-v3":
            ratios = [[cells[(*at, solver, n)] / cells[(*at, "dpm-solver-v3", n)] for n in counts] for at in problems]
            options = solver.removeprefix("dpm-solver-v3:")
            print(f"| `{options}` | " + " | ".join(", ".join(f"{ratio:.2f}" for ratio in line) for line in ratios) + " |")


def agreement(rows: list[Row]) -> None:
    """Print the largest relative difference between our errors and diffusers', where both have a solver of the name."""
    cells = {(row["library"], (row["solver"], row["grid"], row["nfe"])): row["rmse"] for row in rows}
    both = [
        (error, cells["diffusers", key]) for (library, key), error in cells.items() if library == "fewstep" and ("diffusers", key) in cells
    ]
    print(f"{len(both)} pairs of rows, largest relative difference {max(abs(ours / theirs - 1) for ours, theirs in both):.0e}.")


def cost(results: Row) -> None:
    """Print the error of DPM-Solver-v3 on ``angle`` by levels, data and pooling of its statistics."""
    rows = [row for row in results["rows"] if (row["grid"], row["integrals"]) == ("angle", "exact")]
    most = next(row for row in rows if (row["levels"], row["data"], row["pool"]) == (120, 1024, "element"))
    counts = list(most["rmse"])
    heading(["levels", "data", "states visited", "pooling"], counts)
    for pool in ("element", "scalar/element", "channel"):
        for row in (row for row in rows if row["pool"] == pool):
            standard = (row["levels"], row["data"], pool) == (30, 128, "element")
            levels, data = (f"**{row[name]}**" if standard else str(row[name]) for name in ("levels", "data"))
            cells = [f"{row['rmse'][n]:.4f} ({row['rmse'][n] / most['rmse'][n]:.2f})" for n in counts]
            print(f"| {levels} | {data} | {row['points']} | {pool} | " + " | ".join(cells) + " |")


SOURCES = {"own": "own trajectories", "own, unguided": "own guided trajectories, network unguided", "digits": "digits, diffused"}


def states(results: Row) -> None:
    """Print the error of DPM-Solver-v3 by where its statistics come from."""
    heading(["model", "guidance", "states", "grid"], [5, 6, 8, 10])
    for row in results["states"]:
        for grid, errors in row["rmse"].items():
            source = SOURCES.get(row["states"], row["states"])
            print(
                f"| `{row['model']}` | {row['guidance']:g} | {source} | `{grid}` | "
                + " | ".join(f"{e:.4f}" for e in errors.values())
                + " |"
            )


def bounds(results: Row) -> None:
    """Print how well each form of the error bound ranks schedules, and what its optimum is worth."""
    heading(
        ["model", "amplification", "total", "local"], ["rank correlation", "least bound / error", "RMSE of the optimum, 3, 5, 8, 10 steps"]
    )
    for model in ("digits-edm", "digits-ddpm"):
        for row in results[model]["forms"]:
            if row["local"] == "exact" or row["amplification"] == "plain":
                errors = ", ".join(f"{error:.3f}" for error in row["rmse_of_optimum"].values())
                numbers = f"{row['rank_correlation']:.2f} | {row['least_ratio']:.2f} | {errors}"
                print(f"| `{model}` | `{row['amplification']}` | {row['total']} | {row['local']} | {numbers} |")


TUNED = {"phase 1 alone": "schedule alone", "mean": "tuned, `mean` (default)", "score": "tuned, `score`"}


def tuned(results: Row) -> None:
    """Print what tuning a network for a few steps gains."""
    cells = {(row["form"], row["nfe"]): row for row in results["rows"]}
    counts = sorted({nfe for form, nfe in cells if form == "score"})
    heading([""], [f"{n} steps" for n in counts])
    for form, name in TUNED.items():
        print(f"| {name} | " + " | ".join(f"{cells[form, n]['rmse']:.4f} ({cells[form, n]['fd']:.2f})" for n in counts) + " |")
    ratios = [cells["mean", n]["rmse"] / cells["phase 1 alone", n]["rmse"] for n in counts]
    print("| `mean` / schedule alone | " + " | ".join(f"**{ratio:.2f}**" for ratio in ratios) + " |")


def figures(row: Row, best: float | None, grid: str = "") -> str:
    """Return one cell: error, and the Frechet distance if it is known; the best of a column in bold."""
    if row["rmse"] is None:
        return "failed"
    distance = "" if row["fd"] is None else f" ({row['fd']:.2f})"
    text = f"{row['rmse']:.4f}{distance}" + (f" `{grid}`" if grid else "")
    return f"**{text}**" if row["rmse"] == best else text


def pipeline(results: dict[str, Any]) -> None:
    """Print each scheduler on the best spacing for each number of steps, and on the one that its configuration has (leading)."""
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for row in results["rows"]:
        name, _, spacing = row["scheduler"].partition(", ")
        rows.setdefault(name, {}).setdefault(row["steps"], {})[spacing] = row["rmse"]
    steps = sorted({row["steps"] for row in results["rows"]})
    best = {n: min(row["rmse"] for row in results["rows"] if row["steps"] == n) for n in steps}
    print("| scheduler | " + " | ".join(f"{n} steps" for n in steps) + " | as configured |")
    print("|---|" + "---|" * (len(steps) + 1))
    for name, cells in rows.items():
        line = []
        for n in steps:
            spacing, error = min(cells[n].items(), key=lambda cell: cell[1])
            text = f"{error:.3f}" + (f" {spacing}" if spacing else "")
            line.append(f"**{text}**" if error == best[n] else text)
        usual = ", ".join(f"{cells[n]['leading']:.3f}" for n in steps) if "leading" in cells[steps[0]] else ""
        print(f"| {name} | " + " | ".join(line) + f" | {usual} |")


def pipelines(results: dict[str, Any]) -> None:
    """Print what each pipeline makes, whether DDIM on its own times is its own scheduler, what a fit gains, and what is refused."""
    heading(["pipeline", "makes"], ["DDIM is its own scheduler", "error at 5 steps, own to fitted", "refused"])
    for row in results["rows"]:
        apart = row["ddim"]
        same = "it adds noise" if apart is None else "yes" if apart < 1e-5 else f"to {apart:.0e}".replace("e-0", "e-")
        print(f"| {row['class']} | {row['makes']} | {same} | {row['own'] / row['fitted']:.1f} | {'; '.join(row['refused'])} |")


def budget(results: dict[str, Any], part: str) -> None:
    """Print for each problem the mean error (RMSE) of fits by budget, and the share of the largest budget's gain; or what fits cost."""
    rows = results["summary"]
    budgets = sorted({row["budget"] for row in rows})
    heading(["model", "evaluations", "best by hand"], [f"{budget:,}" for budget in budgets])
    for name, nfe in dict.fromkeys((row["problem"], row["nfe"]) for row in rows):
        mine = {row["budget"]: row for row in rows if (row["problem"], row["nfe"]) == (name, nfe)}
        first = next(iter(mine.values()))
        rival = "{:.4f} ({:.4f})".format(*first["rival"]) + " " + " ".join(f"`{word}`" for word in first["hand_made"].split(" on "))
        cells = []
        for one in (mine.get(budget) for budget in budgets):
            if one is None:
                cells.append("")
            elif part == "share":
                cells.append("{:.0%} ({:.0%})".format(*one["share"]) if "share" in one else "")
            else:
                cells.append("{:.4f} ({:.4f})".format(*one["errors"]))
        print(f"| {name} | {nfe} | {rival} | {' | '.join(cells)} |")


def rivals(results: Row, part: str) -> None:
    """Print learned rivals beside the fitted sampler: mean ``errors`` (RMSE), ``tails``, or what their fits ``cost``.

    In bold: a rival whose errors are less than the fitted sampler's, by the paired verdict on the same noises.
    """
    rows, lines = results["rows"], dict[tuple[str, str, str, str], dict[int, Row]]()
    for row in rows:
        about = (row["model"], row["rival"], row.get("distance", ""), json.dumps(row.get("settings"), sort_keys=True))
        lines.setdefault(about, {})[row["nfe"]] = row
    counts = sorted({row["nfe"] for row in rows})
    variants = Counter((model, rival) for model, rival, _, _ in lines)
    if part == "cost":
        heading(["model", "rival", "depends on"], ["evaluations", "with gradients", "processor minutes"])
    else:
        heading(["model", "rival"], counts)
    for (model, rival, distance, _), cells in lines.items():
        one = next(iter(cells.values()))
        longer = f", {one['settings']['iterations']} iterations" if variants[model, rival] > 1 and "settings" in one else ""
        name = f"{rival}{longer}" + (", by features" if distance == "features" else "")
        if part != "cost":
            print(f"| `{model}` | {name} | " + " | ".join(_rival_cell(cells.get(n), part) for n in counts) + " |")
        elif made := [row for row in cells.values() if "forward" in row]:
            spent = [f"{mean(row[key] for row in made):,.0f}" for key in ("forward", "gradient")]
            print(f"| `{model}` | {name} | {one['needs']} | {' | '.join(spent)} | {mean(row['seconds'] for row in made) / 60:.1f} |")


def _rival_cell(row: Row | None, part: str) -> str:
    if row is None or "mean_error" not in row:
        return "" if row is None else "refused" if "refused" in row else "failed"
    tails = f"{row['p99']:.4f}, {row['parted']:.1%}"
    text = tails if part == "tails" else f"{row['mean_error']:.4f} ({row['rmse']:.4f})"
    return f"**{text}**" if row.get("verdict") == "better" else text


def in_parallel(results: dict[str, Any], part: str) -> None:
    """Print rounds, evaluations in multiples of the sampler's own, and RMSE by window; or those of parareal by iteration."""
    if part == "parareal":
        rows = results["parareal"]
        iterations = sorted({row["iteration"] for row in rows})
        heading(["solver"], [f"{k} iteration{'s' if k > 1 else ''}" for k in iterations])
        for solver in dict.fromkeys(row["solver"] for row in rows):
            print(f"| `{solver}` | " + " | ".join(f"{row['rounds']}, {row['rmse']:.1e}" for row in rows if row["solver"] == solver) + " |")
        return
    if part == "clock":
        heading(["model"], ["times faster in wall-clock", "predicted time / real time"])
        for row in results["clock"]:
            print(f"| {row['model']} | {row['faster']:.1f} | {row['expected']:.2f} |")
        return
    rows = results["picard"]
    settings = list(dict.fromkeys((row["window"], row["memory"]) for row in rows))
    heading(["model", "sampler"], [f"window {window}" + (f", memory {memory}" if memory > 1 else "") for window, memory in settings])
    for case in dict.fromkeys((row["model"], row["solver"], row["grid"], row["nfe"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["solver"], row["grid"], row["nfe"]) == case]
        cells = [f"{row['rounds']}, {row['evaluations']:.1f}, {row['rmse']:.0e}".replace("e-0", "e-") for row in mine]
        print(f"| {case[0]} | `{case[1]}` `{case[2]}` {case[3]} | {' | '.join(cells)} |")


def splitting(results: dict[str, Any], part: str) -> None:
    """Print median errors, and shares of samples as asked, of guidance by one classifier."""
    rows = [row for row in results["rows"] if row["classifier"] == part]
    columns = list(dict.fromkeys((row["scale"], row["nfe"]) for row in rows if row["nfe"] is not None))
    heading(["way"], [f"scale {scale:g}, {nfe} evaluations" for scale, nfe in columns])
    for way in dict.fromkeys(row["way"] for row in rows if row["nfe"] is not None):
        found = {(row["scale"], row["nfe"]): row for row in rows if row["way"] == way}
        print(f"| {way} | " + " | ".join(f"{found[key]['error']:.3g} ({found[key]['as_asked']:.2f})" for key in columns) + " |")


def blind(results: dict[str, Any], part: str | None) -> None:
    """Print the PSNR of each way to deblur, means over seeds, with the error of the kernel in brackets; or what a ``part`` names."""
    rows = results["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    heading(["kernel", "pictures of one kernel"], methods)
    for kernel, pictures in sorted({(row["kernel"], row["pictures"]) for row in rows}):
        cells = list[str]()
        for method in methods:
            mine = [row for row in rows if (row["kernel"], row["pictures"], row["method"]) == (kernel, pictures, method)]
            psnr, error, worse = (sum(row[key] for row in mine) / len(mine) for key in ("psnr", "kernel_error", "worse"))
            found = method in ("slow EM", "fast EM", "by evidence")
            cells.append(f"{worse:.0%}" if part == "worse" else f"{psnr:.2f}" + (f" ({error:.2f})" if found else ""))
        print(f"| {kernel} | {pictures} | {' | '.join(cells)} |")


def restorations(results: dict[str, Any], part: str) -> None:
    """Print rows of restorations, a column for each task: the ``error`` in dB, the ``sharpness``, or what ``several`` samples say."""
    rows = [row for row in results["rows"] if "failed" not in row and (part != "several" or "coverage" in row)]
    tasks = list(dict.fromkeys(row["task"] for row in results["rows"]))
    best = {task: max(row["psnr"] for row in rows if row["task"] == task) for task in tasks}
    nearest = {task: min(row["features"] for row in rows if row["task"] == task) for task in tasks}

    def cell(row: Row) -> str:
        if part == "several":
            return f"{row['mean']:.2f} ({row['alone']:.2f}), {row['coverage']:.0%}"
        if part == "sharpness":
            text = f"{row['features']:.3f}"
            return f"{f'**{text}**' if row['features'] == nearest[row['task']] else text} ({row['ssim']:.3f})"
        text = f"{row['psnr']:.2f}"
        compared = f" ({row['gain']:+.2f} ± {row['gain_error']:.2f})" if row.get("gain_error") else ""
        return f"{f'**{text}**' if row['psnr'] == best[row['task']] else text}{compared}"

    order = {
        "pseudo-inverse": 0,
        "projection": 1,
        "proximal": 2,
        "pigdm": 3,
        "dps": 4,
        "constrained": 5,
        "moments": 6,
        "moments:steps=2": 7,
        "spectral": 8,
    }
    lines = dict.fromkeys((row["method"], row["solver"], row["planned"], row["products"]) for row in rows)
    heading(["method", "evaluations"], [task.split(":")[0] for task in tasks])
    for line in sorted(lines, key=lambda line: (order.get(line[0], 9), line[2], line[1])):
        mine = {row["task"]: row for row in rows if (row["method"], row["solver"], row["planned"], row["products"]) == line}
        made = sorted({round(row["nfe"]) for row in mine.values()})
        count = "0" if not made[-1] else f"{made[0]}" if made[0] == made[-1] else f"{made[0]} to {made[-1]}"
        cost = count + (f" + {line[3]} back" if line[3] else "")
        solver = f", `{line[1]}`" if line[1] else ""
        print(f"| `{line[0]}`{solver} | {cost} | " + " | ".join(cell(mine[task]) if task in mine else "" for task in tasks) + " |")


def inspections(results: dict[str, Any]) -> None:
    """Print the sampler that an inspection recommends, and its place among the rows of a benchmark."""
    heading(["model", "recommended"], ["RMSE", "place of all", "best", "its RMSE"])
    for row in results["rows"]:
        pick, best = (f"`{row[key]['solver']}` `{row[key]['grid']}`" for key in ("recommended", "best"))
        figures = f"{row['recommended']['rmse']:.4f} | {row['place']} of {row['tried']}"
        print(f"| {row['model']} | {pick} | {figures} | {best} | {row['best']['rmse']:.4f} |")


def large(results: dict[str, Any]) -> None:
    """Print what learners take beside the network, by the shape of a sample."""
    heading(["sample", "verb", "evaluations"], ["minutes outside the network", "memory, GiB", "disk, GiB"])
    for row in results["rows"]:
        shape = ", ".join(map(str, row["shape"]))
        cost = f"{row['outside'] / 60:.1f} | {row['memory'] / 2**30:.1f} | {row['disk'] / 2**30:.2f}"
        print(f"| [{shape}] | `{row['verb']}` | {row['evaluations']:,} | {cost} |")


def foreign(results: Sequence[Row], part: str) -> None:
    """Print samplers on networks of others by one figure: ``rmse``, ``mean_error``, ``p99`` or ``parted``.

    Of fitted samplers the mean over seeds and their spread, of the others the best one by that figure. Bold where every paired verdict on
    the best hand-made sampler is *better*. The tails (``p99``, ``parted``) are those of the sampler with the least RMSE.
    """
    tail = part in ("p99", "parted")
    for number, file in enumerate(results):
        rows, by = file["rows"], "rmse" if tail else part
        counts = sorted({row["nfe"] for row in rows})
        print("" if number == 0 else "\n", end="")
        heading([f"{file['network']}, {file['num']} noises"], counts)
        hand = [row for row in rows if row["kind"] == "by hand"]
        kinds = {
            "optimised grid": [row for row in rows if row["kind"] == "optimised grid"],
            "by hand": hand,
            "by hand, without statistics": [row for row in hand if not row["solver"].startswith("dpm-solver-v3")],
        }
        fitted = {n: [row for row in rows if row["kind"] == "fitted" and row["nfe"] == n] for n in counts}
        verdicts = {n: [one["verdict"] for one in file["verdicts"] if one["nfe"] == n and one["by"] == by] for n in counts}
        cells = [_of_seeds([row[part] for row in fitted[n]], bold=not tail and set(verdicts[n]) == {"better"}) for n in counts]
        print("| fitted | " + " | ".join(cells) + " |")
        for name, some in kinds.items():
            if not some:
                continue
            best = {n: min((row for row in some if row["nfe"] == n), key=lambda row: row[by], default=None) for n in counts}
            shown = ["" if row is None else f"{_digits(row[part])} `{row['solver']}` `{row['grid'] or 'own'}`" for row in best.values()]
            print(f"| {name} | " + " | ".join(shown) + " |")
            if not tail:
                ratios = [
                    "" if row is None else _of_seeds([one[part] / row[part] for one in fitted[n]], digits="{:.2f}")
                    for n, row in best.items()
                ]
                print("| fitted, times that | " + " | ".join(ratios) + " |")


def _digits(value: float) -> str:
    """Return an error, which may be small, as a cell has it."""
    return f"{value:.4f}" if value >= 0.001 else f"{value:.1e}"


def _of_seeds(values: Sequence[float], *, digits: str = "{:.4f}", bold: bool = False) -> str:
    """Return a mean with the standard deviation of what it is the mean of."""
    if not values:
        return ""
    text = digits.format(mean(values)) + (f" ± {digits.format(stdev(values))}" if len(values) > 1 else "")
    return f"**{text}**" if bold else text


MEASURED = ("ddim", "dpm-solver-pp-2m", "unipc-2", "unipc-3", "deis-3", "ipndm")  # solvers of every file that the next tables read
WITHOUT_PICTURES = 0.1  # of the size of the samples: a network on which no pair comes below that error is left out
PRECONDITIONED = ("digits-edm", "cifar10-16")  # networks whose default grid is angle; of the others it is uniform


def by_network(results: Sequence[Row], nfe: int, solvers: Sequence[str]) -> dict[str, dict[tuple[str, str], float]]:
    """Return the RMSE of each pair of one of these solvers and a grid on each network, from files of any study that has run all pairs."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for file in results:
        rows = file["screen"]["rows"] if "screen" in file else file["rows"]
        of_file: dict[str, dict[tuple[str, str], float]] = {}
        failing = set[str]()
        for name in {row["model"] for row in rows if "model" in row}:  # of several networks in one file
            sized = [row["rmse"] / row["reference_std"] for row in rows if row["model"] == name and row.get("rmse")]
            if min(sized) > WITHOUT_PICTURES:
                failing.add(name)
        scale = file.get("problem", {}).get("guidance", 1)
        whole = file.get("network") or Path(file.get("model", "")).name
        whole += "" if scale == 1 else f", guidance {scale:g}"
        for row in rows:
            name, pair = row.get("model", whole), (row["solver"], row["grid"])
            own = row.get("library", "fewstep") == "fewstep" and pair[0] in solvers and pair[1] in STANDARD
            if own and row["nfe"] == nfe and row.get("rmse") and name not in failing:
                of_file.setdefault(name, {})[pair] = row["rmse"]
        for name, pairs in of_file.items():
            found.setdefault(name, pairs)  # the first file that has a network says what is known of it
    return found


def transfer(results: Sequence[Row], nfe: int, part: str, solvers: Sequence[str]) -> None:
    """Print pairs of one of these solvers and a grid on all networks, as times the least error there.

    Those that are ``best`` on one network, or ``safe`` ones: the six whose worst ratio is the least, and UniPC-2 on the grid that
    `default_grid` takes. The mean over networks is the geometric one.
    """
    errors = by_network(results, nfe, solvers)
    least = {name: min(pairs.values()) for name, pairs in errors.items()}
    ratios = {
        pair: {name: pairs[pair] / least[name] for name, pairs in errors.items() if pair in pairs}
        for pair in dict.fromkeys(pair for pairs in errors.values() for pair in pairs)
    }
    whole = {pair: line for pair, line in ratios.items() if len(line) == len(errors)}
    if part == "best":
        best = {min(pairs, key=lambda pair, pairs=pairs: pairs[pair]) for pairs in errors.values()}
        shown = sorted(best, key=lambda pair: max(ratios[pair].values()))
    else:
        shown = sorted(whole, key=lambda pair: max(whole[pair].values()))[:6]
    lines = {f"`{solver}` `{grid}`": ratios[solver, grid] for solver, grid in shown}
    if part != "best" and "unipc-2" in solvers:
        default = {name: "angle" if name.startswith(PRECONDITIONED) else "uniform" for name in errors}
        lines["`unipc-2`, default grid"] = {
            name: ratios["unipc-2", grid][name] for name, grid in default.items() if name in ratios["unipc-2", grid]
        }
    heading([f"{nfe} evaluations", "worst", "mean"], list(errors))
    for name, line in lines.items():
        usual = math.exp(mean(math.log(ratio) for ratio in line.values()))
        cells = [f"**{line[one]:.2f}**" if line.get(one) == 1 else f"{line[one]:.2f}" if one in line else "" for one in errors]
        print(f"| {name} | {max(line.values()):.2f} | {usual:.2f} | " + " | ".join(cells) + " |")


def default_grid(rows: list[Row]) -> None:
    """Print the error of unipc-2 at 8 evaluations on each grid, the least of each network in bold."""
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    print("| network | " + " | ".join(f"`{grid}`" for grid in grids) + " | size of samples |")
    print("|---|" + "---|" * (len(grids) + 1))
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = {row["grid"]: row for row in rows if (row["model"], row["solver"], row["nfe"]) == (model, "unipc-2", 8)}
        least = min(row["rmse"] for row in cells.values() if "rmse" in row)
        shown = [f"{cells[grid]['rmse']:.3g}" if "rmse" in cells.get(grid, {}) else "refused" if grid in cells else "" for grid in grids]
        bold = [
            f"**{text}**" if grid in cells and cells[grid].get("rmse") == least else text for grid, text in zip(grids, shown, strict=True)
        ]
        size = next(iter(cells.values()))["reference_std"]
        print(f"| {model} | " + " | ".join(bold) + f" | {size:.3g} |")


def ten_minutes(results: Row, part: str) -> None:
    """Print what the guide of ten minutes took: the ``steps`` with their wall times, or the ``errors`` that it reached."""
    if part == "steps":
        heading(["step"], ["seconds"])
        for row in results["rows"]:
            name = "save and load" if row["step"] == "python" else f"`{row['step']}`"
            print(f"| {name} | {row['seconds']:.0f} |")
        print(f"| all, in minutes | **{results['minutes']:.1f}** |")
        return
    heading([""], ["evaluations", "RMSE to the exact trajectory", "Frechet distance"])
    for row in results["figures"]:
        how = f": `{row['solver']}` on `{row['grid']}`" if row["what"] == "best by hand" else ""
        print(f"| {row['what']}{how} | {row['nfe']} | {row['rmse']:.4f} | {row['fd']:.2f} |")


def newcomer(results: Row, part: str) -> None:
    """Print what a newcomer waits for, from the installation on: the first ``table``, or the first ``picture`` on the page."""
    heading(["step"], ["seconds"])
    for row in results[part]:
        print(f"| `{row['step']}` | {row['seconds']:.0f} |")
    print(f"| all, in minutes | **{results['minutes'][part]:.1f}** |")


def traffic(rows: list[Row]) -> None:
    """Print the bytes of a step against the least, eager and compiled."""
    print("| solver | least | eager | compiled | time, compiled : eager |\n|---|---|---|---|---|")
    for row in (row for row in rows if "solver" in row):
        times = f"{row['eager_to_least']:.2f} x | {row['compiled_to_least']:.2f} x | {row['time_compiled_to_eager']:.2f}"
        print(f"| `{row['solver']}` | {row['megabytes']['least']:.0f} MB | {times} |")


def optimized_grids(rows: list[Row], columns: list[int]) -> None:
    """Print the optimised grid of each solver beside the best standard one."""
    print("| solver | | " + " | ".join(f"{n}" for n in columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for solver in dict.fromkeys(row["solver"] for row in rows if row["grid"] == "optimized"):
        pairs = []
        for n in columns:
            cells = [row for row in rows if row["solver"] == solver and row["nfe"] == n]
            best = min((row for row in cells if row["grid"] in STANDARD), key=lambda row: row["rmse"])
            pairs.append((next(row for row in cells if row["grid"] == "optimized"), best))
        print(f"| `{solver}` | optimized | " + " | ".join(f"{ours['rmse']:.4f} ({ours['fd']:.2f})" for ours, _ in pairs) + " |")
        print("| | best standard | " + " | ".join(f"{best['rmse']:.4f} ({best['fd']:.2f}) `{best['grid']}`" for _, best in pairs) + " |")
        print("| | ratio | " + " | ".join(f"**{ours['rmse'] / best['rmse']:.2f}**" for ours, best in pairs) + " |")


def fit_study(rows: list[Row]) -> None:
    """Print rows of fit_study.json: RMSE, mean error, share of large errors, Frechet distance."""
    heading([""], ["evaluations", "RMSE", "mean error", "above 0.1", "Frechet"])
    for row in rows:
        errors = "| | |" if "rmse" not in row else f"{row['rmse']:.4f} | {row['mean_error']:.4f} | {100 * row['share_above_0.1']:.1f} % |"
        refused = f" (refused for {row['chosen']})" if " on " in row.get("chosen", "") else ""
        print(f"| {row['row']}{refused} | {row['nfe']} | {errors} {row['fd']:.2f} |")


def dsno_study(rows: list[Row], part: str) -> None:
    """Print one part of dsno_study.json: controls at equal ``iterations`` or ``time``, the ``bundled`` student, or the ``choices``."""
    if part in ("iterations", "time"):
        _controls(rows, part)
        return
    whole = part == "choices"
    heading([""], ["RMSE", *(["mean error"] if whole else []), "Frechet", "labels as asked"])
    for row in (row for row in rows if row["row"].startswith(f"{part}/")):
        name = row["row"].removeprefix(f"{part}/")
        middle = f" | {row['mean_error']:.4f}" if whole else ""
        figures = f"{row['rmse']:.4f}{middle} | {row['fd']:.2f} | {100 * row['label_agreement']:.1f} %"
        print(f"| {'teacher, exact' if name == '0' else name} | {figures} |")


def _controls(rows: list[Row], basis: str) -> None:
    """Print the controls, mean of the seeds with least and largest."""
    pace = next(row for row in rows if row["row"] == "pace")
    controls = [(row["row"].split("/"), row) for row in rows if row["row"].startswith("controls/")]
    heading([""], ["steps", "training time", "arithmetic of a pass", "RMSE", "Frechet", "labels as asked"])
    for name in dict.fromkeys(parts[3] for parts, _ in controls if parts[2] == basis or parts[3] == "dsno"):
        found = [row for parts, row in controls if parts[3] == name and (parts[2] == basis or name == "dsno")]
        steps, error, fd, agree = ([row[key] for row in found] for key in ("steps", "rmse", "fd", "label_agreement"))
        time = mean(steps) * pace[name] / (pace["dsno"] * next(row["steps"] for parts, row in controls if parts[3] == "dsno"))
        cells = [name, f"{mean(steps):.0f}", f"{time:.2f}", f"{found[0]['arithmetic']:.2f}"]
        cells += [f"{mean(error):.4f} ({min(error):.4f} to {max(error):.4f})", f"{mean(fd):.2f} ({min(fd):.2f} to {max(fd):.2f})"]
        print(f"| {' | '.join(cells)} | {100 * mean(agree):.1f} % |")


STUDY = {"rmse-1": "RMSE, 1 pass", "rmse-2": "2", "rmse-4": "4", "fd-1": "Frechet, 1 pass", "fd-2": "2", "fd-4": "4"}


AS_IT_IS = {"options": "targets/0/trajectory", "guided": "states/fresh"}  # what one thing is changed of


def student_study(rows: list[Row], part: str) -> None:
    """Print one part of student_study.json: ``targets`` and ``longer`` at equal training time, ``options``; ``states`` and ``guided``."""
    named: dict[str, list[Row]] = {}
    for row in (row for row in rows if row["row"] == AS_IT_IS.get(part)):
        named["as it is"] = [row]
    for row in (row for row in rows if row["row"].startswith(f"{part}/")):
        named.setdefault(row["row"].rsplit("/", 1)[-1], []).append(row)
    scales = "124" if part in ("states", "guided") else ""
    heading([""], ["steps", *([f"guidance {scale}" for scale in scales] or STUDY.values())])
    for name, found in named.items():
        figures = [[row["calls"][scale][0] for row in found] for scale in scales] or [[row.get(key) for row in found] for key in STUDY]
        print(f"| {name} | {mean(row['steps'] for row in found):.0f} | {' | '.join(map(_spread, figures))} |")


MATCHED = {"fd": ".3f", "precision": ".3f", "recall": ".3f", "labels": ".1%", "clusters": ".3f", "diversity": ".3f", "rmse": ".4f"}
SHARES = (0.1, 0.25, 0.5, 1.0)  # of a run


def matching_study(rows: Sequence[Row], part: str) -> None:
    """Print a part of matching_study.json: ``ring-6``, ``ring-25`` or ``digits`` by the weights that are kept, ``curves`` of the digits."""
    case = "digits" if part == "curves" else part
    named: dict[str, list[Row]] = {}
    for row in (row for row in rows if row["row"].startswith(f"{case}/")):
        named.setdefault(row["row"].split("/")[1], []).append(row)
    if part == "curves":
        heading([""], [*(f"after {share:.0%} of its time: Frechet, recall" for share in SHARES), "seconds"])
        for name, found in named.items():
            if "curves" in found[0]:
                cells = [_at(found, share) for share in SHARES]
                print(f"| {name} | {' | '.join(cells)} | {mean(row['seconds'] for row in found):.0f} |")
        return
    if case != "digits":
        heading([""], ["masses of the modes, least to largest", "near one", "Frechet", "recall", "seconds"])
        for name, found in named.items():
            least, most = min(row["masses"][0] for row in found), max(row["masses"][1] for row in found)
            kept = [row.get("kept", row) for row in found]
            figures = [_spread([row["fd"] for row in kept], ".4f"), _spread([row["recall"] for row in kept], ".3f"), _seconds(found)]
            print(f"| {name} | {least:.3f} to {most:.3f} | {mean(row['near'] for row in found):.1%} | {' | '.join(figures)} |")
        return
    heading([""], ["Frechet", "precision", "recall", "labels", "clusters", "diversity", "RMSE", "seconds"])
    for name, found in named.items():
        kept = [row.get("kept", row) for row in found]
        paired = "curves" not in found[0] or name.startswith("after")
        cells = [_spread([row[key] for row in kept], form) if key != "rmse" or paired else "" for key, form in MATCHED.items()]
        print(f"| {name} | {' | '.join(cells)} | {_seconds(found)} |")


def _seconds(found: Sequence[Row]) -> str:
    """Write the mean seconds of training, or nothing where none was trained."""
    return f"{mean(row['seconds'] for row in found):.0f}" if "seconds" in found[0] else ""


def _at(found: Sequence[Row], share: float) -> str:
    """Write the mean Frechet distance and recall of the seeds after a share of their training."""
    at = list[int]()
    for steps in (row["curves"]["step"] for row in found):
        at.append(min(range(len(steps)), key=lambda k, steps=steps: abs(steps[k] - share * steps[-1])))
    fd, recall = (mean(row["curves"][key][k] for row, k in zip(found, at, strict=True)) for key in ("fd", "recall"))
    return f"{fd:.3f}, {recall:.3f}"


WAYS_ASKED = {"fd": ".2f", "labels": ".1%", "outside": ".1%"}


def reflected_study(rows: Sequence[Row], key: str) -> None:
    """Print one figure of reflected_study.json by guidance scale: ``fd``, ``labels``, or the share of pixels ``outside``."""
    scales = list(dict.fromkeys(row["guidance"] for row in rows))
    heading([""], [f"guidance {scale:g}" for scale in scales])
    least = {scale: min(row[key] for row in rows if row["guidance"] == scale) for scale in scales}
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = list[str]()
        for row in (row for row in rows if row["way"] == way):
            text = f"{row[key]:{WAYS_ASKED[key]}}"
            cells.append(f"**{text}**" if key != "labels" and row[key] == least[row["guidance"]] else text)
        print(f"| {way} | {' | '.join(cells)} |")


def _spread(found: Sequence[float | None], form: str = ".4f") -> str:
    """Write the mean of the seeds with least and largest, or nothing for a student that has no such figure."""
    known = [value for value in found if value is not None]
    if not known:
        return ""
    between = f" ({min(known):{form}} to {max(known):{form}})" if len(known) > 1 else ""
    return f"{mean(known):{form}}{between}"


def fitted(rows: list[Row]) -> None:
    """Print fitted samplers beside the best pair of a hand-made solver and a standard grid, with v3 and without."""
    ours = {row["nfe"]: row for row in rows if row["solver"] == "fitted"}
    pairs = [row for row in rows if row["solver"] != "fitted" and row["grid"] != "optimized"]
    print("| | " + " | ".join(f"{n}" for n in sorted(ours)) + " |")
    print("|---|" + "---|" * len(ours))
    print("| fitted | " + " | ".join(f"**{ours[n]['rmse']:.4f}** ({ours[n]['fd']:.2f})" for n in sorted(ours)) + " |")
    for title, others in (
        ("best pair", pairs),
        ("best without statistics", [row for row in pairs if not row["solver"].startswith("dpm-solver-v3")]),
    ):
        cells, ratios, saved = [], [], []
        for n in sorted(ours):
            best = min((row for row in others if row["nfe"] == n), key=lambda row: row["rmse"], default=None)
            name = "" if best is None else f"{best['solver']}` `{best['grid']}"
            cells.append("" if best is None else f"{best['rmse']:.4f} ({best['fd']:.2f}) `{name}`")
            ratios.append("" if best is None else f"{ours[n]['rmse'] / best['rmse']:.2f}")
            enough = sorted({row["nfe"] for row in others if row["rmse"] <= ours[n]["rmse"]})
            saved.append(f"{enough[0]}" if enough else f"> {max(row['nfe'] for row in others)}")
        print(f"| {title} | " + " | ".join(cells) + " |")
        print("| ratio | " + " | ".join(ratios) + " |")
        print("| evaluations it needs for the same error | " + " | ".join(saved) + " |")


def student(name: str, rows: list[Row], others: list[Row]) -> None:
    """Print the passes of a student beside as many evaluations of its teacher, and how many those would have to be."""
    ours, others = {row["nfe"]: row for row in rows}, [row for row in others if row["grid"] in STANDARD and row["solver"] != "fitted"]
    best = {n: min((row for row in others if row["nfe"] == n), key=lambda row: row["rmse"]) for n in ours}
    enough = {n: min(row["nfe"] for row in others if row["rmse"] <= ours[n]["rmse"]) for n in ours}
    closer = {n: min(row["nfe"] for row in others if row["fd"] <= ours[n]["fd"]) for n in ours}
    print("| | " + " | ".join(f"{n}" for n in ours) + " |\n|---|" + "---|" * len(ours))
    print(f"| `{name}`, passes | " + " | ".join(f"**{row['rmse']:.4f}** ({row['fd']:.2f})" for row in ours.values()) + " |")
    cells = [f"{row['rmse']:.4f} ({row['fd']:.2f}) `{row['solver']}` `{row['grid']}`" for row in best.values()]
    print("| the teacher by the best hand-made solver, evaluations | " + " | ".join(cells) + " |")
    print("| ratio | " + " | ".join(f"{ours[n]['rmse'] / best[n]['rmse']:.2f}" for n in ours) + " |")
    print("| evaluations that needs for no more error | " + " | ".join(map(str, enough.values())) + " |")
    print("| and for no more Frechet distance | " + " | ".join(map(str, closer.values())) + " |")
    print("| arithmetic of the passes, in evaluations | " + " | ".join(f"{row['arithmetic']:.2f}" for row in ours.values()) + " |")


def guided(results: Sequence[dict[str, Any]]) -> None:
    """Print the Frechet distances of a student that is told its scale beside its teacher's with as many evaluations, by pairs of files."""
    counts = [row["nfe"] for row in results[0]["rows"]]
    heading(["guidance", ""], [str(nfe) for nfe in counts])
    for student, teacher in zip(results[::2], results[1::2], strict=True):
        for name, table in (("student", student), ("teacher", teacher)):
            found = {row["nfe"]: row["fd"] for row in table["rows"]}
            print(f"| {table['problem']['guidance']:g} | {name} | {' | '.join(f'{found[nfe]:.2f}' for nfe in counts)} |")


def falling(rows: Sequence[Row]) -> None:
    """Print the error of a student by its passes, over draws of the noises."""
    heading(["passes"], [row["passes"] for row in rows])
    print("| RMSE | " + " | ".join(f"{row['rmse']:.4f}" for row in rows) + " |")
    print("| 95 % of the draws | " + " | ".join(f"{row['interval'][0]:.4f} to {row['interval'][1]:.4f}" for row in rows) + " |")
    for share in ("below the one before", "below one pass"):
        print(f"| draws {share} | " + " | ".join(f"{row[share]:.1%}" if share in row else "" for row in rows) + " |")


STUDENTS = (1, 2, 3, 4, 5, 6, 8, 10)  # network calls


def students(results: Sequence[Row]) -> None:
    """Print students beside the best hand-made and the best prepared samplers of their teacher, by calls of the network.

    Raises:
        FewstepError: no student's file and its teacher's have the same exact trajectories.
    """
    found = families([ResultsFolder.of(file) for file in results])
    if not found:
        raise FewstepError("none of these files is of a student whose teacher's is here too, at its guidance scale and on its noises")
    for number, family in enumerate(found):
        columns, run = [calls for calls in STUDENTS if calls in family.costs()], family.teacher.runs[-1]
        teacher = f"`{run.model}`" + ("" if run.guidance == 1 else f", guidance {run.guidance:g}")
        print("" if number == 0 else "\n", end="")
        heading(["network calls"], columns)
        for line, cells in family_table(family, columns):
            name = f"`{line.name}`" if line.student else line.name.replace("teacher", teacher)
            rows = [None if cell.priced is None else cell.priced.row for cell in cells]
            texts = ["" if row is None else figures(row, row["rmse"] if cell.best else None) for cell, row in zip(cells, rows, strict=True)]
            print(f"| {name} | " + " | ".join(texts) + " |")


FOLDERS = (ROOT / "src" / "fewstep" / "models" / "weights", ROOT / "assets")  # of students that are published


def every_student(results: Sequence[Row], counts: Sequence[int]) -> None:
    """Print students of the library one below the other, by calls of the network; of several rows the one of least distance.

    Minutes are those of training, trajectories not counted, of students whose folder is published. The first row of each teacher and
    guidance scale is that of its exact trajectories.
    """
    heading(["student", "guidance", "calls"], ["minutes of training", "Frechet", "precision", "recall", "labels", "RMSE"])
    exact = set[tuple[str, float]]()
    for file in results:
        reference, guidance = file["reference"], file["problem"]["guidance"]
        if (teacher := (reference["teacher"], guidance)) not in exact:
            exact.add(teacher)
            print(f"| exact trajectories | {guidance:g} |  |  | {_quality(reference)} |  |")
        for nfe in (nfe for nfe in counts if any(row["nfe"] == nfe for row in file["rows"])):
            row = min((row for row in file["rows"] if row["nfe"] == nfe), key=lambda row: row["fd"])
            about = f"| `{file['model']}` | {guidance:g} | {row.get('calls') or row['nfe']} | {_minutes(file['model'])} |"
            print(f"{about} {_quality(row)} | {_error(row)} |")


def _quality(row: Row) -> str:
    """Write Frechet distance, precision, recall and labels as asked as cells."""
    return " | ".join("" if row.get(key) is None else f"{row[key]:{MATCHED[key]}}" for key in ("fd", "precision", "recall", "labels"))


def _minutes(student: str) -> str:
    """Write the minutes in which a published student was trained, or nothing."""
    for path in (folder / student / "history.json" for folder in FOLDERS):
        history = json.loads(path.read_text()) if path.exists() else {}
        if isinstance(history, dict) and "seconds" in history:
            return f"{history['seconds'] / 60:.0f}"
    return ""


def _error(row: Row) -> str:
    """Write the RMSE to the exact ends, or nothing of a row that has none."""
    return "" if row["rmse"] is None else f"{row['rmse']:.4f}"


def noise(results: Sequence[Row], args: argparse.Namespace) -> None:
    """Print samplers that add noise beside samplers that add none: distances by evaluations, or with ``--part rows`` all figures.

    A cell is the mean Frechet distance over noise paths with its standard deviation over them. The least of a column is bold.
    """
    for number, file in enumerate(results):
        rows = [row for row in file["rows"] if row["fd"] is not None and (not args.nfe or row["nfe"] in args.nfe)]
        rows = [row for row in rows if not args.solver or row["solver"] in args.solver]
        counts = sorted({row["nfe"] for row in rows})
        best = {nfe: min(row["fd"] for row in rows if row["nfe"] == nfe) for nfe in counts}
        print("" if number == 0 else "\n", end="")
        if args.part == "rows":
            noise_rows(sorted(rows, key=lambda row: (row["nfe"], row["fd"])), best)
            continue
        heading([f"`{file['model']}`", "adds noise"], counts)
        noisy = {row["solver"]: any(one["stochastic"] for one in rows if one["solver"] == row["solver"]) for row in rows}
        for solver in sorted(noisy, key=lambda name: noisy[name]):
            line = {row["nfe"]: noise_cell(row, best[row["nfe"]]) for row in rows if row["solver"] == solver}
            said = "yes" if noisy[solver] else "no"
            print(f"| `{solver}` | {said} | " + " | ".join(line.get(nfe, "") for nfe in counts) + " |")


def noise_rows(rows: Sequence[Row], best: dict[int, float]) -> None:
    """Print every figure of samplers that add noise and of those that add none, the least distance first."""
    heading(["solver", "evaluations"], ["distance", "95 %", "precision", "recall", "labels", "spread"])
    for row in rows:
        interval = "" if row["fd_ci"] is None else f"{row['fd_ci'][0]:.2f} to {row['fd_ci'][1]:.2f}"
        shown = [f"{row['precision']:.3f}", f"{row['recall']:.3f}", "" if row["labels"] is None else f"{row['labels']:.3f}"]
        shown += ["" if row["spread"] is None else f"{row['spread']:.2f}"]
        print(f"| `{row['solver']}` | {row['nfe']} | {noise_cell(row, best[row['nfe']])} | {interval} | " + " | ".join(shown) + " |")


def noise_cell(row: Row, best: float) -> str:
    """Return a distance as a cell has it."""
    text = f"{row['fd']:.2f}" + ("" if row["fd_spread"] is None else f" ± {row['fd_spread']:.2f}")
    return f"**{text}**" if row["fd"] == best else text


def best_grids(rows: list[Row], columns: list[int], best: dict[int, float | None]) -> None:
    """Print one line a solver, each cell on the best of its grids."""
    print("| solver | " + " | ".join(f"{n}" for n in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for solver in dict.fromkeys(row["solver"] for row in rows):
        line = []
        for n in columns:
            found = [row for row in rows if row["solver"] == solver and row["nfe"] == n]
            row = min(found, key=lambda row: math.inf if row["rmse"] is None else row["rmse"], default=None)
            line.append("" if row is None else figures(row, best[n], row["grid"]))
        print(f"| `{solver}` | " + " | ".join(line) + " |")


def _named(results: Sequence[Row], args: argparse.Namespace) -> dict[str, list[Row]]:
    """Return the rows of each model and guidance scale, by how a table names them."""
    made: dict[str, list[Row]] = {}
    for file in results:
        guidance = file["problem"]["guidance"]
        name = f"`{file['model']}`" + ("" if guidance == 1 else f", guidance {guidance:g}")
        made.setdefault(name, []).extend(rows_of([file], args, library=None))
    return made


def _optimized(rows: list[Row]) -> None:
    optimized_grids(rows, sorted({row["nfe"] for row in rows if row["grid"] == "optimized"}))


def _best(rows: list[Row]) -> None:
    best = least(rows)
    best_grids(rows, list(best), {n: row["rmse"] for n, row in best.items()})


def _student(results: Sequence[Row], args: argparse.Namespace) -> None:
    first, *others = results
    student(first["model"], first["rows"], rows_of(others, args))


TABLES: dict[str, Callable[[Sequence[Row], argparse.Namespace], None]] = {
    "all": lambda results, args: all_rows(rows_of(results, args)),
    "best": lambda results, args: _best(rows_of(results, args)),
    "gain": lambda results, args: gain(rows_of(results, args)),
    "versus": lambda results, args: versus(_named(results, args)),
    "one-grid": lambda results, args: one_grid(_named(results, args)),
    "relative": lambda results, args: relative(_named(results, args)),
    "agreement": lambda results, args: agreement(rows_of(results, args, library=None)),
    "optimized": lambda results, args: _optimized(rows_of(results, args)),
    "fitted": lambda results, args: fitted(rows_of(results, args, library=None)),
    "student": _student,
    "students": lambda results, args: students(results),
    "every-student": lambda results, args: every_student(results, args.nfe or STUDENTS),
    "guided": lambda results, args: guided(results),
    "passes": lambda results, args: falling(results[0]["rows"]),
    "fit-study": lambda results, args: fit_study([row for row in results[0]["rows"] if row["table"] == args.part]),
    "dsno-study": lambda results, args: dsno_study(results[0]["rows"], args.part),
    "student-study": lambda results, args: student_study(results[0]["rows"], args.part),
    "matching-study": lambda results, args: matching_study(results[0]["rows"], args.part),
    "reflected-study": lambda results, args: reflected_study(results[0]["rows"], args.part),
    "pipeline": lambda results, args: pipeline(results[0]),
    "large": lambda results, args: large(results[0]),
    "parallel": lambda results, args: in_parallel(results[0], args.part or "picard"),
    "splitting": lambda results, args: splitting(results[0], args.part),
    "blind": lambda results, args: blind(results[0], args.part),
    "restorations": lambda results, args: restorations(results[0], args.part or "error"),
    "inspections": lambda results, args: inspections(results[0]),
    "budget": lambda results, args: budget(results[0], args.part or "errors"),
    "rivals": lambda results, args: rivals(results[0], args.part or "errors"),
    "pipelines": lambda results, args: pipelines(results[0]),
    "foreign": lambda results, args: foreign(results, args.part or "rmse"),
    "transfer": lambda results, args: transfer(results, args.nfe[0], args.part or "best", args.solver or MEASURED),
    "default-grid": lambda results, args: default_grid(results[0]["rows"]),
    "newcomer": lambda results, args: newcomer(results[0], args.part),
    "ten-minutes": lambda results, args: ten_minutes(results[0], args.part),
    "traffic": lambda results, args: traffic(results[0]["rows"]),
    "cost": lambda results, args: cost(results[0]),
    "states": lambda results, args: states(results[0]),
    "bounds": lambda results, args: bounds(results[0]),
    "tuned": lambda results, args: tuned(results[0]),
    "noise": noise,
}


if __name__ == "__main__":
    main()
