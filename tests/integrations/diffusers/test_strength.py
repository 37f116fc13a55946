"""A scheduler with a strength: its pipelines begin at that noise level, with exactly the network calls that were asked for."""

import copy
import functools
import math
import pickle

import diffusers
import numpy as np
import pytest
import torch
from tests.integrations.diffusers import tiny_pipelines
from tests.problems import statistics

from fewstep import DiscreteVP, FewstepError, GridError, Sampler, load_model, make_solver
from fewstep.integrations.diffusers import FewstepScheduler
from fewstep.sampling.start import begin, level_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*upcast_vae:FutureWarning"),
]
LEVEL = level_of(0.3)
PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red cat", "a blue square on the moon"]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLE = DiscreteVP.scaled_linear().to_clean()
CONFIGS = {
    "linspace": SD,
    "trailing": {**SD, "timestep_spacing": "trailing"},
    "leading": {**SD, "timestep_spacing": "leading", "steps_offset": 1},
    "karras": {**SD, "use_karras_sigmas": True},
    "exponential": {**SD, "use_exponential_sigmas": True},
    "lu": {**SD, "use_lu_lambdas": True},
    "sigma-min": {**SD, "final_sigmas_type": "sigma_min"},
    "zero-snr": {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "grid-angle": {**SD, "grid": "angle"},
    "grid-karras": {**SD, "grid": "karras:rho=5"},
    "grid-leading": {**SD, "grid": "leading"},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    "flow-grid": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "grid": "uniform"},
    "flow-karras": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_karras_sigmas": True},
}
opened = functools.cache(tiny_pipelines.load)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def level_at_first(scheduler):
    nodes = scheduler._sampler.tableau.nodes
    return float(nodes.sigma[0] / nodes.alpha[0])


# -- the levels -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["unipc-2", "heun", "dpm-solver-3s", "dpm-solver-pp-2m", "sde-dpm-solver-pp-2m"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.every(5, 2)
def test_every_grid_begins_at_the_level_with_all_its_steps(name, solver):
    scheduler = FewstepScheduler(**CONFIGS[name], solver=solver, strength=0.3)
    law, order = scheduler._law.schedule, make_solver(solver).stages
    t = torch.tensor(begin(law, LEVEL), dtype=torch.float64)
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        nodes = scheduler._sampler.tableau.nodes
        assert float(nodes.t[0]) == float(t)
        clean = bool(nodes.sigma[-1] == 0)
        assert len(scheduler.timesteps) == steps * order - (order - 1 if clean else 0)
        assert scheduler._sampler.grid.steps == steps and bool((torch.diff(nodes.t) <= 0).all())
        x0, eps = noise(2, 3), noise(2, 3, seed=2)
        x = scheduler.add_noise(x0, eps, scheduler.timesteps[:1])
        torch.testing.assert_close(x, law.alpha(t).float() * x0 + law.sigma(t).float() * eps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strength", [None, 1, 1.0])
def test_the_whole_range_is_as_without(strength):
    one, two = FewstepScheduler(**SD), FewstepScheduler(**SD, strength=strength)
    for scheduler in (one, two):
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(2)
    assert torch.equal(one.timesteps, two.timesteps) and one._sampler.fingerprint == two._sampler.fingerprint


def test_whole_times_stay_whole():
    scheduler = FewstepScheduler(**SD, timestep_spacing="trailing", strength=0.3)
    scheduler.set_timesteps(6)
    assert scheduler.timesteps.dtype == torch.int64 and float(scheduler.timesteps[0]) == begin(TABLE, LEVEL)


@pytest.mark.parametrize("solver", ["unipc-2", "heun", "dpm-solver-v3"])
def test_saved_samplers_are_re_spread(solver, tmp_path):
    order = make_solver(solver).stages if solver != "dpm-solver-v3" else 1
    made = make_solver(solver) if solver != "dpm-solver-v3" else make_solver(solver, statistics=statistics())
    saved = Sampler.build(made, "uniform", TABLE, nfe=5 if order == 2 else 4)
    saved.save(tmp_path / "saved")
    given = {"statistics": statistics()} if solver == "dpm-solver-v3" else {}
    scheduler = FewstepScheduler.from_sampler(tmp_path / "saved", SD, strength=0.3, **given)
    scheduler.set_timesteps(saved.grid.steps)
    assert scheduler._sampler.fingerprint == saved.from_level(LEVEL).fingerprint and len(scheduler.timesteps) == saved.nfe


def test_configurations_carry_it(tmp_path):
    scheduler = FewstepScheduler.from_config(FewstepScheduler(**SD).config, strength=0.3)
    scheduler.save_pretrained(tmp_path)
    for again in (
        FewstepScheduler.from_pretrained(tmp_path),
        FewstepScheduler.from_config(scheduler.config),
        copy.deepcopy(scheduler),
        pickle.loads(pickle.dumps(scheduler)),
    ):
        again.set_timesteps(4)
        assert level_at_first(again) == pytest.approx(LEVEL, rel=1e-2)
    plain = FewstepScheduler.from_config(scheduler.config, strength=None)
    plain.set_timesteps(4)
    assert level_at_first(plain) > 10


# -- pipelines ------------------------------------------------------------------------------------------------------------------------


def pipeline(folder, name, kind, **options):
    pipe = copy.copy(opened(folder(name)))
    theirs = getattr(diffusers, kind)(
        **{**pipe.components, "scheduler": FewstepScheduler.from_config(pipe.scheduler.config, strength=0.3, **options)},
        **({"requires_safety_checker": False} if name == "sd" else {}),
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


KINDS = {"sd": "StableDiffusionImg2Img", "sdxl": "StableDiffusionXLImg2Img", "sd3": "StableDiffusion3Img2Img", "flux": "FluxImg2Img"}


def first_calls(pipe, network, **ask):
    """What the network is called with: the states, and the image and noise that the first of them was made of."""
    calls, made = [], []
    hook = getattr(pipe, network).register_forward_pre_hook(
        lambda net, args, kwargs: calls.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    add = pipe.scheduler.add_noise

    def noised(image, eps, timesteps):
        made.append((image, eps))
        return add(image, eps, timesteps)

    pipe.scheduler.add_noise = noised
    try:
        out = pipe(output_type="latent", generator=torch.Generator().manual_seed(0), **ask).images
    finally:
        hook.remove()
        del pipe.scheduler.add_noise
    return calls, made, out


@pytest.mark.parametrize("solver", ["unipc-2", "heun"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.every(4)
def test_the_network_is_first_called_at_the_level(name, solver, folder):
    for options in ({}, {"grid": "angle"}):
        pipe = pipeline(folder, name, f"{KINDS[name]}Pipeline", solver=solver, **options)
        ask = {"prompt": PROMPTS[:1], "image": PICTURES[:1], "strength": 1.0, "num_inference_steps": 4, "guidance_scale": 1.0}
        ask |= {"height": 16, "width": 16} if name == "flux" else {}
        calls, made, out = first_calls(pipe, "unet" if name.startswith("sd") and name != "sd3" else "transformer", **ask)
        assert len(calls) == (4 if solver == "unipc-2" else 7) and bool(out.isfinite().all())
        image, eps = made[0]
        law = pipe.scheduler._law.schedule
        t = torch.tensor(begin(law, LEVEL), dtype=torch.float64)
        expected = law.alpha(t).float() * image + law.sigma(t).float() * eps
        seen = calls[0][:1]
        if name == "flux":  # packed
            expected = pipe._pack_latents(expected, *expected.shape)
        torch.testing.assert_close(seen, expected.to(seen.dtype), rtol=1e-4, atol=1e-4)


def test_what_counts_steps_too_is_refused(folder):
    pipe = pipeline(folder, "sd", "StableDiffusionImg2ImgPipeline")
    ask = {"prompt": PROMPTS[:1], "image": PICTURES[:1], "num_inference_steps": 4, "output_type": "latent"}
    with pytest.raises(GridError, match="starts at strength 0.3 with its first step, .* call the pipeline with strength=1"):
        pipe(**ask, strength=0.8)
    assert bool(pipe(**ask, strength=1.0).images.isfinite().all())


def test_text_to_image_is_refused(folder):
    pipe = copy.copy(opened(folder("sd")))
    pipe = type(pipe)(
        **{**pipe.components, "scheduler": FewstepScheduler(**SD, steps_offset=1, strength=0.3)}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(FewstepError, match="and none was: text to image, and an inpainting pipeline"):
        pipe("a red cat", num_inference_steps=3, output_type="latent")


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.every(2)
def test_inpainting(name, folder):
    """Stable Diffusion's takes pure noise at 1, and with less leaves a step out; that of 3 leaves none; Flux' noises the image."""
    family = {"sd": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}[name]
    pipe, mask = pipeline(folder, name, f"{family}InpaintPipeline"), torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    ask = {"prompt": PROMPTS[:1], "image": PICTURES[:1], "mask_image": mask, "num_inference_steps": 4, "guidance_scale": 1.0}
    ask |= {"height": 16, "width": 16}
    network = "unet" if name in ("sd", "sdxl") else "transformer"
    if name == "sd3":  # asks for the width of a whole network's input, which it does not use
        pipe.transformer = copy.deepcopy(pipe.transformer)
        pipe.transformer.register_to_config(in_channels=16)
    if name != "flux":
        with pytest.raises(FewstepError, match="and none was: .* an inpainting pipeline that starts from pure noise at its strength=1"):
            pipe(**ask, strength=1.0, output_type="latent")
    if name in ("sd", "sdxl"):
        with pytest.raises(GridError, match="and not at evaluation 1"):
            pipe(**ask, strength=0.999, output_type="latent")
        return
    calls, _, out = first_calls(pipe, network, **ask, strength=0.999 if name == "sd3" else 1.0)
    assert len(calls) == 4 and bool(out.isfinite().all())


# -- refusals -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0, -1, 1.5, "much", math.nan])
def test_a_strength_that_is_none(strength):
    with pytest.raises(GridError, match="strength is"):
        FewstepScheduler(**SD, strength=strength)


def test_levels_of_ones_own_are_refused():
    scheduler, flow = FewstepScheduler(**SD, strength=0.3), FewstepScheduler(**CONFIGS["flow"], strength=0.3)
    for given in ({"timesteps": [900, 500, 100]}, {"sigmas": [10.0, 1.0, 0.1]}):
        with pytest.raises(GridError, match="lays its levels from strength 0.3: leave timesteps and sigmas out"):
            scheduler.set_timesteps(**given)
    with pytest.raises(GridError, match="lays its levels from strength 0.3"):
        flow.set_timesteps(sigmas=[0.9, 0.5, 0.1])
    flow.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4))  # as pipelines say a number of steps
    assert len(flow.timesteps) == 4 and level_at_first(flow) == pytest.approx(LEVEL)
    with pytest.raises(GridError, match="no step begins at noise level"):
        FewstepScheduler(**SD, strength=0.001).set_timesteps(4)
    with pytest.raises(GridError, match="do not fit below|fall more than once"):
        FewstepScheduler(**SD, grid="angle", strength=0.03).set_timesteps(50)


def test_an_own_loop(folder):
    scheduler = FewstepScheduler(**SD, strength=0.3)
    scheduler.set_timesteps(4)
    assert scheduler.set_begin_level(math.inf) == 0
    with pytest.raises(GridError, match="not at evaluation"):
        scheduler.set_begin_level(0.2)
    x = noise(1, 4, 8, 8)
    with pytest.raises(FewstepError, match="and none was"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.add_noise(x, x, scheduler.timesteps[1:2])  # to another level
    with pytest.raises(FewstepError, match="and none was"):
        scheduler.step(x, scheduler.timesteps[0], x)
    for _ in range(2):  # again, without set_timesteps
        x = scheduler.add_noise(x, noise(1, 4, 8, 8), scheduler.timesteps[:1])
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x).prev_sample
    assert bool(x.isfinite().all())
    scheduler.set_timesteps(4)
    with pytest.raises(FewstepError, match="and none was"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_a_fitted_sampler_of_a_model_of_ours():
    fitted = load_model("digits-ddpm").fitted(6)
    made = fitted.from_level(LEVEL)
    assert made.nfe == 6 and float(made.grid.t[0]) == begin(fitted.schedule, LEVEL)
