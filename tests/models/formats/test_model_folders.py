"""Models saved and loaded again, and what lies beside one in its folder: optimised grids, fitted samplers, what it was tuned for."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tests.models.formats.test_folders import SMALL, _save

from fewstep import (
    ArtifactError,
    GridError,
    Model,
    ModelError,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    load_model,
    make_grid,
    make_solver,
    sample,
)
from fewstep.evaluate.metrics.distances import rmse
from fewstep.models.formats.folders import save_like, save_ours
from fewstep.models.tuned import Tuned
from fewstep.models.zoo import BUNDLED, WEIGHTS
from fewstep.sampling.grid_table import GridTable
from fewstep.sampling.reference import reference_sampler


def _ours(folder: Path, null_label: int | None = None) -> Model:
    torch.manual_seed(0)
    network = UNet2DModel(**SMALL, num_class_embeds=None if null_label is None else null_label + 1)
    save_ours(folder, network, "edm(0.5)", VarianceExploding(0.01, 50.0), (1, 8, 8), null_label)
    return load_model(folder)


def _grids(model: Model, place: str, guidance: float, *nfe: int, fingerprint: str | None = None) -> dict[int, TimeGrid]:
    """Grids in the model's folder, of some solver at some guidance scale."""
    schedule = model.schedule
    grids = {n: make_grid("angle", schedule, n) for n in nfe}
    GridTable(Path(place).name, fingerprint or model.fingerprint, guidance, schedule, grids).save(model.folder / place)
    return grids


def test_what_we_save_is_what_we_load(tmp_path: Path) -> None:
    for null_label in (None, 4):
        model = _ours(tmp_path / str(null_label), null_label)
        assert (model.classes, model.null_label, model.shape, model.prediction.name) == (
            null_label,
            null_label,
            (1, 8, 8),
            "edm(0.5)",
        )
        assert model.schedule.to_config() == VarianceExploding(0.01, 50.0).to_config() and model.folder == tmp_path / str(null_label)


@pytest.mark.parametrize("ours", [True, False], ids=["fewstep", "diffusers"])
def test_a_network_like_another_is_saved_in_the_same_form(tmp_path: Path, ours: bool) -> None:
    model = _ours(tmp_path / "one", 4) if ours else load_model(_save(tmp_path / "one", DDIMScheduler(prediction_type="v_prediction")))
    (tmp_path / "one" / "README.md").write_text("of the one")
    other = model.network
    with torch.no_grad():
        next(iter(other.parameters())).add_(1)
    save_like(model, other, tmp_path / "two")
    kinds = {"fewstep.json", "unet"} if ours else {"scheduler", "unet"}
    assert {path.name for path in (tmp_path / "two").iterdir()} == kinds
    before, after = load_model(tmp_path / "one"), load_model(tmp_path / "two")
    assert before.fingerprint != after.fingerprint
    for what in ("shape", "classes", "null_label"):
        assert getattr(before, what) == getattr(after, what)
    assert before.prediction.name == after.prediction.name
    assert before.schedule.to_config() == after.schedule.to_config()


def test_a_model_from_nowhere_is_saved_by_its_description(tmp_path: Path) -> None:
    model = replace(_ours(tmp_path / "one"), folder=None)
    save_like(model, model.network, tmp_path / "two")
    assert load_model(tmp_path / "two").fingerprint == model.fingerprint
    assert model.tuned is None and model.statistics() is None
    with pytest.raises(GridError, match="there are none in its folder"):
        model.optimized("ddim", 3)


def test_a_pipeline_is_saved_as_a_pipeline(tmp_path: Path) -> None:
    model = load_model("digits-ddpm")
    save_like(model, model.network, tmp_path / "copy")
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
    with pytest.raises(ArtifactError, match=f"made for other weights .*\\({'0' * 16}, not {model.fingerprint}\\)"):
        model.optimized("ddim", 3)
    (model.folder / "optimized" / "ddim" / "grids.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        model.optimized("ddim", 3)


def _fitted(model: Model, place: str, nfe: int, guidance: float = 1.0, fingerprint: str | None = None) -> Sampler:
    """A sampler in the model's folder, as if fitted to it at some guidance scale."""
    schedule, card = model.schedule, {"name": "fitted", "model": fingerprint or model.fingerprint, "guidance": guidance}
    sampler = Sampler.build(make_solver("ddim"), make_grid("angle", schedule, nfe), schedule, card=card)
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
    with pytest.raises(ArtifactError, match=f"the fitted samplers in .*model were made for other weights .*, not {model.fingerprint}"):
        model.fitted(3)
    _fitted(model, "fitted", 3)
    assert model.fitted(3).nfe == 3
    (model.folder / "fitted" / "nfe-03" / "sampler.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="sampler.safetensors is damaged"):
        model.fitted(3)


@pytest.mark.slow
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
    with pytest.raises(ArtifactError, match=r"tuned\.json is None version None"):
        _ = load_model(folder).tuned


def test_what_is_no_model_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="did you mean digits-edm"):
        load_model("digits-emd")
    with pytest.raises(ModelError, match="no model at"):
        load_model(tmp_path / "nothing")
    folder = _save(tmp_path / "broken", DDIMScheduler())
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot read .* as safetensors"):
        load_model(folder)
    ours = tmp_path / "ours"
    shutil.copytree(WEIGHTS / "digits-edm", ours)
    (ours / "fewstep.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        load_model(ours)
    (ours / "fewstep.json").write_text(json.dumps({"format": "fewstep-model", "version": 99}))
    with pytest.raises(ArtifactError, match="version 99"):
        load_model(ours)


BUNDLED_FITS = [("digits-edm", 1, range(3, 11)), ("digits-ddpm", 1, range(4, 11)), ("digits-edm", 2, (4, 5, 6, 8, 10))]


@pytest.mark.parametrize(("name", "guidance", "counts"), BUNDLED_FITS)
@pytest.mark.every(3)
def test_the_bundled_models_have_fitted_samplers(name: str, guidance: float, counts: Sequence[int]) -> None:
    model = load_model(name)
    for nfe in counts:
        sampler = model.fitted(nfe, guidance)
        assert (sampler.nfe, sampler.card["chosen"]) == (nfe, "swept") and sampler.card["error"][0] < 0.75 * sampler.card["error"][1]
    exact = sample(model, reference_sampler(model.schedule, 32), seeds=range(8), guidance=guidance)
    assert rmse(sample(model, sampler, seeds=range(8), guidance=guidance), exact) < 0.02
