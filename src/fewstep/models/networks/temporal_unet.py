"""DSNO's operator (Zheng et al., arXiv 2211.13449): a diffusers ``UNet2DModel`` that answers for several times at once.

Every slot of time is a batch row of the untouched network, ``[B, T] -> B T`` rows; forward hooks put a temporal layer after each
residual (and attention) block, where the slots of a sample meet. So the network's own weights, file format and code stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.models.denoiser import unet_call
from fewstep.models.networks.temporal_conv import FORMS, TemporalConv
from fewstep.runtime.errors import ModelError, look_up

__all__ = ["Mixing", "TemporalUNet"]


@dataclass(frozen=True)
class Mixing:
    """How the slots of a trajectory meet.

    Args:
        form: of the temporal layers (`TemporalConv`), or ``none``: then slots do not meet, and the last alone is one evaluation.
        modes: temporal frequencies that they keep.
        places: after ``all`` blocks, or in the ``inner`` half of the network only: then the outer decoder is run for the last slot alone.
        fan: slots part at the network's ``input``, or at its ``inner`` half: then the outer encoder is run once for all of them.

    Raises:
        ModelError: an unknown word, or an inner fan with layers outside.
    """

    form: str = "real"
    modes: int = 2
    places: str = "all"
    fan: str = "input"

    def __post_init__(self) -> None:
        look_up(self.form, dict.fromkeys(("none", *FORMS)), "form of mixing", ModelError)
        look_up(self.places, dict.fromkeys(("all", "inner")), "place of temporal layers", ModelError)
        look_up(self.fan, dict.fromkeys(("input", "inner")), "fan of slots", ModelError)
        if self.fan == "inner" and self.places != "inner":
            raise ModelError("slots that part in the inner half of the network can only meet there: use places inner")

    @property
    def last_alone(self) -> bool:
        """Whether a slot can be had without those before it."""
        return self.form in ("none", "one-way")


class _Slots:
    """What the hooks of one network share: how many slots the call that is going on has, for how many samples, and what they are told.

    Without one (``count`` 0) the hooks do nothing: the network alone is as it was.
    """

    def __init__(self) -> None:
        self.count, self.batch, self.last_only = 0, 0, False
        self.embedding: Tensor | None = None


@dataclass
class _Meet:
    """After a block: its temporal layer."""

    layer: TemporalConv
    slots: _Slots

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        count = self.slots.count
        return self.layer(output.unflatten(0, (-1, count))).flatten(0, 1) if count else output


@dataclass
class _Tell:
    """After the network's time embedding: what else a slot is told."""

    slots: _Slots

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output if self.slots.embedding is None else output + self.slots.embedding


@dataclass
class _Rows:
    """Before a block: all the rows it takes are those of all slots, or of the last one of each sample."""

    slots: _Slots
    always_last: bool
    may_be_last: bool

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        count, batch = self.slots.count, self.slots.batch
        last = self.always_last or (self.may_be_last and self.slots.last_only)

        def rows(value: Any) -> Any:  # noqa: ANN401 - a block takes tensors, tuples of them, and options
            if isinstance(value, tuple):
                return tuple(map(rows, value))
            if not isinstance(value, Tensor) or count < 2 or (len(value) == batch) == last:
                return value
            return value[count - 1 :: count] if last else value.repeat_interleave(count, 0)

        return tuple(map(rows, inputs)), {name: rows(value) for name, value in named.items()}


class TemporalUNet(nn.Module):
    """A ``UNet2DModel`` over slots of time. New, it answers in each slot what the network alone answers, to the bit.

    ``unet`` is the network itself, ``temporal`` the layers between its blocks, ``told`` (if any) the embedding of what a slot is told
    beside the time; its last layer starts at 0.

    Args:
        unet: any ``UNet2DModel``; it gets hooks, so give it a copy if it is to be used alone, too.
        slots: how many the temporal layers are made for.
        features: of what slots are told; 0 for nothing.

    Raises:
        ModelError: a network without the blocks of a ``UNet2DModel``, or mixing that its slots do not have.
    """

    def __init__(self, unet: Any, slots: int, mixing: Mixing, features: int = 0) -> None:  # noqa: ANN401 - diffusers is not always there
        super().__init__()
        if not all(hasattr(unet, name) for name in ("down_blocks", "mid_block", "up_blocks", "time_embedding")):
            raise ModelError(f"an operator is made of a diffusers UNet2DModel, not of a {type(unet).__name__}")
        self.unet, self.mixing, self._slots = unet, mixing, _Slots()
        self.temporal, self.told = nn.ModuleList(), None
        inner = _inner(unet)
        for block in _blocks(unet) if mixing.form != "none" else ():
            places = _places(block, block is unet.mid_block)
            for place, channels in places if mixing.places == "all" or block in inner else ():
                layer = TemporalConv(channels, slots, mixing.modes, mixing.form)
                self.temporal.append(layer)
                place.register_forward_hook(_Meet(layer, self._slots))
        if features:
            width = unet.time_embedding.linear_2.out_features
            last = nn.Linear(width, width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.told = nn.Sequential(nn.Linear(features, width), nn.SiLU(), last)
        unet.time_embedding.register_forward_hook(_Tell(self._slots))
        by_time = unet.config.time_embedding_type == "fourier"  # it divides by the time, row by row, at its end
        for block in _blocks(unet) if mixing.places == "inner" and not by_time else ():
            outer, encoder = block not in inner, block in set(unet.down_blocks)
            rows = _Rows(self._slots, outer and encoder and mixing.fan == "inner", outer and not encoder)
            block.register_forward_pre_hook(rows, with_kwargs=True)

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None, told: Tensor | None = None, last_only: bool = False) -> Tensor:
        """The network's output ``[B, T, C, H, W]`` in each slot, or ``[B, 1, C, H, W]`` in the last.

        Args:
            x: the input ``[B, C, H, W]`` of all slots, scaled as the network wants it.
            time: the network's time in each slot, ``[T]``.
            cond: class labels ``[B]``, or None.
            told: ``[T, features]``.
            last_only: leave out what the last slot does not need.
        """
        batch, count = len(x), len(time)
        if last_only and self.mixing.last_alone:
            return self(x, time[-1:], cond, None if told is None else told[-1:])
        slots, labels = self._slots, None if cond is None else cond.repeat_interleave(count)
        slots.batch, slots.count, slots.last_only = batch, count, last_only
        try:
            slots.embedding = None if self.told is None or told is None else self.told(told).repeat(batch, 1)
            output = unet_call(self.unet, x.repeat_interleave(count, 0), time.repeat(batch), labels).unflatten(0, (batch, -1))
        finally:
            slots.count, slots.embedding = 0, None
        return output[:, -1:] if last_only else output


def _blocks(unet: Any) -> list[Any]:  # noqa: ANN401
    return [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks]


def _inner(unet: Any) -> set[Any]:  # noqa: ANN401
    """The blocks of the lower half of the resolutions, and the one in the middle."""
    half = (len(unet.down_blocks) + 1) // 2
    return {*unet.down_blocks[-half:], *unet.up_blocks[:half], unet.mid_block}


def _places(block: Any, middle: bool) -> Iterator[tuple[nn.Module, int]]:  # noqa: ANN401
    """What temporal layers follow, with its channels: each attention, else each residual block; in the middle the first only."""
    resnets, attentions = list(block.resnets[:1] if middle else block.resnets), list(getattr(block, "attentions", []))
    attentions = [None] * (len(resnets) - len(attentions)) + attentions  # a lone attention comes after all residual blocks
    for resnet, attention in zip(resnets, attentions, strict=False):
        yield (resnet if attention is None else attention), resnet.out_channels
