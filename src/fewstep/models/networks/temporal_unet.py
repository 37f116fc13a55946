"""DSNO's operator (Zheng et al., arXiv 2211.13449): a diffusers ``UNet2DModel`` that answers for several times at once.

Every slot of time is a batch row of the untouched network, ``[B, T] -> B T`` rows; forward hooks insert a temporal layer after each
residual (and attention) block, which mixes the slots of a sample. So the network's own weights, file format and code stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.models.networks.calls import unet_call
from fewstep.models.networks.extra_embedding import AddEmbedding, EmbeddingContext, embedding_width, zero_embedding
from fewstep.models.networks.temporal_conv import FORMS, TemporalConv
from fewstep.runtime.errors import ModelError, look_up
from fewstep.runtime.front_door import check_fields, checked_class

__all__ = ["Mixing", "TemporalUNet", "has_blocks"]


@checked_class
@dataclass(frozen=True)
class Mixing:
    """The temporal layers of a `TemporalUNet`: their form, and where in the network they mix the slots of a trajectory.

    Args:
        form: the form of a `TemporalConv`, or ``none``: then slots are not mixed, and the last alone costs one evaluation.
        modes: number of temporal frequencies that a layer mixes.
        insert_after: ``all`` blocks, or those in the ``inner`` half of the network: then the outer decoder runs for the last slot alone.
        branch_at: where slots become rows of their own: the ``input``, or the ``inner`` half: then the outer encoder runs once for all.

    Raises:
        ModelError: an unknown word, or slots that branch inside with layers outside.
    """

    form: str = "real"
    modes: int = 2
    insert_after: str = "all"
    branch_at: str = "input"

    def __post_init__(self) -> None:
        check_fields(self)
        look_up(self.form, dict.fromkeys(("none", *FORMS)), "form of mixing", ModelError)
        look_up(self.insert_after, dict.fromkeys(("all", "inner")), "place of temporal layers", ModelError)
        look_up(self.branch_at, dict.fromkeys(("input", "inner")), "branching of slots", ModelError)
        if self.branch_at == "inner" and self.insert_after != "inner":
            raise ModelError("slots that branch at the inner half of the network can only be mixed there: use insert_after inner")

    @property
    def last_alone(self) -> bool:
        """Whether a slot can be computed without the ones before it."""
        return self.form in ("none", "one-way")


class ForwardContext(EmbeddingContext):
    """Per-call context that the hooks of one network share: number of slots, batch size, extra embedding.

    Outside a call (``count`` 0) the hooks do nothing, and the network alone is as it was.

    Attributes:
        count: number of slots ``T``.
        batch: number of samples ``B``.
        last_only: whether the answer of the last slot alone is wanted.
        embedding: the extra embedding ``[B T, width]`` that is added to the network's time embedding, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count, self.batch, self.last_only = 0, 0, False


@dataclass
class TemporalHook:
    """A forward hook that applies a temporal layer to the output of a block."""

    layer: TemporalConv
    context: ForwardContext

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        count = self.context.count
        return self.layer(output.unflatten(0, (-1, count))).flatten(0, 1) if count else output


@dataclass
class SelectRows:
    """A forward pre-hook that gives a block the rows of all slots, or those of the last slot of each sample.

    Attributes:
        context: of the call.
        always_last: select the last slot in every call.
        may_be_last: select it in calls that want the last slot alone.
    """

    context: ForwardContext
    always_last: bool
    may_be_last: bool

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        count, batch = self.context.count, self.context.batch
        last = self.always_last or (self.may_be_last and self.context.last_only)

        def rows(value: Any) -> Any:  # noqa: ANN401 - a block takes tensors, tuples of them, and options
            if isinstance(value, tuple):
                return tuple(map(rows, value))
            if not isinstance(value, Tensor) or count < 2 or (len(value) == batch) == last:
                return value
            return value[count - 1 :: count] if last else value.repeat_interleave(count, 0)

        return tuple(map(rows, inputs)), {name: rows(value) for name, value in named.items()}


class TemporalUNet(nn.Module):
    """A ``UNet2DModel`` over slots of time. New, it answers in each slot what the network alone answers, to the bit.

    Its parts are ``unet``, the network itself; ``temporal``, the layers between its blocks; and ``extra_embedding`` (or None), a small
    network from features of each slot to a vector that is added to the time embedding, and is 0 at first.

    Args:
        unet: any ``UNet2DModel``; it gets hooks, so pass a copy if it is to be used alone, too.
        slots: number of slots ``T`` that the temporal layers are made for.
        mixing: the temporal layers.
        features: number of extra features of each slot; 0 for none.

    Raises:
        ModelError: a network without the blocks of a ``UNet2DModel``, or mixing that its slots do not have.
    """

    def __init__(self, unet: Any, slots: int, mixing: Mixing, features: int = 0) -> None:  # noqa: ANN401 - diffusers is not always there
        super().__init__()
        if not has_blocks(unet):
            raise ModelError(f"temporal layers go between the blocks of a diffusers UNet2DModel, not of a {type(unet).__name__}")
        self.unet, self.mixing, self._context = unet, mixing, ForwardContext()
        self.temporal, self.extra_embedding = nn.ModuleList(), None
        inner = _inner(unet)
        for block in _blocks(unet) if mixing.form != "none" else ():
            followed = _followed(block, block is unet.mid_block)
            for module, channels in followed if mixing.insert_after == "all" or block in inner else ():
                layer = TemporalConv(channels, slots, mixing.modes, mixing.form)
                self.temporal.append(layer)
                module.register_forward_hook(TemporalHook(layer, self._context))
        if features:
            self.extra_embedding = zero_embedding(features, embedding_width(unet.time_embedding))
        unet.time_embedding.register_forward_hook(AddEmbedding(self._context))
        by_time = unet.config.time_embedding_type == "fourier"  # it divides by the time, row by row, at its end
        for block in _blocks(unet) if mixing.insert_after == "inner" and not by_time else ():
            outer, encoder = block not in inner, block in set(unet.down_blocks)
            rows = SelectRows(self._context, outer and encoder and mixing.branch_at == "inner", outer and not encoder)
            block.register_forward_pre_hook(rows, with_kwargs=True)

    @property
    def network(self) -> Any:  # noqa: ANN401
        """The network itself."""
        return self.unet

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None, features: Tensor | None = None, last_only: bool = False) -> Tensor:
        """Return the network's output ``[B, T, C, H, W]`` in each slot, or ``[B, 1, C, H, W]`` in the last.

        Args:
            x: the input ``[B, C, H, W]`` of all slots, scaled as the network expects it.
            time: the network's time in each slot, ``[T]``.
            cond: class labels ``[B]``, or None.
            features: extra features of each slot, ``[T, features]``, or None.
            last_only: return the last slot alone, and skip the work that it does not need.
        """
        batch, count = len(x), len(time)
        if last_only and self.mixing.last_alone:
            return self(x, time[-1:], cond, None if features is None else features[-1:])
        context, labels = self._context, None if cond is None else cond.repeat_interleave(count)
        context.batch, context.count, context.last_only = batch, count, last_only
        try:
            embed = self.extra_embedding
            context.embedding = None if embed is None or features is None else embed(features).repeat(batch, 1)
            output = unet_call(self.unet, x.repeat_interleave(count, 0), time.repeat(batch), labels).unflatten(0, (batch, -1))
        finally:
            context.count, context.embedding = 0, None
        return output[:, -1:] if last_only else output


def has_blocks(network: object) -> bool:
    """Return whether a network has the blocks of a ``UNet2DModel``, between which temporal layers go."""
    return all(hasattr(network, name) for name in ("down_blocks", "mid_block", "up_blocks", "time_embedding"))


def _blocks(unet: Any) -> list[Any]:  # noqa: ANN401
    return [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks]


def _inner(unet: Any) -> set[Any]:  # noqa: ANN401
    """Return the blocks of the lower half of the resolutions, and the one in the middle."""
    half = (len(unet.down_blocks) + 1) // 2
    return {*unet.down_blocks[-half:], *unet.up_blocks[:half], unet.mid_block}


def _followed(block: Any, middle: bool) -> Iterator[tuple[nn.Module, int]]:  # noqa: ANN401
    """Return the modules that temporal layers follow, with their channels.

    These are the attentions, or the residual blocks that have none; in the middle the first only.
    """
    resnets, attentions = list(block.resnets[:1] if middle else block.resnets), list(getattr(block, "attentions", []))
    attentions = [None] * (len(resnets) - len(attentions)) + attentions  # a lone attention comes after all residual blocks
    for resnet, attention in zip(resnets, attentions, strict=False):
        yield (resnet if attention is None else attention), resnet.out_channels
