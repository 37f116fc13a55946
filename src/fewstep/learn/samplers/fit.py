"""Fit samplers to a model: one for each number of evaluations."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fewstep.core.grid import TimeGrid
from fewstep.learn.samplers.fit_search import FitConfig, FitSearch, SearchResult, best_hand_made
from fewstep.learn.teacher.gram import fine_grid
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, trajectories_of
from fewstep.models.carried import FITTED
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_model
from fewstep.runtime.artifact import TEMPORARY, Number, facts_of, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError, SolverError
from fewstep.runtime.front_door import checked, config_of, scale_of, wholes
from fewstep.runtime.job import Job, Progress
from fewstep.runtime.process import from_first, process, wait_for_all
from fewstep.sampling.sampler import Sampler

__all__ = ["FitConfig", "fit", "nfe_folder"]


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

    Returns:
        The samplers by their number of evaluations.

    Raises:
        SolverError: fewer than one evaluation, or more than there are cells between levels.
        ModelError: something that is no `Model`, or a model without a shape.
        ArtifactError: the folder is in use, holds the work of another model or configuration, or cannot be written; trajectories of
            another model.
        FewstepError: more processes than noises, or too few trajectories.

    Example:
        >>> import fewstep
        >>> model = fewstep.load_model("digits-edm")
        >>> samplers = fewstep.fit(model, nfe=3, config=fewstep.FitConfig(num=32, held_out=16, iterations=0))
        >>> samplers[3]
        Sampler(fitted, 3 evaluations, noise levels 80 to 0.002)
    """
    config, counts = config_of(config, FitConfig), sorted(wholes(nfe, "nfe", SolverError))
    check_model(model)
    guidance = scale_of(guidance, model.default_guidance)
    if not isinstance(trajectories, Trajectories | None):
        raise FewstepError(
            f"trajectories are those of fewstep.generate_trajectories, got {trajectories!r}: Trajectories.load reads a folder"
        )
    levels = fine_grid(model.schedule, config.levels) if trajectories is None else TimeGrid(trajectories.t)
    if not counts or counts[0] < 1 or counts[-1] > levels.steps:
        got = ", ".join(map(str, counts)) or "none"
        raise SolverError(f"a fit on {levels.steps + 1} levels takes 1 to {levels.steps} evaluations, got {got}")
    if process()[1] > config.fewest:
        raise FewstepError(f"{process()[1]} processes cannot share {config.fewest} noises: use fewer processes")
    with Job.open("fit", out, device=device or model.device, on_progress=on_progress, command=command) as job:
        problem = Problem(model, guidance, job.device)
        identity = _identity(problem, config, trajectories)
        if job.rank == 0:
            _stored(job.folder, identity)  # the work of another fit is refused before any of this one
        if trajectories is None:
            trajectories = _teach(problem, levels, config.trajectories, job)
        _check(trajectories, problem, config)
        search = FitSearch(problem, trajectories, config, counts[-1])
        for done, n in enumerate(counts):
            place = nfe_folder(job.folder, n)
            if not from_first(job.rank == 0 and (place / "sampler.json").exists()):
                with TemporaryDirectory(dir=job.folder, prefix=TEMPORARY) as scratch:
                    note = lambda text, done=done, n=n: job.on_progress(done, f"{n} evaluations: {text}")  # noqa: E731
                    found = search.find(n, Path(scratch), note)
                if job.rank == 0:
                    _sampler(found, problem, config, identity, job.command).save(place)
            if job.rank == 0:
                write_whole(job.folder / "README.md", _card(problem, _stored(job.folder, identity)).encode())
            wait_for_all()
        job.on_progress(len(counts), "")
        stored = from_first(_stored(job.folder, identity) if job.rank == 0 else {})
        return {n: stored[n] for n in counts}


def _teach(problem: Problem, levels: TimeGrid, config: TrajectoryConfig, job: Job) -> Trajectories:
    """Solve the teacher's trajectories, one step from each level to the next, and read them in all processes."""
    config = replace(config, guidance=problem.guidance, nfe=levels.steps)
    with job.below("trajectories", lambda done, note: job.on_progress(0, f"{done} of {config.num} trajectories")) as part:
        return trajectories_of(problem, levels, config, part)


def _check(trajectories: Trajectories, problem: Problem, config: FitConfig) -> None:
    """Refuse trajectories that are too few, of another model, or do not run from the model's first time to its last."""
    schedule, ends = problem.schedule, (float(trajectories.t[0]), float(trajectories.t[-1]))
    trajectories.check(problem)
    if ends != (schedule.t_max, schedule.t_min):
        raise FewstepError(
            f"{trajectories.folder} goes from t = {ends[0]:g} to {ends[1]:g}; a fit takes trajectories from {schedule.t_max:g} to "
            f"{schedule.t_min:g}, as hand-made samplers have it: make them again, or let the fit make its own"
        )
    if len(trajectories) < config.num + config.held_out:
        raise FewstepError(
            f"{len(trajectories)} trajectories are fewer than {config.num} to fit to and {config.held_out} held out: ask for fewer"
        )


def _sampler(found: SearchResult, problem: Problem, config: FitConfig, identity: str, command: str) -> Sampler:
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
        "noises": config.num,
        "held_out_noises": config.held_out,
        "network_evaluations": found.evaluations,
        "command": command,
    }
    grid = TimeGrid(found.tableau.nodes.t)
    options = {**asdict(config.form), "parent": config.parent_with(grid.steps)}
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
