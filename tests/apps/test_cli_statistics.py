"""fewstep calibrate, and statistics in sample and bench."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.apps.conftest import made_by, run, samples, without_plots

from fewstep import load_model
from fewstep.core.statistics import ModelStatistics
from fewstep.learn.samplers import calibrate
from fewstep.models.zoo import WEIGHTS

pytestmark = [
    pytest.mark.usefixtures("short_reference"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # forward mode of some PyTorch releases says so
]

CALIBRATE = ("calibrate", "digits-edm", "--levels", 4, "--num", 8, "--batch", 4)
V3 = ("sample", "digits-edm", "--nfe", 5, "--num", 2, "--npz", "--solver")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory) -> Path:
    """Statistics of digits-edm."""
    return made_by(tmp_path_factory.mktemp("statistics"), *CALIBRATE, change=without_plots)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of digits-edm without any statistics of its own."""
    return shutil.copytree(WEIGHTS / "digits-edm", tmp_path / "bare", ignore=shutil.ignore_patterns("statistics*"))


@pytest.mark.slow
def test_calibrate_saves_statistics_a_card_and_a_plot(monkeypatch, capsys, tmp_path: Path) -> None:
    words = (*CALIBRATE, "--num", 4, "--pool", "scalar/element", "--data", "digits", "--guidance", 2, "--out", tmp_path)
    assert run(monkeypatch, *words, "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["statistics"] == str(tmp_path) and Path(done["plot"]).exists() and done["seconds"] > 0
    assert (done["data"], done["pool"], done["states"]) == (4, "scalar/element", "digits, 1797 images, diffused")
    made = {path.name for path in tmp_path.iterdir() if not path.name.startswith("moments-")}
    assert made == {"statistics.json", "statistics.safetensors", "README.md", "statistics.png"}
    loaded = ModelStatistics.load(tmp_path)
    assert len(loaded.lam) == 5 and loaded.guidance == 2 and loaded.l.shape == (5, 1, 1, 1) and loaded.b.shape == (5, 1, 8, 8)
    assert "fewstep calibrate digits-edm" in (tmp_path / "README.md").read_text()
    without_plots(monkeypatch)
    assert run(monkeypatch, *words) == 0  # the folder is finished: this is free
    assert f"bench digits-edm --guidance 2 --statistics {tmp_path}" in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")


@pytest.mark.slow
def test_a_killed_calibration_continues(monkeypatch, capsys, tmp_path: Path, statistics: Path) -> None:
    without_plots(monkeypatch)
    real, calls = calibrate.Moments.of, []

    def mortal(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(calibrate.Moments, "of", mortal)
    assert run(monkeypatch, *CALIBRATE, "--out", tmp_path) == 130
    assert "run the same command to continue" in capsys.readouterr().err and not (tmp_path / "statistics.json").exists()
    assert run(monkeypatch, *CALIBRATE, "--out", tmp_path) == 0
    assert len(calls) == 3  # a batch, the kill, and only the second batch again
    assert ModelStatistics.load(tmp_path).fingerprint == ModelStatistics.load(statistics).fingerprint


@pytest.mark.slow
def test_statistics_are_given_by_option_or_in_the_solvers_name(monkeypatch, tmp_path: Path, statistics: Path) -> None:
    name = f"dpm-solver-v3:statistics={statistics}"
    assert run(monkeypatch, *V3, "dpm-solver-v3", "--statistics", statistics, "--out", tmp_path / "option") == 0
    assert run(monkeypatch, *V3, name, "--out", tmp_path / "name") == 0
    assert run(monkeypatch, *V3, f"{name}:steps=2", "--out", tmp_path / "two") == 0
    option, named, two = (samples(tmp_path / folder) for folder in ("option", "name", "two"))
    np.testing.assert_array_equal(option, named)
    assert abs(two - named).max() > 1e-3
    monkeypatch.chdir(shutil.copytree(statistics, tmp_path / "7").parent)
    assert run(monkeypatch, *V3, "dpm-solver-v3:statistics=7", "--out", tmp_path / "number") == 0  # a folder, though a number too
    np.testing.assert_array_equal(samples(tmp_path / "number"), named)


@pytest.mark.slow
def test_bench_takes_statistics(monkeypatch, tmp_path: Path, statistics: Path) -> None:
    words = ("bench", "digits-edm", "--solver", "ddim,dpm-solver-v3", "--grid", "angle", "--nfe", 5, "--num", 2)
    assert run(monkeypatch, *words, "--statistics", statistics, "--out", tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    used = {row["solver"]: row["statistics"] for row in results["rows"]}
    assert used == {"ddim": None, "dpm-solver-v3": ModelStatistics.load(statistics).fingerprint}
    assert f"--statistics {statistics}" in results["command"]


@pytest.mark.slow
def test_statistics_in_the_models_folder_are_found(monkeypatch, capsys, tmp_path: Path, bare: Path, statistics: Path) -> None:
    words = ("sample", bare, "--solver", "dpm-solver-v3", "--nfe", 5, "--num", 2, "--npz", "--out", tmp_path / "own")
    assert run(monkeypatch, *words) == 2
    message = capsys.readouterr().err.strip()
    assert "needs statistics" in message and f"'fewstep calibrate {bare} --out DIR'" in message and "\n" not in message
    assert not (tmp_path / "own").exists()
    shutil.copytree(statistics, bare / "statistics")
    assert run(monkeypatch, *words) == 0
    assert run(monkeypatch, *V3, "dpm-solver-v3", "--statistics", statistics, "--out", tmp_path / "option") == 0
    np.testing.assert_array_equal(samples(tmp_path / "own"), samples(tmp_path / "option"))


@pytest.mark.slow
def test_statistics_of_something_else_are_refused_unless_wanted(monkeypatch, capsys, tmp_path: Path, statistics: Path) -> None:
    edm, ddpm = (load_model(name).fingerprint for name in ("digits-edm", "digits-ddpm"))
    cases = {
        ("digits-edm", "--guidance", "3"): "made for guidance 1.0, but are used with guidance 3.0",
        ("digits-ddpm",): f'made for model "{edm}", but are used with model "{ddpm}"',
    }
    solver = ("--solver", "dpm-solver-v3", "--nfe", 5, "--num", 2, "--statistics", statistics)
    for which, says in cases.items():
        for verb in ("sample", "bench"):
            assert run(monkeypatch, verb, *which, *solver, "--out", tmp_path / "out") == 2
            message = capsys.readouterr().err.strip()
            assert says in message and "\n" not in message and not (tmp_path / "out").exists()
    assert run(monkeypatch, "sample", "digits-edm", "--guidance", 3, *solver, "--any-statistics", "--out", tmp_path / "out") == 0


@pytest.mark.slow
def test_damaged_statistics_are_named(monkeypatch, capsys, tmp_path: Path, statistics: Path) -> None:
    folder = shutil.copytree(statistics, tmp_path / "damaged")
    data = folder / "statistics.safetensors"
    data.write_bytes(data.read_bytes()[:-8])
    assert run(monkeypatch, *V3, "dpm-solver-v3", "--statistics", folder, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err.strip()
    assert f"{data} is damaged" in message and "\n" not in message and not (tmp_path / "out").exists()
