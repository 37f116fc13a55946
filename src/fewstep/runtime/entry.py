"""Functions of other people's modules, named as ``module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.runtime.errors import FewstepError

__all__ = ["imported", "is_entry"]


def is_entry(peer: str) -> bool:
    """Whether a peer is named as ``module:function``."""
    return ":" in peer


def imported(entry: str) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    Raises:
        FewstepError: the module cannot be imported, or has no such function (and why).
    """
    module, _, name = entry.partition(":")
    if not module or not name:
        raise FewstepError(f"{entry!r} names no function: say module:function, as my_samplers:sample_euler")
    try:
        with _working_directory_on_path():
            function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever another's module does when it is imported
        raise FewstepError(f"cannot import {entry}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise FewstepError(f"{entry} is not a function but a {type(function).__name__}")
    return function


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    """As ``python -m`` has it, which an installed command does not."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
