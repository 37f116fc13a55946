"""The noise levels of diffusers' schedulers, from the same options by name."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from diffusers.schedulers.scheduling_utils import AysSchedules

from fewstep import DiscreteVP, RectifiedFlow, make_grid

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers makes arrays of tensors

FLOAT32 = 1e-6  # relative, of levels that diffusers holds in float32
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = (1, 2, 5, 10, 20)


def levels(law, grid):
    sigma = law.sigma(grid.t)
    return (sigma if isinstance(law, RectifiedFlow) else sigma / law.alpha(grid.t)).numpy()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"])
@pytest.mark.every(3, 2)
def test_levels_of_a_table(option, steps):
    """Of DPMSolverMultistepScheduler, which lays them between the ends of its table."""
    theirs = diffusers.DPMSolverMultistepScheduler(**SD, **{option: True}, final_sigmas_type="zero")
    theirs.set_timesteps(steps)
    law = DiscreteVP.from_alphas_cumprod(theirs.alphas_cumprod)
    np.testing.assert_allclose(levels(law, make_grid(option, law, steps)), theirs.sigmas.numpy(), rtol=FLOAT32)


@pytest.mark.parametrize("steps", [2, 5, 10, 20])
@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("mu", [None, 0.8])
@pytest.mark.every(4, 2)
def test_levels_of_a_flow(option, mu, steps):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**{option: True}, use_dynamic_shifting=mu is not None)
    theirs.set_timesteps(steps, mu=mu)
    law = RectifiedFlow(1.0 if mu is None else float(np.exp(mu)))
    np.testing.assert_allclose(levels(law, make_grid(option, law, steps)), theirs.sigmas.numpy(), rtol=FLOAT32)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("terminal", [None, 0.1])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.every(4, 2)
def test_static_shift(shift, terminal, steps):
    if terminal is not None and steps == 1:
        return  # diffusers divides 0 by 0
    law = RectifiedFlow()
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=terminal)
    options = {"shift": shift} | ({} if terminal is None else {"shift_terminal": terminal})
    theirs.set_timesteps(steps)
    np.testing.assert_allclose(levels(law, make_grid("shift:end=append", law, steps, **options)), theirs.sigmas.numpy(), rtol=FLOAT32)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))  # as a pipeline calls it
    np.testing.assert_allclose(levels(law, make_grid("shift", law, steps, **options)), theirs.sigmas.numpy(), rtol=FLOAT32, atol=1e-7)


@pytest.mark.parametrize("steps", [2, 5, 10, 28])
@pytest.mark.parametrize("terminal", [None, 0.1])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.every(3, 2)
def test_dynamic_shift(kind, terminal, steps):
    law = RectifiedFlow()
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=terminal)
    options = {"time_shift_type": kind} | ({} if terminal is None else {"shift_terminal": terminal})
    for tokens in (256, 1024, 4096):
        mu = calculate_shift(tokens)
        theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
        ours = make_grid("use_dynamic_shifting", law, steps, image_seq_len=tokens, **options)
        np.testing.assert_allclose(levels(law, ours), theirs.sigmas.numpy(), rtol=FLOAT32, atol=1e-7)
        theirs.set_timesteps(steps, mu=mu)
        ours = make_grid("dynamic_shift:end=append", law, steps, mu=mu, **options)
        np.testing.assert_allclose(levels(law, ours), theirs.sigmas.numpy(), rtol=FLOAT32)


@pytest.mark.parametrize("steps", [2, 8, 64])
def test_mochis_levels(steps):
    law = RectifiedFlow()
    np.testing.assert_allclose(
        levels(law, make_grid("linear_quadratic", law, steps))[:-1], linear_quadratic_schedule(steps, 0.025), rtol=1e-9
    )


@pytest.mark.parametrize("name", ["StableDiffusionSigmas", "StableDiffusionXLSigmas", "StableDiffusionVideoSigmas"])
def test_align_your_steps(name):
    law = DiscreteVP.scaled_linear()
    np.testing.assert_allclose(levels(law, make_grid(name, law, 10)), AysSchedules[name], rtol=1e-8)


@pytest.mark.parametrize("name", ["StableDiffusionTimesteps", "StableDiffusionXLTimesteps"])
def test_align_your_steps_as_times(name):
    grid = make_grid(name, DiscreteVP.scaled_linear(), 10)
    torch.testing.assert_close(grid.t[:-1], torch.tensor(AysSchedules[name], dtype=torch.float64), atol=1e-6, rtol=0)
