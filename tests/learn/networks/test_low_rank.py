"""Updates of low rank to a frozen network: what they share, what they are at first, what they may become, and what has no room for them."""

from typing import Any

import pytest
import torch
from tests.problems import tiny_folder
from torch import Tensor, nn

from fewstep import ModelError, load_model
from fewstep.learn.networks.low_rank import LowRankNetwork, memory_in_words
from fewstep.models.networks.calls import unet_call


class Mixed(nn.Module):
    """Layers of all kinds: grouped, strided and dilated convolutions, a layer that is used twice, and one whose weight is read by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(4, 6, 3, padding=1, groups=2, padding_mode="circular")
        self.strided = nn.Conv2d(1, 4, 3, stride=2, padding=2, dilation=2)
        self.deep = nn.Conv3d(2, 3, (1, 2, 2), bias=False)
        self.twice, self.by_hand = nn.Linear(12, 12), nn.Linear(12, 5)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        a = self.strided(x.reshape(-1, 1, 6, 6)).flatten(2)  # [B, 4, 9]
        b = self.norm(self.grouped(a)).reshape(-1, 2, 1, 3, 9)
        c = self.deep(b).flatten(1)[:, :12]
        return torch.nn.functional.linear(self.twice(self.twice(input=c)), self.by_hand.weight)


def call(network: nn.Module, *args: Any) -> Any:
    return network(*args)


def mixed() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Mixed().eval(), torch.randn(3, 36)


def of(network: nn.Module, x: Tensor, rank: int = 1) -> LowRankNetwork:
    return LowRankNetwork(network, rank, lambda one: one(x), seed=0)


def filled(low: LowRankNetwork) -> LowRankNetwork:
    """The same with updates that are not 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in low.parameters():
            one.copy_(0.3 * torch.randn(one.shape, generator=generator))
    return low


def test_at_first_it_is_the_network_to_the_bit() -> None:
    network, x = mixed()
    low = of(network, x)
    assert torch.equal(low(call, x), network(x)) and not torch.equal(filled(low)(call, x), network(x))


def test_an_update_is_a_matrix_of_its_rank_that_is_added_to_a_weight() -> None:
    """The same answers as a network whose weights have ``B A`` added; of a convolution each group has its own."""
    network, x = mixed()
    low = filled(of(network, x, rank=2))
    layers = [network.grouped, network.strided, network.deep, network.twice]
    assert len(low.updates) == len(layers)
    with torch.no_grad():
        answer = low(call, x)
        for layer, (down, up) in zip(layers, low.updates, strict=True):
            groups = getattr(layer, "groups", 1)
            pairs = zip(up.weight.flatten(1).chunk(groups), down.weight.flatten(1).chunk(groups), strict=True)
            updates = [b @ a for b, a in pairs]
            assert all(int(torch.linalg.matrix_rank(one)) == min(2, *one.shape) for one in updates)
            layer.weight.add_(torch.cat(updates).reshape(layer.weight.shape))
        torch.testing.assert_close(network(x), answer, rtol=1e-4, atol=1e-5)


def test_the_weights_are_shared_and_get_no_gradient() -> None:
    network, x = mixed()
    low, names = filled(of(network, x)), [name for name, _ in network.named_parameters()]
    low.requires_grad_(True).train()
    low(call, x).square().mean().backward()
    assert all(one.grad is not None and bool(one.grad.any()) for one in low.parameters())
    assert all(one.grad is None and one.requires_grad for one in network.parameters()) and not network.norm.training
    assert not {id(one) for one in low.parameters()} & {id(one) for one in network.parameters()}
    assert low.state_dict().keys() == dict(low.named_parameters()).keys() and not set(low.state_dict()) & set(names)
    with torch.no_grad():
        before = low(call, x)
        network.twice.bias.add_(1.0)  # in the same memory
        assert not torch.equal(low(call, x), before)
    assert not any(one._forward_hooks for one in network.modules())


def test_its_first_steps_are_those_of_a_whole_network() -> None:
    """An entry of ``A`` has variance ``1/R``, so a step of Adam, which has one size, moves a weight about as far."""
    network = nn.Sequential(nn.Linear(200, 200))
    for rank in (4, 16):
        (update,) = of(network, torch.zeros(1, 200), rank).updates
        moved = torch.sign(torch.randn(update[1].weight.shape, generator=torch.Generator().manual_seed(0))) @ update[0].weight
        assert float(moved.detach().square().mean()) == pytest.approx(1.0, rel=0.1)


def test_memory_is_counted(tmp_path: Any) -> None:
    model = load_model(tiny_folder(tmp_path / "teacher", 2, block_out_channels=(8,)))
    x, time, labels = torch.randn(2, 1, 4, 4), torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
    low = LowRankNetwork(model.network, 2, lambda one: unet_call(one, x, time, labels), seed=0)
    assert torch.equal(low(unet_call, x, time, labels), unet_call(model.network, x, time, labels))
    ours, theirs = (sum(one.numel() for one in network.parameters()) for network in (low, model.network))
    found = low.memory()
    assert found["parameters"] == [ours, theirs] and ours < 0.4 * theirs and found["layers"] == len(low.updates)
    assert found["weights"] == found["gradients"] == [4 * ours, 4 * theirs]
    assert found["optimiser"] == [8 * ours, 8 * theirs] and found["checkpoint"] == [12 * ours, 12 * theirs]
    assert f"updates of rank 2 to {len(low.updates)} layers, {ours:,} parameters in place of {theirs:,}" in memory_in_words(found)


def test_a_network_without_room_is_refused() -> None:
    x, linear = torch.zeros(1, 6), nn.Sequential(nn.Linear(6, 6))
    assert of(linear, x, 3).numbers == (36, 42)
    with pytest.raises(ModelError, match="updates of rank 4 have 48 numbers, Sequential itself 42: take a lower fake_rank, or leave"):
        of(linear, x, 4)
    with pytest.raises(ModelError, match="linear and convolutional layers, and Sequential runs none: leave fake_rank out"):
        of(nn.Sequential(nn.GroupNorm(1, 6)), x)
