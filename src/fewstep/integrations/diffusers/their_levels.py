"""The noise levels and times that one of diffusers' own schedulers chooses, asked of its class itself.

So every spacing, end and rounding of it is met, and what is checked here is that the steps lead from one evaluation to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.models.formats.diffusers_law import NoiseLaw
from fewstep.runtime.errors import GridError
from fewstep.runtime.front_door import is_count

__all__ = ["TheirLevels", "their_levels"]

BOUNDARY = 150.0  # LCM's scaled time, from which on its boundary condition changes an answer by less than 1e-5
STRIDED = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "PNDMScheduler")  # steps of one length, whatever comes next
TO_CLEAN = ("DDPMScheduler", "DDPMParallelScheduler", "LCMScheduler")  # steps to the next time, at last to the clean image


class TheirLevels(NamedTuple):
    """The levels and times that `set_timesteps` of one of diffusers' schedulers chose.

    Attributes:
        grid: the steps between its noise levels.
        times: the times that the network is told, one for each evaluation, ``[N]`` float64.
        start: the standard deviation of the noise that a pipeline starts from, in a state of this library's.
    """

    grid: TimeGrid
    times: Tensor
    start: float

    def check_count(self, evaluations: int) -> None:
        """Refuse a solver of another number of evaluations.

        Raises:
            GridError: it is of one.
        """
        if evaluations != len(self.times):
            raise GridError(
                f"the class that same_as names makes {len(self.times)} evaluations here, this solver {evaluations}: take more steps, or "
                "leave same_as out"
            )


def their_levels(same_as: Mapping[str, Any], law: NoiseLaw, **asked: Any) -> TheirLevels:  # noqa: ANN401
    """Return what ``set_timesteps`` of one of diffusers' schedulers chooses.

    Args:
        same_as: its class and options, as `read_scheduler` writes them.
        law: the noise law of its network.
        asked: arguments of ``set_timesteps``; those that are None are left out.

    Raises:
        GridError: its class does not take them, or its steps do not lead from one evaluation to the next.
    """
    import diffusers

    name = str(same_as["_class_name"])  # one of `SAME`, see `check_same_as`
    if not hasattr(diffusers, name):
        raise GridError(f"the levels are those of {name}, which diffusers {diffusers.__version__} does not have: install a newer one")
    scheduler: Any = getattr(diffusers, name)(**{key: value for key, value in same_as.items() if key != "_class_name"})
    asked = {key: value for key, value in asked.items() if value is not None}
    steps = asked.get("num_inference_steps")
    if steps is not None and not is_count(steps):
        raise GridError(f"the number of steps is a whole number of at least 1, got {steps}")
    unknown = sorted(set(asked) - set(signature(scheduler.set_timesteps).parameters))
    if unknown:
        raise GridError(f"set_timesteps of {name} takes no {' and '.join(unknown)}")
    try:
        scheduler.set_timesteps(**asked)
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise GridError(f"{name}: {error}") from error
    times = torch.as_tensor(scheduler.timesteps).double()
    t = _steps(scheduler, law) if name in STRIDED or name in TO_CLEAN else _of_sigmas(scheduler, law)
    if not bool((torch.diff(t) < 0).all()):
        raise GridError(f"{name} has a step that goes nowhere here, with noise levels {_shown(law, t)}: take other steps or another end")
    return TheirLevels(TimeGrid(t), times, _start(scheduler, times))


def _steps(scheduler: Any, law: NoiseLaw) -> Tensor:  # noqa: ANN401
    """Return the times of the law between which a scheduler of whole times steps, with its end."""
    name, count = type(scheduler).__name__, int(scheduler.num_inference_steps)
    told = scheduler._timesteps[::-1].copy() if name == "PNDMScheduler" else scheduler.timesteps
    t, end = torch.as_tensor(told).double(), law.schedule.t_clean
    if name in STRIDED:
        stride = int(scheduler.config.num_train_timesteps) // count
        if not bool((torch.diff(t) == -stride).all()):
            raise GridError(
                f"{name} steps {stride} times down from each evaluation, and its next one is not there (timestep_spacing="
                f"{scheduler.config.timestep_spacing}, {count} steps): take leading, or trailing with steps that divide "
                f"{scheduler.config.num_train_timesteps}"
            )
        last = float(t[-1]) - stride
        end = max(last, 0.0) if last >= 0 or float(scheduler.final_alpha_cumprod) < 1 else end
        if name == "PNDMScheduler" and not scheduler.config.skip_prk_steps and stride % 2:
            raise GridError(f"{name} steps {stride} times, which have no half for its Runge-Kutta steps: take other steps")
    elif name == "LCMScheduler" and float(t[-1]) * float(scheduler.config.timestep_scaling) < BOUNDARY:
        raise GridError(f"{name} at time {t[-1]:g} mixes its answer with the state, which no solver here does: take fewer steps")
    elif scheduler.config.get("variance_type") == "fixed_large" and float(t[-1]) > 0:
        raise GridError(f"{name} with variance_type='fixed_large' ends with noise where its last time is {t[-1]:g}: take fixed_small")
    return torch.cat([t, torch.tensor([end], dtype=torch.float64)])


def _of_sigmas(scheduler: Any, law: NoiseLaw) -> Tensor:  # noqa: ANN401
    """Return the times of the law at the noise levels of a scheduler; those of two evaluations once."""
    sigmas = torch.as_tensor(scheduler.sigmas).double().cpu()
    sigmas = torch.unique_consecutive(sigmas) if len(sigmas) > int(scheduler.num_inference_steps) + 1 else sigmas
    if scheduler.config.get("use_flow_sigmas") or "beta_schedule" not in scheduler.config:
        sigmas = 1 - sigmas if scheduler.config.get("invert_sigmas") else sigmas
        sigmas = sigmas.clamp(max=1.0)  # float32 shifts round to 1 + 1e-7
        lam = torch.log1p(-sigmas) - torch.log(sigmas)
    else:
        lam = -torch.log(sigmas)
    return torch.where(torch.isposinf(lam), law.schedule.t_clean, law.schedule.t_of_lam(lam.clamp(max=1e3)))


def _start(scheduler: Any, times: Tensor) -> float:  # noqa: ANN401
    """Return the standard deviation of the noise that a pipeline starts from, as the network sees it."""
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    start = torch.tensor(float(scheduler.init_noise_sigma), dtype=torch.float64)
    return float(scheduler.scale_model_input(start, scheduler.timesteps[0])) if len(times) else 1.0


def _shown(law: NoiseLaw, t: Tensor) -> str:
    return ", ".join(f"{math.exp(-float(lam)):.3g}" for lam in law.schedule.lam(t))
