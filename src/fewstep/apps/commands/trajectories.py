"""``fewstep trajectories``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.apps.console import console, next_command, print_json, progress
from fewstep.apps.models import guidance_of, model_words, open_model
from fewstep.apps.options import (
    NUM,
    AsJson,
    Fields,
    Flag,
    Guidance,
    InParallel,
    Memory,
    ModelName,
    Tolerance,
    Trust,
    Window,
    command,
    parallel_config,
)
from fewstep.learn.networks.distill import DistillConfig
from fewstep.learn.teacher.trajectories import TrajectoryConfig, generate_trajectories
from fewstep.runtime.process import default_device
from fewstep.runtime.spec import as_typed

__all__ = ["trajectories"]

DISTILL = DistillConfig()  # whose students learn from these by default
FLAGS = {"num": NUM, "seed": Flag(default=DISTILL.seed)}


def trajectories(
    model: ModelName,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the trajectories.")],
    slots: Annotated[int, typer.Option(help="Times at which states are stored, beside the noise.")] = 16,
    grid: Annotated[str, typer.Option(help="Their spacing; optimized is the model's own for ddim.")] = DISTILL.grid,
    config: Annotated[TrajectoryConfig, Fields(FLAGS, ("guidance",))],
    guidance: Guidance = None,
    parallel: InParallel = False,
    window: Window = None,
    tol: Tolerance = None,
    memory: Memory = None,
    trust: Trust = False,
    json: AsJson = False,
) -> None:
    """Solve a model's sampling ODE, for students to learn from.

    A killed run continues where it stopped, a larger --num adds trajectories; the processes of torchrun share the work.
    """
    together = parallel_config(parallel, window=window, tol=tol, memory=memory)
    opened = open_model(model, trust=trust)
    scale = guidance_of(opened, guidance)
    times = opened.trajectory_grid(grid, slots, scale)
    one_of = opened.scales if config.scales is None else None  # scales that students of this model are told, of which this is one
    if one_of is not None and not json:
        low, high = one_of
        console.print(
            f"note: students of {opened.name} are told their scale and learn from trajectories of many: --scales {low:g},{high:g}"
        )
    with progress(f"solving {config.num} trajectories of {opened.name}", config.num) as report:
        about = {
            "guidance": scale if config.scales is None else guidance,
            "config": config,
            "parallel": together,
            "device": default_device(),
            "command": command(),
        }
        made = generate_trajectories(opened, times, out, **about, on_progress=report)
    if made is None:
        return
    size = sum(path.stat().st_size for path in out.glob("shard-*.safetensors"))
    done: dict[str, Any] = {"model": opened.name, "trajectories": str(out), "num": len(made), "times": made.t.tolist(), "bytes": size}
    done |= made.card
    if json:
        print_json(done)
        return
    own = "unknown" if done["teacher_error"] is None else f"{done['teacher_error']:.1e}"
    console.print(f"trajectories: {out} ({size / 1e6:.0f} MB, own error {own})")
    if one_of is not None:
        return
    same = model_words(opened, guidance)
    if opened.domain is not None:  # no student learns from them
        console.print(next_command("fit", model, *same, "--nfe", "5,8", "--trajectories", out, "--out", "runs/fitted"))
        return
    held_out = min(DISTILL.held_out, config.num // 4)
    which = ["--grid", grid, "--slots", slots, "--num", config.num - held_out, "--held-out", held_out]
    if config.scales is not None:
        which += ["--method", "flow-map", *([] if opened.scales else ["--scales", ",".join(as_typed(scale) for scale in config.scales)])]
    elif slots == 1:
        which += ["--method", "kd"]
    console.print(next_command("distill", model, *same, "--trajectories", out, *which, "--out", "runs/student"))
