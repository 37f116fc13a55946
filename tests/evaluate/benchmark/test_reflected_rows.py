"""Rows of a reflected model: samples are folded, the share that lay outside is told, and what would not fold is skipped."""

from pathlib import Path

import pytest
from tests.problems import reflected_model

from fewstep import Cube, ModelError, Sampler, steps
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.benchmark.run import benchmark
from fewstep.evaluate.inspection import check_inspected
from fewstep.evaluate.report.table import plain_table
from fewstep.evaluate.rows import picture_file, read_samples
from fewstep.models.problem import Problem

pytestmark = pytest.mark.usefixtures("short_reference")


@pytest.mark.slow
def test_a_row_tells_how_much_lay_outside_and_holds_what_was_folded(tmp_path: Path) -> None:
    model = reflected_model()
    config = BenchmarkConfig(("ddim", "unipc-2"), ("karras",), (4,), guidance=3.0, num=4, batch=2, peers=("diffusers",))
    results = benchmark(model, config, tmp_path).results
    rows = {row["solver"]: row for row in results["rows"]}
    assert set(rows) == {"ddim", "unipc-2"} and all(row["library"] == "fewstep" and row["failed"] is None for row in rows.values())
    assert {one["why"] for one in results["skipped"]} == {
        "tiny is a reflected model, whose samples diffusers would not fold into their cube"
    }
    problem, tableau = Problem(model, 3.0), Sampler.build("ddim", "karras", model.schedule, nfe=4).tableau
    outside = []
    for seeds in ([0, 1], [2, 3]):
        *_, last = steps(problem.denoiser, tableau, problem.start(seeds), problem.cond(seeds))
        outside.append(Cube().outside(last.x_next))
    assert rows["ddim"]["outside"] == pytest.approx(sum(outside) / 2) and 0 < rows["ddim"]["outside"] < 1
    for key in (("fewstep", "ddim", "karras", 4), ("fewstep", "unipc-2", "karras", 4)):
        assert float(read_samples(picture_file(tmp_path, key)).abs().max()) <= 1
    most = max(row["outside"] for row in rows.values())
    assert f"of the samples' numbers {most:.2%} or less lay beyond the cube before the last fold" in plain_table(results)


def test_it_is_not_inspected() -> None:
    with pytest.raises(ModelError, match="an inspection is not for a reflected model.*use fewstep bench"):
        check_inspected(reflected_model(), 8, 0)
