"""Search for one fitted sampler: initial levels, the fit in sequence, the sweep, and model selection on held-out noises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.core.grid import GRIDS, TimeGrid, make_grid
from fewstep.core.schedule import VPLinear
from fewstep.core.tableau import Nodes, Solver, Tableau, tabulate
from fewstep.learn.search.bound import Bound
from fewstep.learn.search.coefficients import FitForm, TeacherBatch, fit_in_sequence, sweep, widened
from fewstep.learn.search.endpoint import EndpointError, mean_over_processes, per_sample_rmse
from fewstep.learn.teacher.batches import stored_batches
from fewstep.learn.teacher.gram import Gram
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig
from fewstep.models.problem import Problem
from fewstep.runtime.errors import GridError, ModelError, SolverError
from fewstep.runtime.front_door import at_least, check_fields, checked_class
from fewstep.runtime.process import process, share, sum_over_processes
from fewstep.solvers import make_solver

__all__ = ["FitConfig", "FitSearch", "SearchResult", "best_hand_made"]

HAND_MADE = ("dpm-solver-pp-2m", "unipc-2", "ipndm")  # and dpm-solver-v3, if the model has statistics
RANKING = 256  # noises that rank levels to begin with
ABOUT = 1.5  # times the least mean error: levels that may begin a fit
RIVALS = 32  # noises that rank hand-made samplers
GRAM = 64  # trajectories that the dynamic programs for levels are averaged over
PROBE = 8  # steps on which a parent shows its form


@checked_class
@dataclass(frozen=True)
class FitConfig:
    """Configure a fit of samplers.

    Args:
        form: which coefficients are fitted.
        num: trajectories to fit to.
        held_out: held-out trajectories used for model selection and for the reported figures.
        levels: cells between the noise levels at which trajectories are stored; the fit begins on some of them.
        noises: number of trajectories (out of ``num``) used by the sweep.
        window: trajectories that the sweep processes at a time.
        iterations: iterations of the sweep over all steps, at most; 0 for no sweep.
        move: whether the sweep moves the levels too.
        seed: seed of the first trajectory; far from those that benchmarks start with.
        batch: trajectories processed at a time.
        parent: the solver that coefficients are drawn to.

    Raises:
        FewstepError: a number out of range.
        SolverError: an unknown parent, or one that no fit can start from.
    """

    form: FitForm = field(default_factory=FitForm)
    num: int = 1024
    held_out: int = 512
    levels: int = 64
    noises: int = 256
    window: int = 256
    iterations: int = 2
    move: bool = True
    seed: int = 4_000_000
    batch: int = 128
    parent: str = "dpm-solver-pp-2m"

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, num=2, held_out=2, noises=2, window=2, levels=1, batch=1, iterations=0, seed=0)
        parent, law = make_solver(self.parent), VPLinear()
        if self.form.memory(PROBE) > 1:
            widened(tabulate(parent, parent.nodes(TimeGrid.logsnr(law, PROBE), law)), self.form, (1,))
        _ = self.trajectories

    @property
    def trajectories(self) -> TrajectoryConfig:
        """The configuration of the teacher's trajectories, held-out ones last."""
        return TrajectoryConfig(self.num + self.held_out, self.levels, seed=self.seed, batch=self.batch)

    def parent_with(self, steps: int, form: FitForm | None = None) -> str:
        """Return the name of the parent on so many steps: ``ddim`` where a step may read a single output only."""
        return self.parent if (form or self.form).memory(steps) > 1 else "ddim"

    def evaluations(self, nfe: Sequence[int]) -> int:
        """Estimate how many network evaluations a fit takes."""
        swept, window = min(self.noises, self.num), min(self.window, self.num)
        total = (self.num + self.held_out) * self.levels
        for n in nfe:
            columns = (n * (n + 1) * (n + 2) / 6 + n * n) / 2  # evaluations for the Jacobian of one noise, about
            ranked = len(GRIDS) * (min(RANKING, self.num) + len(HAND_MADE) * min(RIVALS, self.num)) * n
            total += int(self.iterations * (window * columns + 5 * swept * n) + (2 * self.num + 3 * self.held_out) * n + ranked)
        return total

    @property
    def fewest(self) -> int:
        """The fewest noises in any part of the work: as many processes can share it."""
        return min(self.num, self.held_out, self.noises, self.window, RANKING, RIVALS, GRAM)


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
    """Return whether the mean square of our errors ``[n]`` exceeds theirs by more than twice the standard error of the difference."""
    excess = ours.square() - theirs.square()
    mean, square = mean_over_processes(excess), mean_over_processes(excess.square())
    count = float(sum_over_processes(torch.tensor(float(len(excess)))))
    return mean > 2 * ((square - mean**2) / count) ** 0.5


class FitSearch:
    """The part of the search that all samplers of one model share.

    Args:
        problem: the model and its guidance.
        trajectories: trajectories of this problem: the first ``num`` to fit to, and the next ``held_out`` for model selection.
        config: how to fit.
        most: the largest number of evaluations that will be needed.
    """

    def __init__(self, problem: Problem, trajectories: Trajectories, config: FitConfig, most: int) -> None:
        self.problem, self.trajectories, self.config, self.most = problem, trajectories, config, most
        self.denoiser, self.schedule = problem.teacher, problem.schedule
        self.levels = TimeGrid(trajectories.t)
        self.held_out = range(config.num, config.num + config.held_out)
        self.hand_made: dict[str, Solver] = {name: make_solver(name) for name in HAND_MADE}
        statistics = problem.model.statistics(problem.guidance)
        if statistics is not None:
            self.hand_made["dpm-solver-v3"] = make_solver("dpm-solver-v3", statistics=statistics)
        self.evaluations = 0

    @cached_property
    def programs(self) -> dict[str, dict[int, list[int]]]:
        """The optima of the first-order dynamic programs, computed when first needed."""
        gram = self._gram()
        return {f"first-order program ({total})": Bound(gram, "plain", total).best(self.most) for total in ("sum", "squares")}

    def find(self, nfe: int, scratch: Path, note: Callable[[str], None]) -> SearchResult:
        """Find the best tableau with ``nfe`` evaluations.

        Args:
            nfe: network evaluations.
            scratch: an empty folder for states of the sampler that is fitted.
            note: called with the stage of the search.
        """
        self.evaluations = 0
        note("levels to begin with")
        begun, at = self.begin(nfe)
        note("fit in sequence")
        form, cache = self.config.form, _OnDisk(scratch)
        found = {"fitted in sequence": self.in_sequence(at, form, range(self.config.num), cache)}
        if self.config.iterations:
            swept = self.swept(found["fitted in sequence"], note)
            found["swept"] = self.in_sequence([0, *[-1] * nfe], form, range(self.config.num), cache, swept)  # its last step
        note("check on held-out noises")
        found |= self.rivals(nfe)
        errors = {name: self.errors(tableau, self.held_out) for name, tableau in found.items()}
        stages = {name: (mean_over_processes(made), mean_over_processes(made.square()) ** 0.5) for name, made in errors.items()}
        rival = best_hand_made(stages)
        allowed = [name for name in stages if not _worse(errors[name], errors[rival])]
        chosen = min(allowed, key=lambda name: stages[name][0])
        return SearchResult(found[chosen], chosen, begun, stages, int(sum_over_processes(torch.tensor(self.evaluations))))

    def begin(self, nfe: int) -> tuple[str, list[int]]:
        """Choose initial levels by a fit of one coefficient for all elements to a few trajectories.

        Of the levels with about the least mean error, choose those with the fewest large errors: a sweep mends usual errors, but hardly a
        sample that ends as another picture, which the first few levels decide.

        Returns:
            Their name, and their places among the stored levels.
        """
        form, error, places = replace(self.config.form, pool="scalar", bias=False), dict[str, Tensor](), dict[str, list[int]]()
        rows = range(min(RANKING, self.config.num))
        for name, at in self.candidates(nfe).items():
            if at not in places.values():
                cache: dict[str, Tensor] = {}
                self.in_sequence(at, form, rows, cache)
                batches = self._batches(rows, at)
                ends = [per_sample_rmse(cache[f"x-{k}"].cpu() - batch.state(nfe).cpu()) for k, batch in enumerate(batches)]
                error[name], places[name] = torch.cat(ends), at
        mean = {name: mean_over_processes(found) for name, found in error.items()}
        large = {name: mean_over_processes(error[name] ** 4) for name in error if mean[name] <= ABOUT * min(mean.values())}
        best = min(large, key=large.__getitem__)
        return best, places[best]

    def candidates(self, nfe: int) -> dict[str, list[int]]:
        """Return the places of standard grids, moved to the nearest stored levels, and of the optima of the dynamic programs."""
        grids: dict[str, TimeGrid] = {}
        for name in GRIDS:
            with suppress(GridError):  # not for this schedule, or too fine for a discrete one
                grids[name] = make_grid(name, self.schedule, nfe)
        lam, found = self.schedule.lam(self.levels.t).clamp(-20, 20), dict[str, list[int]]()
        for name, grid in grids.items():
            at: list[int] = (self.schedule.lam(grid.t).clamp(-20, 20)[:, None] - lam).abs().argmin(1).tolist()
            if at[0] == 0 and at[-1] == self.levels.steps and len(set(at)) == nfe + 1:
                found[name] = at
        return found | {name: best[nfe] for name, best in self.programs.items()}

    def in_sequence(
        self, at: Sequence[int], form: FitForm, rows: range, cache: MutableMapping[str, Tensor], start: Tableau | None = None
    ) -> Tableau:
        """Fit a tableau on these levels, step by step; given ``start``, fit only its last step again."""
        batches, n = self._batches(rows, at), len(at) - 1
        self.evaluations += len(share(rows)) * n
        if start is not None:
            return fit_in_sequence(self.denoiser, start, batches, form, rows=[n - 1], cache=cache)
        parent = make_solver(self.config.parent_with(n, form))
        nodes = parent.nodes(TimeGrid(self.levels.t[list(at)]), self.schedule)
        start = widened(tabulate(parent, nodes), form, self.problem.shape)
        return fit_in_sequence(self.denoiser, start, batches, form, cache=cache)

    def swept(self, tableau: Tableau, note: Callable[[str], None]) -> Tableau:
        """Improve all steps of a tableau together by a sweep."""
        rows = range(min(self.config.noises, self.config.num))
        parts = [rows[k : k + self.config.window] for k in range(0, len(rows), self.config.window)]
        windows = [self._endpoints(part) for part in parts if len(part) >= process()[1]]
        most = self.config.iterations
        moved = sweep(
            windows,
            tableau,
            self.schedule if self.config.move else None,
            iterations=most,
            observe=lambda iteration, error: note(f"sweep {iteration} of at most {most}"),
        )
        self.evaluations += sum(batch.evaluations for window in windows for batch in window)
        return moved

    def rivals(self, nfe: int) -> dict[str, Tableau]:
        """Return the best pair of a hand-made solver and a standard grid, ranked on a few noises."""
        few, error, made = range(min(RIVALS, self.config.num)), dict[str, float](), dict[str, Tableau]()
        for name, solver in self.hand_made.items():
            for spacing in GRIDS:
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
        batches = self._endpoints(rows)
        made = torch.cat([per_sample_rmse(batch.run(tableau)[0]) for batch in batches])
        self.evaluations += sum(batch.evaluations for batch in batches)
        return made

    def _batches(self, rows: range, at: Sequence[int]) -> Sequence[TeacherBatch]:
        """Return this process's share of some trajectories, at some of the stored levels."""
        return stored_batches(self.trajectories, rows, at, self.config.batch, self.problem.device)

    def _endpoints(self, rows: range) -> list[EndpointError]:
        batches = self._batches(rows, [0, -1])
        return [EndpointError(self.denoiser, batch.state(0), batch.state(1), batch.cond) for batch in batches]

    def _gram(self) -> Gram:
        """Average second moments along a few trajectories."""
        nodes, rows = Nodes.at(self.schedule, self.levels.t), range(min(GRAM, self.config.num))
        total = Gram.empty(torch.exp(-nodes.lam))
        for batch in self._batches(rows, range(len(nodes.t))):
            states = [batch.state(k) for k in range(len(nodes.t))]
            with torch.no_grad():
                outputs = [self.denoiser(x, t, batch.cond) for x, t in zip(states, nodes.t, strict=True)]
            bad = [float(t) for t, x0 in zip(nodes.t, outputs, strict=True) if not bool(torch.isfinite(x0).all())]
            if bad:
                raise ModelError(f"the network's output is not finite (NaN or infinite) at t = {bad[0]:g}: check its weights and dtype")
            total.merge(Gram.of(nodes, torch.stack(states), torch.stack(outputs)))
        count = sum_over_processes(torch.tensor(float(total.count)))
        return Gram(total.level, sum_over_processes(total.matrix * total.count) / count, total.slopes, int(count))


class _OnDisk(MutableMapping[str, Tensor]):
    """Tensors in files of their own, so that memory does not grow with the number of noises."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setitem__(self, name: str, value: Tensor) -> None:
        save_file({"x": value.detach().cpu().contiguous()}, self.folder / f"{name}.safetensors")

    def __getitem__(self, name: str) -> Tensor:
        return load_file(self.folder / f"{name}.safetensors")["x"]

    def __delitem__(self, name: str) -> None:
        (self.folder / f"{name}.safetensors").unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self.folder.glob("*.safetensors"))

    def __len__(self) -> int:
        return sum(1 for _ in self)
