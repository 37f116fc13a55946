"""Tables of time, memory and traffic, and of what a newcomer waits for."""

from __future__ import annotations

from typing import Any

from benchmarks.topics.rows import Row, Table, heading


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


def large(results: dict[str, Any]) -> None:
    """Print what learners take beside the network, by the shape of a sample."""
    heading(["sample", "verb", "evaluations"], ["minutes outside the network", "memory, GiB", "disk, GiB"])
    for row in results["rows"]:
        shape = ", ".join(map(str, row["shape"]))
        cost = f"{row['outside'] / 60:.1f} | {row['memory'] / 2**30:.1f} | {row['disk'] / 2**30:.2f}"
        print(f"| [{shape}] | `{row['verb']}` | {row['evaluations']:,} | {cost} |")


def traffic(rows: list[Row]) -> None:
    """Print the bytes of a step against the least, eager and compiled."""
    print("| solver | least | eager | compiled | time, compiled : eager |\n|---|---|---|---|---|")
    for row in (row for row in rows if "solver" in row):
        times = f"{row['eager_to_least']:.2f} x | {row['compiled_to_least']:.2f} x | {row['time_compiled_to_eager']:.2f}"
        print(f"| `{row['solver']}` | {row['megabytes']['least']:.0f} MB | {times} |")


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


TABLES: dict[str, Table] = {
    "parallel": lambda results, args: in_parallel(results[0], args.part or "picard"),
    "large": lambda results, args: large(results[0]),
    "traffic": lambda results, args: traffic(results[0]["rows"]),
    "ten-minutes": lambda results, args: ten_minutes(results[0], args.part),
    "newcomer": lambda results, args: newcomer(results[0], args.part),
}
