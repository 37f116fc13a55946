"""Phase 1 whole: what it leaves on disk, never worse than a standard grid where it counts, and a killed run that goes on."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.problems import LAW, Counted, contents, toy
from tests.processes import as_rank, together
from torch import Tensor

from fewstep import (
    ArtifactError,
    DiscreteVP,
    FewstepError,
    GridError,
    Model,
    ModelError,
    RectifiedFlow,
    Sampler,
    Solver,
    SolverError,
    VarianceExploding,
    load_model,
    make_grid,
    make_solver,
    sample,
    seeded_noise,
)
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.spacings import GRIDS
from fewstep.learn.samplers import optimize as module
from fewstep.learn.samplers import optimize_plan
from fewstep.learn.samplers.optimize import collected_gram, name_of, optimize, solver_folder
from fewstep.learn.samplers.optimize_plan import OptimizeConfig, plan_of
from fewstep.learn.search.bound import Bound
from fewstep.learn.teacher.trajectories import Trajectories
from fewstep.models.problem import Problem
from fewstep.sampling.grid_table import GridTable
from fewstep.solvers import SOLVERS, UniPC, takes_statistics

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode of some PyTorch releases says so

SHAPE = (2, 2)
TINY = OptimizeConfig(levels=12, num=8, noises=8, held_out=8, iterations=2)
FLOAT32 = 1e-6  # of a number: rounding of one operation or two


@pytest.fixture(scope="module", autouse=True)
def few_evaluations() -> Iterator[None]:
    """Of the trajectories that all errors are measured against here: what is tested needs no better ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimize_plan, "REFERENCE_NFE", 24)
        yield


def calls(model: Model) -> int:
    return model.network.calls


def made(
    folder: Path,
    model: Model | None = None,
    solver: str | Solver = "unipc-2",
    nfe: int | Sequence[int] = (2, 3),
    config: OptimizeConfig = TINY,
    **options: Any,
) -> dict[int, Sampler]:
    return optimize(model or toy(), solver, nfe, out=folder, config=config, **options)


# -- what it leaves --------------------------------------------------------------------------------------------------


PROBLEMS: Mapping[str, Callable[[], NoiseSchedule]] = {
    "edm": lambda: LAW,
    "flow": RectifiedFlow,
    "table": lambda: DiscreteVP.linear(60),
}


@pytest.mark.parametrize("law", PROBLEMS)
@pytest.mark.every(3)
def test_schedules_are_saved_and_no_worse_than_standard_grids(tmp_path: Path, law: str) -> None:
    """By the mean error of the held-out samples, measured here once more from the artifacts."""
    schedule, notes = PROBLEMS[law](), []
    model, name = toy(schedule), "ddim" if law == "flow" else "unipc-2"
    found = made(tmp_path, model, name, (4, 2, 4), command="it", on_progress=lambda done, note: notes.append((done, note)))
    exact = Trajectories.load(tmp_path / "exact")
    start, end = (exact.states(range(8, 16))[:, k] for k in (0, -1))
    sigma = float(schedule.sigma(torch.tensor(schedule.t_max, dtype=torch.float64)))
    torch.testing.assert_close(start, sigma * seeded_noise(range(TINY.seed + 8, TINY.seed + 16), SHAPE), rtol=FLOAT32, atol=0)

    def errors(sampler: Sampler) -> Tensor:
        return (sample(model, sampler, start) - end).double().square().mean((1, 2)).sqrt()

    table = GridTable.load(solver_folder(tmp_path, name))
    assert (table.solver, table.model, table.guidance) == (name, model.fingerprint, 1.0)
    assert list(found) == list(table.grids) == [row["nfe"] for row in table.card["rows"]] == [2, 4]
    for (nfe, one), row in zip(found.items(), table.card["rows"], strict=True):
        loaded, card = Sampler.load(solver_folder(tmp_path, name) / f"nfe-{nfe:02d}"), one.card
        assert loaded.nfe == nfe and torch.equal(loaded.grid.t, one.grid.t) and torch.equal(table.grid(nfe).t, loaded.grid.t)
        assert loaded.card == json.loads(json.dumps(dict(card))) and (card["command"], card["held_out_noises"]) == ("it", 8)
        assert row == {"solver": name, "nfe": nfe} | {key: card[key] for key in row.keys() - {"solver", "nfe"}}
        assert float(errors(loaded).square().mean().sqrt()) == pytest.approx(card["rmse"][0], rel=1e-4)
        standard = Sampler.build(make_solver(name), make_grid(card["best_standard_grid"], schedule, nfe), schedule)
        assert float(errors(standard).square().mean().sqrt()) == pytest.approx(card["rmse"][1], rel=1e-4)
        assert float(errors(loaded).mean()) <= float(errors(standard).mean()) * (1 + FLOAT32)
        assert law != "table" or torch.equal(loaded.grid.t, loaded.grid.t.round())
    assert notes[-3:] == [*((n, f"{name}, {nfe} evaluations") for n, nfe in enumerate((2, 4))), (2, "")]
    assert {(0, "8 of 8 trajectories"), (0, "16 of 16 exact endpoints")} <= set(notes)


@pytest.mark.slow
def test_a_schedule_is_chosen_from_many(tmp_path: Path) -> None:
    """All standard grids, four dynamic programs of each kind, the neighbours' schedules, and the best two refined."""
    config = replace(TINY, num=32, noises=64, held_out=64, iterations=6)
    found = made(tmp_path, model := toy(), "dpm-solver-pp-2m", (2, 3, 4), config)
    gram = collected_gram(Problem(model), config, (2, 3), tmp_path)
    bound = Bound(gram)
    assert gram.count == 32
    for nfe, one in found.items():
        candidates = one.card["candidates"]
        refined = {name.removesuffix(", refined") for name in candidates if name.endswith(", refined")}
        tried = [name for name in candidates if not name.endswith(", refined")]
        assert len(refined) == 2 and min(tried, key=lambda name, candidates=candidates: candidates[name][0]) in refined
        assert {"angle", "karras", "logsnr", "quadratic", "uniform"} == GRIDS.keys() & set(tried)
        assert sum("first-order program" in name for name in tried) == sum("pair program" in name for name in tried) == 4
        assert {name for name in tried if "stretched" in name} == {f"that of {steps} steps, stretched" for steps in range(2, nfe)}
        best = "first-order program (plain, sum)"
        assert candidates[best][1] == pytest.approx(bound(bound.best(nfe)[nfe]), rel=1e-9)
        assert all(value is None or value >= candidates[best][1] * (1 - 1e-9) for _, value in candidates.values())
        assert one.card["rmse"][0] < 0.95 * one.card["rmse"][1]  # measured 0.88, 0.79, 0.62
    with pytest.raises(ArtifactError, match="belongs to another Gram matrix"):
        collected_gram(Problem(toy(RectifiedFlow())), config, (2, 3), tmp_path)
    with pytest.raises(ArtifactError, match="gram-0-of-1"):
        collected_gram(Problem(model), config, (2, 3), tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_a_schedule_of_less_error_but_larger_rmse_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With errors made up: each finalist has a lower mean than the one before it, and a larger RMSE."""
    found: list[Tensor] = []

    def made_up(gap: Tensor) -> Tensor:
        k = len(found)
        found.append(torch.tensor([1 - 0.15 * k] * 99 + [20.0 + 10 * k], dtype=torch.float64))
        return found[-1]

    monkeypatch.setattr(module, "per_sample_rmse", made_up)
    card = made(tmp_path, nfe=3)[3].card
    assert len(found) >= 3 and all(two.mean() < one.mean() and two.norm() > one.norm() for one, two in zip(found, found[1:], strict=False))
    assert card["chosen"] == card["best_standard_grid"] and card["rmse"][0] == card["rmse"][1]


@pytest.mark.slow
def test_a_solver_of_two_stages(tmp_path: Path) -> None:
    found = made(tmp_path, model := toy(), "heun", (4, 2))
    assert [(nfe, one.nfe, one.grid.steps) for nfe, one in found.items()] == [(2, 2, 1), (4, 4, 2)]
    flow = made(tmp_path / "flow", toy(RectifiedFlow()), "heun", (3, 1))  # its last step is one evaluation
    assert [(nfe, one.nfe, one.grid.steps) for nfe, one in flow.items()] == [(1, 1, 1), (3, 3, 2)]
    before = calls(model)
    with pytest.raises(SolverError, match="Heun takes 2 evaluations a step and cannot use exactly 5: use 4 or 6"):
        made(tmp_path, model, "heun", (4, 5))
    assert calls(model) == before


def test_a_guided_model(tmp_path: Path) -> None:
    model = toy(classes=2)
    one, exact = made(tmp_path, model, "ddim", 3, guidance=3.0)[3], Trajectories.load(tmp_path / "exact")
    assert one.card["guidance"] == GridTable.load(tmp_path / "ddim").guidance == exact.guidance == 3.0
    states, labels = exact.states(range(8, 16)), exact.labels(range(8, 16))
    gap = sample(model, one, states[:, 0], labels, guidance=3.0) - states[:, -1]
    assert float(gap.double().square().mean().sqrt()) == pytest.approx(one.card["rmse"][0], rel=1e-4)
    with pytest.raises(ModelError, match="cannot be guided"):
        made(tmp_path / "none", guidance=3.0)
    assert not (tmp_path / "none").exists()


def test_a_solver_may_be_an_object_and_each_has_a_folder_of_its_own(tmp_path: Path) -> None:
    names = {"unipc-2": "unipc-2", "unipc-2_corrector_false": "unipc-2:corrector=false"}
    found = [made(tmp_path, solver=name, nfe=2)[2] for name in names.values()]
    for folder, name in names.items():
        assert solver_folder(tmp_path, name) == tmp_path / folder and GridTable.load(tmp_path / folder).solver == name
    assert [one.options["corrector"] for one in found] == [True, False]
    before = contents(tmp_path)
    assert made(tmp_path, model := toy(), UniPC(2), 2)[2].card == found[0].card  # the same by its name
    assert calls(model) == 0 and contents(tmp_path) == before
    assert all(name_of(make_solver(name)) == name for name in (*names.values(), *SOLVERS) if not takes_statistics(name))
    with pytest.raises(SolverError, match="has its statistics already"):
        made(tmp_path, solver=UniPC(2), nfe=2, statistics="somewhere")


# -- continued, and refused ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The files of a run that nobody killed, and its calls of the network."""
    made(folder := tmp_path_factory.mktemp("whole"), model := toy())
    return contents(folder), calls(model)


@pytest.mark.slow
def test_a_run_killed_between_schedules_repeats_nothing(tmp_path: Path, whole: tuple[dict[str, bytes], int]) -> None:
    def mortal(done: int, note: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, killed := toy(), on_progress=mortal)
    assert GridTable.load(tmp_path / "unipc-2").grids.keys() == {2}
    made(tmp_path, again := toy())
    assert (contents(tmp_path), calls(killed) + calls(again)) == whole


@pytest.mark.slow
def test_more_evaluations_and_solvers_can_be_added(tmp_path: Path, whole: tuple[dict[str, bytes], int]) -> None:
    made(tmp_path / "added", one := toy(), nfe=2)
    made(tmp_path / "added", two := toy())
    assert (contents(tmp_path / "added"), calls(one) + calls(two)) == whole
    made(tmp_path / "added", three := toy(), "ddim", 2)  # what was measured of the model serves all solvers
    made(tmp_path / "alone", four := toy(), "ddim", 2)
    assert contents(tmp_path / "added" / "ddim") == contents(tmp_path / "alone" / "ddim") and calls(three) < 0.8 * calls(four)


@pytest.mark.slow
def test_other_work_is_not_mixed_in(tmp_path: Path) -> None:
    made(tmp_path, toy(classes=2), "ddim", 2)
    before, other = contents(tmp_path), VarianceExploding(0.05, 20.5)
    requests = [(toy(other, classes=2), TINY, 1.0), (toy(classes=2), TINY, 2.0), (toy(classes=2), replace(TINY, levels=13), 1.0)]
    requests += [(toy(classes=2), replace(TINY, num=9), 1.0), (toy(classes=2), replace(TINY, seed=4), 1.0)]
    requests += [(toy(classes=2), replace(TINY, iterations=3), 1.0), (toy(classes=2), replace(TINY, held_out=9), 1.0)]
    for model, config, guidance in requests:
        with pytest.raises(ArtifactError, match=r"remove it|use another folder"):
            made(tmp_path, model, "ddim", 2, config, guidance=guidance)
    assert contents(tmp_path) == before
    (tmp_path / "ddim").rename(tmp_path / "unipc-2")
    with pytest.raises(
        ArtifactError, match=r"nfe-02 holds a schedule of another model, solver or configuration: remove it, or use another"
    ):
        made(tmp_path, toy(classes=2), "unipc-2", 2)
    (tmp_path / "unipc-2").rename(tmp_path / "ddim")
    for told, path in (("nfe-02", ("card", "candidates")), ("nfe-02", ("card", "rmse")), ("grids.json", ("card", "rows", 0, "error"))):
        file = tmp_path / "ddim" / (f"{told}/sampler.json" if told == "nfe-02" else told)
        intact = file.read_text()
        damaged = part = json.loads(intact)
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = "none"
        file.write_text(json.dumps(damaged))
        with pytest.raises(ArtifactError, match=rf"{told} is damaged: .*{path[-1]}"):
            made(tmp_path, toy(classes=2), "ddim", 2)
        file.write_text(intact)
    (tmp_path / "ddim" / "nfe-02" / "sampler.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="sampler.safetensors is damaged"):
        made(tmp_path, toy(classes=2), "ddim", 2)


def test_mistakes_are_named_before_any_work(tmp_path: Path) -> None:
    few = DiscreteVP.linear(6)
    for error, says, request in [
        (GridError, "13 steps need at least as many cells between levels; toy has 12: ask for more levels", {"nfe": (2, 13)}),
        (GridError, "6 steps need at least as many cells between levels; toy has 5", {"model": toy(few), "nfe": 6}),
        (SolverError, "nfe must be a whole number of at least 1, got 0", {"nfe": (0, 3)}),
        (FewstepError, "name at least one number of evaluations", {"nfe": ()}),
        (
            SolverError,
            "ddim:eta=1 adds noise, and has no exact ends to compare with",
            {"solver": "ddim:eta=1", "nfe": 2},
        ),
    ]:
        asked = {"model": toy(), **request}
        with pytest.raises(error, match=says):
            made(tmp_path / "new", **asked)
        assert calls(asked["model"]) == 0 and not (tmp_path / "new").exists()
    for options in ({"noises": 1}, {"held_out": 1}, {"seed": -1}, {"iterations": -1}, {"levels": 3}, {"num": 0}):
        with pytest.raises(FewstepError, match="at least"):
            OptimizeConfig(**options)


def test_a_network_that_is_not_finite_is_named(tmp_path: Path, whole: tuple[dict[str, bytes], int]) -> None:
    for bad in (1, 5, 6, int(0.9 * whole[1])):  # a derivative, an output, a derivative, a schedule
        with pytest.raises(ModelError, match="not finite"):
            made(tmp_path / f"bad-{bad}", toy(bad=bad))


# -- several processes, and batches ------------------------------------------------------------------------------------


SHARED = replace(TINY, num=32, noises=64, held_out=64, iterations=6, batch=16)


def same(ours: Sampler, theirs: Sampler) -> None:
    """Up to the rounding of sums."""
    torch.testing.assert_close(ours.grid.t, theirs.grid.t, rtol=1e-9, atol=0)
    known = {**theirs.card, "candidates": None}
    for key, value in {**ours.card, "candidates": None}.items():
        assert value == (pytest.approx(known[key], rel=1e-9) if key in ("error", "rmse") else known[key])
    assert ours.card["candidates"].keys() == theirs.card["candidates"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.release), 4])
def test_processes_find_the_schedules_of_one(tmp_path: Path, world: int) -> None:
    def find(name: str) -> dict[int, Sampler]:
        return made(tmp_path / name, None, "dpm-solver-pp-2m", (2, 5), SHARED)

    one, (first, *others) = find("one"), together(world, lambda: find("many"))
    for nfe, sampler in first.items():
        same(sampler, one[nfe])
        assert all(torch.equal(other[nfe].grid.t, sampler.grid.t) and other[nfe].card == sampler.card for other in others)
    again = made(tmp_path / "many", model := toy(), "dpm-solver-pp-2m", (2, 3, 5), SHARED)  # one process goes on
    assert again[2].card == first[2].card and calls(model) > 0 and set(again) == {2, 3, 5}
    assert sorted(GridTable.load(solver_folder(tmp_path / "many", "dpm-solver-pp-2m")).grids) == [2, 3, 5]


@pytest.mark.slow
def test_noises_go_through_the_network_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, real = set[int](), Counted.__call__

    def watched(network: Counted, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        sizes.add(len(x))
        return real(network, x, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Counted, "__call__", watched)
        found = made(tmp_path / "few", config=replace(TINY, batch=3))
    assert max(sizes) == 3
    for nfe, whole in made(tmp_path / "all").items():
        same(found[nfe], whole)
    assert made(tmp_path / "few", config=replace(TINY, batch=3))[2].card == found[2].card


def test_more_processes_than_noises_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 3, 9)
    with pytest.raises(FewstepError, match="9 processes cannot share 8 noises: use fewer processes"):
        made(tmp_path)
    assert not list(tmp_path.iterdir())


# -- a budget --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("law", PROBLEMS)
def test_a_budget_is_kept_and_still_helps(tmp_path: Path, law: str) -> None:
    """Everything the network is asked counts, and the trajectories that ends are measured against are those of the bound."""
    for budget in (1000, 4000):
        config, folder, schedule = OptimizeConfig(budget=budget), tmp_path / str(budget), PROBLEMS[law]()
        found = made(folder, model := toy(schedule), nfe=(2, 4), config=config)
        plan = plan_of(config, toy(schedule), (2, 4))
        assert model.network.samples <= plan.evaluations((2, 4)) <= budget and model.network.samples > budget / 4
        assert not (folder / "gram-0.safetensors").exists()
        for one in found.values():
            assert one.card["error"][0] <= one.card["error"][1] and one.card["held_out_noises"] == plan.held_out
        gram = collected_gram(Problem(toy(schedule)), config, (2, 4), folder)
        assert gram.count == plan.noises and gram.cells == plan.cells
        before = contents(folder / "exact")
        made(folder, toy(schedule), nfe=(3,), config=config)  # more can be added: the trajectories follow from the budget
        assert contents(folder / "exact") == before and (solver_folder(folder, "unipc-2") / "nfe-03").exists()


def test_a_budget_goes_by_the_size_of_the_model() -> None:
    config, small = OptimizeConfig(), load_model("digits-edm")
    large = replace(small, shape=(3, 64, 64))
    assert not plan_of(config, small, (5,)).small and not plan_of(replace(config, num=200), large, (5,)).small  # a number is named
    plan = plan_of(config, large, (5, 8))
    assert plan.small and plan.evaluations((5, 8)) <= 3000 and plan.batch == 21
    named = plan_of(replace(config, budget=3000, levels=9, num=7, held_out=4, iterations=0), small, (5,))
    assert (named.levels, named.noises, named.held_out, named.iterations) == (9, 7, 4, 0)
    with pytest.raises(FewstepError, match=r"a budget of 100 .* too small for schedules of 5, 8 .* the least search takes \d+"):
        plan_of(OptimizeConfig(budget=100), toy(), (5, 8))
