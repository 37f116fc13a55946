"""Diffusers' own schedulers, read: the solver that takes their steps, and the noise levels and times of their `set_timesteps`.

The levels are asked of their class itself, so that every spacing, end and rounding of it is met; the steps are this library's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.integrations.diffusers.solver_names import solver_of
from fewstep.models.formats.diffusers_law import NoiseLaw
from fewstep.runtime.errors import GridError, SolverError
from fewstep.solvers.stencil import NEVER

__all__ = ["SAME", "TheirLevels", "check_same_as", "read_scheduler", "their_levels"]

LEVEL_OPTIONS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "sigma_min",
    "sigma_max",
    "lambda_min_clipped",
    "timestep_spacing",
    "steps_offset",
    "rescale_betas_zero_snr",
    "snr_shift_scale",
    "invert_sigmas",
    "shift_terminal",
)  # whose names and meanings a `FewstepScheduler` shares
BOUNDARY = 150.0  # LCM's scaled time, from which on its boundary condition changes an answer by less than 1e-5
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CONFIG = Mapping[str, Any]


class TheirLevels(NamedTuple):
    """What `set_timesteps` of one of diffusers' schedulers chose.

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


def _refuse(name: str, config: CONFIG, wanted: CONFIG, why: str) -> None:
    for key, value in wanted.items():
        if key in config and config[key] != value:
            raise SolverError(f"{name} with {key}={config[key]!r} has no solver here, since {why}: take {key}={value!r}")


def _clipped(name: str, config: CONFIG) -> dict[str, Any]:
    """Return the options that clip estimates of the image as ``clip_sample`` does: thresholding whose limit is 1."""
    if not config.get("clip_sample"):
        return {}
    _refuse(name, config, {"clip_sample_range": 1.0}, "estimates of the image are clipped to [-1, 1] alone")
    return {"thresholding": True, "sample_max_value": 1.0}


def _ddim(name: str, config: CONFIG) -> tuple[str, dict[str, Any]]:
    why = "it keeps the noise of the estimate before clipping, which is of no first-order step"
    _refuse(name, config, {"clip_sample": False, "thresholding": False}, why)
    return "ddim", {}


def _ddpm(name: str, config: CONFIG) -> tuple[str, dict[str, Any]]:
    kinds = {"fixed_small": "ddpm", "fixed_small_log": "ddpm", "fixed_large": "ddpm:variance=large"}
    kind = config.get("variance_type", "fixed_small")
    if kind not in kinds:
        raise SolverError(f"{name} with variance_type={kind!r} has no solver here: take one of {', '.join(kinds)}")
    return kinds[str(kind)], {"variance_type": None, **_clipped(name, config)}


def _lcm(name: str, config: CONFIG) -> tuple[str, dict[str, Any]]:
    return "lcm", _clipped(name, config)


def _pndm(name: str, config: CONFIG) -> tuple[str, dict[str, Any]]:  # noqa: ARG001
    return ("pndm" if config.get("skip_prk_steps") else "pndm:warm_up=runge-kutta"), {}


def _named(solver: str) -> Callable[[str, CONFIG], tuple[str, dict[str, Any]]]:
    def read(name: str, config: CONFIG) -> tuple[str, dict[str, Any]]:
        _refuse(name, config, {"clip_sample": False}, "the step goes by the estimate before clipping")
        return solver, {}

    return read


def _described(name: str, config: CONFIG) -> tuple[str, dict[str, Any]]:
    _refuse(name, config, {"solver_p": None}, "its predictor is UniP")
    return solver_of({"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "bh2", **config}), {}


def _sa(name: str, config: CONFIG) -> tuple[str, dict[str, Any]]:
    _refuse(name, config, {"algorithm_type": "data_prediction"}, "its polynomials are those of x0")
    levels = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")
    _refuse(name, config, dict.fromkeys(levels, False), "its last step goes from the last of these levels to itself")
    below = "" if config.get("lower_order_final", True) else f":lower_order_below={NEVER}"
    return f"sa-solver:predictor={config['predictor_order']}:corrector={config['corrector_order']}:form=simple{below}", {
        "final_sigmas_type": "sigma_min",
        "algorithm_type": "dpmsolver++",
    }


def _flow(solver: str) -> Callable[[str, CONFIG], tuple[str, dict[str, Any]]]:
    def read(name: str, config: CONFIG) -> tuple[str, dict[str, Any]]:
        _refuse(name, config, {"scale_factors": None}, "its picture grows between steps")
        renoised = solver == "lcm" or bool(config.get("stochastic_sampling"))
        if renoised:
            _refuse(name, config, {"invert_sigmas": False}, "it noises the picture to the levels of a flow that runs to the noise")
        return ("lcm" if renoised else solver), FLOW

    return read


def _ltx(name: str, config: CONFIG) -> tuple[str, dict[str, Any]]:  # noqa: ARG001
    return f"euler-ancestral:law=flow:eta={config['eta']}:s_noise={config['s_noise']}", FLOW


SAME: dict[str, Callable[[str, CONFIG], tuple[str, dict[str, Any]]]] = {  # their class -> the solver, and options of a `FewstepScheduler`
    "DDIMScheduler": _ddim,
    "DDIMParallelScheduler": _ddim,
    "CogVideoXDDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "LCMScheduler": _lcm,
    "PNDMScheduler": _pndm,
    "EulerDiscreteScheduler": _named("euler"),
    "EulerAncestralDiscreteScheduler": _named("euler-ancestral"),
    "HeunDiscreteScheduler": _named("heun"),
    "KDPM2DiscreteScheduler": _named("dpm-solver-2s"),
    "KDPM2AncestralDiscreteScheduler": _named("dpm2-ancestral"),
    "LMSDiscreteScheduler": _named("lms"),
    "DPMSolverSDEScheduler": _named("dpm-solver-pp-sde"),
    "SASolverScheduler": _sa,
    "DPMSolverMultistepScheduler": _described,
    "UniPCMultistepScheduler": _described,
    "DEISMultistepScheduler": _described,
    "FlowMatchEulerDiscreteScheduler": _flow("euler"),
    "FlowMatchHeunDiscreteScheduler": _flow("heun:law=flow"),
    "FlowMatchLCMScheduler": _flow("lcm"),
    "LTXEulerAncestralRFScheduler": _ltx,
}
WHY_NOT = {
    "DPMSolverSinglestepScheduler": "the stages of its steps are the grid's own points; nearest are dpm-solver-2s and dpm-solver-3s",
    "TCDScheduler": "it makes part of the way back with noise, for a network that was distilled for that",
    "CogVideoXDPMScheduler": "its step is called with what the pipeline keeps of the last one",
    "DDIMInverseScheduler": "it runs from the image to the noise",
    "DPMSolverMultistepInverseScheduler": "it runs from the image to the noise",
}


def check_same_as(config: CONFIG) -> None:
    """Refuse options of a `FewstepScheduler` that say something else than its ``same_as``.

    Raises:
        GridError: an option for other levels, or one of the same name with another value.
    """
    same_as = config.get("same_as")
    if same_as is None:
        return
    others = [key for key in ("grid", "sampler", "strength") if config.get(key) is not None]
    others += [key for key in LEVEL_OPTIONS if key in same_as and key in config and same_as[key] != config[key]]
    if others:
        raise GridError(f"the noise levels are those of {same_as.get('_class_name')} (same_as): leave {' and '.join(others)} out")


def read_scheduler(scheduler: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ANN401 - any of diffusers' schedulers
    """Return the class and options of one of diffusers' schedulers, and the options of a `FewstepScheduler` that takes its steps.

    Raises:
        SolverError: a class whose steps no solver here takes, or an option of it that changes them (which).
        ModelError: as `FewstepScheduler`.
    """
    name = type(scheduler).__name__
    if name not in SAME:
        known = ", ".join(one.removesuffix("Scheduler") for one in SAME)
        why = WHY_NOT.get(name, f"there is one for {known}")
        raise SolverError(f"{name} has no solver here: {why}. For another solver on its noise law use from_config")
    config = {key: scheduler.config[key] for key in signature(type(scheduler).__init__).parameters if key in scheduler.config}
    config = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in config.items() if not callable(value)}
    solver, options = SAME[name](name, config)
    if name == "SASolverScheduler":
        solver += _tau(scheduler)
    if name == "DEISMultistepScheduler":
        options = {"final_sigmas_type": "sigma_min"}
    return {"_class_name": name, **config}, {"solver": solver, **options}


def _tau(scheduler: Any) -> str:  # noqa: ANN401
    """Return the options of `SASolver` that say the ``tau_func`` of a scheduler: one value between two times, and 0 elsewhere.

    Raises:
        SolverError: it is another function.
    """
    values = torch.tensor([float(scheduler.tau_func(t)) for t in range(len(scheduler.alphas_cumprod))], dtype=torch.float64)
    tau, noisy = float(values.max()), (values != 0).nonzero().flatten()
    if not len(noisy):
        return ":tau=0"
    first, last = int(noisy[0]), int(noisy[-1])
    if not bool((values[first : last + 1] == tau).all()):
        raise SolverError("SASolverScheduler has a solver here where its tau_func is one number between two times, and 0 elsewhere")
    level = torch.sqrt((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double())
    low = f":tau_min={float(torch.sqrt(level[first - 1] * level[first])):.9g}" if first else ""
    high = f":tau_max={float(torch.sqrt(level[last] * level[last + 1])):.9g}" if last + 1 < len(level) else ""
    return f":tau={tau:g}{low}{high}"


def their_levels(same_as: CONFIG, law: NoiseLaw, **asked: Any) -> TheirLevels:  # noqa: ANN401
    """Return what ``set_timesteps`` of one of diffusers' schedulers chooses.

    Args:
        same_as: its class and options, as `read_scheduler` writes them.
        law: the noise law of its network.
        asked: arguments of ``set_timesteps``; those that are None are left out.

    Raises:
        GridError: its class does not take them, or its steps do not lead from one evaluation to the next.
    """
    import diffusers

    name = str(same_as["_class_name"])
    scheduler: Any = getattr(diffusers, name)(**{key: value for key, value in same_as.items() if key != "_class_name"})
    asked = {key: value for key, value in asked.items() if value is not None}
    unknown = sorted(set(asked) - set(signature(scheduler.set_timesteps).parameters))
    if unknown:
        raise GridError(f"set_timesteps of {name} takes no {' and '.join(unknown)}")
    try:
        scheduler.set_timesteps(**asked)
    except (ValueError, TypeError, IndexError) as error:
        raise GridError(f"{name}: {error}") from error
    times = torch.as_tensor(scheduler.timesteps).double()
    t = _steps(scheduler, law) if name in STRIDED or name in TO_CLEAN else _of_sigmas(scheduler, law)
    if not bool((torch.diff(t) < 0).all()):
        raise GridError(f"{name} has a step that goes nowhere here, with noise levels {_shown(law, t)}: take other steps or another end")
    return TheirLevels(TimeGrid(t), times, _start(scheduler, times))


STRIDED = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "PNDMScheduler")  # steps of one length, whatever comes next
TO_CLEAN = ("DDPMScheduler", "DDPMParallelScheduler", "LCMScheduler")  # steps to the next time, at last to the clean image


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
