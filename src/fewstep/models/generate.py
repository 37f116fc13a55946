"""The function `sample`: samples of any model by any sampler; and many of them, batch by batch, into a folder."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, SupportsInt

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser, FlowMap, check_denoiser
from fewstep.core.domain import domain_of
from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import prediction
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Solver, Tableau
from fewstep.models.batches import sampled_in_batches, samples_record
from fewstep.models.carried import FITTED, OPTIMIZED
from fewstep.models.cfg_plus_plus import cfg_plus_plus, check_plus_plus_scale
from fewstep.models.gradient_guidance import GradientGuidance
from fewstep.models.model import Model
from fewstep.models.networks.calls import check_evaluating
from fewstep.models.problem import Problem
from fewstep.models.spread import OverProcesses, over_devices
from fewstep.runtime.errors import ArtifactError, FewstepError, GridError, ModelError, SolverError, counted, look_up
from fewstep.runtime.front_door import checked, scale_of
from fewstep.runtime.process import process
from fewstep.runtime.spec import parse_spec
from fewstep.sampling.brownian import NoisePath
from fewstep.sampling.loop import check_start, run
from fewstep.sampling.noise import seed_list, start_noise
from fewstep.sampling.parallel import ParallelConfig, Round, sample_in_parallel
from fewstep.sampling.sampler import Sampler
from fewstep.sampling.start import level_of, noised
from fewstep.solvers import make_solver, takes_statistics

__all__ = [
    "best_sampler",
    "check_made_for",
    "check_statistics",
    "default_grid",
    "generate_to",
    "sample",
    "sampler_for",
    "solver_for",
    "spread_of",
]

What = str | Solver | Sampler | Tableau
GuidanceForm = Literal["cfg", "cfg++"]
GUIDANCE_FORMS: dict[str, bool] = {"cfg": False, "cfg++": True}  # whether `cfg_plus_plus` takes the steps
log = logging.getLogger("fewstep")


@checked
@torch.no_grad()
def sample(
    model: Model | Denoiser | FlowMap,
    what: What | None = None,
    x: Tensor | None = None,
    cond: Cond = None,
    *,
    nfe: int | None = None,
    seeds: Iterable[int] | Tensor | None = None,
    path: NoisePath = "steps",
    x0: Tensor | None = None,
    strength: float | None = None,
    guidance: float | None = None,
    grid: str | TimeGrid | None = None,
    observe: Callable[[Any], None] | None = None,
    parallel: ParallelConfig | None = None,
    guidance_form: GuidanceForm = "cfg",
) -> Tensor:
    """Sample a model, without gradients (iterate over `steps` for those).

    Args:
        model: a `Model`; or any `Denoiser` or `FlowMap`, which has to be given ``x``.
        what: the name of a solver (``"unipc-2"``, ``"DPM++ 2M"``), a `Solver`, a `Sampler` or a `Tableau`. Without it the best sampler
            that the model carries for ``nfe`` evaluations; the logger ``fewstep`` says which.
        x: where to start, ``[B, *D]`` at the sampler's first time; by default the noise of the seeds.
        cond: what the network is conditioned on; by default the class labels of the seeds (of 0, 1, ... without seeds), if the model has
            classes.
        nfe: network evaluations per sample. A sampler or tableau has its own.
        seeds: one for each sample. A seed gives the same picture in any batch and on any device. Of a reflected model the start is folded
            into its cube, and so are the samples.
        path: for samplers that add noise. Of ``steps`` each evaluation has a noise of its own, of ``brownian`` each seed has one path over
            the noise levels, so that more evaluations refine the same sample, see `BrownianPath`.
        x0: image to image: clean images to begin with, ``[B, *D]``, one for each seed, or a single one ``[*D]`` of a model's shape for all.
        strength: how much noise they get, ``sigma / (alpha + sigma)``, above 0 and up to 1: a noise level, the same for any solver, grid
            and ``nfe``, below which all evaluations are made. Of 1 nothing is left of the images but what the model's range leaves. A
            sampler's own grid is re-spread below it, see `Sampler.from_level`.
        guidance: classifier-free guidance scale; by default the model's own, which is 1 but for pipelines.
        grid: where to evaluate: the name of a spacing (``"karras"``), ``"optimized"`` for the model's own, or a `TimeGrid`; by default
            that of `default_grid`. A sampler or tableau has its own.
        observe: called with each `Step`; in parallel, with each `Round`.
        parallel: evaluate several steps at once, for the same samples to a tolerance in less time, see `ParallelConfig`. The processes of
            ``torchrun`` then call this together, with the same arguments, and share each round.
        guidance_form: ``cfg``, or ``cfg++`` for a hand-made sampler: the estimate of the image is guided, and the noise is that of no
            condition, see `cfg_plus_plus`. Its scales are small ones, mostly between 0 and 1, and have to be named. An observed step's
            ``x0`` is then the answer without the condition.

    Returns:
        The samples ``[B, *D]`` on the model's device.

    Raises:
        ModelError: something that is no model, a model without a shape, or one in training mode; a guidance scale or a condition that it
            cannot have; images without a strength, or the other way round, or for a student that starts at the noise alone.
        SolverError: an unknown solver; no ``nfe`` where one is needed, or one that the solver cannot use.
        GridError: an unknown spacing, or one of another number of evaluations; a strength that no step can begin at.
        ArtifactError: a sampler that was made for another model or guidance scale.

    Examples:
        >>> import fewstep
        >>> model = fewstep.load_model("digits-edm")
        >>> fewstep.sample(model, "unipc-2", nfe=6, seeds=range(4)).shape
        torch.Size([4, 1, 8, 8])
        >>> one = fewstep.sample(model, "unipc-2", nfe=6, seeds=[0])[0]
        >>> fewstep.sample(model, "unipc-2", nfe=6, seeds=range(4), x0=one, strength=0.5).shape
        torch.Size([4, 1, 8, 8])
    """
    check_denoiser(model, "sample")
    if look_up(guidance_form, GUIDANCE_FORMS, "guidance_form"):
        if not isinstance(model, Model) or parallel is not None:
            raise ModelError("guidance_form='cfg++' is for a Model, and for evaluations one after the other: leave it or parallel out")
        check_plus_plus_scale(guidance)
    if observe is not None and not callable(observe):
        raise FewstepError(f"observe is a function that is called with each Step, got {observe!r}")
    if not isinstance(parallel, ParallelConfig | None):
        raise FewstepError(f"parallel is a fewstep.ParallelConfig, got {str(parallel)[:80]!r}: pass parallel=fewstep.ParallelConfig()")
    if isinstance(model, Model):
        check_evaluating(model.network)
        guidance = scale_of(guidance, model.default_guidance)
        denoiser = model.guided(guidance)
    else:
        denoiser, guidance = model, scale_of(guidance, 1.0)
        if guidance != 1:
            raise ModelError(
                "only a Model can be guided by a scale: wrap the denoiser with fewstep.classifier_free(denoiser, scale, uncond)"
            )
    seeds = None if seeds is None else seed_list(seeds)
    if seeds is not None and not seeds and x is None:
        raise ModelError("an empty list of seeds makes no samples: pass at least one, as seeds=[0]")
    if x0 is not None or strength is not None:
        x0 = _images(model, x0, strength, seeds, x)
    sampler = sampler_for(model, what, nfe=nfe, guidance=guidance, grid=grid, strength=strength)
    tableau = sampler.tableau if isinstance(sampler, Sampler) else sampler
    edit = None
    if GUIDANCE_FORMS[guidance_form] and isinstance(model, Model):
        denoiser, edit = cfg_plus_plus(model, guidance, sampler)
    if x0 is not None and seeds is not None:
        x = noised(x0, tableau.nodes, seeds).to(model.device if isinstance(model, Model) else x0.device)
    elif x is None:
        if not isinstance(model, Model) or seeds is None:
            missing = "a denoiser does not know the shape of its samples: pass x=, the start" if not isinstance(model, Model) else _SEEDS
            raise ModelError(missing)
        x = start_noise(tableau.nodes, seeds, model.need_shape()).to(model.device)
    else:
        check_start(x, model.shape if isinstance(model, Model) else None)
    if seeds is not None and len(seeds) != len(x):
        raise ModelError(f"{len(seeds)} seeds for {len(x)} starts: pass one for each")
    if (domain := domain_of(model)) is not None:
        x = domain.fold(x)[0]
    if cond is None and isinstance(model, Model):
        labels = model.labels(range(len(x)) if seeds is None else seeds)
        cond = None if labels is None else labels.to(x.device)
    elif isinstance(model, Model):
        cond = model.condition(cond, len(x))
        cond = cond.to(x.device) if isinstance(cond, Tensor) else cond
    if parallel is None:
        return run(denoiser, tableau, x, cond, seeds=seeds, path=path, edit=edit, observe=observe)
    spread = spread_of(model, denoiser, guidance, parallel)
    return sample_in_parallel(spread, tableau, x, cond, seeds=seeds, path=path, config=replace(parallel, devices=()), observe=observe)


def spread_of(model: Model | Denoiser | FlowMap, denoiser: Denoiser | FlowMap, guidance: float, config: ParallelConfig) -> Denoiser:
    """Return the denoiser whose batch the devices of a configuration and the processes of ``torchrun`` share.

    Raises:
        ModelError: a flow map; devices for something that is no model of a network.
    """
    if isinstance(denoiser, FlowMap):
        raise ModelError("a student makes each of its few jumps by one call, and there is nothing to run in parallel: leave parallel out")
    if config.devices:
        if not isinstance(model, Model):
            raise ModelError("devices are for a Model, whose network can be copied: leave them out, or make a Model of the denoiser")
        denoiser = over_devices(model, guidance, config.devices)
    return OverProcesses(denoiser) if process()[1] > 1 else denoiser


def _images(
    model: Model | Denoiser | FlowMap, x0: Tensor | None, strength: float | None, seeds: list[int] | None, x: Tensor | None
) -> Tensor:
    """Return the images ``[len(seeds), *D]`` that image to image begins with.

    Raises:
        ModelError: one of them without the others, or what are no finite images of the model's shape.
        GridError: the strength is none.
    """
    if x is not None:
        raise ModelError("x is the start itself, noise included: leave it out for image to image, or leave x0 and strength out")
    if x0 is None:
        raise ModelError("a strength says how much noise images get: pass x0=, the images, or leave strength out")
    if strength is None:
        raise ModelError("x0 are images to begin with: pass strength=, the share of noise that they get, as strength=0.5, or leave x0 out")
    level_of(strength)
    flow_map = model.flow_map if isinstance(model, Model) else model if isinstance(model, FlowMap) else None
    if flow_map is not None and not flow_map.anywhere:
        raise ModelError("this student's jumps start at pure noise, and at none of its levels can an image be put in: sample its teacher")
    if seeds is None:
        raise ModelError("say which noise the images get: pass seeds=, one for each, as seeds=range(4)")
    shape = model.shape if isinstance(model, Model) else None
    wanted = "[B, *D]" if shape is None else f"[B, {', '.join(map(str, shape))}]"
    if not isinstance(x0, Tensor) or not x0.is_floating_point() or x0.layout != torch.strided:
        what = str(x0.dtype).removeprefix("torch.") if isinstance(x0, Tensor) else type(x0).__name__
        raise ModelError(f"x0 are clean images, a dense tensor {wanted} in floating point, got {what}")
    if shape is not None and tuple(x0.shape) == tuple(shape):
        x0 = x0.expand(len(seeds), *shape)
    if not x0.ndim or (shape is not None and tuple(x0.shape[1:]) != tuple(shape)):
        raise ModelError(f"x0 are clean images, {wanted}, got shape {tuple(x0.shape)}")
    if len(x0) != len(seeds):
        raise ModelError(f"{len(seeds)} seeds for {len(x0)} images: pass one for each, or a single image without its batch for all")
    if not bool(torch.isfinite(x0).all()):
        raise ModelError("x0 has entries that are not finite (NaN or infinite): check where the images come from")
    if (domain := domain_of(model)) is not None:
        domain.check(x0, "the images x0")
    return x0


_SEEDS = "say which samples: pass seeds=, as in seeds=range(4), or x=, the start"


def sampler_for(
    model: Model | Denoiser | FlowMap,
    what: What | None,
    *,
    nfe: int | None = None,
    guidance: float = 1.0,
    grid: str | TimeGrid | None = None,
    statistics: ModelStatistics | str | Path | None = None,
    any_statistics: bool = False,
    strength: float | None = None,
) -> Sampler | Tableau:
    """Return the sampler that `sample` would run. Arguments and errors are those of `sample` and `solver_for`."""
    if isinstance(model, Model):
        model.guided(guidance)  # refuses a scale that it cannot have, before a sampler for it is looked for
    made = _sampler_for(model, what, nfe, guidance, grid, statistics, any_statistics, strength)
    if isinstance(model, Model):
        model.check_own_steps(made.tableau if isinstance(made, Sampler) else made)
    return made


def _sampler_for(
    model: Model | Denoiser | FlowMap,
    what: What | None,
    nfe: int | None,
    guidance: float,
    grid: str | TimeGrid | None,
    statistics: ModelStatistics | str | Path | None,
    any_statistics: bool,
    strength: float | None,
) -> Sampler | Tableau:
    level = math.inf if strength is None else level_of(strength)
    if not isinstance(nfe, SupportsInt | None) or isinstance(nfe, bool):
        raise SolverError(f"nfe is one number of network evaluations, as nfe=8, got {nfe!r}")
    if not isinstance(grid, str | TimeGrid | None):
        raise GridError(f"a grid is the name of a spacing or a fewstep.TimeGrid(times), got a {type(grid).__name__}")
    if isinstance(what, Sampler | Tableau):
        count = what.nfe if isinstance(what, Sampler) else what.evaluations
        if nfe not in (None, count):
            raise SolverError(f"this sampler makes {counted(count, 'evaluation')}, not {nfe}: leave nfe out, or take another sampler")
        if grid is not None:
            raise GridError("a sampler has a grid of its own: leave grid out")
        if isinstance(what, Sampler) and isinstance(model, Model):
            check_made_for(what, model, guidance)
        if isinstance(what, Sampler) and strength is not None:
            return _from_level(what, level, model, guidance)
        if strength is not None:
            raise SolverError("a tableau has numbers for its own levels alone, and begins nowhere else: pass a Sampler, or a solver's name")
        return what
    if what is None:
        if not isinstance(model, Model):
            raise SolverError("say which sampler: a solver's name and nfe, as in sample(denoiser, 'unipc-2', x, nfe=8), or a Sampler")
        if grid is not None:
            raise GridError("a grid belongs to a solver: name one, as in sample(model, 'unipc-2', nfe=8, grid=...)")
        return _from_level(best_sampler(model, nfe, guidance), level, model, guidance)
    if isinstance(what, type):
        raise SolverError(f"{what.__name__} is a class: make a solver of it first, as in {what.__name__}()")
    if not isinstance(what, str | Solver):
        hint = ": load a folder by fewstep.Sampler.load" if isinstance(what, Path) else ""
        raise SolverError(f"a sampler is a solver's name, a Solver, a Sampler or a Tableau, not a {type(what).__name__}{hint}")
    if what == FITTED:
        if not isinstance(model, Model) or nfe is None:
            raise SolverError("a fitted sampler is one of a Model, for a number of evaluations: pass nfe=")
        if grid not in (None, OPTIMIZED) or statistics is not None:
            raise GridError("a fitted sampler has noise levels and coefficients of its own: leave grid and statistics out")
        return _from_level(model.fitted(nfe, guidance), level, model, guidance)
    if isinstance(what, Solver):
        solver, name = what, type(what).__name__
        check_statistics(solver, model, guidance)
    else:
        solver, name = _named(what, model, guidance, statistics, any_statistics), what
    if isinstance(grid, TimeGrid):
        return Sampler.build(solver, grid.known_to(model.schedule), model.schedule, nfe=nfe, level=level)
    if nfe is None:
        raise SolverError(f"say how many network evaluations {name} may use: pass nfe=, as in nfe=8")
    if grid == OPTIMIZED:
        if not isinstance(model, Model) or not isinstance(what, str):
            raise GridError("optimized grids are those that a Model carries, for a solver by name")
        return Sampler.build(solver, model.optimized(what, nfe, guidance), model.schedule, nfe=nfe, level=level)
    return Sampler.build(solver, default_grid(model) if grid is None else grid, model.schedule, nfe=nfe, level=level)


def _from_level(sampler: Sampler, level: float, model: Model | Denoiser | FlowMap, guidance: float) -> Sampler:
    """Return a sampler from a noise level on, with the statistics that the model carries where it wants some."""
    if level == math.inf:
        return sampler
    return sampler.from_level(level, statistics=model.statistics(guidance) if isinstance(model, Model) else None)


def default_grid(model: Model | Denoiser | FlowMap) -> str:
    """Return the spacing where none is named: ``uniform`` where predicted noise is divided by an ``alpha`` that vanishes, else ``angle``.

    Where it is divided, an error of the network at the start counts ``sigma/alpha`` times, and `angle`, whose first step is the longest of
    all, carries it on (docs/decisions/0036). Of a reflected model it is ``karras`` (docs/decisions/0049).
    """
    if domain_of(model) is not None:
        return "karras"
    divided = isinstance(model, Model) and model.flow_map is None and prediction(model.prediction).undefined_at_zero_alpha
    start = torch.tensor(model.schedule.t_max, dtype=torch.float64)
    return "uniform" if divided and float(model.schedule.alpha(start)) < VANISHING else "angle"


VANISHING = 0.5  # the alpha of pure noise is 0 to 0.1 where a law preserves the variance, and 1 where noise is only added


def _named(
    name: str, model: Model | Denoiser | FlowMap, guidance: float, statistics: ModelStatistics | str | Path | None, any_statistics: bool
) -> Solver:
    if isinstance(model, Model):
        return solver_for(name, model, guidance=guidance, statistics=statistics, any_statistics=any_statistics)
    if takes_statistics(name):
        raise SolverError(f"{name} needs statistics of its model: pass fewstep.DPMSolverV3(statistics) instead of its name")
    return make_solver(name)


def check_statistics(solver: Solver, model: Model | Denoiser | FlowMap, guidance: float) -> None:
    """Refuse a solver whose statistics are those of another model."""
    statistics = getattr(solver, "statistics", None)
    if isinstance(statistics, ModelStatistics) and isinstance(model, Model) and statistics.model:
        statistics.check(model=model.fingerprint, guidance=guidance, schedule=model.schedule, shape=model.need_shape())


def best_sampler(model: Model, nfe: int | None = None, guidance: float = 1.0) -> Sampler:
    """Return the best sampler that a model carries for a number of evaluations: what it was tuned for, a fitted one, or an optimised grid.

    A flow map that can jump between any times does so on the default grid where it carries none.

    Args:
        nfe: by default what the model was tuned for, and the fewest jumps of a student.

    Raises:
        SolverError: it carries none (and what there is).
    """
    tuned = model.tuned
    if tuned is not None and tuned.own_steps and nfe not in (None, tuned.nfe):
        raise SolverError(
            f"{model.name} was taught its own {counted(tuned.nfe or 1, 'step')} alone, not {nfe}: leave nfe out, or sample its teacher, "
            f"{tuned.teacher}"
        )
    if tuned is not None and tuned.solver is not None and (guidance == 1 or tuned.guidance is None):
        count = tuned.nfe if nfe is None else nfe
        if count is not None and count in (model.num_jumps or (tuned.nfe,)):
            return _said(model, _on_own_grid(model, tuned.solver, count, guidance))
    fitted = {one.nfe: one for one in model.carried.samplers if one.card.get("guidance") == guidance}
    tables = [table for table in model.carried.grids if table.guidance in (guidance, None)]
    if nfe is None:
        known = sorted({*fitted, *(n for table in tables for n in table.grids)})
        nothing = _NOTHING if model.flow_map is None else "pass nfe=, the number of its jumps, as nfe=1"
        carries = f"it carries samplers for {', '.join(map(str, known))} evaluations: pass nfe=" if known else nothing
        raise SolverError(f"say how to sample {model.name}: {carries}")
    if nfe in fitted:
        return _said(model, model.fitted(nfe, guidance))
    rows = [(row["error"][0], table.solver) for table in tables for row in table.card.get("rows", ()) if row["nfe"] == nfe]
    if rows:
        return _said(model, _on_own_grid(model, min(rows)[1], nfe, guidance))
    if model.flow_map is not None and (anywhere := _jumps_anywhere(model, nfe)) is not None:
        return anywhere
    known = sorted({*fitted, *(n for table in tables for n in table.grids)})
    there = f"it carries some for {', '.join(map(str, known))}; " if known else ""
    mend = _NOTHING if model.flow_map is None else _KNOWN_TIMES
    raise SolverError(f"{model.name} carries no sampler for {counted(nfe, 'evaluation')} at guidance {guidance:g}: {there}{mend}")


_NOTHING = "name a solver, as in sample(model, 'unipc-2', nfe=8, seeds=range(4)), or make a sampler with fewstep.fit"
_KNOWN_TIMES = "name a grid of times that it knows, as in sample(model, 'ddim', grid=fewstep.TimeGrid(times), seeds=range(4))"


def _jumps_anywhere(model: Model, nfe: int) -> Sampler | None:
    """Return a flow map's sampler on the default grid, which it needs no times of its own for; None where it does not know those."""
    assert model.flow_map is not None
    sampler = Sampler.build("ddim", default_grid(model), model.schedule, nfe=nfe)
    try:
        model.flow_map.check(sampler.tableau.nodes.t)
    except SolverError:
        return None
    return sampler


def _on_own_grid(model: Model, solver: str, nfe: int, guidance: float) -> Sampler:
    grid = model.optimized(solver, nfe, guidance)
    return Sampler.build(solver_for(solver, model, guidance=guidance), grid, model.schedule, card={"name": solver, "grid": OPTIMIZED})


def _said(model: Model, sampler: Sampler) -> Sampler:
    log.info("%s is sampled by %s, which it carries", model.name, sampler)
    return sampler


def check_made_for(sampler: Sampler, model: Model, guidance: float, where: object = "this") -> None:
    """Refuse a sampler that was made for one model and guidance scale, with another; a hand-made one is for all.

    Raises:
        ArtifactError: it was made for another (and which).
    """
    made_for = (sampler.card.get("model"), sampler.card.get("guidance", guidance))
    if made_for[0] is None and made_for[1] == guidance:
        return
    if made_for != (model.fingerprint, guidance):
        raise ArtifactError(
            f"{where} is a sampler of {sampler.card.get('of')} ({made_for[0]}) at guidance {made_for[1]:g}, "
            f"not of {model.name} ({model.fingerprint}) at {guidance:g}"
        )


def solver_for(
    name: str,
    model: Model,
    *,
    guidance: float = 1.0,
    statistics: ModelStatistics | str | Path | None = None,
    any_statistics: bool = False,
) -> Solver:
    """Make a solver for a model: one that takes statistics gets those named with it, those given, or those that the model carries.

    Args:
        name: as for `make_solver`.
        statistics: of this model, or their folder.
        any_statistics: take them though they were made for something else.

    Raises:
        SolverError: as `make_solver`; there are no statistics of this model with this guidance.
        ArtifactError: the statistics are damaged or were made for another model, guidance, schedule or shape.
    """
    if not takes_statistics(name):
        return make_solver(name)
    named = parse_spec(name, SolverError)[1].get("statistics", statistics)
    found = (
        model.statistics(guidance) if named is None else named if isinstance(named, ModelStatistics) else ModelStatistics.load(str(named))
    )
    if found is None:
        raise SolverError(
            f"{name} needs statistics of {model.name} at guidance {guidance:g}: make them with "
            f"'fewstep calibrate {model.command_name(guidance)} --out DIR' and pass --statistics DIR"
        )
    if not any_statistics:
        found.check(model=model.fingerprint, guidance=guidance, schedule=model.schedule, shape=model.need_shape())
    return make_solver(name, statistics=found)


# -- into a folder ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate_to(
    folder: Path,
    problem: Problem,
    sampler: Sampler,
    seeds: Sequence[int],
    *,
    label: int | None = None,
    batch: int = 256,
    x0: Tensor | None = None,
    parallel: ParallelConfig | None = None,
    guided_by: GradientGuidance | None = None,
    guidance_form: GuidanceForm = "cfg",
    on_progress: Callable[[int], None] | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> tuple[Tensor, Path] | None:
    """Sample all seeds batch by batch into ``folder``, so that a killed run continues and processes share the work.

    Batches are the same whatever the number of processes, so are the pictures. Processes share the batches; in parallel, each round.
    From an image ``x0 [*D]`` each sample begins with it, noised to the sampler's first level; another image is another command.
    Of ``guidance_form`` see `sample`.

    Returns:
        The samples ``[len(seeds), *D]`` on the CPU and the folder of their batches, for the caller to remove once they are kept elsewhere;
        None in all processes but the first.

    Raises:
        ArtifactError: the folder holds samples of another command, finished or not, or cannot be written.
    """
    tableau = sampler.tableau
    facts: tuple[Any, ...] = (problem.fingerprint, tableau.fingerprint, problem.guidance, label, list(seeds), batch)
    denoiser, edit = problem.denoiser, None
    if guided_by is not None:
        facts = (*facts, guided_by.identity)
    if look_up(guidance_form, GUIDANCE_FORMS, "guidance_form"):
        denoiser, edit = cfg_plus_plus(problem.model, problem.guidance, sampler)
        facts = (*facts, guidance_form)
    if x0 is not None:  # the strength is in the tableau
        facts = (*facts, hashlib.sha256(x0.contiguous().numpy().tobytes()).hexdigest())
    spread, config = None, ParallelConfig()
    if parallel is not None:
        spread, config = spread_of(problem.model, problem.denoiser, problem.guidance, parallel), replace(parallel, devices=())
        facts = (*facts, config)  # the samples are those of any devices
    request = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def make(part: Sequence[int]) -> Tensor:
        x = problem.start(part, tableau.nodes, x0)
        if guided_by is not None:
            return guided_by.run(problem, tableau, x, part, label)
        cond = problem.cond(part, label)
        if spread is None:
            return run(denoiser, tableau, x, cond, seeds=part, edit=edit)
        return sample_in_parallel(spread, tableau, x, cond, seeds=part, config=config, observe=on_round)

    about = samples_record(request, problem.name, repr(sampler), seeds)
    return sampled_in_batches(folder, about, seeds, batch, make, together=spread is not None, on_progress=on_progress)
