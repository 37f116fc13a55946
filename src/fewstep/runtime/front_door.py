"""Checks of what is passed to public functions: what does not exist or has no meaning there is refused, and the error says what to pass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cache, wraps
from numbers import Real
from operator import index
from types import NoneType, UnionType
from typing import Any, ParamSpec, SupportsFloat, TypeVar, Union, get_args, get_origin, get_type_hints

from fewstep.runtime.errors import FewstepError, ModelError, nearest

__all__ = [
    "at_least",
    "check_fields",
    "check_size",
    "checked",
    "checked_class",
    "config_of",
    "is_count",
    "number",
    "plain",
    "scale_of",
    "whole",
    "wholes",
]

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


def is_count(value: Any) -> bool:  # noqa: ANN401
    """Return whether a value, of whatever type, is a whole number of at least 1."""
    try:
        return not isinstance(value, bool) and bool(int(value) == value) and int(value) >= 1
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def whole(value: Any, name: str, error: type[FewstepError] = FewstepError, *, many: bool = False) -> int:  # noqa: ANN401
    """Return a whole number of any library.

    Args:
        value: what was passed.
        name: what the error calls it.
        error: the class of the error.
        many: whether several would do too, for the error.

    Raises:
        error: it is none.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        several = " or a list of them, as [5, 8]" if many else ""
        raise error(f"{name} is a whole number{several}, got {value!r}") from None


def wholes(value: Any, name: str, error: type[FewstepError] = FewstepError) -> list[int]:  # noqa: ANN401
    """Return one or several whole numbers as a list in their order, each once.

    Raises:
        error: it is something else.
    """
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) == 1
    return list(dict.fromkeys(whole(one, name, error, many=True) for one in (value if several else (value,))))


def scale_of(value: Any, default: float) -> float:  # noqa: ANN401
    """Return a guidance scale, or the default for None.

    Raises:
        ModelError: it is no finite number.
    """
    found = default if value is None else _float(value)
    if not math.isfinite(found):
        raise ModelError(f"guidance is a scale, as 2.0, got {found if value is None else repr(value)}")
    return found


def number(value: Any, name: str, error: type[FewstepError] = FewstepError) -> float:  # noqa: ANN401
    """Return a number of any library as a float; it may be infinite.

    Raises:
        error: it is none.
    """
    found = _float(value)
    if math.isnan(found):
        raise error(f"{name} is a number, got {str(value)[:80]!r}")
    return found


def plain(value: Any, kind: type[T], name: str, error: type[FewstepError] = FewstepError) -> T:  # noqa: ANN401
    """Return a number, switch or word of any library as one of Python's.

    Args:
        value: what was passed.
        kind: `bool`, `int`, `float` or `str`.
        name: what the error calls it.
        error: the class of the error.

    Raises:
        error: it is of another kind, or NaN.
    """
    if kind is float:
        return kind(number(value, name, error))
    test, make, meaning = _TYPES[kind]
    if not test(value):
        raise error(f"{name} is {meaning}, got {value!r}")
    return make(value)


def _float(value: Any) -> float:  # noqa: ANN401
    try:
        return float(value) if isinstance(value, SupportsFloat) and not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def config_of(value: Any, kind: type[T]) -> T:  # noqa: ANN401
    """Return a configuration, or the default one for None.

    Raises:
        FewstepError: it is something else.
    """
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise FewstepError(f"config is a {kind.__name__}, as fewstep.{kind.__name__}(...), got {value!r}")
    return value


def check_fields(config: Any) -> None:  # noqa: ANN401
    """Check the types of the numbers, switches and words in a dataclass, and make numbers of other libraries plain ones.

    Raises:
        FewstepError: one is of another type, or NaN.
    """
    cls = type(config)
    for field in fields(config):
        value, kind, optional = getattr(config, field.name), *_kinds(cls)[field.name]
        if kind not in _TYPES or (optional and value is None):
            continue
        test, make, meaning = _TYPES[kind]
        if not test(value):
            raise FewstepError(f"{cls.__name__}: {field.name} is {meaning}, got {value!r}")
        object.__setattr__(config, field.name, make(value))


def at_least(config: Any, **least: float) -> None:  # noqa: ANN401
    """Check that numbers of a dataclass are not below the ``least`` of them, by name, nor of an absurd size; None is not a number.

    Raises:
        FewstepError: one is (which); see `check_size`.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:
            raise FewstepError(f"{name} is at least {bound:g}, got {value}")
        if value is not None:
            check_size(name, value)


_CALLS = "few-step solvers need 5 to 50, references 1000; each is a call of the network for every sample, and a row of numbers in memory"
_SAMPLES = "they take weeks, and no memory holds them together: make several runs, each with a seed of its own"
_BATCH = "a batch is in memory as a whole: take one that fits, as 256, and the rest follows in further batches"
_MOST = {  # by name: the largest that has a meaning, and what a larger one would cost
    **dict.fromkeys(("nfe", "steps of a grid", "teacher_nfe", "levels", "slots"), (10_000, _CALLS)),
    **dict.fromkeys(("num", "held_out", "noises", "samples"), (10_000_000, _SAMPLES)),
    "batch": (1_000_000, _BATCH),
}


def check_size(name: str, value: float, error: type[FewstepError] = FewstepError) -> None:
    """Refuse a number of absurd size before anything is computed or held for it; names without a limit pass.

    Args:
        name: of the number, as ``nfe``, ``num``, ``batch`` or ``levels``.
        value: the number.
        error: the class of the error.

    Raises:
        FewstepError: it is larger than any that has a meaning (and what it would cost).
    """
    most, cost = _MOST.get(name, (math.inf, ""))
    if value > most:
        raise error(f"{name} is at most {most:,}, got {value:,}: {cost}")


@cache
def _kinds(cls: type) -> dict[str, tuple[Any, bool]]:
    """Return the type of each field of a dataclass, and whether it may be None; no type where there is a choice of several."""
    found: dict[str, tuple[Any, bool]] = {}
    for name, hint in get_type_hints(cls).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        others = [kind for kind in kinds if kind is not NoneType]
        found[name] = others[0] if len(others) == 1 else None, NoneType in kinds
    return found


def _is_whole(value: Any) -> bool:  # noqa: ANN401
    try:
        index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _is_number(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, Real) and not math.isnan(_float(value))  # NaN too where it is too large for a float


_TYPES: dict[type, tuple[Callable[[Any], bool], Callable[[Any], Any], str]] = {
    bool: (lambda value: isinstance(value, bool), bool, "True or False"),
    int: (_is_whole, index, "a whole number"),
    float: (_is_number, float, "a number"),
    str: (lambda value: isinstance(value, str), str, "a word"),
}
