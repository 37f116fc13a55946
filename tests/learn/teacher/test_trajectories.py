"""Teacher trajectories: exact states at the stored times, resumption to the same numbers, random access, and damage that is named."""

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_tensors
from tests.learn.teacher import problems
from tests.learn.teacher.problems import LAW, calls, column
from tests.processes import together
from torch import Tensor

from fewstep import (
    ArtifactError,
    DiscreteVP,
    FewstepError,
    GaussianDenoiser,
    MixtureDenoiser,
    Model,
    ModelError,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    VPLinear,
    load_model,
    make_grid,
    make_solver,
    sample,
    seeded_noise,
)
from fewstep.core.schedule import NoiseSchedule
from fewstep.learn.teacher import trajectories as module
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, _read_shard, generate_trajectories, teacher_grid
from fewstep.models.problem import Problem
from fewstep.runtime.artifact import digest_of
from fewstep.solvers import DDIM, UniPC

SHAPE = (2, 2)
GRID = make_grid("karras", LAW, 4)
SMALL = TrajectoryConfig(num=20, nfe=16, solver="ddim", batch=8)
FLOAT32 = 5e-6  # of a state's size: rounding of some tens of steps
MEAN, STD = torch.tensor([[0.5, -0.7], [0.2, 0.9]]), torch.tensor([[0.3, 0.5], [0.7, 0.9]])


def mixture(schedule: NoiseSchedule = LAW) -> MixtureDenoiser:
    return problems.mixture(SHAPE, schedule)


def toy(denoiser: MixtureDenoiser | None = None, **options: Any) -> Model:
    return problems.toy(denoiser or mixture(), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def made(folder: Path, model: Model | None = None, grid: TimeGrid = GRID, **changes: object) -> Trajectories:
    found = generate_trajectories(model or toy(), grid, folder, config=replace(SMALL, **changes))
    assert found is not None
    return found


def exact(trajectories: Trajectories, denoiser: GaussianDenoiser) -> Tensor:
    """The closed solution from the noise that the seeds stand for, ``[n, T, *D]``."""
    t = trajectories.t
    start = seeded_noise(range(len(trajectories)), SHAPE) * denoiser.schedule.sigma(t[0]).float()
    return torch.stack([denoiser.flow(start.double(), t[0], time) for time in t], 1)


def rmse(gap: Tensor) -> Tensor:
    """By stored time."""
    return gap.double().square().mean((0, 2, 3)).sqrt()


def rmse_of(gap: Tensor) -> float:
    return float(gap.double().square().mean().sqrt())


# -- the states ------------------------------------------------------------------------------------------------------


TABLE = DiscreteVP.linear()
PROBLEMS = {
    "edm": (LAW, GRID),
    "vp": (VPLinear(), make_grid("logsnr", VPLinear(), 5)),
    "flow": (RectifiedFlow(), make_grid("uniform", RectifiedFlow(), 4)),  # from alpha = 0 to sigma = 0
    "table": (TABLE, make_grid("trailing", TABLE, 5).to_clean(TABLE)),
    "one-interval": (LAW, TimeGrid(torch.tensor([20.0, 0.05]))),
}


@pytest.mark.parametrize(
    ("solver", "nfe", "allowed", "problem"),
    [
        pytest.param(solver, nfe, allowed, problem, marks=[pytest.mark.slow] if solver != "unipc-3" and problem != "flow" else [])
        for solver, nfe, allowed in (("unipc-3", 64, 1e-3), ("heun", 160, 4e-3), ("dpm-solver-3s", 160, 4e-3))
        for problem in PROBLEMS
    ],
)
@pytest.mark.every(8)
def test_states_are_the_exact_ones_at_the_stored_times(tmp_path, problem: str, solver: str, nfe: int, allowed: float) -> None:
    schedule, grid = PROBLEMS[problem]
    denoiser = GaussianDenoiser(schedule, MEAN, STD)
    found = made(tmp_path, toy(denoiser), grid, solver=solver, nfe=nfe, batch=20)
    assert torch.equal(found.t, grid.t) and found.card["nfe"] >= nfe
    truth = exact(found, denoiser)
    gap = rmse(found.states(slice(None)) - truth) / rmse(truth)
    assert gap[0] < FLOAT32 and bool((gap < allowed).all()), gap


def test_corrected_states_are_stored_and_are_the_better_ones(tmp_path) -> None:
    denoiser, predicted = mixture(), []
    found = made(tmp_path, toy(denoiser), solver="unipc-2", num=64, batch=64)
    finer = made(tmp_path / "finer", toy(denoiser), solver="unipc-3", num=64, batch=64, nfe=128).states(slice(None))
    fine = teacher_grid(LAW, GRID, 16)
    sampler = Sampler.build(make_solver("unipc-2"), fine, LAW)
    end = sample(denoiser, sampler, finer[:, 0], observe=lambda step: predicted.append(step.x))
    at = torch.isin(fine.t[:-1], GRID.t[1:-1]).nonzero().flatten().tolist()
    before = rmse(torch.stack([*[predicted[k] for k in at], end], 1) - finer[:, 1:])
    after = rmse(found.states(slice(None)) - finer)[1:]
    assert bool((after[:-1] < 0.8 * before[:-1]).all()), (after, before)
    torch.testing.assert_close(after[-1], before[-1], rtol=1e-4, atol=0)  # the end is not evaluated, so not corrected


def test_solvers_without_a_corrector_store_what_they_evaluate_at(tmp_path) -> None:
    for solver in ("ddim", "heun", "dpm-solver-2s", "dpm-solver-pp-3m", "deis-3", "unipc-2:corrector=false"):
        found, seen = made(tmp_path / solver, solver=solver, num=8), []
        fine = teacher_grid(LAW, GRID, 16, make_solver(solver).stages)
        sampler = Sampler.build(make_solver(solver), fine, LAW)
        end = sample(mixture(), sampler, found.states(slice(None))[:, 0], observe=lambda step, seen=seen: seen.append(step.x))
        starts = torch.isin(fine.t[:-1], GRID.t).nonzero().flatten() * make_solver(solver).stages
        states = torch.stack([*[seen[k] for k in starts], end], 1)
        torch.testing.assert_close(found.states(slice(None)), states, rtol=0, atol=0)


def test_solvers_of_other_packages(tmp_path, monkeypatch) -> None:
    class Elsewhere(UniPC):
        def nodes(self, grid, schedule):
            return super().nodes(TimeGrid(torch.cat([grid.t[:1], grid.t[1:-1] * 1.01, grid.t[-1:]])), schedule)

    class Ahead(DDIM):  # reads the anchor, which after an evaluation is already the next state
        def update(self, nodes, i, anchor, x, history):
            return super().update(nodes, i, anchor, anchor, history)

    plain = made(tmp_path / "plain").states(slice(None))
    monkeypatch.setattr(module, "make_solver", lambda name: Ahead())
    assert torch.equal(made(tmp_path / "ahead").states(slice(None)), plain)
    monkeypatch.setattr(module, "make_solver", lambda name: Elsewhere())
    with pytest.raises(SolverError, match="Elsewhere does not start each of its steps at a time of the grid"):
        made(tmp_path / "elsewhere")


@pytest.mark.parametrize("schedule", [LAW, RectifiedFlow(), TABLE])
@pytest.mark.parametrize("evaluations", [1, 2])
def test_the_teacher_spaces_its_steps_as_the_exact_trajectories_do(schedule, evaluations: int) -> None:
    grid = make_grid("angle", schedule, 5).to_clean(schedule)
    fine = teacher_grid(schedule, grid, 29, evaluations)
    assert fine.steps == {1: 29, 2: 15}[evaluations] and bool(torch.isin(grid.t, fine.t).all())
    assert teacher_grid(schedule, grid, 5, 1).t.tolist() == grid.t.tolist() == teacher_grid(schedule, grid, 1, 1).t.tolist()
    sigma, alpha = schedule.sigma(fine.t), schedule.alpha(fine.t)
    last = float(torch.exp(-schedule.lam(torch.tensor(float(schedule.t_last)))))  # the network's last level
    place = torch.atan2(sigma, alpha) if alpha[0] == 0 else (sigma / alpha).clamp(min=last) ** (1 / 7)
    ends = torch.isin(fine.t, grid.t).nonzero().flatten()
    lengths = -torch.diff(place)
    for first, last in itertools.pairwise(ends.tolist()):
        torch.testing.assert_close(lengths[first:last], lengths[first:last].mean().expand(last - first))
        # one step fewer in any interval would make its steps longer than every other's
        fewer = lengths[first:last].sum() / max(last - first - 1, 0.5)
        assert bool(fewer >= lengths.max() - 1e-12)


@pytest.mark.slow
def test_few_evaluations_end_near_the_exact_images(tmp_path) -> None:
    """Two steps an interval, uniform in lam, ended .014 from them on these noises."""
    model = load_model("digits-edm")
    grid = make_grid("angle", model.schedule, 16)
    few = made(tmp_path / "few", model, grid, solver="unipc-3", nfe=32, num=64, batch=64)
    exact = made(tmp_path / "exact", model, grid, solver="unipc-3", nfe=128, num=64, batch=64)
    assert rmse_of((few.states(slice(None)) - exact.states(slice(None)))[:, -1]) < 0.004


@pytest.mark.slow
def test_the_teacher_error_is_that_of_half_the_steps(tmp_path) -> None:
    model = toy(denoiser := GaussianDenoiser(LAW, MEAN, STD))
    cards = []
    for nfe in (16, 32, 64):
        found = made(tmp_path / str(nfe), model, nfe=nfe, num=16, batch=16, solver="unipc-2")
        half = made(tmp_path / f"half of {nfe}", model, nfe=nfe // 2, num=16, batch=16, solver="unipc-2")
        gap = rmse(found.states(slice(None)) - half.states(slice(None)))
        torch.testing.assert_close(torch.tensor(found.card["teacher_error"]).double(), gap[-1], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(torch.tensor(found.card["teacher_error_largest"]).double(), gap.max(), rtol=1e-4, atol=1e-7)
        own = float(rmse(found.states(slice(None)) - exact(found, denoiser))[-1])
        assert 1 < found.card["teacher_error"] / own < 40, nfe  # 2^order - 1 of the teacher's own error
        cards.append(found.card["teacher_error"])
    assert cards[1] < cards[0] / 2 and cards[2] < cards[1] / 4, cards
    model, t = toy(GaussianDenoiser(LAW, MEAN, 3 * STD)), torch.tensor([20.0, 3.0, 2.0, 1.5, 1.0])
    for both, worst in (([0, 2, 4], 1), ([0, 1, 3], 2)):  # one step an interval: against every second stored time
        odd = made(tmp_path / f"odd {both}", model, TimeGrid(t[: both[-1] + 1]), nfe=both[-1])
        half = made(tmp_path / f"half {both}", model, TimeGrid(t[both]), nfe=2)
        gap = rmse(odd.states(range(8))[:, both] - half.states(range(8)))
        assert int(gap.argmax()) == worst and odd.card["teacher_error_largest"] == pytest.approx(float(gap[worst]), rel=1e-5)
        assert odd.card["teacher_error"] == pytest.approx(float(gap[-1]), rel=1e-5)
    assert made(tmp_path / "one step", model, TimeGrid(GRID.t[[0, -1]]), nfe=1).card["teacher_error"] is None


def test_a_guided_model_with_labels(tmp_path) -> None:
    model = toy(GaussianDenoiser(LAW, MEAN, STD), classes=2)
    for guidance in (1.0, 3.0):
        found = made(tmp_path / f"{guidance}", model, guidance=guidance, solver="dpm-solver-3s", nfe=64, batch=20)
        assert found.labels(slice(None)).tolist() == [seed % 2 for seed in range(20)] and found.guidance == guidance
        start, end = found.t[0], found.t[-1]
        states = found.states(slice(None)).double()
        moved = guidance * column(found.labels(slice(None)))  # of D: that of a Gaussian whose mean is moved by it over 1 - c
        # dX/dlam = D - X with D = mean + c (X - mean) + m has X - mean = z sqrt(std^2 + t^2) + m p(t); p by quadrature
        s = torch.linspace(float(start), float(end), 200_001, dtype=torch.float64)[:, None, None]
        weight = 1 / (s * torch.sqrt(STD.double() ** 2 + s**2))
        p = torch.sqrt(STD.double() ** 2 + end**2) * torch.trapezoid(weight.flip(0), s.flip(0), dim=0)
        closed = GaussianDenoiser(LAW, MEAN, STD).flow(states[:, 0], start, end) + moved * p
        torch.testing.assert_close(states[:, -1], closed, rtol=0, atol=1e-3)
    one = made(tmp_path / "one", model, label=1)
    assert one.labels([0, 5]).tolist() == [1, 1] and one[0]["label"] == 1
    with pytest.raises(ModelError, match="has labels 0 to 1, got 2"):
        made(tmp_path / "none", model, label=2)
    with pytest.raises(ModelError, match="cannot be guided"):
        made(tmp_path / "none", guidance=2.0)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_trained_model(tmp_path) -> None:
    model = load_model("digits-edm")
    schedule = model.schedule
    found = made(tmp_path, model, make_grid("angle", schedule, 4), solver="unipc-3", num=3, nfe=24, batch=3)
    sampler = Sampler.build(make_solver("unipc-3"), make_grid("angle", schedule, 48), schedule)
    end = sample(model, sampler, found.states(slice(None))[:, 0], found.labels(slice(None)))
    assert float((found.states(slice(None))[:, -1] - end).square().mean().sqrt()) < 0.05 < 0.5 < float(end.std())
    found.check(Problem(model))


# -- the folder ------------------------------------------------------------------------------------------------------


def test_a_killed_run_continues_to_the_same_numbers(tmp_path) -> None:
    made(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "killed", toy(stop=16 + 8 + 16 + 9))  # in the third batch; the first is solved on half the steps as well
    assert set(contents(tmp_path / "killed")) == {"shard-00000.safetensors", "shard-00001.safetensors"}
    with pytest.raises(ArtifactError, match="holds unfinished trajectories: run the same command again"):
        Trajectories.load(tmp_path / "killed")
    model, done = toy(), []
    generate_trajectories(model, GRID, tmp_path / "killed", config=SMALL, on_progress=lambda count, note: done.append((count, note)))
    assert calls(model) == 16 and contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert done[:2] == [(8, "shard 1 of 3"), (16, "shard 2 of 3")] and done[-1] == (20, "shard 3 of 3")
    assert [note[:11] for _, note in done[2:-1]] == ["noise level"] * 3


def test_a_finished_folder_is_only_read_and_more_can_be_added(tmp_path) -> None:
    made(tmp_path / "whole", num=24)
    made(tmp_path / "added", num=16)
    before = contents(tmp_path / "added")
    made(tmp_path / "added", model := toy(), num=16, guidance=1)  # finished: it is only read
    assert calls(model) == 0 and contents(tmp_path / "added") == before
    later = made(tmp_path / "added", model := toy(), num=24)
    assert calls(model) == 16 and len(later) == 24 and contents(tmp_path / "added") == contents(tmp_path / "whole")
    with pytest.raises(ArtifactError, match=r"shard-00002.safetensors holds 8 trajectories from seed 16, not 0: ask for as many"):
        made(tmp_path / "added", num=16)
    made(tmp_path / "part", num=20)
    with pytest.raises(ArtifactError, match=r"shard-00002.safetensors holds 4 trajectories from seed 16, not 8: .* remove it"):
        made(tmp_path / "part", num=24)


def test_two_processes_make_what_one_makes(tmp_path) -> None:
    made(tmp_path / "one")

    def work() -> tuple[bool, int]:
        found = generate_trajectories(model := toy(), GRID, tmp_path / "two", config=SMALL)
        return found is None, calls(model)

    assert together(2, work) == [(False, 16 + 16 + 8), (True, 16)]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_trajectories_of_another_request_are_not_mixed_in(tmp_path) -> None:
    made(tmp_path, toy(classes=2))
    before, same = contents(tmp_path), {"model": toy(classes=2)}
    others = [{"guidance": 2.0}, {"nfe": 32}, {"solver": "heun"}, {"seed": 1}, {"batch": 10}, {"dtype": "float16"}, {"label": 0}]
    others += [{"model": toy(mixture(VarianceExploding(0.05, 20.5)), classes=2)}, {"grid": make_grid("angle", LAW, 4)}]
    for other in others:
        with pytest.raises(ArtifactError, match=r"shard-00000.safetensors is of another teacher or request .*: remove it .*another folder"):
            made(tmp_path, **{**same, **other})
    assert contents(tmp_path) == before


def flip(path: Path, other: Path) -> None:
    path.write_bytes((data := path.read_bytes())[:-5] + bytes([data[-5] ^ 1]) + data[-4:])


DAMAGE = {
    "cut": (lambda path, other: path.write_bytes(path.read_bytes()[:-8]), "is damaged .*: remove it and run"),
    "flipped": (flip, "is damaged: its tensors or their checksum .*; remove it and run the same command again"),
    "mixed-teachers": (lambda path, other: path.write_bytes(other.read_bytes()), "is of another teacher .*: remove it and run"),
    "missing": (lambda path, other: path.unlink(), "is missing: run the same command again"),
}


def test_shards_of_other_tensors_are_refused(tmp_path) -> None:
    """Their checksums are right: those of the tensors that they hold."""
    found = made(tmp_path)
    path = tmp_path / "shard-00000.safetensors"
    about, tensors = _read_shard(path, found.identity)
    for changed, says in [
        ({}, "is damaged"),
        ({"y": tensors["x"]}, "is damaged"),
        ({"x": tensors["x"][:, 1:].contiguous()}, "its tensors or their checksum are not those in manifest.json"),
        ({"x": tensors["x"].long()}, "its tensors or their checksum are not those in manifest.json"),
        ({**tensors, "labels": torch.zeros(8)}, "its tensors or their checksum are not those in manifest.json"),
    ]:
        path.write_bytes(save_tensors(changed, {"about": json.dumps({**asdict(about), "sha256": digest_of(changed)})}))
        manifest = tmp_path / "manifest.json"
        meta = json.loads(manifest.read_text())
        meta["shards"][0]["sha256"] = digest_of(changed)
        manifest.write_text(json.dumps(meta))
        with pytest.raises(ArtifactError, match=says):
            Trajectories.load(tmp_path).states([0])


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.every(4)
def test_damage_is_named_and_mended(tmp_path, damage: str) -> None:
    whole = made(tmp_path / "whole").states(slice(None))
    made(tmp_path / "other", toy(mixture(VarianceExploding(0.05, 20.5))))
    path = tmp_path / "whole" / "shard-00001.safetensors"
    DAMAGE[damage][0](path, tmp_path / "other" / path.name)
    found = Trajectories.load(tmp_path / "whole")
    assert torch.equal(found.states([0, 7, 16]), whole[[0, 7, 16]])  # the other shards
    with pytest.raises(ArtifactError, match=f"shard-00001.safetensors {DAMAGE[damage][1]}"):
        found.states([0, 8])
    path.unlink(missing_ok=True)
    mended = made(tmp_path / "whole", model := toy())
    assert calls(model) == 16 and torch.equal(mended.states(slice(None)), whole)


def test_manifests_that_cannot_be_used_are_named(tmp_path) -> None:
    made(tmp_path)
    path = tmp_path / "manifest.json"
    meta = json.loads(path.read_text())
    for changed, says in [
        ({**meta, "version": 2}, "'fewstep-trajectories' version 2; this fewstep reads 'fewstep-trajectories' version 1"),
        ({k: v for k, v in meta.items() if k != "times"}, "damaged: times: field required; fetch or make it again"),
        ({**meta, "shards": [{**meta["shards"][0], "file": "../x"}, *meta["shards"][1:]]}, "a shard is not in the same folder"),
        ({**meta, "shards": [{**one, "count": 4 - k} for k, one in enumerate(meta["shards"])]}, "do not hold"),
        ({**meta, "shape": 0}, "damaged: shape: "),
        ({**meta, "classes": [2]}, "damaged: classes: "),
        ({**meta, "num": 1 << 60}, "damaged: num: "),
        ({**meta, "seed": 1 << 63}, "damaged: seed: "),
        ({**meta, "times": meta["times"][::-1]}, "damaged .*must strictly decrease"),
        ({**meta, "num": 30}, "damaged .*do not hold 30 trajectories"),
    ]:
        path.write_text(json.dumps(changed))
        with pytest.raises(ArtifactError, match=says):
            Trajectories.load(tmp_path)
    with pytest.raises(ArtifactError, match="cannot read .*manifest.json"):
        Trajectories.load(tmp_path / "nothing")
    made(tmp_path)  # mends it
    assert json.loads(path.read_text()) == meta
    with pytest.raises(ArtifactError, match="cannot write .* is a file; choose a folder"):
        made(path / "below", model := toy())
    assert calls(model) == 0


def test_a_network_that_is_not_finite_is_named_and_nothing_is_left(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"not finite .* at evaluation 5 of 16, t = 6.747.*, sigma = 6.747.*: check its weights"):
        made(tmp_path / "bad", toy(bad=5))
    with pytest.raises(FewstepError, match=r"do not fit in torch.float16.*float32 or bfloat16"):
        made(tmp_path / "bad", toy(mixture(law := VarianceExploding(0.05, 1e6))), make_grid("karras", law, 4), dtype="float16")
    assert not (tmp_path / "bad").exists()
