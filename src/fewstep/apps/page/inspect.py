"""The tab *Inspect*: what a model's trajectories are like and which sampler suits it, measured in the background."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from fewstep.apps.page.running import Running
from fewstep.apps.page.sample import DEFAULT, MOST_NFE, RECOMMENDED, grids_of, picked, solvers_of, whole_of
from fewstep.apps.page.shown import frame, refused
from fewstep.apps.page.workshop import Workshop
from fewstep.evaluate.inspection import check_inspected, inspection_cost
from fewstep.runtime.errors import FewstepError

__all__ = ["begin_inspect", "cost_of", "page_of", "tab"]

MOST_NOISES = 256


def cost_of(shop: Workshop, name: str, nfe: int, num: int) -> str:
    """Return what an inspection costs, in a sentence.

    Raises:
        FewstepError: the model cannot be inspected, numbers out of range.
    """
    if not 3 <= nfe <= MOST_NFE or not 2 <= num <= MOST_NOISES:
        raise FewstepError(f"3 to {MOST_NFE} evaluations and 2 to {MOST_NOISES} noises, got {nfe} and {num}: the command line takes more")
    check_inspected(shop.models.open(name), num, 0)
    return f"up to {inspection_cost(num, nfe):,} network evaluations on {num} noises"


def begin_inspect(shop: Workshop, name: str, solver: str, grid: str, nfe: int, num: int, guidance: float) -> str:
    """Begin an inspection in the background, with the sampler that is in use, and return the name of the job.

    Raises:
        FewstepError: see `cost_of` and `picked`.
    """
    cost_of(shop, name, nfe, num)
    one = picked(shop.models, name, solver, grid, nfe, guidance)
    return shop.jobs.begin(shop.jobs.new("inspect"), "inspect", *shop.models.words(name, guidance), *one.words, "-n", num)


def page_of(shop: Workshop, job: str) -> str:
    """Return the page that an inspection has written, in a frame; empty while there is none."""
    path = shop.jobs.folder(job) / "inspect.html"
    return frame(path.read_text(encoding="utf-8"), f"inspection {job}") if path.exists() else ""


def _usual(solvers: Sequence[str]) -> str:
    return "unipc-2" if "unipc-2" in solvers else RECOMMENDED


def tab(shop: Workshop, page: gr.Blocks) -> None:
    """Lay the tab out."""
    models, first = shop.models, shop.models.names[0]

    def priced(name: str, count: Any, many: Any) -> str:  # noqa: ANN401 - from a browser
        try:
            return f'<p class="fs-note">{cost_of(shop, name, whole_of(count), whole_of(many))}</p>'
        except FewstepError as error:
            return refused(error)

    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_classes="fs-controls"):
            model = gr.Dropdown(models.names, value=first, label="Model")
            with gr.Row():
                solver = gr.Dropdown(
                    solvers_of(models, first), value=_usual(solvers_of(models, first)), label="Sampler in use", min_width=120
                )
                grid = gr.Dropdown(grids_of(models, first), value=DEFAULT, label="Grid", min_width=110)
            nfe = gr.Slider(3, MOST_NFE, 8, step=1, label="Network evaluations", buttons=[])
            with gr.Row():
                num = gr.Number(8, label="Noises", precision=0, minimum=2, maximum=MOST_NOISES, min_width=80)
                guidance = gr.Number(models.open(first).default_guidance, label="Guidance", step=0.5, min_width=80)
            cost = gr.HTML(priced(first, 8, 8))
            go = gr.Button("Inspect", variant="primary")
        with gr.Column(scale=3, min_width=320):
            running = Running(shop, "inspect")
            found = gr.HTML('<p class="fs-note">Where the image is decided, how straight it goes, and which sampler suits the model.</p>')

    def chosen(name: str) -> list[Any]:
        solvers = solvers_of(models, name)
        places = gr.update(choices=grids_of(models, name), value=DEFAULT)
        return [gr.update(choices=solvers, value=_usual(solvers)), places, models.open(name).default_guidance]

    def begin(name: str, one: str, where: str, count: Any, many: Any, scale: float) -> str:  # noqa: ANN401 - from a browser
        return begin_inspect(shop, name, one, where, whole_of(count), whole_of(many), scale)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    model.change(chosen, model, [solver, grid, guidance], **quiet)
    for one in (model, nfe, num):
        one.change(priced, [model, nfe, num], cost, **quiet)
    running.connect(page, go, [model, solver, grid, nfe, num, guidance], begin, [found], lambda job: [page_of(shop, job)])
