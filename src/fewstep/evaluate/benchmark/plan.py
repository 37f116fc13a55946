"""Plan the rows of a benchmark from names: of solvers, grids, folders of samplers and other libraries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fewstep.core.spacings import check_grid_name
from fewstep.core.tableau import Solver
from fewstep.evaluate.benchmark.entries import Entry, HandMadeEntry, PeerEntry, SamplerEntry, ThirdPartyEntry
from fewstep.evaluate.benchmark.peers import LIBRARY, PEERS
from fewstep.evaluate.benchmark.third_party import ThirdPartySampler
from fewstep.models.carried import FITTED, OPTIMIZED
from fewstep.models.generate import check_made_for, solver_for
from fewstep.models.problem import Problem, check_seeds
from fewstep.runtime.entry import is_entry
from fewstep.runtime.errors import ArtifactError, FewstepError, SolverError, look_up
from fewstep.runtime.front_door import at_least, check_fields, check_size, checked_class
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import make_solver, takes_statistics

__all__ = [
    "BenchmarkConfig",
    "Setup",
    "check_names",
    "entries_below",
    "entries_by_name",
    "entries_of_peer",
    "in_reading_order",
    "on_each_grid",
    "planned_entries",
]


@dataclass(frozen=True)
class Setup:
    """The setup that all rows of a benchmark share.

    Attributes:
        num: the number of noises.
        seed: the seed of the first; the next has the next seed.
        batch: samples at a time.
        features: the network in whose features samples are compared with the data, by name (see `load_features`), as ``module:function``
            (which makes a network for samples of a shape), or itself; by default ``digits`` for the digits and ``pixels`` otherwise.
        data: the images that samples are compared with, as `load_images` takes them; by default the model's own, if they are known.

    Raises:
        FewstepError: fewer than two noises, an empty batch, or seeds that are none.
    """

    num: int = 512
    seed: int = 0
    batch: int = 256
    features: str | nn.Module | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        check_seeds(self.seed, self.num)
        at_least(self, num=2, batch=1)


@checked_class
@dataclass(frozen=True)
class BenchmarkConfig:
    """The rows of a benchmark by name, and the noises.

    Attributes:
        solvers: names of solvers; ``fitted`` stands for the fitted samplers that the model carries, which have levels of their own.
        grids: names of spacings, or ``optimized``: the grids that the model carries.
        nfe: numbers of network evaluations.
        num, seed, batch, features, data: see `Setup`.
        guidance: the classifier-free guidance scale.
        peers: ``diffusers``, or third-party samplers as ``module:function``.
        statistics, any_statistics: see `solver_for`.
        samplers: folders below which saved samplers of this model lie; each is a row.

    Raises:
        FewstepError: an unknown name, no rows at all, or a `Setup` that cannot be.
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
        check_fields(self)
        check_names(self.solvers, self.grids, self.nfe, self.peers)
        if not self.samplers and (not (self.solvers or self.peers) or not self.grids or not self.nfe):
            raise FewstepError("a benchmark needs at least one solver (or peers), one grid and one nfe, or a folder of samplers")
        _ = self.setup

    @property
    def setup(self) -> Setup:
        """The setup that all rows share."""
        return Setup(self.num, self.seed, self.batch, self.features, self.data)


def check_names(solvers: Iterable[str], grids: Iterable[str], nfe: Iterable[int], peers: Iterable[str]) -> None:
    """Refuse names that stand for nothing, and numbers of evaluations below 1.

    Raises:
        FewstepError: there is one (with the nearest names).
    """
    for name in solvers:
        if name != FITTED and not takes_statistics(name):
            make_solver(name)
    for name in grids:
        check_grid_name(name, OPTIMIZED)
    for peer in peers:
        if is_entry(peer):
            ThirdPartySampler.load(peer)
        else:
            look_up(peer, {LIBRARY: None}, "library", FewstepError)
    for number in nfe:
        if number < 1:
            raise SolverError(f"nfe must be a whole number of at least 1, got {number}")
        check_size("nfe", number, SolverError)


def planned_entries(problem: Problem, config: BenchmarkConfig) -> list[Entry]:
    """Return the entries of a benchmark, in the order of its rows, each key once.

    Raises:
        ArtifactError: there is no sampler below a folder, or an artifact was made for another model or guidance scale.
    """
    made: list[Entry] = []
    for name in config.solvers:
        made += entries_by_name(problem, name, config.grids, config.nfe, config.statistics, any_statistics=config.any_statistics)
    for peer in config.peers:
        made += entries_of_peer(problem, peer, config.grids, config.nfe)
    for folder in config.samplers:
        made += entries_below(problem, folder, config.nfe)
    first: dict[tuple[str, str, str, int], Entry] = {}
    for entry in made:
        first.setdefault(entry.key, entry)
    return in_reading_order(first.values(), config.grids, config.nfe)


def in_reading_order(entries: Iterable[Entry], grids: Sequence[str], nfe: Sequence[int]) -> list[Entry]:
    """Sort entries by evaluations, then by grid; samplers, which have grids of their own, come after those on grids by name."""

    def place(entry: Entry) -> tuple[int, int]:
        number = nfe.index(entry.nfe) if entry.nfe in nfe else len(nfe)
        return number, len(grids) if isinstance(entry, SamplerEntry) else grids.index(entry.grid)

    return sorted(entries, key=place)


def entries_by_name(
    problem: Problem,
    name: str,
    grids: Sequence[str],
    nfe: Sequence[int],
    statistics: Path | None = None,
    *,
    any_statistics: bool = False,
) -> list[Entry]:
    """Return the entries of one solver, or of the ``fitted`` samplers that the model carries.

    Raises:
        ArtifactError: a fitted sampler or the statistics are damaged, or were made for something else.
    """
    if name == FITTED:
        return [SamplerEntry(problem, FITTED, OPTIMIZED, number, given=_fitted(problem, number)) for number in nfe]
    try:
        method = solver_for(name, problem.model, guidance=problem.guidance, statistics=statistics, any_statistics=any_statistics)
    except SolverError as error:
        method = error
    return on_each_grid(problem, name, method, grids, nfe)


def on_each_grid(
    problem: Problem, name: str, method: Solver | SolverError, grids: Sequence[str], nfe: Sequence[int], *, named: bool = True
) -> list[Entry]:
    """Return the entries of a solver on all grids with all numbers of evaluations; see `HandMadeEntry`."""
    return [HandMadeEntry(problem, name, grid, number, method=method, named=named) for number in nfe for grid in grids]


def _fitted(problem: Problem, nfe: int) -> Sampler | SolverError:
    try:
        return problem.model.fitted(nfe, problem.guidance)
    except SolverError as error:
        return error


def entries_of_peer(problem: Problem, peer: str, grids: Sequence[str], nfe: Sequence[int]) -> list[Entry]:
    """Return the entries of ``diffusers``, one for each of its schedulers, or of a third-party sampler ``module:function``.

    Raises:
        FewstepError: there is no such function.
    """
    places = [(grid, number) for number in nfe for grid in grids]
    if is_entry(peer):
        third = ThirdPartySampler.load(peer)
        return [ThirdPartyEntry(problem, third.name, *place, third_party=third) for place in places]
    return [PeerEntry(problem, name, *place) for place in places for name in PEERS]


def entries_below(problem: Problem, folder: Path, nfe: Sequence[int] = ()) -> list[Entry]:
    """Return the entries of the samplers saved below a folder.

    Args:
        nfe: the numbers of evaluations of interest; by default all.

    Raises:
        ArtifactError: there is none, one was made for another model or guidance scale, or two are called alike.
    """
    paths, made = [path.parent for path in sorted(folder.rglob("sampler.json"))], dict[tuple[str, str, str, int], Entry]()
    if not paths:
        raise ArtifactError(f"no sampler below {folder}: name a folder of fewstep optimize, or one that holds a sampler.json")
    samplers = [Sampler.load(path) for path in paths]
    for path, sampler in zip(paths, samplers, strict=True):
        check_made_for(sampler, problem.model, problem.guidance, path)
        if nfe and sampler.nfe not in nfe:
            continue
        entry = SamplerEntry(problem, sampler.name, str(folder), sampler.nfe, given=sampler)
        if entry.key in made:
            raise ArtifactError(
                f"{folder} has two samplers of {sampler.name} with {sampler.nfe} evaluations, one in {path}: name its folder"
            )
        made[entry.key] = entry
    if not made:
        known = ", ".join(map(str, sorted({sampler.nfe for sampler in samplers})))
        raise ArtifactError(f"the samplers below {folder} use {known} evaluations, not {', '.join(map(str, nfe))}: ask for those")
    return list(made.values())
