"""Models from folders: the bundled ones, diffusers' of every family, and folders that are no model."""

import hashlib
import json
import shutil
import socket
from collections.abc import Sequence
from dataclasses import replace
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
    GridError,
    Model,
    ModelError,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    load_model,
    make_grid,
    make_solver,
    sample,
    start_noise,
)
from fewstep.core.grid_table import GridTable
from fewstep.core.prediction import to_x0
from fewstep.core.statistics import ModelStatistics
from fewstep.evaluate.metrics import rmse
from fewstep.models.denoiser import AdaptedDenoiser
from fewstep.models.loaders import NetworkTime, save_described, save_like, save_ours
from fewstep.models.operators.student import OperatorForm, OperatorStudent
from fewstep.models.tuned import Tuned
from fewstep.models.unets import SongUNet, build_network
from fewstep.models.zoo import BUNDLED, WEIGHTS
from fewstep.solvers.reference import reference_sampler

T = torch.tensor(1.0, dtype=torch.float64)
SMALL = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
SMALL |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_load_small_and_denoise(name: str) -> None:
    model = load_model(name)
    files = [file for file in (WEIGHTS / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 6e6
    assert any(verb in (WEIGHTS / name / "README.md").read_text() for verb in ("fewstep train", "fewstep finetune", "fewstep distill"))
    if model.is_operator:  # its steps lead between times of its own
        x = torch.randn(4, *model.shape) * model.denoiser.schedule.t_max
        ends = sample(
            model.denoiser,
            Sampler.build(make_solver("ddim"), model.optimized("ddim", 1), model.denoiser.schedule),
            x,
            model.labels(range(4)),
        )
        assert model.passes == (1, 2, 3, 4) and ends.shape == x.shape and float(ends.abs().max()) < 2
        return
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
    assert (model.name, model.folder, model.denoiser.prediction.name) == ("small-ddim", None, "v")
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
    denoiser = AdaptedDenoiser(network, VarianceExploding(0.01, 50.0), "edm(0.5)", NetworkTime("log", 0.25))
    save_described(Model("song", denoiser, (1, 8, 8), 3, 3), folder)
    return load_model(folder)


def test_a_folder_with_another_network(tmp_path: Path) -> None:
    model = _song(tmp_path / "one")
    assert (model.name, model.shape, model.classes, model.null_label, model.folder) == ("one", (1, 8, 8), 3, 3, tmp_path / "one")
    x, t, labels = torch.randn(2, 1, 8, 8), T, torch.tensor([0, 2])
    expected = to_x0("edm(0.5)", model.denoiser.network(x / 1.25**0.5, torch.zeros(2), labels), x, T, T)
    torch.testing.assert_close(model.denoiser(x, t, labels), expected)
    with pytest.raises(ModelError, match="the network refused a state"):
        model.denoiser(x, t, labels + 2)
    with torch.no_grad():
        next(iter(model.denoiser.network.parameters())).add_(1)
    save_like(model, model.denoiser.network, tmp_path / "two")
    assert load_model(tmp_path / "two").fingerprint == model.fingerprint != load_model(tmp_path / "one").fingerprint
    with pytest.raises(ModelError, match="an operator is made of a diffusers UNet2DModel, not of a SongUNet"):
        OperatorStudent(model.adapted, make_grid("angle", model.denoiser.schedule, 2).t, OperatorForm())


@pytest.mark.parametrize("scheduler", [DDIMScheduler(prediction_type="v_prediction"), FlowMatchEulerDiscreteScheduler(shift=3.0)])
def test_any_diffusers_folder_can_be_written_as_ours(tmp_path: Path, scheduler: object) -> None:
    model = load_model(_save(tmp_path / "one", scheduler))
    save_described(model, tmp_path / "two")
    assert load_model(tmp_path / "two").fingerprint == model.fingerprint
    x, t = torch.randn(2, 1, 8, 8), T * model.denoiser.schedule.t_max * 0.5
    assert torch.equal(load_model(tmp_path / "two").denoiser(x, t), model.denoiser(x, t))


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


def _ours(folder: Path, null_label: int | None = None) -> Model:
    torch.manual_seed(0)
    network = UNet2DModel(**SMALL, num_class_embeds=None if null_label is None else null_label + 1)
    save_ours(folder, network, "edm(0.5)", VarianceExploding(0.01, 50.0), (1, 8, 8), null_label)
    return load_model(folder)


def _grids(model: Model, place: str, guidance: float, *nfe: int, fingerprint: str | None = None) -> dict[int, TimeGrid]:
    """Grids in the model's folder, of some solver at some guidance scale."""
    schedule = model.denoiser.schedule
    grids = {n: make_grid("angle", schedule, n) for n in nfe}
    GridTable(Path(place).name, fingerprint or model.fingerprint, guidance, schedule, grids).save(model.folder / place)
    return grids


def test_what_we_save_is_what_we_load(tmp_path: Path) -> None:
    for null_label in (None, 4):
        model = _ours(tmp_path / str(null_label), null_label)
        assert (model.classes, model.null_label, model.shape, model.denoiser.prediction.name) == (
            null_label,
            null_label,
            (1, 8, 8),
            "edm(0.5)",
        )
        assert model.denoiser.schedule.to_config() == VarianceExploding(0.01, 50.0).to_config() and model.folder == tmp_path / str(
            null_label
        )


@pytest.mark.parametrize("ours", [True, False], ids=["fewstep", "diffusers"])
def test_a_network_like_another_is_saved_in_the_same_form(tmp_path: Path, ours: bool) -> None:
    model = _ours(tmp_path / "one", 4) if ours else load_model(_save(tmp_path / "one", DDIMScheduler(prediction_type="v_prediction")))
    (tmp_path / "one" / "README.md").write_text("of the one")
    other = model.denoiser.network
    with torch.no_grad():
        next(iter(other.parameters())).add_(1)
    save_like(model, other, tmp_path / "two")
    kinds = {"fewstep.json", "unet"} if ours else {"scheduler", "unet"}
    assert {path.name for path in (tmp_path / "two").iterdir()} == kinds
    before, after = load_model(tmp_path / "one"), load_model(tmp_path / "two")
    assert before.fingerprint != after.fingerprint
    for what in ("shape", "classes", "null_label"):
        assert getattr(before, what) == getattr(after, what)
    assert before.denoiser.prediction.name == after.denoiser.prediction.name
    assert before.denoiser.schedule.to_config() == after.denoiser.schedule.to_config()


def test_a_model_from_nowhere_has_no_form_to_save_in(tmp_path: Path) -> None:
    model = replace(_ours(tmp_path / "one"), folder=None)
    with pytest.raises(ModelError, match="was not loaded from a folder: save it to one first"):
        save_like(model, model.denoiser.network, tmp_path / "two")
    assert model.tuned is None and model.statistics() is None
    with pytest.raises(GridError, match="there are none in its folder"):
        model.optimized("ddim", 3)


def test_a_pipeline_is_saved_as_a_pipeline(tmp_path: Path) -> None:
    model = load_model("digits-ddpm")
    save_like(model, model.denoiser.network, tmp_path / "copy")
    DDPMPipeline.from_pretrained(str(tmp_path / "copy"), low_cpu_mem_usage=False)
    assert load_model(tmp_path / "copy").fingerprint == model.fingerprint


def test_optimized_grids_are_found_by_solver_and_guidance(tmp_path: Path) -> None:
    model = _ours(tmp_path / "model", 4)
    plain, guided = _grids(model, "optimized/ddim", 1.0, 3, 5), _grids(model, "optimized-guidance-2/ddim", 2.0, 4)
    _grids(model, "optimized/unipc-2", 1.0, 6)
    assert torch.equal(model.optimized("ddim", 5).t, plain[5].t) and torch.equal(model.optimized("ddim", 4, 2.0).t, guided[4].t)
    assert model.optimized("unipc-2", 6).steps == 6
    with pytest.raises(GridError, match=f"make a sampler with 'fewstep optimize {tmp_path / 'model'} --solver heun --out DIR'"):
        model.optimized("heun", 4)
    for request, says in {
        ("ddim", 6): "no optimized grid of 6 evaluations for ddim here, only of 3, 5",
        ("ddim", 3, 2.0): "no optimized grid of 3 evaluations for ddim here, only of 4",
        ("heun", 4): "no optimized grid of model for heun at guidance 1, there are some for ddim",
        ("unipc-2", 6, 2.0): "no optimized grid of model for unipc-2 at guidance 2, there are some for ddim",
        (
            "ddim",
            3,
            1.5,
        ): "no optimized grid of model for ddim at guidance 1.5, there are some for ddim at 1, unipc-2 at 1, ddim at 2: make a "
        f"sampler with 'fewstep optimize {tmp_path / 'model'} --guidance 1.5 --solver ddim",
    }.items():
        with pytest.raises(GridError) as error:
            model.optimized(*request)
        assert says in str(error.value)


def test_optimized_grids_of_other_weights_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    model = _ours(tmp_path / "model")
    with pytest.raises(GridError, match="there are none in its folder"):
        model.optimized("ddim", 3)
    _grids(model, "optimized/ddim", 1.0, 3, fingerprint="0" * 16)
    with pytest.raises(ArtifactError, match=f"made for other weights \\({'0' * 16}, not {model.fingerprint}\\)"):
        model.optimized("ddim", 3)
    (model.folder / "optimized" / "ddim" / "grids.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        model.optimized("ddim", 3)


def _fitted(model: Model, place: str, nfe: int, guidance: float = 1.0, fingerprint: str | None = None) -> Sampler:
    """A sampler in the model's folder, as if fitted to it at some guidance scale."""
    schedule, card = model.denoiser.schedule, {"name": "fitted", "model": fingerprint or model.fingerprint, "guidance": guidance}
    sampler = Sampler.build(make_solver("ddim"), make_grid("angle", schedule, nfe), schedule, **card)
    sampler.save(model.folder / place / f"nfe-{nfe:02d}")
    return sampler


def test_fitted_samplers_are_found_by_evaluations_and_guidance(tmp_path: Path) -> None:
    model = _ours(tmp_path / "model", 4)
    with pytest.raises(
        SolverError, match="no fitted sampler of model with 4 evaluations at guidance 1, there are none in its folder: make"
    ):
        model.fitted(4)
    for place, nfe, guidance in (("fitted", 3, 1.0), ("fitted", 12, 1.0), ("fitted-guidance-2", 3, 2.0), ("fitted-guidance-2", 5, 2.0)):
        made = _fitted(model, place, nfe, guidance)
        found = model.fitted(nfe, guidance)
        assert (found.nfe, found.card["guidance"]) == (nfe, guidance) and torch.equal(found.grid.t, made.grid.t)
    command = f"'fewstep fit {tmp_path / 'model'}"
    for request, says in {
        (5,): (
            "no fitted sampler of model with 5 evaluations at guidance 1",
            "3 at 1, 12 at 1, 3 at 2, 5 at 2",
            f"{command} --nfe 5 --out DIR'",
        ),
        (12, 2.0): ("with 12 evaluations at guidance 2", "5 at 2", f"{command} --guidance 2 --nfe 12 --out DIR'"),
        (3, 1.5): ("with 3 evaluations at guidance 1.5", "there are some of 3 at 1", "use it with --sampler DIR"),
    }.items():
        with pytest.raises(SolverError) as error:
            model.fitted(*request)
        assert all(part in str(error.value) for part in says) and "\n" not in str(error.value)
    with pytest.raises(SolverError, match="there are none in its folder"):
        replace(model, folder=None).fitted(3)


def test_fitted_samplers_of_other_weights_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    model = _ours(tmp_path / "model")
    _fitted(model, "fitted", 3, fingerprint="0" * 16)
    with pytest.raises(ArtifactError, match=f"the fitted samplers in .*model were made for other weights, not {model.fingerprint}"):
        model.fitted(3)
    _fitted(model, "fitted", 3)
    assert model.fitted(3).nfe == 3
    (model.folder / "fitted" / "nfe-03" / "sampler.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="sampler.safetensors is damaged"):
        model.fitted(3)


def test_a_command_names_a_model_as_it_was_asked_for(tmp_path: Path) -> None:
    model = _ours(tmp_path / "model", 4)
    assert (model.command_name(1.0), model.command_name(2.5)) == (str(tmp_path / "model"), f"{tmp_path / 'model'} --guidance 2.5")
    assert replace(model, folder=None).command_name(1.0) == "model"
    for name in BUNDLED:
        assert load_model(load_model(name).command_name(1.0)).fingerprint == load_model(name).fingerprint


def test_a_tuned_model_knows_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert _ours(folder).tuned is None
    tuned = Tuned("digits-edm", "0" * 16, 1.0, "ddim", 3, "mean")
    tuned.save(folder)
    assert load_model(folder).tuned == tuned
    (folder / "tuned.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tuned\.json is not"):
        _ = load_model(folder).tuned


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


BUNDLED_FITS = [("digits-edm", 1, range(3, 11)), ("digits-ddpm", 1, range(4, 11)), ("digits-edm", 2, (4, 5, 6, 8, 10))]


@pytest.mark.parametrize(("name", "guidance", "counts"), BUNDLED_FITS)
def test_the_bundled_models_have_fitted_samplers(name: str, guidance: float, counts: Sequence[int]) -> None:
    model = load_model(name)
    for nfe in counts:
        sampler = model.fitted(nfe, guidance)
        assert (sampler.nfe, sampler.card["chosen"]) == (nfe, "swept") and sampler.card["error"][0] < 0.75 * sampler.card["error"][1]
    x_T, labels = start_noise(sampler.tableau.nodes, range(16), model.shape), model.labels(range(16))  # noqa: N806
    with torch.no_grad():
        exact = sample(model.guided(guidance), reference_sampler(model.denoiser.schedule, 32), x_T, labels)
        assert rmse(sample(model.guided(guidance), sampler, x_T, labels), exact) < 0.02
