"""``fewstep convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.apps.console import console, next_command
from fewstep.apps.options import json_object
from fewstep.models.formats import checkpoints

__all__ = ["convert"]


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="EDM's .pkl, ScoreSDE's or guided-diffusion's .pth or .pt, or a .safetensors.")],
    *,
    out: Annotated[Path, typer.Option(help="A folder, or a file that ends in .safetensors.")],
    format: Annotated[str | None, typer.Option(help="edm, score-sde, guided-diffusion; by default as the file shows.")] = None,
    config: Annotated[
        str | None, typer.Option(help="JSON, or a file of it: what the weights do not show, see docs/checkpoints.md.")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Read tensors and known classes from a pickle; nothing in it is run.")] = False,
) -> None:
    """Convert a checkpoint of another code base to safetensors."""
    given = None if config is None else json_object(config, "--config")
    made = checkpoints.convert(checkpoint, out, format=format, config=given, trust=trust)
    console.print(f"model: {out}, samples of shape {made.shape}")
    console.print(next_command("sample", out, "--out", "runs/sample"))
