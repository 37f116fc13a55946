"""``--parallel`` of ``sample`` and ``trajectories``: the pictures, the figures, two processes, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.apps.conftest import run
from tests.problems import DSNO
from tests.processes import together

import fewstep
from fewstep import ParallelConfig, Trajectories, load_model

DDIM = ("--solver", "ddim", "--nfe", 40, "-n", 4)


def arrays(folder: Path) -> torch.Tensor:
    with np.load(folder / "samples.npz") as file:
        return torch.from_numpy(file["x"])


@pytest.mark.slow
def test_the_samples_are_the_sequential_ones(monkeypatch, capsys, tmp_path: Path) -> None:
    assert run(monkeypatch, "sample", "digits-edm", *DDIM, "--npz", "--out", tmp_path / "one") == 0
    capsys.readouterr()
    words = ("sample", "digits-edm", *DDIM, "--batch", 2, "--npz", "--parallel", "--window", 10)
    assert run(monkeypatch, *words, "--out", tmp_path / "two") == 0
    said = capsys.readouterr().out
    assert "expected for 2 samples: about" in said and "rounds instead of 40 calls" in said
    assert float((arrays(tmp_path / "one") - arrays(tmp_path / "two")).square().mean().sqrt()) < 8e-3
    assert run(monkeypatch, *words, "--json", "--out", tmp_path / "three") == 0
    told = json.loads(capsys.readouterr().out)["parallel"]
    assert told["rounds"] < 30 and 40 < told["evaluations"] < 150 and set(told["expected"]["rounds"]) == {"2", "4", "8", "10"}
    assert run(monkeypatch, *words[:-1], 9, "--out", tmp_path / "two") == 2  # other samples, if only by a tolerance
    assert "holds the samples of another command" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_is_stopped_says_that_it_is_a_preview(monkeypatch, capsys, tmp_path: Path) -> None:
    words = ("sample", "digits-edm", *DDIM, "--parallel", "--rounds", 3)
    assert run(monkeypatch, *words, "--out", tmp_path / "one") == 0
    said = capsys.readouterr().out
    assert "stopped after 3 rounds, with" in said and "of 40 evaluations settled: a preview" in said
    assert run(monkeypatch, *words, "--json", "--out", tmp_path / "two") == 0
    assert 3 <= json.loads(capsys.readouterr().out)["parallel"]["settled"] < 40


@pytest.mark.slow
def test_trajectories_are_those_of_the_sequential_teacher(monkeypatch, capsys, tmp_path: Path) -> None:
    words = ("trajectories", "digits-edm", "--num", 4, "--nfe", 32, "--slots", 4)
    assert run(monkeypatch, *words, "--out", tmp_path / "one") == 0
    assert run(monkeypatch, *words, "--parallel", "--tol", 1e-5, "--out", tmp_path / "two") == 0
    one, two = (Trajectories.load(tmp_path / name) for name in ("one", "two"))
    assert "parallel" not in one.card and two.card["parallel"]["tol"] == 1e-5 and one.identity != two.identity
    torch.testing.assert_close(one.states(range(4)), two.states(range(4)), rtol=0, atol=1e-3)
    capsys.readouterr()
    assert run(monkeypatch, *words, "--out", tmp_path / "two") == 2
    assert "another" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_a_window(tmp_path: Path) -> None:
    """And give the sample of one."""
    model, config = load_model("digits-edm"), ParallelConfig(window=8)
    alone = fewstep.sample(model, "ddim", nfe=30, seeds=range(3), parallel=config)
    for made in together(2, lambda: fewstep.sample(model, "ddim", nfe=30, seeds=range(3), parallel=config)):
        torch.testing.assert_close(made, alone, rtol=0, atol=1e-5)
        assert float((made - alone).square().mean().sqrt()) < 1e-6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("sample", "digits-edm", "--window", 4), "--window is for sampling in parallel: say --parallel too"),
        (("sample", "digits-edm", "--tol", 0.1, "--devices", "cpu"), "--tol and --devices are for sampling in parallel"),
        (("sample", "digits-edm", "--parallel", "--window", 0), "window is at least 1, got 0"),
        (("sample", "digits-edm", "--parallel", "--rounds", 0), "rounds is at least 1, got 0"),
        (("sample", "digits-edm", "--parallel", "--tol", "nan"), "tol is a number"),
        (("sample", "digits-edm", "--parallel", "--devices", "cuda:7"), "device 'cuda:7' cannot be used here"),
        (("sample", "digits-edm", "--parallel", "--devices", "cpu,,cpu"), "device '' cannot be used here"),
        (("sample", "digits-edm", "--parallel", "--devices", "meta"), "device 'meta' cannot be used here: nothing has a value there"),
        (("sample", DSNO, "--parallel"), "a student makes each of its few jumps by one call"),
        (("trajectories", "digits-edm", "--memory", 3), "--memory is for sampling in parallel"),
        (("trajectories", "digits-edm", "--parallel", "--memory", 0), "memory is at least 1, got 0"),
    ],
)
@pytest.mark.every(3)
def test_words_that_cannot_be_are_refused(words, says, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *words, "--out", tmp_path / "out") == 2
    told = capsys.readouterr()
    assert says in told.err and len(told.err.splitlines()) == 1 and not (tmp_path / "out").exists()
