r"""PNDM (Liu et al., arXiv 2202.09778): iPNDM's Adams-Bashforth mean after a warm-up of higher order.

Each of its moves is DDIM's step with some ``eps``, which the paper calls the transfer part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.ddim import transfer
from fewstep.solvers.deis import ADAMS_BASHFORTH, weighted
from fewstep.solvers.stencil import noise_or_data

__all__ = ["PNDM"]

MEANS: dict[str, tuple[tuple[float, ...], ...]] = {  # of the eps so far in a step of the warm-up, oldest first
    "heun": ((1.0,), (1 / 2, 1 / 2)),
    "runge-kutta": ((1.0,), (0.0, 1.0), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
WARM_STEPS = {"heun": 1, "runge-kutta": 3}


@dataclass(frozen=True)
class PNDM(Solver):
    """PNDM, also called PLMS: the Adams-Bashforth mean of up to 4 ``eps`` in DDIM's step (Liu et al., arXiv 2202.09778).

    The weights are those of equal steps whatever the grid, so the order is 2. The first step is taken twice, the second time with the mean
    of ``eps`` at both ends: diffusers' ``PNDMScheduler`` with ``skip_prk_steps=True``, and PLMS of latent diffusion. With
    ``warm_up=runge-kutta`` the first three steps are the paper's pseudo Runge-Kutta steps of 4 evaluations. Two of these lie half-way in
    the schedule's own time, so they depend on the noise law. A step to ``sigma = 0`` has no warm-up.

    Args:
        warm_up: ``heun`` or ``runge-kutta``.

    Raises:
        SolverError: another warm-up.
    """

    warm_up: Literal["heun", "runge-kutta"] = "heun"
    references = ("2202.09778",)
    stages = 2
    order = 2

    def __post_init__(self) -> None:
        if self.warm_up not in MEANS:
            raise SolverError(f"PNDM has warm_up heun or runge-kutta, got {self.warm_up!r}")

    @property
    def memory(self) -> int:
        return 5 if self.warm_up == "heun" else 13

    def evaluations(self, steps: int, *, to_clean: bool = False) -> list[int]:
        warm = min(WARM_STEPS[self.warm_up], steps - 1 if to_clean or self.warm_up == "heun" else steps)
        return [len(MEANS[self.warm_up])] * warm + [1] * (steps - warm)

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        times = []
        for s, t, count in zip(grid.t[:-1], grid.t[1:], self.evaluations_on(grid, schedule), strict=True):
            middle = (s + t) / 2
            times += {1: [s], 2: [s, t], 4: [s, middle, middle, t]}[count]
        return Nodes.at(schedule, torch.stack([*times, grid.t[-1]]))

    def record(self, nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
        first = bool(nodes.alpha[0] == 0) and i < len(MEANS[self.warm_up])  # the whole step from alpha = 0 goes by x0
        return x0 if first else noise_or_data(nodes, i, x, x0)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        means, warm = MEANS[self.warm_up], self._warm(nodes)
        if i < warm:
            stage = i % len(means)
            x_s = x if stage == 0 else anchor
            x_t = transfer(nodes, i - stage, i + 1, x_s, weighted(means[stage], history[: stage + 1][::-1]))
            return (x_t if stage == len(means) - 1 else x_s), x_t
        starts = [*range(0, warm, len(means)), *range(warm, i + 1)]  # one evaluation of each step so far
        latest = [k for k in reversed(starts) if bool(nodes.alpha[k] > 0)][:4]
        known = [history[i - k] for k in latest]
        x_t = transfer(nodes, i, i + 1, x, weighted(ADAMS_BASHFORTH[len(known) - 1], known) if known else history[0])
        return x_t, x_t

    def _warm(self, nodes: Nodes) -> int:
        """Return the number of evaluations in the warm-up, whose steps evaluate twice at one time."""
        count = len(MEANS[self.warm_up])
        twice = [k + 2 < len(nodes.t) and bool(nodes.t[k + 1] == nodes.t[k + 2]) for k in range(0, WARM_STEPS[self.warm_up] * count, count)]
        return count * sum(twice)
