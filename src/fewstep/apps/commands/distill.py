"""``fewstep distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fewstep.apps.console import Report, aside, console, next_command, print_json, progress, show_table
from fewstep.apps.models import bench_words, guidance_of, model_words, open_model
from fewstep.apps.options import NUM, AsJson, FieldsOf, Flag, ModelName, TeacherGuidance, Trust, Typed, checked, command
from fewstep.data.images import Images, load_images
from fewstep.evaluate.metrics.features import load_digits_features
from fewstep.evaluate.metrics.judge import EVALUATIONS, OWN, Judge
from fewstep.evaluate.pictures import save_comparison
from fewstep.learn.networks.distill import distill as make_student
from fewstep.learn.networks.objectives import OBJECTIVES, DistillConfig, FlowMapConfig, MatchingConfig
from fewstep.learn.teacher.trajectories import Trajectories
from fewstep.models.flow_map import OperatorMap
from fewstep.models.model import Model
from fewstep.runtime.errors import FewstepError, counted
from fewstep.runtime.process import default_device, process

__all__ = ["distill"]

FIGURES = ("curve", "calls", "ends", "scores", "kept", "slots", "passes", "passes_by_scale", "arithmetic", "trained_on", "fake", "seconds")
SCORES = ("fd", "precision", "recall", "fake", "teacher")
METHODS = "; ".join(f"{name}: {method.about}" for name, method in OBJECTIVES.items()) + "."
FLAGS = {
    "num": NUM,
    "grid": Flag(help="Spacing of the times; optimized, but of progressive, is the model's own for ddim."),
    "states": Flag(
        help="Where the student is taught. flow-map: on the stored trajectories, or at their ends noised anew. guided: on fresh "
        "trajectories without guidance, on guided ones, on stored ones of the teacher, at their ends noised anew, or on noised pictures "
        "(data)."
    ),
    "start": Flag(
        help="Of progressive, steps of the model that is halved first, twice the first number of --nfe by default; of a student that was "
        "halved before, steps of the grid that its own are every second time of, or every fourth, and so on. Of dmd and em, the noise "
        "level sigma/alpha at which the teacher's network begins to make pictures; by default 2.5, or that of the student to begin with."
    ),
    "form.features": Flag(help="Features of what the student is told: the target time of flow-map, the guidance scale of guided."),
    "form.anywhere": Flag("--anywhere/--one-pass", help="Start at any of the slots' times, for several passes, or at the noise only."),
    "form.mixing.form": Flag("--mixing", help="Temporal layers of dsno: real, fft, one-way (the last slot needs no other)."),
    "form.mixing.insert_after": Flag(
        "--insert-after", "--places", help="Temporal layers after all blocks, or in the inner half of the network."
    ),
    "form.mixing.branch_at": Flag("--branch-at", "--fan"),
}


def distill(
    model: ModelName,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the student.")],
    method: Annotated[str, typer.Option(metavar="|".join(OBJECTIVES), help=METHODS)] = "dsno",
    config: Annotated[Typed, FieldsOf({name: method.config for name, method in OBJECTIVES.items()}, FLAGS, ("guidance",))],
    guidance: TeacherGuidance = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="For targets of a flow map that learn from pictures, for the states data of guided, and to judge samples in dmd and em: "
            "digits, an .npz or a folder."
        ),
    ] = None,
    trajectories: Annotated[Path | None, typer.Option(help="A folder of trajectories; by default they are made.")] = None,
    begin: Annotated[str | None, typer.Option("--from", help="A student to begin with; by default the teacher's weights.")] = None,
    trust: Trust = False,
    json: AsJson = False,
) -> None:
    """Distil a model into a student of few passes, or of one call for any guidance scale.

    A killed run continues where it stopped; the processes of torchrun share trajectories and batches.
    """
    checked(method, tuple(OBJECTIVES), "--method")
    chosen = config.config(method, "--method")
    opened, compares = open_model(model, trust=trust), getattr(chosen, "loss", None) == "features"
    features = load_digits_features().smooth if compares else None
    if features is not None and opened.shape != (1, 8, 8):
        raise FewstepError(f"the bundled features are of 8x8 digits, {opened.name} makes {opened.shape}: use another loss")
    stored = None if trajectories is None else Trajectories.load(trajectories)
    scale, matches = guidance_of(opened, guidance), isinstance(chosen, MatchingConfig)
    images = None if data is None else load_images(data)
    with progress(f"distilling {opened.name}", chosen.all_steps) as report:
        judge = _judge(opened, scale, images, report) if matches else None
        if not json and process()[0] == 0:
            before = ""
            if isinstance(chosen, DistillConfig | FlowMapConfig) and stored is None and images is None:
                before = f"{counted(chosen.num + chosen.held_out, 'trajectory')} of {chosen.teacher_nfe} evaluations, then "
            elif judge is not None and judge.own:
                before = f"{counted(judge.own, 'sample')} of {EVALUATIONS} evaluations to judge by, then "
            steps = f"{counted(chosen.all_steps, 'training step')} of {counted(chosen.batch, 'row')}"
            with aside():
                console.print(f"distilling {opened.name}: {before}{steps}")
        student = make_student(
            opened,
            method,
            guidance=scale,
            out=out,
            config=chosen,
            trajectories=stored,
            begin=None if begin is None else open_model(begin, trust=trust),
            features=features,
            images=None if matches else images,
            judge=judge,
            device=default_device(),
            command=command(),
            on_progress=report,
        )
    if student is None:
        return
    done = {"model": opened.name, "student": str(out)}
    if len(opened.need_shape()) == 3 and "slots" in student.card:
        shown = Trajectories.load(out / "work" / "trajectories") if stored is None else stored
        held_out = range(len(shown))[-chosen.held_out :][:6]
        done["picture"] = str(_draw(student, shown, held_out, out / "slots.png"))
    done |= {key: student.card[key] for key in FIGURES if key in student.card}
    if json:
        print_json(done)
        return
    _show(done)
    console.print(f"student: {out}" + (f"\npicture of its slots: {done['picture']}" if "picture" in done else ""))
    console.print(next_command("bench", out, *model_words(student), *bench_words(student, opened.data), "--out", "runs/bench"))


def _judge(opened: Model, guidance: float | None, images: Images | None, report: Report) -> Judge:
    """Return what chooses the weights of a student whose samples match a distribution."""
    opened.need_denoiser().to(default_device())
    if images is not None:
        return Judge.of(images, device=default_device())
    return Judge.of_model(
        opened, 1.0 if guidance is None else guidance, on_progress=lambda done: report(0, f"{done} of {OWN} samples to judge by")
    )


def _show(done: dict[str, Any]) -> None:
    """Print the error of the student by the number of passes, and what they cost."""
    if "calls" in done:
        called = [(scale, f"{error:.4f}", f"{worst:.4f}") for scale, (error, worst) in done["calls"].items()]
        show_table(f"{done['model']} distilled", ("guidance", "RMSE of one call to the guided teacher", "at the worst time"), called)
    if "ends" in done:
        ended = [(scale, f"{error:.4f}") for scale, error in done["ends"].items()]
        show_table(f"{done['model']} distilled", ("guidance", "RMSE of its ends to the model that was halved"), ended)
    if "scores" in done:
        chosen = done["kept"]["step"]
        scored = [
            (f"{one['step']}{' (kept)' if one['step'] == chosen else ''}", *(f"{one[name]:.3f}" for name in SCORES))
            for one in done["scores"]
        ]
        headings = ("step", "Frechet distance", "precision", "recall", "loss of the fake", "of the teacher")
        show_table(f"{done['model']} distilled, on held-out noises", headings, scored)
    if "slots" in done:
        rows = [
            (str(n), f"{done['arithmetic'][n]:.2f}", f"{error:.4f}", ", ".join(f"{t:.4g}" for t in times))
            for n, (times, error) in done["passes"].items()
        ]
        headings = ("passes", "arithmetic (evaluations)", "RMSE to the teacher", "times")
        show_table(f"{done['model']} distilled, on held-out trajectories", headings, rows, left=("times",))
        console.print(f"error in each slot of one pass: {', '.join(f'{error:.4f}' for error in done['slots'])}")
    console.print(f"{done['seconds']:.0f} s of training")


@torch.no_grad()
def _draw(student: Model, stored: Trajectories, index: range, path: Path) -> Path:
    """Draw the state in each slot of one pass, below the teacher's trajectory, each scaled to unit size."""
    flow_map, schedule = student.to(default_device()).flow_map, student.schedule
    assert flow_map is not None  # just made
    t = flow_map.student.times if isinstance(flow_map, OperatorMap) else stored.t[:: max(1, (len(stored.t) - 1) // 4)]
    places = [int((stored.t - wanted).abs().argmin()) for wanted in t]
    x, labels, scale = stored.states(index, at=places).to(default_device()), stored.labels(index), stored.scale(index)
    flow_map = flow_map if scale is None else flow_map.at(scale)
    cond = None if labels is None else labels.to(x.device)
    ours = torch.stack([flow_map(x[:, 0], t[0], later, cond) for later in t[1:]], 1)
    cells = {}
    for name, states in (("teacher", x), ("one pass", torch.cat([x[:, :1], ours], 1))):
        for k, now in enumerate(t):
            size = torch.sqrt(schedule.alpha(now) ** 2 + schedule.sigma(now) ** 2)
            level = float(torch.exp(-schedule.lam(now)))
            error = float((states[:, k] - x[:, k]).double().square().mean().sqrt() / size)
            cells[name, f"noise level {level:.3g}"] = ((states[:, k] / size).cpu(), f"rmse {error:.3f}" if name != "teacher" else "")
    return save_comparison(cells, path, title=f"{student.name}: all slots of one pass, on noises that were not trained on")
