"""Name the objectives that students are trained for, as ``distill(model, METHOD)`` and ``fewstep distill --method`` take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from fewstep.learn.networks.objectives.operator import DistillConfig, OperatorObjective
from fewstep.models.networks.temporal_unet import Mixing
from fewstep.models.problem import Problem
from fewstep.runtime.errors import FewstepError

__all__ = ["OBJECTIVES", "DistillConfig"]

Features = Callable[[Tensor], Tensor] | None
APART = "none"  # slots that do not meet


def _dsno(problem: Problem, config: DistillConfig, features: Features) -> OperatorObjective:
    """Make an operator whose slots meet in temporal layers."""
    if config.form.mixing.form == APART:
        raise FewstepError("the slots of dsno meet in temporal layers: say mixing real, fft or one-way, or use the method slots")
    return OperatorObjective(problem, config, features)


def _slots(problem: Problem, config: DistillConfig, features: Features) -> OperatorObjective:
    """Make an operator without temporal layers, whose slots do not meet: a control."""
    mixing: Mixing = replace(config.form.mixing, form=APART)
    return OperatorObjective(problem, replace(config, form=replace(config.form, mixing=mixing)), features)


def _kd(problem: Problem, config: DistillConfig, features: Features) -> OperatorObjective:
    """Make an operator of one slot: knowledge distillation."""
    if config.slots not in (None, 1):
        raise FewstepError(f"kd has one slot, got {config.slots}: use the method slots, or leave slots out")
    return _slots(problem, replace(config, slots=1), features)


OBJECTIVES: dict[str, Callable[[Problem, DistillConfig, Features], OperatorObjective]] = {"dsno": _dsno, "slots": _slots, "kd": _kd}
