"""The command that trains: every option reaches the run, and the rate is told."""

import json
import re
from pathlib import Path

import pytest
from tests.apps.conftest import run

from fewstep.apps.commands import train
from fewstep.learn.networks.loop import LoopConfig
from fewstep.learn.networks.train import TrainConfig


def test_every_option_reaches_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    words = ("--conditional", "--channels", "16,32", "--layers", 2, "--attention", "8,4", "--dropout", 0.2, "--flip", "--p-mean", -1.2)
    more = ("--p-std", 1.25, "--steps", 3, "--batch", 4, "--lr", 0.002, "--warmup", 2, "--ema", 0.9, "--mixed-precision", "bf16")
    last = ("--channels-last", "--checkpoint-every", 2, "--seed", 5, "--out", tmp_path / "m")
    assert run(monkeypatch, "train", *words, *more, *last) == 0
    card = (tmp_path / "m" / "README.md").read_text()
    for option, value in {
        **{"conditional": True, "channels": (16, 32), "layers": 2, "attention": (8, 4), "dropout": 0.2, "flip": True, "p_mean": -1.2},
        **{"p_std": 1.25, "steps": 3, "batch": 4, "lr": 0.002, "warmup": 2, "ema": 0.9, "mixed_precision": "bf16", "compile": False},
        **{"channels_last": True, "checkpoint_every": 2, "seed": 5},
    }.items():
        assert f"| {option} | {value} |" in card
    made = json.loads((tmp_path / "m" / "unet" / "config.json").read_text())
    assert made["block_out_channels"] == [16, 32] and made["down_block_types"] == ["AttnDownBlock2D"] * 2
    assert re.search(r"model: \S+, \d+ images/s\nnext: fewstep bench", capsys.readouterr().out)


def test_compile_reaches_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(train, "train_model", lambda images, config, loop, *rest, **options: seen.append((config, loop)))
    assert run(monkeypatch, "train", "--compile", "--attention", "none", "--out", tmp_path) == 0
    assert run(monkeypatch, "train", "--out", tmp_path) == 0
    assert seen[0][1].compile and seen[0][0].attention == ()
    assert seen[1] == (TrainConfig("edm"), LoopConfig(8000))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--channels", "48;64"), "--channels wants whole numbers"),
        (("--channels", "48,50"), "multiple of 16"),
        (("--attention", "all"), "--attention wants whole numbers"),
        (("--attention", "16"), "no feature maps are 16 high"),
        (("--mixed-precision", "int8"), "mixed precision"),
        (("--checkpoint-every", 0), "checkpoint_every is at least 1, got 0"),
        (("--ema", 1), "the decay of averaged weights"),
    ],
)
def test_mistakes_are_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path, words: tuple[object, ...], says: str
) -> None:
    assert run(monkeypatch, "train", *words, "--out", tmp_path / "m") == 2
    told = capsys.readouterr().err.strip()
    assert says in told and "\n" not in told and not (tmp_path / "m").exists()


def test_the_rate_leaves_out_what_comes_before_the_first_report(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr(train, "monotonic", lambda: next(times))
    rate = train.Rate(32)
    assert str(rate) == ""
    rate.add(50)  # of a run that continues
    assert str(rate) == ""
    rate.add(60)
    assert str(rate) == ", 160 images/s"
    rate.add(80)
    assert str(rate) == ", 240 images/s"
