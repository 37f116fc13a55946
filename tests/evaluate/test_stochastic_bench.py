"""A benchmark of samplers that add noise: the contract of its rows, that a killed one goes on to the same, and what it refuses."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from tests.evaluate.problems import LAW, toy
from tests.problems import DSNO

import fewstep
from fewstep import ArtifactError, FewstepError, ModelError, SolverError
from fewstep.data.images import load_images
from fewstep.evaluate.benchmark.bench import NEXT_PATH
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.benchmark.run import benchmark
from fewstep.evaluate.metrics.distances import frechet_distance, load_features
from fewstep.evaluate.rows import read_results
from fewstep.evaluate.stochastic.rows import NoiseRow, read_noise_results, read_paths, save_paths
from fewstep.evaluate.stochastic.run import StochasticBench, StochasticBenchConfig, bench_stochastic
from fewstep.evaluate.stochastic.verdict import contests, ranked_rows
from fewstep.models.problem import Problem

NUM, PATHS, NFE = 12, 3, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "pictures.npz"
    np.savez(path, images=np.random.default_rng(0).integers(60, 200, (40, 2, 2), dtype=np.uint8))
    return str(path)


@pytest.fixture(scope="module")
def config(data: str) -> StochasticBenchConfig:
    solvers = ("ddim", "ddim:eta=0.5", "ddim:eta=1", "seeds-2")
    return StochasticBenchConfig(solvers, ("karras",), (3, NFE), num=NUM, batch=8, data=data, paths=PATHS)


@pytest.fixture(scope="module")
def folder(config: StochasticBenchConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("noise")
    bench_stochastic(Problem(toy(LAW)), config, out, command="fewstep bench")
    return out


def rows_of(results: dict[str, Any]) -> dict[tuple[str, int], NoiseRow]:
    rows = [NoiseRow(**row) for row in results["rows"]]
    return {(row.solver, row.key[3]): row for row in rows}


def untimed(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "solver_seconds", "peak_memory")} for row in results["rows"]
    ]


def test_every_row_keeps_the_contract(folder: Path) -> None:
    results = read_noise_results(folder / "results.json")
    rows = rows_of(results)
    names = ("ddim", "ddim:eta=0.5", "ddim:eta=1", "seeds-2")
    assert list(rows) == [*((name, 3) for name in names[:3]), *((name, 4) for name in names)]
    for (name, nfe), row in rows.items():
        assert row.failed is None and (row.nfe, row.calls, row.num, row.library, row.grid) == (nfe, nfe, NUM, "fewstep", "karras")
        assert row.fd_features == "pixels" and row.fd_ci is not None and row.levels is not None and len(row.levels) == nfe + 1
        assert row.seconds is not None and row.seconds > 0 and "rmse" not in {field.name for field in fields(row)}
        assert row.stochastic == (name != "ddim") and row.paths == (PATHS if row.stochastic else 1)
        assert row.of_paths is not None and len(row.of_paths) == row.paths
        distances, recalls = ([path[name] or 0.0 for path in row.of_paths] for name in ("fd", "recall"))
        assert row.fd == mean(distances) and row.recall == mean(recalls)
        assert row.fd_spread == (stdev(distances) if row.stochastic else None)
        kept = read_paths(folder, row.key)
        assert kept is not None and kept.shape == (row.paths, NUM, 1, 2, 2)
        spread = float(kept.double().var(0).mean().sqrt()) if row.stochastic else None
        assert row.spread == (None if spread is None else pytest.approx(spread, rel=1e-5))
    assert rows["ddim:eta=0.5", 4].options["eta"] == 0.5 and rows["ddim", 4].options["eta"] == 0
    assert 0 < (rows["ddim:eta=0.5", 4].spread or 0) < (rows["ddim:eta=1", 4].spread or 0)
    assert results["data"] == {"num": 40, "features": "pixels", "fd_halves": pytest.approx(results["data"]["fd_halves"])}
    ((key, why),) = [(one["key"], one["why"]) for one in results["skipped"]]
    assert key == ["fewstep", "seeds-2", "karras", 3] and "SEEDS2 takes 2 evaluations a step" in why


def test_a_path_is_a_set_of_samples_by_itself(folder: Path, data: str) -> None:
    """The first path is what `fewstep.sample` makes of the seeds, the next begin at the same starts; each is measured against the data."""
    model, rows = toy(LAW), rows_of(read_noise_results(folder / "results.json"))
    row = rows["ddim:eta=1", NFE]
    kept = read_paths(folder, row.key)
    assert kept is not None and row.of_paths is not None
    sampler = fewstep.Sampler.build("ddim:eta=1", "karras", LAW, nfe=NFE)
    torch.testing.assert_close(fewstep.sample(model, sampler, seeds=range(NUM)), kept[0])
    start = Problem(model).start(range(NUM), sampler.tableau.nodes)
    other = fewstep.sampling.loop.run(model, sampler.tableau, start, None, seeds=[seed + NEXT_PATH for seed in range(NUM)])
    torch.testing.assert_close(other, kept[1])
    pixels = load_features("pixels", (1, 2, 2))
    for path, samples in zip(row.of_paths, kept, strict=True):
        assert path["fd"] == pytest.approx(frechet_distance(load_images(data).x, samples, pixels))


def test_no_noise_is_a_limit_of_noise(config: StochasticBenchConfig, tmp_path: Path) -> None:
    both = replace(config, solvers=("ddim", "ddim:eta=0", "ddim:eta=0.000001", "sa-solver:tau=0", "ddim:eta=1"), nfe=(3,))
    rows = rows_of(bench_stochastic(Problem(toy(LAW)), both, tmp_path))
    assert [rows[name, 3].paths for name in both.solvers] == [1, 1, PATHS, 1, PATHS]
    assert rows["ddim:eta=0", 3].fd == rows["ddim", 3].fd == pytest.approx(rows["ddim:eta=0.000001", 3].fd, rel=1e-4)


def test_a_killed_run_goes_on_to_the_same_and_rows_add_up(folder: Path, config: StochasticBenchConfig, tmp_path: Path) -> None:
    seen = list[str]()

    def stop(done: int, note: str) -> None:
        seen.append(note)
        if note.startswith("ddim:eta=1 karras 3"):
            raise KeyboardInterrupt

    problem = Problem(toy(LAW))
    with pytest.raises(KeyboardInterrupt):
        bench_stochastic(problem, config, tmp_path, on_progress=stop, command="fewstep bench")
    assert len(read_noise_results(tmp_path / "results.json")["rows"]) == 2
    seen.clear()
    found = bench_stochastic(problem, config, tmp_path, on_progress=lambda done, note: seen.append(note), command="fewstep bench")
    assert seen[0] == "ddim:eta=1 karras 3" and untimed(found) == untimed(read_noise_results(folder / "results.json"))
    seen.clear()
    more = bench_stochastic(
        problem, replace(config, solvers=("sa-solver",), nfe=(3,)), tmp_path, on_progress=lambda done, note: seen.append(note)
    )
    assert seen == ["sa-solver karras 3", ""] and len(more["rows"]) == len(found["rows"]) + 1
    fewer = bench_stochastic(problem, replace(config, paths=2), tmp_path)  # another table
    assert {row["paths"] for row in fewer["rows"]} == {1, 2} and len(list(tmp_path.glob("results-*.json"))) == 1


FUNCTIONS = """
import torch

def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    torch.rand(1)  # drawn, and not used
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        x = x + (x - model(x, s)) / s * (t - s)
    return x

def noisy(model, x, sigmas, **_):
    return model(x, sigmas[0]) + 0.1 * torch.randn_like(x)

def broken(model, x, sigmas, **_):
    raise KeyError("no such thing")
"""


def test_somebody_elses_functions_say_by_their_samples_what_they_are(
    config: StochasticBenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "noisy_functions.py").write_text(FUNCTIONS)
    peers = tuple(f"noisy_functions:{name}" for name in ("euler", "noisy", "broken"))
    rows = rows_of(bench_stochastic(Problem(toy(LAW)), replace(config, solvers=("ddim",), nfe=(3,), peers=peers), tmp_path / "out"))
    sys.modules.pop("noisy_functions")
    assert [(rows[name, 3].stochastic, rows[name, 3].paths) for name in ("euler", "noisy")] == [(False, 1), (True, PATHS)]
    assert rows["euler", 3].fd == pytest.approx(rows["ddim", 3].fd, rel=1e-4) and rows["noisy", 3].nfe == 1
    assert rows["noisy", 3].spread == pytest.approx(0.1, rel=0.3)
    assert rows["broken", 3].failed == "KeyError: 'no such thing'" and rows["broken", 3].fd is None


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({"solvers": ("ddim", "unipc-2")}, SolverError, "none of ddim, unipc-2 adds noise"),
        ({"solvers": ("seeds-2",), "nfe": (3,)}, SolverError, "SEEDS2 takes 2 evaluations"),
        ({"solvers": ("sa-solvr",)}, SolverError, "unknown solver"),
        ({"solvers": ("ddim:eta=2",)}, SolverError, "between 0"),
        ({"paths": 1}, FewstepError, "paths is at least 2, got 1"),
        ({"num": 4}, FewstepError, "in the 4 features pixels needs more than 4 samples, got 4: make 5 or more"),
        ({"num": NEXT_PATH + 1}, FewstepError, "num is at most"),
        ({"data": None}, FewstepError, "toy does not know its data, and samplers that add noise are judged by their distance to it"),
        ({"data": "digits"}, FewstepError, "digits has images of shape .1, 8, 8., toy makes .1, 2, 2."),
        ({"features": "digits"}, FewstepError, "digits features are for shape"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_writes_nothing(
    config: StochasticBenchConfig, tmp_path: Path, changed: dict[str, Any], kind: type[FewstepError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        bench_stochastic(Problem(toy(LAW)), replace(config, **changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_data_and_students_are_refused(config: StochasticBenchConfig, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", images=np.zeros((4, 2, 2), "uint8"))
    with pytest.raises(FewstepError, match="needs more than 4 images of the data, got 4: name more of them"):
        StochasticBench.of(Problem(toy(LAW)), replace(config, data=str(tmp_path / "few.npz")))
    with pytest.raises(ModelError, match="is a student, which jumps from time to time and follows no SDE"):
        StochasticBench.of(Problem(fewstep.load_model(DSNO)), replace(config, data=None))


def test_the_cost_is_known_beforehand(config: StochasticBenchConfig) -> None:
    assert StochasticBench.of(Problem(toy(LAW)), config).cost == NUM * (3 * (1 + 2 * PATHS) + 4 * (1 + 3 * PATHS))


def test_a_trajectory_error_is_refused_to_samplers_that_add_noise(config: StochasticBenchConfig, data: str, tmp_path: Path) -> None:
    model, small = toy(LAW), {"num": 4, "batch": 4, "data": data}
    with pytest.raises(SolverError, match="sa-solver adds noise, so its samples follow no trajectory and have no error to one"):
        benchmark(model, BenchmarkConfig(("sa-solver",), ("karras",), (3,), **small), tmp_path / "alone")
    results = benchmark(model, BenchmarkConfig(("ddim", "sa-solver"), ("karras",), (3,), **small), tmp_path / "mixed").results
    assert [row["solver"] for row in results["rows"]] == ["ddim"] and "fewstep bench --stochastic" in results["skipped"][0]["why"]


def test_one_benchmark_is_not_taken_for_another(folder: Path, config: StochasticBenchConfig, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="of a benchmark of samplers that add noise"):
        read_results(folder / "results.json")
    (tmp_path / "results.json").write_text(json.dumps({"rows": [], "problem": {"num": 12}}))
    with pytest.raises(ArtifactError, match="of another benchmark than --stochastic"):
        bench_stochastic(Problem(toy(LAW)), config, tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"problem": {"paths": 2}}))
    with pytest.raises(ArtifactError):
        read_noise_results(tmp_path / "results.json")
    key = ("fewstep", "ddim", "karras", 3)
    assert read_paths(tmp_path, key) is None
    save_paths(tmp_path, key, torch.zeros(2, 20, 1, 2, 2))
    assert (saved := read_paths(tmp_path, key)) is not None and saved.shape == (2, 12, 1, 2, 2)
    next((tmp_path / "samples").iterdir()).write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="damaged"):
        read_paths(tmp_path, key)


def made(solver: str, nfe: int, fd: float | None, stochastic: bool | None, interval: list[float] | None = None) -> NoiseRow:
    return NoiseRow(solver, "fewstep", "karras", nfe, 8, 1.0, stochastic, 2 if stochastic else 1, {}, fd=fd, fd_ci=interval)


def test_the_best_of_each_kind_are_apart_where_their_intervals_do_not_meet() -> None:
    rows = [made("noisy", 5, 3.0, True, [2.5, 3.5]), made("plain", 5, 1.0, False, [0.8, 1.2]), made("worse", 5, 2.0, False, [1.8, 2.2])]
    rows += [made("noisy", 20, 0.5, True, [0.4, 0.6]), made("plain", 20, 0.9, False, [0.7, 1.1]), made("broken", 20, None, None)]
    rows += [made("noisy", 10, 1.0, True, [0.8, 1.2]), made("plain", 10, 0.9, False, [0.7, 1.1])]
    rows += [made("noisy", 50, 0.5, True, [0.4, 0.6]), made("noisy", 1, 0.5, True), made("plain", 1, 0.5, False)]
    assert [(one.nfe, one.verdict) for one in contests(rows)] == [(1, None), (5, "no noise"), (10, "not apart"), (20, "noise"), (50, None)]
    best = contests(rows)[1]
    assert best.deterministic is rows[1] and best.stochastic is rows[0]
    assert [row.solver for row in ranked_rows(rows) if row.nfe == 5] == ["plain", "worse", "noisy"]
