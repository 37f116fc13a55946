"""Diffusers' own schedulers, read: the solver of this library that takes the steps of one, and the options with which it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch

from fewstep.integrations.diffusers.solver_names import solver_of
from fewstep.runtime.errors import GridError, SolverError
from fewstep.solvers.stencil import NEVER

__all__ = ["SAME", "check_same_as", "read_scheduler"]

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
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CONFIG = Mapping[str, Any]


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


def _cogvideo(name: str, config: CONFIG) -> tuple[str, dict[str, Any]]:  # noqa: ARG001 - its step clips nothing
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
        _refuse(name, config, {"timestep_type": "discrete"}, "that network is told the logarithm of its noise level")
        _refuse(name, config, {"noise_sampler_seed": None}, "noise here comes from the generator of a call")
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
    "CogVideoXDDIMScheduler": _cogvideo,
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
        GridError: it names no class that is read, there is an option for other levels, or one of the same name with another value.
    """
    same_as = config.get("same_as")
    if same_as is None:
        return
    if not isinstance(same_as, Mapping) or same_as.get("_class_name") not in SAME:
        raise GridError(
            f"same_as is what FewstepScheduler.from_scheduler writes: the class of a scheduler and its options, got {same_as!r}"
        )
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
