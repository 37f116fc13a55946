"""Students beside their teacher: which files belong together, what calls cost, who is best up to how many, and what the page shows."""

from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.report.test_report import Page, check_numbers, put, results, row
from tests.evaluate.report.test_report_rows import shown

from fewstep.evaluate.report.findings import ResultsFolder, network_calls
from fewstep.evaluate.report.students import ARITHMETIC, CALLS, Family, families, family_table, payoff
from fewstep.evaluate.report.table import html_table, plain_table
from fewstep.evaluate.report.write import write_report

CI = {"rmse_ci": [0.0, 1.0]}
LESS = "student has less error than the samplers of its teacher"
SIDES = "student and the samplers of its teacher"
BOTH = "a on angle and b on angle"


def of(
    model: str, rows: list[dict[str, Any]], *, teacher: str | None = None, guidance: float = 1.0, told: float | None = None, **problem: Any
) -> dict[str, Any]:
    """The results of a model whose fingerprint is its name; ``told`` is the scale of the reference, which older files do not say."""
    known = {"fingerprint": model, "seed": 0, "num": 64, "guidance": guidance, "batch": 64, "reference": {"solver": "unipc-3", "nfe": 128}}
    reference: dict[str, Any] = {"solver": "unipc-3", "nfe": 128, "error": 1e-4, "fd": 0.12, "fd_data_halves": 0.8}
    if teacher is not None:
        known["reference"] |= {"teacher": teacher}
        reference["teacher"] = teacher
    if told is not None:
        reference["guidance"] = told
    return results([{**one, "guidance": guidance} for one in rows], model=model, problem={**known, **problem}, reference=reference)


def family_of(*made: dict[str, Any]) -> Family:
    (family,) = families([ResultsFolder(Path(f"run-{number}"), f"run-{number}", one) for number, one in enumerate(made)])
    return family


def said(family: Family, which: int = 0, *, arithmetic: bool = False) -> str:
    return "".join(map(shown, payoff(family, family.lines[which], ARITHMETIC if arithmetic else CALLS)))


TEACHER = of("teacher", [row("a", 1, 0.9), row("a", 2, 0.5), row("a", 4, 0.1), row("b", 8, 0.05)])


def student(errors: dict[int, float], model: str = "student", **more: Any) -> dict[str, Any]:
    return of(model, [row("jump", nfe, error, **more) for nfe, error in errors.items()], teacher="teacher")


def test_calls_of_rows_new_and_old() -> None:
    assert network_calls(row("a", 5, 0.1, calls=10), student=False) == 10
    assert network_calls(row("a", 5, 0.1, calls=5, guidance=2.0), student=True) == 5  # a student that is told its scale
    assert network_calls(row("a", 5, 0.1), student=False) == 5
    assert network_calls(row("a", 5, 0.1, guidance=2.0), student=False) == 10
    assert network_calls(row("a", 5, 0.1, guidance=2.0, calls=None), student=True) == 5


@pytest.mark.parametrize(
    ("change", "related"),
    [
        ({}, True),
        ({"seed": 7}, False),
        ({"num": 32}, False),
        ({"teacher": "another"}, False),
        ({"told": 2.0}, False),
        ({"told": 1.0}, True),
    ],
    ids=str,
)
def test_a_student_belongs_to_a_teacher_of_the_same_trajectories(change: dict[str, Any], related: bool) -> None:
    one = of("student", [row("jump", 1, 0.2)], **{"teacher": "teacher", **change})
    found = families([ResultsFolder.of(TEACHER), ResultsFolder.of(one)])
    assert bool(found) is related
    assert families([ResultsFolder.of(TEACHER)]) == families([ResultsFolder.of(one)]) == []


def test_a_student_of_one_scale_belongs_to_its_teacher_at_that_scale() -> None:
    guided = of("teacher", [row("a", 2, 0.5), row("a", 4, 0.1)], guidance=2.0)
    family = family_of(guided, of("student", [row("jump", 1, 0.3), row("jump", 4, 0.2)], teacher="teacher", told=2.0))
    assert [[one.calls for one in line.rows] for line in family.lines] == [[1, 4], [4, 8]]
    assert said(family) == (
        "Up to 4 calls, student has less error than the samplers of its teacher; from 8 calls on, a on angle has less; "
        "with less than 4 calls no sampler of its teacher was tried."
    )
    silent = of("student", [row("jump", 1, 0.3)], teacher="teacher")
    silent["reference"]["error"] = 1.3e-4  # another reference than that of the teacher without guidance
    assert families([ResultsFolder.of(guided), ResultsFolder.of(TEACHER), ResultsFolder.of(silent)]) == []


def test_unknown_noises_and_failed_rows_make_no_family() -> None:
    unknown = [of("teacher", [row("a", 1, 0.9)], seed=None), of("student", [row("jump", 1, 0.2)], teacher="teacher", seed=None)]
    assert families([ResultsFolder.of(one) for one in unknown]) == []
    failed = of("student", [row("jump", 1, None, failed="no memory")], teacher="teacher")
    assert families([ResultsFolder.of(TEACHER), ResultsFolder.of(failed)]) == []


def test_lines_are_students_then_what_is_prepared_and_what_is_not() -> None:
    rows = [row("fitted", 4, 0.02, "optimized"), row("v3", 4, 0.03, statistics="s"), row("a", 4, 0.2), row("a", 4, 0.1, "karras")]
    family = family_of(of("teacher", rows), student({1: 0.2, 4: 0.05}), student({1: 0.1}, "second"))
    assert [line.name for line in family.lines] == ["student", "second", "teacher, prepared", "teacher, by hand"]
    cells = [[None if cell.priced is None else (cell.priced.row["rmse"], cell.best) for cell in cells] for _, cells in family_table(family)]
    assert cells == [[(0.2, False), (0.05, False)], [(0.1, True), None], [None, (0.02, True)], [None, (0.1, False)]]
    twins = [student({1: 0.2}, "student"), {**student({1: 0.3}, "other"), "model": "student"}]
    assert [line.name for line in family_of(TEACHER, *twins).lines][:2] == ["student (run-1)", "student (run-2)"]


@pytest.mark.parametrize(
    ("errors", "sentence"),
    [
        ({1: 0.3, 2: 0.2}, f"Up to 2 calls, {LESS}; from 4 calls on, {BOTH} have less."),
        ({1: 0.04}, f"Up to 8 calls, the most that were tried, {LESS}."),
        ({2: 0.6}, f"From 2 calls on, {BOTH} have less error than student."),
        ({1: 0.3, 4: 0.1}, f"Up to 2 calls, {LESS}; from 8 calls on, b on angle has less; between, the difference may be chance."),
        ({1: 0.3, 4: 0.2, 8: 0.01, 9: 0.01}, f"Up to 2 calls, {LESS}; with more, now one has less and now the other."),
        ({1: 0.3, 4: 0.1, 8: 0.05}, f"Up to 2 calls, {LESS}; with more, the difference may be chance."),
        ({2: 0.5}, f"From 4 calls on, {BOTH} have less error than student; with less, the difference may be chance."),
        ({1: 0.9, 2: 0.5, 4: 0.1, 8: 0.05}, f"The difference between {SIDES} may be chance."),
        ({1: 0.95, 2: 0.4, 4: 0.2, 8: 0.05}, f"Now one has less error and now the other of {SIDES}."),
    ],
    ids=str,
)
def test_the_sentence_says_up_to_what_a_student_pays(errors: dict[int, float], sentence: str) -> None:
    assert said(family_of(TEACHER, student(errors))) == sentence


def test_intervals_that_overlap_decide_nothing() -> None:
    vague = of("teacher", [row("a", 1, 0.9, **CI), row("a", 2, 0.5, **CI)])
    assert said(family_of(vague, student({1: 0.3}, **CI))) == f"The difference between {SIDES} may be chance."


def test_arithmetic_is_counted_too() -> None:
    made = student({1: 0.3, 2: 0.2})
    made["rows"] = [{**one, "arithmetic": 1.5 * one["nfe"]} for one in made["rows"]]
    family = family_of(TEACHER, made)
    assert said(family, arithmetic=True) == (
        "By arithmetic: up to that of 3 calls, student has less error than the samplers of its teacher; "
        "from that of 4 calls on, a on angle and b on angle have less."
    )
    assert family.lines[0].has_arithmetic and not family.lines[1].has_arithmetic


def test_distances_of_other_features_or_data_are_left_out() -> None:
    made = family_of(TEACHER, student({1: 0.3}, fd_features="pixels", fd=77.5))
    other = family_of(TEACHER, of("student", [row("jump", 1, 0.3)], teacher="teacher", data={"name": "mine"}))
    same = family_of(TEACHER, student({1: 0.3}))
    assert [one.lines[0].rows[0].row["fd"] for one in (made, other, same)] == [None, None, 0.5]


@pytest.mark.slow
def test_the_page_has_plots_sentences_and_a_table(tmp_path: Path) -> None:
    guided = of("teacher", [row("a", 2, 0.5), row("fitted", 2, 0.3, "optimized"), row("a", 4, 0.1, rmse_ci=[0.05, 0.2])], guidance=2.0)
    one = of("student", [row("jump", 1, 0.3, arithmetic=1.25), row("jump", 2, 0.2, arithmetic=2.5)], teacher="teacher", told=2.0)
    folders = [put(tmp_path / name, made, None) for name, made in (("one", guided), ("two", one))]
    page = Page(write_report(folders, tmp_path / "out"))
    check_numbers(page, guided, one)
    assert "Students and their teacher, by network calls" in page.text and "By arithmetic: up to that of" in page.text
    assert {"1.25", "2.5"} <= {value for value, _, _ in page.values}
    drawn = {path.name for path in (tmp_path / "out" / "plots").glob("s0-students.*.svg")}
    assert drawn == {f"s0-students.{kind}.svg" for kind in ("error", "distance", "arithmetic")}
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert "s0-students" in ids and len(ids) == sum("id" in attrs for _, attrs in page.tags)
    alone = Page(write_report(folders[:1], tmp_path / "alone"))
    assert "Students and their teacher" not in alone.text


def test_a_table_says_where_an_evaluation_is_two_calls() -> None:
    guided = of("teacher", [row("a", 2, 0.5, calls=4), row("a", 4, None, failed="no memory")], guidance=2.0)
    note = "at guidance 2 each evaluation is 2 calls of the network"
    assert note in plain_table(guided) and note in html_table(ResultsFolder.of(guided))
    for made in (TEACHER, of("student", [row("a", 2, 0.5, calls=2)], teacher="teacher", guidance=2.0, told=2.0)):
        assert "calls of the network" not in plain_table(made)
