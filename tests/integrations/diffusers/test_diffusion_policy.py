"""A diffusion policy of robots: its loop over `noise_scheduler.timesteps` runs ours in place of diffusers' schedulers."""

import diffusers
import pytest
import torch
from torch import nn

import fewstep
from fewstep import DiscreteVP, FitConfig, Model
from fewstep.integrations.diffusers import FewstepScheduler

HORIZON, ACTIONS = 8, 2
CONFIG = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon", "timestep_spacing": "trailing"}


class ActionNet(nn.Module):
    """A network of actions ``[B, horizon, dim]`` that embeds whole times, as those of LeRobot and of diffusion_policy do."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(100, 16)
        self.enter, self.leave = nn.Conv1d(ACTIONS, 16, 3, padding=1), nn.Conv1d(16, ACTIONS, 3, padding=1)
        self.condition = nn.Linear(4, 16)

    def forward(self, sample: torch.Tensor, time: torch.Tensor, global_cond: torch.Tensor) -> torch.Tensor:
        hidden = self.enter(sample.transpose(1, 2)) + (self.time(time) + self.condition(global_cond))[..., None]
        return sample + 0.3 * self.leave(torch.tanh(hidden)).transpose(1, 2)


def conditional_sample(unet, noise_scheduler, noise, global_cond, steps, generator=None, **more):
    """The documented loop: whole times as a tensor of int64, and ``prev_sample``."""
    sample = noise
    noise_scheduler.set_timesteps(steps)
    for t in noise_scheduler.timesteps:
        model_output = unet(sample, torch.full(sample.shape[:1], t, dtype=torch.long), global_cond=global_cond)
        sample = noise_scheduler.step(model_output, t, sample, generator=generator, **more).prev_sample
    return sample


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    with torch.no_grad():
        return ActionNet().eval().requires_grad_(False), torch.randn(3, HORIZON, ACTIONS), torch.randn(3, 4)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [1, 5, 10])
def test_ddim_is_their_ddim(clip, steps, policy):
    unet, noise, cond = policy
    theirs = diffusers.DDIMScheduler(**CONFIG, clip_sample=clip)
    clipped = {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0} if clip else {}
    ours = FewstepScheduler.from_config(theirs.config, solver="ddim", **clipped)
    one = conditional_sample(unet, ours, noise, cond, steps)
    two = conditional_sample(unet, theirs, noise, cond, steps, use_clipped_model_output=clip)  # without it the noise is that of no image
    assert float((one - two).abs().max()) < 1e-5 * float(two.abs().max())


def test_a_policys_training_noises_alike(policy):
    _, trajectory, _ = policy
    theirs = diffusers.DDPMScheduler(**CONFIG)
    noise, times = torch.randn_like(trajectory), torch.tensor([3, 50, 99])
    ours = FewstepScheduler.from_config(theirs.config)
    torch.testing.assert_close(ours.add_noise(trajectory, noise, times), theirs.add_noise(trajectory, noise, times))


@pytest.mark.parametrize("solver", ["unipc-2", "sde-dpm-solver-pp-2m"])
def test_its_times_are_whole(solver, policy):
    unet, noise, cond = policy
    scheduler = FewstepScheduler.from_config(diffusers.DDPMScheduler(**CONFIG).config, solver=solver)
    made = conditional_sample(unet, scheduler, noise, cond, 8, torch.Generator().manual_seed(0))
    assert made.shape == noise.shape and not scheduler.timesteps.is_floating_point()


@pytest.mark.slow
def test_a_fitted_sampler_runs_in_the_policy(policy, tmp_path):
    unet, noise, cond = policy
    law = DiscreteVP.squared_cosine(100).to_clean()
    model = Model(lambda x, t: unet(x, t, cond[:1].expand(len(x), 4)), law, "epsilon", shape=(HORIZON, ACTIONS), time_dtype=torch.int64)
    small = FitConfig(num=16, held_out=8, noises=8, levels=16, iterations=1, batch=16)
    samplers = fewstep.fit(model, 4, config=small, out=tmp_path / "fitted")
    theirs = diffusers.DDIMScheduler(**CONFIG, clip_sample=False)
    scheduler = FewstepScheduler.from_sampler(tmp_path / "fitted", theirs.config)
    made = conditional_sample(unet, scheduler, noise, cond[:1].expand(3, 4), 4)
    assert not scheduler.timesteps.is_floating_point()
    torch.testing.assert_close(made, fewstep.sample(model, samplers[4], noise), rtol=1e-4, atol=1e-4)
