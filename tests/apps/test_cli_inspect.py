"""``fewstep inspect``: its page, its figures, and refusals."""

import json
import re
from pathlib import Path

import pytest
from tests.apps.conftest import run
from tests.problems import DSNO, tiny_folder

import fewstep


@pytest.mark.slow
def test_a_page_and_its_figures(monkeypatch, capsys, tmp_path: Path) -> None:
    words = ("inspect", "digits-edm", "-n", 2, "--nfe", 5, "--grid", "karras", "--out", tmp_path)
    assert run(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    page, facts = (tmp_path / "inspect.html").read_text(), json.loads((tmp_path / "inspect.json").read_text())
    assert "network evaluations" in said and "the image is decided between noise levels" in said
    assert set(facts) == {"model", "guidance", "nfe", "num", "geometry", "decided", "density", "picks", "present"}
    assert facts["decided"]["from"] > facts["decided"]["to"] and len(facts["present"]["rmse_when_stopped"]) == 6
    best = facts["picks"][0]
    assert best["solver"] == "fitted" and best["error"] < facts["present"]["rmse_when_stopped"][-1]
    assert "fewstep sample digits-edm --solver fitted --nfe 5 --out runs/sample" in page and "unipc-2 on karras" in page
    assert "://" not in page and page.count("<svg") == 3 and page.count("image/png") == 2
    assert not re.search(r"\bnan\b|\binf\b|None", page)


@pytest.mark.slow
def test_a_model_without_artifacts_is_told_to_fit(monkeypatch, capsys, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny", 2)
    assert run(monkeypatch, "inspect", folder, "-n", 2, "--nfe", 4, "--guidance", 2, "--json", "--out", tmp_path / "out") == 0
    told, page = json.loads(capsys.readouterr().out), (tmp_path / "out" / "inspect.html").read_text()
    assert told["guidance"] == 2 and told["page"] == str(tmp_path / "out" / "inspect.html")
    assert f"fewstep fit {folder} --guidance 2 --nfe 4 --out runs/fitted" in page


@pytest.mark.slow
def test_a_saved_sampler_in_use(monkeypatch, capsys, tmp_path: Path) -> None:
    model = fewstep.load_model("digits-edm")
    fewstep.Sampler.build("ddim", "karras", model.schedule, nfe=10).save(tmp_path / "mine")
    assert run(monkeypatch, "inspect", "digits-edm", "-n", 4, "--sampler", tmp_path / "mine", "--json", "--out", tmp_path / "out") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["present"]["idle"] >= 1 and told["nfe"] == 10  # karras spends its last ones where all is decided
    assert "are idle" in (tmp_path / "out" / "inspect.html").read_text()


@pytest.mark.slow
def test_errors_of_a_sampler_that_adds_noise_say_nothing(monkeypatch, capsys, tmp_path: Path) -> None:
    words = ("inspect", "digits-edm", "-n", 2, "--nfe", 4, "--solver", "ddim:eta=1", "--json", "--out", tmp_path)
    assert run(monkeypatch, *words) == 0 and json.loads(capsys.readouterr().out)["present"]["idle"] == 0
    assert "adds noise, so it ends elsewhere" in (tmp_path / "inspect.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((DSNO,), "is a student"),
        (("digits-edm-3step",), "was made for 3 steps of ddim alone, and its answers at other times mean nothing"),
        (("digits-edm", "-n", 1), "an inspection takes 2 noises or more, got 1"),
        (("digits-edm", "--nfe", 0), "0"),
        (("digits-edm", "--solver", "unipc-9"), "unknown solver"),
        (("digits-edm", "--sampler", "nowhere", "--nfe", 4), "a saved sampler has all of its own: leave --nfe out"),
        (("digits-edm", "--seed", -1), "seeds must lie between 0 and 2^63"),
        (("nowhere",), "no model 'nowhere'"),
    ],
)
@pytest.mark.every(3)
def test_words_that_cannot_be_are_refused(words, says, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "inspect", *words, "--out", tmp_path / "out") == 2
    told = capsys.readouterr()
    assert says in told.err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_fitted_sampler_may_be_the_one_in_use(monkeypatch, capsys, tmp_path: Path) -> None:
    assert run(monkeypatch, "inspect", "digits-edm", "-n", 2, "--nfe", 5, "--solver", "fitted", "--json", "--out", tmp_path) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["picks"][0]["error"] == pytest.approx(told["present"]["rmse_when_stopped"][-1], rel=1e-4)


def test_several_processes_are_refused(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(monkeypatch, "inspect", "digits-edm", "--out", tmp_path / "out") == 2
    assert "an inspection is the work of one process" in capsys.readouterr().err
