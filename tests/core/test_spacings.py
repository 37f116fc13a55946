"""The names of grids: each of another program stands for one of ours, and a name alone is checked as `make_grid` reads it."""

import math

import pytest
import torch

from fewstep import DiscreteVP, GridError, RectifiedFlow, TimeGrid, VPLinear, make_grid
from fewstep.core.spacings import ALIASES, GRIDS, KNOWN, REFUSED, check_grid_name, is_curve
from fewstep.integrations.kdiffusion import sigmas_for

A1111 = (
    *("Karras", "Exponential", "Polyexponential", "SGM Uniform", "KL Optimal", "Align Your Steps"),
    *("Simple", "Normal", "DDIM", "Beta", "Uniform"),
)
COMFYUI = ("simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic", "kl_optimal")
LAW = DiscreteVP.scaled_linear()


@pytest.mark.parametrize("name", [*A1111, *COMFYUI])
@pytest.mark.every(3)
def test_the_menus_of_a1111_and_comfyui(name):
    """modules/sd_schedulers.py of A1111 1.10, where Automatic is the sampler's own choice; SCHEDULER_HANDLERS of comfy/samplers.py."""
    assert make_grid(name, LAW, 10).steps == 10
    check_grid_name(name)


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.every(3)
def test_a_name_of_another_program_is_one_of_ours(name):
    law = RectifiedFlow() if "shift" in ALIASES[name] else LAW
    options = {"mu": 1.0} if "shift" in name else {}
    assert torch.equal(make_grid(name, law, 5, **options).t, make_grid(ALIASES[name], law, 5, **options).t)
    assert is_curve(name) and name not in KNOWN


def test_the_levels_of_the_node_for_ltx_are_its_formula():
    """A shift by ``e^mu``, with ``mu`` linear in the tokens, 4096 where none are known, stretched to end at 0.1, and 0."""
    times = torch.linspace(1, 0, 9, dtype=torch.float64)[:-1]
    shifted = math.exp(2.05) / (math.exp(2.05) + 1 / times - 1)
    stretched = 1 - (1 - shifted) * 0.9 / (1 - shifted[-1])
    grid = make_grid("LTXVScheduler", RectifiedFlow(), 8)
    torch.testing.assert_close(grid.t, torch.cat([stretched, torch.zeros(1, dtype=torch.float64)]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_names_of_other_programs_without_a_grid_say_why(name):
    for ask in (lambda: make_grid(name, LAW, 8), lambda: check_grid_name(name)):
        with pytest.raises(GridError, match=f"^{name} is no grid here: ") as caught:
            ask()
        assert REFUSED[name] in str(caught.value)


def test_the_ways_that_the_refusals_name_are_theirs():
    """Forge's Turbo and ComfyUI's node of the same name for SDXL Turbo, by the timesteps in their code."""
    turbo = make_grid("trailing", LAW, 6).to_clean(LAW)
    theirs = (torch.arange(6, 0, -1, dtype=torch.float64) * (1000 / 6) - 1).round()
    assert torch.equal(turbo.t[:-1], theirs) and float(LAW.sigma(turbo.t[-1])) == 0
    assert float(LAW.sigma(TimeGrid([999, 899, LAW.t_clean]).t[-1])) == 0
    assert make_grid("dynamic_shift:mu=2.2", RectifiedFlow(), 8).steps == 8


def test_options_behind_a_name_take_the_place_of_those_it_stands_for():
    assert torch.equal(make_grid("KL Optimal:end=append", LAW, 6).t, make_grid("kl_optimal", LAW, 6).t)
    assert torch.equal(make_grid("beta57:beta=0.5", LAW, 6).t, make_grid("beta:alpha=0.5:beta=0.5", LAW, 6).t)
    assert torch.equal(make_grid("beta", LAW, 6, alpha=0.5, beta=0.7).t, make_grid("beta57", LAW, 6).t)


def test_exact_levels_or_the_networks_own_times():
    exact = make_grid("exponential", LAW, 6)
    assert not torch.equal(exact.t, exact.t.round())
    assert torch.equal(make_grid("exponential:snap=true", LAW, 6).t, exact.t.round())
    assert torch.equal(make_grid("logsnr", LAW, 6).t, make_grid("logsnr:snap=false", LAW, 6).t.round())
    with pytest.raises(GridError, match="fall more than once on the model's time 0"):
        make_grid("exponential:snap=true", LAW, 200)
    assert make_grid("exponential", LAW, 200).steps == 200


def test_the_spacings_of_this_library_are_no_curves():
    assert not any(is_curve(name) for name in GRIDS) and is_curve("beta:alpha=0.5") and is_curve("Karras")


def test_names_that_stand_for_nothing():
    check_grid_name("karras:rho=5", "optimized")
    check_grid_name("optimized", "optimized")
    with pytest.raises(GridError, match="unknown grid 'karas': did you mean karras or Karras"):
        check_grid_name("karas")
    with pytest.raises(GridError, match="unknown grid 'sgm uniform': did you mean sgm_uniform"):
        make_grid("sgm uniform", VPLinear(), 5)


def test_levels_for_a_host_end_as_their_program_ends_them():
    ours = sigmas_for("exponential", 5, 0.03, 14.6)
    assert len(ours) == 6 and ours[-1] == 0 and float(ours[-2]) == pytest.approx(0.03)
    assert float(sigmas_for("exponential:end=sigma_min", 5, 0.03, 14.6)[-1]) == pytest.approx(0.03)
    with pytest.raises(GridError, match="the levels of 'exponential' have an end of their own: leave end out"):
        sigmas_for("exponential", 5, 0.03, 14.6, end="append")
