"""Flow map students: new, copied, saved and loaded, around networks of several kinds."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.problems import LAW, diffusers_folder, names, tiny_folder
from torch import Tensor, nn

import fewstep
from fewstep import FewstepError, Model, ModelError, RectifiedFlow, TimeGrid, VPLinear, load_model, sample
from fewstep.models.flow_map import FirstOrderMap
from fewstep.models.flow_map_student import FlowMapForm, FlowMapStudent
from fewstep.models.formats.folders import as_student, save_like
from fewstep.models.networks.unets import SongUNet

SMALL = {"block_out_channels": (8,)}
S, T, LATER = torch.tensor([12.0, 1.0, 0.3], dtype=torch.float64)


class Timed(nn.Module):
    """A network of one's own, whose time embedding is ``inner.time``: ``net(x, t, labels)``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"time": nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width)), "act": nn.SiLU()})
        self.label, self.first, self.last = nn.Embedding(3, width), nn.Linear(3, width), nn.Linear(width, 3)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        told = self.inner["time"](t[:, None].to(x.dtype))
        told = told if labels is None else told + self.label(labels)
        return self.last(torch.tanh(self.first(x) + told))


def small_teacher(folder: Path, kind: str) -> Model:
    if kind == "unet":
        return load_model(tiny_folder(folder / "teacher", 2, **SMALL))
    if kind == "diffusers":
        return load_model(diffusers_folder(folder / "teacher", **SMALL))
    torch.manual_seed(0)
    if kind == "song":
        build = partial(
            SongUNet,
            img_resolution=4,
            in_channels=1,
            out_channels=1,
            model_channels=4,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(),
        )
        return Model(build().eval(), RectifiedFlow(), "flow", shape=(1, 4, 4), build=build, call=song_call)
    return Model(Timed().eval(), VPLinear(), "v", shape=(3,), classes=2, null_label=2)


def song_call(network: Any, x: Tensor, time: Tensor, cond: Any) -> Tensor:
    return network(x, time)


def made(teacher: Model, **form: Any) -> FlowMapStudent:
    torch.manual_seed(1)
    first, last = teacher.schedule.ends.tolist()
    return FlowMapStudent(teacher.with_network(copy.deepcopy(teacher.network)), first, last, FlowMapForm(**form)).eval()


def told_something(student: FlowMapStudent) -> FlowMapStudent:
    """The same student, after its embedding of the target time has learned something."""
    torch.manual_seed(2)
    for parameter in student.network.embeddings.parameters():
        nn.init.normal_(parameter, std=0.5)
    return student.requires_grad_(False)


def inputs(teacher: Model) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """States, a condition, and two times."""
    x = torch.randn(3, *teacher.need_shape(), generator=torch.Generator().manual_seed(0))
    times = teacher.schedule.t_of_lam(torch.tensor([-2.0, 0.5], dtype=torch.float64))
    return x, teacher.labels(range(3)), times[0], times[1]


KINDS = {"unet": {}, "song": {}, "own": {"insert_at": "inner.time"}}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_new_student_makes_its_teachers_first_order_step(tmp_path: Path, kind: str) -> None:
    teacher = small_teacher(tmp_path, kind)
    student, (x, cond, s, t) = made(teacher, **KINDS[kind]), inputs(teacher)
    assert torch.equal(student(x, s, t, cond), teacher(x, s, cond))
    assert torch.equal(student.jump(x, s, t, cond), FirstOrderMap(teacher)(x, s, t, cond))
    grid = TimeGrid(torch.stack([s, t]))
    torch.testing.assert_close(student.jump(x, s, t, cond), sample(teacher, "ddim", x, cond, grid=grid))  # sums in another order
    assert torch.equal(student(x, s, t, cond), student(x, s, torch.lerp(s, t, 0.5), cond))  # whatever the target time


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_student_is_told_where_it_leads(tmp_path: Path, kind: str) -> None:
    teacher = small_teacher(tmp_path, kind)
    student, (x, cond, s, t) = told_something(made(teacher, **KINDS[kind])), inputs(teacher)
    middle = torch.lerp(s, t, 0.5)
    assert not torch.allclose(student(x, s, t, cond), student(x, s, middle, cond))
    rows = [student(x[k : k + 1], s, at, None if cond is None else cond[k : k + 1]) for k, at in enumerate((t, middle, s))]
    together = student(x, s.expand(3), torch.stack([t, middle, s]), cond)  # a time for each sample
    torch.testing.assert_close(together, torch.cat(rows))
    assert torch.equal(student.jump(x, s, s, cond), x)


@torch.no_grad()
def test_a_copy_is_told_its_own_target_time(tmp_path: Path) -> None:
    student = told_something(made(small_teacher(tmp_path, "unet")))
    x, cond = torch.randn(2, 1, 4, 4), torch.tensor([0, 1])
    before, twin = student(x, S, T, cond), copy.deepcopy(student)
    assert torch.equal(twin(x, S, T, cond), before)
    for parameter in twin.network.embeddings.parameters():
        parameter.add_(1.0)
    assert not torch.allclose(twin(x, S, T, cond), before)
    assert torch.equal(student(x, S, T, cond), before)
    for parameter in student.network.embeddings.parameters():
        parameter.zero_()
    assert torch.equal(student(x, S, T, cond), student(x, S, LATER, cond)) and not torch.allclose(
        twin(x, S, T, cond), twin(x, S, LATER, cond)
    )


@pytest.mark.parametrize("kind", [*KINDS, "diffusers"])
@torch.no_grad()
def test_a_saved_student_answers_to_the_bit(tmp_path: Path, kind: str) -> None:
    teacher = small_teacher(tmp_path, kind)
    student = told_something(made(teacher, features=6, **KINDS.get(kind, {})))
    student.card["said"] = "here"
    out = tmp_path / "student"
    student.save(out)
    save_like(teacher, student.network.network, out)
    assert {"flow-map.json", "flow-map.safetensors", "README.md"} <= names(out) and "said: here" in (out / "README.md").read_text()
    loaded = load_model(out, trust=True)
    assert "flow map" in repr(loaded) and loaded.network.form == student.form and loaded.network.card == {"said": "here"}
    x, cond, s, t = inputs(teacher)
    assert torch.equal(loaded.network(x, s, t, cond), student(x, s, t, cond))
    in_memory = as_student(teacher, student)
    options = {"nfe": 2, "seeds": range(2), "grid": "angle"}
    assert torch.equal(sample(loaded, "ddim", **options), sample(in_memory, "ddim", **options))
    assert loaded.fingerprint == in_memory.fingerprint != teacher.fingerprint


def test_a_teacher_that_says_nothing_of_the_image_at_pure_noise_is_read_as_v(tmp_path: Path) -> None:
    teacher = small_teacher(tmp_path, "diffusers")
    assert made(teacher).prediction.name == "v" and made(teacher, output="epsilon").prediction.name == "epsilon"
    assert made(small_teacher(tmp_path / "other", "unet")).prediction.name == "edm(0.5)"


@torch.no_grad()
def test_a_student_knows_the_times_between_its_own(tmp_path: Path) -> None:
    teacher = small_teacher(tmp_path, "unet")
    student = FlowMapStudent(teacher.with_network(copy.deepcopy(teacher.network)), 20.0, 0.5, FlowMapForm())
    model = as_student(teacher, student)
    assert sample(model, "ddim", grid=TimeGrid([20.0, 3.0, 0.5]), seeds=[0]).shape == (1, 1, 4, 4)
    with pytest.raises(fewstep.SolverError, match=r"this flow map knows times from 20 to 0\.5, not 20 to 0\.05: use a grid between them"):
        sample(model, "ddim", nfe=2, seeds=[0])
    with pytest.raises(fewstep.SolverError, match="a flow map makes first-order steps alone: use the solver ddim"):
        sample(model, "unipc-2", grid=TimeGrid([20.0, 3.0, 0.5]), seeds=[0])


MISTAKES = {
    "unnamed": (
        {},
        "a Timed does not say where its time is embedded: name the submodule .* insert_at='time_mlp' [(]--insert-at time_mlp[)]",
    ),
    "unknown": ({"insert_at": "time"}, "a Timed has no submodule time to insert at; it has inner, label, first, last"),
    "no-embedding": (
        {"insert_at": "inner.act"},
        "a SiLU has no linear layer, so it is no time embedding: name another module as insert_at",
    ),
    "few-features": ({"features": 1}, "features"),
    "prediction": ({"output": "epsilom"}, "unknown prediction type 'epsilom': did you mean epsilon"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path: Path, mistake: str) -> None:
    form, says = MISTAKES[mistake]
    with pytest.raises(FewstepError, match=says):
        made(small_teacher(tmp_path, "own"), **form)


def test_what_is_no_module_is_refused() -> None:
    teacher = Model(lambda x, t: 0 * x, LAW, "sample", shape=(3,), name="half")
    with pytest.raises(ModelError, match="half is a function, which cannot be trained: make the Model of a torch.nn.Module"):
        FlowMapStudent(teacher, 20.0, 0.05, FlowMapForm())


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_damaged_weights_are_refused(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    teacher = small_teacher(tmp_path, "unet")
    student, out = made(teacher), tmp_path / "student"
    student.save(out)
    save_like(teacher, student.network.network, out)
    file = out / "flow-map.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors = {key: value for key, value in tensors.items() if key != name} if damage == "missing" else {**tensors, name: torch.zeros(5, 7)}
    save_file(tensors, file)
    with pytest.raises(fewstep.ArtifactError, match="flow-map"):
        load_model(out)


def test_a_form_is_checked_by_its_fields() -> None:
    assert replace(FlowMapForm(), features=4).features == 4
    with pytest.raises(FewstepError, match="featuring.*did you mean features"):
        FlowMapForm(featuring=4)
