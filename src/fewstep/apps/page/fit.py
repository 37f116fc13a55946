"""The tab *Fit*: samplers of a model's own, planned before they are paid for, made in the background, and taken away."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import gradio as gr

from fewstep.apps.commands.fit import FIGURES, GAIN, PLAN, gain_rows, plan_note, plan_rows
from fewstep.apps.options import integers
from fewstep.apps.page.models import Models
from fewstep.apps.page.running import Running
from fewstep.apps.page.shown import refused, table
from fewstep.apps.page.workshop import Workshop
from fewstep.integrations.exports import TARGETS, Export, export
from fewstep.learn.samplers.fit import FitConfig, plan_fit, seconds_per_evaluation
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import FewstepError
from fewstep.sampling.sampler import Sampler

__all__ = ["begin_fit", "export_of", "gain_of", "planned", "samplers_in", "tab", "zipped"]

MOST = 20  # evaluations of a sampler
DIGITS = 15  # of a budget
FILES = ("README.md", "sampler.json", "sampler.safetensors")


def planned(models: Models, name: str, nfe: str, guidance: float, budget: int | None) -> str:
    """Return what a fit would cost, as a table; one call of the network is timed for it.

    Raises:
        FewstepError: numbers that cannot be fitted, a budget that is too small.
    """
    problem = models.problem(name, guidance)
    plan = plan_fit(problem.model, _counts(nfe), FitConfig(budget=budget))
    title = f"{plan.num} trajectories and {plan.held_out} held out, {plan.levels} levels; {plan_note(plan)}"
    return f'{table(PLAN, plan_rows(plan, seconds_per_evaluation(problem)))}<p class="fs-note">{title}</p>'


def begin_fit(shop: Workshop, name: str, nfe: str, guidance: float, budget: int | None) -> str:
    """Begin a fit in the background, and return the name of the job.

    Raises:
        FewstepError: see `planned`.
    """
    plan_fit(shop.models.problem(name, guidance).model, _counts(nfe), FitConfig(budget=budget))  # refused before a process is begun
    limit = [] if budget is None else ["--budget", budget]
    counts = ",".join(map(str, _counts(nfe)))
    return shop.jobs.begin(shop.jobs.new("fit"), "fit", *shop.models.words(name, guidance), "--nfe", counts, *limit)


def _counts(nfe: str) -> list[int]:
    """Return numbers of evaluations that were typed.

    Raises:
        FewstepError: they are none, or more than the page fits.
    """
    counts = sorted(set(integers(str(nfe), "Network evaluations")))
    if not 1 <= counts[0] <= counts[-1] <= MOST:
        raise FewstepError(f"samplers of 1 to {MOST} evaluations are fitted here, got {nfe}: the command line takes more")
    return counts


def samplers_in(folder: Path) -> dict[str, Sampler]:
    """Return the samplers that a fit has made so far, by the names of their folders."""
    return {path.parent.name: Sampler.load(path.parent) for path in sorted(folder.glob("nfe-*/sampler.json"))}


def gain_of(samplers: Sequence[Sampler]) -> str:
    """Return the errors of samplers on held-out noises beside the best hand-made ones, as a table; empty of none."""
    rows = [{"nfe": one.nfe} | {key: one.card[key] for key in FIGURES} for one in samplers]
    return f"<h4>Mean error on held-out noises (RMSE)</h4>{table(GAIN, gain_rows(rows))}" if rows else ""


def zipped(shop: Workshop, job: str, sampler: str) -> Path:
    """Write a saved sampler as one file to download, and return it.

    Raises:
        FewstepError: the job has no such sampler.
    """
    folder = _folder(shop, job, sampler)
    path = shop.out / ".page" / job / f"{job}-{sampler}.zip"

    def write(temporary: Path) -> None:
        with ZipFile(temporary, "w") as archive:
            for name in FILES:
                archive.write(folder / name, f"{job}-{sampler}/{name}")

    write_whole(path, write)
    return path


def export_of(shop: Workshop, job: str, sampler: str, target: str, levels_only: bool) -> Export:
    """Return the noise levels of a sampler as another program takes them.

    Raises:
        FewstepError: no such sampler or program; a program without its solver, see `export`.
    """
    return export(Sampler.load(_folder(shop, job, sampler)), target, levels_only=levels_only)


def _folder(shop: Workshop, job: str, sampler: str) -> Path:
    made = samplers_in(shop.jobs.folder(job))
    if sampler not in made:
        raise FewstepError(f"{job} has no sampler {str(sampler)[:40]!r}: {', '.join(made) or 'none is there yet'}")
    return shop.jobs.folder(job) / sampler


# -- the tab ------------------------------------------------------------------------------------------------------------


def tab(shop: Workshop, page: gr.Blocks) -> None:
    """Lay the tab out."""
    models = shop.models
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_classes="fs-controls"):
            model = gr.Dropdown(models.names, value=models.names[0], label="Model")
            nfe = gr.Textbox("5,8", label="Evaluations of each sampler")
            with gr.Row():
                guidance = gr.Number(models.open(models.names[0]).default_guidance, label="Guidance", step=0.5, min_width=90)
                budget = gr.Textbox("", label="Budget", placeholder="default", min_width=90)
            with gr.Row():
                plan = gr.Button("Plan", min_width=80)
                go = gr.Button("Fit", variant="primary", min_width=80)
        with gr.Column(scale=3, min_width=320):
            cost = gr.HTML('<p class="fs-note">A sampler of the model\'s own, without training. Plan says what it costs.</p>')
            running = Running(shop, "fit")
            gain = gr.HTML("")
            with gr.Row(visible=False) as away:
                sampler = gr.Dropdown([], label="Sampler", allow_custom_value=True, min_width=110)
                target = gr.Dropdown(list(TARGETS), value="sigmas", label="Levels for", min_width=110)
                levels_only = gr.Checkbox(True, label="levels alone, without coefficients", min_width=160)
                download = gr.DownloadButton("Download", min_width=100)
            exported = gr.Code(label="Levels", lines=1, interactive=False, visible=False)
            how = gr.HTML("")

    def priced(*values: Any) -> str:  # noqa: ANN401 - from a browser
        try:
            return planned(models, *_typed(values))
        except FewstepError as error:
            return refused(error)

    def made(job: str) -> list[Any]:
        samplers = samplers_in(shop.jobs.folder(job))
        names = list(samplers)
        return [
            gain_of(list(samplers.values())),
            gr.update(visible=bool(names)),
            gr.update(choices=names, value=names[0] if names else None),
        ]

    def written(job: Any, name: Any, program: str, alone: bool) -> list[Any]:  # noqa: ANN401 - from a browser
        if not job or not name:
            return [gr.update(visible=False), "", gr.skip()]
        try:
            archive = gr.update(value=str(zipped(shop, str(job), str(name))))
        except (FewstepError, OSError) as error:
            return [gr.update(visible=False), refused(error), gr.skip()]
        try:
            levels = export_of(shop, str(job), str(name), program, alone)
        except FewstepError as error:
            return [gr.update(visible=False), refused(error), archive]
        return [gr.update(value=levels.text, visible=True), f'<p class="fs-note">{levels.use}</p>', archive]

    fields = [model, nfe, guidance, budget]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    model.change(lambda name: models.open(name).default_guidance, model, guidance, **quiet)
    plan.click(priced, fields, cost, show_progress="hidden", api_name="plan")
    running.connect(page, go, fields, lambda *values: begin_fit(shop, *_typed(values)), [gain, away, sampler], made)
    for one in (sampler, target, levels_only):
        one.change(written, [running.jobs, sampler, target, levels_only], [exported, how, download], **quiet)
    running.jobs.change(written, [running.jobs, sampler, target, levels_only], [exported, how, download], **quiet)


def _typed(values: Sequence[Any]) -> tuple[str, str, float, int | None]:
    """Return what the fields say.

    Raises:
        FewstepError: a budget that is no number.
    """
    model, nfe, guidance, budget = values
    text = str(budget or "").replace(",", "").strip()
    if text and not (text.isdecimal() and len(text) <= DIGITS):
        raise FewstepError(f"a budget is a number of network evaluations, got {text[:40]!r}: leave it empty for the default")
    return model, nfe, guidance, int(text) if text else None
