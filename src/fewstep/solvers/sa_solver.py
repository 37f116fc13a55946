r"""SA-Solver (Xue et al., arXiv 2309.05019): stochastic Adams methods in ``x0``, whose corrected states are evaluated again or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.deis import weighted
from fewstep.solvers.phi import interpolation_weights, plain_moment
from fewstep.solvers.stencil import ALWAYS, effective_order
from fewstep.solvers.stochastic import added, carried, check_noise, sde_moment

__all__ = ["SASolver", "SASolverPECE"]


@dataclass(frozen=True)
class SASolver(Solver):
    """SA-Solver (arXiv 2309.05019, algorithm 1): the polynomial through past answers in the SDE of ``eta = tau^2``, see `stochastic`.

    The predicted state is evaluated, and corrected by its own answer with the same noise: ``x + alpha_t (corrector - predictor)``.

    Args:
        predictor: evaluations that the predictor's polynomial passes through, 1 to 4.
        corrector: those of the corrector, the newest among them, 1 to 4; 0 for none.
        tau: the noise: 0 is the ODE, 1 the SDE of the noising process.
        tau_min, tau_max: the noise levels ``sigma/alpha`` between which a step that starts there has noise; elsewhere ``tau`` is 0.
        form: ``exact`` weights, or ``simple``: those of 2 evaluations weigh the slope by ``h^2/2``, as the authors' code and diffusers do.
        s_noise: a factor of the noise.
        lower_order_below: grids of fewer steps end with orders ..., 2, 1.

    Raises:
        SolverError: an option that is none of these.
    """

    predictor: int = 2
    corrector: int = 2
    tau: float = 1.0
    tau_min: float = 0.0
    tau_max: float = math.inf
    form: Literal["exact", "simple"] = "exact"
    s_noise: float = 1.0
    lower_order_below: int = ALWAYS
    references = ("2309.05019",)

    def __post_init__(self) -> None:
        check_noise("SA-Solver", self.s_noise)
        if self.predictor not in (1, 2, 3, 4) or self.corrector not in (0, 1, 2, 3, 4) or self.form not in ("exact", "simple"):
            raise SolverError(f"SA-Solver has predictor 1 to 4, corrector 0 to 4, form exact or simple, got {self}")
        if not (0 <= self.tau < math.inf and 0 <= self.tau_min <= self.tau_max):
            raise SolverError(f"SA-Solver has a tau of at least 0, and noise between tau_min and tau_max, which is above it, got {self}")

    @property
    def order(self) -> int:
        ode = min(self.corrector, self.predictor + 1) if self.corrector else self.predictor
        return ode if self.tau == 0 else min(ode, 2)

    @property
    def memory(self) -> int:
        return max(self.predictor + (self.corrector > 0), self.corrector)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        t = i + 1
        used = self._corrected_by(nodes, i)
        if used:
            change = self._integral(nodes, i - 1, i, used, history) - self._predicted(nodes, i - 1, history[1:])
            x = x + nodes.alpha[i] * change
        x_t = carried(nodes, i, t, self._eta(nodes, i)) * x + nodes.alpha[t] * self._predicted(nodes, i, history)
        return x_t, x_t

    def _eta(self, nodes: Nodes, i: int) -> float:
        level = float(torch.exp(-nodes.lam[i].detach()))
        return self.tau**2 if self.tau_min <= level <= self.tau_max else 0.0

    def _corrected_by(self, nodes: Nodes, i: int) -> int:
        """Return how many answers correct the state of evaluation ``i``, that of ``i`` itself among them; 0 if none do."""
        if not self.corrector or i == 0 or not bool(torch.isfinite(nodes.lam[i - 1])):
            return 0
        lowered = nodes.evaluations - i + 2 if nodes.evaluations < self.lower_order_below else self.corrector
        return min(self.corrector, int(torch.isfinite(nodes.lam[: i + 1]).sum()), lowered)

    def _predicted(self, nodes: Nodes, i: int, history: list[Tensor]) -> Tensor:
        """Return the integral over the step after evaluation ``i`` by the answers up to it, newest first."""
        return self._integral(nodes, i, i, effective_order(nodes, i, self.predictor, self.lower_order_below), history)

    def _integral(self, nodes: Nodes, s: int, newest: int, p: int, history: list[Tensor]) -> Tensor:
        """Return the integral over the step from node ``s`` of the polynomial through ``p`` answers, the newest at node ``newest``."""
        h, moment = nodes.lam[s + 1] - nodes.lam[s], sde_moment(self._eta(nodes, s))
        if p == 1:
            return moment(0, h) * history[0]
        moments = [moment(k, h) for k in range(p)]
        if p == 2 and self.form == "simple":
            moments[1] = (1 + self._eta(nodes, s)) * plain_moment(1, h)
        offsets = [nodes.lam[newest - j] - nodes.lam[s] for j in range(p)]
        return weighted(interpolation_weights(offsets, moments), history)

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        return self.s_noise * added(nodes, i, i + 1, self._eta(nodes, i))


@dataclass(frozen=True)
class SASolverPECE(SASolver):
    """SA-Solver in its PECE form: the corrected state is evaluated, and that answer takes the predicted one's place (arXiv 2309.05019).

    A step makes two evaluations, the second at its end, and the last one makes one. A first step from ``alpha = 0`` is not corrected, so
    that its end is evaluated twice. Its ``s_noise``, orders and ``tau`` are those of `SASolver`.

    Raises:
        SolverError: an option that is none of `SASolver`'s, or no corrector.
    """

    stages = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.corrector:
            raise SolverError("SA-Solver in its PECE form evaluates corrected states: take corrector 1 to 4, or sa-solver:corrector=0")

    @property
    def memory(self) -> int:
        return max(2 * self.predictor, 2 * self.corrector - 2)

    def evaluations(self, steps: int, *, to_clean: bool = False) -> list[int]:  # noqa: ARG002 - no last step is corrected
        return [2] * (steps - 1) + [1]

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        return Nodes.at(schedule, torch.cat([grid.t[:1], grid.t[1:-1].repeat_interleave(2), grid.t[-1:]]))

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        grid, s = _once(nodes), i // 2
        t = s + 1
        if i % 2 == 0:  # the answers at corrected states
            x_t = carried(grid, s, t, self._eta(grid, s)) * x + grid.alpha[t] * self._predicted(grid, s, history[::2])
            return x_t, x_t
        used, answers = self._corrected_by(grid, t), [history[0], *history[1::2]]
        if used:
            x = x + grid.alpha[t] * (self._integral(grid, s, t, used, answers) - self._predicted(grid, s, answers[1:]))
        return x, x

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        return torch.zeros((), dtype=torch.float64) if i % 2 else super().noise(_once(nodes), i // 2)


def _once(nodes: Nodes) -> Nodes:
    """Return the ends of the steps, from nodes that have each inner one twice."""
    return Nodes(*(torch.cat([values[::2], values[-1:]]) for values in nodes))
