"""What is shown at a prompt is one short line, and no tensor is printed."""

import pytest
import torch
from tests.problems import DSNO, LAW, statistics, toy

import fewstep
from fewstep import DiscreteVP, RectifiedFlow, Sampler, VarianceExploding, VPCosine, VPLinear, make_grid
from fewstep.models.flow_map import FirstOrderMap
from fewstep.models.problem import Problem
from fewstep.sampling.grid_table import GridTable

TABLE = DiscreteVP.scaled_linear()
SAMPLER = Sampler.build("unipc-2", "angle", VPLinear(), nfe=8)
SHOWN = {
    "Model": (toy(classes=10), "Model(toy, sample, samples of (2, 2), 10 classes)"),
    "Model without a shape": (fewstep.Model(abs, LAW, "v"), "Model(builtin_function_or_method, v, no shape)"),
    "Model of the package": (fewstep.load_model(DSNO), "Model(digits-dsno, flow map, samples of (1, 8, 8), 10 classes)"),
    "Sampler": (SAMPLER, "Sampler(unipc-2, 8 evaluations, noise levels 152 to 0.0105)"),
    "Sampler with options": (
        Sampler.build("ddim:eta=0.5", "angle", RectifiedFlow(), nfe=4),
        "Sampler(ddim:eta=0.5, 4 evaluations, noise levels inf to 0)",
    ),
    "Tableau": (SAMPLER.tableau, "Tableau(8 evaluations, memory 3)"),
    "Nodes": (SAMPLER.tableau.nodes, "Nodes(8 evaluations, t = 1 to 0.001)"),
    "TimeGrid": (SAMPLER.grid, "TimeGrid(8 steps, t = 1 to 0.001)"),
    "ModelStatistics": (statistics(), "ModelStatistics(221 levels, lam -8 to 14, samples of (1,), guidance 1)"),
    "DiscreteVP": (TABLE, "DiscreteVP(1000 times, noise levels 0.0292 to 14.6)"),
    "DiscreteVP to the clean image": (
        TABLE.zero_terminal_snr().to_clean(),
        "DiscreteVP(1000 times, noise levels 0.0292 to inf, to the clean image)",
    ),
    "VPLinear": (VPLinear(), "VPLinear(beta_min=0.1, beta_max=20.0, t_min=0.001, t_max=1.0, t_clean=0.0)"),
    "VPCosine": (VPCosine(), "VPCosine(s=0.008, t_min=0.001, t_max=0.9946, t_clean=0.0)"),
    "VarianceExploding": (VarianceExploding(), "VarianceExploding(t_min=0.002, t_max=80.0, t_clean=0.0)"),
    "RectifiedFlow": (RectifiedFlow(), "RectifiedFlow(shift=1.0, t_min=0.0, t_max=1.0, t_clean=0.0)"),
    "GridTable": (
        GridTable("ddim", "0" * 16, 1.0, LAW, {n: make_grid("angle", LAW, n) for n in (3, 8)}),
        "GridTable(ddim, 3 to 8 evaluations, guidance 1)",
    ),
    "GaussianDenoiser": (
        fewstep.GaussianDenoiser(VPLinear(), torch.zeros(3), torch.tensor(1.0)),
        "GaussianDenoiser(means (1, 3), VPLinear)",
    ),
    "FirstOrderMap": (FirstOrderMap(toy()), "FirstOrderMap(denoiser=Model(toy, sample, samples of (2, 2)))"),
    "Problem": (Problem(toy(), 2.0 - 1), "Problem(model=Model(toy, sample, samples of (2, 2)), guidance=1.0, device=device(type='cpu'))"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_repr_is_short(name):
    value, expected = SHOWN[name]
    assert repr(value) == expected and len(expected) < 120


def test_a_step_is_shown_by_its_place():
    steps = []
    fewstep.sample(toy(), "ddim", nfe=2, seeds=[1, 2], observe=steps.append)
    assert [repr(step) for step in steps] == [f"Step({i}, t = {float(step.t):.4g}, states of (2, 2, 2))" for i, step in enumerate(steps)]
