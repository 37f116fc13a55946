"""Many samples by seed: in batches, shared between processes, resumed after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.core.denoiser import Denoiser
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Solver
from fewstep.models.formats.folders import Model
from fewstep.runtime.artifact import check_writable, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError, SolverError
from fewstep.runtime.process import default_device, process, wait_for_all
from fewstep.runtime.spec import parse_spec
from fewstep.sampling.loop import sample
from fewstep.sampling.noise import start_noise
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import make_solver, takes_statistics

__all__ = ["check_seeds", "generate", "generate_to", "solver_for"]


def check_seeds(first: int, count: int) -> None:
    """See that ``first, first + 1, ...`` are seeds.

    Raises:
        FewstepError: one is negative or does not fit in 63 bits.
    """
    if first < 0 or first + count > 2**63:
        raise FewstepError(f"seeds must lie between 0 and 2^63, got {first} and the {count - 1} after it")


def solver_for(name: str, model: Model, *, guidance: float = 1.0, statistics: Path | None = None, any_statistics: bool = False) -> Solver:
    """A solver for this model: one that takes statistics gets those named with it, those of the folder, or the model's own.

    Args:
        any_statistics: take them though they were made for something else.

    Raises:
        SolverError: as `make_solver`; there are no statistics of this model with this guidance.
        ArtifactError: the statistics are damaged or were made for another model, guidance, schedule or shape.
    """
    if not takes_statistics(name):
        return make_solver(name)
    named = parse_spec(name, SolverError)[1].get("statistics", statistics)
    found = model.statistics(guidance) if named is None else ModelStatistics.load(str(named))
    if found is None:
        raise SolverError(
            f"{name} needs statistics of {model.name} at guidance {guidance:g}: make them with "
            f"'fewstep calibrate {model.command_name(guidance)} --out DIR' and pass --statistics DIR"
        )
    if not any_statistics:
        found.check(model=model.fingerprint, guidance=guidance, schedule=model.denoiser.schedule, shape=model.shape)
    return make_solver(name, statistics=found)


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
    wait_for_all()
    if rank != 0:
        return None
    try:
        samples = torch.cat([load_file(parts / f"{start:08d}.safetensors")["x"] for start in starts])
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(f"{parts} is damaged ({error}): remove it and sample again") from error
    return samples, parts
