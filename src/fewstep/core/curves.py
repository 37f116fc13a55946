"""The noise levels that other programs call by name: A1111, ComfyUI, k-diffusion and diffusers.

What they call sigma and timesteps, and how their levels end, is said in `fewstep.core.levels`. Levels are met exactly, at a fraction of a
timestep where the table has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fewstep.core.beta_distribution import beta_quantiles
from fewstep.core.grid import RHO, TimeGrid, check_law, grid_ends, step_count
from fewstep.core.levels import (
    Span,
    decreasing,
    ended,
    finite_option,
    log_linear,
    option_between,
    picked,
    positive_option,
    time_of_share,
    whole_option,
)
from fewstep.core.schedule import DiscreteVP, NoiseSchedule, RectifiedFlow, VarianceExploding, VPLinear
from fewstep.runtime.errors import GridError, look_up
from fewstep.runtime.front_door import checked

__all__ = ["CURVES", "linear_quadratic_sigmas"]

ROUNDED = 1e-2  # by which a published level may lie beyond a table whose end it is
LARGEST_BETA = 1000.0  # parameter of the beta distribution

# Align Your Steps (arXiv 2404.14507), as its authors publish them: https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html
AYS_SIGMAS = {
    "SD1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "SDXL": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "SVD": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
AYS_TIMES = {
    "SD1": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "SDXL": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}


# -- curves of the noise level -----------------------------------------------------------------------------------------------------------


@checked
def karras(
    schedule: NoiseSchedule, steps: int, *, rho: float = RHO, end: str = "append", t_max: float | None = None, t_min: float | None = None
) -> TimeGrid:
    """Make k-diffusion's grid of Karras noise levels, uniform in ``sigma^(1/rho)`` (``get_sigmas_karras``; arXiv 2206.00364, eq. 5).

    `TimeGrid.karras` has the same levels with the ends of this library, and is what the name ``karras`` stands for.

    Args:
        schedule: the noise law.
        steps: number of intervals ``N``.
        rho: the larger, the closer the levels lie at their low end.
        end: ``append``, ``clean`` or ``sigma_min``, see `fewstep.core.levels`.
        t_max: the first time, by default the law's.
        t_min: the time of the lowest level, by default the network's last.

    Raises:
        GridError: an option out of its range, or a start at pure noise of a law that is no flow.
    """
    span = Span.finite("Karras", schedule, t_max, t_min)
    return span.grid(ended(span.spaced(TimeGrid.karras, rho=rho), steps, end))


@checked
def exponential(
    schedule: NoiseSchedule, steps: int, *, end: str = "append", t_max: float | None = None, t_min: float | None = None
) -> TimeGrid:
    """Make the grid of noise levels in equal ratios: k-diffusion's ``get_sigmas_exponential``, diffusers' ``use_exponential_sigmas``.

    Diffusers' ``use_lu_lambdas`` has the same levels. `TimeGrid.logsnr` is this spacing with the ends of this library.

    Args:
        schedule: the noise law.
        steps: number of intervals ``N``.
        end: ``append``, ``clean`` or ``sigma_min``, see `fewstep.core.levels`.
        t_max: the first time, by default the law's.
        t_min: the time of the lowest level, by default the network's last.

    Raises:
        GridError: as `karras`.
    """
    span = Span.finite("exponential", schedule, t_max, t_min)
    return span.grid(ended(span.spaced(TimeGrid.logsnr), steps, end))


@checked
def polyexponential(
    schedule: NoiseSchedule, steps: int, *, rho: float = 1.0, end: str = "append", t_max: float | None = None, t_min: float | None = None
) -> TimeGrid:
    """Make the grid whose ``log sigma`` falls as a power of the distance to its end (k-diffusion, ``get_sigmas_polyexponential``).

    Args:
        schedule: the noise law.
        steps: number of intervals ``N``.
        rho: the power, above 0; with 1 it is `exponential`.
        end: ``append``, ``clean`` or ``sigma_min``, see `fewstep.core.levels`.
        t_max: the first time, by default the law's.
        t_min: the time of the lowest level, by default the network's last.

    Raises:
        GridError: as `karras`.
    """
    span = Span.finite("polyexponential", schedule, t_max, t_min)
    power = positive_option(rho, "rho", "polyexponential")

    def levels(count: int) -> Tensor:
        ramp = torch.linspace(1, 0, count, dtype=torch.float64) ** power
        inner = torch.exp(math.log(span.low) + ramp * math.log(span.high / span.low))
        return torch.where(ramp == 1, span.high, torch.where(ramp == 0, span.low, inner))

    return span.grid(ended(levels, steps, end))


@checked
def kl_optimal(
    schedule: NoiseSchedule, steps: int, *, end: str = "append", t_max: float | None = None, t_min: float | None = None
) -> TimeGrid:
    """Make the grid uniform in ``arctan(sigma)`` (Align Your Steps, arXiv 2404.14507, section 3.1).

    ComfyUI's ``kl_optimal`` puts a 0 behind the levels (``append``); A1111's ``KL Optimal`` does not (``sigma_min``).
    `TimeGrid.angle` is this spacing with the ends of this library.

    Args:
        schedule: the noise law.
        steps: number of intervals ``N``.
        end: ``append``, ``clean`` or ``sigma_min``, see `fewstep.core.levels`.
        t_max: the first time, by default the law's.
        t_min: the time of the lowest level, by default the network's last.

    Raises:
        GridError: as `karras`.
    """
    span = Span.finite("kl_optimal", schedule, t_max, t_min)
    return span.grid(ended(span.spaced(TimeGrid.angle), steps, end))


@checked
def laplace(
    schedule: NoiseSchedule,
    steps: int,
    *,
    mu: float = 0.0,
    beta: float = 0.5,
    end: str = "sigma_min",
    t_max: float | None = None,
    t_min: float | None = None,
) -> TimeGrid:
    """Make the grid whose ``log sigma`` are quantiles of a Laplace distribution (Hang et al., arXiv 2407.03297), cut to the range.

    It is ComfyUI's ``get_sigmas_laplace``, which ends at its last level: what is called 20 steps there is 19 here.

    Args:
        schedule: the noise law.
        steps: number of intervals ``N``.
        mu: the mean of ``log sigma``.
        beta: the scale of the distribution, above 0.
        end: ``append``, ``clean`` or ``sigma_min``, see `fewstep.core.levels`.
        t_max: the first time, by default the law's.
        t_min: the time of the lowest level, by default the network's last.

    Raises:
        GridError: as `karras`; levels that the cut makes equal.
    """
    span = Span.finite("laplace", schedule, t_max, t_min)
    mean, scale = finite_option(mu, "mu", "laplace"), positive_option(beta, "beta", "laplace")

    def levels(count: int) -> Tensor:
        away = 0.5 - torch.linspace(0, 1, count, dtype=torch.float64)
        quantiles = mean - scale * torch.sign(away) * torch.log(1 - 2 * away.abs() + 1e-5)  # 1e-5 is theirs
        return torch.exp(quantiles).clamp(span.low, span.high)

    return span.grid(decreasing(ended(levels, steps, end), "laplace", "use fewer steps, a smaller beta or another mu"))


@checked
def vp(
    schedule: NoiseSchedule,
    steps: int,
    *,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    end: str = "append",
    t_max: float | None = None,
) -> TimeGrid:
    """Make the grid of a continuous VP law's levels at equal times (k-diffusion, ``get_sigmas_vp``; ComfyUI's ``VPScheduler``).

    Args:
        schedule: the noise law of the model. Levels beyond its range are kept.
        steps: number of intervals ``N``.
        beta_d: growth of the VP law's ``beta(t) = beta_min + t beta_d``.
        beta_min: its start.
        eps_s: the last time, between 0 and 1.
        end: ``append``, ``clean`` or ``sigma_min``, see `fewstep.core.levels`.
        t_max: the first time in the model's law; by default the grid begins at time 1 of the VP law.

    Raises:
        GridError: an option out of its range.
    """
    check_law(schedule)
    growth, start = positive_option(beta_d, "beta_d", "vp"), positive_option(beta_min, "beta_min", "vp")
    law = VPLinear(beta_min=start, beta_max=start + growth, t_min=option_between(eps_s, "eps_s", "vp", 0, 1))
    first = None if t_max is None else float(law.t_of_lam(schedule.lam(grid_ends(schedule, t_max, None)[:1])))

    def levels(count: int) -> Tensor:
        times = torch.linspace(law.t_max if first is None else first, law.t_min, count, dtype=torch.float64)
        return torch.exp(-law.lam(times))

    return _through(schedule, ended(levels, steps, end))


@checked
def linear_quadratic(
    schedule: NoiseSchedule,
    steps: int,
    *,
    threshold_noise: float = 0.025,
    linear_steps: float | None = None,
    t_max: float | None = None,
) -> TimeGrid:
    """Make Mochi's grid: levels that fall linearly at first, by ``threshold_noise``, then quadratically to 0 (ComfyUI, diffusers).

    Args:
        schedule: the noise law.
        steps: number of intervals ``N``.
        threshold_noise: share of the first level that the linear part takes away, above 0 and below 1.
        linear_steps: intervals of the linear part, from 1 to ``N - 1``; by default half of them, rounded down.
        t_max: the first time, by default the law's.

    Raises:
        GridError: an option out of its range, levels that do not fall, or a start at pure noise of a law that is no flow.
    """
    span, count = Span.finite("linear_quadratic", schedule, t_max, None), step_count(steps)
    threshold = option_between(threshold_noise, "threshold_noise", "linear_quadratic", 0, 1)
    linear = count // 2 if linear_steps is None else whole_option(linear_steps, "linear_steps", "linear_quadratic")
    if linear_steps is not None and not 1 <= linear < count:
        raise GridError(f"linear_steps of grid 'linear_quadratic' is a part of its {count} steps, from 1 to {count - 1}, got {linear}")
    shares = linear_quadratic_sigmas(count, threshold, linear) if count > 1 else torch.ones(1, dtype=torch.float64)
    levels = torch.cat([shares * span.high, torch.zeros(1, dtype=torch.float64)])
    return span.grid(decreasing(levels, "linear_quadratic", "use a smaller threshold_noise or more linear_steps"))


@checked
def bong_tangent(
    schedule: NoiseSchedule,
    steps: int,
    *,
    middle: float = 0.5,
    pivot_1: float = 0.6,
    pivot_2: float = 0.6,
    slope_1: float = 0.2,
    slope_2: float = 0.2,
    t_max: float | None = None,
) -> TimeGrid:
    """Make RES4LYF's grid: two arcs of an arctangent in the share of noise ``sigma / (alpha + sigma)``, from the first level to 0.

    Of a flow the share is its ``sigma``, which is RES4LYF's definition. Of other laws it is scaled to their first share.

    Args:
        schedule: the noise law.
        steps: number of intervals ``N``.
        middle: the share where the two arcs meet, between 0 and 1.
        pivot_1: where the first arc is steepest, as a part of the steps.
        pivot_2: where the second is.
        slope_1: how steep the first arc is there.
        slope_2: how steep the second is.
        t_max: the first time, by default the law's.

    Raises:
        GridError: an option out of its range, or arcs that are too short for so few steps.
    """
    check_law(schedule)
    count, name = step_count(steps), "bong_tangent"
    first = grid_ends(schedule, t_max, schedule.t_clean)[:1]
    top = schedule.sigma(first) / (schedule.alpha(first) + schedule.sigma(first))
    meet = option_between(middle, "middle", name, 0, 1)
    pivots = [option_between(value, f"pivot_{i + 1}", name, 0, 1) for i, value in enumerate((pivot_1, pivot_2))]
    slopes = [positive_option(value, f"slope_{i + 1}", name) for i, value in enumerate((slope_1, slope_2))]
    total = count + 2
    half = int((total * pivots[0] + total * pivots[1]) / 2)  # levels of the first arc, the last of which is the first of the second
    if count > 1 and not 2 <= half <= total - 2:
        raise GridError(f"{count} steps of grid 'bong_tangent' leave an arc without levels: use more steps, or pivots nearer to 0.5")
    slopes = [slope * 40 / total for slope in slopes]
    arcs = [
        _arc(half, slopes[0], int(total * pivots[0]), 1.0, meet)[:-1],
        _arc(total - half, slopes[1], int(total * pivots[1]) - half, meet, 0.0),
    ]
    shares = torch.cat(arcs) if count > 1 else torch.tensor([1.0, 0.0], dtype=torch.float64)
    return TimeGrid(torch.cat([first, time_of_share(schedule, shares[1:] * top)]))


@checked
def align_your_steps(
    schedule: NoiseSchedule, steps: int, *, model: str = "SD1", table: str = "sigmas", end: str = "clean", t_max: float | None = None
) -> TimeGrid:
    """Make the grid of Align Your Steps (Sabour et al., arXiv 2404.14507): 10 steps as published, others log-linearly between them.

    Diffusers' ``AysSchedules`` are ``sigmas`` with the end ``clean``. ComfyUI's ``AlignYourStepsScheduler`` has the levels of the published
    ``times``. A1111 puts a 0 behind all of its levels (``append``).

    Args:
        schedule: the noise law of the model. Levels beyond its range are kept.
        steps: number of intervals ``N``.
        model: the model that the table was made for: ``SD1``, ``SDXL`` or ``SVD``.
        table: ``sigmas``, the published levels; or ``times``, the levels of Stable Diffusion's noise law at the published timesteps.
        end: ``append``, ``clean`` or ``sigma_min``, see `fewstep.core.levels`.
        t_max: the first time, by default that of the table's first level; below it the rest of the curve is resampled.

    Raises:
        GridError: an unknown model, table or end; a first time below the table.
    """
    check_law(schedule)
    known = look_up(table, {"sigmas": AYS_SIGMAS, "times": AYS_TIMES}, "table of align_your_steps", GridError)
    entries = torch.tensor(look_up(model, known, f"model with {table} of align_your_steps", GridError), dtype=torch.float64)
    logs = -DiscreteVP.scaled_linear().lam(entries) if table == "times" else torch.log(entries)
    start = 0.0
    if t_max is not None:
        log_first = float(-schedule.lam(grid_ends(schedule, t_max, schedule.t_clean)[:1]))
        if log_first <= float(logs[-1]):
            raise GridError(
                f"the table {model} of align_your_steps ends at noise level {math.exp(float(logs[-1])):g}, above that at t_max = {t_max:g}"
            )
        start = float(np.interp(-log_first, (-logs).numpy(), np.arange(len(logs))))

    def levels(count: int) -> Tensor:
        where = np.linspace(start, len(logs) - 1, count)
        return torch.exp(torch.from_numpy(np.interp(where, np.arange(len(logs)), logs.numpy())))

    return _through(schedule, ended(levels, steps, end))


# -- curves of the timesteps ---------------------------------------------------------------------------------------------------------------


@checked
def normal(schedule: NoiseSchedule, steps: int, *, end: str = "append", t_max: float | None = None, t_min: float | None = None) -> TimeGrid:
    """Make the grid at equal distances in the network's timesteps (ComfyUI's ``normal``, A1111's ``Uniform`` and ``Normal``).

    Between two entries of a table ``log sigma`` is linear. A VE law's timestep is ``log sigma``. Of a flow the last time is the number that
    its lowest level is, which a shift makes another, as in ComfyUI and in diffusers' ``FlowMatchEulerDiscreteScheduler``.

    Args:
        schedule: the noise law.
        steps: number of intervals ``N``.
        end: ``append``, ``clean`` or ``sigma_min``, see `fewstep.core.levels`.
        t_max: the first time, by default the law's.
        t_min: the last time, by default the network's last.

    Raises:
        GridError: times that do not decrease, or a law without a last level above 0.
    """
    span = Span.of(schedule, t_max, t_min)
    last = span.low if isinstance(schedule, RectifiedFlow) and t_min is None else span.last

    def times(count: int) -> Tensor:
        if isinstance(schedule, VarianceExploding):
            return span.spaced(TimeGrid.logsnr)(count)
        uniform = torch.linspace(span.first, last, count, dtype=torch.float64)
        return uniform if schedule.times is None else log_linear(schedule, uniform)

    return TimeGrid(ended(times, steps, end, zero=float(schedule.t_clean)))


@checked
def sgm_uniform(
    schedule: NoiseSchedule, steps: int, *, end: str = "clean", t_max: float | None = None, t_min: float | None = None
) -> TimeGrid:
    """Make the grid of `normal` with the last of ``N + 1`` times moved to the clean image (ComfyUI's and A1111's ``sgm_uniform``).

    Args:
        schedule: the noise law.
        steps: number of intervals ``N``.
        end: ``append``, ``clean`` or ``sigma_min``, see `fewstep.core.levels`.
        t_max: the first time, by default the law's.
        t_min: the last time, by default the network's last.

    Raises:
        GridError: as `normal`.
    """
    return normal(schedule, steps, end=end, t_max=t_max, t_min=t_min)


@checked
def simple(schedule: NoiseSchedule, steps: int, *, t_max: float | None = None) -> TimeGrid:
    """Make the grid of table entries at equal strides from the first level down, then the clean image (ComfyUI's and A1111's ``simple``).

    Args:
        schedule: the noise law; without a table it gets 1000 times.
        steps: number of intervals ``N``.
        t_max: the first time, by default the law's.

    Raises:
        GridError: more steps than the table has times.
    """
    table, count = Span.of(schedule, t_max, None).table(), step_count(steps)
    stride = len(table) / count
    return picked("simple", schedule, table, [len(table) - 1 - int(i * stride) for i in range(count)])


@checked
def ddim_uniform(schedule: NoiseSchedule, steps: int, *, t_max: float | None = None) -> TimeGrid:
    """Make the grid of every ``T // N``-th table entry from the second up, then the clean image (ComfyUI's ``ddim_uniform``).

    Its first time lies below the law's. Where ``T`` is no multiple of ``N`` there may be more of these entries than ``N``.

    Args:
        schedule: the noise law; without a table it gets 1000 times.
        steps: number of intervals ``N``.
        t_max: the last time of the table, by default the law's.

    Raises:
        GridError: the rule makes another number of steps than that asked for.
    """
    table, count = Span.of(schedule, t_max, None).table(), step_count(steps)
    stride = max(len(table) // count, 1)
    index = list(range(1, len(table), stride))[::-1]
    if len(index) != count:
        raise GridError(
            f"ddim_uniform takes entries at a stride of {len(table)} // {count} = {stride}, which makes {len(index)} steps, not {count}: "
            f"ask for a number of steps that divides {len(table)}, or take simple or leading"
        )
    return picked("ddim_uniform", schedule, table, index)


@checked
def beta(
    schedule: NoiseSchedule,
    steps: int,
    *,
    alpha: float = 0.6,
    beta: float = 0.6,
    over: str = "times",
    t_max: float | None = None,
) -> TimeGrid:
    """Make the grid at quantiles of a beta distribution, dense at both ends (Lee et al., arXiv 2407.12173), then the clean image.

    Two rules have this name. ComfyUI's takes quantiles of the table's times, rounded to its entries (``times``). A1111's and diffusers'
    (``use_beta_sigmas``) takes quantiles of the noise level between its ends (``sigmas``).

    Args:
        schedule: the noise law; for ``times``, one without a table gets 1000 times.
        steps: number of intervals ``N``.
        alpha: first parameter of the distribution, above 0.
        beta: second parameter, above 0.
        over: ``times`` or ``sigmas``.
        t_max: the first time, by default the law's.

    Raises:
        GridError: an option out of its range, or times that fall on the same entry, of which ComfyUI would make fewer steps.
    """
    look_up(over, dict.fromkeys(("times", "sigmas")), "rule of beta", GridError)
    count = step_count(steps)
    shape = [option_between(value, key, "beta", 0, LARGEST_BETA) for key, value in (("alpha", alpha), ("beta", beta))]
    if over == "sigmas":
        span = Span.finite("beta", schedule, t_max, None)
        quantiles = beta_quantiles(1 - torch.linspace(0, 1, count, dtype=torch.float64), *shape)
        levels = torch.where(quantiles == 1, span.high, span.low + quantiles * (span.high - span.low))
        return span.grid(torch.cat([levels, torch.zeros(1, dtype=torch.float64)]))
    table = Span.of(schedule, t_max, None).table()
    quantiles = beta_quantiles(1 - torch.arange(count, dtype=torch.float64) / count, *shape)
    places = torch.round(quantiles * (len(table) - 1), decimals=9)  # the median of equal parameters is a half, to be rounded as one
    return picked("beta", schedule, table, torch.round(places).long().tolist())


CURVES: dict[str, Callable[..., TimeGrid]] = {
    "Karras": karras,
    "align_your_steps": align_your_steps,
    "beta": beta,
    "bong_tangent": bong_tangent,
    "ddim_uniform": ddim_uniform,
    "exponential": exponential,
    "kl_optimal": kl_optimal,
    "laplace": laplace,
    "linear_quadratic": linear_quadratic,
    "normal": normal,
    "polyexponential": polyexponential,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "vp": vp,
}


def linear_quadratic_sigmas(steps: int, threshold: float = 0.025, linear_steps: int | None = None) -> Tensor:
    """Return Mochi's levels ``[steps]``: ``1 - threshold`` is reached by the linear steps, and 0 after the last with no kink between them.

    Args:
        steps: number of levels, at least 2.
        threshold: what the linear part takes away.
        linear_steps: steps of the linear part, by default half of them.
    """
    linear, i = steps // 2 if linear_steps is None else linear_steps, torch.arange(steps, dtype=torch.float64)
    beyond, slope = (i - linear).clamp(min=0), threshold / linear
    curve = (1 - threshold - slope * (steps - linear)) / (steps - linear) ** 2
    return 1 - slope * i - curve * beyond**2


def _arc(count: int, slope: float, pivot: int, start: float, end: float) -> Tensor:
    """Return ``count`` numbers from ``start`` to ``end`` along a falling arctangent that is steepest at the place ``pivot``."""
    curve = -torch.atan(slope * (torch.arange(count, dtype=torch.float64) - pivot))
    return end + (curve - curve[-1]) / (curve[0] - curve[-1]) * (start - end)


def _through(schedule: NoiseSchedule, levels: Tensor) -> TimeGrid:
    """Return the grid through noise levels ``sigma/alpha [N+1]``; those beyond a table are kept, which is said if they are not its ends."""
    inner = levels[levels > 0]
    high, low = torch.exp(-schedule.lam(torch.tensor([schedule.t_max, schedule.t_last], dtype=torch.float64))).tolist()
    if float(inner[0]) > high * (1 + ROUNDED) or float(inner[-1]) < low * (1 - ROUNDED):
        return TimeGrid.from_sigmas(schedule, levels)
    return TimeGrid(torch.where(levels == 0, schedule.t_clean, schedule.t_of_lam(-torch.log(levels))))
