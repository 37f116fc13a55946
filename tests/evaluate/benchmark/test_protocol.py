"""What a row says, and that it is the same whatever happened on the way: resumed, failed, read from an older table."""

import json
from pathlib import Path

import pytest
import torch
from tests.evaluate.problems import toy
from torch import Tensor, nn

from fewstep import ArtifactError, FewstepError, FlowMap, VarianceExploding, load_model
from fewstep.evaluate.benchmark import entries
from fewstep.evaluate.benchmark.cost import PeakMemory, TimedFlowMap, timed
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.benchmark.run import benchmark
from fewstep.evaluate.metrics.confidence import compare_errors, rmse_interval
from fewstep.evaluate.rows import Row, picture_file, read_errors, read_samples
from fewstep.models.analytic import GaussianDenoiser
from fewstep.models.flow_map import FirstOrderMap

SMALL = {"num": 12, "batch": 12}
FIRST_ORDER = 3  # columns of its tableau
MEASURED = ("seconds", "solver_seconds", "peak_memory")  # what no two runs share
OLD = {"solver": "ddim", "library": "fewstep", "grid": "angle", "nfe": 5, "num": 16, "guidance": 1.0, "rmse": 0.1, "fd": 2.0}
OLD |= {"fd_features": "digits", "seconds": 1.0, "solver_seconds": 0.1}


def same(results: dict) -> dict:
    """All of it but times and memory."""
    return {**results, "rows": [{key: value for key, value in row.items() if key not in MEASURED} for row in results["rows"]]}


def files(folder: Path) -> dict[str, bytes]:
    kept = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    kept["results.json"] = json.dumps(same(json.loads(kept["results.json"]))).encode()
    return kept


@pytest.mark.slow
def test_a_row_says_all_of_it(tmp_path: Path) -> None:
    config = BenchmarkConfig(("unipc-2", "ddim"), ("angle",), (6,), **SMALL)
    results = benchmark(load_model("digits-edm"), config, tmp_path).results
    rows = {row["solver"]: row for row in results["rows"]}
    errors = {name: read_errors(picture_file(tmp_path, ("fewstep", name, "angle", 6))) for name in rows}
    for name, row in rows.items():
        kept = errors[name]
        assert kept.shape == (12,) and kept.dtype == torch.float32
        assert row["rmse"] == pytest.approx(float(kept.double().square().mean().sqrt()), rel=1e-6)
        assert row["rmse_ci"] == pytest.approx(rmse_interval(kept), rel=1e-6) and row["rmse_ci"][0] < row["rmse"] < row["rmse_ci"][1]
        assert row["error_median"] == pytest.approx(float(kept.quantile(0.5)), rel=1e-6)
        assert row["error_mean"] == pytest.approx(float(kept.mean()), rel=1e-6)
        assert row["error_p95"] == pytest.approx(float(kept.quantile(0.95)), rel=1e-6)
        assert row["error_p99"] == pytest.approx(float(kept.quantile(0.99)), rel=1e-6)
        assert row["parted"] == sum(error > 3 * kept.quantile(0.5) for error in kept) / 12
        assert row["fd_ci"][0] <= row["fd"] <= row["fd_ci"][1] and row["kd_ci"][0] <= row["kd"] <= row["kd_ci"][1]
        assert all(0 <= row[key] <= 1 for key in ("precision", "recall")) and row["labels"] > 0.9
        assert row["failed"] is None and (row["peak_memory"] is None or 1e5 < row["peak_memory"] < 1e9)
        exact, first = (read_samples(path) for path in (tmp_path / "reference.safetensors", picture_file(tmp_path, Row(**row).key)))
        torch.testing.assert_close((first - exact).square().mean((1, 2, 3)).sqrt(), kept)
    assert compare_errors(errors["unipc-2"], errors["ddim"]).verdict == "better"
    assert {"fd", "fd_ci", "kd", "kd_ci", "precision", "recall", "labels", "fd_data_halves", "error"} < set(results["reference"])


@pytest.mark.slow
def test_interrupted_and_resumed_is_the_same_as_never_interrupted(tmp_path: Path) -> None:
    model, config = load_model("digits-edm"), BenchmarkConfig(("unipc-2", "heun"), ("angle",), (3, 4), num=6, batch=4)
    whole = benchmark(model, config, tmp_path / "whole", command="bench").results

    def interrupt(number: int, name: str) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark(model, config, tmp_path / "resumed", command="bench", on_progress=interrupt)
    assert len(json.loads((tmp_path / "resumed" / "results.json").read_text())["rows"]) < len(whole["rows"])
    benchmark(model, config, tmp_path / "resumed", command="bench")
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


def test_a_solver_that_fails_is_a_row_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = toy(), BenchmarkConfig(("ddim", "unipc-2"), ("karras",), (4,), **SMALL)
    sampling = entries.run

    def failing(denoiser, tableau, *args, **options) -> Tensor:
        made = sampling(denoiser, tableau, *args, **options)
        return made * torch.nan if tableau.update.shape[2] == FIRST_ORDER else made

    with monkeypatch.context() as patch:
        patch.setattr(entries, "run", failing)
        failed, good = benchmark(model, config, tmp_path).results["rows"]
    assert failed["failed"] == "12 of 12 samples are not finite" and failed["rmse"] is None and failed["solver"] == "ddim"
    assert good["failed"] is None and good["rmse"] > 0
    now, still = benchmark(model, config, tmp_path).results["rows"]
    assert now["failed"] is None and now["rmse"] > good["rmse"] and still == good
    with monkeypatch.context() as patch:
        patch.setattr(entries, "run", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # a mistake in this library is no sampler's failure
            benchmark(model, BenchmarkConfig(("euler",), ("karras",), (4,), **SMALL), tmp_path)


def test_a_peer_that_cannot_do_a_grid_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.evaluate.benchmark.plan.PEERS", ["ddim", "lms"])

    def run_peer(name: str, denoiser, grid, x, cond) -> Tensor:
        if name == "lms":
            raise IndexError("their table is too short")
        return denoiser(x, grid.t[0], cond)

    monkeypatch.setattr("fewstep.evaluate.benchmark.entries.run_peer", run_peer)
    good, failed = benchmark(toy(), BenchmarkConfig((), ("karras",), (4,), peers=("diffusers",), **SMALL), tmp_path).results["rows"]
    assert failed["failed"] == "IndexError: their table is too short" and good["failed"] is None
    assert good["artifact"].startswith("diffusers-")


@pytest.mark.slow
def test_older_tables_are_read_and_their_rows_completed(tmp_path: Path) -> None:
    assert Row(**OLD).key == ("fewstep", "ddim", "angle", 5) and Row(**OLD).rmse_ci is Row(**OLD).failed is None
    model, config = load_model("digits-edm"), BenchmarkConfig(("ddim", "unipc-2"), ("angle",), (5,), **SMALL)
    whole = benchmark(model, config, tmp_path).results
    results = json.loads((tmp_path / "results.json").read_text())
    reference = ("error", "fd", "fd_data_halves", "nfe", "solver")
    old = {**results, "reference": {key: results["reference"][key] for key in reference}}
    old["rows"] = [{key: row[key] for key in OLD} for row in results["rows"]]
    (tmp_path / "results.json").write_text(json.dumps(old))
    for row in results["rows"]:
        path = picture_file(tmp_path, Row(**row).key)
        path.write_bytes(path.read_bytes()[:80])
    assert same(benchmark(model, config, tmp_path).results) == same(whole)
    silent = {**results, "reference": {key: value for key, value in results["reference"].items() if key != "guidance"}}
    (tmp_path / "results.json").write_text(json.dumps(silent))
    assert benchmark(model, config, tmp_path).results["reference"] == results["reference"]


def test_a_damaged_table_is_named_and_damaged_samples_are_made_again(tmp_path: Path) -> None:
    model, config = toy(), BenchmarkConfig(("ddim", "euler"), ("karras",), (4,), **SMALL)
    first = benchmark(model, config, tmp_path).results
    path = picture_file(tmp_path, ("fewstep", "ddim", "karras", 4))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ArtifactError, match="is damaged"):
        read_errors(path)
    again = benchmark(model, config, tmp_path).results
    assert same(again) == same(first) and again["rows"][1] == first["rows"][1] and read_errors(path).shape == (12,)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"results\.json is damaged"):
        benchmark(model, config, tmp_path)


@pytest.mark.slow
def test_other_features_measure_all_rows_again(tmp_path: Path) -> None:
    model, out = load_model("digits-edm"), tmp_path / "out"
    by_name, pixels = (BenchmarkConfig(("ddim",), ("angle",), (4,), features=name, **SMALL) for name in (None, "pixels"))
    first, second = (benchmark(model, config, out).results for config in (by_name, pixels))
    (digits,), (other,) = first["rows"], second["rows"]
    assert (digits["fd_features"], other["fd_features"], second["reference"]["fd_features"]) == ("digits", "pixels", "pixels")
    assert other["rmse"] == digits["rmse"] and other["fd"] != digits["fd"] and other["labels"] is None
    with pytest.raises(FewstepError, match="no Inception weights at gone.pth"):
        benchmark(model, BenchmarkConfig(("ddim",), ("angle",), (4,), features="inception:gone.pth", **SMALL), out)
    with pytest.raises(FewstepError, match="did you mean pixels"):
        benchmark(model, BenchmarkConfig(("ddim",), ("angle",), (4,), features="pixel", **SMALL), out)
    with pytest.raises(FewstepError, match="does not know its data"):
        benchmark(toy(), BenchmarkConfig(("ddim",), ("karras",), (4,), features=nn.Flatten(), **SMALL), tmp_path / "toy")
    flat = BenchmarkConfig(("ddim",), ("angle",), (4,), features=nn.Flatten(), **SMALL)
    (row,) = benchmark(model, flat, out).results["rows"]
    assert row["fd_features"].startswith("Flatten:")


# -- work ---------------------------------------------------------------------------------------------------------------


def test_evaluations_and_time_are_counted() -> None:
    exact = GaussianDenoiser(VarianceExploding(), torch.zeros(1, 2, 2), torch.tensor(0.5))
    high, low = torch.tensor([2.0, 1.0]).double()
    for one, places in ((exact, (high,)), (FirstOrderMap(exact), (high, low))):
        counted = timed(one)
        assert isinstance(counted, FlowMap) == isinstance(one, FlowMap) and counted.schedule is exact.schedule
        for count in (3, 5):
            x = torch.ones(count, 1, 2, 2)
            assert torch.equal(counted(x, *places), one(x, *places))
        assert counted.evaluated == 8 and counted.seconds > 0 and counted.times == [2.0, 2.0]


def test_a_timed_flow_map_is_the_map_that_it_times() -> None:
    class Known(FirstOrderMap):
        definition = ("its own",)

        def check(self, t: Tensor) -> None:
            raise FewstepError("only its own times")

    counted = TimedFlowMap(Known(GaussianDenoiser(VarianceExploding(), torch.zeros(1, 2, 2), torch.tensor(0.5))))
    assert counted.definition == ("its own",)
    with pytest.raises(FewstepError, match="its own times"):
        counted.check(torch.ones(2))


def test_peak_memory_is_that_of_this_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def peak(megabytes: int) -> int | None:
        memory = PeakMemory(torch.device("cpu"))
        block = torch.ones(megabytes * 2**18)
        assert float(block[-1]) == 1
        del block
        return memory.bytes()

    large, small = peak(64), peak(8)
    if large is not None and small is not None:  # a system that can say it
        assert 60 * 2**20 < large < 80 * 2**20 and 7 * 2**20 < small < 20 * 2**20  # though the process's own peak is past
    monkeypatch.setattr("fewstep.evaluate.benchmark.cost.PROCESS", tmp_path / "nowhere")
    assert peak(1) is None
