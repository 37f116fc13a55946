"""Distribution matching students: where they begin, what trains them, which weights are kept, and mistakes that are named."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.ring import Ring, ring_data, ring_model
from tests.own_networks import table_model
from tests.problems import LAW, diffusers_folder, tiny_folder, told_model
from torch import Tensor

import fewstep
from fewstep import EMConfig, FewstepError, MatchingConfig, Model, distill, load_model, sample
from fewstep.core.denoiser import Cond
from fewstep.evaluate.metrics.judge import Judge
from fewstep.learn.networks import loop
from fewstep.learn.networks.objectives.matching import MatchingObjective, generate
from fewstep.learn.networks.objectives.objective import Networks
from fewstep.models.flow_map import FirstOrderMap
from fewstep.models.networks.operator import OperatorForm, OperatorStudent
from fewstep.models.networks.temporal_unet import Mixing
from fewstep.models.problem import Problem
from fewstep.sampling.noise import seeded_noise

SMALL: dict[str, Any] = {"steps": 4, "batch": 4, "lr": 1e-2, "ema": 0.5, "held_out": 16, "measures": 2, "updates": 1, "before": 1}
DMD, EM = MatchingConfig(**SMALL), EMConfig(**SMALL, langevin=2)
LAST = 2  # of the measures of such a run
STORED: dict[str, Any] = {"num": 16, "teacher_nfe": 4}


class At:
    """A judge that finds the weights of one measure best, and remembers the samples of all."""

    identity = "a count"

    def __init__(self, best: int) -> None:
        self.best, self.seen = best, list[Tensor]()

    def __call__(self, samples: Tensor, requested: Tensor | None) -> dict[str, float | None]:
        self.seen.append(samples)
        figures = dict.fromkeys(("fd", "precision", "recall", "labels"))
        return {**figures, "value": float(len(self.seen) - 1 != self.best)}


class Says:
    """A judge that says the same of all samples."""

    identity = "a word"

    def __init__(self, figures: Any) -> None:
        self.figures = figures

    def __call__(self, samples: Tensor, requested: Tensor | None) -> Any:
        return self.figures


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny_folder(tmp_path_factory.mktemp("matching") / "teacher", 2, block_out_channels=(8,)))


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.of(torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1))


@pytest.fixture(scope="module")
def students(teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Students of regression, to begin with."""
    folder, common = tmp_path_factory.mktemp("students"), {**STORED, "steps": 2, "batch": 4, "held_out": 4}
    kd = distill(teacher, "kd", config=fewstep.DistillConfig(**common), out=folder / "kd")
    config = fewstep.FlowMapConfig(slots=2, max_passes=2, **common)
    flow_map = distill(teacher, "flow-map", config=config, out=folder / "flow-map")
    slots = distill(teacher, "slots", config=fewstep.DistillConfig(slots=2, **common))
    assert kd is not None and flow_map is not None and slots is not None
    return {"kd": kd, "flow-map": flow_map, "slots": slots}


def objective(teacher: Model, config: MatchingConfig = DMD, begin: Model | None = None, guidance: float = 1.0) -> MatchingObjective:
    return MatchingObjective(Problem(teacher, guidance), config, At(0), begin)


def made(teacher: Model, method: str, config: MatchingConfig, **options: Any) -> Model:
    student = distill(teacher, method, config=config, **{"judge": At(LAST), **options})
    assert student is not None
    return student


def weights(model: Model) -> dict[str, Tensor]:
    return model.network.state_dict()


def same(ours: Model, theirs: Model) -> bool:
    return all(torch.equal(value, weights(theirs)[name]) for name, value in weights(ours).items())


# -- where it begins -------------------------------------------------------------------------------------------------


def test_a_new_student_is_the_first_order_step_of_its_teacher(teacher: Model) -> None:
    one = objective(teacher, replace(DMD, start=3.0))
    t, z, cond = one.grid.t, seeded_noise(range(4), (1, 4, 4)), torch.tensor([0, 1, 0, 1])
    assert float(LAW.sigma(t[0])) == pytest.approx(3.0) and float(t[1]) == LAW.t_last
    with torch.no_grad():
        ours = generate(one.student(), z, cond)
        torch.testing.assert_close(ours, FirstOrderMap(teacher)(3.0 * z, t[0], t[1], cond), rtol=1e-5, atol=1e-6)
        alone = OperatorStudent(teacher.with_network(one.copied()), t, OperatorForm(anywhere=False, mixing=Mixing(form="none")))
        assert torch.equal(ours, alone.jump(float(LAW.sigma(t[0])) * z, t[0], t[1], cond))


@pytest.mark.parametrize("kind", ["kd", "flow-map"])
@pytest.mark.every(3)
def test_it_begins_with_a_student_of_regression(teacher: Model, students: dict[str, Model], kind: str) -> None:
    one = objective(teacher, begin=students[kind])
    z, cond = seeded_noise(range(3), (1, 4, 4)), torch.tensor([0, 1, 2]) % 2
    with torch.no_grad():
        ours = generate(one.student(), z, cond)
    theirs = sample(students[kind], nfe=1, seeds=range(3))
    assert float(one.grid.t[0]) == LAW.t_max
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["kd", "flow-map"])
@pytest.mark.every(2)
def test_its_student_is_saved_as_the_one_that_it_began_with(teacher: Model, students: dict[str, Model], tmp_path: Path, kind: str) -> None:
    before = {name: value.clone() for name, value in weights(students[kind]).items()}
    student = made(teacher, "dmd", DMD, begin=students[kind], out=tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.tuned is not None and (loaded.tuned.form, loaded.tuned.nfe) == ("matching", 1) and loaded.num_jumps == (1,)
    torch.testing.assert_close(sample(loaded, seeds=range(3)), sample(student, nfe=1, seeds=range(3)))
    assert type(loaded.network) is type(students[kind].network) and not same(student, students[kind])
    assert all(torch.equal(value, weights(students[kind])[name]) for name, value in before.items())
    assert "says nothing" not in (tmp_path / "out" / "README.md").read_text()
    for options in ({"nfe": 2}, {"nfe": 1, "x0": torch.zeros(1, 4, 4), "strength": 0.3}):
        with pytest.raises(FewstepError, match="between its own times only|makes one pass alone|start at pure noise"):
            sample(loaded, **{"what": "ddim", "seeds": range(2), **options} if "x0" not in options else {"seeds": range(2), **options})


def test_a_table_of_times_is_kept_to() -> None:
    model = table_model()
    one = objective(model)
    table = model.schedule.times
    assert table is not None and bool((one.grid.t[0] == table).any())
    t = one.levels(64, torch.Generator().manual_seed(0))
    assert bool(torch.isin(t, table).all()) and len(t.unique()) > 8


# -- what trains it --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_langevin_step_is_dmd_to_the_bit(teacher: Model) -> None:
    dmd = made(teacher, "dmd", DMD)
    assert same(dmd, made(teacher, "em", replace(EM, langevin=1, step_z=0.0)))
    assert not same(dmd, made(teacher, "em", replace(EM, langevin=1, step_z=0.3)))
    assert not same(dmd, made(teacher, "em", replace(EM, langevin=2, step_z=0.0)))


@pytest.mark.parametrize("config", [DMD, EM], ids=["dmd", "em"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_gradients_reach_the_network_in_training_alone(teacher: Model, config: MatchingConfig, guidance: float) -> None:
    one, model = objective(teacher, config, guidance=guidance), teacher.network
    student, draws = one.student().requires_grad_(True), loop.seeded(0, 0)
    one.fake.requires_grad_(True)
    with torch.no_grad():
        next(one.fake.parameters()).add_(0.1)  # it is the teacher at first, and moves nothing
    one.loss(Networks(student), one.batch(None, 4, draws), draws).backward()
    with_gradients = [value.grad is not None and bool(value.grad.any()) for value in student.parameters()]
    assert any(with_gradients)
    assert all(value.grad is None for network in (model, one.fake) for value in network.parameters())
    student.zero_grad(set_to_none=True)
    assert one.companion is not None
    one.companion.loss(student, one.fake, 4, draws).backward()
    assert any(value.grad is not None for value in one.fake.parameters())
    assert all(value.grad is None for network in (model, student) for value in network.parameters())


def test_the_target_is_the_guided_teacher_and_the_fake_sees_the_same_labels(teacher: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    one, seen = objective(teacher, guidance=2.0), list[tuple[str, Any]]()

    def spy(name: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
            answer = real(x, t, cond)
            seen.append((name, (x, t, cond, answer)))
            return answer

        return call

    rows = one._rows(4, loop.seeded(0, 0), 1)
    teacher_at, fake = one.problem.teacher, one.denoiser_of(one.fake)
    monkeypatch.setitem(one.problem.__dict__, "teacher", spy("teacher", teacher_at))
    monkeypatch.setattr(one, "denoiser_of", lambda network: spy("fake", fake))
    one.loss(Networks(one.student().requires_grad_(True)), one.batch(None, 4, loop.seeded(0, 0)), loop.seeded(0, 0))
    (first, theirs), (second, ours) = seen
    assert (first, second) == ("teacher", "fake")
    assert all(torch.equal(a, b) for a, b in zip(theirs[:3], ours[:3], strict=True)) and torch.equal(theirs[2], rows.cond)
    torch.testing.assert_close(theirs[3], teacher.guided(2.0)(*theirs[:3]))


@pytest.mark.slow
def test_with_pairs_alone_it_is_knowledge_distillation(teacher: Model) -> None:
    """A weight of the pairs that leaves nothing else, on the same trajectories; the noises are those of held-out ones."""
    common = {**STORED, "steps": 60, "batch": 8, "lr": 3e-3, "ema": 0.9, "held_out": 4}
    kd = distill(teacher, "kd", config=fewstep.DistillConfig(**common))
    ours = made(teacher, "dmd", MatchingConfig(**common, start=20.0, pair=1e4, measures=1, updates=1, before=0), judge=At(1))
    assert kd is not None
    gap = sample(ours, nfe=1, seeds=range(64)) - sample(kd, nfe=1, seeds=range(64))
    start = sample(made(teacher, "dmd", replace(DMD, start=20.0, steps=1), judge=At(0)), nfe=1, seeds=range(64))
    moved = start - sample(kd, nfe=1, seeds=range(64))
    assert float(gap.square().mean().sqrt()) < 0.01 < float(moved.square().mean().sqrt())


# -- which weights are kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [0, 1, 2])
@pytest.mark.every(3)
def test_the_weights_that_the_judge_finds_best_are_kept(teacher: Model, best: int) -> None:
    judge = At(best)
    student = made(teacher, "dmd", DMD, judge=judge)
    assert student.card["kept"]["step"] == 2 * best and [one["step"] for one in student.card["scores"]] == [0, 2, 4]
    one = objective(teacher)
    with torch.no_grad():
        again = torch.cat(one._samples(student.network))
    assert torch.equal(again, judge.seen[best])


@pytest.mark.slow
def test_the_fake_begins_as_the_teacher_and_follows(teacher: Model, judge: Judge) -> None:
    student = made(teacher, "dmd", replace(DMD, steps=30, updates=2, before=10), judge=judge)
    first, *_, last = student.card["scores"]
    assert first["fake"] == pytest.approx(first["teacher"]) and last["fake"] < last["teacher"]


def test_a_fake_that_does_not_follow_is_warned_of_once(teacher: Model, caplog: pytest.LogCaptureFixture) -> None:
    one = objective(teacher)
    behind, ahead = {"fake": 1.2, "teacher": 1.0}, {"fake": 0.9, "teacher": 1.0}
    with caplog.at_level(logging.WARNING, "fewstep"):
        one._check_fake(behind)  # the first measure, before any training
        one.scores.scores = [{}, {}]
        one._check_fake(ahead)
        assert not caplog.records
        one._check_fake(behind)
        one._check_fake(behind)
    (said,) = caplog.records
    assert "the fake does not follow the generator" in said.getMessage() and "raise updates (now 1)" in said.getMessage()


@pytest.mark.slow
def test_the_card_says_what_an_error_to_the_teacher_is_worth(teacher: Model, judge: Judge, tmp_path: Path) -> None:
    student = made(teacher, "em", EM, judge=judge, out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "EM distillation, 2 Langevin steps" in card and "says nothing: the student may send a noise to any picture" in card
    assert student.card["passes"].keys() == {1} and judge.identity in card and "recall" in card
    assert not list((tmp_path / "out").rglob("checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise", "table"])
def test_networks_of_other_kinds_are_distilled(tmp_path: Path, kind: str) -> None:
    model = table_model() if kind == "table" else load_model(diffusers_folder(tmp_path / "teacher"))
    student = made(model, "em", replace(EM, lr=1e-3), out=None)
    images = sample(student, nfe=1, seeds=range(2))
    assert images.shape == (2, *model.need_shape()) and bool(images.isfinite().all())


@pytest.mark.slow
def test_a_half_finished_run_of_other_options_is_refused(teacher: Model, judge: Judge, tmp_path: Path) -> None:
    def stop(done: int, note: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(teacher, "em", EM, judge=judge, out=tmp_path / "out", on_progress=stop)
    for changes in ({"judge": At(0)}, {"config": replace(EM, step_z=0.1)}, {"config": replace(EM, updates=2)}):
        with pytest.raises(FewstepError, match="belongs to another run"):
            distill(teacher, "em", **{"config": EM, "judge": judge, "out": tmp_path / "out", **changes})
    assert same(made(teacher, "em", EM, judge=judge, out=tmp_path / "out"), made(teacher, "em", EM, judge=judge))


# -- six modes on a ring ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dmd", "em"])
def test_all_modes_of_a_ring_are_covered_alike(method: str) -> None:
    """In some seconds: no mode's mass is off by more than .04, most points near a mode, and a fake that follows."""
    model, data = ring_model(), ring_data()
    ring = model.network
    assert isinstance(ring, Ring)
    common: dict[str, Any] = {"steps": 800, "batch": 128, "lr": 2e-3, "held_out": 512, "measures": 8, "start": 1.0, "p_mean": -1.0}
    config = MatchingConfig(**common) if method == "dmd" else EMConfig(**common)
    student = made(model, method, config, judge=Judge.of(data))
    share, near = ring.counted(sample(student, nfe=1, seeds=range(4000)))
    first, chosen, last = student.card["scores"][0], student.card["kept"], student.card["scores"][-1]
    assert float((share - 1 / 6).abs().max()) < 0.04 and near > 0.75
    assert chosen["value"] < 0.05 * first["value"]  # a Frechet distance sees no modes, so it chooses any weights that are good
    assert last["precision"] > 0.75 and last["recall"] > 0.8
    assert chosen["fake"] < 1.05 * chosen["teacher"]


# -- mistakes --------------------------------------------------------------------------------------------------------


CONFIGS: dict[str, tuple[Callable[[], object], str]] = {
    "langevin": (lambda: EMConfig(langevin=0), "langevin is at least 1, got 0"),
    "step e": (lambda: EMConfig(step_e=0.0), "step_e lies in \\(0, 1\\], step_z in \\[0, 1\\], got 0.0 and 0.05"),
    "step z": (lambda: EMConfig(step_z=1.5), "step_z in \\[0, 1\\], got 0.4 and 1.5"),
    "start": (lambda: MatchingConfig(start=-1.0), "start is a noise level sigma/alpha, a positive number, got -1.0"),
    "updates": (lambda: MatchingConfig(updates=0), "updates is at least 1, got 0"),
    "many updates": (lambda: MatchingConfig(before=5000), "updates and before are 4000 together at most, got 2 and 5000"),
    "pair": (lambda: MatchingConfig(pair=-1.0), "pair, the weight of the regression onto stored pairs, is not negative, got -1.0"),
    "num": (lambda: MatchingConfig(num=5), "num changes nothing here"),
    "dropout": (lambda: MatchingConfig(dropout=0.1), "a generator with dropout makes other pictures at each call"),
    "levels": (lambda: MatchingConfig(p_std=0.0), "log noise levels have a mean .* and a positive deviation"),
    "far levels": (lambda: MatchingConfig(p_mean=1e300), "between -10 and 10 .*, got 1e\\+300 and 1.6"),
    "wide levels": (lambda: MatchingConfig(p_std=1e300), "up to 5, got -0.6 and 1e\\+300"),
    "weight decay": (lambda: MatchingConfig(weight_decay=-1.0), "weight_decay is a finite number, not negative, got -1.0"),
    "fake end": (lambda: MatchingConfig(fake_end=0.0), "lies in \\(0, 1\\], got 0.0"),
    "measures": (lambda: MatchingConfig(measures=0), "measures is at least 1, got 0"),
}


@pytest.mark.parametrize("mistake", CONFIGS)
def test_options_without_meaning_are_refused(mistake: str) -> None:
    make, says = CONFIGS[mistake]
    with pytest.raises(FewstepError, match=says):
        make()


def test_what_it_cannot_learn_from_is_refused_before_any_work(
    teacher: Model, judge: Judge, students: dict[str, Model], tmp_path: Path
) -> None:
    other = load_model(tiny_folder(tmp_path / "other", 2, seed=1, block_out_channels=(8,)))
    paired = replace(DMD, pair=1.0, **STORED, held_out=4)
    grid = fewstep.make_grid("angle", LAW, 2)
    stored = fewstep.generate_trajectories(
        teacher, grid, tmp_path / "stored", config=fewstep.TrajectoryConfig(num=20, nfe=4, seed=6_000_000)
    )
    level = float(LAW.sigma(grid.t[1]))
    told = told_model(teacher)
    wrong: dict[str, tuple[Model, dict[str, Any]]] = {
        "pass judge=, as fewstep.evaluate.metrics.judge.Judge.of_model": (teacher, {"judge": None}),
        "judge measures samples, as": (teacher, {"judge": print}),
        "start is a noise level between 0.05 and 20 of the model's noise law, got 100": (teacher, {"config": replace(DMD, start=100.0)}),
        "start is a noise level between": (teacher, {"config": replace(DMD, start=0.01)}),
        r"the level exp\(p_mean\), .*, is a noise level between 0.05 and 20 .*, got 54.5982": (
            teacher,
            {"config": replace(DMD, p_mean=4.0)},
        ),
        "config is a EMConfig, of another method than dmd: pass a MatchingConfig, or name its method": (teacher, {"config": EM}),
        "starts where it was made to: leave start out": (teacher, {"config": replace(DMD, start=2.0), "begin": students["kd"]}),
        "has 2 slots, and distribution matching one: begin with a student of kd": (teacher, {"begin": students["slots"]}),
        "is no student of one pass to begin with": (teacher, {"begin": other}),
        "begin with one of the same teacher": (other, {"begin": students["kd"]}),
        "at guidance 1, not of teacher .* at 2": (teacher, {"begin": students["flow-map"], "guidance": 2}),
        "is a student, which is sampled as it is: name its teacher": (students["kd"], {}),
        "is told its guidance scale, and dmd makes a student of one scale": (told, {}),
        "learns nothing from images": (teacher, {"images": object()}),
        "learns from no stored trajectories with these options": (teacher, {"trajectories": stored}),
        "were not stored at t = 2.5": (teacher, {"trajectories": stored, "config": paired}),
        "begin at t = 20, the generator at .*: leave them out": (teacher, {"trajectories": stored, "config": replace(paired, start=level)}),
    }
    for says, (model, options) in wrong.items():
        with pytest.raises(FewstepError, match=says):
            distill(model, "dmd", **{"config": DMD, "judge": judge, "out": tmp_path / "out", **options})
        assert not (tmp_path / "out").exists(), says
    with pytest.raises(FewstepError, match="the method kd learns nothing from judge"):
        distill(teacher, "kd", judge=judge)


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({}, "a judge returns numbers by name, with a value that is to be least"),
        (0.5, "a judge returns numbers by name"),
        ({"value": "good"}, "a judge returns plain numbers by name, or None"),
        ({"value": torch.zeros(2)}, "a judge returns plain numbers by name, or None"),
    ],
)
def test_a_judge_that_says_no_numbers_is_refused_before_training(teacher: Model, figures: Any, says: str) -> None:
    with pytest.raises(FewstepError, match=says):
        made(teacher, "dmd", DMD, judge=Says(figures))


def test_a_judge_may_say_its_numbers_as_tensors(teacher: Model, tmp_path: Path) -> None:
    student = made(teacher, "dmd", DMD, judge=Says({"value": torch.tensor(0.5), "fd": torch.tensor(2.0)}), out=tmp_path / "student")
    assert student.card["kept"]["value"] == 0.5 and '"fd": 2.0' in (tmp_path / "student" / "history.json").read_text()


def test_samples_that_are_not_finite_say_how_to_mend_them(teacher: Model) -> None:
    config = replace(DMD, weight_decay=1e37, measures=4)
    with pytest.raises(FewstepError, match="the generator's samples of held-out noises are not finite: lower lr or weight_decay"):
        made(teacher, "dmd", config, judge=Says({"value": 0.5}))
