"""Every solver converges with the order that it claims.

Slopes are those of the log RMS error at the end over the log number of steps, from a number to its double, on grids of unequal steps
of VPLinear from noise level 3 to 0.1, in float64. An exact start gives the solver true past evaluations, so that the formula itself is
measured; a cold start is what a user runs, and there the low-order first steps may be all that is left in the limit.
"""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from tests.problems import ANY_STATISTICS, STOCHASTIC, karras_levels, mixture, moments, never_lowered, noise
from tests.problems import ODE as COMMON

from fewstep import Nodes, Solver, State, Tableau, TimeGrid, VarianceExploding, VPLinear, advance, tabulate
from fewstep.models.analytic import GaussianDenoiser
from fewstep.solvers import ABM, DPMSolverV3, UniPC

pytestmark = pytest.mark.usefixtures("each_integral_once")

ORDER_SLACK = 0.35  # how far from its limit a slope may still be at these numbers of steps
TABLE_SLACK = 0.05  # cold-start slopes are deterministic; this leaves room for another processor's rounding
STEPS = (32, 64)
LATE = {  # on few steps the last one, which nothing corrects, outweighs all others with its h^4
    "v3-3-true-same": (96, 192),
    "dpm-solver-3m": (96, 192),  # its two errors of h^2 and h^3 cancel at 24
    "sde-dpm-solver-1m": (96, 192),
    "exp-ab-4": (96, 192),
    "abm-4": (96, 192),
}
FINEST = 192
HIGH, LOW = 3.0, 0.1
WARM_UP = 2  # the first step is DDIM's, with an error of h^2 that no later step takes away
WARM_UP_CORRECTED = 3  # ... and the corrector raises it to h^3

# a pseudo derivative through one or two points is the true one, so those predictors are the same method
ODE = {**COMMON, **{name: solver for name, solver in ANY_STATISTICS.items() if not name.startswith(("v3-1-pseudo", "v3-2-pseudo"))}}
SCHEDULE = VPLinear()
DENOISER = mixture(SCHEDULE)
START = noise(8, 2) * math.sqrt(1 + HIGH**2)  # z = x / alpha

# Measured; near the limit of the order unless the warm-up or a sign change of the error (unipc-3-bh1) shows.
COLD_START = {
    "euler": 0.99,
    "ddim": 0.99,
    "heun": 2.01,
    "heun-flow": 2.00,
    "dpm-solver-2s": 2.01,
    "dpm-solver-3s": 2.99,
    "dpm-solver-2m": 2.05,
    "dpm-solver-3m": 1.99,
    "dpm-solver-1m": 0.99,
    "dpm-solver-2m-taylor": 2.01,
    "dpm-solver-3m-corrected": 1.95,
    "dpm-solver-pp-2m": 2.02,
    "dpm-solver-pp-3m": 1.75,
    "unipc-2": 3.02,
    "unipc-3": 3.87,
    "deis-3": 1.96,
    "ipndm": 1.72,
    "dpm-solver-pp-1": 0.99,
    "dpm-solver-pp-2m-taylor": 2.03,
    "dpm-solver-pp-3m-taylor": 1.71,
    "dpm-solver-pp-3m-corrected": 2.22,
    "dpm-solver-pp-3m-corrected-taylor": 2.21,
    "unipc-1-bh1": 2.04,
    "unipc-1-bh2": 2.00,
    "unipc-1-exact": 2.01,
    "unipc-2-bh1": 3.06,
    "unipc-2-bh2": 3.02,
    "unipc-2-exact": 3.03,
    "unipc-3-bh1": 5.26,
    "unipc-3-bh2": 3.87,
    "unipc-3-exact": 4.14,
    "unip-2-bh1": 2.05,
    "unip-2-bh2": 2.02,
    "unip-2-exact": 2.03,
    "unip-3-bh1": 2.19,
    "unip-3-bh2": 2.22,
    "unip-3-exact": 2.21,
    "deis-1": 0.99,
    "deis-2": 2.01,
    "deis-4": 2.14,
    "ipndm-1": 0.99,
    "ipndm-2": 2.01,
    "ipndm-3": 1.94,
    "lms": 2.37,
    "lms-1": 0.99,
    "lms-2": 1.95,
    "lms-3": 2.49,
    "ipndm-v": 2.37,
    "ipndm-v-2-published": 1.95,
    "ipndm-v-3-published": 1.99,
    "rho-ab-3": 2.49,
    "rho-rk-3": 2.97,
    "rho-rk-4": 4.00,
    "abm-1": 1.99,
    "abm-2": 2.96,
    "abm-3": 3.44,
    "abm-4": 3.09,
    "exp-ab-1": 0.99,
    "exp-ab-2": 2.03,
    "exp-ab-3": 2.22,
    "exp-ab-4": 2.04,
    "res-2s": 2.00,
    "res-3s": 2.95,
    "res-3s-thirds": 2.97,
    "etdrk-2": 1.99,
    "etdrk-4": 3.95,
    "etdrk-4-krogstad": 3.94,
    "gradient-estimation": 0.93,
    "gradient-estimation-1.5": 2.01,
    "pndm": 1.96,
    "pndm-runge-kutta": 2.04,
    "heunpp2": 1.03,
    "dpm-solver-fast": 2.04,
    "dpm-solver-fast-1": 2.08,
    "dpm-solver-fast-2": 3.09,
    "dpm-solver-v3": 1.85,
    "v3-1-true-none": 1.03,
    "v3-1-true-same": 1.03,
    "v3-1-true-pseudo": 1.94,
    "v3-1-true-true": 1.94,
    "v3-2-true-none": 2.10,
    "v3-2-true-same": 2.03,
    "v3-2-true-pseudo": 2.04,
    "v3-2-true-true": 3.28,
    "v3-3-true-none": 2.29,
    "v3-3-true-same": 2.01,
    "v3-3-true-pseudo": 2.04,
    "v3-3-true-true": 2.99,
    "v3-3-pseudo-none": 1.93,
    "v3-3-pseudo-same": 2.05,
    "v3-3-pseudo-pseudo": 2.02,
    "v3-3-pseudo-true": 3.00,
}


@functools.cache
def exact() -> torch.Tensor:
    """``z = x/alpha`` at the nodes of the finest grid, ``[FINEST + 1, B, 2]``, from ``dz/dlam = D - z``."""
    denoiser = mixture(VarianceExploding())

    def slope(lam: float, z: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(z).reshape(START.shape)
        return (denoiser(z, torch.tensor(math.exp(-lam), dtype=torch.float64)) - z).flatten().numpy()

    lam = -torch.log(karras_levels(FINEST, HIGH, LOW)).numpy()
    ends = (lam[0], lam[-1])
    # short steps: the interpolant between them is of lower order than the method
    solution = solve_ivp(slope, ends, START.flatten().numpy(), method="DOP853", t_eval=lam, rtol=1e-13, atol=1e-15, max_step=0.05)
    return torch.from_numpy(solution.y.T.copy()).reshape(-1, *START.shape)


@functools.cache
def prepared(name: str, steps: int) -> tuple[Nodes, Tableau]:
    solver = never_lowered(ODE[name])
    nodes = solver.nodes(TimeGrid.from_sigmas(SCHEDULE, karras_levels(steps, HIGH, LOW)), SCHEDULE)
    return nodes, tabulate(solver, nodes)


def exact_state(name: str, nodes: Nodes, tableau: Tableau, i: int, stride: int) -> State:
    """The state before evaluation ``i`` of a solver that was exact so far."""
    x = [nodes.alpha[k] * exact()[k * stride] for k in range(i + 1)]
    past = [ODE[name].record(nodes, k, x[k], DENOISER(x[k], nodes.t[k])) for k in reversed(range(i))]
    blank = tableau.start(x[-1])
    return blank._replace(anchor=None if blank.anchor is None else x[i - 1], history=(*past, *blank.history[len(past) :]))


def order_of(errors: dict[int, float]) -> float:
    (few, coarse), (many, fine) = errors.items()
    return math.log(coarse / fine) / math.log(many / few)


def slope(name: str, *, exact_start: bool) -> float:
    """The measured order."""
    errors = {}
    for steps in LATE.get(name, STEPS):
        nodes, tableau = prepared(name, steps)
        # a multistep solver has its full order once its history is full; one of several stages has it from the start
        first = ODE[name].memory - 1 if exact_start and ODE[name].stages == 1 else 0
        state = exact_state(name, nodes, tableau, first, FINEST // steps) if first else tableau.start(nodes.alpha[0] * START)
        for i, row in enumerate(tableau.rows(state.x)[first:], first):
            state = advance(row, state, DENOISER(state.x, nodes.t[i]))
        errors[steps] = float((state.x / nodes.alpha[-1] - exact()[-1]).square().mean().sqrt())
    return order_of(errors)


def corrects_the_first_step(solver: Solver) -> bool:
    if isinstance(solver, DPMSolverV3):
        return solver.corrector in ("pseudo", "true")  # "same" has two points only from the second step on
    return isinstance(solver, ABM) or (isinstance(solver, UniPC) and solver.corrector)


@pytest.mark.parametrize("name", ODE)
@pytest.mark.every(13, 3)
def test_exact_start(name, record_property):
    measured = slope(name, exact_start=True)
    record_property("slope", measured)
    assert abs(measured - ODE[name].order) < ORDER_SLACK


@pytest.mark.parametrize("name", ODE)
@pytest.mark.every(11, 3)
def test_cold_start(name, record_property):
    measured = slope(name, exact_start=False)
    record_property("slope", measured)
    assert measured > min(ODE[name].order, WARM_UP_CORRECTED if corrects_the_first_step(ODE[name]) else WARM_UP) - ORDER_SLACK
    assert abs(measured - COLD_START[name]) < TABLE_SLACK


BIASED = ("euler-churn", "heun-churn", "dpm2-churn", "restart", "restart-32")  # their s_noise is not 1; restarts are as long on any grid
FASTER = ("sa-solver", "sa-solver-pece", "er-sde-3-sde")  # on Gaussian data what is left at these steps is of higher order


@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name not in BIASED])
@pytest.mark.every(3)
def test_weak_order_of_a_stochastic_solver(name):
    """The standard deviation of its samples, for Gaussian data."""
    solver = never_lowered(STOCHASTIC[name])
    mean, std = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.6], dtype=torch.float64)
    denoiser, errors = GaussianDenoiser(SCHEDULE, mean, std), {}
    for steps in LATE.get(name, STEPS):
        nodes = solver.nodes(TimeGrid.from_sigmas(SCHEDULE, karras_levels(steps, HIGH, LOW)), SCHEDULE)
        true_mean, true_std = nodes.alpha * mean, torch.sqrt((nodes.alpha * std) ** 2 + nodes.sigma**2)
        end_mean, end_std = moments(tabulate(solver, nodes), denoiser, true_mean[:1], true_std[:1])
        torch.testing.assert_close(end_mean, true_mean[-1:], rtol=1e-12, atol=0)
        errors[steps] = float(abs(end_std - true_std[-1]))
    assert (order_of(errors) > solver.order) if name in FASTER else abs(order_of(errors) - solver.order) < ORDER_SLACK
