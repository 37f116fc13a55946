"""The published reference implementations, number for number (see tests/golden/README.md)."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep import Sampler, Solver, TimeGrid, VarianceExploding, make_solver, sample
from fewstep.models.analytic import MixtureDenoiser
from fewstep.solvers import DPMSolverPP, UniPC
from fewstep.solvers.stencil import ALWAYS, NEVER

GOLDEN_STEP = 1e-10  # two float64 implementations of the same formulas over 20 steps from sigma = 80; measured 6e-13
EXACT = 1e-5  # 300 steps of third and fourth order, against a tight Runge-Kutta solution; measured 1e-6


def read(name: str) -> dict[str, torch.Tensor]:
    with np.load(Path(__file__).parents[1] / "golden" / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


PROBLEM, SAMPLES = read("mixture.npz"), read("baselines.npz")
SCHEDULE = VarianceExploding(t_min=float(PROBLEM["t_0"]), t_max=float(PROBLEM["t_T"]))
DENOISER = MixtureDenoiser(SCHEDULE, PROBLEM["means"].reshape(5, 3, 2, 2), PROBLEM["stds"], PROBLEM["weights"])
FORMS = {"dpmsolver": "midpoint", "taylor": "taylor"}


def parse(key: str) -> tuple[Solver, int]:
    """The solver and the number of steps that made a sample, from its name."""
    if match := re.fullmatch(r"dpmpp_o(\d)_(\w+)_lof(\d)_n(\d+)", key):
        order, form, lowers, steps = match.groups()
        return DPMSolverPP(int(order), FORMS[form], lower_order_below=10 if lowers == "1" else NEVER), int(steps)
    weights, order, lowers, steps = re.fullmatch(r"unipc_(bh\d)_o(\d)_lof(\d)_n(\d+)", key).groups()
    return UniPC(int(order), weights, lower_order_below=ALWAYS if lowers == "1" else NEVER), int(steps)


@pytest.mark.parametrize("key", sorted(SAMPLES))
def test_reference_samples(key):
    solver, steps = parse(key)
    sampler = Sampler.build(solver, TimeGrid.logsnr(SCHEDULE, steps), SCHEDULE)
    torch.testing.assert_close(sample(DENOISER, sampler, PROBLEM["x_T"]), SAMPLES[key], rtol=GOLDEN_STEP, atol=GOLDEN_STEP)


@pytest.mark.parametrize("name", ["dpm-solver-3s", "unipc-3"])
def test_many_steps_reach_the_exact_solution(name):
    sampler = Sampler.build(make_solver(name), TimeGrid.logsnr(SCHEDULE, 300), SCHEDULE)
    torch.testing.assert_close(sample(DENOISER, sampler, PROBLEM["x_T"]), PROBLEM["x_exact"], rtol=EXACT, atol=EXACT)
