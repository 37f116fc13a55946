"""The reference trainer: what it saves is what the loaders load, and it learns."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep import ArtifactError, FewstepError, load_model
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


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 5, "batch": 0}, {"steps": 5, "lr": float("nan")}])
def test_a_loop_that_could_not_train_is_refused(options: dict) -> None:
    with pytest.raises(FewstepError, match="training needs"):
        LoopConfig(**options)


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="edm or ddpm"):
        TrainConfig("vae")
    unlabelled = Images(torch.zeros(4, 1, 8, 8), None, 256, "grey")
    with pytest.raises(FewstepError, match="no labels"):
        train(unlabelled, TrainConfig("edm", True), LOOP, tmp_path / "x", command="")
    assert not (tmp_path / "x").exists()
