"""The model that a command names, and functions of one's own that make one."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from tests.apps import own_models
from tests.apps.conftest import run, samples

import fewstep
from fewstep.apps.models import guidance_of, model_words, open_model
from fewstep.apps.pipelines import PipelineOptions
from fewstep.runtime.errors import ModelError

OWN = "tests.apps.own_models:"


def test_a_function_makes_the_model_under_the_name_that_was_typed() -> None:
    made = open_model(f"{OWN}shrink")
    assert made.name == f"{OWN}shrink" and made.command_name(2) == f"{OWN}shrink --guidance 2"
    assert isinstance(made.network, own_models.Shrink) and made.shape == (1, 4, 4)
    assert open_model(f"{OWN}points").name == f"{OWN}points"  # what hints have to say


def test_a_model_with_a_folder_keeps_its_name() -> None:
    named, folder = open_model(f"{OWN}digits"), open_model(f"{OWN}folder")
    assert (named.name, named.command_name(1)) == ("digits-edm", "digits-edm")
    assert folder.name == "digits-edm" and folder.command_name(1) == str(own_models.WEIGHTS / "digits-edm")


def test_a_folder_with_a_colon_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tests:model").symlink_to(tiny)
    assert open_model("tests:model").fingerprint == open_model(str(tiny)).fingerprint


HOW = "it should be a function without arguments that returns a fewstep.Model"
MISTAKES = {
    "no_such_module:model": f"cannot import no_such_module:model: ModuleNotFoundError: No module named 'no_such_module'; {HOW}",
    f"{OWN}nowhere": "has no attribute 'nowhere'",
    f"{OWN}NUMBER": f"{OWN}NUMBER is not a function but a int; {HOW}",
    f"{OWN}": "names no function: say module:function",
    ":shrink": "names no function: say module:function",
    f"{OWN}wants": f"{OWN}wants cannot be called without arguments (missing a required argument: 'path'); {HOW}",
    f"{OWN}breaks": "breaks made no model: FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.pt' (own_models.py, line ",
    f"{OWN}grumbles": f"{OWN}grumbles made no model: RuntimeError: first line (own_models.py, line ",
    f"{OWN}misuses": "misuses made no model: unknown prediction type 'epsilonn': did you mean epsilon?",
    f"{OWN}network": f"{OWN}network returned a Shrink, not a fewstep.Model: wrap the network with its noise law and what it predicts",
    f"{OWN}nothing": f"{OWN}nothing returned a NoneType, not a fewstep.Model",
    f"{OWN}Shrink": "returned a Shrink, not a fewstep.Model",
    f"{OWN}shapeless": f"the model that {OWN}shapeless returned does not know the shape of its samples: make it with shape=",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path, name: str) -> None:
    assert run(monkeypatch, "sample", name, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("fewstep: ") and MISTAKES[name] in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_prompts_are_for_pipelines(tmp_path: Path) -> None:
    for name in ("digits-edm", f"{OWN}shrink"):
        with pytest.raises(ModelError, match="is not a pipeline: leave --prompts out"):
            open_model(name, PipelineOptions(prompts=tmp_path / "prompts.txt"))


def test_the_guidance_scale_is_the_models_own_where_none_is_typed() -> None:
    class Guided(fewstep.Model):
        default_guidance = 3.0  # type: ignore[assignment]

    plain, own = own_models.shrink(), own_models.shrink()
    object.__setattr__(own, "__class__", Guided)
    assert (guidance_of(plain, None), guidance_of(plain, 2.0), guidance_of(own, None), guidance_of(own, 1.0)) == (1.0, 2.0, 3.0, 1.0)
    assert (model_words(plain, None), model_words(plain, 1.0), model_words(own, 3.0)) == ([], [], [])
    assert model_words(plain, 1.2345678) == ["--guidance", "1.2345678"]  # all digits: the same pictures
    assert plain.command_name(1.2345678).endswith(" --guidance 1.2345678")
    assert model_words(plain, 2.5) == ["--guidance", "2.5"] and model_words(own, 1.0) == ["--guidance", "1"]


def test_a_network_of_ones_own_is_sampled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    words = ("sample", f"{OWN}shrink", "--solver", "ddim", "--nfe", 4, "--num", 3, "--npz", "--out", tmp_path)
    assert run(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert f"next: fewstep bench {OWN}shrink --out runs/bench" in out and (tmp_path / "grid.png").exists()
    expected = fewstep.sample(own_models.shrink(), "ddim", nfe=4, seeds=range(3))
    np.testing.assert_array_equal(samples(tmp_path), expected.numpy())


def test_samples_that_are_no_pictures_are_arrays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    words = ("sample", f"{OWN}points", "--num", 3, "--out", tmp_path)
    assert run(monkeypatch, *words) == 0
    assert f"samples: {tmp_path / 'samples.npz'}\n" in capsys.readouterr().out
    assert samples(tmp_path).shape == (3, 3) and {path.name for path in tmp_path.iterdir()} == {"samples.json", "samples.npz"}
    assert run(monkeypatch, *words, "--json") == 0
    assert json.loads(capsys.readouterr().out).keys() == {"num", "nfe", "sampler", "npz"}
    assert run(monkeypatch, *words[:-1], tmp_path / "out", "--singles") == 2
    assert "samples of shape (3,) are no pictures: leave --singles out" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("short_reference")
@pytest.mark.slow
def test_a_network_of_ones_own_is_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    for name, pictures in (("shrink", True), ("points", False)):
        words = ("bench", f"{OWN}{name}", "--solver", "ddim,unipc-2", "--grid", "angle", "--nfe", 3, "--num", 4, "--out", tmp_path / name)
        assert run(monkeypatch, *words) == 0
        out = capsys.readouterr().out
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["model"] == f"{OWN}{name}" and [row["solver"] for row in results["rows"]] == ["ddim", "unipc-2"]
        assert (tmp_path / name / "pictures.png").exists() == pictures == ("pictures: " in out)
        (line,) = re.findall(r"^next: fewstep (.*)$", out, re.M)
        assert run(monkeypatch, *shlex.split(line)) == 0 and (tmp_path / name / "report.html").exists()
