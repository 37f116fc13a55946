"""``fewstep sample``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from fewstep.apps.classifiers import classifier_of
from fewstep.apps.console import Report, console, next_command, print_json, progress
from fewstep.apps.models import bench_words, guidance_of, model_words, open_model
from fewstep.apps.options import (
    NUMBERS,
    AnyStatistics,
    AsJson,
    Guidance,
    InParallel,
    Memory,
    ModelName,
    StatisticsFolder,
    Tolerance,
    Trust,
    Window,
    numbers,
    parallel_config,
)
from fewstep.core.grid import TimeGrid
from fewstep.data.images import read_image
from fewstep.evaluate.pictures import save_grid, save_singles, to_uint8
from fewstep.integrations.diffusers.pipelines import PipelineModel
from fewstep.models.carried import FITTED, OPTIMIZED
from fewstep.models.cfg_plus_plus import cfg_plus_plus, check_plus_plus_scale
from fewstep.models.generate import GUIDANCE_FORMS, best_sampler, check_made_for, default_grid, generate_to, sampler_for, spread_of
from fewstep.models.model import Model
from fewstep.models.parallel_plan import plan_parallel
from fewstep.models.problem import Problem, check_seeds
from fewstep.runtime.artifact import read_json, write_whole
from fewstep.runtime.errors import FewstepError, GridError, counted, look_up
from fewstep.runtime.front_door import check_size
from fewstep.runtime.job import Job
from fewstep.runtime.process import default_device, process
from fewstep.sampling.parallel import ParallelConfig, Round
from fewstep.sampling.sampler import Sampler
from fewstep.sampling.start import level_of
from fewstep.solvers import takes_statistics

__all__ = ["sample"]

SOLVER, NFE = "unipc-2", 8  # where nothing is named, of a model that was not tuned for others
WITHOUT_CORRECTOR = "dpm-solver-pp-2m"  # the same where something is added between steps


def sample(
    model: ModelName,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    solver: Annotated[
        str | None, typer.Option(help="Or fitted: the model's own. Default: what the model was tuned for, else unipc-2.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Or optimized: the model's own. Default: as for --solver, else uniform or angle.")
    ] = None,
    nfe: Annotated[int | None, typer.Option(help="Network evaluations per sample. Default: as for --solver, else 8.")] = None,
    num: Annotated[int, typer.Option("--num", "-n", help="How many samples. Under torchrun say -n.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the first sample; the next has the next seed.")] = 0,
    guidance: Guidance = None,
    guidance_form: Annotated[
        str, typer.Option(help="Or cfg++: the picture is guided, and its noise is not; small scales, between 0 and 1.")
    ] = "cfg",
    label: Annotated[int | None, typer.Option(help="Class of all samples; by default the seed modulo the classes.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--from", metavar="PICTURE", help="Image to image: begin with this picture, of the samples' own size.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --from: the share of noise that it gets, above 0 and up to 1; 0.5 is as much as picture.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples at a time.")] = 256,
    sampler: Annotated[Path | None, typer.Option(help="A sampler folder to use instead of --solver, --grid and --nfe.")] = None,
    times: Annotated[str | None, typer.Option(metavar=NUMBERS, help="Times, instead of --grid and --nfe: 80,10,1,0.002.")] = None,
    sigmas: Annotated[str | None, typer.Option(metavar=NUMBERS, help="Noise levels sigma/alpha, likewise; 0 is the clean image.")] = None,
    singles: Annotated[bool, typer.Option("--singles", help="Also write one PNG per sample.")] = False,
    npz: Annotated[bool, typer.Option("--npz", help="Also write samples.npz (float32, and uint8 pictures).")] = False,
    statistics: StatisticsFolder = None,
    any_statistics: AnyStatistics = False,
    parallel: InParallel = False,
    window: Window = None,
    tol: Tolerance = None,
    memory: Memory = None,
    rounds: Annotated[int | None, typer.Option(help="In parallel: calls after which to stop, with the samples as they stand.")] = None,
    devices: Annotated[
        str | None, typer.Option(metavar="<device,...>", help="In parallel: devices that share each call: cuda:0,cuda:1.")
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(help="Guide by the gradient of digits, a classifier that is bundled, or of module:function, log p(x, t, labels) [B]."),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="With --classifier: how far. Default: 1.")] = None,
    split: Annotated[
        str | None, typer.Option(help="With --classifier: lie, strang, or joint (none). Default: lie, kicks between the solver's steps.")
    ] = None,
    kick: Annotated[str | None, typer.Option(help="With --classifier, split: euler or heun. Default: euler.")] = None,
    trust: Trust = False,
    json: AsJson = False,
) -> None:
    """Sample a model.

    A killed run continues where it stopped when the same command is typed again; the processes of torchrun share the seeds. Samples of
    another command in the folder are never replaced. With --parallel the processes share each call instead.
    """
    if num < 1 or batch < 1:
        raise FewstepError(f"num and batch must be at least 1, got {num} and {batch}")
    check_seeds(seed, num)
    check_size("batch", batch)
    config = parallel_config(parallel, window=window, tol=tol, memory=memory, rounds=rounds, devices=devices)
    opened = open_model(model, trust=trust)
    guided_by = classifier_of(classifier, opened, scale=scale, split=split, kick=kick)
    if guided_by is not None and guidance is not None:
        raise FewstepError("--classifier guides the model without its own condition: leave --guidance out")
    if guided_by is not None and config is not None:
        raise FewstepError("--classifier guides step by step: leave --parallel out")
    plus_plus = look_up(guidance_form, GUIDANCE_FORMS, "--guidance-form")
    if plus_plus:
        if guided_by is not None or config is not None:
            raise FewstepError("--guidance-form cfg++ is for a model's own condition, step by step: leave --classifier and --parallel out")
        check_plus_plus_scale(guidance)
    kicked = guided_by is not None and guided_by.splitting is not None
    if (kicked or plus_plus) and sampler is None and solver is None and opened.tuned is None:
        solver = WITHOUT_CORRECTOR  # that of the usual one would undo what is added between steps
    cfg = guidance_of(opened, guidance)
    x0 = _image(picture, strength, opened)
    chosen = _Choice(solver, grid, nfe, sampler, times, sigmas, statistics, any_statistics, strength).sampler_for(opened, cfg)
    if len(opened.need_shape()) != 3 and singles:
        raise FewstepError(f"samples of shape {opened.shape} are no pictures: leave --singles out; they are written to samples.npz")
    seeds = range(seed, seed + num)
    if plus_plus:
        cfg_plus_plus(opened, cfg, chosen)  # refused before a folder is made
    with Job.open("sample", out):
        problem = Problem(opened, cfg, default_device())
        meter = None if config is None else _Meter(problem, chosen, config, seeds[:batch], label, x0, quiet=json)
        with progress(f"sampling {num} x {counted(chosen.nfe, 'evaluation')}", num) as report:
            if meter is not None:
                meter.report = report
            options = {"label": label, "batch": batch, "x0": x0, "parallel": config, "guided_by": guided_by, "guidance_form": guidance_form}
            made = generate_to(out, problem, chosen, seeds, **options, on_progress=report, on_round=meter)
        if made is None:
            return
        images, parts = made
        labels = opened.labels(seeds, label) if guided_by is None else guided_by.labels(seeds, label)
        done = {"num": num, "nfe": chosen.nfe, "sampler": _described(chosen), **_written(images, labels, seeds, out, singles, npz)}
        done |= {} if meter is None else {"parallel": meter.figures()}
        rmtree(parts)
    if json:
        print_json(done)
        return
    console.print(f"sampler: {done['sampler']}")
    if meter is not None:
        console.print(f"in parallel: {meter}")
    console.print(f"pictures: {done['grid']}" if "grid" in done else f"samples: {done['npz']}")
    if plus_plus:
        return  # bench has no such form
    console.print(next_command("bench", model, *model_words(opened, guidance), *bench_words(opened, opened.data), "--out", "runs/bench"))


def _image(picture: Path | None, strength: float | None, model: Model) -> Tensor | None:
    """Return the picture that image to image begins with, as an image ``[C, H, W]``; None where none was named.

    Raises:
        FewstepError: a picture without a strength, or the other way round; a model that cannot begin with it, or of another size.
    """
    if (picture is None) != (strength is None):
        raise FewstepError(
            "--strength says how much noise a picture gets: say --from PICTURE"
            if picture is None
            else "--from begins with a picture: say --strength, the share of noise that it gets, as --strength 0.5"
        )
    if picture is None:
        return None
    level_of(strength)
    if model.flow_map is not None and not model.flow_map.anywhere:
        raise FewstepError(f"{model.name} is a student, whose jumps start at pure noise, so it begins with no picture: sample its teacher")
    index = None if model.folder is None else Path(model.folder) / "model_index.json"
    if isinstance(model, PipelineModel) or (index is not None and index.is_file() and {"vae", "vqvae"} & read_json(index).keys()):
        raise FewstepError(
            f"{model.name} samples latents of a pipeline, and a picture is none: put a FewstepScheduler with strength= into its image to "
            "image pipeline"
        )
    return read_image(picture, model.need_shape())


def _silent(done: int, note: str = "") -> None:
    """Report nothing."""


class _Meter:
    """The rounds of a run in parallel: what they were expected to take, and took. It is called with each `Round`."""

    def __init__(
        self,
        problem: Problem,
        sampler: Sampler,
        config: ParallelConfig,
        seeds: range,
        label: int | None,
        x0: Tensor | None,
        *,
        quiet: bool,
    ) -> None:
        denoiser = spread_of(problem.model, problem.denoiser, problem.guidance, config)
        x = problem.start(seeds, sampler.tableau.nodes, x0)
        self.plan = plan_parallel(denoiser, sampler, x, problem.cond(seeds, label), replace(config, devices=(), rounds=None))
        self.nfe, self.batches, self.rounds, self.evaluations, self.settled = sampler.nfe, 0, 0, 0, sampler.nfe
        self.most = config.rounds
        self.report: Report = _silent
        self.done = 0
        if not quiet and process()[0] == 0:
            console.print(f"expected for {len(seeds)} samples: {self.plan}")

    def __call__(self, made: Round) -> None:
        self.batches += made.i == 1
        self.rounds, self.evaluations = self.rounds + 1, self.evaluations + made.last - made.first
        if made.i == self.most:
            self.settled = min(self.settled, made.accepted)
        self.done += made.accepted == self.nfe
        self.report(self.done, f"round {made.i}, {made.accepted} of {self.nfe} evaluations")

    def figures(self) -> dict[str, Any]:
        """Return what it took and was expected to take, for each batch."""
        batches = max(self.batches, 1)
        took = {"rounds": self.rounds / batches, "evaluations": self.evaluations / batches, "settled": self.settled}
        return {**took, "expected": {"rounds": self.plan.rounds, "seconds": self.plan.seconds, "sequential": self.plan.sequential}}

    def __str__(self) -> str:
        if not self.batches:
            return "all batches were there"
        rounds, evaluations = self.rounds / self.batches, self.evaluations / self.batches
        if self.settled < self.nfe:
            return f"stopped after {rounds:g} rounds, with {self.settled} of {self.nfe} evaluations settled: a preview, not the samples"
        return f"{rounds:g} rounds instead of {self.nfe} calls, {evaluations:g} evaluations of each sample instead of {self.nfe}"


@dataclass(frozen=True)
class _Choice:
    """The options that name a sampler; None where nothing was typed."""

    solver: str | None
    grid: str | None
    nfe: int | None
    sampler: Path | None
    times: str | None
    sigmas: str | None
    statistics: Path | None
    any_statistics: bool
    strength: float | None

    def sampler_for(self, model: Model, guidance: float) -> Sampler:
        """Return the sampler: one from a folder, or a solver on explicit times, on explicit noise levels, or on a named grid."""
        model.guided(guidance)  # refuses a scale that it cannot have, before a sampler for it is looked for
        if sum(option is not None for option in (self.sampler, self.times, self.sigmas)) > 1:
            raise FewstepError("give one of --sampler, --times and --sigmas")
        if self.times is not None or self.sigmas is not None:
            self._leave_out("the levels given say where sampling begins", "strength")
        if self.sampler is not None:
            self._leave_out("a saved sampler has all of its own", "solver", "grid", "nfe", "statistics", "any_statistics")
            loaded = Sampler.load(self.sampler)
            check_made_for(loaded, model, guidance, self.sampler)
            return self._from_level(loaded, model, guidance).with_card(grid=str(self.sampler))
        tuned = model.tuned
        solver, spacing, nfe = (
            (SOLVER, default_grid(model), NFE) if tuned is None or tuned.solver is None else (tuned.solver, OPTIMIZED, tuned.nfe or NFE)
        )
        solver, spacing = solver if self.solver is None else self.solver, spacing if self.grid is None else self.grid
        nfe = nfe if self.nfe is None else self.nfe
        free = model.flow_map is not None and model.flow_map.anywhere
        if free and (self.solver, self.grid, self.times, self.sigmas) == (None,) * 4 and nfe not in model.num_jumps:
            return self._from_level(best_sampler(model, nfe, guidance), model, guidance)  # on times of its own choice
        if solver == FITTED:
            self._leave_out("a fitted sampler takes no statistics", "any_statistics")
            if self.times is not None or self.sigmas is not None or self.grid not in (None, OPTIMIZED) or self.statistics is not None:
                raise FewstepError(
                    "a fitted sampler has noise levels and coefficients of its own: leave --grid, --times, --sigmas and --statistics out"
                )
            fitted = model.fitted(nfe, guidance).with_card(name=FITTED, grid=OPTIMIZED)
            return self._from_level(fitted, model, guidance)
        if self.statistics is not None and not takes_statistics(solver):
            raise FewstepError(f"{solver} takes no statistics: say --solver dpm-solver-v3, or leave --statistics out")
        if self.any_statistics and not takes_statistics(solver):
            raise FewstepError(f"{solver} takes no statistics: leave --any-statistics out")
        if self.times is not None or self.sigmas is not None:
            self._leave_out("the levels given say where and how often the network is asked", "grid", "nfe")
        grid, count, where = spacing, nfe, spacing
        if self.times is not None:
            grid, count, where = TimeGrid(torch.tensor(numbers(self.times, "--times"), dtype=torch.float64)), None, "the times given"
            if model.schedule.times is not None and float(grid.t[0]) > model.schedule.t_max:
                raise GridError(f"--times has {float(grid.t[0]):g}, but {model.name} knows times up to {model.schedule.t_max:g}")
        elif self.sigmas is not None:
            grid, count, where = TimeGrid.from_sigmas(model.schedule, numbers(self.sigmas, "--sigmas")), None, "the noise levels given"
        options = {"statistics": self.statistics, "any_statistics": self.any_statistics, "strength": self.strength}
        made = sampler_for(model, solver, nfe=count, guidance=guidance, grid=grid, **options)
        assert isinstance(made, Sampler)  # a tableau is what was given as one
        return made.with_card(name=solver, grid=where)

    def _from_level(self, sampler: Sampler, model: Model, guidance: float) -> Sampler:
        """Return a sampler with a grid of its own, re-spread below the strength that was typed, if any."""
        made = sampler_for(model, sampler, guidance=guidance, strength=self.strength)
        assert isinstance(made, Sampler)
        return made

    def _leave_out(self, why: str, *options: str) -> None:
        """Refuse options that would change nothing."""
        typed = [f"--{name.replace('_', '-')}" for name in options if getattr(self, name) not in (None, False)]
        if typed:
            raise FewstepError(f"{why}: leave {' and '.join(typed)} out")


def _described(sampler: Sampler) -> str:
    """Return what a sampler is, for the reader."""
    first, last = torch.exp(-sampler.tableau.nodes.lam[[0, -1]]).tolist()
    where = f" on {sampler.card['grid']}" if sampler.card.get("grid") else ""
    return f"{sampler.name}{where}, {counted(sampler.nfe, 'evaluation')}, noise levels {first:.3g} to {last:.3g}"


def _written(images: Tensor, labels: Tensor | None, seeds: range, out: Path, singles: bool, npz: bool) -> dict[str, Any]:
    """Write samples as pictures and arrays, those that are no pictures as arrays alone, and return where."""
    places = dict[str, str]()
    if images.ndim == 4:
        places["grid"] = str(save_grid(images, out / "grid.png"))
    if singles:
        places["singles"] = str(save_singles(images, out / "singles", seeds))
    if npz or images.ndim != 4:
        arrays: dict[str, Any] = {"x": images.numpy(), "seeds": np.array(seeds)}
        if images.ndim == 4:
            arrays["images"] = to_uint8(images)
        if labels is not None:
            arrays["labels"] = labels.numpy()
        write_whole(out / "samples.npz", lambda temporary: np.savez(temporary, **arrays))
        places["npz"] = str(out / "samples.npz")
    return places
