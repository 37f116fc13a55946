"""Numbers along lam: their integrals against plain quadrature, the time grids through their points, and whose they are."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import cumulative_trapezoid, quad, trapezoid

from fewstep import ArtifactError, DiscreteVP, GridError, TimeGrid, VPLinear, tabulate
from fewstep.core.statistics import ModelStatistics
from fewstep.solvers import DPMSolverV3

ROUND_OFF = 1e-12  # sums of tens of float64 numbers near 1
QUADRATURE = 1e-10  # nested adaptive integrals
ORDER_SLACK = 0.1  # grids that are all fine for waves this long
SCHEDULE = VPLinear()
SHAPE = (2, 3)
COUNT = 4  # moments


def random_statistics(levels=11, low=-1.0, high=1.5, seed=0) -> ModelStatistics:
    """Waves; ``l`` per row, ``s`` one number, ``b`` per column of samples [2, 3]."""
    generator = torch.Generator().manual_seed(seed)
    lam = torch.linspace(low, high, levels, dtype=torch.float64)

    def waves(*shape: int) -> torch.Tensor:
        size, speed, phase = (torch.rand(1, *shape, generator=generator, dtype=torch.float64) for _ in range(3))
        return size * torch.sin((1 + speed) * lam.reshape(-1, 1, 1) + 6 * phase)

    return ModelStatistics(lam, waves(2, 1), waves(1, 1), waves(1, 3), SHAPE, SCHEDULE, "abc", 2.0, {"rows": 7})


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


STATISTICS = random_statistics()
POINTS = STATISTICS.lam.tolist()  # a quarter apart


# -- integrals ------------------------------------------------------------------------------------------------------------------------


class Reference:
    """The integrals of one element by nested adaptive quadrature, cut at the kinks."""

    def __init__(self, statistics: ModelStatistics, element: tuple[int, int], start: float) -> None:
        self.lam, self.start = statistics.lam.numpy(), start
        self.l, self.s, self.b = (getattr(statistics, name).expand(-1, *SHAPE)[(slice(None), *element)].numpy() for name in "lsb")

    def line(self, values: np.ndarray):
        return lambda r: np.interp(r, self.lam, values)

    def integral(self, function, end: float) -> float:
        """From the start to ``end``."""
        low, high = sorted((self.start, end))
        inside = self.lam[(self.lam > low + 1e-9) & (self.lam < high - 1e-9)]
        points = [self.start, *(inside if self.start <= end else inside[::-1]), end]
        return sum(quad(function, a, b, epsabs=1e-13, epsrel=1e-13)[0] for a, b in pairwise(points))

    def area(self, values: np.ndarray, end: float) -> float:
        """The integral of the line itself, in closed form."""
        before = cumulative_trapezoid(values, self.lam, initial=0)

        def from_first(at: float) -> float:
            k = int(np.clip(np.searchsorted(self.lam, at) - 1, 0, len(self.lam) - 2))
            return before[k] + (at - self.lam[k]) * (values[k] + self.line(values)(at)) / 2

        return from_first(end) - from_first(self.start)

    def growth(self, r: float) -> float:
        return math.exp(self.area(self.l, r) + self.area(self.s, r))

    def beta(self, end: float) -> float:
        return self.integral(lambda r: math.exp(-self.area(self.s, r)) * self.line(self.b)(r), end)

    def moment(self, k: int, end: float) -> float:
        return self.integral(lambda r: self.growth(r) * (r - self.start) ** k / math.factorial(k), end)

    def drift(self, end: float) -> float:
        return self.integral(lambda r: self.growth(r) * self.beta(r), end)


@pytest.mark.parametrize(
    ("start", "end"),
    [(0.05, 0.2), (0.1, 0.9), (0.9, 0.1), (-0.25, 0.25), (0.25, -0.25), (-1.0, -0.4), (1.5, 1.1), (0.3, 0.3)],
    ids=["in-a-cell", "forwards", "backwards", "points", "points-backwards", "first-point", "last-point", "nowhere"],
)
@pytest.mark.every(3)
def test_exact_integrals(start, end):
    actual = STATISTICS.integrals(number(start), number(end), COUNT, "exact")
    for element in ((0, 0), (1, 2)):
        reference = Reference(STATISTICS, element, start)
        expected = [reference.area(reference.l, end), reference.area(reference.s, end), reference.beta(end), reference.drift(end)]
        expected += [reference.moment(k, end) for k in range(COUNT)]
        found = [float(value.expand(SHAPE)[element]) for value in (*actual[:4], *actual.moments)]
        assert found == pytest.approx(expected, rel=QUADRATURE, abs=QUADRATURE)


@pytest.mark.parametrize(("first", "last"), [(0, 10), (3, 7), (7, 3), (4, 5), (5, 4), (6, 6)])
def test_trapezoid_integrals(first, last):
    indices = np.arange(first, last + (1 if first <= last else -1), 1 if first <= last else -1)
    lam = STATISTICS.lam.numpy()[indices]
    l, s, b = (getattr(STATISTICS, name).expand(-1, *SHAPE).numpy()[indices] for name in "lsb")

    def running(values: np.ndarray) -> np.ndarray:
        return cumulative_trapezoid(values, lam, axis=0, initial=0)

    growth, beta = np.exp(running(l) + running(s)), running(np.exp(-running(s)) * b)
    r = (lam - lam[0]).reshape(-1, 1, 1)
    moments = [growth * r**k / math.factorial(k) for k in range(COUNT)]
    expected = [trapezoid(values, lam, axis=0) for values in (l, s, np.exp(-running(s)) * b, growth * beta, *moments)]
    actual = STATISTICS.integrals(STATISTICS.lam[first], STATISTICS.lam[last], COUNT, "trapezoid")
    for found, wanted in zip((*actual[:4], *actual.moments), expected, strict=True):
        torch.testing.assert_close(found.expand(SHAPE), torch.from_numpy(wanted), rtol=ROUND_OFF, atol=ROUND_OFF)


def test_trapezoid_tends_to_exact_with_the_square_of_the_cell():
    worst = []
    for levels in (26, 51, 101):
        statistics = random_statistics(levels)
        exact, rough = (statistics.integrals(number(-0.5), number(1.0), COUNT, rule) for rule in ("exact", "trapezoid"))
        pairs = zip((exact.beta, exact.drift, *exact.moments), (rough.beta, rough.drift, *rough.moments), strict=True)
        worst.append([float((one - two).abs().max()) for one, two in pairs])
    for slopes in (np.log2(np.divide(*pair)) for pair in pairwise(worst)):
        assert slopes == pytest.approx([2] * len(slopes), abs=ORDER_SLACK)


@pytest.mark.parametrize("rule", ["exact", "trapezoid"])
@pytest.mark.parametrize(("start", "middle", "end"), [(-0.75, 0.0, 1.25), (1.25, 0.0, -0.75), (-0.75, 1.25, 0.0), (0.5, -0.5, 0.5)])
def test_integrals_add_up(start, middle, end, rule):
    """Of two steps, the second seen from the start of the first."""
    whole, one, two = (STATISTICS.integrals(number(a), number(b), 2, rule) for a, b in ((start, end), (start, middle), (middle, end)))
    decay, growth = torch.exp(-one.s), torch.exp(one.l + one.s)
    sums = {
        "l": one.l + two.l,
        "s": one.s + two.s,
        "beta": one.beta + decay * two.beta,
        "drift": one.drift + growth * (one.beta * two.moments[0] + decay * two.drift),
    }
    moments = (one.moments[0] + growth * two.moments[0],)
    moments += (one.moments[1] + growth * (two.moments[1] + (middle - start) * two.moments[0]),)
    for name, value in sums.items():
        torch.testing.assert_close(getattr(whole, name), value, rtol=ROUND_OFF, atol=ROUND_OFF)
    for found, value in zip(whole.moments, moments, strict=True):
        torch.testing.assert_close(found, value, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_trapezoid_wants_points_of_the_grid():
    with pytest.raises(GridError, match="need times on the statistics' own grid; snap the grid first"):
        STATISTICS.integrals(number(0.0), number(0.3), 1, "trapezoid")


def test_at_is_linear_between_the_levels():
    lam = torch.tensor([-1.0, -0.9, 0.25, 1.45, 1.5], dtype=torch.float64)
    for name, value in zip("lsb", STATISTICS.at(lam), strict=True):
        table = getattr(STATISTICS, name)
        assert value.shape == (5, *table.shape[1:])
        for i, j in np.ndindex(table.shape[1:]):
            expected = np.interp(lam.numpy(), STATISTICS.lam.numpy(), table[:, i, j].numpy())
            torch.testing.assert_close(value[:, i, j], torch.from_numpy(expected), rtol=ROUND_OFF, atol=ROUND_OFF)


# -- gradients ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(0.05, 0.2), (0.1, 0.9), (0.9, -0.6)])
def test_gradients_reach_the_ends_of_an_integral(start, end):
    def integrals(s, t):
        found = STATISTICS.integrals(s, t, 3, "exact")
        return (*found[:4], *found.moments)

    assert torch.autograd.gradcheck(integrals, (number(start).requires_grad_(), number(end).requires_grad_()))


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 3, "corrector": "true"}, {"steps": 3, "predictor": "pseudo"}])
@pytest.mark.every(3)
def test_gradients_reach_the_times_through_the_tableau(options):
    solver = DPMSolverV3(STATISTICS, **options)
    times = SCHEDULE.t_of_lam(torch.tensor([-0.9, -0.4, 0.3, 0.6, 1.4], dtype=torch.float64))

    def sums(inner):
        grid = TimeGrid(torch.cat([times[:1], inner, times[-1:]]))
        tableau = tabulate(solver, solver.nodes(grid, SCHEDULE))
        tables = (tableau.record, tableau.update, tableau.bias)
        return tuple((table * torch.cos(torch.arange(table.numel()).reshape(table.shape))).sum() for table in tables)

    assert torch.autograd.gradcheck(sums, times[1:-1].clone().requires_grad_())


# -- what is refused ------------------------------------------------------------------------------------------------------------------


def make(lam=None, shape=(2,), **tables) -> ModelStatistics:
    tables = {name: tables.get(name, torch.zeros(5, 2)) for name in "lsb"}
    return ModelStatistics(torch.linspace(0, 1, 5) if lam is None else torch.tensor(lam), *tables.values(), shape, SCHEDULE)


def spoiled(value: float) -> torch.Tensor:
    table = torch.zeros(5, 2)
    table[3, 1] = value
    return table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": [0.0]}, "at least 2 increasing finite numbers"),
        ({"lam": [[0.0, 1.0]]}, "at least 2 increasing finite numbers, got shape \\(1, 2\\)"),
        ({"lam": [0.0, 0.25, 0.25, 0.5, 0.75]}, "at least 2 increasing"),
        ({"lam": [1.0, 0.75, 0.5, 0.25, 0.0]}, "at least 2 increasing"),
        ({"lam": [0.0, 0.25, 0.5, 0.75, math.nan]}, "increasing finite"),
        ({"lam": [0.0, 0.25, 0.5, 0.75, math.inf]}, "increasing finite"),
        ({"lam": [0.0, 0.25, 0.5, 0.75, 1.01]}, "must be uniform"),
        ({"l": torch.zeros(4, 2)}, "l of statistics has shape \\(4, 2\\): for 5 levels and samples of shape \\(2,\\) .* \\[5, 1 or 2\\]"),
        ({"s": torch.zeros(5)}, "s of statistics has shape \\(5,\\)"),
        ({"b": torch.zeros(5, 3)}, "b of statistics has shape \\(5, 3\\)"),
        ({"b": torch.zeros(5, 2, 1)}, "b of statistics has shape \\(5, 2, 1\\)"),
        ({"s": spoiled(math.nan)}, "s of statistics is not finite at level 3, lam = 0.75"),
        ({"b": spoiled(-math.inf)}, "b of statistics is not finite at level 3, lam = 0.75"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change, message):
    make()
    with pytest.raises(ArtifactError, match=message):
        make(**change)


def test_numbers_are_kept_in_float64_without_gradients():
    table = torch.zeros(5, 2, requires_grad=True)
    statistics = make(l=table)
    assert {getattr(statistics, name).dtype for name in ("lam", *"lsb")} == {torch.float64}
    assert not statistics.l.requires_grad
    assert statistics.element == (2,)
    assert STATISTICS.element == SHAPE
    assert make(l=torch.zeros(5, 1), s=torch.zeros(5, 1), b=torch.zeros(5, 1)).element == (1,)


def test_the_last_digits_of_a_noise_table_may_differ_as_machines_do() -> None:
    law = DiscreteVP.scaled_linear(20)
    nudged, other = (DiscreteVP(law.theta * (1 + by)) for by in (1e-15, 1e-6))
    statistics = replace(STATISTICS, schedule=law)
    statistics.check(model="abc", guidance=2, schedule=nudged, shape=SHAPE)  # the scale as a whole number, too
    with pytest.raises(ArtifactError, match="made for schedule"):
        statistics.check(model="abc", guidance=2, schedule=other, shape=SHAPE)
