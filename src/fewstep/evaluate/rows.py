"""The rows of a benchmark, and the files beside its table: of each row the first samples and the error of every sample."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import ArtifactError

__all__ = [
    "OWN_FORMULAS",
    "REFERENCE",
    "Key",
    "Row",
    "has_errors",
    "picture_file",
    "read_errors",
    "read_samples",
    "save_samples",
    "trim_reference",
]

Key = tuple[str, str, str, int]  # library, solver, grid, nfe
REFERENCE = "reference.safetensors"  # the ends of the exact trajectories
OWN_FORMULAS = "formulas-"  # how the artifact of a solver begins whose name does not stand for its formulas
PICTURES = 16  # samples of each row that are saved


@dataclass(frozen=True)
class Row:
    """One sampler on one model. ``rmse`` is the distance to the reference trajectory's end, ``fd`` the Frechet distance to the data.

    A field is None where it does not apply. A sampler that ``failed`` has no numbers. Rows of older benchmarks lack the later fields.
    """

    solver: str
    library: str
    grid: str
    nfe: int  # evaluations made
    num: int
    guidance: float
    rmse: float | None
    fd: float | None
    fd_features: str | None  # the features that all distances between sets of images compare
    seconds: float | None
    solver_seconds: float | None  # without the network
    statistics: str | None = None  # the fingerprint of the solver's statistics
    artifact: str | None = None  # fingerprint of an optimised grid, a sampler, own formulas or a third party's source; a peer's version
    arithmetic: float | None = None  # operations of an operator student, in evaluations of its network alone
    planned: int | None = None  # evaluations requested, where a third party's sampler made another number
    rmse_ci: list[float] | None = None  # 95 % intervals, low and high
    error_median: float | None = None  # quantiles of the errors of single samples
    error_p95: float | None = None
    fd_ci: list[float] | None = None
    kd: float | None = None  # kernel distance to the data
    kd_ci: list[float] | None = None
    precision: float | None = None
    recall: float | None = None
    labels: float | None = None  # share of samples whose label is the requested one
    peak_memory: int | None = None  # bytes
    levels: list[float | None] | None = None  # sigma/alpha at each evaluation and at the end; None where alpha is 0
    failed: str | None = None  # why

    @property
    def key(self) -> Key:
        """The identifier of the row within its benchmark."""
        return self.library, self.solver, self.grid, self.nfe if self.planned is None else self.planned


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
    return _read(path, "x")


def read_errors(path: Path) -> Tensor:
    """Read the errors of all samples of a row, ``[num]`` float32.

    Raises:
        ArtifactError: the file is damaged, or of a version that did not save errors.
    """
    return _read(path, "error")


def has_errors(path: Path) -> bool:
    """Return whether a row's samples and errors are there and can be read."""
    try:
        with safe_open(path, framework="pt") as saved:
            return {"x", "error"} <= set(saved.keys())
    except (OSError, SafetensorError):
        return False


def _read(path: Path, name: str) -> Tensor:
    try:
        return load_file(path)[name]
    except (OSError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): remove it and run the benchmark again") from error
