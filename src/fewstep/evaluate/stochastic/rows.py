"""The rows of a benchmark of stochastic samplers, and the files beside its table: of each row the first samples on every noise path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.evaluate.rows import OLDER, Interval, Key, Skipped, picture_file
from fewstep.runtime.artifact import Count, Number, Whole, check_file, held_to, parse_json, read_file, write_whole
from fewstep.runtime.errors import ArtifactError

__all__ = ["MEASURES", "NoiseRow", "read_noise_results", "read_paths", "save_paths"]

MEASURES = ("fd", "kd", "precision", "recall", "labels")  # of each path
PICTURES = 12  # samples of each path that are saved


@dataclass(frozen=True)
class NoiseRow:
    """Hold one sampler on one model, measured by the distance of its samples to the data.

    A figure is None where it does not apply. A sampler that ``failed`` has no figures.

    Attributes:
        solver, library, grid: which sampler.
        nfe: evaluations made of each sample.
        num: samples of each path; a distance is that of so many.
        guidance: the scale.
        stochastic: whether the sampler adds noise; None where it failed before its samples could say so.
        paths: noise paths from the same starts: 1 of a sampler that adds no noise.
        options: of the sampler's formulas, by name.
        fd: Frechet distance to the data, the mean over paths.
        fd_spread: the standard deviation of ``fd`` over paths.
        fd_ci: of the distance of a single path, the mean of the ends over paths.
        fd_features: the features that samples and data are compared in.
        kd, kd_ci, precision, recall, labels: as of `Row`, the means over paths.
        of_paths: of each path `MEASURES`, by name.
        spread: how far samples from one start are from each other: the root mean square over samples and numbers of their standard
            deviation over paths.
        seconds, solver_seconds: of one path, with and without the network.
        statistics, artifact, calls, planned, peak_memory, levels, failed, processes, threads, outside: as of `Row`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = OLDER

    solver: str
    library: str
    grid: str
    nfe: Count
    num: Count
    guidance: Number
    stochastic: bool | None
    paths: Count
    options: dict[str, Any]
    fd: Number | None = None
    fd_spread: Number | None = None
    fd_ci: Interval | None = None
    fd_features: str | None = None
    kd: Number | None = None
    kd_ci: Interval | None = None
    precision: Number | None = None
    recall: Number | None = None
    labels: Number | None = None
    of_paths: list[dict[str, Number | None]] | None = None
    spread: Number | None = None
    seconds: Number | None = None
    solver_seconds: Number | None = None
    statistics: str | None = None
    artifact: str | None = None
    calls: Count | None = None
    planned: Count | None = None
    peak_memory: Whole | None = None
    levels: list[Number | None] | None = None
    failed: str | None = None
    processes: Count | None = None
    threads: Count | None = None
    outside: Number | None = None

    @property
    def key(self) -> Key:
        """The identifier of the row within its benchmark."""
        return self.library, self.solver, self.grid, self.nfe if self.planned is None else self.planned


@dataclass(frozen=True)
class _Problem:
    """The setup that all rows of ``results.json`` share."""

    __pydantic_config__: ClassVar[dict[str, str]] = OLDER

    fingerprint: str
    seed: Whole
    num: Count
    guidance: Number
    paths: Count


@dataclass(frozen=True)
class _Data:
    """The data of ``results.json``."""

    __pydantic_config__: ClassVar[dict[str, str]] = OLDER

    num: Count
    features: str
    fd_halves: Number


@dataclass(frozen=True)
class _Results:
    """The fields of ``results.json``."""

    __pydantic_config__: ClassVar[dict[str, str]] = OLDER

    version: str
    command: str
    model: str
    problem: _Problem
    data: _Data
    rows: list[NoiseRow]
    skipped: list[Skipped]


def read_noise_results(path: Path) -> dict[str, Any]:
    """Read the ``results.json`` of a benchmark of stochastic samplers.

    Raises:
        ArtifactError: it cannot be read, is of another benchmark, or damaged (which field).
    """
    text = read_file(path)
    results = parse_json(text, path)
    if "paths" not in (results.get("problem") or {}):
        raise ArtifactError(f"{path} is of another benchmark than --stochastic: choose another folder")
    held_to(text, _Results, path)
    return results


def save_paths(folder: Path, key: Key, samples: Tensor) -> None:
    """Write the first of a row's samples ``[paths, num, *D]``, as float32."""
    saved = {"paths": samples[:, :PICTURES].float().contiguous()}
    write_whole(picture_file(folder, key), lambda temporary: save_file(saved, temporary))


def read_paths(folder: Path, key: Key) -> Tensor | None:
    """Read the first samples of a row on each of its paths, ``[paths, n, *D]``; None where they are not there any more.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = picture_file(folder, key)
    if not path.is_file():
        return None
    try:
        check_file(path)
        return load_file(path)["paths"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): remove it and run the benchmark again") from error
