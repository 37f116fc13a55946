"""Tables of networks of others, and of pipelines: what carries over to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.topics.rows import STANDARD, Row, Table, heading


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


TABLES: dict[str, Table] = {
    "foreign": lambda results, args: foreign(results, args.part or "rmse"),
    "transfer": lambda results, args: transfer(results, args.nfe[0], args.part or "best", args.solver or MEASURED),
    "pipeline": lambda results, args: pipeline(results[0]),
    "pipelines": lambda results, args: pipelines(results[0]),
}
