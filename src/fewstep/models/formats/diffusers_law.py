"""The noise law of a diffusers model, as the configuration of any of its schedulers describes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.core.prediction import EDM, Prediction, prediction
from fewstep.core.schedule import DiscreteVP, NoiseSchedule, RectifiedFlow, VarianceExploding, VPCosine
from fewstep.models.networks.calls import NetworkTime, edm_time
from fewstep.runtime.errors import ModelError

__all__ = [
    "ANGLE",
    "ROUNDING",
    "NoiseLaw",
    "ends_clean",
    "flow_shift",
    "is_angle",
    "is_edm",
    "is_flow",
    "noise_law",
    "refuse_no_ode",
    "shift_kind",
]

BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
ANGLE = "CosineDPMSolverMultistepScheduler"  # Stable Audio's
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
OTHER_LAWS = ("CMStochasticIterativeScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler")
DISTILLED = (
    "it adds new noise at every step, for a network that was distilled for that; keep it, or remove the distillation (its LoRA) and take "
    "the configuration of the base model's scheduler"
)
NO_ODE = {  # classes and options that mark a scheduler which solves no ODE on a law known here -> why
    "LCMScheduler": DISTILLED,
    "TCDScheduler": DISTILLED,
    "FlowMatchLCMScheduler": DISTILLED,
    "HeliosDMDScheduler": DISTILLED,
    "original_inference_steps": DISTILLED,
    "scale_factors": DISTILLED,
    "HeliosScheduler": "it changes the picture's size between its steps",
    "stage_range": "it changes the picture's size between its steps",
    "PiflowScheduler": "its network answers a policy rather than a velocity",
    "num_policy_substeps": "its network answers a policy rather than a velocity",
    "FlowMapEulerDiscreteScheduler": "its network jumps to a second time that it is told",
    "RePaintScheduler": "its steps go back and forth",
    "DDIMInverseScheduler": "it runs from the image to the noise; take the configuration of the pipeline's other scheduler",
    "DPMSolverMultistepInverseScheduler": "it runs from the image to the noise; take the configuration of the pipeline's other scheduler",
}
ROUNDING = 2.0**-20  # by which a flow's noise level may exceed 1: shifts are multiplied in float32
ALMOST_NO_SIGNAL = 2.0**-24  # diffusers' last alphas_cumprod of zero terminal SNR, where alpha = 0 would leave epsilon without meaning


@dataclass(frozen=True, eq=False)
class NoiseLaw:
    """The noise law of a diffusers network, with its prediction type and its own time.

    Attributes:
        schedule: the law ``alpha(t), sigma(t)``.
        prediction: the prediction type.
        time: the network's own time, diffusers' "timestep", from ``t``. ``[*] -> [*]``.
        t_of_time: its inverse. (Both are functions of a module, or made of one: a scheduler can be pickled.)
        betas: the variances ``[T]`` of a discrete law, float32 as diffusers has them.
        grows: whether a pipeline's state is ``x / alpha``, which grows with the noise, and its scheduler scales it for the network.
    """

    schedule: NoiseSchedule
    prediction: Prediction
    time: Callable[[Tensor], Tensor]
    t_of_time: Callable[[Tensor], Tensor]
    betas: Tensor | None = None
    grows: bool = False

    def held_time(self, t: Tensor) -> Tensor:
        """Return `time` held where the network knows it. ``[*] -> [*]``."""
        return self.time(self.schedule.held(t))

    def paired(self, t: Tensor, times: Tensor) -> NoiseLaw:
        """Return the law of a network that is told these times ``[M]`` at ``t [M]``, and the line between them elsewhere."""
        pairs = tuple(t.tolist()), tuple(times.tolist())
        return replace(self, time=partial(_between, *pairs), t_of_time=partial(_between, *pairs[::-1]))


def noise_law(config: Mapping[str, Any], *, mu: float | None = None, to_clean: bool = False) -> NoiseLaw:
    """Return the law that a scheduler's configuration describes; betas are built by diffusers itself.

    Args:
        config: the configuration of any of diffusers' schedulers, or of a `FewstepScheduler`.
        mu: the shift of a flow that depends on the image size (``use_dynamic_shifting``).
        to_clean: let grids of a discrete law end at the clean image.

    Raises:
        ModelError: a scheduler whose law is not known here, a prediction type that does not go with it, or no ``mu`` where one is needed.
        KeyError, ValueError, NotImplementedError: a configuration that diffusers refuses.
    """
    name, kind = str(config.get("_class_name", "")), config.get("prediction_type", "epsilon")
    refuse_no_ode(config)
    if is_flow(config):
        steps, law = float(config.get("num_train_timesteps", 1000)), RectifiedFlow(flow_shift(config, mu))
        kind = kind if "prediction_type" in config and config.get("use_flow_sigmas") else "flow"
        if config.get("invert_sigmas"):
            if prediction(kind).name != "flow":
                raise ModelError(f"a flow with invert_sigmas predicts its velocity, not {kind!r}: leave prediction_type out")
            return NoiseLaw(law, prediction("reversed-flow"), partial(_inverted, law, steps), partial(_of_inverted, law, steps))
        return NoiseLaw(law, prediction(kind), NetworkTime("sigma", steps, schedule=law), partial(_of_flow, law, steps))
    if is_angle(config):
        return _angle(config, str(kind), to_clean)
    if is_edm(config):
        if kind != "epsilon":
            raise ModelError(f"an EDM scheduler with prediction type {kind!r} is not known here, only epsilon (EDM's own F)")
        schedule = VarianceExploding(float(config["sigma_min"]), float(config["sigma_max"]))
        return NoiseLaw(schedule, EDM(float(config["sigma_data"])), edm_time, _of_edm)
    if "beta_schedule" not in config or name in OTHER_LAWS:
        raise ModelError(
            f"the noise schedule of a {name or 'scheduler without a class name'} is not known here: a table of betas, FlowMatch or EDM is"
        )
    return _discrete(config, prediction(kind), to_clean)


def refuse_no_ode(config: Mapping[str, Any]) -> None:
    """Refuse the configuration of a scheduler that solves no ODE on a law known here.

    Raises:
        ModelError: it is one; the message names the class or the option that says so.
    """
    name = str(config.get("_class_name", ""))
    mark = name if name in NO_ODE else next((key for key in NO_ODE if key in config), None)
    if mark is not None:
        raise ModelError(f"no ODE solver can stand in for {name or 'a scheduler'}{'' if mark == name else f' with {mark}'}: {NO_ODE[mark]}")
    if config.get("stochastic_sampling"):
        raise ModelError("stochastic_sampling adds new noise at every step, which no ODE solver does: set it to False")
    if config.get("timestep_type", "discrete") != "discrete":
        raise ModelError(
            f"timestep_type={config['timestep_type']!r} is not known here, only discrete: that network (Stable Video Diffusion's) is told "
            "the logarithm of its noise level; keep its scheduler"
        )
    if config.get("prediction_type") == "original_sample":
        raise ModelError(
            "prediction_type='original_sample' is that of the latent upscaler, whose state grows with the noise: keep its scheduler"
        )


def is_flow(config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler's configuration is a flow's. One that was not read from a file does not name its class."""
    name = str(config.get("_class_name", ""))
    by_shift = "shift" in config and "beta_schedule" not in config and name in ("", *FLOWS)
    return bool(config.get("use_flow_sigmas")) or name in FLOWS or by_shift


def is_edm(config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler's configuration is that of one of the EDM schedulers."""
    return str(config.get("_class_name", "")).startswith("EDM") or (config.get("sigma_data") is not None and not is_angle(config))


def is_angle(config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler's configuration is Stable Audio's: its network is told the angle ``2/pi arctan(sigma/alpha)``."""
    ours = "solver" in config and config.get("sigma_data") is not None  # which only a configuration of that scheduler brings in
    return str(config.get("_class_name", "")) == ANGLE or ours


def _angle(config: Mapping[str, Any], kind: str, to_clean: bool) -> NoiseLaw:
    """Return the law of Stable Audio: its network sees ``cos x0 + sin eps``, is told the angle, and answers the velocity.

    Its pipeline adds a sound to noise that its scheduler has scaled, so the state there has to stay ``x / alpha``.
    """
    scale = float(config.get("sigma_data", 1.0))
    if prediction(kind).name != "v" or scale != 1:
        raise ModelError(
            f"{ANGLE} is known here with prediction_type='v_prediction' and sigma_data=1, as Stable Audio has it, got {kind!r} and "
            f"{scale:g}: keep that scheduler"
        )
    low, high = (2 / math.pi * math.atan(float(config.get(key) or usual)) for key, usual in (("sigma_min", 0.3), ("sigma_max", 500.0)))
    return NoiseLaw(VPCosine(s=0.0, t_min=0.0 if to_clean else low, t_max=high), prediction(kind), NetworkTime(), _of_table, grows=True)


def _discrete(config: Mapping[str, Any], kind: Prediction, to_clean: bool) -> NoiseLaw:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    given = {key: config[key] for key in BETAS if config.get(key) is not None}
    scale, no_signal = float(config.get("snr_shift_scale", 1.0)), bool(config.get("rescale_betas_zero_snr"))
    if not scale > 0:
        raise ModelError(f"snr_shift_scale is above 0, got {scale:g}")
    made: Any = DDPMScheduler.from_config(given | ({"rescale_betas_zero_snr": True} if no_signal and scale == 1 else {}))
    table, betas = made.alphas_cumprod.clone(), made.betas
    if scale != 1:  # CogVideoX: sigma^2/alpha^2 times the scale, and only then no signal at the end
        table = table / (scale + (1 - scale) * table)
        law = DiscreteVP.from_alphas_cumprod(table)
        table = law.zero_terminal_snr().alpha(law.times[1:]) ** 2 if no_signal else table
        betas = (1 - table / torch.nn.functional.pad(table[:-1], (1, 0), value=1.0)).float()
    if no_signal and kind.undefined_at_zero_alpha:
        table[-1] = min(ALMOST_NO_SIGNAL, float(table[-2]) / 4)  # DDPM's betas come below that number one time earlier
    law = DiscreteVP.from_alphas_cumprod(table)
    return NoiseLaw(law.to_clean() if to_clean else law, kind, NetworkTime(), _of_table, betas)


def _of_table(time: Tensor) -> Tensor:
    return time


def _of_edm(time: Tensor) -> Tensor:
    return torch.exp(4 * time)


def _of_flow(law: RectifiedFlow, steps: float, time: Tensor) -> Tensor:
    u = (time / steps).clamp(max=1.0)  # float32 shifts round to 1 + 1e-7
    return law.t_of_lam(torch.log1p(-u) - torch.log(u))


def _inverted(law: RectifiedFlow, steps: float, t: Tensor) -> Tensor:
    return steps * law.alpha(t)


def _of_inverted(law: RectifiedFlow, steps: float, time: Tensor) -> Tensor:
    return _of_flow(law, steps, steps - time)


def _between(known: tuple[float, ...], values: tuple[float, ...], at: Tensor) -> Tensor:
    """Return the value at ``at [*]`` of the line through falling points ``known, values``; that of the first or last point beyond them."""
    return torch.as_tensor(np.interp(at.numpy(), known[::-1], values[::-1]), dtype=torch.float64)


def ends_clean(config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler with this configuration steps to the clean image at the end, rather than to the last noise level."""
    chosen = config.get("to_clean")
    return config.get("final_sigmas_type", "zero") == "zero" if chosen is None else bool(chosen)


def flow_shift(config: Mapping[str, Any], mu: float | None = None) -> float:
    """Return the shift of a flow's times: the fixed one, or that of ``mu``.

    Raises:
        ModelError: the shift depends on the image size, and ``mu`` is not given.
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("flow_shift", config.get("shift", 1.0)))
    if mu is None:
        raise ModelError(
            f"{config.get('_class_name', 'this scheduler')} shifts its schedule by the image size (use_dynamic_shifting), which a folder "
            "does not say: set shift, or pass mu to set_timesteps"
        )
    try:
        shift = math.exp(mu) if shift_kind(config) == "exponential" else float(mu)
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"mu is a number of a few units at most, got {mu!r}") from error
    if not 0 < shift < math.inf:
        raise ModelError(f"mu is a number, and above 0 where time_shift_type is linear and it is the shift itself, got {mu}")
    return shift


def shift_kind(config: Mapping[str, Any]) -> str:
    """Return how ``mu`` says the shift: ``exponential``, ``e^mu``, or ``linear``, ``mu`` itself.

    Raises:
        ModelError: another word.
    """
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ModelError(f"time_shift_type is exponential or linear, got {kind!r}")
    return str(kind)
