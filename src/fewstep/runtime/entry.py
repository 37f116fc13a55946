"""Functions and classes of other modules, named as ``module:function``: from the name to what it names, and back."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.runtime.errors import FewstepError, first_line

__all__ = ["Entry", "imported", "is_entry", "named"]

PLAIN = (type(None), bool, int, float, str)
TUPLE = "tuple"  # the only key of what stands for a tuple, which JSON does not have


def is_entry(peer: str) -> bool:
    """Return whether a name has the form ``module:function``."""
    return ":" in peer


def imported(entry: str) -> Callable[..., Any]:
    """Import the function or class that ``module:function`` or ``module:Class.method`` names.

    Raises:
        FewstepError: the module cannot be imported, or has no such function (and why).
    """
    module, _, name = entry.partition(":")
    if not module or not name:
        raise FewstepError(f"{entry!r} names no function: say module:function, as my_module:my_function")
    try:
        with _working_directory_on_path():
            function = functools.reduce(getattr, name.split("."), importlib.import_module(module))
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


# -- from a function to its name ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A function or class by its name, with keyword arguments, as a JSON file holds it.

    Attributes:
        name: ``module:function``.
        options: keyword arguments, plain JSON values.
    """

    name: str
    options: dict[str, Any]

    def function(self) -> Callable[..., Any]:
        """Import the function, bound to the keyword arguments. This runs the code of its module.

        Raises:
            FewstepError: it cannot be imported.
        """
        found, options = imported(self.name), {key: _from_json(value) for key, value in self.options.items()}
        return functools.partial(found, **options) if options else found


def named(function: Any, what: str) -> Entry:  # noqa: ANN401 - whatever was passed for a function
    """Return the entry that a function or class, or a ``functools.partial`` of one, can be imported by again.

    Args:
        function: a function or class at the top of a module, or a `functools.partial` of one with plain keyword arguments.
        what: what the error calls it.

    Raises:
        FewstepError: it has no name in a module that can be imported, or arguments that no JSON file holds (and how to mend it).
    """
    options: Mapping[str, Any] = {}
    if isinstance(function, functools.partial):
        if function.args:
            raise FewstepError(f"{what} is a functools.partial with arguments that have no names: give them as keywords")
        function, options = function.func, function.keywords
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    mend = "write it as a function or class at the top of a module of yours, as my_module.py, and import it from there"
    if not isinstance(module, str) or not isinstance(name, str):
        raise FewstepError(f"{what} is an object of the class {type(function).__name__}, which has no name to import it by: {mend}")
    if module == "__main__":
        raise FewstepError(f"{what} is {name} of the script that is running, which no other program can import: {mend}")
    if "<" in name:
        kind = "a lambda" if name.endswith("<lambda>") else f"{name.rpartition('.')[2]}, made inside a function"
        raise FewstepError(f"{what} is {kind}, which has no name to import it by: {mend}")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not function:
        raise FewstepError(f"{what} is not what {module}:{name} is now: {mend}")
    return Entry(f"{module}:{name}", {key: _to_json(value, f"{what}: its argument {key}") for key, value in options.items()})


def _to_json(value: Any, what: str) -> Any:  # noqa: ANN401
    """Return a plain value as JSON has it, with tuples marked.

    Raises:
        FewstepError: it holds something else.
    """
    if isinstance(value, PLAIN) and type(value) in PLAIN:
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise FewstepError(f"{what} is {value}, which no JSON file holds") from None
        return value
    if isinstance(value, tuple) and type(value) is tuple:
        return {TUPLE: [_to_json(one, what) for one in value]}
    if type(value) is list:
        return [_to_json(one, what) for one in value]
    if type(value) is dict and all(isinstance(key, str) for key in value) and set(value) != {TUPLE}:
        return {key: _to_json(one, what) for key, one in value.items()}
    raise FewstepError(
        f"{what} is a {type(value).__name__}: only numbers, words, None, and lists, tuples and dicts of them can be written down"
    )


def _from_json(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        inside = {key: _from_json(one) for key, one in value.items()}
        return tuple(inside[TUPLE]) if set(inside) == {TUPLE} else inside
    return [_from_json(one) for one in value] if isinstance(value, list) else value
