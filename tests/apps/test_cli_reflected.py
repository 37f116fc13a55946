"""Reflected models on the command line: trained, sampled, compared, and refused where they cannot be right."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.apps.conftest import made_by, run, samples

pytestmark = pytest.mark.usefixtures("short_reference")

TRAIN = ("train", "--kind", "reflected", "--conditional", "--channels", "16,16", "--steps", 2, "--batch", 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by(tmp_path_factory.mktemp("reflected") / "model", *TRAIN)


@pytest.mark.slow
def test_it_is_sampled_inside_and_its_rows_say_what_was_outside(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    assert run(monkeypatch, "sample", model, "--guidance", 4, "--nfe", 4, "--num", 3, "--npz", "--out", tmp_path / "sample") == 0
    assert "on karras, 4 evaluations, noise levels 3 to 0.01" in " ".join(capsys.readouterr().out.split())
    assert np.abs(samples(tmp_path / "sample")).max() <= 1
    words = ("--solver", "ddim", "--grid", "karras", "--nfe", 4, "--num", 4, "--data", "digits")
    assert run(monkeypatch, "bench", model, *words, "--out", tmp_path / "bench", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["failed"] is None and 0 <= row["outside"] < 1 and row["fd"] > 0


def test_verbs_that_cannot_be_right_say_why(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(picture)
    for words in (
        ("distill", model, "--method", "guided"),
        ("finetune", model),
        ("inspect", model),
        ("restore", model, picture, "--task", "denoise", "--noise", 0.1),
        ("sample", model, "--classifier", "digits"),
        ("bench", model, "--task", "denoise"),
    ):
        out = tmp_path / words[0]
        assert run(monkeypatch, *words, "--out", out) == 2
        assert "is not for a reflected model" in " ".join(capsys.readouterr().err.split())
        assert not list(out.glob("*.json"))


def test_its_trajectories_lead_to_a_verb_that_takes_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And not to a student, which is refused."""
    capsys.readouterr()
    stored = tmp_path / "stored"
    assert run(monkeypatch, "trajectories", model, "-n", 8, "--nfe", 8, "--slots", 8, "--guidance", 2, "--out", stored) == 0
    assert " ".join(capsys.readouterr().out.split()).endswith(
        f"next: fewstep fit {model} --guidance 2 --nfe 5,8 --trajectories {stored} --out runs/fitted"
    )
    words = ("--guidance", 2, "--nfe", 4, "--trajectories", stored, "--num", 6, "--held-out", 2, "--iterations", 0)
    assert run(monkeypatch, "fit", model, *words, "--out", tmp_path / "fitted") == 0


def test_options_of_other_kinds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run(monkeypatch, "train", "--kind", "ddpm", "--p-mean", -1, "--out", tmp_path / "m") == 2
    assert "p_mean changes nothing of the kind ddpm" in " ".join(capsys.readouterr().err.split())
