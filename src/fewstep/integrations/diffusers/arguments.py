"""Arguments of a scheduler's methods: lists of numbers, arguments that only other schedulers have, and the time of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.models.formats.diffusers_law import ROUNDING
from fewstep.runtime.errors import FewstepError, GridError

__all__ = ["check_generators", "check_states", "numbers", "one_time", "plain_time", "refuse_asked", "refuse_unknown"]

MEANT = {  # arguments of other schedulers -> what to do instead
    "eta": "how much noise is added is an option of the solver, as in solver='ddim:eta=0.5'",
    "use_clipped_model_output": "to clip estimates of the image say thresholding=True",
    "per_token_timesteps": "tokens with times of their own need the pipeline's own scheduler",
    "original_inference_steps": "it belongs to a network that was distilled for LCM, which no ODE solver fits: keep that scheduler",
}


def numbers(values: Any, name: str) -> Tensor:  # noqa: ANN401 - a number, a list, an array or a tensor
    """Return numbers of any library as ``[M]``, float64, on the CPU.

    Raises:
        GridError: they are none.
    """
    try:
        return torch.as_tensor(values).detach().cpu().double().flatten()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise GridError(f"{name} are numbers, got {str(values)[:80]}") from error


def refuse_unknown(where: str, unknown: Mapping[str, Any]) -> None:
    """Refuse arguments that mean something to other schedulers.

    Args:
        where: the method that was called with them.
        unknown: the arguments by name.

    Raises:
        FewstepError: there are some; the message names them.
    """
    if unknown:
        meant = next((MEANT[key] for key in unknown if key in MEANT), "another scheduler knows it: keep that one in this pipeline")
        raise FewstepError(f"{where} of a FewstepScheduler has no argument {' and no '.join(map(repr, unknown))}; {meant}")


def refuse_asked(where: str, unknown: Mapping[str, Any], **known: Any) -> None:  # noqa: ANN401
    """Refuse arguments that mean something to other schedulers, and those that pipelines pass to all, where they say anything but no.

    Args:
        where: the method that was called with them.
        unknown: arguments that are refused whatever they say.
        known: arguments that may be None, False or 0.

    Raises:
        FewstepError: there are some; the message names them.
    """
    refuse_unknown(where, {key: value for key, value in known.items() if _is_asked(value)} | dict(unknown))


def _is_asked(value: Any) -> bool:  # noqa: ANN401
    """Return whether an argument of another scheduler says anything but no: neither None, nor False, nor 0."""
    try:
        return value is not None and bool(value)
    except (RuntimeError, ValueError):  # an array of several
        return True


def check_states(**states: Any) -> None:  # noqa: ANN401
    """Refuse, by its name, what is no tensor of floating point numbers ``[B, *D]``.

    Raises:
        FewstepError: one is not.
    """
    for name, value in states.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
            what = f"shape {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise FewstepError(f"{name} is a tensor [B, *D] of floating point numbers, got {what}")


def check_generators(generator: Any, count: int) -> None:  # noqa: ANN401
    """Refuse what are no generators of noise for ``count`` samples: one for all, or one for each.

    Raises:
        FewstepError: what they are.
    """
    several = list(generator) if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in several):
        odd = next(one for one in several if not isinstance(one, torch.Generator))
        raise FewstepError(f"generator is a torch.Generator or one for each sample, got {type(odd).__name__}")
    if len(several) not in (1, count):
        raise FewstepError(f"generator is a torch.Generator or one for each of {count} samples, got {len(several)}")


def plain_time(timestep: Any, most: int) -> float:  # noqa: ANN401
    """Return a network's time as a number.

    Args:
        timestep: what was passed, a number of any library.
        most: the largest time of the network.

    Raises:
        FewstepError: it is none from 0 to ``most``.
    """
    try:
        time = float(timestep)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        time = math.nan
    if not 0 <= time <= most * (1 + ROUNDING):
        raise FewstepError(f"timestep is one of scheduler.timesteps, a number from 0 to {most}, got {str(timestep)[:80]}")
    return time


def one_time(timestep: Tensor) -> Tensor:
    """Return the time ``[]`` of a whole batch, without waiting for a device where all of them are one number in memory.

    Raises:
        FewstepError: the samples of the batch have several times, or there is none.
    """
    if not timestep.numel():
        raise FewstepError("the timestep is empty: pass one of scheduler.timesteps")
    one = timestep.flatten()[0]
    repeated = all(stride == 0 or size == 1 for stride, size in zip(timestep.stride(), timestep.shape, strict=True))
    if not repeated and timestep.device.type != "meta" and bool((timestep != one).any()):
        raise FewstepError(f"the samples of a batch are stepped from one time, got {timestep.tolist()}: call step once for each time")
    return one
