"""Samplers fitted to a model: their figures are true, the choice follows its rule, and a killed run goes on to the same numbers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.problems import LAW, Counted, names, toy
from torch import Tensor

from fewstep import (
    DiscreteVP,
    FewstepError,
    Model,
    ModelError,
    RectifiedFlow,
    Sampler,
    SolverError,
    make_grid,
    make_solver,
    sample,
    seeded_noise,
)
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.spacings import GRIDS
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Tableau
from fewstep.learn.samplers import fit_search
from fewstep.learn.samplers.fit import FitConfig, fit, nfe_folder, plan_fit
from fewstep.learn.search.coefficients import FitForm
from fewstep.learn.teacher.trajectories import Trajectories

SHAPE = (2, 2)
TINY = FitConfig(num=32, held_out=16, levels=16, noises=16, iterations=2, batch=16)
SCALAR = FitForm(pool="scalar", bias=False)
FLOAT32 = 1e-4  # of an RMSE: `sample` and the fit sum a few float32 steps in batches of different size
ORDER = 1e-5  # of an error of the fit in sequence: float64 sums in another order, and states rounded to float32; measured 0
SWEPT = 1e-3  # of an error of the sweep, whose differences of float32 states pass such rounding on; measured 3e-5


def network(model: Model) -> Counted:
    return model.network


def made(
    folder: Path, model: Model | None = None, nfe: Sequence[int] = (2,), config: FitConfig = TINY, **options: Any
) -> dict[int, Sampler]:
    return fit(model or toy(), nfe, out=folder, config=config, command="it", **options)


def errors(model: Model, sampler: Sampler, trajectories: Trajectories, guidance: float = 1.0) -> tuple[float, float]:
    """Mean error and RMSE on the held-out trajectories, by running the sampler."""
    rows = range(TINY.num, TINY.num + TINY.held_out)
    states = trajectories.states(rows)
    gap = sample(model, sampler.tableau, states[:, 0], trajectories.labels(rows), guidance=guidance) - states[:, -1]
    each = gap.double().square().mean((1, 2)).sqrt()
    return float(each.mean()), float(each.square().mean().sqrt())


def named(pair: str, schedule: NoiseSchedule, nfe: int) -> Sampler:
    """A hand-made sampler by the name that a card gives it."""
    solver, spacing = pair.split(" on ")
    return Sampler.build(make_solver(solver), make_grid(spacing, schedule, nfe), schedule)


def same(one: Tableau, two: Tableau) -> bool:
    parts = ("record", "update", "bias", "noise")
    return torch.equal(one.nodes.t, two.nodes.t) and all(torch.equal(getattr(one, part), getattr(two, part)) for part in parts)


# -- what it leaves --------------------------------------------------------------------------------------------------


PROBLEMS: Mapping[str, Callable[[], NoiseSchedule]] = {
    "edm": lambda: LAW,
    "flow": RectifiedFlow,  # from alpha = 0 to sigma = 0
    "table": lambda: DiscreteVP.linear(60),
}


@pytest.mark.parametrize("law", PROBLEMS)
@pytest.mark.every(3)
def test_samplers_are_kept_with_figures_that_are_true_and_better(tmp_path: Path, law: str) -> None:
    schedule, told, before = PROBLEMS[law](), [], set[float]()
    model = toy(schedule)

    def on_progress(done: int, note: str) -> None:
        told.append((done, note))
        before.update(network(model).times if "trajectories" in note else ())

    found, readme = made(tmp_path, model, (3, 1, 2, 3), on_progress=on_progress), (tmp_path / "README.md").read_text()
    stored = Trajectories.load(tmp_path / "trajectories")
    start, sigma = stored.states([32], [0])[0, 0], schedule.sigma(torch.tensor(schedule.t_max))
    assert torch.equal(start, seeded_noise([TINY.seed + 32], SHAPE)[0] * sigma)
    assert list(found) == [1, 2, 3] and names(tmp_path) == {"README.md", "plan.json", "trajectories", "nfe-01", "nfe-02", "nfe-03"}
    for nfe, one in found.items():
        kept, card = Sampler.load(nfe_folder(tmp_path, nfe)), one.card
        assert same(kept.tableau, one.tableau) and kept.card == json.loads(json.dumps(dict(card))) and kept.nfe == nfe
        assert (kept.solver, kept.options) == ("fitted", {**asdict(TINY.form), "pool": "element", "parent": TINY.parent_with(nfe)})
        assert (card["name"], card["of"], card["model"], card["guidance"]) == ("fitted", "toy", model.fingerprint, 1.0)
        assert (card["noises"], card["held_out_noises"], card["command"]) == (32, 16, "it")
        assert (float(kept.grid.t[0]), float(kept.grid.t[-1])) == (schedule.t_max, schedule.t_min)
        best = card["best_hand_made"]
        assert list(card["stages"]) == ["fitted in sequence", "swept", best]
        assert card["stages"][card["chosen"]] == [card["error"][0], card["rmse"][0]]
        for sampler, which in ((kept, 0), (named(best, schedule, nfe), 1)):
            measured = errors(model, sampler, stored)
            assert measured == pytest.approx((card["error"][which], card["rmse"][which]), rel=FLOAT32)
        allowed = [name for name in card["stages"] if card["stages"][name][1] <= 1.2 * card["rmse"][1]]  # 16 noises: chance
        assert card["chosen"] == min(allowed, key=lambda name: card["stages"][name][0])
        assert card["error"][0] < 0.85 * card["error"][1]  # measured 0.28 (table, 3) to 0.80 (table, 2)
        assert f"| {nfe} | {card['error'][0]:.4f} ({card['rmse'][0]:.4f}) | {card['error'][1]:.4f}" in readme and best in readme
        if law == "table":
            assert bool(torch.isin(kept.tableau.nodes.t, schedule.times).all()) and network(model).times - before <= set(
                schedule.times.tolist()
            )
    counted = [(done, note) for done, note in told if note.startswith("3 evaluations: sweep")]
    assert (2, "3 evaluations: sweep 1 of at most 2") in counted and (0, "48 of 48 trajectories") in told and told[-1] == (3, "")


def test_the_hand_made_rival_is_the_best_of_a_few(given: Trajectories) -> None:
    """On the two noises that rank them; of all pairs, where the budget is large."""
    found, states = fit(model := toy(), 3, config=TINY, trajectories=given)[3].card, given.states(range(2))

    def error(pair: str) -> float:
        gap = sample(model, named(pair, LAW, 3), states[:, 0]) - states[:, -1]
        return float(gap.double().square().mean((1, 2)).sqrt().mean())

    assert found["best_hand_made"] == min(("unipc-2 on angle", "dpm-solver-pp-2m on angle"), key=error)
    assert found["error"][0] < found["error"][1]


COUNTED = (FitConfig(budget=3000), TINY, FitConfig(budget=700), FitConfig(budget=4000, first=True), replace(TINY, first=True))


@pytest.mark.parametrize("config", COUNTED, ids=lambda config: f"{config.budget}-{config.first}")
@pytest.mark.every(4)
def test_network_evaluations_are_counted_and_foreseen(tmp_path: Path, config: FitConfig) -> None:
    counts = (1, 2, 4)
    found, plan = made(tmp_path, model := toy(), counts, config), plan_fit(toy(), counts, config)
    on_cards = sum(one.card["network_evaluations"] for one in found.values()) + found[1].card["trajectory_evaluations"]
    check = min(4, plan.batch) * plan.levels // 2  # those on half the steps
    assert network(model).samples == on_cards + check
    assert network(model).samples <= plan.evaluations <= (config.budget or 10**9)
    assert network(model).samples > 0.6 * plan.evaluations  # measured 0.7 to 0.9


@pytest.mark.slow
@pytest.mark.parametrize("law", ["table", *(pytest.param(law, marks=pytest.mark.release) for law in ("edm", "flow"))])
def test_no_budget_is_exceeded(tmp_path: Path, law: str) -> None:
    """Whatever the noise law makes of the levels, and where samplers are added to a folder."""
    for counts, budget in (((1,), 400), ((2, 3), 1500), ((1, 2, 3, 4, 5, 6), 4000)):
        model, config = toy(PROBLEMS[law]()), FitConfig(budget=budget)
        fit(model, counts, config=config)
        assert network(model).samples <= plan_fit(model, counts, config).evaluations <= budget
    for counts in ((2,), (2, 6), (3,)):
        made(tmp_path, model := toy(PROBLEMS[law]()), counts, FitConfig(budget=2000))
        assert network(model).samples <= 2000
    with pytest.raises(FewstepError, match=r"too small for samplers of 14 with the num and held_out and levels of the folder"):
        made(tmp_path, toy(PROBLEMS[law]()), (14,), FitConfig(budget=2000))
    assert names(tmp_path) == {"README.md", "plan.json", "trajectories", "nfe-02", "nfe-03", "nfe-06"}


@pytest.mark.slow
def test_samplers_that_are_added_follow_what_was_named(tmp_path: Path) -> None:
    config = FitConfig(budget=3000, iterations=0, held_out=5)
    made(tmp_path, toy(), (2,), config)
    added = made(tmp_path, toy(), (5,), config)[5].card
    assert "swept" not in added["stages"] and added["held_out_noises"] == 5
    with pytest.raises(SolverError, match="a fit on 19 levels takes 1 to 18 evaluations, got 19"):
        made(tmp_path / "few", toy(), (2,), FitConfig(levels=18, num=8))
        made(tmp_path / "few", toy(), (19,), FitConfig(levels=18, num=8))


@pytest.mark.slow
def test_options_change_what_is_fitted(given: Trajectories) -> None:
    def of(**changes: Any) -> Sampler:
        return fit(toy(), 3, config=replace(TINY, **changes), trajectories=given)[3]

    full, short = of(iterations=0), of(iterations=0, form=replace(SCALAR, history=1))
    assert "swept" not in full.card["stages"] and full.tableau.update.shape == (3, 2, 5, *SHAPE)
    assert short.tableau.update.shape == (3, 2, 3) and not bool(short.tableau.bias.any())
    drawn = of(iterations=0, form=FitForm(ridge=1e5, shrink=1e5)).card["stages"]["fitted in sequence"]
    assert drawn[0] > 2 * full.card["stages"]["fitted in sequence"][0]  # near the parent: measured 2.5
    still, begun = of(form=SCALAR, move=False), of(form=SCALAR, move=False).card["levels_from"]
    where = make_grid(begun, LAW, 3).t if begun in GRIDS else given.t
    assert still.card["chosen"] == "swept" and bool(torch.isin(still.grid.t, where).all())
    assert not bool(torch.isin(of(form=SCALAR).grid.t, where).all())


def test_statistics_of_the_model_let_a_third_solver_compete(given: Trajectories, monkeypatch) -> None:
    lam, ones = torch.linspace(-4, 4, 9, dtype=torch.float64), torch.ones(9, *SHAPE)
    asked = []
    monkeypatch.setattr(
        Model, "statistics", lambda model, guidance: asked.append(guidance) or ModelStatistics(lam, ones, 0 * ones, 0 * ones, SHAPE, LAW)
    )
    monkeypatch.setattr(fit_search, "HAND_MADE", ())
    card = fit(toy(), 2, config=replace(TINY, iterations=0), trajectories=given)[2].card
    assert card["best_hand_made"].startswith("dpm-solver-v3 on ") and asked == [1.0]


def test_a_guided_model(tmp_path: Path) -> None:
    one = made(tmp_path, model := toy(classes=2), guidance=3.0)[2]
    stored = Trajectories.load(tmp_path / "trajectories")
    assert one.card["guidance"] == stored.guidance == 3.0
    assert errors(model, one, stored, guidance=3.0) == pytest.approx((one.card["error"][0], one.card["rmse"][0]), rel=FLOAT32)
    assert errors(model, one, stored)[0] > 1.5 * one.card["error"][0]
    assert "at guidance 3" in (tmp_path / "README.md").read_text()
    with pytest.raises(ModelError, match="cannot be guided"):
        made(tmp_path / "none", guidance=3.0)
    assert not (tmp_path / "none").exists()


# -- the choice ------------------------------------------------------------------------------------------------------


def some(usual: float, large: float = 0.0, count: int = 0) -> Tensor:
    """160 errors, so many of them large."""
    return torch.tensor([large] * count + [usual] * (160 - count), dtype=torch.float64)


@pytest.mark.parametrize(
    ("sequence", "swept", "hand_made", "chosen"),
    [
        (some(0.2), some(0.1), some(0.3), "swept"),
        (some(0.1), some(0.2), some(0.1), "fitted in sequence"),  # an equal error is no worse
        (some(0.2), some(0.1, 4.0, 1), some(0.3), "swept"),  # one sample more that ends as another picture may be chance
        (some(0.2), some(0.0, 0.7, 60), some(0.3), "fitted in sequence"),  # sixty are not, however small the mean
        (some(0.0, 0.7, 65), some(0.0, 0.7, 60), some(0.3), " on "),
        (some(0.3), some(0.4), some(0.2), " on "),
    ],
)
@pytest.mark.every(3)
def test_the_stage_is_the_one_of_least_error_that_has_no_larger_rmse_but_by_chance(
    given: Trajectories, monkeypatch, sequence: Tensor, swept: Tensor, hand_made: Tensor, chosen: str
) -> None:
    """Than the best hand-made pair has; both on the held-out noises."""
    real, errors, seen = fit_search.FitSearch.errors, iter((sequence, swept, hand_made)), []

    def fake(self, tableau: Tableau, rows: range) -> Tensor:
        if rows != range(32, 48):
            return real(self, tableau, rows)
        seen.append(tableau)
        return next(errors)

    monkeypatch.setattr(fit_search.FitSearch, "errors", fake)
    one = fit(toy(), 2, config=replace(TINY, iterations=1), trajectories=given)[2]
    which = {"fitted in sequence": 0, "swept": 1, " on ": 2}[chosen]
    ours = (sequence, swept, hand_made)[which]
    assert chosen in one.card["chosen"] and same(one.tableau, seen[which])
    assert one.card["error"] == pytest.approx([float(ours.mean()), float(hand_made.mean())])
    assert one.card["rmse"] == pytest.approx([float(of.square().mean().sqrt()) for of in (ours, hand_made)])


@pytest.mark.parametrize("spoiled", ["sweep", "fit_in_sequence", "both"])
@pytest.mark.every(2)
def test_where_a_fit_goes_wrong_another_sampler_takes_its_place(given: Trajectories, tmp_path: Path, monkeypatch, spoiled: str) -> None:
    def worse(tableau: Tableau) -> Tableau:
        return replace(tableau, update=1e-3 * tableau.update)

    if spoiled != "fit_in_sequence":
        monkeypatch.setattr(fit_search, "sweep", lambda batches, tableau, *rest, **options: worse(tableau))
    if spoiled != "sweep":
        real = fit_search.fit_in_sequence

        def spoil(*args: Any, **options: Any) -> Any:
            found = real(*args, **options)
            return replace(found, tableau=worse(found.tableau))

        monkeypatch.setattr(fit_search, "fit_in_sequence", spoil)
    one, card = made(tmp_path, model := toy(), (3,), trajectories=given)[3], Sampler.load(tmp_path / "nfe-03").card
    if spoiled == "sweep":
        assert card["chosen"] == "fitted in sequence" and card["error"][0] < card["error"][1]
        return
    assert card["chosen"] == card["best_hand_made"] and card["error"][0] == card["error"][1] and card["rmse"][0] == card["rmse"][1]
    assert same(one.tableau, named(card["chosen"], LAW, 3).tableau)
    assert errors(model, one, given)[0] == pytest.approx(card["error"][0], rel=FLOAT32)
    assert f"| {card['chosen']} |" in (tmp_path / "README.md").read_text()


# -- a first answer that is foreseen -----------------------------------------------------------------------------------


def shifted(classes: int = 2) -> Model:
    """A mixture that is moved by its label, so that first answers are nearly the mean of a class."""

    class Moved(torch.nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.inner = toy().network

        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            by = 2.0 * labels.to(x.dtype).reshape(-1, 1, 1)
            Moved.calls += 1
            return by + self.inner(x - LAW.alpha(t[:1]).to(x.dtype) * by, t)

    return Model(Moved(), LAW, "sample", shape=SHAPE, classes=classes, name="moved")


def test_a_foreseen_first_answer_saves_a_call_and_wins_where_it_is_better(tmp_path: Path) -> None:
    model, config = shifted(), replace(TINY, first=True)
    samplers = fit(model, [2, 3], out=tmp_path, config=config)
    for nfe, one in samplers.items():
        stages = one.card["stages"]
        asked, foreseen = ([name for name in stages if " on " not in name and name.endswith("foreseen") is way] for way in (False, True))
        assert asked and foreseen and one.nfe == nfe and one.tableau.nodes.evaluations == nfe + (one.tableau.first is not None)
        assert one.card["chosen"].endswith("foreseen") == (one.tableau.first is not None)
    best = samplers[2]
    assert best.tableau.first is not None
    type(model.network).calls = 0
    images = sample(model, best, seeds=range(4))
    assert type(model.network).calls == 2 and images.shape == (4, *SHAPE)
    loaded = Sampler.load(nfe_folder(tmp_path, 2))
    assert torch.equal(sample(model, loaded, seeds=range(4)), images)
    assert bool((fit(model, [2, 3], out=tmp_path, config=config)[2].tableau.update == best.tableau.update).all())


def test_where_no_first_answer_can_be_foreseen_it_is_refused(given: Trajectories) -> None:
    with pytest.raises(FewstepError, match="learned from 80 noises or more, and there are .* here: leave first out"):
        plan_fit(toy(classes=10), 2, FitConfig(first=True), trajectories=given)
    with pytest.raises(FewstepError, match="from 8 noises or more for each class, 80 in all: raise num, now 32"):
        fit(toy(classes=10), 2, config=replace(TINY, first=True))
    assert plan_fit(toy(classes=10), 3, FitConfig(budget=9000, first=True)).num >= 80
    with pytest.raises(FewstepError, match="too small"):
        plan_fit(toy(classes=10), 3, FitConfig(budget=1000, first=True))
