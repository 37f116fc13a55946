"""Any pipeline is led by its own calls: the first-order sampler is its own scheduler's, and a fitted one beats it at the same steps."""

import inspect

import diffusers
import pytest
import torch
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from tests.integrations.diffusers.led import CALLS, REFUSED, ROUNDED, fit_errors, steps_apart
from tests.integrations.diffusers.test_scheduler import theirs_warn
from tests.integrations.diffusers.tiny_pipelines import load

from fewstep import ModelError, from_pipeline
from fewstep.integrations.diffusers.noise_levels import default_sigmas_count

pytestmark = [  # warnings of theirs, at every call
    theirs_warn,
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You have passed . text prompts:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),
]

SELDOM = (pytest.mark.slow, pytest.mark.release)


def by_default(*quick):
    """All pipelines, of which these run by default, half of the others with the slow tests, and the rest before a release."""
    others = [name for name in CALLS if name not in quick]
    return [pytest.param(name, marks=() if name in quick else SELDOM[others.index(name) % 2]) for name in CALLS]


@pytest.mark.parametrize("name", by_default("wan-2.2"))
def test_it_steps_as_the_pipelines_own_scheduler(name, folder):
    pipe = load(folder(name))
    found = steps_apart(pipe, CALLS[name])
    assert found["own"] < (1e-3 if type(pipe.scheduler).__name__ in ROUNDED else 1e-5)
    assert found["stepped"] < 1e-5 and found["together"] < 1e-5  # whether they are evaluated together or not
    assert found["calls"] > 1e-4


FITTED = {"wan-2.2": pytest.mark.slow, "flux-2": pytest.mark.slow, "stable-audio": pytest.mark.slow, "sdxl-modular": pytest.mark.slow}
assert set(FITTED) <= set(CALLS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=FITTED.get(name, pytest.mark.release)) for name in CALLS])
def test_a_fitted_sampler_beats_the_pipelines_own_scheduler(name, folder, tmp_path):
    found = fit_errors(load(folder(name)), CALLS[name], tmp_path / "fitted")
    assert found["fitted"] < found["own"] and found["saved"] < 1e-3


@pytest.mark.parametrize("steps", [2, 5, 8, 50])
def test_the_sigmas_of_mochi_are_a_number_of_steps(steps):
    assert default_sigmas_count(linear_quadratic_schedule(steps, 0.025)) == steps
    assert default_sigmas_count([*linear_quadratic_schedule(steps, 0.025)[:-1], 0.01]) is None


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_the_sigmas_of_ace_step_are_a_number_of_steps(shift):
    if not hasattr(diffusers, "AceStepPipeline"):
        pytest.skip("this diffusers has no ACE-Step")
    given = diffusers.AceStepPipeline._get_timestep_schedule(None, 8, shift, dtype=torch.float32)
    assert default_sigmas_count(given) == 8
    assert default_sigmas_count([*given[:-1], 0.01]) is None


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.every(3)
def test_calls_whose_network_is_no_denoiser_are_refused(kind, folder):
    name, more, says = REFUSED[kind]
    if name == "z-image" and "_precomputed_t_norms" not in inspect.getsource(diffusers.ZImagePipeline.__call__):
        pytest.skip("in diffusers 0.36 its guidance ends at a time, whatever the steps are")
    with pytest.raises(ModelError, match=says):
        from_pipeline(load(folder(name)), calls=[{**CALLS[name][1], **more}])
