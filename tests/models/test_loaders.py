"""Models from folders: the bundled ones, diffusers' of every family, and folders that are no model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from fewstep import ArtifactError, DiscreteVP, ModelError, RectifiedFlow, VarianceExploding, load_model
from fewstep.core.statistics import ModelStatistics
from fewstep.models.zoo import BUNDLED, WEIGHTS

T = torch.tensor(1.0, dtype=torch.float64)
SMALL = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
SMALL |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_load_small_and_denoise(name: str) -> None:
    model = load_model(name)
    files = [file for file in (WEIGHTS / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 6e6
    assert "fewstep train" in (WEIGHTS / name / "README.md").read_text()
    t = T * model.denoiser.schedule.t_max / 2
    x0 = model.denoiser(x := torch.randn(4, *model.shape) * model.denoiser.schedule.sigma(t).float(), t, model.labels(range(4)))
    assert x0.shape == x.shape and float(x0.abs().max()) < 2 and len(model.fingerprint) == 16


def test_bundled_pipeline_is_one_for_diffusers_too() -> None:
    pipeline = DDPMPipeline.from_pretrained(str(WEIGHTS / "digits-ddpm"), low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=1, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (1, 8, 8, 1)


def _save(folder: Path, scheduler: object, **options: object) -> Path:
    torch.manual_seed(0)
    UNet2DModel(**{**SMALL, **options}).save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize(
    ("scheduler", "law", "prediction"),
    [
        (DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"), DiscreteVP, "v"),
        (DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"), DiscreteVP, "v"),
        (DDIMScheduler(prediction_type="sample", trained_betas=[0.1, 0.2, 0.3]), DiscreteVP, "sample"),
        (EDMEulerScheduler(sigma_data=0.7), VarianceExploding, "edm(0.7)"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), RectifiedFlow, "flow"),
    ],
)
def test_diffusers_folders_of_every_family(tmp_path: Path, scheduler: object, law: type, prediction: str) -> None:
    model = load_model(_save(tmp_path, scheduler))
    schedule = model.denoiser.schedule
    assert isinstance(schedule, law) and model.denoiser.prediction.name == prediction and model.shape == (1, 8, 8)
    if isinstance(schedule, DiscreteVP):
        table = scheduler.alphas_cumprod.double()
        torch.testing.assert_close(schedule.alpha(schedule.times[1:]) ** 2, table, rtol=1e-12, atol=1e-14)
    x0 = model.denoiser(torch.randn(2, 1, 8, 8), T * schedule.t_max * 0.5)
    assert bool(torch.isfinite(x0).all())


def test_a_fingerprint_is_of_the_whole_problem(tmp_path: Path) -> None:
    schedulers = (DDIMScheduler(), DDIMScheduler(), DDIMScheduler(prediction_type="sample"), DDIMScheduler(beta_end=0.03))
    prints = [load_model(_save(tmp_path / str(k), scheduler)).fingerprint for k, scheduler in enumerate(schedulers)]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_schedulers_that_are_not_understood_are_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path, DDIMScheduler())
    config = folder / "scheduler" / "scheduler_config.json"
    for text in (
        '{"_class_name": "ScoreSdeVeScheduler", "sigma_max": 1348.0}',
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": true}',
        '{"_class_name": "EDMEulerScheduler"}',
        '{"_class_name": "DDIMScheduler", "beta_schedule": "foo"}',
        "{}",
    ):
        config.write_text(text)
        with pytest.raises(ModelError):
            load_model(folder)


def test_labels_and_guidance(tmp_path: Path) -> None:
    edm, ddpm = load_model("digits-edm"), load_model("digits-ddpm")
    assert edm.classes == 10 and edm.null_label == 10 and ddpm.classes is None
    assert edm.labels([0, 9, 10, 25]).tolist() == [0, 9, 0, 5] and edm.labels([1, 2], 7).tolist() == [7, 7]
    assert ddpm.labels([1]) is None and ddpm.guided(1.0) is ddpm.denoiser
    for bad in (lambda: edm.labels([0], 10), lambda: ddpm.labels([0], 3), lambda: ddpm.guided(2.0)):
        with pytest.raises(ModelError):
            bad()
    conditional = load_model(_save(tmp_path, DDIMScheduler(), num_class_embeds=4))
    assert conditional.classes == 4 and conditional.null_label is None


@pytest.mark.parametrize("ours", [True, False], ids=["fewstep", "diffusers"])
def test_statistics_are_found_by_guidance(tmp_path: Path, ours: bool) -> None:
    folder = tmp_path / "model"
    if ours:
        shutil.copytree(WEIGHTS / "digits-edm", folder, ignore=shutil.ignore_patterns("statistics*"))
    else:
        _save(folder, DDIMScheduler())
    model = load_model(folder)
    assert model.statistics() is None and model.statistics(2.0) is None
    lam, values = torch.linspace(-1, 1, 3), torch.ones(3, 1, 1, 1)
    for name, guidance in (("statistics", 1.0), ("statistics-guidance-2", 2.0)):
        made = ModelStatistics(lam, values, values, guidance * values, model.shape, model.denoiser.schedule, model.fingerprint, guidance)
        made.save(folder / name)
    for guidance in (1.0, 2.0):
        found = model.statistics(guidance)
        assert found.guidance == guidance and float(found.b.mean()) == guidance
        found.check(model=model.fingerprint, guidance=guidance, schedule=model.denoiser.schedule, shape=model.shape)
    assert model.statistics(3.0) is None
    (folder / "statistics" / "statistics.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="damaged"):
        model.statistics()


def test_what_is_no_model_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="did you mean digits-edm"):
        load_model("digits-emd")
    with pytest.raises(ModelError, match="no model at"):
        load_model(tmp_path / "nothing")
    folder = _save(tmp_path / "broken", DDIMScheduler())
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load"):
        load_model(folder)
    ours = tmp_path / "ours"
    shutil.copytree(WEIGHTS / "digits-edm", ours)
    (ours / "fewstep.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        load_model(ours)
    (ours / "fewstep.json").write_text(json.dumps({"format": "fewstep-model", "version": 99}))
    with pytest.raises(ModelError, match="version 99"):
        load_model(ours)
