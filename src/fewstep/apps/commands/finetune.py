"""``fewstep finetune``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.apps.console import console, next_command, print_json, progress, show_table
from fewstep.apps.models import guidance_of, model_words, open_model
from fewstep.apps.options import NUM, AsJson, Fields, ModelName, TeacherGuidance, Trust, command
from fewstep.data.images import load_images
from fewstep.learn.networks.finetune import FinetuneConfig
from fewstep.learn.networks.finetune import finetune as tune
from fewstep.runtime.errors import counted
from fewstep.runtime.process import default_device

__all__ = ["finetune"]


def finetune(
    model: ModelName,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the tuned model.")],
    config: Annotated[FinetuneConfig, Fields({"num": NUM}, ("guidance",))],
    guidance: TeacherGuidance = None,
    data: Annotated[str | None, typer.Option(help="For the form score: digits, an .npz or a folder of images.")] = None,
    trust: Trust = False,
    json: AsJson = False,
) -> None:
    """Tune a copy of a model for a few steps.

    Its schedule is tuned with it. A killed run continues where it stopped; the processes of torchrun share trajectories and batches.
    """
    opened, images = open_model(model, trust=trust), None if data is None else load_images(data)
    total = config.rounds * config.steps
    with progress(f"tuning {opened.name} for {counted(config.nfe, 'evaluation')}", total) as report:
        tuned = tune(
            opened,
            guidance=guidance_of(opened, guidance),
            out=out,
            config=config,
            images=images,
            device=default_device(),
            command=command(),
            on_progress=report,
        )
        report(total, "")
    if tuned is None:
        return
    history = tuned.card["history"]
    if json:
        print_json({"model": opened.name, "nfe": config.nfe, "folder": str(out), "history": history})
        return
    _show(f"{opened.name} tuned for {counted(config.nfe, 'evaluation')}", history)
    console.print(f"model: {out}")
    console.print(next_command("bench", out, *model_words(tuned), "--nfe", config.nfe, "--out", "runs/bench"))


def _show(title: str, history: Sequence[dict[str, Any]]) -> None:
    """Print the bound and the error round by round."""
    rows = []
    for one in history:
        levels = ", ".join(f"{level:.3g}" for level in one["noise_levels"])
        bounds = (f"{one[key]:.4f}" for key in ("bound_before", "bound_trained", "bound", "rmse"))
        rows.append((str(one["number"]), levels, *bounds, f"{one['seconds']:.0f}"))
    headings = ("round", "noise levels", "bound before", "after training", "best schedule then", "RMSE to the teacher", "seconds")
    show_table(title, headings, rows, left=("noise levels",))
