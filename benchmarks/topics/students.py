"""Tables of students: by passes, beside their teachers, and how they were trained."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.topics.rows import STANDARD, Row, Table, figures, heading, rows_of, spread

from fewstep.evaluate.report.findings import ResultsFolder
from fewstep.evaluate.report.students import families, family_table
from fewstep.runtime.errors import FewstepError


def _student(results: Sequence[Row], args: argparse.Namespace) -> None:
    first, *others = results
    student(first["model"], first["rows"], rows_of(others, args))


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
    print("| teacher evaluations for no more error | " + " | ".join(map(str, enough.values())) + " |")
    print("| and for no more Frechet distance | " + " | ".join(map(str, closer.values())) + " |")
    print("| arithmetic of the passes, in evaluations | " + " | ".join(f"{row['arithmetic']:.2f}" for row in ours.values()) + " |")


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


ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "src" / "fewstep" / "models" / "weights", ROOT / "assets")  # of students that are published

MATCHED = {"fd": ".3f", "precision": ".3f", "recall": ".3f", "labels": ".1%", "clusters": ".3f", "diversity": ".3f", "rmse": ".4f"}


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
        print(f"| {name} | {mean(row['steps'] for row in found):.0f} | {' | '.join(map(spread, figures))} |")


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
            figures = [spread([row["fd"] for row in kept], ".4f"), spread([row["recall"] for row in kept], ".3f"), _seconds(found)]
            print(f"| {name} | {least:.3f} to {most:.3f} | {mean(row['near'] for row in found):.1%} | {' | '.join(figures)} |")
        return
    heading([""], ["Frechet", "precision", "recall", "labels", "clusters", "diversity", "RMSE", "seconds"])
    for name, found in named.items():
        kept = [row.get("kept", row) for row in found]
        paired = "curves" not in found[0] or name.startswith("after")
        cells = [spread([row[key] for row in kept], form) if key != "rmse" or paired else "" for key, form in MATCHED.items()]
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


def reflected_study(results: Row, key: str) -> None:
    """Print one figure of reflected_study.json by guidance scale: ``fd``, ``labels``, the share of pixels ``outside``; or the ``grids``."""
    if key == "grids":
        _reflected_grids(results["grids"])
        return
    rows = results["rows"]
    scales = list(dict.fromkeys(row["guidance"] for row in rows))
    heading([""], [f"guidance {scale:g}" for scale in scales])
    least = {scale: min(row[key] for row in rows if row["guidance"] == scale) for scale in scales}
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = list[str]()
        for row in (row for row in rows if row["way"] == way):
            text = f"{row[key]:{WAYS_ASKED[key]}}"
            cells.append(f"**{text}**" if key != "labels" and row[key] == least[row["guidance"]] else text)
        print(f"| {way} | {' | '.join(cells)} |")


def _reflected_grids(rows: Sequence[Row]) -> None:
    """Print the distance and the share of pixels outside on each grid."""
    columns = list(dict.fromkeys((row["guidance"], row["nfe"]) for row in rows))
    heading(["grid"], [f"guidance {scale:g}, {nfe} evaluations" for scale, nfe in columns])
    for grid in dict.fromkeys(row["grid"] for row in rows):
        found = {(row["guidance"], row["nfe"]): row for row in rows if row["grid"] == grid}
        print(f"| `{grid}` | " + " | ".join(f"{found[at]['fd']:.2f}, {found[at]['outside']:.1%}" for at in columns) + " |")


TABLES: dict[str, Table] = {
    "student": _student,
    "students": lambda results, args: students(results),
    "every-student": lambda results, args: every_student(results, args.nfe or STUDENTS),
    "guided": lambda results, args: guided(results),
    "passes": lambda results, args: falling(results[0]["rows"]),
    "dsno-study": lambda results, args: dsno_study(results[0]["rows"], args.part),
    "student-study": lambda results, args: student_study(results[0]["rows"], args.part),
    "matching-study": lambda results, args: matching_study(results[0]["rows"], args.part),
    "reflected-study": lambda results, args: reflected_study(results[0], args.part),
}
