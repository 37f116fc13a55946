"""Third-party samplers by ``module:function``: what they are given, what is counted, what their failures do."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.evaluate.problems import toy
from torch import Tensor

from fewstep import FewstepError, Sampler, SolverError, TimeGrid, VarianceExploding, load_model, sample
from fewstep.core.schedule import DiscreteVP, NoiseSchedule, RectifiedFlow
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.benchmark.run import benchmark
from fewstep.evaluate.benchmark.third_party import ThirdPartySampler, run_third_party
from fewstep.evaluate.rows import picture_file, read_errors
from fewstep.models.analytic import GaussianDenoiser
from fewstep.sampling.noise import start_noise

SOURCE = """
import torch

def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones([len(x)]), **(extra_args or {}))
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x

def midpoint(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        middle = (s * t).sqrt()
        half = x + (x - model(x, s)) / s * (middle - s)
        x = x + (half - model(half, middle)) / middle * (t - s)
    return x

def random(model, x, sigmas, **_):
    return model(x, sigmas[0]) + 0.1 * torch.randn_like(x)

def jump(model, x, sigmas, **_):
    torch.rand(1)  # drawn, and not used
    return model(x, sigmas[0]) + 0.1

def raises(model, x, sigmas, **_):
    raise KeyError("no such thing")

def nothing(model, x, sigmas, **_):
    return None

def half(model, x, sigmas, **_):
    return x[:, :, ::2]

def blind(model, x, sigmas, **_):
    return x

def nan(model, x, sigmas, **_):
    model(x, sigmas[0])
    return torch.where(x > 0, x, torch.nan)

number = 3
"""
SMALL = {"num": 12, "batch": 8}
FLOAT32 = 1e-4


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two sources of one size in one second have one bytecode
    (tmp_path / "theirs.py").write_text(SOURCE)
    yield "theirs"
    sys.modules.pop("theirs", None)


LAWS = [(VarianceExploding(), 0.002), (DiscreteVP.linear(), 0.0), (RectifiedFlow(), 0.01)]


@pytest.mark.parametrize(("schedule", "end"), LAWS)
@pytest.mark.parametrize(("name", "ours"), [("euler", "euler"), ("midpoint", "dpm-solver-2s")])
def test_its_samples_are_those_of_our_solver_of_the_formula(module: str, schedule: NoiseSchedule, end: float, name: str, ours: str) -> None:
    denoiser = GaussianDenoiser(schedule, torch.full((1, 2, 2), 0.3).double(), torch.tensor(0.5).double())
    start = 0.9 if isinstance(schedule, RectifiedFlow) else schedule.t_max
    grid = TimeGrid.uniform(schedule, 6, t_max=start, t_min=end or schedule.t_min)
    for clean in (False, True) if name == "euler" else (False,):
        grid = grid.to_clean(schedule) if clean else grid
        sampler = Sampler.build(ours, grid, schedule)
        x = start_noise(sampler.tableau.nodes, range(5), (1, 2, 2)).double()
        made = run_third_party(ThirdPartySampler.load(f"{module}:{name}"), denoiser, grid, x, None, range(5))
        assert float((made - sample(denoiser, sampler, x)).abs().max()) < 1e-6


def test_the_model_is_told_times_exactly_and_may_be_asked_for_others(module: str) -> None:
    schedule, asked = VarianceExploding(), []
    exact = GaussianDenoiser(schedule, torch.zeros(1, 2, 2), torch.tensor(0.5))

    class Seen:
        schedule = exact.schedule

        def __call__(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            asked.append(t)
            assert cond == "condition" and x.dtype == torch.float32
            return exact(x, t)

    grid, x = TimeGrid.karras(schedule, 4), torch.zeros(3, 1, 2, 2)
    run_third_party(ThirdPartySampler.load(f"{module}:euler"), Seen(), grid, x, "condition", range(3))
    assert [t.shape for t in asked] == [()] * 4 and torch.equal(torch.stack(asked), grid.t[:-1])  # not those rounded to float32

    def two_levels(model, x, sigmas, **_):
        return model(x, torch.tensor([3.0, 80.0, 3.0]))

    made = run_third_party(ThirdPartySampler.of(two_levels), Seen(), grid, x + 1, "condition", range(3))
    torch.testing.assert_close(made[1], exact(x + 1, torch.tensor(80.0).double())[1])
    torch.testing.assert_close(asked[-1], torch.tensor([3.0, 80.0, 3.0]).double())


def test_entries_that_cannot_be_are_named(module: str, tmp_path: Path) -> None:
    for entry, why in (
        ("nowhere_at_all:f", "cannot import nowhere_at_all:f: ModuleNotFoundError"),
        ("theirs:nope", "cannot import theirs:nope: AttributeError"),
        ("theirs:number", "theirs:number is not a function but a int"),
        ("diffusers:f", "names no sampler"),
        (":f", "names no function"),
    ):
        with pytest.raises(FewstepError, match=why):
            BenchmarkConfig(("ddim",), ("angle",), (5,), peers=(entry,))
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(FewstepError, match="cannot import broken:f: SyntaxError"):
        ThirdPartySampler.load("broken:f")
    assert str(tmp_path) not in sys.path
    flow = RectifiedFlow()
    with pytest.raises(SolverError, match="theirs:euler cannot start at alpha = 0"):
        denoiser = GaussianDenoiser(flow, torch.zeros(1, 2, 2), torch.tensor(0.5))
        run_third_party(ThirdPartySampler.load("theirs:euler"), denoiser, TimeGrid.uniform(flow, 3), torch.zeros(1, 1, 2, 2), None, [0])


def test_rows_say_what_was_made_and_why_it_failed(module: str, tmp_path: Path) -> None:
    peers = tuple(f"theirs:{name}" for name in ("euler", "midpoint", "raises", "nothing", "half", "nan", "blind", "jump", "random"))
    config = BenchmarkConfig(("euler",), ("karras",), (5,), peers=peers, **SMALL)
    results = benchmark(toy(), config, tmp_path / "out").results
    rows = {(row["library"], row["solver"]): row for row in results["rows"]}
    assert rows["theirs", "euler"]["rmse"] == pytest.approx(rows["fewstep", "euler"]["rmse"], rel=FLOAT32)
    assert (rows["theirs", "euler"]["nfe"], rows["theirs", "euler"]["planned"]) == (5, None)
    assert (rows["theirs", "midpoint"]["nfe"], rows["theirs", "midpoint"]["planned"]) == (10, 5)
    assert (rows["theirs", "jump"]["nfe"], rows["theirs", "jump"]["planned"]) == (1, 5)
    why = {name: rows["theirs", name]["failed"] for name in ("raises", "nothing", "half", "nan", "blind", "random")}
    assert why["raises"] == "KeyError: 'no such thing'"
    assert "answered a NoneType to a state of shape (8, 1, 2, 2)" in why["nothing"] and "answered shape (8, 1, 1, 2)" in why["half"]
    assert why["nan"].endswith("of 12 samples are not finite") and why["blind"] == "it made no network evaluation"
    assert why["random"].startswith("random adds noise, so its samples follow no trajectory")
    for name in why:
        row = rows["theirs", name]
        assert row["rmse"] is row["seconds"] is row["fd"] is row["rmse_ci"] is None and row["nfe"] == 5
        assert not picture_file(tmp_path / "out", ("theirs", name, "karras", 5)).exists()
    assert read_errors(picture_file(tmp_path / "out", ("theirs", "midpoint", "karras", 5))).shape == (12,)


def test_rows_are_run_again_when_the_source_changed_or_they_failed_and_not_before(module: str, tmp_path: Path) -> None:
    config = BenchmarkConfig(("euler",), ("karras",), (4,), peers=("theirs:euler", "theirs:midpoint", "theirs:jump"), **SMALL)

    def rows(config: BenchmarkConfig = config) -> dict[str, dict]:
        made = benchmark(toy(), config, tmp_path / "out").results["rows"]
        return {f"{row['library']}:{row['solver']}": row for row in made}

    first = rows()
    assert rows() == first  # the same seconds
    sys.modules.pop("theirs")
    (tmp_path / "theirs.py").write_text(SOURCE.replace("+ 0.1\n", "+ 0.2\n"))
    again = rows()
    assert again["fewstep:euler"] == first["fewstep:euler"]
    for name in ("theirs:euler", "theirs:midpoint"):
        assert again[name]["artifact"] != first[name]["artifact"] and again[name]["rmse"] == first[name]["rmse"]
    assert again["theirs:jump"]["rmse"] != first["theirs:jump"]["rmse"]
    sys.modules.pop("theirs")
    (tmp_path / "theirs.py").write_text(SOURCE.replace("return x\n", "raise ValueError\n"))
    assert rows()["theirs:euler"]["failed"] == "ValueError: "
    sys.modules.pop("theirs")
    (tmp_path / "theirs.py").write_text(SOURCE)
    back = rows()
    assert all(back[name]["rmse"] == first[name]["rmse"] for name in first)


@pytest.mark.slow
def test_class_labels_reach_the_model_unseen(module: str, tmp_path: Path) -> None:
    config = BenchmarkConfig(("euler",), ("angle",), (3,), peers=("theirs:euler",), num=8, batch=8)
    mine, theirs = benchmark(load_model("digits-edm"), config, tmp_path / "out").results["rows"]
    assert theirs["rmse"] == pytest.approx(mine["rmse"], rel=FLOAT32) and theirs["labels"] == mine["labels"]


@pytest.mark.slow
def test_the_guide_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its three lines are one step of DDIM, and both of its comparisons run as they are written."""
    front, compared, jump = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs" / "benchmarks.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_samplers.py").write_text(jump)
    config = BenchmarkConfig(("ddim", "unipc-2"), ("karras",), (1, 5), peers=("my_samplers:jump", "diffusers"), **SMALL)
    rows = {
        (row["library"], row["solver"], row["nfe"]): row for row in benchmark(toy(), config, tmp_path / "runs" / "bench").results["rows"]
    }
    sys.modules.pop("my_samplers")
    assert rows["my_samplers", "jump", 1]["rmse"] == pytest.approx(rows["fewstep", "ddim", 1]["rmse"], rel=FLOAT32)
    names: dict = {}
    exec(compile(front, "benchmarks.md", "exec"), names)
    assert names["best"].nfe == 5 and (tmp_path / "report.html").is_file()
    exec(compile(compared, "benchmarks.md", "exec"), names)
    assert names["verdict"] == "equal" and names["low"] <= names["difference"] <= names["high"]
