"""The command line: each verb parses, calls, and says where the result is and what to type next."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.apps import training
from fewstep.apps.console import bench_table, console, fit_table, optimize_table, print_json
from fewstep.apps.options import (
    AnyStatistics,
    AsJson,
    Guidance,
    ModelName,
    Prompts,
    StatisticsFolder,
    app,
    checked,
    command,
    integers,
    json_object,
    words,
)
from fewstep.learn.samplers.calibrate import CalibrationConfig
from fewstep.learn.samplers.fit_search import FitConfig
from fewstep.learn.samplers.optimize import OptimizeConfig
from fewstep.learn.search.coefficients import FitForm
from fewstep.runtime.errors import FewstepError

DEFAULT, OPTIMIZE, FIT = CalibrationConfig(), OptimizeConfig(), FitConfig()


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
    solver: Annotated[str | None, typer.Option(help="Default: what the model was tuned for, else unipc-2.")] = None,
    grid: Annotated[str | None, typer.Option(help="Or optimized: the model's own. Default: as for --solver, else angle.")] = None,
    nfe: Annotated[int | None, typer.Option(help="Network evaluations per sample. Default: as for --solver, else 8.")] = None,
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
    solver: Annotated[str | None, typer.Option(help="Solvers, separated by commas. Default: five.")] = None,
    grid: Annotated[str | None, typer.Option(help="Grids; optimized is the model's own. Default: logsnr,karras,angle.")] = None,
    nfe: Annotated[str | None, typer.Option(help="Network evaluations, separated by commas. Default: 5,6,8,10.")] = None,
    sampler: Annotated[str, typer.Option(help="Folders of saved samplers, separated by commas: of fewstep optimize, for example.")] = "",
    num: Annotated[int, typer.Option(help="How many noises.")] = 512,
    seed: int = 0,
    guidance: Guidance = 1.0,
    peers: Annotated[
        str, typer.Option(help="Also: diffusers (its ODE solvers), module:function (a sampler of k-diffusion's signature), with commas.")
    ] = "",
    features: Annotated[
        str | None,
        typer.Option(help="Of the comparison with data: digits, pixels, inception:PATH, module:function. Default: by the data."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Images to compare with: digits, an .npz, a folder of pictures. Default: the model's own, if known.")
    ] = None,
    batch: int = 256,
    statistics: StatisticsFolder = None,
    any_statistics: AnyStatistics = False,
    report: Annotated[bool, typer.Option("--report", help="Also write report.html: the rows as plots, tables and pictures.")] = False,
    json: AsJson = False,
) -> None:
    """Compare solvers on the same noises: error to a tight trajectory, Frechet distance, time."""
    from fewstep.apps.verbs import BenchRequest, run_bench

    which = (words(solver), words(grid), None if nfe is None else integers(nfe, "--nfe"), words(sampler) or ())
    request = BenchRequest(
        model, *which, num, seed, guidance, words(peers) or (), batch, statistics, any_statistics, features, data, report
    )
    results = run_bench(request, out, command())
    print_json(results) if json else bench_table(results)
    if not json:
        console.print(f"rows: {out / 'results.json'}\npictures: {out / 'pictures.png'}")
        console.print(f"report: {out / 'report.html'}" if report else f"next: fewstep report {out} --out {out}")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of fewstep bench; earlier runs first.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, results.csv, results.md and plots/.")],
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    json: AsJson = False,
) -> None:
    """Show benchmarks as one page; a row that is in several runs is compared, and marked if it got worse."""
    from fewstep.evaluate.report.write import write_report

    page = write_report(folders, out, title=title)
    print_json({"report": str(page)}) if json else console.print(f"report: {page}\nnext: open it in a browser; it needs no network")


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
    prompts: Prompts = None,
    json: AsJson = False,
) -> None:
    """Estimate the statistics that dpm-solver-v3 needs; continues where a killed run stopped, and shares the work under torchrun."""
    from fewstep.apps.verbs import open_model, run_calibrate

    config = CalibrationConfig(levels, num, pool, batch, seed, jvp=jvp)
    done = run_calibrate(open_model(model, prompts), config, out, data, guidance, unguided, command())
    if done is not None:
        scale = "" if guidance == 1 else f" --guidance {guidance:g}"
        after = f"fewstep bench {model}{scale} --statistics {out} --out runs/bench"
        after = in_pipeline("from_config", out) if prompts else after
        text = f"statistics: {out}\nplot: {done['plot']}\nnext: {after}"
        print_json(done) if json else console.print(text)


@app.command()
def fit(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the samplers.")],
    nfe: Annotated[str, typer.Option(help="Network evaluations, separated by commas.")] = "4,5,6,8,10",
    guidance: Guidance = 1.0,
    num: Annotated[int, typer.Option("--num", "-n", help="Trajectories to fit to (under torchrun say -n).")] = FIT.num,
    held_out: Annotated[int, typer.Option(help="Others, which check the fit.")] = FIT.held_out,
    history: Annotated[int | None, typer.Option(help="How many past outputs a step reads; by default all.")] = FIT.form.history,
    pool: Annotated[str, typer.Option(help="Elements that share a coefficient: element (none do), channel, scalar.")] = FIT.form.pool,
    bias: Annotated[bool, typer.Option(help="Also fit a constant picture to each step.")] = FIT.form.bias,
    ridge: Annotated[float, typer.Option(help="How strongly coefficients are drawn to the parent's.")] = FIT.form.ridge,
    shrink: Annotated[float, typer.Option(help="How strongly those of elements are drawn to each other.")] = FIT.form.shrink,
    iterations: Annotated[int, typer.Option(help="Of the sweep over all steps, at most; 0 for none.")] = FIT.iterations,
    parent: Annotated[str, typer.Option(help="The solver that coefficients are drawn to.")] = FIT.parent,
    seed: Annotated[int, typer.Option(help="Of the first trajectory.")] = FIT.seed,
    trajectories: Annotated[Path | None, typer.Option(help="A folder of trajectories to fit to; by default they are made.")] = None,
    batch: int = FIT.batch,
    prompts: Prompts = None,
    json: AsJson = False,
) -> None:
    """Fit samplers to a model: coefficients and noise levels of its own; continues where a killed run stopped."""
    from fewstep.apps.verbs import open_model, run_fit

    form = FitForm(history, checked(pool, ("element", "channel", "scalar"), "--pool"), bias, ridge, shrink)
    config = FitConfig(form, num, held_out, iterations=iterations, seed=seed, batch=batch, parent=parent)
    done = run_fit(open_model(model, prompts), integers(nfe, "--nfe"), config, out, guidance, trajectories, command())
    if done is None or json:
        print_json(done) if done is not None else None
        return
    fit_table(done)
    if prompts:
        console.print(f"samplers: {out}\nnext: {in_pipeline('from_sampler', out)}")
        return
    scale, first = "" if guidance == 1 else f" --guidance {guidance:g}", done["rows"][0]["nfe"]
    console.print(f"samplers: {out}\nnext: fewstep sample {model}{scale} --sampler {out}/nfe-{first:02d} --out runs/sample")
    console.print(f"or:   fewstep bench {model}{scale} --sampler {out} --out runs/bench")


@app.command()
def optimize(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the samplers.")],
    nfe: Annotated[str, typer.Option(help="Network evaluations, separated by commas.")] = "5,6,8,10",
    solver: Annotated[str, typer.Option(help="Solvers, separated by commas.")] = "unipc-2",
    guidance: Guidance = 1.0,
    levels: Annotated[int, typer.Option(help="Cells between the noise levels that schedules are first sought on.")] = OPTIMIZE.levels,
    num: Annotated[int, typer.Option(help="Trajectories that the error bound is averaged over.")] = OPTIMIZE.num,
    noises: Annotated[int, typer.Option(help="Noises that calibrate a schedule, at most.")] = OPTIMIZE.noises,
    held_out: Annotated[int, typer.Option(help="Other noises, which decide between the schedules found.")] = OPTIMIZE.held_out,
    statistics: StatisticsFolder = None,
    prompts: Prompts = None,
    json: AsJson = False,
) -> None:
    """Find the noise levels at which a solver should evaluate this model; continues where a killed run stopped."""
    from fewstep.apps.verbs import open_model, run_optimize

    config = OptimizeConfig(levels, num, noises, held_out)
    which = (words(solver) or (), integers(nfe, "--nfe"))
    done = run_optimize(open_model(model, prompts), *which, config, out, guidance, statistics, command())
    if json:
        print_json(done)
        return
    optimize_table(done)
    scale = "" if guidance == 1 else f" --guidance {guidance:g}"
    after = f"fewstep bench {model}{scale} --sampler {out} --out runs/bench"
    after = in_pipeline("from_sampler", done["folders"][0]) if prompts else after
    console.print(f"samplers: {out}\nplots: {done['plots']}\nnext: {after}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="EDM's .pkl, ScoreSDE's or guided-diffusion's .pth or .pt, or a .safetensors.")],
    out: Annotated[Path, typer.Option(help="A folder, or a file that ends in .safetensors.")],
    format: Annotated[str | None, typer.Option(help="edm, score-sde, guided-diffusion; by default as the file shows.")] = None,
    config: Annotated[
        str | None, typer.Option(help="JSON, or a file of it: what the weights do not show, see docs/checkpoints.md.")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Read tensors and known classes from a pickle; nothing in it is run.")] = False,
) -> None:
    """Convert a checkpoint of another code base to safetensors."""
    from fewstep.models.formats.checkpoints import convert

    made = convert(checkpoint, out, format=format, config=None if config is None else json_object(config, "--config"), trust=trust)
    console.print(f"model: {out}, samples of shape {made.shape}\nnext: fewstep sample {out} --out runs/sample")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Of a saved sampler or of statistics.")],
    repository: Annotated[str, typer.Argument(help="On the Hugging Face hub: owner/name.")],
    subfolder: Annotated[str | None, typer.Option(help="Where in the repository; by default its top.")] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, only you see it.")] = False,
) -> None:
    """Put a saved sampler or statistics on the hub."""
    from fewstep.core.statistics import ModelStatistics
    from fewstep.sampling.sampler import Sampler

    kind = ModelStatistics if (folder / "statistics.json").exists() else Sampler
    pictures = sorted(folder.glob("*.png"))
    address = kind.load(folder).push_to_hub(repository, subfolder=subfolder, pictures=pictures, private=private or None)
    console.print(f'pushed: {address}\nnext: fewstep.{kind.__name__}.from_pretrained("{repository}")')


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
    page = out / "report.html"
    console.print(f"report: {page}" if page.exists() else "report: none: pip install 'fewstep[report]'")
    console.print("next: fewstep sample digits-edm --solver fitted --nfe 6 --out runs/sample")


def in_pipeline(method: str, folder: Path | str) -> str:
    """What to type next where the model is a pipeline: with samplers, or with statistics."""
    given = f'"{folder}", pipe.scheduler.config'
    if method == "from_config":
        given = f'pipe.scheduler.config, solver="dpm-solver-v3", statistics="{folder}"'
    return f"pipe.scheduler = fewstep.integrations.diffusers.FewstepScheduler.{method}({given})"


for verb in (training.finetune, training.trajectories, training.distill, training.train):
    app.command()(verb)


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
