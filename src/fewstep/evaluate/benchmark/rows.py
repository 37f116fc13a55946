"""One row of a benchmark, and what is kept of it beside the table: its first samples and the error of every sample."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.evaluate.benchmark.plan import Key
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import ArtifactError

__all__ = ["Row", "has_errors", "keep_samples", "picture_file", "read_errors", "read_samples"]

KEPT = 16  # samples of each row kept for pictures


@dataclass(frozen=True)
class Row:
    """One sampler on one model. ``rmse`` is the distance to the reference trajectory's end, ``fd`` the Frechet distance to the data.

    A field is None where it does not apply. Of a sampler that ``failed`` only what was asked of it is known. Rows of older benchmarks lack
    the later fields.
    """

    solver: str
    library: str
    grid: str
    nfe: int  # evaluations that it made
    num: int
    guidance: float
    rmse: float | None
    fd: float | None
    fd_features: str | None  # of all distances between sets of images
    seconds: float | None
    solver_seconds: float | None  # without the network
    statistics: str | None = None  # the fingerprint of those that the solver used
    artifact: str | None = None  # that of an optimised grid, a saved sampler, or a third party's source; a peer's version
    arithmetic: float | None = None  # of an operator student: its operations, in evaluations of its network alone
    planned: int | None = None  # evaluations asked for, where a third party's sampler made another number
    rmse_ci: list[float] | None = None  # 95 % intervals, low and high
    error_median: float | None = None  # of the errors of single samples
    error_p95: float | None = None
    fd_ci: list[float] | None = None
    kd: float | None = None  # kernel distance to the data
    kd_ci: list[float] | None = None
    precision: float | None = None
    recall: float | None = None
    labels: float | None = None  # share of samples whose label is the one asked for
    peak_memory: int | None = None  # bytes
    levels: list[float | None] | None = None  # sigma/alpha at each evaluation and at the end; None where alpha is 0
    failed: str | None = None  # why

    @property
    def key(self) -> Key:
        """What tells rows of one benchmark apart."""
        return self.library, self.solver, self.grid, self.nfe if self.planned is None else self.planned


def picture_file(out: Path, key: Key) -> Path:
    """Where the first samples of a row, and the errors of all, are kept."""
    return out / "samples" / f"{re.sub('[:/]', '_', '-'.join(map(str, key)))}.safetensors"


def keep_samples(path: Path, samples: Tensor, errors: Tensor) -> None:
    """Keep the first of a row's samples ``[num, *D]`` and all its errors ``[num]``, as float32."""
    kept = {"x": samples[:KEPT].contiguous(), "error": errors.to(torch.float32).contiguous()}
    write_whole(path, lambda temporary: save_file(kept, temporary))


def read_samples(path: Path) -> Tensor:
    """Samples that a benchmark kept, ``[n, *D]``.

    Raises:
        ArtifactError: the file is damaged.
    """
    return _read(path, "x")


def read_errors(path: Path) -> Tensor:
    """The errors of all samples of a row, ``[num]`` float32.

    Raises:
        ArtifactError: the file is damaged, or of a benchmark that did not keep them.
    """
    return _read(path, "error")


def has_errors(path: Path) -> bool:
    """Whether a row's samples and errors are there and can be read."""
    try:
        with safe_open(path, framework="pt") as kept:
            return {"x", "error"} <= set(kept.keys())
    except (OSError, SafetensorError):
        return False


def _read(path: Path, name: str) -> Tensor:
    try:
        return load_file(path)[name]
    except (OSError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): remove it and run the benchmark again") from error
