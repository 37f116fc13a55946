"""What is typed reaches the learner, each option as the argument that it stands for; and its progress is shown."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.apps.conftest import run
from tests.problems import DSNO

from fewstep import (
    CalibrationConfig,
    DistillConfig,
    EMConfig,
    FinetuneConfig,
    FitConfig,
    FitForm,
    FlowMapConfig,
    MatchingConfig,
    OptimizeConfig,
    ParallelConfig,
    TrajectoryConfig,
    load_model,
)
from fewstep.apps.commands import optimize
from fewstep.learn.networks.loop import LoopConfig
from fewstep.learn.networks.train import TrainConfig
from fewstep.models.flow_map_student import FlowMapForm
from fewstep.models.networks.operator import OperatorForm
from fewstep.models.networks.temporal_unet import Mixing
from fewstep.models.zoo import WEIGHTS
from fewstep.runtime.errors import FewstepError

STUDENT = DSNO


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments that a learner is called with when a command is typed, under the name that its verb imports it by."""

    def type_it(learner: str, verb: str, *words: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
        calls = []

        def record(*args: Any, **options: Any) -> None:
            calls.append((args, options))
            raise FewstepError("that is enough")

        monkeypatch.setattr(import_module(f"fewstep.apps.commands.{verb}"), learner, record)
        assert run(monkeypatch, verb, *words, "--out", tmp_path / "out") == 2
        ((args, options),) = calls
        assert options.pop("command").startswith(f"fewstep {verb} ")
        if verb != "train":
            assert args[0].fingerprint == load_model("digits-edm").fingerprint
            assert isinstance(options.pop("device"), torch.device) and callable(options.pop("on_progress"))
            assert callable(options.pop("on_plan", print))
            assert options.pop("out", tmp_path / "out") == tmp_path / "out"
        return args[1:], options

    return type_it


def test_calibrate(passed: Callable, capsys: pytest.CaptureFixture) -> None:
    words = ("--levels", 5, "-n", 9, "--pool", "scalar", "--batch", 3, "--seed", 4, "--t-max", 70, "--t-min", 0.01, "--jvp", "reverse")
    _, options = passed("make_statistics", "calibrate", "digits-edm", *words, "--guidance", 2, "--unguided", "--data", "digits")
    assert capsys.readouterr().err.endswith("fewstep: that is enough\n")
    assert options.pop("images").name == "digits"
    assert options == {"guidance": 2.0, "unguided": True, "config": CalibrationConfig(5, 9, "scalar", 3, 4, 70.0, 0.01, "reverse")}
    _, options = passed("make_statistics", "calibrate", "digits-edm")
    assert options == {"guidance": None, "unguided": False, "images": None, "config": CalibrationConfig()}


def test_fit(passed: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.apps.commands.fit.Trajectories.load", lambda folder: f"those in {folder}")
    words = ("--num", 9, "--held-out", 8, "--levels", 7, "--noises", 6, "--iterations", 4, "--no-move", "--seed", 3)
    form = (
        "--history",
        2,
        "--pool",
        "channel",
        "--no-bias",
        "--ridge",
        0.1,
        "--shrink",
        0.2,
        "--parent",
        "ddim",
        "--batch",
        2,
        "--budget",
        5,
        "--storage",
        "float32",
        "--first",
    )
    more = ("--nfe", "5,3,5", "--guidance", 2, "--trajectories", "stored")
    args, options = passed("make_samplers", "fit", "digits-edm", *words, *form, *more)
    config = FitConfig(FitForm(2, "channel", False, 0.1, 0.2), 5, 9, 8, 7, 6, 4, False, 3, 2, "ddim", "float32", True)
    assert args == ([3, 5],) and options == {"guidance": 2.0, "trajectories": "those in stored", "config": config}
    args, options = passed("make_samplers", "fit", "digits-edm")
    assert args == ([4, 5, 6, 8, 10],) and options == {"guidance": None, "trajectories": None, "config": FitConfig()}


def test_optimize(passed: Callable) -> None:
    words = ("--levels", 9, "-n", 8, "--noises", 7, "--held-out", 6, "--seed", 5, "--iterations", 4)
    statistics = WEIGHTS / "digits-edm" / "statistics"
    more = ("--solver", "dpm-solver-v3,ddim", "--nfe", "5,3", "--statistics", statistics)
    args, options = passed("find_schedules", "optimize", "digits-edm", *words, *more)
    assert args == ("dpm-solver-v3", [3, 5])
    assert options == {"guidance": None, "statistics": statistics, "config": OptimizeConfig(9, 8, 7, 6, 5, 4)}
    args, options = passed("find_schedules", "optimize", "digits-edm", "--guidance", 3)
    assert args == ("unipc-2", [5, 6, 8, 10]) and options == {"guidance": 3.0, "statistics": None, "config": OptimizeConfig()}


@pytest.mark.slow
def test_a_mistake_in_the_last_solver_is_found_before_the_first_is_optimised(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(optimize, "find_schedules", lambda *args, **options: pytest.fail("began"))
    for words, says in {
        ("--solver", "ddim,dim"): "did you mean ddim",
        ("--solver", "ddim,heun", "--nfe", "4,5"): "use 4 or 6",
        ("--solver", "ddim", "--nfe", "4,0"): "nfe must be",
        ("--solver", "ddim", "--guidance", "2", "--out", tmp_path / "never"): "cannot be guided",
    }.items():
        assert run(monkeypatch, "optimize", "digits-ddpm", "--out", tmp_path / "out", *words) == 2
        assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_progress_of_several_solvers_is_one(monkeypatch, tmp_path: Path) -> None:
    shown = []

    def search(model: object, name: str, nfe: list[int], *, on_progress: Callable[[int, str], None], **options: object) -> dict:
        for done in range(len(nfe) + 1):
            on_progress(done, name)
        return {}

    real = optimize.progress
    monkeypatch.setattr(optimize, "progress", lambda title, total: shown.append((title, total)) or real(title, total))
    monkeypatch.setattr("fewstep.apps.console._lines", lambda title, total: lambda done, note="": shown.append((done, note)))
    monkeypatch.setattr(optimize, "find_schedules", search)
    monkeypatch.setattr(optimize, "find_spec", lambda name: None)
    assert run(monkeypatch, "optimize", "digits-edm", "--solver", "ddim,unipc-2", "--nfe", "4,4,5", "--out", tmp_path) == 0
    assert shown[0] == ("optimizing 4 schedules of digits-edm", 4)
    assert shown[1:] == [(0, "ddim"), (1, "ddim"), (2, "ddim"), (2, "unipc-2"), (3, "unipc-2"), (4, "unipc-2")]


def test_finetune(passed: Callable) -> None:
    words = ("--nfe", 3, "--rounds", 2, "--steps", 9, "--batch", 8, "--lr", 0.1, "--form", "score", "--states", "teacher", "-n", 7)
    more = ("--held-out", 6, "--levels", 5, "--teacher-nfe", 4, "--seed", 2, "--enough", 0.5, "--half", "--data", "digits")
    _, options = passed("tune", "finetune", "digits-edm", *words, *more)
    config = FinetuneConfig(3, 2, 9, 8, 0.1, "score", "teacher", 1.0, 7, 6, 5, 4, 2, 0.5, True)
    assert options.pop("images").name == "digits" and options == {"guidance": 1.0, "config": config}
    _, options = passed("tune", "finetune", "digits-edm", "--guidance", 2)
    assert options == {"guidance": 2.0, "images": None, "config": FinetuneConfig()}


def test_trajectories(passed: Callable) -> None:
    words = ("-n", 9, "--nfe", 8, "--solver", "ddim", "--seed", 7, "--label", 6, "--batch", 5, "--dtype", "float16")
    args, options = passed("generate_trajectories", "trajectories", "digits-edm", *words, "--slots", 3, "--grid", "karras", "--guidance", 2)
    model = load_model("digits-edm")
    assert torch.equal(args[0].t, model.trajectory_grid("karras", 3).t)
    assert options == {"guidance": 2.0, "config": TrajectoryConfig(9, 8, "ddim", 7, 1.0, 6, 5, "float16"), "parallel": None}
    together = ("--parallel", "--window", 4, "--tol", 0.1, "--memory", 2)
    _, options = passed("generate_trajectories", "trajectories", "digits-edm", *words, *together)
    assert options["parallel"] == ParallelConfig(0.1, 4, 2)
    args, options = passed("generate_trajectories", "trajectories", "digits-edm")
    assert torch.equal(args[0].t, model.trajectory_grid("angle", 16).t)
    assert options == {"guidance": 1.0, "config": TrajectoryConfig(seed=DistillConfig().seed), "parallel": None}


@pytest.mark.slow
def test_distill(passed: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.apps.commands.distill.Trajectories.load", lambda folder: f"those in {folder}")
    words = ("--method", "slots", "--slots", 3, "--grid", "karras", "--output", "skip", "--time", "slot", "--one-pass", "--mixing", "fft")
    form = ("--modes", 1, "--places", "inner", "--loss", "features", "--weights", "snr", "--first", 0.25, "--dropout", 0.1)
    loop = ("--steps", 9, "--batch", 8, "--lr", 0.1, "--weight-decay", 0.2, "--ema", 0.5, "--mixed-precision", "bf16", "--half")
    data = ("-n", 7, "--held-out", 6, "--fresh", 0.5, "--teacher-nfe", 5, "--seed", 4, "--guidance", 2, "--trajectories", "stored")
    args, options = passed("make_student", "distill", "digits-edm", *words, *form, *loop, *data, "--from", STUDENT)
    student = OperatorForm("skip", "slot", False, Mixing("fft", 1, "inner"))
    training = {"dropout": 0.1, "steps": 9, "batch": 8, "lr": 0.1, "weight_decay": 0.2, "ema": 0.5, "mixed_precision": "bf16", "half": True}
    taught = {"num": 7, "held_out": 6, "fresh": 0.5, "teacher_nfe": 5, "seed": 4}
    own = {"slots": 3, "grid": "karras", "form": student, "loss": "features", "weights": "snr", "first": 0.25}
    config = DistillConfig(**own, **training, **taught)
    assert args == ("slots",) and options.pop("begin").fingerprint == load_model(STUDENT).fingerprint
    assert options.pop("features")(torch.zeros(2, 1, 8, 8)).shape[0] == 2
    assert options == {"guidance": 2.0, "trajectories": "those in stored", "images": None, "judge": None, "config": config}
    words = ("--branch-at", "inner", "--insert-after", "inner")
    assert passed("make_student", "distill", "digits-edm", *words) == passed(
        "make_student", "distill", "digits-edm", "--fan", "inner", *words[2:]
    )
    args, options = passed("make_student", "distill", "digits-edm", "--fan", "inner", "--places", "inner")
    config = DistillConfig(form=OperatorForm(mixing=Mixing(insert_after="inner", branch_at="inner")))
    assert args == ("dsno",)
    assert options == {
        "guidance": 1.0,
        "trajectories": None,
        "begin": None,
        "features": None,
        "images": None,
        "judge": None,
        "config": config,
    }


def test_distill_into_a_flow_map(passed: Callable) -> None:
    words = (
        "--method",
        "flow-map",
        "--target",
        "matching",
        "--slots",
        8,
        "--grid",
        "karras",
        "--states",
        "stored",
        "--first",
        0.25,
        "--last",
        0.5,
    )
    form = ("--anchor", 0.75, "--max-passes", 3, "--features", 8, "--output", "v", "--insert-at", "mid", "--loss", "l2", "--lr", 0.1)
    args, options = passed("make_student", "distill", "digits-edm", *words, *form, "--data", "digits")
    own = {
        "target": "matching",
        "slots": 8,
        "grid": "karras",
        "states": "stored",
        "first": 0.25,
        "last": 0.5,
        "anchor": 0.75,
        "max_passes": 3,
    }
    assert args == ("flow-map",) and options["config"] == FlowMapConfig(**own, form=FlowMapForm(8, "v", "mid"), loss="l2", lr=0.1)
    assert options["images"].name == "digits" and options["features"] is None
    assert passed("make_student", "distill", "digits-edm", "--method", "flow-map")[1]["config"] == FlowMapConfig()


def test_distill_in_passes(passed: Callable) -> None:
    words = ("--method", "dmd", "--passes", 2, "--levels", "3,0.5", "--fake-rank", 4, "--fake-end", 0.5)
    args, options = passed("make_student", "distill", "digits-edm", *words)
    assert args == ("dmd",) and options["config"] == MatchingConfig(passes=2, levels=(3.0, 0.5), fake_rank=4, fake_end=0.5)
    assert passed("make_student", "distill", "digits-edm", "--method", "em")[1]["config"] == EMConfig()


def test_train(passed: Callable) -> None:
    words = ("--kind", "ddpm", "--conditional", "--label-dropout", 0.3, "--channels", "16,32", "--layers", 2, "--dropout", 0.2)
    more = ("--attention", "8", "--flip", "--steps", 9, "--batch", 8, "--lr", 0.1, "--warmup", 7)
    loop = ("--weight-decay", 0.5, "--clip", 0.25, "--ema", 0.75, "--seed", 6, "--checkpoint-every", 5, "--mixed-precision", "bf16")
    args, _ = passed("train_model", "train", *words, *more, *loop, "--compile", "--channels-last")
    assert args[:2] == (
        TrainConfig("ddpm", True, 0.3, (16, 32), 2, 0.2, attention=(8,), flip=True),
        LoopConfig(9, 8, 0.1, 7, 0.5, 0.25, 0.75, 6, 5, "bf16", True, True),
    )
    args, _ = passed("train_model", "train", "--kind", "edm", "--p-mean", -1, "--p-std", 2)
    assert args[0] == TrainConfig("edm", p_mean=-1.0, p_std=2.0)
    args, _ = passed("train_model", "train")
    assert args[:2] == (TrainConfig("edm"), LoopConfig(8000))
