"""Students on the command line: from trajectories to pictures, one clear line for every mistake, kills, full disks, several processes."""

import errno
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from tests.apps.conftest import run as run_command
from tests.apps.conftest import samples
from tests.problems import told_model

from fewstep import VarianceExploding, load_model
from fewstep.learn.networks import distill as module
from fewstep.learn.networks import loop
from fewstep.learn.networks.loop import LoopConfig, LossCurve
from fewstep.learn.networks.objectives import config, operator
from fewstep.learn.networks.objectives.operator import OperatorObjective
from fewstep.learn.teacher import trajectories as stored_module
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig
from fewstep.models.formats.folders import save_ours
from fewstep.models.tuned import Tuned

UNET = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
UNET |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
SHORT = ("--method", "slots", "--slots", 2, "--steps", 8, "--batch", 8, "--num", 32, "--teacher-nfe", 8, "--dropout", 0.2)


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of ``fewstep WORDS`` in this process, with few held out where no option says so."""
    words += ("--held-out", 16) if words[0] == "distill" and "--held-out" not in words else ()
    return run_command(monkeypatch, *words)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, short_reference: None) -> None:
    """Less work where no option says so: shards of 16, checkpoints every 3 steps, a quick reference."""
    hurry(monkeypatch)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LoopConfig", partial(LoopConfig, checkpoint_every=3))
    monkeypatch.setattr(config, "TrajectoryConfig", partial(TrajectoryConfig, batch=16))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small model, trajectories of it, and a student of four slots."""
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    save_ours(folder / "teacher", UNet2DModel(**UNET, num_class_embeds=3), "edm(0.5)", VarianceExploding(0.05, 20.0), (1, 4, 4), 2)
    teacher, stored, student = folder / "teacher", folder / "stored", folder / "pupil"
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        assert run(monkeypatch, "trajectories", teacher, "-n", 48, "--slots", 4, "--nfe", 8, "--batch", 16, "--out", stored) == 0
        words = ("distill", teacher, "--trajectories", stored, "-n", 32, "--steps", 4, "--batch", 8, "--out", student)
        assert run(monkeypatch, *words) == 0
    return SimpleNamespace(teacher=teacher, stored=stored, student=student, folder=folder)


# -- the way of a person ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bundled_model_from_trajectories_to_pictures(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("--num", 48, "--slots", 1, "--nfe", 4, "--batch", 16)
    assert run(monkeypatch, "trajectories", "digits-edm", *common, "--out", "stored", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["model"], done["num"], len(done["times"])) == ("digits-edm", 48, 2) and done["bytes"] > 48 * 64 * 4
    words = ("--method", "kd", "--loss", "features", "--steps", 2, "--batch", 4, "--num", 32, "--trajectories", "stored")
    assert run(monkeypatch, "distill", "digits-edm", *words, "--half", "--out", "pupil", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["model"] == "digits-edm" and list(done["passes"]) == ["1"] and len(done["curve"]) == 2 and done["arithmetic"]["1"] < 1.1
    assert Tuned.load(Path("pupil")).teacher == "digits-edm"
    assert run(monkeypatch, "sample", "pupil", "--num", 3, "--out", "pictures", "--json") == 0
    assert json.loads(capsys.readouterr().out)["nfe"] == 1
    assert run(monkeypatch, "bench", "pupil", "--num", 4, "--out", "bench", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["solver"], row["grid"], row["nfe"]) == ("ddim", "optimized", 1) and row["fd"] is not None
    assert row["arithmetic"] == pytest.approx(done["arithmetic"]["1"]) and 0 < row["rmse"] < 2


@pytest.mark.slow
def test_a_student_is_sampled_in_its_own_way_by_default(monkeypatch, tmp_path: Path, made: SimpleNamespace) -> None:
    common = ("sample", made.student, "--num", 3, "--npz", "--out")
    assert run(monkeypatch, *common, tmp_path / "plain") == 0
    for name, words in {
        "said": ("--solver", "ddim", "--grid", "optimized", "--nfe", 1),
        "batch": ("--batch", 1),
        "two": ("--nfe", 2),
        "four": ("--nfe", 4),
    }.items():
        assert run(monkeypatch, *common, tmp_path / name, *words) == 0
    plain = samples(tmp_path / "plain")
    np.testing.assert_array_equal(plain, samples(tmp_path / "said"))
    np.testing.assert_allclose(plain, samples(tmp_path / "batch"), atol=1e-5)
    assert np.abs(plain - samples(tmp_path / "two")).max() > 1e-3 < np.abs(samples(tmp_path / "two") - samples(tmp_path / "four")).max()


@pytest.mark.slow
def test_a_student_is_measured_against_its_teacher_on_all_its_passes(monkeypatch, capsys, tmp_path: Path, made: SimpleNamespace) -> None:
    assert run(monkeypatch, "bench", made.student, "--num", 8, "--out", tmp_path / "bench") == 0
    results, out = json.loads((tmp_path / "bench" / "results.json").read_text()), capsys.readouterr().out
    history = json.loads((made.student / "history.json").read_text())
    assert results["reference"]["teacher"] == load_model(str(made.teacher)).fingerprint
    rows = {row["nfe"]: row for row in results["rows"]}
    assert list(rows) == [1, 2, 3, 4] and results["skipped"] == []
    for nfe, row in rows.items():
        assert row["arithmetic"] == pytest.approx(history["arithmetic"][str(nfe)]) and f"{row['arithmetic']:.2f} evaluations" in out
        assert row["rmse"] == pytest.approx(history["passes"][str(nfe)][1], rel=0.5)  # 8 noises, others
    words = ("bench", made.student, "--solver", "ddim,unipc-2", "--nfe", "1,2,9", "--num", 4, "--out", tmp_path / "others")
    assert run(monkeypatch, *words) == 0
    results = json.loads((tmp_path / "others" / "results.json").read_text())
    assert [(row["solver"], row["nfe"]) for row in results["rows"]] == [("ddim", 1), ("ddim", 2)] and len(results["skipped"]) == 4


@pytest.mark.slow
def test_a_flow_map_is_made_by_its_own_options(monkeypatch, capsys, tmp_path: Path, made: SimpleNamespace) -> None:
    words = ("distill", made.teacher, "--method", "flow-map", "--target", "semigroup", "--anchor", 0.7, "--slots", 4, "--max-passes", 2)
    common = ("--features", 8, "--num", 32, "--steps", 2, "--batch", 8, "--trajectories", made.stored)
    assert run(monkeypatch, *words, *common, "--out", tmp_path / "pupil", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert list(done["passes"]) == ["1", "2"] and done["trained_on"] > 0 and Path(done["picture"]).is_file()
    student = load_model(str(tmp_path / "pupil"))
    assert (student.network.form.features, student.tuned.form) == (8, "flow-map")
    for nfe, grid in ((2, ()), (5, ("--solver", "ddim", "--grid", "karras"))):
        assert run(monkeypatch, "sample", tmp_path / "pupil", "--num", 2, "--nfe", nfe, *grid, "--out", tmp_path / str(nfe)) == 0
    assert run(monkeypatch, *words, *common, "--from", made.student, "--out", tmp_path / "bad") == 2
    assert run(monkeypatch, *words, "--mixing", "fft", "--out", tmp_path / "bad") == 2
    assert run(monkeypatch, *words, "--data", "digits", "--out", tmp_path / "bad") == 2
    said = capsys.readouterr().err
    for one in (
        "is no flow-map student to begin with",
        "--mixing is an option of --method dsno, slots, kd, not of flow-map",
        "of digits have",
    ):
        assert one in said.replace("\n", " ")
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_a_generator_is_trained_without_trajectories(monkeypatch, capsys, tmp_path: Path, made: SimpleNamespace) -> None:
    words = ("distill", made.teacher, "--steps", 4, "--batch", 8, "--updates", 1, "--before", 2, "--measures", 2)
    assert run(monkeypatch, *words, "--method", "em", "--langevin", 2, "--out", tmp_path / "em", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert [one["step"] for one in done["scores"]] == [0, 2, 4] and done["kept"] in done["scores"] and list(done["passes"]) == ["1"]
    assert not (tmp_path / "em" / "work" / "trajectories").exists() and "picture" not in done
    assert run(monkeypatch, "sample", tmp_path / "em", "--num", 2, "--out", tmp_path / "pictures", "--json") == 0
    assert json.loads(capsys.readouterr().out)["nfe"] == 1
    assert run(monkeypatch, "bench", tmp_path / "em", "--num", 4, "--out", tmp_path / "bench") == 0
    capsys.readouterr()
    assert run(monkeypatch, *words, "--method", "dmd", "--from", tmp_path / "em", "--out", tmp_path / "dmd") == 0
    said = capsys.readouterr().out
    assert "(kept)" in said and "loss of the fake" in said and load_model(tmp_path / "dmd").tuned.form == "matching"
    few = ("--method", "dmd", "--passes", 2, "--levels", "3,0.5", "--fake-rank", 2, "--out", tmp_path / "few")
    assert run(monkeypatch, *words, *few, "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert list(done["passes"]) == ["2"] and done["fake"]["rank"] == 2
    assert run(monkeypatch, "sample", tmp_path / "few", "--num", 2, "--out", tmp_path / "more", "--json") == 0
    assert json.loads(capsys.readouterr().out)["nfe"] == 2
    assert run(monkeypatch, "sample", tmp_path / "few", "--num", 2, "--out", tmp_path / "again") == 0
    assert "--stochastic --data PICTURES --out runs/bench" in capsys.readouterr().out.replace("\n", " ")
    assert run(monkeypatch, "bench", tmp_path / "few", "--num", 4, "--out", tmp_path / "bench-few") == 2  # its samples follow no trajectory
    assert "lcm adds noise" in capsys.readouterr().err.replace("\n", " ")
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), dtype=np.uint8))
    judged = ("bench", tmp_path / "few", "--stochastic", "--data", tmp_path / "data.npz", "--features", "pixels", "--num", 20, "--paths", 2)
    assert run(monkeypatch, *judged, "--solver", "ddim:eta=1", "--grid", "karras", "--nfe", 3, "--out", tmp_path / "bench-few") == 2
    assert "was taught its own 2 steps of lcm alone" in capsys.readouterr().err.replace("\n", " ")
    assert run(monkeypatch, *judged, "--json", "--out", tmp_path / "bench-few") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["solver"], row["grid"], row["nfe"], row["stochastic"], row["failed"]) == ("lcm", "optimized", 2, True, None)
    assert run(monkeypatch, *words, *few[:-1], tmp_path / "bad", "--from", tmp_path / "em") == 2
    assert "several passes begin with the teacher's own network" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_the_next_command_that_is_said_works(monkeypatch, capsys, tmp_path: Path, made: SimpleNamespace) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "trajectories", made.teacher, "-n", 40, "--slots", 2, "--nfe", 4, "--out", "stored") == 0
    (line,) = re.findall(r"^next: fewstep (.*)$", capsys.readouterr().out, re.M)
    assert run(monkeypatch, *shlex.split(line), "--steps", 1, "--batch", 2) == 0, capsys.readouterr().err
    (line,) = re.findall(r"^next: fewstep (.*)$", capsys.readouterr().out, re.M)
    assert run(monkeypatch, *shlex.split(line), "--num", 4) == 0


@pytest.mark.slow
def test_trajectories_of_one_scale_are_nothing_that_a_told_model_learns_from(
    monkeypatch, capsys, tmp_path: Path, made: SimpleNamespace
) -> None:
    told = told_model(load_model(made.teacher)).save(tmp_path / "told")
    assert run(monkeypatch, "trajectories", told, "-n", 4, "--slots", 2, "--nfe", 4, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "learn from trajectories of many: --scales 1,4" in said and "next:" not in said


def test_a_model_is_nothing_to_push(monkeypatch, capsys, made: SimpleNamespace) -> None:
    assert run(monkeypatch, "push", made.student, "me/one") == 2
    assert "holds a model, and push takes a sampler or statistics: name one of those in it" in capsys.readouterr().err


def test_one_step_has_no_error_of_its_own_to_print(monkeypatch, capsys, tmp_path: Path, made: SimpleNamespace) -> None:
    assert run(monkeypatch, "trajectories", made.teacher, "-n", 2, "--slots", 1, "--nfe", 1, "--out", tmp_path / "out") == 0
    assert "trajectories: " in capsys.readouterr().out


DISTILL = ("distill", "TEACHER", "--trajectories", "STORED", "--num", 32, "--steps", 2)
MISTAKES = [
    ((*DISTILL, "--guidance", 2), "of guidance 1.0, but they are used with guidance 2.0: make them again"),
    ((*DISTILL, "--guidance", "nan"), "guidance"),
    ((*DISTILL, "--num", 33), "has 48 trajectories, not 33 and 16 held out: ask for fewer"),
    ((*DISTILL, "--slots", 3), "were not stored at t = 1.6673, 0.599772: name a grid of theirs, or make them again"),
    ((*DISTILL, "--grid", "karras"), "were not stored at t ="),
    ((*DISTILL, "--grid", "angel"), "did you mean angle"),
    ((*DISTILL, "--grid", "optimized"), "there are none in its folder"),
    ((*DISTILL, "--trajectories", "nowhere"), "cannot read nowhere/manifest.json"),
    ((*DISTILL, "--method", "dnso"), "--method is flow-map or guided or progressive or dmd or em or dsno or slots or kd, got 'dnso'"),
    ((*DISTILL, "--method", "kd", "--slots", 2), "kd has one slot, got 2: use the method slots, or leave slots out"),
    ((*DISTILL, "--mixing", "none"), "the slots of dsno meet in temporal layers"),
    ((*DISTILL, "--mixing", "complex"), "unknown form of mixing 'complex'"),
    ((*DISTILL, "--loss", "l3"), "unknown loss 'l3': did you mean"),
    ((*DISTILL, "--loss", "features"), "the bundled features are of 8x8 digits"),
    ((*DISTILL, "--output", "x0"), "unknown output of an operator 'x0'"),
    ((*DISTILL, "--time", "end"), "unknown time of an operator 'end'"),
    ((*DISTILL, "--weights", "min-snr"), "unknown weights of the slots 'min-snr'"),
    ((*DISTILL, "--places", "outer"), "unknown place of temporal layers"),
    ((*DISTILL, "--fan", "inner"), "use insert_after inner"),
    ((*DISTILL, "--modes", 4), "4 slots have 3 temporal frequencies"),
    ((*DISTILL, "--steps", 0), "steps is at least 1, got 0"),
    ((*DISTILL, "--batch", 0), "batch is at least 1, got 0"),
    ((*DISTILL, "--lr", "nan"), "lr is a number, got nan"),
    ((*DISTILL, "--slots", 0), "num_slots is at least 1, got 0"),
    ((*DISTILL, "--teacher-nfe", 0), "teacher_nfe is at least 1, got 0"),
    ((*DISTILL, "--fresh", 2), "fresh lies in [0, 1]"),
    ((*DISTILL, "--fresh", "nan"), "fresh is a number, got nan"),
    ((*DISTILL, "--dropout", 1), "dropout in [0, 1)"),
    ((*DISTILL, "--from", "nowhere"), "no model 'nowhere'"),
    ((*DISTILL, "--from", "TEACHER"), "is no operator student to begin with"),
    ((*DISTILL, "--mixed-precision", "half"), "mixed precision"),
    ((*DISTILL, "--seed", 10**18), "seed"),
    (("distill", "TEACHER", "--seed", -1), "seeds must lie between"),
    (("distill", "TEACHER", "--method", "em", "--langevin", 0), "langevin is at least 1, got 0"),
    (("distill", "TEACHER", "--method", "em", "--langevin", 10**7), "langevin is at most 1000, got 10000000"),
    (("distill", "TEACHER", "--method", "em", "--step-e", 2), "step_e lies in (0, 1]"),
    (("distill", "TEACHER", "--method", "dmd", "--langevin", 4), "--langevin is an option of --method em, not of dmd"),
    (("distill", "TEACHER", "--method", "dmd", "--start", 50), "start is a noise level between 0.05 and 20"),
    (("distill", "TEACHER", "--method", "em", "--seed", -1), "seeds must lie between 0 and 2^63, got -1"),
    (("distill", "TEACHER", "--method", "progressive", "--seed", 2**64), "seeds must lie between 0 and 2^63"),
    (("distill", "TEACHER", "--method", "em", "--held-out", 3), "held_out is at least 4, got 3"),
    (
        ("distill", "TEACHER", "--method", "em", "--start", 50.5),
        "start is a noise level between 0.05 and 20 of the model's noise law, got 50.5",
    ),
    (("distill", "TEACHER", "--method", "em", "--start", "inf"), "start is a noise level sigma/alpha, a positive number, got inf"),
    (("distill", "TEACHER", "--method", "progressive", "--start", 2.5), "start is a whole number, got 2.5"),
    (("distill", "TEACHER", "--method", "dmd", "--from", "STUDENT"), "has 4 slots, and distribution matching one"),
    (("distill", "TEACHER", "--method", "dmd", "--from", "TEACHER"), "is no student of one pass to begin with"),
    (("distill", "TEACHER", "--method", "dmd", "--trajectories", "STORED"), "learns from no stored trajectories with these options"),
    (("distill", "TEACHER", "--method", "dmd", "--trajectories", "STORED", "--pair", 1, "--num", 32), "were not stored at t = 2.5"),
    (
        ("distill", "TEACHER", "--method", "dmd", "--data", "digits"),
        "the judge knows images of shape (1, 8, 8), and teacher makes (1, 4, 4)",
    ),
    (("distill", "STUDENT", "--method", "dmd"), "is a student, which is sampled as it is: name its teacher"),
    (("distill", "digits-emd"), "did you mean digits-edm"),
    (("distill", "STUDENT"), "is a student, which is sampled as it is: name its teacher"),
    (("trajectories", "STUDENT"), "is a student"),
    (("finetune", "STUDENT"), "is a student"),
    (("trajectories", "TEACHER", "--num", 0), "num is at least 1, got 0"),
    (("trajectories", "TEACHER", "--slots", 0), "at least 1 step"),
    (("trajectories", "TEACHER", "--dtype", "int8"), "unknown dtype"),
    (("trajectories", "TEACHER", "--solver", "ddim:eta=1"), "adds noise"),
    (("trajectories", "TEACHER", "--label", 2), "has labels 0 to 1, got 2"),
    (("sample", "STUDENT", "--guidance", 2), "its guidance is in its weights; use guidance 1"),
    (("sample", "STUDENT", "--nfe", 5), "makes 1, 2, 3, 4 passes, not 5"),
    (("sample", "STUDENT", "--solver", "unipc-2"), "jumps by ddim alone: leave --solver out"),
    (("sample", "STUDENT", "--solver", "unipc-2", "--grid", "angle", "--nfe", 4), "makes first-order steps alone"),
    (("sample", "STUDENT", "--solver", "ddim", "--grid", "karras", "--nfe", 3), "jumps between its own times only"),
    (("sample", "STUDENT", "--sigmas", "20,3,0.05"), "jumps between its own times only"),
    (("bench", "STUDENT", "--nfe", 7), "makes 1, 2, 3, 4 passes, not 7"),
    (("bench", "STUDENT", "--guidance", 2), "its guidance is in its weights; use guidance 1"),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES)
@pytest.mark.every(7)
def test_mistakes_are_said_in_one_line_and_leave_nothing(monkeypatch, capsys, tmp_path, made, words: tuple, says: str) -> None:
    names, before = {"TEACHER": made.teacher, "STORED": made.stored, "STUDENT": made.student}, contents(made.folder)
    assert run(monkeypatch, *(names.get(word, word) for word in words), "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("fewstep: ") and says in message and "\n" not in message
    assert not (tmp_path / "out").exists() and contents(made.folder) == before


# -- kills, full disks, damage ---------------------------------------------------------------------------------------


def reached(out: Path) -> dict[str, object]:
    """The weights, and all that was measured but the clock; nothing of a checkpoint may be left."""
    assert sorted(path.name for path in (out / "work").iterdir()) == ["curve.json", "trajectories"]
    history = json.loads((out / "history.json").read_text())
    weights = {name: data for name, data in contents(out).items() if name.endswith(".safetensors")}
    return weights | {"history": {key: value for key, value in history.items() if key != "seconds"}}


@pytest.fixture(scope="module")
def whole(made: SimpleNamespace) -> dict[str, object]:
    """What a run reaches that nobody disturbs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        assert run(monkeypatch, "distill", made.teacher, *SHORT, "--out", made.folder / "whole") == 0
    return reached(made.folder / "whole")


def in_a_fork(change: Callable[[pytest.MonkeyPatch], None], *words: object) -> int:
    """The exit code of ``fewstep WORDS`` in a process of its own; 99 for a traceback, or minus the signal that ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        patch = pytest.MonkeyPatch()
        change(patch)
        code = run(patch, *words)
    finally:
        os._exit(code)


def die(*args: object, **options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(count: int, real: Callable, then: Callable = die) -> Callable:
    """``real``, but something else the ``count``-th time."""
    calls = []
    return lambda *args, **options: (then if calls.append(1) or len(calls) == count else real)(*args, **options)


def at_second_checkpoint(real: Callable) -> Callable:
    """``real``, but a kill in place of the second file that makes a checkpoint whole."""
    kill = at(2, real)
    return lambda path, content: (kill if path.name == "loop.json" else real)(path, content)


KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "in the trajectories": lambda patch: patch.setattr(stored_module, "_write_shard", at(2, stored_module._write_shard)),
    "before a checkpoint": lambda patch: patch.setattr(LossCurve, "add", at(2, LossCurve.add)),
    "after a checkpoint": lambda patch: patch.setattr(LossCurve, "add", at(5, LossCurve.add)),
    "in a checkpoint": lambda patch: patch.setattr(loop, "write_whole", at_second_checkpoint(loop.write_whole)),
    "between two checkpoints' names": lambda patch: patch.setattr(Path, "rename", at(3, Path.rename)),
    "before the student is saved": lambda patch: patch.setattr(operator, "save_like", die),
    "while the student is saved": lambda patch: patch.setattr(module, "load_folder", die),
    "before tuned.json": lambda patch: patch.setattr(Tuned, "save", die),
}


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_ends_where_the_other_does(monkeypatch, made, whole, tmp_path, kill: str) -> None:
    words = ("distill", made.teacher, *SHORT, "--out", tmp_path / "out")
    assert in_a_fork(KILLS[kill], *words) == -signal.SIGKILL and not (tmp_path / "out" / "tuned.json").exists()
    assert run(monkeypatch, *words) == 0
    assert reached(tmp_path / "out") == whole


def full(real: Callable) -> Callable:
    """The same, but from its call on no file may grow beyond 500 bytes: real writers fail as on a full disk."""

    def wrapped(*args: object, **options: object) -> object:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        return real(*args, **options)

    return wrapped


FULL: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a shard": lambda patch: patch.setattr(stored_module, "_write_shard", full(stored_module._write_shard)),
    "a checkpoint": lambda patch: patch.setattr(loop, "_checkpoint", full(loop._checkpoint)),
    "the operator": lambda patch: patch.setattr(OperatorObjective, "save", full(OperatorObjective.save)),
    "the network": lambda patch: patch.setattr(operator, "save_like", full(operator.save_like)),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_said_in_one_line_and_the_next_run_completes(monkeypatch, capfd, made, whole, tmp_path, what: str) -> None:
    words = ("distill", made.teacher, *SHORT, "--out", tmp_path / "out")
    assert in_a_fork(FULL[what], *words) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("distilling ")]
    assert len(lines) == 1 and lines[0].startswith("fewstep: ") and os.strerror(errno.EFBIG) in lines[0]
    assert str(tmp_path / "out") in lines[0] and not (tmp_path / "out" / "tuned.json").exists()
    assert run(monkeypatch, *words) == 0
    assert reached(tmp_path / "out") == whole


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    path.write_bytes((data := path.read_bytes())[:-5] + bytes([data[-5] ^ 1]) + data[-4:])


@pytest.mark.slow
@pytest.mark.parametrize(  # of those to learn from, and of those held out
    ("damage", "says", "shard"),
    [
        (flip, "is damaged: its tensors or their checksum", "shard-00002"),
        pytest.param(cut, "is damaged", "shard-00001", marks=pytest.mark.slow),
        pytest.param(Path.unlink, "is missing", "shard-00000", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_shard_is_named_and_mended(monkeypatch, capsys, made, tmp_path, damage: Callable, says: str, shard: str) -> None:
    stored = shutil.copytree(made.stored, tmp_path / "stored")
    damage(stored / f"{shard}.safetensors")
    words = ("distill", made.teacher, "--trajectories", stored, *SHORT, "--out", tmp_path / "out")
    assert run(monkeypatch, *words) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("fewstep: ") and f"{shard}.safetensors {says}" in message and "run the same command again" in message
    (stored / f"{shard}.safetensors").unlink(missing_ok=True)
    again = ("trajectories", made.teacher, "-n", 48, "--slots", 4, "--nfe", 8, "--batch", 16, "--out", stored)
    assert run(monkeypatch, *again) == 0 and contents(stored).keys() == contents(made.stored).keys()
    assert run(monkeypatch, *words) == 0 and load_model(str(tmp_path / "out")).num_jumps == (1, 2)


@pytest.mark.slow
def test_many_slots_fit_in_the_memory(made, tmp_path) -> None:
    def little_memory(patch: pytest.MonkeyPatch) -> None:
        hurry(patch)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 700 * 2**20, resource.RLIM_INFINITY))

    words = ("distill", made.teacher, "--method", "slots", "--slots", 26, "--steps", 1, "--batch", 2, "-n", 16, "--teacher-nfe", 26)
    assert in_a_fork(little_memory, *words, "--out", tmp_path / "out") == 0  # 2^25 ways through the slots cannot all be tried


@pytest.mark.release
@pytest.mark.parametrize("words", [("--method", "slots", "--one-pass"), ("--method", "dsno")])
def test_two_processes_learn_what_one_does(tmp_path, made, words: tuple[str, ...]) -> None:
    line = ["-m", "fewstep", "distill", made.teacher, *words, "--steps", 120, "--batch", 32, "-n", 512, "--lr", 0.003]
    line += ["--teacher-nfe", 8, "--fresh", 0.25, "--ema", 0.95, "--slots", 2, "--out"]
    reach, environment = {}, {**os.environ, "OMP_NUM_THREADS": "1"}
    for count in ("1", "2"):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        whole = [*torchrun, *map(str, line), str(tmp_path / count)]
        done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        found, history = (
            Trajectories.load(tmp_path / count / "work" / "trajectories"),
            json.loads((tmp_path / count / "history.json").read_text()),
        )
        assert len(found) == len(set(found.seeds(slice(None)).tolist())) == 1024 and bool(found.states(slice(None)).isfinite().all())
        assert done.stdout.count("student: ") == 1
        reach[count] = [sum(loss for _, loss in history["curve"][-20:]) / 20, history["passes"]["1"][1]]
    one, two = (contents(tmp_path / count / "work" / "trajectories") for count in ("1", "2"))
    assert {name: data for name, data in one.items() if "shard" in name} == {name: data for name, data in two.items() if "shard" in name}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    for ours, theirs in zip(reach["2"], reach["1"], strict=True):
        assert 0.9 * theirs < ours < 1.1 * theirs, reach
