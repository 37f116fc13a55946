"""Distilling a flow map: the pairs that are drawn, students by every target, and runs that survive kills."""

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.own_networks import table_model
from tests.problems import LAW, diffusers_folder, tiny_folder
from torch import Tensor, nn

from fewstep import (
    ArtifactError,
    FewstepError,
    Model,
    ModelError,
    TimeGrid,
    Trajectories,
    TrajectoryConfig,
    distill,
    generate_trajectories,
    load_model,
    make_grid,
    sample,
)
from fewstep.data.images import Images
from fewstep.learn.networks.distill import DistillConfig, FlowMapConfig, GuidedConfig, ProgressiveConfig
from fewstep.learn.networks.objectives.flow_map import PRESETS, FlowMapObjective
from fewstep.learn.networks.objectives.flow_map_targets import TARGETS
from fewstep.learn.teacher.batches import Batch
from fewstep.models.flow_map import FirstOrderMap
from fewstep.models.flow_map_student import FlowMapForm
from fewstep.models.problem import Problem

SLOTS = 4
BRIEF = FlowMapConfig(slots=SLOTS, steps=2, batch=8, lr=1e-2, ema=0.5, num=16, held_out=8, teacher_nfe=8, max_passes=2)
NUM = FlowMapConfig().num  # which says nothing where there are pictures to learn from
WHOLE = replace(BRIEF, steps=40, batch=16, ema=0.9, num=64, held_out=32, max_passes=3)


def made(teacher: Model, config: FlowMapConfig, out: Path | None = None, **options: Any) -> Model:
    student = distill(teacher, "flow-map", config=config, out=out, **options)
    assert student is not None
    return student


def rmse(gap: Tensor) -> float:
    return float(gap.double().square().mean().sqrt())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny_folder(tmp_path_factory.mktemp("flow-map") / "teacher", 2, block_out_channels=(8,)))


@pytest.fixture(scope="module")
def stored(teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    config = TrajectoryConfig(96, WHOLE.teacher_nfe, seed=WHOLE.seed, batch=96)
    found = generate_trajectories(teacher, make_grid("angle", LAW, SLOTS), tmp_path_factory.mktemp("stored") / "them", config=config)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def pictures() -> Images:
    x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return Images(x, torch.arange(20) % 2, 16, "squares")


@pytest.fixture(scope="module")
def whole(teacher: Model, stored: Trajectories, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    out = tmp_path_factory.mktemp("whole") / "student"
    return out, made(teacher, WHOLE, out, trajectories=stored)


# -- pairs -----------------------------------------------------------------------------------------------------------

MANY = 4000


def drawn(teacher: Model, images: Images | None = None, **changes: Any) -> tuple[FlowMapObjective, Any]:
    """An objective, and the pairs that it draws of many trajectories, whose states are the numbers of their times."""
    objective = FlowMapObjective(Problem(teacher), replace(BRIEF, batch=MANY, num=NUM if images else BRIEF.num, **changes), images)
    states = torch.arange(SLOTS + 1.0).reshape(1, -1, 1, 1, 1).expand(MANY, -1, 1, 4, 4)
    batch = Batch(torch.zeros(MANY, 1, 4, 4) if objective.from_pictures else states, torch.arange(MANY) % 2)
    return objective, objective.pairs(batch, torch.Generator().manual_seed(0))


def share(flags: Tensor) -> float:
    return float(flags.double().mean())


@pytest.mark.parametrize(("first", "last"), [(None, None), (0.0, 0.0), (1.0, 0.3), (0.25, 1.0)])
def test_the_shares_hold_in_the_pairs_drawn(teacher: Model, first: float | None, last: float | None) -> None:
    objective, pairs = drawn(teacher, first=first, last=last)
    first, last = 0.5 if first is None else first, 0.4 if last is None else last
    t = objective.grid.t
    assert bool((pairs.t < pairs.s).all()) and bool(torch.isin(torch.stack([pairs.s, pairs.t]), t).all())
    begins = first + (1 - first) / SLOTS
    assert share(pairs.s == t[0]) == pytest.approx(begins, abs=0.03)
    anyhow = first / SLOTS + (1 - first) * sum(1 / (SLOTS - i) for i in range(SLOTS)) / SLOTS
    assert share(pairs.t == t[-1]) == pytest.approx(last + (1 - last) * anyhow, abs=0.03)
    for states, times in ((pairs.x, pairs.s), (pairs.x_v, pairs.v), (pairs.x_t, pairs.t)):
        assert torch.equal(t[states[:, 0, 0, 0].long()], times)


@pytest.mark.parametrize("anchor", [0.0, 0.5, 1.0])
def test_the_share_of_anchors(teacher: Model, anchor: float) -> None:
    objective, pairs = drawn(teacher, target="semigroup", anchor=anchor, first=1.0, last=0.0)
    near = pairs.t == objective.grid.t[1]
    assert torch.equal(near, pairs.v == pairs.s)
    assert share(near) == pytest.approx(anchor + (1 - anchor) / SLOTS, abs=0.03)


def test_times_between_of_each_target(teacher: Model) -> None:
    for target in ("lagrangian", "eulerian", "semigroup"):
        objective, pairs = drawn(teacher, target=target)
        i, v, j = (torch.searchsorted(-objective.grid.t, -one) for one in (pairs.s, pairs.v, pairs.t))
        wanted = {"lagrangian": j - 1, "eulerian": i + 1, "semigroup": (i + j) // 2}[target]
        assert torch.equal(v, wanted), target


def test_derivatives_are_held_at_any_times(teacher: Model, pictures: Images) -> None:
    objective, pairs = drawn(teacher, pictures, target="matching", anchor=0.5, first=0.2, last=0.2)
    t = objective.grid.t
    inner = (pairs.s != t[0]) & (pairs.s != pairs.t)
    assert bool((pairs.t <= pairs.s).all()) and bool((pairs.t >= t[-1]).all()) and not torch.isin(pairs.s[inner], t).all()
    assert share(pairs.s == pairs.t) == pytest.approx(0.5, abs=0.03)
    sigma = pairs.x.flatten(1).std(1).double() / pairs.s  # of pictures of zeros
    assert float(sigma.mean()) == pytest.approx(1.0, abs=0.05) and torch.equal(pairs.x0, torch.zeros(MANY, 1, 4, 4))
    _, pairs = drawn(teacher, target="lagrangian-jvp", last=0.3)
    assert bool((pairs.t <= pairs.s).all()) and len(pairs.t.unique()) > MANY / 4


@pytest.mark.parametrize("name", PRESETS)
def test_names_in_the_literature_are_targets(name: str) -> None:
    config = replace(BRIEF, target=name)
    assert config.equation in TARGETS
    assert config.share("last") == (1.0 if name.startswith("consistency") else 0.4)


# -- students --------------------------------------------------------------------------------------------------------


REFUSED = {"stored": {"matching"}, "noised": {"matching", "trajectory"}, "pictures": {"trajectory"}}
CASES = [(target, data) for target in (*TARGETS, "consistency") for data, refused in REFUSED.items() if target not in refused]


@pytest.mark.parametrize(("target", "data"), CASES)
@pytest.mark.every(7)
def test_every_target_trains_a_student(teacher: Model, stored: Trajectories, pictures: Images, target: str, data: str) -> None:
    config = replace(BRIEF, target=target, states="noised" if data == "noised" else "stored")
    given = {"images": pictures} if data == "pictures" else {"trajectories": stored}
    config = replace(config, num=NUM) if data == "pictures" else config
    student = made(teacher, config, **given)
    assert len(student.card["curve"]) == 2 and all(value < 10 for _, value in student.card["curve"])
    assert list(student.card["passes"]) == list(student.num_jumps) == [1, 2] and len(student.card["slots"]) == SLOTS
    assert (student.card["trained_on"] is None) == (data == "pictures")
    moved = [torch.equal(*both) for both in zip(student.network.network.network.parameters(), teacher.network.parameters(), strict=True)]
    assert not all(moved)
    assert sample(student, nfe=2, seeds=range(3)).shape == (3, 1, 4, 4)


def test_a_student_is_nearer_to_its_teacher_than_a_first_order_step(teacher: Model, stored: Trajectories, whole: Any) -> None:
    out, student = whole
    x, labels = stored.states(range(64, 96)), stored.labels(range(64, 96))
    step = FirstOrderMap(teacher)(x[:, 0], stored.t[0], stored.t[-1], labels)
    ends = sample(student, None, x[:, 0], labels, nfe=1)
    assert rmse(ends - x[:, -1]) < 0.5 * rmse(step - x[:, -1])


def test_the_card_measures_what_was_trained_on_and_what_was_not(stored: Trajectories, whole: Any) -> None:
    """Inner times are chosen on one half of the held-out trajectories, and errors are those on the other."""
    out, student = whole
    x, labels = stored.states(range(96)), stored.labels(range(96))
    for n, (times, error) in student.card["passes"].items():
        assert student.optimized("ddim", n).t.tolist() == times and len(times) == n + 1
        assert rmse(sample(student, None, x[80:, 0], labels[80:], nfe=n) - x[80:, -1]) == pytest.approx(error, rel=1e-5)
    known = sample(student, None, x[:32, 0], labels[:32], nfe=1) - x[:32, -1]
    assert student.card["trained_on"] == pytest.approx(rmse(known), rel=1e-5)
    history = json.loads((out / "history.json").read_text())
    assert history["trained_on"] == student.card["trained_on"] and history["config"] == json.loads(json.dumps(asdict(WHOLE)))
    assert list(student.card["passes"]) == [1, 2, 3] and student.card["arithmetic"] == {1: 1.0, 2: 2.0, 3: 3.0}
    norms = torch.sqrt(LAW.alpha(stored.t[1:]) ** 2 + LAW.sigma(stored.t[1:]) ** 2)
    flow_map = student.flow_map
    slots = [rmse(flow_map(x[80:, 0], stored.t[0], t, labels[80:]) - x[80:, k + 1]) / float(norms[k]) for k, t in enumerate(stored.t[1:])]
    assert student.card["slots"] == pytest.approx(slots, rel=1e-5)


def test_a_grid_of_any_times_is_jumped_through(stored: Trajectories, whole: Any) -> None:
    student = load_model(whole[0])
    x, labels = stored.states(range(4))[:, 0], torch.tensor([1, 0, 1, 0])
    for times in ([20.0, 0.05], [20.0, 7.3, 2.1, 0.4, 0.05], [11.0, 3.0, 0.2]):
        grid = TimeGrid(times)
        here = x
        for s, t in pairwise(grid.t):
            here = student.network.jump(here, s, t, labels)
        torch.testing.assert_close(sample(student, "ddim", x, labels, grid=grid), here, rtol=1e-6, atol=1e-6)
    start = make_grid("karras", LAW, 3)
    assert sample(student, "ddim", nfe=3, seeds=range(2), grid="karras").shape == (2, 1, 4, 4) and start.steps == 3


def test_a_teacher_that_predicts_noise_is_read_as_v(tmp_path: Path) -> None:
    model = load_model(diffusers_folder(tmp_path / "theirs", block_out_channels=(8,)))
    student = made(model, replace(BRIEF, target="eulerian"), tmp_path / "out")
    assert student.network.prediction.name == "v"
    images = sample(load_model(tmp_path / "out"), nfe=2, seeds=range(2))
    assert torch.equal(images, sample(student, nfe=2, seeds=range(2))) and bool(torch.isfinite(images).all())


def test_a_network_of_ones_own_is_told_where_it_embeds_its_time(tmp_path: Path) -> None:
    model = table_model()
    with pytest.raises(ModelError, match="a TableNet does not say where its time is embedded"):
        made(model, BRIEF)
    with pytest.raises(ModelError, match="a Dropout has no linear layer, so it is no time embedding"):
        made(model, replace(BRIEF, form=FlowMapForm(insert_at="dropout")))


def test_a_student_to_begin_with(teacher: Model, stored: Trajectories, whole: Any, tmp_path: Path) -> None:
    student, still = load_model(whole[0]), replace(BRIEF, steps=1, lr=1e-9)
    later = made(teacher, replace(still, num=WHOLE.num, held_out=WHOLE.held_out), trajectories=stored, begin=student)
    assert later.card["passes"][1][1] == pytest.approx(whole[1].card["passes"][1][1], rel=1e-3)
    other = load_model(tiny_folder(tmp_path / "other", 2, seed=1, block_out_channels=(8,)))
    for model, config, begin, options, says in (
        (teacher, still, teacher, {}, "teacher is no flow-map student to begin with: name one, or leave it out"),
        (teacher, replace(still, form=FlowMapForm(8)), student, {}, "student has another form, of 16 features, read as edm[(]0.5[)]"),
        (other, still, student, {}, "student is a student of .*, not of other .* at 1: begin with one of the same teacher"),
        (teacher, still, student, {"guidance": 2.0}, "at guidance 1, not of teacher .* at 2"),
    ):
        with pytest.raises(ModelError, match=says):
            made(model, config, tmp_path / "bad", begin=begin, **options)
        assert not (tmp_path / "bad").exists()


# -- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("target", ["semigroup", "trajectory", "matching"])
def test_a_killed_run_ends_with_the_same_weights(
    teacher: Model, stored: Trajectories, pictures: Images, tmp_path: Path, target: str
) -> None:
    """Targets are made with averaged weights, so these have to continue, too."""
    config = replace(BRIEF, target=target, steps=6, dropout=0.1)
    given: dict[str, Any] = {"images": pictures} if target == "matching" else {"trajectories": stored}
    config = replace(config, num=NUM) if target == "matching" else config
    wanted = made(teacher, config, tmp_path / "whole", **given)

    def interrupt(done: int, note: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(teacher, config, tmp_path / "killed", on_progress=interrupt, **given)
    seen = list[int]()
    found = made(teacher, config, tmp_path / "killed", on_progress=lambda done, note: seen.append(done), **given)
    assert {one for one in seen if one} == {4, 5, 6}  # the report of the last step before is taken again
    ours, theirs = found.network.state_dict(), wanted.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {**found.card, "seconds": 0} == {**wanted.card, "seconds": 0} and found.fingerprint == wanted.fingerprint


@pytest.mark.slow
def test_other_pictures_do_not_take_over_a_half_finished_run(teacher: Model, pictures: Images, tmp_path: Path) -> None:
    config = replace(BRIEF, target="matching", steps=4, num=NUM)
    with pytest.raises(ZeroDivisionError):
        made(teacher, config, tmp_path, images=pictures, on_progress=lambda done, note: done == 2 and 1 / 0)
    with pytest.raises(KeyboardInterrupt):
        made(teacher, config, tmp_path, images=pictures, on_progress=interrupted)
    with pytest.raises(FewstepError, match="belongs to another run"):
        made(teacher, config, tmp_path, images=replace(pictures, x=pictures.x * 0.5))


def interrupted(done: int, note: str) -> None:
    if done:
        raise KeyboardInterrupt


# -- mistakes --------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"target": "lagrange"}, "unknown target of a flow map 'lagrange': did you mean lagrangian"),
    "first": ({"first": 1.5}, r"first, a share of each batch, lies in \[0, 1\], got 1.5"),
    "last": ({"last": -0.1}, r"last, a share of each batch, lies in \[0, 1\], got -0.1"),
    "anchor": ({"anchor": 2.0}, r"anchor, a share of each batch, lies in \[0, 1\]"),
    "slots": ({"slots": 1}, "slots"),
    "passes": ({"max_passes": 5}, "5 passes go through as many of the 4 slots: ask for fewer passes or more slots"),
    "states": ({"target": "trajectory", "states": "noised"}, "the target trajectory needs stored trajectories: leave states out, or use"),
    "preset": ({"target": "consistency", "last": 0.5}, "consistency is eulerian with last 1: leave last out, or name that target"),
    "loss": ({"loss": "l3"}, "unknown loss 'l3'"),
    "words": ({"states": "fresh"}, "unknown states of a flow map 'fresh'"),
    "bf16": ({"target": "lagrangian-jvp", "mixed_precision": "bf16"}, "lagrangian-jvp is differentiated forward, which mixed precision"),
    "nan": ({"guidance": float("nan")}, "guidance is a number, got nan"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_options_without_meaning_are_refused(mistake: str) -> None:
    changes, says = WRONG[mistake]
    with pytest.raises(FewstepError, match=says):
        replace(BRIEF, **changes)


def test_data_without_meaning_is_refused_before_any_work(teacher: Model, pictures: Images, whole: Any, tmp_path: Path) -> None:
    matching, out = replace(BRIEF, target="matching", num=NUM), tmp_path / "out"
    for config, given, says in (
        (BRIEF, {"images": pictures}, "the target trajectory learns from the teacher's trajectories: leave data out"),
        (matching, {}, "the target matching learns from pictures: pass images=..., .*--data"),
        (replace(matching, num=17), {"images": pictures}, "num changes nothing here, since nothing is learned from stored trajectories"),
        (matching, {"images": replace(pictures, labels=None)}, "teacher has labels 0 to 1, and squares has none or others"),
        (matching, {"images": replace(pictures, labels=pictures.labels + 1)}, "teacher has labels 0 to 1, and squares has none or others"),
        (matching, {"images": replace(pictures, x=pictures.x[..., :3])}, r"the images of squares have shape \(1, 4, 3\), those of teacher"),
        (BRIEF, {"features": lambda x: x}, "the method flow-map learns nothing from features: leave that out"),
    ):
        with pytest.raises(FewstepError, match=says):
            made(teacher, config, out, **given)
        assert not out.exists()
    with pytest.raises(FewstepError, match="the method kd learns nothing from images: leave that out"):
        distill(teacher, "kd", images=pictures)
    with pytest.raises(ModelError, match="student is a student, which is sampled as it is: name its teacher"):
        made(whole[1], BRIEF, out)


class Rounding(nn.Module):
    """A network that no derivative goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.Linear(1, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told = self.time_embedding(t[:, None].to(x.dtype)).reshape(x.shape)
        return (x + told).detach().numpy(force=True).astype("float32") + torch.zeros_like(x)


def test_a_network_that_cannot_be_differentiated_is_told_of_a_target_that_needs_none() -> None:
    model = Model(Rounding(), LAW, "sample", shape=(1, 4, 4))
    for target, other in (("lagrangian-jvp", ": use the target lagrangian"), ("eulerian-jvp", ", or use the target eulerian")):
        with pytest.raises(ModelError, match=f"the network cannot be .*{other}, which needs n"):
            made(model, replace(BRIEF, target=target))


# -- students that were made in memory -------------------------------------------------------------------------------

IN_MEMORY: dict[str, Any] = {
    "flow-map": BRIEF,
    "flow-map, told": replace(BRIEF, scales=(1.0, 3.0)),
    "flow-map, half": replace(BRIEF, half=True),
    "dsno": DistillConfig(slots=SLOTS, steps=2, batch=8, num=16, held_out=8, teacher_nfe=8),
    "guided": GuidedConfig(slots=SLOTS, steps=2, batch=8, held_out=8),
    "progressive": ProgressiveConfig(nfe=(2,), steps=2, batch=8, held_out=8),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("what", IN_MEMORY)
def test_a_student_made_in_memory_is_saved_whole(teacher: Model, tmp_path: Path, what: str) -> None:
    student = distill(teacher, what.partition(",")[0], config=IN_MEMORY[what])
    assert student is not None
    loaded = load_model(student.save(tmp_path / "kept"))
    assert loaded.fingerprint == student.fingerprint and loaded.tuned == student.tuned and loaded.num_jumps == student.num_jumps
    how = {"what": "unipc-2", "nfe": 3} if what == "guided" else {"nfe": 2}
    for scale in (1.0, 2.0) if student.scales else (1.0,):
        assert torch.equal(*(sample(one, seeds=range(3), guidance=scale, **how) for one in (student, loaded)))
    assert what == "progressive" or (tmp_path / "kept" / "README.md").read_text().startswith("# kept\n")
    with pytest.raises(ArtifactError, match="already holds a model, which would be lost"):
        student.save(tmp_path / "kept")


def test_a_flow_map_of_ones_own_code_is_not_saved(teacher: Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="teacher is a flow map of your own code, which makes it anew: save its network's weights"):
        replace(teacher, flow_map=FirstOrderMap(teacher)).save(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
