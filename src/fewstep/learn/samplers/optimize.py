"""Optimise the schedule of a solver for a model: one sampler for each number of evaluations, and a table of their grids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.spacings import GRIDS, standard_grids
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Solver, tabulate
from fewstep.learn.samplers.fit_plan import CHECKED
from fewstep.learn.samplers.optimize_plan import OptimizeConfig, OptimizePlan, plan_of
from fewstep.learn.search.bound import Bound
from fewstep.learn.search.endpoint import mean_over_processes, per_sample_rmse
from fewstep.learn.search.refine import SolverEndpointError, check_deterministic, refine
from fewstep.learn.teacher.batches import stored_batches, stored_gram
from fewstep.learn.teacher.gram import Gram, collect_gram, fine_grid, gram_store
from fewstep.learn.teacher.trajectories import Trajectories, trajectories_of
from fewstep.models.generate import solver_for
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_model
from fewstep.runtime.artifact import Count, Number, facts_of, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError, GridError, SolverError, counted
from fewstep.runtime.front_door import checked, config_of, scale_of, wholes
from fewstep.runtime.job import Job, Progress
from fewstep.runtime.process import from_first, process, sum_over_processes
from fewstep.sampling.grid_table import GridTable
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import spec_of

__all__ = ["OptimizeConfig", "collected_gram", "name_of", "optimize", "solver_folder"]

PROBE = 4  # steps on which a solver shows whether it adds noise


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

    Examples:
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
    plan = plan_of(config, model, counts)
    steps = {n: solver.steps_on(model.schedule, n) for n in counts}
    check_deterministic(tabulate(solver, solver.nodes(TimeGrid.uniform(model.schedule, PROBE), model.schedule)), name)
    most, cells = max(steps.values()), fine_grid(model.schedule, plan.levels).steps
    if most > cells:
        raise GridError(f"{most} steps need at least as many cells between levels; {model.name} has {cells}: ask for more levels")
    if process()[1] > plan.fewest:
        raise FewstepError(f"{process()[1]} processes cannot share {plan.fewest} noises: use fewer processes")
    with Job.open("optimize", out, device=device or model.device, on_progress=on_progress, command=command) as job:
        problem = Problem(model, guidance, job.device)
        gram, exact = _measured(problem, plan, job)
        search, place = _Search(problem, gram, exact, plan, most), solver_folder(job.folder, name)
        made: dict[int, Sampler] = {}
        for done, n in enumerate(counts):
            job.on_progress(done, f"{name}, {counted(n, 'evaluation')}")
            made[n] = search.stored(name, solver, n, place / f"nfe-{n:02d}", made, job)
            if job.rank == 0:
                table = _table(problem, name, made, place, job.command)
                table.save(place)
                write_whole(place / "README.md", _card(table, name).encode())
        job.on_progress(len(counts), "")
        return made


def _measured(problem: Problem, plan: OptimizePlan, job: Job) -> tuple[Gram, Trajectories]:
    """Return the Gram matrix of the bound, and exact trajectories; of a small plan the matrix is along those."""
    gram, levels, asked = None, TimeGrid(problem.schedule.ends), replace(plan.exact, guidance=problem.guidance)
    if plan.small:
        levels = fine_grid(problem.schedule, plan.levels)
        asked = replace(asked, nfe=levels.steps)
    else:
        measuring = replace(job, on_progress=lambda done, note: job.on_progress(0, f"{done} of {plan.gram.num} trajectories"))
        gram = collect_gram(problem, plan.gram, measuring)
    with job.below("exact", lambda done, note: job.on_progress(0, f"{done} of {asked.num} exact endpoints")) as part:
        exact = trajectories_of(problem, levels, asked, part, checked=CHECKED if plan.small else None)
    return (_along(exact, plan) if gram is None else gram), exact


def _along(exact: Trajectories, plan: OptimizePlan) -> Gram:
    return stored_gram(exact, range(plan.noises), plan.batch)


def name_of(solver: Solver) -> str:
    """Return the name that tables and folders give a solver: that of the registry with its options, else that of its class."""
    values = {one.name: getattr(solver, one.name) for one in fields(solver)} if is_dataclass(solver) else {}
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return spec_of(type(solver).__name__, options) or type(solver).__name__


def collected_gram(problem: Problem, config: OptimizeConfig, counts: Sequence[int], folder: Path) -> Gram:
    """Read the Gram matrix that `optimize` left in its folder, or make it anew of the trajectories there.

    Raises:
        ArtifactError: it is not there, or of another model or configuration.
    """
    plan = plan_of(config, problem.model, counts)
    if plan.small:
        return _along(Trajectories.load(folder / "exact"), plan)
    return gram_store(problem, plan.gram, folder).total(len(plan.gram.batches))


class _Search:
    """The part of the search that all schedules of one model share."""

    def __init__(self, problem: Problem, gram: Gram, exact: Trajectories, plan: OptimizePlan, most: int) -> None:
        self.problem, self.plan, self.gram = problem, plan, gram
        self.denoiser, self.schedule = problem.teacher, problem.schedule
        self.exact, self.bound = exact, Bound(gram)
        self.levels = fine_grid(self.schedule, plan.levels)
        self.programs = from_first(self._programs(most) if process()[0] == 0 else {})
        self.evaluations = 0

    def _programs(self, most: int) -> dict[str, dict[int, list[int]]]:
        """Return the optima of the dynamic programs."""
        found, totals = dict[str, dict[int, list[int]]](), tuple[Literal["sum", "squares"], ...](("sum", "squares"))
        for amplification, total in product(("plain",) if self.plan.small else ("plain", "trace"), totals):
            bound = Bound(self.gram, amplification, total)
            found[f"first-order program ({amplification}, {total})"] = bound.best(most)
            found[f"pair program ({amplification}, {total})"] = bound.best_pairs(most)
        return found

    def stored(self, name: str, solver: Solver, nfe: int, place: Path, others: Mapping[int, Sampler], job: Job) -> Sampler:
        """Return the schedule for ``nfe`` evaluations, from its folder if it is there."""
        rebuilt = Sampler.build(solver, self.levels, self.schedule)  # for its options
        config = {key: value for key, value in asdict(self.plan.config).items() if key != "batch"}  # which changes rounding alone
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
        plan, count = self.plan, self.plan.calibrating(nfe)
        fit, few, check = range(count), range(min(plan.ranking, count)), range(plan.noises, plan.noises + plan.held_out)
        self.evaluations, grids = 0, self.candidates(steps, others)
        measured = {name: mean_over_processes(self.errors(solver, few, grid)) for name, grid in grids.items()}
        ranked = sorted(measured, key=measured.__getitem__)
        standards = [name for name in ranked if name in GRIDS][:2]
        finalists = {name: grids[name] for name in (ranked[0], *standards)}
        different = {tuple(grids[name].t.tolist()): name for name in reversed(ranked)}  # the dynamic programs often agree
        batches = list(self._batches(solver, fit))
        for name in sorted(different.values(), key=ranked.index)[: plan.refined(nfe)]:
            grid = finalists[f"{name}, refined"] = refine(batches, grids[name], iterations=plan.iterations)
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
            "held_out_noises": plan.held_out,
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
        for batch in stored_batches(self.exact, rows, self.exact.t[[0, -1]], self.plan.batch, self.problem.device):
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

For the model with fingerprint {table.model} at guidance {table.scale}.{made_by}

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
