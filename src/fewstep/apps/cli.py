"""The command line: each verb parses, calls, and says where the result is and what to type next."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.apps.console import bench_table, console, distill_table, finetune_table, fit_table, optimize_table, print_json, progress
from fewstep.core.errors import FewstepError
from fewstep.learn.calibrate import CalibrationConfig
from fewstep.learn.distill import DistillConfig
from fewstep.learn.finetune import FinetuneConfig
from fewstep.learn.fit_search import FitConfig
from fewstep.learn.fit_solver import FitForm
from fewstep.learn.optimize import OptimizeConfig
from fewstep.learn.trajectories import TrajectoryConfig
from fewstep.models.operators.dsno import Mixing
from fewstep.models.operators.student import OperatorForm

DEFAULT, OPTIMIZE, FINETUNE, FIT = CalibrationConfig(), OptimizeConfig(), FinetuneConfig(), FitConfig()
TRAJECTORIES, DISTILL = TrajectoryConfig(), DistillConfig()
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
    from fewstep.apps.verbs import BenchRequest, run_bench

    which = (words(solver), words(grid), None if nfe is None else integers(nfe, "--nfe"), words(sampler) or ())
    request = BenchRequest(model, *which, num, seed, guidance, words(peers) or (), batch, statistics, any_statistics)
    results = run_bench(request, out, command())
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
    json: AsJson = False,
) -> None:
    """Fit samplers to a model: coefficients and noise levels of its own; continues where a killed run stopped."""
    from fewstep.apps.verbs import run_fit

    form = FitForm(history, checked(pool, ("element", "channel", "scalar"), "--pool"), bias, ridge, shrink)
    config = FitConfig(form, num, held_out, iterations=iterations, seed=seed, batch=batch, parent=parent)
    done = run_fit(model, integers(nfe, "--nfe"), config, out, guidance, trajectories, command())
    if done is None or json:
        print_json(done) if done is not None else None
        return
    fit_table(done)
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
    json: AsJson = False,
) -> None:
    """Find the noise levels at which a solver should evaluate this model; continues where a killed run stopped."""
    from fewstep.apps.verbs import run_optimize

    config = OptimizeConfig(levels, num, noises, held_out)
    done = run_optimize(model, words(solver) or (), integers(nfe, "--nfe"), config, out, guidance, statistics, command())
    if json:
        print_json(done)
        return
    optimize_table(done)
    scale = "" if guidance == 1 else f" --guidance {guidance:g}"
    console.print(f"samplers: {out}\nplots: {done['plots']}\nnext: fewstep bench {model}{scale} --sampler {out} --out runs/bench")


@app.command()
def finetune(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the tuned model.")],
    nfe: Annotated[int, typer.Option(help="Network evaluations that it is tuned for.")] = FINETUNE.nfe,
    rounds: Annotated[int, typer.Option(help="Rounds of training and schedule search, at most.")] = FINETUNE.rounds,
    steps: Annotated[int, typer.Option(help="Training steps in a round.")] = FINETUNE.steps,
    batch: Annotated[int, typer.Option(help="Trajectories in a step.")] = FINETUNE.batch,
    lr: float = FINETUNE.lr,
    form: Annotated[str, typer.Option(help="mean: regress onto the teacher's interval means; score: match scores on --data.")] = "mean",
    states: Annotated[str, typer.Option(help="Where the regression looks: own or teacher.")] = "own",
    guidance: Annotated[float, typer.Option(help="Scale at which the teacher samples; the tuned model is sampled without.")] = 1.0,
    num: Annotated[int, typer.Option("--num", "-n", help="Teacher trajectories to learn from.")] = FINETUNE.num,
    data: Annotated[str | None, typer.Option(help="For the form score: digits, an .npz or a folder of images.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Save the weights in float16.")] = False,
    json: AsJson = False,
) -> None:
    """Tune a copy of a model for a few steps, its schedule with it; continues where a killed run stopped."""
    from fewstep.apps.verbs import run_finetune

    which = (nfe, rounds, steps, batch, lr, checked(form, ("mean", "score"), "--form"), checked(states, ("own", "teacher"), "--states"))
    config = FinetuneConfig(*which, guidance, num, half=half)
    done = run_finetune(model, config, out, data, command())
    if json:
        print_json(done)
        return
    finetune_table(done)
    console.print(f"model: {out}\nnext: fewstep bench {out} --nfe {nfe} --out runs/bench")


@app.command()
def trajectories(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the trajectories.")],
    num: Annotated[int, typer.Option("--num", "-n", help="How many (under torchrun say -n).")] = TRAJECTORIES.num,
    slots: Annotated[int, typer.Option(help="Times at which states are kept, beside the noise.")] = 16,
    grid: Annotated[str, typer.Option(help="Their spacing; optimized is the model's own for ddim.")] = DISTILL.grid,
    nfe: Annotated[int, typer.Option(help="Evaluations per trajectory, at least.")] = TRAJECTORIES.nfe,
    solver: Annotated[str, typer.Option(help="Any that adds no noise and needs no statistics.")] = TRAJECTORIES.solver,
    guidance: Guidance = 1.0,
    label: Annotated[int | None, typer.Option(help="Class of all; by default the seed modulo the classes.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first; the next has the next seed.")] = DISTILL.seed,
    dtype: Annotated[str, typer.Option(help="Of what is stored: float32, float16, bfloat16.")] = TRAJECTORIES.dtype,
    batch: Annotated[int, typer.Option(help="Trajectories at a time, and in a file.")] = TRAJECTORIES.batch,
    json: AsJson = False,
) -> None:
    """Solve a model's sampling ODE and keep the states, for students to learn from; continues, and shares the work under torchrun."""
    from fewstep.apps.verbs import run_trajectories

    config = TrajectoryConfig(num, nfe, solver, seed, guidance, label, batch, dtype)
    done = run_trajectories(model, grid, slots, config, out, command())
    if done is not None:
        scale = "" if guidance == 1 else f" --guidance {guidance:g}"
        own = "unknown" if done["teacher_error"] is None else f"{done['teacher_error']:.1e}"
        held = min(DISTILL.held_out, num // 4)
        which = f"--grid {grid} --slots {slots} --num {num - held} --held-out {held}" + (" --method kd" if slots == 1 else "")
        where = f"trajectories: {out} ({done['bytes'] / 1e6:.0f} MB, own error {own})"
        text = f"{where}\nnext: fewstep distill {model}{scale} --trajectories {out} {which} --out runs/student"
        print_json(done) if json else console.print(text)


@app.command()
def distill(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the student.")],
    method: Annotated[str, typer.Option(help="dsno: slots that meet in temporal layers; slots: they do not; kd: one slot.")] = "dsno",
    slots: Annotated[int | None, typer.Option(help="Times that one pass answers for. Default: 4, or 1 for kd.")] = None,
    grid: Annotated[str, typer.Option(help="Their spacing; optimized is the model's own for ddim.")] = DISTILL.grid,
    output: Annotated[str, typer.Option(help="What the network's output means: denoised, skip, state.")] = DISTILL.form.output,
    time: Annotated[str, typer.Option(help="The time the network is given: that of the start, or the slot's.")] = DISTILL.form.time,
    one_pass: Annotated[bool, typer.Option("--one-pass", help="Start at the noise only, not anywhere.")] = False,
    mixing: Annotated[str, typer.Option(help="Of dsno's temporal layers: real, fft, one-way (the last slot needs no other).")] = "real",
    modes: Annotated[int, typer.Option(help="Temporal frequencies that they keep.")] = DISTILL.form.mixing.modes,
    places: Annotated[str, typer.Option(help="Temporal layers after all blocks, or in the inner half.")] = DISTILL.form.mixing.places,
    fan: Annotated[
        str, typer.Option(help="Slots part at the input, or (one encoder for all) at the inner half.")
    ] = DISTILL.form.mixing.fan,
    loss: Annotated[str, typer.Option(help="huber, l1, l2, or features (of the bundled digits network).")] = DISTILL.loss,
    weights: Annotated[str, typer.Option(help="Of the slots: equal, snr, paper.")] = DISTILL.weights,
    dropout: float = DISTILL.dropout,
    steps: Annotated[int, typer.Option(help="Training steps.")] = DISTILL.steps,
    batch: Annotated[int, typer.Option(help="Trajectories in a step.")] = DISTILL.batch,
    lr: float = DISTILL.lr,
    ema: float = DISTILL.ema,
    num: Annotated[int, typer.Option("--num", "-n", help="Stored trajectories to learn from (under torchrun say -n).")] = DISTILL.num,
    held_out: Annotated[int, typer.Option(help="Others after them, which measure.")] = DISTILL.held_out,
    fresh: Annotated[float, typer.Option(help="Share of each batch that is solved while training.")] = DISTILL.fresh,
    teacher_nfe: Annotated[int, typer.Option(help="Evaluations of the teacher per trajectory.")] = DISTILL.teacher_nfe,
    guidance: Annotated[float, typer.Option(help="Scale at which the teacher samples; the student is sampled without.")] = 1.0,
    trajectories: Annotated[Path | None, typer.Option(help="A folder of trajectories; by default they are made.")] = None,
    begin: Annotated[str | None, typer.Option("--from", help="A student to begin with; by default the teacher's weights.")] = None,
    seed: int = DISTILL.seed,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16, fp16.")] = DISTILL.mixed_precision,
    half: Annotated[bool, typer.Option("--half", help="Save the weights in float16.")] = False,
    json: AsJson = False,
) -> None:
    """Distil a model into an operator that samples in one pass; continues where a killed run stopped, shares the work under torchrun."""
    from fewstep.apps.verbs import run_distill

    checked(method, ("dsno", "slots", "kd"), "--method")
    if method == "kd" and slots not in (None, 1):
        raise FewstepError(f"kd has one slot, got --slots {slots}: say --method slots, or leave --slots out")
    count = (1 if method == "kd" else DISTILL.slots) if slots is None else slots
    form = OperatorForm(output, time, not one_pass, Mixing(mixing if method == "dsno" else "none", modes, places, fan))
    training = {"dropout": dropout, "steps": steps, "batch": batch, "lr": lr, "ema": ema, "mixed_precision": mixed_precision}
    taught = {"num": num, "held_out": held_out, "fresh": fresh, "teacher_nfe": teacher_nfe, "guidance": guidance, "seed": seed}
    config = DistillConfig(count, grid, form, loss, weights, half=half, **training, **taught)
    done = run_distill(model, config, out, trajectories, begin, command())
    if done is None or json:
        print_json(done) if done is not None else None
        return
    distill_table(done)
    console.print(f"student: {out}\npicture of its slots: {done['picture']}\nnext: fewstep bench {out} --out runs/bench")


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
    console.print("next: fewstep sample digits-edm --solver fitted --nfe 6 --out runs/sample")


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


def checked(word: str, words: tuple[str, ...], option: str) -> Any:  # noqa: ANN401 - one of the words
    """A word that is one of a few."""
    if word not in words:
        raise FewstepError(f"{option} is {' or '.join(words)}, got {word!r}")
    return word


def words(text: str | None) -> tuple[str, ...] | None:
    """Names separated by commas."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


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
