"""Refinement of schedules: it only improves, its runs share their beginnings to the bit, and it knows what it cannot refine."""

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from fewstep import (
    Denoiser,
    DiscreteVP,
    GridError,
    MixtureDenoiser,
    ModelError,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    VPLinear,
    make_grid,
    make_solver,
    sample,
)
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.spacings import GRIDS
from fewstep.learn.search.endpoint import per_sample_rmse, rms
from fewstep.learn.search.refine import Levels, SolverEndpointError, refine
from fewstep.sampling.reference import reference_sampler

F64 = torch.float64
ROUNDING = 1e-12  # of the data's size: sums may differ by batch
LAW = VarianceExploding(0.02, 20.0)
TABLE = DiscreteVP.linear(200)
SOLVERS = ("ddim", "dpm-solver-pp-2m", "unipc-3", "heun", "deis-3")
LAWS = {"edm": LAW, "vp": VPLinear(), "flow": RectifiedFlow(), "table": TABLE}


def mixture(schedule: NoiseSchedule = LAW) -> MixtureDenoiser:
    means = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    return MixtureDenoiser(schedule, means, torch.full((4,), 0.2, dtype=F64))


class Counted:
    """A denoiser that counts the samples it evaluates, and may fail from some call on."""

    def __init__(self, denoiser: Denoiser, bad: int = 10**9) -> None:
        self.denoiser, self.schedule, self.bad, self.calls, self.samples = denoiser, denoiser.schedule, bad, 0, 0

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls, self.samples = self.calls + 1, self.samples + len(x)
        answer = self.denoiser(x, t) * (torch.nan if self.calls >= self.bad else 1)
        return answer if cond is None else answer + cond[:, None] / 10


def problem(schedule: NoiseSchedule = LAW, solver: str = "dpm-solver-pp-2m", **options: object) -> SolverEndpointError:
    """Seeded noises with the ends of their trajectories."""
    return SolverEndpointError(Counted(mixture(schedule), **options), make_solver(solver), *trajectories(schedule))


@cache
def trajectories(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    tight = reference_sampler(schedule, 48)
    x = tight.tableau.nodes.sigma[0] * torch.randn(48, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    return x, sample(mixture(schedule), tight, x)


def spacings(schedule: NoiseSchedule, steps: int) -> dict[str, TimeGrid]:
    """The standard grids that this schedule has, but for one that starts elsewhere."""
    found = {}
    for name in set(GRIDS) - {"leading"}:
        try:
            found[name] = make_grid(name, schedule, steps)
        except GridError:
            continue
    return found


def objective(error: SolverEndpointError, start: TimeGrid) -> Callable[[TimeGrid], float]:
    """The mean of ``sqrt(|R_b|^2 + c^2)``, ``c`` the median of ``|R_b|`` at the start."""
    c = per_sample_rmse(error.residual(start)[0]).median()
    return lambda grid: float((per_sample_rmse(error.residual(grid)[0]) ** 2 + c**2).sqrt().mean())


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_is_that_of_the_sampler(solver: str) -> None:
    error, grid = problem(solver=solver), make_grid("karras", LAW, 5)
    end = sample(error.denoiser, Sampler.build(error.solver, grid, LAW), error.x)
    residual, _ = error.residual(grid)
    assert torch.equal(residual, end - error.exact)
    gap = (end - error.exact).square()
    assert error.rmse(grid) == rms(residual) == pytest.approx(float(gap.mean().sqrt()), rel=ROUNDING)


@pytest.mark.parametrize("law, solver", [*product(["edm"], SOLVERS), ("table", "heun"), ("table", "unipc-3")])
@pytest.mark.every(3)
def test_a_run_shares_its_beginning_with_another(law: str, solver: str) -> None:
    """To the bit, and without evaluating it again; the other run stays as it was."""
    schedule, steps = LAWS[law], 6
    error, grid = problem(schedule, solver), make_grid("angle", LAWS[law], steps)
    base, run = error.residual(grid)
    stages, once = error.solver.stages, len(error.x)
    assert error.evaluations == error.denoiser.samples == (each := once * stages * steps)
    for k in range(1, steps):
        for way in (-1.0, 1.0):
            t = grid.t.clone()
            t[k] += way * (1 if law == "table" else 0.01 * float(t[k - 1] - t[k + 1]))
            before = error.evaluations
            reused, _ = error.residual(TimeGrid(t), run)
            # the first evaluation that another run has not made is at the level that moved, be it of a step's end
            assert error.evaluations - before == each - once * ((k - 1) * stages + 1)
            assert torch.equal(reused, error.residual(TimeGrid(t))[0]) and not torch.equal(reused, base)
    before = error.evaluations
    assert torch.equal(error.residual(grid, run)[0], base) and error.evaluations == before
    assert error.evaluations == error.denoiser.samples
    t = torch.cat([grid.t[:-1], grid.t[-1:] + (grid.t[-2] - grid.t[-1]) / 2])
    if law == "edm":  # the end too
        assert torch.equal(error.residual(TimeGrid(t), run)[0], error.residual(TimeGrid(t))[0])
        start = TimeGrid(torch.cat([grid.t[:1] * 1.01, grid.t[1:]]))  # and the start
        assert torch.equal(error.residual(start, run)[0], error.residual(start)[0])


def test_conditions_go_with_their_samples() -> None:
    error, grid = problem(), make_grid("karras", LAW, 3)
    plain, _ = error.residual(grid)
    error.cond = torch.arange(48, dtype=F64)
    moved = error.residual(grid)[0] - plain
    assert float(moved[0].abs().max()) == 0 < 3 < float(moved[40].abs().min())


# -- refinement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "law, solver", [*product(["edm"], ["ddim", "dpm-solver-pp-2m", "deis-3"]), ("vp", "unipc-3"), ("table", "heun"), ("table", "unipc-3")]
)
@pytest.mark.every(2)
def test_refinement_lowers_the_objective_from_the_worst_grid(law: str, solver: str) -> None:
    schedule = LAWS[law]
    error = problem(schedule, solver)
    grids = spacings(schedule, 5)
    start = max(grids.values(), key=error.rmse)
    value, shown = objective(error, start), []
    found = refine([error], start, observe=lambda iteration, best: shown.append((iteration, best)))
    values = [value(start), *(best for _, best in shown)]
    assert [iteration for iteration, _ in shown] == list(range(1, len(shown) + 1)) and 1 < len(shown) <= 6
    assert all(after <= before for before, after in zip(values[:-1], values[1:], strict=True))
    assert value(found) == pytest.approx(values[-1], rel=1e-9) and values[-1] < 0.9 * values[0], values
    assert torch.equal(found.t[[0, -1]], start.t[[0, -1]]) and found.steps == 5
    if law == "table":
        assert torch.equal(found.t, found.t.round())


@pytest.mark.parametrize("solver", ["unipc-3", "heun"])
def test_a_flow_is_refined_between_its_infinite_ends(solver: str) -> None:
    flow = RectifiedFlow()
    error, start = problem(flow, solver), make_grid("quadratic", flow, 5)
    found = refine([error], start)
    assert objective(error, start)(found) < 0.95 * objective(error, start)(start)
    assert found.t[0] == 1 and found.t[-1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_inner_level_is_put_where_a_scan_puts_it(solver: str) -> None:
    """Within 2 % of the least of 80 places, from either side of it."""
    error = problem(solver=solver)
    scan = [TimeGrid(torch.tensor([20.0, float(t), 0.02])) for t in torch.logspace(1.28, -1.68, 80, dtype=F64)]
    made = torch.stack([per_sample_rmse(error.residual(grid)[0]) for grid in scan])
    for spacing in ("uniform", "logsnr", "karras"):
        start = make_grid(spacing, LAW, 2)
        found = refine([error], start, iterations=20)
        least = (made**2 + per_sample_rmse(error.residual(start)[0]).median() ** 2).sqrt().mean(1).min()
        assert objective(error, start)(found) < 1.02 * float(least), spacing


def test_what_cannot_be_better_is_given_back() -> None:
    error = problem()
    for start, options in [
        (make_grid("karras", LAW, 1), {}),  # no level to move
        (make_grid("karras", LAW, 4), {"iterations": 0}),
    ]:
        assert refine([error], start, observe=lambda iteration, best: pytest.fail("nothing to tell"), **options) is start
    table = DiscreteVP.linear(5)
    every = TimeGrid(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]))  # all the model's times: none can move
    assert torch.equal(refine([problem(table)], every).t, every.t)
    exact = error.residual(start)[0] + error.exact
    done = SolverEndpointError(error.denoiser, error.solver, error.x, exact)
    assert torch.equal(refine([done], start).t, start.t)  # without an error


def test_refinement_stops_at_its_evaluations() -> None:
    start, counts = make_grid("uniform", LAW, 6), []
    for most in (0, 3000, 30_000):
        error, shown = problem(), []
        refine([error], start, evaluations=most, observe=lambda iteration, best, shown=shown: shown.append(iteration))
        counts.append(len(shown))
        one = 48 * (6 + 15 + 5 * 6)  # a start, a Jacobian (5 + 4 + ... evaluations) and at most 5 moves
        assert error.evaluations <= 48 * 6 + most + one and error.evaluations == error.denoiser.samples
    assert counts[0] == 1 and counts[0] < counts[1] < counts[2] <= 6


def test_infinite_ends_lie_beyond_their_neighbours() -> None:
    """So that the first and last inner level have a gap on both sides, and can move outwards."""
    levels = Levels(TimeGrid([1.0, 0.8, 0.6, 0.3, 0.0]), RectifiedFlow())
    inner = RectifiedFlow().lam(torch.tensor([0.8, 0.6, 0.3], dtype=F64))
    torch.testing.assert_close(levels.lam, torch.cat([inner[:1] - 2, inner, inner[-1:] + 2]), rtol=0, atol=0)
    torch.testing.assert_close(levels.gap, torch.stack([inner[1] - inner[0], inner[1] - inner[0], inner[2] - inner[1]]), rtol=0, atol=0)
    outwards = levels.moved(torch.tensor([-0.5, 0.0, 0.5], dtype=F64))
    assert outwards is not None and outwards.t[1] > 0.8 and outwards.t[3] < 0.3
    assert Levels(TimeGrid([1.0, 0.0]), RectifiedFlow()).moved(torch.empty(0)) is not None


def test_mistakes_are_named() -> None:
    grid = make_grid("karras", LAW, 4)
    with pytest.raises(SolverError, match="DDIM adds noise, and has no exact ends to compare with: use a deterministic solver"):
        refine([problem(solver="ddim:eta=1")], grid)
    for bad in (1, 3, 7):
        with pytest.raises(ModelError, match=r"the network's output is not finite .*: check its weights"):
            refine([problem(bad=bad)], grid)
