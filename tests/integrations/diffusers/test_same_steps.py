"""`FewstepScheduler.from_scheduler`: the steps of each of diffusers' schedulers, from the same noise, as a pipeline runs them."""

import inspect
import json
import re

import diffusers
import pytest
import torch
from tests.integrations.diffusers import tiny_pipelines
from tests.integrations.diffusers.test_scheduler import relative, theirs_warn

from fewstep import FewstepError, GridError, SolverError
from fewstep.integrations.diffusers import FewstepScheduler
from fewstep.integrations.diffusers.same_steps import SAME

pytestmark = theirs_warn
CLOSE = 1e-5  # of float32 tables and steps beside ours; measured 5e-6 at most, 5e-7 mostly
SPACINGS = [{"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}]
LEVELS = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
DRAWN_OTHERWISE = ("KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler")  # noises from one generator are others
NO_SIGNAL = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def said(value):
    """A name that is the same in each process: a function's own has its address."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def unclipped(name):
    return {"clip_sample": False} if "clip_sample" in inspect.signature(getattr(diffusers, name).__init__).parameters else {}


def cases():
    """Each class with the options that it has, by their names."""
    for name in SAME:
        if name in DRAWN_OTHERWISE or not hasattr(diffusers, name):
            continue
        taken, tables = inspect.signature(getattr(diffusers, name).__init__).parameters, unclipped(name)
        options = [{}]
        if "timestep_spacing" in taken:
            options += [one for one in SPACINGS if not (name.startswith("PNDM") or "DDIM" in name) or one != SPACINGS[2]]
        options += [{key: True} for key in LEVELS if key in taken and not name.startswith(("DEIS", "SASolver"))]
        options += [NO_SIGNAL] if "rescale_betas_zero_snr" in taken else []
        options += [{key: True} for key in ("thresholding",) if key in taken and "DDIM" not in name]
        if name == "PNDMScheduler":
            options = [{"steps_offset": 1}, {"steps_offset": 1, "skip_prk_steps": True}, {"set_alpha_to_one": True}, *options[2:]]
        if name == "SASolverScheduler":
            options += [{"predictor_order": 3, "corrector_order": 4, "tau_func": lambda t: 0.7}, {"lower_order_final": False}]
        if name == "DDPMScheduler":
            options += [{"variance_type": "fixed_large"}, {"clip_sample": True}]
        if name == "DPMSolverMultistepScheduler":
            options += [{"algorithm_type": "sde-dpmsolver++"}, {"final_sigmas_type": "sigma_min", "solver_order": 3}]
        if name == "FlowMatchEulerDiscreteScheduler":
            options += [{"shift": 3.0, "stochastic_sampling": True}, {"shift": 3.0, "invert_sigmas": True}, {"shift_terminal": 0.1}]
        if name == "CogVideoXDDIMScheduler":
            options += [{"clip_sample": True}]  # which its step does not do
        if name == "LTXEulerAncestralRFScheduler":
            options += [{"eta": 0.6, "s_noise": 1.1}]
        for one in options:
            yield name, {**tables, **one}


def network(x, t):
    """Answers of size 1 that depend on the state and on the time."""
    u = torch.as_tensor(float(t)) / 1000
    return torch.tanh(1.3 * x + u) * (0.4 + 0.5 * u) + 0.2 * x


def looped(scheduler, noises=None):
    """Where a pipeline's loop ends; ``noises`` by the call in place of a generator."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * getattr(scheduler, "init_noise_sigma", 1.0)
    generator = torch.Generator().manual_seed(1)
    takes = inspect.signature(scheduler.step).parameters
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        how = {"variance_noise": noises[i]} if noises is not None else {"generator": generator} if "generator" in takes else {}
        x = scheduler.step(network(seen, t), t, x, return_dict=False, **how)[0]
    return x


@pytest.mark.parametrize(("name", "options"), list(cases()), ids=said)
@pytest.mark.every(9, 2)
def test_the_steps_of_each_class(name, options):
    theirs = getattr(diffusers, name)(**options)
    ours = FewstepScheduler.from_scheduler(theirs)
    for one in (ours, theirs):
        one.set_timesteps(4 if name.startswith("LCM") else 10)
    assert ours.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist())
    assert relative(looped(ours), looped(theirs).float()) < CLOSE


@pytest.mark.parametrize("option", [{}, *({key: True} for key in LEVELS)], ids=said)
@pytest.mark.parametrize("name", DRAWN_OTHERWISE)
@pytest.mark.every(4)
def test_the_steps_with_the_same_noises(name, option, monkeypatch):
    """KDPM2 ancestral draws in every second call; the noise of an SDE's step is a Brownian motion over sigma, which holds its stage's."""
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    theirs = getattr(diffusers, name)(**option)
    ours = FewstepScheduler.from_scheduler(theirs)
    for one in (ours, theirs):
        one.set_timesteps(6)
    assert ours.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist())
    xi = torch.randn(12, 2, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    if name.startswith("DPMSolver"):
        levels, calls = torch.unique_consecutive(theirs.sigmas.double()), iter(range(12))

        def brownian(now, then):
            call = next(calls)
            if call % 2 == 0:
                return xi[call]
            first, last = levels[call // 2], levels[call // 2 + 1]
            middle = torch.sqrt(first * last)
            return ((first - middle).sqrt() * xi[call - 1] + (middle - last).sqrt() * xi[call]) / (first - last).sqrt()

        theirs.noise_sampler = brownian
    else:
        calls = iter(range(1, 12, 2))
        monkeypatch.setattr("diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete.randn_tensor", lambda *a, **k: xi[next(calls)])
    assert relative(looped(ours, xi), looped(theirs).float()) < CLOSE


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("DPMSolverSinglestepScheduler", {}, "nearest are dpm-solver-2s"),
        ("TCDScheduler", {}, "distilled for that"),
        ("IPNDMScheduler", {}, "there is one for DDIM, .* use from_config"),
        ("DDIMScheduler", {}, "clip_sample=True has no solver here"),
        ("HeunDiscreteScheduler", {"clip_sample": True}, "clip_sample=True has no solver here"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "logarithm of its noise level: take timestep_type='discrete'"),
        ("DPMSolverSDEScheduler", {"noise_sampler_seed": 3}, "generator of a call: take noise_sampler_seed=None"),
        ("DDPMScheduler", {"clip_sample_range": 2.0}, r"clipped to \[-1, 1\] alone: take clip_sample_range=1.0"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "take one of fixed_small, fixed_small_log, fixed_large"),
        ("SASolverScheduler", {"use_karras_sigmas": True}, "to itself: take use_karras_sigmas=False"),
        ("SASolverScheduler", {"algorithm_type": "noise_prediction"}, "polynomials are those of x0"),
        ("SASolverScheduler", {"tau_func": lambda t: t / 1000}, "tau_func is one number between two times"),
        ("UniPCMultistepScheduler", {"solver_p": "ddim"}, "its predictor is UniP"),
        ("FlowMatchLCMScheduler", {"scale_factors": [0.5], "upscale_mode": "nearest"}, "grows between steps"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True, "invert_sigmas": True}, "take invert_sigmas=False"),
    ],
    ids=said,
)
def test_what_no_solver_takes_is_refused(name, options, says):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    theirs = getattr(diffusers, name)(**options)
    with pytest.raises(SolverError, match=says):
        FewstepScheduler.from_scheduler(theirs)


@pytest.mark.parametrize(
    ("name", "options", "asked", "says"),
    [
        ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "linspace"}, {}, "100 times down .* its next one is not there"),
        ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, {}, "step that goes nowhere"),
        ("DEISMultistepScheduler", {"use_karras_sigmas": True}, {}, "step that goes nowhere"),
        ("PNDMScheduler", {"steps_offset": 1}, {"num_inference_steps": 8}, "125 times, which have no half"),
        ("DDPMScheduler", {"steps_offset": 1, "variance_type": "fixed_large"}, {}, "ends with noise where its last time is 1"),
        ("LCMScheduler", {"timestep_scaling": 1.0}, {"original_inference_steps": 10}, "at time 99 mixes its answer with the state"),
        ("EulerDiscreteScheduler", {}, {"mu": 1.0}, "takes no mu"),
        ("EulerDiscreteScheduler", {}, {"num_inference_steps": 2.5}, "whole number of at least 1, got 2.5"),
        ("EulerDiscreteScheduler", {}, {"timesteps": [400, 200]}, "EulerDiscreteScheduler: .*timesteps"),
        ("LCMScheduler", {}, {"num_inference_steps": 80}, "LCMScheduler: The combination of .original_steps x strength"),
    ],
    ids=said,
)
def test_steps_that_are_none_here_are_refused(name, options, asked, says):
    scheduler = FewstepScheduler.from_scheduler(getattr(diffusers, name)(**options))
    with pytest.raises(GridError, match=says):
        scheduler.set_timesteps(**({"num_inference_steps": 10} | asked))


def test_a_pipelines_own_levels_and_shift_are_theirs_too():
    """As pipelines of flows call it: with sigmas, and with the shift of the picture's size."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ours = FewstepScheduler.from_scheduler(theirs)
    for one in (ours, theirs):
        one.set_timesteps(sigmas=[1.0, 0.7, 0.4, 0.2], mu=0.8)
    assert ours.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist())
    assert relative(looped(ours), looped(theirs)) < CLOSE


PIPELINES = {
    "PNDMScheduler": ("sd", {"skip_prk_steps": True, "steps_offset": 1}),
    "EulerAncestralDiscreteScheduler": ("sd", {}),
    "DDIMScheduler": ("sd", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "LCMScheduler": ("sd", {}),
    "FlowMatchHeunDiscreteScheduler": ("sd3", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_draws_the_same_picture(name, folder):
    kind, options = PIPELINES[name]
    pipe = tiny_pipelines.load(folder(kind))
    theirs = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)

    def picture(scheduler):
        pipe.scheduler, generator = scheduler, torch.Generator().manual_seed(3)
        return pipe("a red cat", num_inference_steps=5, guidance_scale=3.0, output_type="latent", generator=generator).images

    expected = picture(theirs)
    assert relative(picture(FewstepScheduler.from_scheduler(theirs)), expected) < 10 * CLOSE


@pytest.mark.parametrize("same_as", ["EulerDiscreteScheduler", {"_class_name": "logging"}, {"beta_start": 0.1}], ids=said)
def test_a_configuration_that_names_no_scheduler_is_refused(same_as):
    with pytest.raises(GridError, match="is what FewstepScheduler.from_scheduler writes"):
        FewstepScheduler(same_as=same_as)


def test_it_is_saved_and_leaves_the_levels_for_another_solver(tmp_path):
    theirs = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    ours = FewstepScheduler.from_scheduler(theirs)
    ours.save_pretrained(tmp_path)
    again = FewstepScheduler.from_pretrained(tmp_path)
    for one in (ours, again, theirs):
        one.set_timesteps(5)
    assert torch.equal(looped(ours), looped(again)) and again.config.same_as["_class_name"] == type(theirs).__name__
    json.loads((tmp_path / "scheduler_config.json").read_text())
    few = FewstepScheduler.from_config(ours.config, solver="unipc-2")
    assert few.config.same_as is None and few.config.timestep_spacing == "trailing"
    assert type(theirs).from_config(ours.config).config.timestep_spacing == "trailing"


def test_a_solver_may_be_named_on_their_levels():
    theirs = diffusers.DDIMScheduler(clip_sample=False)
    ours = FewstepScheduler.from_scheduler(theirs, solver="ddim:eta=1")
    assert ours.config.solver == "ddim:eta=1"
    two = FewstepScheduler.from_scheduler(theirs, solver="heun")
    with pytest.raises(GridError, match="makes 5 evaluations here, this solver 9"):
        two.set_timesteps(5)


@pytest.mark.parametrize(
    "options", [{"strength": 0.5}, {"grid": "karras"}, {"use_karras_sigmas": True}, {"timestep_spacing": "leading"}], ids=said
)
def test_other_levels_beside_theirs_are_refused(options):
    with pytest.raises(FewstepError, match=f"levels are those of EulerDiscreteScheduler .*: leave {next(iter(options))} out"):
        FewstepScheduler.from_scheduler(diffusers.EulerDiscreteScheduler(), **options)
