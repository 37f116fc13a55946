"""The rows of a benchmark, and the files beside its table: of each row the first samples and the error of every sample."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Len
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.runtime.artifact import Count, Number, Whole, check_file, held_to, parse_json, read_file, tensor_of, write_whole
from fewstep.runtime.errors import ArtifactError

__all__ = [
    "OLDER",
    "OWN_FORMULAS",
    "REFERENCE",
    "Interval",
    "Key",
    "Row",
    "Skipped",
    "has_errors",
    "picture_file",
    "read_errors",
    "read_results",
    "read_samples",
    "save_samples",
    "trim_reference",
]

Key = tuple[str, str, str, int]  # library, solver, grid, nfe
REFERENCE = "reference.safetensors"  # the ends of the exact trajectories
OWN_FORMULAS = "formulas-"  # how the artifact of a solver begins whose name does not stand for its formulas
PICTURES = 16  # samples of each row that are saved
OLDER = {"extra": "ignore"}  # fields of other versions are shown as they are

Interval = Annotated[list[Number], Len(2, 2)]  # of 95 %: low and high


@dataclass(frozen=True)
class Row:
    """One sampler on one model. ``rmse`` is the distance to the reference trajectory's end, ``fd`` the Frechet distance to the data.

    A field is None where it does not apply. A sampler that ``failed`` has no numbers. Rows of older benchmarks lack the later fields.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = OLDER

    solver: str
    library: str
    grid: str
    nfe: Count  # evaluations made
    num: Count
    guidance: Number
    rmse: float | None
    fd: float | None
    fd_features: str | None  # the features that all distances between sets of images compare
    seconds: float | None
    solver_seconds: float | None  # without the network
    statistics: str | None = None  # the fingerprint of the solver's statistics
    artifact: str | None = None  # fingerprint of an optimised grid, a sampler, own formulas or a third party's source; a peer's version
    arithmetic: float | None = None  # operations of a student's passes, in evaluations of its network alone
    calls: Count | None = None  # of the network for one sample: evaluations times two where guidance takes two answers
    planned: Count | None = None  # evaluations requested, where a third party's sampler made another number
    rmse_ci: Interval | None = None
    error_median: float | None = None  # quantiles of the errors of single samples
    error_p95: float | None = None
    error_p99: float | None = None
    error_mean: float | None = None
    parted: float | None = None  # share of samples with an error above three times the median
    fd_ci: Interval | None = None
    kd: float | None = None  # kernel distance to the data
    kd_ci: Interval | None = None
    precision: float | None = None
    recall: float | None = None
    labels: float | None = None  # share of samples whose label is the requested one
    peak_memory: Whole | None = None  # bytes
    levels: list[Number | None] | None = None  # sigma/alpha at each evaluation and at the end; None where alpha is 0
    failed: str | None = None  # why
    processes: Count | None = None  # that were at work when it was timed, each on a row of its own
    threads: Count | None = None  # of each
    outside: Number | None = None  # of a reflected model: share of the samples' numbers beyond its cube, before the last fold

    @property
    def key(self) -> Key:
        """The identifier of the row within its benchmark."""
        return self.library, self.solver, self.grid, self.nfe if self.planned is None else self.planned


@dataclass(frozen=True)
class _Trajectory:
    """The exact trajectories of ``results.json``: those of a student are its teacher's."""

    __pydantic_config__: ClassVar[dict[str, str]] = OLDER

    teacher: str | None = None  # its fingerprint


@dataclass(frozen=True)
class _Problem:
    """The noises of ``results.json``, and the model that they were sampled with."""

    __pydantic_config__: ClassVar[dict[str, str]] = OLDER

    fingerprint: str | None = None
    seed: Whole | None = None
    num: Count | None = None
    guidance: Number = 1.0
    batch: Count | None = None
    reference: _Trajectory | None = None


@dataclass(frozen=True)
class _Reference:
    """The reference trajectory of ``results.json``, and the quality of the samples at its end."""

    __pydantic_config__: ClassVar[dict[str, str]] = OLDER

    solver: str = ""
    nfe: Count = 1
    guidance: Number | None = None  # at which its model was sampled: of a student's teacher another one than the rows'
    error: Number | None = None
    fd: Number | None = None
    fd_data_halves: Number | None = None


@dataclass(frozen=True)
class Skipped:
    """A row that could not be run, and why: an entry of ``results.json``."""

    key: list[Any]
    why: str


@dataclass(frozen=True)
class _Results:
    """The fields of ``results.json``; a table of an older benchmark lacks some."""

    __pydantic_config__: ClassVar[dict[str, str]] = OLDER

    rows: list[Row]
    version: str | None = None
    command: str | None = None
    model: str | None = None
    machine: dict[str, str | int | float | None] | None = None
    problem: _Problem = field(default_factory=_Problem)
    reference: _Reference | None = None
    skipped: list[Skipped] = field(default_factory=list)


def read_results(path: Path) -> dict[str, Any]:
    """Read the ``results.json`` of a benchmark, of this version or an older one.

    Raises:
        ArtifactError: it cannot be read, or a field that is shown is missing or of another type (which).
    """
    if path.parent.is_dir() and not path.exists():
        raise ArtifactError(f"{path.parent} holds no rows of a benchmark: name a folder that fewstep bench or compare(..., out=) made")
    text = read_file(path)
    results = parse_json(text, path)
    if isinstance(results.get("problem"), dict) and "pictures" in results["problem"]:
        raise ArtifactError(
            f"{path} is of a benchmark of restorations (fewstep bench --task, whose page --report writes): choose another folder"
        )
    if isinstance(results.get("problem"), dict) and "paths" in results["problem"]:
        raise ArtifactError(
            f"{path} is of a benchmark of samplers that add noise (fewstep bench --stochastic, whose page --report writes): choose another "
            "folder"
        )
    held_to(text, _Results, path)
    return results


def picture_file(out: Path, key: Key) -> Path:
    """Return the file of a row's first samples and of all its errors."""
    return out / "samples" / f"{re.sub('[:/]', '_', '-'.join(map(str, key)))}.safetensors"


def save_samples(path: Path, samples: Tensor, errors: Tensor) -> None:
    """Write the first of a row's samples ``[num, *D]`` and all its errors ``[num]``, as float32."""
    saved = {"x": samples[:PICTURES].contiguous(), "error": errors.to(torch.float32).contiguous()}
    write_whole(path, lambda temporary: save_file(saved, temporary))


def trim_reference(folder: Path) -> None:
    """Shorten the reference of a folder to as many samples as are saved of each row."""
    first = {"x": read_samples(folder / REFERENCE)[:PICTURES].clone()}
    write_whole(folder / REFERENCE, lambda temporary: save_file(first, temporary))


def read_samples(path: Path) -> Tensor:
    """Read the samples ``[n, *D]`` that a benchmark saved.

    Raises:
        ArtifactError: the file is damaged.
    """
    x = _read(path, "x")
    return tensor_of({"x": x}, "x", [None] * max(x.ndim, 2))


def read_errors(path: Path) -> Tensor:
    """Read the errors of all samples of a row, ``[num]`` float32.

    Raises:
        ArtifactError: the file is damaged, or of a version that did not save errors.
    """
    return tensor_of({"error": _read(path, "error")}, "error", [None])


def has_errors(path: Path) -> bool:
    """Return whether a row's samples and errors are there and can be read."""
    try:
        check_file(path)
        with safe_open(path, framework="pt") as saved:
            return {"x", "error"} <= set(saved.keys())
    except (OSError, SafetensorError, ArtifactError):
        return False


def _read(path: Path, name: str) -> Tensor:
    check_file(path)
    try:
        return load_file(path)[name]
    except (OSError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): remove it and run the benchmark again") from error
