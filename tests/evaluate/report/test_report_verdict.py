"""Whether a row got worse: by the errors of single samples where they were saved, else by intervals."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep import load_model
from fewstep.core.tableau import Nodes
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.benchmark.run import benchmark
from fewstep.evaluate.metrics.confidence import rms, rmse_interval
from fewstep.evaluate.report.findings import grouped, read_folders
from fewstep.evaluate.report.verdict import Version, key_of, verdict
from fewstep.evaluate.report.write import write_report
from fewstep.evaluate.rows import picture_file, save_samples
from fewstep.sampling.reference import REFERENCE_NFE, reference_sampler
from fewstep.solvers.dpm_solver_pp import DPMSolverPP

NOISES = (0, 512)


def version(folder: Path, errors: Tensor, *, saved: Tensor | None = None, noises: tuple[int, int] = NOISES) -> Version:
    """A row with these errors, of which these or others were saved."""
    row = {"library": "fewstep", "solver": "ddim", "grid": "angle", "nfe": 5, "rmse": rms(errors), "rmse_ci": rmse_interval(errors)}
    save_samples(picture_file(folder, key_of(row)), torch.zeros(1, 1, 2, 2), errors if saved is None else saved)
    return Version(row, folder, noises)


@pytest.fixture()
def errors() -> Tensor:
    return torch.rand(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64).square() + 0.01


def test_one_percent_is_seen_in_pairs_where_intervals_overlap(tmp_path: Path, errors: Tensor) -> None:
    before, after = version(tmp_path / "a", errors), version(tmp_path / "b", 1.01 * errors)
    assert after.row["rmse_ci"][0] < before.row["rmse_ci"][1]
    assert (verdict(after, before), verdict(before, after), verdict(before, before)) == ("worse", "better", "equal")


def test_errors_of_other_noises_or_of_another_row_are_not_compared_in_pairs(tmp_path: Path, errors: Tensor) -> None:
    before = version(tmp_path / "a", errors)
    assert verdict(version(tmp_path / "b", 1.01 * errors, noises=(512, 512)), before) == "equal"
    assert verdict(version(tmp_path / "c", 1.01 * errors, saved=3 * errors), before) == "equal"  # a file of an older run
    assert verdict(version(tmp_path / "d", 2 * errors, saved=errors), before) == "worse"  # the intervals say so
    assert verdict(version(tmp_path / "e", 1.01 * errors[:256]), before) == "equal"
    picture_file(tmp_path / "b", key_of(before.row)).write_bytes(b"damaged")
    assert verdict(before._replace(folder=tmp_path / "b"), before) == "equal"


def test_rows_that_failed_are_worse_than_those_that_did_not(tmp_path: Path, errors: Tensor) -> None:
    good = version(tmp_path, errors)
    failed = good._replace(row={**good.row, "rmse": None, "failed": "it broke"})
    assert (verdict(failed, good), verdict(good, failed), verdict(failed, failed)) == ("worse", "better", "equal")


class OnePercent(DPMSolverPP):
    """DPM-Solver++ 2M with a coefficient of its last steps wrong by 1 percent."""

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        anchor, end = super().update(nodes, i, anchor, x, history)
        return anchor, end + 0.01 * history[0] * (i > nodes.evaluations - 4)


@pytest.mark.slow
def test_a_wrong_coefficient_is_a_regression_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = load_model("digits-edm"), BenchmarkConfig(("dpm-solver-pp-2m",), ("karras",), (20,), num=64, batch=64)
    half = lambda schedule, nfe=REFERENCE_NFE: reference_sampler(schedule, nfe // 2)  # noqa: E731 - still far tighter than 20 evaluations
    monkeypatch.setattr("fewstep.evaluate.benchmark.exact.reference_sampler", half)
    for name in ("before", "again", "after"):
        if name == "after":
            monkeypatch.setattr("fewstep.evaluate.benchmark.plan.solver_for", lambda *_, **__: OnePercent(2))
        benchmark(model, config, tmp_path / name, command=name)
    same, changed = ([tmp_path / "before", tmp_path / other] for other in ("again", "after"))
    assert [change.verdict for change in grouped(read_folders(same))[0].changes] == ["equal"]
    assert [change.verdict for change in grouped(read_folders(changed))[0].changes] == ["worse"]
    assert "got worse" in write_report(changed, tmp_path).read_text()
    rows = [json.loads((tmp_path / name / "results.json").read_text())["rows"][0] for name in ("before", "again")]
    work = ("seconds", "solver_seconds", "peak_memory")
    assert all(value == rows[1][name] for name, value in rows[0].items() if name not in work)
