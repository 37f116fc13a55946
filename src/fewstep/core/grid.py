r"""Time grids: where a sampler evaluates the network.

A grid is ``[M+1]`` strictly decreasing float64 times for ``M`` steps. The spacings are uniform in some function of time;
those in ``lam`` or the noise level hold for any schedule, the last three are diffusers' and want a discrete one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.errors import GridError, counted
from fewstep.runtime.front_door import check_size, checked, checked_class, is_count, number

__all__ = ["RHO", "TimeGrid", "check_law", "grid_ends", "karras_roots", "nearest_time", "step_count"]

log = logging.getLogger("fewstep")
ROUNDING = 1e-6  # of a time: a round trip through a noise level
SHOWN = 5  # of a long list in an error
RHO = 7.0  # of Karras noise levels, where nothing is said (EDM, table 1)


@checked_class
@dataclass(frozen=True, eq=False, repr=False)
class TimeGrid:
    """The times at which a sampler evaluates the network, and the end: ``t [M+1]``, float64, strictly decreasing.

    Args:
        t: the times, a tensor or list; checked at construction.

    Raises:
        GridError: fewer than two times, a non-finite one, or two neighbours that do not decrease (which, and their values).
    """

    t: Tensor

    def __post_init__(self) -> None:
        try:
            t = torch.as_tensor(self.t, dtype=torch.float64).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise GridError(f"a grid is a list of times, as TimeGrid([1.0, 0.5, 0.0]), got {str(self.t)[:80]!r}") from error
        object.__setattr__(self, "t", t)
        if t.ndim != 1 or len(t) < 2:
            raise GridError(f"a grid needs a 1-d list of at least 2 times, got shape {tuple(t.shape)}; one step is [start, end]")
        if not bool(torch.isfinite(t).all()):
            raise GridError(f"time {int((~torch.isfinite(t)).nonzero()[0])} of the grid is not finite: {t.tolist()}")
        stuck = (torch.diff(t) >= 0).nonzero()
        if len(stuck):
            i = int(stuck[0])
            what = "appears twice" if t[i] == t[i + 1] else f"is followed by the larger {t[i + 1]:g}"
            raise GridError(f"times must strictly decrease, but {t[i]:g} (at index {i}) {what}; use fewer steps or another spacing")

    def __repr__(self) -> str:
        return f"TimeGrid({counted(self.steps, 'step')}, t = {float(self.t[0]):.4g} to {float(self.t[-1]):.4g})"

    @property
    def steps(self) -> int:
        """The number of intervals ``M``."""
        return len(self.t) - 1

    # -- spacings ---------------------------------------------------------------------------------------------------

    @classmethod
    @checked
    def logsnr(cls, schedule: NoiseSchedule, steps: int, *, t_max: float | None = None, t_min: float | None = None) -> TimeGrid:
        """Return a grid of ``steps`` intervals, uniform in ``lam`` (DPM-Solver, arXiv 2206.00927). Both ends need a finite ``lam``."""
        ends = grid_ends(schedule, t_max, t_min)
        lam = schedule.lam(ends)
        if not bool(torch.isfinite(lam).all()):
            raise GridError(f"logsnr spacing needs finite lam at both ends, got {lam.tolist()}: pass t_max and t_min, or use angle")
        return cls(_pin(schedule.t_of_lam(_linspace(lam[0], lam[1], steps)), ends))

    @classmethod
    @checked
    def karras(
        cls, schedule: NoiseSchedule, steps: int, *, rho: float = RHO, t_max: float | None = None, t_min: float | None = None
    ) -> TimeGrid:
        """Return a grid of ``steps`` intervals, uniform in ``(sigma/alpha)^(1/rho)`` (EDM, arXiv 2206.00364, eq. 5).

        The start needs ``alpha > 0``.
        """
        ends = grid_ends(schedule, t_max, t_min)
        level = torch.exp(-schedule.lam(ends))
        if not bool(torch.isfinite(level).all()):
            raise GridError("karras spacing needs alpha > 0 at its start: pass t_max, or use angle")
        if not abs(number(rho, "rho of the karras spacing", GridError)) > 0:
            raise GridError("the karras spacing cannot take rho = 0")
        roots = karras_roots(level[0], level[1], step_count(steps) + 1, rho)
        return cls(_pin(schedule.t_of_lam(-rho * torch.log(roots)), ends))

    @classmethod
    @checked
    def uniform(cls, schedule: NoiseSchedule, steps: int, *, t_max: float | None = None, t_min: float | None = None) -> TimeGrid:
        """Return a grid of ``steps`` intervals, uniform in ``t``."""
        ends = grid_ends(schedule, t_max, t_min)
        return cls(_pin(_linspace(ends[0], ends[1], steps), ends))

    @classmethod
    @checked
    def quadratic(cls, schedule: NoiseSchedule, steps: int, *, t_max: float | None = None, t_min: float | None = None) -> TimeGrid:
        """Return a grid of ``steps`` intervals, uniform in ``sqrt(t - t_clean)``."""
        ends = grid_ends(schedule, t_max, t_min)
        root = torch.sqrt(ends - schedule.t_clean)
        return cls(_pin(_linspace(root[0], root[1], steps) ** 2 + schedule.t_clean, ends))

    @classmethod
    @checked
    def angle(
        cls,
        schedule: NoiseSchedule,
        steps: int,
        *,
        c: float = 1.0,
        power: float = 1.0,
        t_max: float | None = None,
        t_min: float | None = None,
    ) -> TimeGrid:
        """Return a grid of ``steps`` intervals, uniform in ``arctan(sigma / (c alpha))^(1/power)``.

        With ``c = power = 1`` this is the time of the cosine schedule, finite at both ends whatever the schedule. With ``power`` 2 it is
        quadratic in that time, and closer towards the image.
        """
        c, power = number(c, "c of the angle spacing", GridError), number(power, "power of the angle spacing", GridError)
        if not (c > 0 and power > 0):
            raise GridError(f"the angle spacing needs c > 0 and power > 0, got {c:g} and {power:g}")
        ends = grid_ends(schedule, t_max, t_min)
        root = torch.atan2(schedule.sigma(ends), c * schedule.alpha(ends)) ** (1 / power)
        inner = _linspace(root[0], root[1], steps) ** power
        return cls(_pin(_time_of_angle(schedule, inner, c), ends))

    @classmethod
    @checked
    def linspace(cls, schedule: NoiseSchedule, steps: int, *, t_max: float | None = None, t_min: float | None = None) -> TimeGrid:
        """Return diffusers' ``linspace`` grid as its DPM-Solver, UniPC and DEIS have it: integers nearest to uniform times."""
        ends = grid_ends(_discrete(schedule, "linspace"), t_max, t_min)
        return cls(_linspace(ends[0], ends[1], steps).round())

    @classmethod
    @checked
    def leading(
        cls, schedule: NoiseSchedule, steps: int, *, offset: int = 1, t_max: float | None = None, t_min: float | None = None
    ) -> TimeGrid:
        """Return diffusers' ``leading`` grid as its DDIM has it: multiples of ``T // steps`` plus ``offset`` (its ``steps_offset``)."""
        if number(offset, "the offset of the leading spacing", GridError) % 1:
            raise GridError(f"the offset of the leading spacing is a whole number of times, got {offset}")
        ends = grid_ends(_discrete(schedule, "leading"), t_max, t_min)
        count = int(ends[0]) + 1
        times = torch.arange(step_count(steps) - 1, -1, -1, dtype=torch.float64) * (count // steps) + offset
        return cls(torch.cat([times, ends[1:]]))

    @classmethod
    @checked
    def trailing(cls, schedule: NoiseSchedule, steps: int, *, t_max: float | None = None, t_min: float | None = None) -> TimeGrid:
        """Return diffusers' ``trailing`` grid: from the last time down in strides of ``T / steps``."""
        ends = grid_ends(_discrete(schedule, "trailing"), t_max, t_min)
        count = int(ends[0]) + 1
        times = (count - torch.arange(step_count(steps), dtype=torch.float64) * (count / steps)).round() - 1
        return cls(torch.cat([times, ends[1:]]))

    @classmethod
    @checked
    def from_sigmas(cls, schedule: NoiseSchedule, sigmas: Sequence[float] | Tensor) -> TimeGrid:
        """Return the grid through noise levels ``sigma/alpha [M+1]``, k-diffusion's and diffusers' ``sigmas``; a last 0 is the clean image.

        Levels beyond a table of times are kept; the network is told its first or last time there (the logger ``fewstep`` says so).

        Raises:
            GridError: they do not decrease, or are no numbers from 0.
        """
        check_law(schedule)
        try:
            level = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise GridError(f"noise levels are a list of numbers, as [80.0, 5.0, 0.0], got {str(sigmas)[:80]!r}") from error
        if not bool((level >= 0).all()):
            raise GridError(f"noise levels are numbers from 0, got {str(level.tolist())[:80]}")
        t = torch.where(level == 0, schedule.t_clean, schedule.t_of_lam(-torch.log(level)))
        if bool(((t - schedule.held(t)).abs() > ROUNDING)[level > 0].any()):
            log.warning("noise levels beyond the model's table are kept, and its network is told its first or last time")
        return cls(t)

    # -- changes ----------------------------------------------------------------------------------------------------

    def snap(self, times: Tensor) -> TimeGrid:
        """Return the grid with each time moved to the nearest of ``times [T]``, for a network that knows only those.

        Raises:
            GridError: two times fall on the same entry (the grid is finer than the table there); something that is no table of times.
        """
        try:
            table = torch.as_tensor(times, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            table = torch.empty(0)
        if table.ndim != 1 or len(table) < 2 or not bool(torch.isfinite(table).all()):
            raise GridError(f"a grid is snapped to a table of at least 2 finite times [T], got {str(times)[:80]}")
        return self._moved(nearest_time(self.t, torch.sort(table).values))

    def _moved(self, snapped: Tensor) -> TimeGrid:
        if bool((torch.diff(snapped) == 0).any()):
            twice = sorted(set(snapped[1:][torch.diff(snapped) == 0].tolist()))
            shown = ", ".join(f"{time:g}" for time in twice[:SHOWN]) + (f" and {len(twice) - SHOWN} others" if len(twice) > SHOWN else "")
            raise GridError(f"{self.steps} steps of this spacing fall more than once on the model's time {shown}; use fewer or another")
        return TimeGrid(snapped)

    def known_to(self, schedule: NoiseSchedule) -> TimeGrid:
        """Return the grid snapped to the times that the schedule's network knows; the same grid if it knows all times.

        Times beyond the first and the last of them keep their noise level; the network is told the first or last there.

        Raises:
            GridError: as `snap`.
        """
        check_law(schedule)
        if schedule.times is None:
            return self
        held = schedule.held(self.t)
        beyond = ((self.t - held).abs() > ROUNDING) & (self.t != schedule.t_clean)
        return self._moved(torch.where(beyond, self.t, nearest_time(self.t, schedule.times)))

    def stretched(self, schedule: NoiseSchedule, steps: int) -> TimeGrid:
        """Return a grid of another number of steps with the same density in ``lam``, snapped on a discrete schedule.

        Raises:
            GridError: ``lam`` is infinite at an end, or times coincide after snapping.
        """
        check_law(schedule)
        lam = schedule.lam(self.t)
        if not bool(torch.isfinite(lam).all()):
            raise GridError("only a grid with finite lam at both ends can be stretched to another number of steps")
        where = torch.linspace(0, self.steps, step_count(steps) + 1, dtype=torch.float64)[1:-1]
        index = where.floor().long().clamp(max=self.steps - 1)
        inner = schedule.t_of_lam(torch.lerp(lam[index], lam[index + 1], where - index))
        return TimeGrid(torch.cat([self.t[:1], inner, self.t[-1:]])).known_to(schedule)

    def below(self, schedule: NoiseSchedule, t: float) -> TimeGrid:
        """Return the grid re-spread below a time: as many steps, from exactly ``t`` to the same end, with the same density.

        It is the density in the angle ``arctan(sigma/alpha)``, which is finite at both ends of every law. Where all evaluations are at
        times of a discrete schedule's table, so are those of the new grid.

        Args:
            schedule: the noise law that the times are of.
            t: the first time, after the end of this grid and not before its start.

        Raises:
            GridError: another time, or times that coincide in the table.
        """
        check_law(schedule)
        t = number(t, "the time to begin at", GridError)
        first, last = float(self.t[0]), float(self.t[-1])
        if t == first:
            return self
        if not last < t < first:
            high, low, asked = torch.exp(-schedule.lam(torch.tensor([first, last, t], dtype=torch.float64))).tolist()
            raise GridError(
                f"this grid runs from noise level {high:.4g} to {low:.4g} (times {first:g} to {last:g}), so it cannot begin at {asked:.4g} "
                f"(time {t:g}): begin between them, or take a grid that starts higher"
            )
        start = torch.tensor([t], dtype=torch.float64)
        theta, angle = (torch.atan2(schedule.sigma(at), schedule.alpha(at)) for at in (self.t.detach(), start))
        before = int((theta > angle).sum()) - 1  # the step in which the new grid begins
        place = before + float((theta[before] - angle) / (theta[before] - theta[before + 1]))
        where = torch.linspace(place, self.steps, self.steps + 1, dtype=torch.float64)[1:-1]
        index = where.floor().long().clamp(max=self.steps - 1)
        inner = _time_of_angle(schedule, torch.lerp(theta[index], theta[index + 1], where - index))
        evaluated = self.t[:-1].detach()  # those beyond a table keep their noise level
        if schedule.times is not None and bool((torch.isin(evaluated, schedule.times) | (evaluated > schedule.t_max)).all()):
            inner = nearest_time(inner, schedule.times[1:])  # the first is the clean image, where nothing is evaluated
        return self._moved(torch.cat([start, inner, self.t[-1:].detach()]))

    def to_clean(self, schedule: NoiseSchedule) -> TimeGrid:
        """Return the grid with its end moved to ``sigma = 0`` (diffusers' ``final_sigmas_type="zero"``); evaluations stay."""
        return TimeGrid(torch.cat([self.t[:-1], torch.tensor([schedule.t_clean], dtype=torch.float64)]))


def karras_roots(high: Tensor, low: Tensor, count: int, rho: float = RHO) -> Tensor:
    """Return the ``rho``-th roots ``[count]`` of EDM's noise levels (Karras et al., arXiv 2206.00364, eq. 5), which are spaced uniformly.

    Args:
        high: first noise level ``sigma/alpha []``.
        low: last noise level ``[]``; a single level is the first.
        count: number of levels.
        rho: the larger, the closer the levels lie at their low end.
    """
    start, end = high ** (1 / rho), low ** (1 / rho)
    return start + torch.linspace(0, 1, count, dtype=torch.float64) * (end - start)


def step_count(steps: int) -> int:
    """Return a number of steps as an int.

    Raises:
        GridError: it is no whole number of at least 1, or of an absurd size.
    """
    if not is_count(steps):
        raise GridError(f"a grid needs at least 1 step, a whole number of them, got {steps!r}")
    check_size("steps of a grid", int(steps), GridError)
    return int(steps)


def grid_ends(schedule: NoiseSchedule, t_max: float | None, t_min: float | None) -> Tensor:
    """Return the first and the last time of a spacing ``[2]``, float64: those given, or else the law's.

    Raises:
        GridError: they do not decrease, or lie outside a table of times.
    """
    check_law(schedule)
    given = {"t_max": schedule.t_max if t_max is None else t_max, "t_min": schedule.t_min if t_min is None else t_min}
    ends = [number(end, f"{name} of a grid", GridError) for name, end in given.items()]
    if not (math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] > ends[1]):
        raise GridError(f"a grid runs from t_max down to a smaller t_min, got {ends[0]:g} and {ends[1]:g}")
    if schedule.times is not None and (ends[0] > schedule.t_max or ends[1] < schedule.t_clean):
        raise GridError(f"this law has times from {schedule.t_max:g} down to {schedule.t_clean:g}, not from {ends[0]:g} to {ends[1]:g}")
    return torch.tensor(ends, dtype=torch.float64)


def check_law(schedule: object) -> None:
    """Refuse what is no noise law.

    Raises:
        GridError: it is none.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise GridError(f"a grid is laid out on a noise law, as fewstep.VPLinear() or model.schedule, got {str(schedule)[:80]}")


def _time_of_angle(schedule: NoiseSchedule, angle: Tensor, c: float = 1.0) -> Tensor:
    """Return the times at which ``arctan(sigma / (c alpha))`` is ``angle [*]``, between the ends of the law."""
    return schedule.t_of_lam(-torch.log(c * torch.tan(angle)))


def _linspace(start: Tensor, end: Tensor, steps: int) -> Tensor:
    weight = torch.linspace(0, 1, step_count(steps) + 1, dtype=torch.float64)
    return start + weight * (end - start)


def _pin(t: Tensor, ends: Tensor) -> Tensor:
    """Return the times with exact ends: a round trip through ``lam`` may move them by an ulp, or to where ``lam`` is infinite."""
    return torch.cat([ends[:1], t[1:-1], ends[1:]])


def nearest_time(t: Tensor, table: Tensor) -> Tensor:
    """Return the entry of an increasing table ``[T]`` that is nearest to each time ``t [*]``."""
    right = torch.searchsorted(table, t.detach()).clamp(1, len(table) - 1)
    return torch.where(t - table[right - 1] < table[right] - t, table[right - 1], table[right])


def _discrete(schedule: NoiseSchedule, name: str) -> NoiseSchedule:
    if schedule.times is None:
        raise GridError(f"the {name} spacing is for models with discrete times; use uniform, angle, karras or logsnr")
    return schedule
