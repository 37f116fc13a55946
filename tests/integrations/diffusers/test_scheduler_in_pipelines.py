"""Whole pipelines whose calls of their scheduler are of a kind of their own: each steps as with its own scheduler, or is refused."""

import diffusers
import pytest
import torch
from tests.integrations.diffusers import tiny_pipelines
from tests.integrations.diffusers.test_scheduler import relative, theirs_warn

from fewstep import FewstepError, ModelError
from fewstep.integrations.diffusers import FewstepScheduler

pytestmark = theirs_warn
SAME = 1e-5  # float32 networks at levels that differ by float32 rounding


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stepped_by(folder, solver, **options):
    """The pipeline of a folder with our scheduler."""
    pipe = tiny_pipelines.load(folder)
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver=solver, **options)
    return pipe


# -- CogView4: timesteps beside sigmas, and a linear shift ----------------------------------------------------------------------------

LISTS = {"timesteps": [1000, 700, 400, 100], "sigmas": [1.0, 0.6, 0.3, 0.1]}


@pytest.mark.parametrize("given", [{"num_inference_steps": 6}, {"num_inference_steps": 4, **LISTS}], ids=["steps", "lists"])
@pytest.mark.parametrize("size", [16, 32])  # by which the shift goes
@pytest.mark.every(4)
def test_cogview4_steps_as_with_its_own_scheduler(folder, given, size):
    ask = {"prompt_embeds": noise(2, 16, 16), "negative_prompt_embeds": noise(2, 16, 16, seed=1), "guidance_scale": 3.0}
    ask |= {"height": size, "width": size, "output_type": "latent", **given}
    pipe, start = tiny_pipelines.load(folder("cogview4")), noise(2, 4, size // 2, size // 2)
    expected = pipe(latents=start.clone(), **ask).images
    for solver in ("euler", "ddim"):
        ours = stepped_by(folder("cogview4"), solver)
        assert relative(ours(latents=start.clone(), **ask).images, expected) < SAME
        assert torch.equal(ours.scheduler.timesteps, pipe.scheduler.timesteps)
        torch.testing.assert_close(ours.scheduler.sigmas, pipe.scheduler.sigmas, rtol=1e-6, atol=1e-7)
    other = stepped_by(folder("cogview4"), "unipc-2")(latents=start.clone(), **ask).images
    assert bool(other.isfinite().all()) and SAME < relative(other, expected) < 1  # another solver of the same ODE


# -- LTX: tokens with times of their own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [{"image": noise(1, 3, 64, 64).clamp(-1, 1) / 2 + 0.5}, {}], ids=["picture", "none"])
def test_ltx_with_conditions_is_refused_by_name(folder, condition):
    ask = {"prompt_embeds": noise(1, 8, 32), "prompt_attention_mask": torch.ones(1, 8, dtype=torch.bool), "guidance_scale": 1.0}
    ask |= {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3, "output_type": "latent", **condition}
    assert bool(tiny_pipelines.load(folder("ltx-condition"))(**ask).frames.isfinite().all())
    with pytest.raises(FewstepError, match="'per_token_timesteps'; tokens with times of their own need the pipeline's own scheduler"):
        stepped_by(folder("ltx-condition"), "euler")(**ask)


# -- the latent upscaler: a state that grows with the noise ---------------------------------------------------------------------------


def test_the_latent_upscaler_keeps_its_scheduler(folder):
    """Refused by its configuration, and by its first step where that says another prediction."""
    pipe = tiny_pipelines.load(folder("latent-upscaler"))
    ask = {
        "prompt": ["a red cat"] * 2,
        "image": noise(2, 4, 8, 8),
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "output_type": "latent",
    }
    assert bool(pipe(**ask).images.isfinite().all())
    with pytest.raises(ModelError, match="prediction_type='original_sample' is that of the latent upscaler"):
        FewstepScheduler.from_config(pipe.scheduler.config)
    for kind in ("epsilon", "sample"):
        pipe.scheduler = FewstepScheduler.from_config(diffusers.EulerDiscreteScheduler(prediction_type=kind).config)
        with pytest.raises(FewstepError, match="StableDiffusionLatentUpscalePipeline.* keep its EulerDiscreteScheduler"):
            pipe(**ask)


def test_a_grid_of_ones_own_keeps_what_the_network_is_told():
    """CogView4 tells its network the times before the shift, by timesteps beside sigmas; a named grid has other times on the same line."""
    config = {
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",
        "_class_name": "FlowMatchEulerDiscreteScheduler",
    }
    scheduler = FewstepScheduler.from_config(config, solver="ddim", grid="uniform")
    scheduler.set_timesteps(timesteps=[1000.0, 667.0, 334.0, 1.0], sigmas=[1.0, 0.667, 0.334, 0.001], mu=0.5)
    assert scheduler.timesteps.tolist() == pytest.approx([1000.0, 750.0, 500.0, 250.0])
    assert scheduler.sigmas.tolist() == pytest.approx([0.5 * t / (0.5 * t + 1 - t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)])
