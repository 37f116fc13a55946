"""EDM's network pickles (Karras et al., arXiv 2206.00364), read without running anything in them.

A pickle can run any program when it is opened in the ordinary way. Here nothing in it is called: every class it names must be one of
`KNOWN`, and stands for an empty record. The tensors are decoded, as weights only, when the whole file was accepted.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor

from fewstep.core.schedule import DiscreteVP, NoiseSchedule, VarianceExploding, VPLinear
from fewstep.models.formats.description import description
from fewstep.models.formats.state_dicts import Weights, at_the_end
from fewstep.models.networks.calls import NetworkTime
from fewstep.runtime.errors import ModelError, look_up

__all__ = ["KNOWN", "edm_network", "read_edm"]

KNOWN = {  # what a plain pickle of EDM's networks names; each stands for a record of its arguments
    ("torch_utils.persistence", "_reconstruct_persistent_obj"),
    ("torch.nn.modules.container", "ModuleDict"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.storage", "_load_from_bytes"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
}
PERSISTENCE = 6  # the version of EDM's persistent objects
TRAINING_ONLY = ("dropout", "label_dropout", "use_fp16")


class _Record:
    """The place of an object of a pickle: the arguments it would have been made with, and no code."""

    kind: str
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Record:  # noqa: ANN401 - whatever the file says
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:  # noqa: ANN401
        self.state = state


class _Unpickler(pickle.Unpickler):
    """A reader of pickles that makes records alone, of classes made anew for each file, so that no file can leave anything in them."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if (module, name) in KNOWN:
            return type(name, (_Record,), {"kind": name})
        if (module, name) == ("dnnlib.util", "EasyDict"):
            return type(name, (dict,), {})
        if (module, name) in (
            ("collections", "OrderedDict"),
            ("builtins", "set"),
            ("__builtin__", "set"),
        ):  # hold what they are given; cannot be altered
            return OrderedDict if name == "OrderedDict" else set
        raise ModelError(f"the file names {module}.{name}, which no EDM network needs: it was refused, and nothing of it has run")

    def persistent_load(self, pid: Any) -> Any:  # noqa: ANN401
        raise ModelError(f"the file refers to an object outside it, {pid!r}: it is no EDM network pickle")


def _tensor(value: Any) -> Tensor:  # noqa: ANN401
    """Return the tensor of a record; its bytes are a stream of torch's own, read as weights only."""
    if isinstance(value, _Record) and value.kind == "_rebuild_parameter":
        return _tensor(value.args[0])
    if not isinstance(value, _Record) or value.kind != "_rebuild_tensor_v2":
        raise ModelError(f"where a tensor should be, the file has {getattr(value, 'kind', type(value).__name__)}")
    stored, offset, size, stride = value.args[:4]
    if getattr(stored, "kind", None) != "_load_from_bytes":
        raise ModelError("a tensor in the file has no numbers")
    storage = torch.load(io.BytesIO(stored.args[0]), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ModelError(f"where the numbers of a tensor should be, the file has {type(storage).__name__}")
    tensor = _rebuild_tensor(storage, offset, size, stride).clone()
    return tensor.float() if tensor.is_floating_point() else tensor


def plain(value: Any) -> Any:  # noqa: ANN401
    """Return an option of a network as JSON; numpy's scalars are decoded from their bytes."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, _Record) and value.kind == "scalar":
        dtype, data = value.args
        codes = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "b1": "?"}
        return struct.unpack("<" + codes[dtype.args[0]], data)[0]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ModelError(f"an option in the file is a {getattr(value, 'kind', type(value).__name__)}, not a number or a word")


def _persistent(value: Any) -> tuple[str, dict[str, Any]]:  # noqa: ANN401
    """Return the class name and the state of one of EDM's persistent objects; the program in it is skipped."""
    if not isinstance(value, _Record) or value.kind != "_reconstruct_persistent_obj":
        raise ModelError("the file has no network in EDM's form at 'ema'")
    meta = value.args[0]
    if meta["type"] != "class" or meta["version"] != PERSISTENCE:
        raise ModelError(f"the file has a persistent {meta['type']} of version {meta['version']}; only a class of {PERSISTENCE} is known")
    return meta["class_name"], meta["state"]


def _collect(value: Any, prefix: str, into: Weights) -> Weights:  # noqa: ANN401
    """Return the state dict of a module and its children, added to ``into``."""
    state = value.state if value.kind == "ModuleDict" else _persistent(value)[1]
    passing = state.get("_non_persistent_buffers_set", ())
    own = {**state["_parameters"], **{key: buffer for key, buffer in state["_buffers"].items() if key not in passing}}
    into.update({prefix + key: _tensor(tensor) for key, tensor in own.items() if tensor is not None})
    for key, child in state["_modules"].items():
        if child is not None:
            _collect(child, f"{prefix}{key}.", into)
    return into


def read_edm(path: Path) -> tuple[dict[str, Any], Weights]:
    """Return EDM's own options and the weights from its pickle.

    Raises:
        ModelError: a class that no EDM network needs, or a file of another kind.
    """
    with path.open("rb") as file:
        data = _Unpickler(file).load()
    if not isinstance(data, dict) or "ema" not in data:
        raise ModelError(f"{path} is a pickle without 'ema', where EDM keeps the network")
    name, state = _persistent(data["ema"])
    inner, network = _persistent(state["_modules"]["model"])
    if network["_init_args"]:
        raise ModelError("the network's options lie in the file without their names")
    law = {key: plain(state[key]) for key in EDM_LAWS.get(name, ()) if key in state}
    options = {key: plain(value) for key, value in network["_init_kwargs"].items()}
    return {"precond": name, **law, "model_type": inner, **options}, _collect(data["ema"], "", {})


EDM_LAWS = {  # what each preconditioning has besides the network, with EDM's defaults
    "EDMPrecond": {"sigma_min": 0.0, "sigma_max": math.inf, "sigma_data": 0.5},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100.0},
    "iDDPMPrecond": {"M": 1000},
}


def edm_network(config: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    """Return the description and the weights of an EDM network, under the names of `unets`.

    Args:
        config: ``precond`` and its options, ``model_type`` and the network's options, by EDM's names.
        weights: EDM's own.

    Raises:
        ModelError: options that are missing or unknown.
    """
    config = {key: value for key, value in config.items() if key not in TRAINING_ONLY}
    if missing := [key for key in ("precond", "model_type", "img_resolution", "in_channels") if key not in config]:
        raise ModelError(f"config of an EDM network lacks {', '.join(missing)}")
    name, kind = config.pop("precond"), config.pop("model_type")
    law = {**look_up(name, EDM_LAWS, "preconditioning", ModelError)}
    law = {key: config.pop(key, value) for key, value in law.items()}
    table, channels, size = weights.get("u"), config["in_channels"], config["img_resolution"]
    weights = {key.removeprefix("model."): value for key, value in weights.items() if key != "u"}
    if name == "iDDPMPrecond":
        if table is None or len(table) != law["M"] + 1:
            raise ModelError(f"the file has no table u of {law['M'] + 1} noise levels")
        schedule: NoiseSchedule = DiscreteVP(torch.atan(table.double().flip(0)))  # u_M = 0 is the clean image
        kind_of, time, weights = "epsilon", NetworkTime(), at_the_end(weights, lambda w: w[:channels].clone())  # not the variances
    elif name == "VPPrecond":
        schedule = VPLinear(law["beta_min"], law["beta_min"] + law["beta_d"])
        kind_of, time = "epsilon", NetworkTime("t", law["M"] - 1)
    elif name == "VEPrecond":
        schedule, time = VarianceExploding(law["sigma_min"], law["sigma_max"]), NetworkTime("log", 1.0, 0.5)
        kind_of, weights = "epsilon", at_the_end(weights, torch.neg)
    else:
        schedule = VarianceExploding(max(0.002, law["sigma_min"]), min(80.0, law["sigma_max"]))  # unlimited, as EDM publishes them
        kind_of, time = f"edm({law['sigma_data']})", NetworkTime("log", 0.25)
    options, labels = {**config, "out_channels": channels}, config.get("label_dim") or None
    return description(kind, options, schedule, kind_of, time, (channels, size, size), labels, labels), weights
