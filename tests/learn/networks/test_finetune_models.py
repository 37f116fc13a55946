"""Tuning of other models and in other forms, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import load_file
from tests.learn.networks.test_finetune import (
    BRIEF,
    DECREASE,
    SHAPE,
    TINY,
    Spied,
    coarse,  # noqa: F401 - a fixture of every test
    fresh_error,
    killed_at,
    pictures,
    rounds,
)
from tests.problems import diffusers_folder, tiny_folder
from torch import Tensor

from fewstep import (
    ArtifactError,
    FewstepError,
    FinetuneConfig,
    GridError,
    Model,
    Sampler,
    finetune,
    load_model,
)
from fewstep.data.images import Images
from fewstep.learn.networks.objectives import steps as module
from fewstep.models.formats.folders import save_ours


class Drawn:
    """The times at which, and the labels with which, scores are matched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times: set[float] = set()
        self.conditional, self.labels = None, set[int]()
        real = module.score_matching

        def spy(model: Model, images: Images, levels: Callable, **options: Any) -> Callable:
            self.conditional = options["conditional"]

            def draw(b: int, g: torch.Generator) -> Tensor:
                t = levels(b, g)
                self.times |= set(t.tolist())
                return t

            return real(model, images, draw, **options)

        monkeypatch.setattr(module, "score_matching", spy)
        unet = UNet2DModel.forward

        def forward(network: UNet2DModel, x: Tensor, time: Tensor, class_labels: Tensor | None = None, **options: Any) -> Any:
            if network.training and class_labels is not None:
                self.labels |= set(class_labels.tolist())
            return unet(network, x, time, class_labels, **options)

        monkeypatch.setattr(UNet2DModel, "forward", forward)


@pytest.mark.parametrize("classes", [None, 2])
@pytest.mark.slow
def test_scores_are_matched_at_the_scheduled_levels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int | None) -> None:
    model, drawn, spied = load_model(tiny_folder(tmp_path / "teacher", classes, dropout=0.1)), Drawn(monkeypatch), Spied(monkeypatch)
    config = replace(TINY, rounds=1, nfe=3, steps=20, form="score")
    (one,) = rounds(finetune(model, config=config, out=tmp_path / "out", images=pictures()))
    assert len(drawn.times) == 3  # all levels but the last, where nothing is evaluated
    assert sorted(drawn.times, reverse=True) == pytest.approx(one.noise_levels[:-1], rel=1e-6)  # float32
    assert drawn.conditional == (classes is not None) and drawn.labels == (set() if classes is None else {0, 1, 2})  # 2 is the null label
    assert any(spied.dropout[0])  # noisy targets: as in training
    assert load_model(tmp_path / "out").tuned.form == "score"


@pytest.mark.slow
def test_a_diffusers_folder_stays_one(tmp_path: Path) -> None:
    model = load_model(diffusers_folder(tmp_path / "teacher"))
    (one,) = rounds(finetune(model, config=replace(TINY, rounds=1, lr=1e-3), out=tmp_path / "out"))
    assert one.bound_trained < DECREASE * one.bound_before
    student = load_model(tmp_path / "out")
    assert not (tmp_path / "out" / "fewstep.json").exists() and (tmp_path / "out" / "scheduler" / "scheduler_config.json").exists()
    assert student.schedule.to_config() == model.schedule.to_config() and student.prediction.name == "epsilon"
    grid = student.optimized("ddim", 2)
    assert set(grid.t.tolist()) <= set(model.schedule.times.tolist())
    assert fresh_error(student, grid, model) < 0.8 * fresh_error(model, grid, model)


@pytest.mark.slow
def test_a_guided_teacher_makes_a_student_without_guidance(tmp_path: Path) -> None:
    model = load_model(tiny_folder(tmp_path / "teacher", 2))
    with torch.no_grad():
        model.network.class_embedding.weight.mul_(5)  # so that guidance does something
    save_ours(tmp_path / "teacher", model.network, "edm(0.5)", model.schedule, SHAPE, 2)
    model = load_model(tmp_path / "teacher")
    student = finetune(model, guidance=2.0, config=replace(TINY, rounds=1), out=tmp_path / "out")
    grid = student.optimized("ddim", 2)
    assert student.tuned.guidance == 2.0 and student.classes == 2
    assert Sampler.load(tmp_path / "out" / "sampler").card["guidance"] == 1.0
    guided, plain = fresh_error(student, grid, model, 2.0), fresh_error(student, grid, model)
    assert guided < 0.9 * plain and guided < 0.9 * fresh_error(model, grid, model, 2.0)


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_more_steps_than_levels(tmp_path: Path) -> None:
    with pytest.raises(GridError, match="9 steps need at least as many levels, got 8: ask for more levels or fewer steps"):
        FinetuneConfig(nfe=9, levels=8)
    assert FinetuneConfig(nfe=8, levels=8).nfe == 8


@pytest.mark.parametrize(
    "options",
    [
        {"nfe": 0},
        {"rounds": 0},
        {"steps": 0},
        {"batch": 0},
        {"num": 0},
        {"held_out": 1},
        {"lr": 0.0},
        {"form": "means"},
        {"states": "ours"},
    ],
)
def test_configurations_that_could_not_train_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(FewstepError, match=rf"{next(iter(options))}(, the learning rate,)? is |the form is mean or score"):
        FinetuneConfig(**options)


@pytest.mark.slow
def test_a_round_that_makes_it_worse_is_dropped(tmp_path: Path) -> None:
    model = load_model(tiny_folder(tmp_path / "teacher"))
    tuned = finetune(model, config=replace(TINY, steps=10, lr=0.03, rounds=8), out=tmp_path / "out")
    history = rounds(tuned)
    assert len(history) < 8 and all(two.bound <= one.bound for one, two in zip(history[:-1], history[1:], strict=True))
    again = load_file(tmp_path / "out" / "work" / f"round-{len(history)}" / "student.safetensors")
    assert all(torch.equal(value, again[key]) for key, value in tuned.network.state_dict().items())


def test_images_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    plain, conditional = load_model(tiny_folder(tmp_path / "plain")), load_model(tiny_folder(tmp_path / "conditional", 2))
    config, good = replace(BRIEF, form="score"), pictures()
    wide = Images(torch.zeros(4, 1, 4, 5), None, 256, "wide")
    for model, images, says in [
        (plain, wide, r"images of wide have shape \(1, 4, 5\), those of plain \(1, 4, 4\)"),
        (conditional, pictures(labels=False), "has labels 0 to 1, and made up has none"),
        (conditional, Images(good.x, good.labels + 1, 256, "more"), "has labels 0 to 1, and more has none or others"),
    ]:
        with pytest.raises(FewstepError, match=says):
            finetune(model, config=config, out=tmp_path / "out", images=images)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_other_images_are_another_work(tmp_path: Path) -> None:
    model, config = load_model(tiny_folder(tmp_path / "teacher")), replace(BRIEF, form="score", steps=4)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, config=config, out=tmp_path / "out", images=pictures(), on_progress=killed_at("loss", 2))
    with pytest.raises(ArtifactError, match=r"remove it|another run"):
        finetune(model, config=config, out=tmp_path / "out", images=replace(pictures(), name="others"))
    finetune(model, config=config, out=tmp_path / "out", images=pictures())


@pytest.mark.parametrize("options", [{"lr": float("nan")}, {"lr": float("inf")}, {"seed": -1}])
def test_numbers_that_only_show_later_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(FewstepError, match=rf"{next(iter(options))}(, the learning rate,)? is "):
        FinetuneConfig(**options)
