"""Many samples by seed: in batches, shared between processes, resumed after a kill."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.core.errors import ArtifactError, FewstepError
from fewstep.core.sampler import Sampler, check_writable, write_whole
from fewstep.core.sampling import Denoiser, sample, start_noise
from fewstep.models.loaders import Model

__all__ = ["check_seeds", "default_device", "generate", "generate_to", "process"]


def default_device() -> torch.device:
    """The accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def check_seeds(first: int, count: int) -> None:
    """See that ``first, first + 1, ...`` are seeds.

    Raises:
        FewstepError: one is negative or does not fit in 63 bits.
    """
    if first < 0 or first + count > 2**63:
        raise FewstepError(f"seeds must lie between 0 and 2^63, got {first} and the {count - 1} after it")


def process() -> tuple[int, int]:
    """This process and how many there are, as ``torchrun`` sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@torch.no_grad()
def generate(
    denoiser: Denoiser, sampler: Sampler, seeds: Sequence[int], shape: Sequence[int], labels: Tensor | None, device: torch.device
) -> Tensor:
    """Samples ``[len(seeds), *shape]`` on the CPU, from the noise of their seeds."""
    x = start_noise(sampler.tableau.nodes, seeds, shape).to(device)
    return sample(denoiser, sampler, x, None if labels is None else labels.to(device), seeds=seeds).cpu()


def generate_to(
    folder: Path,
    model: Model,
    sampler: Sampler,
    seeds: Sequence[int],
    *,
    guidance: float = 1.0,
    label: int | None = None,
    batch: int = 256,
    observe: Callable[[int], None] | None = None,
) -> tuple[Tensor, Path] | None:
    """Samples of all seeds, kept in ``folder`` batch by batch, so that a killed run continues.

    Gives the samples ``[len(seeds), *shape]`` and the folder of their batches, for the caller to remove once they are kept
    elsewhere; None in all processes but the first.

    Batches are the same whatever the number of processes, so are the pictures.

    Raises:
        ArtifactError: the folder holds the unfinished samples of another command, or cannot be written.
    """
    check_writable(folder)
    rank, world = process()
    device, denoiser, labels = default_device(), model.guided(guidance), model.labels(seeds, label)
    tableau = sampler.tableau
    numbers = [table.tolist() for table in (*tableau.nodes, tableau.record, tableau.update, tableau.bias, tableau.noise)]
    request = (model.fingerprint, numbers, guidance, label, list(seeds), batch)
    parts = folder / f"parts-{hashlib.sha256(repr(request).encode()).hexdigest()[:16]}"
    others = [path for path in folder.glob("parts-*") if path != parts]
    if others:
        raise ArtifactError(f"{folder} holds unfinished samples of another command: remove {others[0]}, or choose another folder")
    model.to(device)
    starts = range(0, len(seeds), batch)
    for number, start in enumerate(starts):
        path = parts / f"{start:08d}.safetensors"
        if number % world == rank and not path.exists():
            part = slice(start, start + batch)
            images = generate(denoiser, sampler, seeds[part], model.shape, None if labels is None else labels[part], device)
            write_whole(path, lambda temporary, images=images: save_file({"x": images.contiguous()}, temporary))
        if observe is not None and number % world == rank:
            observe(min(start + batch, len(seeds)))
    _wait_for_all(world)
    if rank != 0:
        return None
    try:
        samples = torch.cat([load_file(parts / f"{start:08d}.safetensors")["x"] for start in starts])
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(f"{parts} is damaged ({error}): remove it and sample again") from error
    return samples, parts


def _wait_for_all(world: int) -> None:
    if world > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
