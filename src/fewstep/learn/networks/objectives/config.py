"""Options that all methods of distillation share."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fewstep.learn.networks.loop import LoopConfig
from fewstep.learn.teacher.trajectories import TrajectoryConfig
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.front_door import at_least, check_fields, checked_class

__all__ = ["STORED", "StudentConfig"]


STORED = ("num", "fresh", "teacher_nfe")  # options of stored trajectories


@checked_class
@dataclass(frozen=True)
class StudentConfig:
    """Configure the training of a student of any kind.

    Args:
        dropout: dropout in the network's blocks.
        steps: training steps.
        batch: trajectories, or pictures, in a step.
        lr: learning rate at its peak.
        weight_decay: weight decay of AdamW.
        ema: decay of the averaged weights, which are saved.
        mixed_precision: no, bf16, fp16.
        num: stored trajectories to learn from.
        held_out: held-out trajectories after them, which measure.
        fresh: share of each batch that is not stored but solved while training.
        teacher_nfe: network evaluations of the teacher per trajectory.
        guidance: scale at which the teacher samples; the student takes labels but no scale.
        seed: seed of the first trajectory; far from those that benchmarks start with.
        half: save the weights in float16.

    Raises:
        FewstepError: a number out of range, or an unknown word.
    """

    dropout: float = 0.0
    steps: int = 6000
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.0
    ema: float = 0.999
    mixed_precision: str = "no"
    num: int = 16384
    held_out: int = 512
    fresh: float = 0.0
    teacher_nfe: int = 32
    guidance: float = 1.0
    seed: int = 6_000_000
    half: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, num=1, held_out=2, teacher_nfe=1)
        if not 0 <= self.seed < 2**63:
            raise FewstepError(f"seeds must lie between 0 and 2^63, got {self.seed}: choose another seed")
        if not 0 <= self.fresh <= 1 or not 0 <= self.dropout < 1:
            raise FewstepError(f"fresh lies in [0, 1], dropout in [0, 1), got {self.fresh} and {self.dropout}")
        _ = self.loop

    def check_unused(self, *names: str) -> None:
        """Refuse options that would change nothing, where they are not at their defaults.

        Raises:
            FewstepError: one is not (which).
        """
        for one in fields(self):
            if one.name in names and getattr(self, one.name) != one.default:
                raise FewstepError(f"{one.name} changes nothing here, since nothing is learned from stored trajectories: leave it out")

    @property
    def loop(self) -> LoopConfig:
        """The configuration of the training loop."""
        options = {"weight_decay": self.weight_decay, "ema": self.ema, "seed": self.seed, "mixed_precision": self.mixed_precision}
        return LoopConfig(self.steps, self.batch, self.lr, min(200, self.steps // 10), **options)

    @property
    def all_steps(self) -> int:
        """The number of training steps of all students that are made."""
        return self.steps

    @property
    def trajectories(self) -> TrajectoryConfig:
        """The configuration of the training trajectories followed by held-out ones."""
        return TrajectoryConfig(self.num + self.held_out, self.teacher_nfe, seed=self.seed, guidance=self.guidance)
