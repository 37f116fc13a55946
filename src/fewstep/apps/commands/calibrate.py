"""``fewstep calibrate``."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.apps.console import NO_PLOTS, console, next_command, pipeline_line, print_json, progress
from fewstep.apps.models import model_words, open_model, said_guidance
from fewstep.apps.options import NUM, AsJson, Fields, Guidance, ModelName, Trust, command
from fewstep.apps.pipelines import PipelineOptions
from fewstep.apps.plots import save_statistics
from fewstep.data.images import load_images
from fewstep.learn.samplers.calibrate import CalibrationConfig
from fewstep.learn.samplers.calibrate import calibrate as make_statistics
from fewstep.runtime.process import default_device, process

__all__ = ["calibrate"]


def calibrate(
    model: ModelName,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the statistics.")],
    config: Annotated[CalibrationConfig, Fields({"num": NUM})],
    guidance: Guidance = None,
    data: Annotated[str | None, typer.Option(help="digits, an .npz or a folder of images; else the model's own trajectories.")] = None,
    unguided: Annotated[bool, typer.Option("--unguided", help="Measure the network without guidance, on guided trajectories.")] = False,
    pipeline: Annotated[PipelineOptions, Fields()],
    trust: Trust = False,
    json: AsJson = False,
) -> None:
    """Estimate the statistics that dpm-solver-v3 needs.

    A killed run continues where it stopped, a larger --num adds data; the processes of torchrun share the work.
    """
    opened, begin = open_model(model, pipeline, guidance, trust=trust), time.perf_counter()
    images = None if data is None else load_images(data)
    total = len(config.batches[process()[0] :: process()[1]]) * config.batch * (config.levels + 1)
    with progress(f"calibrating {opened.name}: {config.num} data x {config.levels + 1} levels", total) as report:
        statistics = make_statistics(
            opened,
            guidance=said_guidance(opened, guidance),
            out=out,
            config=config,
            images=images,
            unguided=unguided,
            device=default_device(),
            command=command(),
            on_progress=report,
        )
    if statistics is None:
        return
    plot = str(save_statistics(statistics, out / "statistics.png")) if find_spec("matplotlib") else NO_PLOTS
    done: dict[str, Any] = {"statistics": str(out), "plot": plot, "seconds": time.perf_counter() - begin, **statistics.card}
    if json:
        print_json(done)
        return
    console.print(f"statistics: {out}\nplot: {plot}")
    if pipeline.given:
        console.print(pipeline_line("from_config", out))
    else:
        console.print(next_command("bench", model, *model_words(opened, guidance), "--statistics", out, "--out", "runs/bench"))
