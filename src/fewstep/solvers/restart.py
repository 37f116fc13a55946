"""Restart sampling (Xu et al., arXiv 2306.14878): Heun's steps, and part of the way made again after noise has raised the level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid, karras_roots
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes
from fewstep.runtime.errors import SolverError
from fewstep.runtime.front_door import is_count
from fewstep.solvers.churn import RaisedHeun
from fewstep.solvers.stochastic import check_noise

__all__ = ["Restart"]

RHO = 7.0  # of the levels on the way down again, as A1111 has it


@dataclass(frozen=True)
class Restart(RaisedHeun):
    """Restart sampling with Heun's method (Xu et al., arXiv 2306.14878, algorithm 1), for any law in ``r = sigma/alpha``.

    At the inner level of the grid nearest to ``restart_min`` noise raises the state to the grid's level nearest to ``restart_max``, of
    those that lie higher and are finite; where there is none, to ``restart_max/restart_min`` times as much. It goes down again in
    ``restart_steps`` steps between Karras' levels, ``restarts`` times. These evaluations come on top of the grid's own. A grid of one step
    has no inner level, and is not restarted. Defaults are those of A1111's Restart of 20 to 35 steps, which counts the 9 among them.

    Args:
        restart_steps: steps on the way down again, of 2 evaluations.
        restarts: how often.
        restart_min, restart_max: noise levels ``sigma/alpha``.
        s_noise: a factor of the noise.

    Raises:
        SolverError: an option that is none of these.
    """

    restart_steps: int = 9
    restarts: int = 1
    restart_min: float = 0.1
    restart_max: float = 2.0
    s_noise: float = 1.0
    references = ("2306.14878",)

    def __post_init__(self) -> None:
        check_noise("Restart", self.s_noise)
        if not (is_count(self.restart_steps) and is_count(self.restarts) and 0 < self.restart_min < self.restart_max < math.inf):
            raise SolverError(
                f"Restart has restart_steps and restarts of at least 1, and noise from restart_min up to a larger restart_max, got {self}"
            )

    @property
    def stages(self) -> int:
        return 2 + self._again

    @property
    def _again(self) -> int:
        return 2 * self.restart_steps * self.restarts

    def evaluations(self, steps: int, *, to_clean: bool = False) -> list[int]:
        """Return the number of evaluations in each of ``steps`` intervals; the restarts count in the first, see `evaluations_on`."""
        counts = [2] * (steps - 1) + [1 if to_clean else 2]
        return [counts[0] + self._again, *counts[1:]] if steps > 1 else counts

    def evaluations_on(self, grid: TimeGrid, schedule: NoiseSchedule) -> list[int]:
        counts = [2] * (grid.steps - 1) + [1 if bool(schedule.sigma(grid.t[-1]) == 0) else 2]
        if grid.steps > 1:
            counts[self._lowest(grid, schedule) - 1] += self._again
        return counts

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        t = grid.t
        times = [t[:1], *(one for k in range(1, grid.steps) for one in (t[k : k + 1], t[k : k + 1]))]
        if grid.steps > 1:
            lowest = self._lowest(grid, schedule)
            down = self._down(grid, schedule, lowest)
            again = [down[:1], *(one for k in range(1, len(down)) for one in (down[k : k + 1], down[k : k + 1]))][:-1]
            times[2 * lowest : 2 * lowest] = again * self.restarts  # behind the evaluation at the end of the step to that level
        return Nodes.at(schedule, torch.cat([*times, t[-1:]] if bool(schedule.sigma(t[-1]) == 0) else [*times, t[-1:], t[-1:]]))

    def _lowest(self, grid: TimeGrid, schedule: NoiseSchedule) -> int:
        """Return the number of the level that is restarted from."""
        levels = torch.exp(-schedule.lam(grid.t.detach())[1:-1])
        return int((levels - self.restart_min).abs().argmin()) + 1

    def _down(self, grid: TimeGrid, schedule: NoiseSchedule, lowest: int) -> Tensor:
        """Return the times ``[restart_steps + 1]`` of a restart, from its highest level to its lowest."""
        lam = schedule.lam(grid.t[lowest : lowest + 1])[0]
        above = schedule.lam(grid.t.detach())[:lowest]
        above = torch.exp(-above[torch.isfinite(above)])
        most = float(torch.exp(-schedule.lam(schedule.ends[0])))
        raised = min(float(torch.exp(-lam.detach())) * self.restart_max / self.restart_min, most)
        high = above[int((above - self.restart_max).abs().argmin())] if len(above) else torch.tensor(raised, dtype=torch.float64)
        roots = karras_roots(high, torch.exp(-lam), self.restart_steps + 1, RHO)
        return torch.cat([schedule.t_of_lam(-RHO * torch.log(roots))[:-1], grid.t[lowest : lowest + 1]])
