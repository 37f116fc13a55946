"""Name the methods of distillation, as ``distill(model, METHOD)`` and ``fewstep distill --method`` take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from fewstep.data.images import Images
from fewstep.learn.networks.objectives.config import StudentConfig
from fewstep.learn.networks.objectives.flow_map import FlowMapConfig, FlowMapObjective
from fewstep.learn.networks.objectives.guided import GuidedConfig, GuidedObjective
from fewstep.learn.networks.objectives.matching import JudgeOfSamples, MatchingObjective
from fewstep.learn.networks.objectives.matching_config import EMConfig, MatchingConfig
from fewstep.learn.networks.objectives.matching_few import FewPassObjective
from fewstep.learn.networks.objectives.objective import StudentObjective
from fewstep.learn.networks.objectives.operator import DistillConfig, OperatorObjective
from fewstep.learn.networks.objectives.progressive import ProgressiveConfig, ProgressiveObjective
from fewstep.models.model import Model
from fewstep.models.networks.temporal_unet import Mixing
from fewstep.models.problem import Problem
from fewstep.runtime.errors import FewstepError

__all__ = [
    "OBJECTIVES",
    "DistillConfig",
    "EMConfig",
    "FlowMapConfig",
    "Given",
    "GuidedConfig",
    "MatchingConfig",
    "Method",
    "ProgressiveConfig",
    "StudentConfig",
]

APART = "none"  # slots that do not meet


class Given(NamedTuple):
    """Data that a method may learn from beside the teacher.

    Attributes:
        features: network of the loss ``features``, from pictures ``[B, *D]`` to ``[B, F]``.
        images: pictures.
        judge: a measure of samples that chooses among weights.
        begin: a student to begin with.
    """

    features: Callable[[Tensor], Tensor] | None = None
    images: Images | None = None
    judge: JudgeOfSamples | None = None
    begin: Model | None = None


@dataclass(frozen=True)
class Method:
    """A method of distillation.

    Attributes:
        config: its configuration.
        make: ``(problem, config, given) -> objective``.
        takes: the names of the data in `Given` that it takes.
        about: a few words, for help.
        every_scale: whether it takes a model that is told its guidance scale, at all its scales.
    """

    config: type[StudentConfig]
    make: Callable[[Problem, Any, Given], StudentObjective]
    takes: tuple[str, ...]
    about: str
    every_scale: bool = False


def _dsno(problem: Problem, config: DistillConfig, given: Given) -> OperatorObjective:
    """Make an operator whose slots meet in temporal layers."""
    if config.form.mixing.form == APART:
        raise FewstepError("the slots of dsno meet in temporal layers: say mixing real, fft or one-way, or use the method slots")
    return OperatorObjective(problem, config, given.features)


def _slots(problem: Problem, config: DistillConfig, given: Given) -> OperatorObjective:
    """Make an operator without temporal layers, whose slots do not meet: a control."""
    mixing: Mixing = replace(config.form.mixing, form=APART)
    return OperatorObjective(problem, replace(config, form=replace(config.form, mixing=mixing)), given.features)


def _kd(problem: Problem, config: DistillConfig, given: Given) -> OperatorObjective:
    """Make an operator of one slot: knowledge distillation."""
    if config.slots not in (None, 1):
        raise FewstepError(f"kd has one slot, got {config.slots}: use the method slots, or leave slots out")
    return _slots(problem, replace(config, slots=1), given)


def _flow_map(problem: Problem, config: FlowMapConfig, given: Given) -> FlowMapObjective:
    """Make one student for any number of passes."""
    return FlowMapObjective(problem, config, given.images)


def _guided(problem: Problem, config: GuidedConfig, given: Given) -> GuidedObjective:
    """Make one student that is told its guidance scale."""
    return GuidedObjective(problem, config, given.images)


def _progressive(problem: Problem, config: ProgressiveConfig, given: Given) -> ProgressiveObjective:
    """Make a student of half as many steps."""
    return ProgressiveObjective(problem, config)


def _matching(problem: Problem, config: MatchingConfig, given: Given) -> MatchingObjective:
    """Make a generator whose samples have the right distribution."""
    kind = MatchingObjective if config.passes == 1 else FewPassObjective
    return kind(problem, config, given.judge, given.begin)


OBJECTIVES: dict[str, Method] = {
    "flow-map": Method(FlowMapConfig, _flow_map, ("images",), "any number of passes", every_scale=True),
    "guided": Method(GuidedConfig, _guided, ("images",), "one call for any guidance scale"),
    "progressive": Method(ProgressiveConfig, _progressive, (), "half as many steps, again and again", every_scale=True),
    "dmd": Method(MatchingConfig, _matching, ("judge",), "one pass, or a few, that match distributions"),
    "em": Method(EMConfig, _matching, ("judge",), "the same by Langevin steps (EM distillation)"),
    "dsno": Method(DistillConfig, _dsno, ("features",), "slots that meet in temporal layers"),
    "slots": Method(DistillConfig, _slots, ("features",), "slots that do not meet"),
    "kd": Method(DistillConfig, _kd, ("features",), "one slot"),
}
