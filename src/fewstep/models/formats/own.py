"""Models whose network is a class of the caller's own, in a folder: a description that names its code, beside the weights.

The description (``fewstep.json`` of version 3) says how the network is built again: by a class or function that is imported by its name,
with plain keyword arguments. Importing runs code, so such a folder is read only for those who say that they trust it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.prediction import prediction
from fewstep.core.schedule import schedule_from_config
from fewstep.models.identity import digest, parts
from fewstep.models.model import Model
from fewstep.models.networks.calls import NetworkTime, edm_time, same_time, unwrapped
from fewstep.runtime.artifact import Count, Number, Record, Whole, parse_record
from fewstep.runtime.entry import Entry, named
from fewstep.runtime.errors import FewstepError, ModelError, first_line

__all__ = ["OwnRecord", "entries", "own_files", "own_model"]

TIMES = ((same_time, NetworkTime()), (edm_time, NetworkTime("log", 0.25)))  # functions, and the same as data
MEND = "make the Model with build=functools.partial(Net, ...) that makes the very network it holds, all arguments included"
BAD = 3  # names of weights that an error shows


@dataclass(frozen=True)
class TimeRecord:
    """The fields of a `NetworkTime` in a description."""

    form: str
    scale: Number
    factor: Number


@dataclass(frozen=True)
class OwnRecord(Record):
    """The fields of ``fewstep.json`` of version 3, see the module.

    Attributes:
        network: what builds the network.
        time: the fields of a `NetworkTime`, or None where one of the caller's own is imported.
        own_time: what is imported for that.
        call: what is imported to call the network, or None for the usual call.
        dtype, time_dtype: names of dtypes, or None.
        sha256: checksum of the weights.
    """

    FORMAT, VERSION = "fewstep-model", 3

    network: Entry
    prediction: str
    schedule: dict[str, Any]
    time: TimeRecord | None
    own_time: Entry | None
    call: Entry | None
    shape: list[Count]
    classes: Count | None
    null_label: Whole | None
    dtype: str | None
    time_dtype: str | None
    identity: str
    data: str | None
    sha256: str


def entries(meta: OwnRecord) -> list[str]:
    """Return the names of the code that a description imports."""
    return [one.name for one in (meta.network, meta.own_time, meta.call) if one is not None]


def own_files(model: Model) -> tuple[dict[str, Tensor], bytes]:
    """Return the weights of a model, and what the file of its description holds. The model is built again from them once, and compared.

    Raises:
        ModelError: something of it cannot be written down, or what is built is another model (what differs, and how to mend it).
    """
    if type(model) is not Model:
        raise ModelError(f"{model.name} is a {type(model).__name__}, whose network belongs to a pipeline: save the pipeline")
    network = model.network
    if not isinstance(network, nn.Module):
        raise ModelError(f"{model.name} is a function, which has no weights to save: make the Model of a torch.nn.Module")
    if model.domain is not None:
        raise ModelError(
            f"{model.name} cannot be saved: a reflected model is saved with a network of diffusers or of fewstep, in its own dtype and "
            "with the time log(sigma)/4, as fewstep train --kind reflected makes it"
        )
    network, kind = unwrapped(network), prediction(model.prediction)
    try:
        build = named(model.build or _plain_class(network), "build" if model.build else "its network's class")
        known = model.time if isinstance(model.time, NetworkTime) else next((data for one, data in TIMES if one is model.time), None)
        own_time = named(model.time, "time") if known is None else None
        call = None if model.call is None else named(model.call, "call")
    except FewstepError as error:
        raise ModelError(f"{model.name} cannot be saved: {error}") from error
    if not kind.is_named:
        raise ModelError(f"{model.name} cannot be saved: its prediction type is your own; use one of the names")
    weights = _weights(network, model.name)
    meta = {
        "network": asdict(build),
        "prediction": kind.name,
        "schedule": model.schedule.to_config(),
        "time": None if known is None else {"form": known.form, "scale": known.scale, "factor": known.factor},
        "own_time": None if own_time is None else asdict(own_time),
        "call": None if call is None else asdict(call),
        "shape": model.need_shape(),
        "classes": model.classes,
        "null_label": model.null_label,
        "dtype": _word(model.dtype),
        "time_dtype": _word(model.time_dtype),
        "identity": model.identity,
        "data": model.data,
        "sha256": _checksum(weights),
    }
    text = json.dumps({"format": OwnRecord.FORMAT, "version": OwnRecord.VERSION, **meta}, indent=1) + "\n"
    try:
        again = own_model(parse_record(text, OwnRecord, "its description"), weights, model.name, "its description")
    except FewstepError as error:
        raise ModelError(f"{model.name} cannot be saved, since it could not be loaded again: {error}; {MEND}") from error
    _compare(model, network, again)
    return weights, text.encode()


def _plain_class(network: nn.Module) -> type[nn.Module]:
    """Return the class of a network that is built without arguments.

    Raises:
        ModelError: it needs some.
    """
    kind = type(network)
    try:
        inspect.signature(kind).bind()
    except TypeError as error:
        name = kind.__name__
        raise ModelError(
            f"{name} cannot be built again without arguments ({error}): make the Model with build=functools.partial({name}, ...), with the "
            "keyword arguments that it was built with, or with build= a function of a module of yours that returns such a network"
        ) from error
    return kind


def _weights(network: nn.Module, name: str) -> dict[str, Tensor]:
    found = network.state_dict()
    if bad := [key for key, value in found.items() if not isinstance(value, Tensor)]:
        raise ModelError(f"{name} cannot be saved: {bad[0]} of its state is no tensor (get_extra_state), which safetensors does not hold")
    if bad := [key for key, value in found.items() if value.is_meta or value.layout != torch.strided or value.is_quantized]:
        raise ModelError(
            f"{name} cannot be saved: its weight {bad[0]} is on the meta device, sparse or quantised: load or convert it first"
        )
    return {key: value.detach().cpu().clone().contiguous() for key, value in found.items()}


def _checksum(weights: Mapping[str, Tensor]) -> str:
    """Return the checksum of weights with their names, dtypes and shapes."""
    sha = hashlib.sha256()
    for name, value in sorted(weights.items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _word(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _compare(model: Model, network: nn.Module, again: Model) -> None:
    """Refuse a model that was built again and is another.

    Raises:
        ModelError: it is (what differs).
    """
    try:
        ours, theirs = (dict(_digests(one)) for one in (network, again.network))
    except ModelError:  # what cannot be hashed has an identity, and weights that were just compared by name and shape
        ours = theirs = {}
    differ = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if differ:
        raise ModelError(f"{model.name} cannot be saved: built again, its network differs in {', '.join(differ[:BAD])}: {MEND}")
    if again.fingerprint != model.fingerprint:
        raise ModelError(f"{model.name} cannot be saved: built again, it has another fingerprint: {MEND}")


def _digests(network: Callable[..., Any]) -> list[tuple[str, str]]:
    """Return each part of a network with its hash."""
    return [(where, digest([(where, value)])) for where, value in parts(network, "network")]


def own_model(meta: OwnRecord, weights: Mapping[str, Tensor], name: str, where: object) -> Model:
    """Make the model of a description and its weights. This imports, and runs, the code that the description names.

    Args:
        meta: the description.
        weights: by name.
        name: of the model.
        where: what errors call the description.

    Raises:
        ModelError: code that cannot be imported or raises, or weights that do not fit it.
    """
    if _checksum(weights) != meta.sha256:
        raise ModelError(f"the weights beside {where} are damaged: their checksum is not the one there; fetch or make them again")
    try:
        schedule = schedule_from_config(meta.schedule)
        facts: dict[str, Any] = {
            "shape": tuple(meta.shape),
            "classes": meta.classes,
            "null_label": meta.null_label,
            "identity": meta.identity,
            "data": meta.data,
            "dtype": _dtype(meta.dtype),
            "time_dtype": _dtype(meta.time_dtype),
            "call": None if meta.call is None else meta.call.function(),
            "build": meta.network.function(),
            "name": name,
        }
        if meta.own_time is not None:
            facts["time"] = meta.own_time.function()
        elif meta.time is not None:
            facts["time"] = NetworkTime(**asdict(meta.time), schedule=schedule if meta.time.form == "sigma" else None)
        return Model(_built(facts["build"], meta.network.name, weights), schedule, meta.prediction, **facts)
    except FewstepError as error:
        raise ModelError(f"{where}: {error}") from error
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{where} does not describe a model: {error!r}; make it again") from error


def _dtype(word: str | None) -> torch.dtype | None:
    found = None if word is None else getattr(torch, word)
    if not isinstance(found, torch.dtype | None):
        raise ModelError(f"{word!r} is no dtype")
    return found


def _built(build: Callable[..., Any], entry: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """Build a network and give it its weights, in their dtypes; the state of PyTorch's random numbers stays as it was.

    Raises:
        ModelError: the code raises, returns something else than a module, or has other weights (which).
    """
    try:
        with torch.random.fork_rng(devices=[]):
            network = build()
    except Exception as error:  # whatever another's code raises
        raise ModelError(f"{entry} built no network: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"{entry} returned a {type(network).__name__}, not a torch.nn.Module")
    own = network.state_dict()
    bad = [f"lacks {key}" for key in own if key not in weights] + [f"has {key}, which is not known" for key in weights if key not in own]
    bad += [
        f"has {key} of shape {list(weights[key].shape)}, not {list(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if bad:
        more = f", and {len(bad) - BAD} more" if len(bad) > BAD else ""
        raise ModelError(f"the weights do not fit what {entry} builds: the file {'; it '.join(bad[:BAD])}{more}")
    kinds = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(kinds) == 1:
        network.to(next(iter(kinds)))  # with the buffers that are not saved
    for key, value in network.state_dict(keep_vars=True).items():
        value.data = value.data.to(weights[key].dtype)  # tied weights stay tied, as they would not if tensors were replaced
    network.load_state_dict(dict(weights))
    return network.eval().requires_grad_(False)
