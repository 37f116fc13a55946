"""Tables of pictures that are restored, deblurred, or guided by a classifier."""

from __future__ import annotations

from typing import Any

from benchmarks.topics.rows import Row, Table, heading


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


TABLES: dict[str, Table] = {
    "splitting": lambda results, args: splitting(results[0], args.part),
    "blind": lambda results, args: blind(results[0], args.part),
    "restorations": lambda results, args: restorations(results[0], args.part or "error"),
}
