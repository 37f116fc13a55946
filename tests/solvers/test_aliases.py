"""Solvers by their names in the menus of A1111 and ComfyUI, in k-diffusion and in diffusers."""

import pytest
from tests.problems import toy

from fewstep import FewstepError, Sampler, SolverError, VPLinear, make_solver, sample
from fewstep.solvers import (
    DDPM,
    ERSDE,
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
    SDEDPMSolverPP2M,
    SDEDPMSolverPP3M,
    UniPC,
)
from fewstep.solvers.aliases import ALIASES

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
    **dict.fromkeys(["LMS", "sample_lms", "LMSDiscreteScheduler"], LMS(steps=4)),
    "PLMS": PNDM(),
    "PNDMScheduler": PNDM(warm_up="runge-kutta"),
    "ipndm_v": LMS(steps=4, euler_at_clean=True, weights="published"),
    **dict.fromkeys(["DPM2", "dpm_2", "sample_dpm_2", "KDPM2DiscreteScheduler"], DPMSolver2S()),
    **dict.fromkeys(["DPM fast", "dpm_fast", "sample_dpm_fast"], DPMSolverFast()),
    "res_multistep": ExponentialAB(steps=2),
    "gradient_estimation": GradientEstimation(gamma=2.0),
    "sample_euler": make_solver("euler"),
    "sample_heun": make_solver("heun"),
    "sample_dpmpp_2m": DPMSolverPP(steps=2),
    **dict.fromkeys(["dpmpp_2m_sde_gpu", "sample_dpmpp_2m_sde"], SDEDPMSolverPP2M()),
    "dpmpp_2m_sde_heun_gpu": SDEDPMSolverPP2M(form="taylor"),
    **dict.fromkeys(["Euler a", "euler_ancestral", "sample_euler_ancestral", "EulerAncestralDiscreteScheduler"], EulerAncestral()),
    **dict.fromkeys(["DPM2 a", "dpm_2_ancestral", "sample_dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"], DPM2Ancestral()),
    **dict.fromkeys(["DPM++ 2S a", "dpmpp_2s_ancestral", "sample_dpmpp_2s_ancestral"], DPMSolverPP2SAncestral()),
    **dict.fromkeys(["DPM++ SDE", "dpmpp_sde", "dpmpp_sde_gpu", "sample_dpmpp_sde", "DPMSolverSDEScheduler"], DPMSolverPPSDE()),
    **dict.fromkeys(["DPM++ 3M SDE", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "sample_dpmpp_3m_sde"], SDEDPMSolverPP3M()),
    **dict.fromkeys(["LCM", "LCMScheduler"], LCM()),
    **dict.fromkeys(["DDPM", "DDPMScheduler"], DDPM()),
    "seeds_2": SEEDS2(),
    "seeds_3": SEEDS3(),
    "exp_heun_2_x0": RES2S(c2=1.0),
    "exp_heun_2_x0_sde": SEEDS2(c2=1.0, form="phi2"),
    "er_sde": ERSDE(integrals="sum"),
}


def test_the_table_is_whole():
    assert set(MEANT) == set(ALIASES) and not set(ALIASES) & set(SOLVERS)


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
