"""The tab *Sample*: the same seeds by two samplers and by the exact trajectory, as they are denoised."""

from __future__ import annotations

import math
import shlex
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from torch import Tensor

from fewstep.apps.commands.sample import SOLVER
from fewstep.apps.page.models import Models, quoted
from fewstep.apps.page.shown import ACROSS, Strip, refused, strips
from fewstep.apps.page.workshop import Workshop, worded
from fewstep.core.domain import domain_of
from fewstep.core.spacings import GRIDS
from fewstep.evaluate.benchmark.exact import exact_problem, exact_samples
from fewstep.evaluate.metrics.distances import rmse
from fewstep.models.carried import FITTED, OPTIMIZED
from fewstep.models.generate import best_sampler, check_made_for, sampler_for
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_seeds
from fewstep.runtime.errors import FewstepError, SolverError, counted
from fewstep.runtime.front_door import number, whole
from fewstep.runtime.spec import as_typed
from fewstep.sampling.loop import steps
from fewstep.sampling.reference import REFERENCE_NFE
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import SOLVERS, takes_statistics

__all__ = ["DEFAULT", "RECOMMENDED", "Asked", "Picked", "Shown", "grids_of", "picked", "sampled", "saved_for", "solvers_of", "tab"]

RECOMMENDED, DEFAULT, EACH = "recommended", "default", "one of each"
MOST_NFE, MOST, LONGEST = 20, 16, 2000  # evaluations, pictures, letters of a prompt
PYTHON, PYTHON_ALONE = "and in Python", "The first sampler's pictures in Python"
OF_TABLES = ("leading", "linspace", "trailing")  # grids of a noise law that is a table of times
EXACT = 16  # sets of exact samples in memory


@dataclass(frozen=True)
class Asked:
    """Samples to be made, and how.

    Attributes:
        model: its name.
        solver, grid: of the sampler, words of `solvers_of` and `grids_of`.
        other, other_grid: of the second sampler.
        nfe: network evaluations of both.
        guidance: the scale.
        label: the class of all samples; None for one of each in turn.
        seed, num: the first seed, and how many.
        exact: whether the exact trajectory is run too.
        prompt: of a text pipeline, in place of a class.
    """

    model: str
    solver: str = RECOMMENDED
    grid: str = DEFAULT
    other: str = "ddim"
    other_grid: str = DEFAULT
    nfe: int = 8
    guidance: float = 1.0
    label: int | None = None
    seed: int = 0
    num: int = 8
    exact: bool = True
    prompt: str = ""

    def __post_init__(self) -> None:
        for name, most in (("nfe", MOST_NFE), ("num", MOST)):
            value = whole(getattr(self, name), name, FewstepError)
            if not 1 <= value <= most:
                raise FewstepError(f"{name} is 1 to {most} on this page, got {value}: the command line takes more")
        if not math.isfinite(number(self.guidance, "guidance", FewstepError)):
            raise FewstepError(f"guidance is a finite number, got {self.guidance}")
        check_seeds(whole(self.seed, "the first seed", FewstepError), self.num)
        if not isinstance(self.prompt, str) or len(self.prompt) > LONGEST:
            raise FewstepError(f"a prompt is a text of up to {LONGEST} letters, got {str(self.prompt)[:40]!r}")


class Picked(NamedTuple):
    """A sampler that was chosen, and how it is named elsewhere.

    Attributes:
        sampler: itself.
        name: for the reader.
        words: of the command line.
        python: the arguments of `fewstep.sample`.
    """

    sampler: Sampler
    name: str
    words: list[str]
    python: str


class Shown(NamedTuple):
    """The tab at one moment: the strips, and once all is there what makes the first samples again (of a prompt no command does)."""

    strips: list[Strip]
    command: str = ""
    python: str = ""


# -- samplers to choose from --------------------------------------------------------------------------------------------


def solvers_of(models: Models, name: str) -> list[str]:
    """Return the samplers to choose from for a model: the recommended one, its fitted ones, all solvers, and those saved below the page."""
    model = models.open(name)
    if model.flow_map is not None or (model.tuned is not None and model.tuned.solver is not None):
        return [RECOMMENDED]  # made for its own steps
    own = [FITTED] if model.carried.samplers else []
    able = [solver for solver in SOLVERS if not takes_statistics(solver) or model.carried.statistics]
    return [RECOMMENDED, *own, *able, *saved_for(models.out, model)]


def saved_for(out: Path, model: Model) -> list[str]:
    """Return the folders of saved samplers below the page's that were made for a model."""
    found = []
    for path in sorted(out.glob("*/nfe-*/sampler.json")):
        try:
            made_for = Sampler.load(path.parent).card.get("model") == model.fingerprint
        except FewstepError:  # half a folder of a job that runs, or a damaged one
            continue
        found += [str(path.parent)] if made_for else []
    return found


def grids_of(models: Models, name: str) -> list[str]:
    """Return the grids to choose from for a model: its default, those that it carries, and all spacings."""
    model = models.open(name)
    if model.flow_map is not None or (model.tuned is not None and model.tuned.solver is not None):
        return [DEFAULT]
    able = [grid for grid in GRIDS if model.schedule.times is not None or grid not in OF_TABLES]
    return [DEFAULT, *([OPTIMIZED] if model.carried.grids else []), *able]


def picked(models: Models, name: str, solver: str, grid: str, nfe: int, guidance: float) -> Picked:
    """Return a sampler by the words of the tab.

    Raises:
        FewstepError: it is none of the lists, or the model cannot use it.
    """
    model = models.open(name)
    model.guided(guidance)  # refuses a scale that it cannot have, before a sampler for it is looked for
    if solver not in solvers_of(models, name):
        raise SolverError(f"{name} has no sampler {str(solver)[:80]!r}: choose one of the list")
    if grid not in grids_of(models, name):
        raise FewstepError(f"{name} has no grid {str(grid)[:80]!r}: choose one of the list")
    if solver in saved_for(models.out, model):
        loaded = Sampler.load(solver)
        check_made_for(loaded, model, guidance, solver)
        if grid != DEFAULT or nfe != loaded.nfe:
            raise FewstepError(f"{solver} has {loaded.nfe} evaluations and a grid of its own: choose {loaded.nfe}, and the default grid")
        return Picked(loaded, solver, ["--sampler", solver], f"fewstep.Sampler.load({quoted(solver)})")
    count = ["--nfe", str(nfe)]
    if solver == RECOMMENDED:
        if grid != DEFAULT:
            raise FewstepError("the recommended sampler has a grid of its own: choose the default grid, or a solver by name")
        known, where = _recommended(model, nfe, guidance)
        if known is None:
            best = best_sampler(model, nfe, guidance)
            return Picked(best, f"its own {best.nfe} steps", count, f"nfe={nfe}")
        solver = known
    else:
        where = None if grid == DEFAULT else grid
    made = sampler_for(model, solver, nfe=nfe, guidance=guidance, grid=where)
    assert isinstance(made, Sampler)  # a solver by name makes one
    named = [] if where is None or solver == FITTED else ["--grid", where]
    python = f"{quoted(solver)}, nfe={nfe}" + (f", grid={quoted(named[1])}" if named else "")
    return Picked(made, f"{solver} on {where}" if named else solver, ["--solver", solver, *named, *count], python)


def _recommended(model: Model, nfe: int, guidance: float) -> tuple[str | None, str | None]:
    """Return the solver and the grid of the best sampler that a model carries, else `SOLVER`; no solver where it takes its own steps."""
    own = model.flow_map is not None or (model.tuned is not None and model.tuned.solver is not None)
    try:
        best = best_sampler(model, nfe, guidance)
    except SolverError:
        if own:
            raise
        return SOLVER, None
    if own:
        return None, None
    return (FITTED, None) if best.solver == FITTED else (str(best.card["name"]), OPTIMIZED)


# -- sampling -----------------------------------------------------------------------------------------------------------


class ExactSamples:
    """The ends of exact trajectories, the last few of them in memory."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def of(self, problem: Problem, seeds: Sequence[int], label: int | None) -> Tensor:
        """Return those of some seeds of a class, ``[len(seeds), *D]``."""
        key = (problem.identity, tuple(seeds), label)
        if key not in self._held:
            exact = exact_problem(problem)
            self._held[key] = exact_samples(exact, seeds, exact.cond(seeds, label))
            while len(self._held) > EXACT:
                self._held.popitem(last=False)
        return self._held[key]


def sampled(models: Models, asked: Asked, exact: ExactSamples | None = None) -> Iterator[Shown]:
    """Sample as asked, evaluation by evaluation: first the one sampler, then the other, then the exact trajectory and all errors.

    Raises:
        FewstepError: see `picked`; what the model refuses.
    """
    prompted, seeds = models.takes_prompt(asked.model), range(asked.seed, asked.seed + asked.num)
    if asked.prompt and not prompted:
        raise FewstepError(f"{asked.model} takes no prompt: leave it empty")
    problem = models.problem(asked.model, asked.guidance, asked.prompt if prompted else None)
    pictures = partial(models.pictures, asked.model) if prompted else lambda x0: x0
    chosen = [
        picked(models, asked.model, solver, grid, asked.nfe, problem.guidance)
        for solver, grid in ((asked.solver, asked.grid), (asked.other, asked.other_grid))
    ]
    cond, ends = problem.cond(seeds, asked.label), list[Tensor]()
    shown = [Strip(one.name, "", None) for one in chosen]
    shown += [Strip("exact trajectory", f"{REFERENCE_NFE} evaluations", None)] if asked.exact else []
    for place, one in enumerate(chosen):
        start, last = problem.start(seeds, one.sampler.tableau.nodes), None
        for step in _steps(problem, one.sampler, start, cond, seeds):
            last = step
            halfway = None if prompted and step.x0.ndim != 4 else step.x0.cpu()  # of latents the first channel, until they are decoded
            shown[place] = Strip(one.name, f"{step.i + 1} of {one.sampler.nfe}", halfway)
            yield Shown(list(shown))
        assert last is not None  # a tableau has a row
        domain = domain_of(problem.denoiser)
        ends.append((last.x_next if domain is None else domain.fold(last.x_next)[0]).cpu())
        shown[place] = Strip(one.name, counted(one.sampler.nfe, "evaluation"), pictures(ends[-1]))
        yield Shown(list(shown))
    if asked.exact:
        truth = (exact or ExactSamples()).of(problem, seeds, asked.label)
        shown[-1] = shown[-1]._replace(images=pictures(truth))
        for place, made in enumerate(ends):
            of = " of latents" if prompted else ""
            shown[place] = shown[place]._replace(note=f"{shown[place].note}\nRMSE {rmse(made, truth):.4f}{of}")
    yield Shown(shown, "" if prompted else command_of(models, asked, chosen[0]), python_of(models, asked, chosen[0]))


def _steps(problem: Problem, sampler: Sampler, start: Tensor, cond: Any, seeds: range) -> Iterator[Any]:  # noqa: ANN401 - a condition
    """Yield the steps of `steps` without gradients; a generator must not hold ``no_grad`` over a yield."""
    made = steps(problem.denoiser, sampler.tableau, start, cond, seeds=seeds)
    while True:
        with torch.no_grad():
            step = next(made, None)
        if step is None:
            return
        yield step


def command_of(models: Models, asked: Asked, one: Picked) -> str:
    """Return the command line that makes the same samples."""
    label = [] if asked.label is None else ["--label", asked.label]
    words = ["sample", *models.words(asked.model, asked.guidance), *one.words, "-n", asked.num, "--seed", asked.seed, *label]
    return shlex.join(["fewstep", *map(str, words), "--out", "runs/sample"])


def python_of(models: Models, asked: Asked, one: Picked) -> str:
    """Return the lines of Python that make the same samples."""
    prompted = models.takes_prompt(asked.model)
    lines = [line for line in models.python(asked.model, asked.prompt, asked.guidance) if line]
    imports = [line for line in lines if line.startswith(("from ", "import "))]
    said = prompted or asked.guidance == models.open(asked.model).default_guidance
    guidance = "" if said else f", guidance={as_typed(asked.guidance)}"
    label = "" if asked.label is None else f", cond=torch.full(({asked.num},), {asked.label})"
    made, seeds = "latents" if prompted else "images", f"range({asked.seed}, {asked.seed + asked.num})"
    call = f"{made} = fewstep.sample(model, {one.python}{guidance}{label}, seeds={seeds})"
    used = [*(["import torch"] if label else []), "import fewstep", *imports]
    decoded = ["images = decode_latents(pipe, latents)"] if prompted else []
    used.sort(key=lambda line: line.split()[1].startswith("fewstep"))
    return "\n".join([*used, "", *lines[len(imports) :], call, *decoded])


# -- the tab ------------------------------------------------------------------------------------------------------------


def tab(shop: Workshop, _page: gr.Blocks) -> None:
    """Lay the tab out."""
    models, exact = shop.models, ExactSamples()
    first = models.names[0]
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_classes="fs-controls"):
            model = gr.Dropdown(models.names, value=first, label="Model")
            with gr.Row():
                solver = gr.Dropdown(solvers_of(models, first), value=RECOMMENDED, label="Sampler", min_width=120)
                grid = gr.Dropdown(grids_of(models, first), value=DEFAULT, label="Grid", min_width=110)
            with gr.Row():
                other = gr.Dropdown(solvers_of(models, first), value=_second(solvers_of(models, first)), label="Beside it", min_width=120)
                other_grid = gr.Dropdown(grids_of(models, first), value=DEFAULT, label="Grid", min_width=110)
            nfe = gr.Slider(1, MOST_NFE, _nfe(models.open(first)), step=1, label="Network evaluations", buttons=[])
            with gr.Row():
                guidance = gr.Number(models.open(first).default_guidance, label="Guidance", step=0.5, min_width=90)
                label = gr.Dropdown(
                    _classes(models.open(first)), value=EACH, label="Class", min_width=110, visible=not models.takes_prompt(first)
                )
            prompt = gr.Textbox("", label="Prompt", lines=2, max_length=LONGEST, visible=models.takes_prompt(first))
            with gr.Row():
                seed = gr.Number(0, label="First seed", precision=0, minimum=0, min_width=90)
                num = gr.Number(8, label="Pictures", precision=0, minimum=1, maximum=MOST, min_width=90)
            with_exact = gr.Checkbox(True, label=f"Exact trajectory ({REFERENCE_NFE} evaluations)")
            with gr.Row():
                go = gr.Button("Sample", variant="primary", min_width=90)
                stop = gr.Button("Stop", min_width=70)
        with gr.Column(scale=3, min_width=320):
            pictures = gr.HTML(_HINT, elem_classes="fs-out")
            code: dict[str, Any] = {"lines": 1, "interactive": False, "visible": False}
            command = gr.Code(label="The first sampler's pictures, on the command line", language="shell", **code)
            python = gr.Code(label=PYTHON, language="python", **code)

    def chosen(name: str) -> list[Any]:
        solvers, grids = solvers_of(models, name), grids_of(models, name)
        opened, prompted = models.open(name), models.takes_prompt(name)
        return [
            gr.update(choices=solvers, value=RECOMMENDED),
            gr.update(choices=grids, value=DEFAULT),
            gr.update(choices=solvers, value=_second(solvers)),
            gr.update(choices=grids, value=DEFAULT),
            gr.update(value=_nfe(opened)),
            gr.update(value=opened.default_guidance),
            gr.update(choices=_classes(opened), value=EACH, visible=not prompted),
            gr.update(value="", visible=prompted),
            "",
        ]

    def made(*values: Any) -> Iterator[list[Any]]:  # noqa: ANN401 - from a browser
        empty = gr.update(visible=False)
        try:
            asked = asked_for(*values)
            seeds = [str(one) for one in range(asked.seed, asked.seed + asked.num)]
            for shown in sampled(models, asked, exact):
                text = strips(shown.strips, seeds if asked.num <= ACROSS else ())
                again = [gr.update(value=text, visible=bool(text)) for text in (shown.command, shown.python)]
                again[1]["label"] = PYTHON if shown.command or not shown.python else PYTHON_ALONE
                yield [text, *again]
        except FewstepError as error:
            yield [refused(error), empty, empty]

    fields = [model, solver, grid, other, other_grid, nfe, guidance, label, seed, num, with_exact, prompt]
    theirs = [solver, grid, other, other_grid, nfe, guidance, label, prompt]
    model.change(worded(chosen, len(theirs)), model, [*theirs, pictures], show_progress="hidden")
    running = go.click(made, fields, [pictures, command, python], show_progress="hidden", concurrency_limit=4, api_name="sample")
    stop.click(None, cancels=[running])


_HINT = '<p class="fs-note">The same seeds by two samplers and by the exact trajectory. Press Sample.</p>'


def asked_for(*values: Any) -> Asked:  # noqa: ANN401 - from a browser
    """Return what the fields of the tab say, in their order.

    Raises:
        FewstepError: a value that a field cannot have.
    """
    model, solver, grid, other, other_grid, nfe, guidance, label, seed, num, exact, prompt = values
    of = None if label in (None, EACH) else whole_of(label)
    return Asked(model, solver, grid, other, other_grid, whole_of(nfe), guidance, of, whole_of(seed), whole_of(num), bool(exact), prompt)


def whole_of(value: Any) -> int:  # noqa: ANN401 - from a browser
    """Return a whole number of the browser's, which sends 8.0 for 8.

    Raises:
        FewstepError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, float) and not value.is_integer()):
        raise FewstepError(f"this takes whole numbers, got {str(value)[:40]!r}")
    return int(value)


def _second(solvers: Sequence[str]) -> str:
    return "ddim" if "ddim" in solvers else RECOMMENDED


def _classes(model: Model) -> list[tuple[str, Any]]:
    return [(EACH, EACH), *((str(label), label) for label in range(model.classes or 0))]


def _nfe(model: Model) -> int:
    """Return the evaluations to begin with: those that the model was made for, else 8."""
    if model.num_jumps:
        return min(model.num_jumps)
    if model.tuned is not None and model.tuned.solver is not None and model.tuned.nfe is not None:
        return model.tuned.nfe
    return 2 if model.flow_map is not None else 8
