"""Which rows a benchmark has: those of names, those of the model's own grids, those of saved samplers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep import (
    AdaptedDenoiser,
    ArtifactError,
    FewstepError,
    GaussianDenoiser,
    GridError,
    Model,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    make_grid,
    make_solver,
)
from fewstep.evaluate.benchmark.peers import PEERS
from fewstep.evaluate.benchmark.plan import OPTIMIZED, BenchmarkConfig, grid_of, impossible, planned_keys, saved_samplers, solvers_of
from fewstep.sampling.grid_table import GridTable

LAW = VarianceExploding(0.05, 20.0)
GRID = TimeGrid(torch.tensor([20.0, 3.0, 0.5, 0.05]))


def model(folder: Path | None = None) -> Model:
    """An analytic one."""
    exact = GaussianDenoiser(LAW, torch.zeros(1, 2, 2), torch.tensor(0.5))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return exact(x, t)

    return Model("toy", AdaptedDenoiser(network, LAW, "sample"), (1, 2, 2), folder=folder)


def saved(folder: Path, name: str = "ddim", grid: TimeGrid = GRID, **card: object) -> Path:
    """A sampler of the toy."""
    about = {"name": name, "of": "toy", "model": model().fingerprint, "guidance": 1.0, **card}
    return Sampler.build(make_solver(name), grid, LAW, **about).save(folder)


def test_rows_by_name_in_reading_order() -> None:
    config = BenchmarkConfig(("ddim", "unipc-2"), ("angle", OPTIMIZED), (5, 6))
    keys = list(planned_keys(config))
    assert keys[:3] == [("fewstep", "ddim", "angle", 5), ("fewstep", "unipc-2", "angle", 5), ("fewstep", "ddim", OPTIMIZED, 5)]
    assert len(keys) == len(set(keys)) == 8
    peers = list(planned_keys(BenchmarkConfig((), ("angle",), (5,), peers=("diffusers",))))
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
        ({"num": 1}, FewstepError, "num of at least 2"),
        ({"batch": 0}, FewstepError, "batch of at least 1"),
        ({"seed": -1}, FewstepError, "seeds must lie"),
    ],
)
def test_plans_that_cannot_be_are_refused(options: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        BenchmarkConfig(**{"solvers": ("ddim",), "grids": ("angle",), "nfe": (5,), **options})


def test_saved_samplers_alone_are_enough(tmp_path: Path) -> None:
    config = BenchmarkConfig((), (), (), samplers=(tmp_path,))
    assert list(planned_keys(config)) == []


def test_fitted_samplers_are_rows_once_whatever_the_grids() -> None:
    config = BenchmarkConfig(("ddim", "fitted"), ("angle", "karras", OPTIMIZED), (5, 6))
    keys = list(planned_keys(config))
    assert keys.count(("fewstep", "fitted", OPTIMIZED, 5)) == keys.count(("fewstep", "fitted", OPTIMIZED, 6)) == 1
    assert [key for key in keys if key[1] == "fitted"] == [("fewstep", "fitted", OPTIMIZED, nfe) for nfe in (5, 6)] and len(keys) == 8
    assert set(solvers_of(model(), config)) == {"ddim"}


def test_fitted_samplers_of_the_models_own_folder(tmp_path: Path) -> None:
    saved(tmp_path / "fitted" / "nfe-03", name="ddim")
    saved(tmp_path / "fitted-guidance-2" / "nfe-05", grid=make_grid("angle", LAW, 5), guidance=2.0)
    toy, config = model(tmp_path), BenchmarkConfig(("ddim", "fitted"), ("angle",), (3, 5))
    solvers, found = solvers_of(toy, config), saved_samplers(toy, config)
    assert set(found) == {("fewstep", "fitted", OPTIMIZED, 3)} and torch.equal(found["fewstep", "fitted", OPTIMIZED, 3].grid.t, GRID.t)
    assert impossible(("fewstep", "fitted", OPTIMIZED, 3), toy, config, solvers) == ""
    why = impossible(("fewstep", "fitted", OPTIMIZED, 5), toy, config, solvers)
    assert "no fitted sampler of toy with 5 evaluations at guidance 1, there are some of 3" in why
    guided = BenchmarkConfig(("fitted",), ("angle",), (3, 5), guidance=2.0)
    assert set(saved_samplers(toy, guided)) == {("fewstep", "fitted", OPTIMIZED, 5)}
    assert saved_samplers(toy, BenchmarkConfig(("ddim",), ("angle",), (3,))) == {}  # only where they are asked for
    other = model(tmp_path / "other")
    saved(tmp_path / "other" / "fitted" / "nfe-03", model="0" * 16)
    with pytest.raises(ArtifactError, match="made for other weights"):
        saved_samplers(other, config)


def test_samplers_below_each_folder_are_rows(tmp_path: Path) -> None:
    saved(tmp_path / "a" / "ddim" / "nfe-03")
    saved(tmp_path / "a" / "unipc-2" / "nfe-03", "unipc-2")
    saved(tmp_path / "a" / "unipc-2" / "nfe-05", "unipc-2", make_grid("angle", LAW, 5))
    saved(tmp_path / "b")
    folders = (tmp_path / "a", tmp_path / "b")
    found = saved_samplers(model(), BenchmarkConfig((), (), (), samplers=folders))
    a, b = map(str, folders)
    assert set(found) == {("fewstep", "ddim", a, 3), ("fewstep", "unipc-2", a, 3), ("fewstep", "unipc-2", a, 5), ("fewstep", "ddim", b, 3)}
    assert torch.equal(found["fewstep", "ddim", b, 3].grid.t, GRID.t)
    some = saved_samplers(model(), BenchmarkConfig((), (), (5, 7), samplers=(tmp_path / "a",)))
    assert set(some) == {("fewstep", "unipc-2", a, 5)}
    Sampler.build(make_solver("ddim"), GRID, LAW).save(tmp_path / "plain")  # made by hand: no card
    assert {key[1] for key in saved_samplers(model(), BenchmarkConfig((), (), (), samplers=(tmp_path / "plain",)))} == {"DDIM"}


def test_samplers_of_something_else_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "other", model="0" * 16, of="another")
    saved(tmp_path / "guided", guidance=2.0)
    (tmp_path / "empty").mkdir()
    for folder, says in {
        "other": rf"is a sampler of another \({'0' * 16}\) at guidance 1, not of toy \({model().fingerprint}\) at 1",
        "guided": r"is a sampler of toy .* at guidance 2, not of toy .* at 1",
        "empty": "no sampler below .*empty: name a folder of fewstep optimize",
        "nowhere": "no sampler below .*nowhere",
    }.items():
        with pytest.raises(ArtifactError, match=says):
            saved_samplers(model(), BenchmarkConfig((), (), (), samplers=(tmp_path / folder,)))
    guided = BenchmarkConfig((), (), (), guidance=2.0, samplers=(tmp_path / "guided",))
    assert len(saved_samplers(model(), guided)) == 1


def test_grids_of_rows(tmp_path: Path) -> None:
    toy = model(tmp_path)
    GridTable("ddim", toy.fingerprint, 1.0, LAW, {3: GRID}).save(tmp_path / "optimized" / "ddim")
    config = BenchmarkConfig(("ddim",), ("angle", OPTIMIZED), (3,))
    assert torch.equal(grid_of(("fewstep", "ddim", OPTIMIZED, 3), toy, config, 3).t, GRID.t)
    assert torch.equal(grid_of(("fewstep", "ddim", "angle", 3), toy, config, 3).t, make_grid("angle", LAW, 3).t)


def test_what_cannot_be_done_has_a_reason(tmp_path: Path) -> None:
    toy = model(tmp_path)
    GridTable("ddim", toy.fingerprint, 1.0, LAW, {3: GRID}).save(tmp_path / "optimized" / "ddim")
    config = BenchmarkConfig(("ddim", "heun", "unipc-2", "dpm-solver-v3"), ("angle", OPTIMIZED), (3,), peers=("diffusers",))
    solvers = solvers_of(toy, config)
    assert isinstance(solvers["dpm-solver-v3"], SolverError) and not isinstance(solvers["ddim"], SolverError)
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
        why = impossible(key, toy, config, solvers)
        assert (says in why) if says else why == "", (key, why)


def test_grids_for_other_weights_are_no_gap_but_an_error(tmp_path: Path) -> None:
    toy = model(tmp_path)
    GridTable("ddim", "0" * 16, 1.0, LAW, {3: GRID}).save(tmp_path / "optimized" / "ddim")
    config = BenchmarkConfig(("ddim",), (OPTIMIZED,), (3,))
    with pytest.raises(ArtifactError, match="made for other weights"):
        impossible(("fewstep", "ddim", OPTIMIZED, 3), toy, config, solvers_of(toy, config))


def test_samplers_that_are_not_there_or_there_twice_are_said(tmp_path: Path) -> None:
    saved(tmp_path / "a" / "one")
    with pytest.raises(ArtifactError, match="the samplers below .*a use 3 evaluations, not 5, 7: ask for those"):
        saved_samplers(model(), BenchmarkConfig((), (), (5, 7), samplers=(tmp_path / "a",)))
    saved(tmp_path / "a" / "two", grid=make_grid("angle", LAW, 3))
    with pytest.raises(ArtifactError, match="has two samplers of ddim with 3 evaluations, one in .*two: name its folder"):
        saved_samplers(model(), BenchmarkConfig((), (), (), samplers=(tmp_path / "a",)))
