"""Phase 1 whole: from a model and a solver to its optimised schedules, as `Sampler` artifacts and one `GridTable`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.core.grid import GRIDS, TimeGrid, make_grid
from fewstep.core.prediction import prediction
from fewstep.core.tableau import Solver
from fewstep.learn.search.bound import Bound
from fewstep.learn.search.endpoint import sizes
from fewstep.learn.search.refine import EndError, refine
from fewstep.learn.teacher.gram import Gram, GramConfig, collect_gram, fine_grid
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, generate_trajectories
from fewstep.models.formats.folders import Model
from fewstep.runtime.artifact import check_writable, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError, GridError, SolverError
from fewstep.sampling.grid_table import GridTable
from fewstep.sampling.reference import REFERENCE_NFE
from fewstep.sampling.sampler import Sampler

__all__ = ["Optimized", "OptimizeConfig", "optimize", "solver_folder"]

EVALUATIONS = 1920  # network evaluations of one calibration run, about: fewer noises for more steps
FEWEST = 64  # noises, though; as many rank the candidates
MANY_STEPS = 8  # beyond them only the best candidate is refined, not the two best


@dataclass(frozen=True)
class OptimizeConfig:
    """How to look for schedules.

    Args:
        levels, num: of the Gram matrix, see `GramConfig`.
        noises: at most as many calibrate a schedule, fewer for many steps.
        held_out: others decide between the schedules found.
        seed: of the first of these; far from those that benchmarks start with.
        iterations: of the refinement, at most.

    Raises:
        FewstepError: a number out of range.
    """

    levels: int = 128
    num: int = 256
    noises: int = 256
    held_out: int = 1024
    seed: int = 3_000_000
    iterations: int = 6

    def __post_init__(self) -> None:
        if min(self.noises, self.held_out) < 2 or self.seed < 0 or self.iterations < 0:
            raise FewstepError(f"optimisation needs at least 2 noises, 2 held out, and no negative number, got {self}")
        _ = self.gram

    @property
    def gram(self) -> GramConfig:
        """That of the Gram matrix."""
        return GramConfig(self.levels, self.num, jacobian=True)

    @property
    def exact(self) -> TrajectoryConfig:
        """That of the exact ends of the noises."""
        return TrajectoryConfig(self.noises + self.held_out, REFERENCE_NFE, seed=self.seed, batch=128)


@dataclass(frozen=True)
class Optimized:
    """One optimised schedule: its sampler, and the candidates it came from.

    Attributes:
        candidates: mean error on some calibration noises and the bound (None where there is none) of every schedule tried, by name.
    """

    sampler: Sampler
    candidates: Mapping[str, tuple[float, float | None]]


def solver_folder(folder: Path, name: str) -> Path:
    """Where the schedules of a solver lie."""
    return folder / re.sub("[:/=]", "_", name)


def optimize(
    model: Model,
    solvers: Mapping[str, Solver],
    nfe: Sequence[int],
    config: OptimizeConfig,
    folder: str | Path,
    *,
    guidance: float = 1.0,
    device: torch.device | None = None,
    command: str = "",
    observe: Callable[[int, str], None] | None = None,
) -> tuple[Gram, dict[str, dict[int, Optimized]]]:
    """The best schedules found for each solver and number of evaluations, kept in ``folder``.

    One pass over teacher trajectories serves them all. Each solver has a folder with ``grids.json`` and one `Sampler` per ``nfe``; a
    killed run continues after the last whole schedule.

    Args:
        solvers: by the names that they are kept under.
        observe: called with the number of schedules done and a note.

    Raises:
        SolverError: a solver that adds noise, or cannot use exactly that many evaluations.
        GridError: more steps than cells between the levels.
        ArtifactError: the folder holds the work of another model or configuration, or cannot be written.
    """
    folder, device, say = Path(folder), device or torch.device("cpu"), observe or (lambda done, note: None)
    check_writable(folder)
    if not solvers or not nfe:
        raise FewstepError("name at least one solver and one number of evaluations")
    schedule = model.denoiser.schedule
    steps = {name: {n: solver.steps_on(schedule, n) for n in sorted(set(nfe))} for name, solver in solvers.items()}
    most = max(n for of in steps.values() for n in of.values())
    cells = fine_grid(schedule, config.levels).steps
    if most > cells:
        raise GridError(f"{most} steps need at least as many cells between levels; {model.name} has {cells}: ask for more levels")
    gram = collect_gram(
        model,
        config.gram,
        folder,
        guidance=guidance,
        device=device,
        observe=lambda done, note: say(0, f"{done} of {config.num} trajectories"),
    )
    ends = TimeGrid(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    exact = generate_trajectories(
        model,
        ends,
        TrajectoryConfig(**{**asdict(config.exact), "guidance": guidance}),
        folder / "exact",
        device=device,
        command=command,
        observe=lambda done, note: say(0, f"{done} of {config.exact.num} exact ends"),
    )
    if gram is None or exact is None:
        raise FewstepError("schedules are optimised by one process: start it without torchrun")
    search = _Search(model, gram, exact, config, guidance, device, most)
    made: dict[str, dict[int, Optimized]] = {}
    done = 0
    for name, solver in solvers.items():
        made[name] = {}
        for n in steps[name]:
            say(done, f"{name}, {n} evaluations")
            made[name][n] = search.kept(name, solver, n, folder, made[name], command)
            table = _table(model, name, guidance, made[name], solver_folder(folder, name), command)
            table.save(solver_folder(folder, name))
            write_whole(solver_folder(folder, name) / "README.md", _card(table, name).encode())
            done += 1
    say(done, "")
    return gram, made


class _Search:
    """What all schedules of one model share."""

    def __init__(
        self, model: Model, gram: Gram, exact: Trajectories, config: OptimizeConfig, guidance: float, device: torch.device, most: int
    ) -> None:
        self.model, self.config, self.device, self.gram = model, config, device, gram
        self.denoiser, self.schedule, self.guidance = model.guided(guidance), model.denoiser.schedule, guidance
        self.exact, self.bound = exact, Bound(gram)
        self.levels = fine_grid(self.schedule, config.levels)
        self.programmes: dict[str, dict[int, list[int]]] = {}
        totals: tuple[Literal["sum", "squares"], ...] = ("sum", "squares")
        for amplification, total in product(("plain", "trace"), totals):
            bound = Bound(gram, amplification, total)
            self.programmes[f"first-order programme ({amplification}, {total})"] = bound.best(most)
            self.programmes[f"pair programme ({amplification}, {total})"] = bound.best_pairs(most)

    def kept(self, name: str, solver: Solver, nfe: int, folder: Path, others: Mapping[int, Optimized], command: str) -> Optimized:
        """The schedule for ``nfe`` evaluations, from the folder if it is there."""
        place = solver_folder(folder, name) / f"nfe-{nfe:02d}"
        rebuilt = Sampler.build(solver, self.levels, self.schedule)  # for its options
        about = (self.model.fingerprint, self.guidance, name, sorted(rebuilt.options.items()), nfe, asdict(self.config))
        identity = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
        if (place / "sampler.json").exists():
            sampler = Sampler.load(place)
            if sampler.card.get("identity") != identity:
                raise ArtifactError(f"{place} holds a schedule of another model, solver or configuration: remove it, or use another folder")
            return Optimized(sampler, {key: tuple(value) for key, value in sampler.card["candidates"].items()})
        grid, card, candidates = self.find(solver, nfe, others)
        card = {
            "name": name,
            "of": self.model.name,
            "model": self.model.fingerprint,
            "prediction": prediction(self.model.denoiser.prediction).name,
            "guidance": self.guidance,
            "identity": identity,
            **card,
            "candidates": {key: list(value) for key, value in candidates.items()},
            "command": command,
        }
        sampler = Sampler.build(solver, grid, self.schedule, **card)
        sampler.save(place)
        return Optimized(sampler, candidates)

    def find(
        self, solver: Solver, nfe: int, others: Mapping[int, Optimized]
    ) -> tuple[TimeGrid, dict[str, Any], dict[str, tuple[float, float | None]]]:
        """Candidates, refinement of the best, and the choice on held-out noises."""
        steps = solver.steps_on(self.schedule, nfe)
        count = max(min(FEWEST, self.config.noises), min(self.config.noises, EVALUATIONS // nfe))
        fit, check = self._error(solver, range(count)), self._error(solver, range(self.config.noises, len(self.exact)))
        grids = self.candidates(steps, others)
        few = fit.first(FEWEST)
        measured = {name: few.typical(grid) for name, grid in grids.items()}
        ranked = sorted(measured, key=measured.__getitem__)
        standards = [name for name in ranked if name in GRIDS][:2]
        finalists = {name: grids[name] for name in (ranked[0], *standards)}
        different = {tuple(grids[name].t.tolist()): name for name in reversed(ranked)}  # programmes often agree
        for name in sorted(different.values(), key=ranked.index)[: 2 if nfe <= MANY_STEPS else 1]:
            finalists[f"{name}, refined"] = refine(fit, grids[name], iterations=self.config.iterations)
            measured[f"{name}, refined"] = few.typical(finalists[f"{name}, refined"])
        held = {name: sizes(check.residual(grid)[0]) for name, grid in finalists.items()}
        error = {name: float(of.mean()) for name, of in held.items()}
        rmse = {name: float(of.square().mean().sqrt()) for name, of in held.items()}
        standard = min(standards, key=rmse.__getitem__)
        chosen = min((name for name in finalists if rmse[name] <= rmse[standard]), key=error.__getitem__)
        card = {
            "chosen": chosen,
            "best_standard_grid": standard,
            "error": [error[name] for name in (chosen, standard)],
            "rmse": [rmse[name] for name in (chosen, standard)],
            "calibration_noises": count,
            "held_out_noises": self.config.held_out,
            "network_evaluations": fit.evaluations + few.evaluations + check.evaluations,
        }
        bounds = {name: self.bound_of(grid) for name, grid in {**grids, **finalists}.items()}
        return finalists[chosen], card, {name: (measured[name], bounds[name]) for name in measured}

    def candidates(self, steps: int, others: Mapping[int, Optimized]) -> dict[str, TimeGrid]:
        """Standard grids, the optima of the programmes, and the schedule found for a neighbouring number of steps, stretched."""
        found: dict[str, TimeGrid] = {}
        for name in GRIDS:
            try:
                grid = make_grid(name, self.schedule, steps)
            except GridError:  # not for this schedule, or too fine for a discrete one
                continue
            if (float(grid.t[0]), float(grid.t[-1])) == (self.schedule.t_max, self.schedule.t_min):  # leading starts elsewhere
                found[name] = grid
        for name, best in self.programmes.items():
            found[name] = TimeGrid(self.levels.t[best[steps]])
        near = [made.sampler.grid for made in others.values() if abs(made.sampler.grid.steps - steps) <= 2 and made.sampler.grid.steps > 1]
        for grid in near:
            with suppress(GridError):  # an infinite end, or too fine for a discrete schedule
                found[f"that of {grid.steps} steps, stretched"] = grid.stretched(self.schedule, steps)
        if not any(name in GRIDS for name in found):
            raise SolverError(f"no standard grid of {self.model.name} has {steps} steps: ask for fewer")
        return found

    def bound_of(self, grid: TimeGrid) -> float | None:
        """The error bound of a grid, moved to the nearest levels of the Gram matrix; None if two times fall on one."""
        lam, levels = (self.schedule.lam(g.t).clamp(-20, 20) for g in (grid, self.levels))
        index: list[int] = (lam[:, None] - levels).abs().argmin(1).tolist()
        ordered = all(a < b for a, b in zip(index[:-1], index[1:], strict=True))
        return self.bound(index) if ordered and index[0] == 0 and index[-1] == self.gram.cells else None

    def _error(self, solver: Solver, which: range) -> EndError:
        states, labels = self.exact.states(list(which)), self.exact.labels(list(which))
        cond = None if labels is None else labels.to(self.device)
        x, end = (states[:, k].to(self.device) for k in (0, -1))
        return EndError(self.denoiser, solver, x, end, cond)


def _table(model: Model, name: str, guidance: float, made: Mapping[int, Optimized], folder: Path, command: str) -> GridTable:
    """The grids made now, beside those of other numbers of evaluations that were there."""
    shown = ("chosen", "best_standard_grid", "error", "rmse", "calibration_noises", "held_out_noises")
    old = GridTable.load(folder) if (folder / "grids.json").exists() else None
    if old is not None and (old.model, old.guidance) != (model.fingerprint, guidance):
        old = None  # its samplers were refused before, or are gone
    grids = dict({} if old is None else old.grids) | {n: one.sampler.grid for n, one in made.items()}
    rows = {row["nfe"]: row for row in (() if old is None else old.card["rows"])}
    rows |= {n: {"solver": name, "nfe": n, **{key: one.sampler.card[key] for key in shown}} for n, one in made.items()}
    card = {"of": model.name, "rows": [rows[n] for n in sorted(rows)], "command": command}
    return GridTable(name, model.fingerprint, guidance, model.denoiser.schedule, grids, card)


def _card(table: GridTable, name: str) -> str:
    card = table.card
    rows = []
    for row in card["rows"]:
        ours, theirs = (f"{error:.4f} ({rmse:.4f})" for error, rmse in zip(row["error"], row["rmse"], strict=True))
        rows.append(f"| {row['nfe']} | {ours} | {theirs} `{row['best_standard_grid']}` | {row['chosen']} |")
    table_rows = "\n".join(rows)
    return f"""# Optimized schedules: {name} on {card["of"]}

For the model with fingerprint {table.model} at guidance {table.guidance:g}. Made by

```
{card["command"]}
```

| evaluations | error | of the best standard grid | from |
|---|---|---|---|
{table_rows}

Mean over samples of each one's error to the end of its exact trajectory (in brackets the RMSE of all), on noises that the schedules were
not fitted to. `grids.json` holds them all; each folder `nfe-NN` is a sampler:

```python
import fewstep

sampler = fewstep.Sampler.load("nfe-05")
```
"""
