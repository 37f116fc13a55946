"""The reference trainer: a small diffusion model on a set of images, as a folder that the loaders read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.prediction import EDM, aligned, from_x0, prediction
from fewstep.core.schedule import DiscreteVP, NoiseSchedule, VarianceExploding
from fewstep.data.images import Images
from fewstep.learn.networks.loop import LoopConfig, forget_checkpoint, identity_of, run_loop
from fewstep.models.denoiser import AdaptedDenoiser, edm_time, unet_call
from fewstep.models.formats.folders import save_ours
from fewstep.runtime.artifact import check_writable, write_whole
from fewstep.runtime.errors import FewstepError

__all__ = ["TrainConfig", "score_matching", "train"]

GROUPS = 16  # of channels, normalised together


@dataclass(frozen=True)
class TrainConfig:
    """What to train. ``kind`` is ``edm`` (preconditioned, continuous noise levels, saved with ``fewstep.json``) or ``ddpm``
    (epsilon prediction, 1000 linear betas, saved as a diffusers pipeline folder).

    Attributes:
        channels: of each level; a level has half the height and width of the one before.
        layers: residual blocks of a level.
        attention: heights of the feature maps that attend, beside the middle, which always does; None: those of the last level.
        flip: mirror half of the images, left to right, anew each time.
    """

    kind: str
    conditional: bool = False
    label_dropout: float = 0.1
    channels: tuple[int, ...] = (48, 64)
    layers: int = 1
    dropout: float = 0.1
    p_mean: float = -0.6  # of log sigma, EDM's training distribution
    p_std: float = 1.6
    attention: tuple[int, ...] | None = field(default=None, repr=False)
    flip: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in ("edm", "ddpm"):
            raise FewstepError(f"unknown kind of model {self.kind!r}: edm or ddpm")
        if not self.channels or any(width < 1 or width % GROUPS for width in self.channels):
            raise FewstepError(f"the channels of each level are a multiple of {GROUPS}, got {', '.join(map(str, self.channels)) or 'none'}")
        if self.layers < 1 or not 0 <= self.dropout < 1 or not 0 <= self.label_dropout <= 1:
            got = f"{self.layers}, {self.dropout}, {self.label_dropout}"
            raise FewstepError(f"a network needs at least 1 layer, dropout in [0, 1) and label dropout in [0, 1], got {got}")
        if not (math.isfinite(self.p_mean) and 0 < self.p_std < math.inf):
            raise FewstepError(f"log sigma is drawn with a finite mean and a positive deviation, got {self.p_mean}, {self.p_std}")

    def attends(self, height: int, width: int) -> list[bool]:
        """Which levels attend, of images so large.

        Raises:
            FewstepError: images that cannot be halved so often, or attention at feature maps that there are not.
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
    """Train, save the EMA weights under ``out`` and return it; a killed run continues from its last checkpoint.

    Raises:
        FewstepError: class-conditional training on images without labels; images that the network's levels do not fit; an output
            folder that holds a finished model.
    """
    if (out / "unet" / "config.json").exists():
        raise FewstepError(f"{out} already holds a trained model: choose another folder, or remove it")
    if config.conditional and images.labels is None:
        raise FewstepError(f"{images.name} has no labels: train without --conditional")
    if float(images.x.std()) < 0.01:
        raise FewstepError(
            f"the images of {images.name} are all but constant (standard deviation {float(images.x.std()):.2g}): nothing to learn"
        )
    config.attends(*images.x.shape[2:])
    check_writable(out)
    identity = f"{identity_of(config)} on {images.name} {tuple(images.x.shape)}, mean {float(images.x.double().mean()):.12f}"
    network = _network(images, config)
    denoiser, levels = _problem(network, images, config)
    null = None if images.labels is None else int(images.labels.max()) + 1
    told = {"conditional": config.conditional, "null": null, "dropout": config.label_dropout}
    loss = score_matching(denoiser, images, levels, **told, flip=config.flip)
    result = run_loop(network, loss, loop, out, identity=identity, observe=observe)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return out
    _save(result, denoiser, images, config, loop, out, command)
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


def _problem(network: nn.Module, images: Images, config: TrainConfig) -> tuple[AdaptedDenoiser, Callable[[int, torch.Generator], Tensor]]:
    """The denoiser to train, and how training draws its times ``[b]``."""
    schedule: NoiseSchedule
    if config.kind == "edm":
        schedule = VarianceExploding()
        denoiser = AdaptedDenoiser(network, schedule, EDM(round(float(images.x.std()), 2)), edm_time, unet_call)
        return denoiser, lambda b, g: torch.exp(config.p_mean + config.p_std * torch.randn(b, generator=g))
    schedule = DiscreteVP.from_betas(torch.linspace(1e-4, 0.02, 1000))
    denoiser = AdaptedDenoiser(network, schedule, "epsilon", call=unet_call)
    return denoiser, lambda b, g: torch.randint(1000, (b,), generator=g).float()


def score_matching(
    denoiser: AdaptedDenoiser,
    images: Images,
    levels: Callable[[int, torch.Generator], Tensor],
    *,
    conditional: bool,
    null: int | None = None,
    dropout: float = 0.1,
    flip: bool = False,
) -> Callable[[nn.Module, int, torch.Generator], Tensor]:
    """Denoising score matching in the network's own output: for EDM that is its loss weighting, for epsilon the simple loss.

    Args:
        levels: draws times ``[b]``.
        conditional: whether the network is told the labels; ``null`` replaces the part ``dropout`` of them, if it is given.
        flip: mirror half of the images, left to right.
    """
    kind = prediction(denoiser.prediction)

    def loss(network: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
        device = next(network.parameters()).device
        index = torch.randint(len(images.x), (batch,), generator=generator)
        x0 = images.dequantised(index, generator)
        if flip:
            x0 = torch.where(torch.rand(batch, 1, 1, 1, generator=generator) < 0.5, x0.flip(-1), x0)
        x0, t = _moved(x0, device), _moved(levels(batch, generator), device)
        noise = _moved(torch.randn(x0.shape, generator=generator), device)
        cond = None
        if conditional and images.labels is not None:
            drop = torch.rand(batch, generator=generator) < (dropout if null is not None else 0.0)
            cond = _moved(torch.where(drop, torch.tensor(null or 0), images.labels[index]), device)
        alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
        x = aligned(alpha, x0) * x0 + aligned(sigma, x0) * noise
        scale = 1.0 if kind.input_scale is None else aligned(kind.input_scale(alpha, sigma), x0)
        output = unet_call(network, x * scale, denoiser.time(t), cond)
        return (output.float() - from_x0(kind, x0, x, alpha, sigma)).square().mean()

    return loss


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """The same on a device, without waiting for what the device is doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _save(network: Any, denoiser: AdaptedDenoiser, images: Images, config: TrainConfig, loop: LoopConfig, out: Path, command: str) -> None:  # noqa: ANN401
    shape = list(images.x.shape[1:])
    if config.kind == "ddpm":
        from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        DDPMPipeline(network, DDPMScheduler(num_train_timesteps=1000, clip_sample=True)).save_pretrained(out)
    else:
        null = int(images.labels.max()) + 1 if config.conditional and images.labels is not None else None
        save_ours(out, network, denoiser.prediction, denoiser.schedule, shape, null)
    write_whole(out / "README.md", _card(network, images, config, loop, command, out.name).encode())


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
