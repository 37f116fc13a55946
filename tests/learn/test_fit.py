"""Samplers fitted to a model: their figures are true, the choice follows its rule, and a killed run goes on to the same numbers."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from fewstep import (
    AdaptedDenoiser,
    ArtifactError,
    DiscreteVP,
    FewstepError,
    MixtureDenoiser,
    Model,
    ModelError,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    load_model,
    make_grid,
    make_solver,
    sample,
    seeded_noise,
)
from fewstep.core.grid import GRIDS
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Tableau
from fewstep.learn import fit as module
from fewstep.learn import fit_search
from fewstep.learn.fit import FitConfig, Fitted, fit, nfe_folder
from fewstep.learn.fit_solver import FitForm
from fewstep.learn.gram import fine_grid
from fewstep.learn.trajectories import Trajectories, TrajectoryConfig, generate_trajectories
from fewstep.models.loaders import save_ours

SHAPE = (2, 2)
LAW = VarianceExploding(0.05, 20.0)
TINY = FitConfig(num=32, held_out=16, levels=16, noises=16, window=8, iterations=2, batch=16)
SCALAR = FitForm(pool="scalar", bias=False)
FLOAT32 = 1e-4  # of an RMSE: `sample` and the fit sum a few float32 steps in batches of different size
ORDER = 1e-5  # of an error of the fit in sequence: float64 sums in another order, and states rounded to float32; measured 0
SWEPT = 1e-3  # of an error of the sweep, whose differences of float32 states pass such rounding on; measured 3e-5


class Counted:
    """An analytic denoiser as a network, which counts its samples and calls and can be told to stop at a call or to fail there."""

    def __init__(self, denoiser: MixtureDenoiser, stop: int = -1, bad: int = -1) -> None:
        self.denoiser, self.stop, self.bad, self.calls, self.samples, self.times = denoiser, stop, bad, 0, 0, set[float]()

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.calls, self.samples = self.calls + 1, self.samples + len(x)
        self.times.add(float(t[0]))
        if self.calls == self.stop:
            raise KeyboardInterrupt
        answer = self.denoiser(x, t[0].double()) * (torch.nan if 0 <= self.bad <= self.calls else 1)
        return answer if label is None else answer + (label.float() - 2)[:, None, None] / 10  # class 2 stands for none


def toy(schedule: NoiseSchedule = LAW, *, classes: int | None = None, **options: int) -> Model:
    means = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)) * 0.8
    network = Counted(MixtureDenoiser(schedule, means, torch.full((4,), 0.25)), **options)
    return Model("toy", AdaptedDenoiser(network, schedule, "sample"), SHAPE, classes, classes)


def network(model: Model) -> Counted:
    return model.denoiser.network


def made(folder: Path, model: Model | None = None, nfe: Sequence[int] = (2,), config: FitConfig = TINY, **options: object) -> dict:
    return fit(model or toy(), nfe, config, folder, command="it", **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def errors(model: Model, sampler: Sampler, folder: Path, config: FitConfig = TINY, guidance: float = 1.0) -> tuple[float, float]:
    """Mean error and RMSE on the held-out trajectories, by running the sampler."""
    kept, rows = Trajectories.load(folder / "trajectories"), range(config.num, config.num + config.held_out)
    states = kept.states(rows)
    gap = sample(model.guided(guidance), sampler, states[:, 0], kept.labels(rows)) - states[:, -1]
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


@pytest.mark.parametrize("law", [pytest.param(law, marks=[pytest.mark.slow] if law == "edm" else []) for law in PROBLEMS])
def test_samplers_are_kept_with_figures_that_are_true_and_better(tmp_path: Path, law: str) -> None:
    schedule, told, before = PROBLEMS[law](), [], set[float]()
    model = toy(schedule)

    def observe(done: int, note: str) -> None:
        told.append((done, note))
        before.update(network(model).times if "trajectories" in note else ())

    found, readme = made(tmp_path, model, (3, 1, 2, 3), observe=observe), (tmp_path / "README.md").read_text()
    start, sigma = Trajectories.load(tmp_path / "trajectories").states([32], [0])[0, 0], schedule.sigma(torch.tensor(schedule.t_max))
    assert torch.equal(start, seeded_noise([TINY.seed + 32], SHAPE)[0] * sigma)
    assert list(found) == [1, 2, 3] and {path.name for path in tmp_path.iterdir()} == {
        "README.md", "trajectories", "nfe-01", "nfe-02", "nfe-03"
    }  # fmt: skip
    for nfe, one in found.items():
        kept, card = Sampler.load(nfe_folder(tmp_path, nfe)), one.sampler.card
        assert same(kept.tableau, one.sampler.tableau) and kept.card == json.loads(json.dumps(dict(card))) and kept.nfe == nfe
        assert (kept.solver, kept.options) == ("fitted", {**asdict(TINY.form), "parent": TINY.parent_with(nfe)})
        assert (card["name"], card["of"], card["model"], card["guidance"]) == ("fitted", "toy", model.fingerprint, 1.0)
        assert (card["noises"], card["held_out_noises"], card["command"]) == (32, 16, "it")
        assert (float(kept.grid.t[0]), float(kept.grid.t[-1])) == (schedule.t_max, schedule.t_min)
        best = card["best_hand_made"]
        assert list(one.stages) == ["fitted in sequence", "swept", best] and one.stages[card["chosen"]] == (
            card["error"][0],
            card["rmse"][0],
        )
        for sampler, which in ((kept, 0), (named(best, schedule, nfe), 1)):
            measured = errors(model, sampler, tmp_path)
            assert measured == pytest.approx((card["error"][which], card["rmse"][which]), rel=FLOAT32)
        allowed = [name for name in one.stages if one.stages[name][1] <= card["rmse"][1]]
        assert card["chosen"] == min(allowed, key=lambda name: one.stages[name][0])
        assert card["error"][0] < 0.8 * card["error"][1]  # measured 0.25 (flow, 3) to 0.74 (table, 1)
        assert f"| {nfe} | {card['error'][0]:.4f} ({card['rmse'][0]:.4f}) | {card['error'][1]:.4f}" in readme and best in readme
        if law == "table":
            assert bool(torch.isin(kept.tableau.nodes.t, schedule.times).all()) and network(model).times - before <= set(
                schedule.times.tolist()
            )
    counted = [(done, note) for done, note in told if note.startswith("3 evaluations: sweep")]
    assert (2, "3 evaluations: sweep 1 of at most 2") in counted and (0, "48 of 48 trajectories") in told and told[-1] == (3, "")


def test_no_hand_made_pair_is_better_than_the_one_on_the_card(tmp_path: Path) -> None:
    """All pairs, measured here on the noises that rank them: the first of those that are fitted to, here all."""
    found, trajectories = made(tmp_path, model := toy(), (3,))[3].sampler.card, Trajectories.load(tmp_path / "trajectories")
    states, error = trajectories.states(range(32)), dict[str, float]()
    for solver in ("dpm-solver-pp-2m", "unipc-2"):
        for spacing in GRIDS.keys() - {"linspace", "leading", "trailing"}:  # those of a table
            pair = f"{solver} on {spacing}"
            gap = sample(model.denoiser, named(pair, LAW, 3), states[:, 0]) - states[:, -1]
            error[pair] = float(gap.double().square().mean((1, 2)).sqrt().mean())
    assert found["best_hand_made"] == min(error, key=error.__getitem__) and found["error"][0] < found["error"][1]


def test_network_evaluations_are_counted_and_foreseen(tmp_path: Path) -> None:
    found = made(tmp_path, model := toy(), (1, 2, 4))
    on_cards = sum(one.sampler.card["network_evaluations"] for one in found.values())
    shared = 48 * 16 + 16 * 8 + 32 * 17  # trajectories, those on half the steps in the first batch, moments at all levels
    assert network(model).samples == on_cards + shared
    assert 0.5 < TINY.evaluations((1, 2, 4)) / (48 * 16 + on_cards) < 2  # measured 1.4
    many = replace(TINY, num=256, held_out=64, noises=128, window=64, iterations=3, batch=128)
    spent = made(tmp_path / "many", toy(), (5,), many)[5].sampler.card["network_evaluations"] + 320 * 16
    assert 0.5 < many.evaluations((5,)) / spent < 2


def test_options_change_what_is_fitted(tmp_path: Path) -> None:
    made(tmp_path, toy(), (1,))
    given = Trajectories.load(tmp_path / "trajectories")

    def of(name: str, **changes: object) -> Fitted:
        return made(tmp_path / name, toy(), (3,), replace(TINY, **changes), trajectories=given)[3]

    full, short = of("full", iterations=0), of("short", iterations=0, form=replace(SCALAR, history=1))
    assert "swept" not in full.stages and full.sampler.tableau.update.shape == (3, 2, 5, *SHAPE)
    assert short.sampler.tableau.update.shape == (3, 2, 3) and not bool(short.sampler.tableau.bias.any())
    drawn = of("drawn", iterations=0, form=FitForm(ridge=1e5, shrink=1e5)).stages["fitted in sequence"]
    assert drawn[0] > 2 * full.stages["fitted in sequence"][0]  # near the parent: measured 2.5
    still = of("still", form=SCALAR, move=False).sampler
    assert still.card["chosen"] == "swept" and bool(torch.isin(still.grid.t, given.t).all())
    moved = of("moved", form=SCALAR).sampler
    assert moved.card["levels_from"] == still.card["levels_from"] and not bool(torch.isin(moved.grid.t, given.t).all())


def test_statistics_of_the_model_let_a_third_solver_compete(tmp_path: Path, monkeypatch) -> None:
    lam, ones = torch.linspace(-4, 4, 9, dtype=torch.float64), torch.ones(9, *SHAPE)
    asked = []
    monkeypatch.setattr(
        Model, "statistics", lambda model, guidance: asked.append(guidance) or ModelStatistics(lam, ones, 0 * ones, 0 * ones, SHAPE, LAW)
    )
    monkeypatch.setattr(fit_search, "HAND_MADE", ())
    card = made(tmp_path, toy(), (3,), replace(TINY, iterations=0))[3].sampler.card
    assert card["best_hand_made"].startswith("dpm-solver-v3 on ") and asked == [1.0]


def test_a_guided_model(tmp_path: Path) -> None:
    one = made(tmp_path, model := toy(classes=2), guidance=3.0)[2].sampler
    assert one.card["guidance"] == Trajectories.load(tmp_path / "trajectories").guidance == 3.0
    assert errors(model, one, tmp_path, guidance=3.0) == pytest.approx((one.card["error"][0], one.card["rmse"][0]), rel=FLOAT32)
    assert errors(model, one, tmp_path)[0] > 1.5 * one.card["error"][0]
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
def test_the_stage_is_the_one_of_least_error_that_has_no_larger_rmse_but_by_chance(
    tmp_path: Path, monkeypatch, sequence: Tensor, swept: Tensor, hand_made: Tensor, chosen: str
) -> None:
    """Than the best hand-made pair has; both on the held-out noises."""
    real, given, seen = fit_search.FitSearch.errors, iter((sequence, swept, hand_made)), []

    def told(self, tableau: Tableau, rows: range) -> Tensor:
        if rows != range(32, 48):
            return real(self, tableau, rows)
        seen.append(tableau)
        return next(given)

    monkeypatch.setattr(fit_search.FitSearch, "errors", told)
    one = made(tmp_path)[2].sampler
    which = {"fitted in sequence": 0, "swept": 1, " on ": 2}[chosen]
    ours = (sequence, swept, hand_made)[which]
    assert chosen in one.card["chosen"] and same(one.tableau, seen[which])
    assert one.card["error"] == pytest.approx([float(ours.mean()), float(hand_made.mean())])
    assert one.card["rmse"] == pytest.approx([float(of.square().mean().sqrt()) for of in (ours, hand_made)])


@pytest.mark.parametrize("spoiled", ["sweep", "fit_in_sequence", "both"])
def test_where_a_fit_goes_wrong_another_sampler_takes_its_place(tmp_path: Path, monkeypatch, spoiled: str) -> None:
    def worse(tableau: Tableau) -> Tableau:
        return replace(tableau, update=1e-3 * tableau.update)

    if spoiled != "fit_in_sequence":
        monkeypatch.setattr(fit_search, "sweep", lambda windows, tableau, *rest, **options: worse(tableau))
    if spoiled != "sweep":
        real = fit_search.fit_in_sequence
        monkeypatch.setattr(fit_search, "fit_in_sequence", lambda *args, **options: worse(real(*args, **options)))
    one, card = made(tmp_path, model := toy(), (3,))[3].sampler, Sampler.load(tmp_path / "nfe-03").card
    if spoiled == "sweep":
        assert card["chosen"] == "fitted in sequence" and card["error"][0] < card["error"][1]
        return
    assert card["chosen"] == card["best_hand_made"] and card["error"][0] == card["error"][1] and card["rmse"][0] == card["rmse"][1]
    assert same(one.tableau, named(card["chosen"], LAW, 3).tableau)
    assert errors(model, one, tmp_path)[0] == pytest.approx(card["error"][0], rel=FLOAT32)
    assert f"| {card['chosen']} |" in (tmp_path / "README.md").read_text()


# -- killed, continued, and refused ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that nobody killed, and its calls of the network."""
    folder = tmp_path_factory.mktemp("whole")
    made(folder, model := toy(), (2, 3))
    return folder, network(model).calls


def no_scratch(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("note", "kept"),
    [
        ("32 of 48 trajectories", set()),
        pytest.param("2 evaluations: fit in sequence", {"trajectories"}, marks=pytest.mark.slow),
        ("3 evaluations: sweep 1 of at most 2", {"trajectories", "nfe-02", "README.md"}),
    ],
)
def test_a_killed_run_continues_to_the_same_files(tmp_path: Path, whole: tuple[Path, int], note: str, kept: set[str]) -> None:
    def mortal(done: int, said: str) -> None:
        if said == note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, toy(), (2, 3), observe=mortal)
    assert {path.name for path in tmp_path.iterdir()} == (kept or {"trajectories"}) and no_scratch(tmp_path)
    assert (tmp_path / "trajectories" / "manifest.json").exists() == bool(kept)
    made(tmp_path, model := toy(), (2, 3))
    assert contents(tmp_path) == contents(whole[0]) and network(model).calls < whole[1]


@pytest.mark.parametrize("where", [pytest.param(0.02, marks=pytest.mark.slow), 0.8])  # trajectories, the second sampler
def test_a_run_killed_in_the_network_leaves_nothing_half_made(tmp_path: Path, whole: tuple[Path, int], where: float) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, toy(stop=int(where * whole[1])), (2, 3))
    assert no_scratch(tmp_path)
    for path in tmp_path.glob("nfe-*"):
        assert same(Sampler.load(path).tableau, Sampler.load(whole[0] / path.name).tableau)
    made(tmp_path, toy(), (2, 3))
    assert contents(tmp_path) == contents(whole[0])


def test_what_a_run_that_could_not_clean_up_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".students-dead").mkdir()
    (tmp_path / ".students-dead" / "x-0.safetensors").write_bytes(b"cut")
    made(tmp_path, toy(), (1,), replace(TINY, iterations=0))
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "trajectories", "nfe-01"} and no_scratch(tmp_path)


def test_a_finished_folder_is_only_read(whole: tuple[Path, int]) -> None:
    before = contents(whole[0])
    found = made(whole[0], model := toy(), (3, 2))
    assert network(model).calls == 0 and contents(whole[0]) == before
    for nfe, one in found.items():
        assert same(one.sampler.tableau, Sampler.load(nfe_folder(whole[0], nfe)).tableau)
        assert one.stages == {name: tuple(pair) for name, pair in one.sampler.card["stages"].items()} and len(one.stages) == 3


def test_more_evaluations_can_be_added(tmp_path: Path, whole: tuple[Path, int]) -> None:
    made(tmp_path, toy(), (2,))
    first, shards = contents(tmp_path / "nfe-02"), contents(tmp_path / "trajectories")
    made(tmp_path, model := toy(), (2, 3))
    assert contents(tmp_path / "nfe-02") == first and contents(tmp_path / "trajectories") == shards
    assert contents(tmp_path) == contents(whole[0]) and network(model).calls < 0.8 * whole[1]
    made(tmp_path, toy(), (1,))
    readme = (tmp_path / "README.md").read_text()
    assert re.findall(r"^\| (\d+) \|", readme, re.M) == ["1", "2", "3"]  # the card is of all that is there


def test_other_work_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    made(tmp_path, toy(classes=2))
    before = contents(tmp_path)
    other = VarianceExploding(0.05, 20.5)
    requests = [(toy(other, classes=2), TINY, 1.0), (toy(), TINY, 1.0), (toy(classes=2), TINY, 2.0)]
    for changes in (
        {"num": 40},
        {"held_out": 24},
        {"num": 24, "held_out": 24},
        {"levels": 12},
        {"seed": 4},
        {"iterations": 3},
        {"batch": 4},
    ):
        requests.append((toy(classes=2), replace(TINY, **changes), 1.0))
    for form in (SCALAR, FitForm(ridge=1e-5)):
        requests.append((toy(classes=2), replace(TINY, form=form), 1.0))
    for model, config, guidance in requests:
        for nfe in ((2,), (1, 2), (1,)):  # also before others are made, and where only others are asked for
            with pytest.raises(ArtifactError, match=r"(another|other) .*(remove it|use another folder)"):
                made(tmp_path, model, nfe, config, guidance=guidance)
        assert network(model).calls == 0
    assert contents(tmp_path) == before
    made(tmp_path, model := toy(classes=2), guidance=1)  # the same number as 1.0
    assert network(model).calls == 0 and contents(tmp_path) == before
    (tmp_path / "nfe-02" / "sampler.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="sampler.safetensors is damaged"):
        made(tmp_path, toy(classes=2))


def test_trajectories_of_another_fit_are_not_mixed_in(tmp_path: Path) -> None:
    """Where no sampler was made before the run was killed."""
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, toy(stop=40))
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match="another teacher or request .*: remove it .*or use another folder"):
        made(tmp_path, toy(), config=replace(TINY, levels=12))
    assert contents(tmp_path) == before and before


def test_mistakes_are_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for error, says, request in [
        (SolverError, "takes 1 to 16 evaluations, got none", {"nfe": ()}),
        (SolverError, "takes 1 to 16 evaluations, got 0, 3", {"nfe": (3, 0)}),
        (SolverError, "takes 1 to 16 evaluations, got -1", {"nfe": (-1,)}),
        (SolverError, "takes 1 to 16 evaluations, got 2, 17", {"nfe": (2, 17)}),
        (SolverError, "takes 1 to 5 evaluations, got 6", {"model": toy(DiscreteVP.linear(6)), "nfe": (6,)}),
        (ArtifactError, "cannot write .*: .*file is a file; choose a folder", {"folder": tmp_path / "file"}),
        (ArtifactError, "cannot write .*: .*file is a file; choose a folder", {"folder": tmp_path / "file" / "below"}),
        (FewstepError, "finite guidance", {"guidance": float("nan"), "model": toy(classes=2)}),
    ]:
        asked = {"folder": tmp_path / "new", "model": toy(), **request}
        with pytest.raises(error, match=says):
            made(**asked)
        assert network(asked["model"]).calls == 0 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "config", [TINY, replace(TINY, window=4), replace(TINY, noises=4), replace(TINY, held_out=4), replace(TINY, num=4)]
)
def test_more_processes_than_noises_are_refused_before_any_work(tmp_path: Path, monkeypatch, config: FitConfig) -> None:
    least = min(config.num, config.held_out, config.noises, config.window)
    monkeypatch.setattr(module, "process", lambda: (0, least + 1))
    with pytest.raises(FewstepError, match=f"{least + 1} processes cannot share {least} noises: use fewer processes"):
        made(tmp_path / "new", model := toy(), config=config)
    assert network(model).calls == 0 and not (tmp_path / "new").exists()


def test_a_network_that_is_not_finite_is_named_and_leaves_nothing_half_made(tmp_path: Path, whole: tuple[Path, int]) -> None:
    given = Trajectories.load(whole[0] / "trajectories")
    with pytest.raises(ModelError, match="not finite .* at evaluation 5 of 16"):
        made(tmp_path, toy(bad=5))
    assert contents(tmp_path) == {}
    for bad in (3, 36, 50, 80, 100, 130):  # the moments, and all through the fit that follows
        with pytest.raises(FewstepError, match="not finite.*: check (the network|its weights)"):
            made(tmp_path, toy(bad=bad), trajectories=given)
        assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"num": 1}, FewstepError, "at least 2 trajectories"),
        ({"held_out": 1}, FewstepError, "2 held out"),
        ({"noises": 1}, FewstepError, "2 noises"),
        ({"window": 1}, FewstepError, "2 in a window"),
        ({"batch": 0}, FewstepError, "a batch of 1"),
        ({"levels": 0}, FewstepError, "1 level"),
        ({"iterations": -1}, FewstepError, "no negative number"),
        ({"seed": -1}, FewstepError, "no negative number"),
        ({"seed": 2**63 - 10}, FewstepError, "seeds must lie between 0 and 2\\^63"),
        ({"parent": "dpm-solver-p"}, SolverError, "unknown solver 'dpm-solver-p': did you mean"),
        ({"parent": "unipc-2"}, SolverError, "a fit starts from a solver that .*: dpm-solver-pp-2m"),
        ({"parent": "ddim:eta=1"}, SolverError, "without noise"),
        ({"parent": "deis-3"}, SolverError, "a fit starts from a solver that"),
        ({"parent": "heun"}, SolverError, "a fit starts from a solver that"),
        ({"parent": "dpm-solver-v3"}, SolverError, "statistics"),
        ({"parent": "dpm-solver-pp-3m", "form": FitForm(history=2)}, SolverError, "by at most 2 outputs"),
    ],
)
def test_configurations_that_cannot_be_are_refused(options: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        FitConfig(**options)
    assert "\n" not in str(caught.value)


def test_parents_that_a_fit_can_start_from(tmp_path: Path) -> None:
    for parent, history in (("ddim", None), ("dpm-solver-pp-3m", 3), ("unipc-2:corrector=false", None), ("dpm-solver-pp-2m", 1)):
        config = replace(TINY, parent=parent, form=FitForm(history=history), iterations=0, num=16, levels=8)
        one = made(tmp_path / parent, toy(), (4,), config)[4].sampler
        assert one.tableau.memory == (history or 4) and one.card["error"][0] < one.card["error"][1]
        assert one.options["parent"] == ("ddim" if history == 1 else parent)  # no room for more than one output


# -- given trajectories, batches, processes --------------------------------------------------------------------------


def test_given_trajectories_are_fitted_to(tmp_path: Path, whole: tuple[Path, int]) -> None:
    given = Trajectories.load(whole[0] / "trajectories")
    found = made(tmp_path / "new", model := toy(), (2, 3), trajectories=given)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"README.md", "nfe-02", "nfe-03"}
    assert network(model).calls < whole[1]
    for nfe, one in found.items():
        assert same(one.sampler.tableau, Sampler.load(nfe_folder(whole[0], nfe)).tableau)
    made(tmp_path / "new", model := toy(), (2, 3), trajectories=given)
    assert network(model).calls == 0


def test_given_trajectories_that_do_not_suit_are_refused(tmp_path: Path, whole: tuple[Path, int]) -> None:
    given, inner = Trajectories.load(whole[0] / "trajectories"), TimeGrid(fine_grid(LAW, 16).t[:-1])
    short = generate_trajectories(toy(), inner, TrajectoryConfig(48, 16, batch=16), tmp_path / "short")
    for error, says, request in [
        (ArtifactError, "trajectories of model", {"model": toy(VarianceExploding(0.05, 20.5))}),
        (ArtifactError, "trajectories of guidance 1.0, but they are used with guidance 2.0", {"guidance": 2.0}),
        (
            FewstepError,
            "48 trajectories are fewer than 32 to fit to and 17 held out: ask for fewer",
            {"config": replace(TINY, held_out=17)},
        ),
        (SolverError, "takes 1 to 16 evaluations, got 17", {"nfe": (17,)}),
        (FewstepError, "a fit takes trajectories from 20 to 0.05", {"trajectories": short}),
    ]:
        with pytest.raises(error, match=says):
            made(tmp_path / "new", **{"model": toy(), "trajectories": given, **request})
        assert not (tmp_path / "new").exists()


def test_the_size_of_batches_does_not_matter(tmp_path: Path, whole: tuple[Path, int]) -> None:
    """States are float32, so sums in another order differ by rounding."""
    given = Trajectories.load(whole[0] / "trajectories")
    one, two = (made(tmp_path / str(batch), toy(), (3,), replace(TINY, batch=batch), trajectories=given)[3] for batch in (5, 32))
    assert one.sampler.card["chosen"] == two.sampler.card["chosen"] and one.sampler.card["levels_from"] == two.sampler.card["levels_from"]
    assert one.stages.keys() == two.stages.keys()
    for name, pair in one.stages.items():
        assert two.stages[name] == pytest.approx(pair, rel=SWEPT if name == "swept" else ORDER)


UNET = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (16,), "norm_num_groups": 4, "layers_per_block": 1}
UNET |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}


@pytest.mark.slow
def test_two_processes_fit_what_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_ours(tmp_path / "model", UNet2DModel(**UNET), "edm(0.5)", LAW, (1, 4, 4), None)
    words = [str(tmp_path / "model"), "--nfe", "2,3", "-n", "32", "--held-out", "16", "--iterations", "2", "--batch", "8", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for count in ("1", "2"):
        environment, out = {**os.environ, "OMP_NUM_THREADS": "1"}, str(tmp_path / count)
        command = [*torchrun, count, "-m", "fewstep", "fit", *words, out]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=600)
    assert {path.name for path in (tmp_path / "2").iterdir()} == {"README.md", "trajectories", "nfe-02", "nfe-03"}
    for nfe in (2, 3):
        one, two = (Sampler.load(nfe_folder(tmp_path / count, nfe)) for count in ("1", "2"))
        for key in ("chosen", "levels_from", "best_hand_made", "network_evaluations", "model", "identity"):
            assert one.card[key] == two.card[key]
        assert one.card["stages"].keys() == two.card["stages"].keys()
        for name, pair in one.card["stages"].items():
            assert two.card["stages"][name] == pytest.approx(pair, rel=SWEPT if name == "swept" else ORDER)
    assert load_model(tmp_path / "model").fingerprint == Sampler.load(tmp_path / "2" / "nfe-02").card["model"]
