r"""The two U-Nets that published checkpoints hold: Song et al.'s DDPM++ and NCSN++, and Dhariwal and Nichol's ADM.

Both are ladders of residual blocks at resolutions ``size >> level``. With an embedding ``e`` of the noise level and the class, a block is

    h = conv1(act(norm1(conv0(act(norm0(x)))) * (1 + scale(e)) + shift(e)))      (Song: only a shift, before norm1)
    x = g (h + skip(x)),    and where it attends    x = g (x + proj(attention(qkv(norm2(x))))),

where ``g`` is ``sqrt(1/2)`` (Song) or 1 (ADM), and blocks that change the resolution do so inside ``conv0`` and ``skip``, by a filter
``f f^T / sum^2``. The classes, options and parameter names are those of EDM's checkpoints (Karras et al., arXiv 2206.00364), so their
weights load name by name. What acts in training only (dropout of units and of labels, augmentation) is left out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, one_hot, silu

from fewstep.runtime.errors import ModelError, look_up
from fewstep.runtime.spec import check_options

__all__ = ["NETWORKS", "DhariwalUNet", "SongUNet", "build_network", "empty_network"]

DEPTHS = ("num_blocks", "layers_per_block")  # options that say how many blocks a level has


@dataclass(frozen=True)
class _Style:
    """The options in which the blocks of the two networks differ."""

    gain: float  # g
    eps: float
    adaptive: bool  # scale and shift after the norm, not a shift before it
    project: bool  # a 1x1 convolution on the skip wherever the resolution changes
    heads: Callable[[int], int]  # of attention, by the number of channels
    taps: Sequence[float] = (1, 1)
    per_group: int = 4  # least channels in a group of the norms

    def norm(self, channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(max(1, min(32, channels // self.per_group)), channels, eps=self.eps)


class Resample(nn.Module):
    """A layer that halves (``up=False``) or doubles the resolution by a filter, before a convolution: ``[B, cin, H, W] -> [B, cout, ...]``.

    Args:
        cin, cout: channels.
        kernel: of the convolution; 0 has none.
        taps: the filter.
        up: double rather than halve.
        fused: convolve before halving and pad once for both, as NCSN++ does beside its encoder.
    """

    resample_filter: Tensor

    def __init__(self, cin: int, cout: int, kernel: int, taps: Sequence[float], *, up: bool, fused: bool = False) -> None:
        super().__init__()
        self.up, self.fused, self.weight, self.bias = up, fused, None, None
        if kernel:
            conv = nn.Conv2d(cin, cout, kernel)
            self.weight, self.bias = conv.weight, conv.bias
        row = torch.tensor(taps, dtype=torch.float32, device="cpu")  # a number of the architecture, even where weights are yet to come
        self.register_buffer("resample_filter", (torch.outer(row, row) / row.sum() ** 2)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        half, pad = (self.resample_filter.shape[-1] - 1) // 2, 0 if self.weight is None else self.weight.shape[-1] // 2
        if self.fused and self.weight is not None:  # the filter's taps sum to 1: the bias passes
            return self._filter(conv2d(x, self.weight, self.bias, padding=half + pad), 0)
        x = self._filter(x, half)
        return x if self.weight is None else conv2d(x, self.weight, self.bias, padding=pad)

    def _filter(self, x: Tensor, padding: int) -> Tensor:
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.up:
            return conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=channels)
        return conv2d(x, taps, stride=2, padding=padding, groups=channels)


class Block(nn.Module):
    """A residual block: ``(x [B, cin, H, W], e [B, emb]) -> [B, cout, H', W']``.

    Args:
        cin, cout: channels.
        emb: width of the embedding.
        style: of the network.
        resample: ``up``, ``down`` or None.
        attend: add self-attention.
    """

    def __init__(self, cin: int, cout: int, emb: int, style: _Style, *, resample: str | None = None, attend: bool = False) -> None:
        super().__init__()
        self.style, self.heads = style, style.heads(cout) if attend else 0
        changed = partial(Resample, taps=style.taps, up=resample == "up")
        self.norm0 = style.norm(cin)
        self.conv0 = changed(cin, cout, 3) if resample else nn.Conv2d(cin, cout, 3, padding=1)
        self.affine = nn.Linear(emb, cout * (2 if style.adaptive else 1))
        self.norm1 = style.norm(cout)
        self.conv1 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = None
        if resample:
            self.skip = changed(cin, cout, 1 if style.project or cin != cout else 0)
        elif cin != cout:
            self.skip = nn.Conv2d(cin, cout, 1)
        if self.heads:
            self.norm2 = style.norm(cout)
            self.qkv = nn.Conv2d(cout, 3 * cout, 1)
            self.proj = nn.Conv2d(cout, cout, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h, e = self.conv0(silu(self.norm0(x))), self.affine(emb)[:, :, None, None]
        if self.style.adaptive:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm1(h) * (scale + 1) + shift
        else:
            h = self.norm1(h + e)
        x = (self.conv1(silu(h)) + (x if self.skip is None else self.skip(x))) * self.style.gain
        return (x + self.proj(self._attention(x))) * self.style.gain if self.heads else x

    def _attention(self, x: Tensor) -> Tensor:
        """Return self-attention over the pixels; the channels of ``qkv`` are ordered (head, channel, which of the three)."""
        q, k, v = self.qkv(self.norm2(x)).reshape(len(x) * self.heads, x.shape[1] // self.heads, 3, -1).unbind(2)
        scores = (q.mT @ k).to(torch.promote_types(x.dtype, torch.float32)) / math.sqrt(k.shape[1])
        return (v @ scores.softmax(-1).to(x.dtype).mT).reshape(x.shape)


class Fourier(nn.Module):
    """Random Fourier features of a noise level: ``[B] -> [B, n]``, sines first, of frequencies ``[n/2]``."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(channels // 2))

    def forward(self, time: Tensor) -> Tensor:
        angle = torch.outer(time, (2 * math.pi * self.freqs).to(time.dtype))
        return torch.cat([angle.sin(), angle.cos()], 1)


def _positional(time: Tensor, channels: int, *, closed: bool) -> tuple[Tensor, Tensor]:
    """Return sines and cosines ``[B, channels/2]`` of ``time [B]`` at frequencies from 1 down to 1/10000.

    That end is included if ``closed``.
    """
    half = channels // 2
    powers = torch.arange(half, dtype=torch.float32, device=time.device) / (half - closed)
    angle = torch.outer(time, ((1 / 10000) ** powers).to(time.dtype))
    return angle.sin(), angle.cos()


class _UNet(nn.Module, ABC):
    """The common part of both networks: an encoder and a decoder of blocks with skips; subclasses embed, inject and emit."""

    options: dict[str, Any]  # it was built with, by `build_network`

    def __init__(self, size: int, channels: int, widths: Sequence[int], first: int, blocks: int) -> None:
        super().__init__()
        self.keys = [f"{size >> level}x{size >> level}" for level in range(len(widths))]
        if len(set(self.keys)) < len(widths) or size >> (len(widths) - 1) < 1:
            raise ModelError(f"images of {size}x{size} cannot be halved {len(widths) - 1} times")
        self.blocks, self.widths, self.first, self.channels, self.label_dim = blocks, list(widths), first, channels, 0

    def _build(self, make: Callable[..., Block], attends: Sequence[bool], *, every_block: bool) -> None:
        """Make the blocks; in the decoder every one attends where the level does, or only the last."""
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        wide, skips = self.first, [self.first]
        for level, key in enumerate(self.keys):
            if level == 0:
                self.enc[f"{key}_conv"] = nn.Conv2d(self.channels, wide, 3, padding=1)
            else:
                self.enc[f"{key}_down"] = make(wide, wide, resample="down")
                skips.append(wide)
            for k in range(self.blocks):
                self.enc[f"{key}_block{k}"] = make(wide, self.widths[level], attend=attends[level])
                wide = self.widths[level]
                skips.append(wide)
        for level, key in reversed(list(enumerate(self.keys))):
            if level == len(self.keys) - 1:
                self.dec[f"{key}_in0"], self.dec[f"{key}_in1"] = make(wide, wide, attend=True), make(wide, wide)
            else:
                self.dec[f"{key}_up"] = make(wide, wide, resample="up")
            for k in range(self.blocks + 1):
                attend = attends[level] and (every_block or k == self.blocks)
                self.dec[f"{key}_block{k}"] = make(wide + skips.pop(), self.widths[level], attend=attend)
                wide = self.widths[level]

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the output ``[B, out_channels, H, W]``.

        Args:
            x: ``[B, in_channels, H, W]``.
            time: the noise level as the checkpoint's own code gives it to the network, ``[B]``.
            labels: classes ``[B]``, of which ``label_dim`` stands for none, as does no labels at all.
        """
        emb, aux, skips = self._embed(time, self._classes(x, labels)).to(x.dtype), x, []
        for level, key in enumerate(self.keys):
            if level == 0:
                x = self.enc[f"{key}_conv"](x)
            else:
                x, aux = self._inject(key, self.enc[f"{key}_down"](x, emb), aux)
            skips.append(x)
            for k in range(self.blocks):
                x = self.enc[f"{key}_block{k}"](x, emb)
                skips.append(x)
        out: Tensor | None = None
        for level, key in reversed(list(enumerate(self.keys))):
            for name in ("in0", "in1") if level == len(self.keys) - 1 else ("up",):
                x = self.dec[f"{key}_{name}"](x, emb)
            for k in range(self.blocks + 1):
                x = self.dec[f"{key}_block{k}"](torch.cat([x, skips.pop()], 1), emb)
            out = self._emit(key, x, out)
        assert out is not None  # the level of the images always emits
        return out

    def _classes(self, x: Tensor, labels: Tensor | None) -> Tensor | None:
        """Return the classes as rows ``[B, label_dim]`` of one 1, or of zeros for no class."""
        if not self.label_dim:
            if labels is not None:
                raise ValueError("it takes no class labels")  # what a network refuses, the denoiser reports
            return None
        if labels is None:
            return x.new_zeros(len(x), self.label_dim)
        return one_hot(labels.long(), self.label_dim + 1)[:, :-1].to(x.dtype)

    @abstractmethod
    def _embed(self, time: Tensor, classes: Tensor | None) -> Tensor: ...

    def _inject(self, key: str, x: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
        return x, aux

    @abstractmethod
    def _emit(self, key: str, x: Tensor, out: Tensor | None) -> Tensor | None: ...


class SongUNet(_UNet):
    """The U-Nets DDPM++ and NCSN++ (Song et al., arXiv 2011.13456).

    Args:
        img_resolution, in_channels, out_channels: of the images.
        label_dim: number of classes, 0 for none.
        augment_dim: number of augmentation labels it was trained with: their weights load, the labels are always zero.
        model_channels, channel_mult: the width at each level is their product.
        channel_mult_emb, channel_mult_noise: widths of the embedding, and of the time before it, in ``model_channels``.
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions at which blocks attend.
        embedding_type: of the time: ``positional`` or ``fourier``.
        encoder_type: input beside the encoder at each level: none (``standard``), the image (``skip``), a second ladder (``residual``).
        decoder_type: ``skip`` if each level adds to the output, ``standard`` if the last alone makes it.
        resample_filter: of changes of resolution.

    Raises:
        ModelError: an unknown type, or images that cannot be halved so often.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        look_up(embedding_type, dict.fromkeys(("positional", "fourier")), "embedding_type", ModelError)
        look_up(encoder_type, dict.fromkeys(("standard", "skip", "residual")), "encoder_type", ModelError)
        look_up(decoder_type, dict.fromkeys(("standard", "skip")), "decoder_type", ModelError)
        super().__init__(img_resolution, in_channels, [int(model_channels * m) for m in channel_mult], model_channels, num_blocks)
        emb, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        self.noise, self.label_dim, self.encoder_type, self.decoder_type = noise, label_dim, encoder_type, decoder_type
        style = _Style(math.sqrt(0.5), 1e-6, adaptive=False, project=True, heads=lambda channels: 1, taps=resample_filter)
        self.map_noise = Fourier(noise) if embedding_type == "fourier" else None
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, emb), nn.Linear(emb, emb)
        attends = [img_resolution >> level in attn_resolutions for level in range(len(self.widths))]
        self._build(partial(Block, emb=emb, style=style), attends, every_block=False)
        aux, down = in_channels, partial(Resample, taps=resample_filter, up=False)
        for key, wide in zip(self.keys[1:], self.widths, strict=False):
            if encoder_type == "skip":
                self.enc[f"{key}_aux_down"] = down(aux, aux, 0)
                self.enc[f"{key}_aux_skip"] = nn.Conv2d(aux, wide, 1)
            elif encoder_type == "residual":
                self.enc[f"{key}_aux_residual"] = down(aux, wide, 3, fused=True)
                aux = wide
        for level, (key, wide) in enumerate(zip(self.keys, self.widths, strict=True)):
            if decoder_type == "skip" and level < len(self.keys) - 1:
                self.dec[f"{key}_aux_up"] = Resample(out_channels, out_channels, 0, resample_filter, up=True)
            if decoder_type == "skip" or level == 0:
                self.dec[f"{key}_aux_norm"] = style.norm(wide)
                self.dec[f"{key}_aux_conv"] = nn.Conv2d(wide, out_channels, 3, padding=1)

    def _embed(self, time: Tensor, classes: Tensor | None) -> Tensor:
        emb = torch.cat(_positional(time, self.noise, closed=True), 1) if self.map_noise is None else self.map_noise(time)
        emb = emb.to(self.map_layer0.weight.dtype)
        if self.map_label is not None and classes is not None:
            emb = emb + self.map_label(classes * math.sqrt(self.label_dim))
        return silu(self.map_layer1(silu(self.map_layer0(emb))))

    def _inject(self, key: str, x: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
        if self.encoder_type == "skip":
            aux = self.enc[f"{key}_aux_down"](aux)
            return x + self.enc[f"{key}_aux_skip"](aux), aux
        if self.encoder_type == "residual":
            x = (x + self.enc[f"{key}_aux_residual"](aux)) * math.sqrt(0.5)
            return x, x
        return x, aux

    def _emit(self, key: str, x: Tensor, out: Tensor | None) -> Tensor | None:
        if f"{key}_aux_conv" not in self.dec:
            return None
        more = self.dec[f"{key}_aux_conv"](silu(self.dec[f"{key}_aux_norm"](x)))
        return more if out is None else more + self.dec[f"{key}_aux_up"](out)


class DhariwalUNet(_UNet):
    """The U-Net ADM (Dhariwal and Nichol, arXiv 2105.05233).

    Args:
        img_resolution, in_channels, out_channels, label_dim, augment_dim, model_channels, channel_mult, channel_mult_emb, num_blocks: as of
            `SongUNet`.
        attn_resolutions: as of `SongUNet`.
        num_heads: of attention; by default, one per ``channels_per_head``.
        channels_per_head: width of a head.
        channels_per_group: least channels in a group of the norms: 4 in EDM's, 1 (so always 32 groups) in guided-diffusion's.
        null_label: whether it can do without a class.

    Raises:
        ModelError: images that cannot be halved so often.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        num_heads: int | None = None,
        channels_per_head: int = 64,
        channels_per_group: int = 4,
        null_label: bool = True,
    ) -> None:
        widths = [int(model_channels * m) for m in channel_mult]
        super().__init__(img_resolution, in_channels, widths, widths[0], num_blocks)
        self.model_channels, self.label_dim, self.null_label, emb = model_channels, label_dim, null_label, model_channels * channel_mult_emb

        def heads(channels: int) -> int:
            return channels // channels_per_head if num_heads is None else num_heads

        style = _Style(1.0, 1e-5, adaptive=True, project=False, heads=heads, per_group=channels_per_group)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, emb), nn.Linear(emb, emb)
        self.map_label = nn.Linear(label_dim, emb, bias=False) if label_dim else None
        attends = [img_resolution >> level in attn_resolutions for level in range(len(widths))]
        self._build(partial(Block, emb=emb, style=style), attends, every_block=True)
        self.out_norm, self.out_conv = style.norm(widths[0]), nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def _embed(self, time: Tensor, classes: Tensor | None) -> Tensor:
        sines, cosines = _positional(time, self.model_channels, closed=False)
        emb = self.map_layer1(silu(self.map_layer0(torch.cat([cosines, sines], 1).to(self.map_layer0.weight.dtype))))
        return silu(emb if self.map_label is None or classes is None else emb + self.map_label(classes))

    def _classes(self, x: Tensor, labels: Tensor | None) -> Tensor | None:
        if self.label_dim and not self.null_label and labels is None:
            raise ValueError(f"it was trained with a class for every image: pass labels 0 to {self.label_dim - 1}")
        return super()._classes(x, labels)

    def _emit(self, key: str, x: Tensor, out: Tensor | None) -> Tensor | None:
        return self.out_conv(silu(self.out_norm(x))) if key == self.keys[0] else None


NETWORKS: dict[str, type[_UNet]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


def empty_network(name: str, options: Mapping[str, Any], tensors: int) -> nn.Module:
    """Make a network of `NETWORKS`, or diffusers' ``UNet2DModel``, on the meta device: it takes no memory, and its weights no values.

    Args:
        name: of the class.
        options: arguments of its constructor.
        tensors: how many its weights are; no network has more levels or blocks than those.

    Raises:
        ModelError: an unknown class or option, or a value that no network has.
    """
    if name == "UNet2DModel":
        try:
            from diffusers.models.unets.unet_2d import UNet2DModel
        except ImportError as error:
            raise ModelError("a UNet2DModel needs diffusers: pip install 'fewstep[diffusers]'") from error
        kind: Callable[..., Any] = UNet2DModel
    else:
        kind = look_up(name, NETWORKS, "network class", ModelError)
    check_options(dict(options), kind, name, ModelError)
    depths = [options.get(key) for key in DEPTHS] + [len(value) for value in options.values() if isinstance(value, list | tuple)]
    if any(isinstance(depth, int) and depth > tensors for depth in depths):
        raise ModelError(f"no {name} of {tensors} tensors has the options {dict(options)}: too many blocks or levels")
    try:
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            return kind(**options)
    except Exception as error:  # with the options of a damaged file a constructor raises almost anything
        raise ModelError(f"no {name} has the options {dict(options)}: {error}") from error


def build_network(name: str, options: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """Make a network of `NETWORKS`, or diffusers' ``UNet2DModel``, with its weights and in their dtype, ready to sample with.

    Args:
        name: of the class.
        options: arguments of its constructor.
        weights: by name.

    Raises:
        ModelError: an unknown class or option, or weights that do not fit: too few, too many, of another shape (the first few).
    """
    network = empty_network(name, options, len(weights))
    if isinstance(network, _UNet):
        network.options = dict(options)
    own = network.state_dict()
    weights = {**{key: value for key, value in own.items() if key.endswith("resample_filter")}, **weights}
    bad = [f"lacks {key}" for key in own if key not in weights] + [f"has {key}, which is not known" for key in weights if key not in own]
    shapes = {key: (list(weights[key].shape), list(own[key].shape)) for key in own if key in weights}
    bad += [f"has {key} of shape {there}, not {here}" for key, (there, here) in shapes.items() if there != here]
    if bad:
        more = f", and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ModelError(f"the weights do not fit a {name} with these options: the file {'; it '.join(bad[:3])}{more}")
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)
