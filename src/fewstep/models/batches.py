"""Samples made batch by batch into a folder, so that a killed run continues and processes share the work."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.runtime.artifact import Count, Record, Whole, check_file, check_writable, read_record, write_whole
from fewstep.runtime.errors import ArtifactError
from fewstep.runtime.process import from_first, process, wait_for_all

__all__ = ["SamplesRecord", "is_finished", "samples_record", "sampled_in_batches"]

MADE = ("samples.npz", "grid.png", "singles")  # what finished samples are turned into


@dataclass(frozen=True)
class SamplesRecord(Record):
    """The fields of ``samples.json``, beside finished samples: what they were made of.

    Attributes:
        request: the hash of all that they depend on.
        model: its name.
        sampler: what it was sampled by.
        seed, num: the first seed and how many.
    """

    FORMAT = "fewstep-samples"

    request: str
    model: str
    sampler: str
    seed: Whole
    num: Count


def samples_record(request: str, model: str, sampler: str, seeds: Sequence[int]) -> SamplesRecord:
    """Return the record of samples of some seeds."""
    return SamplesRecord(SamplesRecord.FORMAT, SamplesRecord.VERSION, request, model, sampler, seeds[0], len(seeds))


def is_finished(folder: Path, request: str) -> bool:
    """Return whether a folder holds the finished samples of a request."""
    path = folder / "samples.json"
    return path.exists() and read_record(path, SamplesRecord).request == request


def sampled_in_batches(
    folder: Path,
    about: SamplesRecord,
    seeds: Sequence[int],
    batch: int,
    make: Callable[[Sequence[int]], Tensor],
    *,
    together: bool = False,
    made: Sequence[str] = MADE,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Path] | None:
    """Sample all seeds batch by batch into ``folder``. Batches, and so samples, are the same whatever the number of processes.

    Args:
        folder: where the batches are stored, each whole or not at all.
        about: what the samples are made of; its request belongs to the folder.
        seeds: one for each sample.
        batch: samples at a time.
        make: makes the samples ``[B, *D]`` of some seeds.
        together: whether the processes make each batch together, rather than each its own.
        made: names of what finished samples are turned into; files of these names that are not from them are not replaced.
        on_progress: called with the number of samples that this process has seen done.

    Returns:
        The samples ``[len(seeds), *D]`` on the CPU and the folder of their batches, for the caller to remove once they are kept elsewhere;
        None in all processes but the first.

    Raises:
        ArtifactError: the folder holds samples of another command, finished or not, or cannot be written.
    """
    check_writable(folder)
    rank, world = process()
    parts, finished = folder / f"parts-{about.request}", folder / "samples.json"
    others = [path for path in folder.glob("parts-*") if path != parts]
    if others:
        raise ArtifactError(f"{folder} holds unfinished samples of another command: remove {others[0]}, or choose another folder")
    if finished.exists() and not is_finished(folder, about.request):
        raise ArtifactError(f"{folder} holds the samples of another command (see {finished}): choose another folder, or remove them")
    held = [name for name in made if (folder / name).exists()]
    if held and not finished.exists() and not parts.exists():
        raise ArtifactError(f"{folder} holds {held[0]}, and nothing says what made it: choose another folder, or remove it")
    starts = range(0, len(seeds), batch)
    for number, first in enumerate(starts):
        path, mine = parts / f"{first:08d}.safetensors", together or number % world == rank
        if mine and not (from_first(path.exists()) if together else path.exists()):
            images = make(seeds[first : first + batch]).cpu()
            if not together or rank == 0:
                write_whole(path, lambda temporary, images=images: save_file({"x": images.contiguous()}, temporary))
        if on_progress is not None and mine:
            on_progress(min(first + batch, len(seeds)))
    wait_for_all()
    if rank != 0:
        return None
    try:
        files = [parts / f"{first:08d}.safetensors" for first in starts]
        for path in files:
            check_file(path)
        samples = torch.cat([load_file(path)["x"] for path in files])
    except (OSError, SafetensorError, KeyError, RuntimeError, ArtifactError) as error:
        raise ArtifactError(f"{parts} is damaged ({error}): remove it and sample again") from error
    write_whole(finished, (json.dumps(asdict(about), indent=1) + "\n").encode())
    return samples, parts
