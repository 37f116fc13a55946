"""Networks of a user's own, tuned and distilled: what the contract of all learners does not show."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.own_networks import CLASSES, TableNet, table_model

import fewstep
from fewstep import FinetuneConfig
from fewstep.data.images import Images
from fewstep.learn.networks import finetune as module
from fewstep.learn.teacher.gram import GramConfig

BRIEF = FinetuneConfig(nfe=2, rounds=1, steps=4, batch=8, num=16, held_out=8, levels=8, teacher_nfe=16)


@pytest.fixture(autouse=True)
def few_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GramConfig", lambda num: GramConfig(levels=12, num=8))


def test_scores_are_matched_in_the_networks_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    images = Images(torch.rand(20, 1, 4, 4) * 2 - 1, torch.arange(20) % CLASSES, 16, "squares")
    told, real = set[int](), TableNet.forward

    def forward(net: TableNet, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        if net.training:
            told.update(t.tolist())
        return real(net, x, t, y)

    monkeypatch.setattr(TableNet, "forward", forward)
    tuned = fewstep.finetune(table_model(), config=replace(BRIEF, form="score", steps=20), images=images)
    table = fewstep.sample(tuned, seeds=[0])
    assert bool(torch.isfinite(table).all()) and len(told) == 2  # the times of the schedule's two steps
    assert tuned.tuned is not None and tuned.tuned.form == "score"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_student_keeps_no_mark_of_its_training(tmp_path: Path, precision: str) -> None:
    model, config = table_model(), fewstep.DistillConfig(steps=3, batch=4, num=8, held_out=4, teacher_nfe=4, dropout=0.3)
    made = fewstep.distill(model, "kd", config=replace(config, mixed_precision=precision), out=tmp_path / "student")
    assert made is not None
    network = made.network.operator.network
    assert set(vars(network)) == set(vars(model.network)) and network.dropout.p == model.network.dropout.p


def test_half_weights_load_in_half(tmp_path: Path) -> None:
    tuned = fewstep.finetune(table_model(), config=replace(BRIEF, half=True), out=tmp_path / "tuned")
    loaded = fewstep.load_model(tmp_path / "tuned", trust=True)
    assert {value.dtype for value in loaded.network.parameters()} == {torch.float16} and loaded.fingerprint == tuned.fingerprint


@pytest.mark.slow
def test_the_teacher_lies_with_its_student_and_is_moved_with_it(tmp_path: Path) -> None:
    model = table_model()
    fewstep.finetune(model, config=BRIEF, out=tmp_path / "tuned")
    (tmp_path / "tuned").rename(tmp_path / "moved")
    student = fewstep.load_model(tmp_path / "moved", trust=True)
    assert student.tuned is not None and student.tuned.teacher == str(tmp_path / "moved" / "teacher")
    assert fewstep.load_model(student.tuned.teacher, trust=True).fingerprint == model.fingerprint == student.tuned.fingerprint
    table = fewstep.compare(student, ["ddim"], nfe=[2], grid="optimized", num=4)
    assert table.results["rows"][0]["failed"] is None


def test_a_teacher_that_has_a_folder_is_left_there(tmp_path: Path) -> None:
    table_model().save(tmp_path / "model")
    teacher = fewstep.load_model(tmp_path / "model", trust=True)
    tuned = fewstep.finetune(teacher, config=BRIEF, out=tmp_path / "tuned")
    assert tuned.tuned is not None and tuned.tuned.teacher == str(tmp_path / "model") and not (tmp_path / "tuned" / "teacher").exists()
