r"""SEEDS (Gonzalez et al., arXiv 2305.14267): exponential Runge-Kutta methods for the reverse-time SDE.

Their stages are those of `runge_kutta` with ``(1 + eta) h`` for ``h``, and noise between each two, see `stochastic`. The noise of one stage
is in the next ones as the SDE has it: a state but for its drift is carried on to the next stage, where new noise is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.tableau import Nodes
from fewstep.runtime.errors import SolverError
from fewstep.solvers.deis import weighted
from fewstep.solvers.phi import phi
from fewstep.solvers.runge_kutta import RES2S
from fewstep.solvers.stages import RungeKutta
from fewstep.solvers.stochastic import added, carried, check_noise

__all__ = ["SEEDS2", "SEEDS3"]


class _SEEDS(RungeKutta):
    references = ("2305.14267",)
    eta: Any  # float, as fields
    s_noise: Any
    order = 2

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        stage = i % self.stages + 1
        s, answers = i + 1 - stage, history[:stage][::-1]
        if self.eta == 0 or s + self.stages > nodes.evaluations:
            return super().update(nodes, i, anchor, x, history)
        free = x if stage == 1 else x - self._drift(nodes, s, answers[:-1])
        x_t = carried(nodes, i, i + 1, self.eta) * free + self._drift(nodes, s, answers)
        return x_t, x_t

    def _drift(self, nodes: Nodes, s: int, answers: list[Tensor]) -> Tensor:
        """Return what the answers of a step from node ``s`` add to the state after the last of them."""
        stage = len(answers)
        if bool(nodes.alpha[s] == 0):
            row = self.row(stage, torch.zeros_like(nodes.lam[s]))
            return nodes.alpha[s + stage] * weighted(row, answers) / sum(row)
        h = (1 + self.eta) * (nodes.lam[s + self.stages] - nodes.lam[s])
        return nodes.alpha[s + stage] * h * weighted(self.row(stage, h), answers)

    def forward(self, nodes: Nodes, s: int, t: int, end: int, x_s: Tensor, answers: list[Tensor]) -> Tensor:  # noqa: ARG002
        return carried(nodes, s, t, self.eta) * x_s + self._drift(nodes, s, answers)

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        same = bool(nodes.t[i] == nodes.t[i + 1])  # the last stage lies at the step's end
        return torch.zeros((), dtype=torch.float64) if same else self.s_noise * added(nodes, i, i + 1, self.eta)


@dataclass(frozen=True)
class SEEDS2(_SEEDS):
    """SEEDS-2 of ComfyUI (Gonzalez et al., arXiv 2305.14267); with ``c2=1:form=phi2`` its exponential Heun SDE, ``exp_heun_2_x0_sde``.

    Args:
        c2: the place of the second evaluation, above 0 to 1.
        eta: share of noise: 0 is the ODE, 1 the SDE of the noising process.
        s_noise: a factor of the noise.
        form: weights of the last stage, ``phi1`` as DPM-Solver++(2S) has them, ``phi2`` those of `RES2S`.

    Raises:
        SolverError: an option that is none of these.
    """

    c2: float = 0.5
    eta: float = 1.0
    s_noise: float = 1.0
    form: Literal["phi1", "phi2"] = "phi1"
    stages = 2

    def __post_init__(self) -> None:
        check_noise("SEEDS-2", self.s_noise, self.eta)
        if not 0 < self.c2 <= 1 or self.form not in ("phi1", "phi2"):
            raise SolverError(f"SEEDS-2 has c2 above 0 to 1 and form phi1 or phi2, got {self.c2} and {self.form!r}")

    @property
    def c(self) -> tuple[float, ...]:
        return (self.c2,)

    def row(self, stage: int, h: Tensor) -> Sequence[Tensor]:
        if stage == 1 or self.form == "phi2":
            return RES2S(self.c2).row(stage, h)
        one = phi(1, -h)
        return [one * (1 - 1 / (2 * self.c2)), one / (2 * self.c2)]


@dataclass(frozen=True)
class SEEDS3(_SEEDS):
    """SEEDS-3 (Gonzalez et al., arXiv 2305.14267), as ComfyUI has it: of order 3 for the ODE with ``c3 = 2/3`` alone.

    Args:
        c2, c3: the places of the second and third evaluation, ``0 < c2 < c3 <= 1``.
        eta: share of noise: 0 is the ODE, 1 the SDE of the noising process.
        s_noise: a factor of the noise.

    Raises:
        SolverError: an option that is none of these.
    """

    c2: float = 1 / 3
    c3: float = 2 / 3
    eta: float = 1.0
    s_noise: float = 1.0
    stages = 3

    def __post_init__(self) -> None:
        check_noise("SEEDS-3", self.s_noise, self.eta)
        if not 0 < self.c2 < self.c3 <= 1:
            raise SolverError(f"the stages of SEEDS-3 lie at 0 < c2 < c3 <= 1, got c2={self.c2} and c3={self.c3}")

    @property
    def order(self) -> int:
        return 3 if self.eta == 0 and abs(self.c3 - 2 / 3) < 1e-9 else 2

    @property
    def c(self) -> tuple[float, ...]:
        return (self.c2, self.c3)

    def row(self, stage: int, h: Tensor) -> Sequence[Tensor]:
        c2, c3 = self.c2, self.c3
        if stage == 1:
            return [c2 * phi(1, -c2 * h)]
        if stage == 2:
            a32 = c3**2 / c2 * phi(2, -c3 * h)
            return [c3 * phi(1, -c3 * h) - a32, a32]
        b3 = phi(2, -h) / c3
        return [phi(1, -h) - b3, torch.zeros_like(h), b3]
