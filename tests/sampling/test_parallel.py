"""Sampling in parallel: the sequential sample to round-off or to a tolerance, in how many rounds, and what is refused."""

import gc
import math

import pytest
import torch
from tests.problems import ALL, DSNO, Tanh, mixture, noise

import fewstep
from fewstep import ModelError, ParallelConfig, RectifiedFlow, Sampler, SolverError, TimeGrid, VPLinear, classifier_free, load_model
from fewstep.models.analytic import MixtureDenoiser
from fewstep.models.guidance import Wrapped
from fewstep.sampling.loop import run, steps
from fewstep.sampling.noise import start_noise
from fewstep.sampling.parallel import Round, rounds, sample_in_parallel

SCHEDULE = VPLinear()
SEEDS = [3, 1, 4]


def built(name: str, count: int = 12) -> Sampler:
    solver = ALL[name] if name in ALL else fewstep.make_solver(name)
    return Sampler.build(solver, TimeGrid.logsnr(SCHEDULE, count), SCHEDULE)


def start(count: int = 3) -> torch.Tensor:
    return noise(count, 2)


# -- equal to the sequential sample ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.every(5, 2)
def test_without_a_tolerance_it_is_the_sequential_sample(name):
    """In float64, for every solver; and after p rounds the first p states are those of the sequential run."""
    sampler, denoiser, seen = built(name), mixture(SCHEDULE), list[Round]()
    states = [step.x_next for step in steps(denoiser, sampler.tableau, start(), seeds=SEEDS)]
    count, window, memory = len(states), *((len(states), 1) if len(name) % 2 else (5, 3))
    config = ParallelConfig(tol=0, window=window, memory=memory)
    made = sample_in_parallel(denoiser, sampler, start(), seeds=SEEDS, config=config, observe=seen.append)
    torch.testing.assert_close(made, states[-1], rtol=0, atol=1e-12)
    assert len(seen) <= count and sum(one.last - one.first for one in seen) <= count * (count + 1) / 2
    for one in seen:
        assert one.accepted >= one.i and one.last - one.first <= window
        for step in one.steps:
            torch.testing.assert_close(step.x_next, states[step.i], rtol=0, atol=1e-12)
    assert [step.i for one in seen for step in one.steps] == list(range(count))


@pytest.mark.parametrize(("window", "memory"), [(1, 1), (5, 1), (5, 3), (40, 2)])
def test_any_window_and_memory(window, memory):
    sampler = built("unipc-3")
    config = ParallelConfig(tol=0, window=window, memory=memory)
    made = sample_in_parallel(mixture(SCHEDULE), sampler, start(), config=config)
    torch.testing.assert_close(made, run(mixture(SCHEDULE), sampler.tableau, start()), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-edm", "digits-ddpm"])
def test_bundled_fitted_samplers_and_v3(name):
    """With coefficients for each element, in float64 on an exact denoiser; and once in float32 on the network."""
    model = load_model(name)
    exact = MixtureDenoiser(model.schedule, 0.5 * noise(4, 1, 8, 8), torch.full((4,), 0.3, dtype=torch.float64))
    samplers = [*model.carried.samplers, fewstep.models.generate.sampler_for(model, "dpm-solver-v3", nfe=6)]
    for sampler in samplers:
        x = start_noise(sampler.tableau.nodes, range(2), model.shape).double()
        made = sample_in_parallel(exact, sampler, x, config=ParallelConfig(tol=0, window=4))
        torch.testing.assert_close(made, run(exact, sampler.tableau, x), rtol=0, atol=1e-12)
    x, labels = start_noise(samplers[0].tableau.nodes, range(2), model.shape), model.labels(range(2))
    made = fewstep.sample(model, samplers[0].tableau, x, labels, parallel=ParallelConfig(tol=0))
    torch.testing.assert_close(made, fewstep.sample(model, samplers[0].tableau, x, labels), rtol=0, atol=2e-5)  # of other batches


def test_guidance_with_dict_conditions():
    def conditional(x, t, cond):
        return mixture(SCHEDULE)(x, t) * 0.5 + cond["shift"]

    guided = classifier_free(Wrapped(SCHEDULE, conditional), 3.0, {"shift": torch.zeros(2, dtype=torch.float64)})
    sampler, cond = built("dpm-solver-pp-2m"), {"shift": noise(3, 2)}
    made = sample_in_parallel(guided, sampler, start(), cond, config=ParallelConfig(tol=0, window=4))
    torch.testing.assert_close(made, run(guided, sampler.tableau, start(), cond), rtol=0, atol=1e-12)


def test_a_flow_from_pure_noise_to_the_clean_image():
    flow = RectifiedFlow(t_max=1.0, t_min=0.0)
    sampler = Sampler.build("unipc-2", "linspace" if flow.times is not None else "angle", flow, nfe=10)
    made = sample_in_parallel(mixture(flow), sampler, start(), config=ParallelConfig(tol=0, window=4, memory=2))
    torch.testing.assert_close(made, run(mixture(flow), sampler.tableau, start()), rtol=0, atol=1e-12)


# -- to a tolerance ----------------------------------------------------------------------------------------------------


def edm(solver: str, nfe: int, batch: int = 4):
    model = load_model("digits-edm")
    sampler = Sampler.build(solver, "karras", model.schedule, nfe=nfe)
    return model, sampler, start_noise(sampler.tableau.nodes, range(batch), model.shape), model.labels(range(batch))


@torch.no_grad()
def tried(solver: str, nfe: int, **options) -> tuple[int, int, float]:
    """Return the rounds, the evaluations of each sample, and the RMSE to the sequential sample."""
    model, sampler, x, labels = edm(solver, nfe)
    seen = list[Round]()
    made = sample_in_parallel(model, sampler, x, labels, seeds=range(4), config=ParallelConfig(**options), observe=seen.append)
    exact = run(model, sampler.tableau, x, labels, seeds=range(4))
    assert torch.equal(seen[-1].x, made) and seen[-1].accepted == nfe
    return len(seen), sum(one.last - one.first for one in seen), float((made - exact).square().mean().sqrt())


@pytest.mark.slow
def test_a_smaller_tolerance_is_a_smaller_error_for_more_rounds():
    (few, _, coarse), (many, _, fine) = (tried("ddim", 20, tol=tol, window=20, memory=1) for tol in (1e-2, 1e-3))
    assert fine < coarse <= 8e-2 and fine <= 8e-3 and few < many < 20


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "times"), [(1, 8), (3, 5)])
def test_errors_are_within_a_few_tolerances(memory, times):
    errors = []
    for tol in (1e-2, 1e-3, 1e-4):
        errors.append(tried("ddim", 50, tol=tol, window=50, memory=memory)[2])
        assert errors[-1] <= times * tol
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
def test_rounds_and_evaluations():
    """Floors of the figures that the guide shows."""
    assert tried("ddim", 50, window=50)[0] <= 15 and tried("ddim", 50, window=50, memory=3)[0] <= 13
    count, evaluations, _ = tried("ddim", 64, window=8)
    assert count <= 20 and evaluations <= 2.3 * 64
    assert tried("ddim", 100, window=100, memory=3)[0] <= 12


@pytest.mark.slow
def test_noise_is_that_of_the_seeds():
    count, _, error = tried("ddim:eta=1", 50, window=50)
    assert count < 30 and error < 8e-3


@pytest.mark.slow
def test_a_sample_is_the_same_in_another_batch():
    model, sampler, x, labels = edm("unipc-2", 25)
    with torch.no_grad():
        together = sample_in_parallel(model, sampler, x, labels)
        alone = sample_in_parallel(model, sampler, x[2:3], labels[2:3])
    assert float((together[2:3] - alone).square().mean().sqrt()) < 8e-3


def test_a_call_is_a_window_and_rounds_are_calls():
    calls = list[tuple[int, int]]()

    def answer(x, t, cond):
        calls.append((len(x), len(t)))
        return mixture(SCHEDULE)(x, t)

    seen = list(rounds(Wrapped(SCHEDULE, answer), built("ddim", 30), start(), config=ParallelConfig(window=7)))
    assert len(calls) == len(seen) and all(size == times <= 7 * 3 for size, times in calls)


def test_it_stops_early_with_the_sample_as_it_stands():
    sampler, denoiser = built("ddim", 40), mixture(SCHEDULE)
    exact = run(denoiser, sampler.tableau, start())
    errors, seen = [], list[Round]()
    for most in (3, 8, 40):
        made = sample_in_parallel(denoiser, sampler, start(), config=ParallelConfig(rounds=most), observe=seen.append)
        assert torch.equal(made, seen[-1].x)
        errors.append(float((made - exact).square().mean().sqrt()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 8e-3
    assert seen[2].i == 3 and seen[3].i == 1
    previews = [float((one.x - exact).square().mean().sqrt()) for one in seen[11:]]  # of the last run
    assert previews[len(previews) // 2] < 0.7 * previews[0]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps():
    def peak(count: int) -> int:
        held = calls = 0

        def answer(x, t, cond):
            nonlocal held, calls
            calls += 1
            if calls % 5:
                return x * 0.5
            held = max(held, sum(one.numel() for one in gc.get_objects() if type(one) is torch.Tensor and one.shape[-1:] == (1117,)))
            return x * 0.5

        denoiser = Wrapped(SCHEDULE, answer)
        for _ in rounds(denoiser, built("dpm-solver-pp-2m", count), noise(1, 1117).float(), config=ParallelConfig(window=8, memory=3)):
            pass
        return held

    assert peak(120) <= 1.2 * peak(40)


def test_mixing_without_a_ridge_penalty():
    config = ParallelConfig(memory=16, window=16, ridge=0.0, tol=1e-6)
    made = sample_in_parallel(mixture(SCHEDULE), built("unipc-2", 20), start(), config=config)
    assert float((made - run(mixture(SCHEDULE), built("unipc-2", 20).tableau, start())).abs().max()) < 1e-4


def test_no_samples():
    made = sample_in_parallel(mixture(SCHEDULE), built("ddim"), start(0), seeds=[])
    assert made.shape == (0, 2)


def test_gradients_flow():
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    denoiser = Wrapped(SCHEDULE, lambda x, t, cond: mixture(SCHEDULE)(x, t) + shift)
    sample_in_parallel(denoiser, built("ddim"), start(), config=ParallelConfig(tol=0)).sum().backward()
    there = shift.grad.clone()
    shift.grad = None
    run(denoiser, built("ddim").tableau, start()).sum().backward()
    torch.testing.assert_close(there, shift.grad)


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 0}, "window is at least 1, got 0"),
        ({"memory": 0}, "memory is at least 1, got 0"),
        ({"rounds": 0}, "rounds is at least 1, got 0"),
        ({"window": 2.5}, "window"),
        ({"ridge": -1.0}, "ridge is a finite number of at least 0, got -1"),
        ({"tol": -1e-3}, "tol is a finite number of at least 0"),
        ({"tol": math.inf}, "tol is a finite number of at least 0, got inf"),
        ({"tol": math.nan}, "tol is a number"),
        ({"devices": "cuda:0"}, "devices are names of devices"),
        ({"devices": (0, 1)}, "devices are names of devices"),
    ],
)
def test_numbers_out_of_range_are_refused(options, says):
    with pytest.raises(SolverError, match=says):
        ParallelConfig(**options)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"sampler": built("ddim-eta-1")}, SolverError, "adds noise: pass seeds=, one for each of the 3"),
        ({"sampler": built("ddim-eta-1"), "seeds": [1, 2]}, SolverError, "2 seeds for 3 samples"),
        ({"sampler": "ddim"}, SolverError, "a Sampler or a Tableau, not a str"),
        ({"seeds": [1]}, SolverError, "1 seeds for 3 samples: pass one for each"),
        ({"denoiser": mixture(RectifiedFlow())}, ModelError, "another noise schedule"),
        ({"x": torch.zeros(3, 2, dtype=torch.int64)}, ModelError, "in floating point"),
        ({"config": {"window": 3}}, SolverError, "config is a fewstep.ParallelConfig, got a dict"),
        ({"config": ParallelConfig(devices=("cpu",))}, SolverError, "leave devices out, or pass a Model"),
        ({"observe": 3}, SolverError, "observe is a function"),
        ({"denoiser": Wrapped(SCHEDULE, lambda x, t, cond: x[:, :1])}, ModelError, r"answered shape \(3, 1\) to states of shape \(3, 2\)"),
        ({"denoiser": load_model(DSNO).guided()}, ModelError, "a flow map makes each of its few jumps by one call"),
    ],
)
def test_what_cannot_be_run_is_refused(change, error, says):
    asked = {"denoiser": mixture(SCHEDULE), "sampler": built("ddim"), "x": start()} | change
    with pytest.raises(error, match=says):
        sample_in_parallel(**asked)


def test_a_network_that_is_not_finite_is_named_with_its_round():
    bad = Wrapped(SCHEDULE, lambda x, t, cond: torch.where((torch.arange(len(x)) > 3)[:, None], math.nan, x))
    with pytest.raises(ModelError, match=r"not finite .* at evaluation 3 of 12, .* in round 2: check its weights"):
        sample_in_parallel(bad, built("ddim"), start(), config=ParallelConfig(tol=0))


def test_a_denoiser_of_one_time_is_refused_and_other_errors_are_not_hidden():
    scalar = Wrapped(SCHEDULE, lambda x, t, cond: x * float(t))
    with pytest.raises(ModelError, match=r"cannot be called at several times t \[B\] at once"):
        sample_in_parallel(scalar, built("ddim"), start())

    def broken(x, t, cond):
        raise ValueError("my own")

    with pytest.raises(ValueError, match="my own"):
        sample_in_parallel(Wrapped(SCHEDULE, broken), built("ddim"), start())
    with pytest.raises(ModelError, match="several times"):
        sample_in_parallel(Tanh(), built("ddim"), start())
