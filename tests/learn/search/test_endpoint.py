"""Descent on where samples end: its runs are shared to the bit and counted, its sums are those of the objective, and it only descends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from fewstep import (
    DiscreteVP,
    MixtureDenoiser,
    ModelError,
    Nodes,
    NoiseSchedule,
    RectifiedFlow,
    Tableau,
    TimeGrid,
    VarianceExploding,
    make_grid,
    make_solver,
    sample,
    tabulate,
)
from fewstep.learn.search import endpoint as module
from fewstep.learn.search.endpoint import (
    CachedRun,
    EndpointError,
    Parameters,
    Perturbation,
    TableauPoint,
    levenberg_marquardt,
    mean_over_processes,
    per_sample_rmse,
    rms,
)

F64 = torch.float64
EDM, FLOW, TABLE = VarianceExploding(0.02, 20.0), RectifiedFlow(), DiscreteVP.linear(200)
ROUNDING = 1e-12
STEPS = 4


class Counted:
    """A denoiser that counts the samples it evaluates, and may fail at some calls."""

    def __init__(self, law: NoiseSchedule, bad: Sequence[int] = ()) -> None:
        means = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
        self.denoiser, self.schedule = MixtureDenoiser(law, means, torch.full((4,), 0.3, dtype=F64)), law
        self.bad, self.calls, self.samples = bad, 0, 0

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls, self.samples = self.calls + 1, self.samples + len(x)
        answer = self.denoiser(x, t) * (torch.nan if self.calls in self.bad else 1)
        return answer if cond is None else answer + cond[:, None]


def solved(name: str = "dpm-solver-pp-2m", law: NoiseSchedule = EDM, steps: int = STEPS) -> Tableau:
    solver = make_solver(name)
    return tabulate(solver, solver.nodes(make_grid("angle", law, steps), law))


@cache
def trajectories(law: NoiseSchedule = EDM) -> tuple[Tensor, Tensor]:
    sigma = law.sigma(torch.tensor(law.t_max, dtype=F64))
    x = sigma * torch.randn(24, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    return x, sample(Counted(law), solved("unipc-3", law, 60), x)


def problem(law: NoiseSchedule = EDM, **options: object) -> EndpointError:
    return EndpointError(Counted(law, **options), *trajectories(law))


def changed(tableau: Tableau, name: str, i: int) -> Tableau:
    """One row another, with what is zero left zero."""
    table = getattr(tableau, name).clone()
    table[i] = 0.01 if name == "bias" else 1.01 * table[i]
    return replace(tableau, **{name: table})


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "law, name",
    [
        (law, name)
        for law, names in {EDM: ("ddim", "unipc-2"), FLOW: ("dpm-solver-pp-2m", "unipc-2"), TABLE: ("deis-3", "dpm-solver-pp-2m")}.items()
        for name in names
    ],
)
@pytest.mark.every(4)
def test_a_run_begins_like_another(law: NoiseSchedule, name: str) -> None:
    """As far as it can, to the bit, and the other stays as it was."""
    error, tableau = problem(law), solved(name, law)
    base, run = error.run(tableau)
    assert torch.equal(base, sample(error.denoiser, tableau, error.x) - error.exact) and error.evaluations == 24 * STEPS
    copies = [state.x.clone() for state in run.states], [output.clone() for output in run.outputs]
    others = {(table, i): changed(tableau, table, i) for table in ("record", "update", "bias") for i in range(STEPS)}
    for i in range(STEPS):
        t = tableau.nodes.t.clone()
        t[i] -= 1 if law is TABLE else 0.01 * (t[i] - t[i + 1])
        others["level", i] = replace(tableau, nodes=Nodes.at(law, t))
    for (what, i), other in others.items():
        same = i + (what != "level")  # evaluations at the same states: that of the row that changed too
        assert run.shared(other) == same, (what, i)
        before, counted = error.evaluations, error.denoiser.samples
        residual, made = error.run(other, run)
        assert error.evaluations - before == error.denoiser.samples - counted == 24 * (STEPS - same)
        assert torch.equal(residual, error.run(other)[0]), (what, i)
        assert made.tableau is other and len(made.states) == STEPS + 1 and len(made.outputs) == STEPS
        assert torch.equal(error.run(tableau, made)[0], base)
    assert all(torch.equal(a.x, b) for a, b in zip(run.states, copies[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run.outputs, copies[1], strict=True))
    before = error.evaluations
    assert run.shared(tableau) == STEPS and torch.equal(error.run(tableau, run)[0], base) and error.evaluations == before


def test_a_run_of_another_kind_is_begun_anew() -> None:
    """Its states lack what the other steps from, or hold another number of outputs."""
    error, tableau = problem(), solved("dpm-solver-pp-2m")
    _, run = error.run(tableau)
    update = tableau.update.clone()
    update[-1, 1, 0] = 0.1
    for other in (replace(tableau, update=update), solved("ddim"), solved("dpm-solver-pp-3m"), solved("unipc-2")):
        residual, made = error.run(other, run)
        assert torch.equal(residual, error.run(other)[0])
        assert torch.equal(error.run(tableau, made)[0], error.run(tableau)[0])


def test_conditions_reach_the_network() -> None:
    error, tableau = problem(), solved()
    plain, _ = error.run(tableau)
    error.cond = torch.arange(24, dtype=F64)
    moved = (error.run(tableau)[0] - plain).abs().amin(1)
    assert float(moved[0]) == 0 and bool((moved[1:] > 0).all()) and float(moved[20]) > 5


def test_errors_are_measured_by_sample() -> None:
    residual = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[1.0, -1.0]]])
    torch.testing.assert_close(per_sample_rmse(residual), torch.tensor([12.5**0.5, 0.0, 1.0], dtype=F64), rtol=0, atol=ROUNDING)
    assert rms(residual) == pytest.approx((13.5 / 3) ** 0.5, rel=ROUNDING)


def test_a_network_that_is_not_finite_is_named() -> None:
    for call in range(1, STEPS + 1):
        with pytest.raises(
            ModelError, match=rf"the network's output is not finite .* at evaluation {call} of 4, t = .*: check its weights"
        ):
            problem(bad=[call]).run(solved())
    update = solved().update.clone()
    update[-1, 1, 1:3] = 1e308
    with pytest.raises(ModelError, match=r"the samples on the grid \[20.0, .*, 0.02\] are not finite, though the network's outputs are"):
        problem().run(replace(solved(), update=update))


# -- objective -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.0, 0.3, 10.0])
def test_the_weights_are_those_of_the_objective(c: float) -> None:
    """``W R`` is its gradient, but for the number of residuals."""
    objective, residual = module._Objective(c), torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    slopes = torch.zeros_like(residual).flatten()
    for k in range(30):
        far = torch.zeros(30, dtype=F64)
        far[k] = 1e-5
        up, down = (objective(per_sample_rmse(residual + way * far.reshape(5, 2, 3))) for way in (1, -1))
        slopes[k] = (up - down) / 2e-5
    weighted = objective.weights(per_sample_rmse(residual))[:, None, None] * residual
    torch.testing.assert_close(weighted.flatten() / 30, slopes, rtol=0, atol=1e-9)  # of differences


def test_a_mean_is_over_the_numbers_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.tensor([1.0, 2.0, 6.0])
    assert mean_over_processes(numbers) == 3.0
    monkeypatch.setattr(module, "sum_over_processes", lambda value: value + torch.tensor([7.0, 1.0]))  # another, with a 7
    assert mean_over_processes(numbers) == 4.0
    assert module._Objective(0.0)(numbers) == 4.0


# -- descent ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scaled:
    """A tableau with free multiples of some of its weights: of the state's and the newest output's in each row."""

    tableau: Tableau
    free: Sequence[tuple[int, int]] = tuple((i, column) for i in range(STEPS) for column in (1, 2))
    stuck: Sequence[int] = ()
    refuse: Callable[[Tensor], bool] = lambda far: False
    seen: list[int] | None = None

    def parameters(self, runs: Sequence[CachedRun], size: float) -> Parameters:
        if self.seen is not None:
            self.seen.append(sum(len(run.states[0].x) for run in runs))

        def one(k: int) -> Perturbation:
            far = torch.zeros(len(self.free), dtype=F64)
            far[k] = 1e-4
            return lambda: None if k in self.stuck else (self.moved(far).tableau, 1e-4)

        return Parameters([one(k) for k in range(len(self.free))], lambda far: None if self.refuse(far) else self.moved(far))

    def moved(self, far: Tensor) -> "Scaled":
        update = self.tableau.update.clone()
        for (i, column), amount in zip(self.free, far, strict=True):
            update[i, 1, column] += amount
        return replace(self, tableau=replace(self.tableau, update=update))


def batches(count: int = 1, law: NoiseSchedule = EDM) -> list[EndpointError]:
    x, exact = trajectories(law)
    parts = zip(x.chunk(count), exact.chunk(count), strict=True)
    return [EndpointError(Counted(law), *part) for part in parts]


def descended(parts: Sequence[EndpointError], start: Scaled, **options: object) -> Scaled:
    return levenberg_marquardt(TableauPoint.at(parts, start), **options).here


def value(tableau: Tableau, before: Tableau) -> float:
    error = problem()
    c = per_sample_rmse(error.run(before)[0]).median()
    return float((per_sample_rmse(error.run(tableau)[0]) ** 2 + c**2).sqrt().mean())


@pytest.mark.parametrize("count, steps", [(1, 1), (1, 4), (3, 1), (3, 4)])
def test_descent_only_descends(count: int, steps: int) -> None:
    shown, seen = [], []
    begun = replace(Scaled(solved("ddim")), seen=seen)
    found = descended(batches(count), begun, iterations=6, steps_each=steps, observe=lambda i, best: shown.append((i, best)))
    values = [value(begun.tableau, begun.tableau), *(best for _, best in shown)]
    assert [i for i, _ in shown] == [*range(1, len(shown) + 1)] and 1 < len(shown) <= 6
    assert values == sorted(values, reverse=True) and values[-1] < 0.7 * values[0]
    assert values[-1] == pytest.approx(value(found.tableau, begun.tableau), rel=1e-9)
    assert seen[: len(shown)] == [24] * len(shown)  # one Jacobian an iteration


def test_more_steps_with_one_jacobian_go_further() -> None:
    best = []
    for steps in (1, 2, 3, 6):
        (part,) = batches()
        descended([part], Scaled(solved("ddim")), iterations=1, steps_each=steps, observe=lambda i, value: best.append(value))
        assert part.evaluations <= 24 * (STEPS + 2 * (3 + 2 + 1) + (STEPS - 1) * steps)
    assert best[3] <= best[2] <= best[1] < best[0] and best[3] < best[1]


def test_the_free_numbers_may_be_others_after_a_step() -> None:
    """As many as there are then, where the features of a row have become independent; or none."""

    @dataclass(frozen=True, eq=False)
    class Fewer(Scaled):
        def moved(self, far: Tensor) -> "Fewer":
            return replace(super().moved(far), free=self.free[1:])

    shown, begun = [], Fewer(solved("ddim"))
    found = descended(batches(), begun, iterations=20, steps_each=2, observe=lambda i, best: shown.append(best))
    assert len(shown) > 2 and len(found.free) < len(begun.free) - 1 and shown == sorted(shown, reverse=True)


def test_a_step_corrects_the_jacobian() -> None:
    """Along itself it is right then; the rest stays, and so do the residuals unless they are to be gone on from."""
    point = TableauPoint.at(batches(2), Scaled(solved("ddim")))
    jacobian, before = module._Jacobian(point), module._Jacobian(point)
    step = torch.linspace(-0.02, 0.03, point.size, dtype=F64)
    trial, metric = point.moved(step), torch.linspace(1, 2, point.size, dtype=F64) * step
    jacobian.correct(trial, step, metric, keep=False)
    change = torch.cat(list(trial.residuals)) - before.residual
    torch.testing.assert_close(jacobian.matrix @ step, change, rtol=0, atol=ROUNDING)
    assert float((before.matrix @ step - change).abs().max()) > 1e-4 and torch.equal(jacobian.residual, before.residual)
    across = torch.ones(point.size, dtype=F64)
    across -= metric * (metric @ across) / (metric @ metric)
    torch.testing.assert_close(jacobian.matrix @ across, before.matrix @ across, rtol=0, atol=ROUNDING)
    jacobian.correct(trial, step, metric, keep=True)
    assert torch.equal(jacobian.residual, torch.cat(list(trial.residuals)))


def test_the_equations_are_those_of_the_objective() -> None:
    """Their right side is its gradient, found by differences of the objective itself."""
    begun, parts = Scaled(solved("ddim")), batches(3)
    objective, point = module._Objective(0.5), TableauPoint.at(parts, begun)
    jacobian, errors = module._Jacobian(point), module._errors(point)

    def at(far: Tensor) -> float:
        return objective(torch.cat([per_sample_rmse(batch.run(begun.moved(far).tableau)[0]) for batch in parts]))

    unit = torch.eye(point.size, dtype=F64)
    gradient = torch.tensor([(at(1e-6 * far) - at(-1e-6 * far)) / 2e-6 for far in unit], dtype=F64)
    step, _ = jacobian.step(objective, errors, 0.0)
    weighted = objective.weights(errors)[:, None, None] * jacobian.matrix
    normal, slope = torch.einsum("nmp,nmq->pq", weighted, jacobian.matrix), torch.einsum("nmp,nm->p", weighted, jacobian.residual)
    torch.testing.assert_close(slope / (24 * 3), gradient, rtol=2e-3, atol=1e-4)  # its differences are one-sided
    assert float(torch.linalg.eigvalsh(normal).min()) > 0
    torch.testing.assert_close(normal @ step, -slope, rtol=1e-9, atol=1e-12)


def test_a_part_of_large_samples_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the numbers leads nearly as far, and memory is bounded by what was asked."""
    best = []
    for most in (2**25, 24 * 8):
        monkeypatch.setattr(module, "NUMBERS", most)
        point = TableauPoint.at(batches(2), Scaled(solved("ddim")))
        assert module._Jacobian(point).matrix.numel() <= max(24 * 8 * 2, min(most, 24 * 8 * 3))
        levenberg_marquardt(point, iterations=3, steps_each=3, observe=lambda i, value, most=most: best.append((most, value)))
    whole, part = (min(value for other, value in best if other == most) for most in (2**25, 24 * 8))
    assert whole <= part < 1.5 * whole


def test_batches_do_not_matter() -> None:
    one, many = (descended(batches(count), Scaled(solved("ddim")), iterations=4, steps_each=3).tableau for count in (1, 4))
    torch.testing.assert_close(one.update, many.update, rtol=0, atol=1e-9)  # measured 1e-12, of differences of 1e-4


def test_the_answer_at_the_start_is_asked_for_once() -> None:
    (part,) = batches()
    for tableau in (solved("ddim"), solved("unipc-2"), solved("ddim", steps=3)):
        part.run(tableau)
    assert part.evaluations == part.denoiser.samples == 24 * (STEPS + STEPS - 1 + 2)


class One:
    schedule = EDM

    def __call__(self, x: Tensor, t: Tensor, cond: None = None) -> Tensor:
        return torch.ones_like(x)


def test_a_step_that_gains_makes_the_next_bolder() -> None:
    """Of a linear problem a tenth is missed by the first and a hundredth of that by the second."""
    plain, exact = solved("ddim", steps=1), torch.linspace(-1, 1, 7, dtype=F64)
    update = torch.zeros_like(plain.update)
    update[:, :, 2], missed = 1000.0, []
    for iterations in (1, 2):
        error = EndpointError(One(), torch.ones(7, 1, dtype=F64), exact[:, None])
        found = descended([error], Scaled(replace(plain, update=update), free=[(0, 2)]), iterations=iterations)
        missed.append(float(found.tableau.update[0, 1, 2]))
    assert missed == pytest.approx([1000 / 11, 1000 / 11 / 101], rel=0.01)


def test_the_size_that_counts_is_the_median_at_the_start() -> None:
    """One number, which is every sample: the nearer to the mean of the exact ends, the further it begins; the median is never far."""
    exact = torch.tensor([0.0, 0.1, 0.3, 0.4, 0.5, 0.6, 9.0], dtype=F64)
    plain, places = solved("ddim", steps=1), []
    for begin in (0.45, 2.0, 1000.0):
        update = torch.zeros_like(plain.update)
        update[:, :, 2] = begin  # of the output
        error = EndpointError(One(), torch.ones(7, 1, dtype=F64), exact[:, None])
        found = descended([error], Scaled(replace(plain, update=update), free=[(0, 2)]), iterations=60)
        places.append(float(found.tableau.update[0, 1, 2]))
        c = (begin - exact).abs().median()
        objective = [((place - exact) ** 2 + c**2).sqrt().mean() for place in (places[-1], *torch.linspace(0, 2, 201, dtype=F64))]
        assert objective[0] < 1.01 * min(objective)  # it stops before it would gain 0.3 %
    assert places == sorted(places)
    assert places[0] == pytest.approx(float(exact.median()), abs=0.1) and places[2] > 1


def test_descent_stops_at_its_evaluations() -> None:
    counts, start = [], Scaled(solved("ddim"))
    for most in (0, 500, 10**6):
        shown, parts = [], batches(2)
        for batch in parts:
            batch.evaluations = 10_000  # spent before, on something else
        descended(parts, start, iterations=6, evaluations=most, observe=lambda i, best, shown=shown: shown.append(i))
        counts.append(len(shown))
        spent = sum(batch.evaluations - 10_000 for batch in parts)
        assert spent == sum(batch.denoiser.samples for batch in parts)
        assert spent <= 24 * STEPS + most + 24 * (2 * (3 + 2 + 1) + STEPS)  # a Jacobian and a trial
    assert counts[0] == 1 < counts[1] < counts[2]


def test_what_cannot_move_stays() -> None:
    begun = Scaled(solved("ddim"))
    for start, options in [
        (replace(begun, free=()), {"iterations": 3}),
        (begun, {"iterations": 0}),
    ]:
        assert descended(batches(2), start, observe=lambda i, best: pytest.fail("nothing to tell"), **options) is start
    shown = []
    none = replace(begun, stuck=range(8))
    found = descended(batches(), none, iterations=3, observe=lambda *a: shown.append(a))
    assert torch.equal(found.tableau.update, begun.tableau.update)
    assert len(shown) == 1 and shown[0][1] == pytest.approx(value(begun.tableau, begun.tableau), rel=1e-9)
    some = descended(batches(2), replace(begun, stuck=(0, 3)), iterations=3).tableau.update
    moved = (some - begun.tableau.update).abs().amax(1)[:, 1:3].flatten()
    assert [k for k in range(8) if float(moved[k]) == 0] == [0, 3]
    never = replace(begun, refuse=lambda far: True)
    assert descended(batches(2), never, iterations=3) is never


def test_a_step_that_fails_is_tried_again_shorter() -> None:
    steps: list[float] = []

    def refuse(far: Tensor) -> bool:
        steps.append(float(far.norm()))
        return len(steps) < 3

    begun, shown = Scaled(solved("ddim"), refuse=refuse), []
    descended(batches(), begun, iterations=1, steps_each=3, observe=lambda i, best: shown.append(best))
    assert len(steps) == 3 and steps == sorted(steps, reverse=True) and shown[0] < value(begun.tableau, begun.tableau)
    steps.clear()
    begun = Scaled(solved("ddim"), refuse=lambda far: bool(steps.append(float(far.norm())) or True))
    found = descended(batches(), begun, iterations=9, steps_each=9)
    assert found is begun and len(steps) == module.FAILURES  # and one that gained nothing was the last


def test_a_perfect_start_is_given_back() -> None:
    begun, (x, _) = Scaled(solved("ddim")), trajectories()
    ends = sample(Counted(EDM), begun.tableau, x)
    found = descended([EndpointError(Counted(EDM), x, ends)], begun, iterations=3)
    assert torch.equal(found.tableau.update, begun.tableau.update)
    mostly = ends.clone()
    mostly[:5] += 0.1  # the median error is 0
    found = descended([EndpointError(Counted(EDM), x, mostly)], begun, iterations=3)
    assert rms(EndpointError(Counted(EDM), x, mostly).run(found.tableau)[0]) <= rms(ends - mostly) * (1 + ROUNDING)


@pytest.mark.parametrize("call", [1, 4, 5, 9, 11, 30])
def test_descent_names_a_network_that_is_not_finite(call: int) -> None:
    with pytest.raises(ModelError, match="the network's output is not finite"):
        descended([problem(bad=range(call, 1000))], Scaled(solved("ddim")), iterations=3)


def test_levels_that_differ_make_another_run() -> None:
    """A level that moves is evaluated again even where the coefficients before it are the same."""
    error, grid = problem(), TimeGrid(solved().nodes.t)
    residual, run = error.run(solved())
    end = replace(solved(), nodes=Nodes.at(EDM, torch.cat([grid.t[:-1], grid.t[-1:] / 2])))
    assert run.shared(end) == STEPS  # nothing is evaluated at the end
    assert torch.equal(error.run(end, run)[0], residual)
