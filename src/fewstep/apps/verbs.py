"""What the longer verbs do between parsing and printing."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch

from fewstep.apps.console import progress
from fewstep.core.artifact import write_whole
from fewstep.core.errors import FewstepError
from fewstep.core.grid import TimeGrid, make_grid
from fewstep.core.process import default_device, process
from fewstep.core.sampler import Sampler
from fewstep.core.schedule import DiscreteVP
from fewstep.evaluate.benchmark import REFERENCE_NFE, BenchmarkConfig, benchmark, picture_file, read_samples
from fewstep.evaluate.generation import check_seeds, generate_to, solver_for
from fewstep.evaluate.peers import PEERS
from fewstep.evaluate.pictures import save_comparison, save_grid, save_singles, save_statistics, to_uint8
from fewstep.learn.calibrate import CalibrationConfig, calibrate
from fewstep.models.data import load_images
from fewstep.models.loaders import Model
from fewstep.models.zoo import load_model
from fewstep.solvers import takes_statistics

__all__ = ["SampleRequest", "run_bench", "run_calibrate", "run_demo", "run_sample"]

DEMO = BenchmarkConfig(
    solvers=("ddim", "heun", "dpm-solver-pp-2m", "dpm-solver-pp-3m", "unipc-2", "deis-3", "ipndm", "dpm-solver-v3"),
    grids=("karras", "angle"),
    nfe=(5, 6, 8, 10),
)


@dataclass(frozen=True)
class SampleRequest:
    """The options of ``fewstep sample``."""

    model: str
    out: Path
    solver: str
    grid: str
    nfe: int
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
        if sum(option is not None for option in (self.sampler, self.times, self.sigmas)) > 1:
            raise FewstepError("give one of --sampler, --times and --sigmas")
        if self.sampler is not None:
            return Sampler.load(self.sampler)
        schedule = model.denoiser.schedule
        if self.statistics is not None and not takes_statistics(self.solver):
            raise FewstepError(f"{self.solver} takes no statistics: say --solver dpm-solver-v3, or leave --statistics out")
        solver = solver_for(self.solver, model, guidance=self.guidance, statistics=self.statistics, any_statistics=self.any_statistics)
        if self.times is not None:
            grid = TimeGrid(torch.tensor(_numbers(self.times, "--times"), dtype=torch.float64))
        elif self.sigmas is not None:
            grid = TimeGrid.from_sigmas(schedule, _numbers(self.sigmas, "--sigmas"))
        else:
            return Sampler.build(solver, make_grid(self.grid, schedule, solver.steps_for(self.nfe)), schedule)
        return Sampler.build(solver, grid.snap(schedule.times) if isinstance(schedule, DiscreteVP) else grid, schedule)


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


def run_bench(model_name: str, config: BenchmarkConfig, out: Path, command: str) -> dict[str, Any]:
    """Benchmark, then a picture of all samplers of our own on the same seeds."""
    model = load_model(model_name)
    count = len(config.nfe) * len(config.grids) * (len(config.solvers) + len(PEERS) * len(config.peers))
    cost = config.num * (REFERENCE_NFE + sum(config.nfe) * count / len(config.nfe)) / 1e6
    with progress(f"{model.name}: {count} rows, {config.num} noises, at most {cost:.1f} M network evaluations", count) as report:
        results = benchmark(model, config, out, command=command, observe=report)
    _comparison(results, out)
    return results


def _comparison(results: dict[str, Any], out: Path) -> None:
    """The picture of a benchmark: our own samplers, rows grouped by grid, below the ends of the exact trajectories."""
    rows = [row for row in results["rows"] if row["library"] == "fewstep"]
    if not rows:
        return
    exact, columns = read_samples(out / "reference.safetensors"), sorted({row["nfe"] for row in rows})
    cells = {("exact trajectory", f"{nfe} evaluations"): (exact, "") for nfe in columns}
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    for row in sorted(rows, key=lambda row: (grids.index(row["grid"]), row["nfe"])):
        kept = picture_file(out, ("fewstep", row["solver"], row["grid"], row["nfe"]))
        cells[f"{row['solver']}, {row['grid']}", f"{row['nfe']} evaluations"] = (read_samples(kept), f"rmse {row['rmse']:.3f}")
    save_comparison(cells, out / "pictures.png", title=f"{results['model']}: the same seeds by every sampler")


def run_calibrate(
    model_name: str, config: CalibrationConfig, out: Path, data: str | None, guidance: float, unguided: bool, command: str
) -> dict[str, Any] | None:
    """Calibrate, save the statistics and their plot; None in all processes but the first."""
    model, images = load_model(model_name), load_images(data) if data else None
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


def run_demo(out: Path, num: int, command: str) -> dict[str, Any]:
    """The benchmark that the README shows, on the bundled class-conditional model."""
    return run_bench("digits-edm", replace(DEMO, num=num), out, command)
