"""What is asked of `FewstepScheduler` that other schedulers know: arguments, several times in a batch, levels beyond the table, starts."""

import inspect
import logging
import math

import diffusers
import pytest
import torch
from tests.integrations.diffusers.test_scheduler import relative, run, tame, theirs_warn

from fewstep import FewstepError, GridError
from fewstep.integrations.diffusers import FewstepScheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
EPS = 1e-5  # float32 tables


def noise(seed=0, count=2):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def made(steps=5, **options):
    scheduler = FewstepScheduler(**options)
    scheduler.set_timesteps(steps)
    return scheduler


# -- arguments of other schedulers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"per_token_timesteps": torch.zeros(2, 4)}, "'per_token_timesteps'; tokens with times of their own"),
        ({"pred_original_sample": noise()}, "'pred_original_sample'; another scheduler knows it"),
        ({"s_churn": 0.5, "s_noise": 1.0}, "'s_churn' and no 's_noise'"),
        ({"eta": 0.5}, "'eta'; how much noise is added is an option of the solver"),
        ({"use_clipped_model_output": True}, "thresholding=True"),
        ({"prev_timestep": 3}, "'prev_timestep'"),
    ],
)
def test_step_refuses_by_name_what_would_change_the_step_of_another_scheduler(given, says):
    scheduler = made()
    with pytest.raises(FewstepError, match=f"step of a FewstepScheduler has no argument .*{says}"):
        scheduler.step(noise(), scheduler.timesteps[0], noise(), **given)


def test_step_takes_what_pipelines_pass_to_every_scheduler():
    """They look at its signature: eta is passed, and so one that is not 0 does not go unseen."""
    assert {"eta", "generator"} <= set(inspect.signature(FewstepScheduler.step).parameters)
    scheduler = made()
    t, plain = scheduler.timesteps[0], made().step(noise(), 999, noise()).prev_sample
    for given in ({"eta": 0.0}, {"eta": None}, {"eta": 0.0, "use_clipped_model_output": None, "generator": torch.Generator()}):
        assert torch.equal(made().step(noise(), t, noise(), **given).prev_sample, plain)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"eta": torch.tensor([0.0, 1.0])}, "step of a FewstepScheduler has no argument 'eta'"),
        ({"model_output": [0.0]}, r"model_output is a tensor \[B, \*D\] of floating point numbers, got a list"),
        ({"model_output": noise() + 0j}, "model_output is .*, got shape .* of torch.complex64"),
        ({"sample": noise().long()}, "sample is .*, got shape .* of torch.int64"),
        ({"sample": torch.tensor(1.0)}, r"sample is .*, got shape \[\]"),
        ({"timestep": None}, "timestep is one of scheduler.timesteps, a number from 0 to 1000, got None"),
        ({"timestep": math.nan}, "timestep is .* got nan"),
        ({"timestep": -5}, "timestep is .* got -5"),
        ({"timestep": 1e9}, "timestep is .* got 1000000000"),
        ({"variance_noise": noise(count=1)}, r"variance_noise has shape \(1, 3, 4, 4\), but the sample has \(2, 3, 4, 4\)"),
        ({"variance_noise": [0.0]}, "variance_noise is a tensor .*, got a list"),
        ({"generator": [torch.Generator() for _ in range(3)]}, "one for each of 2 samples, got 3"),
        ({"generator": [1, 2]}, "generator is a torch.Generator or one for each sample, got int"),
    ],
)
def test_step_refuses_what_it_cannot_step_from(given, says):
    scheduler = made(solver="ddim:eta=1")
    with pytest.raises(FewstepError, match=says):
        scheduler.step(**{"model_output": noise(), "timestep": 999, "sample": noise()} | given)


def test_generators_may_be_in_a_tuple():
    for kind in (list, tuple):
        of = kind(torch.Generator().manual_seed(seed) for seed in (1, 2))
        stepped = made(solver="ddim:eta=1").step(noise(), 999, noise(), generator=of).prev_sample
        alone = made(solver="ddim:eta=1").step(noise()[1:], 999, noise()[1:], generator=torch.Generator().manual_seed(2)).prev_sample
        torch.testing.assert_close(stepped[1:], alone)


def test_a_picture_is_no_generator():
    """RePaint passes its picture and its mask where a generator is."""
    with pytest.raises(FewstepError, match=r"generator is a torch.Generator or one for each sample, got Tensor"):
        made().step(noise(), 999, noise(), noise(), noise())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"original_inference_steps": 50}, "'original_inference_steps'; it belongs to a network that was distilled for LCM"),
        ({"strength": 0.5}, "'strength'; another scheduler knows it"),
    ],
)
def test_set_timesteps_refuses_by_name(given, says):
    with pytest.raises(FewstepError, match=f"set_timesteps of a FewstepScheduler has no argument {says}"):
        FewstepScheduler().set_timesteps(4, **given)
    FewstepScheduler().set_timesteps(4, original_inference_steps=None)  # as LCM's pipelines always pass it


def test_what_set_timesteps_refuses_changes_nothing():
    dynamic = {**FLOW, "use_dynamic_shifting": True}
    scheduler = FewstepScheduler(**dynamic)
    scheduler.set_timesteps(4, mu=0.5)
    expected = scheduler.add_noise(noise(), noise(1), scheduler.timesteps[:1])
    for given in ({"sigmas": [2.0], "mu": 2.0}, {"timesteps": [1, 5], "mu": 2.0}, {"num_inference_steps": 4, "mu": 2.0, "device": "nope"}):
        with pytest.raises(FewstepError):
            scheduler.set_timesteps(**given)
        assert torch.equal(scheduler.add_noise(noise(), noise(1), scheduler.timesteps[:1]), expected)


def test_a_noise_level_is_no_sample():
    """The latent upscaler scales its noise level as a state that grows with the noise."""
    scheduler = made()
    with pytest.raises(FewstepError, match="StableDiffusionLatentUpscalePipeline"):
        scheduler.scale_model_input(scheduler.sigmas[0], scheduler.timesteps[0])


# -- one time for a batch -------------------------------------------------------------------------------------------------------------


def test_several_times_in_a_batch_are_refused():
    scheduler = made()
    for times in (torch.tensor([999, 499]), scheduler.timesteps[:2], scheduler.timesteps[:2].clone(), torch.tensor([999.0, 998.9])):
        with pytest.raises(FewstepError, match="stepped from one time, got"):
            scheduler.step(noise(), times, noise())
    with pytest.raises(FewstepError, match="the timestep is empty"):
        scheduler.step(noise(), scheduler.timesteps[:0], noise())


def test_one_time_for_each_sample_of_a_batch_is_one_time():
    expected = run(made(), noise(), tame)[0]
    for repeat in (lambda t: t.expand(2), lambda t: t.repeat(2), lambda t: t[None]):
        scheduler, x = made(), noise()
        for t in scheduler.timesteps:
            x = scheduler.step(tame(x, t), repeat(t), x).prev_sample
        assert torch.equal(x, expected)


# -- levels beyond the table ----------------------------------------------------------------------------------------------------------


def test_levels_beyond_the_table_are_kept_and_the_network_is_told_its_own_times(caplog):
    scheduler = FewstepScheduler(**SD)
    with caplog.at_level(logging.WARNING, "fewstep"):
        for _ in range(2):
            scheduler.set_timesteps(sigmas=[20.0, 5.0, 1.0, 0.02])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([20.0, 5.0, 1.0, 0.02, 0.0]))
    assert scheduler.timesteps[0] == 999 and scheduler.timesteps[3] == 0
    assert bool((torch.diff(scheduler.timesteps) < 0).all())
    nodes = scheduler._sampler.tableau.nodes
    torch.testing.assert_close(nodes.sigma / nodes.alpha, torch.tensor([20.0, 5.0, 1.0, 0.02, 0.0], dtype=torch.float64))
    assert [record.getMessage() for record in caplog.records if record.name == "fewstep"] == [
        "noise levels beyond the model's own, 14.6 to 0.0292: they are kept, and the network is told its first or last time"
    ]


def test_a_level_beyond_the_table_steps_as_its_formula_says():
    """One Euler step from 20 to 5 in the variance-preserving state, by hand."""
    scheduler = FewstepScheduler(**SD, solver="euler")
    scheduler.set_timesteps(sigmas=[20.0, 5.0])
    x, out = noise(), noise(1)
    stepped = scheduler.step(out, scheduler.timesteps[0], x).prev_sample
    by_hand = (x * math.sqrt(1 + 20**2) + (5 - 20) * out) / math.sqrt(1 + 5**2)
    assert relative(stepped, by_hand) < EPS


@theirs_warn
@pytest.mark.parametrize("name", ["karras_sigmas", "exponential_sigmas"])
def test_ends_of_named_levels_beyond_the_table(name):
    """Levels and the network's times are diffusers' (Euler's keeps them fractional)."""
    options = {**SD, f"use_{name}": True, "sigma_min": 0.01, "sigma_max": 30.0}
    theirs, ours = diffusers.EulerDiscreteScheduler(**options), FewstepScheduler(**options)
    theirs.set_timesteps(8)
    ours.set_timesteps(8)
    assert relative(ours.sigmas, theirs.sigmas) < 1e-6
    assert (ours.timesteps[0], ours.timesteps[-1]) == (theirs.timesteps[0], theirs.timesteps[-1]) == (999, 0)
    assert float((ours.timesteps - theirs.timesteps).abs().max()) < 1


@pytest.mark.parametrize(
    ("spacing", "steps", "offset", "ends"),
    [("trailing", 1500, 0, (999, 0)), ("trailing", 1001, 0, (999, 0)), ("leading", 999, 1, (999, 2))],
)
def test_spacings_of_more_steps_than_the_table_has(spacing, steps, offset, ends):
    scheduler = made(steps, **SD, solver="euler", timestep_spacing=spacing, steps_offset=offset)
    assert (float(scheduler.timesteps[0]), float(scheduler.timesteps[-1])) == ends and len(scheduler.timesteps) == steps
    assert bool((torch.diff(scheduler.sigmas) < 0).all())


# -- starts in the middle -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [5, 17, -1, 1.5, "two"])
def test_a_start_that_is_no_evaluation_is_refused(begin):
    with pytest.raises(GridError, match="begin_index is the number of an evaluation, from 0 to 4"):
        made(5).set_begin_index(begin)


@pytest.mark.parametrize("solver", ["unipc-2", "heun", "dpm-solver-3s"])
def test_strength_as_a_noise_level(solver):
    """The first step at that level or below, whatever the spacing; a picture noised there goes the rest of the way."""
    for spacing in ("linspace", "trailing", "leading"):
        scheduler = made(12, **SD, solver=solver, timestep_spacing=spacing)
        begin = scheduler.set_begin_level(2.0)
        levels = scheduler.sigmas[:-1][:: scheduler.order]
        assert begin == scheduler.begin_index == int((levels > 2.0).sum()) * scheduler.order
        same = made(12, **SD, solver=solver, timestep_spacing=spacing)
        same.set_begin_index(begin)
        x = scheduler.add_noise(noise(1).clamp(-1, 1), noise(), scheduler.timesteps[begin : begin + 1])
        assert torch.equal(run(scheduler, x, tame, first=begin)[0], run(same, x, tame, first=begin)[0])


def test_the_level_of_a_start_is_one_that_a_step_has():
    scheduler = made(6, **SD)
    assert scheduler.set_begin_level(math.inf) == 0 and scheduler.set_begin_level(float(scheduler.sigmas[3])) == 3
    with pytest.raises(GridError, match="no step starts at noise level 0.01 or below: the last starts at"):
        scheduler.set_begin_level(0.01)
    for level in ("one", None, True, math.nan, [1.0]):
        with pytest.raises(GridError, match="the noise level to begin at is a number"):
            scheduler.set_begin_level(level)
    with pytest.raises(GridError, match="run set_timesteps before set_begin_level"):
        FewstepScheduler().set_begin_level(1.0)
