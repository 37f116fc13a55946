"""``fewstep restore``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from fewstep.apps.console import console, print_json, progress
from fewstep.apps.measured import TASKS, measured_picture
from fewstep.apps.models import guidance_of, open_model
from fewstep.apps.options import AsJson, Guidance, ModelName, Trust, command, numbers
from fewstep.evaluate.pictures import save_grid, save_singles
from fewstep.inverse.posterior import METHODS, make_method
from fewstep.inverse.restore import REHEARSE, Restoration
from fewstep.inverse.restore import restore as restored
from fewstep.inverse.steps import restored_steps
from fewstep.models.problem import check_seeds
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.process import default_device, process

__all__ = ["restore"]


def restore(
    model: ModelName,
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="The measured picture.")],
    *,
    task: Annotated[str, typer.Option(metavar="|".join(TASKS), help="What happened to it.")],
    out: Annotated[Path, typer.Option(help="Folder for the samples, their mean and their spread.")],
    mask: Annotated[Path | None, typer.Option(help="Of inpaint: a picture, white where to fill in and black elsewhere.")] = None,
    factor: Annotated[int | None, typer.Option(help="Of upscale: how many pixels were averaged on a side.")] = None,
    kernel: Annotated[
        Path | None, typer.Option(help="Of deblur: an array (.npy), or a grey picture as bright as the kernel; odd sides.")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Standard deviation of its noise, of pixels in [-1, 1]. Default: 0 of inpaint and colorize.")
    ] = None,
    nfe: Annotated[int, typer.Option(help="Network evaluations per sample, with the method's. More look sharper, and err more.")] = 10,
    num: Annotated[int, typer.Option("--samples", "-n", help="How many samples. Under torchrun say -n.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the first sample; the next has the next seed.")] = 0,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}, with options: moments:steps=2.")] = "moments",
    solver: Annotated[str, typer.Option(help="Any solver, with options: ddim:eta=1 adds noise.")] = "ddim",
    grid: Annotated[str | None, typer.Option(help="Its grid. Default: karras, or angle where the model starts at pure noise.")] = None,
    guidance: Guidance = None,
    label: Annotated[int | None, typer.Option(help="Class of the picture. Default: none, where the model has a label for that.")] = None,
    strength: Annotated[
        str | None,
        typer.Option(metavar="FLOAT|rehearse", help="Begin at the pseudo-inverse with this share of noise, or one that is tried out."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples at a time.")] = 64,
    singles: Annotated[bool, typer.Option("--singles", help="Also write one PNG per sample.")] = False,
    trust: Trust = False,
    json: AsJson = False,
) -> None:
    """Restore a picture: fill in, enlarge, deblur, denoise or colour it, with a model of such pictures.

    The results are samples: several pictures that fit what was measured, not one. Where they differ, the measurement does not say what was
    there. A killed run continues when the same command is typed again.
    """
    if num < 1 or batch < 1:
        raise FewstepError(f"samples and batch must be at least 1, got {num} and {batch}")
    check_seeds(seed, num)
    opened = open_model(model, trust=trust)
    found = measured_picture(task, picture, opened, mask=mask, factor=factor, kernel=kernel, noise=noise)
    scale, seeds = guidance_of(opened, guidance), range(seed, seed + num)
    labels = None if label is None else opened.labels(seeds, label)
    begin = strength if strength in (None, REHEARSE) else numbers(strength, "--strength")[0]
    share = begin if isinstance(begin, float) and begin != 1 else None
    sampler, chosen = restored_steps(opened, make_method(method), solver, nfe, grid, scale, share), make_method(method)
    if not json:
        backward = f", {sampler.nfe * chosen.cost[1]} of them with back-propagation" if chosen.cost[1] else ""
        console.print(f"{num} samples of {nfe} network evaluations{backward}: {sampler.nfe} steps of {solver} with {method}")
    with progress(f"restoring {picture.name}", num) as report:
        made = restored(
            opened.to(default_device()),
            found.measurement,
            found.y,
            found.noise,
            nfe=nfe,
            seeds=seeds,
            method=method,
            solver=solver,
            grid=grid,
            guidance=scale,
            cond=labels,
            strength=begin,
            batch=batch,
            out=out,
            on_progress=report,
            command=command(),
        )
    if process()[0]:
        return
    places = _drawn(made, found.shown, out, seeds if singles else None)
    misfit, spread = float(made.misfit.mean()), float(made.spread.mean())
    if json:
        print_json({"num": num, "nfe": nfe, "misfit": misfit, "spread": spread, **places, "card": dict(made.card)})
        return
    unit = "times the noise" if found.noise else "of the pixels' range [-1, 1]"
    console.print(f"misfit to the measurement: {misfit:.3g} {unit}")
    console.print(f"spread of the samples: {spread:.3g} on average, {float(made.spread.max()):.3g} at most")
    console.print(f"pictures: {places['overview']} (measured, mean, spread, samples)")
    console.print("these are samples, not one answer: where they differ, the measurement does not say what was there")


def _drawn(made: Restoration, shown: torch.Tensor, out: Path, singles: range | None) -> dict[str, str]:
    """Write the pictures, and return where: the mean, the spread (white is the largest), and all side by side."""
    spread = made.spread.mean(0, keepdim=True).expand_as(made.mean)
    grey = 2 * spread / spread.max().clamp_min(1e-12) - 1
    pictures = torch.stack([shown.cpu(), made.mean, grey])
    sheet = torch.cat([pictures, made.samples])
    places = {
        "overview": str(save_grid(sheet, out / "overview.png", columns=min(len(sheet), 11))),
        "mean": str(save_grid(made.mean[None], out / "mean.png", columns=1)),
        "spread": str(save_grid(grey[None], out / "spread.png", columns=1)),
    }
    if singles is not None:
        places["singles"] = str(save_singles(made.samples, out / "singles", singles))
    return places
