"""``fewstep fit``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.apps.console import aside, console, duration, next_command, pipeline_line, print_json, progress, show_table
from fewstep.apps.models import model_words, open_model, said_guidance
from fewstep.apps.options import INTEGERS, NUM, AsJson, Fields, Guidance, ModelName, Trust, command, integers
from fewstep.apps.pipelines import PipelineOptions
from fewstep.learn.samplers.fit import FitConfig, FitPlan, nfe_folder
from fewstep.learn.samplers.fit import fit as make_samplers
from fewstep.learn.teacher.trajectories import Trajectories
from fewstep.runtime.errors import counted
from fewstep.runtime.process import default_device, process

__all__ = ["FIGURES", "GAIN", "PLAN", "fit", "gain_rows", "plan_note", "plan_rows"]

FIGURES = ("chosen", "best_hand_made", "error", "rmse", "noises", "held_out_noises", "network_evaluations", "trajectory_evaluations")
PLAN = ("stage", "network evaluations", "time")
GAIN = ("evaluations", "fitted", "best hand-made sampler", "ratio", "network evaluations", "from")


def fit(
    model: ModelName,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the samplers.")],
    nfe: Annotated[str, typer.Option(metavar=INTEGERS, help="Network evaluations.")] = "4,5,6,8,10",
    guidance: Guidance = None,
    config: Annotated[FitConfig, Fields({"num": NUM})],
    trajectories: Annotated[Path | None, typer.Option(help="A folder of trajectories to fit to; by default they are made.")] = None,
    pipeline: Annotated[PipelineOptions, Fields()],
    trust: Trust = False,
    json: AsJson = False,
) -> None:
    """Fit samplers of its own to a model.

    Coefficients and noise levels are chosen by where the model's own samples end. What it costs is printed first, and --budget says how
    much that may be. A killed run continues after the last whole sampler; the processes of torchrun share the work.
    """
    opened, counts, begin = open_model(model, pipeline, guidance, trust=trust), sorted(set(integers(nfe, "--nfe"))), time.perf_counter()
    stored = None if trajectories is None else Trajectories.load(trajectories)
    with progress(f"fitting {counted(len(counts), 'sampler')} of {opened.name}", len(counts)) as report:
        samplers = make_samplers(
            opened,
            counts,
            guidance=said_guidance(opened, guidance),
            out=out,
            config=config,
            trajectories=stored,
            device=default_device(),
            command=command(),
            on_progress=report,
            on_plan=None if json else partial(_announce, opened.name),
        )
    if process()[0]:
        return
    rows = [{"nfe": n} | {key: samplers[n].card[key] for key in FIGURES} for n in counts]
    done = {"model": opened.name, "samplers": str(out), "seconds": time.perf_counter() - begin, "rows": rows}
    if json:
        print_json(done)
        return
    _show(done)
    console.print(f"samplers: {out}")
    if pipeline.given:
        console.print(pipeline_line("from_sampler", out))
        return
    scale = model_words(opened, guidance)
    console.print(next_command("sample", model, *scale, "--sampler", nfe_folder(out, counts[0]), "--out", "runs/sample"))
    console.print(next_command("bench", model, *scale, "--sampler", out, "--out", "runs/bench", begin="or"))


def _announce(name: str, plan: FitPlan, seconds: float) -> None:
    """Print what the fit will do and cost."""
    rows = plan_rows(plan, seconds)
    title = f"plan for {name}: {plan.num} trajectories and {plan.held_out} held out, {plan.levels} levels"
    with aside():
        show_table(title, PLAN, rows, left=PLAN[:1])
        console.print(plan_note(plan))


def plan_rows(plan: FitPlan, seconds: float) -> list[tuple[str, str, str]]:
    """Return what each stage of a fit costs, and all of it, under the headings `PLAN`; one evaluation takes so many seconds."""
    rows = [(stage, f"{count:,}", duration(count * seconds)) for stage, count in plan.stages().items() if count]
    return [*rows, ("in all, about", f"{plan.evaluations:,}", duration(plan.evaluations * seconds))]


def plan_note(plan: FitPlan) -> str:
    """Return what a fit takes beside time."""
    disk, memory = (f"{size / 2**30:.1f} GiB" if size >= 2**28 else f"{size / 2**20:.0f} MiB" for size in (plan.disk, plan.memory))
    return f"{disk} of disk and {memory} of memory beside the network; times are from one call just now"


def gain_rows(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the errors on held-out noises of samplers beside the best hand-made ones, under the headings `GAIN`.

    Args:
        rows: the `FIGURES` of each sampler's card, and its ``nfe``.
    """
    made = []
    for row in rows:
        (ours, theirs), (our_rmse, their_rmse) = row["error"], row["rmse"]
        rival = f"{theirs:.4f} ({their_rmse:.4f}) {row['best_hand_made']}"
        cost = f"{row['network_evaluations']:,}"
        made.append((str(row["nfe"]), f"{ours:.4f} ({our_rmse:.4f})", rival, f"{ours / theirs:.2f}", cost, row["chosen"]))
    return made


def _show(done: dict[str, Any]) -> None:
    """Print the errors on held-out noises of each sampler beside the best hand-made one, where it came from and what it cost."""
    show_table(f"{done['model']}: mean error on held-out noises (RMSE)", GAIN, gain_rows(done["rows"]), left=GAIN[-1:])
    console.print(f"{done['seconds']:.0f} seconds; trajectories are stored, other numbers of evaluations begin with them")
