"""Distilling guidance and halving steps: exact targets, fresh trajectories, runs that survive kills, and mistakes that are named."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.own_networks import timed_model
from tests.problems import LAW, diffusers_folder, tiny_folder, told_model, toy
from torch import Tensor

import fewstep
from fewstep import (
    ArtifactError,
    DiscreteVP,
    FewstepError,
    GaussianDenoiser,
    GridError,
    Model,
    ModelError,
    SolverError,
    VPLinear,
    load_model,
    make_grid,
    sample,
)
from fewstep.core.schedule import NoiseSchedule, RectifiedFlow, VarianceExploding
from fewstep.data.images import Images
from fewstep.evaluate.rows import read_results
from fewstep.inverse.measurements import Average
from fewstep.learn.networks import loop
from fewstep.learn.networks.distill import DistillConfig as KdConfig
from fewstep.learn.networks.distill import FlowMapConfig, GuidedConfig, ProgressiveConfig, distill
from fewstep.learn.networks.loop import LoopConfig
from fewstep.learn.networks.objectives import OBJECTIVES
from fewstep.learn.networks.objectives import config as config_module
from fewstep.learn.networks.objectives.flow_map_targets import composed, jump
from fewstep.learn.networks.objectives.guided import GuidedObjective
from fewstep.learn.networks.objectives.objective import Networks
from fewstep.learn.networks.objectives.progressive import ABOVE, ProgressiveObjective
from fewstep.learn.networks.objectives.rollout import Rollout
from fewstep.models.flow_map import FirstOrderMap
from fewstep.models.generate import best_sampler, sampler_for
from fewstep.models.guidance import classifier_free
from fewstep.models.guided import GuidedForm
from fewstep.models.networks.operator import OperatorForm
from fewstep.models.networks.temporal_unet import Mixing
from fewstep.models.problem import Problem
from fewstep.solvers import DDIM

GUIDED = GuidedConfig(slots=4, steps=7, batch=4, lr=1e-2, ema=0.5, held_out=4)
STORED = replace(GUIDED, states="teacher", num=8, teacher_nfe=4)
HALVED = ProgressiveConfig(nfe=(2, 1), steps=7, batch=4, lr=1e-2, ema=0.5, held_out=4)
LAWS: list[NoiseSchedule] = [VPLinear(), VarianceExploding(0.02, 20.0), RectifiedFlow(), DiscreteVP.scaled_linear()]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny_folder(tmp_path_factory.mktemp("halved") / "teacher", 2, block_out_channels=(8,)))


@pytest.fixture(scope="module")
def told(teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(told_model(teacher).save(tmp_path_factory.mktemp("halved") / "student"))


# -- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_the_target_leads_to_the_end_of_two_steps(law: NoiseSchedule) -> None:
    """Everywhere on the range, both ends of it included."""
    draws, t = torch.Generator().manual_seed(0), make_grid("angle", law, 16).t
    x, first, second = torch.randn(3, 8, 5, generator=draws, dtype=torch.float64)
    s, v, to = t[0:15:2], t[1:16:2], t[2:17:2]
    assert (float(s[0]), float(to[-1])) == (law.t_max, law.t_last)
    middle = jump(law, x, first, s, v)
    wanted = jump(law, middle, second, v, to)
    torch.testing.assert_close(jump(law, x, composed(law, first, second, s, v, to), s, to), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("law", LAWS[:3], ids=lambda law: type(law).__name__)
def test_exact_halving_leads_in_one_step_where_64_lead(law: NoiseSchedule) -> None:
    exact = GaussianDenoiser(law, torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([0.7, 0.2], dtype=torch.float64))
    t, x = make_grid("angle", law, 64).t, torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def answer(i: int, stride: int, x: Tensor) -> Tensor:
        """Return the answer at ``t_i`` of the student whose steps are this long."""
        if stride == 1:
            return exact(x, t[i])
        half = stride // 2
        first = answer(i, half, x)
        second = answer(i + half, half, jump(law, x, first, t[i], t[i + half]))
        return composed(law, first, second, t[i], t[i + half], t[i + stride])

    start = x * law.sigma(t[0])
    many = sample(exact, DDIM(), start, grid=make_grid("angle", law, 64), nfe=64)
    torch.testing.assert_close(jump(law, start, answer(0, 64, start), t[0], t[64]), many, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of", ["teacher", "told"])
def test_a_student_that_answers_the_target_has_no_loss(request: pytest.FixtureRequest, of: str) -> None:
    model = request.getfixturevalue(of)
    problem = Problem(model)
    objective = ProgressiveObjective(problem, replace(HALVED, nfe=(2,)))

    class Exact(torch.nn.Module):
        """Answers the composition of two answers of the present model, at the scale that it is told."""

        def forward(self, rows: Any) -> Tensor:
            return objective._two_steps(rows)[1]

    exact = Exact()
    objective._told = lambda network, scale: (
        model.guided(scale) if network is None else lambda x, t, cond: exact(objective._rollout.present.now)
    )
    for step in (0, 1, 5):
        generator = loop.seeded(HALVED.seed, step)
        batch = objective.batch(None, 4, generator)
        assert float(objective.loss(Networks(exact), batch, generator)) == pytest.approx(0, abs=1e-6)


def test_guided_targets_are_the_teachers_at_the_scale_of_each_row(teacher: Model) -> None:
    for states in ("fresh", "guided", "teacher", "noised", "data"):
        pictures = Images(torch.rand(20, 1, 4, 4) * 2 - 1, torch.arange(20) % 2, 16, "squares") if states == "data" else None
        objective = GuidedObjective(Problem(teacher), replace(GUIDED, states=states, batch=6), pictures)
        objective._told = lambda network, scale, objective=objective: objective.problem.teacher_at(scale)
        generator = loop.seeded(GUIDED.seed, 3)
        drawn = torch.randn(6, 5, 1, 4, 4), torch.arange(6) % 2
        batch = fewstep.learn.teacher.batches.Batch(*drawn) if states in ("teacher", "noised") else objective.batch(None, 6, generator)
        assert float(objective.loss(Networks(torch.nn.Identity()), batch, generator)) == 0, states


def test_errors_are_measured_in_the_networks_output_or_in_the_picture(teacher: Model) -> None:
    """An error of 0.1 in the picture is 0.1 by weights ``equal``, and 0.1 / b by ``output``."""
    found = {}
    for weights in ("equal", "output"):
        objective = GuidedObjective(Problem(teacher), replace(GUIDED, weights=weights, loss="l2", states="noised", batch=64))
        wrong = lambda scale, objective=objective: lambda x, t, cond: objective.problem.teacher_at(scale)(x, t, cond) + 0.1  # noqa: E731
        objective._told = lambda network, scale, wrong=wrong: wrong(scale)
        drawn = fewstep.learn.teacher.batches.Batch(torch.randn(64, 5, 1, 4, 4), torch.arange(64) % 2)
        found[weights] = float(objective.loss(Networks(torch.nn.Identity()), drawn, loop.seeded(GUIDED.seed, 3)))
        i = objective.rows(drawn, loop.seeded(GUIDED.seed, 3)).i
        b = objective.output.coefficients(objective.nodes.alpha[i], objective.nodes.sigma[i])[1].double()
    assert found["equal"] == pytest.approx(0.01, rel=1e-4)
    assert found["output"] == pytest.approx(float((0.1 / b).square().mean()), rel=1e-3)


# -- fresh trajectories ----------------------------------------------------------------------------------------------


def rolled(steps: int, begin: int = 0, blocks: int = 1) -> Any:
    problem = Problem(toy(classes=2))
    nodes = fewstep.core.tableau.Nodes.at(LAW, make_grid("angle", LAW, 3).t)

    def move(rows: Any) -> tuple[Tensor, Tensor]:
        x0 = problem.teacher_at(rows.scale)(rows.x, nodes.t[rows.i], rows.cond)
        return jump(LAW, rows.x, x0, nodes.t[rows.i], nodes.t[rows.i + 1]), x0

    rollout = Rollout(problem, nodes, 5, (1.0, 4.0), move, blocks=blocks)
    seen = []
    for step in range(begin, steps):
        rows = rollout.at(step)
        seen.append(rows)
        rollout.advance(*move(rows))
    return seen


def test_a_rollout_that_continues_has_the_trajectories_of_one_that_was_not_stopped() -> None:
    whole = rolled(8)
    for begin in (1, 4, 7):
        for ours, theirs in zip(rolled(8, begin), whole[begin:], strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert {int(i) for rows in whole for i in rows.i} == {0, 1, 2}
    for before, after in zip(whole, whole[1:], strict=False):
        goes_on = after.i > 0
        assert torch.equal(after.scale[goes_on], before.scale[goes_on]) and torch.equal(after.cond[goes_on], before.cond[goes_on])
        assert bool((after.i[goes_on] == before.i[goes_on] + 1).all()) and bool((after.before[~goes_on] == 0).all())


def test_blocks_of_a_rollout_take_turns() -> None:
    whole = rolled(8, blocks=2)
    for begin in (1, 4):
        for ours, theirs in zip(rolled(8, begin, blocks=2), whole[begin:], strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    for before, between, after in zip(whole, whole[1:], whole[2:], strict=False):
        goes_on = after.i > 0
        assert torch.equal(after.scale[goes_on], before.scale[goes_on]) and not bool((between.scale == before.scale).any())


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A checkpoint every 3 steps."""
    monkeypatch.setattr(config_module, "LoopConfig", partial(LoopConfig, checkpoint_every=3))
    yield


def weights(model: Model | None) -> dict[str, Tensor]:
    assert model is not None
    return model.network.state_dict()


def same(ours: Model | None, theirs: Model | None) -> bool:
    return all(torch.equal(value, weights(theirs)[name]) for name, value in weights(ours).items())


RUNS: dict[str, tuple[str, Any]] = {
    "guided": ("guided", GUIDED),
    "guided of stored states": ("guided", STORED),
    "progressive, told": ("progressive", replace(HALVED, nfe=(2,))),
    "progressive": ("progressive", replace(HALVED, nfe=(2,))),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_killed_run_continues_to_the_same_bits(teacher: Model, told: Model, small_parts: None, tmp_path: Path, run: str) -> None:
    method, config = RUNS[run]
    model = told if run.endswith("told") else teacher
    whole = distill(model, method, config=config, out=tmp_path / "whole")

    def kill(step: int, note: str) -> None:
        if step == 5 and note.startswith("loss"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        distill(model, method, config=config, out=tmp_path / "killed", on_progress=kill)
    seen = list[int]()
    again = distill(
        model, method, config=config, out=tmp_path / "killed", on_progress=lambda step, note: note.startswith("loss") and seen.append(step)
    )
    assert same(again, whole) and same(load_model(tmp_path / "killed"), whole) and again.fingerprint == whole.fingerprint
    assert min(seen) == 4 and whole.fingerprint != model.fingerprint
    assert same(distill(model, method, config=config), whole)  # in memory
    with pytest.raises(FewstepError, match="already holds a finished student"):
        distill(model, method, config=config, out=tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("of", ["told", "teacher"])
def test_steps_are_halved_again_and_again(request: pytest.FixtureRequest, tmp_path: Path, of: str) -> None:
    """A run that is killed between two students goes on with the second."""
    model = request.getfixturevalue(of)

    def kill(step: int, note: str) -> None:
        if step == HALVED.steps + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(model, "progressive", config=HALVED, out=tmp_path / "out", on_progress=kill)
    between = load_model(tmp_path / "out" / "steps" / "02")
    made, kept = distill(model, "progressive", config=HALVED, out=tmp_path / "out"), distill(model, "progressive", config=HALVED)
    assert same(made, kept) and made.scales == model.scales
    assert f"- teacher: {model.name} in 2 steps" in (tmp_path / "out" / "README.md").read_text()
    if model.scales is not None:  # its figures are the distance to the two steps that were halved
        held = [ABOVE + k for k in range(HALVED.held_out)]
        one, two = (sample(student, seeds=held, guidance=2.0) for student in (made, between))
        assert made.card["ends"]["2"] == pytest.approx(float((one - two).double().square().mean().sqrt()), rel=1e-4)
    for one, steps in ((between, 2), (made, 1)):
        tuned = one.tuned
        assert tuned is not None and (tuned.nfe, tuned.solver, tuned.form) == (steps, "ddim", "progressive")
        assert tuned.guidance == (None if model.scales else 1.0)
        pictures = sample(one, seeds=range(3))
        assert torch.equal(pictures, sample(one, nfe=steps, seeds=range(3)))
        assert model.scales is None or float((sample(one, seeds=range(3), guidance=3) - pictures).abs().max()) > 1e-4
        assert "2 first-order steps" in (tmp_path / "out/steps/02/README.md").read_text() or model.scales
        own = make_grid("angle", model.schedule, steps)
        assert torch.equal(pictures, sample(one, "ddim", nfe=steps, grid=own, seeds=range(3)))
        for other in ({"what": "unipc-2", "nfe": 8}, {"what": "ddim", "nfe": 3, "grid": "karras"}, {"what": "ddim", "nfe": 5}):
            with pytest.raises(SolverError, match=f"was taught its own {steps} steps? of ddim alone, at the times .*: leave solver"):
                sample(one, seeds=[0], **other)
        with pytest.raises(GridError, match=f"makes {steps} pass(es)?, not 3"):
            sample(one, "ddim", nfe=3, seeds=[0], grid="optimized")
        if model.scales is None:
            with pytest.raises(ModelError, match="is a student: its guidance is in its weights; use guidance 1"):
                sample(one, seeds=[0], guidance=2.0)
    (tmp_path / "new").mkdir()
    (tmp_path / "out" / "steps").rename(tmp_path / "new" / "steps")
    for other, config in ((model, replace(HALVED, lr=1e-3)), (made, HALVED)):
        with pytest.raises(ArtifactError, match="holds a student of another model or with other options: remove it, or use another"):
            distill(other, "progressive", config=config, out=tmp_path / "new")


@pytest.mark.slow
def test_steps_of_a_guided_teacher_are_halved_at_its_guidance(teacher: Model) -> None:
    made = distill(teacher, "progressive", config=HALVED, guidance=2)
    assert made is not None and made.tuned is not None and (made.tuned.guidance, made.tuned.nfe) == (2.0, 1)
    assert not same(made, distill(teacher, "progressive", config=HALVED))
    with pytest.raises(ModelError, match="cannot be guided"):
        distill(replace(teacher, null_label=None), "progressive", config=HALVED, guidance=2)


@pytest.mark.slow
def test_a_halved_student_is_halved_along_its_own_steps_alone(teacher: Model, told: Model) -> None:
    for model in (teacher, told):
        four = distill(model, "progressive", config=replace(HALVED, nfe=(4,)))
        assert four is not None
        two = distill(four, "progressive", config=replace(HALVED, nfe=(2,)))
        assert two is not None and two.tuned is not None and two.tuned.nfe == 2
        for student, changes, mend in (
            (four, {"nfe": (2,), "grid": "karras"}, "halve those, as nfe=2 on their grid"),
            (two, {"nfe": (2,)}, "halve those, as nfe=1 on their grid"),
            (two, {"nfe": (4, 2)}, "halve those, as nfe=1 on their grid"),
        ):
            with pytest.raises(FewstepError, match=f"was taught steps of its own alone, .*: {mend}, or name its teacher"):
                distill(student, "progressive", config=replace(HALVED, **changes))


def test_a_halved_student_says_how_it_is_sampled(told: Model) -> None:
    """Nothing that is advised is refused."""
    student = distill(told, "progressive", config=replace(HALVED, nfe=(2,)))
    assert student is not None
    with pytest.raises(SolverError, match="was taught its own 2 steps alone, not 4: leave nfe out, or sample its teacher"):
        sample(student, nfe=4, seeds=[0])
    with pytest.raises(GridError, match="own 2 steps of ddim alone, not unipc-2: leave --solver and --grid out, or sample its teacher"):
        student.optimized("unipc-2", 2)
    student.network.half()
    with pytest.raises(ArtifactError, match="the optimized grids it carries were made for other weights or another dtype of .*: put these"):
        sample(student, seeds=[0])


def test_more_than_half_is_not_left_out(teacher: Model, tmp_path: Path) -> None:
    for nfe in ((2,), (2, 1)):
        with pytest.raises(FewstepError, match=r"half of start=8 steps is 4, not 2: say nfe=\(4, 2\), which .*, or start=4"):
            distill(teacher, "progressive", config=replace(HALVED, nfe=nfe, start=8), out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", ["progressive", "flow-map"])
def test_a_folder_has_runs_of_one_kind(teacher: Model, tmp_path: Path, first: str) -> None:
    """What a killed run left is no part of another student."""
    methods: dict[str, tuple[str, Any, str]] = {
        "progressive": ("flow-map", FlowMapConfig(slots=4, steps=2, batch=4, num=4, held_out=4, teacher_nfe=4, max_passes=4), "in steps:"),
        "flow-map": ("progressive", HALVED, "in work:"),
    }
    second, config, says = methods[first]
    (tmp_path / "out" / {"progressive": "steps/02", "flow-map": "work"}[first]).mkdir(parents=True)
    (tmp_path / "out" / {"progressive": "steps/02", "flow-map": "work"}[first] / "curve.json").write_text("{}")
    with pytest.raises(FewstepError, match=f"holds an unfinished run of another kind, {says} continue that by its own command, remove"):
        distill(teacher, second, config=config, out=tmp_path / "out")


def test_what_means_nothing_between_its_own_steps_is_not_asked(teacher: Model, told: Model, tmp_path: Path) -> None:
    """Of a halved student: its answers at other times are learned from by nothing, and no other tableau runs."""
    learn: dict[str, Callable[[Model], Any]] = {
        "fit": lambda model: fewstep.fit(model, nfe=2, out=tmp_path / "made"),
        "calibrate": lambda model: fewstep.calibrate(model, out=tmp_path / "made"),
        "unguided": lambda model: fewstep.calibrate(model, unguided=True),
        "optimize": lambda model: fewstep.optimize(model, "unipc-2", nfe=2, out=tmp_path / "made"),
        "trajectories": lambda model: fewstep.generate_trajectories(model, make_grid("angle", model.schedule, 2), tmp_path / "made"),
        "finetune": lambda model: fewstep.finetune(model, nfe=2, out=tmp_path / "made"),
        "guided": lambda model: distill(model, "flow-map", out=tmp_path / "made"),
        "restore": lambda model: fewstep.restore(model, Average(2), torch.zeros(1, 2, 2), 0.1, seeds=[0]),
    }
    for model in (teacher, told):
        student = distill(model, "progressive", config=replace(HALVED, nfe=(2,)))
        assert student is not None
        for name, ask in learn.items():
            if name == "finetune" and model is told:
                continue  # which is refused for its scales before
            with pytest.raises(ModelError, match="was made for 2 steps of ddim alone, .* answers at other times mean nothing: sample it"):
                ask(student)
            assert not (tmp_path / "made").exists(), name
        x, own = torch.zeros(1, 1, 4, 4), best_sampler(student).tableau
        assert len(list(fewstep.steps(student.guided(student.default_guidance), own, x, torch.tensor([0])))) == 2
        with pytest.raises(SolverError, match="was taught its own 2 steps of ddim alone, at the times"):
            next(fewstep.steps(student, sampler_for(model, "ddim", nfe=2, grid="karras").tableau, x, torch.tensor([0])))


@pytest.mark.slow
def test_training_lowers_the_error_of_a_call(teacher: Model) -> None:
    before, after = (
        distill(teacher, "guided", config=replace(GUIDED, steps=steps, batch=16, ema=0.9), on_progress=None) for steps in (1, 300)
    )
    assert before is not None and after is not None
    assert after.card["calls"]["4"][0] < 0.8 * before.card["calls"]["4"][0]


# -- mistakes --------------------------------------------------------------------------------------------------------


def pictures(labels: bool = True) -> Images:
    return Images(torch.rand(20, 1, 4, 4) * 2 - 1, torch.arange(20) % 2 if labels else None, 16, "squares")


def of_dtype(model: Model, dtype: torch.dtype) -> Model:
    network: Any = copy.deepcopy(model.network)
    return model.with_network(network.to(dtype))


MISTAKES: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "no-null-label": (lambda model: replace(model, null_label=None), "guided", {}, "no null label: there is nothing to distil"),
    "data-left-out": (lambda model: model, "guided", {"config": replace(GUIDED, states="data")}, r"pass images=... \(--data\)"),
    "data-not-taken": (lambda model: model, "guided", {"images": pictures()}, "the states fresh need no pictures: leave data out"),
    "no-labels": (
        lambda model: model,
        "guided",
        {"config": replace(GUIDED, states="data"), "images": pictures(labels=False)},
        "squares has none|no labels",
    ),
    "wrapped": (
        lambda model: classifier_free(model, 2.0, torch.tensor(2)),
        "guided",
        {},
        "a Wrapped does not know the shape of its samples: make a Model",
    ),
    "function": (lambda model: toy(classes=2), "guided", {}, "is a function, which cannot be trained"),
    "half": (lambda model: of_dtype(model, torch.float16), "guided", {}, "has weights in float16, in which the small steps"),
    "bfloat16": (lambda model: of_dtype(model, torch.bfloat16), "progressive", {}, r"make them float32, as by model.network.float\(\)"),
    "student": (lambda model: replace(model, flow_map=FirstOrderMap(model)), "guided", {}, "is a student, which is sampled as it is"),
    "begin": (lambda model: model, "progressive", {"begin": 1}, "leave begin and trajectories out"),
    "features": (lambda model: model, "guided", {"features": torch.nn.Identity()}, "learns nothing from features: leave that out"),
    "progressive-pictures": (lambda model: model, "progressive", {"images": pictures()}, "learns nothing from images: leave that out"),
    "other-config": (lambda model: model, "guided", {"config": FlowMapConfig()}, "config is a GuidedConfig"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(teacher: Model, tmp_path: Path, mistake: str) -> None:
    change, method, given, says = MISTAKES[mistake]
    config = {"guided": GUIDED, "progressive": HALVED}[method]
    if mistake == "begin":
        given = {"begin": teacher}
    with pytest.raises(FewstepError, match=says):
        distill(change(teacher), method, **{"config": config, "out": tmp_path / "out", **given})
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("nfe", [(), (3, 2), (4, 1), (2, 4), (4, 2, 2), (0,), (1.5,), ("a",), 0])
def test_numbers_that_do_not_halve_are_refused(nfe: Any) -> None:
    with pytest.raises(FewstepError, match=r"halves the number of steps, as nfe=\(4, 2, 1\) from start=8"):
        ProgressiveConfig(nfe=nfe)
    for start in (3, 4, 12):
        with pytest.raises(FewstepError, match="halves the number of steps"):
            ProgressiveConfig(nfe=(4, 2), start=start)
    assert ProgressiveConfig(nfe=(4, 2), start=16).begins == 16 and ProgressiveConfig(nfe=4).nfe == (4,)


def test_trajectories_of_another_guidance_are_refused(teacher: Model, tmp_path: Path) -> None:
    config = fewstep.TrajectoryConfig(num=12, nfe=4, seed=GUIDED.seed, guidance=2.0)
    stored = fewstep.generate_trajectories(teacher, make_grid("angle", LAW, 4), tmp_path / "stored", config=config)
    with pytest.raises(ArtifactError, match="of guidance 2.0, but they are used with guidance 1.0"):
        distill(teacher, "guided", config=STORED, trajectories=stored)
    with pytest.raises(FewstepError, match="learns from no stored trajectories with these options: leave trajectories out"):
        distill(teacher, "guided", config=GUIDED, trajectories=stored)


@pytest.mark.parametrize("form", [{"features": 1}, {"w_min": "a"}, {"w_min": 4.0}, {"w_max": float("inf")}, {"features": 2.5}])
def test_a_form_without_meaning_is_refused(form: dict[str, Any]) -> None:
    with pytest.raises(FewstepError, match="features is|w_min is a number|guidance scales range from"):
        GuidedForm(**form)


def test_a_folder_of_diffusers_has_no_null_label(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be guided, since it has no null label"):
        distill(load_model(diffusers_folder(tmp_path / "model", 2)), "guided", config=GUIDED)


@pytest.mark.parametrize("option", [{"num": 8}, {"fresh": 0.5}, {"teacher_nfe": 8}])
def test_options_of_stored_trajectories_are_refused_where_there_are_none(option: dict[str, Any]) -> None:
    for config in (GUIDED, HALVED):
        with pytest.raises(FewstepError, match=f"{next(iter(option))} changes nothing here"):
            replace(config, **option)
    assert replace(GUIDED, states="noised", **option)


def test_a_student_of_few_steps_is_no_teacher() -> None:
    for method in ("flow-map", "guided", "kd"):
        with pytest.raises(
            ModelError, match="digits-edm-3step was made for 3 steps of ddim alone, .*: sample it as it is, or name its teacher, digits-edm"
        ):
            distill(load_model("digits-edm-3step"), method)


@pytest.mark.parametrize(("method", "config"), [("guided", GUIDED), ("progressive", replace(HALVED, nfe=(2,)))])
def test_a_loss_says_whose_fault_it_is(teacher: Model, method: str, config: Any, tmp_path: Path) -> None:
    """And names no folder that goes with the run."""
    model = replace(teacher, call=lambda network, x, time, cond: network(x, time, cond).sample * torch.nan, null_label=2)
    for of, says in ((model, "the answers of teacher itself are not finite, so check its weights and dtype$"), (teacher, "lower lr$")):
        with pytest.raises(ArtifactError, match=f"the loss is not finite at step [0-9]+: {says}"):
            distill(of, method, config=replace(config, lr=1e-3 if of is model else 1e30))


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 trains there")
@pytest.mark.parametrize("method", ["flow-map", "kd", "guided", "progressive"])
def test_a_precision_that_is_not_there_is_refused_before_any_work(teacher: Model, tmp_path: Path, method: str) -> None:
    config = OBJECTIVES[method].config(mixed_precision="fp16")
    with pytest.raises(FewstepError, match="no training in fp16 on this machine: it needs a GPU; use bf16, or no"):
        distill(teacher, method, config=config, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_commands_of_a_card_run(told: Model, tmp_path: Path) -> None:
    """Of a network of one's own they trust its code; what was made in Python has no command; a halved student has its own steps."""
    own = timed_model()
    config = KdConfig(slots=1, steps=1, batch=2, num=2, held_out=2, teacher_nfe=2, form=OperatorForm(mixing=Mixing("none")))
    for made in (distill(own, "kd", config=config, out=tmp_path / "own"), distill(own, "kd", config=config)):
        assert made is not None
        folder = tmp_path / "own" if made.folder is not None else made.save(tmp_path / "saved")
        card = (folder / "README.md").read_text()
        assert f"fewstep sample {folder.name} --trust --out runs/sample" in card and "- command:" not in card
    halved = distill(told, "progressive", config=replace(HALVED, nfe=(2,)))
    assert halved is not None
    assert "--solver" not in (halved.save(tmp_path / "halved") / "README.md").read_text()


def test_a_folder_without_what_is_asked_for_says_so(teacher: Model, tmp_path: Path) -> None:
    (tmp_path / "run" / "work").mkdir(parents=True)
    with pytest.raises(ModelError, match="run holds an unfinished run and no model yet: run the command that began it again, it continues"):
        load_model(tmp_path / "run")
    assert teacher.folder is not None
    with pytest.raises(ArtifactError, match="teacher holds no trajectories: name a folder that fewstep trajectories"):
        fewstep.Trajectories.load(teacher.folder)
    with pytest.raises(ArtifactError, match="teacher holds no rows of a benchmark: name a folder that fewstep bench"):
        read_results(teacher.folder / "results.json")
    student = distill(teacher, "flow-map", config=FlowMapConfig(slots=4, steps=1, batch=2, num=2, held_out=2, teacher_nfe=2, max_passes=2))
    assert student is not None
    (student.save(tmp_path / "student") / "flow-map.safetensors").unlink()
    with pytest.raises(ArtifactError, match="flow-map.safetensors: No such file, and flow-map.json is beside it; fetch or make it again"):
        load_model(tmp_path / "student")
