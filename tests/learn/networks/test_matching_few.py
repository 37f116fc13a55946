"""Students of several passes that match a distribution: their levels, the states that they learn from, how they are sampled, mistakes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.ring import Ring, ring_data, ring_model
from tests.learn.networks.test_matching import DMD, EM, LAST, At, made, same
from tests.own_networks import table_model
from tests.problems import LAW, tiny_folder
from torch import Tensor

import fewstep
from fewstep import EMConfig, FewstepError, MatchingConfig, Model, SolverError, distill, load_model, sample
from fewstep.evaluate.metrics.judge import Judge
from fewstep.learn.networks import loop
from fewstep.learn.networks.objectives.matching_few import FewPassObjective
from fewstep.learn.networks.objectives.matching_passes import even_levels
from fewstep.learn.networks.objectives.objective import Networks
from fewstep.models.problem import Problem
from fewstep.sampling.noise import seeded_noise

TWO, THREE = replace(DMD, passes=2), replace(DMD, passes=3, levels=(2.5, 1.0, 0.3))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny_folder(tmp_path_factory.mktemp("few") / "teacher", 2, block_out_channels=(8,)))


@pytest.fixture(scope="module")
def student(teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made(teacher, "dmd", TWO, guidance=2.0, out=tmp_path_factory.mktemp("student") / "out")


def objective(teacher: Model, config: MatchingConfig = THREE, guidance: float = 1.0) -> FewPassObjective:
    return FewPassObjective(Problem(teacher, guidance), config, At(0))


# -- levels ----------------------------------------------------------------------------------------------------------


def test_default_levels_are_even_steps_in_the_angle_from_the_start_down(teacher: Model) -> None:
    for start, passes in ((2.5, 2), (10.0, 4)):
        levels = even_levels(start, passes)
        angles = torch.atan(torch.tensor([*levels, 0.0], dtype=torch.float64))
        assert levels[0] == start and torch.allclose(angles.diff(), torch.full((passes,), -math.atan(start) / passes, dtype=torch.float64))
    one = objective(teacher, replace(TWO, start=4.0))
    torch.testing.assert_close(LAW.sigma(one.grid.t[:-1]), torch.tensor(even_levels(4.0, 2), dtype=torch.float64))
    assert float(one.grid.t[-1]) == LAW.t_clean
    torch.testing.assert_close(LAW.sigma(objective(teacher).grid.t), torch.tensor([2.5, 1.0, 0.3, 0.0], dtype=torch.float64))


def test_the_levels_of_a_table_are_times_of_it() -> None:
    model = table_model()
    table = model.schedule.times
    assert table is not None and bool(torch.isin(objective(model).grid.t[:-1], table).all())
    with pytest.raises(FewstepError, match="no time of its own for each of the levels 2.5, 1, 0.9999: take fewer passes"):
        objective(model, replace(THREE, levels=(2.5, 1.0, 0.9999)))


# -- what trains it --------------------------------------------------------------------------------------------------


def test_training_sees_the_states_of_sampling(teacher: Model) -> None:
    """Each pass is trained at the state that the solver lcm comes to from the same noises, whatever the other rows' passes are."""
    one, seeds = objective(teacher), range(6)
    denoiser, cond = one.model_of(one.student()), torch.tensor([0, 1, 0, 1, 0, 1])
    streams = [seeded_noise(seeds, (1, 4, 4), stream=k) for k in range(3)]
    with torch.no_grad():
        run = [step for step in fewstep.steps(denoiser, one.passes.sampler.tableau, streams[0] * 2.5, cond, seeds=seeds)]
        k = torch.tensor([0, 1, 2, 2, 1, 0])
        turn = one.passes.lead(
            denoiser,
            one.passes.draw(6, (1, 4, 4), loop.seeded(0, 0), streams[0].device)._replace(k=k, noises=torch.stack(streams[:2])),
            cond,
        )
        z = torch.stack([streams[int(j)][row] for row, j in enumerate(k)])
        answer = one.passes.answer(denoiser, turn, z, cond)
    wanted = torch.stack([run[int(j)].x0[row] for row, j in enumerate(k)])
    torch.testing.assert_close(answer, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.answers(one.student(), list(seeds))[-1], run[-1].x_next)
    assert not bool(turn.before[k == 0].any()) and bool(turn.before[k > 0].flatten(1).any(1).all())


def test_each_pass_is_trained_alike_and_by_its_own_row(teacher: Model) -> None:
    """The passes of rows are uniform, and processes together draw what one does; no gradient goes through an earlier pass."""
    passes = objective(teacher).passes
    turn = passes.draw(3000, (1,), loop.seeded(0, 0), torch.device("cpu"))
    assert torch.bincount(turn.k).sub(1000).abs().max() < 100 and turn.noises.shape == (2, 3000, 1)

    class Scaled:
        schedule, calls = LAW, 0

        def __init__(self) -> None:
            self.weight = torch.ones((), requires_grad=True)

        def __call__(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            self.calls += 1
            return self.weight * x

    denoiser: Any = Scaled()
    led = passes.lead(denoiser, turn._replace(k=torch.full((3000,), 2)), None)
    assert denoiser.calls == 2 and not led.before.requires_grad
    z = torch.ones(3000, 1)
    answer = passes.answer(denoiser, led, z, None)
    (slope,) = torch.autograd.grad(answer.sum(), denoiser.weight)
    torch.testing.assert_close(slope, (led.before + 0.3 * z).sum())


@pytest.mark.parametrize("config", [THREE, replace(EM, passes=2)], ids=["dmd", "em"])
def test_gradients_reach_the_network_in_training_alone(teacher: Model, config: MatchingConfig) -> None:
    one = objective(teacher, replace(config, fake_rank=2), 2.0)
    student, draws = one.student().requires_grad_(True), loop.seeded(0, 0)
    one.fake.requires_grad_(True)
    with torch.no_grad():
        for value in one.fake.parameters():
            value.add_(0.1)
    one.loss(Networks(student), one.batch(None, 4, draws), draws).backward()
    assert any(value.grad is not None and bool(value.grad.any()) for value in student.parameters())
    assert all(value.grad is None for network in (teacher.network, one.fake) for value in network.parameters())
    student.zero_grad(set_to_none=True)
    assert one.companion is not None
    one.companion.loss(student, one.fake, 4, draws).backward()
    assert all(value.grad is not None for value in one.fake.parameters())
    assert all(value.grad is None for network in (teacher.network, student) for value in network.parameters())


@pytest.mark.slow
def test_one_langevin_step_is_dmd_to_the_bit(teacher: Model) -> None:
    dmd = made(teacher, "dmd", TWO)
    assert same(dmd, made(teacher, "em", replace(EM, passes=2, langevin=1, step_z=0.0)))
    assert not same(dmd, made(teacher, "em", replace(EM, passes=2, langevin=1, step_z=0.3)))


@pytest.mark.slow
def test_the_judge_sees_the_samples_of_all_passes(teacher: Model) -> None:
    judge = At(1)
    student = made(teacher, "dmd", TWO, judge=judge)
    seeds = [seed for some in objective(teacher, TWO)._held_out for seed in some]
    torch.testing.assert_close(sample(student, seeds=seeds, cond=teacher.labels(seeds)), judge.seen[1])
    assert student.card["kept"]["step"] == 2 and student.card["passes"].keys() == {2} and student.card["arithmetic"] == {2: 2.0}


# -- how it is sampled -----------------------------------------------------------------------------------------------


def test_its_record_is_its_solver_and_its_grid(teacher: Model, student: Model) -> None:
    assert student.folder is not None
    loaded = load_model(student.folder)
    tuned = loaded.tuned
    assert tuned is not None and (tuned.form, tuned.solver, tuned.nfe, tuned.guidance) == ("matching", "lcm", 2, 2.0)
    assert tuned.own_steps and not tuned.halved and loaded.flow_map is None and loaded.num_jumps == ()
    pictures = sample(loaded, seeds=range(4))
    assert torch.equal(pictures, sample(student, seeds=range(4)))
    assert torch.equal(pictures, sample(loaded, "lcm", nfe=2, grid="optimized", seeds=range(4)))
    torch.testing.assert_close(sample(loaded, seeds=[2], cond=[0]), pictures[2:3], rtol=1e-5, atol=1e-6)  # whatever the batch
    assert not torch.equal(pictures, sample(loaded, seeds=range(10, 14)))
    card = (student.folder / "README.md").read_text()
    assert "A student of 2 passes" in card and "noise levels of the passes: [2.5, 0.677]" in card and "says nothing" in card


def test_it_is_right_at_its_own_steps_alone(student: Model) -> None:
    own = "was taught its own 2 steps of lcm alone, at the times 2.5, 0.677033, 0: leave solver"
    wrong: dict[str, dict[str, Any]] = {
        own: {"what": "ddim", "nfe": 2},
        f"{own} ": {"what": "lcm:s_noise=0.5", "nfe": 2, "grid": student.optimized("lcm", 2)},
        f"{own}  ": {"what": "lcm", "nfe": 3},
        f"{own}   ": {"x0": torch.zeros(1, 4, 4), "strength": 0.3},
        "was taught its own 2 steps alone, not 4: leave nfe out": {"nfe": 4},
        "own 2 steps of lcm alone, not ddim: leave --solver and --grid out": {"what": "ddim", "nfe": 2, "grid": "optimized"},
        "makes 2 passes, not 3": {"what": "lcm", "nfe": 3, "grid": "optimized"},
        "is a student: its guidance is in its weights; use guidance 1": {"guidance": 2.0},
    }
    for says, options in wrong.items():
        with pytest.raises(FewstepError, match=says.strip()):
            sample(student, seeds=range(2), **options)
    tableau = fewstep.Sampler.build("ddim", student.optimized("lcm", 2), LAW).tableau
    with pytest.raises(SolverError, match="was taught its own 2 steps of lcm alone"):
        next(fewstep.steps(student, tableau, torch.zeros(1, 1, 4, 4), torch.tensor([0])))


@pytest.mark.parametrize("method", ["progressive", "dmd"])
def test_nothing_is_learned_from_it(student: Model, method: str, tmp_path: Path) -> None:
    more = {"judge": At(0)} if method == "dmd" else {}
    with pytest.raises(
        FewstepError, match="was made for 2 steps of lcm alone, and its answers at other times mean nothing.*name its teacher"
    ):
        distill(student, method, out=tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"passes": 0}, "passes is at least 1, got 0"),
        ({"passes": 10**9}, "passes are 100 at most, got 1000000000"),
        ({"fake_rank": 0}, "fake_rank is at least 1, got 0"),
        ({"passes": 2, "pair": 0.5}, "pair is for a generator of one pass, .*; 2 passes add noise: leave pair out"),
        ({"passes": 2, "levels": (0.5, 2.5)}, r"positive and descending, as levels=\(2.5, 0.7\), got \(0.5, 2.5\)"),
        ({"passes": 2, "levels": (2.5, 0.0)}, "positive and descending"),
        ({"passes": 2, "levels": (math.inf, 1.0)}, "positive and descending"),
        ({"passes": 2, "levels": ()}, "positive and descending"),
        ({"passes": 2, "levels": ("a", 1.0)}, "each of levels is a number, got 'a'"),
        ({"passes": 3, "levels": (2.5, 0.5)}, "levels are one for each of 3 passes, got 2: 2.5, 0.5"),
        ({"levels": (2.5,)}, "levels are those of several passes: say passes=2, or more; the level of one pass is start"),
        ({"passes": 2, "levels": (2.5, 0.5), "start": 2.5}, "the first of the levels is the start: leave start out"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(FewstepError, match=says):
        EMConfig(**options)


def test_what_it_cannot_begin_with_is_refused_before_any_work(teacher: Model, student: Model, tmp_path: Path) -> None:
    wrong: dict[str, dict[str, Any]] = {
        r"each of the default levels of 100 passes \(take fewer, or name levels\) is a noise level .*, got 0.0476": {
            "config": replace(DMD, passes=100)
        },
        "start is a noise level between 0.05 and 20 of the model's noise law, got 100": {"config": replace(TWO, start=100.0)},
        "a level is a noise level between 0.05 and 20 .*, got 0.01": {"config": replace(TWO, levels=(2.5, 0.01))},
        "several passes begin with the teacher's own network, not with .*: leave out the student": {"config": TWO, "begin": student},
        "is no student of one pass to begin with": {"config": DMD, "begin": student},
        "updates of rank 64 have .* take a lower fake_rank, or leave it out": {"config": replace(DMD, fake_rank=64)},
    }
    for says, options in wrong.items():
        with pytest.raises(FewstepError, match=says):
            distill(teacher, "dmd", judge=At(LAST), out=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists(), says


# -- six modes on a ring ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_modes_of_a_ring_are_covered_alike_in_two_passes() -> None:
    model, data = ring_model(), ring_data()
    ring = model.network
    assert isinstance(ring, Ring)
    common: dict[str, Any] = {"steps": 800, "batch": 128, "lr": 2e-3, "held_out": 512, "measures": 8, "start": 1.0, "p_mean": -1.0}
    student = made(model, "dmd", MatchingConfig(**common, passes=2), judge=Judge.of(data))
    share, near = ring.counted(sample(student, seeds=range(4000)))
    first, chosen = student.card["scores"][0], student.card["kept"]
    assert float((share - 1 / 6).abs().max()) < 0.06 and near > 0.75  # measured .037 and .85
    assert chosen["value"] < 0.05 * first["value"] and chosen["recall"] > 0.7  # .009 and .76
