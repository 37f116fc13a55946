"""Noise that belongs to a sample rather than to a batch: a seed gives the same picture on any device, in any batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fewstep.core.tableau import Nodes, Tableau
from fewstep.runtime.errors import FewstepError, SolverError

__all__ = ["seed_list", "seeded_noise", "seeded_scales", "seeds_of", "start_noise"]

SCALES = 1  # the stream of a seed that its guidance scale is drawn from


def seed_list(seeds: Iterable[int] | Tensor) -> list[int]:
    """Return seeds as a list of whole numbers.

    Raises:
        FewstepError: they are no whole numbers from 0 to 2^63.
    """
    try:
        numbers = seeds.tolist() if isinstance(seeds, Tensor) else list(seeds)
        whole = [int(number) for number in numbers]
        fits = all(
            one == two and not isinstance(two, bool | np.bool_) and 0 <= one < 2**63 for one, two in zip(whole, numbers, strict=True)
        )
    except (TypeError, ValueError, OverflowError):
        whole, fits = [], False
    if not fits:
        low = ": they lie between 0 and 2^63" if any(not 0 <= one < 2**63 for one in whole) else ""
        raise FewstepError(f"seeds are whole numbers, one for each sample, as in seeds=range(4), got {str(seeds)[:80]!r}{low}")
    return whole


def seeds_of(tableau: Tableau, x: Tensor, seeds: Iterable[int] | Tensor | None, *, needed: bool = True) -> list[int]:
    """Return the seeds of the samples that start at ``x [B, *D]``; none where there are none and none are needed.

    Raises:
        FewstepError: seeds that are no whole numbers.
        SolverError: there are not as many as samples, or none for a tableau that adds noise.
    """
    if seeds is None:
        if tableau.stochastic and needed:
            raise SolverError(f"this sampler adds noise: pass seeds=, one for each of the {len(x)} samples")
        return []
    listed = seed_list(seeds)
    if len(listed) != len(x):
        raise SolverError(f"{len(listed)} seeds for {len(x)} samples: pass one for each")
    return listed


def seeded_noise(seeds: Sequence[int] | Tensor, shape: Sequence[int], *, stream: int = 0) -> Tensor:
    """Return standard normal noise ``[len(seeds), *shape]``, float32 on the CPU; row ``k`` depends on ``seeds[k]`` alone.

    So a seed gives the same picture whatever the batch it is in, the device and the number of processes.

    Args:
        seeds: one whole number per sample.
        shape: of one sample, ``*D``.
        stream: 0 is the noise that ``torch.manual_seed(seed)`` would start with; other streams are independent of it and of each other.

    Raises:
        FewstepError: seeds that are no whole numbers.
    """
    rows = []
    for seed in seed_list(seeds):
        generator = torch.Generator().manual_seed(_mix(seed, stream))
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def _mix(seed: int, stream: int) -> int:
    """Return a seed for (seed, stream) by the finaliser of splitmix64, which maps different inputs to unrelated outputs."""
    if stream == 0:
        return seed
    z = (seed + 0x9E3779B97F4A7C15 * stream) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**63


def start_noise(nodes: Nodes, seeds: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
    """Return the start ``x_T = sigma_T eps [len(seeds), *shape]`` of the sampling ODE at the first node, seeded per sample."""
    return seeded_noise(seeds, shape) * nodes.sigma[0].float()


def seeded_scales(seeds: Sequence[int] | Tensor, scales: tuple[float, float]) -> Tensor:
    """Return a guidance scale for each seed, ``[len(seeds)]`` float64 on the CPU, uniform between the least and the largest."""
    low, high = scales
    normal = seeded_noise(seeds, (), stream=SCALES).double()
    return low + (high - low) * 0.5 * (1 + torch.erf(normal / math.sqrt(2)))
