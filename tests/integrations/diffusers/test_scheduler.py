"""`FewstepScheduler` as diffusers' own tests ask of a scheduler, step by step beside theirs, and with the artifacts of this library."""

import inspect
import json
import math
from itertools import permutations, product

import diffusers
import numpy as np
import pytest
import torch
from tests.problems import pairwise

from fewstep.integrations.diffusers import FewstepScheduler

DIGITS = 1e-3  # of the constants of diffusers' tests
STEPWISE = 2e-5  # for float32 tables and steps of diffusers beside ours: see tests/parity/test_diffusers_parity.py
SAME = 3e-5  # a few float32 steps by two ways, of which singlestep methods subtract large numbers
LOOSE = 3e-4  # the same, where they subtract large float32 numbers: DEIS, SDEs in noise prediction, bh1, and named levels
ON_PURPOSE = 5e-3  # a flow from pure noise: their first level is 1 - 1e-6 and counts as a point of the polynomial, ours is 1 and does not
BATCH = (4, 3, 8, 8)
# numpy 2 about diffusers' schedulers; and diffusers about the older algorithm of its own DPM-Solver
theirs_warn = pytest.mark.filterwarnings(
    "ignore:__array__ impl:DeprecationWarning", "ignore:__array_wrap__ must:DeprecationWarning", "ignore:.algorithm_types:FutureWarning"
)
unipc_of_flows = pytest.mark.skipif(
    "sigmas" not in inspect.signature(diffusers.UniPCMultistepScheduler.set_timesteps).parameters,
    reason="the UniPC of diffusers 0.36 has other times of a flow, and takes no sigmas",
)
DPM = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "solver_order": 2,
    "prediction_type": "epsilon",
    "thresholding": False,
    "sample_max_value": 1.0,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": False,
    "euler_at_final": False,
    "lambda_min_clipped": -float("inf"),
    "variance_type": None,
    "final_sigmas_type": "sigma_min",
}
UNIPC = {key: DPM[key] for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "solver_order", "final_sigmas_type")}
UNIPC["solver_type"] = "bh2"
V = {"prediction_type": "v_prediction"}


def ramp(shape=BATCH, *, down=False):
    """The samples and noises of diffusers' tests: a ramp over the elements, the batch running fastest."""
    values = torch.arange(math.prod(shape))
    values = (values.flip(0) if down else values) / math.prod(shape)
    return values.reshape(*shape[1:], shape[0]).movedim(-1, 0)


def toy(x, t):
    t = torch.as_tensor(t).to(x.dtype)
    return x * t / (t + 1)


def run(scheduler, x, network=toy, first=0, **options):
    """Where a loop ends, and the states on its way."""
    states = []
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(network(x, t), t, x, **options).prev_sample
        states.append(x)
    return x, states


def made(config, steps=10, kind=FewstepScheduler, **options):
    scheduler = kind(**{**config, **options})
    scheduler.set_timesteps(steps)
    return scheduler


def relative(one, two):
    difference = float((one - two).abs().max() / two.abs().max())
    return difference if math.isfinite(difference) else math.inf


# -- the constants of diffusers' tests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "shape", "expected"),
    [
        (DPM, {}, BATCH, 0.3301),
        (DPM, {"thresholding": True, "dynamic_thresholding_ratio": 0.87, "sample_max_value": 0.5}, BATCH, 1.1364),
        (DPM, V, BATCH, 0.2251),
        (DPM, {**V, "use_karras_sigmas": True}, BATCH, 0.2096),
        (DPM, {**V, "use_lu_lambdas": True}, BATCH, 0.1554),
        (UNIPC, {}, BATCH, 0.2464),
        (UNIPC, {"use_karras_sigmas": True}, BATCH, 0.2925),
        (UNIPC, V, BATCH, 0.1014),
        (UNIPC, {**V, "use_karras_sigmas": True}, BATCH, 0.1966),
        (UNIPC, {}, BATCH[:3], 0.2441),
        (UNIPC, {"use_karras_sigmas": True}, BATCH[:3], 0.2898),
        (UNIPC, V, BATCH[:3], 0.1014),
        (UNIPC, {**V, "use_karras_sigmas": True}, BATCH[:3], 0.1944),
    ],
)
@pytest.mark.every(3, 2)
def test_full_loops(config, options, shape, expected):
    x, _ = run(made(config, **options), ramp(shape))
    assert float(x.abs().mean()) == pytest.approx(expected, abs=DIGITS)


@pytest.mark.parametrize(
    ("config", "first", "shape", "total", "mean"),
    [(DPM, 5, BATCH, 318.4111, 0.4146), (UNIPC, 8, BATCH, 315.5757, 0.4109), (UNIPC, 8, BATCH[:3], 39.0870, 0.4072)],
)
def test_full_loops_from_a_noised_sample(config, first, shape, total, mean):
    scheduler = made(config)
    x = scheduler.add_noise(ramp(shape), ramp(shape, down=True), scheduler.timesteps[first * scheduler.order :][:1])
    x, _ = run(scheduler, x, first=first)
    assert float(x.abs().sum()) == pytest.approx(total, abs=1e-2)
    assert float(x.abs().mean()) == pytest.approx(mean, abs=DIGITS)


@theirs_warn
@pytest.mark.parametrize(("config", "expected"), [(DPM, 0.3301), (UNIPC, 0.2464)])
def test_a_journey_through_other_schedulers_keeps_the_samples(config, expected):
    scheduler = FewstepScheduler(**config)
    for name in ("DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"):
        scheduler = getattr(diffusers, name).from_config(scheduler.config)
    scheduler = FewstepScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(10)
    assert float(run(scheduler, ramp())[0].abs().mean()) == pytest.approx(expected, abs=DIGITS)


# -- configurations -------------------------------------------------------------------------------------------------------------------

SWEEPS = [
    *({"num_train_timesteps": count} for count in (25, 50, 100, 999, 1000)),
    *(
        {"thresholding": True, "solver_order": order, "solver_type": kind, "sample_max_value": most, "prediction_type": prediction}
        for order, kind, most, prediction in pairwise((1, 2, 3), ("midpoint", "heun", "bh1", "bh2"), (0.5, 1.0, 2.0), ("epsilon", "sample"))
    ),
    *(
        {"algorithm_type": algorithm, "solver_type": kind, "solver_order": order, "prediction_type": prediction}
        for algorithm in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
        for order, kind, prediction in pairwise((1, 2) if "sde" in algorithm else (1, 2, 3), ("midpoint", "heun"), ("epsilon", "sample"))
    ),
    *({key: value} for key in ("lower_order_final", "euler_at_final", "rescale_betas_zero_snr", "thresholding") for value in (True, False)),
    *({"lambda_min_clipped": value} for value in (-float("inf"), -5.1)),
    *({"variance_type": value} for value in (None, "learned_range")),
    *({f"use_{name}": True, "final_sigmas_type": end} for name in ("beta_sigmas", "exponential_sigmas", "karras_sigmas", "lu_lambdas")
      for end in ("zero", "sigma_min")),
    *({"final_sigmas_type": end, "timestep_spacing": spacing} for end in ("zero", "sigma_min") for spacing in ("linspace", "trailing")),
    *({"beta_start": start, "beta_end": end} for start, end in ((0.00001, 0.0002), (0.0001, 0.002), (0.001, 0.02))),
    *({"beta_schedule": name, **V} for name in ("linear", "scaled_linear", "squaredcos_cap_v2")),
]  # fmt: skip


@pytest.mark.parametrize(("number", "options"), list(enumerate(SWEEPS)), ids=lambda value: str(value) if isinstance(value, int) else "")
@pytest.mark.every(5, 2)
def test_a_saved_configuration_steps_alike(number, options, tmp_path):
    scheduler = FewstepScheduler(**{**(DPM, UNIPC)[number % 2], **options})
    scheduler.save_config(tmp_path)
    again = FewstepScheduler.from_pretrained(tmp_path)
    ends = []
    for one in (scheduler, again):
        one.set_timesteps(6)
        ends.append(run(one, ramp(), generator=torch.manual_seed(0))[0])
    assert torch.equal(*ends) and bool(ends[0].isfinite().all())


@pytest.mark.parametrize("config", [DPM, UNIPC], ids=["dpm", "unipc"])
def test_saving_gives_the_same_configuration(config, tmp_path):
    scheduler = FewstepScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    again = FewstepScheduler.from_pretrained(tmp_path)
    both = [{key: value for key, value in one.config.items() if key != "_use_default_values"} for one in (scheduler, again)]
    assert both[0] == both[1]
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "FewstepScheduler"


def test_trained_betas_survive(tmp_path):
    scheduler = FewstepScheduler(trained_betas=np.array([0.1, 0.3]), num_train_timesteps=2)
    assert scheduler.betas.tolist() == pytest.approx([0.1, 0.3])
    scheduler.save_pretrained(tmp_path)
    again = FewstepScheduler.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.config.trained_betas, [0.1, 0.3])
    np.testing.assert_array_equal(FewstepScheduler.from_config(again.config).alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.slow
@theirs_warn
@pytest.mark.parametrize("config", [DPM, UNIPC], ids=["dpm", "unipc"])
def test_any_order_of_compatible_classes_gives_the_configuration_back(config):
    start = FewstepScheduler(**config)
    for one in start.compatibles:  # diffusers' own: there and back, one by one
        there = one.from_config(start.config)
        assert FewstepScheduler.from_config(there.config).config == start.config, one
        assert one.from_config(FewstepScheduler.from_config(there.config).config).config == there.config, one
    classes = start.compatibles
    for first, last in zip(classes, [*classes[1:], classes[0]], strict=True):
        assert FewstepScheduler.from_config(last.from_config(first.from_config(start.config).config).config).config == start.config
    for order in (classes, classes[::-1], classes[4:] + classes[:4]):  # through all of them
        scheduler = start
        for one in order:
            scheduler = one.from_config(scheduler.config)
        assert FewstepScheduler.from_config(scheduler.config).config == start.config


@theirs_warn
@pytest.mark.slow
@pytest.mark.parametrize("config", [DPM, UNIPC], ids=["dpm", "unipc"])
def test_every_pair_of_compatible_classes_gives_the_configuration_back(config):
    start = FewstepScheduler(**config)
    for first, last in permutations(start.compatibles, 2):
        assert FewstepScheduler.from_config(last.from_config(first.from_config(start.config).config).config).config == start.config


def test_old_attributes_and_missing_ones():
    scheduler = FewstepScheduler(**DPM)
    with pytest.warns(FutureWarning, match="'scheduler.config.num_train_timesteps'"):
        assert scheduler.num_train_timesteps == 1000
    with pytest.raises(AttributeError, match="'FewstepScheduler' object has no attribute 'no_such_thing'"):
        _ = scheduler.no_such_thing


def test_options_win_over_the_name_that_a_configuration_has():
    before = FewstepScheduler(solver="unipc-2")
    assert FewstepScheduler.from_config(before.config, solver_order=3).config.solver == "unipc-3"
    stochastic = FewstepScheduler.from_config(before.config, algorithm_type="sde-dpmsolver++")
    assert stochastic.config.solver.startswith("sde-dpm-solver-pp-2m")
    assert FewstepScheduler.from_config(before.config, solver="heun").order == 2
    assert FewstepScheduler.from_config(before.config, use_karras_sigmas=True).config.solver == "unipc-2"


# -- steps ----------------------------------------------------------------------------------------------------------------------------


def test_times_that_are_not_in_the_schedule_and_assigned_outputs():
    for config in (DPM, UNIPC):
        scheduler = made(config)
        scheduler.model_outputs = [ramp() + k for k in (0.2, 0.15)]  # diffusers' tests do this; here nothing reads them
        first, second = scheduler.step(0.1 * ramp(), 0, ramp()).prev_sample, scheduler.step(0.1 * ramp(), 1, ramp()).prev_sample
        assert first.shape == second.shape == BATCH and bool(first.isfinite().all() and second.isfinite().all())


@pytest.mark.parametrize("config", [DPM, UNIPC], ids=["dpm", "unipc"])
def test_outputs_and_dtypes(config):
    ours = [made(config) for _ in range(2)]
    t = ours[0].timesteps[0]
    output = ours[0].step(toy(ramp(), t), t, ramp())
    pair = ours[1].step(toy(ramp(), t), t, ramp(), return_dict=False)
    assert (
        torch.equal(output.prev_sample, pair[0]) and torch.equal(output.pred_original_sample, pair[1]) and output[0] is output.prev_sample
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert run(made(config), ramp().to(dtype))[0].dtype == dtype
    wide = torch.cat([toy(ramp(), t), ramp()], 1)  # a network with a variance beside its mean
    assert torch.equal(made(config).step(wide, t, ramp()).prev_sample, output.prev_sample)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_as_many_steps_as_times(spacing):
    scheduler = made(DPM, 1000, timestep_spacing=spacing)
    assert len(scheduler.timesteps.unique()) == 1000 == len(scheduler)


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.every(5)
def test_the_schedulers_own_times_as_custom_ones(algorithm, prediction, end):
    options = {"algorithm_type": algorithm, "prediction_type": prediction, "final_sigmas_type": end}
    own = made(DPM, **options)
    for times in (own.timesteps, own.timesteps.tolist(), own.timesteps.numpy()):
        given = FewstepScheduler(**{**DPM, **options})
        given.set_timesteps(timesteps=times)
        ends = [run(one, ramp(), generator=torch.manual_seed(0))[0] for one in (own, given)]
        assert torch.equal(*ends) and given.num_inference_steps == own.num_inference_steps


# -- beside diffusers' classes --------------------------------------------------------------------------------------------------------


def tame(x, t):
    """Answers of size 1 that no formula of low order follows."""
    return 0.6 * x + 0.4 * torch.sin(3 * x + torch.as_tensor(t) / 300)


def timeless(x, t):
    return tame(x, 0)


PEERS = {"dpm": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler", "deis": "DEISMultistepScheduler"}
PARITY = [
    *(("dpm", {"solver_order": p, "solver_type": kind, "final_sigmas_type": end})
      for p, kind, end in product((1, 2, 3), ("midpoint", "heun"), ("zero", "sigma_min"))),
    *(("dpm", {"algorithm_type": "dpmsolver", "solver_order": p, "solver_type": kind, "final_sigmas_type": "sigma_min"})
      for p, kind in product((1, 2, 3), ("midpoint", "heun"))),
    *(("dpm", {"algorithm_type": f"sde-{name}", "solver_order": p, "solver_type": kind, "final_sigmas_type": "sigma_min"})
      for name, p, kind in product(("dpmsolver", "dpmsolver++"), (1, 2), ("midpoint", "heun"))),
    *(("dpm", {"timestep_spacing": spacing, "steps_offset": 1, **V}) for spacing in ("leading", "trailing")),
    ("dpm", {"thresholding": True, "sample_max_value": 1.5, "prediction_type": "sample"}),
    ("dpm", {"lower_order_final": False, "euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    ("dpm", {"lambda_min_clipped": -3.0, "beta_schedule": "squaredcos_cap_v2", **V}),
    *(("unipc", {"solver_order": p, "solver_type": kind, "final_sigmas_type": "sigma_min"})
      for p, kind in product((1, 2, 3), ("bh1", "bh2"))),
    *(("unipc", {"solver_order": p}) for p in (1, 2, 3)),
    *(("unipc", {"solver_order": 3, "disable_corrector": [0, 2], "timestep_spacing": spacing, **V})
      for spacing in ("linspace", "trailing")),
    ("unipc", {"lower_order_final": False, "final_sigmas_type": "sigma_min", "thresholding": True}),
    *(pytest.param("unipc", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction", **order},
                   marks=unipc_of_flows) for order in ({}, {"solver_order": 3})),
    ("deis", {"solver_order": 3}),
]  # fmt: skip


@theirs_warn
@pytest.mark.parametrize("steps", [5, 16])  # on both sides of 15, where diffusers changes its order rule
@pytest.mark.parametrize(
    ("name", "options"), PARITY, ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value
)
@pytest.mark.every(5, 2)
def test_step_by_step_as_diffusers(name, options, steps):
    theirs = made({}, steps, getattr(diffusers, PEERS[name]), **options)
    ours = FewstepScheduler.from_config(theirs.config)
    ours.set_timesteps(steps)
    torch.testing.assert_close(ours.timesteps.double(), theirs.timesteps.double(), rtol=0, atol=1 if options.get("use_flow_sigmas") else 0)
    noise = torch.randn(2, 3, 4, 4, generator=torch.manual_seed(0))
    random = options.get("algorithm_type", "").startswith("sde")
    network = timeless if options.get("use_flow_sigmas") else tame  # their flow times are truncated to whole numbers, ours are not
    one, two = (run(s, noise, network, **({"generator": torch.manual_seed(1)} if random else {}))[1] for s in (ours, theirs))
    loose = name == "deis" or random or options.get("solver_type") == "bh1"
    close = ON_PURPOSE if options.get("use_flow_sigmas") else LOOSE if loose else STEPWISE
    for step, (mine, their) in enumerate(zip(one, two, strict=True)):
        assert relative(mine, their) < close, step


@theirs_warn
@pytest.mark.parametrize(
    ("kind", "name"),
    [*product(("dpm", "unipc"), ("karras_sigmas", "exponential_sigmas", "beta_sigmas")), ("dpm", "lu_lambdas")],
)
def test_named_levels_are_theirs_and_times_are_not_rounded(kind, name):
    """On purpose: the network is told the fraction of a timestep at which it has the level, not the nearest whole one (theirs, or one
    cut off). So times differ by up to 1, samples of a network that does not see time by nothing.
    """
    theirs = made({}, 8, getattr(diffusers, PEERS[kind]), **{f"use_{name}": True})
    ours = FewstepScheduler.from_config(theirs.config)
    ours.set_timesteps(8)
    assert relative(ours.sigmas, theirs.sigmas) < STEPWISE
    assert 0 < float((ours.timesteps - theirs.timesteps).abs().max()) <= 1
    noise = torch.randn(2, 3, 4, 4, generator=torch.manual_seed(0))
    assert relative(run(ours, noise, timeless)[0], run(theirs, noise, timeless)[0]) < LOOSE


@theirs_warn
@unipc_of_flows
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_flow_that_starts_below_pure_noise_is_theirs(order):
    options = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction", "solver_order": order}
    theirs, ours = diffusers.UniPCMultistepScheduler(**options), FewstepScheduler(**options)
    for one in (theirs, ours):
        one.set_timesteps(sigmas=np.linspace(0.97, 0.1, 8))
    noise = torch.randn(2, 3, 4, 4, generator=torch.manual_seed(0))
    assert relative(run(ours, noise, timeless)[0], run(theirs, noise, timeless)[0]) < STEPWISE


@pytest.mark.parametrize("options", [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "shift_terminal": 0.1},
                                     {"shift": 3.0, "use_karras_sigmas": True}], ids=str)  # fmt: skip
def test_flow_levels_given_by_a_pipeline(options):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    ours = FewstepScheduler.from_config(theirs.config, solver="euler")
    asked = {"sigmas": np.linspace(1, 1 / 6, 6), **({"mu": 0.8} if "use_dynamic_shifting" in options else {})}
    for one in (ours, theirs):
        one.set_timesteps(**asked)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=STEPWISE, atol=1e-6)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=STEPWISE, atol=1e-3)
    noise = torch.randn(2, 3, 4, 4, generator=torch.manual_seed(0))
    assert relative(run(ours, noise, timeless)[0], run(theirs, noise, timeless)[0]) < STEPWISE
    torch.testing.assert_close(
        ours.scale_noise(noise, ours.timesteps[2:3], 2 * noise), theirs.scale_noise(noise, theirs.timesteps[2:3], 2 * noise)
    )
