"""Names with options as text: ``unipc-3``, ``ddim:eta=0.5``, ``dpm-solver-pp-3m:third_order=corrected``, ``angle:c=0.7``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from fewstep.runtime.errors import FewstepError

__all__ = ["as_typed", "check_options", "merged", "parse_spec"]


def parse_spec(text: str, error: type[FewstepError]) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of ``name:option=value:option=value``; values are JSON, or else words.

    Args:
        text: the name with its options.
        error: the class of the errors.

    Raises:
        error: it is no text, an option has no value, or is said twice.
    """
    if not isinstance(text, str):
        raise error(f"a name is text, as 'ddim:eta=0.5', got {type(text).__name__} {str(text)[:80]}")
    name, *parts = text.split(":")
    options: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise error(f"{text!r} should read name:option=value, but has {part!r}")
        if key in options:
            raise error(f"{text!r} says {key} twice: leave one out")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return name, options


def as_typed(value: float) -> str:
    """Return a number as it is typed, in few digits that give it back exactly.

    Examples:
        >>> from fewstep.runtime.spec import as_typed
        >>> as_typed(2.0), as_typed(1.2345678), as_typed(1e-9)
        ('2', '1.2345678', '1e-09')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def merged(text: str, written: dict[str, Any], given: dict[str, Any], error: type[FewstepError]) -> dict[str, Any]:
    """Return the options in a name with those beside it.

    Raises:
        error: one is in both, with two values.
    """
    for key in written.keys() & given.keys():
        if written[key] is not given[key] and written[key] != given[key]:
            raise error(f"{text!r} says {key}={written[key]}, and {key}={given[key]!r} is passed beside it: leave one out")
    return {**written, **given}


def check_options(
    options: dict[str, Any], factory: Callable[..., Any], what: str, error: type[FewstepError], hidden: tuple[str, ...] = ()
) -> None:
    """Refuse options that a factory does not take.

    Args:
        options: the options by name.
        factory: the function or class that they are for.
        what: how the error calls it.
        error: the class of the errors.
        hidden: parameters of the factory that are no options.

    Raises:
        error: it lacks one; the message lists those it has.
    """
    known = [name for name in inspect.signature(factory).parameters if name not in hidden]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise error(f"{what} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
