"""Functions of other modules, named as ``module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.runtime.errors import FewstepError, first_line

__all__ = ["imported", "is_entry"]


def is_entry(peer: str) -> bool:
    """Return whether a name has the form ``module:function``."""
    return ":" in peer


def imported(entry: str) -> Callable[..., Any]:
    """Import the function that ``module:function`` names.

    Raises:
        FewstepError: the module cannot be imported, or has no such function (and why).
    """
    module, _, name = entry.partition(":")
    if not module or not name:
        raise FewstepError(f"{entry!r} names no function: say module:function, as my_module:my_function")
    try:
        with _working_directory_on_path():
            function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever another's module does when it is imported
        raise FewstepError(f"cannot import {entry}: {type(error).__name__}: {first_line(error)}") from error
    if not callable(function):
        raise FewstepError(f"{entry} is not a function but a {type(function).__name__}")
    return function


@contextmanager
def _working_directory_on_path() -> Generator[None, None, None]:
    """Put the working directory on the import path, as ``python -m`` does and an installed command does not."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
