"""``fewstep sample --guidance-form``: the pictures of `sample`, and refusals."""

import re
from pathlib import Path

import numpy as np
import pytest
from tests.apps.conftest import run

import fewstep

WORDS = ("--guidance-form", "cfg++", "--nfe", 4, "-n", 3, "--seed", 5)


def test_the_pictures_are_those_of_sample(monkeypatch, capsys, tmp_path: Path) -> None:
    assert run(monkeypatch, "sample", "digits-edm", *WORDS, "--guidance", 0.6, "--npz", "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "dpm-solver-pp-2m" in said and "next:" not in said
    with np.load(tmp_path / "samples.npz") as file:
        made = file["x"]
    asked = {"nfe": 4, "seeds": range(5, 8), "guidance": 0.6}
    wanted, other = (
        fewstep.sample(fewstep.load_model("digits-edm"), "dpm-solver-pp-2m", guidance_form=form, **asked) for form in ("cfg++", "cfg")
    )
    assert np.abs(made - wanted.numpy()).max() < 1e-5 < np.abs(made - other.numpy()).max()


def test_another_form_is_another_command(monkeypatch, capsys, tmp_path: Path) -> None:
    words = ("sample", "digits-edm", "--solver", "euler", *WORDS[2:], "--out", tmp_path)
    assert run(monkeypatch, *words) == 0
    assert run(monkeypatch, *words, "--guidance-form", "cfg++", "--guidance", 1) == 2
    assert "another command" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("digits-edm", "--guidance-form", "cfg++"), "scales of its own, between 0 and 1: name one"),
        (("digits-edm", "--guidance", 0.6, "--solver", "unipc-2"), "a corrector"),
        (("digits-edm", "--guidance-form", "cfg+"), "did you mean cfg\\+\\+"),
        (("digits-edm", "--parallel"), "leave --classifier and --parallel out"),
        (("digits-edm", "--classifier", "digits"), "leave --classifier and --parallel out"),
        (("digits-ddpm", "--guidance", 0.6), "cannot be guided"),
        (("digits-flow-map", "--guidance", 0.6), "is a student"),
    ],
)
def test_what_it_is_not_for_is_refused_before_a_folder_is_made(words, message, monkeypatch, capsys, tmp_path: Path) -> None:
    model, *others = words
    form = () if "--guidance-form" in words else WORDS[:2]
    assert run(monkeypatch, "sample", model, *form, *others, "-n", 3, "--out", tmp_path / "out") == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
