"""fewstep optimize and finetune, and what they make in sample and bench."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.apps.conftest import counted, made_by, run, samples, without_plots

from fewstep import Sampler, load_model
from fewstep.learn.networks import finetune
from fewstep.learn.samplers import optimize_plan
from fewstep.learn.teacher.gram import GramConfig
from fewstep.sampling.grid_table import GridTable

pytestmark = [
    pytest.mark.usefixtures("short_reference"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # forward mode of some PyTorch releases says so
]

OPTIMIZE = ("--levels", 8, "--num", 8, "--noises", 8, "--held-out", 8, "--iterations", 1, "--solver", "ddim,unipc-2", "--nfe", "2,3")
FINETUNE = ("--nfe", 2, "--rounds", 2, "--steps", 3, "--batch", 4, "--num", 8, "--held-out", 8, "--levels", 8, "--teacher-nfe", 16)


def hurry(monkeypatch) -> None:
    """Less work than finetune does to choose its levels, and than optimize does for exact endpoints."""
    monkeypatch.setattr(finetune, "GramConfig", lambda num: GramConfig(levels=16, num=16))
    monkeypatch.setattr(optimize_plan, "REFERENCE_NFE", 16)


@pytest.fixture(autouse=True)
def _hurried(monkeypatch) -> None:
    hurry(monkeypatch)


@pytest.fixture(scope="module")
def optimized(tmp_path_factory, tiny: Path) -> Path:
    """Schedules of the small model."""
    return made_by(tmp_path_factory.mktemp("optimized") / "samplers", "optimize", tiny, *OPTIMIZE, change=hurry)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny: Path) -> Path:
    """The small model, tuned a little."""
    return made_by(tmp_path_factory.mktemp("tuned") / "model", "finetune", tiny, *FINETUNE, change=hurry)


@pytest.mark.slow
def test_optimize_writes_samplers_grids_and_plots(monkeypatch, capsys, tiny: Path, optimized: Path) -> None:
    for solver in ("ddim", "unipc-2"):
        files = {path.name for path in (optimized / solver).iterdir()}
        assert files == {"grids.json", "README.md", "schedules.png", "nfe-02", "nfe-03"}
        with Image.open(optimized / solver / "schedules.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 10  # not blank
        assert Sampler.load(optimized / solver / "nfe-03").nfe == 3
        assert GridTable.load(optimized / solver).grids.keys() == {2, 3}
    without_plots(monkeypatch)
    calls = counted(monkeypatch)
    words = ("optimize", tiny, *OPTIMIZE, "--out", optimized)
    assert run(monkeypatch, *words, "--json") == 0  # again: all is there
    done = json.loads(capsys.readouterr().out)
    assert not calls and done["samplers"] == str(optimized) and done["model"] == "model" and Path(done["plots"]).exists()
    assert [(row["solver"], row["nfe"]) for row in done["rows"]] == [(solver, nfe) for solver in ("ddim", "unipc-2") for nfe in (2, 3)]
    assert all(0 < row["error"][0] <= row["error"][1] for row in done["rows"])  # the best standard grid was one of the candidates
    assert run(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert not calls and f"bench {tiny} --sampler {optimized} --out runs/bench" in out
    assert all(f"{row['error'][0]:.4f}" in out for row in done["rows"])


@pytest.mark.slow
def test_optimized_samplers_are_compared(monkeypatch, capsys, tmp_path: Path, tiny: Path, optimized: Path) -> None:
    words = ("bench", tiny, "--sampler", optimized, "--num", 4, "--json", "--out", tmp_path / "out")
    assert run(monkeypatch, *words) == 0
    results = json.loads(capsys.readouterr().out)
    place = str(optimized)
    assert [(row["solver"], row["grid"], row["nfe"]) for row in results["rows"]] == [
        (solver, place, nfe) for solver in ("ddim", "unipc-2") for nfe in (2, 3)
    ]
    assert (tmp_path / "out" / "pictures.png").exists()
    calls = counted(monkeypatch)
    assert run(monkeypatch, *words) == 0 and not calls
    assert json.loads(capsys.readouterr().out)["rows"] == results["rows"]
    assert run(monkeypatch, *words[:-3], "--nfe", 3, "--solver", "heun", "--grid", "angle", "--json", "--out", tmp_path / "some") == 0
    some = json.loads(capsys.readouterr().out)
    assert [(row["solver"], row["nfe"]) for row in some["rows"]] == [("ddim", 3), ("unipc-2", 3)]
    assert [one["key"][1:] for one in some["skipped"]] == [["heun", "angle", 3]]


def test_samplers_of_another_model_are_refused(monkeypatch, capsys, tmp_path: Path, optimized: Path) -> None:
    (tmp_path / "none").mkdir()
    for model, folder, says in (
        ("digits-edm", optimized, "is a sampler of model ("),
        ("digits-edm", tmp_path / "none", "no sampler below"),
    ):
        assert run(monkeypatch, "bench", model, "--sampler", folder, "--out", tmp_path / "out") == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith("fewstep: ") and says in message and "\n" not in message and not (tmp_path / "out").exists()


def test_the_grids_of_the_models_own_folder(monkeypatch, capsys, tmp_path: Path, tiny: Path, optimized: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    shutil.copytree(optimized / "ddim", model / "optimized" / "ddim")
    common = ("--num", 3, "--npz", "--out")
    assert run(monkeypatch, "sample", model, "--solver", "ddim", "--grid", "optimized", "--nfe", 3, *common, tmp_path / "a") == 0
    assert run(monkeypatch, "sample", tiny, "--sampler", optimized / "ddim" / "nfe-03", *common, tmp_path / "b") == 0
    np.testing.assert_array_equal(samples(tmp_path / "a"), samples(tmp_path / "b"))
    capsys.readouterr()
    for words, says in {
        ("--solver", "unipc-2", "--nfe", 3): "no optimized grid of model for unipc-2 at guidance 1, there are some for ddim",
        ("--solver", "ddim", "--nfe", 5): "no optimized grid of 5 evaluations for ddim here, only of 2, 3",
    }.items():
        assert run(monkeypatch, "sample", model, "--grid", "optimized", *words, "--out", tmp_path / "c") == 2
        message = capsys.readouterr().err.strip()
        assert says in message and "\n" not in message and not (tmp_path / "c").exists()
    words = ("--solver", "ddim,unipc-2", "--grid", "optimized", "--nfe", "3,5", "--num", 4, "--out", tmp_path / "bench")
    assert run(monkeypatch, "bench", model, *words) == 0
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert [(row["solver"], row["grid"], row["nfe"]) for row in results["rows"]] == [("ddim", "optimized", 3)]
    assert {tuple(one["key"][1:]) for one in results["skipped"]} == {
        (solver, "optimized", nfe) for solver, nfe in (("ddim", 5), ("unipc-2", 3), ("unipc-2", 5))
    }
    assert "no row: no optimized grid of 5 evaluations" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_optimisation_continues(monkeypatch, capsys, tmp_path: Path, tiny: Path, optimized: Path) -> None:
    without_plots(monkeypatch)
    with monkeypatch.context() as mortal:
        counted(mortal, stop=300)  # among the schedules
        assert run(mortal, "optimize", tiny, *OPTIMIZE, "--out", tmp_path / "cut") == 130
        assert "run the same command to continue" in capsys.readouterr().err
    assert run(monkeypatch, "optimize", tiny, *OPTIMIZE, "--out", tmp_path / "cut") == 0
    for solver in ("ddim", "unipc-2"):
        one, two = (GridTable.load(folder / solver) for folder in (optimized, tmp_path / "cut"))
        assert all(torch.equal(one.grid(nfe).t, two.grid(nfe).t) for nfe in (2, 3))


def test_finetune_makes_a_model(monkeypatch, capsys, tmp_path: Path, tiny: Path) -> None:
    before = {path: path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
    out = tmp_path / "tuned"
    words = ("finetune", tiny, *FINETUNE, "--half", "--out", out)
    assert run(monkeypatch, *words, "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["model"], done["nfe"], done["folder"]) == ("model", 2, str(out)) and 1 <= len(done["history"]) <= 2
    assert done["history"] == json.loads((out / "history.json").read_text())
    assert {path: path.read_bytes() for path in tiny.rglob("*") if path.is_file()} == before
    assert "fewstep finetune" in (out / "README.md").read_text()
    model = load_model(out)
    assert (model.tuned.teacher, model.tuned.nfe, model.tuned.form) == (str(tiny.resolve()), 2, "mean")
    calls = counted(monkeypatch)
    assert run(monkeypatch, *words) == 2 and not calls
    assert f"{out} already holds a finished student" in capsys.readouterr().err
    shutil.rmtree(out)
    assert run(monkeypatch, *words) == 0
    text = capsys.readouterr().out
    assert f"model: {out}\nnext: fewstep bench {out} --nfe 2" in text and f"{done['history'][0]['bound_before']:.4f}" in text


@pytest.mark.slow
def test_a_killed_tuning_continues(monkeypatch, capsys, tmp_path: Path, tiny: Path, tuned: Path) -> None:
    words = ("finetune", tiny, *FINETUNE, "--out", tmp_path / "cut")
    with monkeypatch.context() as mortal:
        counted(mortal, stop=4, training=True)  # in the second step
        assert run(mortal, *words) == 130
        assert "run the same command to continue" in capsys.readouterr().err and not (tmp_path / "cut" / "tuned.json").exists()
    assert run(monkeypatch, *words[:-2], "--lr", 1e-5, "--out", tmp_path / "cut") == 2
    assert "remove it" in capsys.readouterr().err
    assert run(monkeypatch, *words) == 0
    assert load_model(tmp_path / "cut").fingerprint == load_model(tuned).fingerprint


@pytest.mark.slow
def test_a_tuned_model_is_sampled_and_compared_as_it_was_tuned(monkeypatch, capsys, tmp_path: Path, tuned: Path) -> None:
    common = ("--num", 3, "--npz", "--out")
    assert run(monkeypatch, "sample", tuned, *common, tmp_path / "a", "--json") == 0
    assert json.loads(capsys.readouterr().out)["nfe"] == 2
    assert run(monkeypatch, "sample", tuned, "--sampler", tuned / "sampler", *common, tmp_path / "b") == 0
    np.testing.assert_array_equal(samples(tmp_path / "a"), samples(tmp_path / "b"))
    capsys.readouterr()
    assert run(monkeypatch, "bench", tuned, "--num", 4, "--json", "--out", tmp_path / "bench") == 0
    results = json.loads(capsys.readouterr().out)
    assert [(row["solver"], row["grid"], row["nfe"]) for row in results["rows"]] == [("ddim", "optimized", 2)]
    assert results["reference"]["teacher"] == load_model(tuned).tuned.fingerprint and results["rows"][0]["fd"] is None
    words = ("--solver", "unipc-2", "--grid", "angle", "--nfe", 4, "--num", 4, "--json", "--out", tmp_path / "bench")
    assert run(monkeypatch, "bench", tuned, *words) == 0  # as asked, not as tuned
    assert ("unipc-2", "angle", 4) in {(row["solver"], row["grid"], row["nfe"]) for row in json.loads(capsys.readouterr().out)["rows"]}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("optimize", "MODEL", "--nfe", "2,x"), "--nfe wants whole numbers separated by commas"),
        (("optimize", "MODEL", "--nfe", "0"), "nfe must be"),
        (("optimize", "MODEL", "--nfe", "300"), "ask for more levels"),
        (("optimize", "MODEL", "--solver", "dim"), "did you mean ddim"),
        (("optimize", "MODEL", "--solver", ""), "at least one solver"),
        (("optimize", "MODEL", "--solver", "heun", "--nfe", "5"), "use 4 or 6"),
        (("optimize", "MODEL", "--levels", "3"), "levels is at least 4, got 3"),
        (("optimize", "MODEL", "--noises", "1"), "noises is at least 2, got 1"),
        (("optimize", "MODEL", "--guidance", "2"), "cannot be guided"),
        (("optimize", "MODEL", "--solver", "dpm-solver-v3"), "needs statistics"),
        (("optimize", "digits-emd"), "did you mean digits-edm"),
        (("finetune", "MODEL", "--form", "means"), "--form is mean or score, got 'means'"),
        (("finetune", "MODEL", "--states", "ours"), "--states is own or teacher, got 'ours'"),
        (("finetune", "MODEL", "--nfe", "0"), "nfe is at least 1, got 0"),
        (("finetune", "MODEL", "--nfe", "33"), "need at least as many levels"),
        (("finetune", "MODEL", "--form", "score"), "matches scores on images"),
        (("finetune", "MODEL", "--form", "score", "--data", "nowhere"), "no images at"),
        (("finetune", "MODEL", "--guidance", "2"), "cannot be guided"),
        (("finetune", "MODEL", "--lr", "0"), "lr, the learning rate, is a positive number, got 0"),
        (("finetune", "digits-emd"), "did you mean digits-edm"),
        (("bench", "MODEL", "--grid", "optimised"), "did you mean optimized"),
        (("bench", "MODEL", "--grid", "optimized"), "there are none in its folder"),
        (("bench", "MODEL", "--sampler", "nowhere"), "no sampler below nowhere"),
        (("sample", "MODEL", "--grid", "optimized"), "there are none in its folder"),
    ],
)
@pytest.mark.every(3)
def test_mistakes_with_schedules_and_tuning(monkeypatch, capsys, tmp_path: Path, tiny: Path, words: tuple[str, ...], says: str) -> None:
    assert run(monkeypatch, *(tiny if word == "MODEL" else word for word in words), "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("fewstep: ") and says in message and "\n" not in message
    assert not (tmp_path / "out").exists()
