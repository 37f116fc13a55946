"""The benchmark: paired noises, a reference that is much better than its rows, resumed rows, honest gaps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import SHORTER
from tests.evaluate.problems import LAW, tiny, tuned

from fewstep import ArtifactError, Model, ModelError, Sampler, SolverError, TimeGrid, load_model, sample
from fewstep.core.statistics import ModelStatistics
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.benchmark.run import benchmark
from fewstep.evaluate.rows import picture_file, read_samples
from fewstep.models.carried import OPTIMIZED
from fewstep.sampling.grid_table import GridTable
from fewstep.sampling.reference import REFERENCE_NFE, reference_sampler

COLUMNS = {"solver", "library", "grid", "nfe", "num", "guidance", "rmse", "fd", "fd_features", "seconds", "solver_seconds"}
COLUMNS |= {"statistics", "artifact", "arithmetic", "calls", "planned", "rmse_ci", "error_median", "error_mean"}
COLUMNS |= {"error_p95", "error_p99", "parted", "fd_ci", "kd", "kd_ci"}
COLUMNS |= {"precision", "recall", "labels", "peak_memory", "failed", "levels", "processes", "threads", "outside"}
SMALL = {"num": 8, "batch": 4}


@pytest.mark.full_reference
def test_rows_are_complete_resumed_and_plausible(tmp_path: Path) -> None:
    model = load_model("digits-edm")
    config = BenchmarkConfig(("ddim", "unipc-2"), ("angle",), (5, 10), num=4)
    results = benchmark(model, config, tmp_path, command="fewstep bench").results
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert {"version", "command", "model", "machine", "rows"} <= set(results) and all(set(row) == COLUMNS for row in results["rows"])
    error = {(row["solver"], row["nfe"]): row["rmse"] for row in results["rows"]}
    assert error["unipc-2", 10] < error["unipc-2", 5] < error["ddim", 5]
    assert results["reference"]["error"] < 0.1 * min(error.values())
    assert all(0 <= row["solver_seconds"] < row["seconds"] and row["fd_features"] == "digits" for row in results["rows"])
    wider = BenchmarkConfig(("ddim", "unipc-2", "deis-3"), ("angle",), (5, 10), num=4)
    again = benchmark(model, wider, tmp_path, command="fewstep bench").results
    assert again["rows"][:4] == results["rows"] and len(again["rows"]) == 6  # the old rows were not run again: same seconds


def test_a_damaged_reference_is_named(tmp_path: Path) -> None:
    model, config = tiny(tmp_path / "model"), BenchmarkConfig(("ddim",), ("angle",), (5,), **SMALL)
    benchmark(model, config, tmp_path)
    reference = tmp_path / "reference.safetensors"
    reference.write_bytes(reference.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="is damaged"):
        benchmark(model, config, tmp_path)


@pytest.mark.slow
def test_peers_equal_ours_and_impossible_rows_are_said(tmp_path: Path) -> None:
    config = BenchmarkConfig(("ddim", "heun"), ("angle",), (5,), peers=("diffusers",), **SMALL)
    results = benchmark(tiny(tmp_path / "model"), config, tmp_path, command="fewstep bench").results
    rmse = {(row["library"], row["solver"]): row["rmse"] for row in results["rows"]}
    assert rmse["diffusers", "ddim"] == pytest.approx(rmse["fewstep", "ddim"], rel=1e-4)  # float32 tables of theirs
    assert ("fewstep", "heun") not in rmse and any("2 evaluations a step" in skipped["why"] for skipped in results["skipped"])


def test_guidance_changes_the_problem_so_rows_are_not_mixed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(tmp_path / "model")
    plain = benchmark(model, BenchmarkConfig(("ddim",), ("angle",), (5,), **SMALL), tmp_path).results
    assert not caplog.messages
    guided = benchmark(model, BenchmarkConfig(("ddim",), ("angle",), (5,), guidance=2.0, **SMALL), tmp_path).results
    assert len(guided["rows"]) == 1 and guided["rows"][0]["rmse"] != plain["rows"][0]["rmse"]
    (aside,) = tmp_path.glob("results-*.json")  # nothing that was measured is lost
    assert json.loads(aside.read_text()) == plain
    assert caplog.messages == [f"{tmp_path / 'results.json'} was of another problem, version or machine; its rows are in {aside.name} now"]


def linear_part(model: Model, l: float, folder: Path) -> tuple[Path, str]:
    """Saved statistics of a model with this ``l``, ``s = b = 0``, and their fingerprint."""
    schedule = model.schedule
    ends = schedule.lam(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    lam = torch.linspace(float(ends[0]), float(ends[1]), 5, dtype=torch.float64)
    values = torch.full((5, 1, 1, 1), l)
    statistics = ModelStatistics(lam, values, 0 * values, 0 * values, model.shape, schedule, model.fingerprint)
    return statistics.save(folder), statistics.fingerprint


@pytest.mark.slow
def test_other_statistics_run_their_own_rows_again_and_no_others(tmp_path: Path) -> None:
    model, out = load_model("digits-edm"), tmp_path / "out"
    (one, first), (two, second) = (linear_part(model, l, tmp_path / str(l)) for l in (1.0, 0.9))
    v3 = "dpm-solver-v3"

    def rows(statistics: Path) -> dict[str, dict]:
        config = BenchmarkConfig(("ddim", v3, f"{v3}:steps=2"), ("angle",), (5,), num=2, statistics=statistics)
        return {row["solver"]: row for row in benchmark(model, config, out).results["rows"]}

    before, again, other = rows(one), rows(one), rows(two)
    assert first != second and again == before  # not run again: the same seconds
    assert other["ddim"] == before["ddim"] and before["ddim"]["statistics"] is None
    for solver in (v3, f"{v3}:steps=2"):
        assert (before[solver]["statistics"], other[solver]["statistics"]) == (first, second)
        assert other[solver]["rmse"] != before[solver]["rmse"]


def test_a_path_in_a_solvers_name_stays_out_of_the_names_of_files(tmp_path: Path) -> None:
    names = ("dpm-solver-v3:statistics=../../made", "dpm-solver-v3:steps=3:statistics=../../made", "dpm-solver-v3:statistics=/made")
    files = {picture_file(tmp_path, ("fewstep", name, "angle", 5)).resolve() for name in names}
    assert len(files) == 3 and {file.parent for file in files} == {(tmp_path / "samples").resolve()}


def test_a_benchmark_without_any_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SolverError, match="use 4 or 6"):
        benchmark(load_model("digits-edm"), BenchmarkConfig(("heun",), ("angle",), (5,), **SMALL), tmp_path)


# -- tuned models, their own grids, saved samplers -------------------------------------------------------------------

FLOAT32 = 1e-5  # two sums of some 30 steps in float32
FEW = {"num": 8, "batch": 4}


def exact_ends(model: Model, scale: float) -> torch.Tensor:
    """Computed here: the ends of the model's trajectories from the seeds of ``FEW``."""
    return sample(model, reference_sampler(LAW, REFERENCE_NFE // SHORTER), seeds=range(FEW["num"]), guidance=scale)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_tuned_model_is_measured_against_its_guided_teacher(tmp_path: Path, guidance: float) -> None:
    teacher = tiny(tmp_path / "teacher")
    student = tuned(tmp_path / "student", teacher, guidance, tiny(tmp_path / "other", 1))
    results = benchmark(student, BenchmarkConfig(("ddim",), (OPTIMIZED,), (2,), **FEW), tmp_path / "out").results
    ends = {scale: exact_ends(teacher, scale) for scale in (1.0, 2.0)}
    kept = read_samples(tmp_path / "out" / "reference.safetensors")
    torch.testing.assert_close(kept, ends[guidance], rtol=0, atol=FLOAT32)
    assert float((kept - ends[3.0 - guidance]).abs().max()) > 1e-2  # guidance does something to this model
    (row,) = results["rows"]
    made = sample(student, Sampler.build("ddim", student.optimized("ddim", 2), LAW), seeds=range(FEW["num"]))
    assert row["rmse"] == pytest.approx(float((made - kept).double().square().mean().sqrt()), rel=FLOAT32)
    assert results["problem"]["reference"]["teacher"] == teacher.fingerprint and results["problem"]["fingerprint"] == student.fingerprint
    assert results["reference"]["guidance"] == guidance and results["problem"]["guidance"] == 1.0  # a student of one scale


@pytest.mark.slow
@pytest.mark.full_reference
def test_a_student_that_is_its_teacher_arrives_with_many_steps(tmp_path: Path) -> None:
    student = tuned(tmp_path / "student", tiny(tmp_path / "teacher"))
    results = benchmark(student, BenchmarkConfig(("unipc-3",), (OPTIMIZED,), (2, 96), **FEW), tmp_path / "out").results
    few, many = (row["rmse"] for row in results["rows"])
    assert many < 1e-4 < 0.01 * few  # measured 2e-6 and 0.3


@pytest.mark.slow
def test_half_weights_are_measured_as_float32(tmp_path: Path) -> None:
    teacher = tiny(tmp_path / "teacher")
    config, rows = BenchmarkConfig(("ddim",), (OPTIMIZED,), (2,), **FEW), []
    for half in (False, True):
        student = tuned(tmp_path / str(half), teacher, half=half)
        assert {value.dtype for value in student.network.parameters()} == {torch.float32}
        (row,) = benchmark(student, config, tmp_path / f"out-{half}").results["rows"]
        rows.append(row["rmse"])
    assert rows[0] != rows[1] and rows[1] == pytest.approx(rows[0], rel=5e-3)  # float16 has 11 bits


def test_a_teacher_that_is_gone_or_has_other_weights_is_named(tmp_path: Path) -> None:
    teacher, config = tiny(tmp_path / "teacher"), BenchmarkConfig(("ddim",), (OPTIMIZED,), (2,), **FEW)
    student = tuned(tmp_path / "student", teacher)
    was = teacher.fingerprint
    now = tiny(tmp_path / "teacher", 3).fingerprint
    with pytest.raises(ModelError, match=f"student was tuned from .*teacher with fingerprint {was}; that model now has {now}"):
        benchmark(student, config, tmp_path / "out")
    (tmp_path / "teacher").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=f"no model at {tmp_path / 'teacher'}"):
        benchmark(student, config, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_solvers_without_grids_of_the_models_own_are_listed(tmp_path: Path) -> None:
    student = tuned(tmp_path / "student", tiny(tmp_path / "teacher"))
    config = BenchmarkConfig(("ddim", "unipc-2"), (OPTIMIZED, "angle"), (1, 2), **FEW)
    results = benchmark(student, config, tmp_path / "out").results
    made = {(row["solver"], row["grid"], row["nfe"]): row["artifact"] for row in results["rows"]}
    assert set(made) == {("ddim", OPTIMIZED, 2), *((solver, "angle", nfe) for solver in ("ddim", "unipc-2") for nfe in (1, 2))}
    assert [key for key, artifact in made.items() if artifact is not None] == [("ddim", OPTIMIZED, 2)]
    skipped = {tuple(one["key"][1:]): one["why"] for one in results["skipped"]}
    assert set(skipped) == {("ddim", OPTIMIZED, 1), ("unipc-2", OPTIMIZED, 2), ("unipc-2", OPTIMIZED, 1)}
    assert "only of 2, 96" in skipped["ddim", OPTIMIZED, 1] and "there are some for ddim" in skipped["unipc-2", OPTIMIZED, 2]


@pytest.mark.slow
def test_a_row_is_run_again_when_its_grid_or_sampler_changed_and_not_before(tmp_path: Path) -> None:
    model = tuned(tmp_path / "student", tiny(tmp_path / "teacher"))
    card = {"name": "ddim", "model": model.fingerprint, "guidance": 1.0}

    def put(middle: float) -> None:
        grid = TimeGrid(torch.tensor([20.0, middle, 0.05]))
        Sampler.build("ddim", grid, LAW, card=card).save(tmp_path / "samplers" / "nfe-02")
        GridTable("ddim", model.fingerprint, 1.0, LAW, {2: grid}).save(tmp_path / "student" / "optimized" / "ddim")

    def rows() -> dict[str, dict]:
        config = BenchmarkConfig(("ddim",), (OPTIMIZED, "angle"), (2,), samplers=(tmp_path / "samplers",), **FEW)
        made = benchmark(model, config, tmp_path / "out").results["rows"]
        return {row["grid"]: row for row in made}

    own, saved = OPTIMIZED, str(tmp_path / "samplers")
    put(0.5)
    first = rows()
    assert set(first) == {own, "angle", saved} and first[own]["rmse"] == first[saved]["rmse"]
    assert rows() == first  # the same seconds
    put(2.0)
    again = rows()
    assert again["angle"] == first["angle"] and again[own]["rmse"] == again[saved]["rmse"] != first[own]["rmse"]
    assert all(again[grid]["artifact"] != first[grid]["artifact"] for grid in (own, saved))
    put(0.5)
    back = rows()
    assert all(back[grid]["artifact"] == first[grid]["artifact"] and back[grid]["rmse"] == first[grid]["rmse"] for grid in (own, saved))


def fitted_row(folder: Path, middle: float, nfe: int = 2) -> TimeGrid:
    """A sampler in a model's folder, as if fitted to it."""
    grid = TimeGrid(torch.tensor([20.0, *([middle] if nfe == 2 else [middle, 0.2]), 0.05]))
    card = {"name": "fitted", "model": load_model(folder).fingerprint, "guidance": 1.0}
    Sampler.build("unipc-2", grid, LAW, card=card).save(folder / "fitted" / f"nfe-{nfe:02d}")
    return grid


def test_fitted_samplers_are_rows_like_saved_ones(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    grid = fitted_row(tmp_path / "model", 0.5)
    config = BenchmarkConfig(("unipc-2", "fitted"), ("angle", "karras"), (2, 3), samplers=(tmp_path / "model" / "fitted",), **FEW)
    results = benchmark(model, config, tmp_path / "out").results
    rows = {(row["solver"], row["grid"], row["nfe"]): row for row in results["rows"]}
    place = str(tmp_path / "model" / "fitted")
    assert set(rows) == {
        ("fitted", OPTIMIZED, 2),
        ("fitted", place, 2),
        *(("unipc-2", spacing, nfe) for spacing in ("angle", "karras") for nfe in (2, 3)),
    }
    own, saved = rows["fitted", OPTIMIZED, 2], rows["fitted", place, 2]
    assert all(own[key] == saved[key] for key in ("rmse", "fd", "artifact", "num")) and own["artifact"] is not None
    kept = [read_samples(picture_file(tmp_path / "out", ("fewstep", "fitted", name, 2))) for name in (OPTIMIZED, place)]
    assert torch.equal(*kept)
    made = sample(model, Sampler.build("unipc-2", grid, LAW), seeds=range(8))
    torch.testing.assert_close(kept[0], made, rtol=0, atol=FLOAT32)
    (skipped,) = results["skipped"]
    assert skipped["key"] == ["fewstep", "fitted", OPTIMIZED, 3]
    assert "no fitted sampler of model with 3 evaluations" in skipped["why"] and "some of 2" in skipped["why"]
    with pytest.raises(SolverError, match="no fitted sampler of model with 5 evaluations"):
        benchmark(model, replace(config, solvers=("fitted",), nfe=(5,), samplers=()), tmp_path / "none")


@pytest.mark.slow
def test_a_fitted_row_is_run_again_when_the_sampler_changed_and_not_before(tmp_path: Path) -> None:
    model, config = tiny(tmp_path / "model"), BenchmarkConfig(("ddim", "fitted"), ("angle",), (2, 3), **FEW)

    def rows() -> dict[tuple[str, int], dict]:
        results = benchmark(model, config, tmp_path / "out").results
        return {(row["solver"], row["nfe"]): row for row in results["rows"]}

    fitted_row(tmp_path / "model", 0.5)
    first = rows()
    assert rows() == first and set(first) == {("ddim", 2), ("ddim", 3), ("fitted", 2)}  # the same seconds
    fitted_row(tmp_path / "model", 2.0, 3)
    more = rows()
    assert {key: more[key] for key in first} == first and set(more) == {*first, ("fitted", 3)}
    fitted_row(tmp_path / "model", 2.0)
    again = rows()
    assert {key for key in more if again[key] != more[key]} == {("fitted", 2)}
    for part in ("artifact", "rmse"):
        assert again["fitted", 2][part] != first["fitted", 2][part]


def test_saved_samplers_make_the_samples_that_they_hold(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    grid = TimeGrid(torch.tensor([20.0, 1.5, 0.05]))
    sampler = Sampler.build("unipc-2", grid, LAW, card={"name": "unipc-2", "model": model.fingerprint, "guidance": 1.0})
    sampler.save(tmp_path / "samplers" / "unipc-2")
    config = BenchmarkConfig((), (), (), samplers=(tmp_path / "samplers",), **FEW)
    (row,) = benchmark(model, config, tmp_path / "out").results["rows"]
    made = sample(model, sampler, seeds=range(FEW["num"]))
    kept = read_samples(picture_file(tmp_path / "out", ("fewstep", "unipc-2", row["grid"], 2)))
    torch.testing.assert_close(kept, made, rtol=0, atol=FLOAT32)
    other = tiny(tmp_path / "other", 1)
    with pytest.raises(ArtifactError, match="is a sampler of"):
        benchmark(other, config, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(ArtifactError, match="no sampler below"):
        benchmark(model, replace(config, samplers=(tmp_path / "nothing",)), tmp_path / "wrong")
