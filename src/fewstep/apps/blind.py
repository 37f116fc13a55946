"""The task ``blind-deblur`` of ``fewstep restore``: pictures that share a kernel which nobody knows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.apps.measured import side_by_side
from fewstep.data.images import read_image
from fewstep.evaluate.pictures import save_grid
from fewstep.inverse.blind import BlindConfig, BlindResult, deblur_blind
from fewstep.inverse.measurements import CircularBlur
from fewstep.inverse.restore import MADE, Restoration
from fewstep.inverse.tasks import picture_shape
from fewstep.models.batches import is_finished, samples_record
from fewstep.models.problem import Problem
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError
from fewstep.runtime.job import Job, Progress

__all__ = ["deblurred", "passes"]


def passes(config: BlindConfig) -> int:
    """Return how many passes blind deblurring makes at most: one for each candidate, and two of the best."""
    return config.candidates + 2


def deblurred(
    problem: Problem,
    pictures: Sequence[Path],
    *,
    noise: float,
    size: int,
    samples: int,
    seed: int,
    label: int | None,
    out: Path,
    command: str,
    on_progress: Progress,
) -> dict[str, Any]:
    """Restore blurred pictures and write what was found, each picture in a folder of its own where there are several.

    Args:
        problem: the prior with its guidance.
        pictures: that share a kernel.
        noise: the standard deviation of their noise.
        size: of the kernel's support.
        samples: of each picture.
        seed: the first.
        label: the class of all pictures, or None for the null label.
        out: the folder.
        command: as typed, for the cards.
        on_progress: called with the passes done.

    Returns:
        Where the files are, and figures.

    Raises:
        FewstepError: pictures that are two times the same name, of another size, an even kernel; a folder that holds something else.
    """
    names = [one.stem for one in pictures]
    if len(set(names)) < len(names):
        raise FewstepError("two of the pictures have one name, which is that of their folders: rename one")
    y = torch.stack([read_image(one, picture_shape(problem.model)) for one in pictures])
    labels = None if label is None else problem.model.labels([0] * len(y), label)
    cond, config = problem.conditions(range(len(y)), labels), BlindConfig()
    seeds = list(range(seed, seed + samples * len(y)))
    facts = (problem.identity, y.numpy().tobytes(), names, noise, size, seeds, label, config)
    request = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    denoiser: Any = problem.denoiser
    with Job.open("restore", out, on_progress=on_progress, command=command, alone=True) as job:
        if not is_finished(out, request):
            if (out / "samples.json").exists():
                raise ArtifactError(f"{out} holds the samples of another command: choose another folder, or remove them")
            held = [one for one in (*MADE, "kernel.npy", "kernel.png", *(names if len(names) > 1 else ())) if (out / one).exists()]
            if held:
                raise ArtifactError(f"{out} holds {held[0]}, and nothing says what made it: choose another folder, or remove it")
            found = deblur_blind(
                denoiser, y.to(problem.device), noise, size, samples=samples, seeds=seeds, cond=cond, config=config, on_progress=on_progress
            )
            card = {**problem.card(), "noise": noise, "evaluations": found.evaluations, "rehearsal": found.rehearsal, "command": command}
            _written(found, y, names, noise, {**card, "measurement": "CircularBlur, of a kernel that was found"}, out)
            about = samples_record(request, problem.name, "blind deblurring", seeds)
            write_whole(out / "samples.json", (json.dumps(asdict(about), indent=1) + "\n").encode())
        job.on_progress(passes(config), "")
    kernel = torch.from_numpy(np.load(out / "kernel.npy"))
    made = [Restoration.load(_place(out, name, names)) for name in names]
    return {
        "kernel": str(out / "kernel.npy"),
        "overview": str(out / "overview.png"),
        "middle": float(kernel[kernel.shape[0] // 2, kernel.shape[1] // 2]),
        "evaluations": made[0].card["evaluations"],
        "misfit": float(torch.cat([one.misfit for one in made]).mean()),
        "spread": float(torch.stack([one.spread.mean() for one in made]).mean()),
    }


def _place(out: Path, name: str, names: Sequence[str]) -> Path:
    return out if len(names) == 1 else out / name


def _written(found: BlindResult, y: Tensor, names: Sequence[str], noise: float, card: dict[str, Any], out: Path) -> None:
    """Write the kernel, each picture's restoration, and all side by side: measured, mean, spread, samples."""
    kernel, x, rows = found.kernel.cpu(), found.x.cpu(), list[Tensor]()
    for one, samples, name in zip(y, x, names, strict=True):
        rms = (CircularBlur(kernel)(samples) - one).flatten(1).square().mean(1).sqrt()
        made = Restoration(samples, one, rms / noise if noise else rms, card)
        made.save(_place(out, name, names))
        rows.append(side_by_side(one, made))
    save_grid(torch.cat(rows), out / "overview.png", columns=len(rows[0]))
    save_grid((2 * kernel / kernel.max() - 1)[None, None], out / "kernel.png", columns=1)
    write_whole(out / "kernel.npy", lambda temporary: _save(temporary, kernel))


def _save(path: Path, kernel: Tensor) -> None:
    with path.open("wb") as file:
        np.save(file, kernel.numpy())
