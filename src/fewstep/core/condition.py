"""Conditions of networks: trees of what each sample is given, and what is done to all leaves of one.

A leaf is a tensor or numpy array ``[B, ...]``, or a list of B texts. Branches are tuples, lists, named tuples, mappings and dataclasses.
Plain values in them (numbers, words, None) are options, the same for all samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.core.denoiser import Cond
from fewstep.runtime.errors import ModelError, first_line

__all__ = ["check_batch", "moved", "part_of", "repeated", "with_null"]

OPTIONS = (type(None), bool, int, float, str, bytes, Enum, torch.dtype, torch.device)
WHOLE = "the condition"


def with_null(null: Cond, cond: Cond, count: int) -> Cond:
    """Return the condition of a doubled batch: the null condition for each sample, then ``cond``.

    Args:
        null: of the form of ``cond``; its leaves are those of one sample, or broadcast to those of the batch.
        cond: for ``count`` samples.
        count: the samples ``B``.

    Raises:
        ModelError: a part that is no condition, is for another number of samples, or has no counterpart in ``null`` (which part).
    """
    if isinstance(cond, OPTIONS):
        raise ModelError(f"guidance needs a condition for each sample, as labels [B], got {cond!r}: pass cond")

    def pair(leaf: Any, other: Any, where: str) -> Any:  # noqa: ANN401
        _check_length(leaf, count, where)
        if isinstance(leaf, list):
            return [*_texts(other, count, where), *leaf]
        if isinstance(leaf, Tensor):
            return torch.cat([_like(other, leaf, where), leaf])
        if leaf.dtype.kind == "U":
            return np.array([*_texts(other, count, where), *leaf.tolist()])
        return np.concatenate([_like(other, torch.as_tensor(leaf), where).numpy(), leaf])

    both = _walked(pair, WHOLE, cond, null)
    if not any(True for _ in _leaves(cond, WHOLE)):
        raise ModelError(f"guidance needs a condition for each sample, and {cond!r} has options alone: pass labels [B], or alike")
    return both


def check_batch(cond: Cond, count: int) -> None:
    """Refuse a condition with a tensor or array for another number of samples than ``count``; what is not known here is let pass.

    Raises:
        ModelError: there is one (which, and its shape).
    """
    for leaf, where in _leaves(cond, WHOLE):
        _check_length(leaf, count, where)


def repeated(cond: Cond, times: int) -> Cond:
    """Return the condition of the whole batch ``times`` times over."""

    def again(leaf: Any, where: str) -> Any:  # noqa: ANN401
        if isinstance(leaf, list):
            return leaf * times
        return torch.cat([leaf] * times) if isinstance(leaf, Tensor) else np.concatenate([leaf] * times)

    return _walked(again, WHOLE, cond)


def part_of(cond: Cond, rows: slice) -> Cond:
    """Return the condition of some samples of the batch."""

    def some(leaf: Any, where: str) -> Any:  # noqa: ANN401
        return leaf[rows]

    return _walked(some, WHOLE, cond)


def moved(cond: Cond, device: torch.device) -> Cond:
    """Return the condition with its tensors on a device."""

    def there(leaf: Any, where: str) -> Any:  # noqa: ANN401
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    return _walked(there, WHOLE, cond)


# -- the tree -----------------------------------------------------------------------------------------------------------


def _is_leaf(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, Tensor | np.ndarray):
        return True
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, str) for one in value)


def _branches(value: Any) -> list[tuple[Any, str, Any]] | None:  # noqa: ANN401
    """Return the parts of a branch, each with its key and how an error names it; None of something that is no branch."""
    if isinstance(value, Mapping):
        return [(key, f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [(i, f"[{i}]", part) for i, part in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(one.name, f".{one.name}", getattr(value, one.name)) for one in fields(value)]
    return None


def _leaves(value: Any, where: str) -> Iterator[tuple[Any, str]]:  # noqa: ANN401
    if _is_leaf(value):
        yield value, where
        return
    for _, key, part in _branches(value) or ():
        yield from _leaves(part, where + key)


def _walked(function: Callable[..., Any], where: str, value: Any, *others: Any) -> Any:  # noqa: ANN401
    """Return a tree of the same form with ``function(leaf, *others, where)`` of each leaf.

    Raises:
        ModelError: a part that is neither leaf, branch nor option; others of another form, or with other options.
    """
    if _is_leaf(value):
        _check_kind(value, where)
        return function(list(value) if isinstance(value, tuple) else value, *others, where)
    if isinstance(value, OPTIONS):
        for other in others:
            if type(other) is not type(value) or other != value:
                raise ModelError(f"{where} is {value!r}, but in the null condition {_shown(other)}: an option is the same in both")
        return value
    parts = _branches(value)
    if parts is None:
        raise ModelError(
            f"{where} is a {type(value).__name__}, which cannot be put together for a batch: make it of tensors [B, ...], in tuples, "
            "lists, dicts or dataclasses"
        )
    theirs = [_same_form(value, other, where) for other in others]
    made = [_walked(function, where + name, part, *(other[key] for other in theirs)) for key, name, part in parts]
    return _rebuilt(value, [key for key, _, _ in parts], made, where)


def _same_form(value: Any, other: Any, where: str) -> dict[Any, Any]:  # noqa: ANN401
    """Return the parts of ``other`` by their keys.

    Raises:
        ModelError: they are not those of ``value``.
    """
    ours, theirs = _branches(value) or [], _branches(other)
    found = None if theirs is None or isinstance(other, Tensor) else {key: part for key, _, part in theirs}
    if found is None or isinstance(value, Mapping) != isinstance(other, Mapping) or set(found) != {key for key, _, _ in ours}:
        names = ", ".join(name for _, name, _ in ours) or "no parts"
        raise ModelError(f"the null condition needs the form of {where}, a {type(value).__name__} of {names}; got {_shown(other)}")
    return found


def _rebuilt(value: Any, keys: list[Any], parts: list[Any], where: str) -> Any:  # noqa: ANN401
    """Return a branch of the type of ``value`` with other parts.

    Raises:
        ModelError: a copy of it would keep something of the samples, or is none.
    """
    if isinstance(value, tuple):
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return parts
    if isinstance(value, Mapping) and (type(value) is dict or not isinstance(value, MutableMapping)):
        return dict(zip(keys, parts, strict=True))
    _check_beside(value, keys, where)
    try:
        made: Any = copy.copy(value)
        for name in [name for name in getattr(made, "__dict__", ()) if isinstance(getattr(type(made), name, None), cached_property)]:
            del made.__dict__[name]  # it was computed from the parts of another batch
        for key, part in zip(keys, parts, strict=True):
            if not isinstance(made, MutableMapping):
                object.__setattr__(made, key, part)  # frozen ones, too
                continue
            before, made[key] = value[key], part
            if value[key] is not before:
                value[key] = before
                raise TypeError("a copy of it shares its values")
            if key in getattr(made, "__dict__", ()):
                made.__dict__[key] = part  # of one whose parts are its attributes, too
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{where} is a {type(value).__name__}, which cannot be copied ({first_line(error)}): pass a dict") from error
    return made


def _check_beside(value: Any, keys: list[Any], where: str) -> None:  # noqa: ANN401
    """Refuse a branch that holds tensors beside its parts, which would stay those of another batch."""
    for name, held in getattr(value, "__dict__", {}).items():
        known = name in keys or isinstance(getattr(type(value), name, None), cached_property)
        leaves = () if known or isinstance(held, MutableMapping) and isinstance(value, MutableMapping) else _leaves(held, "")
        if any(not isinstance(leaf, list | tuple) for leaf, _ in leaves):
            raise ModelError(
                f"{where} is a {type(value).__name__} that holds tensors in {name}, which is no field of it: make it one, or compute it in "
                "the network"
            )


# -- leaves -------------------------------------------------------------------------------------------------------------


def _check_kind(leaf: Any, where: str) -> None:  # noqa: ANN401
    """Refuse a tensor or array that cannot be put together for a batch."""
    odd, mend = None, ""
    if isinstance(leaf, Tensor) and leaf.layout != torch.strided:
        odd, mend = str(leaf.layout).removeprefix("torch."), "pass x.to_dense()"
    elif isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "biufcU":
        odd, mend = str(leaf.dtype), "make it one of numbers or of texts"
    if odd is not None:
        raise ModelError(f"{where} is a {type(leaf).__name__} of {odd}, which cannot be put together for a batch: {mend}")


def _check_length(leaf: Any, count: int, where: str) -> None:  # noqa: ANN401
    length = (leaf.shape[0] if leaf.ndim else None) if isinstance(leaf, Tensor | np.ndarray) else len(leaf)
    if length != count:
        raise ModelError(
            f"{where} is {_shown(leaf)}, which is not one for each of {count} samples: its first dimension is the batch; what all samples "
            "share belongs into the Model's call"
        )


def _like(other: Any, leaf: Tensor, where: str) -> Tensor:  # noqa: ANN401
    """Return the null condition of a tensor for every sample, in its dtype and on its device.

    Raises:
        ModelError: it has another shape, or values that the dtype does not have.
    """
    try:
        null = torch.as_tensor(other)
        cast = null.to(leaf.dtype)
        if leaf.is_floating_point() or bool((cast == null).all()):  # where null lies, so that no device is waited for
            return cast.to(leaf.device).expand_as(leaf)
    except (RuntimeError, TypeError, ValueError):
        pass
    raise ModelError(f"the null condition does not fit {where}, {_shown(leaf)}: it is {_shown(other)}; give it the shape of one sample's")


def _texts(other: Any, count: int, where: str) -> list[str]:  # noqa: ANN401
    texts = [other] * count if isinstance(other, str) else other.tolist() if isinstance(other, np.ndarray) else other
    if not isinstance(texts, list | tuple) or len(texts) != count or not all(isinstance(one, str) for one in texts):
        raise ModelError(f"{where} is {count} texts, and its null condition a text or one for each, got {_shown(other)}")
    return list(texts)


def _shown(value: Any) -> str:  # noqa: ANN401
    """Return what a part is, never its numbers."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    branches = _branches(value)
    if branches is not None:
        return f"a {type(value).__name__} of {len(branches)}"
    return str(value.item()) if isinstance(value, Tensor | np.ndarray) else repr(value)[:80]
