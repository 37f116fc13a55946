"""The tab *Compare*: samplers on the same noises as a report, made in the background; and the reports of earlier runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

from fewstep.apps.options import integers
from fewstep.apps.page.models import Models
from fewstep.apps.page.running import Running
from fewstep.apps.page.sample import DEFAULT, RECOMMENDED, grids_of, saved_for, solvers_of, whole_of
from fewstep.apps.page.shown import frame, refused
from fewstep.apps.page.workshop import Workshop
from fewstep.core.schedule import VarianceExploding
from fewstep.evaluate.report.findings import read_folders
from fewstep.evaluate.report.write import report_page
from fewstep.models.carried import FITTED
from fewstep.models.generate import default_grid
from fewstep.models.problem import check_seeds
from fewstep.runtime.errors import FewstepError, SolverError
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import make_solver, takes_statistics

__all__ = ["begin_compare", "report_of", "runs_below", "samplers_to_compare", "tab"]

MOST_NFE, MOST_NOISES, MOST_ROWS, DEPTH = 200, 2048, 200, 3
STEPS = range(12, 8, -1)  # evaluations, of which each solver can make some


def samplers_to_compare(models: Models, name: str) -> tuple[list[str], list[str]]:
    """Return the solvers and the grids to choose rows from for a model; a solver that adds noise has no error to a trajectory."""
    saved = saved_for(models.out, models.open(name))
    able = [one for one in solvers_of(models, name) if one != RECOMMENDED and one not in saved]
    return [one for one in able if not _adds_noise(one)], [one for one in grids_of(models, name) if one != DEFAULT]


@cache
def _adds_noise(solver: str) -> bool:
    """Return whether a solver adds noise, on any grid that it can use."""
    if solver == FITTED or takes_statistics(solver):
        return False
    method, law = make_solver(solver), VarianceExploding()
    for nfe in STEPS:
        with suppress(SolverError):
            return Sampler.build(method, "karras", law, nfe=nfe).tableau.stochastic
    return False


def begin_compare(
    shop: Workshop, name: str, solvers: Sequence[str], grids: Sequence[str], nfe: str, num: int, seed: int, guidance: float
) -> str:
    """Begin a benchmark in the background, and return the name of the job.

    Raises:
        FewstepError: rows that are none of the lists, none or too many of them, numbers out of range.
    """
    known, places = samplers_to_compare(shop.models, name)
    for kind, asked, there in (("solver", solvers, known), ("grid", grids, places)):
        strange = [str(one)[:40] for one in asked if one not in there]
        if strange:
            raise FewstepError(f"{name} has no {kind} {' or '.join(strange)} here: choose from the list")
    counts = sorted(set(integers(str(nfe), "Network evaluations")))
    if not 1 <= counts[0] <= counts[-1] <= MOST_NFE or not 2 <= num <= MOST_NOISES:
        raise FewstepError(
            f"1 to {MOST_NFE} evaluations and 2 to {MOST_NOISES} noises, got {str(nfe)[:40]} and {num}: the command line takes more"
        )
    check_seeds(seed, num)
    shop.models.problem(name, guidance)  # refuses a scale that the model cannot have
    own = not known  # a student or a tuned model, which has its own steps
    if not own and not (solvers and grids):
        raise FewstepError("choose at least one solver and one grid")
    rows = len(counts) * max(1, len(solvers)) * max(1, len(grids))
    if rows > MOST_ROWS:
        raise FewstepError(f"these are {rows} rows, and the page takes {MOST_ROWS} at most: choose fewer, or use fewstep bench")
    names = [] if own else ["--solver", ",".join(solvers), "--grid", ",".join(grids)]
    words = [*shop.models.words(name, guidance), *names, "--nfe", ",".join(map(str, counts)), "-n", num, "--seed", seed]
    return shop.jobs.begin(shop.jobs.new("bench"), "bench", *words, "--report")


def runs_below(out: Path) -> list[str]:
    """Return the folders below the page's that hold results, the newest first."""
    found = {path.parent for depth in range(1, DEPTH + 1) for path in out.glob(f"{'*/' * depth}results.json")}
    return [str(path) for path in sorted(found, key=lambda path: -(path / "results.json").stat().st_mtime)]


def report_of(shop: Workshop, run: str) -> str:
    """Return the report of an earlier run in a frame.

    Raises:
        FewstepError: it is none of those below the page's folder, or its files are damaged.
    """
    if run not in runs_below(shop.out):
        raise FewstepError(f"no results in {str(run)[:80]!r}: choose one of the list, or put a run of fewstep bench into {shop.out}")
    folder = Path(run)
    written, results = folder / "report.html", folder / "results.json"
    current = written.is_file() and written.stat().st_mtime >= results.stat().st_mtime
    page = written.read_text(encoding="utf-8") if current else report_page(read_folders([folder])[0])
    return frame(page, f"report of {run}")


def tab(shop: Workshop, page: gr.Blocks) -> None:
    """Lay the tab out."""
    models, first = shop.models, shop.models.names[0]
    solvers_here, grids_here = samplers_to_compare(models, first)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_classes="fs-controls"):
            model = gr.Dropdown(models.names, value=first, label="Model")
            solvers = gr.Dropdown(solvers_here, value=_some(solvers_here), multiselect=True, label="Solvers")
            grids = gr.Dropdown(grids_here, value=_grids(models, first), multiselect=True, label="Grids")
            with gr.Row():
                nfe = gr.Textbox(_nfe(models, first), label="Evaluations", min_width=90)
                num = gr.Number(64, label="Noises", precision=0, minimum=2, maximum=MOST_NOISES, min_width=80)
            with gr.Row():
                seed = gr.Number(0, label="First seed", precision=0, minimum=0, min_width=80)
                guidance = gr.Number(models.open(first).default_guidance, label="Guidance", step=0.5, min_width=80)
            go = gr.Button("Compare", variant="primary")
            earlier = gr.Dropdown(_below(shop), value="", label="Or open the report of", allow_custom_value=True)
        with gr.Column(scale=3, min_width=320):
            running = Running(shop, "bench")
            report = gr.HTML('<p class="fs-note">Errors to the exact trajectories on the same noises, as curves, a table and pictures.</p>')

    def chosen(name: str) -> list[Any]:
        there, places = samplers_to_compare(models, name)
        return [
            gr.update(choices=there, value=_some(there)),
            gr.update(choices=places, value=_grids(models, name) if there else []),
            _nfe(models, name),
            models.open(name).default_guidance,
        ]

    def begin(*values: Any) -> str:  # noqa: ANN401 - from a browser
        name, many, places, counts, noises, begin_at, scale = values
        return begin_compare(shop, name, many or [], places or [], counts, whole_of(noises), whole_of(begin_at), scale)

    def made(job: str) -> list[Any]:
        folder = shop.jobs.folder(job)
        found = str(folder) in runs_below(shop.out) and shop.jobs.state(job).state != "running"
        return [report_of(shop, str(folder)) if found else "", gr.update(choices=_below(shop))]

    def opened(run: Any) -> Any:  # noqa: ANN401 - from a browser
        try:
            return report_of(shop, str(run)) if run else gr.skip()
        except (FewstepError, OSError) as error:
            return refused(error)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    model.change(chosen, model, [solvers, grids, nfe, guidance], **quiet)
    running.connect(page, go, [model, solvers, grids, nfe, num, seed, guidance], begin, [report, earlier], made)
    earlier.input(opened, earlier, report, **quiet)


def _some(solvers: Sequence[str]) -> list[str]:
    return [one for one in ("fitted", "unipc-2", "dpm-solver-pp-2m", "ddim") if one in solvers]


def _nfe(models: Models, name: str) -> str:
    """Return the evaluations to begin with: those that the model was made for, else 5 and 8."""
    own = models.open(name)
    made_for = ",".join(map(str, own.num_jumps)) or str(own.tuned.nfe if own.tuned is not None else 2)
    return "5,8" if samplers_to_compare(models, name)[0] else made_for


def _grids(models: Models, name: str) -> list[str]:
    model = models.open(name)
    fitted = ["optimized"] if model.carried.samplers else []
    return [*fitted, default_grid(model)] if samplers_to_compare(models, name)[0] else []


def _below(shop: Workshop) -> list[str]:
    return ["", *runs_below(shop.out)]
