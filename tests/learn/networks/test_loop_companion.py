"""A second network in the training loop, and weights that are chosen on the way: killed anywhere, a run ends with the same bits."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import ArtifactError, FewstepError
from fewstep.learn.networks.loop import Companion, LoopConfig, Selection, run_loop

CONFIG = LoopConfig(steps=9, batch=8, lr=0.05, warmup=2, checkpoint_every=4, ema=0.9)


class Pair:
    """A network, and a second one that follows it; both losses count their calls, and one call can be interrupted."""

    def __init__(self, stop: int = -1) -> None:
        torch.manual_seed(0)
        self.network, self.second, self.calls, self.stop = nn.Linear(2, 1), nn.Linear(2, 1), 0, stop
        self.companion = Companion(self.second, self.follow, 0.02, updates=2, before=3, end=0.25)
        self.selection = Selection(self.measure, 3)

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt

    def follow(self, network: nn.Module, second: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
        self.count()
        x = torch.randn(batch, 2, generator=generator)
        return (second(x) - network(x).detach()).square().mean()

    def loss(self, network: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
        self.count()
        x = torch.randn(batch, 2, generator=generator)
        return (network(x) + self.second(x).detach() - x.sum(1, keepdim=True)).square().mean()

    def measure(self, network: nn.Module) -> dict[str, Any]:
        self.count()
        assert not network.training
        return {"value": float(len(self.selection.scores) != 2), "bias": float(network.bias.detach())}

    def run(self, folder: Path, config: LoopConfig = CONFIG) -> None:
        run_loop(self.network, self.loss, config, folder, companion=self.companion, selection=self.selection)

    def state(self) -> list[Any]:
        weights = [value.tolist() for one in (self.network, self.second) for value in one.state_dict().values()]
        return [*weights, self.selection.scores]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    pair = Pair()
    pair.run(tmp_path_factory.mktemp("whole"))
    return pair


def test_the_second_network_is_trained_as_often_as_was_asked(whole: Pair) -> None:
    measures = len(whole.selection.scores)
    assert whole.calls == 3 + 9 * (2 + 1) + measures and [one["step"] for one in whole.selection.scores] == [0, 3, 6, 9]


def test_its_rate_falls_as_half_a_cosine_from_the_first_step_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, rates = Pair(), list[float]()
    step = torch.optim.AdamW.step

    def recorded(optimizer: torch.optim.AdamW, closure: Any = None) -> Any:
        if optimizer.param_groups[0]["betas"] == pair.companion.betas:
            rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    pair.run(tmp_path)
    assert rates[:6] == pytest.approx([0.02] * 5 + [0.02 * (0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi / 9)))])
    assert len(rates) == 3 + 9 * 2 and rates == sorted(rates, reverse=True)
    assert pair.companion.lr_at(9, 9) == pytest.approx(0.005)


@pytest.mark.slow
def test_wherever_it_is_interrupted_both_networks_end_with_the_same_bits(whole: Pair, tmp_path: Path) -> None:
    for stop in range(1, whole.calls + 1, 2):
        with pytest.raises(KeyboardInterrupt):
            Pair(stop).run(tmp_path / str(stop))
        resumed = Pair()
        resumed.run(tmp_path / str(stop))
        assert resumed.state() == whole.state(), stop
        assert resumed.calls == whole.calls - stop + 1, stop  # nothing is done twice but the call that was interrupted


class KilledError(Exception):
    """Stands for a kill signal, after which only the last checkpoint is left."""


def test_a_killed_run_goes_on_from_its_last_checkpoint(whole: Pair, tmp_path: Path) -> None:
    killed = Pair()

    def mortal(network: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
        if killed.calls > 22:
            raise KilledError
        return Pair.loss(killed, network, batch, generator)

    killed.loss = mortal
    with pytest.raises(KilledError):
        killed.run(tmp_path)
    resumed = Pair()
    resumed.run(tmp_path)
    assert resumed.state() == whole.state() and resumed.calls < whole.calls


def test_the_weights_of_the_least_value_are_kept(whole: Pair) -> None:
    *_, best, last = whole.selection.scores
    assert whole.selection.chosen is best and float(whole.network.bias.detach()) == best["bias"] != last["bias"]


def test_a_measure_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    pair = Pair()
    pair.selection = Selection(lambda network: {"value": float("nan")}, 3)
    with pytest.raises(ArtifactError, match="the measure of the network is not finite after 0 steps: lower lr, or raise updates"):
        pair.run(tmp_path)


def test_a_loss_that_is_not_finite_says_what_two_networks_may_need(tmp_path: Path) -> None:
    pair = Pair()
    pair.loss = lambda network, batch, generator: network.weight.sum() * torch.nan
    with pytest.raises(ArtifactError, match="the loss is not finite at step 1: lower lr, or raise updates"):
        pair.run(tmp_path)


def test_two_networks_are_not_scaled_together(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="two networks are not trained together in fp16: use bf16, or no"):
        Pair().run(tmp_path, replace(CONFIG, mixed_precision="fp16"))
