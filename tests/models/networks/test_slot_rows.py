"""Operator students of any network: slots of time that do not meet, each told as the network's own time."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.own_networks import TIMES, table_model

import fewstep
from fewstep import Model, ModelError
from fewstep.models.networks.operator import OperatorForm, OperatorStudent
from fewstep.models.networks.slot_rows import SlotRows
from fewstep.models.networks.temporal_unet import Mixing

NONE = Mixing(form="none")
ROWS = OperatorForm(time="slot", anywhere=False, mixing=NONE)


def student(form: OperatorForm, slots: int = 2, model: Model | None = None) -> OperatorStudent:
    model = table_model() if model is None else model
    times = fewstep.make_grid("uniform", model.schedule, slots).t
    return OperatorStudent(replace(model, network=copy.deepcopy(model.network)), times, form)


def test_each_slot_is_the_network_at_its_own_time() -> None:
    model, x, labels = table_model(), torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 3])
    made = student(replace(ROWS, output="skip"))
    assert isinstance(made.operator, SlotRows)
    ratio, _ = made.coefficients(made.times[0], made.times[1:])
    together = made(x, made.times[1:], labels)
    for k, t in enumerate(made.times[1:]):
        own = model.network(x, torch.full((3,), int(t)), labels)
        torch.testing.assert_close(together[:, k], ratio[k].float() * x + own)
        torch.testing.assert_close(made.jump(x, made.times[0], t, labels), together[:, k])
    assert made.arithmetic(made.times[[0, 2]]) == 1.0


def test_one_slot_is_told_its_start() -> None:
    made, x = student(OperatorForm(mixing=NONE, output="skip"), slots=1), torch.randn(2, 1, 4, 4)
    own = table_model().network(x, torch.full((2,), TIMES - 1))
    ratio, _ = made.coefficients(made.times[0], made.times[1:])
    torch.testing.assert_close(made(x, made.times[1:])[:, 0], ratio[0].float() * x + own)


@pytest.mark.parametrize(
    ("form", "slots", "says"),
    [
        (
            OperatorForm(),
            1,
            r"temporal layers \(dsno\) go between the blocks of a diffusers UNet2DModel, which a TableNet does not have: use",
        ),
        (
            OperatorForm(mixing=NONE),
            2,
            "a TableNet is told one time, and slots that start anywhere, or at the time start, want two: use time",
        ),
        (replace(ROWS, anywhere=True), 2, "want two: use time slot and one pass"),
        (replace(ROWS, time="start"), 2, "want two: use time slot and one pass"),
    ],
)
def test_forms_that_want_the_inside_of_a_network_are_refused(form: OperatorForm, slots: int, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        student(form, slots)


def test_times_that_the_network_cannot_be_told_are_refused() -> None:
    model = table_model()
    with pytest.raises(ModelError, match="takes whole times, but is asked at"):
        OperatorStudent(model, torch.tensor([49.0, 20.5, 0.0]), ROWS)
    clean = replace(model, schedule=model.schedule.to_clean())
    with pytest.raises(ModelError, match="two slots are one time to the network"):
        OperatorStudent(clean, torch.tensor([49.0, 0.0, -1.0]), ROWS)


@pytest.mark.parametrize("method", ["kd", "slots"])
def test_methods_that_any_network_can_be_distilled_by(method: str) -> None:
    form = {"form": OperatorForm(time="slot", anywhere=False), "slots": 3} if method == "slots" else {}
    config = fewstep.DistillConfig(steps=2, batch=4, num=8, held_out=4, teacher_nfe=4, **form)
    made = fewstep.distill(table_model(), method, config=config)
    assert made is not None and made.card["arithmetic"] == {1: 1.0}
    assert len(made.card["slots"]) == (3 if method == "slots" else 1)
    assert fewstep.sample(made, nfe=1, seeds=range(2)).shape == (2, 1, 4, 4)


def test_what_cannot_be_distilled_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="use the method kd"):
        fewstep.distill(table_model(), "dsno", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
