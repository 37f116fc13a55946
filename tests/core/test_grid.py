"""Time grids: each spacing uniform in what it says, exact at its ends, and nothing that no solver could run on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fewstep import (
    DiscreteVP,
    FewstepError,
    GridError,
    Model,
    RectifiedFlow,
    Sampler,
    TimeGrid,
    VarianceExploding,
    VPCosine,
    VPLinear,
    make_grid,
    sample,
)
from fewstep.core.spacings import GRIDS, standard_grids

UNIFORM = 1e-8  # relative, of equal steps of a variable: times went through lam and back
VARIABLES = {
    "logsnr": lambda s, t: s.lam(t),
    "karras": lambda s, t: torch.exp(-s.lam(t) / 7),
    "uniform": lambda s, t: t,
    "quadratic": lambda s, t: torch.sqrt(t - s.t_clean),
    "angle": lambda s, t: torch.atan2(s.sigma(t), s.alpha(t)),
}
LAWS = {
    "vp-linear": VPLinear(),
    "vp-cosine": VPCosine(),
    "edm": VarianceExploding(),
    "flow": RectifiedFlow(t_min=0.01, t_max=0.99),
    "flow-shift-3": RectifiedFlow(shift=3.0, t_min=0.01, t_max=0.99),
    "table": DiscreteVP.linear(),
}
WHOLE = {"flow": RectifiedFlow(), "flow-shift-3": RectifiedFlow(shift=3.0), "table": DiscreteVP.linear().zero_terminal_snr()}


def uniform_in(name, schedule, grid):
    steps = torch.diff(VARIABLES[name](schedule, grid.t))
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=UNIFORM, atol=0)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.every(4, 2)
def test_uniform_in_its_own_variable(name, law):
    schedule = LAWS[law]
    for steps in (1, 2, 7, 50):
        grid = GRIDS[name](schedule, steps)
        assert grid.steps == steps
        assert grid.t.dtype == torch.float64
        assert (grid.t[0], grid.t[-1]) == (schedule.t_max, schedule.t_min)
        uniform_in(name, schedule, grid)


@pytest.mark.parametrize("law", WHOLE)
@pytest.mark.parametrize("name", ["uniform", "quadratic", "angle"])
def test_from_pure_noise_to_clean(name, law):
    schedule = WHOLE[law]
    grid = GRIDS[name](schedule, 9, t_min=schedule.t_clean)
    assert (grid.t[0], grid.t[-1]) == (schedule.t_max, schedule.t_clean)
    uniform_in(name, schedule, grid)


@pytest.mark.parametrize("name", VARIABLES)
def test_ends_of_ones_own(name):
    grid = GRIDS[name](VPLinear(), 5, t_max=0.7, t_min=0.1)
    assert (grid.t[0], grid.t[-1]) == (0.7, 0.1)
    uniform_in(name, VPLinear(), grid)


def test_karras_is_equation_5_of_its_paper():
    i = torch.arange(11, dtype=torch.float64) / 10
    for rho in (3.0, 7.0):
        expected = (80 ** (1 / rho) + i * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
        torch.testing.assert_close(TimeGrid.karras(VarianceExploding(), 10, rho=rho).t, expected, rtol=1e-12, atol=0)


def test_angle_with_a_scale():
    schedule = RectifiedFlow()
    t = TimeGrid.angle(schedule, 8, c=0.25).t
    steps = torch.diff(torch.atan2(schedule.sigma(t), 0.25 * schedule.alpha(t)))
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=UNIFORM, atol=0)


# -- diffusers' three -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 7, 10, 20, 27, 50, 250, 999, 1000])
@pytest.mark.every(3, 2)
def test_diffusers_integers(steps):
    """The formulas of its schedulers, written as there."""
    schedule, count = DiscreteVP.linear(), 1000
    trailing = np.round(np.arange(count, 0, -count / steps)).astype(np.int64) - 1
    leading = (np.arange(0, steps) * (count // steps)).round()[::-1].astype(np.int64) + 1
    assert TimeGrid.trailing(schedule, steps, t_min=-1).t.tolist() == [*trailing, -1]
    if steps < 1000:
        linspace = np.linspace(0, count - 1, steps + 1).round()[::-1][:-1].astype(np.int64)
        assert TimeGrid.linspace(schedule, steps).t.tolist() == [*linspace, 0]
    assert TimeGrid.leading(schedule, steps, t_min=-1).t.tolist() == [*leading, -1]


@pytest.mark.parametrize("name", ["linspace", "leading", "trailing"])
def test_diffusers_spacings_want_a_table(name):
    with pytest.raises(GridError, match=f"the {name} spacing is for models with discrete times; use uniform, angle"):
        make_grid(name, VPLinear(), 10)


# -- from noise levels, snapped, moved to the end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["vp-linear", "vp-cosine", "edm", "flow", "table"])
def test_from_sigmas(law):
    schedule, levels = LAWS[law], torch.tensor([20.0, 5.0, 1.0, 0.1, 0.0], dtype=torch.float64)
    grid = TimeGrid.from_sigmas(schedule, levels.tolist())
    torch.testing.assert_close(schedule.sigma(grid.t) / schedule.alpha(grid.t), levels, rtol=1e-9, atol=0)
    assert grid.t[-1] == schedule.t_clean


@pytest.mark.parametrize("levels", [[10, 1, math.nan], [10, 1, -0.5], [10, math.nan, 0]])
def test_noise_levels_that_are_none_are_refused(levels):
    with pytest.raises(GridError, match="noise levels are numbers from 0"):
        TimeGrid.from_sigmas(VarianceExploding(), levels)


def test_to_clean_moves_the_last_time_only():
    for schedule in (VPLinear(), DiscreteVP.linear(), VarianceExploding()):
        grid = TimeGrid.logsnr(schedule, 6)
        clean = grid.to_clean(schedule)
        assert torch.equal(clean.t[:-1], grid.t[:-1])
        assert clean.t[-1] == schedule.t_clean


@given(st.lists(st.floats(-3, 12), min_size=2, max_size=5, unique=True), st.permutations([0.0, 1.5, 2.0, 5.0, 9.0]))
def test_snap_is_to_the_nearest(times, table):
    grid, table = TimeGrid(torch.tensor(sorted(times, reverse=True), dtype=torch.float64)), torch.tensor(table, dtype=torch.float64)
    distance = (grid.t[:, None] - table).abs()
    nearest, second = distance.sort(1).values.unbind(1)[:2]
    assume(bool((nearest < second).all()))
    expected = table[distance.argmin(1)]
    if len(expected.unique()) < len(expected):
        with pytest.raises(GridError, match="more than once"):
            grid.snap(table)
    else:
        assert torch.equal(grid.snap(table).t, expected)


@pytest.mark.parametrize("table", ["a", None, 3.0, [], [1.0], [math.nan, 1.0], [[1.0, 2.0]], torch.tensor([1.0, math.inf])])
def test_snap_refuses_what_is_no_table(table):
    with pytest.raises(GridError, match="snapped to a table of at least 2 finite times"):
        TimeGrid(torch.tensor([1.0, 0.5])).snap(table)


def test_snap_refuses_two_times_on_one_entry():
    schedule = DiscreteVP.linear()
    with pytest.raises(GridError, match="3 steps .* more than once on the model's time 5"):
        TimeGrid(torch.tensor([9.0, 5.2, 4.9, 0.0])).snap(schedule.times)
    with pytest.raises(GridError, match="200 steps of this spacing fall more than once on the model's time 0, 1"):
        make_grid("logsnr", schedule, 200)
    with pytest.raises(GridError, match=r"model's time 0, 1, 2, 3, 4 and \d+ others; use fewer or another"):
        make_grid("logsnr", schedule, 900)


def test_make_grid_snaps_on_a_table_only():
    table = DiscreteVP.linear()
    assert torch.equal(make_grid("logsnr", table, 10).t, TimeGrid.logsnr(table, 10).snap(table.times).t)
    assert make_grid("angle", table, 10, t_min=-1).t.tolist() == make_grid("angle", table, 10, t_min=-1).t.round().tolist()
    assert torch.equal(make_grid("karras", VPLinear(), 10, rho=5).t, TimeGrid.karras(VPLinear(), 10, rho=5).t)


# -- refusals -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0], "at least 2 times, got shape \\(1,\\)"),
        ([], "at least 2 times"),
        ([[1.0, 0.0]], "1-d list"),
        (1.0, "1-d list"),
        ([1.0, math.nan, 0.0], "time 1 of the grid is not finite"),
        ([math.inf, 1.0], "time 0 of the grid is not finite"),
        ([1.0, 0.5, 0.5, 0.1], "0.5 \\(at index 1\\) appears twice"),
        ([1.0, 0.2, 0.7], "0.2 \\(at index 1\\) is followed by the larger 0.7"),
    ],
)
def test_times_that_are_no_grid(times, message):
    with pytest.raises(GridError, match=message):
        TimeGrid(torch.tensor(times))


@pytest.mark.parametrize("steps", [0, -1, 2.5])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.every(4, 2)
def test_at_least_one_step(name, steps):
    with pytest.raises(GridError, match="at least 1 step"):
        make_grid(name, DiscreteVP.linear(), steps)


@pytest.mark.parametrize(("t_max", "t_min"), [(0.1, 0.5), (0.5, 0.5), (math.inf, 0.1)])
@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.every(3, 2)
def test_ends_the_wrong_way_round(name, t_max, t_min):
    with pytest.raises(GridError, match="from t_max down to a smaller t_min"):
        make_grid(name, VPLinear(), 5, t_max=t_max, t_min=t_min)


def test_spacings_that_need_another_start_or_end():
    with pytest.raises(GridError, match="logsnr spacing needs finite lam at both ends.*use angle"):
        TimeGrid.logsnr(RectifiedFlow(), 5)
    with pytest.raises(GridError, match="karras spacing needs alpha > 0 at its start"):
        TimeGrid.karras(RectifiedFlow(), 5)


def test_names_and_options():
    with pytest.raises(GridError, match="unknown grid 'karas': did you mean karras"):
        make_grid("karas", VPLinear(), 5)
    with pytest.raises(GridError, match="'logsnr' has no option rho"):
        make_grid("logsnr", VPLinear(), 5, rho=7)


def test_a_grid_is_float64_on_the_cpu_whatever_it_is_made_of():
    grid = TimeGrid(torch.tensor([1.0, 0.5], dtype=torch.float32))
    assert (grid.t.dtype, grid.t.device.type) == (torch.float64, "cpu")


def test_levels_beyond_a_table_are_kept_and_the_network_is_told_its_last_times(caplog):
    law = DiscreteVP.scaled_linear()
    levels = torch.tensor([20.0, 5.0, 1.0, 0.02], dtype=torch.float64)
    grid = TimeGrid.from_sigmas(law, [*levels.tolist(), 0.0])
    assert "noise levels beyond the model's table are kept" in caplog.text
    known = grid.known_to(law)
    assert known.t[[0, 3, 4]].tolist() == grid.t[[0, 3, 4]].tolist() and torch.equal(known.t[1:3], grid.t[1:3].round())
    torch.testing.assert_close(torch.exp(-law.lam(grid.t[:4])), levels, rtol=1e-9, atol=0)
    told = []
    model = Model(lambda x, time: told.append(float(time[0])) or x, law, "v", shape=(2,))
    sample(model, "ddim", seeds=[1], grid=grid)
    assert told == [999.0, *known.t[1:3].tolist(), 0.0]
    caplog.clear()
    TimeGrid.from_sigmas(law, [10.0, 1.0, 0.0])
    assert not caplog.text


@pytest.mark.parametrize("levels", [["a", 1], None, "80,1"])
def test_levels_that_are_no_list_are_refused(levels):
    with pytest.raises(GridError, match="noise levels are a list of numbers"):
        TimeGrid.from_sigmas(DiscreteVP.linear(), levels)


@pytest.mark.parametrize(
    ("law", "times"),
    [
        (DiscreteVP.scaled_linear(), [1500.0, 500.0, 0.0]),
        (RectifiedFlow(), [1.2, 0.5, 0.0]),
        (RectifiedFlow(3.0), [1.0, 0.5, -0.1]),
        (VPLinear(), [1.0, 0.5, -0.1]),
        (VarianceExploding(), [10.0, 1.0, -1.0]),
    ],
)
def test_times_outside_the_noise_law_are_refused(law, times):
    with pytest.raises(GridError, match="leave the noise law, which runs from .*: beyond pure noise or the clean image"):
        Sampler.build("ddim", TimeGrid(times), law)


LAW = VPLinear()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TimeGrid.uniform(None, 5), "a grid is laid out on a noise law, .* got None"),
        (lambda: TimeGrid.from_sigmas(None, [1, 0]), "a grid is laid out on a noise law"),
        (lambda: TimeGrid([3, 2]).known_to(None), "a grid is laid out on a noise law"),
        (lambda: TimeGrid([3, 2]).stretched("flow", 3), "a grid is laid out on a noise law, .* got flow"),
        (lambda: TimeGrid.uniform(LAW, 5, bogus=1), "uniform: got an unexpected keyword argument 'bogus'"),
        (lambda: TimeGrid.uniform(LAW, math.nan), "at least 1 step, a whole number of them, got nan"),
        (lambda: TimeGrid.uniform(LAW, True), "at least 1 step, a whole number of them, got True"),
        (lambda: TimeGrid.uniform(LAW, 5, t_max="1"), "t_max of a grid is a number, got '1'"),
        (lambda: TimeGrid.karras(LAW, 5, rho="7"), "rho of the karras spacing is a number, got '7'"),
        (lambda: TimeGrid.karras(LAW, 5, rho=0), "the karras spacing cannot take rho = 0"),
        (lambda: TimeGrid.angle(LAW, 5, c="1"), "c of the angle spacing is a number, got '1'"),
        (lambda: TimeGrid.angle(LAW, 5, power=None), "power of the angle spacing is a number, got 'None'"),
        (lambda: TimeGrid.leading(DiscreteVP.linear(), 5, offset="a"), "the offset of the leading spacing is a number, got 'a'"),
    ],
)
def test_spacings_say_what_to_pass(make, says):
    with pytest.raises(FewstepError, match=says):
        make()


def test_standard_grids_run_from_the_first_time_to_the_last() -> None:
    for schedule in (VarianceExploding(0.1, 10.0), DiscreteVP.linear(60)):
        found = standard_grids(schedule, 5)
        assert {"angle", "karras", "logsnr", "uniform", "quadratic"} - {"karras"} <= set(found) <= set(GRIDS) - {"leading"}
        for name, grid in found.items():
            assert torch.equal(grid.t, make_grid(name, schedule, 5).t)
            assert (float(grid.t[0]), float(grid.t[-1])) == (schedule.t_max, schedule.t_min)
    assert "trailing" not in standard_grids(VarianceExploding(0.1, 10.0), 5)  # of a table alone
    assert standard_grids(DiscreteVP.linear(4), 50) == {}
