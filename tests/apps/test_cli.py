"""The command line as a person uses it: models, sample, bench, resumption, several processes, and one clear line for every mistake."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.apps.conftest import counted, run, samples

import fewstep
from fewstep import Sampler, TimeGrid, VarianceExploding, load_model, make_solver
from fewstep.apps import cli
from fewstep.evaluate.benchmark.comparison import Comparison
from fewstep.models import generate as generation
from fewstep.models.zoo import WEIGHTS
from fewstep.runtime.job import Job

pytestmark = [
    pytest.mark.usefixtures("short_reference"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # forward mode of some PyTorch releases says so
]


def test_it_says_its_version(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--version") == 0 and capsys.readouterr().out == f"fewstep {fewstep.__version__}\n"


def test_models(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "models", "--json") == 0
    known = json.loads(capsys.readouterr().out)
    assert (
        {"digits-edm", "digits-edm-3step", "digits-flow-map", "digits-ddpm"} == set(known["models"])
        and "unipc-2" in known["solvers"]
        and "angle" in known["grids"]
    )


def test_sample_writes_pictures_and_arrays(monkeypatch, capsys, tmp_path: Path) -> None:
    words = (
        "sample",
        "digits-edm",
        "--nfe",
        4,
        "--num",
        5,
        "--seed",
        7,
        "--guidance",
        2,
        "--npz",
        "--singles",
        "--out",
        tmp_path,
        "--json",
    )
    assert run(monkeypatch, *words) == 0
    done = json.loads(capsys.readouterr().out)
    assert Path(done["grid"]).exists() and sorted(p.name for p in (tmp_path / "singles").iterdir())[0] == "000007.png"
    with np.load(done["npz"]) as file:
        arrays = dict(file)
    assert set(arrays) == {"x", "images", "seeds", "labels"}
    assert (
        arrays["x"].shape == (5, 1, 8, 8) and arrays["seeds"].tolist() == [7, 8, 9, 10, 11] and arrays["labels"].tolist() == [7, 8, 9, 0, 1]
    )
    assert {p.name for p in tmp_path.iterdir()} == {"grid.png", "samples.json", "samples.npz", "singles"}


def test_a_killed_sample_run_continues(monkeypatch, capsys, tmp_path: Path) -> None:
    words = ("sample", "digits-edm", "--nfe", 3, "--num", 6, "--batch", 2, "--npz")
    assert run(monkeypatch, *words, "--out", tmp_path / "whole") == 0
    real, calls = generation.run, []

    def mortal(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(generation, "run", mortal)
    assert run(monkeypatch, *words, "--out", tmp_path / "cut") == 130
    assert "run the same command to continue" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--nfe", 4, "--out", tmp_path / "cut") == 2  # another command: not mixed
    assert run(monkeypatch, *words, "--out", tmp_path / "cut") == 0
    assert len(calls) == 4  # two batches, the kill, and only the third batch again
    np.testing.assert_array_equal(samples(tmp_path / "whole"), samples(tmp_path / "cut"))


@pytest.mark.slow
def test_two_processes_make_the_pictures_of_one(monkeypatch, tmp_path: Path) -> None:
    words = ("sample", "digits-edm", "--nfe", 3, "-n", 8, "--batch", 2, "--npz", "--out")
    assert run(monkeypatch, *words, tmp_path / "1") == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fewstep"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, *map(str, (*words, tmp_path / "2"))], check=True, env=environment, capture_output=True, timeout=300)
    np.testing.assert_array_equal(samples(tmp_path / "1"), samples(tmp_path / "2"))


def test_a_saved_sampler_is_used(monkeypatch, tmp_path: Path) -> None:
    schedule = VarianceExploding()
    Sampler.build(make_solver("unipc-2"), TimeGrid.angle(schedule, 3), schedule).save(tmp_path / "sampler")
    common = ("--num", 3, "--npz", "--out")
    assert run(monkeypatch, "sample", "digits-edm", "--sampler", tmp_path / "sampler", *common, tmp_path / "a") == 0
    assert run(monkeypatch, "sample", "digits-edm", "--nfe", 3, *common, tmp_path / "b") == 0
    np.testing.assert_array_equal(samples(tmp_path / "a"), samples(tmp_path / "b"))


def test_a_sampler_of_another_model_or_scale_is_refused(monkeypatch, capsys, tmp_path: Path) -> None:
    fitted = WEIGHTS / "digits-edm" / "fitted" / "nfe-05"
    assert run(monkeypatch, "sample", "digits-edm", "--sampler", fitted, "--num", 2, "--out", tmp_path / "right") == 0
    for words in (("digits-ddpm",), ("digits-edm", "--guidance", 2)):
        assert run(monkeypatch, "sample", *words, "--sampler", fitted, "--out", tmp_path / "wrong") == 2
        assert "is a sampler of digits-edm (3eb39c07bb43bdb6) at guidance 1, not of" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_bench_and_demo(monkeypatch, capsys, tmp_path: Path) -> None:
    words = ("bench", "digits-ddpm", "--solver", "ddim,unipc-2", "--grid", "angle,trailing", "--nfe", "5,6", "--num", 8, "--out", tmp_path)
    assert run(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == 8 and str(Comparison(results, tmp_path)) in out and (tmp_path / "pictures.png").exists()
    assert run(monkeypatch, "demo", "--num", 8, "--out", tmp_path / "demo") == 0
    out = capsys.readouterr().out
    assert "dpm-solver-pp-3m" in out and "heun" in out and str(tmp_path / "demo" / "pictures.png") in out.replace("\n", "")


def test_explicit_times_and_levels(monkeypatch, tmp_path: Path) -> None:
    for option in ("--times", "--sigmas"):  # the same thing where alpha = 1
        assert run(monkeypatch, "sample", "digits-edm", option, "80,5,0.5,0.002", "--num", 2, "--npz", "--out", tmp_path / option) == 0
    one, two = (samples(tmp_path / option) for option in ("--times", "--sigmas"))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)  # float32


def test_a_network_that_answers_nan_is_named_and_nothing_is_written(monkeypatch, capsys, tmp_path: Path) -> None:
    model = load_model("digits-edm")
    with torch.no_grad():
        next(model.network.parameters()).fill_(torch.nan)
    monkeypatch.setattr("fewstep.apps.models.load_model", lambda name, **options: model)
    assert run(monkeypatch, *SAMPLE, "--out", tmp_path / "out") == 2
    assert "not finite (NaN or infinite) at evaluation 1 of 8, t = 80" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- training and mistakes -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train(monkeypatch, capsys, tmp_path: Path) -> None:
    assert run(monkeypatch, "train", "--kind", "ddpm", "--steps", 2, "--batch", 4, "--out", tmp_path / "m") == 0
    assert run(monkeypatch, "sample", tmp_path / "m", "--nfe", 2, "--num", 2, "--out", tmp_path / "s") == 0


SAMPLE = ("sample", "digits-edm", "--num", "2")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*SAMPLE, "--solver", "unipc2"), "did you mean unipc-2"),
        ((*SAMPLE, "--solver", ""), "unknown solver ''"),
        ((*SAMPLE, "--grid", ""), "unknown grid ''"),
        ((*SAMPLE, "--grid", "angel"), "did you mean angle"),
        ((*SAMPLE, "--grid", "karras:rho=0"), "cannot take"),
        ((*SAMPLE, "--grid", "angle:c=-1"), "needs c > 0"),
        ((*SAMPLE, "--solver", "unipc-2:lower_order_below=foo"), "is a whole number, got 'foo'"),
        ((*SAMPLE, "--seed", "99999999999999999999"), "between 0 and 2^63"),
        (("bench", "digits-edm", "--solver", ""), "at least one solver"),
        (("train", "--steps", "0"), "steps is at least 1, got 0"),
        ((*SAMPLE, "--nfe", "0"), "nfe must be a whole number of at least 1, got 0"),
        ((*SAMPLE, "--solver", "heun", "--nfe", "5"), "use 4 or 6"),
        ((*SAMPLE, "--label", "11"), "labels 0 to 9"),
        ((*SAMPLE, "--num", "0"), "at least 1"),
        ((*SAMPLE, "--times", "80,1,1,0.002"), "1 (at index 1) appears twice"),
        (("sample", "digits-ddpm", "--times", "1500,500,0"), "--times has 1500, but digits-ddpm knows times up to 999"),
        ((*SAMPLE, "--times", "80,1,2,0.002"), "followed by the larger 2"),
        ((*SAMPLE, "--times", "80,1", "--sigmas", "80,1"), "give one of"),
        ((*SAMPLE, "--sigmas", "80,x"), "numbers separated by commas"),
        ((*SAMPLE, "--times", "80,1", "--nfe", "5"), "the levels given say where and how often the network is asked: leave --nfe out"),
        ((*SAMPLE, "--sigmas", "80,1", "--grid", "karras", "--nfe", "5"), "leave --grid and --nfe out"),
        ((*SAMPLE, "--solver", "fitted", "--any-statistics"), "a fitted sampler takes no statistics: leave --any-statistics out"),
        ((*SAMPLE, "--solver", "ddim", "--any-statistics"), "ddim takes no statistics: leave --any-statistics out"),
        (
            ("bench", "digits-edm", "--solver", "ddim,fitted", "--statistics", "s"),
            "none of ddim, fitted takes statistics: leave --statistics out",
        ),
        (("bench", "digits-edm", "--solver", "ddim", "--any-statistics"), "none of ddim takes statistics: leave --any-statistics out"),
        (("sample", "digits-emd"), "did you mean digits-edm"),
        (("sample", "digits-ddpm", "--guidance", "2"), "cannot be guided"),
        (("sample", "digits-ddpm", "--grid", "logsnr", "--nfe", "200"), "fall more than once"),
        (("bench", "digits-edm", "--nfe", "5,x"), "separated by commas"),
        (("bench", "digits-edm", "--nfe", "0"), "nfe must be"),
        (("bench", "digits-edm", "--solver", "dim"), "did you mean ddim"),
        (("bench", "digits-edm", "--peers", "difusers"), "did you mean diffusers"),
        (("train", "--data", "nowhere"), "no images at"),
        (("train", "--kind", "gan"), "unknown kind of model 'gan'"),
        (("calibrate", "digits-emd"), "did you mean digits-edm"),
        (("calibrate", "digits-edm", "--levels", "1"), "levels is at least 2, got 1"),
        (("calibrate", "digits-edm", "--num", "0"), "num is at least 2, got 0"),
        (("calibrate", "digits-edm", "--pool", "pixel"), "unknown pooling 'pixel'"),
        (("calibrate", "digits-edm", "--jvp", "forwardd"), "did you mean forward"),
        (("calibrate", "digits-edm", "--data", "nowhere"), "no images at"),
        (("calibrate", "digits-ddpm", "--guidance", "2"), "cannot be guided"),
        ((*SAMPLE, "--solver", "dpm-solver-v3", "--statistics", "nowhere"), "cannot read nowhere/statistics.json"),
        ((*SAMPLE, "--solver", "dpm-solver-v3", "--guidance", "7.25"), "'fewstep calibrate digits-edm --guidance 7.25 --out DIR'"),
        (("bench", "digits-edm", "--solver", "dpm-solver-v3", "--guidance", "7.25"), "pass --statistics DIR"),
    ],
)
@pytest.mark.every(7)
def test_mistakes_get_one_line_exit_2_and_leave_nothing(monkeypatch, capsys, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    assert run(monkeypatch, *words, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("fewstep: ") and says in message
    assert not (tmp_path / "out").exists()


def test_damaged_samplers_and_unwritable_folders(monkeypatch, capsys, tmp_path: Path) -> None:
    schedule = VarianceExploding()
    folder = Sampler.build(make_solver("ddim"), TimeGrid.angle(schedule, 3), schedule).save(tmp_path / "sampler")
    data = folder / "sampler.safetensors"
    data.write_bytes(data.read_bytes()[:-8])
    for words, flag in ((("--nfe", 8), "--nfe"), (("--solver", "ddim"), "--solver"), (("--grid", "karras"), "--grid")):
        assert run(monkeypatch, *SAMPLE, *words, "--sampler", folder, "--out", tmp_path / "out") == 2
        assert f"a saved sampler has all of its own: leave {flag} out" in capsys.readouterr().err
    assert run(monkeypatch, *SAMPLE, "--sampler", folder, "--out", tmp_path / "out") == 2
    assert "damaged" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert run(monkeypatch, *SAMPLE, "--out", tmp_path / "file" / "out") == 2
    assert "choose a folder that you may write to" in capsys.readouterr().err


# -- hostile words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb", [verb for verb in cli.VERBS if "out" in inspect.signature(verb).parameters], ids=lambda verb: verb.__name__
)
@pytest.mark.every(3, 2)
def test_an_empty_folder_is_not_the_working_folder(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, verb.__name__, "digits-edm", "--out=") == 2
    assert "a file or folder is named by its path, got ''" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("sample", "digits-edm", "--out", "a" * 5000), "no file or folder can be named"),
        (("sample", "a" * 5000, "--out", "x"), "no file or folder can be named"),
        (("sample", "", "--out", "x"), "named by its path, got ''"),
        (("sample", "digits-edm", "--sampler", "a" * 300, "--out", "x"), "no file or folder can be named"),
        (("sample", "digits-edm", "--sampler=", "--out", "x"), "named by its path, got ''"),
        (("sample", "digits-edm", "--seed", 2**63, "--out", "x"), "seeds must lie between 0 and 2^63"),
        (("bench", "digits-edm", "--seed", 2**63, "--out", "x"), "seeds must lie between 0 and 2^63"),
        (("trajectories", "digits-edm", "--seed", 2**63, "--out", "x"), "seeds must lie between 0 and 2^63"),
        (("report", "", "--out", "x"), "named by its path, got ''"),
        (("calibrate", "digits-edm", "--data", "", "--out", "x"), "named by its path, got ''"),
        (("sample", "tests.apps.own_models:leaves", "--out", "x"), "made no model: SystemExit: bye"),
        (("sample", "digits-edm", "--out", "/dev/null/x"), "/dev/null is a file; choose a folder"),
    ],
)
def test_words_that_cannot_be_are_refused(words, says, tmp_path, monkeypatch, capsys):
    _refused(words, says, tmp_path, monkeypatch, capsys)


BILLION = 10**9
FIT = ("fit", "digits-edm", "--nfe", 3)
BENCH = ("bench", "digits-edm", "--solver", "ddim", "--grid", "karras")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("sample", "digits-edm", "--nfe", BILLION), "nfe is at most 10,000, got 1,000,000,000"),
        (("sample", "digits-edm", "--nfe", BILLION, "--solver", "dpm-solver-fast"), "nfe is at most 10,000, got 1,000,000,000"),
        (("sample", "digits-flow-map", "--nfe", BILLION), "nfe is at most 10,000, got 1,000,000,000"),
        (("sample", "digits-edm", "--num", BILLION), "num is at most 10,000,000, got 1,000,000,000: they take weeks"),
        (("sample", "digits-edm", "--batch", BILLION), "batch is at most 1,000,000, got 1,000,000,000"),
        ((*BENCH, "--nfe", BILLION), "nfe is at most 10,000"),
        ((*BENCH, "--nfe", 3, "--num", BILLION), "num is at most 10,000,000"),
        ((*BENCH, "--nfe", 3, "--batch", BILLION), "batch is at most 1,000,000"),
        (("fit", "digits-edm", "--nfe", BILLION), "nfe is at most 10,000"),
        ((*FIT, "--num", BILLION), "num is at most 10,000,000"),
        ((*FIT, "--levels", BILLION), "levels is at most 10,000"),
        ((*FIT, "--batch", BILLION), "batch is at most 1,000,000"),
        (("optimize", "digits-edm", "--solver", "unipc-2", "--nfe", BILLION), "nfe is at most 10,000"),
        (("optimize", "digits-edm", "--solver", "unipc-2", "--nfe", 3, "--noises", BILLION), "noises is at most 10,000,000"),
        (("calibrate", "digits-edm", "--levels", BILLION), "levels is at most 10,000"),
        (("calibrate", "digits-edm", "--num", BILLION), "num is at most 10,000,000"),
        (("trajectories", "digits-edm", "--slots", BILLION), "steps of a grid is at most 10,000"),
        (("trajectories", "digits-edm", "--nfe", BILLION), "nfe is at most 10,000"),
        (("trajectories", "digits-edm", "--num", BILLION), "num is at most 10,000,000"),
        (("inspect", "digits-edm", "--nfe", BILLION), "nfe is at most 10,000"),
        (("inspect", "digits-edm", "--num", BILLION), "num is at most 10,000,000"),
        (("finetune", "digits-edm", "--nfe", BILLION), "nfe"),
        (("finetune", "digits-edm", "--nfe", 3, "--num", BILLION), "num is at most 10,000,000"),
        (("finetune", "digits-edm", "--nfe", 3, "--teacher-nfe", BILLION), "teacher_nfe is at most 10,000"),
        (("distill", "digits-edm", "--method", "kd", "--num", BILLION), "num is at most 10,000,000"),
        (("distill", "digits-edm", "--method", "kd", "--teacher-nfe", BILLION), "teacher_nfe is at most 10,000"),
        (("distill", "digits-edm", "--method", "kd", "--batch", BILLION), "batch is at most 1,000,000"),
        (("train", "--data", "digits", "--batch", BILLION), "batch is at most 1,000,000"),
    ],
    ids=lambda value: " ".join(map(str, value[:1] + value[-2:])) if isinstance(value, tuple) else "",
)
@pytest.mark.every(4, 2)
def test_numbers_of_absurd_size_are_refused_before_they_cost_anything(words, says, tmp_path, monkeypatch, capsys):
    _refused((*words, "--out", "x"), says, tmp_path, monkeypatch, capsys)


def _refused(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.encode()) < 2100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    "words",
    [
        ("report", "runs"),
        ("convert", "a.pkl"),
    ],
    ids=lambda words: words[0],
)
def test_work_that_processes_do_not_share_is_refused_at_once_under_torchrun(words, rank, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    calls = counted(monkeypatch)
    assert run(monkeypatch, *words, "--out", tmp_path / "out") == 2
    assert "runs in one process: start it without torchrun" in capsys.readouterr().err
    assert calls == [] and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_by_every_verb_that_writes_there(tmp_path, tiny, monkeypatch, capsys):
    with Job.open("bench", tmp_path / "out") as job:
        for words in (
            ("sample", tiny),
            ("bench", tiny),
            ("calibrate", tiny),
            ("optimize", tiny),
            ("fit", tiny),
            ("finetune", tiny, "--nfe", 3),
            ("trajectories", tiny),
            ("distill", tiny),
            ("train",),
            ("demo",),
            ("report", job.folder),
            ("convert", "a.pkl"),
        ):
            assert run(monkeypatch, *words, "--out", job.folder) == 2, words
            assert f"another fewstep job is working in {job.folder}" in capsys.readouterr().err, words
        assert [path.name for path in job.folder.iterdir()] == [".lock"]


def test_samples_of_other_seeds_do_not_replace_the_first(tmp_path, tiny, monkeypatch, capsys):
    words = ("sample", tiny, "--nfe", 2, "--num", 2, "--npz", "--out", tmp_path)
    assert run(monkeypatch, *words) == 0
    first = (tmp_path / "samples.npz").read_bytes()
    for other in (("--seed", 7), ("--solver", "ddim"), ("--num", 3)):
        assert run(monkeypatch, *words, *other) == 2
        assert "holds the samples of another command" in capsys.readouterr().err
        assert (tmp_path / "samples.npz").read_bytes() == first
    assert run(monkeypatch, *words, "--singles") == 0  # the same samples, one by one too
    assert (tmp_path / "samples.npz").read_bytes() == first and len(list((tmp_path / "singles").iterdir())) == 2


@pytest.mark.parametrize(("world", "says"), [("2", "gloo/transport/tcp/pair.cc: Connection closed by peer"), ("2", "a bug"), ("1", "gloo")])
def test_a_process_that_loses_another_says_so(world: str, says: str, monkeypatch, capsys) -> None:
    def verb() -> None:
        raise RuntimeError(says)

    monkeypatch.setattr(cli, "app", verb)
    monkeypatch.setenv("WORLD_SIZE", world)
    lost = world == "2" and "gloo" in says
    with pytest.raises(SystemExit if lost else RuntimeError) as end:
        cli.main()
    if lost:
        assert end.value.code == 1
        said = "fewstep: another process of this run has ended (see above for why); run the same command to continue\n"
        assert capsys.readouterr().err == said
