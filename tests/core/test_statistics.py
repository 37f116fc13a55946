"""Numbers along lam: their integrals against plain quadrature, the time grids through their points, and whose they are."""

import hashlib
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors
from scipy.integrate import cumulative_trapezoid, quad, trapezoid

from fewstep import ArtifactError, DiscreteVP, GridError, RectifiedFlow, TimeGrid, VarianceExploding, VPLinear, tabulate
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


# -- time grids -----------------------------------------------------------------------------------------------------------------------


def test_covers_what_is_finite():
    inside = torch.tensor([-math.inf, -1.0, 0.0, 1.5, math.inf], dtype=torch.float64)
    assert STATISTICS.covers(inside)
    assert STATISTICS.covers(inside + 1e-9)
    assert not STATISTICS.covers(inside - 1e-3)
    assert not STATISTICS.covers(inside + 1e-3)


def test_indices_are_the_nearest_points():
    lam = torch.tensor([-1.0, -0.88, -0.87, 0.1, 1.5], dtype=torch.float64)
    assert STATISTICS.indices(lam).tolist() == [0, 0, 1, 4, 10]
    halves = torch.tensor([-0.875, -0.625, -0.375], dtype=torch.float64)
    assert STATISTICS.indices(halves).tolist() == [0, 2, 2]
    assert STATISTICS.indices(STATISTICS.lam, exactly=True).tolist() == list(range(11))
    with pytest.raises(GridError, match="lam = \\[-1.0, -0.88"):
        STATISTICS.indices(lam, exactly=True)


@pytest.mark.parametrize(
    "schedule", [SCHEDULE, VarianceExploding(), RectifiedFlow(), DiscreteVP.linear()], ids=["vp", "edm", "flow", "table"]
)
def test_a_grid_through_points(schedule):
    grid = STATISTICS.grid(schedule, [0, 3, 4, 10])
    torch.testing.assert_close(schedule.lam(grid.t), STATISTICS.lam[[0, 3, 4, 10]], rtol=ROUND_OFF, atol=ROUND_OFF)
    moved = TimeGrid(schedule.t_of_lam(torch.tensor([-0.95, -0.3, 0.1, 1.4], dtype=torch.float64)))
    assert torch.equal(STATISTICS.snap(moved, schedule).t, grid.t)
    assert torch.equal(STATISTICS.grid(schedule, torch.tensor([0, 3, 4, 10])).t, grid.t)
    with pytest.raises(GridError, match="appears twice"):
        STATISTICS.snap(TimeGrid(schedule.t_of_lam(torch.tensor([-0.95, 0.1, 0.05 + 0.06, 1.4], dtype=torch.float64))), schedule)


def test_a_trapezoid_solver_snaps_its_grid():
    lam = torch.tensor([-0.95, -0.3, 0.1, 1.4], dtype=torch.float64)
    moved, kept = (
        DPMSolverV3(STATISTICS, integrals=rule).nodes(TimeGrid(SCHEDULE.t_of_lam(lam)), SCHEDULE) for rule in ("trapezoid", "exact")
    )
    torch.testing.assert_close(moved.lam, STATISTICS.lam[[0, 3, 4, 10]], rtol=ROUND_OFF, atol=ROUND_OFF)
    torch.testing.assert_close(kept.lam, lam, rtol=ROUND_OFF, atol=ROUND_OFF)


# -- whose ----------------------------------------------------------------------------------------------------------------------------


def test_check_passes_what_belongs_together():
    STATISTICS.check(model="abc", guidance=2.0, schedule=VPLinear(), shape=SHAPE)
    STATISTICS.check(model="", guidance=2.0, schedule=VPLinear(), shape=SHAPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "xyz"}, 'made for model "abc", but are used with model "xyz": calibrate this model'),
        ({"guidance": 1.0}, "made for guidance 2.0, but are used with guidance 1.0"),
        ({"shape": (3, 2)}, "made for sample shape \\[2, 3\\], but are used with sample shape \\[3, 2\\]"),
        ({"schedule": VPLinear(beta_max=10.0)}, '"beta_max": 20.0.*, but are used with schedule .*"beta_max": 10.0'),
        ({"schedule": VarianceExploding()}, '"vp-linear".* but are used with schedule .*"edm"'),
    ],
)
def test_check_names_both_sides(change, message):
    with pytest.raises(ArtifactError, match=message):
        STATISTICS.check(**{"model": "abc", "guidance": 2.0, "schedule": VPLinear(), "shape": SHAPE, **change})


def test_fingerprints_tell_statistics_apart():
    same = random_statistics()
    others = [random_statistics(seed=1), random_statistics(levels=12), random_statistics(high=1.6)]
    others += [
        ModelStatistics(same.lam, same.l, same.s, same.b, SHAPE, *rest) for rest in ((SCHEDULE, "x"), (VPLinear(beta_min=0.2), "abc"))
    ]
    others += [ModelStatistics(same.lam, same.l, same.s, same.b, SHAPE, SCHEDULE, "abc", 1.0)]
    assert same.fingerprint == STATISTICS.fingerprint
    assert len({STATISTICS.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


# -- disk -----------------------------------------------------------------------------------------------------------------------------


def save(folder):
    return STATISTICS.save(folder / "statistics")


def edit(folder, **changes) -> None:
    """Other fields in ``statistics.json``; a field set to ``None`` goes."""
    meta = {**json.loads((folder / "statistics.json").read_text()), **changes}
    (folder / "statistics.json").write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))


@pytest.mark.parametrize("schedule", [VPLinear(beta_max=10.0), DiscreteVP.linear(10)], ids=["law", "table"])
def test_round_trip(tmp_path, schedule):
    statistics = ModelStatistics(STATISTICS.lam, STATISTICS.l, STATISTICS.s, STATISTICS.b, SHAPE, schedule, "abc", 2.0, {"rows": 7})
    folder = statistics.save(tmp_path / "a" / "statistics")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "statistics.json", "statistics.safetensors"]
    loaded = ModelStatistics.load(folder)
    torch.testing.assert_close(loaded.lam, statistics.lam, rtol=ROUND_OFF, atol=ROUND_OFF)
    for name in "lsb":
        assert torch.equal(getattr(loaded, name), getattr(statistics, name).float().double())
    loaded.check(model="abc", guidance=2.0, schedule=schedule, shape=SHAPE)
    assert (loaded.shape, loaded.card, loaded.fingerprint) == (SHAPE, {"rows": 7}, statistics.fingerprint)
    again = loaded.save(tmp_path / "b")
    assert (again / "statistics.safetensors").read_bytes() == (folder / "statistics.safetensors").read_bytes()
    text = (folder / "README.md").read_text()
    assert "guidance 2, samples of shape (2, 3)" in text
    assert "- 11 levels, lam from -1 to 1.5; l (2, 1), s (1, 1), b (1, 3)" in text
    assert "- rows: 7" in text


@pytest.mark.parametrize("name", ["statistics.json", "statistics.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = save(tmp_path)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"cannot read .*{name}: No such file"):
        ModelStatistics.load(folder)


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_truncated_tensor_file_is_refused(tmp_path, keep):
    path = save(tmp_path) / "statistics.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="is damaged: its checksum is not the one in statistics.json"):
        ModelStatistics.load(path.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "'fewstep-statistics' version 2; this fewstep reads 'fewstep-statistics' version 1"),
        ({"format": "fewstep-sampler"}, "is 'fewstep-sampler' version 1"),
        ({"lam": None}, "not a whole statistics artifact: KeyError\\('lam'\\)"),
        ({"lam": [0.0]}, "not a whole statistics artifact: ValueError"),
        ({"lam": [1.0, 0.0]}, "at least 2 increasing"),
        ({"shape": [2, 4]}, "b of statistics has shape \\(11, 1, 3\\)"),
        ({"schedule": {"law": "unheard-of"}}, "not a whole statistics artifact: .*unknown noise schedule"),
        ({"card": 3}, "not a whole statistics artifact: TypeError"),
    ],
)
def test_other_json_is_refused(tmp_path, changes, message):
    folder = save(tmp_path)
    edit(folder, **changes)
    with pytest.raises(ArtifactError, match=message):
        ModelStatistics.load(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"l": torch.zeros(11, 1, 1), "s": torch.zeros(11, 1, 1)}, "not a whole statistics artifact: KeyError\\('b'\\)"),
        ({name: torch.full((11, 1, 1), math.nan) for name in "lsb"}, "l of statistics is not finite at level 0"),
        ({name: torch.zeros(()) for name in "lsb"}, "not a whole statistics artifact: TypeError"),
    ],
)
def test_other_tensors_are_refused(tmp_path, tensors, message):
    folder, data = save(tmp_path), save_tensors(tensors)
    (folder / "statistics.safetensors").write_bytes(data)
    edit(folder, sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ArtifactError, match=message):
        ModelStatistics.load(folder)


def test_a_card_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    statistics = ModelStatistics(STATISTICS.lam, STATISTICS.l, STATISTICS.s, STATISTICS.b, SHAPE, SCHEDULE, card={"rows": torch.ones(2)})
    with pytest.raises(ArtifactError, match="plain JSON values"):
        statistics.save(tmp_path / "statistics")
    assert list(tmp_path.iterdir()) == []
