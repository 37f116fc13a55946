"""The benchmark: paired noises, a reference that is much better than its rows, resumed rows, honest gaps."""

import json
from pathlib import Path

import pytest
import torch

from fewstep import ArtifactError, Model, SolverError, load_model
from fewstep.core.statistics import ModelStatistics
from fewstep.evaluate.benchmark import BenchmarkConfig, benchmark, picture_file

COLUMNS = {"solver", "library", "grid", "nfe", "num", "guidance", "rmse", "fd", "fd_features", "seconds", "solver_seconds", "statistics"}
SMALL = {"num": 16, "batch": 8}


def test_rows_are_complete_resumed_and_plausible(tmp_path: Path) -> None:
    model = load_model("digits-edm")
    config = BenchmarkConfig(("ddim", "unipc-2"), ("angle",), (5, 10), **SMALL)
    results = benchmark(model, config, tmp_path, command="fewstep bench")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert {"version", "command", "model", "machine", "rows"} <= set(results) and all(set(row) == COLUMNS for row in results["rows"])
    error = {(row["solver"], row["nfe"]): row["rmse"] for row in results["rows"]}
    assert error["unipc-2", 10] < error["unipc-2", 5] < error["ddim", 5]
    assert results["reference"]["error"] < 0.1 * min(error.values())
    assert all(0 <= row["solver_seconds"] < row["seconds"] and row["fd_features"] == "digits" for row in results["rows"])
    wider = BenchmarkConfig(("ddim", "unipc-2", "deis-3"), ("angle",), (5, 10), **SMALL)
    again = benchmark(model, wider, tmp_path, command="fewstep bench")
    assert again["rows"][:4] == results["rows"] and len(again["rows"]) == 6  # the old rows were not run again: same seconds


def test_a_damaged_reference_is_named(tmp_path: Path) -> None:
    model, config = load_model("digits-edm"), BenchmarkConfig(("ddim",), ("angle",), (5,), **SMALL)
    benchmark(model, config, tmp_path, command="")
    reference = tmp_path / "reference.safetensors"
    reference.write_bytes(reference.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="is damaged"):
        benchmark(model, config, tmp_path, command="")


def test_peers_equal_ours_and_impossible_rows_are_said(tmp_path: Path) -> None:
    config = BenchmarkConfig(("ddim", "heun"), ("angle",), (5,), peers=("diffusers",), **SMALL)
    results = benchmark(load_model("digits-edm"), config, tmp_path, command="fewstep bench")
    rmse = {(row["library"], row["solver"]): row["rmse"] for row in results["rows"]}
    assert rmse["diffusers", "ddim"] == pytest.approx(rmse["fewstep", "ddim"], rel=1e-4)  # float32 tables of theirs
    assert ("fewstep", "heun") not in rmse and any("2 evaluations a step" in skipped["why"] for skipped in results["skipped"])


def test_guidance_changes_the_problem_so_rows_are_not_mixed(tmp_path: Path) -> None:
    model = load_model("digits-edm")
    plain = benchmark(model, BenchmarkConfig(("ddim",), ("angle",), (5,), **SMALL), tmp_path, command="")
    guided = benchmark(model, BenchmarkConfig(("ddim",), ("angle",), (5,), guidance=2.0, **SMALL), tmp_path, command="")
    assert len(guided["rows"]) == 1 and guided["rows"][0]["rmse"] != plain["rows"][0]["rmse"]


def linear_part(model: Model, l: float, folder: Path) -> tuple[Path, str]:
    """Saved statistics of a model with this ``l``, ``s = b = 0``, and their fingerprint."""
    schedule = model.denoiser.schedule
    ends = schedule.lam(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    lam = torch.linspace(float(ends[0]), float(ends[1]), 5, dtype=torch.float64)
    values = torch.full((5, 1, 1, 1), l)
    statistics = ModelStatistics(lam, values, 0 * values, 0 * values, model.shape, schedule, model.fingerprint)
    return statistics.save(folder), statistics.fingerprint


def test_other_statistics_run_their_own_rows_again_and_no_others(tmp_path: Path) -> None:
    model, out = load_model("digits-edm"), tmp_path / "out"
    (one, first), (two, second) = (linear_part(model, l, tmp_path / str(l)) for l in (1.0, 0.9))
    v3 = "dpm-solver-v3"

    def rows(statistics: Path) -> dict[str, dict]:
        config = BenchmarkConfig(("ddim", v3, f"{v3}:steps=3"), ("angle",), (5,), num=2, statistics=statistics)
        return {row["solver"]: row for row in benchmark(model, config, out, command="")["rows"]}

    before, again, other = rows(one), rows(one), rows(two)
    assert first != second and again == before  # not run again: the same seconds
    assert other["ddim"] == before["ddim"] and before["ddim"]["statistics"] is None
    for solver in (v3, f"{v3}:steps=3"):
        assert (before[solver]["statistics"], other[solver]["statistics"]) == (first, second)
        assert other[solver]["rmse"] != before[solver]["rmse"]


def test_a_path_in_a_solvers_name_stays_out_of_the_names_of_files(tmp_path: Path) -> None:
    names = ("dpm-solver-v3:statistics=../../made", "dpm-solver-v3:steps=3:statistics=../../made", "dpm-solver-v3:statistics=/made")
    files = {picture_file(tmp_path, ("fewstep", name, "angle", 5)).resolve() for name in names}
    assert len(files) == 3 and {file.parent for file in files} == {(tmp_path / "samples").resolve()}


def test_a_benchmark_without_any_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SolverError, match="use 4 or 6"):
        benchmark(load_model("digits-edm"), BenchmarkConfig(("heun",), ("angle",), (5,), **SMALL), tmp_path, command="")
