"""The loop: what it calls and when, what it refuses, and noise that belongs to a sample."""

import math
from dataclasses import replace

import pytest
import torch
from tests.problems import WHOLE_REGISTRY, Tanh

from fewstep import ModelError, RectifiedFlow, Sampler, SolverError, TimeGrid, VPLinear, sample, seeded_noise, start_noise
from fewstep.sampling.loop import run

SCHEDULE = VPLinear()


def sampler(name="dpm-solver-pp-2m", steps=4, schedule=SCHEDULE, **options):
    return Sampler.build(replace(WHOLE_REGISTRY[name], **options), TimeGrid.uniform(schedule, steps), schedule)


# -- noise ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2,), (3, 5), (3, 32, 32)])
@pytest.mark.parametrize("stream", [0, 3])
def test_noise_belongs_to_its_seed(shape, stream):
    seeds = [7, 3, 11, 2**40, 0]
    together = seeded_noise(seeds, shape, stream=stream)
    assert (together.shape, together.dtype) == ((5, *shape), torch.float32)
    for row, seed in zip(together, seeds, strict=True):
        assert torch.equal(row, seeded_noise([seed], shape, stream=stream)[0])
    assert torch.equal(together.flip(0), seeded_noise(torch.tensor(seeds[::-1]), shape, stream=stream))


def test_stream_0_is_what_manual_seed_starts_with():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = torch.randn(3, 4)
    assert torch.equal(seeded_noise([5], (3, 4))[0], expected)


def test_seeds_and_streams_differ_and_look_normal():
    noise = torch.stack([seeded_noise(range(20), (100,), stream=stream) for stream in range(5)]).flatten(0, 1)
    correlation = torch.corrcoef(noise) - torch.eye(100)
    assert float(correlation.abs().max()) < 0.5  # five standard errors of 0.1
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05


def test_noise_leaves_the_global_generator_alone():
    with torch.random.fork_rng(devices=[]):
        before = torch.random.get_rng_state()
        seeded_noise([1, 2], (4,))
        assert torch.equal(torch.random.get_rng_state(), before)


def test_no_seeds_give_no_noise():
    assert seeded_noise([], (3, 4)).shape == (0, 3, 4)


def test_the_start_has_the_noise_level_of_the_first_node():
    nodes = sampler().tableau.nodes
    torch.testing.assert_close(start_noise(nodes, [1, 2], (3,)), seeded_noise([1, 2], (3,)) * float(nodes.sigma[0]))


# -- the loop -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE_REGISTRY)
@pytest.mark.every(4, 2)
def test_a_sample_does_not_know_its_batch(name):
    """Bit for bit, with noise and without."""
    seeds, shape = [4, 8, 15, 16, 23], (3, 5)
    made = sampler(name)
    together = sample(Tanh(), made, start_noise(made.tableau.nodes, seeds, shape), seeds=seeds)
    alone = [sample(Tanh(), made, start_noise(made.tableau.nodes, [seed], shape), seeds=[seed]) for seed in seeds]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", WHOLE_REGISTRY)
@pytest.mark.every(4, 2)
def test_an_observer_sees_every_evaluation(name):
    denoiser, steps, made = Tanh(), [], sampler(name)
    x = start_noise(made.tableau.nodes, [1, 2], (3,))
    end = sample(denoiser, made, x, seeds=[1, 2], observe=steps.append)
    assert [step.i for step in steps] == list(range(made.nfe))
    assert torch.equal(torch.stack([step.t for step in steps]), made.tableau.nodes.t[:-1])
    assert torch.equal(steps[0].x, x)
    for step, following, call in zip(steps, [*steps[1:], None], denoiser.calls, strict=True):
        assert step.x is call[0]
        assert torch.equal(step.x0, torch.tanh(step.x * SCHEDULE.alpha(step.t).float()))
        assert step.x_next is (end if following is None else following.x)


def test_the_condition_reaches_every_evaluation():
    denoiser, cond = Tanh(), {"label": torch.tensor([1, 2])}
    sample(denoiser, sampler(), torch.zeros(2, 3), cond)
    assert all(call[2] is cond for call in denoiser.calls)


def test_a_bare_tableau_is_enough():
    made, x = sampler(), torch.ones(2, 3)
    assert torch.equal(sample(Tanh(), made, x), sample(Tanh(), made.tableau, x))


def test_an_empty_batch_is_a_batch():
    assert sample(Tanh(), sampler(), torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("start", "kept"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2]
)
def test_the_state_is_at_least_float32(start, kept):
    denoiser = Tanh()
    assert sample(denoiser, sampler(), torch.ones(2, 3, dtype=start)).dtype == kept
    assert {call[0].dtype for call in denoiser.calls} == {kept}
    assert {call[1].dtype for call in denoiser.calls} == {torch.float64}
    assert {call[1].shape for call in denoiser.calls} == {()}


# -- refusals -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_is_not_finite_is_named(value):
    def answer(x0, call):
        return torch.where(torch.arange(x0.numel()).reshape(x0.shape) == 1, value, x0) if call >= 3 else x0

    with pytest.raises(ModelError, match=r"not finite \(NaN or infinite\) at evaluation 3 of 4, t = 0.5005, sigma = 0.9"):
        sample(Tanh(answer=answer), sampler(), torch.ones(2, 3))


def test_an_output_of_another_shape_is_refused():
    with pytest.raises(ModelError, match=r"answered shape \(2, 4\) to a state of shape \(2, 3\)"):
        sample(Tanh(answer=lambda x0, call: torch.zeros(2, 4)), sampler(), torch.ones(2, 3))


def test_another_noise_schedule_is_refused():
    with pytest.raises(ModelError, match="made for another noise schedule: at t = 1 it has alpha = 0.006.*, the model 0$"):
        sample(Tanh(RectifiedFlow()), sampler(), torch.ones(2, 3))
    denoiser = Tanh(VPLinear(beta_max=20.01))
    with pytest.raises(ModelError, match="another noise schedule"):
        sample(denoiser, sampler(), torch.ones(2, 3))
    assert not denoiser.calls


@pytest.mark.parametrize("seeds", [None, [1], [1, 2, 3], []])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_seeds_are_one_for_each_sample_whether_they_are_read_or_not(seeds, eta: float):
    tableau = sampler("ddim", eta=eta).tableau
    if seeds is None and not eta:
        run(Tanh(), tableau, torch.ones(2, 3))
        return
    expected = "adds noise: pass seeds=, one for each of the 2 samples" if seeds is None else f"{len(seeds)} seeds for 2 samples"
    with pytest.raises(SolverError, match=expected):
        run(Tanh(), tableau, torch.ones(2, 3), seeds=seeds)


def test_noise_of_different_steps_is_independent_and_not_the_start():
    """Three pure-noise steps: what is added at each is another stream of the same seed."""
    steps, made = [], sampler("sde-dpm-solver-pp-2m", steps=3)
    sample(Tanh(answer=lambda x0, call: 0 * x0), made, torch.zeros(1, 1000), seeds=[5], observe=steps.append)
    decay = made.tableau.update[:, 1, 1, None]
    added = [step.x_next - scale * step.x for step, scale in zip(steps, decay, strict=True)]
    correlation = torch.corrcoef(torch.cat([*added, seeded_noise([5], (1000,))])) - torch.eye(4)
    assert float(correlation.abs().max()) < 0.16  # five standard errors
    for noise, std in zip(added, made.tableau.noise, strict=True):
        torch.testing.assert_close(float(noise.std()), float(std), rtol=0.1, atol=0)
