"""Any pipeline is led by its own calls: the first-order sampler is its own scheduler's, and a fitted one beats it at the same steps."""

import pytest
import torch
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from tests.integrations.diffusers import tiny_pictures, tiny_videos
from tests.integrations.diffusers.test_scheduler import theirs_warn
from tests.integrations.diffusers.tiny_pipelines import load

import fewstep
from fewstep import FitConfig, ModelError, Sampler, TimeGrid, from_pipeline
from fewstep.integrations.diffusers import FewstepScheduler
from fewstep.integrations.diffusers.noise_levels import default_sigmas_count

pytestmark = [  # warnings of theirs, at every call
    theirs_warn,
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You have passed . text prompts:FutureWarning"),
]
CALLS = tiny_pictures.CALLS | tiny_videos.CALLS


def by_default(*quick):
    """All pipelines, of which these run by default and the others with the slow tests."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in CALLS]


STEPS = 5
SMALL = FitConfig(num=32, held_out=16, noises=16, levels=16, iterations=1, batch=16)
ROUNDED = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")  # they round the time that the network is told, and not its level


def last_state(pipe, call, scheduler, steps=4, **more):
    """The state after the last step of the pipeline's own call with a scheduler: before it is unpacked or put on another scale."""
    usual, pipe.scheduler, states = pipe.scheduler, scheduler, []
    step = scheduler.step

    def watched(*args, **options):
        answer = step(*args, **options)
        states.append(answer[0])
        return answer

    scheduler.step = watched
    with torch.no_grad():
        pipe(**call, num_inference_steps=steps, output_type="latent", generator=torch.Generator().manual_seed(0), **more)
    pipe.scheduler = usual
    return states[-1]


def own(pipe, **options):
    """The pipeline's own scheduler, at the first order where it has several."""
    return type(pipe.scheduler).from_config(pipe.scheduler.config, solver_order=1, disable_corrector=[*range(50)], **options)


def apart(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", by_default("wan-2.2", "qwen-image", "cogvideox"))
def test_it_steps_as_the_pipelines_own_scheduler(name, folder):
    pipe = load(folder(name))
    model = from_pipeline(pipe, calls=CALLS[name])
    law, made = model.network.law, []
    for label, call in enumerate(CALLS[name]):
        theirs = own(pipe)
        expected = last_state(pipe, call, theirs)
        relay, first = model.network._begun(label, 1, 4)
        relay.close()
        ends = law.schedule.ends
        t = law.t_of_time(theirs.timesteps.double()).clamp(ends.min(), ends.max())
        sampler = Sampler.build(fewstep.make_solver("ddim"), TimeGrid(torch.cat([t, ends.min()[None]])), law.schedule)
        ours = fewstep.sample(model, sampler, first.x, torch.tensor([label]))
        assert apart(ours, expected) < (1e-3 if type(theirs).__name__ in ROUNDED else 1e-5)
        made.append(ours)

        stepped = FewstepScheduler.from_config(pipe.scheduler.config, solver="ddim")
        expected = last_state(pipe, call, stepped)
        ours = fewstep.sample(model, stepped._sampler, first.x, torch.tensor([label]))
        assert apart(ours, expected) < 1e-5
        three = fewstep.sample(model, stepped._sampler, first.x.expand(3, *first.x.shape[1:]), torch.full((3,), label))
        assert apart(three, ours.expand_as(three)) < 1e-5  # whether they are evaluated together or not
    assert apart(made[0], made[1]) > 1e-4
    model.network.close()


def error(pipe, calls, schedulers, truth):
    """The root mean square error of the calls, each with its scheduler."""
    made = torch.cat([last_state(pipe, call, scheduler, STEPS) for call, scheduler in zip(calls, schedulers, strict=True)])
    return float((made - truth).square().mean().sqrt())


@pytest.mark.parametrize("name", by_default("wan-2.2"))
def test_a_fitted_sampler_beats_the_pipelines_own_scheduler(name, folder, tmp_path):
    pipe, calls = load(folder(name)), CALLS[name]
    usual = type(pipe.scheduler)
    model = from_pipeline(pipe, calls=calls)
    fewstep.fit(model, STEPS, config=SMALL, out=tmp_path / "fitted")
    theirs = [usual.from_config(pipe.scheduler.config) for _ in calls]
    truth = torch.cat([last_state(pipe, call, usual.from_config(pipe.scheduler.config), 50) for call in calls])
    fitted = [FewstepScheduler.from_sampler(tmp_path / "fitted", pipe.scheduler.config) for _ in calls]
    assert error(pipe, calls, fitted, truth) < error(pipe, calls, theirs, truth)

    sampler = Sampler.load(tmp_path / "fitted" / f"nfe-{STEPS:02d}")
    for label, call in enumerate(calls):
        relay, first = model.network._begun(label, 1, STEPS)
        relay.close()
        expected = fewstep.sample(model, sampler, first.x, torch.tensor([label]))
        assert apart(last_state(pipe, call, fitted[label], STEPS), expected) < 1e-3
    model.network.close()


def changed(name, **more):
    return [{**CALLS[name][1], **more}]


@pytest.mark.parametrize("steps", [2, 5, 8, 50])
def test_the_sigmas_of_mochi_are_a_number_of_steps(steps):
    assert default_sigmas_count(linear_quadratic_schedule(steps, 0.025)) == steps
    assert default_sigmas_count([*linear_quadratic_schedule(steps, 0.025)[:-1], 0.01]) is None


REFUSED = {  # what a call asks for -> why its network is no function of the state and the time
    "guidance that ends at a step": ("z-image", {"cfg_truncation": 0.5}, "answers otherwise at another"),
    "guidance that ends at a part of the steps": ("lumina-2", {"cfg_trunc_ratio": 0.5}, "answers otherwise at another"),
    "guidance by the number of steps": ("cogvideox", {"use_dynamic_cfg": True}, "answers otherwise in a call of another number of steps"),
    "a part of the trajectory": ("flux-fill", {"strength": 0.5}, "not at pure noise"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_calls_whose_network_is_no_denoiser_are_refused(kind, folder):
    name, more, says = REFUSED[kind]
    with pytest.raises(ModelError, match=says):
        from_pipeline(load(folder(name)), calls=changed(name, **more))
