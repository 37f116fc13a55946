"""The noise levels that papers spread their steps on, as times of a noise law."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.errors import GridError

EPSILON = 1e-3  # where EDM's variance-preserving law ends (arXiv 2206.00364, table 1)


def levels_of(schedule: NoiseSchedule) -> Tensor:
    """Return the largest and the least noise level ``sigma/alpha`` of a law, ``[2]``.

    Raises:
        GridError: the law begins at pure noise or ends at the clean image, which none of these spacings is for.
    """
    level = torch.exp(-schedule.lam(schedule.ends))
    if not bool(torch.isfinite(level).all()) or not bool((level > 0).all()):
        raise GridError("the rivals are written for laws that begin above alpha = 0 and end above sigma = 0, as EDM's: use such a model")
    return level


def times_at(schedule: NoiseSchedule, level: Tensor) -> Tensor:
    """Return the times of noise levels ``sigma/alpha [*]``; differentiable."""
    return schedule.t_of_lam(-torch.log(level))


def polynomial(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Return the times ``[steps+1]`` of EDM's polynomial spacing with ``rho = 7``."""
    return TimeGrid.karras(schedule, steps).t


def vp_time(schedule: NoiseSchedule) -> tuple[float, float]:
    """Return ``beta_d, beta_min`` of the variance-preserving law through a law's levels: the largest at time 1, the least at `EPSILON`.

    Its level is ``sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)`` (EDM, arXiv 2206.00364, table 1).
    """
    most, least = torch.log1p(levels_of(schedule) ** 2).tolist()
    beta_d = 2 * (least / EPSILON - most) / (EPSILON - 1)
    return beta_d, most - beta_d / 2


def level_at_vp_time(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Return the noise level at a time ``t [*]`` of the law of `vp_time`; differentiable."""
    beta_d, beta_min = vp_time(schedule)
    return torch.sqrt(torch.expm1(beta_d * t**2 / 2 + beta_min * t))


def vp_uniform(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Return the times ``[steps+1]`` that are uniform in the time of `vp_time`, which papers call time-uniform."""
    inner = torch.linspace(1, EPSILON, steps + 1, dtype=torch.float64)[1:-1]
    return torch.cat([schedule.ends[:1], times_at(schedule, level_at_vp_time(schedule, inner)), schedule.ends[1:]])


SPACINGS = {"polynomial": polynomial, "time_uniform": vp_uniform}
