"""Distilling an operator student: exact losses, a student that is nearer to its teacher, and runs that survive kills and full disks."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.problems import LAW, contents, count_arithmetic_once, diffusers_folder, names, tiny_folder
from torch import Tensor, nn

from fewstep import (
    ArtifactError,
    DistillConfig,
    FewstepError,
    Model,
    ModelError,
    Trajectories,
    TrajectoryConfig,
    distill,
    generate_trajectories,
    load_model,
    make_grid,
    sample,
)
from fewstep.learn.networks import loop
from fewstep.learn.networks.loop import LoopConfig
from fewstep.learn.networks.objectives import config as module
from fewstep.learn.networks.objectives.distances import DISTANCES
from fewstep.learn.networks.objectives.objective import Networks
from fewstep.learn.networks.objectives.operator import WEIGHTS, OperatorObjective
from fewstep.learn.teacher.batches import TeacherData
from fewstep.models.networks.operator import OperatorForm, OperatorStudent
from fewstep.models.networks.temporal_unet import Mixing
from fewstep.models.problem import Problem
from fewstep.models.tuned import Tuned
from fewstep.runtime.job import Job
from fewstep.sampling.grid_table import GridTable

LEVELS = {"block_out_channels": (8, 16), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}  # of the U-Net
TINY = DistillConfig(slots=2, steps=30, batch=16, lr=1e-2, ema=0.9, num=64, held_out=32, teacher_nfe=8)
BRIEF = replace(TINY, steps=4, batch=8)
NO_MIXING = Mixing("none")
SHORT = replace(TINY, steps=8, batch=8, num=16, held_out=8, dropout=0.2, form=OperatorForm(mixing=NO_MIXING))
ROUNDING = 1e-5  # float32 sums of some hundreds of numbers in another order, relative


def made(teacher: Model, config: DistillConfig, out: Path | None = None, **options: Any) -> Model:
    """A student by the method that has its mixing."""
    student = distill(teacher, "slots" if config.form.mixing == NO_MIXING else "dsno", config=config, out=out, **options)
    assert student is not None
    return student


def rmse(gap: Tensor) -> float:
    return float(gap.double().square().mean().sqrt())


@pytest.fixture(scope="module", autouse=True)
def quick_arithmetic() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        count_arithmetic_once(patch)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny_folder(tmp_path_factory.mktemp("distill") / "teacher", 2, dropout=0.3, **LEVELS))


@pytest.fixture(scope="module")
def stored(teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    """96 trajectories at four times, of which the grid of two slots has every second."""
    config = TrajectoryConfig(96, TINY.teacher_nfe, seed=TINY.seed, batch=16)
    found = generate_trajectories(teacher, make_grid("angle", LAW, 4), tmp_path_factory.mktemp("stored") / "them", config=config)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def whole(teacher: Model, stored: Trajectories, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A student's folder and its figures."""
    out = tmp_path_factory.mktemp("whole") / "student"
    return out, dict(made(teacher, TINY, out, trajectories=stored, command="fewstep distill it").card)


def check_measured(student: Model, trajectories: Trajectories, config: DistillConfig, within: float = ROUNDING) -> None:
    """The student gives the errors back that are on its card, as everyone samples it."""
    passes, held_out = student.card["passes"], range(config.num, config.num + config.held_out)
    x, labels = trajectories.states(held_out), trajectories.labels(held_out)
    assert student.num_jumps == tuple(passes)
    for n, (times, error) in passes.items():
        assert student.optimized("ddim", n).t.tolist() == times and len(times) == n + 1
        assert rmse(sample(student, None, x[:, 0], labels, nfe=n) - x[:, -1]) == pytest.approx(error, rel=within)


# -- losses ----------------------------------------------------------------------------------------------------------


def test_distances_by_hand() -> None:
    error = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 1.0], [2.0, -2.0]]])  # two samples, two slots
    # norms 5 and 1, 0 and sqrt(8), over sqrt(2); less 0.00054, unless the norm is 0
    by_hand = {"l1": [2.0, 1.0], "l2": [6.5, 2.0], "huber": [3 / 2**0.5 - 0.00054, 1 - 0.00027]}
    assert set(by_hand) == set(DISTANCES)
    for name, wanted in by_hand.items():
        torch.testing.assert_close(DISTANCES[name](error), torch.tensor(wanted), rtol=1e-6, atol=1e-6)


def test_weights_by_hand() -> None:
    snr = torch.tensor([0.05, 4.0, 100.0, torch.inf])
    by_hand = {"equal": [1.0, 1.0, 1.0, 1.0], "snr": [1.0, 4.0, 10.0, 10.0], "paper": [1.0, 4.0, 100.0, 1e4]}
    assert {name: weight(snr).tolist() for name, weight in WEIGHTS.items()} == by_hand


class Oracle(nn.Module):
    """The teacher's own states, moved by ``off`` network outputs in each slot; it knows the sample by its state."""

    def __init__(self, stored: Trajectories, grid: Tensor, off: Callable[[Tensor, Tensor], Tensor] | float = 0.0) -> None:
        super().__init__()
        self.one, self.grid, self.off, self.starts = nn.Parameter(torch.ones(())), grid, off, list[float]()
        self.states = stored.states(slice(0, TINY.num), [int((stored.t - t).abs().argmin()) for t in grid])

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, start: Tensor) -> Tensor:
        j = self.grid.tolist().index(float(start))
        self.starts += [float(start)] * len(x)
        which = torch.cdist(x.flatten(1), self.states[:, j].flatten(1)).argmin(1)
        assert t.tolist() == self.grid[j + 1 :].tolist() and torch.equal(cond, (TINY.seed + which) % 2)
        off = self.off(start, t) if callable(self.off) else torch.full_like(t, self.off)
        return self.one * (self.states[which][:, j + 1 :] + off.float().reshape(-1, 1, 1, 1))


def losses(teacher: Model, stored: Trajectories, oracle: Callable[[Tensor], Oracle], n: int = 1, **changes: Any) -> list[Any]:
    """The oracle, and the losses of ``n`` batches."""
    config, problem = replace(TINY, **changes), Problem(teacher)
    objective = OperatorObjective(problem, config, lambda x: x.flatten(1))
    with Job.open("distill") as job:
        data = TeacherData(problem, objective.grid, config.trajectories, config.held_out, job, given=stored)
    asked, generators = oracle(objective.grid.t), [torch.Generator().manual_seed(k) for k in range(n)]
    return [asked, *(objective.loss(Networks(asked), objective.batch(data, 8, generator), generator) for generator in generators)]


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # what one unit of the network's output moves a state at t by
    "state": lambda s, t: torch.sqrt(1 + t**2),
    "skip": lambda s, t: torch.ones_like(t),
    "denoised": lambda s, t: (1 - t / s) * s * 0.5 / torch.sqrt(s**2 + 0.25),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.every(3)
def test_the_target_is_the_teachers_state_and_its_unit_the_networks_output(teacher, stored, output: str) -> None:
    form = OperatorForm(output, mixing=NO_MIXING)
    for loss in (*DISTANCES, "features"):
        _, *zeros = losses(teacher, stored, partial(Oracle, stored), 6, slots=4, form=form, loss=loss)
        assert [float(zero.detach()) for zero in zeros] == [0.0] * 6, loss
    tenth = partial(Oracle, stored, off=lambda s, t: 0.1 * OUTPUTS[output](s, t))
    for loss, wanted in {"l1": 0.1, "l2": 0.01, "huber": 0.1 - 0.00054}.items():
        oracle, *values = losses(teacher, stored, tenth, 12, slots=4, form=form, loss=loss)
        assert len(set(oracle.starts)) > 1
        torch.testing.assert_close(torch.stack(values).detach(), torch.full((12,), wanted), rtol=2e-3, atol=0)


def test_weights_are_those_of_the_slots_and_leave_the_size_alone(teacher, stored) -> None:
    form, last_off = OperatorForm("skip", mixing=NO_MIXING), lambda s, t: torch.tensor([0.0, 0.1])
    for weights, wanted in {"equal": 0.05, "snr": 0.1 * 10 / 11, "paper": 0.1 * 20 / 21}.items():  # alpha / sigma is 1 and 20
        changes = {"weights": weights, "form": form, "loss": "l1", "first": 1.0}
        _, value = losses(teacher, stored, partial(Oracle, stored, off=last_off), **changes)
        assert float(value.detach()) == pytest.approx(wanted, rel=1e-4)
        _, value = losses(teacher, stored, partial(Oracle, stored, off=0.1), **changes)
        assert float(value.detach()) == pytest.approx(0.1, rel=1e-4)


def test_each_step_of_training_starts_at_the_noise_and_anywhere(teacher, stored) -> None:
    form = OperatorForm(mixing=NO_MIXING)
    oracle, *_ = losses(teacher, stored, partial(Oracle, stored), 200, slots=4, form=form, first=0.25)
    share = {start: oracle.starts.count(start) / len(oracle.starts) for start in set(oracle.starts)}
    assert set(share) == set(oracle.grid[:-1].tolist()) and all(0.15 < one < 0.35 for one in share.values()), share
    for changes in ({"first": 1.0, "form": form}, {"first": 0.25, "form": replace(form, anywhere=False)}):
        oracle, *_ = losses(teacher, stored, partial(Oracle, stored), 20, slots=4, **changes)
        assert set(oracle.starts) == {20.0}


def test_features_are_of_pictures_of_unit_size_and_have_a_gradient(teacher, stored, tmp_path) -> None:
    tenth = partial(Oracle, stored, off=lambda s, t: 0.1 * torch.sqrt(1 + t**2))
    oracle, value = losses(teacher, stored, tenth, loss="features", first=1.0)
    assert float(value.detach()) == pytest.approx(0.01, rel=1e-4)
    value.backward()
    assert oracle.one.grad is not None and float(oracle.one.grad) != 0
    with pytest.raises(FewstepError, match="the loss features compares features of pictures: pass features="):
        made(teacher, replace(BRIEF, loss="features"), tmp_path / "out", trajectories=stored)
    assert not (tmp_path / "out").exists()


# -- one student, from every side ------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_student_beats_the_untrained_one(teacher, stored, whole) -> None:
    _, figures = whole
    curve = figures["curve"]
    assert [step for step, _ in curve] == list(range(1, TINY.steps + 1))
    begin, end = (sum(value for _, value in part) / 5 for part in (curve[:5], curve[-5:]))
    assert end < 0.6 * begin
    grid, x = make_grid("angle", LAW, 2).t, stored.states(range(64, 96), [0, 2, 4])
    untrained = OperatorStudent(replace(teacher, network=copy.deepcopy(teacher.network)), grid, TINY.form)
    with torch.no_grad():
        before = rmse(untrained(x[:, 0], grid[1:], stored.labels(range(64, 96)))[:, -1] - x[:, -1])
    assert figures["passes"][1][1] < 0.8 * before


def test_the_folder_gives_the_measured_errors_back(teacher, stored, whole) -> None:
    out, figures = whole
    student = load_model(out)
    check_measured(replace(student, card=figures), stored, TINY)
    x = stored.states(range(64, 96), [0, 2, 4])
    with torch.no_grad():
        states = student.network(x[:, 0], make_grid("angle", LAW, 2).t[1:], stored.labels(range(64, 96)))
    norms = [2**0.5, (1 + 0.05**2) ** 0.5]
    assert [rmse(states[:, k] - x[:, k + 1]) / norms[k] for k in (0, 1)] == pytest.approx(figures["slots"], rel=ROUNDING)
    assert student.flow_map is not None and (student.classes, student.null_label) == (2, None)
    assert student.fingerprint != teacher.fingerprint
    with pytest.raises(ModelError, match="its guidance is in its weights"):
        student.guided(2.0)


def test_the_folder_says_what_it_is(teacher, whole) -> None:
    out, figures = whole
    history = json.loads((out / "history.json").read_text())
    assert history == json.loads(json.dumps({"config": asdict(TINY), "of": teacher.fingerprint, **figures}))
    assert set(history["passes"]) == {"1", "2"} and set(history["arithmetic"]) == {"1", "2"}
    assert Tuned.load(out) == Tuned(str(teacher.folder.resolve()), teacher.fingerprint, 1.0, "ddim", 1, "operator")
    table = GridTable.load(out / "optimized" / "ddim")
    assert (table.model, table.solver, table.guidance) == (load_model(out).fingerprint, "ddim", 1.0)
    readme = (out / "README.md").read_text()
    for said in (
        "fewstep distill it",
        teacher.fingerprint,
        str(round(figures["passes"][1][1], 4)),
        str(round(figures["arithmetic"][2], 2)),
    ):
        assert said in readme
    assert not list(out.rglob("checkpoint*")) and not list(out.rglob(".*"))
    assert not (out / "work" / "trajectories").exists()
    assert str(out.parent) not in (out / "unet" / "config.json").read_text()  # no folder of this machine is published


def test_finished_folders_and_models_are_not_written_over(teacher, stored, whole, tmp_path) -> None:
    before = contents(whole[0])
    with pytest.raises(FewstepError, match="already holds a finished student: choose another folder, or remove it"):
        made(teacher, TINY, whole[0], trajectories=stored)
    assert contents(whole[0]) == before
    before = contents(tiny_folder(tmp_path / "model", 2))
    with pytest.raises(FewstepError, match="already holds a model, which would be lost"):
        made(teacher, BRIEF, tmp_path / "model", trajectories=stored)
    assert contents(tmp_path / "model") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "changes", "cheap"),
    [
        (OperatorForm("skip", "slot", mixing=NO_MIXING), {"weights": "paper", "half": True}, True),
        (OperatorForm("state", mixing=Mixing("one-way")), {"loss": "l1", "weights": "snr"}, False),
        (OperatorForm(mixing=Mixing("fft", insert_after="inner", branch_at="inner"), anywhere=False), {"dropout": 0.2}, False),
    ],
)
def test_students_of_every_kind(teacher, stored, tmp_path, form: OperatorForm, changes: dict, cheap: bool) -> None:
    config = replace(BRIEF, form=form, **changes)
    student = made(teacher, config, tmp_path / "out", trajectories=stored)
    check_measured(student, stored, config, 2e-3 if config.half else ROUNDING)
    passes, arithmetic = (student.card[name] for name in ("passes", "arithmetic"))
    assert len(student.card["slots"]) == 2 and list(passes) == list(arithmetic) == ([1, 2] if form.anywhere else [1])
    assert 1 <= arithmetic[1] < (1.02 if cheap else 3) and (2 not in arithmetic or arithmetic[2] > 1.99)
    if config.half:
        sizes = [(folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size for folder in (tmp_path / "out", teacher.folder)]
        assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.slow
def test_methods(teacher, stored, whole) -> None:
    config = replace(BRIEF, steps=1, slots=None)
    assert config.num_slots == 4
    one, two = (
        distill(teacher, method, config=replace(config, slots=n), trajectories=stored) for method, n in (("kd", None), ("slots", 2))
    )
    assert [len(student.card["slots"]) for student in (one, two)] == [1, 2]  # knowledge distillation has one
    check_measured(one, stored, replace(config, slots=1))
    assert one.card["arithmetic"][1] < 1.02 and two.card["arithmetic"][1] < 1.02  # no temporal layers
    assert whole[1]["arithmetic"][1] > 1.05  # with them
    for method, options, says in [
        ("dnso", {}, "unknown method 'dnso': did you mean dsno"),
        ("kd", {"slots": 2}, "kd has one slot, got 2: use the method slots, or leave slots out"),
        ("dsno", {"form": OperatorForm(mixing=NO_MIXING)}, "the slots of dsno meet in temporal layers: .* or use the method slots"),
    ]:
        with pytest.raises(FewstepError, match=says):
            distill(teacher, method, config=replace(config, **options))


def test_what_half_precision_trains_is_measured_as_it_is_sampled(teacher, stored) -> None:
    config = replace(BRIEF, steps=2, mixed_precision="bf16")
    check_measured(made(teacher, config, trajectories=stored), stored, config)


@pytest.mark.slow
def test_an_unconditional_model_that_predicts_noise(tmp_path) -> None:
    model, config = load_model(diffusers_folder(tmp_path / "theirs", **LEVELS)), replace(BRIEF, steps=2, fresh=0.5)
    student = made(model, config, tmp_path / "out")
    check_measured(student, Trajectories.load(tmp_path / "out" / "work" / "trajectories"), config)


@pytest.mark.slow
def test_a_guided_teacher_moves_into_the_weights(teacher, tmp_path) -> None:
    config = replace(BRIEF, steps=2, fresh=0.5, form=OperatorForm(mixing=NO_MIXING))
    student = made(teacher, config, tmp_path / "out", guidance=3.0)
    assert Tuned.load(tmp_path / "out").guidance == 3.0
    found = Trajectories.load(tmp_path / "out" / "work" / "trajectories")
    assert found.guidance == 3.0
    check_measured(student, found, config)
    problem = Problem(teacher, 3.0)
    with Job.open("distill") as job:
        data = TeacherData(problem, make_grid("angle", LAW, 2), config.trajectories, config.held_out, job, given=found)
    states, labels, _ = data._solved(found.seeds(range(4)).tolist())  # what is solved while training is what would be stored
    torch.testing.assert_close(states, found.states(range(4)), rtol=1e-5, atol=1e-5)
    assert labels.tolist() == found.labels(range(4)).tolist()


@pytest.mark.parametrize(("fresh", "count"), [(0.5, 4), (1.0, 8)])
@pytest.mark.every(2)
def test_fresh_trajectories_are_new_every_step(teacher, stored, monkeypatch, fresh: float, count: int) -> None:
    solved, real = [], TeacherData._solved
    monkeypatch.setattr(TeacherData, "_solved", lambda data, seeds: solved.append(seeds) or real(data, seeds))
    made(teacher, replace(BRIEF, steps=3, fresh=fresh, form=OperatorForm(mixing=NO_MIXING)), trajectories=stored)
    assert [len(seeds) for seeds in solved] == [count] * 3
    seeds = sum(solved, [])
    assert len(set(seeds)) == len(seeds) and min(seeds) > TINY.seed + 10**9


@pytest.mark.slow
def test_a_student_to_begin_with(teacher, stored, whole, tmp_path) -> None:
    student, config = load_model(whole[0]), replace(BRIEF, steps=1, batch=32, first=1.0, lr=1e-9)
    plain, later = (made(teacher, config, trajectories=stored, begin=begin).card for begin in (None, student))
    assert later["curve"][0][1] < 0.8 * plain["curve"][0][1]
    assert later["passes"][1][1] == pytest.approx(whole[1]["passes"][1][1], rel=1e-3)
    other = made(teacher, replace(config, slots=4), trajectories=stored, begin=student)
    assert len(other.card["slots"]) == 4  # what fits is taken
    with pytest.raises(ModelError, match="is a student, which is sampled as it is: name its teacher"):
        made(student, config, tmp_path / "bad")
    with pytest.raises(ModelError, match="teacher is no operator student to begin with"):
        made(teacher, config, tmp_path / "bad", begin=teacher)
    assert not (tmp_path / "bad").exists()


def test_a_student_to_begin_with_has_the_same_teacher_and_network(teacher, tmp_path) -> None:
    """Else what does not fit would be left out without a word."""
    config = replace(BRIEF, steps=1, slots=None, form=OperatorForm(mixing=NO_MIXING))
    student = distill(teacher, "kd", config=config)
    wide = load_model(tiny_folder(tmp_path / "wide", 2, **{**LEVELS, "block_out_channels": (8, 24)}))
    assert student is not None
    for model, begin, guidance, says in (
        (wide, student, 1.0, "at guidance 1, not of wide .*: begin with one of the same teacher"),
        (teacher, student, 2.0, "at guidance 1, not of teacher .* at 2: begin with one of the same teacher"),
        (
            wide,
            replace(student, given=None),
            1.0,
            r"another than that of wide: .* is \[.*\] there and \[.*\] here; begin with a student of",
        ),
    ):
        with pytest.raises(ModelError, match=says):
            distill(model, "kd", config=config, begin=begin, guidance=guidance, out=tmp_path / "bad")
        assert not (tmp_path / "bad").exists()


# -- kills, changed minds and damage ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_parts() -> Iterator[None]:
    """A checkpoint every 3 steps, and shards of 8 trajectories."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "LoopConfig", partial(LoopConfig, checkpoint_every=3))
        monkeypatch.setattr(module, "TrajectoryConfig", partial(TrajectoryConfig, batch=8))
        yield


def reached(out: Path) -> dict[str, object]:
    """The weights and all that was measured but the clock; nothing of a checkpoint may be left."""
    assert names(out / "work") == {"curve.json", "trajectories"}
    history = json.loads((out / "history.json").read_text())
    weights = {name: data for name, data in contents(out).items() if name.endswith(".safetensors")}
    return weights | {"history": {key: value for key, value in history.items() if key != "seconds"}}


@pytest.fixture(scope="module")
def short(teacher: Model, small_parts: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a short run reaches that nobody disturbs."""
    made(teacher, SHORT, out := tmp_path_factory.mktemp("short") / "out")
    return reached(out)


@pytest.mark.slow
def test_a_run_interrupted_after_its_last_step_does_none_again(teacher, short, small_parts, tmp_path) -> None:
    def interrupt(done: int, note: str) -> None:
        if done == SHORT.steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(teacher, SHORT, tmp_path, on_progress=interrupt)
    seen: list[int] = []
    made(teacher, SHORT, tmp_path, on_progress=lambda done, note: seen.append(done))
    assert reached(tmp_path) == short and {*seen} <= {0, SHORT.steps}


@pytest.mark.slow
def test_an_interrupt_while_the_curve_is_written_loses_no_point(teacher, short, small_parts, tmp_path) -> None:
    writes, real = [], loop.write_whole

    def interrupted(path: Path, content: bytes) -> None:
        writes.append(path.name)
        if writes.count("curve.json") == 5:
            raise KeyboardInterrupt
        real(path, content)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "write_whole", interrupted)
        made(teacher, SHORT, tmp_path)
    made(teacher, SHORT, tmp_path)
    assert reached(tmp_path) == short


CHANGES = [{"lr": 1e-3}, {"steps": 9}, {"batch": 16}, {"loss": "l1"}, {"slots": 3}, {"seed": 1}, {"num": 48}, {"teacher_nfe": 4}]


@pytest.mark.slow
def test_other_options_do_not_take_over_a_half_finished_run(teacher, stored, short, small_parts, tmp_path) -> None:
    with pytest.raises(ZeroDivisionError):
        made(teacher, SHORT, tmp_path, on_progress=lambda done, note: done == 5 and 1 / 0)
    before = contents(tmp_path)
    for change in [*CHANGES, {"trajectories": stored}]:
        given = {"trajectories": stored} if "trajectories" in change else {}
        with pytest.raises(ArtifactError, match=r"of another|to another run|from seed"):
            made(teacher, replace(SHORT, **({} if given else change)), tmp_path, **given)
        assert contents(tmp_path) == before, change
    made(teacher, SHORT, tmp_path)
    assert reached(tmp_path) == short
