"""Models that are told their guidance scale: new ones, a scale for each row, saved ones, their cost, and what they refuse."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.own_networks import timed_model
from tests.problems import tiny_folder, told_model
from torch import Tensor

from fewstep import ArtifactError, FewstepError, Model, ModelError, VPLinear, load_model, sample
from fewstep.core.denoiser import FlowMap
from fewstep.core.prediction import convert, from_x0
from fewstep.core.schedule import NoiseSchedule, RectifiedFlow, VarianceExploding
from fewstep.integrations.diffusers.pipelines import PipelineModel
from fewstep.models.flow_map_student import FlowMapForm, FlowMapStudent
from fewstep.models.formats.folders import as_student
from fewstep.models.guidance import calls_of, classifier_free, scale_range
from fewstep.models.guided import GuidedForm, guided_model
from fewstep.models.networks.calls import plain_call
from fewstep.models.networks.extra_embedding import ConditionedNetwork
from fewstep.models.problem import Problem

SCALES = (1.0, 1.7, 4.0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny_folder(tmp_path_factory.mktemp("guided") / "teacher", 2, block_out_channels=(8,)))


@pytest.fixture(scope="module")
def told(teacher: Model) -> Model:
    return told_model(teacher)


def states(model: Model, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """States, a time of each in the middle, and labels."""
    t = torch.linspace(0.9, 0.3, count, dtype=torch.float64) * model.schedule.t_max
    return Problem(model, model.default_guidance).start(range(count)), t, torch.arange(count) % 2


@torch.no_grad()
def answers(model: Model, scale: float | Tensor) -> Tensor:
    x, t, cond = states(model)
    denoiser = model.guided(scale)
    assert not isinstance(denoiser, FlowMap)
    return denoiser(x, t, cond)


class Rows:
    """Counts the calls of a network and the rows of each."""

    def __init__(self, network: Any) -> None:
        self.rows = list[int]()
        self.handle = network.register_forward_hook(lambda module, inputs, output: self.rows.append(len(inputs[0])))

    def taken(self) -> list[int]:
        rows, self.rows[:] = list(self.rows), []
        return rows


# -- what it answers -------------------------------------------------------------------------------------------------


def test_a_new_one_is_the_conditional_teacher_at_every_scale(teacher: Model) -> None:
    new = told_model(teacher, seed=None)
    for scale in (*SCALES, torch.tensor([1.0, 2.5, 4.0])):
        assert torch.equal(answers(new, scale), answers(teacher, 1.0))


def test_a_scale_for_each_row_is_that_of_the_rows_one_by_one(told: Model) -> None:
    together = answers(told, torch.tensor(SCALES, dtype=torch.float64))
    for row, scale in enumerate(SCALES):
        torch.testing.assert_close(together[row], answers(told, scale)[row], rtol=1e-6, atol=1e-6)
    assert float((answers(told, 1.0) - answers(told, 4.0)).abs().max()) > 1e-3  # it is told


@pytest.mark.parametrize("law", [VPLinear(), VarianceExploding(0.02, 20.0), RectifiedFlow()], ids=lambda law: type(law).__name__)
def test_guidance_commutes_with_what_is_predicted(law: NoiseSchedule) -> None:
    draws = torch.Generator().manual_seed(0)
    x, null, cond = torch.randn(3, 4, 5, generator=draws, dtype=torch.float64)
    t = torch.linspace(0.2, 0.9, 4, dtype=torch.float64) * law.t_max
    alpha, sigma = law.alpha(t), law.sigma(t)
    for kind in ("epsilon", "v", "flow", "score"):
        of_null, of_cond = (from_x0(kind, x0, x, alpha, sigma) for x0 in (null, cond))
        for scale in (0.0, 1.0, 2.5, 7.5):
            guided = convert(kind, "sample", of_null + scale * (of_cond - of_null), x, alpha, sigma)
            torch.testing.assert_close(guided, null + scale * (cond - null), rtol=1e-12, atol=1e-12)


def test_it_makes_one_call_where_its_teacher_makes_two(teacher: Model, told: Model) -> None:
    for model, network, rows in ((told, told.network.network, 5), (teacher, teacher.network, 10)):
        counted = Rows(network)
        for scale in (1.5, 2.0, 4.0):
            assert calls_of(model.guided(scale)) == rows // 5
            sample(model, "unipc-2", nfe=3, seeds=range(5), guidance=scale)
            assert counted.taken() == [rows] * 3
        counted.handle.remove()


def test_the_default_scale_is_one_that_it_knows(teacher: Model) -> None:
    for (low, high), scale in {(1.0, 4.0): 1.0, (2.0, 4.0): 2.0, (0.0, 0.5): 0.5}.items():
        model = told_model(teacher, GuidedForm(low, high))
        assert model.default_guidance == scale and torch.equal(answers(model, scale), answers(model, float(model.call.scale)))
        assert torch.equal(sample(model, "ddim", nfe=1, seeds=[0]), sample(model, "ddim", nfe=1, seeds=[0], guidance=scale))


# -- as a folder -----------------------------------------------------------------------------------------------------


def check_same(model: Model, loaded: Model, **options: Any) -> None:
    assert (loaded.scales, loaded.classes, loaded.null_label) == (model.scales, model.classes, None)
    assert loaded.fingerprint == model.fingerprint
    for scale in SCALES:
        ours, theirs = (sample(one, "ddim", nfe=2, seeds=range(3), guidance=scale, **options) for one in (model, loaded))
        assert torch.equal(ours, theirs)


def test_saved_and_loaded_it_is_the_same_to_the_bit(told: Model, tmp_path: Path) -> None:
    check_same(told, load_model(told.save(tmp_path / "told")))


def test_one_whose_time_embedding_had_to_be_named_is_saved_with_that_name(tmp_path: Path) -> None:
    told = told_model(timed_model(), GuidedForm(insert_at="clock"))
    check_same(told, load_model(told.save(tmp_path / "told"), trust=True))
    assert json.loads((tmp_path / "told" / "guided.json").read_text())["form"]["insert_at"] == "clock"


def flow_map(told: Model, seed: int = 1) -> Model:
    """A flow map of random weights that is told its scale."""
    base = told.with_network(copy.deepcopy(told.network))
    student = FlowMapStudent(base, told.schedule.t_max, told.schedule.t_min, FlowMapForm()).eval().requires_grad_(False)
    torch.manual_seed(seed)
    for weight in student.network.embeddings["time"].parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return as_student(base, student)


def test_a_new_flow_map_is_the_first_order_step_at_each_scale(told: Model) -> None:
    student = FlowMapStudent(told.with_network(copy.deepcopy(told.network)), told.schedule.t_max, told.schedule.t_min, FlowMapForm())
    ours = as_student(told, student.eval().requires_grad_(False))
    for scale in SCALES:
        step = {"nfe": 2, "seeds": range(3), "grid": "karras", "guidance": scale}
        torch.testing.assert_close(sample(ours, "ddim", **step), sample(told, "ddim", **step), rtol=1e-6, atol=1e-6)


def test_a_flow_map_with_a_scale_for_each_row_is_that_of_the_rows_one_by_one(told: Model) -> None:
    made, (x, _, cond) = flow_map(told), states(told)
    s, t = (torch.tensor(one, dtype=torch.float64) for one in (told.schedule.t_max, 0.4))
    with torch.no_grad():
        together = made.guided(torch.tensor(SCALES))(x, s, t, cond)
        for row, scale in enumerate(SCALES):
            torch.testing.assert_close(together[row], made.guided(scale)(x, s, t, cond)[row], rtol=1e-6, atol=1e-6)


def test_a_flow_map_without_its_scales_beside_it_is_damaged(teacher: Model, tmp_path: Path) -> None:
    """It would be taken for one that is told nothing."""
    from fewstep.learn.networks.distill import FlowMapConfig, distill

    brief = FlowMapConfig(slots=2, steps=1, batch=2, num=2, held_out=2, teacher_nfe=2, max_passes=1, scales=(1.0, 3.0))
    distill(teacher, "flow-map", config=brief, out=tmp_path / "map")
    (tmp_path / "map" / "guided.json").unlink()
    with pytest.raises(ArtifactError, match="has guided.safetensors, the rest of a student, and no guided.json"):
        load_model(tmp_path / "map")


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(2.0, 2.0), (3.0, 1.0), (-1.0, 4.0), (1.0, float("inf")), (float("nan"), 4.0)])
def test_scales_that_are_no_range_are_refused(scales: tuple[float, float]) -> None:
    for make in (lambda: GuidedForm(*scales), lambda: scale_range(scales)):
        with pytest.raises(FewstepError, match=r"guidance scales range from one of at least 0 to a larger one|is a number"):
            make()


def test_scales_that_are_no_pair_are_refused() -> None:
    for scales in (5, "12", (1.0,), (1.0, 2.0, 3.0), ("a", "b")):
        with pytest.raises(FewstepError, match=r"as \(1.0, 4.0\)|is a number"):
            scale_range(scales)


@pytest.mark.parametrize("scale", [0.5, 4.5, torch.tensor([1.0, 5.0, 2.0])], ids=str)
def test_a_scale_beyond_those_it_knows_is_refused(told: Model, scale: float | Tensor) -> None:
    for model in (told, flow_map(told)):
        with pytest.raises(ModelError, match=r"knows guidance scales from 1 to 4, not .*: use one of those, or distil a wider range"):
            model.guided(scale)


def test_scales_for_other_samples_are_refused(teacher: Model, told: Model) -> None:
    x, t, labels = torch.zeros(3, 1, 4, 4), torch.tensor(1.0, dtype=torch.float64), torch.tensor([0, 1, 0])
    two = torch.tensor([1.0, 2.0])
    for model in (teacher, told, flow_map(told)):
        made = model.guided(two)
        with pytest.raises(ModelError, match="guidance has 2 scales for 3 samples: pass one scale, or one for each sample"):
            _ = made(x, t, t / 2, labels) if isinstance(made, FlowMap) else made(x, t, labels)
        for scale in (torch.tensor([1j, 2.0]), torch.tensor([])):
            with pytest.raises(ModelError, match=r"guidance is a scale, or one for each sample \[B\], not "):
                model.guided(scale)


def test_guidance_by_two_answers_is_refused(told: Model) -> None:
    for options in ({}, {"rescale": 0.7}, {"interval": (0.1, 3.0)}):
        with pytest.raises(
            ModelError, match=r"told its guidance scale, and answers by one call: use model.guided\(scale\); an interval, or resc"
        ):
            classifier_free(told, 2.0, torch.tensor(2), **options)


def test_scales_without_a_call_that_tells_them_are_refused(teacher: Model) -> None:
    with pytest.raises(ModelError, match="scales are those of a network that is told its guidance scale"):
        replace(teacher, scales=(1.0, 4.0))


def test_a_pipeline_guides_by_itself(teacher: Model) -> None:
    facts = {"shape": (1, 4, 4), "classes": 2, "null_label": 2, "call": teacher.call, "time": teacher.time, "name": "SD"}
    pipeline = PipelineModel(teacher.network, teacher.schedule, teacher.prediction, prompts=("a cat", "a dog"), **facts)
    with pytest.raises(ModelError, match="SD is a pipeline, which guides by itself: only a model of one network can be told"):
        guided_model(pipeline, GuidedForm())


def test_a_network_that_cannot_be_told_is_refused(teacher: Model) -> None:
    with pytest.raises(ModelError, match="is a function, which cannot be trained"):
        guided_model(replace(teacher, network=lambda x, t, y: x), GuidedForm())
    for place, says in (
        ("no_such", "has no submodule no_such to insert at; it has clock, label"),
        (None, "name the submodule whose output"),
    ):
        with pytest.raises(ModelError, match=says):
            ConditionedNetwork(timed_model().network, plain_call, place)
