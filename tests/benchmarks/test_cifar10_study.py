"""The study's commands are commands of this version, its tables say what rows say, and artifacts end where the teacher's solvers look."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from benchmarks.cifar10.features import PRESETS as FEATURES
from benchmarks.cifar10.study import PRESETS, TWO, Stage, keep_grids, keep_samplers, main, run, stages, typed
from benchmarks.cifar10.tables import PAGE, claims, filled, plot, tables

from fewstep.apps.cli import app
from fewstep.apps.commands.train import FLAGS
from fewstep.runtime.artifact import read_json


def planned(name: str) -> list[Stage]:
    return list(stages(PRESETS[name], Path("shared"), Path("work"), Path("docs")))


@pytest.mark.parametrize("name", PRESETS)
def test_every_command_is_one_of_this_version(name: str) -> None:
    group = typer.main.get_command(app)
    commands = [typed(stage.command) for stage in planned(name)]
    for words in commands:
        if "fewstep" in words:
            verb, *options = words[words.index("fewstep") + 1 :]
            command = group.commands[verb]
            assert command.make_context(verb, options, resilient_parsing=False)
        else:
            assert (Path(__file__).parents[2] / (words[2].replace(".", "/") + ".py")).is_file()
    assert sum("train" in words for words in commands) == 1
    assert PRESETS[name].features in FEATURES and FEATURES[PRESETS[name].features].size == PRESETS[name].size


def test_a_gpu_needs_no_other_code_and_stages_have_one_name_each() -> None:
    assert FLAGS["kind"].default == "edm"
    for name in PRESETS:
        names = [stage.name for stage in planned(name)]
        assert len(set(names)) == len(names)
    assert [stage.name for stage in planned("cpu")][:7] == [stage.name for stage in planned("gpu")][:7]


def test_a_stage_notes_its_time_whole_or_killed(tmp_path: Path) -> None:
    log, fails = tmp_path / "stages.json", Stage("one", [sys.executable, "-c", "raise SystemExit(3)"])
    for _ in range(2):
        with pytest.raises(Exception, match="status 3"):
            run(fails, log)
    killed = read_json(log)["one"]
    assert killed["whole"] is False and killed["command"] == "python -c 'raise SystemExit(3)'"
    run(replace(fails, command=[sys.executable, "-c", "pass"]), log)
    assert read_json(log)["one"]["whole"] and read_json(log)["one"]["seconds"] > killed["seconds"]


def test_an_unknown_stage_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study", "--preset", "cpu", "--until", "nothing"])
    with pytest.raises(SystemExit):
        main()
    assert "no stage 'nothing': there are data, teacher, features" in capsys.readouterr().err


@pytest.mark.parametrize(("preset", "folder"), [("cpu", "docs"), ("smoke", "runs/cifar10")])
def test_a_study_not_to_be_kept_leaves_the_page_alone(
    preset: str, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study", "--preset", preset, "--list"])
    main()
    assert capsys.readouterr().out.rstrip().endswith(f"--docs {folder}")


def test_artifacts_are_copied_where_they_are_looked_for(tmp_path: Path) -> None:
    for file in (
        "optimized/ddim/grids.json",
        "optimized/ddim/nfe-05/sampler.json",
        "optimized/ddim/schedules.png",
        "optimized/scratch/gram.pt",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    (tmp_path / "fitted" / "nfe-05").mkdir(parents=True)
    (tmp_path / "fitted" / "nfe-05" / "sampler.json").write_text("x")
    keep_grids(tmp_path / "optimized", tmp_path / "model" / "optimized")
    keep_samplers(tmp_path / "fitted", tmp_path / "model" / "fitted")
    found = sorted(str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*") if path.is_file())
    assert found == ["fitted/nfe-05/sampler.json", "optimized/ddim/grids.json"]


# -- tables ---------------------------------------------------------------------------------------------------------------------------


def row(solver: str, grid: str, nfe: int, rmse: float | None, **more: Any) -> dict[str, Any]:
    return {"library": "fewstep", "solver": solver, "grid": grid, "nfe": nfe, "rmse": rmse, "fd": 1.5, **more}


ROWS = [
    row("ddim", "karras", 5, 0.4),
    row("ddim", "angle", 5, 0.3),
    row("unipc-2", "karras", 5, 0.2),
    row("unipc-2", "angle", 5, 0.25),
    row("dpm-solver-v3", "angle", 5, 0.1),
    row("dpm-solver-v3", "karras", 5, None, failed="it broke"),
    row("ddim", "optimized", 5, 0.15),
    row("unipc-2", "optimized", 5, 0.12),
    row("fitted", "optimized", 5, 0.05),
    {**row("unipc-2", "karras", 5, 0.2), "library": "diffusers"},
]


def test_tables_are_filled_from_rows(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10-0"
    (folder / "standard").mkdir(parents=True)
    (folder / "standard" / "results.json").write_text(json.dumps({"rows": ROWS}))
    names = ("by-solver", "v3", "diffusers", "optimized", "fitted", "guidance-2")
    text = filled("# LABEL\n" + "".join(f"\n## {name}\n\nTABLE {name}\n" for name in names), folder)
    assert text.startswith("# cifar10-0\n")
    parts = {part.split("\n")[0]: part for part in text.split("\n## ")[1:]}
    assert "| `ddim` | 0.3000 (1.50) `angle` |" in parts["by-solver"]
    assert "| `dpm-solver-v3` | **0.1000 (1.50) `angle`** |" in parts["by-solver"]
    assert "| `angle` | 0.1000 : 0.2500 = **0.40** |" in parts["v3"] and "`karras` |  |" in parts["v3"]
    assert "0.2000 (1.50) `karras`" in parts["diffusers"]
    assert "| | ratio | **0.50** |" in parts["optimized"] and "| ratio | 0.50 |" in parts["fitted"]
    assert "was not run" in parts["guidance-2"]


def test_pooling_says_what_each_cost(tmp_path: Path) -> None:
    name = "dpm-solver-v3:statistics=runs/cifar10-0-statistics-30-64-scalar"
    (tmp_path / "pooling").mkdir()
    (tmp_path / "pooling" / "results.json").write_text(json.dumps({"rows": [row(name, "angle", 5, 0.25)]}))
    (tmp_path / "stages.json").write_text(json.dumps({"statistics 30, 64, scalar": {"seconds": 90}}))
    assert filled("TABLE pooling", tmp_path).endswith("| 30 | 64 | scalar | 1.5 | 0.2500 (1.50) |")


def test_claims_are_ratios_of_the_least_errors() -> None:
    more = [row(TWO, "angle", 5, 0.08), row("unipc-2", "angle", 8, 0.04, fd=1.2), row("ddim", "angle", 8, 0.06, fd=1.0)]
    found = claims([*(one for one in ROWS if one["rmse"] is not None), *more])
    assert found["DPM-Solver-v3 : best of DPM-Solver++ 2M, 3M, UniPC-2, UniPC-3"] == "0.50"
    assert found["DPM-Solver-v3-2p : best of all others here"] == "0.40"
    assert found["best pair here : best of diffusers', on the same grids"] == "1.00"
    assert found["UniPC-2 on its optimised grid : on its best standard grid"] == "0.60"
    assert found["DPM-Solver-v3 on its optimised grid : on its best standard grid"] == ""
    assert found["fitted : best pair of a solver and a standard grid"] == "0.62"
    assert found["evaluations that pair needs for no more error"] == "8"
    assert found["Frechet distance, fitted at 5 : that of the best such pair at 8"] == "1.25"
    assert found["Frechet distance, fitted at 5 : least of any such pair at 8"] == "1.50"


def test_a_plot_has_each_solver_and_what_was_made_for_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr("benchmarks.cifar10.tables.work_precision", lambda series, floor: drawn.update(series, floor=floor))
    monkeypatch.setattr("benchmarks.cifar10.tables.png", lambda figure: b"picture")
    plot([one for one in ROWS if one["rmse"] is not None], "rmse", tmp_path / "plot.png", 0.01)
    assert (tmp_path / "plot.png").read_bytes() == b"picture"
    assert list(drawn) == ["fitted", "dpm-solver-v3", "unipc-2, own", "unipc-2", "ddim", "floor"]
    assert drawn["ddim"] == [(5, 0.3, None)] and drawn["floor"] == 0.01


def test_every_table_of_the_page_is_known(tmp_path: Path) -> None:
    wanted = re.findall(r"^TABLE ([\w-]+)$", PAGE.read_text(), re.MULTILINE)
    assert sorted(wanted) == sorted(tables(tmp_path))
    assert filled(PAGE.read_text(), tmp_path / "nothing").count("was not run") == len(wanted)
