"""The models, the jobs and the folder that the tabs of one page share; and how errors become sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from fewstep.apps.page.jobs import Jobs
from fewstep.apps.page.models import Models
from fewstep.apps.page.shown import refused
from fewstep.runtime.errors import FewstepError

__all__ = ["Workshop", "worded"]


@dataclass(frozen=True)
class Workshop:
    """The things that one page works with.

    Attributes:
        out: its folder, outside of which the browser reads and writes nothing.
        models: to choose from.
        jobs: that run in the background.
    """

    out: Path
    models: Models
    jobs: Jobs


def worded(function: Callable[..., list[Any]], kept: int) -> Callable[..., list[Any]]:
    """Return a handler whose errors are sentences in the last of its outputs, the ``kept`` others staying as they are."""

    def handler(*values: Any) -> list[Any]:  # noqa: ANN401 - from a browser
        try:
            return function(*values)
        except (FewstepError, OSError) as error:
            return [*(gr.skip() for _ in range(kept)), refused(error)]

    return handler
