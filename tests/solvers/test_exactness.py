"""Identities that hold to rounding, whatever the number of steps."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.problems import ALL, ODE, STOCHASTIC, TIMED, karras_levels, mixture, noise, statistics

from fewstep import (
    DiscreteVP,
    Nodes,
    RectifiedFlow,
    Solver,
    Tableau,
    TimeGrid,
    VarianceExploding,
    VPCosine,
    VPLinear,
    sample,
    seeded_noise,
    tabulate,
)
from fewstep.models.analytic import MixtureDenoiser
from fewstep.solvers import (
    DDIM,
    DEIS,
    IPNDM,
    LMS,
    DPMSolverPP,
    DPMSolverV3,
    Euler,
    ExponentialAB,
    GradientEstimation,
    UniPC,
)
from fewstep.solvers.stencil import NEVER

pytestmark = pytest.mark.usefixtures("each_integral_once")

ROUND_OFF = 1e-10  # relative to the largest element: tens of float64 steps, weights up to 1e3 on grids that start at sigma = 80
SAME_SUMS = 1e-12  # the same few terms in another order
SEEDS = range(3)

GRIDS = {
    "edm-karras-to-clean": (VarianceExploding(), lambda s: TimeGrid.karras(s, 7).to_clean(s)),
    "vp-logsnr-to-clean": (VPLinear(), lambda s: TimeGrid.logsnr(s, 16).to_clean(s)),
    "cosine-uniform": (VPCosine(), lambda s: TimeGrid.uniform(s, 5)),
    "flow-angle": (RectifiedFlow(shift=3.0), lambda s: TimeGrid.angle(s, 8)),
    "zero-snr-uniform": (DiscreteVP.linear().zero_terminal_snr(), lambda s: TimeGrid.uniform(s, 6, t_min=s.t_clean)),
}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal to ``tolerance`` relative to the largest element expected."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def grid_of(case: str, solver: Solver) -> Nodes:
    schedule, make = GRIDS[case]
    return solver.nodes(make(schedule), schedule)


@functools.cache
def tableau_of(case: str, name: str) -> Tableau:
    return tabulate(ALL[name], grid_of(case, ALL[name]))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.every(9, 3)
def test_point_mass(name):
    """A point mass: ``x_t = alpha_t mu + sigma_t eps`` at every evaluation with the ``eps`` of the start, and ``mu`` itself at the end.

    DPM-Solver-v3 with statistics of another model takes it to ``mu`` only where ``sigma = 0``: between, it expects F to follow them.
    """
    mean, eps = torch.tensor([0.3, -1.2], dtype=torch.float64), noise(3, 2)
    for case, (schedule, _) in GRIDS.items():
        tableau, steps = tableau_of(case, name), []
        nodes = tableau.nodes
        denoiser = MixtureDenoiser(schedule, mean[None], torch.zeros(1, dtype=torch.float64))
        end = sample(denoiser, tableau, nodes.alpha[0] * mean + nodes.sigma[0] * eps, seeds=SEEDS, observe=steps.append)
        if name in ODE:
            exact = nodes.alpha[1:, None, None] * mean + nodes.sigma[1:, None, None] * eps
            close(torch.stack([step.x_next for step in steps]), exact, ROUND_OFF)
        if nodes.sigma[-1] == 0:
            close(end, mean.expand(3, 2), ROUND_OFF)


@pytest.mark.parametrize("low", [0.02, 0.0], ids=["noisy-end", "clean-end"])
@pytest.mark.parametrize("name", [name for name in ALL if name not in TIMED])
@pytest.mark.every(11, 4)
def test_rescaling(name, low):
    """VP, VE and flow are one problem in ``x/alpha``: the same noise levels give the same samples."""
    levels = karras_levels(7, 10.0, low)
    ends = []
    for schedule in (VarianceExploding(), VPLinear(), RectifiedFlow(shift=3.0)):
        nodes = ALL[name].nodes(TimeGrid.from_sigmas(schedule, levels), schedule)
        start = nodes.alpha[0] * 10.0 * noise(3, 2)
        ends.append(sample(mixture(schedule), tabulate(ALL[name], nodes), start, seeds=SEEDS) / nodes.alpha[-1])
    for end in ends[1:]:
        close(end, ends[0], ROUND_OFF)


@pytest.mark.parametrize("case", ["edm-karras-to-clean", "flow-angle"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.every(9, 2)
def test_tableau_is_the_formulas(name, case):
    """The numbers of a tableau do what the solver's own formulas do on tensors; a formula reads no evaluation before the first."""
    solver, tableau, denoiser, steps = ALL[name], tableau_of(case, name), mixture(GRIDS[case][0]), []
    nodes = tableau.nodes
    x = nodes.sigma[0] * noise(3, 2)
    sample(denoiser, tableau, x, seeds=SEEDS, observe=steps.append)
    anchor, history = x, []
    for i, step in enumerate(steps):
        x0 = denoiser(x, nodes.t[i])
        history = [solver.record(nodes, i, x, x0), *history][: solver.memory]
        anchor, x = solver.update(nodes, i, anchor, x, history)
        x = x + solver.noise(nodes, i) * seeded_noise(SEEDS, (2,), stream=i + 1).double()
        close(step.x_next, x, SAME_SUMS * len(steps))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=8)
@given(st.integers(0, 2**31), st.floats(-3, 3), st.sampled_from(["vp-logsnr-to-clean", "flow-angle"]), st.data())
@pytest.mark.every(19, 3)
def test_update_is_affine(name, seed, weight, case, data):
    (schedule, make), solver = GRIDS[case], ALL[name]
    nodes = solver.nodes(make(schedule), schedule)
    i = data.draw(st.integers(0, nodes.evaluations - 1))
    one, two = seeded_noise([seed, seed + 1], (2 + solver.memory, 2)).double()

    def update(basis: torch.Tensor) -> torch.Tensor:
        anchor, x, *history = basis
        return torch.stack(solver.update(nodes, i, anchor, x, history))

    mixed, parts = update(torch.lerp(one, two, weight)), torch.lerp(update(one), update(two), weight)
    torch.testing.assert_close(mixed, parts, rtol=ROUND_OFF, atol=ROUND_OFF * float(parts.abs().max()))


DATA, NOISE = statistics(l=1.0, s=0.0, b=0.0), statistics(l=0.0, s=-1.0, b=0.0)  # F is -x0, sigma eps / alpha

SAME = {
    "euler is ddim": (Euler(), DDIM()),
    "deis of 1 step is ddim": (DEIS(steps=1), DDIM()),
    "ipndm of 1 step is ddim": (IPNDM(steps=1), DDIM()),
    "dpm-solver++ of 1 step is ddim": (DPMSolverPP(steps=1), DDIM()),
    "unip of 1 step is ddim": (UniPC(steps=1, corrector=False), DDIM()),
    "lms of 1 step is ddim": (LMS(steps=1), DDIM()),
    "ipndm-v of 2 steps is published exactly": (LMS(2, weights="published"), LMS(2)),
    "exponential ab of 1 step is ddim": (ExponentialAB(steps=1), DDIM()),
    "gradient estimation of 1 is ddim": (GradientEstimation(gamma=1.0), DDIM()),
    "res multistep is 2m": (ExponentialAB(2), DPMSolverPP(2, "taylor", lower_order_below=NEVER)),
    "exponential ab-3 is 3m": (ExponentialAB(3, 15), DPMSolverPP(3, "taylor", third_order="corrected")),
    "unip-2 is 2m": (UniPC(2, "exact", corrector=False, lower_order_below=NEVER), DPMSolverPP(2, "taylor", lower_order_below=NEVER)),
    "unip-2 with bh2 is 2m with midpoint": (UniPC(2, "bh2", corrector=False, lower_order_below=15), DPMSolverPP(2, "midpoint")),
    "unip-3 is 3m": (UniPC(3, "exact", corrector=False, lower_order_below=15), DPMSolverPP(3, "taylor", third_order="corrected")),
    "v3-1 in x0 is ddim": (DPMSolverV3(DATA, 1, "true", "none"), DDIM()),
    "v3-1 in eps is ddim": (DPMSolverV3(NOISE, 1, "true", "none"), DDIM()),
    "v3-2 is 2m": (DPMSolverV3(DATA, 2, "true", "none", lower_order_below=15), DPMSolverPP(2, "taylor")),
    "v3-3 is 3m": (DPMSolverV3(DATA, 3, "true", "none", lower_order_below=15), DPMSolverPP(3, "taylor", third_order="corrected")),
    "v3-3 is unip-3": (DPMSolverV3(DATA, 3, "true", "none"), UniPC(3, "exact", corrector=False)),
    **{f"v3-{p} with a true corrector is unipc-{p}": (DPMSolverV3(DATA, p, "true", "true"), UniPC(p, "exact")) for p in (1, 2, 3)},
    "v3-3 is unipc-3 with full order to the end": (
        DPMSolverV3(DATA, 3, "true", "true", lower_order_below=0),
        UniPC(3, "exact", lower_order_below=0),
    ),
    "a pseudo corrector of 2 points is true": (DPMSolverV3(DATA, 1, "true", "pseudo"), UniPC(1, "exact")),
    "a pseudo predictor of 1 point is true": (DPMSolverV3(DATA, 1, "pseudo", "true"), DPMSolverV3(DATA, 1, "true", "true")),
    "a pseudo predictor of 2 points is true": (DPMSolverV3(DATA, 2, "pseudo", "same"), DPMSolverV3(DATA, 2, "true", "same")),
}


@pytest.mark.parametrize("pair", SAME)
@pytest.mark.parametrize("case", GRIDS)
@pytest.mark.every(7, 2)
def test_one_method_under_two_names(pair, case):
    schedule, make = GRIDS[case]
    nodes = Nodes.at(schedule, make(schedule).t)
    start = nodes.sigma[0] * noise(3, 2)
    one, two = (sample(mixture(schedule), tabulate(solver, nodes), start) for solver in SAME[pair])
    close(one, two, ROUND_OFF)


@pytest.mark.parametrize("steps", [2, 3])
def test_a_pseudo_corrector_is_not_unipc(steps):
    nodes = grid_of("vp-logsnr-to-clean", DDIM())
    ends = [
        sample(mixture(VPLinear()), tabulate(solver, nodes), nodes.sigma[0] * noise(3, 2))
        for solver in (DPMSolverV3(DATA, steps, "true", "pseudo"), UniPC(steps, "exact"))
    ]
    assert float((ends[0] - ends[1]).abs().max()) > 1e-3


def posterior(nodes: Nodes, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """DDPM's ``q(x_t | x_s, x0)``: the weights of ``x_s`` and ``x0`` in its mean, and its standard deviation."""
    (alpha_s, alpha_t), (sigma_s, sigma_t) = nodes.alpha[i : i + 2], nodes.sigma[i : i + 2]
    step = alpha_s / alpha_t
    spread = sigma_s**2 - (step * sigma_t) ** 2
    return torch.stack([step * sigma_t**2, alpha_t * spread]) / sigma_s**2, sigma_t / sigma_s * torch.sqrt(spread)


@pytest.mark.parametrize("case", ["vp-logsnr-to-clean", "zero-snr-uniform"])
def test_ddim_with_eta_1_is_ancestral_sampling(case):
    schedule, make = GRIDS[case]
    tableau = tabulate(DDIM(eta=1.0), Nodes.at(schedule, make(schedule).t))
    for i in range(tableau.nodes.evaluations):
        mean, std = posterior(tableau.nodes, i)
        torch.testing.assert_close(tableau.update[i, 1, 1:], mean, rtol=ROUND_OFF, atol=ROUND_OFF)
        torch.testing.assert_close(tableau.noise[i], std, rtol=ROUND_OFF, atol=ROUND_OFF)
    assert tableau.stochastic


def test_ddim_with_a_tiny_eta_tends_to_eta_0():
    schedule, make = GRIDS["vp-logsnr-to-clean"]
    nodes = Nodes.at(schedule, make(schedule).t)
    still, moved = tabulate(DDIM(eta=0.0), nodes), tabulate(DDIM(eta=1e-7), nodes)
    assert not still.stochastic
    assert moved.stochastic
    torch.testing.assert_close(moved.update, still.update, rtol=0, atol=SAME_SUMS)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_seeds_decide_a_stochastic_sample(name):
    """Different seeds, same start: samples differ, and repeat exactly with the seeds."""
    tableau, start = tableau_of("vp-logsnr-to-clean", name), noise(1, 2).expand(2, 2)
    first, again = (sample(mixture(VPLinear()), tableau, start, seeds=[5, 6]) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.allclose(first[0], first[1])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.every(5)
def test_a_solver_is_a_value(name):
    solver = ALL[name]
    assert solver == replace(solver)
    assert all(isinstance(paper, str) and len(paper) == len("2206.00927") for paper in solver.references)
    assert solver.references
