r"""DPM-Solver (Lu et al., arXiv 2206.00927) in ``eps``, as a singlestep and as a multistep method.

Singlestep solvers are Runge-Kutta methods in ``lam`` with evaluations inside the step; multistep ones put polynomials through the
``eps`` of past evaluations.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import to_x0
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.runtime.front_door import check_size, is_count
from fewstep.solvers.ddim import first_order, transfer
from fewstep.solvers.deis import NoiseMultistep
from fewstep.solvers.dpm_solver_pp import Form, ThirdOrder, multistep_integral
from fewstep.solvers.phi import noise_moment
from fewstep.solvers.stages import stage_nodes
from fewstep.solvers.stencil import effective_order, noise_or_data

__all__ = ["DPMSolver2S", "DPMSolver3S", "DPMSolverFast", "DPMSolverM"]


class _Singlestep(Solver):
    """A singlestep solver with stages at ``lam_s + fraction h``.

    A step from ``alpha = 0`` (``h`` infinite) is the Runge-Kutta method of the same fractions in ``v = alpha/sigma``, for which
    ``d(x/sigma)/dv = D``; a step to ``sigma = 0`` is one evaluation of first order.
    """

    references = ("2206.00927",)
    fractions: ClassVar[tuple[float, ...]]

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        return stage_nodes(grid, schedule, [self.fractions] * grid.steps)

    def record(self, nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
        return noise_or_data(nodes, i, x, x0)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.at_stage(nodes, i % self.stages, i, anchor, x, history)

    def at_stage(self, nodes: Nodes, stage: int, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the `update` after evaluation ``i``, which is number ``stage`` of its step."""
        s, t = i - stage, i + 1
        if stage == 0:
            x0 = history[0] if bool(nodes.alpha[s] == 0) else to_x0("epsilon", history[0], x, nodes.alpha[s], nodes.sigma[s])
            return x, first_order(nodes, s, t, x, x0)
        if bool(nodes.alpha[s] == 0):
            x0 = to_x0("epsilon", history[0], x, nodes.alpha[i], nodes.sigma[i])
            x_t = self.from_zero_alpha(nodes, stage, s, t, anchor, x0, history)
        else:
            x_t = self.stage(nodes, stage, s, t, anchor, history)
        return (x_t if stage == self.stages - 1 else anchor), x_t

    @abstractmethod
    def stage(self, nodes: Nodes, stage: int, s: int, t: int, x_s: Tensor, history: list[Tensor]) -> Tensor:
        """Return the state after stage ``1, 2, ...``, from the state ``x_s`` at the step's start."""

    @abstractmethod
    def from_zero_alpha(self, nodes: Nodes, stage: int, s: int, t: int, x_s: Tensor, x0: Tensor, history: list[Tensor]) -> Tensor:
        """Return the state after a stage where ``alpha_s = 0``; ``x0`` is the newest estimate."""

    def expand(self, nodes: Nodes, s: int, t: int, x_s: Tensor, eps: Tensor, slope: Tensor) -> Tensor:
        """Return the state at node ``t`` for ``eps(lam_s + r) = eps + r slope``, by the noise form of `phi`."""
        h = nodes.lam[t] - nodes.lam[s]
        integral = noise_moment(0, h) * eps + noise_moment(1, h) * slope
        return nodes.alpha[t] / nodes.alpha[s] * (x_s - nodes.sigma[s] * integral)


@dataclass(frozen=True)
class DPMSolver2S(_Singlestep):
    """DPM-Solver-2 (arXiv 2206.00927, algorithm 1): one evaluation half-way in ``lam``.

    Its difference is weighted by ``e^h - 1``, as published.
    """

    stages = 2
    order = 2
    memory = 2
    fractions = (0.5,)

    def stage(self, nodes: Nodes, stage: int, s: int, t: int, x_s: Tensor, history: list[Tensor]) -> Tensor:
        middle, start = history[0], history[1]
        return self.expand(nodes, s, t, x_s, start + (middle - start) / (2 * 0.5), torch.zeros_like(start))

    def from_zero_alpha(self, nodes: Nodes, stage: int, s: int, t: int, x_s: Tensor, x0: Tensor, history: list[Tensor]) -> Tensor:
        return nodes.sigma[t] / nodes.sigma[s] * x_s + nodes.alpha[t] * x0  # the midpoint rule


@dataclass(frozen=True)
class DPMSolver3S(_Singlestep):
    """DPM-Solver-3 (arXiv 2206.00927, algorithm 2): evaluations at one and two thirds of the step in ``lam``."""

    stages = 3
    order = 3
    memory = 3
    fractions = (1 / 3, 2 / 3)

    def stage(self, nodes: Nodes, stage: int, s: int, t: int, x_s: Tensor, history: list[Tensor]) -> Tensor:
        newest, start = history[0], history[stage]
        slope = (newest - start) / (nodes.lam[s + stage] - nodes.lam[s])
        return self.expand(nodes, s, t, x_s, start, slope)

    def from_zero_alpha(self, nodes: Nodes, stage: int, s: int, t: int, x_s: Tensor, x0: Tensor, history: list[Tensor]) -> Tensor:
        x0 = x0 if stage == 1 else (history[2] + 3 * x0) / 4  # Heun's third-order rule
        return nodes.sigma[t] / nodes.sigma[s] * x_s + nodes.alpha[t] * x0


@dataclass(frozen=True)
class DPMSolverFast(Solver):
    """DPM-Solver-fast (arXiv 2206.00927): steps of DPM-Solver-3, and a last one or two of lower order that use up the rest.

    k-diffusion's ``sample_dpm_fast`` of ``n`` evaluations is this solver with ``remainder = n % 3`` on the grid ``logsnr``.

    Args:
        remainder: evaluations beyond a multiple of 3. With 0 the last two steps are of order 2 and 1, else the last is of this order.

    Raises:
        SolverError: another remainder.
    """

    remainder: int = 0
    references = ("2206.00927",)
    stages = 3
    memory = 3

    def __post_init__(self) -> None:
        if self.remainder not in (0, 1, 2):
            raise SolverError(f"DPM-Solver-fast has remainder 0, 1 or 2, got {self.remainder}")

    @property
    def order(self) -> int:
        return 3 if self.remainder == 2 else 2  # one step of order 1 has an error of h^2

    def evaluations(self, steps: int, *, to_clean: bool = False) -> list[int]:
        last = [2, 1][-steps:] if self.remainder == 0 else [1 if to_clean else self.remainder]
        return [3] * (steps - len(last)) + last

    def steps_for(self, nfe: int, *, to_clean: bool = False) -> int:
        if is_count(nfe):
            check_size("nfe", nfe, SolverError)
        try:
            return super().steps_for(nfe, to_clean=to_clean)
        except SolverError as error:
            if is_count(nfe) and nfe % 3 != self.remainder and not (to_clean and nfe % 3 == 2):
                raise SolverError(f"{error}, or the option remainder={nfe % 3}") from error
            raise

    def nodes(self, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
        inside = {1: (), 2: DPMSolver2S.fractions, 3: DPMSolver3S.fractions}
        return stage_nodes(grid, schedule, [inside[count] for count in self.evaluations_on(grid, schedule)])

    def record(self, nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
        return noise_or_data(nodes, i, x, x0)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        rest = nodes.evaluations % 3
        tail = nodes.evaluations - (rest or 3)  # where the steps of order 3 end
        if i < tail:
            return DPMSolver3S().at_stage(nodes, i % 3, i, anchor, x, history)
        if rest == 1 or i - tail == 2:
            return x, transfer(nodes, i, i + 1, x, history[0])
        return DPMSolver2S().at_stage(nodes, i - tail, i, anchor, x, history)


@dataclass(frozen=True)
class DPMSolverM(NoiseMultistep):
    """Multistep DPM-Solver in ``eps``, of 1, 2 or 3 past evaluations: diffusers' ``dpmsolver``, and with ``sde`` its ``sde-dpmsolver``.

    The SDE form weighs ``eps`` twice and adds noise. A step from ``alpha = 0`` or to ``sigma = 0`` is DDIM's.

    Args:
        steps: number of evaluations that the polynomial passes through, 1 to 3; at most 2 of the SDE form.
        form, third_order, lower_order_below, euler_at_final: as of `DPMSolverPP`.
        sde: solve the reverse-time SDE.

    Raises:
        SolverError: an option that is none of these.
    """

    steps: int = 2
    form: Form = "midpoint"
    third_order: ThirdOrder = "published"
    lower_order_below: int = 15
    euler_at_final: bool = False
    sde: bool = False
    references = ("2206.00927",)

    def __post_init__(self) -> None:
        if self.steps not in (1, 2, 3) or self.form not in ("midpoint", "taylor") or self.third_order not in ("published", "corrected"):
            raise SolverError(f"DPM-Solver has steps 1, 2, 3, form midpoint or taylor, third_order published or corrected; got {self}")
        if self.sde and self.steps == 3:
            raise SolverError("the SDE form of DPM-Solver has steps 1 or 2, got 3")

    @property
    def order(self) -> int:
        return 2 if self.steps == 3 and self.third_order == "published" else self.steps

    def integral(self, nodes: Nodes, i: int, eps: list[Tensor]) -> Tensor:
        p = effective_order(nodes, i, self.steps, self.lower_order_below, euler_at_final=self.euler_at_final)
        twice = 2 if self.sde and bool(nodes.sigma[i + 1] > 0) else 1
        return twice * multistep_integral(nodes, i, p, eps, noise_moment, self.form, self.third_order)

    def noise(self, nodes: Nodes, i: int) -> Tensor:
        s, t = i, i + 1
        if not self.sde or bool(nodes.alpha[s] == 0) or bool(nodes.sigma[t] == 0):
            return torch.zeros((), dtype=torch.float64)
        h = nodes.lam[t] - nodes.lam[s]
        return nodes.sigma[t] * torch.sqrt(torch.expm1(2 * h))
