"""A benchmark of restorations: the contract of its rows, that a killed one goes on to the same, and what it refuses."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from tests.problems import DSNO

import fewstep
from fewstep import ArtifactError, ModelError, SolverError
from fewstep.evaluate.restoration.plan import RestorationBenchConfig, planned_restorations, restoration_cost
from fewstep.evaluate.restoration.rows import PSEUDO_INVERSE, RestorationRow, read_restorations, read_row_file, row_file
from fewstep.evaluate.restoration.run import bench_restorations
from fewstep.models.problem import Problem
from fewstep.runtime.errors import FewstepError

CONFIG = RestorationBenchConfig(
    ("upscale", "inpaint"), ("moments", "projection"), nfe=(4, 3), num=6, samples=19, several=2, batch=21, data="digits"
)
Rows = dict[tuple[str, str, int], RestorationRow]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(fewstep.load_model("digits-edm"))


@pytest.fixture(scope="module")
def folder(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("restored")
    bench_restorations(problem, CONFIG, out, command="fewstep bench")
    return out


def by_name(rows: list[RestorationRow]) -> Rows:
    return {(row.task.split(":")[0], row.method, row.planned): row for row in rows}


def untimed(rows: list[RestorationRow]) -> list[RestorationRow]:
    return [replace(row, seconds=None) for row in rows]


def test_rows_and_what_is_left_out(problem: Problem, folder: Path) -> None:
    results = read_restorations(folder / "results.json")
    assert [key[1:] for key in by_name(results.rows) if key[0] == "upscale"] == [
        (PSEUDO_INVERSE, 0),
        ("moments", 4),
        ("projection", 4),
        ("projection", 3),
    ]
    assert len(results.rows) == 8 and len(results.left_out) == 1
    assert results.left_out[0].startswith("moments ddim 3: Moments takes 2 network evaluations a step")
    entries, _ = planned_restorations(problem, CONFIG)
    assert CONFIG.made == 6 + 18 * 2 and restoration_cost(entries, CONFIG) == (2 * 11 * 42, 0)
    assert (results.problem["num"], results.problem["data"], results.problem["features"]) == (6, "digits", "digits")


def test_every_row_keeps_the_contract(folder: Path) -> None:
    rows = by_name(read_restorations(folder / "results.json").rows)
    for (task, method, nfe), row in rows.items():
        assert row.failed is None and row.nfe == nfe and row.products == 0 and row.num == 6
        sampled = {name: getattr(row, name) for name in ("mean", "alone", "coverage", "spread")}
        if method == PSEUDO_INVERSE:
            assert (row.solver, row.grid, row.samples, row.several) == ("", "", 1, 0) and not any(sampled.values())
        else:
            assert (row.solver, row.grid, row.samples, row.several) == ("ddim", "karras", 19, 2)
            assert row.mean > row.alone and 0 < row.coverage <= 1 and row.spread > 0
        assert all(getattr(row, name) is not None for name in ("psnr", "psnr_error", "gain", "ssim", "features", "misfit", "seconds"))
        kept = read_row_file(row_file(folder, row))
        assert kept is not None and kept["x"].shape == (6, 1, 8, 8) and float(kept["psnr"].mean()) == pytest.approx(row.psnr)
        first = read_row_file(row_file(folder, rows[task, "moments", 4]))
        assert first is not None and row.gain == pytest.approx(float((kept["psnr"] - first["psnr"]).mean()))
    assert rows["upscale", "moments", 4].gain == 0
    assert rows["upscale", "moments", 4].psnr > rows["upscale", PSEUDO_INVERSE, 0].psnr
    assert {field.name for field in fields(RestorationRow)} >= {"task", "method", "solver", "grid", "nfe", "products", "seconds"}


def test_methods_see_the_same_measurement_and_noise(problem: Problem, folder: Path, tmp_path: Path) -> None:
    """A row is the same by itself, with other rows, and with more pictures: it is `sample_posterior` from the seeds of its pictures."""
    rows = by_name(read_restorations(folder / "results.json").rows)
    zero = read_row_file(row_file(folder, rows["upscale", PSEUDO_INVERSE, 0]))
    row = read_row_file(row_file(folder, rows["upscale", "projection", 4]))
    assert zero is not None and row is not None
    sampler = fewstep.Sampler.build("ddim", "karras", problem.schedule, nfe=4)
    start, null = problem.start(range(6), sampler.tableau.nodes), problem.unconditional(range(6))
    x = fewstep.sample_posterior(
        problem.model, sampler, start, fewstep.inverse.measurements.Average(2), zero["y"], 0.05, null, method="projection"
    )
    torch.testing.assert_close(x, row["x"], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same(problem: Problem, folder: Path, tmp_path: Path) -> None:
    seen = list[str]()

    def stop(done: int, note: str) -> None:
        seen.append(note)
        if note.startswith("inpaint, projection ddim 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench_restorations(problem, CONFIG, tmp_path, on_progress=stop, command="fewstep bench")
    assert len(read_restorations(tmp_path / "results.json").rows) == 6
    seen.clear()
    found = bench_restorations(problem, CONFIG, tmp_path, on_progress=lambda done, note: seen.append(note), command="fewstep bench")
    assert not any("upscale" in note or "moments" in note for note in seen)
    assert untimed(found.rows) == untimed(read_restorations(folder / "results.json").rows)


@pytest.mark.slow
def test_rows_add_up_and_are_never_mixed(problem: Problem, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = RestorationBenchConfig(("upscale",), ("projection",), nfe=(2,), num=4, samples=1, data="digits")
    alone = bench_restorations(problem, small, tmp_path).rows
    assert [row.samples for row in alone] == [1, 1] and alone[1].mean is None and alone[1].coverage is None
    more = bench_restorations(problem, replace(small, methods=("moments",), tasks=("clip", "upscale")), tmp_path).rows
    assert [(row.task[:4], row.method) for row in more if row.solver] == [("upsc", "projection"), ("upsc", "moments"), ("clip", "moments")]
    assert more[1] == alone[1] and more[2].gain != 0
    again = bench_restorations(problem, replace(small, samples=2, several=2), tmp_path).rows  # more samples: a row anew
    assert len(again) == 5 and again[1].samples == 2 and again[1].psnr == alone[1].psnr and again[0] == more[0]
    row_file(tmp_path, again[2]).unlink()
    assert len(bench_restorations(problem, replace(small, methods=("moments",)), tmp_path).rows) == 5
    other = bench_restorations(problem, replace(small, seed=5), tmp_path).rows
    assert len(other) == 2 and len(list(tmp_path.glob("results-*.json"))) == 1 and "another model, other pictures" in caplog.text
    assert other[1].psnr != alone[1].psnr


def test_a_method_that_stops_early_and_one_that_goes_back_are_counted(problem: Problem, tmp_path: Path) -> None:
    config = RestorationBenchConfig(
        ("upscale:factor=8:noise=2",), ("constrained:inner=1", "dps", "dps:zeta=1e30"), nfe=(6,), num=2, seed=7, samples=1, data="digits"
    )
    early, back, failed = bench_restorations(problem, config, tmp_path).rows[1:]
    assert early.planned == 6 and 2 <= early.nfe < 6 and early.products == 0  # one number with much noise: nearly anything fits
    assert (back.nfe, back.products) == (6, 6)
    assert failed.psnr is None and failed.failed is not None and not row_file(tmp_path, failed).exists()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"tasks": ()}, "at least one task"),
        ({"tasks": ("blur",)}, "unknown task"),
        ({"methods": ("momentum",)}, "unknown method"),
        ({"methods": ("moments:step=2",)}, "has no option step"),
        ({"solvers": ("ddin",)}, "unknown solver"),
        ({"grid": "krras"}, "unknown grid"),
        ({"nfe": (0,)}, "nfe must be"),
        ({"nfe": 10}, "several of each nfe, as a tuple, got 10"),
        ({"tasks": "upscale"}, "several of each task, as a tuple"),
        ({"num": 1}, "num is at least 2"),
        ({"samples": 0}, "samples is at least 1"),
        ({"seed": -1}, "seeds must lie"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changed: dict[str, object], says: str) -> None:
    with pytest.raises(FewstepError, match=says):
        replace(CONFIG, **changed)


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({"tasks": ("colorize",)}, ModelError, "three colours"),
        ({"tasks": ("inpaint:box=8",)}, ModelError, "leaves nothing of pictures of 8 x 8"),
        ({"methods": ("constrained",)}, SolverError, "a multiple of 11, as 11, not 4; constrained ddim 3"),
        ({"num": 5000}, FewstepError, "has 1797 pictures, not 5000"),
        ({"data": "nowhere.npz"}, FewstepError, "no images at nowhere.npz"),
        ({"features": "digit"}, FewstepError, "unknown features"),
    ],
)
def test_nothing_is_written_where_nothing_can_be_run(
    problem: Problem, tmp_path: Path, changed: dict[str, object], kind: type[FewstepError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        bench_restorations(problem, replace(CONFIG, **changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_a_prior_of_pictures(tmp_path: Path) -> None:
    def refused(model: fewstep.Model, says: str, config: RestorationBenchConfig = CONFIG) -> None:
        with pytest.raises(FewstepError, match=says):
            bench_restorations(Problem(model), config, tmp_path / "out")

    model = fewstep.load_model("digits-edm")
    refused(replace(model, shape=(4, 8, 8)), "samples of shape .4, 8, 8., no pictures of 1 or 3 channels")
    refused(replace(model, shape=(8,)), "makes samples of shape")
    refused(replace(model, shape=(3, 8, 8)), "digits has pictures of shape .1, 8, 8.")
    refused(replace(model, data=None), "does not know its data", replace(CONFIG, data=None))
    refused(fewstep.load_model(DSNO), "student")
    classes = replace(model, null_label=None)
    from numpy import savez, zeros

    savez(tmp_path / "plain.npz", images=zeros((8, 8, 8), "uint8"))
    refused(classes, "no null label, and plain has no labels", replace(CONFIG, data=str(tmp_path / "plain.npz"), features="pixels"))
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_null_label_is_told_the_true_ones(tmp_path: Path) -> None:
    model = replace(fewstep.load_model("digits-edm"), null_label=None)
    config = RestorationBenchConfig(("upscale",), ("projection",), nfe=(2,), num=2, samples=1, data="digits")
    results = bench_restorations(Problem(model), config, tmp_path)
    assert results.problem["labels"] == "true" and results.rows[1].failed is None


def test_other_benchmarks_are_not_taken_for_it(problem: Problem, folder: Path, tmp_path: Path) -> None:
    from fewstep.evaluate.rows import read_results

    with pytest.raises(ArtifactError, match="of a benchmark of restorations .fewstep bench --task"):
        read_results(folder / "results.json")
    (tmp_path / "results.json").write_text('{"rows": [], "reference": null}')
    with pytest.raises(ArtifactError, match="of a benchmark of samplers"):
        bench_restorations(problem, CONFIG, tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ArtifactError, match="damaged"):
        read_restorations(tmp_path / "results.json")
    (tmp_path / "samples").mkdir()
    row = read_restorations(folder / "results.json").rows[0]
    row_file(tmp_path, row).write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="damaged"):
        read_row_file(row_file(tmp_path, row))
