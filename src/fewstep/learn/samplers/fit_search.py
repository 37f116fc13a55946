"""Search for one fitted sampler: levels to begin with, the descent in levels, the fit in sequence, the sweep, and model selection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fewstep.core.denoiser import Denoiser
from fewstep.core.first_answer import FirstAnswer
from fewstep.core.grid import TimeGrid
from fewstep.core.spacings import GRIDS, make_grid, standard_grids
from fewstep.core.tableau import Solver, Tableau, tabulate
from fewstep.learn.samplers.fit_plan import FEW_RIVALS, FitPlan
from fewstep.learn.search.bound import Bound
from fewstep.learn.search.coefficients import FitForm, sweep, widened
from fewstep.learn.search.endpoint import EndpointError, levenberg_marquardt, mean_over_processes, per_sample_rmse
from fewstep.learn.search.foresee import Foreseeing, learn_first_answer
from fewstep.learn.search.refine import Levels
from fewstep.learn.search.sequence import LevelsInSequence, Sequenced, fit_in_sequence
from fewstep.learn.teacher.batches import stored_batches, stored_gram
from fewstep.learn.teacher.trajectories import Trajectories
from fewstep.models.generate import default_grid
from fewstep.models.problem import Problem
from fewstep.runtime.errors import GridError, SolverError
from fewstep.runtime.process import sum_over_processes
from fewstep.solvers import make_solver

__all__ = ["FitSearch", "SearchResult", "best_hand_made"]

HAND_MADE = ("unipc-2", "dpm-solver-pp-2m", "ipndm")  # and dpm-solver-v3, if the model has statistics
ABOUT = 1.5  # times the least mean error: levels that may begin a fit
FEW = 4  # held-out noises, of which a difference counts half
FORESEEN = ", first answer foreseen"  # of the name of a stage
GRAM = 64  # trajectories that the dynamic programs for levels are averaged over, at most


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        tableau: the best sampler.
        chosen: name of the stage that it is from.
        begun: name of the initial levels.
        stages: for each stage by name the mean error of a sample, and the RMSE over all, on held-out noises; names of hand-made samplers
            contain `` on ``.
        evaluations: network evaluations of all processes, in samples.
    """

    tableau: Tableau
    chosen: str
    begun: str
    stages: Mapping[str, tuple[float, float]]
    evaluations: int


def best_hand_made(stages: Mapping[str, tuple[float, float]]) -> str:
    """Return the hand-made sampler with the least RMSE."""
    return min((name for name in stages if " on " in name), key=lambda name: stages[name][1])


def _worse(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether our errors ``[n]`` of the same noises are clearly larger: their mean by more than its standard error, or their mean
    square by more than twice its own; by more where there are few noises, whose standard error is itself uncertain.
    """
    count = float(sum_over_processes(torch.tensor(float(len(ours)))))
    return any(_excess(ours**power - theirs**power) > times * (1 + FEW / count) for power, times in ((1, 1), (2, 2)))


def _excess(values: Tensor) -> float:
    """Return the mean of the values ``[n]`` of all processes, in units of its standard error."""
    mean, square = mean_over_processes(values), mean_over_processes(values.square())
    count = float(sum_over_processes(torch.tensor(float(len(values)))))
    return mean / (max(square - mean**2, 0.0) / count + 1e-30) ** 0.5


@dataclass(eq=False)
class _Sequences:
    """Fits in sequence to some of the stored trajectories, on any levels, see `Sequences`."""

    problem: Problem
    denoiser: Denoiser
    trajectories: Trajectories
    rows: range
    form: FitForm
    parent: Callable[[int, FitForm], str]
    batch: int
    evaluations: int = 0

    def at(self, t: Tensor, base: Sequenced | None = None, start: Tableau | None = None, rows: Sequence[int] | None = None) -> Sequenced:
        """Fit on the times ``t``; given ``start``, fit only some of its rows again."""
        if start is None:
            parent = make_solver(self.parent(len(t) - 1, self.form))
            nodes = parent.nodes(TimeGrid(t), self.problem.schedule)
            start = widened(tabulate(parent, nodes), self.form, self.problem.shape)
        batches = stored_batches(self.trajectories, self.rows, t, self.batch, self.problem.device)
        found = fit_in_sequence(self.denoiser, start, batches, self.form, rows=rows, base=base)
        self.evaluations += found.evaluations
        return found

    def residuals(self, found: Sequenced) -> list[Tensor]:
        """Return samples minus exact endpoints, for each batch."""
        return [end - exact for end, exact in zip(found.states[-1], self._exact, strict=True)]

    def levels(self, t: Tensor) -> Levels:
        """Return the levels of some times as free numbers."""
        return Levels(TimeGrid(t), self.problem.schedule)

    def of(self, rows: range, form: FitForm | None = None) -> _Sequences:
        """Return the fits to other trajectories, or of another form."""
        return replace(self, rows=rows, form=form or self.form, evaluations=0)

    @cached_property
    def _exact(self) -> list[Tensor]:
        ends = self.trajectories.t[-1:]
        return [batch.state(0).cpu() for batch in stored_batches(self.trajectories, self.rows, ends, self.batch, torch.device("cpu"))]


class FitSearch:
    """The search for the samplers of one model, whose first answer is the network's or is foreseen.

    Args:
        problem: the model and its guidance.
        trajectories: trajectories of this problem: the first ``num`` to fit to, and the next ``held_out`` for model selection.
        plan: how to fit.
        first: the answer that is foreseen; None to ask the network.
    """

    def __init__(self, problem: Problem, trajectories: Trajectories, plan: FitPlan, first: FirstAnswer | None = None) -> None:
        self.problem, self.trajectories, self.plan, self.schedule = problem, trajectories, plan, problem.schedule
        self.first, self.denoiser = first, problem.teacher
        if first is not None:
            begin = problem.schedule.ends[0]
            self.denoiser = Foreseeing(problem.teacher, first, float(begin), float(problem.schedule.sigma(begin)))
        self.levels = TimeGrid(trajectories.t)
        self.held_out = range(plan.num, plan.num + plan.held_out)
        self.hand_made: dict[str, Solver] = {name: make_solver(name) for name in HAND_MADE}
        statistics = problem.model.statistics(problem.guidance)
        if statistics is not None:
            self.hand_made["dpm-solver-v3"] = make_solver("dpm-solver-v3", statistics=statistics)
        self._runs: dict[range, list[EndpointError]] = {}
        self._usual = {default_grid(problem.model), "angle", "logsnr"}  # grids to begin with where few are tried
        self._counted = 0  # evaluations of fits in sequence that are done
        self._first: dict[range, Sequenced] = {}  # a fit whose answers at the start all fits to the same noises share

    @cached_property
    def programs(self) -> dict[str, dict[int, list[int]]]:
        """The optima of the first-order dynamic programs, computed when first needed."""
        rows, most = range(min(GRAM, self.plan.num)), min(max(self.plan.counts) + self.plan.foresees, self.levels.steps)
        gram = stored_gram(self.trajectories, rows, self.plan.batch)
        return {f"first-order program ({total})": Bound(gram, "plain", total).best(most) for total in ("sum", "squares")}

    @cached_property
    def foreseen(self) -> FitSearch | None:
        """The search for samplers that foresee the first answer; None where none are asked for."""
        if not self.plan.foresees:
            return None
        every, start = self._sequences(range(self.plan.num)), self.levels.t[:1]
        batches = list(stored_batches(self.trajectories, every.rows, start, self.plan.batch, self.problem.device))
        sigma, answers = float(self.schedule.sigma(start[0])), self._start_of(every).outputs[0]
        noise = [batch.state(0) / sigma for batch in batches]
        first = learn_first_answer(noise, answers, [batch.cond for batch in batches], self.problem.model.classes)
        return FitSearch(self.problem, self.trajectories, self.plan, first)

    def find(self, nfe: int, others: Mapping[int, TimeGrid], note: Callable[[str], None]) -> SearchResult:
        """Find the best tableau with ``nfe`` evaluations.

        Whether the first answer is asked for or foreseen is decided by which begins better, since the rest of a search is most of its cost;
        held-out noises judge a fit in sequence of the other way too.

        Args:
            nfe: network evaluations.
            others: grids of samplers that were found before, by their number of steps.
            note: called with the stage of the search.
        """
        self._clear()
        other = None if nfe >= self.levels.steps else self.foreseen  # learned from answers that the fits here share
        ways = [self] if other is None else [self, other]
        if other is not None:
            other._clear()
        found, begun, of = dict[str, Tableau](), dict[str, str](), dict[str, FitSearch]()
        note("levels to begin with")
        starts = {way: way.begin(nfe + (way.first is not None), others) for way in ways}
        best = min(ways, key=lambda way: starts[way][1])
        for way in ways:
            for name, (tableau, levels) in way.fitted(nfe, starts[way][0], note, whole=way is best).items():
                name += "" if way.first is None else FORESEEN
                found[name], begun[name], of[name] = tableau, levels, way
        note("check on held-out noises")
        rivals = self.rivals(nfe)
        errors = {name: of.get(name, self).errors(tableau, self.held_out) for name, tableau in (found | rivals).items()}
        stages = {name: (mean_over_processes(made), mean_over_processes(made.square()) ** 0.5) for name, made in errors.items()}
        rival = best_hand_made(stages)
        ours = [name for name in found if not _worse(errors[name], errors[rival])]
        chosen = min(ours or [rival], key=lambda name: stages[name][0])
        tableau = replace((found | rivals)[chosen], first=of.get(chosen, self).first)
        spent = sum(way._spent() for way in ways)
        return SearchResult(tableau, chosen, begun.get(chosen, next(iter(begun.values()))), stages, spent)

    def fitted(self, nfe: int, starts: Mapping[str, Tensor], note: Callable[[str], None], *, whole: bool) -> dict[str, tuple[Tableau, str]]:
        """Fit tableaus with ``nfe`` evaluations, and return each by the stage that it is from, with the name of its initial levels.

        Args:
            nfe: network evaluations.
            starts: initial levels, see `begin`.
            note: called with the stage of the search.
            whole: whether levels move and coefficients are swept; else the fit in sequence on the best of these levels is all.
        """
        plan, every = self.plan, self._sequences(range(self.plan.num))
        name, t = self.descended(starts, note) if whole else next(iter(starts.items()))
        note("coefficients")
        fitted = every.at(t, self._start_of(every))
        found = {("fitted in sequence" if whole else "on levels to begin with"): (fitted.tableau, name)}
        if whole and plan.sweeps(nfe):
            swept = self.swept(fitted.tableau, plan.sweeps(nfe), note)
            last = len(swept.update) - 1
            found["swept"] = every.at(swept.nodes.t, fitted, swept, [last]).tableau, name  # its last row again, from all noises
        self._count(every)
        return found

    def _clear(self) -> None:
        """Forget what was computed, so that a run that was killed goes on to the same numbers."""
        self._counted = 0
        self._runs.clear()
        self._first.clear()
        if isinstance(self.denoiser, Foreseeing):
            self.denoiser.answered = 0

    # -- the levels -------------------------------------------------------------------------------------------------

    def begin(self, steps: int, others: Mapping[int, TimeGrid]) -> tuple[dict[str, Tensor], float]:
        """Choose initial levels by a fit of one coefficient for all elements to a few trajectories.

        Of the levels with about the least mean error, those with the fewest large errors come first: a descent mends usual errors, but
        hardly a sample that ends as another picture, which the first few levels decide.

        Returns:
            Their times by name, the most promising first, and the least mean error.
        """
        few, error, times = self._levels_only(range(self.plan.ranking)), dict[str, Tensor](), dict[str, Tensor]()
        for name, t in self.candidates(steps, others).items():
            if not any(torch.equal(t, other) for other in times.values()):
                found = few.at(t, self._start_of(few))
                error[name], times[name] = torch.cat([per_sample_rmse(one) for one in few.residuals(found)]), t
        self._count(few)
        mean = {name: mean_over_processes(found) for name, found in error.items()}
        large = {name: mean_over_processes(found**4) for name, found in error.items()}
        least = min(mean.values())
        ranked = sorted(mean, key=lambda name: (mean[name] > ABOUT * least, large[name] if mean[name] <= ABOUT * least else mean[name]))
        return {name: times[name] for name in ranked[: self.plan.effort.starts]}, least

    def candidates(self, steps: int, others: Mapping[int, TimeGrid]) -> dict[str, Tensor]:
        """Return the times of standard grids, of the optima of the dynamic programs, and of levels found for other numbers of steps."""
        found = {name: grid.t for name, grid in standard_grids(self.schedule, steps).items()}
        if self.plan.few and self._usual & set(found):
            found = {name: t for name, t in found.items() if name in self._usual}
        if steps <= self.levels.steps:
            found |= {name: self.levels.t[best[steps]] for name, best in self.programs.items()}
        for fewer in [one for one in sorted(others) if one < steps][-1:]:
            with suppress(GridError):  # an infinite end, or too fine for a discrete schedule
                found[f"those of {fewer} steps, stretched"] = others[fewer].stretched(self.schedule, steps).t
        if not found:
            raise SolverError(f"no standard grid of {self.problem.name} has {steps} steps: ask for fewer evaluations")
        return found

    def descended(self, starts: Mapping[str, Tensor], note: Callable[[str], None]) -> tuple[str, Tensor]:
        """Move levels to where a fit in sequence ends best, from each start, and return the name of the best one and the times."""
        if not self.plan.config.move or len(next(iter(starts.values()))) < 3:
            return next(iter(starts.items()))
        sequences, effort, found = self._levels_only(range(self.plan.noises)), self.plan.effort, dict[str, tuple[float, Tensor]]()
        for k, (name, t) in enumerate(starts.items()):
            note(f"levels {k + 1} of {len(starts)}")
            begin = LevelsInSequence(sequences, sequences.at(t, self._start_of(sequences)))
            point = levenberg_marquardt(begin, iterations=effort.descents, steps_each=effort.steps)
            error = mean_over_processes(torch.cat([per_sample_rmse(residual) for residual in point.residuals]))
            found[name] = error, point.found.tableau.nodes.t
        self._count(sequences)
        best = min(found, key=lambda name: found[name][0])
        return best, found[best][1]

    # -- the coefficients -------------------------------------------------------------------------------------------

    def swept(self, tableau: Tableau, most: int, note: Callable[[str], None]) -> Tableau:
        """Improve all steps of a tableau together by a sweep of at most so many Jacobians."""
        note(f"sweep 1 of at most {most}")
        return sweep(
            self._endpoints(range(self.plan.noises)),
            tableau,
            self.schedule if self.plan.config.move else None,
            iterations=most,
            observe=lambda done, error: note(f"sweep {min(done + 1, most)} of at most {most}"),
        )

    # -- model selection --------------------------------------------------------------------------------------------

    def rivals(self, nfe: int) -> dict[str, Tableau]:
        """Return the best pair of a hand-made solver and a standard grid, ranked on a few noises."""
        effort, error, made = self.plan.effort, dict[str, float](), dict[str, Tableau]()
        pairs = [(name, grid) for name in self.hand_made for grid in GRIDS]
        if not effort.rivals:
            first = [name for name in ("unipc-2", "dpm-solver-v3") if name in self.hand_made]
            usual = default_grid(self.problem.model)
            pairs = [(name, grid) for grid in dict.fromkeys((usual, "angle")) for name in first]
            pairs = [*pairs, *((name, usual) for name in ("dpm-solver-pp-2m",) if name in self.hand_made)][:FEW_RIVALS]
        few = range(min(effort.rivals or 2, self.plan.num))
        for name, spacing in pairs:
            solver = self.hand_made[name]
            with suppress(GridError, SolverError):
                grid = make_grid(spacing, self.schedule, solver.steps_on(self.schedule, nfe))
                if float(grid.t[0]) == self.schedule.t_max and float(grid.t[-1]) == self.schedule.t_min:  # leading starts elsewhere
                    pair = f"{name} on {spacing}"
                    made[pair] = tabulate(solver, solver.nodes(grid, self.schedule))
                    error[pair] = mean_over_processes(self.errors(made[pair], few))
        if not error:
            raise SolverError(f"no standard grid of {self.problem.name} has {nfe} steps: ask for fewer evaluations")
        best = min(error, key=error.__getitem__)
        return {best: made[best]}

    def errors(self, tableau: Tableau, rows: range) -> Tensor:
        """Return the errors of this process's samples, ``[n]``."""
        return torch.cat([per_sample_rmse(batch.run(tableau)[0]) for batch in self._endpoints(rows)])

    # -- what is measured -------------------------------------------------------------------------------------------

    def _sequences(self, rows: range) -> _Sequences:
        plan = self.plan
        return _Sequences(self.problem, self.denoiser, self.trajectories, rows, plan.form, plan.config.parent_with, plan.batch)

    def _levels_only(self, rows: range) -> _Sequences:
        """Return fits with one coefficient for all elements, which show where levels should be."""
        return self._sequences(rows).of(rows, replace(self.plan.form, pool="scalar", bias=False))

    def _start_of(self, sequences: _Sequences) -> Sequenced:
        """Return a fit to the same noises with the answers at the start, which all fits share: one step, and one evaluation."""
        if sequences.rows not in self._first:
            one = sequences.of(sequences.rows, FitForm(pool="scalar", bias=False))
            self._first[sequences.rows] = one.at(self.levels.t[[0, -1]])
            self._count(one)
        return self._first[sequences.rows]

    def _endpoints(self, rows: range) -> list[EndpointError]:
        if rows not in self._runs:
            batches = stored_batches(self.trajectories, rows, self.levels.t[[0, -1]], self.plan.batch, self.problem.device)
            self._runs[rows] = [EndpointError(self.denoiser, batch.state(0), batch.state(1), batch.cond) for batch in batches]
        return self._runs[rows]

    def _count(self, sequences: _Sequences) -> None:
        self._counted += sequences.evaluations

    def _spent(self) -> int:
        """Return the evaluations of all processes in this search."""
        runs = sum(batch.evaluations for batches in self._runs.values() for batch in batches)
        foreseen = self.denoiser.answered if isinstance(self.denoiser, Foreseeing) else 0
        return int(sum_over_processes(torch.tensor(self._counted + runs - foreseen)))
