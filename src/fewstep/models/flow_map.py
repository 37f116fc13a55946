r"""Flow maps: models that jump along the sampling trajectory from one time to another in a single call.

Any denoiser is one by its first-order step, ``x_t = r x_s + (alpha_t - r alpha_s) D(x_s, s)`` with ``r = sigma_t/sigma_s``, which is
exact where ``D`` does not change on the way. Students are ones by training.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser, FlowMap, check_jump
from fewstep.core.prediction import aligned
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes
from fewstep.models.flow_map_student import FlowMapStudent
from fewstep.models.networks.operator import OperatorStudent
from fewstep.runtime.errors import SolverError

__all__ = ["FirstOrderMap", "OperatorMap", "StudentMap"]


@dataclass(frozen=True, eq=False)
class FirstOrderMap(FlowMap):
    """The flow map of a denoiser's first-order step, from any time to any other."""

    denoiser: Denoiser

    @property
    def anywhere(self) -> bool:
        return True

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        s, t = check_jump(self, x, s, t)
        ratio, gain = Nodes.at(self.schedule, torch.stack([s, t])).first_order(0, 1)
        return aligned(ratio, x) * x + aligned(gain, x) * self.denoiser(x, s, cond)


@dataclass(frozen=True, eq=False)
class OperatorMap(FlowMap):
    """A DSNO student (arXiv 2211.13449) as a flow map: it jumps between its own times alone."""

    student: OperatorStudent = field(repr=False)

    @property
    def called(self) -> object:
        return self.student

    @property
    def schedule(self) -> NoiseSchedule:
        return self.student.schedule

    @property
    def definition(self) -> tuple[Any, ...]:
        return astuple(self.student.form), self.student.times.tolist()

    def __call__(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return self.student.jump(x, *check_jump(self, x, s, t), cond)

    def arithmetic(self, t: Tensor) -> float:
        return self.student.arithmetic(t)

    def check(self, t: Tensor) -> None:
        times, anywhere = self.student.times, self.student.form.anywhere
        use = "use ddim on the grid optimized, with the numbers of passes that it has"
        if not bool(torch.isin(t, times).all()):
            known = ", ".join(f"{time:.6g}" for time in times.tolist())
            raise SolverError(f"an operator jumps between its own times only, {known}: {use}")
        if t[0] != times[0] and not anywhere:
            raise SolverError(f"this operator starts at t = {times[0]:g} only, not at {t[0]:g}: {use}")
        if len(t) > 2 and not anywhere:
            raise SolverError(f"this operator makes one pass only, not {len(t) - 1}: {use}")


@dataclass(frozen=True, eq=False)
class StudentMap(FlowMap):
    """A flow map student (arXiv 2406.07505): it jumps from any time that it was trained between to any later one.

    Attributes:
        student: its network.
        scale: the guidance scale that it is told, where it is told one; by default that of `default_scale`.
    """

    student: FlowMapStudent = field(repr=False)
    scale: float | Tensor | None = None

    @property
    def called(self) -> object:
        return self.student

    @property
    def schedule(self) -> NoiseSchedule:
        return self.student.schedule

    @property
    def definition(self) -> tuple[Any, ...]:
        student = self.student
        more = ([] if student.scales is None else [student.scales]) + (["single"] if student.single else [])
        return astuple(student.form), student.first, student.last, *more

    @property
    def anywhere(self) -> bool:
        return not self.student.single

    def at(self, scale: float | Tensor) -> StudentMap:
        return replace(self, scale=scale)

    def __call__(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return self.student.jump(x, *check_jump(self, x, s, t), cond, self.scale)

    def arithmetic(self, t: Tensor) -> float:
        return float(len(t) - 1)  # the small networks of its embeddings apart

    def check(self, t: Tensor) -> None:
        first, last = self.student.first, self.student.last
        if self.student.single and (len(t) > 2 or not torch.allclose(t, torch.tensor([first, last], dtype=t.dtype), rtol=1e-9)):
            raise SolverError(f"this student makes one pass alone, from t = {first:g} to {last:g}: leave nfe, grid and times out")
        slack = 1e-9 * abs(first - last)
        if not bool(((t - last) * (t - first) <= slack * abs(first - last)).all()):
            raise SolverError(f"this flow map knows times from {first:g} to {last:g}, not {t[0]:g} to {t[-1]:g}: use a grid between them")
