"""Mutations of the files of an artifact: damaged bytes, JSON of other values and types, other tensors, files that are none."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

__all__ = ["mutated"]

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    2**64,
    1e308,
    -1e-308,
    0.5,
    float("nan"),
    float("inf"),
    -float("inf"),
)
VALUES += ("", "x", "../x", "/etc/passwd", "=1+1", "\ud800", "\0", "é" * 9, "x" * 10**6, "a/" * 3000, "1", "nan", [], {}, [[]], [1, "x"])
VALUES += ({"law": "flow"}, [0] * 10_000, list(range(50)))
TEXTS = ("1" + "0" * 400, "[" * 5000 + "]" * 5000, '{"a":' * 300 + "1" + "}" * 300, "NaN", "1e999", "-0", '"\\ud800\\udc00"')
MARK = "\x01mark\x01"


def mutated(base: Path, folder: Path, random: Random) -> str:
    """Copy a folder to another with one to three mutations, and return what they were."""
    shutil.copytree(base, folder)
    said = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        path = random.choice(sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) or [folder])
        if path == folder:
            break
        ways = [WAYS.get(path.suffix, _bytes), WAYS.get(path.suffix, _bytes), _bytes, _place]
        way = random.choices(ways, (6, 6, 4, 1))[0]
        try:
            said.append(f"{path.relative_to(folder)}: {way(path, random)}")
        except Exception as error:  # damaged by a mutation before this one
            said.append(f"{path.relative_to(folder)}: {_bytes(path, random)} ({type(error).__name__})")
    return "; ".join(said)


def _bytes(path: Path, random: Random) -> str:
    """Damage the bytes of a file."""
    data = bytearray(path.read_bytes())
    at, kind = (
        random.randrange(len(data) + 1),
        random.choice(("cut", "empty", "flip", "flip", "zero", "insert", "double", "noise", "remove")),
    )
    if kind == "cut":
        del data[at:]
    elif kind == "empty":
        data.clear()
    elif kind == "flip":
        for _ in range(random.choice((1, 3, 30))):
            if data:
                data[random.randrange(min(len(data), random.choice((64, 1 << 30))))] ^= 1 << random.randrange(8)
    elif kind == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "insert":
        data[at:at] = random.randbytes(random.choice((1, 8, 200)))
    elif kind == "double":
        data = data + data
    elif kind == "noise":
        data = bytearray(random.randbytes(len(data)))
    else:
        del data[at : at + random.choice((1, 8, 100))]
    path.write_bytes(bytes(data))
    return f"{kind} at {at}"


def _place(path: Path, random: Random) -> str:
    """Put something else in the place of a file: nothing, a folder, a pipe, a device, another file."""
    others = [other for other in path.parent.iterdir() if other != path and other.is_file()]
    path.unlink()
    kind = random.choice(("nothing", "folder", "pipe", "zero", "null", "loop", "outside", "other"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "other" and others:
        shutil.copyfile(random.choice(others), path)
    elif kind in ("zero", "null", "loop", "outside"):
        path.symlink_to({"zero": "/dev/zero", "null": "/dev/null", "loop": path.name, "outside": "/etc/hostname"}[kind])
    return kind


def _json(path: Path, random: Random) -> str:
    """Change one value of a JSON file."""
    text, said = _changed(json.loads(path.read_text()), random)
    path.write_text(text)
    return said


def _changed(value: Any, random: Random) -> tuple[str, str]:
    """Return JSON with one value changed, and what was changed."""
    places = list(_places({"": value}, "", random))
    holder, key, where = random.choice(places)
    kind, old = random.choice(("value", "value", "text", "drop", "rename", "number", "copy")), holder[key]
    put: Any = MARK if kind == "text" else random.choice(VALUES)
    if kind == "drop" and where:
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict) and where:
        holder[f"{key}x"] = holder.pop(key)
    elif kind == "number" and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = old * random.choice((-1, 2, 10, 0.5, 1e6, 1e300))
    elif kind == "copy":
        other, name, _ = random.choice(places)
        holder[key] = copy.deepcopy(other[name])
    else:
        holder[key] = put
    text = json.dumps(value if where else put, default=str)
    return text.replace(json.dumps(MARK), random.choice(TEXTS)), f"{kind} {where}"


def _places(holder: Any, within: str, random: Random) -> Any:
    """Yield each value below: what holds it, its key, and its path; of long lists a few."""
    keys = list(holder) if isinstance(holder, dict) else random.sample(range(len(holder)), min(4, len(holder)))
    for key in keys:
        where = f"{within}.{key}".strip(".")
        yield holder, key, where
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key], where, random)


def _tensors(path: Path, random: Random) -> str:
    """Change a tensor or the header of a safetensors file, and put the right checksum beside it."""
    with safe_open(path, framework="pt") as file:
        header, tensors = dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if header and random.random() < 0.4:
        name = random.choice(sorted(header))
        try:
            header[name], said = _changed(json.loads(header[name]), random)
        except (ValueError, TypeError):
            header[name], said = str(random.choice(VALUES)).encode("utf-8", "replace").decode(), "value"
        said = f"header {name} {said}"
    else:
        name = random.choice(sorted(tensors))
        kind, change = random.choice(sorted(CHANGES.items()))
        said = f"tensor {name} {kind}"
        made = change(tensors.pop(name))
        tensors |= {} if made is None else {f"{name}x" if kind == "rename" else name: made.contiguous()}
    path.write_bytes(data := save_tensors(tensors, header or None))
    beside = path.with_suffix(".json")
    if beside.exists() and isinstance(meta := json.loads(beside.read_text()), dict) and "sha256" in meta:
        beside.write_text(json.dumps({**meta, "sha256": hashlib.sha256(data).hexdigest()}))
    return said


CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "drop": lambda tensor: None,
    "rename": lambda tensor: tensor,
    "whole": lambda tensor: torch.nan_to_num(tensor.float(), 0, 9, -9).long(),
    "bytes": lambda tensor: tensor.bool().byte(),
    "half": lambda tensor: tensor.half(),
    "double": lambda tensor: tensor.double(),
    "nan": lambda tensor: tensor.float() * float("nan"),
    "inf": lambda tensor: tensor.float() + float("inf"),
    "huge": lambda tensor: tensor.float() * 1e30,
    "negative": lambda tensor: -tensor.float(),
    "more": lambda tensor: tensor[None],
    "scalar": lambda tensor: tensor.flatten()[0] if tensor.numel() else tensor,
    "empty": lambda tensor: tensor.flatten()[:0],
    "shorter": lambda tensor: tensor[:-1] if tensor.ndim else tensor[None],
    "longer": lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor[None],
    "flat": lambda tensor: tensor.flatten(),
    "turned": lambda tensor: tensor.transpose(0, -1) if tensor.ndim else tensor,
    "reversed": lambda tensor: tensor.flip(0) if tensor.ndim else tensor,
    "zero": lambda tensor: torch.zeros_like(tensor),
    "random": lambda tensor: torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)),
}


def _npz(path: Path, random: Random) -> str:
    """Change an array of an archive, or the archive."""
    with np.load(path, allow_pickle=True) as found:
        arrays = {name: found[name] for name in found.files}
    name = random.choice(sorted(arrays))
    kind, change = random.choice(sorted(ARRAYS.items()))
    if kind == "header":
        buffer = io.BytesIO()
        np.save(buffer, arrays[name])
        text = buffer.getvalue().replace(
            b"'shape': (", random.choice((b"'shape': (9", b"'shape': (-", b"'shape': ((", b"'shape': ([" * 50))
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}.npy", text)
        return "header"
    made = change(arrays.pop(name))
    np.savez(path, allow_pickle=True, **arrays, **({} if made is None else {name: made}))
    return f"array {name} {kind}"


ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray | None]] = {
    "drop": lambda array: None,
    "header": lambda array: array,
    "objects": lambda array: array.astype(object),
    "floats": lambda array: array.astype(np.float32),
    "nan": lambda array: array * np.nan,
    "words": lambda array: array.astype(str),
    "negative": lambda array: -array.astype(np.int64) - 1,
    "wide": lambda array: array.astype(np.uint16),
    "big": lambda array: array.astype(np.uint64) + np.uint64(2**63),
    "complex": lambda array: array.astype(np.complex64),
    "empty": lambda array: array[:0],
    "scalar": lambda array: np.array(3),
    "longer": lambda array: np.concatenate([array, array]),
    "more": lambda array: array[None],
    "turned": lambda array: array.T,
    "no-pixels": lambda array: array[..., :0],
    "records": lambda array: np.zeros(len(array), [("a", "u1")]),
    "dates": lambda array: np.zeros(len(array), "M8[s]"),
}
WAYS: dict[str, Callable[[Path, Random], str]] = {".json": _json, ".safetensors": _tensors, ".npz": _npz}
