"""The noise levels of a row are those at which its network was asked, whoever wrote the sampler; they are enough to make it again."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import shorten_reference

from fewstep import Sampler, TimeGrid, load_model, make_grid, sample
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.benchmark.run import benchmark
from fewstep.evaluate.rows import picture_file, read_samples

pytestmark = pytest.mark.slow
SCRIPT = """
def two_stages(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for here, there in zip(sigmas[:-1], sigmas[1:]):
        mean = model(x, here)
        middle = (here * there) ** 0.5
        mean = model(mean + (x - mean) * middle / here, middle.expand(len(x)))
        x = mean + (x - mean) * there / here
    return x
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("levels")
    (folder / "levels_script.py").write_text(SCRIPT)
    sys.path.insert(0, str(folder))
    peers = ("diffusers", "levels_script:two_stages")
    config = BenchmarkConfig(("ddim", "heun", "unipc-2"), ("angle",), (4,), num=4, batch=3, peers=peers)
    with pytest.MonkeyPatch.context() as patch:
        shorten_reference(patch)
        benchmark(load_model("digits-edm"), config, folder)
    sys.path.remove(str(folder))
    return folder


def levels(out: Path) -> dict[tuple[str, str], list[float]]:
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert all(row["failed"] is None for row in rows)
    return {(row["library"], row["solver"]): row["levels"] for row in rows}


def test_multistep_solvers_are_asked_at_the_grid_whoever_wrote_them(out: Path) -> None:
    grid = make_grid("angle", load_model("digits-edm").schedule, 4).t.tolist()  # sigma is the time there
    found = levels(out)
    for key in (("fewstep", "ddim"), ("fewstep", "unipc-2"), ("diffusers", "ddim"), ("diffusers", "unipc-3"), ("diffusers", "lms")):
        assert found[key] == pytest.approx(grid, rel=1e-12), key


def test_stages_between_levels_are_named_too(out: Path) -> None:
    found = levels(out)
    assert len(found["fewstep", "heun"]) == 5 and found["fewstep", "heun"] == pytest.approx(found["diffusers", "heun"])
    third = found["levels_script", "two_stages"]  # 8 evaluations, as they were asked in turn
    assert len(third) == 9
    assert third[1:-1:2] == pytest.approx([(a * b) ** 0.5 for a, b in zip(third[:-2:2], third[2::2], strict=True)], rel=1e-6)


def test_a_row_can_be_made_again_from_its_levels(out: Path) -> None:
    model = load_model("digits-edm")
    law = model.schedule
    lam = -torch.log(torch.tensor(levels(out)["fewstep", "unipc-2"], dtype=torch.float64))
    again = Sampler.build("unipc-2", TimeGrid(law.t_of_lam(lam)), law)
    made = sample(model, again, seeds=range(4))
    kept = read_samples(picture_file(out, ("fewstep", "unipc-2", "angle", 4)))
    torch.testing.assert_close(made, kept, rtol=0, atol=2e-5)
