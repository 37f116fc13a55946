"""Train a network: AdamW, warm-up and cosine, EMA, checkpoints that resume exactly, any number of processes.

A second network may be trained beside it (`Companion`), and the weights may be chosen among those on the way (`Selection`).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep.runtime.artifact import Number, Whole, check_file, held_to, read_file, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError, first_line, look_up
from fewstep.runtime.front_door import at_least, check_fields, checked_class
from fewstep.runtime.process import from_first, process, share

__all__ = [
    "Companion",
    "LoopConfig",
    "LossCurve",
    "Selection",
    "check_checkpoint",
    "check_precision",
    "forget_checkpoint",
    "identity_of",
    "run_loop",
    "seeded",
    "step_of",
]

STRIDE = 4099  # between the seeds of steps


@checked_class
@dataclass(frozen=True)
class LoopConfig:
    """Configure the training loop.

    Args:
        steps: training steps.
        batch: samples in a step, over all processes.
        lr: learning rate at its peak; it rises linearly and falls as a cosine.
        warmup: steps in which the learning rate rises.
        weight_decay: weight decay of AdamW.
        clip: norm at which gradients are clipped.
        ema: decay of the averaged weights, which are saved.
        seed: seed of the data, the noise and dropout.
        checkpoint_every: steps between checkpoints.
        mixed_precision: no, bf16, fp16.
        compile: compile the network; for speed, and dropout may draw otherwise.
        channels_last: lay images out in memory with their channels last.

    Raises:
        FewstepError: a number out of range.
    """

    steps: int
    batch: int = 96
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    checkpoint_every: int = 500
    mixed_precision: str = "no"
    compile: bool = field(default=False, repr=False)
    channels_last: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, steps=1, batch=1, warmup=0, checkpoint_every=1)
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise FewstepError(f"lr, the learning rate, is a positive number, got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise FewstepError(f"weight_decay is a finite number, not negative, got {self.weight_decay}")
        if not self.clip > 0:  # a negative norm would turn gradients round
            raise FewstepError(f"clip, the norm at which gradients are clipped, is above 0, got {self.clip}: inf clips none")
        if not 0 <= self.ema < 1:
            raise FewstepError(f"the decay of averaged weights lies in [0, 1), got {self.ema}")
        look_up(self.mixed_precision, dict.fromkeys(("no", "bf16", "fp16")), "mixed precision", FewstepError)
        if abs(self.seed) >= 2**31:
            raise FewstepError(f"a seed of training lies below 2^31, got {self.seed}")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then half a cosine to 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


def identity_of(config: Any) -> str:  # noqa: ANN401 - any dataclass
    """Return what a checkpoint stores of a configuration: its ``repr``, and those fields hidden from it that are not at their default.

    A field that is added later with ``repr=False`` thus leaves older checkpoints valid.
    """
    later = [f"{one.name}={value!r}" for one in fields(config) if not one.repr and (value := getattr(config, one.name)) != one.default]
    return " ".join([repr(config), *later])


def seeded(seed: int, step: int, part: int = 0) -> torch.Generator:
    """Return the generator of a training step, or of one of its parts, fewer than 4099: the updates of a companion."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * STRIDE + part)


def step_of(generator: torch.Generator, seed: int) -> int:
    """Return the training step that a generator was `seeded` for."""
    return generator.initial_seed() // STRIDE - seed * 1_000_003


@dataclass(frozen=True)
class Companion:
    """A second network that is trained within each step of the loop, before the first one, and lies in the same checkpoint.

    Attributes:
        network: the module, which is trained in place by AdamW.
        loss: ``(network, companion, batch size, generator) -> scalar``, the mean over this process's `share` of the batch. No gradient of
            it reaches the first network.
        lr: the learning rate at the start.
        updates: its steps for each of the first network, below 1000.
        before: its steps before the first of all, below 1000.
        betas: decays of AdamW's moments.
        end: the learning rate at the end of the run, in that at the start; it falls as half a cosine.
    """

    network: nn.Module
    loss: Callable[[nn.Module, nn.Module, int, torch.Generator], Tensor]
    lr: float
    updates: int = 1
    before: int = 0
    betas: tuple[float, float] = (0.9, 0.99)
    end: float = 1.0

    def lr_at(self, step: int, steps: int) -> float:
        """Return its learning rate in a step of the loop, of so many."""
        return self.lr * (self.end + (1 - self.end) * 0.5 * (1 + math.cos(math.pi * step / steps)))

    def updates_at(self, step: int) -> int:
        """Return its number of updates in a step of the loop."""
        return self.updates + (self.before if step == 0 else 0)


@dataclass
class Selection:
    """Choose the weights that a run ends with among the averaged ones that it had on its way, by a measure.

    Attributes:
        measure: ``network -> figures``, plain numbers by name, of which ``value`` is to be least.
        every: steps between measures; the start and the end are measured, too.
        scores: the figures of each measure, with its ``step``.
    """

    measure: Callable[[nn.Module], dict[str, Any]]
    every: int
    scores: list[dict[str, Any]] = field(default_factory=list)
    _weights: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def chosen(self) -> dict[str, Any]:
        """The figures with the least ``value``; the earliest of equal ones."""
        return min(self.scores, key=lambda one: one["value"])

    def due(self, step: int, steps: int) -> bool:
        """Return whether the weights after so many of ``steps`` steps are to be measured, and have not been."""
        return (step % self.every == 0 or step == steps) and all(one["step"] != step for one in self.scores)

    def take(self, step: int, network: nn.Module) -> None:
        """Measure a network, and remember its weights if they are the best.

        Raises:
            ArtifactError: its value is not finite.
        """
        figures = {"step": step, **self.measure(network)}
        if not math.isfinite(figures["value"]):
            raise ArtifactError(f"the measure of the network is not finite after {step} steps: lower lr, or raise updates")
        self.scores.append(figures)
        if self.chosen is figures:
            self._weights = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}

    def give(self, network: nn.Module) -> None:
        """Give a network the chosen weights."""
        network.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        return {"scores": self.scores, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what a checkpoint kept."""
        self.scores, self._weights = list(state["scores"]), state["weights"]


N = TypeVar("N", bound=nn.Module)


def run_loop(
    network: N,
    loss: Callable[[nn.Module, int, torch.Generator], Tensor],
    config: LoopConfig,
    folder: Path,
    *,
    identity: str = "",
    averaged: nn.Module | None = None,
    companion: Companion | None = None,
    selection: Selection | None = None,
    observe: Callable[[int, float], None] | None = None,
    in_memory: bool = False,
    mend: Callable[[], str | None] = lambda: None,
) -> N:
    """Train a network and return it with its averaged (EMA) weights.

    Every step draws its data and noise from a generator seeded by ``(seed, step)``, so a run that was killed and resumed ends with the same
    weights as one that was not. The processes of ``torchrun`` draw alike, each computes its share of the batch, and gradients are averaged:
    any number of them makes the steps of one, up to rounding and dropout, and continues what another number began. The checkpoint lies in
    ``folder/checkpoint``; `forget_checkpoint` removes it when the result is saved.

    Args:
        network: the module to train, in place.
        loss: ``(network, batch size, generator) -> scalar``, the mean over this process's `share` of the batch.
        config: how to train.
        folder: where the checkpoint lies.
        identity: what is trained on what, beside the configuration; a checkpoint of anything else is refused.
        averaged: a copy of the network, which has the averaged weights whenever ``loss`` is called.
        companion: a second network, which is trained first in each step.
        selection: chooses among the averaged weights on the way; by default the last are returned.
        observe: called with the step and the mean loss since the last call, about 100 times a run.
        in_memory: whether the folder goes with the run.
        mend: says how to mend a loss that is not finite; None stands for a lower learning rate.

    Raises:
        ArtifactError: the folder holds a checkpoint of a run with another configuration; the loss is not finite.
        FewstepError: this machine has no such precision; there are more processes than samples in a batch, or accelerate knows of others; a
            companion in fp16.
    """
    from diffusers.training_utils import EMAModel

    (rank, world), mine = process(), len(share(range(config.batch)))
    check_precision(config, pair=companion is not None)
    accelerator = _accelerator(config)
    if config.channels_last:
        loose: Any = network  # torch's types do not know this form of ``to``
        network = loose.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    bare, own = network, set(vars(network))
    prepared: Any = accelerator.prepare(network, optimizer)
    network, optimizer = prepared
    if config.compile:
        bare.compile()
    many = accelerator.device.type == "cuda"  # one kernel for all tensors
    ema = EMAModel(bare.parameters(), decay=config.ema, use_ema_warmup=True, power=0.75, foreach=many)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    both: tuple[Any, Any] = (None, None) if companion is None else _prepared(accelerator, companion)
    second, second_optimizer = both
    if selection is not None:
        accelerator.register_for_checkpointing(selection)
    identity = f"{identity} {identity_of(config)}".strip()
    if averaged is not None:
        averaged.to(accelerator.device)
    first, resumed, part = _resume(accelerator, folder, identity, config.steps)
    every, counted = max(1, config.steps // 100), first % max(1, config.steps // 100)
    total = torch.tensor(resumed, device=accelerator.device)
    if resumed and (not counted or first == config.steps):  # interrupted before the report of its last step was taken
        reduced: Any = accelerator.reduce(total / (counted or every), "mean")
        if observe is not None and accelerator.is_main_process:
            observe(first, float(reduced))
        total, counted = torch.zeros_like(total), 0
    network.train()
    done, whole = first, True

    def measured(step: int) -> None:
        if selection is None or not selection.due(step, config.steps):
            return
        ema.store(bare.parameters())
        try:
            ema.copy_to(bare.parameters())
            with torch.no_grad():
                selection.take(step, bare.eval())
        finally:
            ema.restore(bare.parameters())
            bare.train()

    try:
        for step in range(first, config.steps):
            if not part:
                measured(step)
            if companion is not None:
                for group in second_optimizer.param_groups:
                    group["lr"] = companion.lr_at(step, config.steps)
            while companion is not None and part < companion.updates_at(step):
                generator = seeded(config.seed, step, 1 + part)
                torch.manual_seed(generator.initial_seed() + rank)
                value = companion.loss(network, second, config.batch, generator) * (mine * world / config.batch)
                accelerator.backward(value)
                accelerator.clip_grad_norm_(second.parameters(), config.clip)
                whole = False
                second_optimizer.step()
                second_optimizer.zero_grad()
                part += 1
                whole = True
            generator = seeded(config.seed, step)
            torch.manual_seed(generator.initial_seed() + rank)  # dropout
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step)
            if averaged is not None:
                ema.copy_to(averaged.parameters())
            value = loss(network, config.batch, generator) * (mine * world / config.batch)  # whose mean over processes is that over samples
            accelerator.backward(value)
            accelerator.clip_grad_norm_(network.parameters(), config.clip)
            whole = False
            optimizer.step()
            optimizer.zero_grad()
            ema.step(bare.parameters())
            total, counted, done, part = total + value.detach(), counted + 1, step + 1, 0
            whole = True
            if (step + 1) % every == 0 or step + 1 == config.steps:
                reduced = accelerator.reduce(total / counted, "mean")
                mean = float(reduced)
                if not math.isfinite(mean):
                    how = mend() or ("lower lr" if companion is None else "lower lr, or raise updates")
                    kept = not in_memory and (folder / "checkpoint").exists()
                    last = f"; the last checkpoint is kept in {folder}" if kept else ""
                    raise ArtifactError(f"the loss is not finite at step {step + 1}: {how}{last}")
                if observe is not None and accelerator.is_main_process:
                    observe(step + 1, mean)
                total, counted = torch.zeros_like(total), 0
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                _checkpoint(accelerator, folder, identity, step + 1, total)
        measured(config.steps)
    except KeyboardInterrupt:
        if whole and world == 1:  # else the last checkpoint stands: others may be at another step, or gone
            _checkpoint(accelerator, folder, identity, done, total, part)
        raise
    ema.copy_to(bare.parameters())
    if selection is not None:
        selection.give(bare)
    accelerator.wait_for_everyone()
    bare._compiled_call_impl = None
    trained = accelerator.unwrap_model(bare, keep_fp32_wrapper=False).eval()
    for mark in {"_is_accelerate_prepared", "forward"} & set(vars(trained)) - own:  # they would tell it from a network that is loaded
        delattr(trained, mark)
    return trained.to(memory_format=torch.contiguous_format) if config.channels_last else trained


def _prepared(accelerator: Any, companion: Companion) -> tuple[Any, Any]:  # noqa: ANN401
    """Return a companion and its optimiser as accelerate runs and saves them."""
    companion.network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(companion.network.parameters(), lr=companion.lr, betas=companion.betas, weight_decay=0.0)
    return accelerator.prepare(companion.network, optimizer)


def check_precision(config: LoopConfig, *, pair: bool = False) -> None:
    """Refuse, before long work, a precision that training would not have.

    Args:
        config: how to train.
        pair: whether two networks are trained together.

    Raises:
        FewstepError: fp16 without a GPU, where accelerate would train in float32 and not say so; or of two networks, since one scale of the
            loss for two optimisers would not be right.
    """
    if config.mixed_precision != "fp16":
        return
    if pair:
        raise FewstepError("two networks are not trained together in fp16: use bf16, or no")
    if not torch.cuda.is_available():
        raise FewstepError("no training in fp16 on this machine: it needs a GPU; use bf16, or no")


def _accelerator(config: LoopConfig) -> Any:  # noqa: ANN401
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # another run of this process may have had another precision
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available())
    except ValueError as error:
        raise FewstepError(f"no training in {config.mixed_precision} on this machine: {first_line(error)}") from error
    if accelerator.num_processes != process()[1]:  # each would train on its share, and nobody average
        raise FewstepError(
            f"{process()[1]} processes were started, and accelerate knows of {accelerator.num_processes}: start them with torchrun, or set "
            "LOCAL_RANK in each"
        )
    return accelerator


@dataclass(frozen=True)
class _Curve:
    """The fields of ``curve.json``."""

    identity: str
    seconds: Number
    loss: list[tuple[Whole, Number]]


@dataclass(frozen=True)
class _Checkpoint:
    """The fields of ``loop.json``: steps done, the sum of the losses since the last report, what is trained on what, and the updates of a
    companion that are done of the next step.
    """

    step: Whole
    identity: str
    loss: Number = 0.0
    part: Whole = 0


class LossCurve:
    """The loss curve of a run, written to disk point by point; a continued run overwrites the steps that it repeats."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity, self.began = path, identity, time.monotonic()
        self.points, self.before = list[tuple[int, float]](), 0.0  # (step, mean loss since the one before)
        if path.exists():
            meta = held_to(read_file(path), _Curve, path)
            if meta.identity == identity:
                self.points, self.before = meta.loss, meta.seconds

    @property
    def seconds(self) -> float:
        """Training time of all runs together."""
        return self.before + time.monotonic() - self.began

    def add(self, step: int, value: float) -> None:
        """Add a point, and drop later ones, which a killed run has left."""
        self.points = [point for point in self.points if point[0] < step] + [(step, value)]
        write_whole(self.path, json.dumps(asdict(_Curve(self.identity, self.seconds, self.points))).encode())


def check_checkpoint(folder: Path, begins: str) -> None:
    """Refuse, before long work, a folder that holds a checkpoint whose identity begins otherwise.

    Raises:
        ArtifactError: it holds one.
    """
    for found in (folder / "checkpoint", folder / "checkpoint.old"):
        if (found / "loop.json").exists() and not (identity := _read_checkpoint(found).identity).startswith(begins):
            raise ArtifactError(f"{found} belongs to another run ({identity}): remove it, or train with those options")


def _read_checkpoint(folder: Path) -> _Checkpoint:
    return held_to(read_file(folder / "loop.json"), _Checkpoint, folder / "loop.json")


def forget_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a finished run, and any half-written one that a kill left."""
    for name in ("checkpoint", "checkpoint.new", "checkpoint.old"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _checkpoint(accelerator: Any, folder: Path, identity: str, step: int, total: Tensor, part: int = 0) -> None:  # noqa: ANN401
    """Save a checkpoint beside the old one, then swap them, so that a whole one exists at any time."""
    new, current, old = folder / "checkpoint.new", folder / "checkpoint", folder / "checkpoint.old"
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(new))
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's own writer raises RuntimeError
        raise ArtifactError(f"cannot write {new}: {first_line(error)}; make room and run the same command again") from error
    total = accelerator.reduce(total, "mean")
    if accelerator.is_main_process:
        write_whole(new / "loop.json", json.dumps(asdict(_Checkpoint(step, identity, float(total), part))).encode())
        shutil.rmtree(old, ignore_errors=True)
        if current.exists():
            current.rename(old)
        new.rename(current)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _resume(accelerator: Any, folder: Path, identity: str, steps: int) -> tuple[int, float, int]:  # noqa: ANN401
    """Return the step to continue with, the sum of the losses since the last report, and the updates of a companion that are done of it."""
    current, old = folder / "checkpoint", folder / "checkpoint.old"
    found = from_first(next((path for path in (current, old) if process()[0] == 0 and (path / "loop.json").exists()), None))
    if found is None:
        return 0, 0.0, 0
    meta = _read_checkpoint(found)
    if meta.identity != identity:
        raise ArtifactError(f"{found} belongs to another run ({meta.identity}): remove it, or train with those options")
    try:
        if meta.step > steps:
            raise ValueError(f"{meta.step} of {steps} steps are done")
        for path in found.iterdir():
            check_file(path)
            if path.name.startswith("custom_checkpoint_"):  # accelerate opens these as pickles that may run anything: weights alone pass
                torch.load(path, map_location="cpu", weights_only=True)
        accelerator.load_state(str(found))
    except Exception as error:  # a damaged file makes pickle and torch raise almost anything
        raise ArtifactError(f"{found} is damaged ({first_line(error)}): remove it and run the same command again") from error
    return meta.step, meta.loss, meta.part
