"""Faults that schedulers of other libraries have had, and that `FewstepScheduler` must not have."""

import copy
import math
import pickle

import pytest
import torch
from tests.integrations.diffusers.test_scheduler import relative, run, tame
from tests.problems import pairwise, statistics
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import Sampler, TimeGrid, load_model, make_grid, make_solver
from fewstep.core.tableau import tabulate
from fewstep.integrations.diffusers import FewstepScheduler

SAME = 1e-5  # a few float32 steps by two ways
LAST_CAST = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # one rounding to that dtype
SOLVERS = (
    "unipc-2",
    "unipc-3",
    "dpm-solver-pp-2m",
    "dpm-solver-pp-3m",
    "heun",
    "dpm-solver-2s",
    "dpm-solver-3s",
    "deis-3",
    "ipndm",
    "ddim",
)
V = {"prediction_type": "v_prediction"}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}


def noise(seed=0, count=2):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def made(steps=5, **options):
    scheduler = FewstepScheduler(**{**V, **options})
    scheduler.set_timesteps(steps)
    return scheduler


# -- times ----------------------------------------------------------------------------------------------------------------------------


def test_times_are_rounded_not_cut():
    """Where they are whole: 999 / 7 k to the nearest; where they are levels they are not rounded at all."""
    assert made(7).timesteps.tolist() == [round(999 * (7 - k) / 7) for k in range(7)]
    karras = made(7, use_karras_sigmas=True)
    assert karras.timesteps.dtype == torch.float32 and bool((karras.timesteps != karras.timesteps.round()).any())
    level = torch.exp(-karras._law.schedule.lam(karras.timesteps.double()))
    torch.testing.assert_close(level.float(), karras.sigmas[:-1], rtol=1e-4, atol=0)  # float32 times


@pytest.mark.parametrize("name", ["karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas"])
@pytest.mark.parametrize(
    ("betas", "steps"),
    [
        pytest.param(betas, steps, marks=[pytest.mark.slow] if steps == 200 and betas != "scaled_linear" else [])
        for betas in ("squaredcos_cap_v2", "linear", "scaled_linear")
        for steps in (5, 200)
    ],
)
@pytest.mark.every(2)
def test_no_time_appears_twice(betas, name, steps):
    scheduler = made(steps, beta_schedule=betas, **{f"use_{name}": True})
    assert len(scheduler.timesteps.unique()) == steps and bool((torch.diff(scheduler.timesteps) < 0).all())
    assert bool(run(scheduler, noise(), tame)[0].isfinite().all())


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_more_steps_than_times(spacing):
    scheduler = made(40, num_train_timesteps=25, timestep_spacing=spacing) if spacing != "leading" else made(24, num_train_timesteps=25)
    assert bool((torch.diff(scheduler.timesteps.float()) < 0).all()) and bool(run(scheduler, noise(), tame)[0].isfinite().all())


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("solver", ["unipc-2", "heun", "euler", "dpm-solver-pp-3m"])
@pytest.mark.every(3, 2)
def test_a_terminal_shift_of_few_steps(solver, steps):
    scheduler = made(steps, **FLOW, shift_terminal=0.1, solver=solver)
    assert bool(scheduler.timesteps.isfinite().all() and scheduler.sigmas.isfinite().all())
    assert bool(run(scheduler, noise(), tame)[0].isfinite().all())
    assert steps == 1 or float(scheduler.timesteps[-1]) == pytest.approx(100, rel=1e-5)


LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    ("solver", "betas", "levels", "prediction"),
    pairwise(
        SOLVERS,
        (LATENT, {}, {"beta_schedule": "squaredcos_cap_v2"}),
        ({}, {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}),
        ("v_prediction", "sample", "epsilon"),
    ),
)
@pytest.mark.every(4, 2)
def test_starts_without_signal_are_finite(solver, betas, levels, prediction):
    scheduler = made(6, rescale_betas_zero_snr=True, solver=solver, **{**betas, **levels, "prediction_type": prediction})
    network = tame if prediction != "epsilon" else lambda x, t: x  # the answer for no image at all; others are without meaning there
    x, states = run(scheduler, noise(), network)
    assert all(bool(state.isfinite().all()) for state in states) and float(x.abs().max()) < 1e3


# -- many samples on one scheduler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [None, "replace", "in place"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.every(5, 2)
def test_two_loops_in_turn(solver, edit):
    def edited(x, k):
        return x if edit is None else x.mul_(1 - 0.02 * k) if edit == "in place" else x * (1 - 0.02 * k)

    alone = []
    for seed in (0, 1):
        scheduler, x = made(solver=solver), noise(seed)
        for k, t in enumerate(scheduler.timesteps):
            x = edited(scheduler.step(tame(x, t), t, x).prev_sample, k)
        alone.append(x)
    scheduler, both = made(solver=solver), [noise(0), noise(1)]
    for k, t in enumerate(scheduler.timesteps):
        for j in (0, 1) if k % 2 else (1, 0):  # not always the same one first
            both[j] = edited(scheduler.step(tame(both[j], t), t, both[j]).prev_sample, k)
    for one, two in zip(alone, both, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.every(3, 2)
def test_again_without_set_timesteps(solver):
    scheduler = made(solver=solver)
    assert torch.equal(run(scheduler, noise(), tame)[0], run(scheduler, noise(), tame)[0])
    for number in range(len(scheduler.timesteps) + 1):  # times as numbers say their place by their value
        x = noise()
        for t in scheduler.timesteps.tolist()[:number] + scheduler.timesteps.tolist():
            x = noise() if t == scheduler.timesteps.tolist()[0] else x
            x = scheduler.step(tame(x, t), t, x).prev_sample


@pytest.mark.parametrize("given_up", [1, 2, 3, 4])
@pytest.mark.parametrize("edited", [False, True])  # a new tensor at each step, as inpainting makes one
def test_a_loop_that_is_given_up_leaves_no_trace(given_up, edited):
    def loop(scheduler, x, times):
        for t in times:
            x = scheduler.step(tame(x, t), t, x).prev_sample
            x = 0.9 * x if edited else x
        return x

    expected, scheduler = loop(made(), noise(), made().timesteps), made()
    loop(scheduler, 3 * noise(1), scheduler.timesteps[:given_up])
    assert torch.equal(loop(scheduler, noise(), scheduler.timesteps), expected)


def test_a_tail_after_a_loop_that_was_given_up():
    fresh, scheduler = made(), made()
    run(scheduler, noise(1), lambda x, t: tame(x, t))
    x = noise(1)
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(tame(x, t), t, x).prev_sample
    for one in (fresh, scheduler):
        one.set_begin_index(3)
    assert torch.equal(run(scheduler, noise(), tame, first=3)[0], run(fresh, noise(), tame, first=3)[0])


def test_timesteps_that_a_pipeline_cuts():
    """Some pipelines put a part of the times in their place."""
    scheduler, fresh = made(8), made(8)
    fresh.set_begin_index(3)
    scheduler.timesteps = scheduler.timesteps[3:]
    assert torch.equal(run(scheduler, noise(), tame)[0], run(fresh, noise(), tame, first=3)[0])


def test_times_that_are_copies_or_were_rounded():
    """The sample itself says where it is."""
    for times in (made().timesteps.clone(), made(**FLOW).timesteps.bfloat16()):
        options = FLOW if times.is_floating_point() else {}
        scheduler, x = made(**options), noise()
        for t, exact in zip(times, scheduler.timesteps, strict=True):
            x = scheduler.step(tame(x, exact), t, x).prev_sample
        assert torch.equal(x, run(made(**options), noise(), tame)[0])


def test_what_is_handed_out_may_be_written_to():
    scheduler, x = made(), noise()
    for t in scheduler.timesteps:
        output = scheduler.step(tame(x, t), t, x)
        output.pred_original_sample.zero_()
        x = output.prev_sample
    assert torch.equal(x, run(made(), noise(), tame)[0])


def test_a_copy_goes_its_own_way():
    scheduler, x = made(), noise()
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(tame(x, t), t, x).prev_sample
    twin, y = copy.deepcopy(scheduler), x
    for t, u in zip(scheduler.timesteps[2:], twin.timesteps[2:], strict=True):
        x, y = scheduler.step(tame(x, t), t, x).prev_sample, twin.step(tame(y, u), u, y).prev_sample
    assert torch.equal(x, y)


@pytest.mark.parametrize("law", [V, FLOW], ids=["betas", "flow"])
def test_another_process_may_have_it(law):
    """Before times are chosen, and after."""
    chosen = FewstepScheduler.from_config(law, solver="unipc-2")
    bare = pickle.loads(pickle.dumps(chosen))
    for one in (bare, chosen):
        one.set_timesteps(6)
    samples = [run(one, noise(), tame)[0] for one in (chosen, bare, pickle.loads(pickle.dumps(chosen)))]
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])


@pytest.mark.parametrize("solver", [*SOLVERS, "sde-dpm-solver-pp-2m", "ddim:eta=1"])
@pytest.mark.every(4)
def test_a_sample_does_not_know_its_batch(solver):
    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = run(made(solver=solver), noise(count=3), tame, generator=generators(range(3)))[0]
    for k in range(3):
        alone = run(made(solver=solver), noise(count=3)[k : k + 1], tame, generator=generators([k]))[0]
        assert torch.equal(alone[0], together[k])


# -- compiling, gradients, devices ----------------------------------------------------------------------------------------------------


def test_compiled_once_for_all_steps():
    """A function that calls `step`, and one that only makes what `step` takes; neither is compiled again at a later step."""
    torch._dynamo.reset()
    scheduler = made(8, solver="unipc-3")

    @torch.compile(backend="eager")
    def whole(x, t):
        return scheduler.step(0.6 * x + 0.1 * torch.sin(x), t, x).prev_sample

    x = y = noise()
    for k, t in enumerate(scheduler.timesteps):
        with torch._dynamo.config.patch(error_on_recompile=k > 1):  # the first may come again for strides that changed
            x = whole(x, t)
    plain = made(8, solver="unipc-3")
    for t in plain.timesteps:
        y = plain.step(0.6 * y + 0.1 * torch.sin(y), t, y).prev_sample
    assert relative(x, y) < SAME
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options", [{}, {"rescale_betas_zero_snr": True}, {"use_karras_sigmas": True}, FLOW, {"thresholding": True}], ids=str
)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.every(5, 2)
def test_gradients_are_finite_and_right(solver, options):
    scheduler = made(4, solver=solver, **options)
    start, gain = noise().double().requires_grad_(), torch.ones((), dtype=torch.float64, requires_grad=True)
    end = run(scheduler, start, lambda x, t: gain * torch.sin(x))[0]
    by_x, by_gain = torch.autograd.grad((end**2).sum(), (start, gain))
    assert bool(by_x.isfinite().all()) and bool(by_gain.isfinite())
    with torch.no_grad():
        step = 1e-6
        ends = [(run(scheduler, start, lambda x, t, g=g: g * torch.sin(x))[0] ** 2).sum() for g in (1 + step, 1 - step)]
    assert float(by_gain) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-4)


class NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for a device, or move a tensor to another."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        assert name not in self.WAITING, f"{name} waits for the device"
        result = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            assert len({tensor.device for tensor in [*tensors, result]}) == 1, "a tensor changed its device"
        return result


@pytest.mark.parametrize(
    ("solver", "options", "dtype"),
    pairwise(
        (*SOLVERS, "sde-dpm-solver-pp-2m"), ({}, FLOW, {"thresholding": True}, {"use_karras_sigmas": True}), (torch.float32, torch.bfloat16)
    ),
)
@pytest.mark.every(7)
def test_a_step_never_waits_for_its_device(solver, options, dtype):
    """On the meta device, which has no numbers to wait for."""
    if solver == "dpm-solver-v3" or (solver.startswith("sde") and options is FLOW):
        solver = "unipc-2"
    scheduler = FewstepScheduler(**{**V, **options, "solver": solver})
    scheduler.set_timesteps(5, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    x, edited = (torch.empty(2, 3, 4, 4, device="meta", dtype=dtype) for _ in range(2))
    for t in scheduler.timesteps:
        with NoWaiting():
            x = scheduler.step(x.sin(), t, x, variance_noise=x).prev_sample
            edited = scheduler.step(edited.sin(), t, edited, variance_noise=x).prev_sample
            assert (x.device.type, x.dtype) == ("meta", dtype)


# -- half precision -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LAST_CAST)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.every(3)
def test_the_state_is_kept_in_float32(solver, dtype):
    """The same answers of the network (rounded numbers) on a float32 loop: only the last cast differs, whatever the number of steps."""
    half, full, x, y = made(30, solver=solver), made(30, solver=solver), noise().to(dtype), noise().to(dtype).float()
    for t in half.timesteps:
        answer = tame(x.float(), t).to(dtype)
        x, y = half.step(answer, t, x).prev_sample, full.step(answer.float(), t, y).prev_sample
    assert torch.equal(x, y.to(dtype))


@pytest.mark.parametrize("how", ["in place", "replace"])
@pytest.mark.parametrize("dtype", LAST_CAST)
@pytest.mark.parametrize("solver", ["dpm-solver-pp-2m", "ddim", "deis-3", "unipc-2"])
@pytest.mark.every(4, 2)
def test_edits_of_half_latents_are_taken_over(solver, dtype, how):
    half, full, x, y = made(solver=solver), made(solver=solver), noise().to(dtype), noise().to(dtype).float()
    for k, t in enumerate(half.timesteps):
        answer = tame(x.float(), t).to(dtype)
        x, y = half.step(answer, t, x).prev_sample, full.step(answer.float(), t, y).prev_sample
        if k == 2:
            x = x.mul_(0.5).add_(1) if how == "in place" else 0.5 * x + 1
            y = 0.5 * y + 1
    assert relative(x.float(), y) < 3 * LAST_CAST[dtype]
    untouched = run(made(solver=solver), noise().to(dtype), lambda x, t: tame(x.float(), t).to(dtype))[0]
    assert relative(untouched.float(), y) > 0.1


# -- image to image, inpainting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("solver", [*SOLVERS, "dpm-solver-v3"])
@pytest.mark.every(3)
def test_a_tail_is_a_grid_of_its_own(solver, announced):
    extra = {"statistics": statistics()} if solver == "dpm-solver-v3" else {}
    scheduler, begin = made(8, solver=solver, **extra), 3
    first = begin * scheduler.order
    if announced:
        scheduler.set_begin_index(first)
    ours, _ = run(scheduler, noise(), tame, first=first)
    fresh = FewstepScheduler(**V, solver=solver, **extra)
    fresh.set_timesteps(timesteps=scheduler._law.time(scheduler._sampler.grid.t[begin:-1]))
    assert torch.equal(scheduler.timesteps[first:], fresh.timesteps)
    assert relative(ours, run(fresh, noise(), tame)[0]) < SAME


@pytest.mark.parametrize("solver", ["unipc-3:weights=bh1", "heun", "dpm-solver-pp-3m", "dpm-solver-3s", "deis-3:steps=2"])
@pytest.mark.parametrize("card", [True, False])
@pytest.mark.every(4)
def test_the_tail_of_a_saved_sampler_is_its_own_solver(solver, card, tmp_path):
    law = FewstepScheduler(**V)._law.schedule
    facts = {"prediction": "v"} | ({"name": solver} if card else {})
    sampler = Sampler.build(make_solver(solver), make_grid("angle", law, 6), law, card=facts)
    sampler.save(tmp_path / "one")
    scheduler = FewstepScheduler.from_sampler(tmp_path / "one")
    scheduler.set_timesteps(6)
    assert scheduler.order == make_solver(solver).stages and scheduler.num_inference_steps == 6
    first = 2 * scheduler.order
    scheduler.set_begin_index(first)
    fresh = FewstepScheduler(**V, solver=solver)
    fresh.set_timesteps(timesteps=sampler.grid.t[2:-1])
    assert relative(run(scheduler, noise(), tame, first=first)[0], run(fresh, noise(), tame)[0]) < SAME


def test_the_tail_of_a_fitted_sampler_is_its_parent():
    model = load_model("digits-ddpm")
    scheduler = FewstepScheduler.from_sampler(model.folder / "fitted", {})  # that its network predicts epsilon is the default
    scheduler.set_timesteps(6)
    sampler = Sampler.load(model.folder / "fitted" / "nfe-06")
    scheduler.set_begin_index(2)
    solver, grid = make_solver(sampler.options["parent"]), TimeGrid(sampler.grid.t[2:])
    assert torch.equal(scheduler._sampler.tail(2).tableau.update, tabulate(solver, solver.nodes(grid, sampler.schedule)).update)
    x = run(scheduler, torch.randn(1, 1, 8, 8), tame, first=2)[0]
    assert bool(x.isfinite().all())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.every(3, 2)
def test_inpainting(solver):
    """The known part is put back at the noise of each step; the result there is the known picture, elsewhere that of one's own loop."""
    scheduler, known, mask = made(6, solver=solver), noise(5).clamp(-1, 1), (noise(7)[:1, :1] > 0).float()
    x = noise()
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(tame(x, t), t, x).prev_sample
        following = scheduler.timesteps[k + 1 : k + 2]
        proper = scheduler.add_noise(known, noise(), following) if len(following) else known
        x = mask * x + (1 - mask) * proper
    assert torch.equal((1 - mask) * x, (1 - mask) * known) and bool(x.isfinite().all()) and math.isfinite(float(x.std()))
