"""Train updates of low rank to the layers of a frozen network, in place of a copy of it (LoRA, Hu et al., arXiv 2106.09685).

A layer ``y = W x`` becomes ``y = W x + B A x`` (eq. 3 there), with ``A`` of ``R`` rows; of a convolution ``A`` has its kernel, stride and
padding, and ``B`` is pointwise. ``B`` starts at 0, and ``A`` has entries of variance ``1/R``, so that the first step of Adam changes a
weight of ``W + B A`` about as much as it would change ``W``: learning rates are those of a whole network.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.runtime.errors import ModelError

__all__ = ["LowRankNetwork", "ThroughUpdates", "memory_in_words"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MOMENTS = 2  # of AdamW, for each number
SHOWN = ("weights", "gradients", "optimiser", "checkpoint")  # on a card


class LowRankNetwork(nn.Module):
    """A frozen network with trained updates of low rank to its linear and convolutional layers: ``(call, *args) -> call(network, *args)``.

    Its parameters, and so an optimiser and a checkpoint, are the updates alone. The network's weights are those of the one that was passed,
    in the same memory; they get no gradient. Before training it answers as that one does, to the bit.

    Args:
        network: the network; it is not changed. Its mode stays, whatever the mode of this module.
        rank: of the updates; those of a layer that has no such rank have the layer's own.
        probe: calls the network that it is given once. Layers that this does not run, as those whose weights a module reads itself, get no
            update.
        seed: of ``A``.

    Raises:
        ModelError: no linear or convolutional layer is run, or the updates have as many numbers as the network.
    """

    def __init__(self, network: nn.Module, rank: int, probe: Callable[[nn.Module], Any], *, seed: int) -> None:
        super().__init__()
        shared: dict[int, Any] = {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in network.parameters()}
        shared |= {id(one): one for one in network.buffers()}
        frozen = copy.deepcopy(network, shared)
        self.rank, self._frozen = rank, (frozen,)  # no module of this one: its weights are neither trained nor saved
        layers = _layers_run(frozen, probe)
        name = type(network).__name__
        if not layers:
            raise ModelError(f"updates of low rank are to linear and convolutional layers, and {name} runs none: leave fake_rank out")
        generator = torch.Generator().manual_seed(seed)
        self.updates = nn.ModuleList(_update(layer, rank, generator) for layer in layers)
        if self.numbers[0] >= self.numbers[1]:
            ours, theirs = self.numbers
            raise ModelError(f"updates of rank {rank} have {ours} numbers, {name} itself {theirs}: take a lower fake_rank, or leave it out")
        for layer, update in zip(layers, self.updates, strict=True):
            layer.register_forward_hook(_adds(update), with_kwargs=True)

    def forward(self, call: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 - as the call answers
        return call(self._frozen[0], *args)

    @property
    def numbers(self) -> tuple[int, int]:
        """How many numbers its updates have, and the network."""
        ours, theirs = (sum(one.numel() for one in network.parameters()) for network in (self, self._frozen[0]))
        return ours, theirs

    def memory(self) -> dict[str, Any]:
        """Return what training takes, in bytes, beside what a whole copy of the network would take, as plain JSON values.

        Returns:
            ``rank``; ``layers``, how many have an update; and pairs, of the updates and of a copy: ``parameters``, how many; and in bytes
            ``weights``, ``gradients``, ``optimiser`` (AdamW's two moments) and ``checkpoint`` (weights and moments).
        """
        sizes = [sum(one.numel() * one.element_size() for one in network.parameters()) for network in (self, self._frozen[0])]
        return {
            "rank": self.rank,
            "layers": len(self.updates),
            "parameters": list(self.numbers),
            "weights": sizes,
            "gradients": sizes,
            "optimiser": [MOMENTS * size for size in sizes],
            "checkpoint": [(1 + MOMENTS) * size for size in sizes],
        }


def _layers_run(network: nn.Module, probe: Callable[[nn.Module], Any]) -> list[nn.Module]:
    """Return the linear and convolutional layers that a call of a network runs, in the order of its modules."""
    found, run = [one for one in network.modules() if isinstance(one, (nn.Linear, *CONVOLUTIONS))], set[nn.Module]()
    handles = [one.register_forward_hook(lambda layer, _, output: run.add(layer)) for one in found]
    try:
        with torch.no_grad():
            probe(network)
    finally:
        for handle in handles:
            handle.remove()
    return [one for one in found if one in run]


def _update(layer: Any, rank: int, generator: torch.Generator) -> nn.Sequential:  # noqa: ANN401 - linear or convolutional
    """Return ``x -> B A x`` for a layer, with ``B = 0``; of a convolution in groups each group has updates of its own."""
    where = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    first: Any
    if isinstance(layer, nn.Linear):
        inner = min(rank, layer.in_features, layer.out_features)
        first = nn.Linear(layer.in_features, inner, bias=False, **where)
        last: Any = nn.Linear(inner, layer.out_features, bias=False, **where)
    else:
        kind, groups = next(one for one in CONVOLUTIONS if isinstance(layer, one)), layer.groups
        inner = min(rank, math.prod(layer.weight.shape[1:]), layer.out_channels // groups)
        shape = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")}
        first = kind(layer.in_channels, groups * inner, bias=False, **shape, **where)
        last = kind(groups * inner, layer.out_channels, 1, groups=groups, bias=False, **where)
    with torch.no_grad():
        drawn = torch.randn(first.weight.shape, generator=generator)
        first.weight.copy_(drawn / math.sqrt(inner))
        last.weight.zero_()
    return nn.Sequential(first, last)


def _adds(update: nn.Module) -> Callable[..., Tensor]:
    """Return the hook that adds an update to what a layer answers."""

    def hook(layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any], answer: Tensor) -> Tensor:
        return answer + update(args[0] if args else options["input"])

    return hook


@dataclass(frozen=True)
class ThroughUpdates:
    """The call of a `LowRankNetwork` by the call of the network that it updates.

    Attributes:
        call: that one, ``(network, x, time, cond)``.
    """

    call: Callable[..., Any]

    def __call__(self, network: Callable[..., Any], x: Tensor, time: Tensor, cond: Cond) -> Any:  # noqa: ANN401 - as the network answers
        return network(self.call, x, time, cond)


def memory_in_words(memory: Mapping[str, Any]) -> str:
    """Return what `LowRankNetwork.memory` says, for a card."""
    ours, theirs = memory["parameters"]
    parts = [f"{name} {memory[name][0] / 1e6:.3g} MB in place of {memory[name][1] / 1e6:.3g}" for name in SHOWN]
    return f"updates of rank {memory['rank']} to {memory['layers']} layers, {ours:,} parameters in place of {theirs:,}; {'; '.join(parts)}"
