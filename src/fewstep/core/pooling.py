"""Pooling: the elements of a state that share a number, by *element*, *channel* or *scalar*, for statistics and coefficients alike.

The channels of a state ``[B, C, ...]`` are its dimension 1, whatever follows: pixels, the samples of a sound, frames and their pixels.
A state of tokens ``[B, N, features]`` has its tokens there, so *channel* gives each token one number, for all of its features. A
state ``[B, features]`` has one element a channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

__all__ = ["POOLED", "Pool", "default_pool", "pooled_shape", "shared_axes"]

POOLED = 2**14  # numbers of a sample, beyond which all share a number: as many for each of them would be larger than what they gain

Pool = Literal["element", "channel", "scalar"]


def default_pool(sample: Sequence[int]) -> Pool:
    """Return how elements of samples ``*D`` share numbers where nothing is said: not at all, or all of them if there are many."""
    return "element" if math.prod(sample) <= POOLED else "scalar"


def shared_axes(pool: Pool, ndim: int) -> tuple[int, ...]:
    """Return the axes of samples ``[..., *D]``, counted from the last, along which elements share a number; ``ndim`` is that of ``*D``."""
    return {"element": (), "channel": tuple(range(1 - ndim, 0)), "scalar": tuple(range(-ndim, 0))}[pool]


def pooled_shape(pool: Pool, sample: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the numbers of samples ``*D``: 1 along each axis that shares them; ``()`` where all elements do."""
    if pool == "scalar":
        return ()
    shared = shared_axes(pool, len(sample))
    return tuple(1 if axis in shared else size for axis, size in zip(range(-len(sample), 0), sample, strict=True))
