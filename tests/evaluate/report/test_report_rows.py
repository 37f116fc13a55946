"""What the report says of rows is true of them: one row, one sampler, ties, intervals, and what others need to be as good."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.evaluate.report.test_report import results, row

from fewstep.evaluate.report.findings import Format, Name, Number, ResultsFolder, RowGroup, summary


def said(rows: Sequence[dict[str, Any]]) -> list[str]:
    group = RowGroup([ResultsFolder(Path(), "run", results(rows))])
    return ["".join(map(shown, sentence)) for sentence in summary(group, Format(rows))]


def shown(part: str | Number | Name) -> str:
    return part if isinstance(part, str) else part.shown if isinstance(part, Number) else part.text


def test_the_first_sentence_says_what_saves_most() -> None:
    rows = [row("a", 5, 0.1), row("b", 5, 0.2), row("b", 9, 0.1), row("c", 9, 0.3), row("a", 9, 0.01)]
    assert (
        said(rows)[0]
        == "With 5 evaluations, a on angle has the least error, 0.1000; the first of the others to equal it is b on angle, with 9."
    )


def test_one_row_one_solver_and_ties() -> None:
    assert said([row("a", 1, 0.1)])[0] == "With 1 evaluation, a on angle has the least error, 0.1000."
    assert said([row("a", 5, 0.2), row("a", 6, 0.1)])[0] == "With 5 evaluations, a on angle has the least error, 0.2000."
    assert said([row("a", 5, 0.1), row("b", 5, 0.2)])[0].endswith("0.1000; no other sampler here equals it.")
    tie = said([row("a", 5, 0.1), row("b", 5, 0.1), row("a", 5, 0.1, library="diffusers"), row("c", 5, 0.1), row("d", 5, 0.3)])[0]
    assert (
        tie
        == "With 5 evaluations, a on angle, b on angle, c on angle and more have the least error, 0.1000; no other sampler here equals it."
    )
    rounding = said([row("a", 5, 0.100001), row("a", 5, 0.1, library="diffusers")])[0]
    assert rounding == "With 5 evaluations, a on angle and a (diffusers) on angle have the least error, 0.1000."


def test_a_sampler_that_gets_worse_with_more_evaluations_is_not_said_to_save() -> None:
    assert said([row("a", 5, 0.1), row("b", 8, 0.2), row("a", 8, 0.3)])[0].startswith("With 5 evaluations, a")


def test_what_is_made_for_a_model_and_what_is_not_certain_are_said() -> None:
    rows = [row("fitted", 5, 0.1, "optimized", rmse_ci=[0.08, 0.12]), row("a", 5, 0.11, rmse_ci=[0.1, 0.13]), row("b", 5, 0.2)]
    sentences = said(rows)
    assert sentences[0].startswith("With 5 evaluations, fitted has the least error")
    assert "That order is not certain: with other noises a on angle may be as good." in sentences
    assert "With nothing made for this model beforehand, a on angle is best: 0.1100." in sentences
    assert not any("certain" in one or "beforehand" in one for one in said([row("a", 5, 0.1), row("b", 5, 0.2)]))


def test_evaluations_to_equal_quality() -> None:
    rows = [row("a", 5, 0.1), row("a", 8, 0.05), row("b", 5, 0.3), row("b", 5, 0.2, "karras"), row("b", 8, 0.1), row("c", 6, 0.5)]
    group = RowGroup([ResultsFolder(Path(), "run", results(rows))])
    goals = [group.winners(nfe)[0] for nfe in (5, 6, 8)]
    table = {name: [group.needs(("fewstep", name), goal) for goal in goals] for name in "abc"}
    assert [(need.nfe, need.more, need.best) for need in table["a"]] == [(5, False, True), (5, False, False), (8, False, True)]
    assert [(need.nfe, need.more, need.best) for need in table["b"]] == [(8, False, False), (5, False, False), (8, True, False)]
    assert [(need.nfe, need.more, need.best) for need in table["c"]] == [(6, True, False), (6, False, True), (6, True, False)]
