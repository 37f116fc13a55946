"""The command line: each verb parses, calls, and says where the result is and what to type next."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.apps.console import bench_table, console, print_json, progress
from fewstep.core.errors import FewstepError
from fewstep.learn.calibrate import CalibrationConfig

DEFAULT = CalibrationConfig()
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ModelName = Annotated[str, typer.Argument(help="A bundled model (see 'fewstep models') or a folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
StatisticsFolder = Annotated[Path | None, typer.Option("--statistics", help="For dpm-solver-v3: a folder of fewstep calibrate.")]
AnyStatistics = Annotated[bool, typer.Option("--any-statistics", help="Use the statistics though they are of another model or guidance.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")]


@app.callback()
def root() -> None:
    """Sample any diffusion or flow model in a few steps."""


@app.command()
def models(json: AsJson = False) -> None:
    """List the bundled models, the solvers and the grids."""
    from fewstep.core.grid import GRIDS
    from fewstep.models.zoo import BUNDLED
    from fewstep.solvers import SOLVERS

    known = {"models": {name: about for name, (about, _) in BUNDLED.items()}, "solvers": list(SOLVERS), "grids": list(GRIDS)}
    if json:
        print_json(known)
        return
    for name, about in known["models"].items():
        console.print(f"{name:12} {about}")
    console.print(f"\nsolvers      {', '.join(known['solvers'])}\ngrids        {', '.join(known['grids'])}")
    console.print("\nnext: fewstep sample digits-edm --nfe 6 --out runs/sample")


@app.command()
def sample(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    solver: str = "unipc-2",
    grid: str = "angle",
    nfe: Annotated[int, typer.Option(help="Network evaluations per sample.")] = 8,
    num: Annotated[int, typer.Option("--num", "-n", help="How many samples (under torchrun say -n: it takes --num for its own).")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the first sample; the next has the next seed.")] = 0,
    guidance: Guidance = 1.0,
    label: Annotated[int | None, typer.Option(help="Class of all samples; by default the seed modulo the classes.")] = None,
    batch: int = 256,
    sampler: Annotated[Path | None, typer.Option(help="A sampler folder to use instead of --solver, --grid and --nfe.")] = None,
    times: Annotated[str | None, typer.Option(help="Explicit times, decreasing, instead of --grid and --nfe: 80,10,1,0.002.")] = None,
    sigmas: Annotated[str | None, typer.Option(help="The same as noise levels sigma/alpha; a last 0 is the clean image.")] = None,
    singles: Annotated[bool, typer.Option("--singles", help="Also write one PNG per sample.")] = False,
    npz: Annotated[bool, typer.Option("--npz", help="Also write samples.npz (float32, and uint8 pictures).")] = False,
    statistics: StatisticsFolder = None,
    any_statistics: AnyStatistics = False,
    json: AsJson = False,
) -> None:
    """Sample a model; continues where a killed run stopped, and shares the seeds out under torchrun."""
    from fewstep.apps.verbs import SampleRequest, run_sample

    which = (solver, grid, nfe, num, seed, guidance, label, batch, sampler, times, sigmas)
    request = SampleRequest(model, out, *which, singles, npz, statistics, any_statistics)
    done = run_sample(request)
    if done is not None:
        print_json(done) if json else console.print(f"pictures: {done['grid']}\nnext: fewstep bench {model} --out runs/bench")


@app.command()
def bench(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for results.json and the pictures.")],
    solver: Annotated[str, typer.Option(help="Solvers, separated by commas.")] = "ddim,dpm-solver-pp-2m,unipc-2,deis-3,dpm-solver-v3",
    grid: Annotated[str, typer.Option(help="Grids, separated by commas.")] = "logsnr,karras,angle",
    nfe: Annotated[str, typer.Option(help="Network evaluations, separated by commas.")] = "5,6,8,10",
    num: Annotated[int, typer.Option(help="How many noises.")] = 1024,
    seed: int = 0,
    guidance: Guidance = 1.0,
    peers: Annotated[str, typer.Option(help="Also the samplers of: diffusers.")] = "",
    batch: int = 256,
    statistics: StatisticsFolder = None,
    any_statistics: AnyStatistics = False,
    json: AsJson = False,
) -> None:
    """Compare solvers on the same noises: error to a tight trajectory, Frechet distance, time."""
    from fewstep.apps.verbs import run_bench
    from fewstep.evaluate.benchmark import BenchmarkConfig

    names = [tuple(part.strip() for part in text.split(",") if part.strip()) for text in (solver, grid, peers)]
    which = (names[0], names[1], integers(nfe, "--nfe"), num, seed, guidance, names[2], batch)
    config = BenchmarkConfig(*which, statistics=statistics, any_statistics=any_statistics)
    results = run_bench(model, config, out, command())
    print_json(results) if json else bench_table(results)
    if not json:
        console.print(f"rows: {out / 'results.json'}\npictures: {out / 'pictures.png'}")


@app.command()
def calibrate(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the statistics.")],
    levels: Annotated[int, typer.Option(help="Cells of the grid of noise levels.")] = DEFAULT.levels,
    num: Annotated[int, typer.Option("--num", "-n", help="How many data (under torchrun say -n).")] = DEFAULT.num,
    pool: Annotated[
        str, typer.Option(help="Elements that share l and s / b: element, channel, scalar, scalar/element, ...")
    ] = DEFAULT.pool,
    data: Annotated[str | None, typer.Option(help="digits, an .npz or a folder of images; else the model's own trajectories.")] = None,
    guidance: Guidance = 1.0,
    unguided: Annotated[bool, typer.Option("--unguided", help="Measure the network without guidance, on guided trajectories.")] = False,
    batch: int = DEFAULT.batch,
    seed: int = DEFAULT.seed,
    jvp: Annotated[str, typer.Option(help="How to differentiate: auto, forward, reverse, difference.")] = DEFAULT.jvp,
    json: AsJson = False,
) -> None:
    """Estimate the statistics that dpm-solver-v3 needs; continues where a killed run stopped, and shares the work under torchrun."""
    from fewstep.apps.verbs import run_calibrate

    config = CalibrationConfig(levels, num, pool, batch, seed, jvp=jvp)
    done = run_calibrate(model, config, out, data, guidance, unguided, command())
    if done is not None:
        scale = "" if guidance == 1 else f" --guidance {guidance:g}"
        text = f"statistics: {out}\nplot: {done['plot']}\nnext: fewstep bench {model}{scale} --statistics {out} --out runs/bench"
        print_json(done) if json else console.print(text)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"), num: int = 512, json: AsJson = False
) -> None:
    """The main job: a trained model sampled by the field's solvers at 5 to 10 evaluations, as a table and in pictures."""
    from fewstep.apps.verbs import run_demo

    results = run_demo(out, num, command())
    if json:
        print_json(results)
        return
    bench_table(results)
    console.print(f"rows: {out / 'results.json'}\npictures, rows solvers, columns evaluations, same seeds: {out / 'pictures.png'}")
    console.print("next: fewstep sample digits-edm --solver dpm-solver-v3 --grid angle --nfe 6 --out runs/sample")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    data: Annotated[str, typer.Option(help="digits, an .npz with images, or a folder of pictures.")] = "digits",
    kind: Annotated[str, typer.Option(help="edm or ddpm.")] = "edm",
    conditional: Annotated[bool, typer.Option("--conditional", help="Condition on class labels, with a null label.")] = False,
    steps: int = 8000,
    batch: int = 96,
    lr: float = 1e-3,
    seed: int = 0,
) -> None:
    """Train a small diffusion model; a killed run continues where it was."""
    from fewstep.core.process import process
    from fewstep.learn.loop import LoopConfig
    from fewstep.learn.train import TrainConfig, train
    from fewstep.models.data import load_images

    config, loop = TrainConfig(kind, conditional), LoopConfig(steps=steps, batch=batch, lr=lr, seed=seed)
    with progress(f"training {kind} on {data}", steps) as report:
        train(load_images(data), config, loop, out, command=command(), observe=lambda step, loss: report(step, f"loss {loss:.4f}"))
    if process()[0] == 0:
        console.print(f"model: {out}\nnext: fewstep bench {out} --out {out}/bench")


def integers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise FewstepError(f"{option} wants whole numbers separated by commas, got {text!r}") from None


def command() -> str:
    """This command line, as a reader would type it."""
    return shlex.join(["fewstep", *sys.argv[1:]])


def main() -> Any:  # noqa: ANN401
    """Entry point: 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    try:
        app()
    except FewstepError as error:
        typer.echo(f"fewstep: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:  # typer turns an interrupt into an exit with 130
        if isinstance(end, SystemExit) and end.code != 130:
            raise
        typer.echo("fewstep: interrupted; run the same command to continue", err=True)
        sys.exit(130)
