"""Names with options, as people type them: ``unipc-3``, ``ddim:eta=0.5``, ``dpm-solver-pp-3m:third_order=corrected``, ``angle:c=0.7``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from fewstep.runtime.errors import FewstepError

__all__ = ["check_options", "parse_spec"]


def parse_spec(text: str, error: type[FewstepError]) -> tuple[str, dict[str, Any]]:
    """The name and the options of ``name:option=value:option=value``; values are JSON, or else words.

    Raises:
        error: an option without a value.
    """
    name, *parts = text.split(":")
    options: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise error(f"{text!r} should read name:option=value, but has {part!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return name, options


def check_options(
    options: dict[str, Any], factory: Callable[..., Any], what: str, error: type[FewstepError], hidden: tuple[str, ...] = ()
) -> None:
    """See that ``factory`` has these options.

    Raises:
        error: it lacks one; the message lists those it has.
    """
    known = [name for name in inspect.signature(factory).parameters if name not in hidden]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise error(f"{what} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
