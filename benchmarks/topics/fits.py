"""Tables of fitted samplers: what budgets, options and rivals give; what statistics, schedules and tuned networks give."""

from __future__ import annotations

import json
from collections import Counter
from statistics import mean
from typing import Any

from benchmarks.topics.rows import Row, Table, heading


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


def fit_study(rows: list[Row]) -> None:
    """Print rows of fit_study.json: RMSE, mean error, share of large errors, Frechet distance."""
    heading([""], ["evaluations", "RMSE", "mean error", "above 0.1", "Frechet"])
    for row in rows:
        errors = "| | |" if "rmse" not in row else f"{row['rmse']:.4f} | {row['mean_error']:.4f} | {100 * row['share_above_0.1']:.1f} % |"
        refused = f" (refused for {row['chosen']})" if " on " in row.get("chosen", "") else ""
        print(f"| {row['row']}{refused} | {row['nfe']} | {errors} {row['fd']:.2f} |")


SOURCES = {"own": "own trajectories", "own, unguided": "own guided trajectories, network unguided", "digits": "digits, diffused"}


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


def inspections(results: dict[str, Any]) -> None:
    """Print the sampler that an inspection recommends, and its place among the rows of a benchmark."""
    heading(["model", "recommended"], ["RMSE", "place of all", "best", "its RMSE"])
    for row in results["rows"]:
        pick, best = (f"`{row[key]['solver']}` `{row[key]['grid']}`" for key in ("recommended", "best"))
        figures = f"{row['recommended']['rmse']:.4f} | {row['place']} of {row['tried']}"
        print(f"| {row['model']} | {pick} | {figures} | {best} | {row['best']['rmse']:.4f} |")


TABLES: dict[str, Table] = {
    "budget": lambda results, args: budget(results[0], args.part or "errors"),
    "rivals": lambda results, args: rivals(results[0], args.part or "errors"),
    "fit-study": lambda results, args: fit_study([row for row in results[0]["rows"] if row["table"] == args.part]),
    "cost": lambda results, args: cost(results[0]),
    "states": lambda results, args: states(results[0]),
    "bounds": lambda results, args: bounds(results[0]),
    "tuned": lambda results, args: tuned(results[0]),
    "inspections": lambda results, args: inspections(results[0]),
}
