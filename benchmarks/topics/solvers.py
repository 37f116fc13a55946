"""Tables of solvers and grids: errors by evaluations, on one model or on several."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from benchmarks.topics.rows import STANDARD, Row, Table, figures, heading, least, pair, rows_of

OWN = ("dpm-solver-v3", "unipc-2")  # solvers that are shown on their optimised grids

PLAIN = ("ddim", "dpm-solver-pp-2m", "dpm-solver-pp-3m", "unipc-2", "unipc-3", "deis-3")  # solvers without statistics or Adams' history


def all_rows(rows: list[Row]) -> None:
    """Print one line for each solver and grid."""
    cells, best = {(row["grid"], row["solver"], row["nfe"]): row for row in rows}, least(rows)
    heading(["solver", "grid"], list(best))
    for grid, solver in sorted(dict.fromkeys(key[:2] for key in cells), key=lambda line: line[0]):
        found = [cells.get((grid, solver, n)) for n in best]
        line = ["" if row is None else figures(row, best[row["nfe"]]["rmse"]) for row in found]
        print(f"| `{solver}` | `{grid}` | " + " | ".join(line) + " |")


def _best(rows: list[Row]) -> None:
    best = least(rows)
    best_grids(rows, list(best), {n: row["rmse"] for n, row in best.items()})


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


def _optimized(rows: list[Row]) -> None:
    optimized_grids(rows, sorted({row["nfe"] for row in rows if row["grid"] == "optimized"}))


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


def _named(results: Sequence[Row], args: argparse.Namespace) -> dict[str, list[Row]]:
    """Return the rows of each model and guidance scale, by how a table names them."""
    made: dict[str, list[Row]] = {}
    for file in results:
        guidance = file["problem"]["guidance"]
        name = f"`{file['model']}`" + ("" if guidance == 1 else f", guidance {guidance:g}")
        made.setdefault(name, []).extend(rows_of([file], args, library=None))
    return made


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


TABLES: dict[str, Table] = {
    "all": lambda results, args: all_rows(rows_of(results, args)),
    "best": lambda results, args: _best(rows_of(results, args)),
    "optimized": lambda results, args: _optimized(rows_of(results, args)),
    "gain": lambda results, args: gain(rows_of(results, args)),
    "versus": lambda results, args: versus(_named(results, args)),
    "one-grid": lambda results, args: one_grid(_named(results, args)),
    "relative": lambda results, args: relative(_named(results, args)),
    "agreement": lambda results, args: agreement(rows_of(results, args, library=None)),
    "fitted": lambda results, args: fitted(rows_of(results, args, library=None)),
    "default-grid": lambda results, args: default_grid(results[0]["rows"]),
    "noise": noise,
}
