"""Stable Audio's scheduler: the same levels, times and steps, on a state that grows with the noise."""

import math

import pytest
import torch

import fewstep
from fewstep import FewstepError, ModelError
from fewstep.integrations.diffusers import FewstepScheduler

CONFIG = {
    "_class_name": "CosineDPMSolverMultistepScheduler",
    "sigma_min": 0.3,
    "sigma_max": 500,
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "prediction_type": "v_prediction",
    "rho": 7.0,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
}


def network(x, time):
    return torch.tanh(x + time.reshape(-1, 1, 1)) - 0.3 * x


def run(scheduler, start, steps, noises=None):
    """The state after each step of a pipeline's loop, from a start of unit variance."""
    scheduler.set_timesteps(steps)
    x, made = start * scheduler.init_noise_sigma, []
    for k, time in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, time), time.to(x.dtype))
        given = {} if noises is None else {"variance_noise": noises[k]}
        x = scheduler.step(output, time, x, **given, return_dict=False)[0]
        made.append(x)
    return made


@pytest.fixture
def theirs(monkeypatch):
    """A function from options to their scheduler, whose noises are given."""
    pytest.importorskip("torchsde")
    from diffusers.schedulers import scheduling_cosine_dpmsolver_multistep as module

    def made(noises, **options):
        left = list(noises)
        monkeypatch.setattr(module, "BrownianTreeNoiseSampler", lambda *_, **__: lambda *_: left.pop(0))
        return module.CosineDPMSolverMultistepScheduler.from_config({**CONFIG, **options})

    return made


def test_levels_and_times_are_those_of_its_formula():
    scheduler = FewstepScheduler.from_config(CONFIG)
    scheduler.set_timesteps(6)
    levels = torch.linspace(math.log(500), math.log(0.3), 6, dtype=torch.float64).exp()
    torch.testing.assert_close(scheduler.sigmas.double(), torch.cat([levels, torch.zeros(1).double()]), rtol=1e-6, atol=0)
    torch.testing.assert_close(scheduler.timesteps.double(), levels.atan() * 2 / math.pi, rtol=1e-6, atol=0)
    assert scheduler.config["solver"] == "sde-dpm-solver-pp-2m"
    assert scheduler.init_noise_sigma == pytest.approx(math.sqrt(500**2 + 1))
    again = FewstepScheduler.from_config(scheduler.config)
    again.set_timesteps(6)
    assert torch.equal(again.timesteps, scheduler.timesteps) and again.config["sigma_schedule"] == "exponential"
    scheduler = FewstepScheduler.from_config({**CONFIG, "sigma_schedule": "karras", "rho": 5.0, "final_sigmas_type": "sigma_min"})
    scheduler.set_timesteps(4)
    levels = torch.linspace(500 ** (1 / 5), 0.3 ** (1 / 5), 4, dtype=torch.float64) ** 5
    torch.testing.assert_close(scheduler.sigmas.double(), torch.cat([levels, levels[-1:]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"solver_order": 1}, {"solver_type": "heun"}, {"sigma_schedule": "karras"}, {"euler_at_final": True}]
)
@pytest.mark.parametrize("steps", [3, 16])
def test_steps_are_its_own(options, steps, theirs):
    noises = torch.randn(steps, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    start = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
    expected = run(theirs(noises, **options), start, steps)
    ours = run(FewstepScheduler.from_config({**CONFIG, **options}), start, steps, noises)
    for one, two in zip(ours, expected, strict=True):
        assert float((one - two).abs().max()) < 2e-5 * float(two.abs().max())


def test_of_the_first_order_it_is_ddim_with_noise(theirs):
    noises = torch.randn(5, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    start = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
    expected = run(theirs(noises, solver_order=1), start, 5)[-1]
    ours = run(FewstepScheduler.from_config(CONFIG, solver="ddim:eta=1"), start, 5, noises)[-1]
    assert float((ours - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_images_are_noised_as_by_it(theirs):
    one, ours = theirs([]), FewstepScheduler.from_config(CONFIG)
    image, noise = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    for scheduler in (one, ours):
        scheduler.set_timesteps(5)
    time = ours.timesteps[2:3].expand(2)
    torch.testing.assert_close(ours.add_noise(image, noise, time), one.add_noise(image, noise, one.timesteps[2:3].expand(2)))
    back = type(one).from_config(ours.config)
    back.set_timesteps(5)
    assert torch.equal(back.sigmas, one.sigmas) and back.config["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_pipelines_loop_makes_what_sample_makes(dtype):
    scheduler = FewstepScheduler.from_config(CONFIG, solver="unipc-2")
    start = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    ours = run(scheduler, start, 6)[-1]
    model = fewstep.Model(network, scheduler._law.schedule, "v", shape=(3, 8), dtype=dtype)
    expected = fewstep.sample(model, scheduler._sampler, start)
    allowed = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float64: 1e-6}[dtype]
    assert ours.dtype == dtype and float((ours - expected).abs().max()) < allowed * float(expected.abs().max())


def test_a_change_of_a_callback_stays_and_loops_interleave():
    scheduler = FewstepScheduler.from_config(CONFIG, solver="ddim")
    starts = [torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    alone = [run(scheduler, start, 4)[-1] for start in starts]
    scheduler.set_timesteps(4)
    states = [start * scheduler.init_noise_sigma for start in starts]
    for time in scheduler.timesteps:
        for k in range(2):
            output = network(scheduler.scale_model_input(states[k], time), time)
            states[k] = scheduler.step(output, time, states[k]).prev_sample.clone()  # as a callback's own tensor
    for one, two in zip(states, alone, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("more", [{"prediction_type": "epsilon"}, {"sigma_data": 0.5}])
def test_other_networks_of_its_class_are_refused(more):
    with pytest.raises(ModelError, match="known here with prediction_type='v_prediction' and sigma_data=1"):
        FewstepScheduler.from_config({**CONFIG, **more})


def test_times_outside_its_own_are_refused():
    scheduler = FewstepScheduler.from_config(CONFIG)
    with pytest.raises(FewstepError, match="between 0 and 1"):
        scheduler.set_timesteps(timesteps=[2.0, 0.5])
    scheduler.set_timesteps(timesteps=[0.99, 0.5])
    assert scheduler.sigmas[1].item() == pytest.approx(1.0)
    scheduler.set_timesteps(sigmas=[80.0, 1.0, 0.0])
    assert scheduler.timesteps[1].item() == pytest.approx(0.5)


def test_a_saved_sampler_says_its_own_law(tmp_path):
    law = FewstepScheduler.from_config(CONFIG)._law
    sampler = fewstep.Sampler.build("unipc-2", "angle", law.schedule, nfe=4, card={"prediction": "v"})
    scheduler = FewstepScheduler.from_sampler(sampler.save(tmp_path / "saved"))
    start = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
    model = fewstep.Model(network, law.schedule, "v", shape=(3, 8))
    torch.testing.assert_close(run(scheduler, start, 4)[-1], fewstep.sample(model, sampler, start), rtol=1e-5, atol=1e-5)
    scheduler.save_pretrained(tmp_path / "scheduler")
    again = FewstepScheduler.from_pretrained(tmp_path / "scheduler")
    assert torch.equal(run(again, start, 4)[-1], run(scheduler, start, 4)[-1])


def test_a_sound_is_gone_on_with_from_the_middle():
    scheduler = FewstepScheduler.from_config(CONFIG, solver="unipc-2")
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    sound, noise = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(4)), torch.randn(2, 3, 8)
    x = scheduler.add_noise(sound, noise, scheduler.timesteps[2:3])
    law, nodes = scheduler._law.schedule, scheduler._sampler.tableau.nodes
    start = nodes.alpha[2].float() * sound + nodes.sigma[2].float() * noise
    expected = fewstep.sample(fewstep.Model(network, law, "v", shape=(3, 8)), scheduler._sampler.tail(2), start)
    for time in scheduler.timesteps[2:]:
        x = scheduler.step(network(scheduler.scale_model_input(x, time), time), time, x).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
