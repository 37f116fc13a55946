r"""Where image to image begins: a strength, as a noise level, as a time of any law, and as a noised image.

``strength = sigma / (alpha + sigma)`` is the share of noise in the start, so the level ``sigma/alpha`` is ``strength / (1 - strength)``. Of
a rectified flow it is its ``sigma``; 0.5 is as much noise as image, and 1 the model's whole range. The time follows from the law alone:
neither the solver, nor the spacing, nor the number of evaluations moves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid, nearest_time
from fewstep.core.prediction import add_noise
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.spacings import make_grid
from fewstep.core.tableau import Nodes
from fewstep.runtime.errors import GridError, ModelError
from fewstep.runtime.front_door import number
from fewstep.sampling.noise import seed_list, seeded_noise

__all__ = ["begin", "level_of", "noised", "spacing_from"]

ROUNDING = 1e-6  # by which a level may leave the range: that of a float32


def level_of(strength: Any) -> float:  # noqa: ANN401 - a number of any library
    """Return the noise level ``sigma/alpha = strength / (1 - strength)`` of a strength; infinite for 1.

    Examples:
        >>> from fewstep.sampling.start import level_of
        >>> level_of(0.5), level_of(1)
        (1.0, inf)

    Raises:
        GridError: it is no number above 0 and up to 1.
    """
    share = number(strength, "strength", GridError)
    if not 0 < share <= 1:
        raise GridError(
            f"strength is the share of noise in the start, sigma / (alpha + sigma), above 0 and at most 1, got {share:g}: "
            "0.5 is as much noise as image"
        )
    return share / (1 - share) if share < 1 else math.inf


def begin(schedule: NoiseSchedule, level: float) -> float:
    """Return the time at which sampling begins from a noise level; of a table of times, the nearest that the network knows.

    Args:
        schedule: the noise law.
        level: ``sigma/alpha``; infinite for the law's whole range.

    Raises:
        GridError: no step can begin there (from which level and strength to which one can).
    """
    level = number(level, "the noise level to begin at", GridError)
    if level <= 0:
        raise GridError(f"the noise level to begin at is sigma/alpha, above 0, got {level:g}")
    if not isinstance(schedule, NoiseSchedule):
        raise GridError(f"a time belongs to a noise law, as fewstep.VPLinear() or model.schedule, got {str(schedule)[:80]}")
    if level == math.inf:
        return float(schedule.t_max)
    times = schedule.times
    starts = schedule.ends if times is None else times[(times > schedule.t_min) & (times <= schedule.t_max)].flip(0)
    high, low = torch.exp(-schedule.lam(starts[[0, -1]])).tolist()
    below = level <= low if times is None else level < low * (1 - ROUNDING)
    if below or level > high * (1 + ROUNDING):
        ends = "above" if times is None else "from"
        raise GridError(
            f"no step begins at noise level {level:g} (strength {_share(level):g}): this noise law has levels {ends} {low:.4g} to "
            f"{high:.4g}, strengths {ends} {_share(low):.4g} to {_share(high):.4g}, and 1 for its whole range"
        )
    if level >= high:
        return float(schedule.t_max)
    t = schedule.t_of_lam(-torch.log(torch.tensor([level], dtype=torch.float64)))
    return float(t if times is None else nearest_time(t, starts.flip(0)) if len(starts) > 1 else starts)


def _share(level: float) -> float:
    """Return the strength of a level: the inverse of `level_of`."""
    return level / (1 + level) if level < math.inf else 1.0


def spacing_from(name: str, schedule: NoiseSchedule, steps: int, t: float) -> TimeGrid:
    """Return a spacing by name, laid between a time and the end of the law; every spacing begins at exactly this time.

    Args:
        name: of the spacing, for `make_grid`, options included.
        schedule: the noise law.
        steps: number of intervals.
        t: the first time, see `begin`; at the law's own the spacing is as it is without.

    Raises:
        GridError: as `make_grid`; so many steps do not fit into the table below this time.
    """
    if t == schedule.t_max:
        return make_grid(name, schedule, steps)
    if schedule.times is not None:
        known = int(((schedule.times <= t) & (schedule.times > schedule.t_min)).sum())
        if steps > known:
            raise GridError(
                f"{steps} steps do not fit below time {t:g}, where the network knows {known} times: use fewer steps, or a larger strength"
            )
    alone = t == schedule.t_last > schedule.t_min  # a single step to the clean image, which leaves a spacing no choice
    made = make_grid(name, schedule, 1) if alone else make_grid(name, schedule, steps, t_max=t)
    return TimeGrid(torch.cat([torch.tensor([t], dtype=torch.float64), made.t[1:]]))


def noised(x0: Tensor, nodes: Nodes, seeds: Sequence[int] | Tensor) -> Tensor:
    """Return the start of image to image, ``alpha x0 + sigma eps [len(seeds), *D]`` at the first node, with the noise of the seeds.

    Args:
        x0: clean images ``[len(seeds), *D]``.
        nodes: of the sampler that goes on from there.
        seeds: one whole number per sample.

    Raises:
        ModelError: another number of images than of seeds.
    """
    seeds = seed_list(seeds)
    if len(seeds) != len(x0):
        raise ModelError(f"{len(seeds)} seeds for {len(x0)} images: pass one for each")
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    return add_noise(x0, seeded_noise(seeds, x0.shape[1:]).to(x0.device, x0.dtype), nodes.alpha[0], nodes.sigma[0])
