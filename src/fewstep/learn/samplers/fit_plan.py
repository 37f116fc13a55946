"""Plan a fit within a budget: the network evaluations of each of its stages, and the disk and memory that it takes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from fewstep.core.grid import TimeGrid
from fewstep.core.pooling import default_pool
from fewstep.core.schedule import VPLinear
from fewstep.core.spacings import GRIDS
from fewstep.core.tableau import tabulate
from fewstep.learn.search.coefficients import STEPS, FitForm, widened
from fewstep.learn.teacher.trajectories import DTYPES, TrajectoryConfig
from fewstep.models.model import Model
from fewstep.runtime.errors import FewstepError, look_up
from fewstep.runtime.front_door import at_least, check_fields, checked_class
from fewstep.runtime.memory import available_memory
from fewstep.solvers import make_solver

__all__ = ["FitConfig", "FitPlan", "default_budget", "plan_of"]

PROBE = 8  # steps on which a parent shows its form
SMALL, LARGE = 30_000, 3000  # budgets by default: for a network of at most CHEAP weights and samples of as many numbers as ELEMENTS, else
CHEAP, ELEMENTS = 10_000_000, 2**12
TOGETHER = 2**18  # numbers of the samples in one batch, about
CACHED = 2**30  # numbers that a fit in sequence keeps in memory, at most
CHECKED = 4  # trajectories whose error is estimated
TIMED = 4  # samples of the call that is timed, after one of a single sample
CANDIDATES, FEW = 10, 6  # levels to begin with, about; where few noises rank them
FEW_NOISES = 8  # that rank levels
FEW_RIVALS = 5  # hand-made samplers that a small budget compares with, at most
NUMBER = 4  # bytes
COPIES = 4  # of all states of a fit in sequence that are in memory at once: the one here, a trial, and their least squares


STAGES = ("trajectories", "levels to begin with", "levels", "coefficients", "sweep", "check on held-out noises")


class Effort(NamedTuple):
    """How much a budget does with each noise. Levels are chosen on few of them; most noises fit coefficients alone, which is cheap.

    Attributes:
        least: the fewest noises to fit to that this is for.
        levels: network evaluations of a teacher's trajectory.
        ranking: noises that rank levels to begin with, at most.
        share: the share of the noises that levels, and all coefficients together, are chosen on.
        noises: their number, at most.
        starts: levels to begin with from which others are sought.
        descents: Jacobians of the levels from each, and ``steps`` with each Jacobian.
        sweeps: Jacobians of all coefficients together; for samplers of at most ``swept`` evaluations.
        held_out: held-out noises for each one to fit to.
        rivals: noises that rank hand-made samplers; 0 to take a few samplers by name.
    """

    least: int
    levels: int
    ranking: int
    share: float
    noises: int
    starts: int
    descents: int
    steps: int
    sweeps: int
    swept: int
    held_out: float
    rivals: int


EFFORTS = (
    Effort(256, 32, 64, 0.3, 128, 2, 2, 5, 2, 12, 0.4, 8),
    Effort(120, 32, 24, 0.3, 48, 2, 2, 4, 1, 10, 0.4, 4),
    Effort(48, 24, 12, 0.3, 32, 2, 1, 3, 1, 6, 0.3, 0),
    Effort(20, 20, 6, 0.3, 12, 1, 1, 2, 1, 6, 0.15, 0),
    Effort(5, 18, 3, 0.25, 5, 1, 1, 1, 0, 0, 0.2, 0),
)


@checked_class
@dataclass(frozen=True)
class FitConfig:
    """Configure a fit of samplers. What is left out follows from the budget.

    Args:
        form: which coefficients are fitted.
        budget: network evaluations, counted singly (a guided one is one), for all samplers together; by default 30,000 for a small network
            (10 million weights, samples of 4096 numbers), else 3000.
        num: trajectories to fit to.
        held_out: held-out trajectories used for model selection and for the reported figures.
        levels: cells between the noise levels at which trajectories are stored, each one network evaluation.
        noises: number of trajectories (out of ``num``) on which the levels, and all coefficients together, are chosen.
        iterations: Jacobians of the sweep over all coefficients together, at most; 0 for no sweep.
        move: whether levels move from the grids and programs that they begin on.
        seed: seed of the first trajectory; far from those that benchmarks start with.
        batch: trajectories processed at a time; by default by the size of a sample.
        parent: the solver that coefficients are drawn to.
        storage: dtype of the stored trajectories: float16, bfloat16 or float32.
        first: whether samplers that foresee the first answer (`FirstAnswer`) are fitted too, and taken where they win. They take one step
            more for as many evaluations. There have to be some noises for each class, and a pipeline cannot use them.

    Raises:
        FewstepError: a number out of range, more noises than trajectories, an unknown dtype.
        SolverError: an unknown parent, or one that no fit can start from.
    """

    form: FitForm = field(default_factory=FitForm)
    budget: int | None = None
    num: int | None = None
    held_out: int | None = None
    levels: int | None = None
    noises: int | None = None
    iterations: int | None = None
    move: bool = True
    seed: int = 4_000_000
    batch: int | None = None
    parent: str = "dpm-solver-pp-2m"
    storage: str = "float16"
    first: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, budget=1, num=2, held_out=2, noises=2, levels=1, batch=1, iterations=0, seed=0)
        if self.noises is not None and self.num is not None and self.noises > self.num:
            raise FewstepError(f"noises are some of the num trajectories: at most {self.num}, got {self.noises}")
        look_up(self.storage, DTYPES, "dtype of trajectories")
        parent, law = make_solver(self.parent), VPLinear()
        if self.form.memory(PROBE) > 1:
            widened(tabulate(parent, parent.nodes(TimeGrid.logsnr(law, PROBE), law)), self.form, (1,))

    def parent_with(self, steps: int, form: FitForm | None = None) -> str:
        """Return the name of the parent on so many steps: ``ddim`` where a step may read a single output only."""
        return self.parent if (form or self.form).memory(steps) > 1 else "ddim"


@dataclass(frozen=True)
class FitPlan:
    """The plan of a fit: its numbers, and what they cost.

    Attributes:
        config: the configuration with nothing left out.
        counts: network evaluations of each sampler.
        effort: what is done with each noise.
        shape: of a sample.
        cells: network evaluations of a trajectory, which a discrete or infinite noise law makes another number than the levels that were
            asked for; 0 where trajectories are there.
        limit: the budget.
    """

    config: FitConfig
    counts: tuple[int, ...]
    effort: Effort
    shape: tuple[int, ...]
    cells: int
    limit: int

    def _number(self, name: str) -> int:
        value = getattr(self.config, name)
        assert value is not None  # a plan's configuration is whole
        return value

    @property
    def num(self) -> int:
        """The trajectories to fit to."""
        return self._number("num")

    @property
    def held_out(self) -> int:
        """The held-out trajectories."""
        return self._number("held_out")

    @property
    def levels(self) -> int:
        """The cells between the levels of a trajectory that are asked for."""
        return self._number("levels")

    @property
    def noises(self) -> int:
        """The trajectories on which levels and sweeps are chosen."""
        return self._number("noises")

    @property
    def ranking(self) -> int:
        """The trajectories that rank levels to begin with."""
        return max(2, min(self.effort.ranking, self.noises))

    @property
    def few(self) -> bool:
        """Whether only a few levels to begin with are tried."""
        return self.effort.ranking <= FEW_NOISES

    @property
    def batch(self) -> int:
        """The trajectories processed at a time."""
        return self._number("batch")

    @property
    def form(self) -> FitForm:
        """The coefficients that are fitted."""
        return self.config.form

    @property
    def trajectories(self) -> TrajectoryConfig:
        """The configuration of the teacher's trajectories, held-out ones last."""
        config = self.config
        return TrajectoryConfig(self.num + self.held_out, self.levels, seed=config.seed, batch=self.batch, dtype=config.storage)

    @property
    def fewest(self) -> int:
        """The fewest noises in any part of the work: as many processes can share it."""
        return min(self.num, self.held_out, self.noises, self.ranking, *((self.effort.rivals,) if self.effort.rivals else ()))

    @property
    def foresees(self) -> bool:
        """Whether samplers that foresee the first answer are fitted too."""
        return self.config.first

    def sweeps(self, nfe: int) -> int:
        """Return the Jacobians of all coefficients together, for a sampler of so many evaluations."""
        return self._number("iterations") if nfe <= self.effort.swept else 0

    def stages(self) -> dict[str, int]:
        """Return the network evaluations of each stage, at most or about, for all samplers together."""
        num, held_out, noises, effort = self.num, self.held_out, self.noises, self.effort
        of: dict[str, int] = dict.fromkeys(STAGES, 0)
        of["trajectories"] = (num + held_out) * self.cells + min(CHECKED, num) * -(-self.cells // 2) + TIMED + 1
        for n in self.counts:
            rows = n + self.foresees
            run = rows - 1  # the answers at the start are shared, or foreseen
            ways = 2 if self.foresees else 1
            of["levels to begin with"] += ways * (self.ranking + (FEW if self.few else CANDIDATES) * self.ranking * run)
            if self.config.move:
                of["levels"] += noises * (1 + effort.starts * (run + effort.descents * (rows * run // 2 + effort.steps * run)))
            of["coefficients"] += num + ways * num * run
            if self.sweeps(n):
                columns = sum((i + 2) * (run - i) for i in range(rows)) + rows * run // 2  # for the Jacobian of one noise, at most
                of["sweep"] += noises + self.sweeps(n) * noises * (columns + STEPS * run) + num * run
            found = (2 if self.sweeps(n) else 1) + ways - 1
            rivals = len(GRIDS) * 4 * effort.rivals if effort.rivals else FEW_RIVALS * min(2, num)
            of["check on held-out noises"] += held_out + held_out * run * (found + 1) + rivals * n
        return of

    @property
    def evaluations(self) -> int:
        """The network evaluations of all stages."""
        return sum(self.stages().values())

    @property
    def disk(self) -> int:
        """The bytes that it writes, about."""
        each = {"float32": 4}.get(self.config.storage, 2)
        coefficients = sum(n * 2 * (2 + n) * 8 for n in self.counts) * math.prod(self.form.shape(self.shape))
        return (self.num + self.held_out) * self.cells * math.prod(self.shape) * each + coefficients + 2**20

    @property
    def memory(self) -> int:
        """The bytes of host memory that it takes beside the network, about."""
        most, dim = max(self.counts) + self.foresees, math.prod(self.shape)
        sequence = self.num * (2 * most + 1) * dim * NUMBER
        levels = COPIES * self.noises * (2 * most + 1) * dim * NUMBER
        equations = min(self.batch, self.num) * (most + 3) * dim * 8 * 2 + math.prod(self.form.shape(self.shape)) * (most + 2) ** 2 * 8 * 8
        return sequence + levels + equations + 2**28

    def check(self, folder: Path) -> None:
        """Refuse a plan that this machine has no room for.

        Raises:
            FewstepError: too little disk or memory (how much).
        """
        beside = next(path for path in (folder, *folder.parents) if path.exists())
        free, host = shutil.disk_usage(beside).free, available_memory()
        for what, needed, there in (("disk", self.disk, free), ("memory", self.memory, host)):
            if there is not None and needed > there:
                raise FewstepError(
                    f"this fit needs about {needed / 2**30:.1f} GiB of {what}, and {there / 2**30:.1f} GiB are free: give it a smaller "
                    f"budget, or fewer num and held_out"
                )


def default_budget(model: Model) -> int:
    """Return the budget of a fit where none is named, by the size of the network and of its samples alone."""
    network = model.network
    weights = sum(weight.numel() for weight in network.parameters()) if isinstance(network, nn.Module) else CHEAP + 1
    return SMALL if weights <= CHEAP and math.prod(model.need_shape()) <= ELEMENTS else LARGE


def plan_of(
    config: FitConfig,
    counts: Sequence[int],
    shape: Sequence[int],
    budget: int,
    cells: Callable[[int], int] = lambda levels: levels,
    named: str = "that are named",
    least: int = 0,
) -> FitPlan:
    """Plan a fit: the most thorough one within the budget, with the numbers that the configuration names as they are.

    Args:
        config: what is named.
        counts: network evaluations of each sampler.
        shape: of a sample.
        budget: network evaluations, where the configuration names none.
        cells: the network evaluations of a trajectory by the levels that are asked for.
        named: what an error calls the numbers of the configuration.
        least: the fewest trajectories to fit to.

    Raises:
        FewstepError: the budget is too small, alone or for the numbers that are named; seeds beyond 2^63.
    """
    dim, counts, shape = math.prod(shape), tuple(counts), tuple(shape)
    room = max(8, CACHED // ((2 * max(counts) + 1) * dim))
    pool = config.form.pool or default_pool(shape)
    config = replace(config, form=replace(config.form, pool=pool), batch=config.batch or max(1, min(128, TOGETHER // dim)))
    limit = budget if config.budget is None else config.budget

    def plan(effort: Effort, num: int) -> FitPlan:
        whole = _whole(config, num, effort, max(counts))
        swept = effort if config.iterations is None else effort._replace(swept=max(counts))  # as many as are named
        return FitPlan(whole, counts, swept, shape, cells(whole.levels or 0), limit)

    found = None
    if config.num is not None and config.budget is None:  # as many noises as are named, whatever it costs
        found = plan(next((one for one in EFFORTS if one.least <= config.num), EFFORTS[-1]), config.num)
    for effort in EFFORTS if found is None else ():
        sizes = [size for size in _sizes(config, effort, room, least) if size >= least]
        found = next((one for one in (plan(effort, num) for num in sizes) if one.evaluations <= limit), None)
        if found is not None:
            break
    if found is not None:
        _ = found.trajectories  # seeds beyond 2^63 are refused here
        return found
    fixed = " and ".join(name for name in ("num", "held_out", "levels", "noises") if getattr(config, name) is not None)
    raise FewstepError(
        f"a budget of {limit} network evaluations is too small for samplers of {', '.join(map(str, counts))}"
        f"{f' with the {fixed} {named}' if fixed else ''}: the least fit takes "
        f"{plan(EFFORTS[-1], config.num or max(EFFORTS[-1].least, config.noises or 0, least)).evaluations}"
    )


def _sizes(config: FitConfig, effort: Effort, room: int, fewest: int) -> list[int]:
    """Return the numbers of noises that are tried for an effort, the largest first."""
    if config.num is not None:
        return [config.num] if config.num >= effort.least or effort is EFFORTS[-1] else []
    least = max(effort.least, config.noises or 0, fewest)
    sizes = [least] if least <= room else []
    while sizes and sizes[-1] < min(2048, room):
        sizes.append(min(room, 2048, sizes[-1] + max(1, sizes[-1] // 8)))
    return sizes[::-1]


def _whole(config: FitConfig, num: int, effort: Effort, most: int) -> FitConfig:
    """Return a configuration with nothing left out, for samplers of at most ``most`` evaluations."""
    by_effort: Mapping[str, int] = {
        "num": num,
        "held_out": max(3, round(num * effort.held_out)),
        "levels": max(effort.levels, 2 * most),
        "noises": min(num, max(3, min(effort.noises, round(num * effort.share)))),
        "iterations": effort.sweeps,
    }
    return replace(config, **{name: value for name, value in by_effort.items() if getattr(config, name) is None})
