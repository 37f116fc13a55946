"""``fewstep restore``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fewstep.apps.blind import deblurred, passes
from fewstep.apps.console import console, print_json, progress
from fewstep.apps.measured import BLIND, TASKS, measured_picture, side_by_side
from fewstep.apps.models import guidance_of, open_model
from fewstep.apps.options import AsJson, Guidance, ModelName, Trust, command
from fewstep.evaluate.pictures import save_grid, save_singles
from fewstep.inverse.blind import BlindConfig
from fewstep.inverse.corrections import Projection
from fewstep.inverse.posterior import METHODS, checked_prior, make_method
from fewstep.inverse.restore import REHEARSE, Restoration
from fewstep.inverse.restore import restore as restored
from fewstep.inverse.steps import restored_steps
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_seeds
from fewstep.runtime.errors import FewstepError, look_up
from fewstep.runtime.front_door import check_size
from fewstep.runtime.process import default_device, process

__all__ = ["restore"]

NFE, METHOD, SOLVER = 10, "moments", "ddim"
DIFFER = "these are samples, not one answer: where they differ, the measurement does not say what was there"


def restore(
    model: ModelName,
    picture: Annotated[list[Path], typer.Argument(metavar="PICTURE", help="The measured picture; of blind-deblur one or several.")],
    *,
    task: Annotated[str, typer.Option(metavar="|".join((*TASKS, BLIND)), help="What happened to it.")],
    out: Annotated[Path, typer.Option(help="Folder for the samples, their mean and their spread.")],
    mask: Annotated[Path | None, typer.Option(help="Of inpaint: a picture, white where to fill in and black elsewhere.")] = None,
    factor: Annotated[int | None, typer.Option(help="Of upscale: how many pixels were averaged on a side.")] = None,
    kernel: Annotated[
        Path | None, typer.Option(help="Of deblur: an array (.npy), or a grey picture as bright as the kernel; odd sides.")
    ] = None,
    kernel_size: Annotated[int | None, typer.Option(help="Of blind-deblur: the side of the kernel to be found, odd.")] = None,
    noise: Annotated[
        float | None, typer.Option(help="Standard deviation of its noise, of pixels in [-1, 1]. Default: 0 of inpaint and colorize.")
    ] = None,
    nfe: Annotated[
        int | None, typer.Option(help="Network evaluations per sample, with the method's. More look sharper, and err more. Default: 10.")
    ] = None,
    num: Annotated[int, typer.Option("--samples", "-n", help="How many samples of a picture. Under torchrun say -n.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the first sample; the next has the next seed.")] = 0,
    method: Annotated[str | None, typer.Option(help=f"{', '.join(METHODS)}, with options: moments:steps=2. Default: moments.")] = None,
    solver: Annotated[str | None, typer.Option(help="Any solver, with options: ddim:eta=1 adds noise. Default: ddim.")] = None,
    grid: Annotated[str | None, typer.Option(help="Its grid. Default: karras, or angle where the model starts at pure noise.")] = None,
    guidance: Guidance = None,
    label: Annotated[int | None, typer.Option(help="Class of the picture. Default: none, where the model has a label for that.")] = None,
    strength: Annotated[
        str | None,
        typer.Option(metavar="FLOAT|rehearse", help="Begin at the pseudo-inverse with this share of noise, or one that is tried out."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Samples at a time. Default: 64.")] = None,
    singles: Annotated[bool, typer.Option("--singles", help="Also write one PNG per sample.")] = False,
    trust: Trust = False,
    json: AsJson = False,
) -> None:
    """Restore a picture: fill in, enlarge, deblur, denoise or colour it, with a model of such pictures.

    The results are samples: several pictures that fit what was measured, not one. Where they differ, the measurement does not say what was
    there. A killed run continues when the same command is typed again.
    """
    if num < 1 or (batch is not None and batch < 1):
        raise FewstepError(f"samples and batch must be at least 1, got {num} and {batch}")
    check_seeds(seed, num * len(picture))
    check_size("batch", batch or 1)
    opened = open_model(model, trust=trust)
    typed = {"mask": mask, "factor": factor, "kernel": kernel}
    if task == BLIND:
        typed |= {"nfe": nfe, "method": method, "solver": solver, "grid": grid, "strength": strength, "batch": batch}
        _leave_out(BLIND, {**typed, "singles": singles or None})
        _blind(opened, picture, kernel_size, noise, num, seed, guidance_of(opened, guidance), label, out, json)
        return
    look_up(task, {**TASKS, BLIND: None}, "task", FewstepError)
    _leave_out(task, {"kernel_size": kernel_size})
    if len(picture) > 1:
        raise FewstepError(f"{task} takes one picture at a time, got {len(picture)}")
    found = measured_picture(task, picture[0], opened, mask=mask, factor=factor, kernel=kernel, noise=noise)
    scale, seeds = guidance_of(opened, guidance), range(seed, seed + num)
    labels = None if label is None else opened.labels(seeds, label)
    begin = strength if strength in (None, REHEARSE) else _share(strength)
    share = begin if isinstance(begin, float) and begin != 1 else None
    nfe, method, solver = NFE if nfe is None else nfe, METHOD if method is None else method, SOLVER if solver is None else solver
    chosen = make_method(method)
    sampler = restored_steps(opened, chosen, solver, nfe, grid, scale, share)
    if not json:
        backward = f", {sampler.nfe * chosen.cost[1]} of them with back-propagation" if chosen.cost[1] else ""
        console.print(f"{num} samples of {nfe} network evaluations{backward}: {sampler.nfe} steps of {solver} with {method}")
        if chosen.preparation:
            console.print(f"before them {chosen.preparation} evaluations of a single sample, which measure the model")
    options = {"nfe": nfe, "method": method, "solver": solver, "grid": grid, "guidance": scale, "cond": labels, "strength": begin}
    with progress(f"restoring {picture[0].name}", num) as report:
        made = restored(
            opened.to(default_device()),
            found.measurement,
            found.y,
            found.noise,
            seeds=seeds,
            batch=64 if batch is None else batch,
            out=out,
            on_progress=report,
            **options,
        )
    if process()[0]:
        return
    made = made.with_card(command=command())
    made.save(out)
    places = _drawn(made, found.shown, out, seeds if singles else None)
    misfit, spread = float(made.misfit.mean()), float(made.spread.mean())
    if json:
        print_json({"num": num, "nfe": nfe, "misfit": misfit, "spread": spread, **places, "card": dict(made.card)})
        return
    if begin == REHEARSE:
        console.print(f"strength: {made.card.get('strength', 1)}, the best of those rehearsed")
    _say(misfit, found.noise, spread, places["overview"])


def _share(strength: str) -> float:
    try:
        return float(strength)
    except ValueError:
        raise FewstepError(f"--strength is one number above 0 and up to 1, or {REHEARSE}, got {strength!r}") from None


def _leave_out(task: str, typed: dict[str, Any]) -> None:
    """Refuse options that the task does not take."""
    given = [f"--{name.replace('_', '-')}" for name, value in typed.items() if value is not None]
    if given:
        raise FewstepError(f"{task} takes no {' and no '.join(given)}: leave {'it' if len(given) == 1 else 'them'} out")


def _blind(
    model: Model,
    pictures: list[Path],
    size: int | None,
    noise: float | None,
    samples: int,
    seed: int,
    scale: float,
    label: int | None,
    out: Path,
    json: bool,
) -> None:
    if size is None or noise is None:
        meant = {"--kernel-size": (size, "the odd side of the kernel to be found"), "--noise": (noise, "its standard deviation")}
        missing = [f"{name}, {meaning}" for name, (value, meaning) in meant.items() if value is None]
        raise FewstepError(f"{BLIND} needs {' and '.join(missing)}")
    if process()[1] > 1:
        raise FewstepError(f"{BLIND} is the work of one process: run it without torchrun")
    checked_prior(model, Projection())
    problem, config = Problem(model, scale, default_device()), BlindConfig()
    if not json:
        most = (config.candidates + 1) * config.nfe + config.final
        console.print(
            f"{len(pictures)} pictures that share a kernel of {size} x {size}: at most {most} network evaluations for each of "
            f"{samples} samples, and {config.rehearsal} samples of the model itself"
        )
    with progress("finding the kernel", passes(config)) as report:
        made = deblurred(
            problem,
            pictures,
            noise=noise,
            size=size,
            samples=samples,
            seed=seed,
            label=label,
            out=out,
            command=command(),
            on_progress=report,
        )
    if json:
        print_json({"num": samples, "pictures": len(pictures), **made})
        return
    shown = f"{made['middle']:.0%} of it in the middle pixel"
    console.print(f"kernel: {made['kernel']}, {shown}{'' if made['middle'] < 0.99 else ': no blur was found'}")
    _say(made["misfit"], noise, made["spread"], made["overview"])


def _say(misfit: float, noise: float, spread: float, overview: str) -> None:
    unit = "times the noise" if noise else "of the pixels' range [-1, 1]"
    console.print(f"misfit to the measurement: {misfit:.3g} {unit}")
    console.print(f"spread of the samples: {spread:.3g} on average")
    console.print(f"pictures: {overview} (measured, mean, spread, samples)")
    console.print(DIFFER)


def _drawn(made: Restoration, shown: torch.Tensor, out: Path, singles: range | None) -> dict[str, str]:
    """Write the pictures, and return where: the mean, the spread, and all side by side."""
    sheet = side_by_side(shown, made)
    places = {
        "overview": str(save_grid(sheet, out / "overview.png", columns=min(len(sheet), 11))),
        "mean": str(save_grid(sheet[1:2], out / "mean.png", columns=1)),
        "spread": str(save_grid(sheet[2:3], out / "spread.png", columns=1)),
    }
    if singles is not None:
        places["singles"] = str(save_singles(made.samples, out / "singles", singles))
    return places
