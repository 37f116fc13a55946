"""Times between two others, at a noise level between theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.schedule import NoiseSchedule

__all__ = ["between", "between_in_angle"]


def between(schedule: NoiseSchedule, s: Tensor, t: Tensor, weight: Tensor | float) -> Tensor:
    """Return times ``[*]`` between ``s`` and ``t``, ``weight`` of the way in ``lam``, or in the angle where that is infinite at an end."""
    first, last = schedule.lam(s), schedule.lam(t)
    finite = torch.isfinite(first) & torch.isfinite(last)
    if not bool(finite.any()):
        return between_in_angle(schedule, s, t, weight)
    found = schedule.t_of_lam(torch.where(finite, torch.lerp(first, last, weight), torch.zeros_like(first)))
    return found if bool(finite.all()) else torch.where(finite, found, between_in_angle(schedule, s, t, weight))


def between_in_angle(schedule: NoiseSchedule, s: Tensor, t: Tensor, weight: Tensor | float) -> Tensor:
    """Return times ``[*]`` between ``s`` and ``t``, ``weight`` of the way in the angle ``arctan(sigma/alpha)``."""
    first, last = (torch.atan2(schedule.sigma(one), schedule.alpha(one)) for one in (s, t))
    return schedule.t_of_lam(-torch.log(torch.tan(torch.lerp(first, last, weight))))
