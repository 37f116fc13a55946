"""A network of one's own, as ``module:function``, through every verb that learns, and on by the next commands that they print."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests import own_networks
from tests.apps import own_models
from tests.apps.conftest import run, samples, without_plots

import fewstep
from fewstep.core.statistics import ModelStatistics
from fewstep.learn.networks import finetune
from fewstep.learn.teacher.gram import GramConfig

pytestmark = [
    pytest.mark.usefixtures("short_reference"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # forward mode of some PyTorch releases says so
]

OWN = "tests.apps.own_models:shrink"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable[..., str]:
    """Type a command in an empty folder: gives what it prints."""
    monkeypatch.chdir(tmp_path)
    without_plots(monkeypatch)

    def type_it(*words: object) -> str:
        code = run(monkeypatch, *words)
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return type_it


def next_words(printed: str, begin: str = "next") -> list[str]:
    """The words of the next command that was printed."""
    (line,) = re.findall(rf"^{begin}: +fewstep (.*)$", printed, re.M)
    return shlex.split(line)


def test_calibrate(typed: Callable[..., str]) -> None:
    printed = typed("calibrate", OWN, "--levels", 4, "--num", 8, "--batch", 4, "--out", "statistics")
    assert ModelStatistics.load("statistics").card["of"] == OWN
    assert next_words(printed) == ["bench", OWN, "--statistics", "statistics", "--out", "runs/bench"]
    typed(*next_words(printed), "--num", 4, "--grid", "angle", "--nfe", 3)
    results = json.loads(Path("runs/bench/results.json").read_text())
    used = {row["solver"]: row["statistics"] for row in results["rows"]}
    assert used["dpm-solver-v3"] == ModelStatistics.load("statistics").fingerprint and used["ddim"] is None


def test_fit(typed: Callable[..., str]) -> None:
    words = ("--nfe", 2, "--num", 16, "--held-out", 16, "--iterations", 0, "--levels", 8, "--noises", 8)
    printed = typed("fit", OWN, *words, "--out", "my fit")
    typed(*next_words(printed), "--npz", "--num", 4)
    expected = fewstep.sample(own_models.shrink(), fewstep.Sampler.load("my fit/nfe-02"), seeds=range(4))
    np.testing.assert_array_equal(samples(Path("runs/sample")), expected.numpy())
    assert OWN in printed and f"fewstep fit {OWN} --nfe 2" in Path("my fit/README.md").read_text()
    typed(*next_words(printed, "or"), "--num", 4)
    (row,) = json.loads(Path("runs/bench/results.json").read_text())["rows"]
    assert (row["solver"], row["grid"], row["nfe"]) == ("fitted", "my fit", 2)


@pytest.mark.slow
def test_optimize(typed: Callable[..., str]) -> None:
    words = ("--levels", 8, "--num", 8, "--noises", 8, "--held-out", 8, "--iterations", 0, "--solver", "ddim,unipc-2", "--nfe", 2)
    printed = typed("optimize", OWN, *words, "--out", "grids")
    typed(*next_words(printed), "--num", 4)
    rows = json.loads(Path("runs/bench/results.json").read_text())["rows"]
    assert [(row["solver"], row["nfe"]) for row in rows] == [("ddim", 2), ("unipc-2", 2)]


def test_trajectories_and_a_fit_to_them(typed: Callable[..., str]) -> None:
    printed = typed("trajectories", OWN, "--num", 24, "--slots", 4, "--nfe", 8, "--out", "stored")
    assert next_words(printed)[:4] == ["distill", OWN, "--trajectories", "stored"]
    words = ("--nfe", 2, "--num", 16, "--held-out", 8, "--iterations", 0, "--noises", 8)
    typed("fit", OWN, *words, "--trajectories", "stored", "--out", "fitted")
    assert fewstep.Sampler.load("fitted/nfe-02").nfe == 2


@pytest.mark.parametrize("verb", ["finetune", "distill"])
def test_a_student_of_a_network_that_has_no_name_cannot_be_saved(monkeypatch, capsys, tmp_path: Path, verb: str) -> None:
    assert run(monkeypatch, verb, "tests.apps.own_models:nameless", "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err.strip()
    assert "call is a lambda, which has no name to import it by: write it as a function" in message and "\n" not in message
    assert "leave out=" in message and not (tmp_path / "out").exists()


TABLE = "tests.own_networks:table"
FEW = ("--steps", 2, "--batch", 4, "--num", 8, "--held-out", 8)


@pytest.mark.slow
def test_a_tuned_network_of_whole_times_is_sampled_and_compared_by_those_who_trust_it(
    typed: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(finetune, "GramConfig", lambda num: GramConfig(levels=16, num=16))
    printed = typed("finetune", TABLE, "--nfe", 2, "--rounds", 1, *FEW, "--levels", 8, "--teacher-nfe", 16, "--out", "tuned")
    assert next_words(printed) == ["bench", "tuned", "--trust", "--nfe", "2", "--out", "runs/bench"]
    typed(*next_words(printed), "--num", 4)  # measured against the teacher, which lies in the folder
    (row,) = json.loads(Path("runs/bench/results.json").read_text())["rows"]
    assert (row["solver"], row["grid"], row["nfe"]) == ("ddim", "optimized", 2) and row["failed"] is None
    assert run(monkeypatch, "sample", "tuned", "--out", "no") == 2
    assert "holds a network of someone's own code, tests.own_networks:TableNet," in capsys.readouterr().err and not Path("no").exists()
    printed = typed("sample", "tuned", "--trust", "--num", 2, "--out", "pictures")
    assert next_words(printed) == ["bench", "tuned", "--trust", "--out", "runs/bench"]
    Path("tuned").rename("moved")
    typed("bench", "moved", "--trust", "--num", 4, "--out", "elsewhere")
    assert "tuned --trust --out runs/sample" in Path("moved/README.md").read_text()


def test_a_network_of_whole_times_is_distilled(typed: Callable[..., str]) -> None:
    printed = typed("distill", TABLE, "--method", "kd", *FEW, "--teacher-nfe", 4, "--out", "student")
    assert next_words(printed) == ["bench", "student", "--trust", "--out", "runs/bench"] and Path("student/slots.png").exists()
    typed(*next_words(printed), "--num", 4)
    (row,) = json.loads(Path("runs/bench/results.json").read_text())["rows"]
    assert (row["solver"], row["nfe"], row["arithmetic"]) == ("ddim", 1, 1.0)


def test_samples_that_are_no_pictures_are_distilled_too(typed: Callable[..., str]) -> None:
    typed("distill", "tests.apps.own_models:points", "--method", "kd", *FEW, "--teacher-nfe", 4, "--out", "student")
    assert not Path("student/slots.png").exists()
    typed("sample", "student", "--trust", "--num", 4, "--out", "points")
    assert samples(Path("points")).shape == (4, 3)


@pytest.mark.slow
def test_a_saved_network_goes_through_every_verb(typed: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    own_networks.table().save("model")
    for verb, *words in (
        ("calibrate", "--levels", 4, "--num", 8, "--batch", 4),
        ("fit", "--nfe", 2, "--num", 16, "--held-out", 16, "--iterations", 0, "--levels", 8, "--noises", 8),
        ("optimize", "--levels", 8, "--num", 8, "--noises", 8, "--held-out", 8, "--iterations", 0, "--solver", "unipc-2", "--nfe", 2),
        ("trajectories", "--num", 8, "--slots", 2, "--nfe", 8),
    ):
        printed = typed(verb, "model", "--trust", *words, "--out", verb)
        assert next_words(printed)[1:3] == ["model", "--trust"]
        if verb != "trajectories":
            typed(*next_words(printed), "--num", 4)


UNET = "tests.apps.own_models:unet"


@pytest.mark.slow
def test_finetune(typed: Callable[..., str], monkeypatch, tmp_path: Path, tiny: Path) -> None:
    monkeypatch.setattr(finetune, "GramConfig", lambda num: GramConfig(levels=16, num=16))
    (tmp_path / "model").symlink_to(tiny)
    words = ("--nfe", 2, "--rounds", 1, "--steps", 2, "--batch", 4, "--num", 8, "--held-out", 8, "--levels", 8, "--teacher-nfe", 16)
    printed = typed("finetune", UNET, *words, "--out", "tuned")
    assert next_words(printed) == ["bench", "tuned", "--nfe", "2", "--out", "runs/bench"]
    typed(*next_words(printed), "--num", 4)
    (row,) = json.loads(Path("runs/bench/results.json").read_text())["rows"]
    assert (row["solver"], row["grid"], row["nfe"]) == ("ddim", "optimized", 2)


@pytest.mark.slow
def test_distill(typed: Callable[..., str], tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "model").symlink_to(tiny)
    words = ("--method", "slots", "--slots", 2, "--steps", 2, "--batch", 4, "--num", 16, "--held-out", 8, "--teacher-nfe", 4)
    printed = typed("distill", UNET, *words, "--out", "student")
    typed(*next_words(printed), "--num", 4)
    rows = json.loads(Path("runs/bench/results.json").read_text())["rows"]
    assert [(row["solver"], row["nfe"]) for row in rows] == [("ddim", 1), ("ddim", 2)] and Path("student/slots.png").exists()
