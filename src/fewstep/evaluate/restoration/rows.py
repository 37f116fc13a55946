"""The rows of a benchmark of restorations, and the files beside its table: of each row the first pictures and every picture's PSNR."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.runtime.artifact import Count, Number, Whole, check_file, held_to, parse_json, read_file, write_whole
from fewstep.runtime.errors import ArtifactError

__all__ = [
    "PICTURES",
    "PSEUDO_INVERSE",
    "RestorationKey",
    "RestorationResults",
    "RestorationRow",
    "as_json",
    "by_task",
    "read_restorations",
    "read_row_file",
    "row_file",
    "save_row_file",
]

RestorationKey = tuple[str, str, str, str, int]  # task, method, solver, grid, evaluations
PSEUDO_INVERSE = "pseudo-inverse"  # the method of the row that no model has made
PICTURES = 6  # of each row that are kept
OLDER = {"extra": "ignore"}  # fields of other versions


@dataclass(frozen=True)
class RestorationRow:
    """Hold one method on one task.

    A figure is None where it does not apply: ``mean``, ``alone`` and ``spread`` want several samples of a picture, ``coverage`` 19. A row
    that ``failed`` has no figures.

    Attributes:
        task: with its options.
        method, solver, grid: with which options; of the pseudo-inverse the last two are empty.
        planned: network evaluations of a sample that were asked for, 0 of the pseudo-inverse.
        nfe: those that were made, on average: a method may stop early.
        products: backward passes through the network.
        num: pictures.
        samples, several: how many samples of each of the first so many pictures, for the figures that want them.
        request: a hash of all that the row depends on.
        psnr, psnr_error: in decibels, of one sample, the mean over pictures and its standard error.
        gain, gain_error: the same of the difference to the first method of the task on the same pictures.
        ssim: structural similarity of one sample.
        features: distance to the truth in features, relative to that of another picture.
        misfit: of one sample, in units of the noise, or as it is where there is none.
        mean, alone: PSNR of the mean of the samples, and of one of them, both on the first pictures.
        coverage: share of the truth in the 90 % interval of the samples, where they differ.
        spread: mean standard deviation of the samples.
        seconds: for one sample.
        failed: why there is none.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = OLDER

    task: str
    method: str
    solver: str
    grid: str
    planned: Whole
    nfe: Number
    products: Whole
    num: Count
    samples: Count
    several: Whole
    request: str
    psnr: Number | None = None
    psnr_error: Number | None = None
    gain: Number | None = None
    gain_error: Number | None = None
    ssim: Number | None = None
    features: Number | None = None
    misfit: Number | None = None
    mean: Number | None = None
    alone: Number | None = None
    coverage: Number | None = None
    spread: Number | None = None
    seconds: Number | None = None
    failed: str | None = None

    @property
    def key(self) -> RestorationKey:
        """The identifier of the row within its benchmark."""
        return self.task, self.method, self.solver, self.grid, self.planned

    @property
    def sampler(self) -> str:
        """The solver and, where it is not the pseudo-inverse, its evaluations, as tables name them."""
        return f"{self.solver} {self.nfe:g}" if self.solver else ""


@dataclass(frozen=True)
class RestorationResults:
    """Hold the fields of ``results.json`` of a benchmark of restorations.

    Attributes:
        version: of this library.
        command: all command lines that made rows.
        model: its name.
        machine: what times depend on.
        problem: what all rows share: the model, the data, the seeds and the features.
        rows: grouped by task, the pseudo-inverse of each first.
        left_out: what was asked for last and cannot be, with the reason.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = OLDER

    version: str
    command: str
    model: str
    machine: dict[str, str | int | float | None]
    problem: dict[str, str | int | float | None]
    rows: list[RestorationRow]
    left_out: list[str] = field(default_factory=list)


def by_task(rows: Iterable[RestorationRow]) -> dict[str, list[RestorationRow]]:
    """Return the rows of each task, tasks and rows in order of appearance, but for the pseudo-inverse, which is first."""
    tasks = dict[str, list[RestorationRow]]()
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    return {name: sorted(mine, key=lambda row: row.method != PSEUDO_INVERSE) for name, mine in tasks.items()}


def read_restorations(path: Path) -> RestorationResults:
    """Read the ``results.json`` of a benchmark of restorations.

    Raises:
        ArtifactError: it cannot be read, is of a benchmark of samplers, or damaged (which field).
    """
    text = read_file(path)
    if "reference" in parse_json(text, path):
        raise ArtifactError(f"{path} is of a benchmark of samplers, not of restorations: choose another folder")
    return held_to(text, RestorationResults, path)


def row_file(out: Path, row: RestorationRow) -> Path:
    """Return the file of a row's pictures and figures of each picture; its name holds the request, so it is never another row's."""
    words = [part for part in map(str, row.key) if part]
    return out / "samples" / f"{re.sub('[:/=]', '_', '-'.join(words))}-{row.request}.safetensors"


def save_row_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what a row keeps: ``psnr [num]``, ``x`` the first samples, and of the pseudo-inverse ``truth`` and ``y`` too."""
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_whole(path, lambda temporary: save_file(whole, temporary))


def read_row_file(path: Path, wanted: Sequence[str] = ("x", "psnr")) -> dict[str, Tensor] | None:
    """Read what a row keeps; None where it is not there any more.

    Raises:
        ArtifactError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        check_file(path)
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): remove it and run the benchmark again") from error
    if not set(wanted) <= set(found) or not all(bool(torch.isfinite(value).all()) for value in found.values()):
        raise ArtifactError(f"{path} is damaged: it should hold {', '.join(wanted)}, all finite; remove it and run the benchmark again")
    return found


def as_json(results: RestorationResults) -> dict[str, Any]:
    """Return results as JSON values, each row with the fields that it has."""
    fields = dict(vars(results))
    return {**fields, "rows": [{key: value for key, value in vars(row).items() if value is not None} for row in results.rows]}
