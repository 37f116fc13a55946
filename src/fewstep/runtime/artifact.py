"""Artifacts on disk: numbers as safetensors, their description as JSON, a card for people. Never a pickle, never half-written.

What is read may be damaged, or written to do harm. So a path is checked before it is opened, a JSON file is held to a `Record` (a dataclass
of its fields and their types), and each tensor to the shape that its file describes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, cast

import torch
from annotated_types import Ge, Gt, Le, Lt
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fewstep.runtime.errors import ArtifactError, FewstepError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "MODEL_FILES",
    "TEMPORARY",
    "ArtifactRecord",
    "Count",
    "Number",
    "Record",
    "Whole",
    "alike",
    "check_file",
    "check_no_model",
    "check_writable",
    "digest_of",
    "facts_of",
    "held_to",
    "listed",
    "load_artifact",
    "named_path",
    "parse_json",
    "parse_record",
    "read_file",
    "read_json",
    "read_record",
    "rounded",
    "save_artifact",
    "tensor_of",
    "write_whole",
    "written_apart",
]

VERSION = 1
TEMPORARY = ".fewstep-"  # how the names of files and folders begin that are not whole yet; a `Job` removes those of killed runs
MODEL_FILES = ("fewstep.json", "network.safetensors", "unet", "model_index.json")  # any of them makes a folder that of a model
LARGEST = 1 << 30  # bytes of a file that is read as a whole
DEEPEST = 64  # lists within lists in a JSON file
DIGITS = 20  # of a whole number in one
T = TypeVar("T")

Number = Annotated[float, Gt(-math.inf), Lt(math.inf)]
Whole = Annotated[int, Ge(0), Lt(1 << 63)]
Count = Annotated[int, Ge(1), Le(1 << 40)]


@dataclass(frozen=True)
class Record:
    """The fields of a JSON file of ours. Subclass it as a frozen dataclass, with the file's fields and their types.

    A type may be narrowed: `Number` is finite, `Whole` at least 0, `Count` at least 1. A field that a record does not have is refused.
    """

    format: str
    version: int

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    FORMAT: ClassVar[str]
    VERSION: ClassVar[int] = VERSION


R = TypeVar("R", bound=Record)


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


@dataclass(frozen=True)
class ArtifactRecord(Record):
    """The fields of every ``{kind}.json`` that `save_artifact` writes."""

    sha256: str


A = TypeVar("A", bound=ArtifactRecord)


def load_artifact(folder: str | Path, kind: str, record: type[A], build: Callable[[A, dict[str, Tensor]], T]) -> T:
    """Read files that `save_artifact` wrote, and return ``build(meta, tensors)``.

    Args:
        folder: where they are.
        kind: of the artifact.
        record: the class of its description.
        build: makes the object; its errors are those of a damaged artifact.

    Raises:
        ArtifactError: a file is missing, damaged, or of another version.
    """
    folder = named_path(folder)
    meta = read_record(folder / f"{kind}.json", record)
    path = folder / f"{kind}.safetensors"
    if not path.exists():
        raise ArtifactError(f"cannot read {path}: No such file, and {kind}.json is beside it; fetch or make it again")
    data = read_file(path)
    if hashlib.sha256(data).hexdigest() != meta.sha256:
        raise ArtifactError(f"{path} is damaged: its checksum is not the one in {kind}.json; fetch or make it again")
    try:
        return build(meta, load_tensors(data))
    except (SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, FewstepError) as error:
        why = str(error) if isinstance(error, FewstepError) else repr(error)
        raise ArtifactError(f"{folder} is not a whole {kind} artifact: {why}; fetch or make it again") from error


def listed(card: Mapping[str, Any]) -> str:
    """Return the facts of a card as a list of Markdown, but for those that are empty, as the command of what was made in Python."""
    return "\n".join(f"- {key}: {value}" for key, value in card.items() if value not in ("", None))


def tensor_of(
    tensors: Mapping[str, Tensor], name: str, shape: Sequence[int | None], *, finite: bool = True, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a tensor of a file, of floating-point numbers.

    Args:
        tensors: by name.
        name: of the one.
        shape: what it should be; None for any length.
        finite: whether each of its numbers should be.
        dtype: what it should be; None for any.

    Raises:
        ArtifactError: it is missing, of whole numbers, of another dtype or shape, or not finite.
    """
    if name not in tensors:
        raise ArtifactError(f"there is no tensor {name}")
    found = tensors[name]
    if not found.is_floating_point() or dtype not in (None, found.dtype):
        wanted = "floating-point numbers" if dtype is None else str(dtype).removeprefix("torch.")
        raise ArtifactError(f"the tensor {name} holds {str(found.dtype).removeprefix('torch.')}, not {wanted}")
    if found.ndim != len(shape) or any(wanted not in (None, side) for side, wanted in zip(found.shape, shape, strict=True)):
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise ArtifactError(f"the tensor {name} has shape {list(found.shape)}, not [{wanted}]")
    if finite and not bool(torch.isfinite(found).all()):
        raise ArtifactError(f"the tensor {name} has numbers that are not finite")
    return found


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of tensors, without their names."""
    parts = (tensors[name].detach().cpu().contiguous().flatten() for name in sorted(tensors))
    return hashlib.sha256(b"".join(part.view(torch.uint8).numpy().tobytes() for part in parts)).hexdigest()


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
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=path.suffix)
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


@contextmanager
def written_apart(folder: Path, last: str) -> Generator[Path, None, None]:
    """Write files into a temporary folder of the same name, which is handed out, and then move them into another.

    Args:
        folder: where they go; made if it is not there. What has their names is replaced.
        last: the name of the one that is moved last: where it is, all are.

    Raises:
        ArtifactError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY) as temporary:
            scratch = Path(temporary, folder.resolve().name)
            scratch.mkdir(exist_ok=True)
            yield scratch
            for path in sorted(scratch.iterdir(), key=lambda path: path.name == last):
                if (there := folder / path.name).is_dir():
                    rmtree(there)
                path.replace(there)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror or error}; choose a folder that you may write to") from error


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


def check_no_model(folder: Path) -> None:
    """Refuse a folder that holds a model, or part of one, for anything else: its card would be lost. A folder below it is right.

    Raises:
        ArtifactError: it holds one.
    """
    if any((folder / name).exists() for name in MODEL_FILES):
        raise ArtifactError(f"{folder} already holds a model, whose card would be lost: choose another folder, or one below it")


def named_path(value: Any) -> Path:  # noqa: ANN401 - what a caller passed
    """Return the path that a text or a path names.

    Raises:
        ArtifactError: it is empty, or no file can have that name.
    """
    if not isinstance(value, str | Path) or not str(value):
        raise ArtifactError(f"a file or folder is named by its path, got {value!r}")
    path = Path(value)
    if "\0" in str(path) or len(os.fsencode(path)) > 4095 or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise ArtifactError(f"no file or folder can be named {str(path)[:80]!r} ({len(str(path))} characters): name another")
    return path


def check_file(path: Path) -> int:
    """Return the size in bytes of a file, without opening it: a pipe or a device may never end.

    Raises:
        ArtifactError: it is not there, or no ordinary file.
    """
    try:
        found = named_path(path).stat()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"cannot read {path}: it is a {'folder' if stat.S_ISDIR(found.st_mode) else 'pipe or device'}, not a file")
    return found.st_size


def read_file(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        ArtifactError: it cannot be read, is no ordinary file, or is larger than `LARGEST`.
    """
    if (size := check_file(path)) > LARGEST:
        raise ArtifactError(f"cannot read {path}: it has {size} bytes, more than any such file needs")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ArtifactError: it cannot be read, is not JSON, or is not an object.
    """
    return parse_json(read_file(path), path)


def parse_json(text: str | bytes, where: object) -> dict[str, Any]:
    """Return the JSON object in a text.

    Args:
        text: UTF-8 if it is bytes.
        where: what errors call it.

    Raises:
        ArtifactError: it is not JSON, not an object, or has lists within lists or numbers that no file needs.
    """
    try:
        value = json.loads(text, parse_int=_whole)
        level = [value]
        for _ in range(DEEPEST):
            level = [child for one in level for child in _inside(one)]
        if level:
            raise ValueError(f"more than {DEEPEST} lists or objects within each other")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is damaged: {error}; fetch or make it again") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} should hold a JSON object, not a {type(value).__name__}")
    return value


def _inside(value: Any) -> Iterable[Any]:  # noqa: ANN401 - of JSON
    """Return what a list or an object of JSON holds."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def read_record(path: Path, kind: type[R]) -> R:
    """Read a JSON file of ours.

    Raises:
        ArtifactError: it cannot be read, is of another format or version, or a field is missing, of another type, or too many (which).
    """
    return parse_record(read_file(path), kind, path)


def parse_record(text: str | bytes, kind: type[R], where: object) -> R:
    """Return the record in a text, see `read_record`."""
    meta = parse_json(text, where)
    if (meta.get("format"), meta.get("version")) != (kind.FORMAT, kind.VERSION):
        raise ArtifactError(
            f"{where} is {meta.get('format')!r} version {meta.get('version')!r}; this fewstep reads {kind.FORMAT!r} version "
            f"{kind.VERSION}: use the version of fewstep that wrote it, or make it again"
        )
    return held_to(text, kind, where)


def held_to(text: str | bytes, kind: type[T], where: object) -> T:
    """Return the JSON text as a dataclass, whose types it is held to: no word is taken for a number, nor a switch for one.

    Raises:
        ArtifactError: a field is missing, of another type, or too many (which).
    """
    from pydantic import ValidationError  # when something is read: sampling by name does not wait for it

    try:
        return _reader(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, says = ".".join(map(str, first["loc"])), first["msg"]
        got = "" if first["type"] in ("missing", "json_invalid") else f", got {str(first['input'])[:80]!r}"
        at = f"{place}: " if place else ""
        raise ArtifactError(f"{where} is damaged: {at}{says[:1].lower()}{says[1:]}{got}; fetch or make it again") from error


def facts_of(card: Mapping[str, Any], kind: type[T], where: object) -> T:
    """Return those facts of a card that a dataclass has, held to its types; other facts are for the reader.

    Raises:
        ArtifactError: one is missing or of another type (which).
    """
    known = {field.name: card[field.name] for field in fields(cast("Any", kind)) if field.name in card}
    return held_to(json.dumps(known), kind, where)


@cache
def _reader(kind: type[T]) -> TypeAdapter[T]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def alike(one: Any, other: Any) -> bool:  # noqa: ANN401
    """Return whether plain values are equal, their floats to nine digits."""
    return bool(one == other) or rounded(one) == rounded(other)


def rounded(value: Any) -> Any:  # noqa: ANN401
    """Return plain values with their floats as words of nine digits, since machines differ in the last."""
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value
