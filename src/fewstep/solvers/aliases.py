"""The solvers of this library by their names in the menus of A1111 and ComfyUI, in k-diffusion and in diffusers.

The menus have a second list for noise levels, which is a grid here; A1111's older menus join the two ("DPM++ 2M Karras").
"""

from __future__ import annotations

__all__ = ["ALIASES", "GRID_HINT", "LEVELS"]

ALIASES: dict[str, str] = {  # their name -> ours
    "DDIM": "ddim",
    "Euler": "euler",
    "Heun": "heun",
    "DPM++ 2M": "dpm-solver-pp-2m",
    "dpmpp_2m": "dpm-solver-pp-2m",
    "DPM++ 2M SDE": "sde-dpm-solver-pp-2m",
    "dpmpp_2m_sde": "sde-dpm-solver-pp-2m",
    "DPM++ 2M SDE Heun": "sde-dpm-solver-pp-2m:form=taylor",
    "dpmpp_2m_sde_heun": "sde-dpm-solver-pp-2m:form=taylor",
    "UniPC": "unipc-3:weights=bh1",
    "uni_pc": "unipc-3:weights=bh1",
    "uni_pc_bh2": "unipc-3",
    "deis": "deis-3",
    "DEIS": "deis-3",
    "LMS": "lms",
    "sample_lms": "lms",
    "LMSDiscreteScheduler": "lms",
    "PLMS": "pndm",
    "PNDMScheduler": "pndm:warm_up=runge-kutta",
    "ipndm_v": "ipndm-v:weights=published",
    "DPM2": "dpm-solver-2s",
    "dpm_2": "dpm-solver-2s",
    "sample_dpm_2": "dpm-solver-2s",
    "KDPM2DiscreteScheduler": "dpm-solver-2s",
    "DPM fast": "dpm-solver-fast",
    "dpm_fast": "dpm-solver-fast",
    "sample_dpm_fast": "dpm-solver-fast",
    "res_multistep": "exp-ab-2",
    "gradient_estimation": "gradient-estimation",
}

LEVELS = (" Karras", " Exponential", "_karras", "_exponential")
GRID_HINT = "sample(model, 'dpmpp_2m', nfe=8, grid='karras')"
