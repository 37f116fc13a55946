"""``fewstep export``: the list to stdout, how to use it to stderr, a file whole or not at all."""

import json
from pathlib import Path

import pytest
from tests.apps.conftest import run

from fewstep import RectifiedFlow, Sampler
from fewstep.models.zoo import WEIGHTS

FITTED = WEIGHTS / "digits-edm" / "fitted"


@pytest.fixture
def euler(tmp_path: Path) -> Path:
    """A folder of two samplers of a flow."""
    for nfe in (2, 4):
        Sampler.build("euler", "uniform", RectifiedFlow(), nfe=nfe).save(tmp_path / "made" / f"nfe-{nfe:02d}")
    return tmp_path / "made"


def test_the_list_is_all_of_stdout(euler: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "export", euler, "--to", "comfyui", "--nfe", 4) == 0
    said = capsys.readouterr()
    assert said.out == "1.0, 0.75, 0.5, 0.25, 0.0\n"
    assert said.err.startswith("euler, 4 evaluations: paste it into ManualSigmas") and "on euler" in said.err
    assert run(monkeypatch, "export", euler) == 0
    assert capsys.readouterr().out == "1.0, 0.5, 0.0\n1.0, 0.75, 0.5, 0.25, 0.0\n"
    assert run(monkeypatch, "export", euler / "nfe-02" / "sampler.json", "--to", "vllm-omni", "--shift", 3) == 0
    assert capsys.readouterr().out == "[1.0, 0.25]\n"


def test_json(euler: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "export", euler, "--to", "sdcpp", "--json") == 0
    said = capsys.readouterr()
    first, second = json.loads(said.out)
    assert (first["nfe"], second["nfe"], said.err) == (2, 4, "")
    assert first["values"] == [1.0, 0.5, 0.0] and first["text"] == "1.0,0.5,0.0" and first["out"] is None
    assert {"target", "argument", "law", "solver", "use", "sampler"} <= set(first)


def test_a_file_is_written_whole_or_not_at_all(euler: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "lists" / "levels.txt"
    assert run(monkeypatch, "export", euler, "--out", out, "--nfe", 2) == 0
    assert out.read_text() == "1.0, 0.5, 0.0\n" and capsys.readouterr().out == f"list: {out}\n"
    for words in (("--to", "kdiffusion"), ("--to", "a1111"), ("--nfe", 3)):
        assert run(monkeypatch, "export", euler, "--out", out, *words) == 2
    assert out.read_text() == "1.0, 0.5, 0.0\n" and [path.name for path in out.parent.iterdir()] == ["levels.txt"]
    (tmp_path / "file").write_text("")
    assert run(monkeypatch, "export", euler, "--out", tmp_path / "file" / "levels.txt") == 2
    assert "choose a folder that you may write to" in capsys.readouterr().err


def test_refusals(euler: Path, monkeypatch, capsys) -> None:
    for words, says in (
        ((euler, "--to", "a1111"), "written for sigmas, diffusers, comfyui, kdiffusion, sdcpp, vllm-omni"),
        ((FITTED, "--to", "sigmas"), "the coefficients of a fitted sampler do not travel with a list of levels"),
        ((euler, "--nfe", 3), "no sampler of 3 evaluations in"),
        ((euler / "nfe-09",), "it should hold sampler.json or nfe-NN/sampler.json"),
    ):
        assert run(monkeypatch, "export", *words) == 2
        said = capsys.readouterr()
        assert says in said.err and said.out == "" and said.err.count("\n") == 1
    assert run(monkeypatch, "export", FITTED, "--levels-only", "--nfe", 4) == 0
    assert "does not travel" in capsys.readouterr().err
