"""Artifacts on disk: numbers as safetensors, their description as JSON, a card for people. Never a pickle, never half-written."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fewstep.runtime.errors import ArtifactError, FewstepError

__all__ = ["check_writable", "load_artifact", "read_json", "save_artifact", "write_whole"]

VERSION = 1
T = TypeVar("T")


def save_artifact(folder: Path, kind: str, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], readme: str) -> Path:
    """Write ``{kind}.safetensors``, a ``README.md`` card and ``{kind}.json``, and return the folder.

    Args:
        folder: where they go; made if it is not there.
        kind: of the artifact, as ``sampler``.
        meta: JSON values; the format, its version and the checksum of the tensors are added.
        tensors: by name.
        readme: the text of the card.

    Raises:
        ArtifactError: the folder cannot be written, or ``meta`` is not JSON-able.
    """
    data = save_tensors({name: value.detach().clone().contiguous() for name, value in tensors.items()})  # clone: two may share memory
    whole = {"format": f"fewstep-{kind}", "version": VERSION, **meta, "sha256": hashlib.sha256(data).hexdigest()}
    try:
        text = json.dumps(whole, indent=1) + "\n"
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the options and the card of a {kind} must be plain JSON values: {error}") from error
    write_whole(folder / f"{kind}.safetensors", data)
    write_whole(folder / "README.md", readme.encode())
    write_whole(folder / f"{kind}.json", text.encode())
    return folder


def load_artifact(folder: Path, kind: str, build: Callable[[dict[str, Any], dict[str, Tensor]], T]) -> T:
    """Read files that `save_artifact` wrote, and return ``build(meta, tensors)``.

    Args:
        folder: where they are.
        kind: of the artifact.
        build: makes the object; its errors are those of a damaged artifact.

    Raises:
        ArtifactError: a file is missing, damaged, or of another version.
    """
    meta = read_json(folder / f"{kind}.json")
    if meta.get("format") != f"fewstep-{kind}" or meta.get("version") != VERSION:
        raise ArtifactError(
            f"{folder / f'{kind}.json'} is {meta.get('format')!r} version {meta.get('version')!r}; this fewstep reads "
            f"'fewstep-{kind}' version {VERSION}"
        )
    path = folder / f"{kind}.safetensors"
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != meta["sha256"]:
            raise ArtifactError(f"{path} is damaged: its checksum is not the one in {kind}.json; fetch or make it again")
        return build(meta, load_tensors(data))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    except ArtifactError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, FewstepError) as error:
        raise ArtifactError(f"{folder} is not a whole {kind} artifact: {error!r}; fetch or make it again") from error


def write_whole(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write a file under a temporary name and rename it, so that nobody ever sees half of it.

    Args:
        path: of the file; its folder is made if it is not there.
        content: the bytes, or a function that writes the file at the path it is called with.

    Raises:
        ArtifactError: the folder cannot be made or written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ArtifactError(f"cannot write {path}: {why}; choose a folder that you may write to") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before long work; it may not exist yet.

    Raises:
        ArtifactError: the nearest existing parent is a file, or may not be written to.
    """
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        what = "may not be written to" if parent.is_dir() else "is a file"
        raise ArtifactError(f"cannot write {folder}: {parent} {what}; choose a folder that you may write to")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ArtifactError: it is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value
