"""The study of foreign networks, whole, on a network with numbers of our own."""

import json
from pathlib import Path

import pytest
from benchmarks.foreign_networks import read
from benchmarks.foreign_study import main
from tests.benchmarks.test_foreign_networks import arrays, write

import fewstep
from benchmarks import foreign_study
from fewstep.evaluate.rows import picture_file
from fewstep.learn.samplers.calibrate import CalibrationConfig
from fewstep.learn.samplers.optimize_plan import OptimizeConfig


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of 6x6 pixels that answers a small score, few solvers, and learners of few noises."""
    values = arrays()
    values[2] *= 0.01  # the convolution that makes pixels
    write(tmp_path / "one.eqx", values)
    monkeypatch.setattr(foreign_study, "load", lambda name: read(tmp_path / "one.eqx", name))
    monkeypatch.setattr(foreign_study, "SOLVERS", "ddim,unipc-2,dpm-solver-v3:steps=2:predictor=true,dpm-solver-v3")
    monkeypatch.setattr(foreign_study, "GRIDS", "karras,angle")
    monkeypatch.setattr(foreign_study, "SCREEN", 4)
    monkeypatch.setattr(foreign_study, "COUNTS", (3, 4))
    monkeypatch.setattr(foreign_study, "SEEDS", (4_000_000, 5_000_000))
    monkeypatch.setattr(foreign_study, "FIT", fewstep.FitConfig(num=16, held_out=8, levels=8, iterations=0, first=True))
    monkeypatch.setattr(foreign_study, "OPTIMIZE", OptimizeConfig(budget=600))
    monkeypatch.setattr(foreign_study, "CALIBRATION", CalibrationConfig(levels=6, num=4))


def run(tmp_path: Path, *words: str) -> dict:
    main(["--network", "hsc-32", "--num", "8", "--nfe", "3", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *words])
    path = tmp_path / "out" / "hsc-32.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.slow
@pytest.mark.usefixtures("small", "short_reference")
@pytest.mark.filterwarnings("ignore")
def test_the_study_measures_every_kind_and_goes_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--plan") == {} and "pairs on 4 noises" in capsys.readouterr().out
    made = run(tmp_path)
    kinds = [row["kind"] for row in made["rows"]]
    assert kinds.count("fitted") == 2 and kinds.count("optimised grid") == 3 and kinds.count("by hand") >= 1
    assert len(made["screen"]["rows"]) == 8 and made["screen"]["num"] == 4
    least = {by: min(row[by] for row in made["screen"]["rows"]) for by in ("rmse", "mean_error")}
    near = {
        (row["solver"], row["grid"])
        for row in made["screen"]["rows"]
        if row["rmse"] <= 1.5 * least["rmse"] or row["mean_error"] <= 1.5 * least["mean_error"]
    }
    assert {(row["solver"], row["grid"]) for row in made["rows"] if row["kind"] == "by hand"} == near
    for row in made["rows"]:
        assert row["mean_error"] <= row["rmse"] and row["error_median"] <= row["p99"] and 0 <= row["parted"] <= 1
    for verdict in made["verdicts"]:
        best = min(row[verdict["by"]] for row in made["rows"] if row["kind"] == "by hand")
        ours = next(row for row in made["rows"] if row.get("seed") == verdict["seed"])
        assert verdict["by_hand"] == pytest.approx(best) and verdict["fitted"] == pytest.approx(ours[verdict["by"]])
        assert verdict["ratio"] == pytest.approx(ours[verdict["by"]] / best)
    assert len(made["verdicts"]) == 4

    lost = picture_file(tmp_path / "work" / "hsc-32" / "rows", ("fewstep", "fitted", str(tmp_path / "work/hsc-32/fitted-5000000"), 3))
    lost.unlink()  # as if the run had been killed before that row
    capsys.readouterr()
    again = run(tmp_path)
    ran = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" 3")]  # evaluations
    assert len(ran) == 1 and "fitted-5000000" in ran[0]
    assert sorted(map(json.dumps, again["rows"])) == sorted(map(json.dumps, made["rows"]))


def test_numbers_of_evaluations_that_no_sampler_is_made_for_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--nfe", "7"])
    assert "samplers are made for 3, 4, 5, 6, 8, 10 evaluations, not 7" in capsys.readouterr().err
