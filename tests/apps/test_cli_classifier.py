"""``fewstep sample --classifier``: pictures as asked, a classifier of one's own, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.apps.conftest import run
from tests.problems import DSNO

from fewstep.evaluate.metrics.features import load_digits_features

HOSTILE = """import torch


def two_classes(x, t, labels):
    return x.flatten(1).sum(1)


two_classes.classes = "two"


def backward(x, t, labels):
    y = x.exp()
    y.add_(1)
    return y.flatten(1).sum(1)


def imaginary(x, t, labels):
    return x.flatten(1).sum(1) + 0j


def leaves(x, t, labels):
    raise SystemExit(0)


def writes(x, t, labels):
    value = x.flatten(1).sum(1)
    with torch.no_grad():
        x.zero_()
    return value
"""
WORDS = ("--solver", "dpm-solver-pp-2m", "--nfe", 6, "-n", 32, "--npz", "--classifier", "digits")


def digits(folder: Path) -> float:
    """Return the share of samples that are the digit of their label."""
    with np.load(folder / "samples.npz") as file:
        return float((load_digits_features().labels(torch.from_numpy(file["x"])) == torch.from_numpy(file["labels"])).float().mean())


@pytest.mark.parametrize("split", ["lie", "strang", "joint"])
@pytest.mark.every(3)
def test_an_unconditional_model_makes_what_is_asked_for(split, monkeypatch, tmp_path: Path) -> None:
    assert run(monkeypatch, "sample", "digits-ddpm", *WORDS, "--scale", 4, "--split", split, "--out", tmp_path) == 0
    assert digits(tmp_path) > 0.85


def test_a_label_for_all_and_other_options_are_other_samples(monkeypatch, capsys, tmp_path: Path) -> None:
    words = ("sample", "digits-ddpm", *WORDS, "--label", 7, "--scale", 4, "--out", tmp_path / "out")
    assert run(monkeypatch, *words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["num"] == 32 and digits(tmp_path / "out") > 0.85
    for other in (("--split", "strang"), ("--kick", "heun")):
        assert run(monkeypatch, *words, *other) == 2
        assert "holds the samples of another command" in capsys.readouterr().err


def test_a_function_that_writes_into_its_input_does_not_write_into_the_samples(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("sample", "digits-ddpm", "--nfe", 6, "-n", 2, "--npz", "--classifier", "hostile:writes", "--scale", 0.001)
    assert run(monkeypatch, *words, "--out", tmp_path / "out") == 0  # and by a solver that takes kicks, where none is named
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert float(np.abs(file["x"]).max()) > 0.5


def test_a_loss_of_ones_own(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "brighter.py").write_text("def up(x, t, labels):\n    return 5 * x.flatten(1).mean(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    means = []
    for scale in (0, 20):
        words = ("sample", "digits-ddpm", *WORDS[:-1], "brighter:up", "--scale", scale, "--out", tmp_path / str(scale))
        assert run(monkeypatch, *words) == 0
        with np.load(tmp_path / str(scale) / "samples.npz") as file:
            means.append(float(file["x"].mean()))
            assert "labels" not in file
    assert means[1] > means[0] + 0.05


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("digits-ddpm", "--scale", 2), "--scale is for --classifier: say which"),
        (("digits-ddpm", "--split", "lie", "--kick", "heun"), "--split and --kick are for --classifier"),
        (("digits-ddpm", "--classifier", "digit"), "no classifier 'digit': did you mean digits"),
        (("digits-ddpm", "--classifier", "digits", "--split", "strong"), "--split is lie, strang or joint, got 'strong'"),
        (("digits-ddpm", "--classifier", "digits", "--kick", "rk"), "unknown kick of a splitting 'rk'"),
        (("digits-ddpm", "--classifier", "digits", "--split", "joint", "--kick", "heun"), "--kick is for splitting"),
        (("digits-ddpm", "--classifier", "digits", "--scale", "inf"), "a finite number, got inf"),
        (("digits-ddpm", "--classifier", "digits", "--label", 10), "has labels 0 to 9, got 10"),
        (("digits-ddpm", "--classifier", "digits", "--solver", "unipc-2"), "would undo a kick"),
        (("digits-ddpm", "--classifier", "digits", "--parallel"), "--classifier guides step by step: leave --parallel out"),
        (("digits-ddpm", "--classifier", "hostile:two_classes"), "classes of hostile:two_classes is the number of its labels, got 'two'"),
        (("digits-ddpm", "--classifier", "hostile:backward"), "log_prob cannot be differentiated by x"),
        (("digits-ddpm", "--classifier", "hostile:imaginary"), "log_prob answers real numbers, got complex64"),
        (("digits-ddpm", "--classifier", "hostile:leaves"), "hostile:leaves failed: SystemExit"),
        (("digits-ddpm", "--classifier", "hostile:leaves", "--label", 3), "its attribute classes would say how many"),
        (("digits-edm", "--classifier", "digits", "--guidance", 2), "without its own condition: leave --guidance out"),
        ((DSNO, "--classifier", "digits"), "cannot be guided on their way"),
        (("digits-ddpm", "--classifier", "os:getcwd"), "os:getcwd cannot be called with x, t, labels"),
        (("digits-ddpm", "--classifier", "os.path:join"), "os.path:join failed: TypeError"),
        (("digits-ddpm", "--classifier", "nowhere:join"), "nowhere"),
    ],
)
@pytest.mark.every(3)
def test_words_that_cannot_be_are_refused(words, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    solver = () if "--solver" in words or words[0] == DSNO else ("--solver", "ddim", "--nfe", 3)
    assert run(monkeypatch, "sample", *words, *solver, "-n", 2, "--out", tmp_path / "out") == 2
    told = capsys.readouterr()
    assert says in told.err and len([line for line in told.err.splitlines() if line.startswith("fewstep:")]) == 1
    assert not (tmp_path / "out" / "grid.png").exists() and not list((tmp_path / "out").glob("parts-*"))
