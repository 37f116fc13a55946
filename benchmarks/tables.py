"""The tables of the README and the docs, as Markdown, from a results.json of fewstep bench.

python benchmarks/tables.py benchmarks/results/digits-edm/results.json [--solver unipc-2,ipndm] [--grid angle] [--library fewstep]
    [--best] [--optimized] [--fitted] [--study] [--dsno] [--student] [--pipeline] [--traffic]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

STANDARD = ("karras", "logsnr", "uniform", "quadratic", "angle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--solver", type=lambda text: text.split(","))
    parser.add_argument("--grid", type=lambda text: text.split(","))
    parser.add_argument("--library", default="fewstep")
    parser.add_argument("--best", action="store_true", help="one line a solver, each cell on the best of its grids")
    parser.add_argument("--optimized", action="store_true", help="the optimized grid of each solver beside the best of the others")
    parser.add_argument("--fitted", action="store_true", help="the fitted samplers beside the best of all others, diffusers' too")
    parser.add_argument("--study", action="store_true", help="those of fit_study.json")
    parser.add_argument("--dsno", action="store_true", help="those of dsno_study.json")
    parser.add_argument(
        "--student", action="store_true", help="a student's rows (the first file) beside its teacher's best on standard grids"
    )
    parser.add_argument("--pipeline", action="store_true", help="those of pipeline_study.json")
    parser.add_argument("--traffic", action="store_true", help="those of kernel_traffic.json")
    args = parser.parse_args()
    if args.traffic:
        traffic(json.loads(args.results[0].read_text())["rows"])
        return
    if args.pipeline:
        pipeline(json.loads(args.results[0].read_text()))
        return
    if args.student:
        first, *others = (json.loads(path.read_text()) for path in args.results)
        student(first["model"], first["rows"], [row for results in others for row in results["rows"]])
        return
    if args.dsno:
        dsno(json.loads(args.results[0].read_text())["rows"])
        return
    if args.study:
        study(json.loads(args.results[0].read_text())["rows"])
        return
    if args.fitted:
        fitted([row for path in args.results for row in json.loads(path.read_text())["rows"] if row["rmse"] is not None])
        return
    rows = [row for path in args.results for row in json.loads(path.read_text())["rows"] if row["library"] == args.library]
    rows = [row for row in rows if (not args.solver or row["solver"] in args.solver) and (not args.grid or row["grid"] in args.grid)]
    columns = sorted({row["nfe"] for row in rows if not args.optimized or row["grid"] == "optimized"})
    whole = [row for row in rows if row["rmse"] is not None]  # others failed
    best = {n: min((row["rmse"] for row in whole if row["nfe"] == n), default=None) for n in columns}
    if args.optimized:
        optimized_grids(whole, columns)
        return
    if args.best:
        best_grids(rows, columns, best)
        return
    cells = {(row["grid"], row["solver"], row["nfe"]): row for row in rows}
    print("| solver | grid | " + " | ".join(f"{n}" for n in columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for grid, solver in sorted(dict.fromkeys(key[:2] for key in cells), key=lambda line: line[0]):
        line = []
        for n in columns:
            row = cells.get((grid, solver, n))
            line.append("" if row is None else figures(row, best[n]))
        print(f"| `{solver}` | `{grid}` | " + " | ".join(line) + " |")


def figures(row: dict[str, Any], best: float | None, grid: str = "") -> str:
    """One cell: error, and the Frechet distance if it is known; the best of a column in bold."""
    if row["rmse"] is None:
        return "failed"
    distance = "" if row["fd"] is None else f" ({row['fd']:.2f})"
    text = f"{row['rmse']:.4f}{distance}" + (f" `{grid}`" if grid else "")
    return f"**{text}**" if row["rmse"] == best else text


def pipeline(results: dict[str, Any]) -> None:
    """Each scheduler on the spacing that its configuration has (leading), and on the best one for each number of steps."""
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


def traffic(rows: list[dict[str, Any]]) -> None:
    """Bytes of a step against the least, eager and compiled."""
    print("| solver | least | eager | compiled | time, compiled : eager |\n|---|---|---|---|---|")
    for row in (row for row in rows if "solver" in row):
        times = f"{row['eager_to_least']:.2f} x | {row['compiled_to_least']:.2f} x | {row['time_compiled_to_eager']:.2f}"
        print(f"| `{row['solver']}` | {row['megabytes']['least']:.0f} MB | {times} |")


def optimized_grids(rows: list[dict[str, Any]], columns: list[int]) -> None:
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


def study(rows: list[dict[str, Any]]) -> None:
    """One table for each part of the study: RMSE, mean error, share of large errors, Frechet distance."""
    for table in dict.fromkeys(row["table"] for row in rows):
        print(f"\n{table}:\n\n| | evaluations | RMSE | mean error | above 0.1 | Frechet |\n|---|---|---|---|---|---|")
        for row in (row for row in rows if row["table"] == table):
            errors = (
                "| | |" if "rmse" not in row else f"{row['rmse']:.4f} | {row['mean_error']:.4f} | {100 * row['share_above_0.1']:.1f} % |"
            )
            refused = f" (refused for {row['chosen']})" if " on " in row.get("chosen", "") else ""
            print(f"| {row['row']}{refused} | {row['nfe']} | {errors} {row['fd']:.2f} |")


def dsno(rows: list[dict[str, Any]]) -> None:
    """The controls at equal iterations and at equal time, mean of the seeds with their least and largest; the choices one by one."""
    pace = next(row for row in rows if row["row"] == "pace")
    controls = [(row["row"].split("/"), row) for row in rows if row["row"].startswith("controls/")]
    for basis in ("iterations", "time"):
        print(f"\nequal {basis}:\n\n| | steps | training time | arithmetic of a pass | RMSE | Frechet | labels as asked |")
        print("|---|---|---|---|---|---|---|")
        for name in dict.fromkeys(parts[3] for parts, _ in controls if parts[2] == basis or parts[3] == "dsno"):
            found = [row for parts, row in controls if parts[3] == name and (parts[2] == basis or name == "dsno")]
            steps, error, fd, agree = ([row[key] for row in found] for key in ("steps", "rmse", "fd", "label_agreement"))
            time = mean(steps) * pace[name] / (pace["dsno"] * next(row["steps"] for parts, row in controls if parts[3] == "dsno"))
            cells = [name, f"{mean(steps):.0f}", f"{time:.2f}", f"{found[0]['arithmetic']:.2f}"]
            cells += [f"{mean(error):.4f} ({min(error):.4f} to {max(error):.4f})", f"{mean(fd):.2f} ({min(fd):.2f} to {max(fd):.2f})"]
            print(f"| {' | '.join(cells)} | {100 * mean(agree):.1f} % |")
    print("\nbundled:\n\n| | RMSE | Frechet | labels as asked |\n|---|---|---|---|")
    for row in (row for row in rows if row["row"].startswith("bundled/")):
        name = row["row"].removeprefix("bundled/").replace("0", "teacher, exact")
        print(f"| {name} | {row['rmse']:.4f} | {row['fd']:.2f} | {100 * row['label_agreement']:.1f} % |")
    print("\nchoices:\n\n| | RMSE | mean error | Frechet | labels as asked |\n|---|---|---|---|---|")
    for row in (row for row in rows if row["row"].startswith("choices/")):
        figures = f"{row['rmse']:.4f} | {row['mean_error']:.4f} | {row['fd']:.2f} | {100 * row['label_agreement']:.1f} %"
        print(f"| {row['row'].removeprefix('choices/')} | {figures} |")


def fitted(rows: list[dict[str, Any]]) -> None:
    """Each beside the best pair of a hand-made solver and a standard grid, with v3 and without, and the evaluations such pairs need."""
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


def student(name: str, rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Its passes beside as many evaluations of its teacher, and how many those would have to be."""
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


def best_grids(rows: list[dict[str, Any]], columns: list[int], best: dict[int, float | None]) -> None:
    print("| solver | " + " | ".join(f"{n}" for n in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for solver in dict.fromkeys(row["solver"] for row in rows):
        line = []
        for n in columns:
            found = [row for row in rows if row["solver"] == solver and row["nfe"] == n]
            row = min(found, key=lambda row: math.inf if row["rmse"] is None else row["rmse"], default=None)
            line.append("" if row is None else figures(row, best[n], row["grid"]))
        print(f"| `{solver}` | " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
