"""The adapter: what reaches the network, and what comes back."""

import pytest
import torch
from torch import Tensor, nn

from fewstep import EDM, DiscreteVP, Model, ModelError, VarianceExploding
from fewstep.models.networks.calls import edm_time


class Recorder(nn.Module):
    """Answers half of its input and remembers how it was called."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=dtype))
        self.calls: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor, time: Tensor, *cond: Tensor) -> Tensor:
        self.calls.append((x, time, *cond))
        return self.weight * x


def test_epsilon_is_undone_and_times_are_one_per_sample() -> None:
    network, schedule = Recorder(torch.float32), DiscreteVP.linear()
    denoiser, x = Model(network, schedule, "epsilon"), torch.randn(3, 1, 4, 4)
    t = torch.tensor(500.0, dtype=torch.float64)
    x0 = denoiser(x, t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(x0, ((1 - 0.5 * sigma) / alpha).float() * x)
    assert network.calls[0][1].tolist() == [500.0] * 3
    torch.testing.assert_close(denoiser(x, t.expand(3)), x0)


def test_edm_scales_its_input_and_its_time() -> None:
    network = Recorder(torch.float32)
    denoiser = Model(network, VarianceExploding(), EDM(0.5), time=edm_time)
    x, t = torch.randn(2, 3), torch.tensor(2.0, dtype=torch.float64)
    denoiser(x, t, torch.tensor([7, 8]))
    seen, time, cond = network.calls[0]
    torch.testing.assert_close(seen, x / (4 + 0.25) ** 0.5)
    torch.testing.assert_close(time, torch.full((2,), torch.log(torch.tensor(2.0)).item() / 4))
    assert cond.tolist() == [7, 8]


def test_a_half_precision_network_sees_its_own_dtype_and_answers_in_that_of_the_state() -> None:
    network = Recorder(torch.bfloat16)
    x0 = Model(network, DiscreteVP.linear(), "v")(torch.randn(2, 3), torch.tensor(10.0, dtype=torch.float64))
    assert network.calls[0][0].dtype == torch.bfloat16 and network.calls[0][1].dtype == torch.float32 and x0.dtype == torch.float32


def test_a_network_that_refuses_or_answers_another_shape_is_named() -> None:
    t = torch.tensor(10.0, dtype=torch.float64)
    with pytest.raises(ModelError, match="refused a state of shape"):
        Model(nn.Linear(5, 5), DiscreteVP.linear(), "v", call=lambda net, x, time, cond: net(x))(torch.randn(2, 3), t)
    with pytest.raises(ModelError, match="pass call="):
        Model(lambda x, time: (x,), DiscreteVP.linear(), "v")(torch.randn(2, 3), t)
    with pytest.raises(ModelError, match=r"answered shape \(2, 2\)"):
        Model(lambda x, time: x[:, :2], DiscreteVP.linear(), "v")(torch.randn(2, 3), t)
