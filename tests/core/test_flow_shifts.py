"""Shifts of a flow's time: static, by the image's size, and to a last level, against their published formulas."""

import math

import numpy as np
import pytest

from fewstep import DiscreteVP, FewstepError, GridError, RectifiedFlow, VPLinear, make_grid
from fewstep.core.flow_shifts import shift_of_size

SAME = 1e-12
STEPS = (1, 2, 5, 28)


def levels(grid, law):
    return law.sigma(grid.t).numpy()


@pytest.mark.parametrize("law", [RectifiedFlow(), RectifiedFlow(3.0)])
@pytest.mark.parametrize("steps", STEPS)
def test_static(law, steps):
    """Esser et al., arXiv 2403.03206, eq. 23 with m/n = shift^2; times as pipelines pass them, from 1 to 1/N."""
    u = np.linspace(1, 1 / steps, steps)
    for shift in (0.5, 1.0, 3.0):
        expected = np.append(shift * u / (1 + (shift - 1) * u), 0)
        np.testing.assert_allclose(levels(make_grid("shift", law, steps, shift=shift), law), expected, atol=SAME)
    assert np.allclose(make_grid("shift", law, steps).t, make_grid("uniform", law, steps).t, atol=SAME)  # the law's own by default


@pytest.mark.parametrize("steps", STEPS)
def test_dynamic(steps):
    """black-forest-labs/flux, src/flux/sampling.py: time_shift, mu linear in the number of tokens from (256, 0.5) to (4096, 1.15)."""
    law, u = RectifiedFlow(), np.linspace(1, 1 / steps, steps)
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (1024 - 256)
    expected = np.append(math.exp(mu) / (math.exp(mu) + (1 / u - 1)), 0)
    for options in ({"image_seq_len": 1024}, {"mu": mu}, {"width": 512, "height": 512}):
        np.testing.assert_allclose(levels(make_grid("dynamic_shift", law, steps, **options), law), expected, atol=SAME)
    expected = np.append(mu / (mu + (1 / u - 1)), 0)
    np.testing.assert_allclose(levels(make_grid("dynamic_shift:time_shift_type=linear", law, steps, mu=mu), law), expected, atol=SAME)


def test_the_parameter_of_an_image_size():
    assert shift_of_size(256) == pytest.approx(0.5) and shift_of_size(4096) == pytest.approx(1.15)
    own = shift_of_size(2048, base_shift=0.6, max_shift=2.0, base_image_seq_len=1024, max_image_seq_len=4096)
    assert own == pytest.approx(0.6 + 1.4 / 3)
    with pytest.raises(GridError, match="base_image_seq_len and max_image_seq_len differ, as 256 and 4096, got 256 twice"):
        shift_of_size(1024, max_image_seq_len=256)


@pytest.mark.parametrize("steps", [2, 5, 28])
def test_to_a_last_level(steps):
    """Lightricks/LTX-Video, ltx_video/schedulers/rf.py, stretch_shift_to_terminal."""
    law, u = RectifiedFlow(), np.linspace(1, 1 / steps, steps)
    u = 3 * u / (1 + 2 * u)
    expected = np.append(1 - (1 - u) / ((1 - u[-1]) / (1 - 0.1)), 0)
    np.testing.assert_allclose(levels(make_grid("shift:shift=3:shift_terminal=0.1", law, steps), law), expected, atol=SAME)
    np.testing.assert_allclose(expected[-2], 0.1)
    assert make_grid("shift:shift_terminal=0.1", law, 1).t.tolist() == [1.0, 0.0]  # a single level at 1 has nothing to stretch


def test_the_ends():
    law = RectifiedFlow()
    low = 3 * 1e-3 / (1 + 2e-3)
    for end, u in (("append", np.linspace(1, low, 5)), ("sigma_min", np.linspace(1, low, 6))):
        expected = 3 * u / (1 + 2 * u)
        expected = np.append(expected, 0) if end == "append" else expected
        np.testing.assert_allclose(levels(make_grid(f"shift:shift=3:end={end}", law, 5), law), expected, atol=SAME)


def test_from_a_time_on():
    law = RectifiedFlow(3.0)
    grid = make_grid("shift", law, 4, t_max=0.5)
    assert np.allclose(grid.t, [0.5, 0.375, 0.25, 0.125, 0.0], atol=SAME)
    grid = make_grid("dynamic_shift:mu=1", law, 4, t_max=0.5)
    assert float(grid.t[0]) == 0.5 and grid.steps == 4


@pytest.mark.parametrize("law", [VPLinear(), DiscreteVP.linear(), None, "flow"])
@pytest.mark.parametrize("name", ["shift", "dynamic_shift:mu=1"])
def test_a_law_that_is_no_flow_is_refused(name, law):
    with pytest.raises(FewstepError, match="shifts the time of a rectified flow, and .* is none|a spacing is laid out on a noise law"):
        make_grid(name, law, 5)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("shift:shift=0", "option shift of grid 'shift' is above 0, got 0"),
        ("shift:shift=NaN", "option shift of grid 'shift' is a number, got 'nan'"),
        ("shift:shift_terminal=1", "option shift_terminal of grid 'shift' lies between 0 and 1, got 1"),
        ("shift:end=zero", "unknown end of a grid 'zero'"),
        ("shift:mu=1", "grid 'shift' has no option mu; it has: shift, shift_terminal, end, t_max"),
        ("dynamic_shift", "dynamic_shift needs one of mu, image_seq_len, or width and height of the image"),
        ("dynamic_shift:mu=1:image_seq_len=256", "dynamic_shift needs one of mu"),
        ("dynamic_shift:width=1024", "dynamic_shift needs one of mu"),
        ("dynamic_shift:mu=1:time_shift_type=cosine", "unknown time_shift_type 'cosine'"),
        ("dynamic_shift:mu=-1:time_shift_type=linear", "option mu of grid 'dynamic_shift' is above 0, got -1"),
        ("dynamic_shift:mu=1000", "option mu of grid 'dynamic_shift' lies between -100 and 100"),
        ("dynamic_shift:image_seq_len=-4", "option image_seq_len of grid 'dynamic_shift' is above 0, got -4"),
    ],
)
def test_options_are_refused_in_words(spec, says):
    with pytest.raises(GridError, match=says):
        make_grid(spec, RectifiedFlow(), 5)


@pytest.mark.parametrize("steps", [0, 2.5, math.nan])
def test_at_least_one_step(steps):
    for name in ("shift", "dynamic_shift:mu=1"):
        with pytest.raises(GridError, match="at least 1 step, a whole number of them"):
            make_grid(name, RectifiedFlow(), steps)
