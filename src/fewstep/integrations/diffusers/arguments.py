"""Arguments of a scheduler's methods: lists of numbers, arguments that only other schedulers have, and the time of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.runtime.errors import FewstepError, GridError

__all__ = ["numbers", "one_time", "refuse_unknown"]

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
