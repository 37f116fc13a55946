"""The commands that train: each parses, calls, and says where the result is and what to type next."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Annotated

import typer

from fewstep.apps.console import console, distill_table, finetune_table, print_json, progress
from fewstep.apps.options import AsJson, Guidance, ModelName, checked, command, integers
from fewstep.learn.networks.distill import DistillConfig
from fewstep.learn.networks.finetune import FinetuneConfig
from fewstep.learn.networks.loop import LoopConfig
from fewstep.learn.networks.train import TrainConfig
from fewstep.learn.networks.train import train as train_model
from fewstep.learn.teacher.trajectories import TrajectoryConfig
from fewstep.models.networks.operator import OperatorForm
from fewstep.models.networks.temporal_unet import Mixing
from fewstep.runtime.errors import FewstepError

FINETUNE, TRAJECTORIES, DISTILL = FinetuneConfig(), TrajectoryConfig(), DistillConfig()
TRAIN, LOOP = TrainConfig("edm"), LoopConfig(steps=8000)
CHANNELS = ",".join(map(str, TRAIN.channels))


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


def train(
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    data: Annotated[str, typer.Option(help="digits, an .npz with images, or a folder of pictures.")] = "digits",
    kind: Annotated[str, typer.Option(help="edm or ddpm.")] = TRAIN.kind,
    conditional: Annotated[bool, typer.Option("--conditional", help="Condition on class labels, with a null label.")] = False,
    channels: Annotated[str, typer.Option(help="Of each level, separated by commas; the next has half the size.")] = CHANNELS,
    layers: Annotated[int, typer.Option(help="Residual blocks of a level.")] = TRAIN.layers,
    attention: Annotated[
        str | None, typer.Option(help="Heights of the feature maps that attend, as 16,8, or none. Default: the last level's.")
    ] = None,
    dropout: float = TRAIN.dropout,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the images, left to right.")] = False,
    p_mean: Annotated[float, typer.Option(help="Of edm: mean of the log of the noise levels in training.")] = TRAIN.p_mean,
    p_std: Annotated[float, typer.Option(help="Their standard deviation.")] = TRAIN.p_std,
    steps: int = LOOP.steps,
    batch: Annotated[int, typer.Option(help="Images in a step, of all processes.")] = LOOP.batch,
    lr: float = LOOP.lr,
    warmup: Annotated[int, typer.Option(help="Steps in which lr rises; then it falls to 0.")] = LOOP.warmup,
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights, which are saved.")] = LOOP.ema,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16, fp16.")] = LOOP.mixed_precision,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Lay images out with their channels last.")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = LOOP.checkpoint_every,
    seed: int = LOOP.seed,
) -> None:
    """Train a small diffusion model; a killed run continues where it was, several processes share the batches under torchrun."""
    from fewstep.data.images import load_images
    from fewstep.runtime.process import process

    levels = () if attention == "none" else None if attention is None else integers(attention, "--attention")
    network = {"channels": integers(channels, "--channels"), "layers": layers, "dropout": dropout, "attention": levels}
    config = TrainConfig(kind, conditional, p_mean=p_mean, p_std=p_std, flip=flip, **network)
    speed = {"mixed_precision": mixed_precision, "compile": compile, "channels_last": channels_last}
    loop = LoopConfig(steps, batch, lr, warmup, ema=ema, seed=seed, checkpoint_every=checkpoint_every, **speed)
    rate = Rate(batch)
    with progress(f"training {kind} on {data}", steps) as report:

        def observe(step: int, loss: float) -> None:
            rate.add(step)
            report(step, f"loss {loss:.4f}{rate}")

        train_model(load_images(data), config, loop, out, command=command(), observe=observe)
    if process()[0] == 0:
        console.print(f"model: {out}{rate}\nnext: fewstep bench {out} --out {out}/bench")


class Rate:
    """Images per second of a run, from its first report on: what comes before is paid once."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.first: tuple[int, float] | None = None
        self.last = (0, 0.0)

    def add(self, step: int) -> None:
        """So many steps are done."""
        self.last = (step, monotonic())
        self.first = self.first or self.last

    def __str__(self) -> str:
        if self.first is None or self.last[0] == self.first[0]:
            return ""
        return f", {(self.last[0] - self.first[0]) * self.batch / (self.last[1] - self.first[1]):.0f} images/s"
