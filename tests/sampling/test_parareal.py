"""Parareal: exact after as many iterations as blocks, within tolerance before, and what is refused."""

import math

import pytest
import torch
from tests.problems import mixture, noise

import fewstep
from fewstep import Sampler, SolverError, TimeGrid, VPLinear, load_model, parareal
from fewstep.models.guidance import Wrapped
from fewstep.sampling.loop import run
from fewstep.sampling.noise import start_noise
from fewstep.sampling.parareal import Iterate

SCHEDULE = VPLinear()
SEEDS = [3, 1, 4]


def pair(solver: str, blocks: int, each: int, schedule=SCHEDULE, grid: str = "angle") -> tuple[Sampler, Sampler]:
    coarse = fewstep.make_grid(grid, schedule, blocks)
    return Sampler.build(solver, coarse.stretched(schedule, blocks * each), schedule), Sampler.build("ddim", coarse, schedule)


SOLVERS = ("ddim", "ddim:eta=1", "dpm-solver-pp-2m", "unipc-3", "deis-3", "ipndm", "sde-dpm-solver-pp-2m", "heun", "dpm-solver-pp-3m")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.every(3, 2)
def test_exact_after_as_many_iterations_as_blocks(solver):
    fine, coarse = pair(solver, 5, 4)
    if solver == "heun":
        fine = Sampler.build("heun", coarse.grid.stretched(SCHEDULE, 10), SCHEDULE)
    seen, x = list[Iterate](), noise(3, 2)
    made = parareal(mixture(SCHEDULE), fine, coarse, x, tol=0, seeds=SEEDS, observe=seen.append)
    torch.testing.assert_close(made, run(mixture(SCHEDULE), fine.tableau, x, seeds=SEEDS), rtol=0, atol=1e-12)
    assert [one.i for one in seen] == list(range(6)) and torch.equal(made, seen[-1].x)
    if solver != "heun":
        assert [one.rounds for one in seen] == [5 + p * 3 for p in range(6)]  # pipelined


def test_other_coarse_samplers_with_a_history():
    fine, coarse = pair("unipc-2", 5, 3)
    coarse = Sampler.build("dpm-solver-pp-2m", coarse.grid, SCHEDULE)
    made = parareal(mixture(SCHEDULE), fine, coarse, noise(3, 2), tol=0)
    torch.testing.assert_close(made, run(mixture(SCHEDULE), fine.tableau, noise(3, 2)), rtol=0, atol=1e-12)


@torch.no_grad()
def errors(solver: str, iterations: int) -> list[float]:
    model = load_model("digits-edm")
    fine, coarse = pair(solver, 8, 8, model.schedule, "karras")
    x, labels, seen = start_noise(fine.tableau.nodes, range(4), model.shape), model.labels(range(4)), list[Iterate]()
    parareal(model, fine, coarse, x, labels, tol=0, iterations=iterations, observe=seen.append)
    exact = run(model, fine.tableau, x, labels)
    return [float((one.x - exact).square().mean().sqrt()) for one in seen]


@pytest.mark.slow
def test_few_iterations_of_ddim_are_near():
    found = errors("ddim", 2)
    assert len(found) == 3 and found[1] < 3e-2 and found[2] < 5e-3


@pytest.mark.slow
def test_the_anchor_moves_with_the_state():
    """UniPC's corrector would throw the correction away, and the iteration diverge until it is exact."""
    found = errors("unipc-3", 5)
    assert max(found) <= 2 * found[0] and found[-1] < 5e-3


def test_it_returns_within_the_tolerance():
    fine, coarse = pair("ddim", 8, 4)
    seen, x = list[Iterate](), noise(3, 2)
    made = parareal(mixture(SCHEDULE), fine, coarse, x, tol=1e-3, observe=seen.append)
    assert len(seen) < 7 and seen[-1].residual <= 1e-3 < seen[-2].residual
    assert float((made - run(mixture(SCHEDULE), fine.tableau, x)).square().mean().sqrt()) < 2e-3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tol": -1.0}, "tol is a finite number of at least 0"),
        ({"tol": math.nan}, "tol is a number"),
        ({"iterations": 0}, "iterations is at least 1, got 0"),
        ({"observe": 1}, "observe is a function"),
        ({"coarse": "ddim"}, "a Sampler or a Tableau"),
        ({"coarse": pair("ddim:eta=1", 8, 1)[0]}, "the coarse sampler adds noise"),
        ({"coarse": Sampler.build("heun", TimeGrid.logsnr(SCHEDULE, 4), SCHEDULE)}, "evaluates more than once a step"),
        ({"coarse": pair("ddim", 7, 1)[1]}, "the coarse sampler evaluates at t = .*, and the fine one does not"),
        ({"coarse": Sampler.build("ddim", TimeGrid(pair("ddim", 8, 4)[0].grid.t[[0, 4, 8]]), SCHEDULE)}, "begins or ends at another time"),
        ({"sampler": pair("ddim:eta=1", 8, 4)[0]}, "adds noise: pass seeds="),
    ],
)
def test_what_cannot_be_is_refused(change, says):
    fine, coarse = pair("ddim", 8, 4)
    with pytest.raises(SolverError, match=says):
        parareal(**({"denoiser": mixture(SCHEDULE), "sampler": fine, "coarse": coarse, "x": noise(3, 2)} | change))


def test_a_network_that_is_not_finite_is_named_with_its_round():
    fine, coarse = pair("ddim", 4, 2)
    with pytest.raises(fewstep.ModelError, match="not finite .* at evaluation 1 of 8, .* in round 1"):
        parareal(Wrapped(SCHEDULE, lambda x, t, cond: x * math.nan), fine, coarse, noise(3, 2))
