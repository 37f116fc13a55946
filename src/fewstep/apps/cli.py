"""The command line: each verb parses, calls and prints where the result is."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fewstep.apps.console import progress

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Sample any diffusion or flow model in a few steps."""


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    data: Annotated[str, typer.Option(help="digits, an .npz with images, or a folder of pictures.")] = "digits",
    kind: Annotated[str, typer.Option(help="edm or ddpm.")] = "edm",
    conditional: Annotated[bool, typer.Option("--conditional", help="Condition on class labels, with a null label.")] = False,
    steps: int = 8000,
    batch: int = 96,
    lr: float = 1e-3,
    seed: int = 0,
) -> None:
    """Train a small diffusion model; a killed run continues where it was."""
    from fewstep.learn.loop import LoopConfig
    from fewstep.learn.train import TrainConfig, train
    from fewstep.models.data import load_images

    with progress(f"training {kind} on {data}", steps) as report:
        loop = LoopConfig(steps=steps, batch=batch, lr=lr, seed=seed)
        train(load_images(data), TrainConfig(kind, conditional), loop, out, command=command(), observe=report)
    typer.echo(f"model: {out}\nnext:  fewstep bench {out} --solver unipc-2,dpm-solver-pp-2m")


def command() -> str:
    """This command line, as a reader would type it."""
    return shlex.join(["fewstep", *sys.argv[1:]])


def main() -> None:
    """Entry point: 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    from fewstep.core.errors import FewstepError

    try:
        app()
    except FewstepError as error:
        typer.echo(f"fewstep: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("fewstep: interrupted; run the same command to continue", err=True)
        sys.exit(130)
