"""A fitted solver: exact where the truth is in its form, least squares where it is not, its parent where nothing asks for more."""

from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from fewstep import (
    Denoiser,
    DiscreteVP,
    FitForm,
    GaussianDenoiser,
    MixtureDenoiser,
    NoiseSchedule,
    RectifiedFlow,
    Tableau,
    TimeGrid,
    VarianceExploding,
    VPLinear,
    make_grid,
    make_solver,
    sample,
    tabulate,
)
from fewstep.learn.search.coefficients import FOLDS, NormalEquations, widened
from fewstep.learn.search.sequence import fit_in_sequence

F64 = torch.float64
SHAPE = (2, 3, 3)
EDM, TABLE = VarianceExploding(0.02, 20.0), DiscreteVP.linear(200)
LAWS: dict[str, NoiseSchedule] = {"edm": EDM, "vp": VPLinear(), "flow": RectifiedFlow(), "table": TABLE}
POOLS = ("scalar", "channel", "element")
EXACT = 1e-10  # of ends of size 1; measured 3e-12, most of it from nearly dependent features
ROUNDING = 1e-12  # of states: sums in another order
COEFFICIENT = 1e-8  # what rounding does to a coefficient of features that a ridge of 1e-6 keeps apart; measured 1e-9
BATCHES = 1e-10  # likewise, where the features differ
PLAIN = {"ridge": 0.0, "shrink": 0.0}


@dataclass
class Given:
    """States ``[N+1, B, *D]`` as a batch of the teacher's."""

    states: Tensor
    cond: object = None
    first: int = 0

    def state(self, i: int) -> Tensor:
        return self.states[i]

    @property
    def places(self) -> range:
        return range(self.first, self.first + self.states.shape[1])

    def split(self, count: int) -> list["Given"]:
        parts = self.states.chunk(count, dim=1)
        return [Given(part, None, sum(one.shape[1] for one in parts[:k])) for k, part in enumerate(parts)]


def noise(law: NoiseSchedule, seed: int, count: int = 48, shape: tuple[int, ...] = SHAPE) -> Tensor:
    sigma = law.sigma(torch.tensor(law.t_max, dtype=F64))
    return sigma * torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gaussian(law: NoiseSchedule, std: float | Tensor = 0.7) -> GaussianDenoiser:
    mean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=F64)
    return GaussianDenoiser(law, mean, torch.as_tensor(std, dtype=F64))


def flow(denoiser: GaussianDenoiser, grid: TimeGrid, x: Tensor) -> Given:
    """The exact states."""
    return Given(torch.stack([x, *(denoiser.flow(x, grid.t[0], t) for t in grid.t[1:])]))


def mixture(law: NoiseSchedule) -> MixtureDenoiser:
    means = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=F64)
    return MixtureDenoiser(law, means, torch.full((4,), 0.4, dtype=F64))


def solved(law: NoiseSchedule, grid: TimeGrid, name: str, **options: object) -> Tableau:
    solver = make_solver(name, **options)
    return tabulate(solver, solver.nodes(grid, law))


def start(law: NoiseSchedule, grid: TimeGrid, form: FitForm, name: str = "") -> Tableau:
    return widened(solved(law, grid, name or ("ddim" if form.history == 1 else "dpm-solver-pp-2m")), form, SHAPE)


def path(denoiser: Denoiser, tableau: Tableau, x: Tensor) -> Given:
    """The states of a run."""
    states = [x]
    sample(denoiser, tableau, x, observe=lambda step: states.append(step.x_next))
    return Given(torch.stack(states))


def moved(fitted: Tableau, before: Tableau) -> float:
    return max(float((getattr(fitted, name) - getattr(before, name)).abs().max()) for name in ("update", "bias", "record", "noise"))


@cache
def taught(law: NoiseSchedule, steps: int = 4) -> tuple[MixtureDenoiser, TimeGrid, Given]:
    """A problem whose steps are not affine, with the states of a solver of 16 steps to each of the grid's."""
    denoiser, grid = mixture(law), make_grid("angle", law, steps)
    level = torch.linspace(0, steps, 16 * steps + 1, dtype=F64)
    index = level.floor().long().clamp(max=steps - 1)
    fine = torch.lerp(grid.t[index], grid.t[index + 1], level - index)
    states = path(denoiser, solved(law, TimeGrid(fine), "dpm-solver-pp-3m"), noise(law, 1)).states
    return denoiser, grid, Given(states[::16])


# -- where the truth is in the form ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.every(3)
def test_the_steps_of_a_gaussian_are_found(law: str, pool: str) -> None:
    """On other noises than those of the fit, from any number of outputs, with an std for all that share coefficients."""
    schedule, stds = LAWS[law], 0.3 + 1.5 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(6), dtype=F64)
    denoiser = gaussian(schedule, {"scalar": torch.tensor(0.7), "channel": stds[:, :1, :1].expand(SHAPE), "element": stds}[pool])
    grid, other = make_grid("angle", schedule, 4), noise(schedule, 2)
    batch, ends = flow(denoiser, grid, noise(schedule, 1)), flow(denoiser, grid, other).state(-1)
    for history, bias in product((1, 2, None), (True, False)):
        form = FitForm(history, pool, bias, **PLAIN)
        begun = start(schedule, grid, form)
        found = fit_in_sequence(denoiser, begun, [batch], form).tableau
        torch.testing.assert_close(sample(denoiser, found, other), ends, rtol=0, atol=EXACT)
        assert float((sample(denoiser, begun, other) - ends).abs().max()) > 0.03
    if pool != "scalar":  # and not with coefficients for all of them, unless the outputs tell them apart
        form = FitForm(1, "scalar", **PLAIN)
        found = fit_in_sequence(denoiser, start(schedule, grid, form), [batch], form).tableau
        assert float((sample(denoiser, found, other) - ends).abs().max()) > 1e-4


@pytest.mark.parametrize("law, form", [("edm", PLAIN), ("flow", {}), ("edm", {"ridge": 10.0}), ("flow", {"shrink": 10.0})], ids=str)
@pytest.mark.every(4)
def test_an_exact_parent_is_given_back(law: str, form: dict) -> None:
    """Of a point mass, whose outputs are all the same, and where the batch holds the parent's own states; with any ridge."""
    schedule = LAWS[law]
    grid, x, other = make_grid("angle", schedule, 4), noise(schedule, 1), noise(schedule, 2)
    for pool, history in product(POOLS, (1, None)):
        one = FitForm(history, pool, **form)
        begun = start(schedule, grid, one)
        for denoiser in (gaussian(schedule, 0.0), gaussian(schedule)):
            batch = path(denoiser, begun, x) if float(denoiser.stds.max()) else flow(denoiser, grid, x)
            found = fit_in_sequence(denoiser, begun, [batch], one).tableau
            assert moved(found, begun) < COEFFICIENT, (pool, history)
            torch.testing.assert_close(sample(denoiser, found, other), sample(denoiser, begun, other), rtol=0, atol=ROUNDING)


# -- least squares ---------------------------------------------------------------------------------------------------


def ridge(features: Tensor, target: Tensor, near: Tensor, size: Tensor, strength: float) -> Tensor:
    """``argmin |F w - y|^2 + ridge |size (w - near)|^2``, from stacked equations; ``features [n, c]``."""
    n = len(features)
    left = torch.cat([features / n**0.5, strength**0.5 * torch.diag(size)])
    right = torch.cat([target / n**0.5, strength**0.5 * size * near])
    return torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution[:, 0]


@pytest.mark.parametrize("pool, bias", [*product(POOLS, (True, False))])
def test_normal_equations_are_those_of_the_stacked_features(pool: str, bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    features, target = torch.randn(3, 40, *SHAPE, generator=generator, dtype=F64), torch.randn(40, *SHAPE, generator=generator, dtype=F64)
    features[1] = 20 * features[1] + features[0]  # of another size, and not independent
    target += torch.arange(18, dtype=F64).reshape(SHAPE) / 6 * features[2] + 0.3
    parent, groups = torch.tensor([0.5, -0.2, 1.0], dtype=F64), {"scalar": 1, "channel": 2, "element": 18}[pool]
    equations = NormalEquations(groups, 3)
    for part in range(0, 40, 10):
        equations.add(features[:, part : part + 10], target[part : part + 10], range(part, part + 10))
    flat = torch.cat([features, torch.ones_like(features[:1])]).flatten(2).reshape(4, 40, groups, -1).permute(2, 1, 3, 0).flatten(1, 2)
    wanted, rows = target.flatten(1).reshape(40, groups, -1).transpose(0, 1).flatten(1), 40 * 18 // groups
    assert int(equations.rows.sum()) == rows
    size = flat.square().mean((0, 1)).sqrt()
    for strength, shrink in ((0.0, 0.0), (1e-6, 1e-3), (0.3, 0.0), (0.0, 0.3), (2.0, 2.0)):
        common = ridge(flat.flatten(0, 1)[:, :3], wanted.flatten(), parent, size[:3], strength)
        near = torch.cat([common, torch.zeros(1, dtype=F64)])
        own, free = near.expand(groups, 4).clone(), 4 if bias else 3
        for group in range(groups) if (pool, bias) != ("scalar", False) else ():  # what all want is what the only group wants
            own[group, :free] = ridge(flat[group, :, :free], wanted[group], near[:free], size[:free], shrink)
        found = equations.solve(parent, FitForm(None, pool, bias, strength, shrink))
        torch.testing.assert_close(found, own, rtol=0, atol=1e-11)  # measured 1e-13
    alike = torch.cat([ridge(flat.flatten(0, 1)[:, :3], wanted.flatten(), parent, size[:3], 0.0), torch.zeros(1, dtype=F64)])
    free, tight = (float((equations.solve(parent, FitForm(None, pool, bias, 0.0, much)) - alike).norm()) for much in (0.0, 9e5))
    assert tight < 2e-5 * free if groups > 1 or bias else free < 1e-11
    stiff = equations.solve(parent, FitForm(None, pool, bias, 9e5, 9e5))
    torch.testing.assert_close(stiff, torch.cat([parent, torch.zeros(1)]).expand_as(stiff), rtol=0, atol=1e-5)


def test_a_penalty_is_chosen_by_cross_validation() -> None:
    """Elements that want other coefficients get them; where they want the same, noise is not taken for a wish."""
    generator, groups = torch.Generator().manual_seed(4), 18
    x, parent = torch.randn(2, 24, *SHAPE, generator=generator, dtype=F64), torch.tensor([0.5, 1.0], dtype=F64)
    noise, tilt = torch.randn(24, *SHAPE, generator=generator, dtype=F64), torch.arange(18, dtype=F64).reshape(SHAPE) / 9
    for size, spread in ((0.0, 1.0), (1.0, 0.0)):
        equations = NormalEquations(groups, 2)
        for part in range(0, 24, 6):
            target = 0.5 * x[0] + (1 + spread * tilt) * x[1] + size * noise
            equations.add(x[:, part : part + 6], target[part : part + 6], range(part, part + 6))
        found = equations.solve(parent, FitForm())
        own, common = (equations.solve(parent, FitForm(shrink=shrink)) for shrink in (1e-3, 9e5))
        assert torch.equal(found, own) is bool(spread)
        assert (float((found - common).abs().max()) < 0.05) is not bool(spread)
    single = NormalEquations(groups, 2)
    single.add(x[:, :1], noise[:1], [FOLDS])
    torch.testing.assert_close(single.solve(parent, FitForm()), single.solve(parent, FitForm(shrink=9e5)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("law, pool", [("edm", "scalar"), ("vp", "channel"), ("flow", "element"), ("flow", "scalar"), ("edm", "channel")])
@pytest.mark.every(3)
def test_each_row_is_the_optimum(law: str, pool: str) -> None:
    """The distance to the teacher's state has no slope in any coefficient, and grows along every one."""
    (denoiser, grid, batch), form = taught(LAWS[law]), FitForm(2, pool, **PLAIN)
    found = fit_in_sequence(denoiser, start(LAWS[law], grid, form), [batch], form).tableau

    def distance(i: int, update: Tensor, bias: Tensor) -> float:
        run = path(denoiser, Tableau(found.nodes, found.record, update, bias, found.noise), batch.state(0))
        return float((run.state(i + 1) - batch.state(i + 1)).square().sum())

    for i in range(4):
        here = distance(i, found.update, found.bias)
        for column in (1, 2, 3, None) if i else (1, 2, None):
            far = []
            for way in (1e-2, -1e-2):
                update, bias = found.update.clone(), found.bias.clone()
                (bias[i, 1] if column is None else update[i, 1, column]).add_(way)
                far.append(distance(i, update, bias) - here)
            assert min(far) > 0 and abs(far[0] - far[1]) < 1e-6 * sum(far), (i, column)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("law", ["edm", "vp", "flow"])
def test_a_longer_history_fits_better_where_it_begins_to_matter(law: str, pool: str) -> None:
    denoiser, grid, batch = taught(LAWS[law])
    left, ratios = {}, []
    for history in (1, 2, 3, 4):
        form = FitForm(history, pool, **PLAIN)
        found = fit_in_sequence(denoiser, start(LAWS[law], grid, form, "ddim"), [batch], form).tableau
        left[history] = (path(denoiser, found, batch.state(0)).states - batch.states).flatten(1).norm(dim=1)
    for history in (1, 2, 3):  # the first that reads one output more is step `history`
        short, long = left[history], left[history + 1]
        torch.testing.assert_close(short[: history + 1], long[: history + 1], rtol=0, atol=EXACT)
        ratios.append(float(long[history + 1] / short[history + 1]))
    assert max(ratios) < 1 + ROUNDING, ratios
    assert min(ratios) < 0.99 or (law, pool) == ("flow", "element"), ratios  # the output at alpha = 0 is the same for all: a bias


# -- how it is run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "law, form",
    [("edm", FitForm()), ("flow", FitForm(pool="scalar")), ("edm", FitForm(2, "channel", **PLAIN)), ("flow", FitForm(2, "element"))],
    ids=str,
)
def test_batches_do_not_matter(law: str, form: FitForm) -> None:
    denoiser, grid, batch = taught(LAWS[law])
    begun = start(LAWS[law], grid, form)
    one, many = (fit_in_sequence(denoiser, begun, batch.split(count), form).tableau for count in (1, 16))
    assert moved(many, one) < BATCHES and moved(one, begun) > 1e-3


def test_rows_that_are_not_asked_for_stay() -> None:
    (denoiser, grid, batch), form = taught(EDM), FitForm(pool="channel")
    whole = fit_in_sequence(denoiser, start(EDM, grid, form), [batch], form).tableau
    for begun in (start(EDM, grid, form), whole):
        assert moved(fit_in_sequence(denoiser, begun, [batch], form, rows=[]).tableau, begun) == 0
        for rows in ([3], [1, 2], {0}):
            found = fit_in_sequence(denoiser, begun, [batch], form, rows=rows).tableau
            for i in range(4):
                same = torch.equal(found.update[i], begun.update[i]) and torch.equal(found.bias[i], begun.bias[i])
                assert same is (i not in rows)
    states = path(denoiser, start(EDM, grid, form), batch.state(0))  # the last row, from where the parent's lead
    last, wanted = fit_in_sequence(denoiser, start(EDM, grid, form), [batch], form, rows=[3]).tableau, batch.state(4)
    before, after = states.state(4) - wanted, path(denoiser, last, batch.state(0)).state(4) - wanted
    assert float(after.norm()) < 0.85 * float(before.norm())
