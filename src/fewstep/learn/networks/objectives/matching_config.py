"""Options of distribution matching distillation: DMD, and EM distillation."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from fewstep.learn.networks.objectives.config import STORED, StudentConfig
from fewstep.learn.networks.score_matching import check_log_levels
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.front_door import at_least, checked_class, number

__all__ = ["EMConfig", "EStep", "MatchingConfig"]


MOST = 1000  # Langevin steps
MOST_PASSES = 100


class EStep(NamedTuple):
    """The E-step of a training step, see `direction`.

    Attributes:
        langevin: its number of Langevin steps ``K``.
        step_e, step_z: their sizes.
        cancel: whether the known part of their noise is dropped.
    """

    langevin: int = 1
    step_e: float = 1.0
    step_z: float = 0.0
    cancel: bool = True


@checked_class
@dataclass(frozen=True)
class MatchingConfig(StudentConfig):
    """Configure distribution matching distillation (DMD): a generator of few passes that makes the right pictures in the right proportions.

    Args:
        start: the noise level ``sigma/alpha`` at which the teacher's network begins to make pictures; by default 2.5, or that of the
            student to begin with.
        updates: updates of the fake, the denoiser of the generator's own samples, for each of the generator.
        before: its updates before the first of the generator.
        pair: weight of the regression onto stored pairs of noise and picture, which keeps the pairing of a student to begin with.
        p_mean, p_std: mean and deviation of the logarithm of the noise levels at which teacher and fake are compared.
        measures: measures of the generator on held-out noises, by which the best weights are chosen.
        passes: passes of the generator; each after the first begins at the last one's samples, noised anew to a lower level.
        levels: the noise levels ``sigma/alpha`` at which several passes begin, descending; by default even steps in
            ``arctan(sigma/alpha)`` from the start down.
        fake_end: the fake's learning rate at the end, in that at its start: twice that of the generator. It falls as half a cosine, so that
            the noise of its updates does not move the generator for ever; 1 keeps it.
        fake_rank: the rank of updates to the teacher's own layers, of which the fake then consists; by default it is a whole copy of the
            teacher's network.

    Raises:
        FewstepError: a number out of range.
    """

    steps: int = 2000
    lr: float = 2e-4
    ema: float = 0.99
    start: float | None = None
    updates: int = 2
    before: int = 20
    pair: float = 0.0
    p_mean: float = -0.6
    p_std: float = 1.6
    measures: int = 20
    passes: int = 1
    levels: tuple[float, ...] | None = None
    fake_end: float = 0.05
    fake_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, updates=1, before=0, measures=1, held_out=4, passes=1, fake_rank=1)  # a recall takes more than 3 samples
        if self.passes > MOST_PASSES:
            raise FewstepError(f"passes are {MOST_PASSES} at most, got {self.passes}: so many steps the teacher takes better by itself")
        if self.updates + self.before > 4000:
            raise FewstepError(f"updates and before are 4000 together at most, got {self.updates} and {self.before}: take fewer")
        if self.dropout:
            raise FewstepError(f"a generator with dropout makes other pictures at each call, got dropout {self.dropout}: leave it out")
        if self.start is not None and not 0 < self.start < math.inf:
            raise FewstepError(f"start is a noise level sigma/alpha, a positive number, got {self.start}: at infinity there is no picture")
        if not 0 <= self.pair < math.inf:
            raise FewstepError(f"pair, the weight of the regression onto stored pairs, is not negative, got {self.pair}")
        if not 0 < self.fake_end <= 1:
            raise FewstepError(f"fake_end, the share of the fake's rate that is left at the end, lies in (0, 1], got {self.fake_end}")
        check_log_levels(self.p_mean, self.p_std)
        if not self.pair:
            self.check_unused(*STORED)
        elif self.passes > 1:
            raise FewstepError(
                f"pair is for a generator of one pass, whose noise leads to one picture; {self.passes} passes add noise: leave pair out"
            )
        self._check_levels()

    def _check_levels(self) -> None:
        """Refuse noise levels of the passes that are not one for each, and make a tuple of a list."""
        if self.levels is None:
            return
        listed = self.levels if isinstance(self.levels, tuple | list) else (self.levels,)
        levels = tuple(number(level, "each of levels") for level in listed)
        if not levels or not 0 < levels[-1] <= levels[0] < math.inf or any(low >= high for high, low in itertools.pairwise(levels)):
            raise FewstepError(f"levels are noise levels sigma/alpha, positive and descending, as levels=(2.5, 0.7), got {self.levels!r}")
        if self.passes == 1:
            raise FewstepError("levels are those of several passes: say passes=2, or more; the level of one pass is start")
        if len(levels) != self.passes:
            raise FewstepError(f"levels are one for each of {self.passes} passes, got {len(levels)}: {', '.join(f'{u:g}' for u in levels)}")
        if self.start is not None:
            raise FewstepError("the first of the levels is the start: leave start out")
        object.__setattr__(self, "levels", levels)

    @property
    def e_step(self) -> EStep:
        """The E-step: one step that leaves the noise of the generator where it is."""
        return EStep()


@checked_class
@dataclass(frozen=True)
class EMConfig(MatchingConfig):
    """Configure EM distillation: distribution matching by several Langevin steps for each training step.

    One step with ``step_z`` 0 is DMD, exactly.

    Args:
        langevin: number of Langevin steps.
        step_e: their size in the noise that is added to a sample.
        step_z: their size in the noise that the generator is given; 0 leaves that where it is, and takes no derivative of the generator.
        cancel: drop the part of the noise that is known to be no signal.

    Raises:
        FewstepError: a number out of range.
    """

    langevin: int = 4
    step_e: float = 0.4
    step_z: float = 0.05
    cancel: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, langevin=1)
        if self.langevin > MOST:
            raise FewstepError(f"langevin is at most {MOST}, got {self.langevin}: the noise of all steps is drawn at once")
        if not 0 < self.step_e <= 1 or not 0 <= self.step_z <= 1:
            raise FewstepError(f"step_e lies in (0, 1], step_z in [0, 1], got {self.step_e} and {self.step_z}")

    @property
    def e_step(self) -> EStep:
        return EStep(self.langevin, self.step_e, self.step_z, self.cancel)
