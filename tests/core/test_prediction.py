"""What a network predicts against its definition, from a clean image and a noise that are known."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import EDM, ModelError, convert, from_x0, seeded_noise, to_x0
from fewstep.core.prediction import PREDICTIONS, Prediction, prediction

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
