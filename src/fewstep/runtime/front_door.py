"""Checks of the arguments of public functions: one that does not exist is refused with the name to pass instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from fewstep.runtime.errors import FewstepError, nearest

__all__ = ["checked", "checked_class"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def checked(function: Callable[P, R], name: str | None = None) -> Callable[P, R]:
    """Wrap a public function so that a misspelt, missing or doubled argument raises a `FewstepError`, as every other mistake does.

    Args:
        function: the function; a class method is wrapped below ``@classmethod``.
        name: how the error calls it; by default its own name.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            unknown = [key for key in kwargs if key not in signature.parameters]
            shown = [key for key in signature.parameters if key not in ("self", "cls", "_")]
            hint = f"; {nearest(unknown[0], shown)}" if unknown else f"; it takes {', '.join(shown)}"
            raise FewstepError(f"{name or function.__name__}: {error}{hint}") from None
        return function(*args, **kwargs)

    return call


def checked_class(cls: type[T]) -> type[T]:
    """Wrap the constructor of a public class as `checked` wraps a function."""
    constructor: Any = checked(cls.__init__, cls.__name__)
    cls.__init__ = constructor
    return cls
