"""``fewstep bench``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.apps.commands.bench_restoration import bench_tasks
from fewstep.apps.commands.bench_stochastic import bench_noise, needs_statistics
from fewstep.apps.console import console, next_command, print_json, progress
from fewstep.apps.models import guidance_of, made_for, open_model
from fewstep.apps.options import (
    ANY_STATISTICS,
    INTEGERS,
    NAMES,
    STATISTICS,
    AsJson,
    Fields,
    Flag,
    Guidance,
    ModelName,
    Trust,
    command,
    integers,
    words,
)
from fewstep.evaluate.benchmark.comparison import Comparison
from fewstep.evaluate.benchmark.plan import BenchmarkConfig, planned_entries
from fewstep.evaluate.benchmark.run import benchmark
from fewstep.evaluate.pictures import save_comparison
from fewstep.evaluate.report.write import check_packages, write_report
from fewstep.evaluate.rows import REFERENCE, picture_file, read_samples
from fewstep.models.model import Model
from fewstep.models.problem import Problem
from fewstep.runtime.errors import FewstepError, counted
from fewstep.runtime.process import default_device, process
from fewstep.sampling.reference import REFERENCE_NFE

__all__ = ["bench", "run_bench"]

SOLVERS = ("ddim", "dpm-solver-pp-2m", "unipc-2", "deis-3", "dpm-solver-v3")
GRIDS = ("logsnr", "karras", "angle")
NFE = (5, 6, 8, 10)

FLAGS = {
    "seed": Flag(help="Seed of the first noise; the next has the next seed."),
    "samplers": Flag("--sampler", help="Folders of saved samplers: of fewstep fit or optimize, for example."),
    "peers": Flag(help="Also: diffusers (its ODE solvers), module:function (a sampler of k-diffusion's signature)."),
    "features": Flag(help="In which samples and data are compared: digits, pixels, inception:PATH, module:function. Default: by the data."),
    "data": Flag(help="Images to compare with, or to restore: digits, an .npz, a folder of pictures. Default: the model's own, if known."),
    "statistics": Flag(help=STATISTICS),
    "any_statistics": Flag("--any-statistics", help=ANY_STATISTICS),
}


def bench(
    model: ModelName,
    *,
    out: Annotated[Path, typer.Option(help="Folder for results.json and the pictures.")],
    task: Annotated[
        str | None,
        typer.Option(metavar=NAMES, help="Compare ways to restore pictures instead: upscale, inpaint, deblur, denoise, colorize, clip."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar=NAMES, help="Of a task: moments, projection, proximal, pigdm, dps, constrained. Default: moments,projection."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Of a task: samples of each of the first pictures. Default: 19.")] = None,
    several: Annotated[int | None, typer.Option(help="Of a task: how many pictures have several samples. Default: 32.")] = None,
    stochastic: Annotated[
        bool,
        typer.Option(
            "--stochastic",
            help="Compare solvers that add noise with those that do not, by distance to the data. Default: nine, karras,angle, 5,10,20.",
        ),
    ] = False,
    paths: Annotated[int | None, typer.Option(help="With --stochastic: noise paths from each start. Default: 4.")] = None,
    solver: Annotated[
        str | None,
        typer.Option(metavar=NAMES, help="Solvers; fitted: the model's own. Default: five; of a task ddim."),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar=NAMES,
            help="Grids; optimized: the model's own. Default: logsnr,karras,angle; of a task one.",
        ),
    ] = None,
    nfe: Annotated[
        str | None,
        typer.Option(metavar=INTEGERS, help="Network evaluations. Default: 5,6,8,10; with --stochastic 5,10,20; of a task 10,20."),
    ] = None,
    num: Annotated[
        int | None, typer.Option("--num", "-n", help="How many noises, or pictures. Under torchrun say -n. Default: 512; of a task 256.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Noises at a time. Default: 256; of a task 64.")] = None,
    guidance: Guidance = None,
    rest: Annotated[partial[BenchmarkConfig], Fields(FLAGS, ("solvers", "grids", "nfe", "num", "batch", "guidance"))],
    report: Annotated[bool, typer.Option("--report", help="Also write report.html: the rows as plots, tables and pictures.")] = False,
    trust: Trust = False,
    json: AsJson = False,
) -> None:
    """Compare samplers on the same noises, with --task ways to restore the same pictures, with --stochastic samplers that add noise.

    Shown are the error to a tight trajectory, the Frechet distance to data, and the time; of a task the error to the true picture, its
    sharpness, and how honest the samples are; of samplers that add noise, which follow no trajectory, the distance to data alone, over
    several noise paths. Rows that are there already are not run again; the processes of torchrun share the others.
    """
    if report:
        check_packages()
    counts = None if nfe is None else integers(nfe, "--nfe")
    if stochastic and task is not None:
        raise FewstepError("--stochastic and --task are two benchmarks: say one of them")
    if paths is not None and not stochastic:
        raise FewstepError("--paths is for comparing samplers that add noise: say --stochastic too")
    if task is not None:
        given = {"--peers": "peers", "--statistics": "statistics", "--any-statistics": "any_statistics", "--sampler": "samplers"}
        alien = [flag for flag, name in given.items() if rest.keywords[name]] + (["--guidance"] if guidance is not None else [])
        _refuse(alien, "comparing samplers", f"leave {' and '.join(alien)} out with --task")
        spacings = words(grid)
        if spacings is not None and len(spacings) != 1:
            raise FewstepError(f"with --task all rows are on one grid, got --grid {grid}: run it again for another one")
        fields = {"tasks": words(task), "methods": words(method), "solvers": words(solver), "nfe": counts}
        fields |= {"grid": None if spacings is None else spacings[0], "num": num, "batch": batch, "samples": samples, "several": several}
        fields |= {name: rest.keywords[name] for name in ("seed", "data", "features")}
        bench_tasks(model, fields, out, command(), report=report, trust=trust, json=json)
        return
    own = {"--method": method, "--samples": samples, "--several": several}
    _refuse([flag for flag, value in own.items() if value is not None], "restoring pictures", "say --task too, as --task upscale,inpaint")
    if stochastic:
        fields = {"solvers": words(solver), "grids": words(grid), "nfe": counts, "num": num, "batch": batch, "paths": paths}
        bench_noise(model, rest, fields, out, command(), guidance=guidance, report=report, trust=trust, json=json)
        return
    rest = partial(rest, **{name: value for name, value in {"num": num, "batch": batch}.items() if value is not None})
    opened = open_model(model, trust=trust)
    alone = bool(rest.keywords["samplers"]) and solver is None and grid is None and not rest.keywords["peers"]
    typed = words(solver), words(grid), counts
    default = ((), (), ()) if alone else made_for(opened) or (SOLVERS, GRIDS, NFE)
    solvers, grids, counts = (other if one is None else one for one, other in zip(typed, default, strict=True))
    config = rest(solvers=solvers, grids=grids, nfe=counts, guidance=guidance_of(opened, guidance))
    needs_statistics(config)
    compared = run_bench(opened, config, out, command(), report=report)
    if process()[0]:
        return
    if json:
        print_json(compared.results)
        return
    console.print(str(compared))
    console.print(f"rows: {out / 'results.json'}")
    if (out / "pictures.png").exists():
        console.print(f"pictures: {out / 'pictures.png'}")
    console.print(f"report: {out / 'report.html'}" if report else next_command("report", out, "--out", out))


def _refuse(flags: Sequence[str], purpose: str, instead: str) -> None:
    """Refuse options of the other benchmark.

    Raises:
        FewstepError: there are some.
    """
    if flags:
        raise FewstepError(f"{' and '.join(flags)} {'is' if len(flags) == 1 else 'are'} for {purpose}: {instead}")


def run_bench(model: Model, config: BenchmarkConfig, out: Path, typed: str, *, report: bool = False) -> Comparison:
    """Benchmark a model, draw all samplers of our own on the same seeds, and write the report if it is wanted."""
    planned = planned_entries(Problem(model, config.guidance, default_device()), config)
    cost = config.num * (REFERENCE_NFE + sum(entry.nfe for entry in planned))
    title = f"{model.name}: {len(planned)} rows, {config.num} noises, at most {cost:,} network evaluations"
    with progress(title, len(planned)) as on_progress:
        compared = benchmark(model, config, out, command=typed, on_progress=on_progress)
    if process()[0]:
        return compared
    _draw(compared.results, out)
    if report:
        write_report([out], out)
    return compared


def _draw(results: Mapping[str, Any], out: Path) -> None:
    """Draw our own samplers, rows grouped by grid, below the ends of exact trajectories; if the samples are pictures."""
    rows = [row for row in results["rows"] if row["library"] == "fewstep" and row.get("failed") is None]
    exact, columns = read_samples(out / REFERENCE), sorted({row["nfe"] for row in rows})
    if not rows or exact.ndim != 4:
        return
    cells = {("exact trajectory", counted(nfe, "evaluation")): (exact, "") for nfe in columns}
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    for row in sorted(rows, key=lambda row: (grids.index(row["grid"]), row["nfe"])):
        stored = picture_file(out, ("fewstep", row["solver"], row["grid"], row["nfe"]))
        cells[f"{row['solver']}, {row['grid']}", counted(row["nfe"], "evaluation")] = (read_samples(stored), f"rmse {row['rmse']:.3f}")
    save_comparison(cells, out / "pictures.png", title=f"{results['model']}: the same seeds by every sampler")
