"""Fitted samplers: from a model to one artifact for each number of evaluations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import torch

from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import prediction
from fewstep.learn.samplers.fit_search import FitConfig, FitSearch, Found, best_hand_made
from fewstep.learn.teacher.gram import fine_grid
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, generate_trajectories
from fewstep.models.formats.folders import FITTED, Model
from fewstep.runtime.artifact import check_writable, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError, SolverError
from fewstep.runtime.process import process, wait_for_all
from fewstep.sampling.sampler import Sampler

__all__ = ["FitConfig", "Fitted", "fit", "nfe_folder"]

SCRATCH = ".students-"  # begins the names of folders that only a running fit has


@dataclass(frozen=True)
class Fitted:
    """One fitted sampler.

    Attributes:
        stages: on held-out noises, the mean error of a sample and the RMSE of all, of the fit and of hand-made samplers, by name.
    """

    sampler: Sampler
    stages: Mapping[str, tuple[float, float]]


def nfe_folder(folder: Path, nfe: int) -> Path:
    """Where the sampler with ``nfe`` evaluations lies."""
    return folder / f"nfe-{nfe:02d}"


def fit(
    model: Model,
    nfe: Sequence[int],
    config: FitConfig,
    folder: str | Path,
    *,
    guidance: float = 1.0,
    trajectories: Trajectories | None = None,
    device: torch.device | None = None,
    command: str = "",
    observe: Callable[[int, str], None] | None = None,
) -> dict[int, Fitted]:
    """A sampler of its own for each number of evaluations, kept in ``folder/nfe-NN``.

    One set of teacher trajectories serves them all. A killed run continues after the last whole sampler; the processes of ``torchrun``
    share the noises. Where a hand-made solver is better on the held-out noises, the sampler is that one, and its card says so.

    Args:
        trajectories: to fit to, at least ``num + held_out``, which are the next; by default they are made in ``folder/trajectories``.
        observe: called with the number of samplers done and a note.

    Raises:
        SolverError: fewer than one evaluation, or more than there are cells between levels.
        ArtifactError: the folder holds the work of another model or configuration, or cannot be written; trajectories of another model.
        FewstepError: more processes than noises, or too few trajectories.
    """
    folder, device, say = Path(folder), device or torch.device("cpu"), observe or (lambda done, note: None)
    check_writable(folder)
    schedule, counts, (rank, world) = model.denoiser.schedule, sorted(set(nfe)), process()
    levels = fine_grid(schedule, config.levels) if trajectories is None else TimeGrid(trajectories.t)
    if not counts or counts[0] < 1 or counts[-1] > levels.steps:
        got = ", ".join(map(str, counts)) or "none"
        raise SolverError(f"a fit on {levels.steps + 1} levels takes 1 to {levels.steps} evaluations, got {got}")
    if world > config.fewest:
        raise FewstepError(f"{world} processes cannot share {config.fewest} noises: use fewer processes")
    identity = _identity(model, guidance, config, trajectories)
    _kept(folder, identity)  # what is there of something else is said before any work
    if trajectories is None:
        asked = replace(config.trajectories, guidance=guidance, nfe=levels.steps)  # a step from each level to the next
        trajectories = _teachers(model, levels, asked, folder / "trajectories", device, command, say)
    _check(trajectories, model, guidance, config)
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        for left in folder.glob(f"{SCRATCH}*"):  # of a run that could not clean up
            rmtree(left)
    wait_for_all()
    search = FitSearch(model.to(device), trajectories, config, guidance, device, counts[-1])
    for done, n in enumerate(counts):
        place = nfe_folder(folder, n)
        if not (place / "sampler.json").exists():
            with TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
                found = search.find(n, Path(scratch), lambda note, done=done, n=n: say(done, f"{n} evaluations: {note}"))
            if rank == 0:
                _sampler(found, model, guidance, config, identity, command).save(place)
        if rank == 0:
            write_whole(folder / "README.md", _card(model.name, guidance, _kept(folder, identity)).encode())
        wait_for_all()
    say(len(counts), "")
    kept = _kept(folder, identity)
    return {n: kept[n] for n in counts}


def _teachers(
    model: Model,
    levels: TimeGrid,
    config: TrajectoryConfig,
    folder: Path,
    device: torch.device,
    command: str,
    say: Callable[[int, str], None],
) -> Trajectories:
    """The trajectories, made or read, in all processes."""
    generate_trajectories(
        model,
        levels,
        config,
        folder,
        device=device,
        command=command,
        observe=lambda done, note: say(0, f"{done} of {config.num} trajectories"),
    )
    wait_for_all()
    return Trajectories.load(folder)


def _check(trajectories: Trajectories, model: Model, guidance: float, config: FitConfig) -> None:
    """See that there are enough trajectories, and the model's, from its first time to its last."""
    schedule, ends = model.denoiser.schedule, (float(trajectories.t[0]), float(trajectories.t[-1]))
    trajectories.check(model=model.fingerprint, schedule=schedule, shape=model.shape, guidance=guidance)
    if ends != (schedule.t_max, schedule.t_min):
        raise FewstepError(
            f"{trajectories.folder} goes from t = {ends[0]:g} to {ends[1]:g}; a fit takes trajectories from {schedule.t_max:g} to "
            f"{schedule.t_min:g}, as hand-made samplers have it: make them again, or let the fit make its own"
        )
    if len(trajectories) < config.num + config.held_out:
        raise FewstepError(
            f"{len(trajectories)} trajectories are fewer than {config.num} to fit to and {config.held_out} held out: ask for fewer"
        )


def _sampler(found: Found, model: Model, guidance: float, config: FitConfig, identity: str, command: str) -> Sampler:
    best = best_hand_made(found.stages)
    card = {
        "name": FITTED,
        "of": model.name,
        "model": model.fingerprint,
        "prediction": prediction(model.denoiser.prediction).name,
        "guidance": guidance,
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
    return Sampler(found.tableau, grid, model.denoiser.schedule, FITTED, options, card)


def _identity(model: Model, guidance: float, config: FitConfig, given: Trajectories | None) -> str:
    """What all samplers of one folder share."""
    about = (model.fingerprint, float(guidance), asdict(config), None if given is None else given.identity)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def _loaded(place: Path, identity: str) -> Fitted:
    sampler = Sampler.load(place)
    if sampler.card.get("identity") != identity:
        raise ArtifactError(f"{place} holds a sampler of another model or configuration: remove it, or use another folder")
    return Fitted(sampler, {key: tuple(value) for key, value in sampler.card["stages"].items()})


def _kept(folder: Path, identity: str) -> dict[int, Fitted]:
    """All samplers of a folder."""
    found = (_loaded(path.parent, identity) for path in sorted(folder.glob("nfe-*/sampler.json")))
    return {one.sampler.nfe: one for one in found}


def _card(name: str, guidance: float, made: Mapping[int, Fitted]) -> str:
    rows = []
    for nfe, one in made.items():
        card = one.sampler.card
        ours, theirs = (f"{error:.4f} ({rmse:.4f})" for error, rmse in zip(card["error"], card["rmse"], strict=True))
        rows.append(f"| {nfe} | {ours} | {theirs} `{card['best_hand_made']}` | {card['chosen']} |")
    table = "\n".join(rows)
    model = next(iter(made.values())).sampler.card["model"]
    commands = "\n".join(dict.fromkeys(one.sampler.card["command"] for one in made.values()))
    return f"""# Samplers fitted to {name}

For the model with fingerprint {model} at guidance {guidance:g}. Made by

```
{commands}
```

| evaluations | error | of the best hand-made sampler | from |
|---|---|---|---|
{table}

Mean over samples of each one's error to the end of its exact trajectory (in brackets the RMSE of all), on noises that the samplers were
not fitted to. Each folder `nfe-NN` is a sampler:

```python
import fewstep

sampler = fewstep.Sampler.load("nfe-{next(iter(made)):02d}")
```
"""
