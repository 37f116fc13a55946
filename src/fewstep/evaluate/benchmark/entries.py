"""The samplers of a benchmark: one small class per kind, each of which makes samples and says what it is made of."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser, FlowMap
from fewstep.core.grid import TimeGrid
from fewstep.core.spacings import make_grid
from fewstep.core.tableau import Nodes, Solver, Tableau
from fewstep.evaluate.benchmark.peers import LIBRARY, peer_steps, run_peer
from fewstep.evaluate.benchmark.third_party import ThirdPartySampler, run_third_party
from fewstep.evaluate.rows import OWN_FORMULAS, Key
from fewstep.models.carried import OPTIMIZED
from fewstep.models.problem import Problem
from fewstep.runtime.errors import GridError, SolverError
from fewstep.sampling.loop import jumps, run
from fewstep.sampling.sampler import Sampler

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Entry", "HandMadeEntry", "PeerEntry", "SamplerEntry", "ThirdPartyEntry"]


@dataclass(frozen=True, eq=False)
class Entry(ABC):
    """One sampler with a number of evaluations, on one problem: a row of the benchmark to be.

    Attributes:
        problem: the model at a guidance scale.
        solver, grid: what the table calls them.
        nfe: the evaluations that are requested.
    """

    problem: Problem
    solver: str
    grid: str
    nfe: int

    @property
    @abstractmethod
    def library(self) -> str:
        """The library that the sampler belongs to."""

    @property
    def key(self) -> Key:
        """The identifier of its row."""
        return self.library, self.solver, self.grid, self.nfe

    @property
    def statistics(self) -> str | None:
        """The fingerprint of the statistics that it uses."""
        return None

    @property
    @abstractmethod
    def artifact(self) -> str | None:
        """The fingerprint of what it is made of, as far as its key does not say."""

    @property
    def trusted(self) -> bool:
        """Whether all of its code is this library's, so that an unexpected exception is a mistake here and no failure of the sampler."""
        return False

    @property
    def sampler(self) -> Sampler | None:
        """The sampler as data, where it is one of this library's."""
        return None

    @property
    @abstractmethod
    def stochastic(self) -> bool | None:
        """Whether it adds noise, so that it follows no trajectory; None of somebody else's function, of which only its samples say it."""

    @property
    def options(self) -> dict[str, Any]:
        """The options of its formulas by name, where they are known: numbers and words."""
        sampler = self.sampler
        options = {} if sampler is None else dict(sampler.options)
        return {name: value for name, value in options.items() if isinstance(value, bool | int | float | str)}

    @property
    @abstractmethod
    def time_grid(self) -> TimeGrid:
        """The times of its grid.

        Raises:
            GridError, SolverError: it has none.
        """

    @abstractmethod
    def why_not(self) -> str:
        """Say why it cannot run at all; empty if it can."""

    @abstractmethod
    def samples(self, denoiser: Denoiser | FlowMap, seeds: Sequence[int], cond: Cond, noise: Sequence[int] | None = None) -> Tensor:
        """Sample the noises of ``seeds``, ``[len(seeds), *D]``.

        Args:
            denoiser: that of the problem, or a wrapper around it.
            seeds: of the noises that the samples start from.
            cond: the condition of each.
            noise: the seeds of the noise that the sampler adds on the way; by default those of the start.
        """

    def same_as(self, other: Entry) -> bool:
        """Return whether an entry with the same key is the same sampler."""
        return type(self) is type(other) and (self.statistics, self.artifact) == (other.statistics, other.artifact)

    def renamed(self, solver: str) -> Self:
        """Return the same sampler under another name."""
        return replace(self, solver=solver)


def _named_grid(entry: Entry, steps: int) -> TimeGrid:
    """Return the grid that an entry names, of so many intervals."""
    problem = entry.problem
    if entry.grid == OPTIMIZED:
        return problem.model.optimized(entry.solver, entry.nfe, problem.guidance)
    return make_grid(entry.grid, problem.schedule, steps)


def _refused(problem: Problem, tableau: Tableau) -> None:
    """Refuse a tableau that a student cannot take.

    Raises:
        SolverError: it is not of first order, or has times between which the student cannot jump, or that it was not taught.
        GridError: the student's own grid is missing.
    """
    if isinstance(problem.denoiser, FlowMap):
        jumps(problem.denoiser, tableau)
    problem.model.check_own_steps(tableau)


def _numbers(*tables: Tensor) -> str:
    return hashlib.sha256(repr([table.tolist() for table in tables]).encode()).hexdigest()[:16]


# -- of this library ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HandMadeEntry(Entry):
    """A solver on a grid by name.

    Attributes:
        method: the solver, or why the model has none.
        named: whether its name stands for its formulas; a solver of somebody's own has a name that says nothing of them.
    """

    _: KW_ONLY
    method: Solver | SolverError
    named: bool = True

    @property
    def library(self) -> str:
        return "fewstep"

    @property
    def trusted(self) -> bool:
        return self.named

    @property
    def statistics(self) -> str | None:
        used = getattr(self.method, "statistics", None)
        return None if used is None else used.fingerprint

    @property
    def artifact(self) -> str | None:
        if not self.named:
            try:
                return OWN_FORMULAS + self.sampler.fingerprint
            except Exception:  # somebody's own code: its row says why
                return None
        return _numbers(self.time_grid.t) if self.grid == OPTIMIZED else None

    @property
    def _solver(self) -> Solver:
        if isinstance(self.method, SolverError):
            raise self.method
        return self.method

    @cached_property
    def _times(self) -> TimeGrid:
        return _named_grid(self, self._solver.steps_on(self.problem.schedule, self.nfe))

    @property
    def time_grid(self) -> TimeGrid:
        return self._times

    @cached_property
    def _built(self) -> Sampler:
        return Sampler.build(self._solver, self.time_grid, self.problem.schedule)

    @property
    def sampler(self) -> Sampler:
        return self._built

    @property
    def stochastic(self) -> bool:
        try:
            return self.sampler.tableau.stochastic
        except Exception:  # it cannot be built: `why_not`, or the row of somebody's own code, says why
            return False

    @property
    def options(self) -> dict[str, Any]:
        return super().options if self.named else {}

    def why_not(self) -> str:
        try:
            _refused(self.problem, self.sampler.tableau)
        except (GridError, SolverError) as error:
            return str(error)
        except Exception:  # somebody's own code: its row says why
            if self.trusted:
                raise
        return ""

    def samples(self, denoiser: Denoiser | FlowMap, seeds: Sequence[int], cond: Cond, noise: Sequence[int] | None = None) -> Tensor:
        return _sampled(self.sampler, self.problem, denoiser, seeds, cond, noise)

    def same_as(self, other: Entry) -> bool:
        if not isinstance(other, HandMadeEntry):
            return False
        if self.named and other.named:
            return self.statistics == other.statistics
        try:
            return bool(self.method == other.method)
        except Exception:  # options that cannot be compared, as tensors
            return False


@dataclass(frozen=True, eq=False)
class SamplerEntry(Entry):
    """A `Sampler`: saved in a folder, carried by the model, or in memory.

    Attributes:
        given: the sampler, or why the model carries none.
    """

    _: KW_ONLY
    given: Sampler | SolverError

    @property
    def library(self) -> str:
        return "fewstep"

    @property
    def trusted(self) -> bool:
        return True

    @property
    def sampler(self) -> Sampler:
        if isinstance(self.given, SolverError):
            raise self.given
        return self.given

    @property
    def stochastic(self) -> bool:
        return not isinstance(self.given, SolverError) and self.given.tableau.stochastic

    @property
    def time_grid(self) -> TimeGrid:
        return self.sampler.grid

    @property
    def artifact(self) -> str | None:
        if isinstance(self.given, SolverError):
            return None
        tableau = self.given.tableau
        return _numbers(tableau.nodes.t, tableau.update, tableau.record, tableau.bias)

    def why_not(self) -> str:
        try:
            _refused(self.problem, self.sampler.tableau)
        except (GridError, SolverError) as error:
            return str(error)
        return ""

    def samples(self, denoiser: Denoiser | FlowMap, seeds: Sequence[int], cond: Cond, noise: Sequence[int] | None = None) -> Tensor:
        return _sampled(self.sampler, self.problem, denoiser, seeds, cond, noise)


def _sampled(
    sampler: Sampler, problem: Problem, denoiser: Denoiser | FlowMap, seeds: Sequence[int], cond: Cond, noise: Sequence[int] | None
) -> Tensor:
    x = problem.start(seeds, sampler.tableau.nodes)
    return run(denoiser, sampler.tableau, x, cond, seeds=seeds if noise is None else noise)


# -- of others ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _ForeignEntry(Entry):
    """A sampler of another library on a grid by name."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """The grid intervals with which it makes `nfe` evaluations."""

    @abstractmethod
    def run(self, denoiser: Denoiser, x: Tensor, seeds: Sequence[int], cond: Cond) -> Tensor:
        """Sample from ``x [B, *D]`` at the grid's first time to its last; ``seeds`` are those of the noise that it adds."""

    @cached_property
    def _times(self) -> TimeGrid:
        return _named_grid(self, self.steps)

    @property
    def time_grid(self) -> TimeGrid:
        return self._times

    def why_not(self) -> str:
        if isinstance(self.problem.denoiser, FlowMap):
            return f"{self.problem.name} is a student, which jumps from time to time: no sampler of {self.library} is for it"
        if (tuned := self.problem.model.tuned) is not None and tuned.own_steps:
            return f"{self.problem.name} is a student, which knows its own steps alone: no sampler of {self.library} is for it"
        if self.problem.model.domain is not None:
            return f"{self.problem.name} is a reflected model, whose samples {self.library} would not fold into their cube"
        try:
            _ = self.time_grid
        except (GridError, SolverError) as error:
            return str(error)
        return ""

    def samples(self, denoiser: Denoiser | FlowMap, seeds: Sequence[int], cond: Cond, noise: Sequence[int] | None = None) -> Tensor:
        assert not isinstance(denoiser, FlowMap)  # `why_not` says so
        x = self.problem.start(seeds, Nodes.at(self.problem.schedule, self.time_grid.t))
        return self.run(denoiser, x, seeds if noise is None else noise, cond)


@dataclass(frozen=True, eq=False)
class PeerEntry(_ForeignEntry):
    """A scheduler class of diffusers."""

    @property
    def library(self) -> str:
        return LIBRARY

    @property
    def steps(self) -> int:
        return peer_steps(self.solver, self.nfe, to_clean=self.problem.schedule.ends_clean)

    @property
    def stochastic(self) -> bool:
        return False  # these are solvers of the sampling ODE

    @property
    def artifact(self) -> str | None:
        return f"{LIBRARY}-{version(LIBRARY)}"

    def run(self, denoiser: Denoiser, x: Tensor, seeds: Sequence[int], cond: Cond) -> Tensor:
        return run_peer(self.solver, denoiser, self.time_grid, x, cond)


@dataclass(frozen=True, eq=False)
class ThirdPartyEntry(_ForeignEntry):
    """A function with the signature of k-diffusion's samplers.

    It is given as many grid intervals as evaluations are requested; how many it makes is its own business, and counted.
    """

    _: KW_ONLY
    third_party: ThirdPartySampler

    @property
    def library(self) -> str:
        return self.third_party.module

    @property
    def steps(self) -> int:
        return self.nfe

    @property
    def stochastic(self) -> None:
        return None

    @property
    def artifact(self) -> str | None:
        return self.third_party.fingerprint

    def run(self, denoiser: Denoiser, x: Tensor, seeds: Sequence[int], cond: Cond) -> Tensor:
        return run_third_party(self.third_party, denoiser, self.time_grid, x, cond, seeds)

    def same_as(self, other: Entry) -> bool:
        return isinstance(other, ThirdPartyEntry) and self.third_party.function == other.third_party.function
