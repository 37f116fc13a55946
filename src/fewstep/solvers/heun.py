r"""Euler's and Heun's methods for ``dz/dr = (z - D)/r``, ``z = x/alpha``, ``r = sigma/alpha`` (EDM, arXiv 2206.00364, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import to_x0
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.ddim import first_order, transfer
from fewstep.solvers.deis import weighted
from fewstep.solvers.stencil import noise_or_data

__all__ = ["Euler", "Heun", "HeunPP2"]


@dataclass(frozen=True)
class Euler(Solver):
    """Euler's method in ``z = x/alpha`` over ``r = sigma/alpha``: ``z_t = z_s + (r_t - r_s) dz/dr`` (EDM, arXiv 2206.00364).

    In these variables it and deterministic DDIM are the same numbers.
    """

    references = ("2206.00364",)
    order = 1
    memory = 1

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        x_t = first_order(nodes, i, i + 1, x, history[0])
        return x_t, x_t


def trapezoid(nodes: Nodes, s: int, t: int, x_s: Tensor, x: Tensor, history: list[Tensor]) -> Tensor:
    """Return the state at node ``t`` of Heun's step from ``s``, by what was recorded at the state ``x`` of ``t`` and at ``x_s``."""
    alpha, sigma = nodes.alpha, nodes.sigma
    end, start = history[0], history[1]
    if bool(alpha[s] == 0):
        x0 = to_x0("epsilon", end, x, alpha[t], sigma[t])
        return sigma[t] / sigma[s] * x_s + alpha[t] * (start + x0) / 2
    r_s, r_t = sigma[s] / alpha[s], sigma[t] / alpha[t]
    return alpha[t] * (x_s / alpha[s] + (r_t - r_s) * (start + end) / 2)


def velocity(nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
    """Return the slope ``dy/dw`` at node ``i`` of ``y = x/(alpha + sigma)`` over ``w = sigma/(alpha + sigma)``: a flow's velocity."""
    return (x - (nodes.alpha[i] + nodes.sigma[i]) * x0) / nodes.sigma[i]


def flow_step(nodes: Nodes, s: int, t: int, x: Tensor, slope: Tensor) -> Tensor:
    """Return the state at node ``t`` after a step from ``s`` with this velocity."""
    (one, two), (w_s, w_t) = (nodes.alpha + nodes.sigma)[[s, t]], (nodes.sigma / (nodes.alpha + nodes.sigma))[[s, t]]
    return two * (x / one + (w_t - w_s) * slope)


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method in ``z = x/alpha`` over ``r = sigma/alpha``: an Euler step, then the trapezoid (EDM, arXiv 2206.00364, algorithm 1).

    It makes two evaluations a step, the second at the step's end; ``dz/dr`` is ``eps``. A last step to ``sigma = 0`` is Euler's (one
    evaluation). A first step from ``alpha = 0``, where ``r`` is infinite, is the trapezoid in ``1/r`` instead: ``d(x/sigma)/d(1/r) = D``.

    Args:
        law: ``eps``, or ``flow`` for the trapezoid in ``y = x/(alpha + sigma)`` over a flow's time ``w = sigma/(alpha + sigma)``, whose
            slope is a flow's velocity: what ComfyUI and diffusers run on flow models.

    Raises:
        SolverError: another law.
    """

    law: Literal["eps", "flow"] = "eps"
    references = ("2206.00364",)
    stages = 2
    order = 2
    memory = 2

    def __post_init__(self) -> None:
        if self.law not in ("eps", "flow"):
            raise SolverError(f"Heun's method has law eps or flow, got {self.law!r}")

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        t = torch.cat([grid.t[:1], grid.t[1:].repeat_interleave(2)])  # s, t, t, u, u, ..., end; stages at (s, t), (t, u), ...
        to_clean = bool(schedule.sigma(grid.t[-1]) == 0)
        return Nodes.at(schedule, t[:-1] if to_clean else t)

    def record(self, nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
        return noise_or_data(nodes, i, x, x0) if self.law == "eps" else velocity(nodes, i, x, x0)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        alpha, sigma = nodes.alpha, nodes.sigma
        t = i + 1
        if self.law == "flow":
            slope = history[0] if i % 2 == 0 else (history[0] + history[1]) / 2
            s, x_s = (i, x) if i % 2 == 0 else (i - 1, anchor)
            x_t = flow_step(nodes, s, t if s == i else i, x_s, slope)
            return (x_s if s == i else x_t), x_t
        if i % 2 == 0:
            s = i
            x0 = history[0] if bool(alpha[s] == 0) else to_x0("epsilon", history[0], x, alpha[s], sigma[s])
            return x, first_order(nodes, s, t, x, x0)
        x_t = trapezoid(nodes, i - 1, i, anchor, x, history)
        return x_t, x_t


@dataclass(frozen=True)
class HeunPP2(Solver):
    """Heun++ of ComfyUI (``heunpp2``): the mean of three slopes, found by two Euler steps ahead, with weights that depend on the level.

    With ``w_k = r_k / (n r_0)`` for the levels ``r`` of the later slopes and of the grid's start, a step is ``z_t = z_s + (r_t - r_s) ((1 -
    sum w) eps_s + sum w_k eps_k)`` of ``n = 3`` slopes, ``n = 2`` in the last step but one, and Euler's in the last. It has no paper; the
    weights are those of no method of order 2. On a grid from ``alpha = 0``, where ``r_0`` is infinite, it is Euler's method.
    """

    references = ("2206.00364",)
    stages = 3
    order = 1
    memory = 3

    def evaluations(self, steps: int, *, to_clean: bool = False) -> list[int]:  # noqa: ARG002 - the last step is Euler's anyhow
        return [3] * (steps - 2) + [2, 1][-steps:]

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        counts = self.evaluations(grid.steps)
        times = [grid.t[k : k + count] for k, count in enumerate(counts)]
        return Nodes.at(schedule, torch.cat([*times, grid.t[-1:]]))

    def record(self, nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
        return noise_or_data(nodes, i, x, x0)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        left = nodes.evaluations - i  # 3 and more, but 3 in the last step but one, where 1 is the last step's
        stage = -left % 3 if left > 1 else 0
        s, t = i - stage, i - stage + 1
        slopes = 1 if left == 1 else 2 if left + stage == 3 else 3
        if stage < slopes - 1 or slopes == 1:
            return (anchor if stage else x), transfer(nodes, i, i + 1, x, history[0])
        if bool(nodes.alpha[s] == 0):  # weights r/r_0 = 0
            x_t = first_order(nodes, s, t, anchor, history[stage])
        else:
            r = nodes.sigma / nodes.alpha
            later = [r[s + k] / (slopes * r[0]) for k in range(1, slopes)]
            mean = weighted([1 - sum(later), *later], history[:slopes][::-1])
            x_t = nodes.alpha[t] * (anchor / nodes.alpha[s] + (r[t] - r[s]) * mean)
        return x_t, x_t
