"""What the longer verbs do between parsing and printing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch

from fewstep.apps.console import progress
from fewstep.apps.plots import save_schedules, save_statistics
from fewstep.core.grid import TimeGrid, make_grid
from fewstep.core.schedule import DiscreteVP
from fewstep.data.images import load_images
from fewstep.evaluate.benchmark.plan import OPTIMIZED, BenchmarkConfig, check_made_for, planned_keys, saved_samplers
from fewstep.evaluate.benchmark.run import benchmark, picture_file, read_samples
from fewstep.evaluate.metrics.features import load_digits_features
from fewstep.evaluate.pictures import save_comparison, save_grid, save_singles, to_uint8
from fewstep.evaluate.report.write import check_packages, write_report
from fewstep.integrations.diffusers.pipelines import from_pipeline, is_pipeline, load_pipeline
from fewstep.learn.networks.distill import DistillConfig, distill
from fewstep.learn.networks.finetune import FinetuneConfig, finetune
from fewstep.learn.samplers.calibrate import CalibrationConfig, calibrate
from fewstep.learn.samplers.fit import FitConfig, fit
from fewstep.learn.samplers.optimize import OptimizeConfig, Optimized, optimize, solver_folder
from fewstep.learn.search.bound import Bound
from fewstep.learn.teacher.gram import Gram
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, generate_trajectories
from fewstep.models.formats.folders import FITTED, Model
from fewstep.models.generate import check_seeds, generate_to, solver_for
from fewstep.models.networks.operator import OperatorStudent
from fewstep.models.zoo import load_model
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import FewstepError, GridError, ModelError
from fewstep.runtime.process import default_device, process
from fewstep.sampling.reference import REFERENCE_NFE
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import takes_statistics

__all__ = [
    "BenchRequest",
    "SampleRequest",
    "run_bench",
    "run_calibrate",
    "run_demo",
    "run_distill",
    "run_finetune",
    "run_fit",
    "run_optimize",
    "run_sample",
    "run_trajectories",
]

BENCH = (("ddim", "dpm-solver-pp-2m", "unipc-2", "deis-3", "dpm-solver-v3"), ("logsnr", "karras", "angle"), (5, 6, 8, 10))
DEMO = ("ddim", "heun", "dpm-solver-pp-2m", "dpm-solver-pp-3m", "unipc-2", "deis-3", "ipndm", "dpm-solver-v3")
SHOWN = ("chosen", "best_standard_grid", "error", "rmse")
GAINED = ("chosen", "best_hand_made", "error", "rmse", "noises", "held_out_noises", "network_evaluations")
DEMO_OPTIMIZED = ("ddim", "dpm-solver-pp-2m", "unipc-2", "dpm-solver-v3")


@dataclass(frozen=True)
class SampleRequest:
    """The options of ``fewstep sample``."""

    model: str
    out: Path
    solver: str | None
    grid: str | None
    nfe: int | None
    num: int
    seed: int
    guidance: float
    label: int | None
    batch: int
    sampler: Path | None
    times: str | None
    sigmas: str | None
    singles: bool
    npz: bool
    statistics: Path | None
    any_statistics: bool

    def build(self, model: Model) -> Sampler:
        """The sampler asked for: from a folder, or a solver on explicit times, on explicit noise levels, or on a named grid."""
        if model.is_operator:
            model.guided(self.guidance)  # says that it cannot be
        if sum(option is not None for option in (self.sampler, self.times, self.sigmas)) > 1:
            raise FewstepError("give one of --sampler, --times and --sigmas")
        if self.sampler is not None:
            sampler = Sampler.load(self.sampler)
            check_made_for(sampler, self.sampler, model, self.guidance)
            return sampler
        schedule = model.denoiser.schedule
        name, grid_name, nfe = _defaults(model)
        name, grid_name, nfe = self.solver or name, self.grid or grid_name, nfe if self.nfe is None else self.nfe
        if name == FITTED:
            if self.times is not None or self.sigmas is not None or self.grid not in (None, OPTIMIZED) or self.statistics is not None:
                raise FewstepError(
                    "a fitted sampler has noise levels and coefficients of its own: leave --grid, --times, --sigmas and --statistics out"
                )
            return model.fitted(nfe, self.guidance)
        if self.statistics is not None and not takes_statistics(name):
            raise FewstepError(f"{name} takes no statistics: say --solver dpm-solver-v3, or leave --statistics out")
        solver = solver_for(name, model, guidance=self.guidance, statistics=self.statistics, any_statistics=self.any_statistics)
        if self.times is not None:
            grid = TimeGrid(torch.tensor(_numbers(self.times, "--times"), dtype=torch.float64))
        elif self.sigmas is not None:
            grid = TimeGrid.from_sigmas(schedule, _numbers(self.sigmas, "--sigmas"))
        elif grid_name == OPTIMIZED:
            return Sampler.build(solver, model.optimized(name, nfe, self.guidance), schedule)
        else:
            return Sampler.build(solver, make_grid(grid_name, schedule, solver.steps_on(schedule, nfe)), schedule)
        return Sampler.build(solver, grid.snap(schedule.times) if isinstance(schedule, DiscreteVP) else grid, schedule)


def _defaults(model: Model) -> tuple[str, str, int]:
    """Solver, grid and evaluations if nothing is said: what the model was tuned for, if it was."""
    return ("unipc-2", "angle", 8) if model.tuned is None else (model.tuned.solver, OPTIMIZED, model.tuned.nfe)


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise FewstepError(f"{option} wants numbers separated by commas, got {text!r}") from None


def run_sample(request: SampleRequest) -> dict[str, Any] | None:
    """Sample and write the pictures; None in all processes but the first."""
    if request.num < 1 or request.batch < 1:
        raise FewstepError(f"num and batch must be at least 1, got {request.num} and {request.batch}")
    check_seeds(request.seed, request.num)
    model = load_model(request.model)
    sampler = request.build(model)
    seeds = list(range(request.seed, request.seed + request.num))
    with progress(f"sampling {request.num} x {sampler.nfe} evaluations", request.num) as report:
        made = generate_to(
            request.out, model, sampler, seeds, guidance=request.guidance, label=request.label, batch=request.batch, observe=report
        )
    if made is None:
        return None
    images, parts = made
    done: dict[str, Any] = {"num": request.num, "nfe": sampler.nfe, "grid": str(save_grid(images, request.out / "grid.png"))}
    if request.singles:
        done["singles"] = str(save_singles(images, request.out / "singles", seeds))
    if request.npz:
        arrays: dict[str, Any] = {"x": images.numpy(), "images": to_uint8(images), "seeds": np.array(seeds)}
        labels = model.labels(seeds, request.label)
        if labels is not None:
            arrays["labels"] = labels.numpy()
        write_whole(request.out / "samples.npz", lambda temporary: np.savez(temporary, **arrays))
        done["npz"] = str(request.out / "samples.npz")
    rmtree(parts)
    return done


@dataclass(frozen=True)
class BenchRequest:
    """The options of ``fewstep bench``; None where nothing was said."""

    model: str
    solvers: tuple[str, ...] | None
    grids: tuple[str, ...] | None
    nfe: tuple[int, ...] | None
    samplers: tuple[str, ...] = ()
    num: int = 512
    seed: int = 0
    guidance: float = 1.0
    peers: tuple[str, ...] = ()
    batch: int = 256
    statistics: Path | None = None
    any_statistics: bool = False
    features: str | None = None
    data: str | None = None
    report: bool = False

    def build(self, model: Model) -> BenchmarkConfig:
        """What to compare: saved samplers alone if only they are named; a tuned model is tried with what it was tuned for."""
        solvers, grids, nfe = BENCH
        if model.tuned is not None:
            solvers, grids, nfe = (model.tuned.solver,), (OPTIMIZED,), model.passes or (model.tuned.nfe,)
        if self.samplers and self.solvers is None and self.grids is None and not self.peers:
            solvers, grids, nfe = (), (), ()
        solvers = solvers if self.solvers is None else self.solvers
        grids = grids if self.grids is None else self.grids
        nfe = nfe if self.nfe is None else self.nfe
        rest = (self.num, self.seed, self.guidance, self.peers, self.batch, self.statistics, self.any_statistics)
        return BenchmarkConfig(solvers, grids, nfe, *rest, tuple(map(Path, self.samplers)), self.features, self.data)


def run_bench(request: BenchRequest, out: Path, command: str) -> dict[str, Any]:
    """Benchmark, then a picture of all samplers of our own on the same seeds, and the report if it was asked for."""
    if request.report:
        check_packages()
    model = load_model(request.model)
    config = request.build(model)
    planned = {*planned_keys(config), *saved_samplers(model, config)}
    cost = config.num * (REFERENCE_NFE + sum(key[-1] for key in planned)) / 1e6
    title = f"{model.name}: {len(planned)} rows, {config.num} noises, at most {cost:.1f} M network evaluations"
    with progress(title, len(planned)) as report:
        results = benchmark(model, config, out, command=command, observe=report)
    _comparison(results, out)
    if request.report:
        write_report([out], out)
    return results


def _comparison(results: dict[str, Any], out: Path) -> None:
    """The picture of a benchmark: our own samplers, rows grouped by grid, below the ends of exact trajectories; if they are pictures."""
    rows = [row for row in results["rows"] if row["library"] == "fewstep" and row.get("failed") is None]
    exact, columns = read_samples(out / "reference.safetensors"), sorted({row["nfe"] for row in rows})
    if not rows or exact.ndim != 4:
        return
    cells = {("exact trajectory", f"{nfe} evaluations"): (exact, "") for nfe in columns}
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    for row in sorted(rows, key=lambda row: (grids.index(row["grid"]), row["nfe"])):
        kept = picture_file(out, ("fewstep", row["solver"], row["grid"], row["nfe"]))
        cells[f"{row['solver']}, {row['grid']}", f"{row['nfe']} evaluations"] = (read_samples(kept), f"rmse {row['rmse']:.3f}")
    save_comparison(cells, out / "pictures.png", title=f"{results['model']}: the same seeds by every sampler")


def open_model(name: str, prompts: Path | None = None) -> Model:
    """A model by name, folder or checkpoint; the network of a whole pipeline's folder, conditioned on prompts.

    Raises:
        ModelError: no such model, prompts missing or not wanted, or a pipeline that is not known.
    """
    if not is_pipeline(name):
        if prompts is not None:
            raise ModelError(f"{name} is not a pipeline that takes prompts: leave --prompts out, or name the folder of one")
        return load_model(name)
    return from_pipeline(load_pipeline(name), prompts)


def run_calibrate(
    model: Model, config: CalibrationConfig, out: Path, data: str | None, guidance: float, unguided: bool, command: str
) -> dict[str, Any] | None:
    """Calibrate, save the statistics and their plot; None in all processes but the first."""
    images = load_images(data) if data else None
    total = len(config.batches[process()[0] :: process()[1]]) * config.batch * (config.levels + 1)
    title = f"calibrating {model.name}: {config.num} data x {config.levels + 1} levels"
    begin = time.perf_counter()
    with progress(title, total) as report:
        statistics = calibrate(
            model,
            config,
            out,
            images=images,
            guidance=guidance,
            unguided=unguided,
            device=default_device(),
            command=command,
            observe=report,
        )
    if statistics is None:
        return None
    plot = str(save_statistics(statistics, out / "statistics.png")) if find_spec("matplotlib") else "none: pip install 'fewstep[report]'"
    return {"statistics": str(out), "plot": plot, "seconds": time.perf_counter() - begin, **statistics.card}


def run_optimize(
    model: Model,
    names: tuple[str, ...],
    nfe: tuple[int, ...],
    config: OptimizeConfig,
    out: Path,
    guidance: float,
    statistics: Path | None,
    command: str,
) -> dict[str, Any]:
    """Optimise the schedules of each solver and draw them."""
    solvers = {name: solver_for(name, model, guidance=guidance, statistics=statistics) for name in names}
    if not solvers:
        raise FewstepError("optimize needs at least one solver")
    with progress(f"optimizing {len(names) * len(set(nfe))} schedules of {model.name}", len(names) * len(set(nfe))) as report:
        gram, made = optimize(model, solvers, nfe, config, out, guidance=guidance, device=default_device(), command=command, observe=report)
    rows, plots = [], "none: pip install 'fewstep[report]'"
    for name, found in made.items():
        rows += [{key: found[n].sampler.card[key] for key in SHOWN} | {"solver": name, "nfe": n} for n in found]
        if find_spec("matplotlib"):
            plots = str(_schedule_plot(model, name, gram, found, solver_folder(out, name)))
    folders = [str(solver_folder(out, name)) for name in made]
    return {"model": model.name, "samplers": str(out), "folders": folders, "plots": plots, "rows": rows}


def _schedule_plot(model: Model, name: str, gram: Gram, found: Mapping[int, Optimized], folder: Path) -> Path:
    schedule = model.denoiser.schedule
    schedules, candidates = {}, {}
    for nfe, one in found.items():
        grids = {"optimized": one.sampler.grid}
        for standard in ("angle", "karras", "logsnr"):
            with suppress(GridError):
                grids[standard] = make_grid(standard, schedule, one.sampler.grid.steps)
        schedules[nfe] = {key: torch.exp(-schedule.lam(grid.t)).tolist() for key, grid in grids.items()}
        candidates[nfe] = [(bound, error) for error, bound in one.candidates.values() if bound is not None]
    stride = max(1, gram.cells // 32)  # a short step, but one that is longer than the network is rough
    short = Bound(gram).first_order.diagonal(stride)
    return save_schedules(folder / "schedules.png", f"{name} on {model.name}", schedules, (gram.level[:-stride], short), candidates)


def run_finetune(model_name: str, config: FinetuneConfig, out: Path, data: str | None, command: str) -> dict[str, Any]:
    """Tune a model and draw some of its samples beside its teacher's."""
    model, images = load_model(model_name), load_images(data) if data else None
    with progress(f"tuning {model.name} for {config.nfe} evaluations", config.rounds * config.steps) as report:
        history = finetune(model, config, out, images=images, device=default_device(), command=command, observe=report)
        report(config.rounds * config.steps, "")
    return {"model": model.name, "nfe": config.nfe, "folder": str(out), "history": [asdict(made) for made in history]}


def run_fit(
    model: Model, nfe: tuple[int, ...], config: FitConfig, out: Path, guidance: float, stored: Path | None, command: str
) -> dict[str, Any] | None:
    """Fit samplers; None in all processes but the first."""
    counts, begin = sorted(set(nfe)), time.perf_counter()
    title = f"fitting {len(counts)} samplers of {model.name}, about {config.evaluations(counts) / 1e6:.2f} M network evaluations"
    given = None if stored is None else Trajectories.load(stored)
    with progress(title, len(counts)) as report:
        where = {"guidance": guidance, "trajectories": given, "device": default_device()}
        made = fit(model, counts, config, out, **where, command=command, observe=report)
    if process()[0]:
        return None
    rows = [{"nfe": n} | {key: made[n].sampler.card[key] for key in GAINED} for n in counts]
    return {"model": model.name, "samplers": str(out), "seconds": time.perf_counter() - begin, "rows": rows}


def run_trajectories(model_name: str, grid: str, slots: int, config: TrajectoryConfig, out: Path, command: str) -> dict[str, Any] | None:
    """Make trajectories; None in all processes but the first."""
    model = load_model(model_name)
    kept = model.slot_grid(grid, slots, config.guidance)
    with progress(f"solving {config.num} trajectories of {model.name}", config.num) as report:
        made = generate_trajectories(model, kept, config, out, device=default_device(), command=command, observe=report)
    if made is None:
        return None
    size = sum(path.stat().st_size for path in out.glob("shard-*.safetensors"))
    return {"model": model.name, "trajectories": str(out), "num": len(made), "times": made.t.tolist(), "bytes": size, **made.card}


def run_distill(
    model_name: str, config: DistillConfig, out: Path, stored: Path | None, begin: str | None, command: str
) -> dict[str, Any] | None:
    """Distil a student; None in all processes but the first."""
    model, features = load_model(model_name), load_digits_features().smooth if config.loss == "features" else None
    if features is not None and model.shape != (1, 8, 8):
        raise FewstepError(f"the bundled features are of 8x8 digits, {model.name} makes {model.shape}: use another loss")
    given = None if stored is None else Trajectories.load(stored)
    with progress(f"distilling {model.name}", config.steps) as report:
        made = distill(
            *(model, config, out),
            trajectories=given,
            begin=None if begin is None else load_model(begin),
            features=features,
            device=default_device(),
            command=command,
            observe=report,
        )
    if made is None:
        return None
    shown = Trajectories.load(out / "work" / "trajectories") if given is None else given
    picture = _slots_picture(load_model(out), shown, range(config.num, config.num + min(6, config.held_out)), out / "slots.png")
    return {"model": model.name, "student": str(out), "picture": str(picture), **asdict(made)}


@torch.no_grad()
def _slots_picture(student: Model, stored: Trajectories, index: range, path: Path) -> Path:
    """What one pass answers in each slot, below the teacher's trajectory, each state scaled to unit size."""
    operator, schedule = student.denoiser.network, student.denoiser.schedule
    assert isinstance(operator, OperatorStudent)  # just made
    t = operator.times
    places = [int((stored.t - wanted).abs().argmin()) for wanted in t]
    x, labels = stored.states(index, at=places).to(default_device()), stored.labels(index)
    ours = operator(x[:, 0], t[1:], None if labels is None else labels.to(x.device))
    cells = {}
    for name, states in (("teacher", x), ("one pass", torch.cat([x[:, :1], ours], 1))):
        for k, now in enumerate(t):
            size = torch.sqrt(schedule.alpha(now) ** 2 + schedule.sigma(now) ** 2)
            level = float(torch.exp(-schedule.lam(now)))
            error = float((states[:, k] - x[:, k]).double().square().mean().sqrt() / size)
            cells[name, f"noise level {level:.3g}"] = ((states[:, k] / size).cpu(), f"rmse {error:.3f}" if name != "teacher" else "")
    return save_comparison(cells, path, title=f"{student.name}: all slots of one pass, on noises that were not trained on")


def run_demo(out: Path, num: int, command: str) -> dict[str, Any]:
    """The benchmark that the README shows, on the bundled class-conditional model."""
    nfe = (5, 6, 8, 10)
    run_bench(BenchRequest("digits-edm", DEMO, ("karras", "angle"), nfe, num=num), out, command)
    shown = all(map(find_spec, ("jinja2", "matplotlib")))
    return run_bench(BenchRequest("digits-edm", (*DEMO_OPTIMIZED, FITTED), (OPTIMIZED,), nfe, num=num, report=shown), out, command)
