"""diffusers: every sampler of this library as a scheduler, and every pipeline as a model.

`FewstepScheduler` needs diffusers and is imported on first use; saved pipelines name it by this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.integrations.diffusers.scheduler import FewstepScheduler, FewstepSchedulerOutput, SchedulerMixin

__all__ = ["FewstepScheduler", "FewstepSchedulerOutput", "SchedulerMixin"]  # the last is what a pipeline's loader looks for here


def __getattr__(name: str) -> Any:  # noqa: ANN401 - one of three classes
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fewstep.integrations.diffusers import scheduler

    return getattr(scheduler, name)
