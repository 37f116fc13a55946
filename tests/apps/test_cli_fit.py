"""fewstep fit, and fitted samplers in sample and bench."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.apps.conftest import counted, made_by, run, samples

from fewstep import Sampler
from fewstep.apps.commands import bench

pytestmark = [
    pytest.mark.usefixtures("short_reference"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # forward mode of some PyTorch releases says so
]

FIT = ("--nfe", "3,2", "--num", 32, "--held-out", 16, "--iterations", 1, "--batch", 32, "--levels", 12, "--noises", 16)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tiny: Path) -> Path:
    """Samplers fitted to the small model."""
    return made_by(tmp_path_factory.mktemp("fitted") / "samplers", "fit", tiny, *FIT)


@pytest.fixture
def owner(tmp_path: Path, tiny: Path, fitted: Path) -> Path:
    """A copy of the small model with fitted samplers of its own."""
    model = shutil.copytree(tiny, tmp_path / "owner")
    shutil.copytree(fitted, model / "fitted", ignore=shutil.ignore_patterns("trajectories"))
    return model


def test_fit_writes_samplers(monkeypatch, capsys, tmp_path: Path, tiny: Path, fitted: Path) -> None:
    assert {path.name for path in fitted.iterdir()} == {"README.md", "plan.json", "trajectories", "nfe-02", "nfe-03"}
    assert f"fewstep fit {tiny} --nfe 3,2" in (fitted / "README.md").read_text()
    calls, words = counted(monkeypatch), ("fit", tiny, *FIT, "--out", fitted)
    assert run(monkeypatch, *words, "--json") == 0  # again: all is there
    done = json.loads(capsys.readouterr().out)
    assert not calls and (done["model"], done["samplers"]) == ("model", str(fitted)) and done["seconds"] > 0
    assert [row["nfe"] for row in done["rows"]] == [2, 3]
    for row in done["rows"]:
        card = Sampler.load(fitted / f"nfe-{row['nfe']:02d}").card
        assert row == {"nfe": row["nfe"]} | {key: card[key] for key in row.keys() - {"nfe"}}
        assert (row["noises"], row["held_out_noises"]) == (32, 16) and 0 < row["error"][0] < row["error"][1]
        assert row["chosen"] in ("fitted in sequence", "swept") and " on " in row["best_hand_made"] and row["network_evaluations"] > 0
    assert run(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert not calls and all(f"{row['error'][0]:.4f} ({row['rmse'][0]:.4f})" in out and row["chosen"] in out for row in done["rows"])
    assert f"samplers: {fitted}\n" in out
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"^next: fewstep (.*)$", out, re.M)
    assert run(monkeypatch, *shlex.split(line)) == 0 and (tmp_path / "runs" / "sample" / "grid.png").exists()
    (line,) = re.findall(r"^or: +fewstep (.*)$", out, re.M)
    assert run(monkeypatch, *shlex.split(line), "--num", 4) == 0
    rows = json.loads((tmp_path / "runs" / "bench" / "results.json").read_text())["rows"]
    assert [(row["solver"], row["grid"], row["nfe"]) for row in rows] == [("fitted", str(fitted), nfe) for nfe in (2, 3)]


@pytest.mark.slow
def test_the_plan_is_printed_before_anything_runs(monkeypatch, capsys, tmp_path: Path, tiny: Path) -> None:
    stages = ("trajectories", "levels to begin with", "levels", "coefficients", "check on held-out noises", "in all, about")
    assert run(monkeypatch, "fit", tiny, "--nfe", 2, "--budget", 400, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{stage} +[\d,]+ +[\d.]+ (seconds|minutes) *$", out, re.M) for stage in stages), out
    assert int(re.search(r"in all, about +([\d,]+)", out)[1]) <= 400 and "MiB of disk and" in out
    assert out.index("plan for model") < out.index("mean error on held-out noises")
    monkeypatch.setattr("fewstep.learn.samplers.fit_plan.available_memory", lambda: 2**20)
    assert run(monkeypatch, "fit", tiny, "--nfe", 2, "--budget", 400, "--out", tmp_path / "other") == 2
    assert "this fit needs about 0.3 GiB of memory, and 0.0 GiB are free: give it a smaller budget" in capsys.readouterr().err
    assert run(monkeypatch, "fit", tiny, "--nfe", "2,8", "--budget", 50, "--out", tmp_path / "other") == 2
    assert "a budget of 50 network evaluations is too small for samplers of 2, 8: the least fit takes" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_options_of_fit_reach_it(monkeypatch, capsys, tmp_path: Path, tiny: Path, fitted: Path) -> None:
    options = ("--history", 2, "--pool", "channel", "--no-bias", "--ridge", 1e-4, "--shrink", 0.5, "--parent", "ddim", "--iterations", 0)
    words = ("fit", tiny, *FIT, *options, "--trajectories", fitted / "trajectories", "--out", tmp_path / "out")
    assert run(monkeypatch, *words, "--json") == 0
    assert not (tmp_path / "out" / "trajectories").exists()
    sampler = Sampler.load(tmp_path / "out" / "nfe-03")
    form = {"history": 2, "pool": "channel", "bias": False, "ridge": 1e-4, "shrink": 0.5}
    assert sampler.options == {**form, "parent": "ddim"} and "swept" not in sampler.card["stages"]
    assert run(monkeypatch, *words[:-2], "--noises", 8, "--out", tmp_path / "out") == 2  # of another configuration
    assert "remove it, or use another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_fit_continues(monkeypatch, capsys, tmp_path: Path, tiny: Path, fitted: Path) -> None:
    with monkeypatch.context() as mortal:
        counted(mortal, stop=90)  # among the samplers
        assert run(mortal, "fit", tiny, *FIT, "--out", tmp_path / "cut") == 130
        assert "run the same command to continue" in capsys.readouterr().err
    assert (tmp_path / "cut" / "trajectories" / "manifest.json").exists() and not (tmp_path / "cut" / "nfe-03").exists()
    assert not list((tmp_path / "cut").glob(".*"))
    assert run(monkeypatch, "fit", tiny, *FIT, "--out", tmp_path / "cut") == 0
    for nfe in ("nfe-02", "nfe-03"):
        one, two = (folder / nfe / "sampler.safetensors" for folder in (fitted, tmp_path / "cut"))
        assert one.read_bytes() == two.read_bytes()


def test_fitted_samplers_of_the_models_own_folder_are_used(monkeypatch, capsys, tmp_path: Path, owner: Path, fitted: Path) -> None:
    common = ("--num", 3, "--npz", "--out")
    for name, options in {"a": (), "b": ("--grid", "optimized")}.items():
        assert run(monkeypatch, "sample", owner, "--solver", "fitted", "--nfe", 3, *options, *common, tmp_path / name) == 0
    assert run(monkeypatch, "sample", owner, "--sampler", fitted / "nfe-03", *common, tmp_path / "c") == 0
    np.testing.assert_array_equal(samples(tmp_path / "a"), samples(tmp_path / "c"))
    np.testing.assert_array_equal(samples(tmp_path / "b"), samples(tmp_path / "c"))
    capsys.readouterr()
    its_own = "leave --grid, --times, --sigmas and --statistics out"
    for words, says in {
        ("--nfe", 3, "--grid", "angle"): its_own,
        ("--times", "20,1,0.05"): its_own,
        ("--sigmas", "20,1,0.05"): its_own,
        ("--nfe", 3, "--statistics", "nowhere"): its_own,
        ("--nfe", 5): f"no fitted sampler of owner with 5 evaluations at guidance 1, there are some of 2 at 1, 3 at 1: make one with "
        f"'fewstep fit {owner} --nfe 5 --out DIR'",
        (): "no fitted sampler of owner with 8 evaluations",  # the default
        ("--nfe", 3, "--guidance", 2): "owner cannot be guided",
    }.items():
        assert run(monkeypatch, "sample", owner, "--solver", "fitted", *words, "--out", tmp_path / "d") == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith("fewstep: ") and says in message and "\n" not in message and not (tmp_path / "d").exists()


def test_fitted_samplers_are_compared(monkeypatch, capsys, tmp_path: Path, owner: Path) -> None:
    titles, real = [], bench.progress
    monkeypatch.setattr(bench, "progress", lambda title, total: titles.append((title, total)) or real(title, total))
    words = ("bench", owner, "--solver", "ddim,fitted", "--grid", "angle,karras", "--nfe", "2,5", "--num", 4, "--out", tmp_path / "out")
    assert run(monkeypatch, *words) == 0
    results, text = json.loads((tmp_path / "out" / "results.json").read_text()), capsys.readouterr().out
    rows = [(row["solver"], row["grid"], row["nfe"]) for row in results["rows"]]
    assert rows.count(("fitted", "optimized", 2)) == 1 and len(rows) == 5 and {row[1] for row in rows} == {"angle", "karras", "optimized"}
    assert "no row: no fitted sampler of owner with 5 evaluations" in text and (tmp_path / "out" / "pictures.png").exists()
    ((title, total),) = titles
    assert title.startswith("owner: 6 rows, 4 noises") and total == 6  # one of them skipped


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("MODEL", "--pool", "pixel"), "--pool is element or channel or scalar, got 'pixel'"),
        (("MODEL", "--nfe", "2,x"), "--nfe wants whole numbers separated by commas"),
        (("MODEL", "--nfe", ""), "--nfe wants whole numbers separated by commas"),
        (("MODEL", "--nfe", "0"), "at least 1 evaluation, got 0"),
        (("MODEL", "--nfe", "65", "--levels", "64"), "1 to 64 evaluations, got 65"),
        (("MODEL", "--parent", "dim"), "did you mean ddim"),
        (("MODEL", "--parent", "unipc-2"), "a fit starts from a solver that"),
        (("MODEL", "--parent", "ddim:eta=1"), "without noise"),
        (("MODEL", "--parent", "ddim:eta=x"), "eta"),
        (("MODEL", "--parent", "dpm-solver-v3"), "statistics"),
        (("MODEL", "--history", "0"), "history is at least 1, got 0"),
        (("MODEL", "--ridge", "-1"), "ridge lies between 0 and 1e6"),
        (("MODEL", "--shrink", "nan"), "shrink is a number, got nan"),
        (("MODEL", "--shrink", "inf"), "shrink lies between 0 and 1e6"),
        (("MODEL", "--seed", "-1"), "seed is at least 0, got -1"),
        (("MODEL", "--iterations", "-1"), "iterations is at least 0, got -1"),
        (("MODEL", "--num", "1"), "num is at least 2, got 1"),
        (("MODEL", "--held-out", "0"), "held_out is at least 2, got 0"),
        (("MODEL", "--batch", "0"), "batch is at least 1, got 0"),
        (("MODEL", "--guidance", "2"), "cannot be guided"),
        (("MODEL", "--guidance", "nan"), "guidance"),
        (("MODEL", "--trajectories", "nowhere"), "cannot read nowhere/manifest.json"),
        (("digits-emd",), "did you mean digits-edm"),
    ],
)
@pytest.mark.every(3)
def test_mistakes_with_fits(monkeypatch, capsys, tmp_path: Path, tiny: Path, words: tuple[str, ...], says: str) -> None:
    calls = counted(monkeypatch)
    assert run(monkeypatch, "fit", *(tiny if word == "MODEL" else word for word in words), "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("fewstep: ") and says in message and "\n" not in message
    assert not calls and not (tmp_path / "out").exists()


def test_a_fit_that_cannot_be_kept_is_not_begun(monkeypatch, capsys, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "file").write_text("")
    calls = counted(monkeypatch)
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert run(monkeypatch, "fit", tiny, "--out", out) == 2
        message = capsys.readouterr().err.strip()
        assert not calls and "choose a folder that you may write to" in message and "\n" not in message


def test_numbers_that_are_none_are_said_so(monkeypatch, capsys, tmp_path: Path, tiny: Path) -> None:
    assert run(monkeypatch, "finetune", tiny, "--nfe", "three", "--out", tmp_path / "out") == 2
    assert "--nfe" in capsys.readouterr().err and not (tmp_path / "out").exists()
