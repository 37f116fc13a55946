"""The solvers of this library by their names in the menus of A1111 and ComfyUI, in k-diffusion and in diffusers.

The menus have a second list for noise levels, which is a grid here; A1111's older menus join the two ("DPM++ 2M Karras").
"""

from __future__ import annotations

__all__ = ["ALIASES", "GRID_HINT", "LEVELS", "REFUSED"]

MENUS: dict[str, str] = {  # their name -> ours
    "DDIM": "ddim",
    "Euler": "euler",
    "Heun": "heun",
    "DPM++ 2M": "dpm-solver-pp-2m",
    "dpmpp_2m": "dpm-solver-pp-2m",
    "DPM++ 2M SDE": "sde-dpm-solver-pp-2m",
    "dpmpp_2m_sde": "sde-dpm-solver-pp-2m",
    "dpmpp_2m_sde_gpu": "sde-dpm-solver-pp-2m",
    "DPM++ 2M SDE Heun": "sde-dpm-solver-pp-2m:form=taylor",
    "dpmpp_2m_sde_heun": "sde-dpm-solver-pp-2m:form=taylor",
    "dpmpp_2m_sde_heun_gpu": "sde-dpm-solver-pp-2m:form=taylor",
    "UniPC": "unipc-3:weights=bh1",
    "uni_pc": "unipc-3:weights=bh1",
    "uni_pc_bh2": "unipc-3",
    "deis": "deis-3",
    "DEIS": "deis-3",
    "LMS": "lms",
    "LMSDiscreteScheduler": "lms",
    "PLMS": "pndm",
    "PNDMScheduler": "pndm:warm_up=runge-kutta",
    "ipndm_v": "ipndm-v:weights=published",
    "DPM2": "dpm-solver-2s",
    "dpm_2": "dpm-solver-2s",
    "KDPM2DiscreteScheduler": "dpm-solver-2s",
    "DPM fast": "dpm-solver-fast",
    "dpm_fast": "dpm-solver-fast",
    "res_multistep": "exp-ab-2",
    "gradient_estimation": "gradient-estimation",
    "Euler a": "euler-ancestral",
    "euler_ancestral": "euler-ancestral",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "DPM2 a": "dpm2-ancestral",
    "dpm_2_ancestral": "dpm2-ancestral",
    "KDPM2AncestralDiscreteScheduler": "dpm2-ancestral",
    "DPM++ 2S a": "dpm-solver-pp-2s-ancestral",
    "dpmpp_2s_ancestral": "dpm-solver-pp-2s-ancestral",
    "DPM++ SDE": "dpm-solver-pp-sde",
    "dpmpp_sde": "dpm-solver-pp-sde",
    "dpmpp_sde_gpu": "dpm-solver-pp-sde",
    "DPMSolverSDEScheduler": "dpm-solver-pp-sde",
    "DPM++ 3M SDE": "sde-dpm-solver-pp-3m",
    "dpmpp_3m_sde": "sde-dpm-solver-pp-3m",
    "dpmpp_3m_sde_gpu": "sde-dpm-solver-pp-3m",
    "LCM": "lcm",
    "LCMScheduler": "lcm",
    "DDPM": "ddpm",
    "DDPMScheduler": "ddpm",
    "seeds_2": "seeds-2",
    "seeds_3": "seeds-3",
    "res_multistep_ancestral": "res-multistep-ancestral",
    "sa_solver": "sa-solver:predictor=3:corrector=4",
    "sa_solver_pece": "sa-solver-pece:predictor=3:corrector=4",
    "Restart": "restart",
    "HeunPP2": "heunpp2",
    "IPNDM": "ipndm",
    "IPNDM_V": "ipndm-v:weights=published",
    "exp_heun_2_x0": "res-2s:c2=1",
    "exp_heun_2_x0_sde": "seeds-2:c2=1:form=phi2",
    "er_sde": "er-sde-3:integrals=sum",
}
SAME_THERE = ("euler", "heun", "heunpp2", "lms", "ddpm", "lcm", "ipndm")  # solvers that ComfyUI calls by the same names
ALIASES: dict[str, str] = {  # and the functions of k-diffusion and ComfyUI behind its names
    **MENUS,
    **{f"sample_{name}": name for name in SAME_THERE},
    **{f"sample_{name}": ours for name, ours in MENUS.items() if name == name.lower() and not name.startswith("sample_")},
}

ADAPTIVE = "it chooses its steps by an error while it samples, so it has no number of evaluations; dpm-solver-3s has its formulas on a grid"
PLUS_PLUS = "it is a solver with CFG++ guidance: pass guidance_form='cfg++' to fewstep.sample, with the solver {}"
_REFUSED: dict[str, str] = {  # their name -> why there is no solver of it here
    "DPM adaptive": ADAPTIVE,
    "dpm_adaptive": ADAPTIVE,
    "DDIM CFG++": PLUS_PLUS.format("ddim"),
    "euler_cfg_pp": PLUS_PLUS.format("euler"),
    "euler_ancestral_cfg_pp": PLUS_PLUS.format("euler-ancestral"),
    "dpmpp_2m_cfg_pp": PLUS_PLUS.format("dpm-solver-pp-2m"),
    "dpmpp_2s_ancestral_cfg_pp": PLUS_PLUS.format("dpm-solver-pp-2s-ancestral"),
    "res_multistep_cfg_pp": PLUS_PLUS.format("exp-ab-2"),
    "res_multistep_ancestral_cfg_pp": PLUS_PLUS.format("res-multistep-ancestral"),
    "gradient_estimation_cfg_pp": PLUS_PLUS.format("gradient-estimation"),
    "cfgpp_ud10_ab": (
        "it mixes past guided answers into the state, by weights searched for one model, where a solver here is given one answer; "
        "nearest is guidance_form='cfg++' of fewstep.sample, with the solver dpm-solver-pp-2m"
    ),
    "ar_video": "it makes a video block by block, with a network that remembers the blocks before; a sampler here makes whole samples",
}
REFUSED: dict[str, str] = {**_REFUSED, **{f"sample_{name}": why for name, why in _REFUSED.items() if name == name.lower()}}

LEVELS = (" Karras", " Exponential", "_karras", "_exponential")
GRID_HINT = "sample(model, 'dpmpp_2m', nfe=8, grid='karras')"
