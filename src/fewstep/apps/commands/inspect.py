"""``fewstep inspect``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fewstep.apps.commands.sample import NFE, SOLVER
from fewstep.apps.console import console, print_json, progress
from fewstep.apps.models import guidance_of, model_words, open_model
from fewstep.apps.options import AsJson, Guidance, ModelName, Trust
from fewstep.evaluate.inspection import check_inspected, inspect_model, inspection_cost
from fewstep.evaluate.report.inspection_page import write_inspection
from fewstep.evaluate.report.template import check_packages
from fewstep.models.carried import FITTED
from fewstep.models.generate import check_made_for, default_grid, sampler_for
from fewstep.models.problem import Problem
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.job import Job
from fewstep.runtime.process import default_device, process
from fewstep.sampling.sampler import Sampler

__all__ = ["inspect"]


def inspect(
    model: ModelName,
    *,
    out: Annotated[Path, typer.Option(help="Folder for inspect.html and inspect.json.")],
    solver: Annotated[str | None, typer.Option(help="The solver that you use. Default: unipc-2.")] = None,
    grid: Annotated[str | None, typer.Option(help="Its grid. Default: uniform or angle, by the model.")] = None,
    nfe: Annotated[int | None, typer.Option(help="Its network evaluations; others are tried with as many. Default: 8.")] = None,
    sampler: Annotated[Path | None, typer.Option(help="Or the sampler folder that you use.")] = None,
    num: Annotated[int, typer.Option("--num", "-n", help="Noises.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the first.")] = 0,
    guidance: Guidance = None,
    trust: Trust = False,
    json: AsJson = False,
) -> None:
    """Inspect a model: where its image is decided, which sampler suits it, and what your last evaluations buy.

    It takes some hundred network evaluations for each noise; the number is printed first.
    """
    check_packages()
    if process()[1] > 1:
        raise FewstepError("an inspection is the work of one process: run it without torchrun")
    opened = open_model(model, trust=trust)
    scale = guidance_of(opened, guidance)
    check_inspected(opened, num, seed)
    if sampler is not None:
        typed = [f"--{name}" for name, value in (("solver", solver), ("grid", grid), ("nfe", nfe)) if value is not None]
        if typed:
            raise FewstepError(f"a saved sampler has all of its own: leave {' and '.join(typed)} out")
        present = Sampler.load(sampler)
        check_made_for(present, opened, scale, sampler)
    else:
        name = SOLVER if solver is None else solver
        where = grid if grid is not None or name == FITTED else default_grid(opened)
        made = sampler_for(opened, name, nfe=NFE if nfe is None else nfe, guidance=scale, grid=where)
        assert isinstance(made, Sampler)  # a solver by name makes one
        present = made.with_card(name=name if where is None else f"{name} on {where}")
    with Job.open("inspect", out):
        problem, cost = Problem(opened, scale, default_device()), inspection_cost(num, present.nfe)
        if not json:
            console.print(f"inspecting {opened.name} on {num} noises: up to {cost:,} network evaluations")
        with progress(f"inspecting {opened.name}", cost) as report:
            found = inspect_model(problem, present, num=num, seed=seed, on_progress=report)
            report(cost, "")
        pick = found.best
        best = sampler_for(opened, pick.solver, nfe=present.nfe, guidance=scale, grid=pick.grid)
        assert isinstance(best, Sampler)  # a solver by name makes one
        words = model_words(opened, guidance)
        count = ("--nfe", present.nfe)
        by_hand = ("sample", model, *words, "--solver", pick.solver, "--grid", pick.grid, *count, "--out", "runs/sample")
        carried = ("sample", model, *words, "--solver", FITTED, *count, "--out", "runs/sample")
        fitting = ("fit", model, *words, *count, "--out", "runs/fitted")
        asked = (carried,) if found.picks[0].solver == FITTED else (by_hand, fitting)
        commands = [shlex.join(["fewstep", *map(str, one)]) for one in asked]
        page = write_inspection(found, best, out, commands)
    if json:
        print_json({**found.facts(), "page": str(page)})
        return
    high, low = found.decided()
    console.print(f"the image is decided between noise levels {high:.3g} and {low:.3g}")
    console.print(
        f"best by hand at {present.nfe} evaluations: {pick.solver} on {pick.grid}, RMSE {pick.error:.4f}; in use {found.stops[-1]:.4f}"
    )
    console.print(f"idle evaluations at the end of the one in use: {found.idle}")
    console.print(f"page: {page}")
    console.print(f"next: {commands[0]}")
