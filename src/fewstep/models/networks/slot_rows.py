"""Any network over slots of time that do not meet: a batch row for each slot, at the slot's own time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.models.networks.calls import answer_of

__all__ = ["SlotRows"]


class SlotRows(nn.Module):
    """A network that is told each slot's time as its own, and nothing else of the slots.

    Args:
        network: any module.
        call: how it is called, ``(network, x, time, cond) -> output``.
    """

    extra_embedding = None

    def __init__(self, network: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x: Tensor, time: Tensor, cond: Cond = None, features: Tensor | None = None, last_only: bool = False) -> Tensor:
        """Return the network's output ``[B, T, *D]`` in each slot, or ``[B, 1, *D]`` in the last.

        Args:
            x: the input ``[B, *D]`` of all slots, scaled as the network expects it.
            time: the network's time in each slot, ``[T]``.
            cond: class labels ``[B]``, or None.
            features: None.
            last_only: return the last slot alone.
        """
        time = time[-1:] if last_only else time
        rows, labels = x.repeat_interleave(len(time), 0), None if cond is None else cond.repeat_interleave(len(time))
        return answer_of(self.call(self.network, rows, time.repeat(len(x)), labels), rows).unflatten(0, (len(x), -1))
