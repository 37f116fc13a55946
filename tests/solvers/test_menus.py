"""The samplers of k-diffusion and ComfyUI, number for number.

Each is written here once more from its recurrence in ``x0 + sigma eps``, in float64, and run on levels that end at 0.
"""

import math

import pytest
import torch
from tests.problems import karras_levels, mixture, noise

from fewstep import RectifiedFlow, TimeGrid, VarianceExploding, make_solver, sample, tabulate
from fewstep.solvers import ETDRK4, LMS

SAME = 1e-11  # the same few terms in another order, over 9 steps from sigma = 10; measured 2e-13
DENOISER = mixture(VarianceExploding())
LEVELS = {"to-clean": [*karras_levels(8, 10.0, 0.05).tolist(), 0.0], "to-noise": karras_levels(9, 10.0, 0.05).tolist()}


def answer(x, sigma):
    return DENOISER(x, torch.tensor(sigma, dtype=torch.float64))


def slope(x, sigma):
    return (x - answer(x, sigma)) / sigma


def lagrange(points, j):
    """The coefficients of the j-th Lagrange polynomial, constant first."""
    made = [1.0]
    for k, point in enumerate(points):
        if k != j:
            scale = points[j] - point
            shifted = [0.0, *made]
            made = [(up - point * low) / scale for up, low in zip(shifted, [*made, 0.0], strict=True)]
    return made


def primitive(coefficients, u):
    return sum(c * u ** (k + 1) / (k + 1) for k, c in enumerate(coefficients))


def lms(x, levels, order=4, euler_at_clean=False):
    slopes = []
    for i, (now, then) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        slopes = [slope(x, now), *slopes][:order]
        used = slopes[:1] if then == 0 and euler_at_clean else slopes
        points = [levels[i - k] for k in range(len(used))]
        for j, one in enumerate(used):
            part = lagrange(points, j)
            x = x + (primitive(part, then) - primitive(part, now)) * one
    return x


def published_shares(h):
    """iPNDM-v's, each as its code writes it out."""
    if len(h) == 1:
        return [1.0]
    h0, h1, *more = h
    first, second = (2 + h0 / h1) / 2, -(h0 / h1) / 2
    if not more:
        return [first, second]
    h2 = more[0]
    t1 = (1 - h0 / (3 * (h0 + h1)) * (h0 * (h0 + h1)) / (h1 * (h1 + h2))) / 2
    if len(h) == 3:
        return [first + t1, second - (1 + h1 / h2) * t1, t1 * h1 / h2]
    h3 = more[1]
    t2 = (1 - h0 / (3 * (h0 + h1))) / 2 + (1 - h0 / (2 * (h0 + h1))) * h0 / (6 * (h0 + h1 + h2))
    t2 *= h0 * (h0 + h1) * (h0 + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
    m = h1 * (h1 + h2) / (h2 * (h2 + h3))
    third = t1 * h1 / h2 + (h1 / h2 + m * (1 + h2 / h3)) * t2
    return [first + t1 + t2, second - (1 + h1 / h2) * t1 - (1 + h1 / h2 + m) * t2, third, -t2 * m * h1 / h2]


def ipndm_v(x, levels):
    slopes = []
    for i, (now, then) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        slopes = [slope(x, now), *slopes][:4]
        used = slopes[:1] if then == 0 else slopes
        shares = published_shares([levels[i - k + 1] - levels[i - k] for k in range(len(used))])
        x = x + (then - now) * sum(share * one for share, one in zip(shares, used, strict=True))
    return x


def dpm_2(x, levels):
    for now, then in zip(levels[:-1], levels[1:], strict=True):
        if then == 0:
            return answer(x, now)
        middle = math.sqrt(now * then)
        x = x + (then - now) * slope(x + (middle - now) * slope(x, now), middle)
    return x


def heunpp2(x, levels):
    for i, (now, then) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        slopes, ahead = [slope(x, now)], x
        for k in range(i + 1, min(i + 3, len(levels) - 1)):
            ahead = ahead + (levels[k] - levels[k - 1]) * slopes[-1]
            slopes.append(slope(ahead, levels[k]))
        later = [levels[i + k] / (len(slopes) * levels[0]) for k in range(1, len(slopes))]
        x = x + (then - now) * sum(w * one for w, one in zip([1 - sum(later), *later], slopes, strict=True))
    return x


def res_multistep(x, levels):
    before = None
    for i, (now, then) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        found = answer(x, now)
        if then == 0 or before is None:
            x = x + (then - now) * (x - found) / now
        else:
            h, c2 = math.log(now / then), -math.log(levels[i - 1] / now) / math.log(now / then)
            phi1 = (1 - math.exp(-h)) / h
            phi2 = (1 - phi1) / h
            x = math.exp(-h) * x + h * ((phi1 - phi2 / c2) * found + phi2 / c2 * before)
        before = found
    return x


def gradient_estimation(x, levels, gamma=2.0):
    before = None
    for now, then in zip(levels[:-1], levels[1:], strict=True):
        found = slope(x, now)
        plain = before is None or then == 0
        x = x + (then - now) * (found if plain else found + (gamma - 1) * (found - before))
        before = found
    return x


def dpm_fast(x, levels):
    """For levels of equal ratio; ``len(levels) - 2`` steps of order 3, and one of order 2."""

    def to(x, eps, now, then, weight=1.0):
        return x - weight * then * (now / then - 1) * eps

    for i, (now, then) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        h, start = math.log(now / then), slope(x, now)
        if i == len(levels) - 2:
            middle = math.sqrt(now * then)
            return to(x, slope(to(x, start, now, middle), middle), now, then)
        one, two = now * math.exp(-h / 3), now * math.exp(-2 * h / 3)
        change = slope(to(x, start, now, one), one) - start
        at_two = to(x, start, now, two) - two * 2 * ((math.exp(2 * h / 3) - 1) / (2 * h / 3) - 1) * change
        change = slope(at_two, two) - start
        x = to(x, start, now, then) - then / (2 / 3) * ((math.exp(h) - 1) / h - 1) * change
    return x


THEIRS = {
    "LMS": lms,
    "ipndm_v": ipndm_v,
    "ipndm-v": lambda x, levels: lms(x, levels, euler_at_clean=True),
    "rho-ab-3": lambda x, levels: lms(x, levels, 3, euler_at_clean=True),
    "dpm_2": dpm_2,
    "heunpp2": heunpp2,
    "res_multistep": res_multistep,
    "gradient_estimation": gradient_estimation,
    "gradient-estimation:gamma=1.3": lambda x, levels: gradient_estimation(x, levels, 1.3),
}


def ours(name, x, levels):
    schedule = VarianceExploding(t_min=levels[-1], t_max=levels[0])
    solver = make_solver(name)
    return sample(mixture(schedule), tabulate(solver, solver.nodes(TimeGrid(torch.tensor(levels, dtype=torch.float64)), schedule)), x)


@pytest.mark.parametrize("end", LEVELS)
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.every(2, 2)
def test_a_sampler_is_its_recurrence(name, end):
    x = 10 * noise(4, 2)
    torch.testing.assert_close(ours(name, x, LEVELS[end]), THEIRS[name](x, LEVELS[end]), rtol=SAME, atol=SAME)


@pytest.mark.parametrize("levels", [[1.0, 0.9, 0.6, 0.3, 0.0], [0.95, 0.7, 0.4, 0.1]], ids=["from-noise", "inside"])
def test_heun_of_a_flow_is_its_recurrence(levels):
    """The trapezoid of velocities, as ComfyUI and diffusers run it on flow models."""
    law = RectifiedFlow(t_min=levels[-1], t_max=levels[0])
    velocity = lambda x, s: (x - mixture(law)(x, torch.tensor(s, dtype=torch.float64))) / s  # noqa: E731
    x = start = noise(4, 2)
    for now, then in zip(levels[:-1], levels[1:], strict=True):
        d = velocity(x, now)
        ahead = x + (then - now) * d
        x = ahead if then == 0 else x + (then - now) * (d + velocity(ahead, then)) / 2
    solver = make_solver("heun:law=flow")
    made = sample(mixture(law), tabulate(solver, solver.nodes(TimeGrid(torch.tensor(levels, dtype=torch.float64)), law)), start)
    torch.testing.assert_close(made, x, rtol=SAME, atol=SAME)


def test_dpm_fast_is_its_recurrence():
    levels, x = torch.logspace(1, -1, 5, dtype=torch.float64).tolist(), 10 * noise(4, 2)
    torch.testing.assert_close(ours("dpm_fast:remainder=2", x, levels), dpm_fast(x, levels), rtol=SAME, atol=SAME)


def test_the_published_weights_of_ipndm_v_do_not_sum_to_1():
    """So even a constant slope is not integrated: of 4 evaluations on unequal steps, and of no fewer."""
    h = [1.0, 1.4, 2.1, 3.3]
    assert [abs(sum(published_shares(h[:p])) - 1) < 1e-12 for p in (1, 2, 3, 4)] == [True, True, True, False]
    assert LMS(4, weights="published").order == 2 and LMS(3, weights="published").order == 3


@pytest.mark.parametrize("form", ["cox-matthews", "krogstad"])
def test_etdrk4_is_its_paper(form):
    """``u' = -u + D`` over lam, of a step ``h``, with Cox and Matthews' combinations written out."""
    levels, x = [2.0, 0.9], 10 * noise(4, 2)
    z, h = x, math.log(levels[0] / levels[1])
    middle = math.sqrt(levels[0] * levels[1])
    e, half = math.exp(-h), math.exp(-h / 2)
    start = answer(z, levels[0])
    a = half * z + (1 - half) * start
    at_a = answer(a, middle)
    if form == "cox-matthews":
        b = half * z + (1 - half) * at_a
        at_b = answer(b, middle)
        c = half * a + (1 - half) * (2 * at_b - start)
    else:
        phi2_half, phi2 = (half - 1 + h / 2) / (h / 2) ** 2, (e - 1 + h) / h**2
        b = half * z + (1 - half) * start + h * phi2_half * (at_a - start)
        at_b = answer(b, middle)
        c = e * z + (1 - e) * start + 2 * h * phi2 * (at_b - start)
    at_c = answer(c, levels[1])
    cubed = -(h**3)
    f1, f2, f3 = -4 + h + e * (4 + 3 * h + h**2), 2 - h + e * (-2 - h), -4 + 3 * h - h**2 + e * (4 + h)
    expected = e * z + h * (f1 * start + 2 * f2 * (at_a + at_b) + f3 * at_c) / cubed
    spec = f"etdrk-4:form={form}"
    assert make_solver(spec) == ETDRK4(form)
    torch.testing.assert_close(ours(spec, x, levels), expected, rtol=SAME, atol=SAME)
