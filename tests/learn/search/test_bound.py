"""Phase 1 on statistics: the identity, the bound (never below the error), its global minimum by exhaustion, and the Monte-Carlo way."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep import (
    DatasetDenoiser,
    Denoiser,
    FewstepError,
    GaussianDenoiser,
    GridError,
    MixtureDenoiser,
    Nodes,
    Sampler,
    TimeGrid,
    VarianceExploding,
    VPLinear,
    make_grid,
    make_solver,
    sample,
)
from fewstep.core.schedule import NoiseSchedule
from fewstep.learn.search.bound import AMPLIFICATIONS, Bound, convex_weights, descend_bound, monte_carlo_bound
from fewstep.learn.teacher.gram import Gram

F64 = torch.float64
ROUNDING = 1e-12  # of a state's size: some tens of float64 operations
SLACK = 1e-6  # relative, of a bound: a local error is the root of a difference of moments, which round at 1e-16 of the data's variance
TINY = 1e-7  # the same for local errors that are themselves no larger than that root
LAW = VarianceExploding(0.02, 20.0)
FORMS = list(product(AMPLIFICATIONS, ("sum", "squares"), ("exact", "jensen")))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first_order(denoiser: Denoiser, t: Tensor, x: Tensor, outputs: list[Tensor] | None = None) -> Tensor:
    """The library's DDIM."""
    sampler = Sampler.build(make_solver("ddim"), TimeGrid(t), denoiser.schedule)
    return sample(denoiser, sampler, x, observe=lambda step: outputs is None or outputs.append(step.x0))


def subsets(cells: int, count: int, most: int, seed: int) -> Iterator[list[int]]:
    """Random schedules on ``cells + 1`` levels, of 1 to ``most`` steps."""
    generator = seeded(seed)
    for _ in range(count):
        steps = int(torch.randint(1, most + 1, (), generator=generator))
        inner = 1 + torch.randperm(cells - 1, generator=generator)[: steps - 1]
        yield [0, *sorted(inner.tolist()), cells]


# -- the identity ----------------------------------------------------------------------------------------------------


class Arbitrary:
    """A nonlinear function of state and level that denoises nothing."""

    def __init__(self, seed: int) -> None:
        self.schedule = VarianceExploding()
        self.inner, self.outer = torch.randn(2, 3, 3, generator=seeded(seed), dtype=F64)

    def __call__(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return torch.sin(x @ self.inner / (1 + t) + torch.log(t)) @ self.outer


@given(st.lists(st.floats(0.01, 2.0), min_size=1, max_size=9), st.floats(0.01, 80.0), st.integers(0, 2**31))
def test_a_first_order_sample_is_a_convex_combination(gaps: list[float], highest: float, seed: int) -> None:
    """Equation (3), for the step written out and for the library's DDIM: they are the same step."""
    level = highest * torch.exp(-torch.tensor([0.0, *gaps], dtype=F64).cumsum(0))
    denoiser, start = Arbitrary(seed), highest * torch.randn(4, 3, generator=seeded(seed + 1), dtype=F64)
    z, outputs, theirs = start, [], []
    for s, end in zip(level[:-1], level[1:], strict=True):
        outputs.append(denoiser(z, s))
        z = end / s * z + (1 - end / s) * outputs[-1]
    share, weights = convex_weights(level)
    assert bool((weights >= 0).all()) and float(share) > 0 and abs(float(share + weights.sum()) - 1) < ROUNDING
    size = float(torch.stack([start, *outputs]).abs().max())
    end = first_order(denoiser, level, start, theirs)
    for made, answers in ((z, outputs), (end, theirs)):
        combined = share * start + torch.einsum("n,nbd->bd", weights, torch.stack(answers))
        torch.testing.assert_close(made, combined, rtol=0, atol=ROUNDING * size)
    torch.testing.assert_close(end, z, rtol=0, atol=1e-8 * size)  # rounding, multiplied by 1 + (1 - r) |dD/dz| a step


# -- the bound is one ------------------------------------------------------------------------------------------------


def gram_of(denoiser: Denoiser, t: Tensor, x: Tensor, slopes: Tensor | None = None) -> Gram:
    outputs = torch.stack([denoiser(state, time) for state, time in zip(x, t, strict=True)])
    return Gram.of(Nodes.at(denoiser.schedule, t), x, outputs, slopes)


@pytest.mark.parametrize("schedule", [LAW, VPLinear()], ids=["edm", "vp"])
@pytest.mark.every(2)
def test_a_contraction_obeys_the_plain_bound(schedule: NoiseSchedule) -> None:
    """A Gaussian's denoiser is linear with slopes below 1, and its exact trajectory is closed."""
    std = torch.tensor([0.05, 0.2, 0.5, 1.0, 2.0, 0.01], dtype=F64)
    denoiser, t = GaussianDenoiser(schedule, torch.linspace(-1, 1, 6, dtype=F64), std), make_grid("logsnr", schedule, 128).t
    start = schedule.sigma(t[0]) * torch.randn(256, 6, generator=seeded(0), dtype=F64)
    x = torch.stack([denoiser.flow(start, t[0], time) for time in t])
    gram = gram_of(denoiser, t, x)
    exact, jensen, tightest = Bound(gram), Bound(gram, local="jensen"), torch.inf
    for indices in subsets(128, 60, 10, seed=1):
        error = float((first_order(denoiser, t[indices], start) - x[-1]).square().mean().sqrt() / schedule.alpha(t[-1]))
        bound = exact(indices)
        assert error <= bound * (1 + SLACK) + TINY, indices
        assert bool((exact.steps(indices) <= jensen.steps(indices) * (1 + SLACK) + TINY).all()) and jensen(indices) > bound
        if len(indices) == 2:
            assert error == pytest.approx(bound, rel=SLACK)  # one step has its own error and nothing else
        tightest = min(tightest, bound / error)
    assert tightest < 1.2  # and it says something


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1.0, 0.05], ids=["noise", "near-the-ridge"])
def test_an_expansion_obeys_the_bound_with_its_own_slopes(spread: float) -> None:
    """Two narrow components: the denoiser is steep between them, and from starts that lie there the plain bound is none."""
    denoiser = MixtureDenoiser(LAW, torch.tensor([[-1.0], [1.0]], dtype=F64), torch.tensor([0.1, 0.1], dtype=F64))
    fine = make_grid("logsnr", LAW, 256).t
    t, x = fine[::2], solved(denoiser, fine, spread * LAW.t_max * torch.randn(512, 1, generator=seeded(0), dtype=F64))[::2]
    line = torch.linspace(-5, 5, 1001, dtype=F64).repeat(len(t))[:, None].requires_grad_()  # with 0, the steepest place by symmetry
    (slopes,) = torch.autograd.grad(denoiser(line, t.repeat_interleave(1001)).sum(), line)
    slope = slopes.reshape(len(t), 1001).amax(1)
    assert float(slope.max()) > 20
    gram = gram_of(denoiser, t, x, torch.stack([slope, slope**2], 1))
    bound, plain, violations = Bound(gram, "trace"), Bound(gram), 0
    for indices in subsets(128, 60, 8, seed=2):
        error = float((first_order(denoiser, t[indices], x[0]) - x[-1]).square().mean().sqrt())
        assert error <= bound(indices) * (1 + SLACK) + TINY, indices
        violations += error > 1.01 * plain(indices)
    assert (violations > 0) == (spread < 1)


def solved(denoiser: Denoiser, t: Tensor, start: Tensor) -> Tensor:
    """States by Runge-Kutta's method in ``log t`` (alpha is 1). The bound holds for any states: its accuracy needs no allowance."""
    x = [start]

    def slope(z: Tensor, time: Tensor) -> Tensor:
        return z - denoiser(z, time)

    for s, end in zip(t[:-1], t[1:], strict=True):
        h, middle = torch.log(end / s), torch.sqrt(s * end)
        one = slope(x[-1], s)
        two = slope(x[-1] + h / 2 * one, middle)
        three = slope(x[-1] + h / 2 * two, middle)
        x.append(x[-1] + h / 6 * (one + 2 * two + 2 * three + slope(x[-1] + h * three, end)))
    return torch.stack(x)


# -- its least value -------------------------------------------------------------------------------------------------


def random_gram(cells: int, seed: int) -> Gram:
    """Of no model: any positive semidefinite matrix."""
    generator = seeded(seed)
    level = 20 * torch.exp(-2 * torch.rand(cells + 1, generator=generator, dtype=F64).cumsum(0))
    root = torch.randn(2 * cells + 1, 3 * cells, generator=generator, dtype=F64)
    trace = torch.rand(cells + 1, generator=generator, dtype=F64) * 1.5
    square = trace**2 + torch.rand(cells + 1, generator=generator, dtype=F64)
    return Gram(level, root @ root.T / root.shape[1], torch.stack([trace, square], 1), 1)


def mixture_gram(cells: int) -> Gram:
    means = torch.randn(4, 3, generator=seeded(0), dtype=F64)
    denoiser, t = MixtureDenoiser(LAW, means, torch.full((4,), 0.2, dtype=F64)), make_grid("logsnr", LAW, cells * 16).t
    x = solved(denoiser, t, LAW.t_max * torch.randn(64, 3, generator=seeded(1), dtype=F64))
    slopes = torch.stack([torch.linspace(0, 1.2, cells + 1, dtype=F64), torch.linspace(0, 2, cells + 1, dtype=F64)], 1)
    return gram_of(denoiser, t[::16], x[::16], slopes)


GRAMS = {"mixture": lambda: mixture_gram(8), "random-7": lambda: random_gram(7, 0), "random-9": lambda: random_gram(9, 1)}


def by_hand(bound: Bound, path: Sequence[int], pairs: bool = False, last_first_order: bool = True) -> float:
    """The recursion of the bound, with the gains from their definitions."""
    gram, error = bound.gram, 0.0
    for n in range(1, len(path)):
        j, k = path[n - 1], path[n]
        r, (trace, square) = float(gram.level[k] / gram.level[j]), gram.slopes[j].tolist()
        gain = {"plain": 1.0, "trace": r + (1 - r) * trace, "norm": (r * r + 2 * r * (1 - r) * trace + (1 - r) ** 2 * square) ** 0.5}
        second = pairs and n > 1 and not (last_first_order and n == len(path) - 1)
        local = bound.second_order[path[n - 2], j, k] if second else bound.first_order[j, k]
        carried, local = gain[bound.amplification] * error, float(local)
        error = carried + local if bound.total == "sum" else (carried**2 + local**2) ** 0.5
    return error


def least(bound: Bound, steps: int, pairs: bool = False, last_first_order: bool = True) -> float:
    """By exhaustion."""
    cells = bound.gram.cells
    return min(by_hand(bound, [0, *inner, cells], pairs, last_first_order) for inner in combinations(range(1, cells), steps - 1))


@pytest.mark.parametrize("name", GRAMS)
@pytest.mark.every(3)
def test_the_first_order_program_finds_the_least_of_all_schedules(name: str) -> None:
    gram = GRAMS[name]()
    for form in FORMS:
        bound, cells = Bound(gram, *form), gram.cells
        best = bound.best(cells)
        assert list(best) == list(range(1, cells + 1)) and best[1] == [0, cells] and best[cells] == list(range(cells + 1))
        for steps, found in best.items():
            assert len(found) == steps + 1 and bound(found) == pytest.approx(by_hand(bound, found), rel=ROUNDING)
            assert bound(found) == pytest.approx(least(bound, steps), rel=ROUNDING), (form, steps)
            assert bound.best(steps) == {n: best[n] for n in range(1, steps + 1)}  # asking for more changes nothing


@pytest.mark.parametrize("last_first_order", [True, False])
@pytest.mark.parametrize("name", GRAMS)
@pytest.mark.every(3)
def test_the_pair_program_finds_the_least_of_all_schedules(name: str, last_first_order: bool) -> None:
    gram = GRAMS[name]()
    for amplification, total in product(AMPLIFICATIONS, ("sum", "squares")):
        bound = Bound(gram, amplification, total)
        for steps, found in bound.best_pairs(gram.cells, last_first_order=last_first_order).items():
            value = by_hand(bound, found, True, last_first_order)
            assert len(found) == steps + 1 and value == pytest.approx(least(bound, steps, True, last_first_order), rel=ROUNDING)


def test_mistakes_are_named() -> None:
    gram = random_gram(7, 0)
    for bad in ([0, 3], [1, 7], [0, 3, 3, 7], [0, 5, 3, 7]):
        with pytest.raises(GridError, match="runs from 0 up to 7 with no level twice"):
            Bound(gram)(bad)
    for program in (Bound(gram).best, Bound(gram).best_pairs):
        for most in (0, 8):
            with pytest.raises(GridError, match=f"a schedule of {most} steps .*there are 7: use more levels, or fewer"):
                program(most)
    with pytest.raises(FewstepError, match="unknown form of the amplification 'plane': did you mean plain"):
        Bound(gram, "plane")
    with pytest.raises(FewstepError, match="total sum or squares and local exact or jensen, got 'mean' and 'exact'"):
        Bound(gram, total="mean")
    bare = Gram(gram.level, gram.matrix, torch.full_like(gram.slopes, torch.nan), 1)
    with pytest.raises(FewstepError, match="'trace' needs a Gram matrix made with jacobian=True"):
        Bound(bare, "trace")
    assert Bound(bare)([0, 7]) == Bound(gram)([0, 7])


# -- the paper's own way ---------------------------------------------------------------------------------------------

FEW = replace(LAW, t_min=0.05)
LEVEL = torch.tensor([20.0, 4.0, 0.9, 0.2, 0.05], dtype=F64)
POINTS = DatasetDenoiser(FEW, torch.randn(5, 2, generator=seeded(3), dtype=F64), 0.1)


def pool(count: int) -> tuple[Tensor, Tensor]:
    generator = seeded(4)
    which = torch.randint(5, (count,), generator=generator)
    x0 = POINTS.means[which] + 0.1 * torch.randn(count, 2, generator=generator, dtype=F64)
    return x0, torch.randn(count, 2, generator=generator, dtype=F64)


def test_the_monte_carlo_bound_estimates_that_of_jensen() -> None:
    """Against the integral over the level, by the trapezoid rule."""
    (x0, noise), draws, exact = pool(24), 400, 0.0
    for s, end in zip(LEVEL[:-1].tolist(), LEVEL[1:].tolist(), strict=True):
        inside = torch.logspace(*torch.tensor([s, end], dtype=F64).log10().tolist(), 801, dtype=F64)
        start = POINTS(x0 + s * noise, torch.tensor(s, dtype=F64))
        at = inside.repeat_interleave(24)
        answers = POINTS(x0.repeat(801, 1) + at[:, None] * noise.repeat(801, 1), at)
        gap = (answers - start.repeat(801, 1)).square().reshape(801, -1).mean(1)
        exact += ((1 - end / s) * end * torch.trapezoid((gap / inside**2).flip(0), inside.flip(0))) ** 0.5
    tiled, noises = x0.repeat(draws, 1), noise.repeat(draws, 1)
    spread = ((torch.arange(draws, dtype=F64) + 0.5) / draws).repeat_interleave(24).expand(4, -1)
    even = float(monte_carlo_bound(POINTS, LEVEL, tiled, noises, None, spread))
    assert even == pytest.approx(float(exact), rel=1e-4)  # both quadratures err by h^2
    u = torch.rand(4, 24 * draws, generator=seeded(5), dtype=F64)
    assert float(monte_carlo_bound(POINTS, LEVEL, tiled, noises, None, u)) == pytest.approx(float(exact), rel=0.03)  # 3 standard errors


def test_its_gradient_is_a_difference_of_it() -> None:
    level, u, h = LEVEL.clone().requires_grad_(), torch.rand(4, 32, generator=seeded(5), dtype=F64), 1e-6
    (gradient,) = torch.autograd.grad(monte_carlo_bound(POINTS, level, *pool(32), None, u), level)
    for k in range(1, 4):
        there, back = (LEVEL * (1 + way * h * torch.eye(5, dtype=F64)[k]) for way in (1, -1))
        rise = float(monte_carlo_bound(POINTS, there, *pool(32), None, u) - monte_carlo_bound(POINTS, back, *pool(32), None, u))
        assert float(gradient[k]) == pytest.approx(rise / (2 * h * float(LEVEL[k])), rel=1e-6)  # h^2, and rounding over h


@pytest.mark.slow
@pytest.mark.parametrize(
    "spacing, steps, before, after",
    [("quadratic", 5, 1.3, 1), ("uniform", 3, 1.1, 1.187)],
)
def test_descent_reaches_a_minimum(spacing: str, steps: int, before: float, after: float) -> None:
    """That of the program, which is global, on moments of the same diffused states; with all levels close to the noise another."""
    (x0, noise), t, start = pool(64), make_grid("logsnr", FEW, 128).t, make_grid(spacing, FEW, steps)
    best = Bound(gram_of(POINTS, t, x0 + t[:, None, None] * noise), local="jensen").best(steps)[steps]
    seen: list[int] = []
    found = descend_bound(POINTS, start, lambda step: (x0, noise, None), iterations=120, observe=lambda step, bound: seen.append(step))
    assert seen == list(range(1, 121))
    assert torch.equal(found.t[[0, -1]], start.t[[0, -1]])
    u = torch.rand(steps, 64 * 128, generator=seeded(6), dtype=F64)
    values = [
        float(monte_carlo_bound(POINTS, level, x0.repeat(128, 1), noise.repeat(128, 1), None, u)) for level in (start.t, found.t, t[best])
    ]
    assert values[0] > before * values[2]
    assert values[1] == pytest.approx(after * values[2], rel=0.01)  # half of it scatter; the levels are not the program's


def test_descent_refuses_infinite_levels() -> None:
    with pytest.raises(GridError, match="0 < sigma/alpha < infinity at all times: set t_max and t_min"):
        descend_bound(POINTS, make_grid("karras", FEW, 4).to_clean(FEW), lambda step: pytest.fail("drawn before it was checked"))
