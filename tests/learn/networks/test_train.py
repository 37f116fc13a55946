"""The reference trainer: what it saves is what the loaders load, and it learns."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep import ArtifactError, FewstepError, Model, VarianceExploding, load_model, sample
from fewstep.data.images import Images, load_images
from fewstep.learn.networks import train as module
from fewstep.learn.networks.loop import LoopConfig, identity_of
from fewstep.learn.networks.score_matching import score_matching
from fewstep.learn.networks.train import TrainConfig, train
from fewstep.models.networks.calls import unet_call

LOOP = LoopConfig(steps=12, batch=16, checkpoint_every=100)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "conditional"), [("edm", True), ("edm", False), ("ddpm", False)])
def test_a_trained_folder_loads_as_a_model(tmp_path: Path, kind: str, conditional: bool) -> None:
    losses: list[float] = []
    config = TrainConfig(kind, conditional, channels=(16, 16))
    out = train(
        load_images("digits"), config, LOOP, tmp_path / kind, command="fewstep train", observe=lambda step, value: losses.append(value)
    )
    model = load_model(out)
    assert model.shape == (1, 8, 8) and model.classes == (10 if conditional else None)
    assert losses[-1] < losses[0]
    assert "fewstep train" in (out / "README.md").read_text() and not (out / "checkpoint").exists()
    t = torch.tensor(model.schedule.t_max, dtype=torch.float64)
    assert bool(torch.isfinite(model(torch.randn(2, 1, 8, 8), t, model.labels([0, 1]))).all())
    with pytest.raises(FewstepError, match="already holds a trained model"):
        train(load_images("digits"), config, LOOP, out, command="")


@pytest.mark.slow
def test_a_flow_map_is_trained_from_pictures_alone(tmp_path: Path) -> None:
    losses: list[float] = []
    digits, config, loop = (
        load_images("digits"),
        TrainConfig("flow-map", True, channels=(16, 16)),
        replace(LOOP, steps=24, lr=1e-2, warmup=0),
    )
    out = train(digits, config, loop, tmp_path / "map", command="fewstep train", observe=lambda step, value: losses.append(value))
    model = load_model(out)
    assert model.flow_map is not None and (model.shape, model.classes, model.null_label) == ((1, 8, 8), 10, None)
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6]) and not (out / "checkpoint").exists()
    assert bool(torch.isfinite(sample(model, nfe=3, seeds=range(2))).all())
    with pytest.raises(FewstepError, match="already holds a trained model"):
        train(digits, config, loop, out, command="")


@pytest.mark.parametrize(
    ("kind", "option"), [("flow-map", {"flip": True}), ("flow-map", {"label_dropout": 0.2}), ("ddpm", {"p_mean": 1.0})]
)
def test_options_that_a_kind_does_not_have_are_refused(kind: str, option: dict) -> None:
    with pytest.raises(FewstepError, match=f"{next(iter(option))} changes nothing of the kind {kind}"):
        TrainConfig(kind, **option)


@pytest.mark.slow
def test_an_interrupted_run_is_not_continued_as_another_model(tmp_path: Path) -> None:
    digits, config = load_images("digits"), TrainConfig("edm", channels=(16, 16))

    def interrupt(step: int, value: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(digits, config, LOOP, tmp_path, command="", observe=interrupt)
    for other in (replace(config, kind="ddpm"), replace(config, conditional=True)):
        with pytest.raises(ArtifactError, match="belongs to another run"):
            train(digits, other, LOOP, tmp_path, command="")
    train(digits, config, LOOP, tmp_path, command="")


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 5, "batch": 0}, {"steps": 5, "lr": -1.0}])
def test_a_loop_that_could_not_train_is_refused(options: dict) -> None:
    with pytest.raises(FewstepError, match="is at least 1, got 0|is a positive number, got -1"):
        LoopConfig(**options)


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="unknown kind of model 'vae'"):
        TrainConfig("vae")
    unlabelled = Images(torch.zeros(4, 1, 8, 8), None, 256, "grey")
    with pytest.raises(FewstepError, match="no labels"):
        train(unlabelled, TrainConfig("edm", True), LOOP, tmp_path / "x", command="")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"channels": (48, 40)}, "multiple of 16, got 48, 40"),
        ({"channels": ()}, "got none"),
        ({"layers": 0}, "layers is at least 1"),
        ({"dropout": 1.0}, "dropout in"),
        ({"p_std": 0.0}, "positive deviation"),
        ({"p_mean": float("inf")}, "a mean \\(p_mean\\) between -10 and 10"),
        ({"p_mean": -1e300}, "got -1e\\+300 and 1.6"),
        ({"p_std": 1e300}, "a positive deviation \\(p_std\\) up to 5"),
    ],
)
def test_networks_and_noise_levels_that_cannot_be_are_refused(options: dict, says: str) -> None:
    with pytest.raises(FewstepError, match=says):
        TrainConfig("edm", **options)


def test_images_that_do_not_fit_the_levels_are_refused(tmp_path: Path) -> None:
    digits = load_images("digits")
    with pytest.raises(FewstepError, match="8x8 cannot be halved 4 times"):
        train(digits, TrainConfig("edm", channels=(16,) * 5), LOOP, tmp_path / "x", command="")
    with pytest.raises(FewstepError, match="no feature maps are 16 high .* they are 8, 4"):
        train(digits, TrainConfig("edm", channels=(16, 16), attention=(16, 4)), LOOP, tmp_path / "x", command="")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("attention", "down"),
    [
        (None, ["DownBlock2D", "AttnDownBlock2D"]),
        ((), ["DownBlock2D", "DownBlock2D"]),
        ((8,), ["AttnDownBlock2D", "DownBlock2D"]),
        ((8, 4), ["AttnDownBlock2D", "AttnDownBlock2D"]),
    ],
)
def test_attention_is_where_it_is_asked_for(tmp_path: Path, attention: tuple[int, ...] | None, down: list[str]) -> None:
    config = TrainConfig("edm", channels=(16, 32), attention=attention)
    out = train(load_images("digits"), config, replace(LOOP, steps=1), tmp_path / "m", command="")
    made = json.loads((out / "unet" / "config.json").read_text())
    assert made["down_block_types"] == down and made["up_block_types"] == [name.replace("Down", "Up") for name in reversed(down)]


def test_pictures_need_not_be_square(tmp_path: Path) -> None:
    pictures = Images(torch.rand(6, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1, None, 256, "wide")
    out = train(pictures, TrainConfig("edm", channels=(16, 16)), replace(LOOP, steps=2), tmp_path / "m", command="")
    model = load_model(out)
    assert model.shape == (3, 8, 12) and model(torch.randn(2, 3, 8, 12), torch.tensor(1.0)).shape == (2, 3, 8, 12)


class Seen(torch.nn.Module):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, time: torch.Tensor, return_dict: bool, **labels: torch.Tensor) -> tuple[torch.Tensor]:
        self.x = x
        return (self.weight * x,)


def test_half_of_the_images_are_mirrored() -> None:
    ramp = torch.linspace(-1, 1, 8).expand(50, 3, 8, 8)  # from left to right
    given = []
    for flip in (False, True):
        network = Seen()
        model = Model(network, VarianceExploding(), "sample", call=unet_call)
        images = Images(ramp, None, 256, "ramps")
        loss = score_matching(model, images, lambda b, g: torch.full((b,), 1e-3), conditional=False, flip=flip)
        loss(network, 64, torch.Generator().manual_seed(0))
        given.append((network.x[..., -1] > network.x[..., 0]).all((1, 2)))
    assert bool(given[0].all()) and 16 < int(given[1].sum()) < 48


def test_options_that_came_later_leave_older_checkpoints_valid() -> None:
    """What a checkpoint says of defaults is what it said before there were these options."""
    before = (
        "TrainConfig(kind='edm', conditional=True, label_dropout=0.1, channels=(48, 64), layers=1, dropout=0.1, p_mean=-0.6, p_std=1.6)",
        "LoopConfig(steps=9, batch=96, lr=0.001, warmup=200, weight_decay=0.0, clip=1.0, ema=0.999, seed=0, checkpoint_every=500, "
        "mixed_precision='no')",
    )
    config, loop = TrainConfig("edm", True), LoopConfig(9)
    assert (identity_of(config), identity_of(loop)) == before
    assert identity_of(replace(config, flip=True, attention=(4,))) == before[0] + " attention=(4,) flip=True"
    assert identity_of(replace(loop, compile=True, channels_last=True)) == before[1] + " compile=True channels_last=True"


@pytest.mark.parametrize(
    ("config", "loop"),
    [
        pytest.param({"flip": True, "attention": (8, 4), "layers": 2}, {}, marks=pytest.mark.slow),
        ({"flip": True, "conditional": True}, {"channels_last": True, "mixed_precision": "bf16"}),
    ],
)
@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_a_whole_one(tmp_path: Path, config: dict, loop: dict) -> None:
    digits, what = load_images("digits"), TrainConfig("edm", channels=(16, 16), **config)
    how = replace(LOOP, steps=7, batch=8, checkpoint_every=3, warmup=2, **loop)

    def killed(step: int, value: float) -> None:
        if step == 5:
            raise RuntimeError

    train(digits, what, how, tmp_path / "whole", command="")
    with pytest.raises(RuntimeError):
        train(digits, what, how, tmp_path / "cut", command="", observe=killed)
    with pytest.raises(ArtifactError, match="belongs to another run"):
        train(digits, replace(what, flip=False), how, tmp_path / "cut", command="")
    train(digits, what, how, tmp_path / "cut", command="")
    assert load_model(tmp_path / "whole").fingerprint == load_model(tmp_path / "cut").fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["edm", "ddpm", "flow-map"])
def test_a_run_that_was_killed_while_it_saved_is_not_taken_for_a_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    digits, what, how = load_images("digits"), TrainConfig(kind, channels=(16, 16)), replace(LOOP, steps=2, batch=4)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_card", lambda *args: 1 / 0)  # after the network's files are written
        with pytest.raises(ZeroDivisionError):
            train(digits, what, how, tmp_path / "out", command="")
    assert not (tmp_path / "out" / "unet").exists()
    train(digits, what, how, tmp_path / "out", command="")
    assert not list((tmp_path / "out").glob(".*"))
    load_model(tmp_path / "out")
    with pytest.raises(FewstepError, match="already holds a trained model"):
        train(digits, what, how, tmp_path / "out", command="")
