"""The step kernel against plain arithmetic, and a solver's formulas against their numbers."""

from dataclasses import dataclass, replace

import pytest
import torch

from fewstep import (
    GridError,
    Nodes,
    RectifiedFlow,
    Solver,
    SolverError,
    State,
    Tableau,
    TimeGrid,
    VarianceExploding,
    VPLinear,
    advance,
    make_grid,
    make_solver,
    tabulate,
)
from fewstep.models.analytic import MixtureDenoiser
from fewstep.sampling.loop import run as run_loop
from fewstep.solvers import DDIM

ROUND_OFF = 1e-12
SCHEDULE = VPLinear()
DATA = (3, 2, 2)  # *D: channels and pixels
SHAPES = {"scalar": (), "channel": (3, 1, 1), "element": DATA}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nodes(steps=4):
    return Nodes.at(SCHEDULE, TimeGrid.uniform(SCHEDULE, steps).t)


def aligned(coefficients):
    """``[..., *E]`` as ``[..., 1 of the batch, *D]``."""
    e = coefficients.shape[coefficients.ndim - len(DATA) :] if coefficients.ndim > len(DATA) else ()
    lead = coefficients.shape[: coefficients.ndim - len(e)]
    return coefficients.reshape(*lead, 1, *(e or (1,) * len(DATA)))


@pytest.mark.parametrize("memory", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_advance_is_a_matrix_product(shape, memory):
    """Random numbers, no solver: two rows in turn, with bias and noise."""
    count = 2
    tableau = Tableau(
        nodes(count),
        record=random(count, 2, *shape),
        update=random(count, 2, 2 + memory, *shape, seed=1),
        bias=random(count, 2, *shape, seed=2),
        noise=random(count, seed=3),
    )
    x = random(5, *DATA, seed=4)
    state, anchor, history = tableau.start(x), x, [torch.zeros_like(x)] * memory
    for i, row in enumerate(tableau.rows(x)):
        x0, noise = random(5, *DATA, seed=10 + i), random(5, *DATA, seed=20 + i)
        state = advance(row, state, x0, noise)
        history = [(aligned(tableau.record[i]) * torch.stack([x, x0])).sum(0), *history[:-1]]
        basis = torch.stack([anchor, x, *history])
        anchor, x = (aligned(tableau.update[i]) * basis).sum(1) + aligned(tableau.bias[i])
        x = x + tableau.noise[i] * noise
        torch.testing.assert_close(state.x, x, rtol=ROUND_OFF, atol=ROUND_OFF)
        torch.testing.assert_close(state.anchor, anchor, rtol=ROUND_OFF, atol=ROUND_OFF)
        for kept, expected in zip(state.history, history, strict=True):
            torch.testing.assert_close(kept, expected, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_a_step_leaves_the_state_it_came_from_alone():
    tableau = tabulate(make_solver("unipc-3"), nodes())
    x = random(2, *DATA)
    state, kept = tableau.start(x), x.clone()
    for row in tableau.rows(x):
        before = [t.clone() for t in (state.x, state.anchor, *state.history)]
        after = advance(row, state, random(2, *DATA, seed=1))
        assert all(torch.equal(a, b) for a, b in zip(before, (state.x, state.anchor, *state.history), strict=True))
        state = after
    assert torch.equal(x, kept)


@dataclass(frozen=True)
class PerChannel(Solver):
    """DDIM with a gain and an offset of each channel's own, and a use for everything that a tableau has."""

    gain: tuple[float, ...] = (0.9, 1.0, 1.2)
    offset: tuple[float, ...] = (0.0, -0.3, 0.5)

    @property
    def order(self):
        return 1

    @property
    def memory(self):
        return 2

    @property
    def shape(self):
        return (3, 1, 1)

    def channels(self, values):
        return torch.tensor(values, dtype=torch.float64).reshape(self.shape)

    def record(self, nodes, i, x, x0):
        return self.channels(self.gain) * x0 + 0.1 * x

    def update(self, nodes, i, anchor, x, history):
        x_t = nodes.sigma[i + 1] / nodes.sigma[i] * x + 0.3 * self.channels(self.gain) * history[0] + self.channels(self.offset)
        return 0.5 * anchor + 0.5 * x, x_t if i == 0 else x_t - 0.1 * history[1] + 0.01 * anchor


@dataclass(frozen=True)
class PerElement(PerChannel):
    gain: tuple[float, ...] = tuple(k / 12 for k in range(12))
    offset: tuple[float, ...] = tuple(1 - k / 12 for k in range(12))

    @property
    def shape(self):
        return DATA


@pytest.mark.parametrize("solver", [PerChannel(), PerElement()], ids=["channel", "element"])
def test_coefficients_per_channel_and_element(solver):
    points = nodes()
    tableau = tabulate(solver, points)
    assert tableau.record.shape == (4, 2, *solver.shape)
    assert tableau.update.shape == (4, 2, 4, *solver.shape)
    assert tableau.bias.shape == (4, 2, *solver.shape)
    x = random(5, *DATA)
    state, anchor, history = tableau.start(x), x, []
    for i, row in enumerate(tableau.rows(x)):
        x0 = torch.tanh(x)
        state = advance(row, state, x0)
        history = [solver.record(points, i, x, x0), *history][:2]
        anchor, x = solver.update(points, i, anchor, x, history)
        torch.testing.assert_close(state.x, x, rtol=ROUND_OFF, atol=ROUND_OFF)
        torch.testing.assert_close(state.anchor, anchor, rtol=ROUND_OFF, atol=ROUND_OFF)


# -- what the kernel need not compute -------------------------------------------------------------------------------------------------


def used(row):
    """Which coefficients a row has: the state's by name."""
    names = ("anchor", "x", *(f"h{k}" for k in range(len(row.x) - 2)))
    return {name for name, value in zip(names, row.x, strict=True) if value is not None}


@pytest.mark.parametrize(
    ("name", "x", "anchor", "records", "noise"),
    [
        ("ddim", {"x", "h0"}, False, False, False),
        ("dpm-solver-pp-3m", {"x", "h0", "h1", "h2"}, False, False, False),
        ("sde-dpm-solver-pp-2m", {"x", "h0", "h1"}, False, False, True),
        ("deis-3", {"x", "h0", "h1", "h2"}, False, True, False),
        ("unipc-2", {"anchor", "h0", "h1", "h2"}, True, False, False),
        ("heun", {"anchor", "x", "h0", "h1"}, True, True, False),
    ],
)
def test_unused_coefficients_are_none_in_every_row(name, x, anchor, records, noise):
    solver, start = make_solver(name), random(2, *DATA)
    tableau = tabulate(solver, solver.nodes(TimeGrid.uniform(SCHEDULE, 8), SCHEDULE))
    rows = tableau.rows(start)
    assert len(rows) == tableau.nodes.evaluations
    for row in rows:
        assert used(row) == x
        assert (row.anchor is not None, row.record is not None, row.noise is not None) == (anchor, records, noise)
        assert row.bias == (None, None)
    assert tableau.stochastic == noise
    assert tableau.memory == solver.memory
    state = tableau.start(start)
    assert (state.anchor is not None) == anchor
    assert len(state.history) == solver.memory


def test_a_stochastic_step_adds_its_noise_and_wants_it():
    tableau, x = tabulate(make_solver("ddim", eta=1.0), nodes()), random(2, *DATA)
    row, xi = tableau.rows(x)[0], random(2, *DATA, seed=2)
    mean, noisy = (advance(row, tableau.start(x), torch.tanh(x), noise).x for noise in (torch.zeros_like(xi), xi))
    torch.testing.assert_close(noisy - mean, tableau.noise[0] * xi, rtol=ROUND_OFF, atol=ROUND_OFF)
    with pytest.raises(SolverError, match="adds noise"):
        advance(row, tableau.start(x), torch.tanh(x))


def test_gradients_are_finite_where_an_end_has_infinite_lam():
    """The end itself is fixed, inner times learn."""
    schedule = RectifiedFlow()
    t = torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64, requires_grad=True)
    tabulate(make_solver("unipc-2"), Nodes.at(schedule, t)).update.square().sum().backward()
    assert bool(torch.isfinite(t.grad).all()) and float(t.grad[1]) != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["unipc-3", "heun", "sde-dpm-solver-pp-2m"])
def test_the_state_keeps_its_dtype(name, dtype):
    solver = make_solver(name)
    tableau = tabulate(solver, solver.nodes(TimeGrid.uniform(SCHEDULE, 3), SCHEDULE))
    x = random(2, *DATA).to(dtype)
    state: State = tableau.start(x)
    for row in tableau.rows(x):
        state = advance(row, state, torch.tanh(state.x), torch.ones_like(x))
        assert {t.dtype for t in (state.x, *state.history)} == {dtype}
    assert {getattr(tableau, name).dtype for name in ("record", "update", "bias", "noise")} == {torch.float64}


# -- refusals -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken(PerChannel):
    """Divides by zero at evaluation 2, in one of its formulas."""

    where: str = "update"

    def scale(self, i, where):
        return torch.tensor(1.0 if i != 2 or where != self.where else float("inf"), dtype=torch.float64)

    def record(self, nodes, i, x, x0):
        return super().record(nodes, i, x, x0) * self.scale(i, "record")

    def update(self, nodes, i, anchor, x, history):
        anchor, x = super().update(nodes, i, anchor, x, history)
        return anchor, x * self.scale(i, "update")

    def noise(self, nodes, i):
        return 0.1 * self.scale(i, "noise")


@pytest.mark.parametrize("where", ["record", "update", "noise"])
def test_coefficients_that_are_not_finite_are_refused(where):
    t = nodes().t
    with pytest.raises(SolverError, match=f"Broken has no finite coefficients at evaluation 2, from t = {t[2]:g} to {t[3]:g}"):
        tabulate(Broken(where=where), nodes())


def test_an_output_that_depends_on_nothing_is_refused():
    empty = Tableau(nodes(1), *(torch.zeros(shape, dtype=torch.float64) for shape in ((1, 2), (1, 2, 3), (1, 2), (1,))))
    x = random(2, *DATA)
    with pytest.raises(SolverError, match="depends on nothing"):
        advance(empty.rows(x)[0], empty.start(x), x)


# -- gradients ------------------------------------------------------------------------------------------------------------------------

DENOISER = MixtureDenoiser(SCHEDULE, random(3, 2), torch.tensor([0.5, 0.7, 0.6], dtype=torch.float64))


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm-solver-3s", "dpm-solver-pp-3m", "unipc-3", "deis-3", "sde-dpm-solver-pp-2m"])
@pytest.mark.every(3)
def test_gradients_reach_the_times(name):
    """Through the nodes, the tableau and the loop, and through the times at which the network is called."""
    solver, start, ends = make_solver(name), random(2, 2), torch.tensor([1.0, 0.02], dtype=torch.float64)

    def end(inner):
        grid = TimeGrid(torch.cat([ends[:1], inner, ends[1:]]))
        return run_loop(DENOISER, tabulate(solver, solver.nodes(grid, SCHEDULE)), start, seeds=[0, 1])

    inner = torch.tensor([0.7, 0.45, 0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(end, inner, atol=1e-7)


def test_gradients_reach_the_numbers_of_a_tableau_and_the_start():
    """Those that are used: a coefficient that is zero in every row is left out of the kernel."""
    tableau, x = tabulate(make_solver("dpm-solver-pp-2m"), nodes()), random(2, 2)

    def end(gain, x):
        return run_loop(DENOISER, Tableau(tableau.nodes, tableau.record, tableau.update * gain, tableau.bias, tableau.noise), x)

    assert torch.autograd.gradcheck(end, (torch.ones_like(tableau.update).requires_grad_(), x.requires_grad_()), atol=1e-7)


def test_a_grid_that_training_has_tangled_is_refused():
    inner = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    with pytest.raises(GridError, match="followed by the larger 0.7"):
        TimeGrid(torch.cat([torch.ones(1), inner]))


def test_a_table_that_is_learned_keeps_its_zeros():
    """A coefficient that is zero in every row is skipped, unless it is a parameter."""
    table, x = tabulate(make_solver("ddim"), nodes()), random(2, *DATA)
    learned = replace(table, update=table.update.clone().requires_grad_())
    state = learned.start(x)
    for row in learned.rows(x):
        state = advance(row, state, torch.tanh(state.x))
    torch.testing.assert_close(state.x, run(table, x), rtol=ROUND_OFF, atol=ROUND_OFF)
    state.x.sum().backward()
    assert bool((learned.update.grad[-1, 1] != 0).all())  # every column of the last row, also those DDIM has no use for


def test_a_constant_in_record_is_refused():
    @dataclass(frozen=True)
    class Shifted(DDIM):
        def record(self, nodes, i, x, x0):
            return x0 + 1

    with pytest.raises(SolverError, match="remembers a constant"):
        tabulate(Shifted(), nodes())


def run(table, x):
    state = table.start(x)
    for row in table.rows(x):
        state = advance(row, state, torch.tanh(state.x))
    return state.x


@pytest.mark.parametrize("schedule", [VarianceExploding(), RectifiedFlow()])  # the second ends at sigma = 0
@pytest.mark.parametrize("nfe", [4, 5, 7])
def test_steps_on_a_schedule_use_exactly_nfe_evaluations(schedule, nfe):
    solver = make_solver("heun")
    try:
        steps = solver.steps_on(schedule, nfe)
    except SolverError:
        assert (nfe % 2 == 1) == isinstance(schedule, VarianceExploding)
    else:
        assert solver.nodes(make_grid("angle", schedule, steps), schedule).evaluations == nfe
