"""The noise law of a diffusers model, as the configuration of any of its schedulers describes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.core.prediction import EDM, Prediction, prediction
from fewstep.core.schedule import DiscreteVP, NoiseSchedule, RectifiedFlow, VarianceExploding
from fewstep.models.networks.calls import NetworkTime, edm_time
from fewstep.runtime.errors import ModelError

__all__ = ["NoiseLaw", "flow_shift", "is_edm", "is_flow", "noise_law"]

BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
OTHER_LAWS = ("CMStochasticIterativeScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler")
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
    """

    schedule: NoiseSchedule
    prediction: Prediction
    time: Callable[[Tensor], Tensor]
    t_of_time: Callable[[Tensor], Tensor]
    betas: Tensor | None = None


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
    if is_flow(config):
        steps, law = float(config.get("num_train_timesteps", 1000)), RectifiedFlow(flow_shift(config, mu))
        kind = kind if "prediction_type" in config and config.get("use_flow_sigmas") else "flow"
        return NoiseLaw(law, prediction(kind), NetworkTime("sigma", steps, schedule=law), partial(_of_flow, law, steps))
    if is_edm(config):
        if kind != "epsilon":
            raise ModelError(f"an EDM scheduler with prediction type {kind!r} is not known here, only epsilon (EDM's own F)")
        schedule = VarianceExploding(float(config["sigma_min"]), float(config["sigma_max"]))
        return NoiseLaw(schedule, EDM(float(config["sigma_data"])), edm_time, _of_edm)
    if "beta_schedule" not in config or name in OTHER_LAWS:
        raise ModelError(
            f"the noise schedule of a {name or 'scheduler without a class name'} is not known here: a table of betas, FlowMatch or EDM is"
        )
    if config.get("snr_shift_scale", 1.0) != 1 or config.get("timestep_type", "discrete") != "discrete":
        raise ModelError(f"a {name} with snr_shift_scale or continuous timesteps is not known here: its table or its times are others")
    return _discrete(config, prediction(kind), to_clean)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler's configuration is a flow's. One that was not read from a file does not name its class."""
    named = "FlowMatch" in str(config.get("_class_name", "")) or ("shift" in config and "beta_schedule" not in config)
    return bool(config.get("use_flow_sigmas")) or named


def is_edm(config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler's configuration is that of one of the EDM schedulers."""
    return str(config.get("_class_name", "")).startswith("EDM") or "sigma_data" in config


def _discrete(config: Mapping[str, Any], kind: Prediction, to_clean: bool) -> NoiseLaw:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    made: Any = DDPMScheduler.from_config({key: config[key] for key in BETAS if config.get(key) is not None})
    table = made.alphas_cumprod.clone()
    if config.get("rescale_betas_zero_snr") and kind.undefined_at_zero_alpha:
        table[-1] = min(ALMOST_NO_SIGNAL, float(table[-2]) / 4)  # DDPM's betas come below that number one time earlier
    law = DiscreteVP.from_alphas_cumprod(table)
    return NoiseLaw(law.to_clean() if to_clean else law, kind, NetworkTime(), _of_table, made.betas)


def _of_table(time: Tensor) -> Tensor:
    return time


def _of_edm(time: Tensor) -> Tensor:
    return torch.exp(4 * time)


def _of_flow(law: RectifiedFlow, steps: float, time: Tensor) -> Tensor:
    u = time / steps
    return law.t_of_lam(torch.log1p(-u) - torch.log(u))


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
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ModelError(f"time_shift_type is exponential or linear, got {kind!r}")
    return math.exp(mu) if kind == "exponential" else float(mu)
