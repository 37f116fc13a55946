"""A fit in sequence reuses what it has, and its levels descend to where it ends best."""

from dataclasses import dataclass, field

import pytest
import torch
from tests.learn.search.test_coefficients import (
    EDM,
    LAWS,
    PLAIN,
    ROUNDING,
    SHAPE,
    Given,
    flow,
    gaussian,
    moved,
    noise,
    solved,
    start,
    taught,
)
from torch import Tensor

from fewstep import Denoiser, FewstepError, FitForm, NoiseSchedule, TimeGrid, make_grid, sample
from fewstep.learn.search.coefficients import widened
from fewstep.learn.search.endpoint import levenberg_marquardt, per_sample_rmse
from fewstep.learn.search.refine import Levels
from fewstep.learn.search.sequence import LevelsInSequence, Sequenced, fit_in_sequence

F64 = torch.float64


class Counted:
    """A denoiser that counts what it is asked."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.schedule, self.samples = denoiser, denoiser.schedule, 0

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.samples += len(x)
        answer = self.denoiser(x, t)
        return answer if cond is None else answer + cond[:, None, None, None]


@pytest.mark.parametrize("history", [2, None])
def test_the_states_and_answers_are_those_of_a_run(history: int | None) -> None:
    (denoiser, grid, batch), form = taught(EDM), FitForm(history)
    batches = batch.split(3)
    found = fit_in_sequence(denoiser, start(EDM, grid, form), batches, form)
    for k, part in enumerate(batches):
        states, outputs = [part.state(0)], []
        sample(denoiser, found.tableau, part.state(0), observe=lambda s, x=states, h=outputs: (x.append(s.x_next), h.append(s.x0)))
        for i, (x, mine) in enumerate(zip(states, found.states, strict=True)):
            torch.testing.assert_close(mine[k], x, rtol=0, atol=ROUNDING, msg=f"state {i}")
        for h, mine in zip(outputs, found.outputs, strict=True):
            torch.testing.assert_close(mine[k], h, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("pool", ["scalar", "channel"])
def test_a_fit_reuses_the_rows_and_answers_that_it_shares(pool: str) -> None:
    """To the bit, and evaluates what comes after alone."""
    (mixture, grid, batch), form = taught(EDM), FitForm(pool=pool)
    denoiser, count = Counted(mixture), len(batch.state(0))
    base = fit_in_sequence(denoiser, start(EDM, grid, form), [batch], form)
    assert denoiser.samples == base.evaluations == 4 * count
    for k in (1, 2, 3, 4):  # the time that is another
        t = grid.t.clone()
        t[k] = (grid.t[k] + grid.t[k - 1]) / 2
        states = batch.states.clone()
        states[k] = states[k] * 1.01
        other = start(EDM, TimeGrid(t), form)
        afresh = fit_in_sequence(mixture, other, [Given(states)], form)
        denoiser.samples = 0
        shared = fit_in_sequence(denoiser, other, [Given(states)], form, base=base)
        assert denoiser.samples == shared.evaluations == (4 - k) * count
        assert moved(shared.tableau, afresh.tableau) == 0 and torch.equal(shared.states[-1][0], afresh.states[-1][0])
    scalar = FitForm(1, "scalar", bias=False)  # of another form: the answers at the start alone
    denoiser.samples = 0
    found = fit_in_sequence(denoiser, start(EDM, grid, scalar, "ddim"), [batch], scalar, base=base)
    assert denoiser.samples == 3 * count
    assert moved(found.tableau, fit_in_sequence(mixture, start(EDM, grid, scalar, "ddim"), [batch], scalar).tableau) == 0
    denoiser.samples = 0
    last = fit_in_sequence(denoiser, start(EDM, grid, form), [batch], form, rows=[3], base=base)
    assert denoiser.samples == 3 * count and torch.equal(last.tableau.update[:3], start(EDM, grid, form).update[:3])


def test_the_condition_goes_to_the_denoiser() -> None:
    denoiser = Counted(gaussian(EDM))
    grid, form, x, label = make_grid("angle", EDM, 3), FitForm(pool="scalar", **PLAIN), noise(EDM, 1), torch.arange(48, dtype=F64)
    batch = flow(gaussian(EDM), grid, x)
    batch.cond = label
    found = fit_in_sequence(denoiser, start(EDM, grid, form), [batch], form)
    torch.testing.assert_close(found.outputs[0][0], gaussian(EDM)(x, grid.t[0]) + label[:, None, None, None], rtol=0, atol=ROUNDING)


# -- the levels ------------------------------------------------------------------------------------------------------


@dataclass
class Gaussian:
    """Fits to the exact trajectories of a Gaussian whose elements differ, which one coefficient for all cannot follow."""

    law: NoiseSchedule
    form: FitForm = field(default_factory=lambda: FitForm(1, "scalar", bias=False))
    evaluations: int = 0

    def __post_init__(self) -> None:
        self.denoiser = gaussian(self.law, 0.2 + 2 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(8), dtype=F64))
        self.x = noise(self.law, 1)

    def at(self, t: Tensor, base: Sequenced | None = None) -> Sequenced:
        grid = TimeGrid(t)
        begin = widened(solved(self.law, grid, "ddim"), self.form, SHAPE)
        found = fit_in_sequence(self.denoiser, begin, [flow(self.denoiser, grid, self.x)], self.form, base=base)
        self.evaluations += found.evaluations
        return found

    def residuals(self, found: Sequenced) -> list[Tensor]:
        t = found.tableau.nodes.t
        return [found.states[-1][0] - self.denoiser.flow(self.x, t[0], t[-1])]

    def levels(self, t: Tensor) -> Levels:
        return Levels(TimeGrid(t), self.law)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.every(4)
def test_levels_descend_to_where_the_fit_ends_best(law: str) -> None:
    schedule, told = LAWS[law], []
    problem = Gaussian(schedule)
    begin = LevelsInSequence(problem, problem.at(make_grid("logsnr" if law != "flow" else "uniform", schedule, 4).t))
    found = levenberg_marquardt(begin, iterations=3, steps_each=4, observe=lambda i, value: told.append(value))
    before, after = (float(per_sample_rmse(point.residuals[0]).mean()) for point in (begin, found))
    t = found.found.tableau.nodes.t
    assert told == sorted(told, reverse=True) and after < 0.9 * before
    assert torch.equal(t[[0, -1]], begin.found.tableau.nodes.t[[0, -1]]) and bool((torch.diff(t) < 0).all())
    if law == "table":
        assert bool(torch.isin(t, schedule.times.double()).all())
    for level in found.levels.perturbed():  # no level alone, moved by a tenth of a gap, is much better
        if level is not None:
            other = problem.residuals(problem.at(level[0].t))[0]
            assert float(per_sample_rmse(other).mean()) > 0.9 * after


def test_a_column_costs_what_comes_after_its_level() -> None:
    problem = Gaussian(EDM)
    point = LevelsInSequence(problem, problem.at(make_grid("angle", EDM, 4).t))
    problem.evaluations = 0
    assert len(list(point.columns())) == point.size == 3
    assert problem.evaluations == 48 * (3 + 2 + 1)


def test_batches_are_needed() -> None:
    denoiser, grid, batch = taught(EDM)
    with pytest.raises(FewstepError, match="has not the coefficients of the form"):
        fit_in_sequence(denoiser, start(EDM, grid, FitForm(pool="scalar")), [batch], FitForm())
