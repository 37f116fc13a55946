"""The stochastic samplers of k-diffusion, ComfyUI and the papers, number for number; their limits, their laws and their paths.

Each recurrence is written here once more in its own variables, ``x0 + sigma eps`` or a flow's, in float64; ``xi[j]`` is the noise of our
row ``j``.
"""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.problems import STOCHASTIC, karras_levels, mixture, moments, noise

from fewstep import DiscreteVP, RectifiedFlow, SolverError, TimeGrid, VarianceExploding, VPLinear, make_solver, sample, steps, tabulate
from fewstep.models.analytic import GaussianDenoiser
from fewstep.sampling.brownian import BrownianPath
from fewstep.solvers import (
    DDIM,
    DDPM,
    ERSDE,
    LCM,
    RES2S,
    RES3S,
    SEEDS2,
    SEEDS3,
    DPM2Ancestral,
    DPM2Churn,
    DPMSolver2S,
    DPMSolverPP,
    DPMSolverPP2SAncestral,
    DPMSolverPPSDE,
    EulerAncestral,
    EulerChurn,
    ExponentialAB,
    Heun,
    HeunChurn,
    RESAncestral,
    Restart,
    SASolver,
    SDEDPMSolverPP2M,
    SDEDPMSolverPP3M,
)
from fewstep.solvers.stencil import NEVER

SAME = 1e-11  # the same few terms in another order, over 9 steps from sigma = 10
LEVELS = {"to-clean": [*karras_levels(8, 10.0, 0.05).tolist(), 0.0], "to-noise": karras_levels(9, 10.0, 0.05).tolist()}
FLOW = {"from-noise": [1.0, 0.9, 0.7, 0.4, 0.1, 0.0], "inside": [0.95, 0.8, 0.55, 0.3, 0.1]}


def answer(x, sigma, law=VarianceExploding):
    return mixture(law())(x, torch.tensor(sigma, dtype=torch.float64))


def slope(x, sigma, law=VarianceExploding):
    return (x - answer(x, sigma, law)) / sigma


def ancestral(now, then, eta):
    up = min(then, eta * math.sqrt(then**2 * (now**2 - then**2) / now**2))
    return math.sqrt(then**2 - up**2), up


def pairs(levels):
    return enumerate(zip(levels[:-1], levels[1:], strict=True))


def euler_ancestral(x, levels, xi, eta=1.0, s_noise=1.0):
    for i, (now, then) in pairs(levels):
        down, up = ancestral(now, then, eta)
        x = x + (down - now) * slope(x, now) + s_noise * up * xi[i]
    return x


def dpm_2_ancestral(x, levels, xi, eta=1.0, s_noise=1.0):
    for i, (now, then) in pairs(levels):
        down, up = ancestral(now, then, eta)
        if down == 0:
            x = x + (down - now) * slope(x, now)
            continue
        middle = math.sqrt(now * down)
        between = x + (middle - now) * slope(x, now)
        x = x + (down - now) * slope(between, middle) + s_noise * up * xi[2 * i + 1]
    return x


def dpmpp_2s_ancestral(x, levels, xi, eta=1.0, s_noise=1.0):
    for i, (now, then) in pairs(levels):
        down, up = ancestral(now, then, eta)
        if down == 0:
            x = x + (down - now) * slope(x, now)
            continue
        h = math.log(now / down)
        between = math.exp(-h / 2) * x + (1 - math.exp(-h / 2)) * answer(x, now)
        x = math.exp(-h) * x + (1 - math.exp(-h)) * answer(between, now * math.exp(-h / 2)) + s_noise * up * xi[2 * i + 1]
    return x


def res_multistep_ancestral(x, levels, xi, eta=1.0, s_noise=1.0):
    before = drop = None
    for i, (now, then) in pairs(levels):
        down, up = ancestral(now, then, eta)
        found = answer(x, now)
        if down == 0 or before is None:
            x = x + (down - now) * (x - found) / now
        else:
            h = math.log(now / down)
            c2 = -drop / h
            phi1 = (1 - math.exp(-h)) / h
            phi2 = (phi1 - 1) / -h
            x = math.exp(-h) * x + h * ((phi1 - phi2 / c2) * found + phi2 / c2 * before)
        x = x + s_noise * up * xi[i]
        before, drop = found, math.log(now / down) if down else None
    return x


def dpmpp_sde(x, levels, xi, eta=1.0, s_noise=1.0, r=0.5):
    for i, (now, then) in pairs(levels):
        if then == 0:
            return answer(x, now)
        middle = now * (then / now) ** r
        one, two = xi[2 * i], xi[2 * i + 1]
        whole = (math.sqrt(now - middle) * one + math.sqrt(middle - then) * two) / math.sqrt(now - then)  # of a Brownian motion over sigma
        start, (down, up) = answer(x, now), ancestral(now, middle, eta)
        between = down / now * x + (1 - down / now) * start + s_noise * up * one
        mixed = (1 - 1 / (2 * r)) * start + answer(between, middle) / (2 * r)
        down, up = ancestral(now, then, eta)
        x = down / now * x + (1 - down / now) * mixed + s_noise * up * whole
    return x


def dpmpp_2m_sde(x, levels, xi, eta=1.0, s_noise=1.0, form="midpoint"):
    before = h_before = None
    for i, (now, then) in pairs(levels):
        found = answer(x, now)
        if then == 0:
            return found
        h = math.log(now / then)
        z = h * (1 + eta)
        x = then / now * math.exp(-eta * h) * x - math.expm1(-z) * found
        if before is not None:
            weight = -math.expm1(-z) / 2 if form == "midpoint" else math.expm1(-z) / z + 1
            x = x + weight * h / h_before * (found - before)
        x = x + s_noise * then * math.sqrt(-math.expm1(-2 * eta * h)) * xi[i]
        before, h_before = found, h
    return x


def dpmpp_3m_sde(x, levels, xi, eta=1.0, s_noise=1.0):
    past = []
    for i, (now, then) in pairs(levels):
        found = answer(x, now)
        if then == 0:
            return found
        h = math.log(now / then)
        z = h * (eta + 1)
        x = math.exp(-z) * x - math.expm1(-z) * found
        phi_2 = math.expm1(-z) / z + 1
        if len(past) > 1:
            (one, h1), (two, h2) = past[:2]
            r0, r1 = h1 / h, h2 / h
            d10, d11 = (found - one) / r0, (one - two) / r1
            x = x + phi_2 * (d10 + (d10 - d11) * r0 / (r0 + r1)) - (phi_2 / z - 0.5) * (d10 - d11) / (r0 + r1)
        elif past:
            x = x + phi_2 * (found - past[0][0]) * h / past[0][1]
        x = x + s_noise * then * math.sqrt(-math.expm1(-2 * h * eta)) * xi[i]
        past = [(found, h), *past]
    return x


def heun_churn(x, levels, xi, s_churn=5.0, s_tmin=0.2, s_tmax=4.0, s_noise=1.003):
    for i, (now, then) in pairs(levels):
        gamma = min(s_churn / (len(levels) - 1), math.sqrt(2) - 1) if s_tmin <= now <= s_tmax else 0.0
        up = now * (1 + gamma)
        x = x + s_noise * math.sqrt(up**2 - now**2) * xi[max(2 * i - 1, 0)]
        d = slope(x, up)
        x_2 = x + (then - up) * d
        x = x_2 if then == 0 else x + (then - up) * (d + slope(x_2, then)) / 2
    return x


def churned(now, count, s_churn, s_tmin, s_tmax):
    return now * (1 + (min(s_churn / count, math.sqrt(2) - 1) if s_tmin <= now <= s_tmax else 0.0))


def euler_churn(x, levels, xi, s_churn=5.0, s_tmin=0.2, s_tmax=4.0, s_noise=1.003):
    for i, (now, then) in pairs(levels):
        up = churned(now, len(levels) - 1, s_churn, s_tmin, s_tmax)
        x = x + s_noise * math.sqrt(up**2 - now**2) * xi[i - 1]
        x = x + (then - up) * slope(x, up)
    return x


def dpm_2_churn(x, levels, xi, s_churn=5.0, s_tmin=0.2, s_tmax=4.0, s_noise=1.003):
    for i, (now, then) in pairs(levels):
        up = churned(now, len(levels) - 1, s_churn, s_tmin, s_tmax)
        x = x + s_noise * math.sqrt(up**2 - now**2) * xi[2 * i - 1]
        if then == 0:
            return answer(x, up)
        middle = math.sqrt(up * then)
        x = x + (then - up) * slope(x + (middle - up) * slope(x, up), middle)
    return x


def restart(x, levels, xi, count=3, times=2, low=0.3, high=2.0, s_noise=1.1):
    """A1111's, over the list of its steps."""
    lowest = min(range(1, len(levels) - 1), key=lambda k: abs(levels[k] - low))
    again = karras_levels(count, min(levels[:lowest], key=lambda level: abs(level - high)), levels[lowest]).tolist()
    listed = list(zip(levels[:-1], levels[1:], strict=True))
    listed[lowest:lowest] = times * list(zip(again[:-1], again[1:], strict=True))
    last = levels[0]
    for i, (now, then) in enumerate(listed):
        if last < now:
            x = x + s_noise * math.sqrt(now**2 - last**2) * xi[2 * i - 1]
        d = slope(x, now)
        ahead = x + (then - now) * d
        x = ahead if then == 0 else x + (then - now) * (d + slope(ahead, then)) / 2
        last = then
    return x


def seeds_2(x, levels, xi, eta=1.0, s_noise=1.0, r=0.5, form="phi1"):
    for i, (now, then) in pairs(levels):
        found = answer(x, now)
        if then == 0:
            return found
        h = math.log(now / then)
        z, middle, rest = h * (eta + 1), now * math.exp(-r * h), (r - 1) * h * eta
        first = math.sqrt(-math.expm1(-2 * r * h * eta)) * xi[2 * i]
        second = answer(middle / now * math.exp(-r * h * eta) * x - math.expm1(-r * z) * found + s_noise * middle * first, middle)
        if form == "phi1":
            drift = -math.expm1(-z) * (found + (second - found) / (2 * r))
        else:
            b2 = (math.expm1(-z) + z) / (-z) / r
            drift = -((math.expm1(-z) - b2) * found + b2 * second)
        both = math.exp(rest) * first + math.sqrt(-math.expm1(2 * rest)) * xi[2 * i + 1]
        x = then / now * math.exp(-h * eta) * x + drift + s_noise * then * both
    return x


def seeds_3(x, levels, xi, eta=1.0, s_noise=1.0, r1=1 / 3, r2=2 / 3):
    def phi_2(u):
        return (math.expm1(u) - u) / u

    for i, (now, then) in pairs(levels):
        d1 = answer(x, now)
        if then == 0:
            return d1
        h = math.log(now / then)
        z, one, two = h * (eta + 1), now * math.exp(-r1 * h), now * math.exp(-r2 * h)
        w = math.sqrt(-math.expm1(-2 * r1 * h * eta)) * xi[3 * i]
        d2 = answer(one / now * math.exp(-r1 * h * eta) * x - math.expm1(-r1 * z) * d1 + s_noise * one * w, one)
        a32 = r2 / r1 * phi_2(-r2 * z)
        w = math.exp((r1 - r2) * h * eta) * w + math.sqrt(-math.expm1(2 * (r1 - r2) * h * eta)) * xi[3 * i + 1]
        third = two / now * math.exp(-r2 * h * eta) * x - (math.expm1(-r2 * z) - a32) * d1 - a32 * d2 + s_noise * two * w
        d3, b3 = answer(third, two), phi_2(-z) / r2
        w = math.exp((r2 - 1) * h * eta) * w + math.sqrt(-math.expm1(2 * (r2 - 1) * h * eta)) * xi[3 * i + 2]
        x = then / now * math.exp(-h * eta) * x - (math.expm1(-z) - b3) * d1 - b3 * d3 + s_noise * then * w
    return x


def er_sde(x, levels, xi, s_noise=1.0):
    def scale(u):
        return u * (np.exp(u**0.3) + 10)

    found, slopes = [], []
    for i, (now, then) in pairs(levels):
        found.append(answer(x, now))
        if then == 0:
            return found[-1]
        r = scale(then) / scale(now)
        kept = x
        x = r * x + (1 - r) * found[-1]
        at, step = then + np.arange(200) * (now - then) / 200, (now - then) / 200
        if i > 0:
            slopes.append((found[-1] - found[-2]) / (now - levels[i - 1]))
            x = x + (then - now + scale(then) * float((1 / scale(at)).sum() * step)) * slopes[-1]
        if i > 1:
            second = (slopes[-1] - slopes[-2]) / ((now - levels[i - 2]) / 2)
            x = x + ((then - now) ** 2 / 2 + scale(then) * float(((at - now) / scale(at)).sum() * step)) * second
        x = x + s_noise * math.sqrt(then**2 - (now * r) ** 2) * xi[i] + 0 * kept
    return x


def sa_solver(x, levels, xi, p=2, c=2, tau=1.0, lowers=True, again=False):
    """By numerical integrals of the Lagrange polynomials under the kernel; the corrector steps from the last corrected state.

    With ``again`` corrected states are evaluated, too (PECE).
    """
    xi = xi[::2] if again else xi
    theta, n, found, corrected = 1 + tau**2, len(levels) - 1, [], [x]
    lam = [-math.log(level) if level else math.inf for level in levels]
    places, weights = np.polynomial.legendre.leggauss(40)

    def integral(s, used):  # over the step from node s, by the answers at these nodes
        if len(used) == 1:
            return -math.expm1(-theta * (lam[s + 1] - lam[s])) * found[used[0]]
        at = lam[s] + (places + 1) / 2 * (lam[s + 1] - lam[s])
        kernel = theta * np.exp(-theta * (lam[s + 1] - at)) * weights * (lam[s + 1] - lam[s]) / 2
        basis = [np.prod([(at - lam[m]) / (lam[j] - lam[m]) for m in used if m != j], 0) for j in used]
        return sum(float((kernel * one).sum()) * found[j] for one, j in zip(basis, used, strict=True))

    def step(s, x, used):
        h = lam[s + 1] - lam[s]
        std = levels[s + 1] * math.sqrt(-math.expm1(-2 * tau**2 * h)) if tau else 0.0
        kept = levels[s + 1] / levels[s] * math.exp(-(tau**2) * h) if levels[s + 1] else 0.0
        return kept * x + integral(s, used) + std * xi[s]

    for i in range(n):
        found.append(answer(x, levels[i]))
        if i:
            count = min(c, i + 1, n - i + 2) if lowers else min(c, i + 1)
            corrected.append(step(i - 1, corrected[-1], list(range(i, i - count, -1))) if c else x)
            found[i] = answer(corrected[-1], levels[i]) if again else found[i]
        count = 1 if levels[i + 1] == 0 else min(p, i + 1, n - i)
        x = step(i, corrected[-1], list(range(i, i - count, -1)))
    return x


def lcm(x, levels, xi):
    for i, (now, then) in pairs(levels):
        x = answer(x, now) + then * xi[i]
    return x


def ddpm(x, levels, xi, large=False):
    """In the variance-preserving law, by alphas_cumprod."""
    for i, (now, then) in pairs(levels):
        bar, bar_then = 1 / (1 + now**2), 1 / (1 + then**2)
        alpha, y = bar / bar_then, x * math.sqrt(bar)
        y = (y - (1 - alpha) / math.sqrt(1 - bar) * slope(x, now)) / math.sqrt(alpha)
        variance = (1 - alpha) * (1 if large and then else (1 - bar_then) / (1 - bar))
        x = (y + math.sqrt(variance) * xi[i]) / math.sqrt(bar_then)
    return x


THEIRS = {
    "Euler a": euler_ancestral,
    "Euler a:eta=0.6:s_noise=1.1": lambda *a: euler_ancestral(*a, eta=0.6, s_noise=1.1),
    "DPM2 a": dpm_2_ancestral,
    "DPM2 a:eta=0.6:s_noise=1.1": lambda *a: dpm_2_ancestral(*a, eta=0.6, s_noise=1.1),
    "DPM++ 2S a": dpmpp_2s_ancestral,
    "DPM++ 2S a:eta=0.6:s_noise=1.1": lambda *a: dpmpp_2s_ancestral(*a, eta=0.6, s_noise=1.1),
    "res_multistep_ancestral": res_multistep_ancestral,
    "res_multistep_ancestral:eta=0.6:s_noise=1.1": lambda *a: res_multistep_ancestral(*a, eta=0.6, s_noise=1.1),
    "DPM++ SDE": dpmpp_sde,
    "DPM++ SDE:eta=0.6:s_noise=1.1:r=0.3": lambda *a: dpmpp_sde(*a, eta=0.6, s_noise=1.1, r=0.3),
    "DPM++ 2M SDE:lower_order_below=0": dpmpp_2m_sde,
    "DPM++ 2M SDE:lower_order_below=0:eta=0.6:s_noise=1.1": lambda *a: dpmpp_2m_sde(*a, eta=0.6, s_noise=1.1),
    "DPM++ 2M SDE Heun:lower_order_below=0:eta=0.6": lambda *a: dpmpp_2m_sde(*a, eta=0.6, form="heun"),
    "DPM++ 3M SDE": dpmpp_3m_sde,
    "DPM++ 3M SDE:eta=0.6:s_noise=1.1": lambda *a: dpmpp_3m_sde(*a, eta=0.6, s_noise=1.1),
    "heun-churn:s_churn=5:s_tmin=0.2:s_tmax=4": heun_churn,
    "heun-churn:s_churn=2:s_tmin=0:s_tmax=8:s_noise=1": lambda *a: heun_churn(*a, s_churn=2.0, s_tmin=0.0, s_tmax=8.0, s_noise=1.0),
    "euler-churn:s_churn=5:s_tmin=0.2:s_tmax=4": euler_churn,
    "sample_euler": lambda *a: euler_churn(*a, s_churn=0.0),
    "dpm2-churn:s_churn=5:s_tmin=0.2:s_tmax=4": dpm_2_churn,
    "restart:restart_steps=3:restarts=2:restart_min=0.3:s_noise=1.1": restart,
    "sa-solver-pece": lambda *a: sa_solver(*a, again=True),
    "sa-solver-pece:predictor=3:corrector=4:tau=0.7": lambda *a: sa_solver(*a, p=3, c=4, tau=0.7, again=True),
    "seeds_2": seeds_2,
    "seeds_2:eta=0.6:s_noise=1.1:c2=0.3": lambda *a: seeds_2(*a, eta=0.6, s_noise=1.1, r=0.3),
    "seeds_2:form=phi2": lambda *a: seeds_2(*a, form="phi2"),
    "exp_heun_2_x0_sde": lambda *a: seeds_2(*a, r=1.0, form="phi2"),
    "seeds_3": seeds_3,
    "seeds_3:eta=0.6:s_noise=1.1:c2=0.4:c3=0.9": lambda *a: seeds_3(*a, eta=0.6, s_noise=1.1, r1=0.4, r2=0.9),
    "er_sde": er_sde,
    "sa-solver": sa_solver,
    "sa-solver:predictor=3:corrector=4:tau=0.7": lambda *a: sa_solver(*a, p=3, c=4, tau=0.7),
    "sa-solver:predictor=3:corrector=0": lambda *a: sa_solver(*a, p=3, c=0),
    "sa-solver:predictor=2:corrector=3:tau=0": lambda *a: sa_solver(*a, p=2, c=3, tau=0.0),
    "LCM": lcm,
    "DDPM": ddpm,
    "DDPM:variance=large": lambda *a: ddpm(*a, large=True),
}


def draws(count):
    return [noise(count, 4, 2)[j] for j in range(count)]


def ours(name, x, levels, law):
    solver, schedule = make_solver(name), law(t_min=levels[-1], t_max=levels[0])
    tableau = tabulate(solver, solver.nodes(TimeGrid(torch.tensor(levels, dtype=torch.float64)), schedule))
    xi = draws(tableau.evaluations)
    return list(steps(mixture(schedule), tableau, x, noise=lambda i: xi[i]))[-1].x_next, xi


@pytest.mark.parametrize("end", LEVELS)
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.every(2)
def test_a_sampler_is_its_recurrence(name, end):
    x = 10 * noise(4, 2)
    made, xi = ours(name, x, LEVELS[end], VarianceExploding)
    torch.testing.assert_close(made, THEIRS[name](x, LEVELS[end], xi), rtol=SAME, atol=SAME)


# -- ComfyUI's ancestral samplers for flows ------------------------------------------------------------------------------


def flow_ancestral(x, levels, xi, second, eta=1.0, s_noise=1.0):
    for i, (now, then) in pairs(levels):
        found = answer(x, now, RectifiedFlow)
        if then == 0:
            return found
        down = then * (1 + (then / now - 1) * eta)
        again = math.sqrt(then**2 - (down * (1 - then) / (1 - down)) ** 2) if eta else 0.0
        x = second(x, found, now, down)
        x = (1 - then) / (1 - down) * x + s_noise * again * xi[i if second is flow_euler else 2 * i + 1]
    return x


def flow_euler(x, found, now, down):
    return down / now * x + (1 - down / now) * found


def flow_dpm_2(x, found, now, down):
    middle = math.sqrt(now * down)
    between = x + (x - found) / now * (middle - now)
    return x + slope(between, middle, RectifiedFlow) * (down - now)


def flow_2s(x, found, now, down):
    if now == 1:
        middle = 1 / (1 + min((1 - down) / down / 2, FIRST))
    else:
        middle = 1 / (1 + math.exp((math.log((1 - now) / now) + math.log((1 - down) / down)) / 2))
    between = flow_euler(x, found, now, middle)
    return flow_euler(x, answer(between, middle, RectifiedFlow), now, down)


FIRST = 0.1 / 0.9  # where our second evaluation lies at most in a step from pure noise to 0.9; ComfyUI's lies at sigma = 0.9999
RF = {"euler-ancestral": flow_euler, "dpm2-ancestral": flow_dpm_2, "dpm-solver-pp-2s-ancestral": flow_2s}


@pytest.mark.parametrize("eta", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("end", FLOW)
@pytest.mark.parametrize("name", RF)
@pytest.mark.every(2)
def test_an_ancestral_sampler_of_a_flow_is_its_recurrence(name, end, eta):
    x = noise(4, 2)
    made, xi = ours(f"{name}:law=flow:eta={eta}:s_noise=1.1", x, FLOW[end], RectifiedFlow)
    torch.testing.assert_close(made, flow_ancestral(x, FLOW[end], xi, RF[name], eta, 1.1), rtol=SAME, atol=SAME)


# -- limits --------------------------------------------------------------------------------------------------------------

LIMITS = {
    "euler ancestral is ddim of the same eta": (EulerAncestral(eta=0.4), DDIM(eta=0.4)),
    "ddpm is ddim of eta 1": (DDPM(), DDIM(eta=1.0)),
    "euler ancestral without noise is ddim": (EulerAncestral(eta=0.0), DDIM()),
    "res ancestral without noise is res multistep": (RESAncestral(eta=0.0), ExponentialAB(steps=2)),
    "... of a flow too": (EulerAncestral(eta=0.0, law="flow"), DDIM()),
    "dpm2 ancestral without noise is dpm-solver-2s": (DPM2Ancestral(eta=0.0), DPMSolver2S()),
    "2s ancestral without noise is dpm++ sde without": (DPMSolverPP2SAncestral(eta=0.0), DPMSolverPPSDE(eta=0.0)),
    "dpm++ sde without noise is seeds-2 without": (DPMSolverPPSDE(eta=0.0), SEEDS2(eta=0.0)),
    "2m sde without noise is 2m": (SDEDPMSolverPP2M(eta=0.0), DPMSolverPP(steps=2)),
    "3m sde without noise is 3m": (SDEDPMSolverPP3M(eta=0.0), DPMSolverPP(steps=3, form="taylor", lower_order_below=NEVER)),
    "3m sde corrected is uncorrected sa": (
        SDEDPMSolverPP3M(third_order="corrected"),
        SASolver(predictor=3, corrector=0, lower_order_below=NEVER),
    ),
    "heun without churn is heun": (HeunChurn(s_churn=0.0), Heun()),
    "euler without churn is ddim": (EulerChurn(s_churn=0.0), DDIM()),
    "dpm2 without churn is dpm-solver-2s": (DPM2Churn(s_churn=0.0), DPMSolver2S()),
    "seeds-2 without noise is res-2s": (SEEDS2(eta=0.0, form="phi2"), RES2S()),
    "seeds-3 without noise is res-3s": (SEEDS3(eta=0.0), RES3S(c2=1 / 3, c3=2 / 3)),
    "er-sde-1 of the sde is ddim of eta 1": (ERSDE(steps=1, scale="sde"), DDIM(eta=1.0)),
    "er-sde-1 of the ode is ddim": (ERSDE(steps=1, scale="sde", eta=0.0), DDIM()),
    "sa-solver of 1 step is ddim of eta 1": (SASolver(predictor=1, corrector=0), DDIM(eta=1.0)),
    "sa-solver without noise is 2m": (SASolver(2, 0, tau=0.0, lower_order_below=15), DPMSolverPP(steps=2, form="taylor")),
    "simple sa-solver without noise": (SASolver(2, 0, tau_max=0.0, form="simple"), SASolver(2, 0, tau=0.0, form="simple")),
}
GRIDS = {
    "edm": (VarianceExploding(), lambda law: TimeGrid.karras(law, 7).to_clean(law)),
    "flow": (RectifiedFlow(shift=3.0), lambda law: TimeGrid.angle(law, 6)),
    "discrete": (DiscreteVP.linear(), lambda law: TimeGrid.linspace(law, 5)),
}


@pytest.mark.parametrize("pair", LIMITS)
def test_limits(pair):
    for law, make in GRIDS.values():
        one, two = (tabulate(solver, solver.nodes(make(law), law)) for solver in LIMITS[pair])
        assert one.stochastic == two.stochastic
        x = one.nodes.sigma[0] * noise(2, 2)
        torch.testing.assert_close(*(sample(mixture(law), made, x, seeds=[1, 2]) for made in (one, two)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in STOCHASTIC if hasattr(STOCHASTIC[name], "s_noise")])
def test_s_noise_is_a_factor_of_the_noise(name):
    law, make = GRIDS["edm"]
    plain, more = (tabulate(one, one.nodes(make(law), law)) for one in (STOCHASTIC[name], replace(STOCHASTIC[name], s_noise=2.0)))
    torch.testing.assert_close(more.noise * STOCHASTIC[name].s_noise, 2 * plain.noise, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("euler-ancestral:eta=1.5", "between 0 .deterministic. and 1"),
        ("dpm2-ancestral:law=edm", "law eps or flow"),
        ("dpm-solver-pp-sde:r=1", "r between 0 and 1"),
        ("dpm-solver-pp-sde:correlation=none", "correlation level or exact"),
        ("sde-dpm-solver-pp-2m:s_noise=-1", "s_noise of at least 0"),
        ("sde-dpm-solver-pp-3m:eta=-1", "eta of at least 0"),
        ("sde-dpm-solver-pp-3m:third_order=best", "published or corrected"),
        ("heun-churn:s_churn=-1", "s_churn of at least 0"),
        ("heun-churn:s_tmin=2:s_tmax=1", "s_tmin of at least 0 up to s_tmax"),
        ("euler-churn:s_churn=-1", "s_churn of at least 0"),
        ("restart:restart_steps=0", "restart_steps and restarts of at least 1"),
        ("restart:restart_min=3", "up to a larger restart_max"),
        ("sa-solver-pece:corrector=0", "evaluates corrected states"),
        ("heun:law=edm", "law eps or flow"),
        ("er-sde-3:eta=0.5", "has no eta"),
        ("er-sde-3:steps=4", "steps 1 to 3"),
        ("seeds-2:c2=0", "c2 above 0 to 1"),
        ("seeds-2:form=phi3", "form phi1 or phi2"),
        ("seeds-3:c2=0.7", "0 < c2 < c3 <= 1"),
        ("sa-solver:predictor=5", "predictor 1 to 4"),
        ("sa-solver:tau=-1", "tau of at least 0"),
        ("lcm:s_noise=-0.1", "s_noise of at least 0"),
        ("ddpm:variance=learned", "variance small or large"),
        ("sa-solver:churn=1", "has no option churn"),
    ],
)
def test_an_option_that_means_nothing_is_refused(spec, says):
    with pytest.raises(SolverError, match=says):
        make_solver(spec)


# -- laws and paths --------------------------------------------------------------------------------------------------------

MEAN, STD = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.6], dtype=torch.float64)
HIGH, LOW = 3.0, 0.1
WIDTH = 64  # numbers in a sample, all with the same law


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.every(4)
def test_the_variance_is_exact_at_many_steps(name):
    solver, law = STOCHASTIC[name], VPLinear()
    nodes = solver.nodes(TimeGrid.from_sigmas(law, karras_levels(128, HIGH, LOW)), law)
    mean, std = nodes.alpha * MEAN, torch.sqrt((nodes.alpha * STD) ** 2 + nodes.sigma**2)
    end_mean, end_std = moments(tabulate(solver, nodes), GaussianDenoiser(law, MEAN, STD), mean[:1], std[:1])
    torch.testing.assert_close(end_mean, mean[-1:], rtol=1e-9, atol=0)
    error = abs(float(end_std / std[-1]) - 1)
    assert error < 0.02 if name != "lcm" else 0.2 < error < 0.4


@functools.cache
def path():
    return BrownianPath(range(8), (WIDTH,))


def driven(solver, count, denoiser, x):
    law = VarianceExploding(LOW, HIGH)
    tableau = tabulate(solver, solver.nodes(TimeGrid(karras_levels(count, HIGH, LOW)), law))
    return list(steps(denoiser, tableau, x, noise=lambda i: path().of(tableau, i)))[-1].x_next


@functools.cache
def exact_end():
    """The start, and the SDE's solution for Gaussian data: its posterior mean is ``M_s + int dB/(1/s^2 + q)``, a Wiener integral."""
    start, levels = HIGH * noise(8, WIDTH) + MEAN, np.linspace(-math.log(HIGH), -math.log(LOW), 513)
    q, angles = np.exp(2 * levels), np.arctan(np.exp(-levels))
    precision = 1 / float(STD) ** 2 + q
    m = (MEAN / STD**2 + q[0] * start) / precision[0]
    for k in range(512):
        m = m + math.sqrt(q[k + 1] - q[k]) * path().between(angles[k], angles[k + 1]) * 2 / (precision[k] + precision[k + 1])
    return start, (precision[-1] * m - MEAN / STD**2) / q[-1]


ETA_1 = [
    "ddim-eta-1",
    "dpm2-ancestral",
    "dpm-solver-pp-2s-ancestral",
    "dpm-solver-pp-sde",
    "dpm-solver-pp-sde-exact",
    "sde-dpm-solver-pp-2m",
]
ETA_1 += ["sde-dpm-solver-pp-3m", "seeds-2", "seeds-3", "exp-heun-sde", "er-sde-3-sde", "sa-solver", "euler-ancestral", "ddpm"]


@pytest.mark.parametrize("name", ETA_1)
@pytest.mark.every(4)
def test_strong_order_on_an_ornstein_uhlenbeck_process(name, record_property):
    start, end = exact_end()
    denoiser = GaussianDenoiser(VarianceExploding(LOW, HIGH), MEAN, STD)
    errors = [float((driven(STOCHASTIC[name], n, denoiser, start) - end).square().mean().sqrt()) for n in (16, 64)]
    measured = math.log(errors[0] / errors[1]) / math.log(4)
    record_property("slope", measured)
    assert measured > 0.8, errors


SELF = {
    "ddim-eta-0.5": 0.8,
    "er-sde-1": 0.8,
    "er-sde-3": 0.8,
    "dpm-solver-pp-sde-third": 0.8,
    "seeds-2-phi2": 0.8,
    "sa-solver-3-simple": 0.8,
}
SELF |= {"euler-ancestral-0.5-flow": 0.8, "dpm2-ancestral-0.5": 0.8}


@pytest.mark.slow
@pytest.mark.parametrize("name", SELF)
def test_strong_order_on_a_mixture(name, record_property):
    """Against the same solver on 384 steps of the same path."""
    start, denoiser = HIGH * noise(8, WIDTH).reshape(-1, WIDTH), mixture(VarianceExploding(LOW, HIGH))

    def run(count):
        law = VarianceExploding(LOW, HIGH)
        tableau = tabulate(STOCHASTIC[name], STOCHASTIC[name].nodes(TimeGrid(karras_levels(count, HIGH, LOW)), law))
        draw = lambda i: path().of(tableau, i).reshape(-1, 2)  # noqa: E731
        return list(steps(denoiser, tableau, start.reshape(-1, 2), noise=draw))[-1].x_next

    fine = run(384)
    errors = [float((run(n) - fine).square().mean().sqrt()) for n in (16, 64)]
    measured = math.log(errors[0] / errors[1]) / math.log(4)
    record_property("slope", measured)
    assert measured > SELF[name], errors


def test_lcm_and_churn_have_a_path_too():
    law = VarianceExploding(LOW, HIGH)
    for solver in (LCM(), HeunChurn(s_churn=2.0, s_tmax=1.5)):
        tableau = tabulate(solver, solver.nodes(TimeGrid(karras_levels(16, HIGH, LOW)), law))
        drawn = torch.stack([path().of(tableau, i).flatten() for i in range(tableau.evaluations) if tableau.noise[i]])
        torch.testing.assert_close(drawn @ drawn.T / 512, torch.eye(len(drawn), dtype=torch.float64), rtol=0, atol=0.35)


def test_restart_goes_up_once_more_for_each_restart():
    for law, make in GRIDS.values():
        grid, solver = make(law), Restart(restart_steps=3, restarts=2)
        nodes = solver.nodes(grid, law)
        up = (nodes.lam[1:] < nodes.lam[:-1]).nonzero().flatten()
        assert len(up) == 2 and bool(torch.isin(nodes.t[up], grid.t[1:-1]).all())
        assert sum(solver.evaluations_on(grid, law)) == sum(Heun().evaluations_on(grid, law)) + 12 == nodes.evaluations


def test_nodes_of_another_are_refused_by_churn():
    law = VarianceExploding()
    with pytest.raises(SolverError, match="use its own nodes"):
        tabulate(EulerChurn(), Heun().nodes(TimeGrid.karras(law, 3), law))


def test_churn_raises_no_level_above_the_models_first():
    law = DiscreteVP.linear()
    nodes = HeunChurn(s_churn=400.0, s_tmax=math.inf).nodes(TimeGrid.linspace(law, 20), law)
    assert float(nodes.t.max()) == law.t_max and bool((nodes.t[2::2] >= nodes.t[1:-1:2]).all())
