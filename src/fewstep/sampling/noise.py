"""Noise that belongs to a sample rather than to a batch: a seed gives the same picture on any device, in any batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.tableau import Nodes

__all__ = ["seeded_noise", "start_noise"]


def seeded_noise(seeds: Sequence[int] | Tensor, shape: Sequence[int], *, stream: int = 0) -> Tensor:
    """Standard normal noise ``[len(seeds), *shape]``, float32 on the CPU; row ``k`` depends on ``seeds[k]`` alone.

    So a seed gives the same picture whatever the batch it is in, the device and the number of processes.
    Stream 0 of seed ``s`` is what ``torch.manual_seed(s)`` would start with; other streams are independent of it.
    """
    rows = []
    for seed in torch.as_tensor(seeds).tolist():
        generator = torch.Generator().manual_seed(_mix(int(seed), stream))
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def _mix(seed: int, stream: int) -> int:
    """A seed for (seed, stream): the finaliser of splitmix64, which maps different inputs to unrelated outputs."""
    if stream == 0:
        return seed
    z = (seed + 0x9E3779B97F4A7C15 * stream) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**63


def start_noise(nodes: Nodes, seeds: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
    """The start ``x_T = sigma_T eps`` of the sampling ODE, ``[len(seeds), *shape]``, seeded per sample."""
    return seeded_noise(seeds, shape) * nodes.sigma[0].float()
