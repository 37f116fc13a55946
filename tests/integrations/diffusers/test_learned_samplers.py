"""Samplers and statistics that were learned from a pipeline run in it, and give what `fewstep.sample` gives."""

from pathlib import Path

import pytest
import torch
from tests.apps.conftest import run as command
from tests.integrations.diffusers.test_pipelines import PROMPTS, SAME, distance, latents_of, loaded, model_of, noise

import fewstep
from fewstep import CalibrationConfig, FitConfig, OptimizeConfig, load_model
from fewstep.integrations.diffusers import FewstepScheduler

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode of some PyTorch releases says so

FIT = FitConfig(num=32, held_out=16, noises=16, levels=16, iterations=1, batch=32)


def brought_back(pipe, model, scheduler, steps=3):
    """The pipeline with what was learnt gives what `sample` gives."""
    pipe.scheduler, start = scheduler, noise(model.shape)
    ours = latents_of(pipe, "", start, steps, 5.0)
    with torch.no_grad():
        expected = fewstep.sample(model, scheduler._sampler, start)
    assert bool(ours.isfinite().all()) and distance(ours, expected) < 10 * SAME  # tables of betas in float32
    return ours


@pytest.mark.slow
def test_calibrated_statistics_in_the_pipeline(folder, tmp_path):
    pipe = loaded(folder("sd"))
    model = model_of(pipe, "sd")
    config = CalibrationConfig(levels=6, num=4, batch=4, jvp="reverse")
    ems = fewstep.calibrate(model, config=config, out=tmp_path / "ems", guidance=5.0)
    scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver="dpm-solver-v3", statistics=ems)
    brought_back(pipe, model, scheduler)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_pipelines_model_is_sampled_in_parallel(name, folder):
    model, parallel = model_of(loaded(folder(name)), name), fewstep.ParallelConfig(tol=0, window=4)
    made = fewstep.sample(model, "ddim", nfe=10, seeds=range(2), guidance=5.0, parallel=parallel)
    torch.testing.assert_close(made, fewstep.sample(model, "ddim", nfe=10, seeds=range(2), guidance=5.0), rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_optimized_and_fitted_samplers_in_the_pipeline(name, folder, tmp_path):
    pipe = loaded(folder(name))
    model, config = model_of(pipe, name), pipe.scheduler.config
    small = OptimizeConfig(levels=8, num=4, noises=4, held_out=4, iterations=1)
    fewstep.optimize(model, "unipc-2", 3, config=small, out=tmp_path / "optimized", guidance=5.0)
    one = brought_back(pipe, model, FewstepScheduler.from_sampler(tmp_path / "optimized" / "unipc-2", config))
    fewstep.fit(model, 3, config=FIT, out=tmp_path / "fitted", guidance=5.0)
    two = brought_back(pipe, model, FewstepScheduler.from_sampler(tmp_path / "fitted", config))
    three = brought_back(pipe, model, FewstepScheduler.from_sampler(tmp_path / "fitted"))  # its card knows enough
    assert distance(one, two) > 1e-3 and distance(two, three) < 10 * SAME


@pytest.mark.slow
def test_fit_from_the_command_line(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    place = folder("sd3")
    options = ["--nfe", "3", "--num", "32", "--held-out", "16", "--iterations", "1", "--guidance", "5"]
    options += ["--levels", "16", "--noises", "16"]
    words = ("fit", place, "--prompts", tmp_path / "prompts.txt", *options)
    assert command(monkeypatch, *words, "--batch", 32, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "FewstepScheduler.from_sampler" in said and (tmp_path / "out" / "nfe-03" / "sampler.json").exists()
    pipe = loaded(place)
    brought_back(pipe, model_of(pipe, "sd3"), FewstepScheduler.from_sampler(tmp_path / "out", pipe.scheduler.config))
    for wrong, message in (
        (("fit", place, "--nfe", 3), "needs prompts"),
        (("fit", load_model("digits-ddpm").folder, "--prompts", tmp_path / "prompts.txt"), "leave --prompts out"),
        (("fit", place, "--prompts", Path("nowhere.txt")), "cannot read the prompts"),
    ):
        assert command(monkeypatch, *wrong, "--out", tmp_path / "no") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "no").exists()
