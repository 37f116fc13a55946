"""Train a small diffusion model on a set of images, and save it as a folder that the loaders read."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.domain import Cube
from fewstep.core.prediction import EDM
from fewstep.core.schedule import DiscreteVP, NoiseSchedule, VarianceExploding
from fewstep.data.images import Images
from fewstep.learn.networks.loop import LoopConfig, check_precision, forget_checkpoint, identity_of, run_loop
from fewstep.learn.networks.objectives.flow_map import FlowMapConfig, FlowMapObjective
from fewstep.learn.networks.objectives.objective import Networks
from fewstep.learn.networks.preconditioning import measure_preconditioning
from fewstep.learn.networks.score_matching import check_log_levels, score_matching
from fewstep.models.flow_map_student import FlowMapStudent
from fewstep.models.formats.folders import save_described, save_ours
from fewstep.models.model import Model
from fewstep.models.networks.calls import edm_time, network_device, unet_call
from fewstep.models.problem import Problem
from fewstep.runtime.artifact import check_writable, write_whole, written_apart
from fewstep.runtime.errors import FewstepError, look_up
from fewstep.runtime.front_door import at_least, check_fields, checked_class
from fewstep.runtime.process import default_device, process

__all__ = ["TrainConfig", "train"]

KINDS = ("edm", "ddpm", "flow-map", "reflected")
LEVELS = {"edm": (-0.6, 1.6), "reflected": (-1.0, 1.1)}  # mean and deviation of log sigma in training
CUBE = Cube()  # of pictures
WALLS = VarianceExploding(t_min=0.01, t_max=3.0)  # in a cube of edge 2: above 3 the law is uniform to 1.5e-5
MATCHING = FlowMapConfig(target="matching", first=0.2, last=0.4, anchor=0.5)  # half of the pairs of flow map matching are denoising
UNUSED = {"p_mean": KINDS[1:3], "p_std": KINDS[1:3], "label_dropout": KINDS[2:3], "flip": KINDS[2:3]}  # options that kinds do not have
USUAL: dict[str, Any] = dict(zip(("p_mean", "p_std"), LEVELS["edm"], strict=True))  # what kinds that do not have these options say of them
GROUPS = 16  # of channels, normalised together


@checked_class
@dataclass(frozen=True)
class TrainConfig:
    """Configure a network to train, and the noise levels that it is trained on.

    Args:
        kind: edm (preconditioned, continuous noise levels, saved with ``fewstep.json``), ddpm (epsilon prediction, 1000 linear betas,
            saved as a diffusers pipeline folder), flow-map (one network for any number of passes, from pictures alone and without a
            teacher: flow map matching, with EDM's preconditioning) or reflected (noise is folded back at the walls of the pixels' cube, so
            that samples stay inside at any guidance).
        conditional: condition on class labels, with a null label but for a flow map, which is not guided.
        label_dropout: share of labels that training replaces by the null label.
        channels: channels of each level; a level has half the height and width of the one before.
        layers: residual blocks of a level.
        dropout: dropout in the network's blocks.
        p_mean: mean of the log of the noise levels in training, for edm (-0.6 where none is named) and reflected (-1).
        p_std: standard deviation of that log (1.6 for edm, 1.1 for reflected).
        attention: heights of the feature maps that attend, beside the middle, which always does; by default the last level's.
        flip: mirror half of the images, left to right, anew each time.

    Raises:
        FewstepError: an unknown kind, or a number out of range.
    """

    kind: str
    conditional: bool = False
    label_dropout: float = 0.1
    channels: tuple[int, ...] = (48, 64)
    layers: int = 1
    dropout: float = 0.1
    p_mean: float | None = None
    p_std: float | None = None
    attention: tuple[int, ...] | None = field(default=None, repr=False)
    flip: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        look_up(self.kind, dict.fromkeys(KINDS), "kind of model", FewstepError)
        for name, usual in zip(("p_mean", "p_std"), LEVELS.get(self.kind, LEVELS["edm"]), strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)
        if not self.channels or any(width < 1 or width % GROUPS for width in self.channels):
            raise FewstepError(f"the channels of each level are a multiple of {GROUPS}, got {', '.join(map(str, self.channels)) or 'none'}")
        at_least(self, layers=1)
        if not 0 <= self.dropout < 1 or not 0 <= self.label_dropout <= 1:
            raise FewstepError(f"dropout lies in [0, 1), label_dropout in [0, 1], got {self.dropout} and {self.label_dropout}")
        ignored = [
            one
            for one in fields(self)
            if self.kind in UNUSED.get(one.name, ()) and getattr(self, one.name) != USUAL.get(one.name, one.default)
        ]
        if ignored:
            raise FewstepError(f"{ignored[0].name} changes nothing of the kind {self.kind}: leave it out, or train another kind")
        check_log_levels(*self.levels)
        low, high = WALLS.t_min, WALLS.t_max
        if self.kind == "reflected" and not math.log(low) < self.levels[0] < math.log(high):
            raise FewstepError(
                f"a reflected model has noise levels from {low:g} to {high:g}, so p_mean lies between {math.log(low):.3g} and "
                f"{math.log(high):.3g}, got {self.levels[0]:g}: half of the levels would be one of the ends"
            )

    @property
    def levels(self) -> tuple[float, float]:
        """The mean and the standard deviation of the log of the noise levels in training."""
        assert self.p_mean is not None and self.p_std is not None  # set at birth
        return self.p_mean, self.p_std

    def attends(self, height: int, width: int) -> list[bool]:
        """Return whether each level attends, for images of this size.

        Raises:
            FewstepError: images that cannot be halved so often, or attention at a height that no feature map has.
        """
        depth = len(self.channels)
        if height % 2 ** (depth - 1) or width % 2 ** (depth - 1):
            raise FewstepError(f"images of {height}x{width} cannot be halved {depth - 1} times: give --channels fewer levels")
        heights = [height >> level for level in range(depth)]
        if self.attention is None:
            return [False] * (depth - 1) + [True]
        if unknown := sorted(set(self.attention) - set(heights)):
            raise FewstepError(
                f"no feature maps are {unknown[0]} high to attend at: with these images they are {', '.join(map(str, heights))}"
            )
        return [size in self.attention for size in heights]


def train(
    images: Images, config: TrainConfig, loop: LoopConfig, out: Path, *, command: str, observe: Callable[[int, float], None] | None = None
) -> Path:
    """Train a network, save its EMA weights as a model folder and return that; a killed run continues from its last checkpoint.

    Raises:
        FewstepError: class-conditional training on images without labels; images that the network's levels do not fit, or that lie beyond
            the cube of a reflected model; an output folder that holds a finished model.
    """
    if (out / "unet").exists():  # written last of all
        raise FewstepError(f"{out} already holds a trained model: choose another folder, or remove it")
    if config.conditional and images.labels is None:
        raise FewstepError(f"{images.name} has no labels: train without --conditional")
    if float(images.x.std()) < 0.01:
        raise FewstepError(
            f"the images of {images.name} are all but constant (standard deviation {float(images.x.std()):.2g}): nothing to learn"
        )
    config.attends(*images.x.shape[2:])
    if config.kind == "reflected":
        CUBE.check(images.x, f"the images of {images.name}")
    check_writable(out)
    check_precision(loop)
    identity = f"{identity_of(config)}{images.identity}"
    network = _network(images, config)
    if config.kind == "flow-map":
        objective, student = _flow_map(network, images, config, loop)
        averaged = copy.deepcopy(student).eval().requires_grad_(False)

        def matching(network: nn.Module, size: int, generator: torch.Generator) -> Tensor:
            batch = objective.batch(None, size, generator).to(network_device(network))
            return objective.loss(Networks(network, averaged), batch, generator)

        trained = run_loop(student, matching, loop, out, identity=identity, averaged=averaged, observe=observe)
        if process()[0] == 0:
            with written_apart(out, last="unet") as scratch:
                objective.save(trained, scratch)
                write_whole(scratch / "README.md", _card(network, images, config, loop, command, out.name).encode())
            forget_checkpoint(out)
        return out
    model, levels = _model(network, images, config)
    null = None if images.labels is None else int(images.labels.max()) + 1
    labels = {"conditional": config.conditional, "null": null, "dropout": config.label_dropout}
    loss = score_matching(model, images, levels, **labels, flip=config.flip)
    result = run_loop(network, loss, loop, out, identity=identity, observe=observe)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return out
    _save(result, model, images, config, loop, out, command)
    forget_checkpoint(out)
    return out


def _network(images: Images, config: TrainConfig) -> nn.Module:
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(0)
    _, channels, height, width = images.x.shape
    attends = config.attends(height, width)
    classes = int(images.labels.max()) + 1 if config.conditional and images.labels is not None else None
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        norm_num_groups=GROUPS,
        attention_head_dim=math.gcd(32, config.channels[-1], *itertools.compress(config.channels, attends)),
        dropout=config.dropout,
        num_class_embeds=None if classes is None else classes + 1,  # the last one is the null label
    )


def _model(network: nn.Module, images: Images, config: TrainConfig) -> tuple[Model, Callable[[int, torch.Generator], Tensor]]:
    """Return the model to train, and a function that draws the times ``[b]`` of a batch."""
    schedule: NoiseSchedule
    mean, deviation = config.levels
    if config.kind == "edm":
        schedule = VarianceExploding()
        model = Model(network, schedule, EDM(round(float(images.x.std()), 2)), time=edm_time, call=unet_call)
        return model, lambda b, g: torch.exp(mean + deviation * torch.randn(b, generator=g))
    if config.kind == "reflected":
        null = int(images.labels.max()) + 1 if config.conditional and images.labels is not None else None
        facts: dict[str, Any] = {"shape": tuple(images.x.shape[1:]), "classes": null, "null_label": null}
        kind = measure_preconditioning(images, CUBE, WALLS)
        model = Model(network, WALLS, kind, time=edm_time, call=unet_call, domain=CUBE, **facts)
        return model, lambda b, g: torch.exp(mean + deviation * torch.randn(b, generator=g)).clamp(WALLS.t_min, WALLS.t_max)
    schedule = DiscreteVP.from_betas(torch.linspace(1e-4, 0.02, 1000))
    model = Model(network, schedule, "epsilon", call=unet_call)
    return model, lambda b, g: torch.randint(1000, (b,), generator=g).float()


def _flow_map(network: nn.Module, images: Images, config: TrainConfig, loop: LoopConfig) -> tuple[FlowMapObjective, FlowMapStudent]:
    """Return the objective of flow map matching (arXiv 2406.07505), and a new student to train."""
    null = int(images.labels.max()) + 1 if config.conditional and images.labels is not None else None
    shape, kind = tuple(images.x.shape[1:]), EDM(round(float(images.x.std()), 2))
    model = Model(network.eval(), VarianceExploding(), kind, shape=shape, time=edm_time, call=unet_call, classes=null, null_label=null)
    options = replace(MATCHING, steps=loop.steps, batch=loop.batch, seed=loop.seed, dropout=config.dropout)
    objective = FlowMapObjective(Problem(model, device=default_device()), options, images)
    return objective, objective.student().requires_grad_(True).train()


def _save(network: Any, model: Model, images: Images, config: TrainConfig, loop: LoopConfig, out: Path, command: str) -> None:  # noqa: ANN401
    with written_apart(out, last="unet") as scratch:  # whose presence says that the run is finished
        if config.kind == "ddpm":
            from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
            from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

            DDPMPipeline(network, DDPMScheduler(num_train_timesteps=1000, clip_sample=True)).save_pretrained(scratch)
        elif config.kind == "reflected":
            save_described(model, scratch, network)
        else:
            null = int(images.labels.max()) + 1 if config.conditional and images.labels is not None else None
            save_ours(scratch, network, model.prediction, model.schedule, list(images.x.shape[1:]), null)
        write_whole(scratch / "README.md", _card(network, images, config, loop, command, out.name).encode())


def _card(network: nn.Module, images: Images, config: TrainConfig, loop: LoopConfig, command: str, name: str) -> str:
    size = sum(p.numel() for p in network.parameters())
    rows = "\n".join(f"| {key} | {value} |" for key, value in {**asdict(config), **asdict(loop)}.items())
    return f"""# {name}

A small diffusion model of `{images.name}` ({len(images.x)} images, shape {tuple(images.x.shape[1:])}, pixels in [-1, 1],
dequantised while training), {size:,} parameters, EMA weights. Made by

```
{command}
```

| option | value |
|---|---|
{rows}

```python
import fewstep

model = fewstep.load_model("path/to/this/folder")
```
"""
