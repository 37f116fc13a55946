"""Networks that are told more than their own time: a vector made of other numbers is added to the time embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.models.networks.calls import answer_of
from fewstep.runtime.errors import FewstepError, ModelError

__all__ = [
    "LEVELS",
    "AddEmbedding",
    "ConditionedNetwork",
    "EmbeddingContext",
    "embedding_width",
    "even",
    "level_features",
    "scale_features",
    "zero_embedding",
]

INSERT_AT = {"UNet2DModel": "time_embedding", "SongUNet": "map_layer1", "DhariwalUNet": "map_layer1"}  # whose output is the time embedding
LEVELS = 8.0  # log(alpha/sigma) beyond which two levels are one to the features


def even(features: int) -> None:
    """Refuse an odd number of features, which come in pairs.

    Raises:
        FewstepError: it is odd.
    """
    if features % 2:
        raise FewstepError(f"features come in pairs, so their number is even, got {features}")


def level_features(lam: Tensor, count: int) -> Tensor:
    """Return features of noise levels ``lam [*]``: waves in ``arctan(sigma/alpha)`` and in ``lam`` from -8 to 8, ``[*, count]``."""
    angle = torch.atan(torch.exp(-lam)) * (2 / math.pi)
    level = (lam.clamp(-LEVELS, LEVELS) + LEVELS) / (2 * LEVELS)
    waves = math.pi * torch.arange(1, count // 2 + 1, dtype=lam.dtype)
    return torch.cos(torch.cat([angle[..., None] * waves, level[..., None] * waves], -1))


def scale_features(scale: Tensor, largest: float, count: int) -> Tensor:
    """Return features of guidance scales ``[*]`` up to ``largest``: the sine and cosine of ``k pi w / (2 largest)``, ``[*, count]``."""
    phase = scale[..., None] * (math.pi / (2 * largest) * torch.arange(1, count // 2 + 1, dtype=scale.dtype))
    return torch.cat([torch.sin(phase), torch.cos(phase)], -1)


def zero_embedding(features: int, width: int) -> nn.Sequential:
    """Return a small network ``[B, features] -> [B, width]`` that answers 0 at first."""
    last = nn.Linear(width, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(features, width), nn.SiLU(), last)


class EmbeddingContext:
    """The extra embedding ``[B, width]`` of the call that is being made, or None; the hooks of one network share it.

    It is an object of the network's own, so that a deep copy of the network has one too.
    """

    def __init__(self) -> None:
        self.embedding: Tensor | None = None


@dataclass
class AddEmbedding:
    """A forward hook that adds the extra embedding to the network's time embedding."""

    context: EmbeddingContext

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        added = self.context.embedding
        if added is None:
            return output
        if output.ndim != 2 or output.shape[-1] != added.shape[-1]:
            raise ModelError(
                f"a {type(module).__name__} answers {list(output.shape)}, so it is no time embedding [B, {added.shape[-1]}]: name another "
                "submodule as insert_at"
            )
        return output + added


def embedding_width(module: nn.Module) -> int:
    """Return the width of what a time embedding answers: that of its last linear layer, or of its table.

    Raises:
        ModelError: it has none.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Embedding)]
    if not layers:
        raise ModelError(f"a {type(module).__name__} has no linear layer, so it is no time embedding: name another module as insert_at")
    return layers[-1].out_features if isinstance(layers[-1], nn.Linear) else layers[-1].embedding_dim


class ConditionedNetwork(nn.Module):
    """A network that is told more than its time: ``(x [B, *D], time [B], cond, features) -> output [B, *D]``.

    New, it answers what the network alone answers, to the bit.

    Args:
        network: any module; it gets a hook, so pass a copy if it is to be used alone, too.
        call: how it is called, ``(network, x, time, cond) -> output``.
        insert_at: the name of the submodule whose output ``[B, width]`` is the time embedding; known of a ``UNet2DModel``, a `SongUNet`
            and a `DhariwalUNet`.

    Raises:
        ModelError: the network has no such submodule, or one that is no embedding.
    """

    def __init__(self, network: nn.Module, call: Callable[..., Any], insert_at: str | None = None) -> None:
        super().__init__()
        self.network, self.call, self.embeddings, self._context = network, call, nn.ModuleDict(), EmbeddingContext()
        self.features, self.insert_at = dict[str, int](), insert_at
        kind = type(network).__name__
        place = insert_at or INSERT_AT.get(kind) or ("time_embedding" if hasattr(network, "time_embedding") else None)
        if place is None:
            raise ModelError(
                f"a {kind} does not say where its time is embedded: name the submodule whose output [B, width] is the time embedding, as "
                "insert_at='time_mlp' (--insert-at time_mlp)"
            )
        try:
            module = network.get_submodule(place)
        except AttributeError as error:
            known = ", ".join(name for name, _ in network.named_children())
            raise ModelError(f"a {kind} has no submodule {place} to insert at; it has {known}") from error
        self.width = embedding_width(module)
        module.register_forward_hook(AddEmbedding(self._context))

    def tell(self, name: str, features: int) -> ConditionedNetwork:
        """Add the embedding of one more thing that it is told, which answers 0 at first, and return the network."""
        self.features[name] = features
        self.embeddings[name] = zero_embedding(features, self.width)
        return self

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None, features: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the network's output ``[B, *D]``.

        Args:
            x: the input, scaled as the network expects it.
            time: the network's own time ``[B]``.
            cond: what it is conditioned on.
            features: of what it is told, ``[B, F]`` each, by name; what is left out adds nothing.
        """
        told: list[Tensor] = [self.embeddings[name](value) for name, value in (features or {}).items()]
        self._context.embedding = torch.stack(told).sum(0) if told else None
        try:
            return answer_of(self.call(self.network, x, time, cond), x)
        finally:
            self._context.embedding = None
