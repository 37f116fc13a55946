"""The classifier or loss that a command guides by."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from fewstep.core.denoiser import Cond
from fewstep.models.classifier import CLASSIFIERS, load_classifier
from fewstep.models.gradient_guidance import GradientGuidance
from fewstep.models.model import Model
from fewstep.runtime.entry import imported, is_entry
from fewstep.runtime.errors import FewstepError, ModelError, first_line, nearest
from fewstep.runtime.front_door import is_count
from fewstep.sampling.splitting import SCHEMES, LogProb, Splitting

__all__ = ["classifier_of"]

JOINT = "joint"


def classifier_of(name: str | None, model: Model, *, scale: float | None, split: str | None, kick: str | None) -> GradientGuidance | None:
    """Return the guidance that was typed, or None.

    Args:
        name: of a bundled classifier, or ``module:function``: ``(x [B, *D], t, labels) -> [B]``, whose attribute ``classes`` says how many
            labels it takes; without it those of the model.
        model: what is guided.
        scale, split, kick: as typed.

    Raises:
        FewstepError: its options without it, an unknown word.
        ModelError: no such classifier, or one of other samples.
    """
    typed = [f"--{option}" for option, value in (("scale", scale), ("split", split), ("kick", kick)) if value is not None]
    if name is None:
        if typed:
            raise FewstepError(f"{' and '.join(typed)} {'is' if len(typed) == 1 else 'are'} for --classifier: say which")
        return None
    if split not in (None, JOINT, *SCHEMES):
        raise FewstepError(f"--split is {', '.join(SCHEMES)} or {JOINT}, got {split!r}")
    if split == JOINT and kick is not None:
        raise FewstepError("--kick is for splitting: leave it out, or say --split lie or strang")
    splitting = None if split == JOINT else Splitting(split or SCHEMES[0], **({} if kick is None else {"kick": kick}))
    if is_entry(name) and not Path(name).exists():
        function = imported(name)
        classes = getattr(function, "classes", model.classes)
        if not (classes is None or is_count(classes)):
            raise ModelError(f"the attribute classes of {name} is the number of its labels, got {classes!r}")
        return GradientGuidance(_told(name, function), _one(scale), splitting, classes, name)
    if name not in CLASSIFIERS:
        raise ModelError(f"no classifier {name!r}: {nearest(name, CLASSIFIERS)}; one of your own is module:function")
    network = load_classifier(name)
    if model.need_shape() != network.shape:
        raise ModelError(f"the classifier {name} knows samples of shape {network.shape}, and those of {model.name} are {model.shape}")
    return GradientGuidance(network.to(model.device).log_prob(model.schedule), _one(scale), splitting, network.classes, name)


def _told(name: str, function: Callable[..., Tensor]) -> LogProb:
    """Return a function of the caller's own whose errors are of one line.

    Raises:
        ModelError: it does not take three arguments; later, whatever it raises.
    """
    try:
        inspect.signature(function).bind(*ARGUMENTS)
    except TypeError as error:
        raise ModelError(f"{name} cannot be called with {', '.join(ARGUMENTS)} ({error}): {HOW}") from error
    except ValueError:  # a function in C that does not say what it takes
        pass

    def log_prob(x: Tensor, t: Tensor, labels: Cond) -> Tensor:
        try:
            return function(x, t, labels)
        except FewstepError:
            raise
        except (Exception, SystemExit) as error:  # whatever another's function does
            raise ModelError(f"{name} failed: {type(error).__name__}: {first_line(error)}; {HOW}") from error

    return log_prob


ARGUMENTS = ("x", "t", "labels")
HOW = "it is a function (x [B, *D], t, labels) -> log p [B], of which the gradient by x is taken"


def _one(scale: float | None) -> float:
    return 1.0 if scale is None else scale
