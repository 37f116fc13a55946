"""Fit samplers to a model: one for each number of evaluations."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from fewstep.core.grid import TimeGrid
from fewstep.learn.samplers.fit_plan import CHECKED, TIMED, Effort, FitConfig, FitPlan, default_budget, plan_of
from fewstep.learn.samplers.fit_search import FitSearch, SearchResult, best_hand_made
from fewstep.learn.search.foresee import LEAST
from fewstep.learn.teacher.gram import fine_grid
from fewstep.learn.teacher.trajectories import Trajectories, trajectories_of
from fewstep.models.carried import FITTED
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_model
from fewstep.runtime.artifact import Count, Number, Record, Whole, facts_of, read_record, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError, SolverError, counted
from fewstep.runtime.front_door import check_size, checked, config_of, scale_of, wholes
from fewstep.runtime.job import Job, Progress
from fewstep.runtime.process import from_first, process, wait_for_all
from fewstep.sampling.sampler import Sampler

__all__ = ["FitConfig", "FitPlan", "fit", "nfe_folder", "plan_fit", "seconds_per_evaluation"]


def nfe_folder(folder: Path, nfe: int) -> Path:
    """Return where the sampler with ``nfe`` evaluations lies."""
    return folder / f"nfe-{nfe:02d}"


@checked
def fit(
    model: Model,
    nfe: int | Sequence[int],
    *,
    guidance: float | None = None,
    out: str | Path | None = None,
    config: FitConfig | None = None,
    trajectories: Trajectories | None = None,
    device: torch.device | str | None = None,
    command: str = "",
    on_progress: Progress | None = None,
    on_plan: Callable[[FitPlan, float], None] | None = None,
) -> dict[int, Sampler]:
    """Fit one sampler to a model for each number of evaluations.

    One set of teacher trajectories serves all samplers. Where a hand-made solver is better on the held-out noises, the sampler is that one,
    and its card says so. The card has the errors on held-out noises: ``error`` and ``rmse`` of the sampler and of the best hand-made one,
    and all ``stages``.

    Args:
        model: the model to fit to.
        nfe: network evaluations per sample, one number or several.
        guidance: the scale that the model will be sampled with; by default the model's own.
        out: a folder to save the samplers in (``out/nfe-NN``), where a killed run continues after the last whole sampler, and where the
            processes of ``torchrun`` share the noises; by default they stay in memory.
        config: how to fit.
        trajectories: stored ones to fit to, at least ``num + held_out``; by default they are made.
        device: where to compute; the model is moved there.
        command: for the card.
        on_progress: called with the number of samplers done and a note.
        on_plan: called before the work begins, in the first process, with its plan and the seconds that one network evaluation takes.

    Returns:
        The samplers by their number of evaluations.

    Raises:
        SolverError: fewer than one evaluation, or more than there are cells between levels.
        ModelError: something that is no `Model`, or a model without a shape.
        ArtifactError: the folder is in use, holds the work of another model or configuration, or cannot be written; trajectories of
            another model.
        FewstepError: more processes than noises, or too few trajectories.

    Examples:
        >>> import fewstep
        >>> model = fewstep.load_model("digits-edm")
        >>> samplers = fewstep.fit(model, nfe=3, config=fewstep.FitConfig(num=32, held_out=16, iterations=0))
        >>> samplers[3]
        Sampler(fitted, 3 evaluations, noise levels 80 to 0.002)
    """
    config, counts = config_of(config, FitConfig), sorted(wholes(nfe, "nfe", SolverError))
    check_model(model)
    if on_plan is not None and not callable(on_plan):
        raise FewstepError(f"on_plan is a function of a plan and the seconds of one evaluation, got {on_plan!r}")
    guidance = scale_of(guidance, model.default_guidance)
    if not isinstance(trajectories, Trajectories | None):
        raise FewstepError(
            f"trajectories are those of fewstep.generate_trajectories, got {trajectories!r}: Trajectories.load reads a folder"
        )
    plan = plan_fit(model, counts, config, trajectories=trajectories)
    with Job.open("fit", out, device=device or model.device, on_progress=on_progress, command=command) as job:
        problem = Problem(model, guidance, job.device)
        identity = _identity(problem, config, trajectories)
        if job.rank == 0:
            _stored(job.folder, identity)  # the work of another fit is refused before any of this one
        plans: list[FitPlan] = from_first(_begun(plan, config, problem, job.folder, identity) if job.rank == 0 else [])
        fewest = min(one.fewest for one in plans)
        if process()[1] > fewest:
            raise FewstepError(f"{process()[1]} processes cannot share {fewest} noises: use fewer processes")
        left = [n for n in counts if not (nfe_folder(job.folder, n) / "sampler.json").exists()]
        taught = trajectories is not None or (job.folder / "trajectories" / "manifest.json").exists()
        for one in plans:
            more = tuple(n for n in one.counts if n in left)
            if more and on_plan is not None and job.rank == 0:
                on_plan(replace(one, counts=more, cells=0 if taught else one.cells), seconds_per_evaluation(problem))
                taught = True
        with _noted(job, plans, identity):
            trajectories = _teach(problem, plans[0], job) if trajectories is None else trajectories
            _check(trajectories, problem, plans[0], counts[-1])
            searches = {}
            for one in plans:
                searches |= dict.fromkeys(one.counts, FitSearch(problem, trajectories, one))
            for done, n in enumerate(counts):
                place = nfe_folder(job.folder, n)
                if not from_first(job.rank == 0 and (place / "sampler.json").exists()):
                    note = lambda text, done=done, n=n: job.on_progress(done, f"{counted(n, 'evaluation')}: {text}")  # noqa: E731
                    before = _stored(job.folder, identity) if job.rank == 0 else {}
                    found = searches[n].find(n, from_first({one.grid.steps: one.grid for m, one in before.items() if m < n}), note)
                    if job.rank == 0:
                        _sampler(found, problem, searches[n].plan, identity, job.command).save(place)
                if job.rank == 0:
                    write_whole(job.folder / "README.md", _card(problem, _stored(job.folder, identity)).encode())
                wait_for_all()
        job.on_progress(len(counts), "")
        stored = from_first(_stored(job.folder, identity) if job.rank == 0 else {})
        return {n: stored[n] for n in counts}


@checked
def plan_fit(
    model: Model, nfe: int | Sequence[int], config: FitConfig | None = None, *, trajectories: Trajectories | None = None
) -> FitPlan:
    """Plan a fit without running it: its network evaluations by stage, and the disk and memory that it takes.

    Args:
        model: the model to fit to.
        nfe: network evaluations per sample, one number or several.
        config: how to fit.
        trajectories: stored ones to fit to.

    Raises:
        SolverError: fewer than one evaluation, or more than there are cells between levels.
        FewstepError: a budget that is too small; fewer trajectories than are named.

    Examples:
        >>> import fewstep
        >>> plan = fewstep.plan_fit(fewstep.load_model("digits-edm"), [5, 8], fewstep.FitConfig(budget=3000))
        >>> plan.evaluations <= 3000
        True
    """
    config, counts = config_of(config, FitConfig), sorted(wholes(nfe, "nfe", SolverError))
    check_model(model)
    if not counts or counts[0] < 1:
        raise SolverError(f"a fit takes at least 1 evaluation, got {', '.join(map(str, counts)) or 'none'}")
    check_size("nfe", counts[-1], SolverError)
    shape, budget = model.need_shape(), default_budget(model)
    least = _check_foreseeable(model, config) if config.first else 0
    if trajectories is not None:
        cells, given = len(trajectories.t) - 1, len(trajectories)
        if config.storage != FitConfig.storage or config.seed not in (FitConfig.seed, trajectories.first):
            raise FewstepError(f"{trajectories.folder} has its trajectories already: leave seed and storage out")
        if config.levels not in (None, cells):
            raise FewstepError(f"{trajectories.folder} has {cells} cells between its levels, not {config.levels}: leave levels out")
        config = replace(config, levels=cells)
        plan = plan_of(config, counts, shape, budget, lambda levels: 0, least=least)
        if config.num is None and plan.num + plan.held_out > given:
            held_out = config.held_out or max(2, given // 4)
            if given - held_out < 2:
                raise FewstepError(f"{given} trajectories are too few to fit to with {held_out} held out")
            plan = plan_of(replace(config, num=given - held_out, held_out=held_out), counts, shape, budget, lambda levels: 0, least=least)
    else:
        plan = plan_of(config, counts, shape, budget, lambda levels: fine_grid(model.schedule, levels).steps, least=least)
        cells = plan.cells
    _check_levels(counts[-1], cells)
    if plan.num < least:
        raise FewstepError(f"a first answer is learned from {least} noises or more, and there are {plan.num} here: leave first out")
    return plan


def _check_foreseeable(model: Model, config: FitConfig) -> int:
    """Return the fewest noises from which a first answer is learned.

    Raises:
        FewstepError: fewer are named, or the model's samplers run where one cannot be foreseen.
    """
    if model.hosted:
        raise FewstepError(f"{model.name} is a pipeline, which calls its network at every step: leave first out")
    if model.domain is not None:
        raise FewstepError(f"{model.name} is reflected, so that its start is folded noise, to which no answer is linear: leave first out")
    least = LEAST * (model.classes or 1)
    if config.num is not None and config.num < least:
        raise FewstepError(
            f"a first answer is learned from {LEAST} noises or more for each class, {least} in all: raise num, now {config.num}"
        )
    return least


def _check_levels(most: int, cells: int) -> None:
    if most > cells:
        raise SolverError(f"a fit on {cells + 1} levels takes 1 to {cells} evaluations, got {most}")


@torch.no_grad()
def seconds_per_evaluation(problem: Problem) -> float:
    """Time one call of the network on a few samples, after one that is not timed, and return the seconds for one of them."""
    t, taken = problem.schedule.ends[0], 0.0
    for seeds in (range(1), range(TIMED)):
        begin = time.perf_counter()
        float(problem.teacher(problem.start(seeds), t, problem.cond(seeds)).sum())  # read: a device computes behind our back
        taken = (time.perf_counter() - begin) / len(seeds)
    return taken


@dataclass(frozen=True)
class _SearchRecord:
    """The search for the samplers of some numbers of evaluations in ``plan.json``."""

    counts: list[Count]
    noises: Count
    iterations: Whole
    effort: Effort


@dataclass(frozen=True)
class _PlanRecord(Record):
    """The fields of ``plan.json``: the numbers of the trajectories in a folder, which all its samplers share, and each search for some."""

    FORMAT = "fewstep-fit-plan"

    identity: str
    num: Count
    held_out: Count
    levels: Count
    batch: Count
    searches: list[_SearchRecord]


PLAN, SHARED = "plan.json", ("num", "held_out", "levels", "batch")


def _begun(plan: FitPlan, config: FitConfig, problem: Problem, folder: Path, identity: str) -> list[FitPlan]:
    """Return the plans that a fit in a folder follows: those that were begun there, and one for the samplers that are new.

    Raises:
        ArtifactError: they are of another model or configuration.
        FewstepError: there is too little disk or memory, or the budget is too small for what is new.
    """
    path = folder / PLAN
    if not path.exists():
        plan.check(folder)
        return [plan]
    record = read_record(path, _PlanRecord)
    if record.identity != identity:
        raise ArtifactError(f"{folder} holds a fit of another model or configuration: remove it, or use another folder")
    shared = {name: getattr(record, name) for name in SHARED}
    cells = fine_grid(problem.schedule, record.levels).steps if plan.cells else 0
    begun = [
        replace(
            plan,
            config=replace(plan.config, **shared, noises=one.noises, iterations=one.iterations),
            counts=tuple(one.counts),
            effort=one.effort,
            cells=cells,
        )
        for one in record.searches
    ]
    new = [n for n in plan.counts if not any(n in one.counts for one in begun)]
    if not new:
        return begun
    limit = None if config.budget is None and config.num is not None else plan.limit  # as many noises as are named, whatever it costs
    added = plan_of(
        replace(config, **shared, budget=limit),
        new,
        plan.shape,
        plan.limit,
        lambda levels: 0,
        "of the folder",
        LEAST * (problem.model.classes or 1) * config.first,
    )
    return [*begun, replace(added, cells=cells)]


@contextmanager
def _noted(job: Job, plans: Sequence[FitPlan], identity: str) -> Generator[None, None, None]:
    """Write ``plan.json``, and put back what was there if nothing is made that follows it."""
    path, files = job.folder / PLAN, job.files
    old = path.read_bytes() if job.rank == 0 and path.exists() else None
    searches = [
        {"counts": one.counts, "noises": one.noises, "iterations": one.config.iterations, "effort": list(one.effort)} for one in plans
    ]
    numbers = {name: getattr(plans[0].config, name) for name in SHARED}
    whole = {"format": _PlanRecord.FORMAT, "version": _PlanRecord.VERSION, "identity": identity, **numbers, "searches": searches}
    if job.rank == 0:
        write_whole(path, (json.dumps(whole, indent=1) + "\n").encode())
    try:
        yield
    except BaseException:
        if job.rank == 0 and job.files <= files | {PLAN}:
            path.unlink() if old is None else write_whole(path, old)
        raise


def _teach(problem: Problem, plan: FitPlan, job: Job) -> Trajectories:
    """Solve the teacher's trajectories, one step from each level to the next, and read them in all processes."""
    levels = fine_grid(problem.schedule, plan.levels)
    config = replace(plan.trajectories, guidance=problem.guidance, nfe=levels.steps)
    with job.below("trajectories", lambda done, note: job.on_progress(0, f"{done} of {config.num} trajectories")) as part:
        return trajectories_of(problem, levels, config, part, checked=CHECKED)


def _check(trajectories: Trajectories, problem: Problem, plan: FitPlan, most: int) -> None:
    """Refuse trajectories that are too few, at too few levels, of another model, or not from the model's first time to its last."""
    schedule, ends = problem.schedule, (float(trajectories.t[0]), float(trajectories.t[-1]))
    trajectories.check(problem)
    if ends != (schedule.t_max, schedule.t_min):
        raise FewstepError(
            f"{trajectories.folder} goes from t = {ends[0]:g} to {ends[1]:g}; a fit takes trajectories from {schedule.t_max:g} to "
            f"{schedule.t_min:g}, as hand-made samplers have it: make them again, or let the fit make its own"
        )
    _check_levels(most, len(trajectories.t) - 1)
    if len(trajectories) < plan.num + plan.held_out:
        raise FewstepError(
            f"{len(trajectories)} trajectories are fewer than {plan.num} to fit to and {plan.held_out} held out: ask for fewer"
        )


def _sampler(found: SearchResult, problem: Problem, plan: FitPlan, identity: str, command: str) -> Sampler:
    best = best_hand_made(found.stages)
    card = {
        "name": FITTED,
        **problem.card(),
        "identity": identity,
        "chosen": found.chosen,
        "levels_from": found.begun,
        "best_hand_made": best,
        "error": [found.stages[name][0] for name in (found.chosen, best)],
        "rmse": [found.stages[name][1] for name in (found.chosen, best)],
        "stages": {name: list(errors) for name, errors in found.stages.items()},
        "noises": plan.num,
        "held_out_noises": plan.held_out,
        "network_evaluations": found.evaluations,
        "trajectory_evaluations": (plan.num + plan.held_out) * plan.cells,
        "command": command,
    }
    grid = TimeGrid(found.tableau.nodes.t)
    options = {**asdict(plan.form), "parent": plan.config.parent_with(grid.steps)}
    return Sampler(found.tableau, grid, problem.schedule, FITTED, options, card)


def _identity(problem: Problem, config: FitConfig, given: Trajectories | None) -> str:
    """Return a hash of what all samplers of one folder share: model, guidance, configuration and trajectories."""
    about = (problem.fingerprint, problem.guidance, asdict(config), None if given is None else given.identity)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Facts:
    """The facts of a sampler's card that the card of all samplers of a fit shows, see `fit`."""

    error: tuple[Number, Number]
    rmse: tuple[Number, Number]
    best_hand_made: str
    chosen: str
    command: str


def _loaded(place: Path, identity: str) -> Sampler:
    sampler = Sampler.load(place)
    if sampler.card.get("identity") != identity:
        raise ArtifactError(f"{place} holds a sampler of another model or configuration: remove it, or use another folder")
    facts_of(sampler.card, _Facts, place)
    return sampler


def _stored(folder: Path, identity: str) -> dict[int, Sampler]:
    """Return all samplers of a folder.

    Raises:
        ArtifactError: one is of another fit.
    """
    found = (_loaded(path.parent, identity) for path in sorted(folder.glob("nfe-*/sampler.json")))
    return {one.nfe: one for one in found}


def _card(problem: Problem, made: Mapping[int, Sampler]) -> str:
    rows = []
    for nfe, one in made.items():
        ours, theirs = (f"{error:.4f} ({rmse:.4f})" for error, rmse in zip(one.card["error"], one.card["rmse"], strict=True))
        rows.append(f"| {nfe} | {ours} | {theirs} `{one.card['best_hand_made']}` | {one.card['chosen']} |")
    table = "\n".join(rows)
    commands = "\n".join(dict.fromkeys(one.card["command"] for one in made.values() if one.card["command"]))
    made_by = f" Made by\n\n```\n{commands}\n```" if commands else ""
    return f"""# Samplers fitted to {problem.name}

For the model with fingerprint {problem.fingerprint} at guidance {problem.guidance:g}.{made_by}

| evaluations | error | of the best hand-made sampler | from |
|---|---|---|---|
{table}

Mean over samples of each one's error to the endpoint of its exact trajectory (in brackets the RMSE of all), on held-out noises. Each folder
`nfe-NN` is a sampler:

```python
import fewstep

sampler = fewstep.Sampler.load("nfe-{next(iter(made)):02d}")
```
"""
