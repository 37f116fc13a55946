"""The description of a model beside its weights, as ``fewstep.json`` and the header of a single file hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.core.schedule import NoiseSchedule
from fewstep.models.networks.calls import NetworkTime

__all__ = ["description"]


def description(
    kind: str,
    options: Mapping[str, Any],
    schedule: NoiseSchedule,
    prediction: str,
    time: NetworkTime,
    shape: tuple[int, ...],
    classes: int | None,
    null_label: int | None,
) -> dict[str, Any]:
    """Return a JSON-able description, which `folders.described` reads back.

    Args:
        kind: the class of the network.
        options: arguments of its constructor.
        schedule: its noise law.
        prediction: its prediction type.
        time: its own time.
        shape: the shape of one sample.
        classes: number of class labels, or None.
        null_label: the label that stands for no condition, or None.
    """
    return {
        "network": {"class": kind, "options": dict(options)},
        "prediction": prediction,
        "schedule": schedule.to_config(),
        "time": {"form": time.form, "scale": time.scale, "factor": time.factor},
        "shape": shape,
        "classes": classes,
        "null_label": null_label,
    }
