"""What a fit in a folder may be continued with, what is refused, given trajectories and parents."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.learn.samplers.test_fit import ORDER, SCALAR, SWEPT, TINY, made, network, same
from tests.problems import LAW, contents, names, toy

from fewstep import (
    ArtifactError,
    DiscreteVP,
    FewstepError,
    ModelError,
    SolverError,
    TimeGrid,
    VarianceExploding,
    generate_trajectories,
)
from fewstep.learn.samplers import fit as module
from fewstep.learn.samplers import fit_search
from fewstep.learn.samplers.fit import FitConfig, fit, plan_fit
from fewstep.learn.search.coefficients import FitForm
from fewstep.learn.teacher.gram import fine_grid
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig


def test_what_a_run_that_could_not_clean_up_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".fewstep-dead").mkdir()
    (tmp_path / ".fewstep-dead" / "x-0.safetensors").write_bytes(b"cut")
    made(tmp_path, toy(), (1,), replace(TINY, iterations=0))
    assert names(tmp_path) == {"README.md", "plan.json", "trajectories", "nfe-01"}


def searches(plan: bytes) -> list[list[int]]:
    return [one["counts"] for one in json.loads(plan)["searches"]]


@pytest.mark.slow
def test_more_evaluations_can_be_added(tmp_path: Path) -> None:
    whole, added, config = tmp_path / "whole", tmp_path / "added", replace(TINY, iterations=1)
    made(whole, at_once := toy(), (2, 3), config)
    made(added, toy(), (2,), config)
    first, shards = contents(added / "nfe-02"), contents(added / "trajectories")
    made(added, model := toy(), (2, 3), config)
    assert contents(added / "nfe-02") == first and contents(added / "trajectories") == shards
    more, everything = contents(added), contents(whole)
    assert searches(more.pop("plan.json")) == [[2], [3]] and searches(everything.pop("plan.json")) == [[2, 3]]
    assert more == everything and network(model).calls < 0.8 * network(at_once).calls
    made(added, toy(), (1,), config)
    readme = (added / "README.md").read_text()
    assert re.findall(r"^\| (\d+) \|", readme, re.M) == ["1", "2", "3"]  # the card is of all that is there


@pytest.mark.slow
def test_other_work_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    short = replace(TINY, iterations=0)
    made(tmp_path, toy(classes=2), config=short)
    before = contents(tmp_path)
    requests = [(toy(), short, 1.0), (toy(classes=2), short, 2.0)]
    for changes in (
        {"num": 40},
        {"held_out": 24},
        {"num": 24, "held_out": 24},
        {"levels": 12},
        {"seed": 4},
        {"iterations": 3},
        {"batch": 4},
        {"form": SCALAR},
        {"form": FitForm(ridge=1e-5)},
    ):
        requests.append((toy(classes=2), replace(short, **changes), 1.0))
    for model, config, guidance in requests:
        for nfe in ((2,), (1, 2), (1,)):  # also before others are made, and where only others are asked for
            with pytest.raises(ArtifactError, match=r"(another|other) .*(remove it|use another folder)"):
                made(tmp_path, model, nfe, config, guidance=guidance)
        assert network(model).calls == 0
    assert contents(tmp_path) == before
    made(tmp_path, model := toy(classes=2), config=short, guidance=1)  # the same number as 1.0
    assert network(model).calls == 0 and contents(tmp_path) == before
    told = tmp_path / "nfe-02" / "sampler.json"
    whole = json.loads(told.read_text())
    for fact, value in (("rmse", None), ("error", [0.1]), ("chosen", 3)):
        told.write_text(json.dumps({**whole, "card": {**whole["card"], fact: value}}))
        with pytest.raises(ArtifactError, match=f"nfe-02 is damaged: {fact}"):
            made(tmp_path, toy(classes=2), config=short)
    (tmp_path / "nfe-02" / "sampler.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="sampler.safetensors is damaged"):
        made(tmp_path, toy(classes=2), config=short)


def test_trajectories_of_another_fit_are_not_mixed_in(tmp_path: Path) -> None:
    """Where no sampler was made before the run was killed."""
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, toy(stop=40))
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match="a fit of another model or configuration: remove it, or use another folder"):
        made(tmp_path, toy(), config=replace(TINY, levels=12))
    assert contents(tmp_path) == before and before


def test_mistakes_are_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for error, says, request in [
        (SolverError, "takes at least 1 evaluation, got none", {"nfe": ()}),
        (SolverError, "takes at least 1 evaluation, got 0, 3", {"nfe": (3, 0)}),
        (SolverError, "takes at least 1 evaluation, got -1", {"nfe": (-1,)}),
        (SolverError, "takes 1 to 16 evaluations, got 17", {"nfe": (2, 17)}),
        (SolverError, "takes 1 to 5 evaluations, got 6", {"model": toy(DiscreteVP.linear(6)), "nfe": (6,)}),
        (ArtifactError, "cannot write .*: .*file is a file; choose a folder", {"folder": tmp_path / "file"}),
        (ArtifactError, "cannot write .*: .*file is a file; choose a folder", {"folder": tmp_path / "file" / "below"}),
        (FewstepError, "guidance is a scale, as 2.0, got nan", {"guidance": float("nan"), "model": toy(classes=2)}),
    ]:
        asked = {"folder": tmp_path / "new", "model": toy(), **request}
        with pytest.raises(error, match=says):
            made(**asked)
        assert network(asked["model"]).calls == 0 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("config", [TINY, replace(TINY, noises=4), replace(TINY, held_out=4), replace(TINY, num=4, noises=4)])
def test_more_processes_than_noises_are_refused_before_any_work(tmp_path: Path, monkeypatch, config: FitConfig) -> None:
    least = plan_fit(toy(), 2, config).fewest
    monkeypatch.setattr(module, "process", lambda: (0, least + 1))
    with pytest.raises(FewstepError, match=f"{least + 1} processes cannot share {least} noises: use fewer processes"):
        made(tmp_path / "new", model := toy(), config=config)
    assert network(model).calls == 0 and not (tmp_path / "new").exists()


def test_a_network_that_is_not_finite_is_named_and_leaves_nothing_half_made(tmp_path: Path, given: Trajectories) -> None:
    with pytest.raises(ModelError, match="not finite .* at evaluation 5 of 16"):
        made(tmp_path / "new", toy(bad=5))
    assert not (tmp_path / "new").exists()
    for bad in (1, 3, 12, 30):  # all through the search for levels
        with pytest.raises(FewstepError, match="not finite.*: check (the network|its weights)"):
            made(tmp_path / "new", toy(bad=bad), trajectories=given)
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"num": 1}, FewstepError, "num is at least 2, got 1"),
        ({"held_out": 1}, FewstepError, "held_out is at least 2, got 1"),
        ({"noises": 1}, FewstepError, "noises is at least 2, got 1"),
        ({"num": 8, "noises": 9}, FewstepError, "noises are some of the num trajectories: at most 8, got 9"),
        ({"budget": 0}, FewstepError, "budget is at least 1, got 0"),
        ({"storage": "float8"}, FewstepError, "unknown dtype of trajectories 'float8'"),
        ({"batch": 0}, FewstepError, "batch is at least 1, got 0"),
        ({"levels": 0}, FewstepError, "levels is at least 1, got 0"),
        ({"iterations": -1}, FewstepError, "iterations is at least 0, got -1"),
        ({"seed": -1}, FewstepError, "seed is at least 0, got -1"),
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


@pytest.mark.slow
def test_parents_that_a_fit_can_start_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_search, "HAND_MADE", ("dpm-solver-pp-2m",))  # what is chosen here is the fit
    for parent, history in (("ddim", None), ("dpm-solver-pp-3m", 3), ("unipc-2:corrector=false", None), ("dpm-solver-pp-2m", 1)):
        config = replace(TINY, parent=parent, form=FitForm(history=history), iterations=0, num=16, levels=8)
        one = fit(toy(), 4, config=config)[4]
        assert one.tableau.memory == (history or 4) and one.card["error"][0] < one.card["error"][1]
        assert one.options["parent"] == ("ddim" if history == 1 else parent)  # no room for more than one output


# -- given trajectories, batches, processes --------------------------------------------------------------------------


@pytest.mark.slow
def test_given_trajectories_are_fitted_to(tmp_path: Path, given: Trajectories) -> None:
    config = replace(TINY, iterations=1)
    one = made(tmp_path / "own", toy(), (2, 3), replace(config, storage="float32"))
    two = made(tmp_path / "given", toy(), (2, 3), config, trajectories=given)
    assert names(tmp_path / "own") == {"README.md", "plan.json", "nfe-02", "nfe-03", "trajectories"}
    assert names(tmp_path / "given") == {"README.md", "plan.json", "nfe-02", "nfe-03"}
    assert all(same(one[nfe].tableau, two[nfe].tableau) for nfe in (2, 3))
    made(tmp_path / "given", model := toy(), (2, 3), config, trajectories=given)
    assert network(model).calls == 0


def test_given_trajectories_that_do_not_suit_are_refused(tmp_path: Path, given: Trajectories) -> None:
    inner = TimeGrid(fine_grid(LAW, 16).t[:-1])
    short = generate_trajectories(toy(), inner, tmp_path / "short", config=TrajectoryConfig(48, 16, batch=16))
    for error, says, request in [
        (ArtifactError, "trajectories of schedule", {"model": toy(VarianceExploding(0.05, 20.5))}),
        (ArtifactError, "trajectories of guidance 1.0, but they are used with guidance 2.0", {"guidance": 2.0, "model": toy(classes=2)}),
        (
            FewstepError,
            "48 trajectories are fewer than 32 to fit to and 17 held out: ask for fewer",
            {"config": replace(TINY, held_out=17)},
        ),
        (SolverError, "takes 1 to 16 evaluations, got 17", {"nfe": (17,)}),
        (FewstepError, "has its trajectories already: leave seed and storage out", {"config": replace(TINY, storage="float32")}),
        (FewstepError, "has its trajectories already: leave seed and storage out", {"config": replace(TINY, seed=5)}),
        (FewstepError, "a fit takes trajectories from 20 to 0.05", {"trajectories": short, "config": replace(TINY, levels=None)}),
        (FewstepError, "short has 15 cells between its levels, not 16: leave levels out", {"trajectories": short}),
    ]:
        with pytest.raises(error, match=says):
            made(tmp_path / "new", **{"model": toy(), "trajectories": given, **request})
        assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_size_of_batches_does_not_matter(given: Trajectories) -> None:
    """States are float32, so sums in another order differ by rounding."""
    one, two = (fit(toy(), 3, config=replace(TINY, batch=batch), trajectories=given)[3] for batch in (5, 32))
    assert (
        all(one.card[key] == two.card[key] for key in ("chosen", "levels_from")) and one.card["stages"].keys() == two.card["stages"].keys()
    )
    for name, pair in one.card["stages"].items():
        assert two.card["stages"][name] == pytest.approx(pair, rel=SWEPT if name == "swept" else ORDER)
