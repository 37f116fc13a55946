"""Write docs/results/cifar10.md with its tables, plots and picture of samplers, from ``page.md`` and the rows of the study.

    python -m benchmarks.cifar10.tables benchmarks/results/cifar10-16 --docs docs

In ``page.md`` a line ``TABLE name`` stands for a table, and LABEL for the name of the folder of rows. A table whose rows are not there
says so.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.cifar10.study import TWO
from benchmarks.topics.rows import STANDARD
from benchmarks.topics.solvers import best_grids, fitted, optimized_grids
from benchmarks.topics.students import students

from fewstep.evaluate.pictures import save_comparison
from fewstep.evaluate.report.plots import Point, png, work_precision
from fewstep.evaluate.rows import picture_file, read_samples
from fewstep.runtime.artifact import read_json, write_whole

Row = dict[str, Any]
PAGE = Path(__file__).with_name("page.md")
PLACE = Path("results/cifar10.md")  # below the docs; its pictures lie beside the guides
DIGITS = Path("benchmarks/results")  # the rows of the claims on digits
SHOWN = 5  # evaluations of the picture
PLOTTED = ("unipc-2", "dpm-solver-v3")  # on their optimised grids
RIVALS = ("dpm-solver-pp-2m", "dpm-solver-pp-3m", "unipc-2", "unipc-3")  # of DPM-Solver-v3
V3 = {"dpm-solver-v3": "DPM-Solver-v3", TWO: "DPM-Solver-v3-2p"}


def read(path: Path) -> list[Row]:
    """The rows of a results.json that did not fail.

    Raises:
        FileNotFoundError: the stage was not run.
    """
    return [row for row in json.loads(path.read_text())["rows"] if row["rmse"] is not None]


def standard(rows: list[Row]) -> list[Row]:
    """Rows of this library on standard grids, which need no fit."""
    return [row for row in rows if row["library"] == "fewstep" and row["grid"] in STANDARD and "statistics=" not in row["solver"]]


def exact(reference: dict[str, Any]) -> None:
    """What every row is measured against."""
    half, moved = reference["nfe"] // 2, reference["error"]
    print(f"The exact trajectories themselves: Frechet distance {reference['fd']:.2f}, labels as asked {reference['labels']:.2f}; ", end="")
    print(f"{half} evaluations of {reference['solver']} instead of {reference['nfe']} move them by {moved:.0e}.")


def by_solver(rows: list[Row]) -> None:
    """Each solver on its best grid."""
    rows = standard(rows)
    columns = sorted({row["nfe"] for row in rows})
    best_grids(rows, columns, {n: min(row["rmse"] for row in rows if row["nfe"] == n) for n in columns})


def against(rows: list[Row], solver: str) -> None:
    """A DPM-Solver-v3 beside DPM-Solver++ 2M and 3M and UniPC 2 and 3 on the same grid."""
    cells = {(row["grid"], row["nfe"], row["solver"]): row["rmse"] for row in standard(rows)}
    columns = sorted({nfe for _, nfe, _ in cells})
    print("| grid | " + " | ".join(map(str, columns)) + " |\n|---|" + "---|" * len(columns))
    for grid in dict.fromkeys(grid for grid, _, _ in cells):
        line = []
        for nfe in columns:
            ours, theirs = cells.get((grid, nfe, solver)), [cells[grid, nfe, one] for one in RIVALS if (grid, nfe, one) in cells]
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


def pooling(rows: list[Row], stages: dict[str, Any]) -> None:
    """What statistics cost and what they are worth."""
    rows = [row for row in rows if "statistics=" in row["solver"]]
    columns = sorted({row["nfe"] for row in rows})
    print("| levels | data | pooling | minutes | " + " | ".join(map(str, columns)) + " |\n|---|---|---|---|" + "---|" * len(columns))
    for solver in dict.fromkeys(row["solver"] for row in rows):
        match = re.search(r"statistics-(\d+)-(\d+)-(\w+)", solver)
        assert match is not None
        cells = {row["nfe"]: row for row in rows if row["solver"] == solver}
        minutes = stages["statistics {}, {}, {}".format(*match.groups())]["seconds"] / 60
        figures = [f"{cells[n]['rmse']:.4f} ({cells[n]['fd']:.2f})" for n in columns]
        print(f"| {' | '.join([*match.groups(), f'{minutes:.1f}', *figures])} |")


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
    best = _best(rows)
    print("| evaluations | tuned | the teacher by the best of all samplers here | ratio |\n|---|---|---|---|")
    for row in own:
        other = best[row["nfe"]]
        text = f"{other['rmse']:.4f} ({other['fd']:.2f}) `{other['solver']}` `{other['grid']}`"
        print(f"| {row['nfe']} | **{row['rmse']:.4f}** ({row['fd']:.2f}) | {text} | {row['rmse'] / other['rmse']:.2f} |")


def claims(rows: list[Row]) -> dict[str, str]:
    """What the docs claim, of one model at one guidance: each as figures at 5, 6, 8 and 10 evaluations, as far as there are rows."""
    hand_made, theirs = standard(rows), [row for row in rows if row["library"] == "diffusers"]
    shared = {row["grid"] for row in theirs}

    def of(solver: str, grid: str = "") -> dict[int, float]:
        return _least([row for row in (rows if grid else hand_made) if row["solver"] == solver and (not grid or row["grid"] == grid)])

    best, own = _best(hand_made), of("fitted", "optimized")
    rivals, others = [row for row in hand_made if row["solver"] in RIVALS], [row for row in hand_made if row["solver"] not in V3]
    enough = {n: min((row["nfe"] for row in hand_made if row["rmse"] <= error), default=None) for n, error in own.items()}
    last = max(row["nfe"] for row in hand_made)
    at_5 = next((row["fd"] for row in rows if row["solver"] == "fitted" and row["nfe"] == 5), None)
    distance = {} if at_5 is None else {8: at_5}
    found: dict[str, str] = {}
    for solver, name in V3.items():
        found[f"{name} : best of DPM-Solver++ 2M, 3M, UniPC-2, UniPC-3"] = _ratios(of(solver), _least(rivals))
        found[f"{name} : best of all others here"] = _ratios(of(solver), _least(others))
    shared_best = _least([row for row in hand_made if row["grid"] in shared])
    found["best pair here : best of diffusers', on the same grids"] = _ratios(shared_best, _least(theirs))
    for solver, name in {"unipc-2": "UniPC-2", **V3}.items():
        found[f"{name} on its optimised grid : on its best standard grid"] = _ratios(of(solver, "optimized"), of(solver))
    for solver, name in V3.items():
        found[f"{name} : UniPC-2, each on its optimised grid"] = _ratios(of(solver, "optimized"), of("unipc-2", "optimized"))
    return found | {
        "fitted : best pair of a solver and a standard grid": _ratios(own, _least(hand_made)),
        "evaluations that pair needs for no more error": _cells({n: f"{needed or f'> {last}'}" for n, needed in enough.items()}),
        "Frechet distance, fitted at 5 : that of the best such pair at 8": _ratios(distance, {n: row["fd"] for n, row in best.items()}),
        "Frechet distance, fitted at 5 : least of any such pair at 8": _ratios(distance, _least(hand_made, "fd")),
    }


def _best(rows: list[Row], measure: str = "rmse") -> dict[int, Row]:
    """The row of the least error for each number of evaluations."""
    counts = sorted({row["nfe"] for row in rows})
    return {n: min((row for row in rows if row["nfe"] == n), key=lambda row: row[measure]) for n in counts}


def _least(rows: list[Row], measure: str = "rmse") -> dict[int, float]:
    return {n: row[measure] for n, row in _best(rows, measure).items()}


def _ratios(ours: dict[int, float], theirs: dict[int, float]) -> str:
    return _cells({n: f"{ours[n] / theirs[n]:.2f}" for n in ours if n in theirs})


def _cells(of: dict[int, str]) -> str:
    shown = [of.get(n, "-") for n in (5, 6, 8, 10)]
    return ", ".join(shown if len(of) > 1 else of.values())


def held(here: dict[str, list[Row]], digits: dict[str, list[str]]) -> None:
    """Every claim on digits and here."""
    print("| RMSE at 5, 6, 8, 10 evaluations | guidance | `digits-edm` | here |\n|---|---|---|---|")
    for guidance, rows in here.items():
        theirs = claims([row for name in digits[guidance] for row in read(DIGITS / name / "results.json")])
        ours = claims(rows)
        for name, figures in ours.items():
            if figures:
                print(f"| {name} | {guidance} | {theirs[name]} | {figures} |")


def cost(stages: dict[str, Any]) -> None:
    """What each stage took, and the commands."""
    minutes = {name: stage["seconds"] / 60 for name, stage in stages.items()}
    print("| stage | minutes |\n|---|---|")
    for name, took in minutes.items():
        print(f"| {name} | {took:.1f} |")
    print(f"| **all** | **{sum(minutes.values()):.0f}** |")
    print("\n```")
    for name, stage in stages.items():
        print(f"# {name}\n{stage['command']}")
    print("```")


def tables(folder: Path) -> dict[str, Callable[[], None]]:
    """What prints each table."""
    rows, guided = folder / "standard" / "results.json", folder / "guidance-2" / "results.json"

    def json_of(name: str) -> dict[str, Any]:
        return json.loads((folder / name).read_text())

    digits = {
        "1": ["digits-edm", "digits-edm-two", "digits-edm-fitted", "digits-edm-optimized"],
        "2": ["digits-edm-guidance-2", "digits-edm-guidance-2-two", "digits-edm-guidance-2-fitted"],
    }
    return {
        "held": lambda: held({"1": read(rows)} | ({"2": read(guided)} if guided.is_file() else {}), digits),
        "variants": lambda: by_solver(read(folder / "variants" / "results.json")),
        "teacher": lambda: teacher(json_of("teacher.json")),
        "exact": lambda: exact(json.loads(rows.read_text())["reference"]),
        "by-solver": lambda: by_solver(read(rows)),
        "v3": lambda: against(read(rows), "dpm-solver-v3"),
        "v3-two": lambda: against(read(rows), TWO),
        "diffusers": lambda: peers(read(rows)),
        "guidance-2": lambda: by_solver(read(guided)),
        "guidance-2-exact": lambda: exact(json.loads(guided.read_text())["reference"]),
        "guidance-2-fitted": lambda: fitted(read(guided)),
        "pooling": lambda: pooling(read(folder / "pooling" / "results.json"), json_of("stages.json")),
        "optimized": lambda: optimised(read(rows)),
        "fitted": lambda: fitted(read(rows)),
        "tuned": lambda: tuned(read(folder / "tuned" / "results.json"), read(rows)),
        "student": lambda: students([json_of(f"{part}/results.json") for part in ("student", "kd", "few", "standard")]),
        "guided-student": lambda: students([json_of(f"{part}/results.json") for part in ("guided-2", "guidance-2", "guidance-2-calls")]),
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
    rows = [row for row in read(folder / "results.json") if row["nfe"] == SHOWN and row["library"] == "fewstep"]
    cells = {("exact trajectory", ""): (read_samples(folder / "reference.safetensors"), "128 evaluations")}
    for solver in dict.fromkeys(("fitted", "dpm-solver-v3", *(row["solver"] for row in sorted(rows, key=lambda row: row["rmse"])))):
        row = min((row for row in rows if row["solver"] == solver), key=lambda row: row["rmse"], default=None)
        if row is not None:
            kept = picture_file(folder, ("fewstep", solver, row["grid"], SHOWN))
            name = solver if solver == "fitted" else f"{_plain(solver)}, {row['grid']}"
            cells[name, ""] = (read_samples(kept), f"rmse {row['rmse']:.3f}, Frechet {row['fd']:.2f}")
    save_comparison(cells, path, title=f"The same seeds, {SHOWN} evaluations", across=16)


def _plain(solver: str) -> str:
    return V3.get(solver, solver).lower()


def plot(rows: list[Row], measure: str, path: Path, floor: float | None) -> None:
    """An error over evaluations: each solver on its best standard grid, UniPC-2 and DPM-Solver-v3 on their own, and fitted samplers."""
    made = {f"{solver}, own": [row for row in rows if (row["solver"], row["grid"]) == (solver, "optimized")] for solver in PLOTTED}
    made["fitted"] = [row for row in rows if row["solver"] == "fitted"]
    for row in standard(rows):
        made.setdefault(_plain(row["solver"]), []).append(row)
    best = {name: _best(found) for name, found in made.items() if found}
    ranked = sorted(best, key=lambda name: best[name][SHOWN]["rmse"] if SHOWN in best[name] else math.inf)
    series = {name: [Point(n, row[measure], None) for n, row in best[name].items()] for name in ranked}
    write_whole(path, png(work_precision(series, floor=floor)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--docs", type=Path, required=True, help="the folder of results/cifar10.md and its pictures")
    args = parser.parse_args()
    (args.docs / PLACE).parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.docs / PLACE, filled(PAGE.read_text(encoding="utf-8"), args.results).encode())
    file, pictures = args.results / "standard" / "results.json", args.docs / args.results.name
    for name, suffix in (("standard", ""), ("guidance-2", "-guidance-2")):
        if (args.results / name / "results.json").is_file():
            picture(args.results / name, pictures.with_name(f"{pictures.name}-samplers{suffix}.png"))
    plot(read(file), "rmse", pictures.with_name(f"{pictures.name}-rmse.png"), None)
    plot(read(file), "fd", pictures.with_name(f"{pictures.name}-frechet.png"), read_json(file)["reference"]["fd"])


if __name__ == "__main__":
    main()
