"""Samples of any model compared with images, and in features, that the user names."""

import json
from pathlib import Path

import numpy as np
import pytest
from tests.evaluate.problems import toy

from fewstep import FewstepError, load_model
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.benchmark.run import benchmark

SMALL = {"num": 6, "batch": 6}


def pictures(path: Path, side: int = 8, brightness: int = 128) -> str:
    images = np.random.default_rng(0).integers(0, brightness, (40, side, side), dtype=np.uint8)
    np.savez(path, images=images)
    return str(path)


def run(out: Path, data: str | None, **more: object) -> dict:
    return benchmark(load_model("digits-edm"), BenchmarkConfig(("ddim",), ("angle",), (3,), data=data, **SMALL, **more), out).results


@pytest.mark.slow
def test_other_data_gives_other_distances_the_same_errors_and_another_table(tmp_path: Path) -> None:
    own = run(tmp_path / "own", None)
    dark = run(tmp_path / "named", pictures(tmp_path / "dark.npz"))
    assert "data" not in own["problem"] and dark["problem"]["data"]["name"] == "dark" and dark["problem"]["data"]["num"] == 40
    mine, theirs = own["rows"][0], dark["rows"][0]
    assert mine["rmse"] == theirs["rmse"] and mine["fd_features"] == "digits" and theirs["fd_features"] == "pixels"
    again = run(tmp_path / "own", "digits")  # named, and the model's own: the same table, and nothing is measured again
    assert again["problem"] == own["problem"] and again["rows"] == own["rows"]
    light = run(tmp_path / "named", pictures(tmp_path / "light.npz", brightness=256))
    assert len(light["rows"]) == 1 and light["rows"][0]["fd"] != theirs["fd"]
    assert json.loads((tmp_path / "named" / "results.json").read_text())["problem"]["data"]["name"] == "light"


def test_a_model_without_data_of_its_own(tmp_path: Path) -> None:
    model = toy()
    assert model.data is None
    config = BenchmarkConfig(("ddim",), ("angle",), (3,), data=pictures(tmp_path / "x.npz", 2), **SMALL)
    assert benchmark(model, config, tmp_path / "out").results["rows"][0]["fd"] > 0


SCRIPT = """
import torch
from torch import nn

def network(shape):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 4))

def nothing(shape):
    return shape
"""


@pytest.mark.slow
def test_features_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_features.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    row = run(tmp_path / "out", None, features="own_features:network")["rows"][0]
    assert row["fd"] > 0 and row["fd_features"].startswith("Sequential:")
    for wrong, said in (("nothing", "made a tuple"), ("missing", "cannot import own_features:missing"), ("", "names no function")):
        with pytest.raises(FewstepError, match=said):
            run(tmp_path / "out", None, features=f"own_features:{wrong}")


def test_images_of_another_shape_and_features_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"large.npz has images of shape \(1, 9, 9\), digits-edm makes \(1, 8, 8\)"):
        run(tmp_path, pictures(tmp_path / "large.npz", 9))
    with pytest.raises(FewstepError, match="name the data"):
        benchmark(toy(), BenchmarkConfig(("ddim",), ("angle",), (3,), features="pixels", **SMALL), tmp_path)
