"""The laws of noise: every one consistent with itself, and the tables with what they were made from."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep import EDM, DiscreteVP, FewstepError, ModelError, RectifiedFlow, VarianceExploding, VPCosine, VPLinear
from fewstep.core.schedule import schedule_from_config

ROUND_TRIP = 1e-9  # of t; lam near the clean end of the cosine law has lost this much to cancellation
ROUND_OFF = 1e-12
TABLE = 1e-12  # relative, of alphas_cumprod down to 1e-9: cos(theta) near pi/2 keeps this much

CONTINUOUS = {
    "vp-linear": VPLinear(),
    "vp-linear-slow": VPLinear(beta_min=0.5, beta_max=4.0),
    "vp-cosine": VPCosine(),
    "edm": VarianceExploding(),
    "flow": RectifiedFlow(),
    "flow-shift-3": RectifiedFlow(shift=3.0),
}
DISCRETE = {
    "linear": DiscreteVP.linear(),
    "scaled-linear": DiscreteVP.scaled_linear(),
    "squared-cosine": DiscreteVP.squared_cosine(),
    "zero-terminal-snr": DiscreteVP.scaled_linear().zero_terminal_snr(),
    "two-entries": DiscreteVP.from_alphas_cumprod(torch.tensor([0.9, 0.1], dtype=torch.float64)),
}
LAWS = {**CONTINUOUS, **DISCRETE}
VARIANCE_PRESERVING = ["vp-linear", "vp-linear-slow", "vp-cosine", *DISCRETE]
laws = pytest.mark.parametrize("schedule", LAWS.values(), ids=LAWS)


def between(schedule, count=101, *, inside=0.0):
    """Times from ``t_max`` down to ``t_min``; ``inside`` moves both ends inwards by that fraction."""
    ends = torch.lerp(*torch.tensor([[schedule.t_max], [schedule.t_min]], dtype=torch.float64), torch.tensor([inside, 1 - inside]).double())
    return ends[0] + torch.linspace(0, 1, count, dtype=torch.float64) * (ends[1] - ends[0])


@laws
@given(st.floats(0, 1))
@pytest.mark.every(3)
def test_lam_and_back(schedule, fraction):
    t = torch.tensor(schedule.t_min + fraction * (schedule.t_max - schedule.t_min), dtype=torch.float64)
    lam = schedule.lam(t)
    back = schedule.t_of_lam(lam)
    torch.testing.assert_close(back, t, rtol=ROUND_TRIP, atol=ROUND_TRIP * schedule.t_max)


@laws
def test_noise_only_grows_with_time(schedule):
    t = between(schedule)
    alpha, sigma, lam = schedule.alpha(t), schedule.sigma(t), schedule.lam(t)
    assert (torch.diff(lam) > 0).all()
    assert (torch.diff(sigma) < 0).all()
    assert (torch.diff(alpha) >= 0).all()
    assert schedule.t_max > schedule.t_min >= schedule.t_clean


@laws
def test_lam_is_the_log_ratio(schedule):
    t = between(schedule, inside=0.01)
    torch.testing.assert_close(schedule.lam(t), torch.log(schedule.alpha(t) / schedule.sigma(t)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_is_preserved(name):
    t = between(LAWS[name])
    torch.testing.assert_close(LAWS[name].alpha(t) ** 2 + LAWS[name].sigma(t) ** 2, torch.ones_like(t), rtol=ROUND_OFF, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_rectified_flow_is_a_line_in_its_own_time(shift):
    schedule = RectifiedFlow(shift=shift)
    t = between(schedule)
    u = shift * t / (1 + (shift - 1) * t)
    torch.testing.assert_close(schedule.sigma(t), u, rtol=ROUND_OFF, atol=0)
    torch.testing.assert_close(schedule.alpha(t), 1 - u, rtol=ROUND_OFF, atol=ROUND_OFF)


@laws
def test_the_clean_end(schedule):
    clean = torch.tensor(schedule.t_clean, dtype=torch.float64)
    assert schedule.sigma(clean) == 0
    assert schedule.alpha(clean) == 1
    assert schedule.lam(clean) == math.inf


@pytest.mark.parametrize("name", ["flow", "flow-shift-3", "zero-terminal-snr"])
def test_the_pure_noise_end(name):
    schedule = LAWS[name]
    for dtype in (torch.float64, torch.float32):
        start = torch.tensor(schedule.t_max, dtype=dtype)
        assert schedule.alpha(start) == 0
        assert schedule.sigma(start) == 1
        assert schedule.lam(start) == -math.inf


@laws
def test_derivatives(schedule):
    """Autograd's derivatives are finite and those of the function; on tables between the knots."""
    t = between(schedule, 8, inside=0.0503).requires_grad_()
    for law in (schedule.alpha, schedule.sigma, schedule.lam):
        assert torch.autograd.gradcheck(law, t, eps=1e-7 * schedule.t_max, atol=1e-6, rtol=1e-5)
    lam = schedule.lam(t).detach().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.t_of_lam(lam).sum(), lam)
    (inverse,) = torch.autograd.grad(schedule.lam(t).sum(), t)
    torch.testing.assert_close(slope * inverse, torch.ones_like(slope), rtol=1e-6, atol=0)


@laws
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.every(4, 2)
def test_dtype_and_shape_are_kept(schedule, dtype):
    t = between(schedule, 12, inside=0.1).to(dtype).reshape(3, 4)
    for law in (schedule.alpha, schedule.sigma, schedule.lam):
        assert (law(t).dtype, law(t).shape) == (dtype, t.shape)
    assert schedule.t_of_lam(schedule.lam(t)).dtype == dtype


@laws
def test_config_round_trip(schedule):
    config = json.loads(json.dumps(schedule.to_config()))
    again = schedule_from_config(config)
    t = between(schedule)
    assert type(again) is type(schedule)
    assert torch.equal(again.alpha(t), schedule.alpha(t))
    assert torch.equal(again.sigma(t), schedule.sigma(t))
    assert (again.t_max, again.t_min, again.t_clean) == (schedule.t_max, schedule.t_min, schedule.t_clean)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"law": "edmm"}, "did you mean edm"),
        ({"law": "xyz"}, "known: edm, flow"),
        ({}, "unknown noise schedule 'None'"),
        ({"law": "edm", "rho": 7}, "noise schedule 'edm': .*rho"),
    ],
)
def test_unknown_configs_are_refused(config, message):
    with pytest.raises(ModelError, match=message):
        schedule_from_config(config)


# -- tables ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        (DiscreteVP.linear(), torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
        (DiscreteVP.scaled_linear(), torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2),
        (DiscreteVP.linear(4, 0.1, 0.4), torch.linspace(0.1, 0.4, 4, dtype=torch.float64)),
    ],
    ids=["linear", "scaled-linear", "short"],
)
def test_tables_are_exact_at_their_own_times(schedule, betas):
    alphas_cumprod, times = torch.cumprod(1 - betas, 0), schedule.times[1:]
    assert times.tolist() == list(range(len(betas)))
    torch.testing.assert_close(schedule.alpha(times) ** 2, alphas_cumprod, rtol=TABLE, atol=0)
    torch.testing.assert_close(schedule.sigma(times) ** 2, 1 - alphas_cumprod, rtol=TABLE, atol=0)
    torch.testing.assert_close(schedule.t_of_lam(schedule.lam(times)), times, rtol=0, atol=ROUND_TRIP)


def test_squared_cosine_is_its_formula_where_betas_are_not_capped():
    t = torch.arange(1, 991, dtype=torch.float64) / 1000
    bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(DISCRETE["squared-cosine"].alpha(t * 1000 - 1) ** 2, bar, rtol=1e-9, atol=0)


def test_a_float32_table_is_taken_at_its_own_values():
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    schedule = DiscreteVP.from_alphas_cumprod(table)
    torch.testing.assert_close(schedule.alpha(schedule.times[1:]) ** 2, table.double(), rtol=TABLE, atol=0)


def test_between_two_times_the_angle_is_linear():
    schedule = DiscreteVP.linear()
    t = torch.tensor([500.0, 500.25, 501.0], dtype=torch.float64)
    theta = torch.atan2(schedule.sigma(t), schedule.alpha(t))
    torch.testing.assert_close(theta[1], torch.lerp(theta[0], theta[2], 0.25), rtol=ROUND_OFF, atol=0)


def test_zero_terminal_snr_keeps_the_first_time_and_zeroes_the_last():
    before = DiscreteVP.scaled_linear()
    after, times = before.zero_terminal_snr(), before.times[1:]
    assert after.alpha(times)[-1] == 0
    torch.testing.assert_close(after.alpha(times)[0], before.alpha(times)[0], rtol=ROUND_OFF, atol=0)
    scale = torch.diff(after.alpha(times)) / torch.diff(before.alpha(times))  # shifted and scaled: one factor everywhere
    torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    "table",
    [[0.5], [0.5, 0.5], [0.1, 0.9], [1.0, 0.5], [0.9, -0.1], [1.1, 0.5], [0.9, math.nan], [[0.9, 0.5], [0.4, 0.1]], []],
    ids=["one", "constant", "growing", "clean", "negative", "above-1", "nan", "2-d", "empty"],
)
def test_bad_tables_are_refused(table):
    with pytest.raises(ModelError, match="strictly decreasing"):
        DiscreteVP.from_alphas_cumprod(torch.tensor(table, dtype=torch.float64))


@pytest.mark.parametrize(
    "theta", [[0.0, 1.0, 3.0], [0.2, 1.0, 1.5], [-1.0, 1.0, 1.5], [0, 1, 2]], ids=["beyond", "noised", "negative", "whole"]
)
def test_angles_that_are_no_table_are_refused(theta):
    for kind in (list, np.array, torch.tensor):
        with pytest.raises(ModelError, match="angles from 0 to at most pi/2"):
            DiscreteVP(kind(theta))


def test_angles_of_any_library_make_the_same_law():
    theta = [0.0, 0.5, 1.0]
    for kind in (list, np.array, lambda values: torch.tensor(values, dtype=torch.float32)):
        law = DiscreteVP(kind(theta))
        assert law.theta.dtype == torch.float64 and law.theta.tolist() == theta


@pytest.mark.parametrize(
    "make",
    [
        lambda: VPLinear(t_min=-3, t_clean=-5),
        lambda: VPCosine(t_min=0.6, t_clean=0.5),
        lambda: RectifiedFlow(t_min=-1, t_clean=-1),
        lambda: VarianceExploding(t_min=1, t_clean=1),
        lambda: VPLinear(0, 0),
    ],
)
def test_a_law_is_clean_at_its_clean_time_and_noisy_elsewhere(make):
    with pytest.raises(ModelError, match=r"needs .*0 = t_clean <= t_min < t_max"):
        make()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DiscreteVP.linear(10, bogus=3), "linear: got an unexpected keyword argument 'bogus'"),
        (lambda: DiscreteVP(torch.tensor([0, 0.1, 0.2]), bogus=1), "DiscreteVP: got an unexpected keyword argument 'bogus'"),
        (lambda: DiscreteVP.from_alphas_cumprod([0.9, 0.5], 3), "too many positional arguments"),
        (lambda: DiscreteVP.from_alphas_cumprod([0.9, 0.5j]), "a list of numbers"),
        (lambda: DiscreteVP.squared_cosine(10, max_beta="a"), "max_beta is a number, got 'a'"),
        (lambda: EDM(sigma=1), "EDM: got an unexpected keyword argument 'sigma'; did you mean sigma_data"),
    ],
)
def test_makers_of_laws_say_what_to_pass(make, says):
    with pytest.raises(FewstepError, match=says):
        make()
