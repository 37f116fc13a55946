r"""Train an operator student on teacher trajectories (DSNO, Zheng et al., arXiv 2211.13449): one pass then leads from noise to the image.

The trajectories pair each noise with its own solution, so training is regression: with ``output_k`` the answer of slot ``k`` and
``target_k`` the one that would land on the teacher's state,

    mean_k  weight_k  distance(output_k, target_k),

in the network's own output, where all targets have one size. It starts at the noise, or at any time of the trajectory (then the slots are
those below), so that a student may go on from where it came to: one stored trajectory teaches all its ``(s, t)``. One slot is plain
knowledge distillation; several that do not meet are several such tasks on one network.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.core.grid import TimeGrid
from fewstep.core.tableau import Nodes
from fewstep.learn.networks.loop import LoopConfig, LossCurve, check_checkpoint, forget_checkpoint, run_loop
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, TrajectorySolver, generate_trajectories
from fewstep.models.formats.folders import Model, load_folder, save_like
from fewstep.models.networks.operator import OperatorForm, OperatorStudent
from fewstep.models.tuned import Tuned
from fewstep.runtime.artifact import check_writable, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError, ModelError, look_up
from fewstep.runtime.process import process, wait_for_all
from fewstep.sampling.grid_table import GridTable
from fewstep.sampling.noise import start_noise
from fewstep.solvers import make_solver

__all__ = ["DISTANCES", "WEIGHTS", "Distilled", "DistillConfig", "distill"]

FIRST_FRESH = 2**40  # seeds of trajectories made while training; far from all others


def _l1(error: Tensor) -> Tensor:
    return error.abs().mean((0, *range(2, error.ndim)))


def _l2(error: Tensor) -> Tensor:
    return error.square().mean((0, *range(2, error.ndim)))


def _huber(error: Tensor) -> Tensor:
    """``(sqrt(|e|^2 + c^2) - c) / sqrt(D)`` of each sample's norm, with ``c = 0.00054 sqrt(D)`` (Song and Dhariwal, arXiv 2310.14189)."""
    size = math.prod(error.shape[2:])
    c = 0.00054 * math.sqrt(size)
    return (torch.sqrt(error.flatten(2).square().sum(2) + c * c) - c).mean(0) / math.sqrt(size)


# error [B, T, *D] -> distance [T]
DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {"l1": _l1, "l2": _l2, "huber": _huber}

# alpha/sigma of the slots [T] -> weight [T]
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "equal": torch.ones_like,
    "snr": lambda snr: snr.clamp(1, 10),
    "paper": lambda snr: snr.clamp(1, 1e4),
}


@dataclass(frozen=True)
class DistillConfig:
    """How to distil.

    Args:
        slots: times below the start that one pass answers for.
        grid: their spacing, or ``optimized``: the model's own for DDIM. ``angle`` is uniform in DSNO's time, ``angle:power=2`` quadratic.
        form: of the student.
        loss: ``l2``, ``l1``, ``huber`` or ``features``: the last compares features of pictures, see `distill`.
        weights: of the slots: ``equal``, ``snr`` (alpha/sigma, from 1 to 10) or ``paper`` (to 10000: little but the last slot is left).
        first: share of each batch that starts at the noise, where the student starts anywhere.
        dropout: in the network's blocks.
        steps, batch, lr, weight_decay, ema, mixed_precision: of the training loop; ``batch`` counts trajectories.
        num: stored trajectories to learn from.
        held_out: others, which measure.
        fresh: share of each batch that is not stored but solved while training.
        teacher_nfe: evaluations of the teacher per trajectory.
        guidance: the scale at which the teacher samples; the student takes labels but no scale.
        seed: of the first trajectory; far from those that benchmarks start with.
        half: save the weights in float16.

    Raises:
        FewstepError: a number out of range, or an unknown word.
    """

    slots: int = 4
    grid: str = "angle"
    form: OperatorForm = field(default_factory=OperatorForm)
    loss: str = "huber"
    weights: str = "equal"
    first: float = 0.5
    dropout: float = 0.0
    steps: int = 6000
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.0
    ema: float = 0.999
    mixed_precision: str = "no"
    num: int = 16384
    held_out: int = 512
    fresh: float = 0.0
    teacher_nfe: int = 32
    guidance: float = 1.0
    seed: int = 6_000_000
    half: bool = False

    def __post_init__(self) -> None:
        if self.slots < 1 or self.num < 1 or self.held_out < 2 or self.teacher_nfe < 1:
            raise FewstepError(f"distilling needs slots, num and teacher_nfe of at least 1 and 2 trajectories held out, got {self}")
        if not 0 <= self.fresh <= 1 or not 0 < self.first <= 1 or not 0 <= self.dropout < 1:
            raise FewstepError(f"fresh lies in [0, 1], first in (0, 1], dropout in [0, 1), got {self.fresh}, {self.first}, {self.dropout}")
        look_up(self.loss, {**DISTANCES, "features": None}, "loss", FewstepError)
        look_up(self.weights, WEIGHTS, "weights of the slots", FewstepError)
        _ = self.loop

    @property
    def loop(self) -> LoopConfig:
        """That of the training."""
        options = {"weight_decay": self.weight_decay, "ema": self.ema, "seed": self.seed, "mixed_precision": self.mixed_precision}
        return LoopConfig(self.steps, self.batch, self.lr, min(200, self.steps // 10), **options)

    @property
    def trajectories(self) -> TrajectoryConfig:
        """Those to learn from, and after them those held out."""
        return TrajectoryConfig(self.num + self.held_out, self.teacher_nfe, seed=self.seed, guidance=self.guidance)


@dataclass(frozen=True)
class Distilled:
    """What distilling reached, on trajectories that no training saw.

    Attributes:
        curve: ``(step, mean loss since the step before it)``.
        slots: RMSE of the states in each slot of one pass from the noise, over ``sqrt(alpha^2 + sigma^2)``.
        passes: by their number: the best times to go through, and the RMSE to the teacher's ends.
        arithmetic: by the number of passes: their operations in evaluations of the teacher.
        seconds: of training, without the trajectories.
    """

    curve: list[tuple[int, float]]
    slots: list[float]
    passes: dict[int, tuple[list[float], float]]
    arithmetic: dict[int, float]
    seconds: float


def distill(
    model: Model,
    config: DistillConfig,
    out: str | Path,
    *,
    trajectories: Trajectories | None = None,
    begin: Model | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    teacher: str = "",
    device: torch.device | None = None,
    command: str = "",
    observe: Callable[[int, str], None] | None = None,
) -> Distilled | None:
    """Distil a copy of the model's network; ``out`` becomes a model folder that samples in one pass. None in all processes but the first.

    A killed run continues where it was and ends with the same weights. The processes of ``torchrun`` share trajectories and batches.

    Args:
        trajectories: of this model, with the times of ``config.grid`` among theirs; by default they are made below ``out``.
        begin: a student whose weights to begin with, where they fit; by default the teacher's.
        features: for the loss ``features``: from pictures ``[B, *D]`` to what is compared, ``[B, F]``.
        teacher: how `load_model` finds the teacher; by default its folder or name.
        observe: called with the number of training steps done, and a note.

    Raises:
        FewstepError: ``out`` holds a finished model, or the loss ``features`` has none.
        ModelError: a network that operators cannot be made of, or that was not loaded from a folder.
        ArtifactError: trajectories of another model or without the times of the grid; the folder holds another run, or cannot be written.
    """
    out, device, say = Path(out), device or torch.device("cpu"), observe or (lambda done, note: None)
    if (out / "tuned.json").exists():
        raise FewstepError(f"{out} already holds a distilled model: choose another folder, or remove it")
    if (out / "unet").exists() and not (out / "work" / "curve.json").exists():  # with one, a run was killed while it saved
        raise FewstepError(f"{out} already holds a model, which would be lost: choose another folder")
    if config.loss == "features" and features is None:
        raise FewstepError("the loss features compares features of pictures: pass features=, a network from pictures [B, *D] to [B, F]")
    if not isinstance(model.adapted.network, nn.Module) or model.folder is None:
        raise ModelError(f"{model.name} was not loaded from a folder, so its student could not be saved as one: save it first")
    if begin is not None and not begin.is_operator:
        raise ModelError(f"{begin.name} is no operator student to begin with: name one of fewstep distill")
    check_writable(out)
    work = _Distilling(model.to(device), config, out, device, say, features)
    work.teach(trajectories, command)
    student, curve, seconds = work.train(begin)
    if process()[0]:
        return None
    made = work.measure(student, curve, seconds)
    _save(work, student, made, out, teacher or (model.name if model.data else str(model.folder.resolve())), command)
    return made


class _Distilling:
    """A teacher, its trajectories, and the student's training."""

    def __init__(
        self,
        model: Model,
        config: DistillConfig,
        out: Path,
        device: torch.device,
        say: Callable[[int, str], None],
        features: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.model, self.config, self.work, self.device, self.say, self.features = model, config, out / "work", device, say, features
        self.grid = model.slot_grid(config.grid, config.slots, config.guidance)
        self.identity = f"{model.fingerprint} {asdict(replace(config, half=False))}"
        self.new_student()  # what cannot be made is said before long work

    def new_student(self) -> OperatorStudent:
        """One with the teacher's weights."""
        torch.manual_seed(self.config.seed)
        network: Any = copy.deepcopy(self.model.adapted.network)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.config.dropout
        return OperatorStudent(replace(self.model.adapted, network=network), self.grid.t, self.config.form).to(self.device)

    def teach(self, given: Trajectories | None, command: str) -> None:
        """The trajectories, and where the times of the grid are among theirs."""
        config, model = self.config, self.model
        check_checkpoint(self.work, self.identity)
        if given is None:
            request, folder = config.trajectories, self.work / "trajectories"
            told: Callable[[int, str], None] = lambda done, note: self.say(0, f"{done} of {request.num} teacher trajectories")  # noqa: E731
            generate_trajectories(model, self.grid, request, folder, device=self.device, command=command, observe=told)
            wait_for_all()  # the first process writes the manifest last
            given = Trajectories.load(folder)
        given.check(model=model.fingerprint, schedule=model.denoiser.schedule, shape=model.shape, guidance=config.guidance)
        if len(given) < config.num + config.held_out:
            wanted = f"{config.num} and {config.held_out} held out"
            raise ArtifactError(f"{given.folder} has {len(given)} trajectories, not {wanted}: ask for fewer")
        near = torch.isclose(self.grid.t[:, None], given.t, rtol=1e-9, atol=1e-12)
        if not bool(near.any(1).all()):
            lacking = ", ".join(f"{t:.6g}" for t in self.grid.t[~near.any(1)].tolist())
            raise ArtifactError(f"those in {given.folder} were not kept at t = {lacking}: name a grid of theirs, or make them again")
        self.trajectories, self.places = given, near.double().argmax(1).tolist()

    # -- training ---------------------------------------------------------------------------------------------------

    def train(self, begin: Model | None) -> tuple[OperatorStudent, list[tuple[int, float]], float]:
        """The trained student, its loss curve, and the seconds that it took in all."""
        student, config = self.new_student(), self.config
        identity = f"{self.identity} {self.trajectories.identity}"
        if begin is not None:
            assert isinstance(begin.denoiser.network, OperatorStudent)  # as was checked
            theirs, ours = begin.denoiser.network.state_dict(), student.state_dict()
            fitting = {name: value for name, value in theirs.items() if name in ours and ours[name].shape == value.shape}
            student.load_state_dict(fitting, strict=False)
            identity += f" from {begin.fingerprint}"
        curve = LossCurve(self.work / "curve.json", identity)
        student.requires_grad_(True)

        def observe(step: int, value: float) -> None:
            curve.add(step, value)
            self.say(step, f"loss {value:.3e}")

        student = run_loop(student, self.loss(student), config.loop, self.work, identity=identity, observe=observe).to(self.device)
        return student.requires_grad_(False), curve.points, curve.seconds

    def loss(self, student: OperatorStudent) -> Callable[[nn.Module, int, torch.Generator], Tensor]:
        """See the module's text; ``student`` itself may be wrapped in what is then called."""
        config, t = self.config, self.grid.t
        nodes = Nodes.at(self.model.denoiser.schedule, t)
        weight = WEIGHTS[config.weights](torch.exp(nodes.lam))

        def of_start(network: nn.Module, x: Tensor, cond: Cond, j: int) -> Tensor:
            """The loss of the slots below the time ``t_j``, from the trajectories ``x [b, M+1, *D]``."""
            states, later = network(x[:, j], t[j + 1 :], cond, t[j]), slice(j + 1, None)
            of_slot = (weight[later] / weight[later].mean()).to(x.dtype).to(x.device)
            if config.loss == "features":
                return (of_slot * self.feature_distance(states, x[:, later], nodes.alpha[later], nodes.sigma[later])).mean()
            scale = student.coefficients(t[j], t[later])[1].to(x.dtype).to(x.device)
            error = (states - x[:, later]) / scale.reshape(-1, *(1,) * (x.ndim - 2))
            return (of_slot * DISTANCES[config.loss](error)).mean()

        def loss(network: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
            x, cond = self.batch(batch, generator)
            device = next(network.parameters()).device  # that of the loop, which may be another
            x, cond = x.to(device), None if cond is None else cond.to(device)
            at_noise = max(1, round(batch * config.first)) if config.form.anywhere and config.slots > 1 else batch
            total = at_noise / batch * of_start(network, x[:at_noise], None if cond is None else cond[:at_noise], 0)
            if at_noise < batch:  # both in each step: one or the other in turn would shake the weights
                j = int(torch.randint(1, config.slots, (), generator=generator))
                rest = of_start(network, x[at_noise:], None if cond is None else cond[at_noise:], j)
                total = total + (1 - at_noise / batch) * rest
            return total

        return loss

    def feature_distance(self, states: Tensor, wanted: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Mean square distance of features ``[T]``, of the states scaled to unit size."""
        assert self.features is not None  # checked at the beginning
        norm = torch.sqrt(alpha**2 + sigma**2).to(states.dtype).to(states.device).reshape(-1, *(1,) * (states.ndim - 2))
        ours, theirs = (self.features((x / norm).flatten(0, 1)) for x in (states, wanted))
        return (ours - theirs).square().unflatten(0, (len(states), -1)).flatten(2).mean((0, 2))

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Cond]:
        """Trajectories ``[b, M+1, *D]`` at the times of the grid, and labels; some of them made now, if any are."""
        made = round(size * self.config.fresh)
        index = torch.randint(self.config.num, (size - made,), generator=generator)
        x, labels = self.trajectories.states(index, at=self.places), self.trajectories.labels(index)
        if not made:
            return x, labels
        seeds = torch.randint(FIRST_FRESH, 2 * FIRST_FRESH, (made,), generator=generator).tolist()
        fresh, theirs = self.solve(seeds)
        mixed = torch.randperm(size, generator=generator)
        return torch.cat([x, fresh])[mixed], None if labels is None or theirs is None else torch.cat([labels, theirs])[mixed]

    @cached_property
    def solver(self) -> TrajectorySolver:
        """Makes trajectories while training."""
        config = self.config.trajectories
        return TrajectorySolver(self.model.guided(config.guidance), make_solver(config.solver), self.grid, config.nfe)

    def solve(self, seeds: list[int]) -> tuple[Tensor, Tensor | None]:
        """The teacher's trajectories of these seeds at the times of the grid, on the CPU."""
        labels, start = self.model.labels(seeds), start_noise(self.solver.tableau.nodes, seeds, self.model.shape)
        states = self.solver.run(start.to(self.device), None if labels is None else labels.to(self.device))
        return torch.cat([start[:, None], states], 1), labels

    # -- what is measured -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, student: OperatorStudent, curve: list[tuple[int, float]], seconds: float) -> Distilled:
        """Errors on the trajectories held out."""
        config, t = self.config, self.grid.t
        nodes, most = Nodes.at(student.schedule, t), config.slots if config.form.anywhere else 1
        counts = [n for n in range(most) if config.slots <= 7 or n <= 2 or n == config.slots - 1]  # inner times: all 64 paths, or some
        paths = [(0, *inner, config.slots) for n in counts for inner in itertools.combinations(range(1, config.slots), n)]
        slot_error, path_error = torch.zeros(config.slots, dtype=torch.float64), torch.zeros(len(paths), dtype=torch.float64)
        for part in torch.arange(config.num, config.num + config.held_out).split(256):
            x, labels = self.trajectories.states(part, at=self.places).to(self.device), self.trajectories.labels(part)
            cond = None if labels is None else labels.to(self.device)
            error = (student(x[:, 0], t[1:], cond) - x[:, 1:]).double().cpu()
            slot_error += error.square().mean((0, *range(2, x.ndim))) * len(part) / config.held_out
            for k, path in enumerate(paths):
                here = x[:, 0]
                for i, j in itertools.pairwise(path):
                    here = student.jump(here, t[i], t[j], cond)
                path_error[k] += (here - x[:, -1]).double().square().mean().cpu() * len(part) / config.held_out
        passes: dict[int, tuple[list[float], float]] = {}
        for path, error in sorted(zip(paths, path_error.sqrt().tolist(), strict=True), key=lambda one: one[1]):
            passes.setdefault(len(path) - 1, (t[list(path)].tolist(), error))
        size = torch.sqrt(nodes.alpha[1:] ** 2 + nodes.sigma[1:] ** 2)
        costs = {n: student.arithmetic(passes[n][0]) for n in sorted(passes)}
        return Distilled(curve, (slot_error.sqrt() / size).tolist(), {n: passes[n] for n in sorted(passes)}, costs, seconds)


def _save(work: _Distilling, student: OperatorStudent, made: Distilled, out: Path, teacher: str, command: str) -> None:
    """The model folder: weights, what it was distilled from, its passes, and a card. ``tuned.json`` comes last."""
    model, config = work.model, work.config
    card = {
        "teacher": model.name,
        "fingerprint": model.fingerprint,
        "guidance": config.guidance,
        "trajectories": config.num,
        "sequential evaluations": list(made.passes),
        "arithmetic, in evaluations of the teacher": [round(cost, 2) for cost in made.arithmetic.values()],
        "RMSE to the teacher on trajectories held out": [round(error, 4) for _, error in made.passes.values()],
        "command": command,
    }
    student.card.update(card)
    network: Any = student.operator.unet
    network.register_to_config(_name_or_path=out.name)  # not a folder of this machine
    if config.half:
        student.operator.half()
    student.save(out)
    save_like(model, network, out)
    loaded = load_folder(out)
    grids = {n: TimeGrid(torch.tensor(times, dtype=torch.float64)) for n, (times, _) in made.passes.items()}
    GridTable("ddim", loaded.fingerprint, 1.0, student.schedule, grids, {"command": command}).save(out / "optimized" / "ddim")
    write_whole(out / "history.json", (json.dumps({"config": asdict(config), **asdict(made)}, indent=1) + "\n").encode())
    Tuned(teacher, model.fingerprint, config.guidance, "ddim", 1, "operator").save(out)
    forget_checkpoint(work.work)
