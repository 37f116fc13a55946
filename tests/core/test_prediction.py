"""What a network predicts against its definition, from a clean image and a noise that are known."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import EDM, ModelError, convert, from_x0, seeded_noise, to_x0
from fewstep.core.prediction import PREDICTIONS, Measured, Prediction, prediction

ROUND_OFF = 1e-11  # with scales down to 1e-2, whose quotients lose two digits

X0, EPS = seeded_noise([1, 2], (5, 3)).double()  # five samples of three numbers
DEFINITIONS = {
    "epsilon": lambda x0, eps, alpha, sigma: eps,
    "sample": lambda x0, eps, alpha, sigma: x0,
    "v": lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    "score": lambda x0, eps, alpha, sigma: -eps / sigma,
    "flow": lambda x0, eps, alpha, sigma: eps - x0,
    "reversed-flow": lambda x0, eps, alpha, sigma: x0 - eps,
}
KINDS = [*DEFINITIONS, "edm(0.5)", "edm(1.3)"]
scales = st.floats(0.01, 1.0).map(lambda v: torch.tensor(v, dtype=torch.float64))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_every_prediction_has_a_definition_here():
    assert set(DEFINITIONS) == set(PREDICTIONS)


@pytest.mark.parametrize("kind", DEFINITIONS)
@given(scales, scales)
def test_definition(kind, alpha, sigma):
    output = DEFINITIONS[kind](X0, EPS, alpha, sigma)
    x = alpha * X0 + sigma * EPS
    close(to_x0(kind, output, x, alpha, sigma), X0)
    close(from_x0(kind, X0, x, alpha, sigma), output)


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
@settings(max_examples=8)
@given(scales, scales)
@pytest.mark.every(5, 2)
def test_pairs_invert(source, target, alpha, sigma):
    x = alpha * X0 + sigma * EPS
    there = convert(source, target, EPS, x, alpha, sigma)
    torch.testing.assert_close(convert(target, source, there, x, alpha, sigma), EPS, rtol=0, atol=1e-8)  # four scales of 1e-2


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
@given(st.floats(0.002, 80).map(lambda v: torch.tensor(v, dtype=torch.float64)))
def test_edm_is_table_1_of_its_paper(sigma_data, sigma):
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / torch.sqrt(sigma_data**2 + sigma**2)
    c_in = 1 / torch.sqrt(sigma**2 + sigma_data**2)
    kind, one = EDM(sigma_data), torch.ones((), dtype=torch.float64)
    x = X0 + sigma * EPS
    close(to_x0(kind, torch.tanh(c_in * x), x, one, sigma), c_skip * x + c_out * torch.tanh(c_in * x))
    close(kind.input_scale(one, sigma), c_in)


@pytest.mark.parametrize("kind", ["edm(0.5)", "v", "flow", "sample"])
def test_defined_at_both_ends(kind):
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert torch.isfinite(to_x0(kind, EPS, X0, zero, one)).all()
    assert torch.isfinite(to_x0(kind, EPS, X0, one, zero)).all()
    if kind != "sample":
        close(to_x0(kind, EPS, X0, one, zero), X0)  # nothing to predict where there is no noise


@pytest.mark.parametrize("kind", ["epsilon", "score"])
def test_noise_says_nothing_at_zero_alpha(kind):
    alpha = torch.tensor([0.5, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    with pytest.raises(ModelError, match=f"'{kind}' says nothing about x0 where alpha = 0"):
        to_x0(kind, EPS, X0, alpha, 1 - alpha)


@pytest.mark.parametrize("kind", KINDS)
def test_one_time_per_sample(kind):
    """Scales ``[B]`` belong to the samples, whatever the shape of a sample."""
    alpha, sigma = torch.linspace(0.2, 0.9, 5, dtype=torch.float64), torch.linspace(0.8, 0.1, 5, dtype=torch.float64)
    x0, output = X0[:, :, None].expand(5, 3, 3), EPS[:, :, None].expand(5, 3, 3)
    together = to_x0(kind, output, x0, alpha, sigma)
    for k in range(5):
        close(together[k], to_x0(kind, output[k : k + 1], x0[k : k + 1], alpha[k], sigma[k])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_answer_has_the_dtype_of_the_state(dtype):
    scale = torch.tensor(0.5, dtype=torch.float64)
    assert to_x0("v", EPS.to(torch.bfloat16), X0.to(dtype), scale, scale).dtype == dtype


def test_names():
    assert prediction("v_prediction") is PREDICTIONS["v"]
    assert prediction("flow_prediction") is PREDICTIONS["flow"]
    assert prediction("edm(0.25)").name == EDM(0.25).name == "edm(0.25)"
    assert prediction(EDM(1 / 3).name).name == f"edm({1 / 3})"  # a name says all digits: a saved model comes back the same
    with pytest.raises(ModelError, match="unknown prediction type 'epsilom': did you mean epsilon"):
        prediction("epsilom")
    with pytest.raises(ModelError, match="known: epsilon, flow, reversed-flow, sample, score, v"):
        prediction("zzz")


@pytest.mark.parametrize("name", [*PREDICTIONS, "edm(0.25)"])
def test_one_of_ours_is_pickled_by_its_name(name):
    there = pickle.loads(pickle.dumps(prediction(name)))
    assert there.name == name
    assert all(torch.equal(a, b) for a, b in zip(there.coefficients(X0, EPS), prediction(name).coefficients(X0, EPS), strict=True))


def test_one_of_a_user_is_not_mistaken_for_ours():
    mine = Prediction("epsilon", torch.broadcast_tensors)
    assert pickle.loads(pickle.dumps(mine)) == copy.deepcopy(mine) == mine != PREDICTIONS["epsilon"]


@pytest.mark.parametrize("name", ["edm(half)", "edm()", "edm(0)", "edm(-1)", "edm(nan)"])
def test_edm_wants_a_positive_number(name):
    with pytest.raises(ModelError, match="sigma_data"):
        prediction(name)


# -- measured coefficients ----------------------------------------------------------------------------------------------

ROWS = [[math.log(0.01), 1.0, 0.01, 1.25], [math.log(0.5), 1.1, 0.4, 1.5], [math.log(3.0), 1.0, 2e-4, 1.7]]


def test_measured_coefficients_are_those_of_the_table_at_its_levels_and_beyond():
    kind, table = Measured(ROWS), torch.tensor(ROWS, dtype=torch.float64)
    for levels in (torch.exp(table[:, 0]), torch.tensor([0.001, 0.5, 30.0], dtype=torch.float64)):
        close(torch.stack(kind.at(levels), 1), table[:, 1:])


def test_measured_coefficients_follow_the_decay_in_a_cube_between_levels():
    decay = [[math.log(s), 1.0, math.exp(-(math.pi**2) * s**2 / 8), 1.0] for s in (1.0, 2.0, 3.0)]
    level = torch.tensor([1.3, 2.8], dtype=torch.float64)
    close(Measured(decay).at(level)[1], torch.exp(-(math.pi**2) * level**2 / 8))


def test_measured_outputs_and_clean_images_are_inverse_at_any_scale_of_the_state():
    alpha, sigma = torch.tensor([0.5, 1.0], dtype=torch.float64), torch.tensor([0.2, 0.4], dtype=torch.float64)
    kind, output = Measured(ROWS), torch.randn(2, 3, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)
    close(from_x0(kind, to_x0(kind, output, x, alpha, sigma), x, alpha, sigma), output)
    same = to_x0(kind, output, alpha[:, None] * x, alpha, sigma)  # the level is the same, 0.4
    close(same, to_x0(kind, output, x, torch.ones(2, dtype=torch.float64), torch.full((2,), 0.4, dtype=torch.float64)))
    close(kind.input_scale(alpha, sigma) * alpha, kind.at(sigma / alpha)[2])


def test_a_measured_prediction_is_a_value():
    kind = Measured(ROWS)
    assert prediction(kind) is kind and pickle.loads(pickle.dumps(kind)) == copy.deepcopy(kind) == kind and not kind.is_named
    assert kind != Measured(ROWS[:2]) and len({kind, Measured(torch.tensor(ROWS, dtype=torch.float64))}) == 1
    assert repr(kind) == "Measured(3 levels, 0.01 to 3)" and Measured(kind.to_config()["table"]) == kind


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("rows", "are rows of numbers"),
        ([[1.0, 2.0]], "2 or more rows"),
        (ROWS[:1], "2 or more rows"),
        (ROWS[::-1], "of increasing levels"),
        ([*ROWS[:2], [2.0, 1.0, 0.0, 1.0]], "c_out and c_in above 0"),
        ([*ROWS[:2], [2.0, math.nan, 1.0, 1.0]], "are finite"),
    ],
)
def test_coefficients_that_cannot_be_are_refused(table, says):
    with pytest.raises(ModelError, match=says):
        Measured(table)
