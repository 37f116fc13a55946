"""Adapters, guiders and sounds: what they add is a part of the model, and what no sampler can be fitted to is refused."""

import diffusers
import pytest
import torch
from tests.integrations.diffusers.led import CALLS, GUIDERS, last_state
from tests.integrations.diffusers.test_scheduler import theirs_warn
from tests.integrations.diffusers.tiny_pipelines import load

import fewstep
from fewstep import ModelError, from_pipeline
from fewstep.integrations.diffusers import FewstepScheduler

pytestmark = [
    theirs_warn,
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),
]


def guided(pipe, kind=diffusers.ClassifierFreeGuidance, **options):
    pipe.update_components(guider=kind(**options))
    return pipe


CHANGES = {  # what changes the answers of a network, and is no weight of it
    "sd-ip-adapter": lambda pipe: pipe.set_ip_adapter_scale(0.3),
    "sd-lora": lambda pipe: pipe.set_adapters(pipe.get_active_adapters(), [0.3]),
    "sdxl-modular": lambda pipe: guided(pipe, guidance_scale=2.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_the_strength_of_an_adapter_tells_models_apart(name, folder):
    pipe = load(folder(name))
    before = from_pipeline(pipe, calls=CALLS[name]).fingerprint
    assert from_pipeline(load(folder(name)), calls=CALLS[name]).fingerprint == before
    CHANGES[name](pipe)
    assert from_pipeline(pipe, calls=CALLS[name]).fingerprint != before


@pytest.mark.parametrize("kind", GUIDERS)
@pytest.mark.every(2)
def test_guiders_that_know_their_step_are_refused(kind, folder):
    guider, options = GUIDERS[kind]
    pipe = guided(load(folder("sdxl-modular")), guider, guidance_scale=4.0, **options)
    with pytest.raises(ModelError, match="answers otherwise at another step of its loop"):
        from_pipeline(pipe, calls=CALLS["sdxl-modular"])


def test_the_arguments_of_a_modular_pipeline_are_those_of_its_blocks(folder):
    pipe = load(folder("sdxl-modular"))
    with pytest.raises(ModelError, match="the argument 'guidance_scale', which a StableDiffusionXLModularPipeline does not know"):
        from_pipeline(pipe, calls=[{"prompt": "a cat", "guidance_scale": 3.0}])
    empty = diffusers.ModularPipeline.from_pretrained(str(folder("sdxl-modular")))
    with pytest.raises(ModelError, match=r"is not loaded yet: run load_components\(\) first"):
        from_pipeline(empty, calls=CALLS["sdxl-modular"])


@pytest.mark.slow
def test_a_modular_pipeline_keeps_its_own_parts(folder):
    pipe = load(folder("sdxl-modular"))
    before = dict(vars(pipe))
    model = from_pipeline(pipe, calls=CALLS["sdxl-modular"])
    fewstep.sample(model, "ddim", nfe=2, seeds=range(2))
    model.network.close()
    assert dict(vars(pipe)) == before


def test_a_start_from_a_sound_is_as_its_own_scheduler_has_it(folder):
    pipe = load(folder("stable-audio"))
    call = {**CALLS["stable-audio"][0], "initial_audio_waveforms": torch.ones(1, 2, 16), "initial_audio_sampling_rate": 16}
    states = []
    for scheduler in (type(pipe.scheduler).from_config(pipe.scheduler.config), FewstepScheduler.from_config(pipe.scheduler.config)):
        scheduler.scale_model_input, scale = lambda x, t, s=scheduler: states.append(x) or s.kept(x, t), scheduler.scale_model_input
        scheduler.kept = scale
        last_state(pipe, call, scheduler)
    torch.testing.assert_close(states[0], states[4], rtol=1e-5, atol=1e-4)
