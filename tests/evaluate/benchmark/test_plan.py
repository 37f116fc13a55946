"""Which rows a benchmark has: those of names, of the model's own grids and of saved samplers; and which of them cannot run, and why."""

from pathlib import Path

import pytest
import torch
from tests.evaluate.problems import LAW, toy
from tests.problems import DSNO

from fewstep import ArtifactError, FewstepError, GridError, Model, Sampler, SolverError, TimeGrid, load_model, make_grid
from fewstep.evaluate.benchmark.entries import Entry, HandMadeEntry, PeerEntry, SamplerEntry, ThirdPartyEntry
from fewstep.evaluate.benchmark.peers import PEERS
from fewstep.evaluate.benchmark.plan import BenchmarkConfig, planned_entries
from fewstep.evaluate.rows import Key
from fewstep.models.carried import FITTED, OPTIMIZED
from fewstep.models.problem import Problem
from fewstep.sampling.grid_table import GridTable

GRID = TimeGrid(torch.tensor([20.0, 3.0, 0.5, 0.05]))


def planned(config: BenchmarkConfig, model: Model | None = None) -> dict[Key, Entry]:
    """The entries of a config by key, which are all different."""
    entries = planned_entries(Problem(toy(LAW) if model is None else model, config.guidance), config)
    made = {entry.key: entry for entry in entries}
    assert len(made) == len(entries)
    return made


def saved(folder: Path, name: str = "ddim", grid: TimeGrid = GRID, **card: object) -> Path:
    """A sampler of the toy."""
    about = {"name": name, "of": "toy", "model": toy(LAW).fingerprint, "guidance": 1.0, **card}
    return Sampler.build(name, grid, LAW, card=about).save(folder)


def below(*folders: Path, **options: object) -> BenchmarkConfig:
    return BenchmarkConfig((), (), **{"nfe": (), **options}, samplers=folders)


def test_rows_by_name_in_reading_order() -> None:
    keys = list(planned(BenchmarkConfig(("ddim", "unipc-2", "ddim"), ("angle", OPTIMIZED), (5, 6))))
    assert keys[:3] == [("fewstep", "ddim", "angle", 5), ("fewstep", "unipc-2", "angle", 5), ("fewstep", "ddim", OPTIMIZED, 5)]
    assert len(keys) == 8
    peers = planned(BenchmarkConfig((), ("angle",), (5,), peers=("diffusers",)))
    assert [key[1] for key in peers] == list(PEERS) and {key[0] for key in peers} == {"diffusers"}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"solvers": ()}, FewstepError, "at least one solver"),
        ({"grids": ()}, FewstepError, "one grid"),
        ({"nfe": ()}, FewstepError, "one nfe"),
        ({"nfe": (5, 0)}, SolverError, "nfe must be"),
        ({"solvers": ("dim",)}, SolverError, "did you mean ddim"),
        ({"grids": ("optimised",)}, GridError, "did you mean optimized"),
        ({"grids": ("angel",)}, GridError, "did you mean angle"),
        ({"peers": ("difusers",)}, FewstepError, "did you mean diffusers"),
        ({"num": 1}, FewstepError, "num is at least 2, got 1"),
        ({"batch": 0}, FewstepError, "batch is at least 1, got 0"),
        ({"seed": -1}, FewstepError, "seeds must lie"),
    ],
)
def test_plans_that_cannot_be_are_refused(options: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        BenchmarkConfig(**{"solvers": ("ddim",), "grids": ("angle",), "nfe": (5,), **options})


def test_each_kind_of_row_says_what_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kinds.py").write_text("def theirs(model, x, sigmas, **_):\n    return model(x, sigmas[0])\n")
    monkeypatch.syspath_prepend(tmp_path)
    saved(tmp_path / "ddim")
    config = BenchmarkConfig(("ddim",), ("angle",), (3,), peers=("diffusers", "kinds:theirs"), samplers=(tmp_path,))
    made = planned(config)
    kinds = {HandMadeEntry: "ddim", SamplerEntry: "ddim", PeerEntry: "ddim", ThirdPartyEntry: "theirs"}
    found = {type(entry): entry for entry in made.values() if kinds[type(entry)] == entry.solver}
    assert set(found) == set(kinds)
    assert {kind: entry.library for kind, entry in found.items()} == {
        HandMadeEntry: "fewstep",
        SamplerEntry: "fewstep",
        PeerEntry: "diffusers",
        ThirdPartyEntry: "kinds",
    }
    assert found[HandMadeEntry].artifact is found[HandMadeEntry].statistics is None
    assert str(found[PeerEntry].artifact).startswith("diffusers-")
    assert all(found[kind].artifact for kind in (SamplerEntry, ThirdPartyEntry))
    seeds = [0, 1]
    for entry in found.values():
        assert entry.why_not() == "" and entry.samples(entry.problem.denoiser, seeds, None).shape == (2, 1, 2, 2)
        assert entry.same_as(entry) and entry.renamed("other").key == (entry.library, "other", entry.grid, 3)


def test_fitted_samplers_are_rows_once_whatever_the_grids() -> None:
    made = planned(BenchmarkConfig(("ddim", FITTED), ("angle", "karras", OPTIMIZED), (5, 6)))
    assert [key for key in made if key[1] == FITTED] == [("fewstep", FITTED, OPTIMIZED, nfe) for nfe in (5, 6)] and len(made) == 8


def test_fitted_samplers_of_the_models_own_folder(tmp_path: Path) -> None:
    saved(tmp_path / "fitted" / "nfe-03", name="ddim")
    saved(tmp_path / "fitted-guidance-2" / "nfe-05", grid=make_grid("angle", LAW, 5), guidance=2.0)
    model = toy(LAW, tmp_path)
    made = planned(BenchmarkConfig(("ddim", FITTED), ("angle",), (3, 5)), model)
    there, missing = (made["fewstep", FITTED, OPTIMIZED, nfe] for nfe in (3, 5))
    assert there.why_not() == "" and torch.equal(there.time_grid.t, GRID.t)
    assert "no fitted sampler of toy with 5 evaluations at guidance 1, there are some of 3" in missing.why_not()
    assert {key[1] for key in planned(BenchmarkConfig(("ddim",), ("angle",), (3,)), model)} == {"ddim"}  # only where they are asked for
    saved(tmp_path / "other" / "fitted" / "nfe-03", model="0" * 16)
    with pytest.raises(ArtifactError, match="made for other weights"):
        planned(BenchmarkConfig((FITTED,), ("angle",), (3,)), toy(LAW, tmp_path / "other"))


def test_samplers_below_each_folder_are_rows(tmp_path: Path) -> None:
    saved(tmp_path / "a" / "ddim" / "nfe-03")
    saved(tmp_path / "a" / "unipc-2" / "nfe-03", "unipc-2")
    saved(tmp_path / "a" / "unipc-2" / "nfe-05", "unipc-2", make_grid("angle", LAW, 5))
    saved(tmp_path / "b")
    folders = (tmp_path / "a", tmp_path / "b")
    found, (a, b) = planned(below(*folders)), map(str, folders)
    assert set(found) == {("fewstep", "ddim", a, 3), ("fewstep", "unipc-2", a, 3), ("fewstep", "unipc-2", a, 5), ("fewstep", "ddim", b, 3)}
    assert torch.equal(found["fewstep", "ddim", b, 3].time_grid.t, GRID.t)
    assert set(planned(below(tmp_path / "a", nfe=(5, 7)))) == {("fewstep", "unipc-2", a, 5)}
    Sampler.build("ddim", GRID, LAW).save(tmp_path / "plain")  # made by hand: no card
    assert {key[1] for key in planned(below(tmp_path / "plain"))} == {"ddim"}


def test_samplers_of_something_else_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "other", model="0" * 16, of="another")
    saved(tmp_path / "guided", guidance=2.0)
    (tmp_path / "empty").mkdir()
    mine = toy(LAW).fingerprint
    for folder, says in {
        "other": rf"other is a sampler of another \({'0' * 16}\) at guidance 1, not of toy \({mine}\) at 1",
        "guided": r"guided is a sampler of toy .* at guidance 2, not of toy .* at 1",
        "empty": "no sampler below .*empty: name a folder of fewstep optimize",
        "nowhere": "no sampler below .*nowhere",
    }.items():
        with pytest.raises(ArtifactError, match=says):
            planned(below(tmp_path / folder))


def test_samplers_that_are_not_there_or_there_twice_are_said(tmp_path: Path) -> None:
    saved(tmp_path / "a" / "one")
    with pytest.raises(ArtifactError, match="the samplers below .*a use 3 evaluations, not 5, 7: ask for those"):
        planned(below(tmp_path / "a", nfe=(5, 7)))
    saved(tmp_path / "a" / "two", grid=make_grid("angle", LAW, 3))
    with pytest.raises(ArtifactError, match="has two samplers of ddim with 3 evaluations, one in .*two: name its folder"):
        planned(below(tmp_path / "a"))


def test_grids_of_rows_and_what_cannot_be_done_has_a_reason(tmp_path: Path) -> None:
    model = toy(LAW, tmp_path)
    GridTable("ddim", model.fingerprint, 1.0, LAW, {3: GRID}).save(tmp_path / "optimized" / "ddim")
    config = BenchmarkConfig(("ddim", "heun", "unipc-2", "dpm-solver-v3"), ("angle", OPTIMIZED, "linspace"), (3, 4), peers=("diffusers",))
    made = planned(config, model)
    own, named = made["fewstep", "ddim", OPTIMIZED, 3], made["fewstep", "ddim", "angle", 3]
    assert torch.equal(own.time_grid.t, GRID.t) and torch.equal(named.time_grid.t, make_grid("angle", LAW, 3).t)
    assert own.artifact is not None and named.artifact is None
    for key, says in {
        ("fewstep", "ddim", "angle", 3): "",
        ("fewstep", "ddim", OPTIMIZED, 3): "",
        ("diffusers", "ddim", OPTIMIZED, 3): "",
        ("fewstep", "ddim", OPTIMIZED, 4): "no optimized grid of 4 evaluations for ddim here, only of 3",
        ("fewstep", "unipc-2", OPTIMIZED, 3): "no optimized grid of toy for unipc-2",
        ("diffusers", "unipc-2", OPTIMIZED, 3): "no optimized grid of toy for unipc-2",
        ("fewstep", "heun", "angle", 3): "2 evaluations a step",
        ("fewstep", "dpm-solver-v3", "angle", 3): "needs statistics",
        ("fewstep", "ddim", "linspace", 3): "linspace",
    }.items():
        why = made[key].why_not()
        assert (says in why) if says else why == "", (key, why)


def test_grids_for_other_weights_are_no_gap_but_an_error(tmp_path: Path) -> None:
    model = toy(LAW, tmp_path)
    GridTable("ddim", "0" * 16, 1.0, LAW, {3: GRID}).save(tmp_path / "optimized" / "ddim")
    (entry,) = planned(BenchmarkConfig(("ddim",), (OPTIMIZED,), (3,)), model).values()
    with pytest.raises(ArtifactError, match="made for other weights"):
        entry.why_not()


def test_a_student_says_which_samplers_are_not_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kinds.py").write_text("def theirs(model, x, sigmas, **_):\n    return model(x, sigmas[0])\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model(DSNO)
    two = Sampler.build("unipc-2", model.optimized("ddim", 2), model.schedule).save(tmp_path / "made")
    config = BenchmarkConfig(("ddim", "unipc-2"), (OPTIMIZED, "karras"), (1, 2), peers=("diffusers", "kinds:theirs"), samplers=(two,))
    why = {key: entry.why_not() for key, entry in planned(config, model).items()}
    assert {key for key, said in why.items() if not said} == {
        *(("fewstep", "ddim", OPTIMIZED, nfe) for nfe in (1, 2)),
        *(("fewstep", name, "karras", 1) for name in ("ddim", "unipc-2")),  # from its first time to its last
    }
    assert "no sampler of kinds is for it" in why["kinds", "theirs", "karras", 1]
    assert "no sampler of diffusers is for it" in why["diffusers", "ddim", "karras", 1]
    assert "jumps between its own times only" in why["fewstep", "ddim", "karras", 2]
    assert "a flow map makes first-order steps alone" in why["fewstep", "unipc-2", str(two), 2]
