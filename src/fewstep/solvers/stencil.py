"""The past evaluations that a multistep formula may use at each step, decided here, before the loop, for every solver."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.prediction import from_x0
from fewstep.core.tableau import Nodes

__all__ = ["ALWAYS", "NEVER", "effective_order", "noise_or_data"]

ALWAYS, NEVER = 1_000_000, 0  # for lower_order_below


def effective_order(nodes: Nodes, i: int, order: int, lower_order_below: int = NEVER, *, euler_at_final: bool = False) -> int:
    """Return the order of the step that follows evaluation ``i`` of a solver that evaluates once per step.

    * Warm-up: only ``i + 1`` evaluations exist.
    * End: on a grid of fewer than ``lower_order_below`` steps the last steps have order ..., 2, 1. The implementations
      differ in nothing else: UniPC always lowers, diffusers' DPM-Solver and DEIS below 15 steps, DPM-Solver's own code below 10.
      With ``euler_at_final`` the last step is of first order on every grid.
    * A node with infinite ``lam`` (``alpha = 0`` at the start, ``sigma = 0`` at the end) carries no polynomial: it is not used
      as a past point, and a step that touches one is of first order.
    """
    steps = nodes.evaluations
    p = min(order, i + 1)
    if steps < lower_order_below:
        p = min(p, steps - i)
    if euler_at_final and i == steps - 1:
        return 1
    if not bool(torch.isfinite(nodes.lam[i])) or not bool(torch.isfinite(nodes.lam[i + 1])):
        return 1
    while p > 1 and not bool(torch.isfinite(nodes.lam[i + 1 - p])):
        p -= 1
    return p


def noise_or_data(nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
    """Return the quantity that a solver in ``eps`` records: ``eps``, but ``x0`` where ``alpha = 0``, since ``eps = x/sigma`` there."""
    if bool(nodes.alpha[i] == 0):
        return x0
    return from_x0("epsilon", x0, x, nodes.alpha[i], torch.as_tensor(nodes.sigma[i]))
