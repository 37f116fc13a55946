"""Optimise the schedule of a solver for a model: one sampler for each number of evaluations, and a table of their grids."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.grid import GRIDS, TimeGrid, standard_grids
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Solver, tabulate
from fewstep.learn.samplers.fit_plan import CHECKED, LARGE, TOGETHER, default_budget
from fewstep.learn.search.bound import Bound
from fewstep.learn.search.endpoint import mean_over_processes, per_sample_rmse
from fewstep.learn.search.refine import STEPS, SolverEndpointError, check_deterministic, refine
from fewstep.learn.teacher.batches import stored_batches, stored_gram
from fewstep.learn.teacher.gram import Gram, GramConfig, collect_gram, fine_grid, gram_store
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, trajectories_of
from fewstep.models.generate import solver_for
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_model
from fewstep.runtime.artifact import Count, Number, facts_of, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError, GridError, SolverError
from fewstep.runtime.front_door import at_least, check_fields, checked, checked_class, config_of, scale_of, wholes
from fewstep.runtime.job import Job, Progress
from fewstep.runtime.process import from_first, process, sum_over_processes
from fewstep.sampling.grid_table import GridTable
from fewstep.sampling.reference import REFERENCE_NFE
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import spec_of

__all__ = ["OptimizeConfig", "collected_gram", "name_of", "optimize", "solver_folder"]

PROBE = 4  # steps on which a solver shows whether it adds noise
EVALUATIONS = 1920  # network evaluations of one calibration run, about: fewer noises for more steps
FEWEST = 64  # noises, though; as many rank the candidates
GRAM_BATCH = 64  # trajectories of the Gram matrix at a time, at most: its derivatives take more memory
RANKING = 8  # within a budget
CANDIDATES = 14  # grids that are ranked, about
BUDGETS = ((32, 3, 32), (24, 2, 16), (20, 1, 4))  # levels, iterations, and the fewest noises that they are for
MANY_STEPS = 8  # beyond them only the best candidate is refined, not the two best


@checked_class
@dataclass(frozen=True)
class OptimizeConfig:
    """Configure a search for schedules.

    Args:
        budget: network evaluations, counted singly, for all schedules of a solver together: the numbers below become as small as it asks
            for, and the error bound is that along the same trajectories. By default 3000 for a large network where no number is named.
        levels: cells between the noise levels that the dynamic programs choose from.
        num: trajectories that the error bound is averaged over.
        noises: noises that calibrate a schedule, at most; fewer for many steps.
        held_out: held-out noises, used for model selection and for the reported figures.
        seed: seed of the first noise; far from those that benchmarks start with.
        iterations: iterations of the refinement, at most.
        batch: noises processed at a time.

    Raises:
        FewstepError: a number out of range.
    """

    levels: int = 128
    num: int = 256
    noises: int = 256
    held_out: int = 1024
    seed: int = 3_000_000
    iterations: int = 6
    batch: int = 128
    budget: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, budget=1, noises=2, held_out=2, seed=0, iterations=0, batch=1)
        _ = self.gram

    @property
    def gram(self) -> GramConfig:
        """The configuration of the Gram matrix."""
        return GramConfig(self.levels, self.num, batch=min(self.batch, GRAM_BATCH), jacobian=True)

    @property
    def exact(self) -> TrajectoryConfig:
        """The configuration of the exact trajectories: of many evaluations with only the endpoints stored, within a budget of a few."""
        evaluations, storage = (REFERENCE_NFE, "float32") if self.budget is None else (self.levels, "float16")
        return TrajectoryConfig(self.noises + self.held_out, evaluations, seed=self.seed, batch=self.batch, dtype=storage)

    def within(self, model: Model, counts: Sequence[int]) -> OptimizeConfig:
        """Return the configuration for a model, with its numbers as small as the budget asks for.

        Raises:
            FewstepError: the budget is too small.
        """
        dim, usual, budget = math.prod(model.need_shape()), default_budget(model), self.budget
        if budget is None and usual == LARGE and replace(self, seed=0, batch=1) == OptimizeConfig(seed=0, batch=1):
            budget = usual
        if budget is None:
            return self
        batch, small = min(self.batch, max(1, TOGETHER // dim)), self
        for levels, iterations, least in BUDGETS:
            for noises in range(min(self.noises, 512), least - 1, -1):
                held_out = min(self.held_out, max(4, noises // 3))
                small = replace(self, levels=min(self.levels, levels), num=noises, noises=noises, held_out=held_out, budget=budget)
                small = replace(small, iterations=min(self.iterations, iterations), batch=batch)
                if small.evaluations(counts) <= budget:
                    return small
        raise FewstepError(
            f"a budget of {budget} network evaluations is too small for schedules of {', '.join(map(str, counts))} evaluations: the least "
            f"search takes {small.evaluations(counts)}"
        )

    def evaluations(self, counts: Sequence[int]) -> int:
        """Estimate the network evaluations of a search within a budget."""
        total = (self.noises + self.held_out) * self.levels + min(CHECKED, self.noises) * self.levels // 2
        for n in counts:
            refined = 2 if n <= MANY_STEPS else 1
            each = self.iterations * (n * (n - 1) // 2 + STEPS * (n - 1)) + (n - 1)
            total += CANDIDATES * min(RANKING, self.noises) * n + refined * (self.noises * each + min(RANKING, self.noises) * n)
            total += self.held_out * n * (3 + refined) + self.noises
        return total

    @property
    def fewest(self) -> int:
        """The fewest noises in any part of the work: as many processes can share it."""
        return min(self.noises, self.held_out, FEWEST)

    @property
    def ranking(self) -> int:
        """The noises that rank candidates, at most."""
        return FEWEST if self.budget is None else RANKING


def solver_folder(folder: Path, name: str) -> Path:
    """Return the folder of a solver's schedules."""
    return folder / re.sub("[:/=]", "_", name)


@checked
def optimize(
    model: Model,
    solver: str | Solver,
    nfe: int | Sequence[int],
    *,
    guidance: float | None = None,
    out: str | Path | None = None,
    config: OptimizeConfig | None = None,
    statistics: ModelStatistics | str | Path | None = None,
    device: torch.device | str | None = None,
    command: str = "",
    on_progress: Progress | None = None,
) -> dict[int, Sampler]:
    """Find the noise levels at which a solver should evaluate a model, for each number of evaluations.

    The card of each sampler has the errors on held-out noises: ``error`` and ``rmse`` of the schedule and of the best standard grid, and
    all ``candidates`` with their mean error on some calibration noises and their bound.

    Args:
        model: the model to sample.
        solver: a solver's name, or a `Solver`.
        nfe: network evaluations per sample, one number or several.
        guidance: the scale that the model will be sampled with; by default the model's own.
        out: a folder to save the samplers in (``out/SOLVER/nfe-NN``, with ``grids.json``), where a killed run continues after the last
            whole schedule, where other solvers share what is measured of the model, and where the processes of ``torchrun`` share the
            noises; by default they stay in memory.
        config: how to search.
        statistics: statistics for ``dpm-solver-v3`` by name, or their folder; by default those that the model carries.
        device: where to compute; the model is moved there.
        command: for the card.
        on_progress: called with the number of schedules done and a note.

    Returns:
        The samplers by their number of evaluations.

    Raises:
        SolverError: a solver that adds noise, or cannot use exactly that many evaluations.
        GridError: more steps than cells between the levels.
        ModelError: something that is no `Model`, or a model without a shape.
        ArtifactError: the folder is in use, holds the work of another model or configuration, or cannot be written.
        FewstepError: no number of evaluations, or more processes than noises.

    Example:
        >>> import fewstep
        >>> model = fewstep.load_model("digits-edm")
        >>> config = fewstep.OptimizeConfig(levels=16, num=8, noises=16, held_out=16, iterations=1)
        >>> samplers = fewstep.optimize(model, "unipc-2", nfe=4, config=config)
        >>> samplers[4]
        Sampler(unipc-2, 4 evaluations, noise levels 80 to 0.002)
    """
    config, counts = config_of(config, OptimizeConfig), sorted(wholes(nfe, "nfe", SolverError))
    check_model(model)
    guidance = scale_of(guidance, model.default_guidance)
    if not counts:
        raise FewstepError("name at least one number of evaluations, as in nfe=[6, 8]")
    if isinstance(solver, str):
        name, solver = solver, solver_for(solver, model, guidance=guidance, statistics=statistics)
    elif not isinstance(solver, Solver):
        raise SolverError(f"solver is one name or Solver, as 'unipc-2' or fewstep.make_solver('unipc-2'), got {solver!r}")
    else:
        name = name_of(solver)
        if statistics is not None:
            raise SolverError(f"a {type(solver).__name__} has its statistics already: leave statistics out")
    config = config.within(model, counts)
    steps = {n: solver.steps_on(model.schedule, n) for n in counts}
    check_deterministic(tabulate(solver, solver.nodes(TimeGrid.uniform(model.schedule, PROBE), model.schedule)), name)
    most, cells = max(steps.values()), fine_grid(model.schedule, config.levels).steps
    if most > cells:
        raise GridError(f"{most} steps need at least as many cells between levels; {model.name} has {cells}: ask for more levels")
    if process()[1] > config.fewest:
        raise FewstepError(f"{process()[1]} processes cannot share {config.fewest} noises: use fewer processes")
    with Job.open("optimize", out, device=device or model.device, on_progress=on_progress, command=command) as job:
        problem = Problem(model, guidance, job.device)
        gram = None
        if config.budget is None:
            measuring = replace(job, on_progress=lambda done, note: job.on_progress(0, f"{done} of {config.num} trajectories"))
            gram = collect_gram(problem, config.gram, measuring)
        levels, asked = TimeGrid(problem.schedule.ends), replace(config.exact, guidance=guidance)
        if gram is None:
            levels = fine_grid(problem.schedule, config.levels)
            asked = replace(asked, nfe=levels.steps)
        with job.below("exact", lambda done, note: job.on_progress(0, f"{done} of {config.exact.num} exact endpoints")) as part:
            exact = trajectories_of(problem, levels, asked, part, checked=None if gram is not None else CHECKED)
        gram = stored_gram(exact, range(config.noises), config.batch) if gram is None else gram
        search, place = _Search(problem, gram, exact, config, most), solver_folder(job.folder, name)
        made: dict[int, Sampler] = {}
        for done, n in enumerate(counts):
            job.on_progress(done, f"{name}, {n} evaluations")
            made[n] = search.stored(name, solver, n, place / f"nfe-{n:02d}", made, job)
            if job.rank == 0:
                table = _table(problem, name, made, place, job.command)
                table.save(place)
                write_whole(place / "README.md", _card(table, name).encode())
        job.on_progress(len(counts), "")
        return made


def name_of(solver: Solver) -> str:
    """Return the name that tables and folders give a solver: that of the registry with its options, else that of its class."""
    values = {one.name: getattr(solver, one.name) for one in fields(solver)} if is_dataclass(solver) else {}
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return spec_of(type(solver).__name__, options) or type(solver).__name__


def collected_gram(problem: Problem, config: OptimizeConfig, folder: Path) -> Gram:
    """Read the Gram matrix that `optimize` left in its folder, for a configuration that is `OptimizeConfig.within` its budget.

    Raises:
        ArtifactError: it is not there, or of another model or configuration.
    """
    if config.budget is not None:
        return stored_gram(Trajectories.load(folder / "exact"), range(config.noises), config.batch)
    return gram_store(problem, config.gram, folder).total(len(config.gram.batches))


class _Search:
    """The part of the search that all schedules of one model share."""

    def __init__(self, problem: Problem, gram: Gram, exact: Trajectories, config: OptimizeConfig, most: int) -> None:
        self.problem, self.config, self.gram = problem, config, gram
        self.denoiser, self.schedule = problem.teacher, problem.schedule
        self.exact, self.bound = exact, Bound(gram)
        self.levels = fine_grid(self.schedule, config.levels)
        self.programs = from_first(self._programs(most) if process()[0] == 0 else {})
        self.evaluations = 0

    def _programs(self, most: int) -> dict[str, dict[int, list[int]]]:
        """Return the optima of the dynamic programs."""
        found, totals = dict[str, dict[int, list[int]]](), tuple[Literal["sum", "squares"], ...](("sum", "squares"))
        for amplification, total in product(("plain", "trace") if self.config.budget is None else ("plain",), totals):
            bound = Bound(self.gram, amplification, total)
            found[f"first-order program ({amplification}, {total})"] = bound.best(most)
            found[f"pair program ({amplification}, {total})"] = bound.best_pairs(most)
        return found

    def stored(self, name: str, solver: Solver, nfe: int, place: Path, others: Mapping[int, Sampler], job: Job) -> Sampler:
        """Return the schedule for ``nfe`` evaluations, from its folder if it is there."""
        rebuilt = Sampler.build(solver, self.levels, self.schedule)  # for its options
        config = {key: value for key, value in asdict(self.config).items() if key != "batch"}  # which changes rounding alone
        about = (self.problem.fingerprint, self.problem.guidance, name, sorted(rebuilt.options.items()), nfe, config)
        identity = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
        if from_first(job.rank == 0 and (place / "sampler.json").exists()):
            sampler = Sampler.load(place)
            if sampler.card.get("identity") != identity:
                raise ArtifactError(f"{place} holds a schedule of another model, solver or configuration: remove it, or use another folder")
            facts_of(sampler.card, _Drawn, place)
            return sampler
        grid, card, candidates = self.find(solver, nfe, others)
        card = {
            "name": name,
            **self.problem.card(),
            "identity": identity,
            **card,
            "candidates": {key: list(value) for key, value in candidates.items()},
            "command": job.command,
        }
        sampler = Sampler.build(solver, grid, self.schedule, card=card)
        if job.rank == 0:
            sampler.save(place)
        return sampler

    def find(
        self, solver: Solver, nfe: int, others: Mapping[int, Sampler]
    ) -> tuple[TimeGrid, dict[str, Any], dict[str, tuple[float, float | None]]]:
        """Rank candidates, refine the best and choose on held-out noises: the grid, facts for the card, and error and bound of each."""
        steps = solver.steps_on(self.schedule, nfe)
        count = max(min(FEWEST, self.config.noises), min(self.config.noises, EVALUATIONS // nfe))
        fit, few, check = (
            range(count),
            range(min(self.config.ranking, count)),
            range(self.config.noises, self.config.noises + self.config.held_out),
        )
        self.evaluations, grids = 0, self.candidates(steps, others)
        measured = {name: mean_over_processes(self.errors(solver, few, grid)) for name, grid in grids.items()}
        ranked = sorted(measured, key=measured.__getitem__)
        standards = [name for name in ranked if name in GRIDS][:2]
        finalists = {name: grids[name] for name in (ranked[0], *standards)}
        different = {tuple(grids[name].t.tolist()): name for name in reversed(ranked)}  # the dynamic programs often agree
        batches = list(self._batches(solver, fit))
        for name in sorted(different.values(), key=ranked.index)[: 2 if nfe <= MANY_STEPS else 1]:
            grid = finalists[f"{name}, refined"] = refine(batches, grids[name], iterations=self.config.iterations)
            measured[f"{name}, refined"] = mean_over_processes(self.errors(solver, few, grid))
        self.evaluations += sum(batch.evaluations for batch in batches)
        held = {name: self.errors(solver, check, grid) for name, grid in finalists.items()}
        error = {name: mean_over_processes(of) for name, of in held.items()}
        rmse = {name: mean_over_processes(of.square()) ** 0.5 for name, of in held.items()}
        standard = min(standards, key=rmse.__getitem__)
        chosen = min((name for name in finalists if rmse[name] <= rmse[standard]), key=error.__getitem__)
        card = {
            "chosen": chosen,
            "best_standard_grid": standard,
            "error": [error[name] for name in (chosen, standard)],
            "rmse": [rmse[name] for name in (chosen, standard)],
            "calibration_noises": count,
            "held_out_noises": self.config.held_out,
            "network_evaluations": int(sum_over_processes(torch.tensor(self.evaluations))),
        }
        bounds = {name: self.bound_of(grid) for name, grid in {**grids, **finalists}.items()}
        return finalists[chosen], card, {name: (measured[name], bounds[name]) for name in measured}

    def candidates(self, steps: int, others: Mapping[int, Sampler]) -> dict[str, TimeGrid]:
        """Return standard grids, the optima of the dynamic programs, and stretched schedules of neighbouring numbers of steps."""
        found = standard_grids(self.schedule, steps)
        for name, best in self.programs.items():
            found[name] = TimeGrid(self.levels.t[best[steps]])
        near = [made.grid for made in others.values() if abs(made.grid.steps - steps) <= 2 and made.grid.steps > 1]
        for grid in near:
            with suppress(GridError):  # an infinite end, or too fine for a discrete schedule
                found[f"that of {grid.steps} steps, stretched"] = grid.stretched(self.schedule, steps)
        if not any(name in GRIDS for name in found):
            raise SolverError(f"no standard grid of {self.problem.name} has {steps} steps: ask for fewer")
        return found

    def bound_of(self, grid: TimeGrid) -> float | None:
        """Return the error bound of a grid, moved to the nearest levels of the Gram matrix; None if two times fall on one."""
        lam, levels = (self.schedule.lam(g.t).clamp(-20, 20) for g in (grid, self.levels))
        index: list[int] = (lam[:, None] - levels).abs().argmin(1).tolist()
        ordered = all(a < b for a, b in zip(index[:-1], index[1:], strict=True))
        return self.bound(index) if ordered and index[0] == 0 and index[-1] == self.gram.cells else None

    def errors(self, solver: Solver, rows: range, grid: TimeGrid) -> Tensor:
        """Return the errors of this process's samples on a grid, ``[n]``; one batch at a time is in memory."""
        found = []
        for batch in self._batches(solver, rows):
            found.append(per_sample_rmse(batch.residual(grid)[0]))
            self.evaluations += batch.evaluations
        return torch.cat(found)

    def _batches(self, solver: Solver, rows: range) -> Iterator[SolverEndpointError]:
        for batch in stored_batches(self.exact, rows, self.exact.t[[0, -1]], self.config.batch, self.problem.device):
            yield SolverEndpointError(self.denoiser, solver, batch.state(0), batch.state(1), batch.cond)


@dataclass(frozen=True)
class _Facts:
    """The facts of a schedule's card that the table of its solver shows."""

    chosen: str
    best_standard_grid: str
    error: tuple[Number, Number]
    rmse: tuple[Number, Number]
    calibration_noises: Count
    held_out_noises: Count


@dataclass(frozen=True)
class _Drawn(_Facts):
    """Facts of a schedule's card that are drawn too: error and bound of each candidate."""

    candidates: dict[str, tuple[Number, Number | None]]


@dataclass(frozen=True)
class _Row(_Facts):
    """A row of the table."""

    solver: str
    nfe: Count


@dataclass(frozen=True)
class _Rows:
    """The facts of a table's card that stay when schedules are added."""

    rows: list[_Row]


def _table(problem: Problem, name: str, made: Mapping[int, Sampler], folder: Path, command: str) -> GridTable:
    """Return the table of the grids made now and of those that were there for other numbers of evaluations."""
    old = GridTable.load(folder) if (folder / "grids.json").exists() else None
    if old is not None and (old.model, old.guidance) != (problem.fingerprint, problem.guidance):
        old = None  # its samplers were refused before, or are gone
    grids = dict({} if old is None else old.grids) | {n: one.grid for n, one in made.items()}
    if old is not None:
        facts_of(old.card, _Rows, folder / "grids.json")
    rows = {row["nfe"]: row for row in (() if old is None else old.card["rows"])}
    rows |= {n: {"solver": name, "nfe": n, **{fact.name: one.card[fact.name] for fact in fields(_Facts)}} for n, one in made.items()}
    card = {"of": problem.name, "rows": [rows[n] for n in sorted(rows)], "command": command}
    return GridTable(name, problem.fingerprint, problem.guidance, problem.schedule, grids, card)


def _card(table: GridTable, name: str) -> str:
    card = table.card
    rows = []
    for row in card["rows"]:
        ours, theirs = (f"{error:.4f} ({rmse:.4f})" for error, rmse in zip(row["error"], row["rmse"], strict=True))
        rows.append(f"| {row['nfe']} | {ours} | {theirs} `{row['best_standard_grid']}` | {row['chosen']} |")
    table_rows = "\n".join(rows)
    made_by = f" Made by\n\n```\n{card['command']}\n```" if card["command"] else ""
    return f"""# Optimized schedules: {name} on {card["of"]}

For the model with fingerprint {table.model} at guidance {table.guidance:g}.{made_by}

| evaluations | error | of the best standard grid | from |
|---|---|---|---|
{table_rows}

Mean over samples of each one's error to the endpoint of its exact trajectory (in brackets the RMSE of all), on held-out noises.
`grids.json` holds them all; each folder `nfe-NN` is a sampler:

```python
import fewstep

sampler = fewstep.Sampler.load("nfe-05")
```
"""
