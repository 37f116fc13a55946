"""Distances between a student's answers and what they should be: the losses of regression."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["DISTANCES"]


def _l1(error: Tensor) -> Tensor:
    return error.abs().mean((0, *range(2, error.ndim)))


def _l2(error: Tensor) -> Tensor:
    return error.square().mean((0, *range(2, error.ndim)))


def _huber(error: Tensor) -> Tensor:
    """Return the pseudo-Huber distance (Song and Dhariwal, arXiv 2310.14189).

    It is ``(sqrt(|e|^2 + c^2) - c) / sqrt(D)`` of each sample's norm, with ``c = 0.00054 sqrt(D)``.
    """
    size = math.prod(error.shape[2:])
    c = 0.00054 * math.sqrt(size)
    return (torch.sqrt(error.flatten(2).square().sum(2) + c * c) - c).mean(0) / math.sqrt(size)


# error [B, T, *D] -> distance [T]
DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {"l1": _l1, "l2": _l2, "huber": _huber}
