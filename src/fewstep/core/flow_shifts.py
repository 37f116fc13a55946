"""Shifts of a rectified flow's time, by name: static, by the image's size, and to a last level."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid, grid_ends
from fewstep.core.levels import TIMES, decreasing, ended, finite_option, option_between, positive_option, time_of_share
from fewstep.core.schedule import NoiseSchedule, RectifiedFlow
from fewstep.runtime.errors import GridError, look_up
from fewstep.runtime.front_door import checked

__all__ = ["SHIFTS", "dynamic_shift", "shift", "shift_of_size", "shifted", "stretched_to_terminal"]


@checked
def shift(
    schedule: NoiseSchedule,
    steps: int,
    *,
    shift: float | None = None,
    shift_terminal: float | None = None,
    end: str = "clean",
    t_max: float | None = None,
) -> TimeGrid:
    """Make the grid of a flow's uniform times under a static shift: ``sigma = shift u / (1 + (shift - 1) u)`` (arXiv 2403.03206).

    With the end ``clean`` the times ``u`` are ``1, 1 - 1/N, .. 1/N`` and 0, as pipelines pass them. With ``append`` they run to the lowest
    level, as diffusers' ``FlowMatchEulerDiscreteScheduler`` has it where a call passes none: the shift of ``1/1000``, shifted once more.

    Args:
        schedule: a `RectifiedFlow`.
        steps: number of intervals ``N``.
        shift: in place of the law's own, which it is by default; above 0.
        shift_terminal: the last level before the end, between 0 and 1: the levels are stretched to it, as for LTX-Video.
        end: ``append``, ``clean`` or ``sigma_min``, see `fewstep.core.levels`.
        t_max: the first time, by default the law's.

    Raises:
        GridError: a law that is no flow, or an option out of its range.
    """
    flow = _flow(schedule, "shift")
    factor = flow.shift if shift is None else positive_option(shift, "shift", "shift")
    return _shifted(
        "shift", flow, steps, factor, float(shifted(torch.tensor(1 / TIMES, dtype=torch.float64), factor)), shift_terminal, end, t_max
    )


@checked
def dynamic_shift(
    schedule: NoiseSchedule,
    steps: int,
    *,
    mu: float | None = None,
    image_seq_len: float | None = None,
    width: float | None = None,
    height: float | None = None,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_image_seq_len: float = 256,
    max_image_seq_len: float = 4096,
    time_shift_type: str = "exponential",
    shift_terminal: float | None = None,
    end: str = "clean",
    t_max: float | None = None,
) -> TimeGrid:
    """Make the grid of a flow's uniform times under a shift that follows the image's size (diffusers' ``use_dynamic_shifting``, Flux).

    The shift is ``exp(mu)``, or ``mu`` itself for the type ``linear``. ``mu`` is given, or linear in the number of image tokens. It takes
    the place of the law's own shift.

    Args:
        schedule: a `RectifiedFlow`.
        steps: number of intervals ``N``.
        mu: the parameter of the shift, in place of a size.
        image_seq_len: number of image tokens.
        width: of the image in pixels, with ``height`` in place of ``image_seq_len``: a token is 16 x 16 pixels.
        height: of the image in pixels.
        base_shift: ``mu`` at ``base_image_seq_len``.
        max_shift: ``mu`` at ``max_image_seq_len``.
        base_image_seq_len: number of tokens.
        max_image_seq_len: number of tokens.
        time_shift_type: ``exponential`` or ``linear``.
        shift_terminal: the last level before the end, between 0 and 1: the levels are stretched to it, as for LTX-Video.
        end: ``append``, ``clean`` or ``sigma_min``, see `fewstep.core.levels`; as for `shift`, with ``1/1000`` as the lowest time.
        t_max: the first time, by default the law's.

    Raises:
        GridError: a law that is no flow, neither or both of ``mu`` and a size, or an option out of its range.
    """
    name = "dynamic_shift"
    flow = _flow(schedule, name)
    look_up(time_shift_type, dict.fromkeys(("exponential", "linear")), "time_shift_type", GridError)
    pixels = (width, height)
    sizes = [value is not None for value in (mu, image_seq_len, *pixels)]
    if sizes not in ([True, False, False, False], [False, True, False, False], [False, False, True, True]):
        raise GridError(
            "dynamic_shift needs one of mu, image_seq_len, or width and height of the image, as dynamic_shift:image_seq_len=4096 "
            "or dynamic_shift:width=1024:height=1024"
        )
    if mu is None:
        tokens = image_seq_len
        if width is not None and height is not None:
            tokens = positive_option(width, "width", name) * positive_option(height, "height", name) / 256
        mu = shift_of_size(
            positive_option(tokens, "image_seq_len", name),
            base_shift=finite_option(base_shift, "base_shift", name),
            max_shift=finite_option(max_shift, "max_shift", name),
            base_image_seq_len=finite_option(base_image_seq_len, "base_image_seq_len", name),
            max_image_seq_len=finite_option(max_image_seq_len, "max_image_seq_len", name),
        )
    exponent = finite_option(mu, "mu", name)
    linear = time_shift_type == "linear"
    factor = positive_option(exponent, "mu", name) if linear else math.exp(option_between(exponent, "mu", name, -100, 100))
    return _shifted(name, flow, steps, factor, 1 / TIMES, shift_terminal, end, t_max)


SHIFTS: dict[str, Callable[..., TimeGrid]] = {"dynamic_shift": dynamic_shift, "shift": shift}


def shifted(sigma: Tensor, factor: float) -> Tensor:
    """Return a flow's times ``[*]`` under a static shift, ``factor u / (1 + (factor - 1) u)`` (Esser et al., arXiv 2403.03206)."""
    return factor * sigma / (1 + (factor - 1) * sigma)


def shift_of_size(
    image_seq_len: float,
    *,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_image_seq_len: float = 256,
    max_image_seq_len: float = 4096,
) -> float:
    """Return the parameter ``mu`` of a dynamic shift: linear in the number of image tokens, as for Flux.

    Args:
        image_seq_len: number of tokens.
        base_shift: the answer at ``base_image_seq_len``.
        max_shift: the answer at ``max_image_seq_len``.
        base_image_seq_len: number of tokens.
        max_image_seq_len: number of tokens, another one.

    Raises:
        GridError: the two numbers of tokens are the same.
    """
    if base_image_seq_len == max_image_seq_len:
        raise GridError(f"base_image_seq_len and max_image_seq_len differ, as 256 and 4096, got {base_image_seq_len:g} twice")
    slope = (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len)
    return base_shift + slope * (image_seq_len - base_image_seq_len)


def stretched_to_terminal(sigma: Tensor, terminal: float) -> Tensor:
    """Return levels of a flow ``[N]`` with their distances to 1 scaled so that the last is ``terminal``; a single level at 1 stays."""
    return 1 - (1 - sigma) * ((1 - terminal) / (1 - sigma[-1])) if float(sigma[-1]) < 1 else sigma


def _flow(schedule: NoiseSchedule, name: str) -> RectifiedFlow:
    if not isinstance(schedule, RectifiedFlow):
        shown = type(schedule).__name__ if isinstance(schedule, NoiseSchedule) else str(schedule)[:80]
        raise GridError(f"grid {name!r} shifts the time of a rectified flow, and {shown} is none: use sgm_uniform, logsnr or angle")
    return schedule


def _shifted(
    name: str, flow: RectifiedFlow, steps: int, factor: float, lowest: float, terminal: float | None, end: str, t_max: float | None
) -> TimeGrid:
    """Return the grid of shifted uniform times, stretched to ``terminal``; ``lowest`` is the last of them where it is not 0."""
    first = grid_ends(flow, t_max, flow.t_clean)[:1]
    start = float(shifted(flow.sigma(first), 1 / factor))
    last = None if terminal is None else option_between(terminal, "shift_terminal", name, 0, 1)

    def levels(count: int) -> Tensor:
        uniform = torch.linspace(start, 0 if end == "clean" else lowest, count, dtype=torch.float64)
        return shifted(uniform, factor)

    sigma = ended(levels, steps, end)
    if last is not None:
        evaluated = sigma if end == "sigma_min" else sigma[:-1]
        sigma = torch.cat([stretched_to_terminal(evaluated, last), sigma[len(evaluated) :]])
    return TimeGrid(torch.cat([first, time_of_share(flow, decreasing(sigma, name, "use fewer steps or a smaller shift_terminal")[1:])]))
