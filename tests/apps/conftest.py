"""What the tests of the command line share: how a command is run, and a small model."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from fewstep import VarianceExploding
from fewstep.apps import cli
from fewstep.models.formats.folders import save_ours

UNET = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (16,), "norm_num_groups": 4, "layers_per_block": 1}
UNET |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}


def run(monkeypatch, *words: object) -> int:
    """The exit code of ``fewstep WORDS`` in this process."""
    monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
        sys.exit(0)
    return int(end.value.code or 0)


def made_by(out: Path, *words: object, change: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None) -> Path:
    """The folder that a command wrote, for a fixture of a whole module."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        change(monkeypatch)
        assert run(monkeypatch, *words, "--out", out) == 0
    return out


def samples(folder: Path) -> np.ndarray:
    """What ``--npz`` wrote."""
    with np.load(folder / "samples.npz") as arrays:
        return arrays["x"]


def without_plots(monkeypatch) -> None:
    """No picture is drawn, where other tests look at it."""
    monkeypatch.setattr("fewstep.apps.plots._write", lambda figure, path: path)


def counted(monkeypatch, stop: int = -1, training: bool = False) -> list[int]:
    """Calls of any network from now on, in a list that grows; the one numbered ``stop`` is interrupted."""
    real, calls = UNet2DModel.forward, []

    def forward(network: UNet2DModel, *args: object, **options: object) -> object:
        if network.training or not training:
            calls.append(len(calls))
            if len(calls) == stop:
                raise KeyboardInterrupt
        return real(network, *args, **options)

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    return calls


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A small model of random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_ours(folder, UNet2DModel(**UNET), "edm(0.5)", VarianceExploding(0.05, 20.0), (1, 4, 4), None)
    return folder
