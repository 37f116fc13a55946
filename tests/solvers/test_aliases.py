"""Solvers by their names in the menus of A1111 and ComfyUI, in k-diffusion and in diffusers."""

import re
from pathlib import Path

import pytest
from tests.problems import toy

from fewstep import FewstepError, GridError, Sampler, SolverError, VarianceExploding, VPLinear, make_solver, sample
from fewstep.core.spacings import REFUSED as GRIDS_REFUSED
from fewstep.core.spacings import check_grid_name
from fewstep.models.cfg_plus_plus import plus_plus_gains
from fewstep.solvers import (
    DDPM,
    ERSDE,
    IPNDM,
    LCM,
    LMS,
    PNDM,
    RES2S,
    SEEDS2,
    SEEDS3,
    SOLVERS,
    DPM2Ancestral,
    DPMSolver2S,
    DPMSolverFast,
    DPMSolverPP,
    DPMSolverPP2SAncestral,
    DPMSolverPPSDE,
    EulerAncestral,
    ExponentialAB,
    GradientEstimation,
    HeunPP2,
    RESAncestral,
    Restart,
    SASolver,
    SASolverPECE,
    SDEDPMSolverPP2M,
    SDEDPMSolverPP3M,
    UniPC,
    solvers_by_family,
)
from fewstep.solvers.aliases import ALIASES, REFUSED

MEANT = {  # written out once more
    "DDIM": make_solver("ddim"),
    "Euler": make_solver("euler"),
    "Heun": make_solver("heun"),
    "DPM++ 2M": DPMSolverPP(steps=2),
    "dpmpp_2m": DPMSolverPP(steps=2),
    "DPM++ 2M SDE": SDEDPMSolverPP2M(),
    "dpmpp_2m_sde": SDEDPMSolverPP2M(),
    "DPM++ 2M SDE Heun": SDEDPMSolverPP2M(form="taylor"),
    "dpmpp_2m_sde_heun": SDEDPMSolverPP2M(form="taylor"),
    "UniPC": UniPC(steps=3, weights="bh1"),
    "uni_pc": UniPC(steps=3, weights="bh1"),
    "uni_pc_bh2": UniPC(steps=3),
    "deis": make_solver("deis-3"),
    "DEIS": make_solver("deis-3"),
    **dict.fromkeys(["LMS", "LMSDiscreteScheduler"], LMS(steps=4)),
    "PLMS": PNDM(),
    "PNDMScheduler": PNDM(warm_up="runge-kutta"),
    "ipndm_v": LMS(steps=4, euler_at_clean=True, weights="published"),
    **dict.fromkeys(["DPM2", "dpm_2", "KDPM2DiscreteScheduler"], DPMSolver2S()),
    **dict.fromkeys(["DPM fast", "dpm_fast"], DPMSolverFast()),
    "res_multistep": ExponentialAB(steps=2),
    "gradient_estimation": GradientEstimation(gamma=2.0),
    **dict.fromkeys(["dpmpp_2m_sde_gpu"], SDEDPMSolverPP2M()),
    "dpmpp_2m_sde_heun_gpu": SDEDPMSolverPP2M(form="taylor"),
    **dict.fromkeys(["Euler a", "euler_ancestral", "EulerAncestralDiscreteScheduler"], EulerAncestral()),
    **dict.fromkeys(["DPM2 a", "dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"], DPM2Ancestral()),
    **dict.fromkeys(["DPM++ 2S a", "dpmpp_2s_ancestral"], DPMSolverPP2SAncestral()),
    **dict.fromkeys(["DPM++ SDE", "dpmpp_sde", "dpmpp_sde_gpu", "DPMSolverSDEScheduler"], DPMSolverPPSDE()),
    **dict.fromkeys(["DPM++ 3M SDE", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu"], SDEDPMSolverPP3M()),
    **dict.fromkeys(["LCM", "LCMScheduler"], LCM()),
    **dict.fromkeys(["DDPM", "DDPMScheduler"], DDPM()),
    "seeds_2": SEEDS2(),
    "seeds_3": SEEDS3(),
    "exp_heun_2_x0": RES2S(c2=1.0),
    "exp_heun_2_x0_sde": SEEDS2(c2=1.0, form="phi2"),
    "er_sde": ERSDE(integrals="sum"),
    "res_multistep_ancestral": RESAncestral(),
    "sa_solver": SASolver(predictor=3, corrector=4),
    "sa_solver_pece": SASolverPECE(predictor=3, corrector=4),
    "Restart": Restart(),
    "HeunPP2": HeunPP2(),
    "IPNDM": IPNDM(),
    "IPNDM_V": LMS(steps=4, euler_at_clean=True, weights="published"),
}
MEANT |= {f"sample_{name}": made for name, made in MEANT.items() if name == name.lower()}
MEANT |= {f"sample_{name}": make_solver(name) for name in ("euler", "heun", "heunpp2", "lms", "ddpm", "lcm", "ipndm")}

# The menus as their sources have them: ComfyUI at e0d4ea77a9f6 (SAMPLER_NAMES and SCHEDULER_HANDLERS of comfy/samplers.py), A1111 1.10 and
# Forge (sd_samplers_kdiffusion.py, sd_samplers_timesteps.py, sd_samplers_lcm.py and sd_schedulers.py of modules, alter_samplers.py).
COMFYUI = [
    *("euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "exp_heun_2_x0", "exp_heun_2_x0_sde"),
    *("dpm_2", "dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde"),
    *("dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"),
    *("dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "ipndm", "ipndm_v", "deis", "cfgpp_ud10_ab", "res_multistep"),
    *("res_multistep_cfg_pp", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp", "gradient_estimation"),
    *("gradient_estimation_cfg_pp", "er_sde", "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece", "ddim", "uni_pc", "uni_pc_bh2"),
]
A1111 = [
    *("DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE", "Euler a", "Euler", "LMS", "Heun"),
    *("DPM2", "DPM2 a", "DPM fast", "DPM adaptive", "Restart", "DDIM", "DDIM CFG++", "PLMS", "UniPC", "LCM"),
]
FORGE = ["DDPM", "HeunPP2", "IPNDM", "IPNDM_V", "DEIS"]  # beside those of A1111
COMFYUI_LEVELS = ["simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic", "kl_optimal"]
A1111_LEVELS = [
    *("Automatic", "Uniform", "Karras", "Exponential", "Polyexponential", "SGM Uniform", "KL Optimal", "Align Your Steps", "Simple"),
    *("Normal", "DDIM", "Beta", "Turbo"),  # the last one is Forge's
]
COMFYUI_NODES = [  # of comfy_extras, that make noise levels
    *("KarrasScheduler", "ExponentialScheduler", "PolyexponentialScheduler", "LaplaceScheduler", "SDTurboScheduler"),
    *("BetaSamplingScheduler", "VPScheduler", "AlignYourStepsScheduler", "GITSScheduler", "OptimalStepsScheduler", "LTXVScheduler"),
    "Flux2Scheduler",
]
MIGRATION = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")


def test_the_table_is_whole():
    assert set(MEANT) == set(ALIASES) and not set(ALIASES) & set(SOLVERS)


@pytest.mark.parametrize("name", [*COMFYUI, *A1111, *FORGE])
def test_every_name_of_the_menus_is_a_solver_or_refused_with_its_reason(name):
    if name not in REFUSED:
        assert make_solver(name).references
        return
    with pytest.raises(SolverError, match=f"^{re.escape(name)} has no solver here: ") as caught:
        make_solver(name)
    assert REFUSED[name] in str(caught.value)


def test_the_migration_page_has_every_name():
    rows = [line.split("|")[1:-1] for line in MIGRATION.splitlines() if line.startswith("|")]
    cells = " | ".join(cell for row in rows for cell in row[:-1])
    words = set(re.split(r"[|,;]| and ", cells.replace("`", "")))
    told = {word.strip() for word in words}
    menus = {*COMFYUI, *A1111, *FORGE, *COMFYUI_LEVELS, *A1111_LEVELS, *COMFYUI_NODES}
    assert not {name.removesuffix("_gpu") for name in menus} - {word.removesuffix(" (Forge)") for word in told}
    assert not [row for row in rows if row[-1].strip() in ("", "none")]


@pytest.mark.parametrize("name", [*COMFYUI_LEVELS, *A1111_LEVELS, *COMFYUI_NODES])
def test_every_name_of_the_noise_levels_is_a_grid_or_refused_with_its_reason(name):
    if name not in GRIDS_REFUSED:
        check_grid_name(name)
        return
    with pytest.raises(GridError, match=f"^{name} is no grid here: "):
        check_grid_name(name)


@pytest.mark.parametrize("name", [name for name, why in REFUSED.items() if "guidance_form" in why])
def test_a_solver_that_a_refusal_names_takes_that_guidance(name):
    solver = REFUSED[name].split()[-1]
    law = VarianceExploding()
    assert len(plus_plus_gains(Sampler.build(solver, "karras", law, nfe=make_solver(solver).stages * 3))) == make_solver(solver).stages * 3


def test_solvers_are_listed_by_family_with_a_line_each():
    families = solvers_by_family()
    assert [name for names in families.values() for name in names] and {n for names in families.values() for n in names} == set(SOLVERS)
    assert all(len(line) > 10 and len(family) > 10 for family, names in families.items() for line in names.values())


@pytest.mark.parametrize("name", MEANT)
@pytest.mark.every(3)
def test_each_name_makes_its_solver(name):
    assert make_solver(name) == MEANT[name]
    nfe = sum(MEANT[name].evaluations(4))
    assert Sampler.build(name, "angle", VPLinear(), nfe=nfe).solver == type(MEANT[name]).__name__


def test_options_are_added_to_a_menus_name_and_win_over_it():
    assert make_solver("DPM++ 2M:form=taylor") == DPMSolverPP(steps=2, form="taylor")
    assert make_solver("UniPC:weights=bh2", corrector=False) == UniPC(steps=3, corrector=False)


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "DPM++ 2M SDE Exponential", "dpmpp_2m_karras", "uni_pc_exponential"])
def test_noise_levels_in_a_name_are_a_grid(name):
    says = f"unknown solver '{name.replace('+', '.')}': (Karras|Exponential|_karras|_exponential) is a choice of noise levels, so name them"
    with pytest.raises(SolverError, match=says + r" by the grid, as in sample\(model, 'dpmpp_2m', nfe=8, grid='karras'\)"):
        make_solver(name)
    with pytest.raises(FewstepError, match="grid='karras'"):
        sample(toy(), name, nfe=4, seeds=[1])


@pytest.mark.parametrize(("name", "near"), [("dpmpp_2s", "dpmpp_2m"), ("DPM++ 3M", "DPM.. 2M"), ("dpm-solver++-2m", "dpm-solver-pp-2m")])
def test_a_near_name_is_found(name, near):
    with pytest.raises(SolverError, match=f"did you mean .*{near}"):
        make_solver(name)
