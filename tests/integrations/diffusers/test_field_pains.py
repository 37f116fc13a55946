"""Pains that users of samplers meet again and again, in whatever library: each has a test here, and none may come back."""

import random
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from tests.integrations.diffusers.test_scheduler import relative, run, tame

from fewstep import GridError, make_solver
from fewstep.integrations.diffusers import FewstepScheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
LEVELS = 1e-6


def noise(seed=0, count=1):
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def made(*steps, **options):
    scheduler = FewstepScheduler(**options)
    scheduler.set_timesteps(*steps)
    return scheduler


# -- levels and times -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize(
    "given",
    [{"num_inference_steps": 6}, {"sigmas": np.linspace(1, 1 / 6, 6)}, {"sigmas": np.linspace(1, 1 / 6, 6), "mu": 0.9}],
    ids=["steps", "sigmas", "mu"],
)
def test_a_fixed_shift_is_applied_once(shift, given):
    """Whether a pipeline passes sigmas or a number, and a mu that a fixed shift does not read."""
    scheduler = FewstepScheduler(**FLOW, flow_shift=shift)
    scheduler.set_timesteps(**given)
    u = np.linspace(1, 1 / 1000, 7)[:-1] if "num_inference_steps" in given else given["sigmas"]
    expected = torch.as_tensor(shift * u / (1 + (shift - 1) * u))
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), expected, rtol=LEVELS, atol=0)
    torch.testing.assert_close(scheduler.timesteps.double(), 1000 * expected, rtol=LEVELS, atol=0)


@pytest.mark.parametrize(
    ("spacing", "steps"),  # leading has at most one step fewer than the table has times
    sorted({*product(("linspace", "trailing", "leading"), (1, 2, 24, 25))} - {("leading", 25)}),
)
@pytest.mark.parametrize("prediction", ["v_prediction", "flow_prediction"])
@pytest.mark.every(5, 2)
def test_every_number_of_steps_ends_at_zero(prediction, steps, spacing):
    """Also one below the length of a short table."""
    law = FLOW if prediction == "flow_prediction" else V
    scheduler = made(steps, **law, num_train_timesteps=25, timestep_spacing=spacing)
    assert len(scheduler.sigmas) == steps + 1 and float(scheduler.sigmas[-1]) == 0
    answer = noise(3)
    x = noise()
    for t in scheduler.timesteps:  # a network that knows the image: at zero the sample is that image
        node = scheduler._sampler.tableau.nodes
        k = int((scheduler.timesteps == t).nonzero()[0])
        a, s = float(node.alpha[k]), float(node.sigma[k])
        out = (x - answer) / s if law is FLOW else (a * x - (a**2 + s**2) * answer) / s
        x = scheduler.step(out, t, x).prev_sample
    assert relative(x, answer) < 1e-5


@pytest.mark.parametrize("name", [None, "karras", "exponential", "beta"])
@pytest.mark.parametrize("shift", [1.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.every(4, 2)
def test_one_step_with_a_terminal_shift_is_a_number(steps, shift, name):
    options = {} if name is None else {f"use_{name}_sigmas": True}
    scheduler = made(steps, **FLOW, flow_shift=shift, shift_terminal=0.1, **options)
    x, states = run(scheduler, noise(), tame)
    assert all(bool(state.isfinite().all()) for state in [*states, scheduler.sigmas, scheduler.timesteps])
    assert scheduler.sigmas[0] == 1 and (steps == 1 or float(scheduler.sigmas[-2]) == pytest.approx(0.1, rel=1e-5))


MAKERS = {  # few-step lists that distilled models are published with
    "SDXL-Lightning, 4 steps": (SD, {"timesteps": [999, 749, 499, 249]}),
    "AnimateDiff-Lightning, 8 steps": (SD, {"timesteps": [999, 874, 749, 624, 499, 374, 249, 124]}),
    "Align Your Steps, SD 1.5": (SD, {"timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]}),
    "Align Your Steps, SDXL": (SD, {"sigmas": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029]}),
    "LTX-Video 0.9.7 distilled": (FLOW, {"timesteps": [1000, 993, 987, 981, 975, 909, 725, 0.03]}),
    "Wan lightx2v, 4 steps": (FLOW, {"sigmas": [1.0, 0.9375, 0.8333, 0.625]}),
    "Qwen-Image-Lightning, 8 steps": (FLOW, {"sigmas": [1.0, 0.9546, 0.9, 0.8333, 0.75, 0.6428, 0.5, 0.3]}),
}


@pytest.mark.parametrize("solver", ["euler", "unipc-3"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.every(3, 2)
def test_lists_of_makers_are_run_exactly_as_given(name, solver):
    law, given = MAKERS[name]
    scheduler = FewstepScheduler(**law, solver=solver)
    scheduler.set_timesteps(**given)
    ((kind, wanted),) = given.items()
    told = scheduler.timesteps if kind == "timesteps" else scheduler.sigmas[:-1]
    torch.testing.assert_close(told.double(), torch.tensor(wanted, dtype=torch.float64), rtol=LEVELS, atol=0)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == len(wanted) and float(scheduler.sigmas[-1]) == 0
    seen = []
    run(scheduler, noise(), lambda x, t: seen.append(float(t)) or tame(x, t))
    assert seen == scheduler.timesteps.tolist()


@pytest.mark.parametrize(("betas", "first"), [(SD, 4508.4), ({}, 30812.0), ({"beta_schedule": "squaredcos_cap_v2"}, 4096.0)])
def test_noise_prediction_without_terminal_signal_starts_where_levels_still_fall(betas, first):
    """At diffusers' 4096, or beyond it where the table comes near that number one time earlier."""
    scheduler = made(1000, **betas, solver="euler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert float(scheduler.sigmas[0]) == pytest.approx(first, rel=1e-4) and bool((torch.diff(scheduler.sigmas) < 0).all())


def test_leading_is_that_of_dpm_solver_whatever_scheduler_the_configuration_is_of():
    for kind in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler):
        config = kind(timestep_spacing="leading", steps_offset=1).config
        scheduler = FewstepScheduler.from_config(config)
        scheduler.set_timesteps(5)
        assert scheduler.timesteps.tolist() == [831, 665, 499, 333, 167]
        scheduler.set_timesteps(timesteps=[801, 601, 401, 201, 1])  # DDIM's
        assert scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]


# -- numbers of evaluations and strength ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", ["ddim", "euler", "unipc-2", "dpm-solver-pp-3m", "deis-3", "heun", "dpm-solver-2s", "dpm-solver-3s"])
@pytest.mark.every(5)
def test_n_steps_are_n_steps(solver, end):
    """Of each step every stage is evaluated; only the step to the clean image needs but one."""
    stages = make_solver(solver).stages
    for options in ({}, {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading"}, {"use_karras_sigmas": True}):
        scheduler, seen = made(6, **V, **options, solver=solver, final_sigmas_type=end), []
        run(scheduler, noise(), lambda x, t: seen.append(t) or tame(x, t))  # noqa: B023 - called in this round
        assert len(seen) == (6 * stages if end == "sigma_min" or stages == 1 else 5 * stages + 1)
        assert scheduler.num_inference_steps == 6


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
def test_a_strength_in_steps_leaves_another_noise_with_each_spacing_and_a_level_does_not(spacing):
    scheduler = made(20, **SD, timestep_spacing=spacing)
    scheduler.set_begin_level(1.5)
    begin = scheduler.begin_index
    assert float(scheduler.sigmas[begin]) <= 1.5 < float(scheduler.sigmas[begin - 1])
    strength = (20 - begin + 0.5) / 20  # for pipelines, which cut the product with the number of steps to a whole number
    assert 20 - min(int(20 * strength), 20) == begin


def test_a_strength_that_leaves_no_step_is_refused():
    with pytest.raises(GridError, match="take more steps, or a larger strength"):
        made(10).set_begin_index(10)


# -- one job and the next -------------------------------------------------------------------------------------------------------------

JOBS = [
    {"solver": "unipc-3"},
    {"solver": "heun", "use_karras_sigmas": True},
    {"solver": "deis-3", "timestep_spacing": "trailing"},
    {"solver": "dpm-solver-pp-2m", "rescale_betas_zero_snr": True},
    {"solver": "ddim:eta=1"},
    {"solver": "euler", **FLOW, "flow_shift": 3.0},
    {"solver": "unipc-2", **FLOW, "use_dynamic_shifting": True},
    {"solver": "dpm-solver-3s", **FLOW, "shift_terminal": 0.1},
]


def job(scheduler, number, mu):
    """The steps of one job on a scheduler that others have used, one `next` at a time."""
    scheduler.set_timesteps(3 + number % 4, mu=mu)
    generator, x = torch.Generator().manual_seed(number), noise(number)
    begin = (number % 3) * scheduler.order
    if begin:
        scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(tame(x, t), t, x, generator=generator).prev_sample
        yield x


@pytest.mark.slow
@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_jobs_do_not_leak_into_each_other(count):
    """Interleaved at random on schedulers that are used again, they equal jobs on fresh ones to the bit."""
    order, free, active, done = random.Random(0), [FewstepScheduler(**{**V, **options}) for options in JOBS], [], 0
    started = iter(range(count))
    while done < count:
        number = next(started, None) if free and (not active or order.random() < 0.4) else None
        if number is not None:
            scheduler = free.pop(order.randrange(len(free)))
            active.append((scheduler, number, job(scheduler, number, 0.1 * (number % 7)), []))
        elif active:
            place = order.randrange(len(active))
            scheduler, number, steps, states = active[place]
            x = next(steps, None)
            if x is not None:
                states.append(x.clone())
                continue
            active.pop(place)
            free.append(scheduler)
            fresh = FewstepScheduler.from_config(scheduler.config)
            alone = list(job(fresh, number, 0.1 * (number % 7)))
            assert len(alone) == len(states) and all(map(torch.equal, alone, states)), (number, scheduler.config.solver)
            done += 1


def test_another_scheduler_of_diffusers_leaves_nothing_behind():
    """A pipeline's configuration goes from one to the next; what it says is what is run."""
    config = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing", use_karras_sigmas=True).config
    first = FewstepScheduler.from_config(config, solver="heun", use_karras_sigmas=False)
    second = FewstepScheduler.from_config(diffusers.UniPCMultistepScheduler.from_config(first.config).config, solver="unipc-2")
    second.set_timesteps(6)
    fresh = made(6, **SD, timestep_spacing="trailing", solver="unipc-2")
    assert torch.equal(second.timesteps, fresh.timesteps) and torch.equal(run(second, noise(), tame)[0], run(fresh, noise(), tame)[0])
