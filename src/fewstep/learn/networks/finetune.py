r"""Phase 2 of few-step schedule optimisation (Huang, arXiv 2412.10786): tune the network on the steps it will take, and alternate.

Phase 1 chooses the schedule for which the outputs ``D(z_i; s_i)`` are nearest to the means ``Dbar_i`` of the teacher's output over each
step. Phase 2 lowers the same bound over the weights: with ``D_theta(z_i; s_i) = Dbar_i`` the first-order steps are exact. No quadrature is
needed, since ``(1 - r_i) Dbar_i = z_{i-1} - r_i z_i`` for the teacher's states, so the loss of a step, weighted by ``(1 - r_i)^2``, is

    | r_i z_i + (1 - r_i) D_theta(z_i; s_i) - z_{i-1} |^2,

how far it lands from the teacher. ``z_i`` is the teacher's state, or where the student itself has come to: then it learns to come back.
The paper's own form goes on with denoising score matching, at the scheduled levels only.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import aligned
from fewstep.core.tableau import Nodes
from fewstep.data.images import Images
from fewstep.learn.networks.loop import LoopConfig, forget_checkpoint, run_loop
from fewstep.learn.networks.train import score_matching
from fewstep.learn.search.bound import Bound
from fewstep.learn.teacher.gram import Gram, GramConfig, collect_gram, fine_grid
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, generate_trajectories
from fewstep.models.denoiser import AdaptedDenoiser
from fewstep.models.formats.folders import Model, load_folder, save_like
from fewstep.models.tuned import Tuned
from fewstep.runtime.artifact import check_writable, read_json, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError, GridError, ModelError
from fewstep.sampling.grid_table import GridTable
from fewstep.sampling.loop import sample
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import DDIM

__all__ = ["FinetuneConfig", "Round", "finetune"]

Loss = Callable[[nn.Module, int, torch.Generator], Tensor]


@dataclass(frozen=True)
class FinetuneConfig:
    """How to tune a network for ``nfe`` first-order steps.

    Args:
        rounds: of training and schedule search, at most; fewer if one gains less than ``enough``.
        steps, batch, lr: of the training in each round.
        form: ``mean`` regresses onto the interval means, ``score`` is the paper's denoising score matching (which needs data).
        states: where the regression looks: the student's ``own`` states or the ``teacher``'s.
        num: teacher trajectories to learn from.
        held_out: others, which measure.
        levels: cells between the levels at which their states are kept, and schedules sought.
        teacher_nfe: evaluations of the teacher per trajectory.
        seed: of the first trajectory; far from those that benchmarks start with.
        half: save the weights in float16.

    Raises:
        FewstepError: a number out of range, an unknown form.
    """

    nfe: int = 4
    rounds: int = 3
    steps: int = 200
    batch: int = 128
    lr: float = 3e-4
    form: Literal["mean", "score"] = "mean"
    states: Literal["own", "teacher"] = "own"
    guidance: float = 1.0
    num: int = 4096
    held_out: int = 512
    levels: int = 32
    teacher_nfe: int = 64
    seed: int = 1_000_000
    enough: float = 0.01
    half: bool = False

    def __post_init__(self) -> None:
        if min(self.nfe, self.rounds, self.steps, self.batch, self.num) < 1 or self.held_out < 2 or self.lr <= 0:
            raise FewstepError(f"tuning needs nfe, rounds, steps, batch and num of at least 1 and 2 trajectories held out, got {self}")
        if self.form not in ("mean", "score") or self.states not in ("own", "teacher"):
            raise FewstepError(f"the form is mean or score and the states are own or teacher, got {self.form!r} and {self.states!r}")
        if self.form == "score" and self.guidance != 1:
            raise FewstepError("score matching learns the data, not what guidance makes of it: use the form mean, or guidance 1")
        if self.seed < 0:
            raise FewstepError(f"the seed must be at least 0, got {self.seed}")
        _ = self.loop
        if self.nfe > self.levels:
            raise GridError(f"{self.nfe} steps need at least as many levels, got {self.levels}: ask for more levels or fewer steps")

    @property
    def loop(self) -> LoopConfig:
        """That of one round."""
        warmup = min(50, self.steps // 4)
        return LoopConfig(self.steps, self.batch, self.lr, warmup=warmup, seed=self.seed, checkpoint_every=100)


@dataclass(frozen=True)
class Round:
    """What a round reached: the bound of its schedule before training, after it, and of the schedule that is best then."""

    number: int
    noise_levels: list[float]
    bound_before: float
    bound_trained: float
    bound: float
    rmse: float  # to the teacher's ends, held-out trajectories, on the schedule that is best then
    next_times: list[float]
    seconds: float


def finetune(
    model: Model,
    config: FinetuneConfig,
    out: str | Path,
    *,
    teacher: str = "",
    images: Images | None = None,
    device: torch.device | None = None,
    command: str = "",
    observe: Callable[[int, str], None] | None = None,
) -> list[Round]:
    """Tune a copy of the model's network; ``out`` becomes a model folder that knows its teacher and carries its schedule and sampler.

    A killed run continues where it was. The teacher's own weights are never changed.

    Args:
        teacher: how `load_model` finds the teacher; by default its folder or name.
        images: for the form ``score``.
        observe: called with the number of training steps done in all rounds, and a note.

    Raises:
        FewstepError: ``out`` holds a finished model, or there are no images to match scores on.
        ModelError: the network is not one that this library can save.
        ArtifactError: the folder holds the work of another configuration, or cannot be written.
    """
    out, device, say = Path(out), device or torch.device("cpu"), observe or (lambda done, note: None)
    if (out / "tuned.json").exists():
        raise FewstepError(f"{out} already holds a tuned model: choose another folder, or remove it")
    if (out / "unet").exists() and not (out / "work").exists():
        raise FewstepError(f"{out} already holds a model, which would be lost: choose another folder")
    if config.form == "score" and images is None:
        raise FewstepError("the form score matches scores on images: pass the data that the model was trained on, or use the form mean")
    if config.form == "score" and images is not None:
        _check_images(images, model)
    if not isinstance(model.adapted.network, nn.Module) or model.folder is None:
        raise ModelError(f"{model.name} was not loaded from a folder, so its tuned network could not be saved as one: save it first")
    check_writable(out)
    tuning = _Tuning(model, config, out, images, device, say)
    history = tuning.alternate(command)
    _save(tuning, history, out, teacher or (model.name if model.data else str(model.folder.resolve())), command)
    return history


def _check_images(images: Images, model: Model) -> None:
    if tuple(images.x.shape[1:]) != tuple(model.shape):
        raise FewstepError(
            f"the images of {images.name} have shape {tuple(images.x.shape[1:])}, those of {model.name} {tuple(model.shape)}"
        )
    if model.classes is not None and (images.labels is None or int(images.labels.max()) >= model.classes):
        raise FewstepError(
            f"{model.name} has labels 0 to {model.classes - 1}, and {images.name} has none or others: pass images with these"
        )


class _Tuning:
    """A student, its teacher's trajectories, and the alternation."""

    def __init__(
        self, model: Model, config: FinetuneConfig, out: Path, images: Images | None, device: torch.device, say: Callable[[int, str], None]
    ) -> None:
        self.model, self.config, self.out, self.images, self.device, self.say = model, config, out, images, device, say
        self.work, self.schedule = out / "work", model.denoiser.schedule
        self.network: nn.Module = copy.deepcopy(model.to(device).denoiser.network)  # pyright: ignore - a module, as was checked

    def alternate(self, command: str) -> list[Round]:
        """Schedule, weights, schedule, ... until a round gains too little."""
        config = self.config
        identity = f"{self.model.fingerprint} {asdict(replace(config, rounds=1, enough=0.0, half=False))}"
        if config.form == "score" and self.images is not None:
            identity += f" on {self.images.name} {tuple(self.images.x.shape)}, mean {float(self.images.x.double().mean()):.12f}"
        self.trajectories, self.grid = self._teach(command)
        self.nodes = Nodes.at(self.schedule, self.grid.t)
        best = Bound(self.gram()).best(config.nfe)[config.nfe]
        index, reached, history = best, Bound(self.gram())(best), list[Round]()
        for number in range(1, config.rounds + 1):
            folder = self.work / f"round-{number}"
            made = self._resume(folder, f"{identity} {number}")
            if made is None:
                begin = time.monotonic()
                self._train(index, folder, f"{identity} {index}", (number - 1) * config.steps)
                bound = Bound(self.gram())
                best = bound.best(config.nfe)[config.nfe]
                levels = torch.exp(-self.nodes.lam[index]).tolist()
                error, times = self.rmse(best), self.grid.t[best].tolist()
                made = Round(number, levels, reached, bound(index), bound(best), error, times, time.monotonic() - begin)
                self._keep(folder, f"{identity} {number}", made)
            history.append(made)
            index = [int((self.grid.t == t).nonzero()) for t in made.next_times]
            if made.bound > reached and number > 1:  # worse than the round before: back to that
                history.pop()
                self._resume(self.work / f"round-{number - 1}", f"{identity} {number - 1}")
                break
            gained, reached = 1 - made.bound / reached, made.bound
            if gained < config.enough:
                break
        return history

    def _teach(self, command: str) -> tuple[Trajectories, TimeGrid]:
        """The teacher's trajectories, kept at the levels of its own best schedule of many first-order steps: close where it changes."""
        config, fine = self.config, GramConfig(num=128)
        told: Callable[[int, str], None] = lambda done, note: self.say(0, f"{done} of {fine.num} trajectories for the levels")  # noqa: E731
        gram = collect_gram(self.model, fine, self.work, guidance=config.guidance, device=self.device, observe=told)
        levels = fine_grid(self.schedule, fine.levels)
        kept = min(config.levels, levels.steps)
        if gram is None:
            raise FewstepError("the levels are chosen by one process: begin without torchrun, and interrupt when training begins")
        grid = TimeGrid(levels.t[Bound(gram).best(kept)[kept]])
        wanted = TrajectoryConfig(config.num + config.held_out, config.teacher_nfe, seed=config.seed, guidance=config.guidance)
        told = lambda done, note: self.say(0, f"{done} of {wanted.num} teacher trajectories")  # noqa: E731
        made = generate_trajectories(
            self.model, grid, wanted, self.work / "trajectories", device=self.device, command=command, observe=told
        )
        assert made is not None  # one process
        return made, grid

    # -- what is measured -------------------------------------------------------------------------------------------

    @property
    def student(self) -> AdaptedDenoiser:
        """The network as it stands, as a denoiser."""
        return replace(self.model.adapted, network=self.network)

    def held_out(self) -> list[int]:
        """The trajectories that no training sees."""
        return list(range(self.config.num, self.config.num + self.config.held_out))

    @torch.no_grad()
    def gram(self) -> Gram:
        """The Gram matrix of the student's outputs at the teacher's states."""
        self.network.eval()
        total = Gram.empty(torch.exp(-self.nodes.lam))
        for part in torch.tensor(self.held_out()).split(128):
            x, cond = self._batch(part)
            outputs = torch.stack([self.student(state, t, cond) for state, t in zip(x, self.nodes.t, strict=True)])
            total.merge(Gram.of(self.nodes, x, outputs))
        return total

    @torch.no_grad()
    def rmse(self, index: list[int]) -> float:
        """The student's error to its teacher's ends."""
        self.network.eval()
        sampler, square = Sampler.build(DDIM(), TimeGrid(self.grid.t[index]), self.schedule), 0.0
        for part in torch.tensor(self.held_out()).split(128):
            x, cond = self._batch(part)
            square += float((sample(self.student, sampler, x[0], cond) - x[-1]).double().square().mean() * len(part))
        return (square / self.config.held_out) ** 0.5

    def _batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """States ``[T, b, *D]`` and conditions."""
        labels = self.trajectories.labels(index)
        return self.trajectories.states(index).transpose(0, 1).to(self.device), None if labels is None else labels.to(self.device)

    # -- training ---------------------------------------------------------------------------------------------------

    def _train(self, index: list[int], folder: Path, identity: str, before: int) -> None:
        t = self.grid.t[index]
        loss: Loss = self.landing(index)
        if self.config.form == "score" and self.images is not None:
            draw: Callable[[int, torch.Generator], Tensor] = lambda b, g: t[torch.randint(len(t) - 1, (b,), generator=g)].float()  # noqa: E731
            loss = score_matching(
                self.model.adapted, self.images, draw, conditional=self.model.classes is not None, null=self.model.null_label
            )
        if self.config.form == "mean":
            for module in self.network.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0  # its targets are exact: noise would only blur them
        told: Callable[[int, float], None] = lambda step, value: self.say(before + step, f"loss {value:.2e}")  # noqa: E731
        self.network.requires_grad_(True)
        self.network = run_loop(self.network, loss, self.config.loop, folder, identity=identity, observe=told).to(self.device)
        self.network.requires_grad_(False)

    def landing(self, index: list[int]) -> Loss:
        """How far each step of the schedule lands from the teacher, summed over the steps."""
        at = Nodes.at(self.schedule, self.grid.t[index])
        ratio = at.sigma[1:] / at.sigma[:-1]  # x' = ratio x + gain D, the first-order step
        gain = at.alpha[1:] - ratio * at.alpha[:-1]

        def loss(network: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
            denoiser = replace(self.model.adapted, network=network)
            device = next(network.parameters()).device  # that of the loop, which may be another
            x, cond = self._batch(torch.randint(self.config.num, (batch,), generator=generator))
            x, cond = x.to(device), None if cond is None else cond.to(device)
            states = x[index]
            here, total = states[0], torch.zeros((), device=x.device)
            for i in range(len(ratio)):
                there = aligned(ratio[i], here) * here + aligned(gain[i], here) * denoiser(here, at.t[i], cond)
                total = total + ((there - states[i + 1]) / aligned(at.alpha[i + 1], here)).square().mean()
                here = there.detach() if self.config.states == "own" else states[i + 1]
            return total

        return loss

    # -- rounds on disk ---------------------------------------------------------------------------------------------

    def _keep(self, folder: Path, identity: str, made: Round) -> None:
        torch_state: Any = self.network
        torch_state.save_pretrained(folder / "unet")
        write_whole(folder / "round.json", (json.dumps({"identity": identity, **asdict(made)}, indent=1) + "\n").encode())
        forget_checkpoint(folder)

    def _resume(self, folder: Path, identity: str) -> Round | None:
        if not (folder / "round.json").exists():
            return None
        meta = read_json(folder / "round.json")
        if meta.pop("identity", None) != identity:
            raise ArtifactError(f"{folder} is a round of another tuning: remove {self.work}, or use another folder")
        kind: Any = type(self.network)
        self.network = kind.from_pretrained(folder / "unet", use_safetensors=True, low_cpu_mem_usage=False).to(self.device).eval()
        return Round(**meta)


def _save(tuning: _Tuning, history: list[Round], out: Path, teacher: str, command: str) -> None:
    """The model folder: weights, what it was tuned for, its schedule and sampler, and a card. ``tuned.json`` comes last."""
    model, config = tuning.model, tuning.config
    network: Any = tuning.network
    network.register_to_config(_name_or_path=out.name)  # not a folder of this machine
    save_like(model, network.half() if config.half else network, out)
    tuned = Tuned(teacher, model.fingerprint, config.guidance, "ddim", config.nfe, config.form)
    student = load_folder(out)
    grid = TimeGrid(torch.tensor(history[-1].next_times, dtype=torch.float64))
    card = {"name": "ddim", "of": out.name, "model": student.fingerprint, "guidance": 1.0, "rmse": history[-1].rmse, "command": command}
    Sampler.build(DDIM(), grid, tuning.schedule, **card).save(out / "sampler")
    GridTable("ddim", student.fingerprint, 1.0, tuning.schedule, {config.nfe: grid}, card).save(out / "optimized" / "ddim")
    write_whole(out / "history.json", (json.dumps([asdict(made) for made in history], indent=1) + "\n").encode())
    write_whole(out / "README.md", _card(model, config, history, out.name, command).encode())
    tuned.save(out)


def _card(model: Model, config: FinetuneConfig, history: list[Round], name: str, command: str) -> str:
    rows = "\n".join(
        f"| {r.number} | {', '.join(f'{s:.4g}' for s in r.noise_levels)} | {r.bound_before:.4f} | {r.bound_trained:.4f} | {r.bound:.4f} | "
        f"{r.rmse:.4f} |"
        for r in history
    )
    options = "\n".join(f"| {key} | {value} |" for key, value in asdict(config).items())
    return f"""# {name}

`{model.name}` (fingerprint {model.fingerprint}) tuned to sample in {config.nfe} first-order steps: its network lands where the
teacher would be after each step. Made by

```
{command}
```

| round | noise levels trained on | bound before | after training | on the schedule that is best then | RMSE to the teacher |
|---|---|---|---|---|---|
{rows}

RMSE on {config.held_out} trajectories that no training saw.

| option | value |
|---|---|
{options}

```
fewstep sample {name} --out runs/sample
fewstep bench {name} --nfe {config.nfe} --out runs/bench
```
"""
