"""The command line as a person uses it: every verb, resumption, several processes, and one clear line for every mistake."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from PIL import Image

from fewstep import Sampler, TimeGrid, VarianceExploding, load_model, make_solver
from fewstep.apps import cli, training, verbs
from fewstep.core.grid_table import GridTable
from fewstep.core.statistics import ModelStatistics
from fewstep.evaluate import generation
from fewstep.learn import calibrate, finetune
from fewstep.learn.finetune import FinetuneConfig
from fewstep.learn.fit import FitConfig
from fewstep.learn.gram import GramConfig
from fewstep.learn.optimize import OptimizeConfig
from fewstep.models.loaders import save_ours
from fewstep.models.zoo import WEIGHTS

pytestmark = [
    pytest.mark.usefixtures("short_reference"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # forward mode of some PyTorch releases says so
]


def run(monkeypatch, *words: object) -> int:
    """The exit code of ``fewstep WORDS`` in this process."""
    monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
        sys.exit(0)
    return int(end.value.code or 0)


def samples(folder: Path) -> np.ndarray:
    """What ``--npz`` wrote."""
    with np.load(folder / "samples.npz") as arrays:
        return arrays["x"]


def test_models(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "models", "--json") == 0
    known = json.loads(capsys.readouterr().out)
    assert (
        {"digits-edm", "digits-edm-3step", "digits-dsno", "digits-ddpm"} == set(known["models"])
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
    assert {p.name for p in tmp_path.iterdir()} == {"grid.png", "samples.npz", "singles"}


def test_a_killed_sample_run_continues(monkeypatch, capsys, tmp_path: Path) -> None:
    words = ("sample", "digits-edm", "--nfe", 3, "--num", 6, "--batch", 2, "--npz")
    assert run(monkeypatch, *words, "--out", tmp_path / "whole") == 0
    real, calls = generation.generate, []

    def mortal(*args: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(generation, "generate", mortal)
    assert run(monkeypatch, *words, "--out", tmp_path / "cut") == 130
    assert "run the same command to continue" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--nfe", 4, "--out", tmp_path / "cut") == 2  # another command: not mixed
    assert run(monkeypatch, *words, "--out", tmp_path / "cut") == 0
    assert len(calls) == 4  # two batches, the kill, and only the third batch again
    np.testing.assert_array_equal(samples(tmp_path / "whole"), samples(tmp_path / "cut"))


@pytest.mark.slow
def test_two_processes_make_the_pictures_of_one(tmp_path: Path) -> None:
    words = ["-m", "fewstep", "sample", "digits-edm", "--nfe", "3", "-n", "8", "--batch", "2", "--npz", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for count in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*torchrun, count, *words, str(tmp_path / count)], check=True, env=environment, capture_output=True, timeout=300)
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
        assert "is a sampler of digits-edm (f9eb189710908366) at guidance 1, not of" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_bench_and_demo(monkeypatch, capsys, tmp_path: Path) -> None:
    words = ("bench", "digits-ddpm", "--solver", "ddim,unipc-2", "--grid", "angle,trailing", "--nfe", "5,6", "--num", 8, "--out", tmp_path)
    assert run(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == 8 and f"{results['rows'][0]['rmse']:.4f}" in out and (tmp_path / "pictures.png").exists()
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
        next(model.denoiser.network.parameters()).fill_(torch.nan)
    monkeypatch.setattr(verbs, "load_model", lambda name: model)
    assert run(monkeypatch, *SAMPLE, "--out", tmp_path / "out") == 2
    assert "not finite (NaN or infinite) at evaluation 1 of 2, t = 80" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- statistics ------------------------------------------------------------------------------------------------------

CALIBRATE = ("calibrate", "digits-edm", "--levels", 4, "--num", 8, "--batch", 4)
V3 = ("sample", "digits-edm", "--nfe", 5, "--num", 2, "--npz", "--solver")


def without_plots(monkeypatch) -> None:
    """No picture is drawn, where other tests look at it."""
    monkeypatch.setattr("fewstep.evaluate.plots._write", lambda figure, path: path)


@pytest.fixture(scope="module")
def statistics(tmp_path_factory) -> Path:
    """Statistics of digits-edm."""
    out = tmp_path_factory.mktemp("statistics")
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_plots(monkeypatch)
        assert run(monkeypatch, *CALIBRATE, "--out", out) == 0
    return out


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of digits-edm without any statistics of its own."""
    return shutil.copytree(WEIGHTS / "digits-edm", tmp_path / "bare", ignore=shutil.ignore_patterns("statistics*"))


def test_calibrate_saves_statistics_a_card_and_a_plot(monkeypatch, capsys, tmp_path: Path) -> None:
    words = (*CALIBRATE, "--num", 4, "--pool", "scalar/element", "--data", "digits", "--guidance", 2, "--out", tmp_path)
    assert run(monkeypatch, *words, "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["statistics"] == str(tmp_path) and Path(done["plot"]).exists() and done["seconds"] > 0
    assert (done["data"], done["pool"], done["states"]) == (4, "scalar/element", "digits, 1797 images, diffused")
    made = {path.name for path in tmp_path.iterdir() if not path.name.startswith("moments-")}
    assert made == {"statistics.json", "statistics.safetensors", "README.md", "statistics.png"}
    loaded = ModelStatistics.load(tmp_path)
    assert len(loaded.lam) == 5 and loaded.guidance == 2 and loaded.l.shape == (5, 1, 1, 1) and loaded.b.shape == (5, 1, 8, 8)
    assert "fewstep calibrate digits-edm" in (tmp_path / "README.md").read_text()
    assert run(monkeypatch, *words) == 0  # the folder is finished: this is free
    assert f"bench digits-edm --guidance 2 --statistics {tmp_path}" in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")


def test_a_killed_calibration_continues(monkeypatch, capsys, tmp_path: Path, statistics: Path) -> None:
    without_plots(monkeypatch)
    real, calls = calibrate.Moments.of, []

    def mortal(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(calibrate.Moments, "of", mortal)
    assert run(monkeypatch, *CALIBRATE, "--out", tmp_path) == 130
    assert "run the same command to continue" in capsys.readouterr().err and not (tmp_path / "statistics.json").exists()
    assert run(monkeypatch, *CALIBRATE, "--out", tmp_path) == 0
    assert len(calls) == 3  # a batch, the kill, and only the second batch again
    assert ModelStatistics.load(tmp_path).fingerprint == ModelStatistics.load(statistics).fingerprint


def test_statistics_are_given_by_option_or_in_the_solvers_name(monkeypatch, tmp_path: Path, statistics: Path) -> None:
    name = f"dpm-solver-v3:statistics={statistics}"
    assert run(monkeypatch, *V3, "dpm-solver-v3", "--statistics", statistics, "--out", tmp_path / "option") == 0
    assert run(monkeypatch, *V3, name, "--out", tmp_path / "name") == 0
    assert run(monkeypatch, *V3, f"{name}:steps=3", "--out", tmp_path / "three") == 0
    option, named, three = (samples(tmp_path / folder) for folder in ("option", "name", "three"))
    np.testing.assert_array_equal(option, named)
    assert abs(three - named).max() > 1e-3
    monkeypatch.chdir(shutil.copytree(statistics, tmp_path / "7").parent)
    assert run(monkeypatch, *V3, "dpm-solver-v3:statistics=7", "--out", tmp_path / "number") == 0  # a folder, though a number too
    np.testing.assert_array_equal(samples(tmp_path / "number"), named)


def test_bench_takes_statistics(monkeypatch, tmp_path: Path, statistics: Path) -> None:
    words = ("bench", "digits-edm", "--solver", "ddim,dpm-solver-v3", "--grid", "angle", "--nfe", 5, "--num", 2)
    assert run(monkeypatch, *words, "--statistics", statistics, "--out", tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    used = {row["solver"]: row["statistics"] for row in results["rows"]}
    assert used == {"ddim": None, "dpm-solver-v3": ModelStatistics.load(statistics).fingerprint}
    assert f"--statistics {statistics}" in results["command"]


def test_statistics_in_the_models_folder_are_found(monkeypatch, capsys, tmp_path: Path, bare: Path, statistics: Path) -> None:
    words = ("sample", bare, "--solver", "dpm-solver-v3", "--nfe", 5, "--num", 2, "--npz", "--out", tmp_path / "own")
    assert run(monkeypatch, *words) == 2
    message = capsys.readouterr().err.strip()
    assert "needs statistics" in message and f"'fewstep calibrate {bare} --out DIR'" in message and "\n" not in message
    assert not (tmp_path / "own").exists()
    shutil.copytree(statistics, bare / "statistics")
    assert run(monkeypatch, *words) == 0
    assert run(monkeypatch, *V3, "dpm-solver-v3", "--statistics", statistics, "--out", tmp_path / "option") == 0
    np.testing.assert_array_equal(samples(tmp_path / "own"), samples(tmp_path / "option"))


def test_statistics_of_something_else_are_refused_unless_wanted(monkeypatch, capsys, tmp_path: Path, statistics: Path) -> None:
    edm, ddpm = (load_model(name).fingerprint for name in ("digits-edm", "digits-ddpm"))
    cases = {
        ("digits-edm", "--guidance", "3"): "made for guidance 1.0, but are used with guidance 3.0",
        ("digits-ddpm",): f'made for model "{edm}", but are used with model "{ddpm}"',
    }
    solver = ("--solver", "dpm-solver-v3", "--nfe", 5, "--num", 2, "--statistics", statistics)
    for which, says in cases.items():
        for verb in ("sample", "bench"):
            assert run(monkeypatch, verb, *which, *solver, "--out", tmp_path / "out") == 2
            message = capsys.readouterr().err.strip()
            assert says in message and "\n" not in message and not (tmp_path / "out").exists()
    assert run(monkeypatch, "sample", "digits-edm", "--guidance", 3, *solver, "--any-statistics", "--out", tmp_path / "out") == 0


def test_damaged_statistics_are_named(monkeypatch, capsys, tmp_path: Path, statistics: Path) -> None:
    folder = shutil.copytree(statistics, tmp_path / "damaged")
    data = folder / "statistics.safetensors"
    data.write_bytes(data.read_bytes()[:-8])
    assert run(monkeypatch, *V3, "dpm-solver-v3", "--statistics", folder, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err.strip()
    assert f"{data} is damaged" in message and "\n" not in message and not (tmp_path / "out").exists()


# -- training and mistakes -------------------------------------------------------------------------------------------


def test_train(monkeypatch, capsys, tmp_path: Path) -> None:
    assert run(monkeypatch, "train", "--kind", "ddpm", "--steps", 2, "--batch", 4, "--out", tmp_path / "m") == 0
    assert run(monkeypatch, "sample", tmp_path / "m", "--nfe", 2, "--num", 2, "--out", tmp_path / "s") == 0


SAMPLE = ("sample", "digits-edm", "--num", "2", "--nfe", "2")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*SAMPLE, "--solver", "unipc2"), "did you mean unipc-2"),
        ((*SAMPLE, "--grid", "angel"), "did you mean angle"),
        ((*SAMPLE, "--grid", "karras:rho=0"), "cannot take"),
        ((*SAMPLE, "--grid", "angle:c=-1"), "needs c > 0"),
        ((*SAMPLE, "--solver", "unipc-2:lower_order_below=foo"), "is of type int"),
        ((*SAMPLE, "--seed", "99999999999999999999"), "between 0 and 2^63"),
        (("bench", "digits-edm", "--solver", ""), "at least one solver"),
        (("train", "--steps", "0"), "training needs steps"),
        ((*SAMPLE, "--nfe", "0"), "nfe must be a whole number of at least 1, got 0"),
        ((*SAMPLE, "--solver", "heun", "--nfe", "5"), "use 4 or 6"),
        ((*SAMPLE, "--label", "11"), "labels 0 to 9"),
        ((*SAMPLE, "--num", "0"), "at least 1"),
        ((*SAMPLE, "--times", "80,1,1,0.002"), "1 (at index 1) appears twice"),
        ((*SAMPLE, "--times", "80,1,2,0.002"), "followed by the larger 2"),
        ((*SAMPLE, "--times", "80,1", "--sigmas", "80,1"), "give one of"),
        ((*SAMPLE, "--sigmas", "80,x"), "numbers separated by commas"),
        (("sample", "digits-emd"), "did you mean digits-edm"),
        (("sample", "digits-ddpm", "--guidance", "2"), "cannot be guided"),
        (("sample", "digits-ddpm", "--grid", "logsnr", "--nfe", "200"), "fall more than once"),
        (("bench", "digits-edm", "--nfe", "5,x"), "separated by commas"),
        (("bench", "digits-edm", "--nfe", "0"), "nfe must be"),
        (("bench", "digits-edm", "--solver", "dim"), "did you mean ddim"),
        (("bench", "digits-edm", "--peers", "difusers"), "did you mean diffusers"),
        (("train", "--data", "nowhere"), "no images at"),
        (("train", "--kind", "gan"), "edm or ddpm"),
        (("calibrate", "digits-emd"), "did you mean digits-edm"),
        (("calibrate", "digits-edm", "--levels", "1"), "at least 2 levels"),
        (("calibrate", "digits-edm", "--num", "0"), "2 data"),
        (("calibrate", "digits-edm", "--pool", "pixel"), "unknown pooling 'pixel'"),
        (("calibrate", "digits-edm", "--jvp", "forwardd"), "did you mean forward"),
        (("calibrate", "digits-edm", "--data", "nowhere"), "no images at"),
        (("calibrate", "digits-ddpm", "--guidance", "2"), "cannot be guided"),
        ((*SAMPLE, "--solver", "dpm-solver-v3", "--statistics", "nowhere"), "cannot read nowhere/statistics.json"),
        ((*SAMPLE, "--solver", "dpm-solver-v3", "--guidance", "7.25"), "'fewstep calibrate digits-edm --guidance 7.25 --out DIR'"),
        (("bench", "digits-edm", "--solver", "dpm-solver-v3", "--guidance", "7.25"), "pass --statistics DIR"),
    ],
)
def test_mistakes_get_one_line_exit_2_and_leave_nothing(monkeypatch, capsys, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    assert run(monkeypatch, *words, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("fewstep: ") and says in message
    assert not (tmp_path / "out").exists()


# -- schedules and tuned models --------------------------------------------------------------------------------------

UNET = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (16,), "norm_num_groups": 4, "layers_per_block": 1}
UNET |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
OPTIMIZE = ("--levels", 8, "--num", 8, "--noises", 8, "--held-out", 8, "--solver", "ddim,unipc-2", "--nfe", "2,3")
FINETUNE = ("--nfe", 2, "--rounds", 2, "--steps", 3, "--batch", 4, "--num", 8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A small model of random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_ours(folder, UNet2DModel(**UNET), "edm(0.5)", VarianceExploding(0.05, 20.0), (1, 4, 4), None)
    return folder


def hurry(monkeypatch) -> None:
    """Less work than optimize and finetune do by those defaults that no option changes."""
    monkeypatch.setattr(cli, "OptimizeConfig", partial(OptimizeConfig, iterations=1))
    monkeypatch.setattr(training, "FinetuneConfig", partial(FinetuneConfig, held_out=8, levels=8, teacher_nfe=16))
    monkeypatch.setattr(finetune, "GramConfig", lambda num: GramConfig(levels=16, num=16))


def counted(monkeypatch, stop: int = -1, training: bool = False) -> list[int]:
    """Calls of any network from now on, in a list that grows; the one numbered ``stop`` is interrupted."""
    real, calls = UNet2DModel.forward, []

    def forward(network: UNet2DModel, *args: object, **options: object) -> object:
        if network.training or not training:
            calls.append(len(calls))
            if len(calls) == stop:
                raise KeyboardInterrupt
        return real(network, *args, **options)

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    return calls


@pytest.fixture(scope="module")
def optimized(tmp_path_factory, tiny: Path) -> Path:
    """Schedules of the small model."""
    out = tmp_path_factory.mktemp("optimized") / "samplers"
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        assert run(monkeypatch, "optimize", tiny, *OPTIMIZE, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny: Path) -> Path:
    """The small model, tuned a little."""
    out = tmp_path_factory.mktemp("tuned") / "model"
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        assert run(monkeypatch, "finetune", tiny, *FINETUNE, "--out", out) == 0
    return out


def test_optimize_writes_samplers_grids_and_plots(monkeypatch, capsys, tiny: Path, optimized: Path) -> None:
    hurry(monkeypatch)
    for solver in ("ddim", "unipc-2"):
        files = {path.name for path in (optimized / solver).iterdir()}
        assert files == {"grids.json", "README.md", "schedules.png", "nfe-02", "nfe-03"}
        with Image.open(optimized / solver / "schedules.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 10  # not blank
        assert Sampler.load(optimized / solver / "nfe-03").nfe == 3
        assert GridTable.load(optimized / solver).grids.keys() == {2, 3}
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


def test_a_killed_optimisation_continues(monkeypatch, capsys, tmp_path: Path, tiny: Path, optimized: Path) -> None:
    hurry(monkeypatch)
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
    hurry(monkeypatch)
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
    assert f"{out} already holds a tuned model" in capsys.readouterr().err
    shutil.rmtree(out)
    assert run(monkeypatch, *words) == 0
    text = capsys.readouterr().out
    assert f"model: {out}\nnext: fewstep bench {out} --nfe 2" in text and f"{done['history'][0]['bound_before']:.4f}" in text


def test_a_killed_tuning_continues(monkeypatch, capsys, tmp_path: Path, tiny: Path, tuned: Path) -> None:
    hurry(monkeypatch)
    words = ("finetune", tiny, *FINETUNE, "--out", tmp_path / "cut")
    with monkeypatch.context() as mortal:
        counted(mortal, stop=4, training=True)  # in the second step
        assert run(mortal, *words) == 130
        assert "run the same command to continue" in capsys.readouterr().err and not (tmp_path / "cut" / "tuned.json").exists()
    assert run(monkeypatch, *words[:-2], "--lr", 1e-5, "--out", tmp_path / "cut") == 2
    assert "remove it" in capsys.readouterr().err
    assert run(monkeypatch, *words) == 0
    assert load_model(tmp_path / "cut").fingerprint == load_model(tuned).fingerprint


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
        (("optimize", "MODEL", "--levels", "3"), "at least 4 levels"),
        (("optimize", "MODEL", "--noises", "1"), "at least 2 noises"),
        (("optimize", "MODEL", "--guidance", "2"), "cannot be guided"),
        (("optimize", "MODEL", "--solver", "dpm-solver-v3"), "needs statistics"),
        (("optimize", "digits-emd"), "did you mean digits-edm"),
        (("finetune", "MODEL", "--form", "means"), "--form is mean or score, got 'means'"),
        (("finetune", "MODEL", "--states", "ours"), "--states is own or teacher, got 'ours'"),
        (("finetune", "MODEL", "--nfe", "0"), "nfe, rounds, steps"),
        (("finetune", "MODEL", "--nfe", "33"), "need at least as many levels"),
        (("finetune", "MODEL", "--form", "score"), "matches scores on images"),
        (("finetune", "MODEL", "--form", "score", "--data", "nowhere"), "no images at"),
        (("finetune", "MODEL", "--guidance", "2"), "cannot be guided"),
        (("finetune", "MODEL", "--lr", "0"), "tuning needs"),
        (("finetune", "digits-emd"), "did you mean digits-edm"),
        (("bench", "MODEL", "--grid", "optimised"), "did you mean optimized"),
        (("bench", "MODEL", "--grid", "optimized"), "there are none in its folder"),
        (("bench", "MODEL", "--sampler", "nowhere"), "no sampler below nowhere"),
        (("sample", "MODEL", "--grid", "optimized"), "there are none in its folder"),
    ],
)
def test_mistakes_with_schedules_and_tuning(monkeypatch, capsys, tmp_path: Path, tiny: Path, words: tuple[str, ...], says: str) -> None:
    assert run(monkeypatch, *(tiny if word == "MODEL" else word for word in words), "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("fewstep: ") and says in message and "\n" not in message
    assert not (tmp_path / "out").exists()


# -- fitted samplers -------------------------------------------------------------------------------------------------

FIT = ("--nfe", "3,2", "--num", 32, "--held-out", 16, "--iterations", 1, "--batch", 32)


def hurry_fit(monkeypatch) -> None:
    """Less work than fit does by those defaults that no option changes."""
    monkeypatch.setattr(cli, "FitConfig", partial(FitConfig, levels=12, noises=16, window=8))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tiny: Path) -> Path:
    """Samplers fitted to the small model."""
    out = tmp_path_factory.mktemp("fitted") / "samplers"
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry_fit(monkeypatch)
        assert run(monkeypatch, "fit", tiny, *FIT, "--out", out) == 0
    return out


@pytest.fixture
def owner(tmp_path: Path, tiny: Path, fitted: Path) -> Path:
    """A copy of the small model with fitted samplers of its own."""
    model = shutil.copytree(tiny, tmp_path / "owner")
    shutil.copytree(fitted, model / "fitted", ignore=shutil.ignore_patterns("trajectories"))
    return model


def test_fit_writes_samplers(monkeypatch, capsys, tmp_path: Path, tiny: Path, fitted: Path) -> None:
    hurry_fit(monkeypatch)
    assert {path.name for path in fitted.iterdir()} == {"README.md", "trajectories", "nfe-02", "nfe-03"}
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


def test_the_options_of_fit_reach_it(monkeypatch, capsys, tmp_path: Path, tiny: Path, fitted: Path) -> None:
    hurry_fit(monkeypatch)
    options = ("--history", 2, "--pool", "channel", "--no-bias", "--ridge", 1e-4, "--shrink", 0.5, "--parent", "ddim", "--iterations", 0)
    words = ("fit", tiny, *FIT, *options, "--trajectories", fitted / "trajectories", "--out", tmp_path / "out")
    assert run(monkeypatch, *words, "--json") == 0
    assert not (tmp_path / "out" / "trajectories").exists()
    sampler = Sampler.load(tmp_path / "out" / "nfe-03")
    form = {"history": 2, "pool": "channel", "bias": False, "ridge": 1e-4, "shrink": 0.5}
    assert sampler.options == {**form, "parent": "ddim"} and "swept" not in sampler.card["stages"]
    assert run(monkeypatch, *words[:-2], "--seed", 5, "--out", tmp_path / "out") == 2  # of another configuration
    assert "remove it, or use another folder" in capsys.readouterr().err


def test_a_killed_fit_continues(monkeypatch, capsys, tmp_path: Path, tiny: Path, fitted: Path) -> None:
    hurry_fit(monkeypatch)
    with monkeypatch.context() as mortal:
        counted(mortal, stop=180)  # among the samplers
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
        ("--nfe", 3, "--guidance", 2): "at guidance 2",
    }.items():
        assert run(monkeypatch, "sample", owner, "--solver", "fitted", *words, "--out", tmp_path / "d") == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith("fewstep: ") and says in message and "\n" not in message and not (tmp_path / "d").exists()


def test_fitted_samplers_are_compared(monkeypatch, capsys, tmp_path: Path, owner: Path) -> None:
    hurry_fit(monkeypatch)
    titles, real = [], verbs.progress
    monkeypatch.setattr(verbs, "progress", lambda title, total: titles.append((title, total)) or real(title, total))
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
        (("MODEL", "--nfe", "0"), "evaluations, got 0"),
        (("MODEL", "--nfe", "65"), "1 to 64 evaluations, got 65"),
        (("MODEL", "--parent", "dim"), "did you mean ddim"),
        (("MODEL", "--parent", "unipc-2"), "a fit starts from a solver that"),
        (("MODEL", "--parent", "ddim:eta=1"), "without noise"),
        (("MODEL", "--parent", "ddim:eta=x"), "eta"),
        (("MODEL", "--parent", "dpm-solver-v3"), "statistics"),
        (("MODEL", "--history", "0"), "history of at least 1"),
        (("MODEL", "--ridge", "-1"), "ridge and shrink from 0 to less than 1e6"),
        (("MODEL", "--shrink", "nan"), "ridge and shrink from 0 to less than 1e6"),
        (("MODEL", "--seed", "-1"), "no negative number"),
        (("MODEL", "--iterations", "-1"), "no negative number"),
        (("MODEL", "--num", "1"), "at least 2 trajectories"),
        (("MODEL", "--held-out", "0"), "2 held out"),
        (("MODEL", "--batch", "0"), "a batch of 1"),
        (("MODEL", "--guidance", "2"), "cannot be guided"),
        (("MODEL", "--guidance", "nan"), "guidance"),
        (("MODEL", "--trajectories", "nowhere"), "cannot read nowhere/manifest.json"),
        (("digits-emd",), "did you mean digits-edm"),
    ],
)
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


def test_damaged_samplers_and_unwritable_folders(monkeypatch, capsys, tmp_path: Path) -> None:
    schedule = VarianceExploding()
    folder = Sampler.build(make_solver("ddim"), TimeGrid.angle(schedule, 3), schedule).save(tmp_path / "sampler")
    data = folder / "sampler.safetensors"
    data.write_bytes(data.read_bytes()[:-8])
    assert run(monkeypatch, *SAMPLE, "--sampler", folder, "--out", tmp_path / "out") == 2
    assert "damaged" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert run(monkeypatch, *SAMPLE, "--out", tmp_path / "file" / "out") == 2
    assert "choose a folder that you may write to" in capsys.readouterr().err
