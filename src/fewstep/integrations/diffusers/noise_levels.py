"""The `TimeGrid` that diffusers' options describe: spacings of timesteps, noise levels by name, shifts of flows.

Times are never rounded after the fact. Spacings of timesteps are whole numbers because their rule says so; where two would fall together
they stay fractions. Noise levels (Karras, exponential, beta) are met exactly, at the fraction of a timestep that has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.core.beta_distribution import beta_quantiles
from fewstep.core.curves import linear_quadratic_sigmas
from fewstep.core.flow_shifts import shifted, stretched_to_terminal
from fewstep.core.grid import RHO, TimeGrid, karras_roots
from fewstep.core.schedule import NoiseSchedule, RectifiedFlow, VPCosine
from fewstep.integrations.diffusers.arguments import numbers
from fewstep.models.formats.diffusers_law import ROUNDING, NoiseLaw, ends_clean
from fewstep.runtime.errors import GridError, look_up
from fewstep.runtime.front_door import is_count
from fewstep.sampling.start import begin, level_of, spacing_from

__all__ = ["all_times", "checked_times", "default_sigmas_count", "grid_from_config"]

LARGEST = 2.0**12  # the noise level that spacings of levels begin at where the table ends without signal
SHORTEST = 1e-6  # of the way to the clean image: the last step of levels that end where their last evaluation is
CALLED = (1.0, 2.0, 3.0)  # shifts that a call of ACE-Step has
LEVELS = ("karras", "exponential", "beta", "lu")  # use_{name}_sigmas


def grid_from_config(
    config: Mapping[str, Any],
    law: NoiseLaw,
    steps: int | None,
    *,
    timesteps: Sequence[float] | Tensor | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
) -> TimeGrid:
    """Return the grid of ``steps`` intervals that a scheduler's options describe, or the grid through timesteps or noise levels.

    With a ``strength`` it begins at that level: a spacing of this library is laid below it, any other grid re-spread (`TimeGrid.below`).

    Args:
        config: the options of a `FewstepScheduler`.
        law: the noise law of its network.
        steps: number of intervals; None where timesteps or sigmas are given.
        timesteps: the network's own times ``[M]``, decreasing, without the end.
        sigmas: noise levels ``sigma/alpha [M]``, or a flow's ``sigma`` before its shift; a last 0 is the end rather than an evaluation.
            A flow may be given timesteps beside them: those that its network is told at these levels (`NoiseLaw.paired`).

    Raises:
        GridError: not exactly one of the three, an unknown option, a strength at which no step can begin, or times that do not decrease.
    """
    start = begin(law.schedule, level_of(config.get("strength") or 1.0))
    grid = _whole_grid(config, law, steps, start, timesteps=timesteps, sigmas=sigmas)
    return grid if start == float(law.schedule.t_max) else grid.below(law.schedule, start)


def _whole_grid(
    config: Mapping[str, Any],
    law: NoiseLaw,
    steps: int | None,
    start: float,
    *,
    timesteps: Sequence[float] | Tensor | None,
    sigmas: Sequence[float] | Tensor | None,
) -> TimeGrid:
    """Return the grid on the law's whole range; a spacing of this library from ``start`` on."""
    given = [name for name, value in {"num_inference_steps": steps, "timesteps": timesteps, "sigmas": sigmas}.items() if value is not None]
    paired = timesteps is not None and sigmas is not None and isinstance(law.schedule, RectifiedFlow)
    if not given or "timesteps" in given and len(given) > 1 and not paired:
        raise GridError(f"set_timesteps wants one of num_inference_steps, timesteps or sigmas, got {' and '.join(given) or 'none'}")
    wanted = None if sigmas is None else numbers(sigmas, "sigmas")
    if steps is not None and not is_count(steps) and (steps != 0 or isinstance(steps, bool)):
        raise GridError(f"the number of steps is a whole number, got {steps}")
    if wanted is not None and not len(wanted):
        raise GridError("sigmas are empty: give at least one, or num_inference_steps")
    if wanted is not None and steps is not None and len(wanted) - int(bool(wanted[-1] == 0)) != steps:
        raise GridError(f"{steps} steps were asked for with {len(wanted)} sigmas: leave one of the two out")
    if timesteps is not None:
        times = checked_times(config, law, timesteps)
        if wanted is None:
            return _ended(config, law, law.t_of_time(times))
        if len(times) != len(wanted) - int(bool(wanted[-1] == 0)):
            raise GridError(f"timesteps and sigmas come in pairs, got {len(times)} and {len(wanted)}")
    if config.get("grid"):
        if wanted is not None:
            raise GridError(f"this scheduler has a grid of its own, {config['grid']}: leave sigmas out, or make it without grid=")
        return spacing_from(str(config["grid"]), law.schedule, int(steps or 0), start)
    if isinstance(law.schedule, RectifiedFlow):
        return _ended(config, law, _flow(config, law.schedule, steps, wanted))
    of_angles = isinstance(law.schedule, VPCosine)
    if law.schedule.times is None and not of_angles:
        raise GridError("timestep spacings are for discrete times and flows: make the scheduler with grid=, for example karras")
    if wanted is not None:
        wanted = wanted[:-1] if bool(wanted[-1] == 0) else wanted
        return _ended(config, law, law.schedule.t_of_lam(-torch.log(wanted)))
    name = _named(config) or (str(config.get("sigma_schedule") or "exponential") if of_angles else None)
    if name is None:
        return _ended(config, law, _spaced(config, law.schedule, int(steps or 0)))
    ends = torch.exp(-law.schedule.lam(torch.tensor([law.schedule.t_max, 0.0], dtype=torch.float64))).clamp(max=LARGEST)
    high, low = _falling(*(float(config.get(key) or end) for key, end in zip(("sigma_max", "sigma_min"), ends, strict=True)))
    levels = _levels(name, high, low, int(steps or 0), float(config.get("rho", RHO)))
    return _ended(config, law, law.schedule.t_of_lam(-torch.log(levels)))


def all_times(count: int, law: NoiseLaw) -> Tensor:
    """Return the times ``[count]`` of training, float32: ``count - 1 .. 0``, or angles from the first level's on."""
    if isinstance(law.schedule, VPCosine):
        return law.schedule.t_max * torch.arange(count, 0, -1, dtype=torch.float32) / count
    return torch.arange(count - 1, -1, -1, dtype=torch.float32)


def checked_times(config: Mapping[str, Any], law: NoiseLaw, timesteps: Any) -> Tensor:  # noqa: ANN401 - a number, a list, an array or a tensor
    """Return the network's own times as ``[M]``, float64, on the CPU.

    Raises:
        GridError: there are none, or one that the network does not know.
    """
    times = numbers(timesteps, "timesteps")
    most = float(config.get("num_train_timesteps", 1000)) - (law.schedule.times is not None)
    most = 1.0 if isinstance(law.schedule, VPCosine) else most
    slack = 0.0 if law.schedule.times is not None else ROUNDING * most
    if not len(times) or not bool(((times >= 0) & (times <= most + slack)).all()):
        raise GridError(f"timesteps lie between 0 and {most:g}, got {times.tolist()}")
    return times.clamp(max=most)


def default_sigmas_count(sigmas: Any) -> int | None:  # noqa: ANN401 - a list, an array or a tensor
    """Return the number of a flow pipeline's default sigmas, None of other sigmas. Such pipelines always pass some.

    They are uniform from 1, shifted by 1, 2 or 3 (ACE-Step), or Mochi's: linear over the first half of the steps, then quadratic.
    """
    given = numbers(sigmas, "sigmas")
    uniform = torch.linspace(1, 1 / max(len(given), 1), len(given), dtype=torch.float64)
    usual = [shifted(uniform, shift) for shift in CALLED]
    usual += [linear_quadratic_sigmas(len(given))] if len(given) > 1 else []
    return len(given) if len(given) and any(torch.allclose(given, sigmas, rtol=1e-5) for sigmas in usual) else None


def _ended(config: Mapping[str, Any], law: NoiseLaw, times: Tensor) -> TimeGrid:
    """Return the grid through these times ``[M]`` and its end: the clean image (``zero``), or the model's last time (``sigma_min``)."""
    schedule, kind, clean = law.schedule, config.get("final_sigmas_type", "zero"), ends_clean(config)
    if kind not in ("zero", "sigma_min"):
        raise GridError(f"final_sigmas_type is zero or sigma_min, got {kind!r}")
    end = schedule.t_clean
    if not clean and len(times):
        last = float(times[-1])
        end = min(last if schedule.times is None else schedule.t_last, last - SHORTEST * (last - schedule.t_clean))
    if schedule.times is not None and len(times) and not float(schedule.alpha(times[0])) > 0 and float(times[0]) > schedule.t_max:
        raise GridError(f"time {float(times[0]):g} lies beyond pure noise, which is at {schedule.t_max:g}: use fewer steps or offset 0")
    return TimeGrid(torch.cat([times, torch.tensor([end], dtype=torch.float64)]))


def _named(config: Mapping[str, Any]) -> str | None:
    chosen = [name for name in LEVELS if config.get(f"use_{name}_{'lambdas' if name == 'lu' else 'sigmas'}")]
    if len(chosen) > 1:
        raise GridError(f"noise levels are of one kind, but {' and '.join(chosen)} are asked for")
    return chosen[0] if chosen else None


def _falling(high: float, low: float) -> tuple[float, float]:
    if not 0 < low < high:
        raise GridError(f"noise levels run from sigma_max down to a smaller sigma_min above 0, got {high:g} and {low:g}")
    return high, low


def _levels(name: str, high: float, low: float, steps: int, rho: float = RHO) -> Tensor:
    """Return ``steps`` noise levels from ``high`` to ``low``, both included."""
    if steps < 1:
        raise GridError(f"a grid needs at least 1 step, got {steps}")
    if name == "karras":
        return karras_roots(*torch.tensor([high, low], dtype=torch.float64), count=steps, rho=rho) ** rho
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if name == "beta":
        return low + beta_quantiles(1 - ramp, 0.6, 0.6) * (high - low)
    return torch.exp(math.log(high) + ramp * math.log(low / high))  # exponential; Lu's lambdas are the same levels


def _spaced(config: Mapping[str, Any], schedule: NoiseSchedule, steps: int) -> Tensor:
    """Return ``linspace``, ``leading`` or ``trailing`` timesteps ``[steps]`` (arXiv 2305.08891, table 2), as diffusers' DPM-Solver does."""
    if steps < 1:
        raise GridError(f"a grid needs at least 1 step, got {steps}")
    clip = float(config.get("lambda_min_clipped", -math.inf))
    last = int((schedule.lam(torch.arange(int(schedule.t_max) + 1, dtype=torch.float64)) >= clip).sum())
    if last < 1:
        raise GridError(f"no time of the model has lambda above lambda_min_clipped = {clip:g}")

    def linspace() -> Tensor:
        return torch.linspace(last - 1, 0, steps + 1, dtype=torch.float64)[:-1]

    def leading() -> Tensor:
        return torch.arange(steps, 0, -1, dtype=torch.float64) * (last // (steps + 1)) + int(config.get("steps_offset", 0))

    def trailing() -> Tensor:
        return last - torch.arange(steps, dtype=torch.float64) * (last / steps) - 1

    rules: dict[str, Callable[[], Tensor]] = {"linspace": linspace, "leading": leading, "trailing": trailing}
    times = look_up(str(config.get("timestep_spacing", "linspace")), rules, "timestep spacing", GridError)()
    whole = (times + 1).round() - 1 if config.get("timestep_spacing") == "trailing" else times.round()
    return whole if bool((torch.diff(whole) < 0).all()) and bool(whole[-1] >= 0) else times


def _flow(config: Mapping[str, Any], schedule: RectifiedFlow, steps: int | None, sigmas: Tensor | None) -> Tensor:
    """Return a flow's times ``[M]``: uniform ``u`` from 1 or ``sigmas``, shifted, stretched to ``shift_terminal``, respaced by name.

    Respaced levels are a flow's ``sigma`` between the first and the last of these, as diffusers' flow scheduler has it; with ``sigma_max``
    and ``sigma_min`` they are ``sigma/alpha`` between those, as its UniPC has it, and the shift does not count.
    """
    if sigmas is None:
        if steps is None or steps < 1:
            raise GridError(f"a grid needs at least 1 step, got {steps}")
        sigmas = torch.linspace(1, 1 / float(config.get("num_train_timesteps", 1000)), steps + 1, dtype=torch.float64)[:-1]
    sigmas = sigmas[:-1] if bool(sigmas[-1] == 0) else sigmas
    if len(sigmas) < 1 or bool((sigmas <= 0).any()) or bool((sigmas > 1 + ROUNDING).any()):
        raise GridError(f"the sigmas of a flow lie between 0 and 1, got {sigmas.tolist()}")
    sigmas, name, terminal = schedule.sigma(sigmas.clamp(max=1.0)), _named(config), config.get("shift_terminal")
    if terminal:
        sigmas = stretched_to_terminal(sigmas, float(terminal))
    high, low = config.get("sigma_max"), config.get("sigma_min")
    if name is not None and (high is not None or low is not None):
        if high is None or low is None:
            raise GridError(f"sigma_min and sigma_max of a flow go together, got {low} and {high}: give both or none")
        level = _levels(name, *_falling(float(high), float(low)), len(sigmas))
        sigmas = level / (1 + level)
    elif name is not None:
        sigmas = _levels(name, float(sigmas[0]), float(sigmas[-1]), len(sigmas)).clamp(max=1.0)
    return schedule.t_of_lam(torch.log1p(-sigmas) - torch.log(sigmas))
