"""``fewstep train``."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Annotated

import typer

from fewstep.apps.console import console, next_command, progress
from fewstep.apps.options import Fields, Flag, command
from fewstep.data.images import load_images
from fewstep.learn.networks.loop import LoopConfig
from fewstep.learn.networks.train import TrainConfig
from fewstep.learn.networks.train import train as train_model
from fewstep.runtime.job import Job
from fewstep.runtime.process import process

__all__ = ["train"]

FLAGS = {"kind": Flag(default="edm"), "attention": Flag(more="Or none: the middle alone.")}


def train(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    data: Annotated[str, typer.Option(help="digits, an .npz with images, or a folder of pictures.")] = "digits",
    config: Annotated[TrainConfig, Fields(FLAGS)],
    loop: Annotated[LoopConfig, Fields({"steps": Flag(default=8000)})],
) -> None:
    """Train a small diffusion model.

    A killed run continues from its last checkpoint; the processes of torchrun share the batches.
    """
    rate = Rate(loop.batch)
    with progress(f"training {config.kind} on {data}", loop.steps) as report:

        def on_progress(step: int, loss: float) -> None:
            rate.add(step)
            report(step, f"loss {loss:.4f}{rate}")

        with Job.open("train", out, makes_model=True):
            train_model(load_images(data), config, loop, out, command=command(), observe=on_progress)
    if process()[0] == 0:
        console.print(f"model: {out}{rate}")
        if config.kind == "flow-map":
            console.print(next_command("sample", out, "--nfe", 4, "--out", out / "samples"))
        else:
            console.print(next_command("bench", out, "--out", out / "bench"))


class Rate:
    """Images per second of a run, from its first report on: what comes before is paid once."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.first: tuple[int, float] | None = None
        self.last = (0, 0.0)

    def add(self, step: int) -> None:
        """Note that so many steps are done."""
        self.last = (step, monotonic())
        self.first = self.first or self.last

    def __str__(self) -> str:
        if self.first is None or self.last[0] == self.first[0]:
            return ""
        return f", {(self.last[0] - self.first[0]) * self.batch / (self.last[1] - self.first[1]):.0f} images/s"
