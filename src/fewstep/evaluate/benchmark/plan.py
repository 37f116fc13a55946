"""Which rows a benchmark has, and the sampler of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fewstep.core.grid import GRIDS, TimeGrid, make_grid
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Solver, tabulate
from fewstep.evaluate.benchmark.peers import LIBRARY, PEERS, peer_steps
from fewstep.evaluate.benchmark.third_party import load_third_party
from fewstep.models.formats.folders import FITTED, Model
from fewstep.models.generate import check_seeds, solver_for
from fewstep.runtime.entry import is_entry
from fewstep.runtime.errors import ArtifactError, FewstepError, GridError, SolverError, look_up
from fewstep.runtime.spec import parse_spec
from fewstep.sampling.loop import aimed
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import make_solver, takes_statistics

__all__ = [
    "OPTIMIZED",
    "BenchmarkConfig",
    "Key",
    "check_made_for",
    "grid_of",
    "impossible",
    "planned_keys",
    "saved_samplers",
    "solvers_of",
    "steps_of",
]

Key = tuple[str, str, str, int]  # library, solver, grid, nfe
OPTIMIZED = "optimized"  # the name of the grids in a model's own folder


@dataclass(frozen=True)
class BenchmarkConfig:
    """Which rows, on how many noises.

    Args:
        solvers: by name; ``fitted`` stands for the fitted samplers in the model's own folder, which have levels of their own.
        grids: spacings by name, or ``optimized``: the grids in the model's own folder.
        peers: ``diffusers``, or samplers of third parties as ``module:function``, see `third_party`.
        statistics, any_statistics: see `solver_for`.
        samplers: folders below which saved samplers of this model lie; each is a row.
        features: in which the samples are compared with the data, by name (see `load_features`), as ``module:function`` (which makes a
            network for samples of a shape), or as a network; by default ``digits`` for models of the digits and ``pixels`` for others.
        data: images that the samples are compared with, as `load_images` takes them; by default the model's own data, if it is known.
    """

    solvers: tuple[str, ...]
    grids: tuple[str, ...]
    nfe: tuple[int, ...]
    num: int = 512
    seed: int = 0
    guidance: float = 1.0
    peers: tuple[str, ...] = ()
    batch: int = 256
    statistics: Path | None = None
    any_statistics: bool = False
    samplers: tuple[Path, ...] = ()
    features: str | nn.Module | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        for name in self.solvers:
            if name != FITTED and not takes_statistics(name):
                make_solver(name)
        for name in self.grids:
            look_up(parse_spec(name, GridError)[0], {**GRIDS, OPTIMIZED: None}, "grid", GridError)
        for peer in self.peers:
            if is_entry(peer):
                load_third_party(peer)
            else:
                look_up(peer, {LIBRARY: None}, "library", FewstepError)
        for nfe in self.nfe:
            if nfe < 1:
                raise SolverError(f"nfe must be a whole number of at least 1, got {nfe}")
        if not self.samplers and (not (self.solvers or self.peers) or not self.grids or not self.nfe):
            raise FewstepError("a benchmark needs at least one solver (or peers), one grid and one nfe, or a folder of samplers")
        check_seeds(self.seed, self.num)
        if self.num < 2 or self.batch < 1:
            raise FewstepError(f"a benchmark needs num of at least 2 and batch of at least 1, got {self.num} and {self.batch}")


def planned_keys(config: BenchmarkConfig) -> Iterator[Key]:
    """The rows that solvers and grids by name make."""
    for nfe in config.nfe:
        for grid in config.grids:
            for solver in config.solvers:
                if solver != FITTED:
                    yield "fewstep", solver, grid, nfe
            for peer in config.peers:
                if is_entry(peer):
                    module, _, name = peer.partition(":")
                    yield module, name, grid, nfe
                else:
                    yield from ((peer, solver, grid, nfe) for solver in PEERS)
        if FITTED in config.solvers:
            yield "fewstep", FITTED, OPTIMIZED, nfe


def solvers_of(model: Model, config: BenchmarkConfig) -> dict[str, Solver | SolverError]:
    """Our solvers by name, or why there is none."""
    made: dict[str, Solver | SolverError] = {}
    for name in config.solvers:
        if name == FITTED:
            continue
        try:
            made[name] = solver_for(
                name, model, guidance=config.guidance, statistics=config.statistics, any_statistics=config.any_statistics
            )
        except SolverError as error:
            made[name] = error
    return made


def saved_samplers(model: Model, config: BenchmarkConfig) -> dict[Key, Sampler]:
    """The samplers below the folders that were named, and the fitted ones of the model's own folder if they are asked for.

    Raises:
        ArtifactError: there is none below one of them, or one was made for another model or guidance scale.
    """
    found: dict[Key, Sampler] = {}
    for nfe in config.nfe if FITTED in config.solvers else ():
        with suppress(SolverError):  # `impossible` says why
            found["fewstep", FITTED, OPTIMIZED, nfe] = model.fitted(nfe, config.guidance)
    for folder in config.samplers:
        paths, there = sorted(folder.rglob("sampler.json")), set[int]()
        if not paths:
            raise ArtifactError(f"no sampler below {folder}: name a folder of fewstep optimize, or one that holds a sampler.json")
        for path in paths:
            sampler = Sampler.load(path.parent)
            there.add(sampler.nfe)
            check_made_for(sampler, path.parent, model, config.guidance)
            if not config.nfe or sampler.nfe in config.nfe:
                key = "fewstep", str(sampler.card.get("name", sampler.solver)), str(folder), sampler.nfe
                if key in found:
                    raise ArtifactError(
                        f"{folder} has two samplers of {key[1]} with {key[3]} evaluations, one in {path.parent}: name its folder"
                    )
                found[key] = sampler
        if not there & set(config.nfe or there):
            known = ", ".join(map(str, sorted(there)))
            raise ArtifactError(
                f"the samplers below {folder} use {known} evaluations, not {', '.join(map(str, config.nfe))}: ask for those"
            )
    return found


def check_made_for(sampler: Sampler, folder: Path, model: Model, guidance: float) -> None:
    """See that a saved sampler that was made for one model and guidance scale is used with them; a hand-made one is for all.

    Raises:
        ArtifactError: it is not (and what it was made for).
    """
    made_for = (sampler.card.get("model", model.fingerprint), sampler.card.get("guidance", guidance))
    if made_for != (model.fingerprint, guidance):
        raise ArtifactError(
            f"{folder} is a sampler of {sampler.card.get('of')} ({made_for[0]}) at guidance {made_for[1]:g}, "
            f"not of {model.name} ({model.fingerprint}) at {guidance:g}"
        )


def grid_of(key: Key, model: Model, config: BenchmarkConfig, steps: int) -> TimeGrid:
    """The grid of a row."""
    _, solver, name, nfe = key
    return model.optimized(solver, nfe, config.guidance) if name == OPTIMIZED else make_grid(name, model.denoiser.schedule, steps)


def steps_of(key: Key, schedule: NoiseSchedule) -> int:
    """Grid intervals of a row of another library on a grid that ends at the schedule's ``t_min``.

    A third party's sampler is given as many intervals as there should be evaluations: how many it makes is for it to say.

    Raises:
        SolverError: the sampler cannot make this number of evaluations.
    """
    library, solver, _, nfe = key
    end = torch.tensor(schedule.t_min, dtype=torch.float64)
    return peer_steps(solver, nfe, to_clean=bool(schedule.sigma(end) == 0)) if library == LIBRARY else nfe


def impossible(key: Key, model: Model, config: BenchmarkConfig, solvers: dict[str, Solver | SolverError]) -> str:
    """Why a sampler cannot do what is asked of it, or nothing."""
    library, solver, _, nfe = key
    if model.is_operator and library != "fewstep":
        return f"{model.name} is an operator student, which makes first-order steps along its own times: no sampler of {library} is for it"
    try:
        if solver == FITTED:
            model.fitted(nfe, config.guidance)
        elif library == "fewstep":
            method = solvers[solver]
            if isinstance(method, SolverError):
                return str(method)
            schedule = model.denoiser.schedule
            nodes = method.nodes(grid_of(key, model, config, method.steps_on(schedule, nfe)), schedule)
            if model.is_operator:
                aimed(model.denoiser, tabulate(method, nodes))
        else:
            grid_of(key, model, config, steps_of(key, model.denoiser.schedule))
    except (GridError, SolverError) as error:
        return str(error)
    return ""
