"""The integrals behind the exponential integrators, and the rule for which evaluations a step may use."""

import math

import numpy as np
import pytest
import torch

from fewstep import Nodes, RectifiedFlow, TimeGrid, VPLinear
from fewstep.solvers.phi import data_moment, divided_difference_weights, interpolation_weights, noise_moment, phi
from fewstep.solvers.stencil import ALWAYS, NEVER, effective_order

QUADRATURE = 1e-13  # Gauss-Legendre with 64 nodes on smooth integrands, in float64
POINTS, WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(64))
STEPS = torch.tensor([1e-12, 1e-4, 0.1, 0.999, 1.0, 1.001, 3.0, 20.0], dtype=torch.float64)


def integral(kernel, h):
    """``int_0^h kernel(r, h) dr`` for every ``h [n]``."""
    r = h[:, None] * (POINTS + 1) / 2
    return (kernel(r, h[:, None]) * WEIGHTS).sum(1) * h / 2


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_is_its_integral(k):
    """``phi_k(z) = int_0^1 e^{(1-u) z} u^{k-1}/(k-1)! du``."""
    z = torch.cat([-STEPS, torch.zeros(1, dtype=torch.float64), STEPS[:-1]])
    u, half = (POINTS + 1) / 2, WEIGHTS / 2
    expected = (torch.exp((1 - u) * z[:, None]) * u ** (k - 1) / math.factorial(k - 1) * half).sum(1)
    torch.testing.assert_close(phi(k, z), expected, rtol=QUADRATURE, atol=0)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_moments_are_their_integrals(k):
    data = integral(lambda r, h: torch.exp(r - h) * r**k / math.factorial(k), STEPS)
    torch.testing.assert_close(data_moment(k, STEPS), data, rtol=QUADRATURE, atol=0)
    noisy = integral(lambda r, h: torch.exp(-r) * r**k / math.factorial(k), STEPS)
    torch.testing.assert_close(noise_moment(k, STEPS), noisy, rtol=QUADRATURE, atol=0)


def test_moments_of_an_infinite_step():
    forever = torch.tensor(math.inf, dtype=torch.float64)
    assert data_moment(0, forever) == 1
    assert [float(noise_moment(k, forever)) for k in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize("points", [1, 2, 3, 4])
def test_interpolation_weights_integrate_polynomials_exactly(points):
    h = torch.tensor(0.7, dtype=torch.float64)
    offsets = [torch.tensor(v, dtype=torch.float64) for v in (0.0, -0.5, -1.3, -1.6)[:points]]
    weights = interpolation_weights(offsets, [noise_moment(k, h) for k in range(points)])
    for degree in range(points):
        exact = noise_moment(degree, h) * math.factorial(degree)
        torch.testing.assert_close((weights * torch.stack(offsets) ** degree).sum(), exact, rtol=QUADRATURE, atol=0)


OFFSETS = [torch.tensor(v, dtype=torch.float64) for v in (0.0, 0.7, -0.5, -1.3)]


@pytest.mark.parametrize("weights", [interpolation_weights, divided_difference_weights])
@pytest.mark.parametrize("points", [1, 2, 3, 4])
def test_moments_per_element_give_weights_per_element(points, weights):
    moments = [noise_moment(k, STEPS[2:].reshape(2, 3)) for k in range(points)]
    together = weights(OFFSETS[:points], moments)
    assert together.shape == (points, 2, 3)
    for i, j in np.ndindex(2, 3):
        alone = weights(OFFSETS[:points], [moment[i, j] for moment in moments])
        torch.testing.assert_close(together[:, i, j], alone, rtol=QUADRATURE, atol=QUADRATURE)


@pytest.mark.parametrize("points", [1, 2, 3, 4])
def test_divided_difference_weights_are_newtons(points):
    """The k-th derivative is ``k!`` times the divided difference over the first ``k + 1`` values."""
    at, values = [float(v) for v in OFFSETS[:points]], [math.cos(3 * k) for k in range(points)]

    def difference(first, last):
        if first == last:
            return values[first]
        return (difference(first + 1, last) - difference(first, last - 1)) / (at[last] - at[first])

    moments = [noise_moment(k, STEPS[4]) for k in range(points)]
    expected = sum(math.factorial(k) * difference(0, k) * float(moment) for k, moment in enumerate(moments))
    actual = float(divided_difference_weights(OFFSETS[:points], moments) @ torch.tensor(values, dtype=torch.float64))
    assert actual == pytest.approx(expected, rel=QUADRATURE)


def test_both_weights_agree_up_to_2_points_and_differ_beyond():
    moments = [noise_moment(k, STEPS[4]) for k in range(3)]
    for points, same in ((1, True), (2, True), (3, False)):
        one, two = (weights(OFFSETS[:points], moments[:points]) for weights in (interpolation_weights, divided_difference_weights))
        assert torch.allclose(one, two, rtol=QUADRATURE, atol=0) == same


def orders(nodes, order, lower_order_below):
    return [effective_order(nodes, i, order, lower_order_below) for i in range(nodes.evaluations)]


def test_effective_order():
    vp = VPLinear()
    noisy = Nodes.at(vp, TimeGrid.uniform(vp, 6).t)
    assert orders(noisy, 3, NEVER) == [1, 2, 3, 3, 3, 3]
    assert orders(noisy, 3, ALWAYS) == [1, 2, 3, 3, 2, 1]
    assert orders(noisy, 3, 6) == [1, 2, 3, 3, 3, 3]
    assert orders(noisy, 3, 7) == [1, 2, 3, 3, 2, 1]
    assert orders(noisy, 1, ALWAYS) == [1] * 6
    flow = RectifiedFlow()
    both_ends = Nodes.at(flow, TimeGrid.uniform(flow, 6).t)
    assert orders(both_ends, 3, NEVER) == [1, 1, 2, 3, 3, 1]
    assert orders(both_ends, 3, ALWAYS) == [1, 1, 2, 3, 2, 1]
