"""``fewstep optimize``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fewstep.apps.console import NO_PLOTS, console, next_command, pipeline_line, print_json, progress, show_table
from fewstep.apps.models import guidance_of, model_words, open_model, said_guidance
from fewstep.apps.options import (
    INTEGERS,
    NAMES,
    NUM,
    AsJson,
    Fields,
    Guidance,
    ModelName,
    StatisticsFolder,
    Trust,
    command,
    integers,
    words,
)
from fewstep.apps.pipelines import PipelineOptions
from fewstep.apps.plots import STANDARD, save_schedules
from fewstep.core.spacings import make_grid
from fewstep.learn.samplers.optimize import collected_gram, solver_folder
from fewstep.learn.samplers.optimize import optimize as find_schedules
from fewstep.learn.samplers.optimize_plan import OptimizeConfig
from fewstep.learn.search.bound import Bound
from fewstep.learn.teacher.gram import Gram
from fewstep.models.generate import solver_for
from fewstep.models.problem import Problem
from fewstep.runtime.errors import FewstepError, GridError, counted
from fewstep.runtime.process import default_device, process
from fewstep.sampling.sampler import Sampler

__all__ = ["optimize"]

FIGURES = ("chosen", "best_standard_grid", "error", "rmse")


def optimize(
    model: ModelName,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the samplers.")],
    nfe: Annotated[str, typer.Option(metavar=INTEGERS, help="Network evaluations.")] = "5,6,8,10",
    solver: Annotated[str, typer.Option(metavar=NAMES, help="Solvers.")] = "unipc-2",
    guidance: Guidance = None,
    config: Annotated[OptimizeConfig, Fields({"num": NUM})],
    statistics: StatisticsFolder = None,
    pipeline: Annotated[PipelineOptions, Fields()],
    trust: Trust = False,
    json: AsJson = False,
) -> None:
    """Find the best noise levels for a solver on a model.

    A killed run continues after the last whole schedule; the processes of torchrun share the work.
    """
    opened, names, counts = open_model(model, pipeline, guidance, trust=trust), words(solver) or (), sorted(set(integers(nfe, "--nfe")))
    if not names:
        raise FewstepError("optimize needs at least one solver")
    problem = Problem(opened, guidance_of(opened, guidance), default_device())
    for name in names:  # a mistake in the last of them is no news for the end of the first
        method = solver_for(name, opened, guidance=problem.guidance, statistics=statistics)
        for n in counts:
            method.steps_on(problem.schedule, n)
    made = dict[str, dict[int, Sampler]]()
    with progress(f"optimizing {counted(len(names) * len(counts), 'schedule')} of {opened.name}", len(names) * len(counts)) as report:
        for name in names:
            before = len(made) * len(counts)
            made[name] = find_schedules(
                opened,
                name,
                counts,
                guidance=said_guidance(opened, guidance),
                out=out,
                config=config,
                statistics=statistics,
                device=default_device(),
                command=command(),
                on_progress=lambda done, note, before=before: report(before + done, note),
            )
    if process()[0]:
        return
    plots = NO_PLOTS
    if find_spec("matplotlib"):
        gram = collected_gram(problem, config, counts, out)
        plots = str([_draw(problem, name, gram, found, solver_folder(out, name)) for name, found in made.items()][-1])
    rows = [{key: one.card[key] for key in FIGURES} | {"solver": name, "nfe": n} for name, of in made.items() for n, one in of.items()]
    folders = [str(solver_folder(out, name)) for name in made]
    if json:
        print_json({"model": opened.name, "samplers": str(out), "folders": folders, "plots": plots, "rows": rows})
        return
    _show(opened.name, rows)
    console.print(f"samplers: {out}\nplots: {plots}")
    if pipeline.given:
        console.print(pipeline_line("from_sampler", folders[0]))
    else:
        console.print(next_command("bench", model, *model_words(opened, guidance), "--sampler", out, "--out", "runs/bench"))


def _show(name: str, rows: list[dict[str, Any]]) -> None:
    """Print the errors on held-out noises of each schedule beside the best standard grid, and where it came from."""
    lines = []
    for row in rows:
        (ours, theirs), (our_rmse, their_rmse) = row["error"], row["rmse"]
        standard = f"{theirs:.4f} ({their_rmse:.4f}) {row['best_standard_grid']}"
        lines.append((row["solver"], str(row["nfe"]), f"{ours:.4f} ({our_rmse:.4f})", standard, f"{ours / theirs:.2f}", row["chosen"]))
    headings = ("solver", "evaluations", "optimized", "best standard grid", "ratio", "from")
    show_table(f"{name}: mean error on held-out noises (RMSE)", headings, lines, left=("solver", "from"))


def _draw(problem: Problem, name: str, gram: Gram, found: Mapping[int, Sampler], folder: Path) -> Path:
    """Draw the schedules of one solver beside standard ones, and the errors that led to them."""
    schedule, schedules, candidates = problem.schedule, {}, {}
    for nfe, sampler in found.items():
        grids = {"optimized": sampler.grid}
        for standard in STANDARD:
            with suppress(GridError):
                grids[standard] = make_grid(standard, schedule, sampler.grid.steps)
        schedules[nfe] = {key: torch.exp(-schedule.lam(grid.t)).tolist() for key, grid in grids.items()}
        candidates[nfe] = [(bound, error) for error, bound in sampler.card["candidates"].values() if bound is not None]
    stride = max(1, gram.cells // 32)  # a short step, but one that is longer than the network is rough
    short = Bound(gram).first_order.diagonal(stride)
    title = f"{name} on {problem.name}"
    return save_schedules(folder / "schedules.png", title, schedules, (gram.level[:-stride], short), candidates)
