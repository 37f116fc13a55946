"""The tables of benchmarks/tables.py that no page has."""

import json
from pathlib import Path

import pytest
from benchmarks.tables import printed
from tests.evaluate.report.test_report import row
from tests.evaluate.report.test_report_students import of

from fewstep import FewstepError


def test_students_are_printed_beside_their_teacher_by_calls(tmp_path: Path) -> None:
    teacher = [row("a", 2, 0.2), row("a", 2, 0.3, "karras"), row("a", 5, 0.05, fd=None), row("fitted", 4, 0.02, "optimized", fd=0.25)]
    made = {
        "teacher": of("teacher", teacher, guidance=2.0),
        "told": of("told", [row("fitted", 4, 0.03, "optimized", calls=4), row("a", 7, 0.01, calls=7)], teacher="teacher", guidance=2.0),
        "jumps": of("jumps", [row("ddim", 1, 0.1), row("ddim", 4, 0.04)], teacher="teacher", told=2.0),
    }
    for name, results in made.items():
        (tmp_path / name).write_text(json.dumps(results))
    assert printed(["students", *(str(tmp_path / name) for name in made)]).splitlines() == [
        "| network calls | 1 | 4 | 8 | 10 |",
        "|---|---|---|---|---|",
        "| `told` |  | **0.0300 (0.50)** |  |  |",
        "| `jumps` | **0.1000 (0.50)** | 0.0400 (0.50) |  |  |",
        "| `teacher`, guidance 2, prepared |  |  | **0.0200 (0.25)** |  |",
        "| `teacher`, guidance 2, by hand |  | 0.2000 (0.50) |  | **0.0500** |",
    ]
    with pytest.raises(FewstepError, match="none of these files is of a student"):
        printed(["students", str(tmp_path / "teacher")])
