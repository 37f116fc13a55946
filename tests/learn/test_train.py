"""The reference trainer: what it saves is what the loaders load, and it learns."""

from pathlib import Path

import pytest
import torch

from fewstep import FewstepError, load_model
from fewstep.learn.loop import LoopConfig
from fewstep.learn.train import TrainConfig, train
from fewstep.models.data import Images, load_images

LOOP = LoopConfig(steps=12, batch=16, checkpoint_every=100)


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
    t = torch.tensor(model.denoiser.schedule.t_max, dtype=torch.float64)
    assert bool(torch.isfinite(model.denoiser(torch.randn(2, 1, 8, 8), t, model.labels([0, 1]))).all())
    with pytest.raises(FewstepError, match="already holds a trained model"):
        train(load_images("digits"), config, LOOP, out, command="")


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="edm or ddpm"):
        TrainConfig("vae")
    unlabelled = Images(torch.zeros(4, 1, 8, 8), None, 256, "grey")
    with pytest.raises(FewstepError, match="no labels"):
        train(unlabelled, TrainConfig("edm", True), LOOP, tmp_path / "x", command="")
    assert not (tmp_path / "x").exists()
