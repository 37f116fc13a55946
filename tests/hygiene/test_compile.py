"""The kernel compiles once, and the network is called exactly where and as often as the nodes say."""

import pytest
import torch
from tests.problems import WHOLE_REGISTRY, Tanh, statistics
from torch._dynamo.testing import CompileCounter

from fewstep import RectifiedFlow, Sampler, TimeGrid, VPLinear, advance, make_solver, sample, seeded_noise, tabulate

STEPS = 20
SEEDS = [0, 1]


@pytest.mark.parametrize(
    "solver",
    [
        make_solver("dpm-solver-pp-2m"),
        make_solver("unipc-3"),
        make_solver("ddim", eta=1.0),
        make_solver("heun"),
        make_solver("deis-3"),
        make_solver("dpm-solver-v3", statistics=statistics(l=0.5, s=0.2, b=-0.3)),
    ],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.every(9)
def test_one_graph_runs_every_row(solver):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(advance, fullgraph=True, backend=counter)
    schedule = VPLinear()
    tableau = tabulate(solver, solver.nodes(TimeGrid.logsnr(schedule, STEPS), schedule))
    x = seeded_noise(SEEDS, (3, 4)).double()
    plain, fast = tableau.start(x), tableau.start(x)
    for row in tableau.rows(x):
        x0, noise = torch.tanh(plain.x), torch.cos(x)
        plain, fast = advance(row, plain, x0, noise), compiled(row, fast, x0, noise)
        torch.testing.assert_close(fast.x, plain.x, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


@pytest.mark.parametrize("schedule", [VPLinear(), RectifiedFlow()], ids=["noisy-end", "clean-end"])
@pytest.mark.parametrize("name", WHOLE_REGISTRY)
@pytest.mark.every(9, 2)
def test_number_and_place_of_the_evaluations(name, schedule):
    solver, grid = WHOLE_REGISTRY[name], TimeGrid.angle(schedule, 4)
    nfe = sum(solver.evaluations_on(grid, schedule))
    sampler, denoiser = Sampler.build(solver, grid, schedule), Tanh(schedule)
    sample(denoiser, sampler, seeded_noise(SEEDS, (3,)), seeds=SEEDS)
    assert len(denoiser.calls) == sampler.nfe == nfe
    assert torch.equal(torch.stack([t for _, t, _ in denoiser.calls]), sampler.tableau.nodes.t[:-1])
    assert torch.equal(sampler.tableau.nodes.t[-1], grid.t[-1])
