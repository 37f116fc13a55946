"""The two ends of time: ``alpha = 0`` at the start, ``sigma = 0`` at the end, and the number of evaluations between."""

import math
from itertools import pairwise as neighbours

import pytest
import torch
from tests.problems import ALL, ODE, SOME_STATISTICS, WHOLE_REGISTRY, mixture, moments, noise, pairwise, statistics

from fewstep import (
    DiscreteVP,
    Model,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VPLinear,
    make_grid,
    make_solver,
    sample,
    tabulate,
)
from fewstep.models.analytic import GaussianDenoiser
from fewstep.solvers import (
    ABM,
    DDIM,
    DEIS,
    ETDRK4,
    IPNDM,
    LMS,
    PNDM,
    RES2S,
    RES3S,
    SOLVERS,
    DPMSolverFast,
    DPMSolverPP,
    DPMSolverV3,
    ExponentialAB,
    GradientEstimation,
    SDEDPMSolverPP2M,
    UniPC,
    takes_statistics,
)

pytestmark = pytest.mark.usefixtures("each_integral_once")

SCHEDULES = {
    "flow": RectifiedFlow(),
    "flow-shift-3": RectifiedFlow(shift=3.0),
    "zero-terminal-snr": DiscreteVP.scaled_linear().zero_terminal_snr(),
}
MANY = 48
# Largest error of MANY steps from end to end, in standard deviations of the data. Steps next to an end are long in lam and of first
# order, so no solver shows its own order here, but each must come near: measured 0.059 at first order, else 0.023.
FIRST_ORDER, HIGHER_ORDER = 0.08, 0.03
LATE = {"res-multistep-ancestral": 0.05}  # of second order later than others: measured 0.036, and 0.013 and 0.004 at 96 and 192 steps
ORDER_SLACK = 0.2  # lengths well within the asymptotic range
BFLOAT16_STEP = 2e-2  # relative: a network's rounding of 2^-9 per layer, over the steps


@pytest.mark.parametrize(("name", "law", "spacing"), pairwise([*WHOLE_REGISTRY, *SOME_STATISTICS], list(SCHEDULES), ["angle", "uniform"]))
@pytest.mark.every(9, 3)
def test_finite_from_end_to_end(name, law, spacing):
    schedule, solver = SCHEDULES[law], ALL[name]
    for steps in (1, 2, 3, 5, 8):
        grid = make_grid(spacing, schedule, steps, t_min=schedule.t_clean)
        sampler = Sampler.build(solver, grid, schedule)
        nodes = sampler.tableau.nodes
        assert nodes.alpha[0] == 0
        assert nodes.sigma[-1] == 0
        for table in (sampler.tableau.record, sampler.tableau.update, sampler.tableau.bias, sampler.tableau.noise):
            assert torch.isfinite(table).all()
        assert torch.isfinite(sample(mixture(schedule), sampler, noise(2, 2), seeds=range(2))).all()


@pytest.mark.parametrize("law", SCHEDULES)
@pytest.mark.parametrize("name", WHOLE_REGISTRY)
@pytest.mark.every(11, 3)
def test_many_steps_solve_a_gaussian(name, law):
    """Trajectories of an ODE solver against the closed form, moments of a stochastic one against the data's."""
    schedule, solver = SCHEDULES[law], WHOLE_REGISTRY[name]
    mean, std = torch.tensor([0.4], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    denoiser = GaussianDenoiser(schedule, mean, std)
    tableau = tabulate(solver, solver.nodes(TimeGrid.angle(schedule, MANY, t_min=schedule.t_clean), schedule))
    if name in ODE:
        start = noise(8, 1)
        error = sample(denoiser, tableau, start) - denoiser.flow(start, tableau.nodes.t[0], tableau.nodes.t[-1])
    elif solver.order:
        error = torch.stack(moments(tableau, denoiser, torch.zeros_like(mean), torch.ones_like(std))) - torch.stack([mean, std])
    else:  # LCM's, of a denoiser, are narrower
        error = torch.stack(moments(tableau, denoiser, torch.zeros_like(mean), torch.ones_like(std))) - torch.stack([mean, 0.674 * std])
    assert float(error.abs().max()) < LATE.get(name, FIRST_ORDER if solver.order == 1 else HIGHER_ORDER) * float(std)


@pytest.mark.parametrize("name", [name for name in ODE if name in WHOLE_REGISTRY])
@pytest.mark.every(4, 2)
def test_the_first_step_from_pure_noise_has_its_local_order(name):
    """In ``v = alpha/sigma``, which is finite there: solvers of several stages keep their order, the others take DDIM's step."""
    schedule, solver, lengths, errors, order = RectifiedFlow(), ODE[name], (0.08, 0.04, 0.02), [], 1
    denoiser = GaussianDenoiser(schedule, torch.tensor([0.4], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    for v in lengths:
        nodes = solver.nodes(TimeGrid(torch.tensor([1.0, 1 / (1 + v)], dtype=torch.float64)), schedule)
        start = noise(8, 1)
        error = sample(denoiser, tabulate(solver, nodes), start) - denoiser.flow(start, nodes.t[0], nodes.t[-1])
        order = solver.order if nodes.evaluations > 1 else 1  # a single step may be one of lower order
        errors.append(float(error.square().mean().sqrt()))
    slopes = [math.log2(a / b) for a, b in neighbours(errors)]
    assert min(slopes) > order + 1 - ORDER_SLACK


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_many_ancestral_steps_sample_a_gaussian(eta):
    schedule = SCHEDULES["zero-terminal-snr"]
    mean, std = torch.tensor([0.4], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    grid = TimeGrid.angle(schedule, MANY, t_min=schedule.t_clean)
    tableau = tabulate(DDIM(eta=eta), DDIM(eta=eta).nodes(grid, schedule))
    end_mean, end_std = moments(tableau, GaussianDenoiser(schedule, mean, std), torch.zeros_like(mean), torch.ones_like(std))
    torch.testing.assert_close(end_mean, mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(end_std, std, rtol=FIRST_ORDER, atol=0)


class Network(torch.nn.Module):
    """A small network that wants its own dtype, and says what it was given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.5, -0.2], [0.1, 0.4]]))
            self.layer.bias.copy_(torch.tensor([0.3, -0.1]))
        self.seen = set()

    def forward(self, x, time):
        self.seen.add((x.dtype, time.dtype))
        return torch.tanh(self.layer(x))


@pytest.mark.parametrize("prediction", ["v", "flow"])
@pytest.mark.parametrize("name", WHOLE_REGISTRY)
@pytest.mark.every(7, 2)
def test_a_bfloat16_network_keeps_a_float32_state(name, prediction):
    schedule, ends, steps = RectifiedFlow(), [], []
    grid = TimeGrid.angle(schedule, 6)
    for dtype in (torch.bfloat16, torch.float32):
        network = Network().to(dtype)
        sampler = Sampler.build(WHOLE_REGISTRY[name], grid, schedule)
        with torch.no_grad():
            start = noise(3, 2).to(torch.float32)
            ends.append(sample(Model(network, schedule, prediction), sampler, start, seeds=range(3), observe=steps.append))
        assert network.seen == {(dtype, torch.float32)}
    assert {tensor.dtype for step in steps for tensor in (step.x, step.x0, step.x_next)} == {torch.float32}
    assert {step.t.dtype for step in steps} == {torch.float64}
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=BFLOAT16_STEP * float(ends[1].abs().max()))


# -- numbers of evaluations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_clean", [False, True])
@pytest.mark.parametrize("name", WHOLE_REGISTRY)
@pytest.mark.every(7, 2)
def test_steps_for_gives_exactly_that_many_evaluations(name, to_clean):
    solver, schedule = WHOLE_REGISTRY[name], RectifiedFlow(t_min=0.0 if to_clean else 0.1)
    usable = []
    for nfe in range(1, 14):
        try:
            steps = solver.steps_for(nfe, to_clean=to_clean)
        except SolverError as error:
            assert f"cannot use exactly {nfe}: use" in str(error)
            continue
        grid = TimeGrid.uniform(schedule, steps)
        nodes, counts = solver.nodes(grid, schedule), solver.evaluations_on(grid, schedule)
        assert nodes.evaluations == sum(counts) == nfe and max(counts) <= solver.stages
        begins = nodes.begins(grid.t)
        raised = name.endswith("churn") and any(bool(solver.noise(nodes, i) > 0) for i in range(nfe))
        assert begins == tuple(sum(counts[:k]) for k in range(steps)) and torch.equal(nodes.t[list(begins)], grid.t[:-1]) != raised
        usable.append(nfe)
    assert len(usable) >= 13 // solver.stages


@pytest.mark.parametrize(
    ("name", "nfe", "to_clean", "neighbours"),
    [
        ("heun", 5, False, "use 4 or 6"),
        ("heun", 6, True, "use 5 or 7"),
        ("heun", 1, False, "use 2$"),
        ("heun", 2, True, "use 1 or 3"),
        ("dpm-solver-3s", 10, False, "use 9 or 12"),
        ("dpm-solver-3s", 2, False, "use 3$"),
        ("pndm", 2, False, "takes a different number of evaluations by step .* use 1 or 3$"),
        ("heunpp2", 7, False, "use 6 or 9$"),
        ("dpm-solver-fast", 8, False, "use 6 or 9, or the option remainder=2$"),
        ("dpm-solver-fast", 8, True, "use 6 or 9$"),
    ],
)
def test_an_impossible_number_of_evaluations_names_its_neighbours(name, nfe, to_clean, neighbours):
    with pytest.raises(SolverError, match=neighbours):
        make_solver(name).steps_for(nfe, to_clean=to_clean)


@pytest.mark.parametrize("nfe", [0, -3, 2.5])
def test_no_evaluations_are_refused(nfe):
    for solver in WHOLE_REGISTRY.values():
        with pytest.raises(SolverError, match="at least 1"):
            solver.steps_for(nfe)


# -- options --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDIM(eta=1.5),
        lambda: DDIM(eta=math.nan),
        lambda: DEIS(steps=5),
        lambda: IPNDM(steps=0),
        lambda: DPMSolverPP(steps=4),
        lambda: DPMSolverPP(form="euler"),
        lambda: DPMSolverPP(third_order="fixed"),
        lambda: SDEDPMSolverPP2M(form="euler"),
        lambda: UniPC(steps=4),
        lambda: UniPC(weights="bh3"),
        lambda: LMS(steps=5),
        lambda: LMS(weights="equal"),
        lambda: ABM(steps=0),
        lambda: ExponentialAB(steps=5),
        lambda: RES2S(c2=0),
        lambda: RES3S(c2=2 / 3),
        lambda: RES3S(c2=0.5, c3=0.5),
        lambda: ETDRK4(form="kutta"),
        lambda: PNDM(warm_up="euler"),
        lambda: GradientEstimation(gamma=math.nan),
        lambda: DPMSolverFast(remainder=3),
        lambda: DPMSolverV3(statistics(), steps=4),
        lambda: DPMSolverV3(statistics(), predictor="exact"),
        lambda: DPMSolverV3(statistics(), corrector="unipc"),
        lambda: DPMSolverV3(statistics(), gate="quarter"),
        lambda: DPMSolverV3(statistics(), integrals="simpson"),
    ],
)
@pytest.mark.every(2)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(SolverError, match="got"):
        make()


def test_make_solver_names_what_there_is():
    assert make_solver("unipc-3", weights="bh1") == UniPC(steps=3, weights="bh1")
    assert make_solver("ddim", eta=0.5) == DDIM(eta=0.5)
    with pytest.raises(SolverError, match="did you mean .*dpm-solver-pp-2m"):
        make_solver("dpm-solver++-2m")
    with pytest.raises(SolverError, match="known: .*unipc-3"):
        make_solver("xyz")
    with pytest.raises(SolverError, match="'ddim' has no option etta; it has: eta"):
        make_solver("ddim", etta=1.0)
    with pytest.raises(SolverError, match="'euler' has no option eta; it has: none"):
        make_solver("euler", eta=1.0)


def test_every_name_of_the_registry_makes_a_solver_that_runs():
    schedule = VPLinear()
    for name in SOLVERS:
        solver = make_solver(name, **({"statistics": statistics()} if takes_statistics(name) else {}))
        sampler = Sampler.build(solver, TimeGrid.logsnr(schedule, 4), schedule)
        assert sampler.nfe == sum(solver.evaluations(4))
        assert torch.isfinite(sample(mixture(schedule), sampler, noise(2, 2), seeds=range(2))).all()
