"""Models from folders: the bundled ones, diffusers' of every family, and folders that are no model."""

import hashlib
import shutil
import socket
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from fewstep import (
    ArtifactError,
    DiscreteVP,
    Model,
    ModelError,
    RectifiedFlow,
    Sampler,
    VarianceExploding,
    load_model,
    make_grid,
    make_solver,
    sample,
)
from fewstep.core.prediction import to_x0
from fewstep.core.statistics import ModelStatistics
from fewstep.models.formats.folders import NetworkTime, save_described, save_like
from fewstep.models.networks.operator import OperatorForm, OperatorStudent
from fewstep.models.networks.unets import SongUNet, build_network
from fewstep.models.zoo import BUNDLED, WEIGHTS

T = torch.tensor(1.0, dtype=torch.float64)
SMALL = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
SMALL |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_load_small_and_denoise(name: str) -> None:
    model = load_model(name)
    files = [file for file in (WEIGHTS / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 6e6
    assert any(verb in (WEIGHTS / name / "README.md").read_text() for verb in ("fewstep train", "fewstep finetune", "fewstep distill"))
    if model.flow_map is not None:  # its steps lead between times of its own
        x = torch.randn(4, *model.shape) * model.schedule.t_max
        ends = sample(
            model,
            Sampler.build(make_solver("ddim"), model.optimized("ddim", 1), model.schedule),
            x,
            model.labels(range(4)),
        )
        assert model.num_jumps == tuple(range(1, 9)) and ends.shape == x.shape and float(ends.abs().max()) < 2
        return
    t = T * model.schedule.t_max / 2
    x0 = model(x := torch.randn(4, *model.shape) * model.schedule.sigma(t).float(), t, model.labels(range(4)))
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
@pytest.mark.every(2)
def test_diffusers_folders_of_every_family(tmp_path: Path, scheduler: object, law: type, prediction: str) -> None:
    model = load_model(_save(tmp_path, scheduler))
    schedule = model.schedule
    assert isinstance(schedule, law) and model.prediction.name == prediction and model.shape == (1, 8, 8)
    if isinstance(schedule, DiscreteVP):
        table = scheduler.alphas_cumprod.double()
        torch.testing.assert_close(schedule.alpha(schedule.times[1:]) ** 2, table, rtol=1e-12, atol=1e-14)
    x0 = model(torch.randn(2, 1, 8, 8), T * schedule.t_max * 0.5)
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


def _in_the_cache(cache: Path, folder: Path, name: str) -> None:
    """Lay a folder out as huggingface_hub keeps a repository: blobs by their hash, links to them, and what ``main`` is."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        link = repository / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers' own call
def test_a_hub_id_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def no_network(*args: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what the variable of this name sets when the hub is imported
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    folder = _save(tmp_path / "model", DDIMScheduler(prediction_type="v_prediction"))
    _in_the_cache(tmp_path / "hub", folder, "somebody/small-ddim")
    model = load_model("somebody/small-ddim")
    assert (model.name, model.folder, model.prediction.name) == ("small-ddim", None, "v")
    assert model.fingerprint == load_model(folder).fingerprint
    with pytest.raises(ModelError, match="cannot load somebody/other/unet as a UNet2DModel"):
        load_model("somebody/other")
    with pytest.raises(ModelError, match="somebody/small-ddim is no file: format and config are for checkpoint files"):
        load_model("somebody/small-ddim", config={"sde": "vp"})


def _song(folder: Path) -> Model:
    """A folder of version 2."""
    torch.manual_seed(0)
    options = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 3, "model_channels": 8, "channel_mult": [1, 2]}
    options |= {"num_blocks": 1, "attn_resolutions": [4]}
    network = build_network("SongUNet", options, SongUNet(**options).state_dict())
    time = NetworkTime("log", 0.25)
    model = Model(network, VarianceExploding(0.01, 50.0), "edm(0.5)", shape=(1, 8, 8), time=time, classes=3, null_label=3, name="song")
    save_described(model, folder)
    return load_model(folder)


def test_a_folder_with_another_network(tmp_path: Path) -> None:
    model = _song(tmp_path / "one")
    assert (model.name, model.shape, model.classes, model.null_label, model.folder) == ("one", (1, 8, 8), 3, 3, tmp_path / "one")
    x, t, labels = torch.randn(2, 1, 8, 8), T, torch.tensor([0, 2])
    expected = to_x0("edm(0.5)", model.network(x / 1.25**0.5, torch.zeros(2), labels), x, T, T)
    torch.testing.assert_close(model(x, t, labels), expected)
    with pytest.raises(ModelError, match="the network refused a state"):
        model(x, t, labels + 2)
    with torch.no_grad():
        next(iter(model.network.parameters())).add_(1)
    save_like(model, model.network, tmp_path / "two")
    assert load_model(tmp_path / "two").fingerprint == model.fingerprint != load_model(tmp_path / "one").fingerprint
    with pytest.raises(ModelError, match="between the blocks of a diffusers UNet2DModel, which a SongUNet does not have"):
        OperatorStudent(model, make_grid("angle", model.schedule, 2).t, OperatorForm())


@pytest.mark.parametrize("scheduler", [DDIMScheduler(prediction_type="v_prediction"), FlowMatchEulerDiscreteScheduler(shift=3.0)])
def test_any_diffusers_folder_can_be_written_as_ours(tmp_path: Path, scheduler: object) -> None:
    model = load_model(_save(tmp_path / "one", scheduler))
    save_described(model, tmp_path / "two")
    assert load_model(tmp_path / "two").fingerprint == model.fingerprint
    x, t = torch.randn(2, 1, 8, 8), T * model.schedule.t_max * 0.5
    assert torch.equal(load_model(tmp_path / "two")(x, t), model(x, t))


def test_labels_and_guidance(tmp_path: Path) -> None:
    edm, ddpm = load_model("digits-edm"), load_model("digits-ddpm")
    assert edm.classes == 10 and edm.null_label == 10 and ddpm.classes is None
    assert edm.labels([0, 9, 10, 25]).tolist() == [0, 9, 0, 5] and edm.labels([1, 2], 7).tolist() == [7, 7]
    assert ddpm.labels([1]) is None and ddpm.guided(1.0) is ddpm
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
        made = ModelStatistics(lam, values, values, guidance * values, model.shape, model.schedule, model.fingerprint, guidance)
        made.save(folder / name)
    for guidance in (1.0, 2.0):
        found = model.statistics(guidance)
        assert found.guidance == guidance and float(found.b.mean()) == guidance
        found.check(model=model.fingerprint, guidance=guidance, schedule=model.schedule, shape=model.shape)
    assert model.statistics(3.0) is None
    (folder / "statistics" / "statistics.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="damaged"):
        model.statistics()
