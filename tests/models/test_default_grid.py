"""The grid where none is named: uniform times where predicted noise is divided by an alpha that vanishes, angle elsewhere."""

import pytest
import torch
from tests.apps.conftest import run as command

import fewstep
from fewstep import DiscreteVP, RectifiedFlow, VarianceExploding, VPCosine, VPLinear
from fewstep.models.generate import default_grid

TABLE = DiscreteVP.linear()
CASES = [
    (TABLE, "epsilon", "uniform"),
    (DiscreteVP.scaled_linear(), "epsilon", "uniform"),
    (DiscreteVP.squared_cosine(), "epsilon", "uniform"),
    (VPLinear(), "score", "uniform"),
    (VPCosine(), "epsilon", "uniform"),
    (TABLE, "v", "angle"),
    (TABLE, "sample", "angle"),
    (VarianceExploding(), "epsilon", "angle"),
    (RectifiedFlow(), "flow", "angle"),
]


@pytest.mark.parametrize("schedule, kind, grid", CASES)
def test_the_default_follows_prediction_and_law(schedule, kind, grid):
    model = fewstep.Model(lambda x, t: 0.5 * x, schedule, kind, shape=(2,))
    assert default_grid(model) == grid
    plain = fewstep.sample(model, "unipc-2", nfe=5, seeds=range(3))
    assert torch.equal(plain, fewstep.sample(model, "unipc-2", nfe=5, grid=grid, seeds=range(3)))
    assert not torch.allclose(plain, fewstep.sample(model, "unipc-2", nfe=5, grid="quadratic", seeds=range(3)))


@pytest.mark.slow
def test_a_trained_network_is_nearer_to_its_exact_samples():
    model = fewstep.load_model("digits-ddpm")
    exact = fewstep.sample(model, "unipc-3", nfe=64, grid="quadratic", seeds=range(16))

    def error(solver, grid):
        return float((fewstep.sample(model, solver, nfe=5, grid=grid, seeds=range(16)) - exact).square().mean().sqrt())

    for solver in ("ddim", "unipc-2", "dpm-solver-pp-2m", "deis-3"):
        assert error(solver, None) < 0.9 * error(solver, "angle")


@pytest.mark.slow
def test_the_command_line_takes_the_same(tmp_path, monkeypatch):
    for name, grid in (("digits-ddpm", "uniform"), ("digits-edm", "angle")):
        assert command(monkeypatch, "sample", name, "-n", 4, "--npz", "--out", tmp_path / name) == 0
        assert command(monkeypatch, "sample", name, "-n", 4, "--npz", "--grid", grid, "--out", tmp_path / f"{name}-named") == 0
        one, two = (tmp_path / folder / "samples.npz" for folder in (name, f"{name}-named"))
        assert one.read_bytes() == two.read_bytes()
