"""The tables of `benchmarks.tables` that no page has."""

import json
from pathlib import Path
from typing import Any

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


def of_others(network: str) -> dict[str, Any]:
    """Rows on a foreign network: one pair by hand with statistics, one without, one own grid, and two seeds of a fit."""

    def line(kind: str, solver: str, grid: str | None, rmse: float, **more: object) -> dict[str, Any]:
        figures = {"rmse": rmse, "mean_error": rmse / 2, "p99": 3 * rmse, "parted": 0.01}
        return {"kind": kind, "solver": solver, "grid": grid, "nfe": 5, **figures, **more}

    rows = [line("by hand", "dpm-solver-v3", "karras", 0.1), line("by hand", "unipc-2", "karras", 0.2)]
    rows += [line("by hand", "unipc-2", "uniform", 0.4), line("optimised grid", "unipc-2", None, 0.08)]
    rows += [line("fitted", "fitted", None, rmse, seed=seed) for seed, rmse in ((1, 0.02), (2, 0.04))]
    verdicts = [{"nfe": 5, "by": by, "verdict": word} for by, word in (("rmse", "better"), ("rmse", "better"), ("mean_error", "equal"))]
    return {"network": network, "num": 64, "rows": rows, "verdicts": verdicts, "screen": {"num": 16, "rows": rows[:3]}}


def test_fitted_samplers_on_networks_of_others_are_a_mean_over_seeds(tmp_path: Path) -> None:
    (tmp_path / "one").write_text(json.dumps(of_others("far-16")))
    assert printed(["foreign", str(tmp_path / "one")]).splitlines() == [
        "| far-16, 64 noises | 5 |",
        "|---|---|",
        "| fitted | **0.0300 ± 0.0141** |",
        "| optimised grid | 0.0800 `unipc-2` `own` |",
        "| fitted, times that | 0.38 ± 0.18 |",
        "| by hand | 0.1000 `dpm-solver-v3` `karras` |",
        "| fitted, times that | 0.30 ± 0.14 |",
        "| by hand, without statistics | 0.2000 `unipc-2` `karras` |",
        "| fitted, times that | 0.15 ± 0.07 |",
    ]
    assert "| fitted | 0.0150 ± 0.0071 |" in printed(["foreign", str(tmp_path / "one"), "--part", "mean_error"])
    tails = printed(["foreign", str(tmp_path / "one"), "--part", "p99"])
    assert "| by hand | 0.3000 `dpm-solver-v3` `karras` |" in tails and "times that" not in tails


def test_what_transfers_is_told_by_ratios_to_the_least_error_on_each_network(tmp_path: Path) -> None:
    own = of("digits-edm", [row("unipc-2", 5, 0.1, "angle"), row("unipc-2", 5, 0.3, "karras"), row("unipc-2", 5, 0.5, "uniform")])
    several = {
        "rows": [
            {"model": name, "reference_std": 1.0, "nfe": 5, "solver": "unipc-2", "grid": grid, "rmse": rmse}
            for name, of_grids in (("kind", {"karras": 0.02, "uniform": 0.01}), ("without pictures", {"karras": 2.0, "uniform": 3.0}))
            for grid, rmse in of_grids.items()
        ]
    }
    for name, results in (("own", own), ("several", several), ("one", of_others("far-16"))):
        (tmp_path / name).write_text(json.dumps(results))
    words = [str(tmp_path / name) for name in ("own", "several", "one")]
    assert printed(["transfer", *words, "--nfe", "5", "--part", "best"]).splitlines() == [
        "| 5 evaluations | worst | mean | digits-edm | kind | far-16 |",
        "|---|---|---|---|---|---|",
        "| `unipc-2` `angle` | 1.00 | 1.00 | **1.00** |  |  |",
        "| `unipc-2` `karras` | 3.00 | 1.82 | 3.00 | 2.00 | **1.00** |",
        "| `unipc-2` `uniform` | 5.00 | 2.15 | 5.00 | **1.00** | 2.00 |",
    ]
    safe = printed(["transfer", *words, "--nfe", "5", "--part", "safe"]).splitlines()
    assert [line.split("|")[1].strip() for line in safe[2:]] == ["`unipc-2` `karras`", "`unipc-2` `uniform`", "`unipc-2`, default grid"]
    assert safe[-1] == "| `unipc-2`, default grid | 2.00 | 1.26 | **1.00** | **1.00** | 2.00 |"
    own["rows"] += [row("dpm-solver-v3", 5, rmse, grid) for rmse, grid in ((0.05, "angle"), (0.1, "karras"))]
    (tmp_path / "own").write_text(json.dumps(own))
    with_statistics = printed(["transfer", *words, "--nfe", "5", "--part", "safe", "--solver", "dpm-solver-v3"]).splitlines()
    assert with_statistics[2:] == [
        "| `dpm-solver-v3` `karras` | 2.00 | 1.41 | 2.00 | **1.00** |",
    ]
