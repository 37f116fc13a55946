"""A noise law in the noise levels of other programs, and the rules by which they end a grid.

Their *sigma* is the noise level ``sigma/alpha``. Of a rectified flow it is the flow's own ``sigma``, from 1 to 0. Their *timesteps* are the
table of a discrete law. Laws without a table get 1000 times, as in ComfyUI: the levels of a VE law in equal ratios, and the times of a flow
or of a continuous VP law at equal distances; those of a flow begin at 1/1000.

Other programs lay ``N`` levels and put a 0 behind them. The option ``end`` says so:

- ``append``: ``N`` levels, both ends of the range among them, then the clean image;
- ``clean``: ``N + 1`` levels, and the last is moved to the clean image;
- ``sigma_min``: ``N + 1`` levels, and sampling stops at the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid, grid_ends, step_count
from fewstep.core.schedule import NoiseSchedule, RectifiedFlow, VarianceExploding
from fewstep.runtime.errors import GridError, look_up
from fewstep.runtime.front_door import number

__all__ = [
    "TIMES",
    "Span",
    "decreasing",
    "ended",
    "finite_option",
    "log_linear",
    "option_between",
    "picked",
    "positive_option",
    "time_of_share",
    "whole_option",
]

TIMES = 1000  # of a law without a table
ENDS: dict[str, None] = dict.fromkeys(("append", "clean", "sigma_min"))


@dataclass(frozen=True)
class Span:
    """The part of a law between two times, with the noise levels there as other programs count them.

    Attributes:
        schedule: the law.
        first: the first time.
        last: the time of the lowest level at which a network is trained.
        high: the level at ``first``; infinite where a law that is no flow starts at pure noise.
        low: the level at ``last``.
    """

    schedule: NoiseSchedule
    first: float
    last: float
    high: float
    low: float

    @classmethod
    def of(cls, schedule: NoiseSchedule, t_max: float | None, t_min: float | None) -> Span:
        """Measure a law between two times; by default from its first to the lowest at which a network is trained.

        Raises:
            GridError: the times do not decrease, or the last is the clean image.
        """
        lowest = t_min
        if t_min is None and isinstance(schedule, NoiseSchedule):
            lowest = float(schedule.t_last)
            if lowest == schedule.t_clean and isinstance(schedule, RectifiedFlow):
                lowest = 1 / TIMES
        ends = grid_ends(schedule, t_max, lowest)
        if float(ends[1]) <= schedule.t_clean:
            raise GridError(
                f"these levels need a lowest one above 0, and the law ends at the clean image: pass t_min, or give the law one, {schedule}"
            )
        direct = isinstance(schedule, RectifiedFlow | VarianceExploding)
        high, low = (schedule.sigma(ends) if direct else torch.exp(-schedule.lam(ends))).tolist()
        return cls(schedule, float(ends[0]), float(ends[1]), high, low)

    @classmethod
    def finite(cls, name: str, schedule: NoiseSchedule, t_max: float | None, t_min: float | None) -> Span:
        """Measure a law as `of`, for a curve between two finite levels.

        Raises:
            GridError: also a first level that is infinite.
        """
        span = cls.of(schedule, t_max, t_min)
        if not math.isfinite(span.high):
            raise GridError(
                f"grid {name!r} is laid between two noise levels, but this law starts at pure noise, where sigma/alpha is infinite: "
                "pass t_max, or use sgm_uniform, simple, trailing or angle"
            )
        return span

    def spaced(self, spacing: Callable[..., TimeGrid], **options: float) -> Callable[[int], Tensor]:
        """Return the function from a count to levels ``[count]`` between the ends, by a spacing of `TimeGrid` in the level."""
        levels = VarianceExploding(t_min=self.low, t_max=self.high)
        return lambda count: spacing(levels, count - 1, **options).t if count > 1 else levels.ends[:1]

    def table(self) -> Tensor:
        """Return the times of training between the ends, increasing ``[T]``; those of a table, or 1000."""
        times = self.schedule.times
        if times is not None:
            return times[(times >= self.last) & (times <= self.first)]
        if isinstance(self.schedule, VarianceExploding):
            return self.spaced(TimeGrid.logsnr)(TIMES).flip(0)
        return torch.linspace(self.last, self.first, TIMES, dtype=torch.float64)

    def grid(self, levels: Tensor) -> TimeGrid:
        """Return the grid through levels ``[N+1]`` as other programs count them; a last 0 is the clean image."""
        if isinstance(self.schedule, RectifiedFlow):
            times = time_of_share(self.schedule, levels)
        else:
            times = torch.where(levels == 0, self.schedule.t_clean, self.schedule.t_of_lam(-torch.log(levels)))
        return TimeGrid(torch.where(levels == self.high, self.first, torch.where(levels == self.low, self.last, times)))


def time_of_share(schedule: NoiseSchedule, share: Tensor) -> Tensor:
    """Return the times ``[*]`` at which the share of noise ``sigma / (alpha + sigma)`` is given."""
    inner = share.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(share == 0, schedule.t_clean, schedule.t_of_lam(torch.log1p(-inner) - torch.log(inner)))


def log_linear(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """Return the times ``[*]`` whose ``log sigma`` is linear between two neighbours of a table, as A1111 and ComfyUI have it."""
    below = times.floor()
    lower, upper = schedule.lam(below), schedule.lam(times.ceil())
    found = schedule.t_of_lam(torch.lerp(lower, upper, times - below))
    return torch.where((times == below) | ~torch.isfinite(upper), times, found)


def ended(at: Callable[[int], Tensor], steps: int, end: str, zero: float = 0.0) -> Tensor:
    """Return ``steps + 1`` levels or times by the rule of their end.

    Args:
        at: the function from a count to as many levels of the curve, both of its ends among them.
        steps: number of intervals ``N``.
        end: ``append``, ``clean`` or ``sigma_min``, see this module.
        zero: the clean image, as a level or as a time.

    Raises:
        GridError: another end, or no whole number of steps.
    """
    look_up(end, ENDS, "end of a grid", GridError)
    count = step_count(steps)
    if end == "sigma_min":
        return at(count + 1)
    return torch.cat([at(count) if end == "append" else at(count + 1)[:-1], torch.tensor([zero], dtype=torch.float64)])


def picked(name: str, schedule: NoiseSchedule, table: Tensor, index: list[int]) -> TimeGrid:
    """Return the grid of these entries of a table, then the clean image.

    Raises:
        GridError: one appears twice.
    """
    distinct = len(set(index))
    if distinct < len(index):
        raise GridError(
            f"{len(index)} steps of grid {name!r} fall on {distinct} of the law's {len(table)} times: use at most as many, or another grid"
        )
    return TimeGrid(torch.cat([table[index], torch.tensor([schedule.t_clean], dtype=torch.float64)]))


def decreasing(levels: Tensor, name: str, mend: str) -> Tensor:
    """Return levels ``[N+1]`` that decrease.

    Raises:
        GridError: they do not; ``mend`` says what to do.
    """
    if bool((torch.diff(levels) >= 0).any()):
        raise GridError(f"{len(levels) - 1} steps of grid {name!r} have noise levels that do not decrease: {mend}")
    return levels


def finite_option(value: Any, option: str, name: str) -> float:  # noqa: ANN401 - whatever was passed
    """Return an option of a grid that is a finite number.

    Raises:
        GridError: it is not.
    """
    found = number(value, f"option {option} of grid {name!r}", GridError)
    if not math.isfinite(found):
        raise GridError(f"option {option} of grid {name!r} is a finite number, got {found}")
    return found


def positive_option(value: Any, option: str, name: str) -> float:  # noqa: ANN401
    """Return an option of a grid that is a number above 0.

    Raises:
        GridError: it is not.
    """
    found = finite_option(value, option, name)
    if found <= 0:
        raise GridError(f"option {option} of grid {name!r} is above 0, got {found:g}")
    return found


def option_between(value: Any, option: str, name: str, low: float, high: float) -> float:  # noqa: ANN401
    """Return an option of a grid that lies between two numbers, neither of them included.

    Raises:
        GridError: it does not.
    """
    found = finite_option(value, option, name)
    if not low < found < high:
        raise GridError(f"option {option} of grid {name!r} lies between {low:g} and {high:g}, got {found:g}")
    return found


def whole_option(value: Any, option: str, name: str) -> int:  # noqa: ANN401
    """Return an option of a grid that is a whole number.

    Raises:
        GridError: it is not.
    """
    found = finite_option(value, option, name)
    if found % 1:
        raise GridError(f"option {option} of grid {name!r} is a whole number, got {found:g}")
    return int(found)
