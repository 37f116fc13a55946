"""Parts of a model that its answers depend on, which tell it from any other: to hash, the same on any machine.

A module is its weights in C order, its own settings and those of its submodules, without the shells of ``torch.compile`` and
``DataParallel``. A setting is a plain attribute; tensors that are not saved with a module are what it has computed, and no part of it. A
function is its source with the values that it holds. What is neither is refused, rather than taken for something else.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.models.networks.calls import unwrapped
from fewstep.runtime.errors import ModelError

__all__ = ["Part", "digest", "parts", "state_of"]

LIBRARIES = ("accelerate", "diffusers", "einops", "fewstep", "math", "numpy", "peft", "safetensors", "timm", "torch", "transformers")
BARE = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_is_hf_initialized", "_is_torch_compile"}  # of any module
ADAPTED = ("scale", "scaling", "_active_adapter", "_disable_adapters")  # how much of an adapter (LoRA, IP-adapter) is added
PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, np.generic)
PLACES = (torch.device, PurePath, ModuleType)  # where something is, which changes no answer

Part = tuple[str, Any]  # where it is, and a tensor or plain value


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight that is read when it is needed: one of an offloaded module."""

    weights: Mapping[str, Tensor]
    name: str


LEAVES = (*PLAIN, Tensor, np.ndarray, Stored)


def digest(found: Iterable[Part]) -> str:
    """Return the hash of parts.

    Raises:
        ModelError: a weight without values.
    """
    sha = hashlib.sha256()
    for where, value in found:
        sha.update(where.encode())
        for chunk in _bytes(value, where):
            sha.update(chunk)
    return sha.hexdigest()[:16]


def state_of(found: Iterable[Part]) -> tuple[object, ...]:
    """Return what says cheaply whether parts have changed: where tensors lie and how often they were written, and plain values.

    Whole numbers and what is in lists and alike are left out: modules count calls and keep records in them.
    """

    def state(where: str, value: Any) -> object:  # noqa: ANN401
        if isinstance(value, Tensor):
            written = 0 if value.is_inference() else value._version  # noqa: SLF001 - the only record of it
            return id(value), 0 if value.layout != torch.strided or value.is_meta else value.data_ptr(), written
        if isinstance(value, np.ndarray | Stored):
            return id(value if isinstance(value, np.ndarray) else value.weights)
        counted = isinstance(value, int) and not isinstance(value, bool)
        listed = where.endswith("]") and not any(f".{name}[" in where for name in ADAPTED)
        return None if counted or listed else repr(value)

    return tuple((where, state(where, value)) for where, value in found)


def parts(value: Any, where: str = "", known: dict[int, tuple[str, Any]] | None = None) -> Iterator[Part]:  # noqa: ANN401
    """Yield the tensors and plain values that a network, function or value consists of, in an order that does not depend on the machine.

    Args:
        value: what to take apart.
        where: how its parts are called.
        known: the modules, functions and objects that were taken apart before, by id, with where they were.

    Raises:
        ModelError: something that cannot be told from others of its kind (what, and where).
    """
    if isinstance(value, LEAVES):
        yield where, value
        return
    known = {} if known is None else known
    value = value if isinstance(value, nn.Module) else getattr(value, "_torchdynamo_orig_callable", value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module) and value.__name__ == "forward":
        value = value.__self__  # what a module that was compiled twice holds
    value = unwrapped(value) if isinstance(value, nn.Module) else value
    if isinstance(value, PLACES):
        return
    if isinstance(value, type | BuiltinFunctionType):
        yield where, value.__qualname__
    elif isinstance(value, set | frozenset):
        yield from parts(sorted(value, key=repr), where, known)
    elif isinstance(value, MethodType):
        yield from parts((value.__self__, value.__func__), where, known)
    elif isinstance(value, functools.partial):
        yield from parts((value.func, value.args, value.keywords), where, known)
    elif id(value) in known:
        yield where, f"as {known[id(value)][0]}"
    else:
        known[id(value)] = where, value  # kept, so that no other has its id
        if isinstance(value, Mapping):
            named = {key: part for key, part in value.items() if not str(key).startswith("_")}  # a library's version, for one
            for key in sorted(named, key=repr):
                yield from parts(named[key], f"{where}[{key!r}]", known)
        elif isinstance(value, list | tuple):
            for i, part in enumerate(value):
                yield from parts(part, f"{where}[{i}]", known)
        elif isinstance(value, nn.Module):
            yield from _of_module(value, where, known)
        elif isinstance(value, FunctionType):
            yield from _of_function(value, where, known)
        else:
            yield from _of_object(value, where, known)
        if isinstance(value, Mapping | list | tuple):
            del known[id(value)]  # equal ones may be one in one process and two in another


# -- modules ------------------------------------------------------------------------------------------------------------


def _of_module(module: nn.Module, where: str, known: dict[int, tuple[str, Any]], configured: bool = False) -> Iterator[Part]:
    """Yield the parts of a module. Below one of a library that has a configuration, that configuration says what its submodules are."""
    library, kept = _is_library(type(module)), module.__dict__
    settings = _settings(module)
    if not (library and configured):
        yield where, type(module).__name__
        if library:
            yield where, module.extra_repr() if settings is None else ""
    for key, value in sorted((settings or {}).items()):
        yield from parts(value, f"{where}.config.{key}", known)
    hook = kept.get("_hf_hook")
    for name, value in sorted(kept.items()):
        replaced = name == "forward" and hook is None  # accelerate's hooks put one in its place
        if name in BARE or name in ("forward", "_hf_hook", "_old_forward") and not replaced:
            continue
        adapted = name in ADAPTED and _is_adapter(type(module))
        if replaced or not library or adapted:
            value = tuple(value) if adapted and isinstance(value, list) else value  # one scale for each IP-adapter
            yield from _of_attribute(value, f"{where}.{name}", known)
    fleeting = module._non_persistent_buffers_set  # noqa: SLF001 - a module computes these
    for name, value in sorted([*module._parameters.items(), *module._buffers.items()]):  # noqa: SLF001
        if value is not None and name not in fleeting:
            yield f"{where}.{name}", _loaded(value, name, hook)
    for name, child in sorted(module._modules.items()):  # noqa: SLF001
        if child is not None:
            yield from _of_module(unwrapped(child), f"{where}.{name}", known, configured or settings is not None)


def _of_attribute(value: Any, where: str, known: dict[int, tuple[str, Any]]) -> Iterator[Part]:  # noqa: ANN401
    """Yield the parts of a module's attribute or of a global that is a setting; none of what it has computed, of a logger and alike."""
    if not _is_setting(value):
        return
    try:
        found = list(parts(value, where, known))
    except ModelError:
        return
    yield from found


def _is_setting(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, tuple | Mapping):
        return all(map(_is_setting, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, (*PLAIN, type, FunctionType, BuiltinFunctionType, MethodType, functools.partial)) or is_dataclass(value)


def _settings(module: nn.Module) -> dict[str, Any] | None:
    """Return the configuration of a diffusers model where it differs from its class's defaults, which later versions add to."""
    config = getattr(module, "config", None)
    if not _is_library(type(module)) or not isinstance(config, Mapping):
        return None
    usual = {name: one.default for name, one in inspect.signature(type(module).__init__).parameters.items()}

    def listed(value: object) -> object:
        return list(value) if isinstance(value, tuple) else value  # as JSON gives it back

    return {key: listed(value) for key, value in config.items() if not key.startswith("_") and listed(value) != listed(usual.get(key))}


def _loaded(value: Tensor, name: str, hook: Any) -> Tensor | Stored:  # noqa: ANN401
    """Return a weight, or where accelerate keeps it while the module is offloaded."""
    if not value.is_meta:
        return value
    for one in getattr(hook, "hooks", (hook,)):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            return Stored(weights, name)
    return value


# -- functions and other objects ----------------------------------------------------------------------------------------


def _of_function(function: FunctionType, where: str, known: dict[int, tuple[str, Any]]) -> Iterator[Part]:
    """Yield a function's source, and the values that it holds: defaults, closure, and what it reads of its module."""
    library = _is_library(function)
    yield where, function.__qualname__ if library else _source(function)
    for i, value in enumerate(function.__defaults__ or ()):
        yield from parts(value, f"{where}.default[{i}]", known)
    for name, value in sorted((function.__kwdefaults__ or {}).items()):
        yield from parts(value, f"{where}.default.{name}", known)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield from parts(cell.cell_contents, f"{where}.{name}", known)
    for name in () if library else sorted(_names(function.__code__)):
        value = function.__globals__.get(name)
        if isinstance(value, nn.Module | Tensor | np.ndarray):
            yield from parts(value, f"{where}.{name}", known)
        elif value is not None and not isinstance(value, type) and not _is_library(value):
            yield from _of_attribute(value, f"{where}.{name}", known)


def _source(function: FunctionType) -> str:
    """Return the text of a function; of a lambda, that of its body alone, since others may stand on its lines."""
    code = function.__code__
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        return repr((code.co_code, [c for c in code.co_consts if isinstance(c, PLAIN)], code.co_names, code.co_varnames))
    places = [place for place in getattr(code, "co_positions", tuple)() if None not in place]  # from Python 3.11 on
    if function.__name__ != "<lambda>":
        return textwrap.dedent("".join(lines))
    if not places:
        return f"{''.join(lines)}{code.co_code!r}{code.co_consts!r}"
    start = min((line, column) for line, _, column, _ in places if column is not None)
    end = max((line, column) for _, line, _, column in places if line is not None and column is not None)
    text = [line.encode() for line in lines[start[0] - first : end[0] - first + 1]]  # columns are bytes
    text[-1] = text[-1][: end[1]]
    text[0] = text[0][start[1] :]
    return f"lambda {', '.join(code.co_varnames[: code.co_argcount])}: {b' '.join(part.strip() for part in text).decode()}"


def _names(code: CodeType) -> set[str]:
    """Return the names that code reads, with those of the functions inside it."""
    return {*code.co_names}.union(*(_names(one) for one in code.co_consts if isinstance(one, CodeType)))


def _of_object(value: Any, where: str, known: dict[int, tuple[str, Any]]) -> Iterator[Part]:  # noqa: ANN401
    """Yield the parts of an object: what it says of itself (a fingerprint, a configuration), or its fields.

    Raises:
        ModelError: it has none.
    """
    said = getattr(value, "fingerprint", None)
    described = getattr(value, "to_config", None)
    if isinstance(said, str):
        yield where, said
    elif callable(described):
        yield from parts(described(), where, known)
    elif is_dataclass(value) or hasattr(value, "__dict__"):
        held = {one.name: getattr(value, one.name) for one in fields(value)} if is_dataclass(value) else vars(value)
        yield where, type(value).__name__
        for name, part in sorted(held.items()):
            if not (_is_library(type(value)) and (name.startswith("_") or name.endswith("_version"))):
                yield from parts(part, f"{where}.{name}", known)
    else:
        raise ModelError(
            f"this model cannot be told from others: {where.strip('.') or 'its network'} is a {type(value).__name__}, whose values are not "
            "known; make the Model with identity=, a word for its weights and code"
        )


def _is_adapter(kind: type) -> bool:
    return kind.__module__.startswith("peft") or "Adapter" in kind.__name__


def _is_library(value: Callable[..., Any] | Any) -> bool:  # noqa: ANN401
    return str(getattr(value, "__module__", "")).partition(".")[0] in LIBRARIES


# -- values -------------------------------------------------------------------------------------------------------------


def _bytes(value: Any, where: str) -> Iterator[bytes]:  # noqa: ANN401
    """Yield the bytes that stand for a tensor or plain value."""
    if isinstance(value, Stored):
        value = value.weights[value.name]
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        if value.is_meta:
            raise ModelError(
                f"the weight {where.strip('.')} is on the meta device, without values: load it, or make the Model with identity=, a word "
                "for its weights and code"
            )
        value = value.detach().resolve_conj().resolve_neg()
        if value.layout != torch.strided:
            whole = value.coalesce() if value.layout == torch.sparse_coo else value.to_sparse_coo().coalesce()
            yield from _bytes(whole.indices(), where)
            value = whole.values()
        value = value.dequantize() if value.is_quantized else value
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.generic):
        yield repr(value.item()).encode()
    elif isinstance(value, float) and math.isfinite(value):
        yield value.hex().encode()
    else:
        yield f"{type(value).__name__} {value!r}".encode()
