"""Plan a search for schedules: its configuration, and the numbers that a budget makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fewstep.learn.samplers.fit_plan import CHECKED, LARGE, TOGETHER, default_budget
from fewstep.learn.search.refine import STEPS
from fewstep.learn.teacher.gram import GramConfig, fine_grid
from fewstep.learn.teacher.trajectories import TrajectoryConfig
from fewstep.models.model import Model
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.front_door import at_least, check_fields, checked_class
from fewstep.sampling.reference import REFERENCE_NFE

__all__ = ["OptimizeConfig", "OptimizePlan", "plan_of"]

EVALUATIONS = 1920  # network evaluations of one calibration run, about: fewer noises for more steps
FEWEST = 64  # noises, though; as many rank the candidates
MANY_STEPS = 8  # beyond them only the best candidate is refined, not the two best
GRAM_BATCH = 64  # trajectories of the Gram matrix at a time, at most: its derivatives take more memory
# within a budget:
SHARE, HELD_OUT = 0.2, 6  # of the budget, for the trajectories; of those one in so many is held out
RANKING, CANDIDATES = 4, 14  # noises that rank grids, and how many those are, about
LEVELS = ((10_000, 32), (4000, 24), (0, 20))  # cells between levels from so large a budget on
ITERATIONS = ((3, 32), (2, 12), (1, 2))  # Jacobians of a refinement, and the fewest noises that they are for


@checked_class
@dataclass(frozen=True)
class OptimizeConfig:
    """Configure a search for schedules.

    Args:
        levels: cells between the noise levels that the dynamic programs choose from.
        num: trajectories that the error bound is averaged over.
        noises: noises that calibrate a schedule, at most; fewer for many steps.
        held_out: held-out noises, used for model selection and for the reported figures.
        seed: seed of the first noise; far from those that benchmarks start with.
        iterations: iterations of the refinement, at most.
        batch: noises processed at a time.
        budget: network evaluations, counted singly (a guided one is one), for all schedules of a solver together: the numbers above become
            as small as it asks for, and the error bound is that along the same trajectories. By default 3000 for a large network where no
            number is named.

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
        _ = GramConfig(self.levels, self.num)


@dataclass(frozen=True)
class OptimizePlan:
    """The numbers of a search.

    Attributes:
        config: what was asked for.
        small: whether it is within a budget: few trajectories, of few evaluations, serve for everything.
        levels, noises, held_out, iterations, batch: as in the configuration, or smaller.
        most: noises that calibrate a schedule, at most.
        cells: network evaluations of a trajectory.
    """

    config: OptimizeConfig
    small: bool
    levels: int
    noises: int
    held_out: int
    iterations: int
    batch: int
    most: int
    cells: int

    @property
    def gram(self) -> GramConfig:
        """The configuration of the Gram matrix."""
        return GramConfig(self.levels, self.config.num, batch=min(self.batch, GRAM_BATCH), jacobian=True)

    @property
    def exact(self) -> TrajectoryConfig:
        """The configuration of the exact trajectories: of many evaluations with only the endpoints stored, or of a few."""
        storage = "float16" if self.small else "float32"
        return TrajectoryConfig(self.noises + self.held_out, self.cells, seed=self.config.seed, batch=self.batch, dtype=storage)

    @property
    def fewest(self) -> int:
        """The fewest noises in any part of the work: as many processes can share it."""
        return min(self.calibrating(1), self.held_out, self.ranking)

    @property
    def ranking(self) -> int:
        """The noises that rank candidates, at most."""
        return RANKING if self.small else FEWEST

    def calibrating(self, nfe: int) -> int:
        """Return the number of noises that calibrate a schedule."""
        return self.most if self.small else max(min(FEWEST, self.noises), min(self.noises, EVALUATIONS // nfe))

    def refined(self, nfe: int) -> int:
        """Return the number of candidates that are refined."""
        return 1 if self.small or nfe > MANY_STEPS else 2

    def evaluations(self, counts: Sequence[int]) -> int:
        """Return the network evaluations of a small plan, at most or about."""
        total = (self.noises + self.held_out) * self.cells + min(CHECKED, self.noises) * -(-self.cells // 2)
        few = min(RANKING, self.most)
        for n in counts:
            refinement = self.iterations * (n * (n - 1) // 2 + STEPS * (n - 1)) + n
            total += (CANDIDATES + 1) * few * n + self.most * refinement + self.held_out * n * 4
        return total


def plan_of(config: OptimizeConfig, model: Model, counts: Sequence[int]) -> OptimizePlan:
    """Plan a search for a model. Its trajectories follow from the budget alone, so that schedules can be added to a folder.

    Raises:
        FewstepError: the budget is too small.
    """
    usual, budget = default_budget(model), config.budget
    if budget is None and usual == LARGE and replace(config, seed=0, batch=1) == OptimizeConfig(seed=0, batch=1):
        budget = usual
    if budget is None:
        numbers = (config.levels, config.noises, config.held_out, config.iterations, config.batch, config.noises)
        return OptimizePlan(config, False, *numbers, cells=REFERENCE_NFE)
    levels = min(config.levels, next(cells for least, cells in LEVELS if budget >= least))
    cells, batch = fine_grid(model.schedule, levels).steps, min(config.batch, max(1, TOGETHER // math.prod(model.need_shape())))
    made = max(8, int(SHARE * budget / cells))
    held_out = min(config.held_out, max(3, made // HELD_OUT))
    noises = min(config.noises, config.num, made - held_out)
    plan = OptimizePlan(config, True, levels, noises, held_out, 0, batch, noises, cells)
    for iterations, least in ITERATIONS:
        for most in range(noises, least - 1, -1):
            plan = replace(plan, iterations=min(config.iterations, iterations), most=most)
            if plan.evaluations(counts) <= budget:
                return plan
    raise FewstepError(
        f"a budget of {budget} network evaluations is too small for schedules of {', '.join(map(str, counts))} evaluations: with its "
        f"trajectories the least search takes {plan.evaluations(counts)}"
    )
