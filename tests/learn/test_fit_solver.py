"""A fitted solver: exact where the truth is in its form, least squares where it is not, its parent where nothing asks for more."""

import os
import subprocess
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep import (
    Denoiser,
    DiscreteVP,
    FewstepError,
    FitForm,
    GaussianDenoiser,
    MixtureDenoiser,
    ModelError,
    Nodes,
    NoiseSchedule,
    RectifiedFlow,
    Sampler,
    SolverError,
    Tableau,
    TimeGrid,
    VarianceExploding,
    VPLinear,
    fit_in_sequence,
    make_grid,
    make_solver,
    sample,
    tabulate,
)
from fewstep.core import sampler as sampler_module
from fewstep.core import tableau as tableau_module
from fewstep.learn.ends import Ends, sizes
from fewstep.learn.fit_solver import NormalEquations, sweep, widened
from fewstep.solvers import SOLVERS

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
    """States ``[N+1, B, *D]`` as a lesson."""

    states: Tensor
    cond: object = None

    def state(self, i: int) -> Tensor:
        return self.states[i]

    def split(self, count: int) -> list["Given"]:
        return [Given(part) for part in self.states.chunk(count, dim=1)]


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
def test_the_steps_of_a_gaussian_are_found(law: str, pool: str) -> None:
    """On other noises than those of the fit, from any number of outputs, with an std for all that share coefficients."""
    schedule, stds = LAWS[law], 0.3 + 1.5 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(6), dtype=F64)
    denoiser = gaussian(schedule, {"scalar": torch.tensor(0.7), "channel": stds[:, :1, :1].expand(SHAPE), "element": stds}[pool])
    grid, other = make_grid("angle", schedule, 4), noise(schedule, 2)
    lesson, ends = flow(denoiser, grid, noise(schedule, 1)), flow(denoiser, grid, other).state(-1)
    for history, bias in product((1, 2, None), (True, False)):
        form = FitForm(history, pool, bias, **PLAIN)
        begun = start(schedule, grid, form)
        found = fit_in_sequence(denoiser, begun, [lesson], form)
        torch.testing.assert_close(sample(denoiser, found, other), ends, rtol=0, atol=EXACT)
        assert float((sample(denoiser, begun, other) - ends).abs().max()) > 0.03
    if pool != "scalar":  # and not with coefficients for all of them, unless the outputs tell them apart
        form = FitForm(1, "scalar", **PLAIN)
        found = fit_in_sequence(denoiser, start(schedule, grid, form), [lesson], form)
        assert float((sample(denoiser, found, other) - ends).abs().max()) > 1e-4


@pytest.mark.parametrize("form", [{"ridge": 0.0, "shrink": 0.0}, {}, {"ridge": 10.0}, {"shrink": 10.0}], ids=str)
@pytest.mark.parametrize("law", ["edm", "flow"])
def test_an_exact_parent_is_given_back(law: str, form: dict) -> None:
    """Of a point mass, whose outputs are all the same, and where the lessons are the parent's own states; with any ridge."""
    schedule = LAWS[law]
    grid, x, other = make_grid("angle", schedule, 4), noise(schedule, 1), noise(schedule, 2)
    for pool, history in product(POOLS, (1, None)):
        one = FitForm(history, pool, **form)
        begun = start(schedule, grid, one)
        for denoiser in (gaussian(schedule, 0.0), gaussian(schedule)):
            lesson = path(denoiser, begun, x) if float(denoiser.stds.max()) else flow(denoiser, grid, x)
            found = fit_in_sequence(denoiser, begun, [lesson], one)
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
        equations.add(features[:, part : part + 10], target[part : part + 10])
    flat = torch.cat([features, torch.ones_like(features[:1])]).flatten(2).reshape(4, 40, groups, -1).permute(2, 1, 3, 0).flatten(1, 2)
    wanted, rows = target.flatten(1).reshape(40, groups, -1).transpose(0, 1).flatten(1), 40 * 18 // groups
    assert int(equations.rows) == rows
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
    free, held = (float((equations.solve(parent, FitForm(None, pool, bias, 0.0, much)) - alike).norm()) for much in (0.0, 9e5))
    assert held < 2e-5 * free if groups > 1 or bias else free < 1e-11
    stiff = equations.solve(parent, FitForm(None, pool, bias, 9e5, 9e5))
    torch.testing.assert_close(stiff, torch.cat([parent, torch.zeros(1)]).expand_as(stiff), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("law", ["edm", "vp", "flow"])
def test_each_row_is_the_optimum(law: str, pool: str) -> None:
    """The distance to the teacher's state has no slope in any coefficient, and grows along every one."""
    (denoiser, grid, lesson), form = taught(LAWS[law]), FitForm(2, pool, **PLAIN)
    found = fit_in_sequence(denoiser, start(LAWS[law], grid, form), [lesson], form)

    def distance(i: int, update: Tensor, bias: Tensor) -> float:
        run = path(denoiser, Tableau(found.nodes, found.record, update, bias, found.noise), lesson.state(0))
        return float((run.state(i + 1) - lesson.state(i + 1)).square().sum())

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
    denoiser, grid, lesson = taught(LAWS[law])
    left, ratios = {}, []
    for history in (1, 2, 3, 4):
        form = FitForm(history, pool, **PLAIN)
        found = fit_in_sequence(denoiser, start(LAWS[law], grid, form, "ddim"), [lesson], form)
        left[history] = (path(denoiser, found, lesson.state(0)).states - lesson.states).flatten(1).norm(dim=1)
    for history in (1, 2, 3):  # the first that reads one output more is step `history`
        short, long = left[history], left[history + 1]
        torch.testing.assert_close(short[: history + 1], long[: history + 1], rtol=0, atol=EXACT)
        ratios.append(float(long[history + 1] / short[history + 1]))
    assert max(ratios) < 1 + ROUNDING, ratios
    assert min(ratios) < 0.99 or (law, pool) == ("flow", "element"), ratios  # the output at alpha = 0 is the same for all: a bias


# -- how it is run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [FitForm(), FitForm(pool="scalar"), FitForm(2, "channel", ridge=0.0, shrink=0.0)], ids=str)
@pytest.mark.parametrize("law", ["edm", "flow"])
def test_batches_do_not_matter(law: str, form: FitForm) -> None:
    denoiser, grid, lesson = taught(LAWS[law])
    begun = start(LAWS[law], grid, form)
    one, many = (fit_in_sequence(denoiser, begun, lesson.split(count), form) for count in (1, 16))
    assert moved(many, one) < BATCHES and moved(one, begun) > 1e-3


def test_rows_that_are_not_asked_for_stay() -> None:
    (denoiser, grid, lesson), form = taught(EDM), FitForm(pool="channel")
    whole = fit_in_sequence(denoiser, start(EDM, grid, form), [lesson], form)
    for begun in (start(EDM, grid, form), whole):
        assert moved(fit_in_sequence(denoiser, begun, [lesson], form, rows=[]), begun) == 0
        for rows in ([3], [1, 2], {0}):
            found = fit_in_sequence(denoiser, begun, [lesson], form, rows=rows)
            for i in range(4):
                same = torch.equal(found.update[i], begun.update[i]) and torch.equal(found.bias[i], begun.bias[i])
                assert same is (i not in rows)
    states = path(denoiser, start(EDM, grid, form), lesson.state(0))  # the last row, from where the parent's lead
    last, wanted = fit_in_sequence(denoiser, start(EDM, grid, form), [lesson], form, rows=[3]), lesson.state(4)
    before, after = states.state(4) - wanted, path(denoiser, last, lesson.state(0)).state(4) - wanted
    assert float(after.norm()) < 0.85 * float(before.norm())


class Elsewhere(MutableMapping[str, Tensor]):
    """Tensors as bytes."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[bytes, torch.Size]] = {}

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.held[name] = (value.numpy().tobytes(), value.shape)

    def __getitem__(self, name: str) -> Tensor:
        data, shape = self.held[name]
        return torch.frombuffer(bytearray(data), dtype=F64).reshape(shape)

    def __delitem__(self, name: str) -> None:
        del self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


@pytest.mark.parametrize("history", [2, None])
def test_the_states_of_the_students_are_kept(history: int | None) -> None:
    (denoiser, grid, lesson), form = taught(EDM), FitForm(history)
    lessons, kept, elsewhere = lesson.split(3), {}, Elsewhere()
    found = fit_in_sequence(denoiser, start(EDM, grid, form), lessons, form, kept=kept)
    assert moved(fit_in_sequence(denoiser, start(EDM, grid, form), lessons, form, kept=elsewhere), found) == 0
    assert set(elsewhere) == set(kept) and all(torch.equal(kept[name], elsewhere[name]) for name in kept)
    assert moved(fit_in_sequence(denoiser, start(EDM, grid, form), lessons, form, kept=elsewhere), found) == 0  # used before
    for k, part in enumerate(lessons):
        outputs = []
        end = sample(denoiser, found, part.state(0), observe=lambda step, outputs=outputs: outputs.append(step.x0))
        torch.testing.assert_close(kept[f"x-{k}"], end, rtol=0, atol=ROUNDING)
        for i, h in enumerate(outputs):
            torch.testing.assert_close(kept[f"h-{i}-{k}"], h, rtol=0, atol=ROUNDING)


def test_the_condition_goes_to_the_denoiser() -> None:
    class Shifted:
        schedule = EDM

        def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            return gaussian(EDM)(x, t) + cond[:, None, None, None]

    grid, form, x, label = make_grid("angle", EDM, 3), FitForm(pool="scalar", **PLAIN), noise(EDM, 1), torch.arange(48, dtype=F64)
    lesson = flow(gaussian(EDM), grid, x)
    lesson.cond, kept = label, {}
    fit_in_sequence(Shifted(), start(EDM, grid, form), [lesson], form, kept=kept)
    torch.testing.assert_close(kept["h-0-0"], gaussian(EDM)(x, grid.t[0]) + label[:, None, None, None], rtol=0, atol=ROUNDING)


# -- parents ---------------------------------------------------------------------------------------------------------

USABLE = {
    "ddim": 1,
    "euler": 1,
    "dpm-solver-pp-2m": 2,
    "dpm-solver-pp-2m:form=taylor": 2,
    "unipc-2:corrector=false": 2,
    "dpm-solver-pp-3m": 3,
    "dpm-solver-pp-3m:third_order=corrected": 3,
    "unipc-3:corrector=false": 3,
}  # with the outputs that they read
SINGLESTEP = ("heun", "dpm-solver-2s", "dpm-solver-3s")
IN_NOISE = ("dpm-solver-2m", "dpm-solver-3m", "sde-dpm-solver-2m", "deis-3", "ipndm")
OTHERS = (*SINGLESTEP, *IN_NOISE, "sde-dpm-solver-pp-2m", "unipc-2", "unipc-3", "ddim:eta=1")
REFUSED = "steps from where it evaluates, by at most {} outputs and without noise"


@pytest.mark.parametrize("law", LAWS)
def test_room_for_coefficients_changes_no_sample(law: str) -> None:
    assert {name.partition(":")[0] for name in (*USABLE, *OTHERS)} == set(SOLVERS) - {"dpm-solver-v3"}
    schedule = LAWS[law]
    denoiser, grid, x = mixture(schedule), make_grid("angle", schedule, 6), noise(schedule, 2)
    for name, needs in USABLE.items():
        parent = solved(schedule, grid, name)
        wanted = sample(denoiser, parent, x)
        for history, pool in [(1, "scalar"), (2, "element"), (3, "channel"), (5, "scalar"), (9, "channel"), (None, "element")]:
            form = FitForm(history, pool)
            if history is None or history >= needs:
                wide = widened(parent, form, SHAPE)
                assert wide.memory == min(history or 6, 6) and wide.update.shape[3:] == wide.bias.shape[2:] == form.shape(SHAPE)
                torch.testing.assert_close(sample(denoiser, wide, x), wanted, rtol=0, atol=ROUNDING)
            elif law != "flow":  # which starts and ends with steps of first order
                with pytest.raises(SolverError, match=REFUSED.format(history)):
                    widened(parent, form, SHAPE)


def test_a_parent_may_step_from_its_anchor_if_that_is_the_state() -> None:
    plain, x = solved(EDM, make_grid("angle", EDM, 4), "dpm-solver-pp-2m"), noise(EDM, 2)
    update = plain.update.clone()
    update[:, :, 0], update[:, :, 1] = 0.3 * plain.update[:, :, 1], 0.7 * plain.update[:, :, 1]
    anchored = Tableau(plain.nodes, plain.record, update, plain.bias, plain.noise)
    for parent in (plain, anchored):
        wide = widened(parent, FitForm(), SHAPE)
        assert not wide.update[:, 1, 0].any()
        torch.testing.assert_close(sample(mixture(EDM), wide, x), sample(mixture(EDM), anchored, x), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", OTHERS)
def test_other_parents_are_refused(name: str) -> None:
    for schedule, history in product((EDM, RectifiedFlow()), (2, None)):
        parent = solved(schedule, make_grid("angle", schedule, 6), name)
        with pytest.raises(SolverError, match=REFUSED.format(history or len(parent.update))):
            widened(parent, FitForm(history), SHAPE)


def test_the_refusal_names_parents_that_are_not_refused() -> None:
    grid = make_grid("angle", EDM, 6)
    with pytest.raises(SolverError) as error:
        widened(solved(EDM, grid, "unipc-2"), FitForm(), SHAPE)
    named = [name for name in (*SOLVERS, *USABLE) if name in str(error.value).replace(",", " ").replace(";", " ").split()]
    assert {"ddim", "dpm-solver-pp-2m"} <= set(named)
    for name in named:
        widened(solved(EDM, grid, name), FitForm(), SHAPE)


def test_a_parent_with_numbers_of_its_own_is_refused() -> None:
    """A bias, or a coefficient for each element: neither has a place in what follows."""
    plain = solved(EDM, make_grid("angle", EDM, 4), "ddim")
    biased = Tableau(plain.nodes, plain.record, plain.update, torch.full_like(plain.bias, 0.1), plain.noise)
    for parent in (biased, widened(plain, FitForm(pool="channel"), SHAPE)):
        with pytest.raises(SolverError, match=REFUSED.format(4)):
            widened(parent, FitForm(pool="scalar"), SHAPE)


# -- sweeps ----------------------------------------------------------------------------------------------------------


def problem(law: NoiseSchedule, form: FitForm, **options: int) -> tuple[Tableau, Ends]:
    denoiser, grid, lesson = taught(law, **options)
    return fit_in_sequence(denoiser, start(law, grid, form), [lesson], form), Ends(denoiser, lesson.state(0), lesson.state(-1))


def split(ends: Ends, windows: int, batches: int = 1) -> list[list[Ends]]:
    """Every window another part of the noises."""
    parts = zip(ends.x.chunk(windows * batches), ends.exact.chunk(windows * batches), strict=True)
    each = [Ends(ends.denoiser, x, exact) for x, exact in parts]
    return [each[k : k + batches] for k in range(0, len(each), batches)]


@pytest.mark.parametrize("pool", ["scalar", "element"])
@pytest.mark.parametrize("law", LAWS)
def test_a_sweep_brings_the_ends_nearer(law: str, pool: str) -> None:
    fitted, ends = problem(LAWS[law], FitForm(None, pool, bias=pool == "element"))
    gains = {}
    for schedule in (None, LAWS[law]):
        told = []
        found = sweep(split(ends, 2), fitted, schedule, iterations=3, observe=lambda i, value, told=told: told.append((i, value)))
        before, after = (sizes(ends.run(tableau)[0]) for tableau in (fitted, found))
        c = before.median()
        first, last = (float((error**2 + c**2).sqrt().mean()) for error in (before, after))
        values = [first, *(value for _, value in told)]
        assert [i for i, _ in told] == [*range(1, len(told) + 1)] and values == sorted(values, reverse=True)
        assert values[-1] == pytest.approx(last, rel=1e-9) and last < 0.99 * first, (first, last)
        t, old = found.nodes.t, fitted.nodes.t
        assert torch.equal(t[[0, -1]], old[[0, -1]]) and torch.equal(found.bias, fitted.bias)
        for ours, theirs in zip(found.nodes, Nodes.at(LAWS[law], t), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(t, old) is (schedule is None) and bool((torch.diff(t) < 0).all())
        if law == "table":
            assert torch.equal(t, t.round())
        moves = found.update - fitted.update  # alike for all elements
        torch.testing.assert_close(moves.reshape(4, 2, 6, -1).std(-1, correction=0), torch.zeros(4, 2, 6, dtype=F64), rtol=0, atol=ROUNDING)
        gains[schedule is None] = last
    assert gains[False] < first


@pytest.mark.parametrize("law", LAWS)
def test_batches_of_a_sweep_do_not_matter(law: str) -> None:
    fitted, ends = problem(LAWS[law], FitForm(2, "scalar"))
    one, many = (sweep(split(ends, 2, batches), fitted, LAWS[law], iterations=2) for batches in (1, 4))
    assert moved(many, one) < BATCHES and moved(one, fitted) > 1e-4
    torch.testing.assert_close(one.nodes.t, many.nodes.t, rtol=0, atol=BATCHES)


@pytest.mark.parametrize("law", LAWS)
def test_a_sweep_of_one_step(law: str) -> None:
    """There is no level to move, whether the ends are finite or not."""
    fitted, ends = problem(LAWS[law], FitForm(pool="scalar"), steps=1)
    begun = widened(solved(LAWS[law], TimeGrid(fitted.nodes.t), "ddim"), FitForm(pool="scalar"), SHAPE)
    error = []
    for schedule in (None, LAWS[law]):
        found = sweep([[ends]], begun, schedule, iterations=2)
        assert torch.equal(found.nodes.t, begun.nodes.t)
        error.append(float(ends.run(found)[0].norm()))
    assert error[0] == error[1] < 0.99 * float(ends.run(begun)[0].norm())


@pytest.mark.parametrize("law", LAWS)
def test_what_has_no_error_is_given_back(law: str) -> None:
    denoiser, grid, x = mixture(LAWS[law]), make_grid("angle", LAWS[law], 3), noise(LAWS[law], 1)
    begun = start(LAWS[law], grid, FitForm(pool="scalar"))
    for schedule in (None, LAWS[law]):
        found = sweep([[Ends(denoiser, x, sample(denoiser, begun, x))]], begun, schedule, iterations=3)
        assert moved(found, begun) == 0 and torch.equal(found.nodes.t, begun.nodes.t)
    assert sweep([[Ends(denoiser, x, x)]], begun, None, iterations=0) is begun


# -- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_the_result_runs_without_a_solver(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, ends = problem(EDM, FitForm(3, pool))
    swept, card = sweep([[ends]], fitted, EDM, iterations=1), {"of": "a mixture"}
    Sampler(swept, TimeGrid(swept.nodes.t), EDM, "fitted", {"pool": pool}, card).save(tmp_path)
    wanted = sample(ends.denoiser, swept, ends.x)
    monkeypatch.setattr("fewstep.solvers.SOLVERS", {})
    for module in (tableau_module, sampler_module):
        monkeypatch.setattr(module, "tabulate", lambda *_: pytest.fail("nothing is built from formulas"))
    loaded = Sampler.load(tmp_path)
    assert torch.equal(sample(ends.denoiser, loaded, ends.x), wanted) and loaded.nfe == 4
    assert loaded.tableau.update.shape == (4, 2, 5, *{"scalar": (), "channel": (2, 1, 1), "element": SHAPE}[pool])
    differ = loaded.tableau.update[:, 1, 1:3].reshape(8, -1).std(1, correction=0)
    assert bool((differ > 1e-6).all()) is (pool != "scalar")
    assert torch.equal(loaded.tableau.update[:, 0], torch.zeros_like(loaded.tableau.update[:, 0]))
    near = sample(ends.denoiser, loaded, ends.x.float())
    assert near.dtype is torch.float32 and float((near - wanted).abs().median()) < 1e-5  # a few lie between two means


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"pool": "pixel"}, "coefficients are pooled by element, channel or scalar, got 'pixel'"),
        ({"history": 0}, r"a history of at least 1 and .*history=0"),
        ({"ridge": -1e-9}, "ridge and shrink .*ridge=-1e-09"),
        ({"shrink": -1.0}, "ridge and shrink .*shrink=-1.0"),
        ({"ridge": float("nan")}, "ridge and shrink .*ridge=nan"),
        ({"shrink": float("inf")}, "ridge and shrink from 0 to less than 1e6, got .*shrink=inf"),
    ],
)
def test_forms_that_cannot_be_are_named(options: dict, said: str) -> None:
    with pytest.raises(FewstepError, match=said):
        FitForm(**options)


def test_forms_know_their_size() -> None:
    assert [FitForm(history).memory(5) for history in (None, 1, 5, 9)] == [5, 1, 5, 5]
    assert [FitForm(pool=pool).shape((3, 8, 8)) for pool in POOLS] == [(), (3, 1, 1), (3, 8, 8)]
    assert [FitForm(pool=pool).shape((7,)) for pool in POOLS] == [(), (7,), (7,)]


@pytest.mark.parametrize("pool, bias", [*product(POOLS, (True, False))])
def test_what_is_not_finite_is_named(pool: str, bias: bool) -> None:
    (denoiser, grid, lesson), form = taught(EDM), FitForm(None, pool, bias)
    begun = start(EDM, grid, form)
    with pytest.raises(FewstepError, match="a fit needs at least one lesson"):
        fit_in_sequence(denoiser, begun, [], form)
    said = "the states for evaluation {} of a fit are not finite: check the network and the trajectories"
    for bad, k in ((torch.nan, 2), (torch.inf, 0)):
        states = lesson.states.clone()
        states[k + 1, 3, 0, 1, 1] = bad
        with pytest.raises(FewstepError, match=said.format(k)):
            fit_in_sequence(denoiser, begun, [Given(states)], form)

        class Bad:
            schedule = EDM

            def __call__(self, x: Tensor, t: Tensor, cond: None = None, bad: float = bad, k: int = k) -> Tensor:
                return torch.where(t <= grid.t[k], bad, denoiser(x, t))

        with pytest.raises(FewstepError, match=said.format(k)):
            fit_in_sequence(Bad(), begun, [lesson], form)
        with pytest.raises(ModelError, match="are not finite: check the network"):
            sweep([[Ends(Bad(), lesson.state(0), lesson.state(-1))]], begun, None, iterations=1)


# -- processes -------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
from fewstep import FitForm, fit_in_sequence
from fewstep.core.process import process
from fewstep.learn.ends import Ends
from fewstep.learn.fit_solver import sweep
from tests.learn.test_fit_solver import EDM, start, taught

rank, world = process()
denoiser, grid, lesson = taught(EDM)
form = FitForm(pool="channel")
found = fit_in_sequence(denoiser, start(EDM, grid, form), lesson.split(4)[rank::world], form)
parts = list(zip(lesson.state(0).chunk(4), lesson.state(-1).chunk(4)))
windows = [[Ends(denoiser, *parts[k])] * (3 - world) for k in (0, 1)]  # the same in both: so have all errors one median
swept = sweep(windows, found, EDM, iterations=2)
other = sweep([[Ends(denoiser, *parts[k + rank])] for k in (0, 2)], found, EDM, iterations=2)
torch.save([found.update, found.bias, swept.update, swept.nodes.t, other.update, other.nodes.t], f"{sys.argv[1]}-{world}-{rank}")
"""


@pytest.mark.slow
def test_two_processes_fit_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    root = Path(__file__).parents[2]
    for count in ("1", "2"):
        command = [*torchrun, count, str(tmp_path / "script.py"), str(tmp_path / "made")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (torch.load(tmp_path / f"made-{name}") for name in ("1-0", "2-0", "2-1"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))
    for one, ours in zip(alone[:4], first[:4], strict=True):
        torch.testing.assert_close(ours, one, rtol=0, atol=BATCHES)
    assert not torch.equal(alone[4], first[4])  # of half of the noises
