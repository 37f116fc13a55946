"""The noise levels of other programs: each curve against its published definition, written here in float64, on every kind of law."""

import logging
import math

import numpy as np
import pytest
import scipy.stats
import torch

from fewstep import (
    DiscreteVP,
    FewstepError,
    GridError,
    Model,
    NoiseSchedule,
    RectifiedFlow,
    VarianceExploding,
    VPCosine,
    VPLinear,
    make_grid,
    sample,
)
from fewstep.core import curves
from fewstep.core.beta_distribution import beta_quantiles
from fewstep.core.curves import AYS_SIGMAS, AYS_TIMES, CURVES, linear_quadratic_sigmas

SAME = 1e-8  # relative: levels went through lam and back
STEPS = (1, 2, 5, 10, 20)


class Host:
    """What a scheduler of ComfyUI or A1111 sees of a model: a table of sigmas, and the maps between sigmas and timesteps."""

    def __init__(self, law, sigmas, timestep, sigma):
        self.law, self.sigmas, self.timestep, self.sigma = law, np.asarray(sigmas), timestep, sigma
        self.low, self.high = self.sigmas[0], self.sigmas[-1]

    def levels(self, grid):
        """Return a grid's levels as this host counts them."""
        alpha, sigma = self.law.alpha(grid.t), self.law.sigma(grid.t)
        return (sigma if isinstance(self.law, RectifiedFlow) else sigma / alpha).numpy()


def discrete(law):
    """ModelSamplingDiscrete of comfy/model_sampling.py: timesteps are places in the table, between them log sigma is linear."""
    cumulative = np.cos(law.theta.numpy()[1:]) ** 2
    logs = np.log((1 - cumulative) / cumulative) / 2
    places = np.arange(len(logs))
    return Host(law, np.exp(logs), lambda s: np.interp(np.log(s), logs, places), lambda t: np.exp(np.interp(t, places, logs)))


def exploding(low, high):
    """ModelSamplingContinuousEDM: 1000 sigmas in equal ratios, timesteps of log(sigma) / 4."""
    sigmas = np.exp(np.linspace(math.log(low), math.log(high), 1000))
    return Host(VarianceExploding(low, high), sigmas, lambda s: 0.25 * np.log(s), lambda t: np.exp(4 * t))


def flow(shift):
    """ModelSamplingDiscreteFlow: the timestep of a sigma is 1000 sigma, the sigma of a timestep its shift."""

    def shifted(u):
        return shift * u / (1 + (shift - 1) * u)

    return Host(RectifiedFlow(shift), shifted(np.arange(1, 1001) / 1000), lambda s: 1000 * s, lambda t: shifted(t / 1000))


def continuous():
    """The continuous VP law of arXiv 2011.13456: timesteps are its times, 1000 of them from 0.001 to 1."""

    def sigma(t):
        return np.sqrt(np.expm1(9.95 * t**2 + 0.1 * t))

    t = np.linspace(1e-3, 1, 1000)
    return Host(VPLinear(), sigma(t), lambda s: np.interp(np.log(s), np.log(sigma(t)), t), sigma)


HOSTS = {
    "sd": discrete(DiscreteVP.scaled_linear()),
    "ddpm": discrete(DiscreteVP.linear(400)),
    "edm": exploding(0.002, 80.0),
    "vp": continuous(),
    "flow": flow(1.0),
    "flow-3": flow(3.0),
}


def same(host, name, steps, expected):
    grid = make_grid(name, host.law, steps)
    assert grid.steps == steps and len(expected) == steps + 1
    np.testing.assert_allclose(host.levels(grid), expected, rtol=SAME, atol=1e-12)


# -- the definitions, as published ----------------------------------------------------------------------------------------------------


def zero(levels):
    return np.append(levels, 0.0)


def karras(n, low, high, rho=7.0):
    """crowsonkb/k-diffusion, k_diffusion/sampling.py, get_sigmas_karras."""
    return (high ** (1 / rho) + np.linspace(0, 1, n) * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def exponential(n, low, high):
    """The same file, get_sigmas_exponential."""
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def polyexponential(n, low, high, rho):
    """The same file, get_sigmas_polyexponential."""
    return np.exp(np.linspace(1, 0, n) ** rho * (math.log(high) - math.log(low)) + math.log(low))


def kl_optimal(n, low, high):
    """comfyanonymous/ComfyUI, comfy/samplers.py, kl_optimal_scheduler."""
    share = np.arange(n) / max(n - 1, 1)
    return np.tan(share * math.atan(low) + (1 - share) * math.atan(high))


def laplace(n, low, high, mu=0.0, beta=0.5):
    """ComfyUI, comfy/k_diffusion/sampling.py, get_sigmas_laplace."""
    x = np.linspace(0, 1, n)
    return np.clip(np.exp(mu - beta * np.sign(0.5 - x) * np.log(1 - 2 * np.abs(0.5 - x) + 1e-5)), low, high)


def linear_quadratic(n, threshold, linear):
    """genmoai/models, src/mochi_preview/infer.py, linear_quadratic_schedule: a + b i + c i^2 behind a linear part."""
    if n == 1:
        return np.array([1.0, 0.0])
    quadratic = n - linear
    rest = linear - threshold * n
    c = rest / (linear * quadratic**2)
    b = threshold / linear - 2 * rest / quadratic**2
    i = np.arange(n)
    return zero(1 - np.where(i < linear, i * threshold / linear, c * i**2 + b * i + c * linear**2))


def bong_tangent(steps):
    """ClownsharkBatwing/RES4LYF, sigmas.py, bong_tangent_scheduler at its defaults."""
    n = steps + 2
    half, pivot, slope = int((n * 0.6 + n * 0.6) / 2), int(n * 0.6), 0.2 / (n / 40)

    def stage(count, place, start, end):
        y = (2 / math.pi * np.arctan(-slope * (np.arange(count) - place)) + 1) / 2
        return (y - y[-1]) / (y[0] - y[-1]) * (start - end) + end

    return np.concatenate([stage(half, pivot, 1.0, 0.5)[:-1], stage(n - half, pivot - half, 0.5, 0.0)])


# -- curves of the noise level --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.every(4, 2)
def test_curves_between_two_levels(host, steps):
    host = HOSTS[host]
    low, high = host.low, host.high
    rules = {
        "Karras": lambda n: karras(n, low, high),
        "Karras:rho=3": lambda n: karras(n, low, high, 3.0),
        "exponential": lambda n: exponential(n, low, high),
        "polyexponential": lambda n: polyexponential(n, low, high, 1.0),
        "polyexponential:rho=2": lambda n: polyexponential(n, low, high, 2.0),
        "polyexponential:rho=0.7": lambda n: polyexponential(n, low, high, 0.7),
        "kl_optimal": lambda n: kl_optimal(n, low, high),
    }
    for name, rule in rules.items():
        same(host, f"{name}:end=append", steps, zero(rule(steps)))
        same(host, f"{name}:end=clean", steps, zero(rule(steps + 1)[:-1]))
        same(host, f"{name}:end=sigma_min", steps, rule(steps + 1))
        same(host, name, steps, zero(rule(steps)))  # append is what the field does


@pytest.mark.parametrize("host", ["sd", "ddpm", "edm", "vp"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.every(3, 2)
def test_laplace(host, steps):
    host = HOSTS[host]
    same(host, "laplace", steps, laplace(steps + 1, host.low, host.high))
    same(host, "laplace:end=append", steps, zero(laplace(steps, host.low, host.high)))
    same(host, "laplace:mu=-0.5:beta=0.3", steps, laplace(steps + 1, host.low, host.high, -0.5, 0.3))


def test_laplace_on_a_flow_needs_a_mean_below_its_range():
    same(HOSTS["flow"], "laplace:mu=-1.5:beta=0.2", 4, laplace(5, 0.001, 1.0, -1.5, 0.2))
    with pytest.raises(GridError, match="5 steps of grid 'laplace' have noise levels that do not decrease: use fewer steps"):
        make_grid("laplace", RectifiedFlow(), 5)


@pytest.mark.parametrize("steps", STEPS)
def test_vp_is_the_continuous_law_of_its_own(steps):
    t = np.linspace(1, 1e-3, steps)
    host = HOSTS["vp"]
    same(host, "vp", steps, zero(np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)))  # get_sigmas_vp
    t = np.linspace(1, 1e-2, steps)
    same(host, "vp:beta_d=9:beta_min=0.2:eps_s=0.01", steps, zero(np.sqrt(np.exp(9 * t**2 / 2 + 0.2 * t) - 1)))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.every(4, 2)
def test_linear_quadratic(host, steps):
    host = HOSTS[host]
    same(host, "linear_quadratic", steps, host.high * linear_quadratic(steps, 0.025, steps // 2))
    if steps > 2:
        same(host, "linear_quadratic:threshold_noise=0.1:linear_steps=2", steps, host.high * linear_quadratic(steps, 0.1, 2))


def test_linear_quadratic_is_mochis():
    """The first numbers of its 64 steps, by hand: 0.025 / 32 a step."""
    levels = linear_quadratic_sigmas(64)
    assert levels[:3].tolist() == pytest.approx([1, 1 - 0.025 / 32, 1 - 0.05 / 32], abs=1e-15)
    assert float(levels[32]) == pytest.approx(0.975)


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 50])
def test_bong_tangent(steps):
    same(HOSTS["flow"], "bong_tangent", steps, bong_tangent(steps))
    same(HOSTS["flow-3"], "bong_tangent", steps, bong_tangent(steps))
    for host in ("sd", "edm", "vp"):  # in the share of noise, from the law's own
        level = HOSTS[host].levels(make_grid("bong_tangent", HOSTS[host].law, steps))
        top = HOSTS[host].high / (1 + HOSTS[host].high)
        np.testing.assert_allclose(level / (1 + level), top * bong_tangent(steps), rtol=1e-7, atol=1e-12)


def test_bong_tangent_of_one_step_and_of_too_few():
    assert make_grid("bong_tangent", RectifiedFlow(), 1).t.tolist() == [1.0, 0.0]
    with pytest.raises(GridError, match="4 steps of grid 'bong_tangent' leave an arc without levels"):
        make_grid("bong_tangent:pivot_1=0.1:pivot_2=0.1", RectifiedFlow(), 4)


# -- Align Your Steps: published numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", AYS_SIGMAS)
def test_align_your_steps_of_ten_are_the_published_numbers(model):
    """https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html"""
    host = exploding(0.002, 700.0)
    same(host, f"align_your_steps:model={model}", 10, [*AYS_SIGMAS[model][:-1], 0])
    same(host, f"align_your_steps:model={model}:end=sigma_min", 10, AYS_SIGMAS[model])
    same(host, f"align_your_steps:model={model}:end=append", 11, [*AYS_SIGMAS[model], 0])


def test_align_your_steps_between_the_published_numbers():
    """The page's loglinear_interp."""
    host = exploding(0.002, 700.0)
    for steps in (1, 4, 7, 20):
        logs = np.log(np.array(AYS_SIGMAS["SDXL"])[::-1])
        levels = np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, 11), logs))[::-1]
        same(host, "align_your_steps:model=SDXL:end=sigma_min", steps, levels)
        same(host, "align_your_steps:model=SDXL", steps, zero(levels[:-1]))


@pytest.mark.parametrize(
    ("model", "levels"),
    [  # ComfyUI, comfy_extras/nodes_align_your_steps.py
        ("SD1", [14.6146412293, 6.4745760956, 3.8636745985, 2.6946152, 1.8841921177, 1.3943805092, 0.9642583904, 0.6523686016, 0.3977456272,
                 0.1515232662, 0.0291671582]),
        ("SDXL", [14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289, 0.3798540708,
                  0.2332364134, 0.1114188177, 0.0291671582]),
    ],
)  # fmt: skip
def test_comfyuis_table_are_the_levels_of_the_published_times(model, levels):
    for law in (DiscreteVP.scaled_linear(), VarianceExploding()):
        grid = make_grid(f"align_your_steps:model={model}:table=times:end=sigma_min", law, 10)
        np.testing.assert_allclose(torch.exp(-law.lam(grid.t)), levels, rtol=1e-6)
    grid = make_grid(f"align_your_steps:model={model}:table=times:snap=true", DiscreteVP.scaled_linear(), 10)
    assert grid.t.tolist() == [*AYS_TIMES[model][:-1], -1]


def test_align_your_steps_below_a_first_time():
    law = VarianceExploding()
    grid = make_grid("align_your_steps:end=sigma_min", law, 6, t_max=1.886)  # the fifth number
    np.testing.assert_allclose(grid.t, AYS_SIGMAS["SD1"][4:], rtol=SAME)
    with pytest.raises(GridError, match=r"the table SD1 of align_your_steps ends at noise level 0.029, above that at t_max = 0.02"):
        make_grid("align_your_steps", law, 6, t_max=0.02)


def test_published_levels_at_the_ends_of_a_table_are_no_surprise(caplog):
    with caplog.at_level(logging.WARNING, logger="fewstep"):
        make_grid("Align Your Steps", DiscreteVP.scaled_linear(), 11)
        assert not caplog.text
        make_grid("align_your_steps:model=SVD", DiscreteVP.scaled_linear(), 10)
    assert "noise levels beyond the model's table are kept" in caplog.text


# -- curves of the timesteps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.every(4, 2)
def test_normal_and_sgm_uniform(host, steps):
    """ComfyUI, comfy/samplers.py, normal_scheduler; A1111, modules/sd_schedulers.py has the same."""
    host = HOSTS[host]
    start, end = host.timestep(host.high), host.timestep(host.low)
    for name in ("normal", "Normal", "Uniform"):
        same(host, name, steps, zero(host.sigma(np.linspace(start, end, steps))))
    for name in ("sgm_uniform", "SGM Uniform"):
        same(host, name, steps, zero(host.sigma(np.linspace(start, end, steps + 1)[:-1])))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("steps", [*STEPS, 7, 30, 33, 100])
@pytest.mark.every(5, 2)
def test_simple(host, steps):
    """ComfyUI, comfy/samplers.py, simple_scheduler."""
    host, stride = HOSTS[host], len(HOSTS[host].sigmas) / steps
    same(host, "simple", steps, zero([host.sigmas[-(1 + int(x * stride))] for x in range(steps)]))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.every(4, 2)
def test_ddim_uniform(host, steps):
    """ComfyUI, comfy/samplers.py, ddim_scheduler."""
    host, stride = HOSTS[host], len(HOSTS[host].sigmas) // steps
    same(host, "ddim_uniform", steps, zero(host.sigmas[1::stride][::-1]))


def test_ddim_uniform_says_where_its_rule_makes_another_number():
    with pytest.raises(GridError, match=r"stride of 1000 // 30 = 33, which makes 31 steps, not 30: ask for a number .* divides 1000"):
        make_grid("ddim_uniform", DiscreteVP.linear(), 30)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.6), (0.5, 0.7)])
@pytest.mark.every(7, 2)
def test_beta_over_times_and_over_levels(host, steps, alpha, beta):
    host, total = HOSTS[host], len(HOSTS[host].sigmas) - 1
    options = "" if alpha == beta else f":alpha={alpha}:beta={beta}"
    # ComfyUI, comfy/samplers.py, beta_scheduler
    places = np.rint(scipy.stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), alpha, beta) * total).astype(int)
    same(host, f"beta{options}", steps, zero(host.sigmas[places]))
    # A1111, modules/sd_schedulers.py, beta_scheduler; diffusers, EulerDiscreteScheduler._convert_to_beta
    quantiles = scipy.stats.beta.ppf(1 - np.linspace(0, 1, steps), alpha, beta)
    same(host, f"Beta{options}", steps, zero(host.low + quantiles * (host.high - host.low)))


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.6), (0.5, 0.7), (1, 1), (0.1, 0.1), (2, 5), (50, 40), (0.05, 30)])
def test_quantiles_of_the_beta_distribution(alpha, beta):
    p = np.concatenate([np.linspace(0, 1, 41), [1e-6, 1 - 1e-6]])
    found = beta_quantiles(torch.from_numpy(p), alpha, beta).numpy()
    np.testing.assert_allclose(found, scipy.stats.beta.ppf(p, alpha, beta), rtol=0, atol=1e-11)


# -- every law, every number ----------------------------------------------------------------------------------------------------------

LAWS = {
    **{name: host.law for name, host in HOSTS.items()},
    "vp-cosine": VPCosine(),
    "zero-terminal-snr": DiscreteVP.scaled_linear().zero_terminal_snr(),
    "clean": DiscreteVP.scaled_linear().to_clean(),
    "flow-inner": RectifiedFlow(t_min=0.01, t_max=0.99),
}
WHOLE = ("align_your_steps", "beta", "bong_tangent", "ddim_uniform", "normal", "sgm_uniform", "simple")  # where there is pure noise, too
LIMITS = {"laplace": ":beta=0.2:mu=-1.5"}  # levels of a flow


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.every(11, 2)
def test_a_grid_on_every_law(name, law):
    schedule = LAWS[law]
    if law == "zero-terminal-snr" and name not in (*WHOLE, "vp"):
        with pytest.raises(GridError, match=f"grid '{name}' is laid between two noise levels, but this law starts at pure noise.*t_max"):
            make_grid(name, schedule, 5)
        return
    for steps in (1, 2, 5):
        grid = make_grid(name + (LIMITS.get(name, "") if "flow" in law else ""), schedule, steps)
        assert grid.steps == steps
        lam = schedule.lam(grid.t)
        assert bool((lam[1:] > lam[:-1]).all())
        assert grid.t[-1] >= schedule.t_clean
        if name not in ("align_your_steps", "ddim_uniform", "laplace", "vp"):
            assert (grid.t[0], grid.t[-1]) == (schedule.t_max, schedule.t_clean)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.every(3, 2)
def test_from_a_time_on(name):
    """As image to image asks for it: no time above the first."""
    for schedule, t in ((DiscreteVP.scaled_linear(), 400.0), (VPLinear(), 0.4), (VarianceExploding(), 3.0), (RectifiedFlow(3.0), 0.6)):
        grid = make_grid(name + (LIMITS.get(name, "") if isinstance(schedule, RectifiedFlow) else ""), schedule, 1, t_max=t)
        assert schedule.t_clean <= float(grid.t[-1]) < float(grid.t[0]) <= t + 1e-9
    images = torch.zeros(2, 2)
    model = Model(lambda x, time: x, DiscreteVP.scaled_linear(), "v", shape=(2,))
    assert sample(model, "ddim", nfe=3, grid=name + LIMITS.get(name, ""), seeds=[1, 2], x0=images, strength=0.5).isfinite().all()


def test_a_lowest_time_of_ones_own():
    for name in ("exponential", "Karras", "polyexponential", "kl_optimal", "normal"):
        assert float(make_grid(f"{name}:end=sigma_min", VPLinear(), 5, t_min=0.2).t[-1]) == 0.2
    with pytest.raises(GridError, match="these levels need a lowest one above 0, and the law ends at the clean image: pass t_min"):
        make_grid("exponential", VPLinear(t_min=0.0), 5)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("steps", [0, -1, 2.5, math.nan, True, "4"])
@pytest.mark.every(11, 2)
def test_at_least_one_step(name, steps):
    with pytest.raises(GridError, match="at least 1 step, a whole number of them"):
        make_grid(name, VPLinear(), steps)


@pytest.mark.parametrize("name", ["simple", "beta", "ddim_uniform"])
def test_more_steps_than_a_table_has(name):
    with pytest.raises(GridError, match="fall on .* of the law's 60 times: use at most as many|makes 59 steps, not 80"):
        make_grid(name, DiscreteVP.linear(60), 80)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("exponential:end=zero", "unknown end of a grid 'zero': known: append, clean, sigma_min"),
        ("exponential:rho=2", "grid 'exponential' has no option rho; it has: end, t_max, t_min"),
        ("exponential:snap=2", "option snap of grid 'exponential' is true or false, got 2"),
        ("polyexponential:rho=0", "option rho of grid 'polyexponential' is above 0, got 0"),
        ("polyexponential:rho=NaN", "option rho of grid 'polyexponential' is a number, got 'nan'"),
        ("polyexponential:rho=Infinity", "option rho of grid 'polyexponential' is a finite number"),
        ("Karras:rho=0", "the karras spacing cannot take rho = 0"),
        ("laplace:beta=-1", "option beta of grid 'laplace' is above 0, got -1"),
        ("laplace:mu=x", "option mu of grid 'laplace' is a number, got 'x'"),
        ("vp:eps_s=1", "option eps_s of grid 'vp' lies between 0 and 1, got 1"),
        ("beta:alpha=0", "option alpha of grid 'beta' lies between 0 and 1000, got 0"),
        ("beta:over=levels", "unknown rule of beta 'levels': known: sigmas, times"),
        ("linear_quadratic:linear_steps=5", "linear_steps of grid 'linear_quadratic' is a part of its 5 steps, from 1 to 4, got 5"),
        ("linear_quadratic:linear_steps=1.5", "option linear_steps of grid 'linear_quadratic' is a whole number, got 1.5"),
        ("linear_quadratic:threshold_noise=1", "option threshold_noise of grid 'linear_quadratic' lies between 0 and 1, got 1"),
        ("bong_tangent:middle=1", "option middle of grid 'bong_tangent' lies between 0 and 1, got 1"),
        ("bong_tangent:slope_2=0", "option slope_2 of grid 'bong_tangent' is above 0, got 0"),
        ("align_your_steps:model=SD3", "unknown model with sigmas of align_your_steps 'SD3'"),
        ("align_your_steps:model=SVD:table=times", "unknown model with times of align_your_steps 'SVD'"),
        ("align_your_steps:table=levels", "unknown table of align_your_steps 'levels'"),
        ("simple:t_min=0", "grid 'simple' has no option t_min; it has: t_max"),
    ],
)
@pytest.mark.every(2)
def test_options_are_refused_in_words(spec, says):
    with pytest.raises(GridError, match=says):
        make_grid(spec, VPLinear(), 5)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.every(3, 2)
def test_a_law_is_asked_for(name):
    with pytest.raises(FewstepError, match="a grid is laid out on a noise law, as fewstep.VPLinear"):
        CURVES[name](None, 5)
    assert isinstance(VPLinear(), NoiseSchedule)


def test_a_misspelt_argument():
    with pytest.raises(FewstepError, match="polyexponential: got an unexpected keyword argument 'rh'"):
        curves.polyexponential(VPLinear(), 5, rh=2)
