"""States between stored times: those stored to the bit, exact where the denoiser's answer is constant, and near everywhere else."""

import pytest
import torch
from torch import Tensor

from fewstep import DiscreteVP, GaussianDenoiser, GridError, NoiseSchedule, RectifiedFlow, VarianceExploding, VPLinear
from fewstep.learn.teacher.dense import interpolation
from fewstep.learn.teacher.gram import fine_grid

F64 = torch.float64
LAWS: dict[str, NoiseSchedule] = {
    "edm": VarianceExploding(0.002, 80.0),
    "vp": VPLinear(),
    "flow": RectifiedFlow(),  # alpha = 0 at its start, sigma = 0 at its end
    "table": DiscreteVP.linear(1000),
}


def between(law: NoiseSchedule, std: float, cells: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stored times, times in the middles of the cells, and the exact states of a Gaussian at both."""
    mean = torch.tensor([0.7, -0.3], dtype=F64)
    denoiser = GaussianDenoiser(law, mean, torch.tensor(std, dtype=F64))
    stored = fine_grid(law, cells).t
    x = law.sigma(stored[0]) * torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    middle = (stored[1:] + stored[:-1]) / 2
    states = (torch.stack([denoiser.flow(x, stored[0], t) for t in times]) for times in (stored, middle))
    return stored, middle, *states


@pytest.mark.parametrize("law", LAWS)
def test_a_constant_answer_is_followed_exactly(law: str) -> None:
    stored, middle, states, wanted = between(LAWS[law], 0.0, 12)
    for t, exact in zip(middle, wanted, strict=True):
        places, weights = interpolation(LAWS[law], stored, t)
        found = sum(weight * states[place] for place, weight in zip(places, weights, strict=True))
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_the_error_falls_with_the_fourth_power_of_the_gap(law: str) -> None:
    worst = []
    for cells in (16, 32):
        stored, middle, states, wanted = between(LAWS[law], 0.6, cells)
        errors = []
        for t, exact in list(zip(middle, wanted, strict=True))[1:-2]:  # the ends have no neighbours on one side
            places, weights = interpolation(LAWS[law], stored, t)
            errors.append(float((sum(w * states[k] for k, w in zip(places, weights, strict=True)) - exact).abs().max()))
        worst.append(max(errors))
    assert worst[0] < 0.02 and worst[1] < worst[0] / 6, worst


@pytest.mark.parametrize("law", LAWS)
def test_a_stored_state_is_given_back(law: str) -> None:
    stored = fine_grid(LAWS[law], 12).t
    assert [interpolation(LAWS[law], stored, t) for t in stored] == [([k], [1.0]) for k in range(len(stored))]


@pytest.mark.parametrize("t", [81.0, 0.001])
def test_times_beyond_the_ends_are_refused(t: float) -> None:
    law = LAWS["edm"]
    with pytest.raises(GridError, match=r"trajectories from t = 80 to 0.002 have no state at"):
        interpolation(law, fine_grid(law, 12).t, torch.tensor(t, dtype=F64))


def test_few_stored_states_are_enough() -> None:
    law = VarianceExploding(0.1, 10.0)
    for count in (2, 3):
        stored = torch.linspace(10, 0.1, count, dtype=F64)
        places, weights = interpolation(law, stored, torch.tensor(5.0, dtype=F64))
        assert len(places) == len(weights) == count
