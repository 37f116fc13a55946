r"""Bespoke non-stationary solvers: learn every coefficient and every time (Shaul et al., arXiv 2403.01329).

Formula: ``x_{i+1} = a_i x_0 + sum_{j<=i} b_ij u_j(x_j)`` with free ``a [N]``, ``b [N, N]`` and times ``t [N-1]``, where ``x_0`` is the
noise. A velocity ``u_j`` is affine in the state and the network's answer, so the same solvers are affine in the noise and the answers,
which are the coefficients here, in the coordinates of a rectified flow (where all of them are of size 1).

Start: Euler's method on uniform times of the flow, which is DDIM there.

Loss: ``mean log |x_N - x(1)|^2``, the PSNR up to a factor.

Authors' numbers, from the paper's text: 520 pairs to learn from, Adam, the numbers with the best PSNR on held-out pairs kept. Assumed: rate
5e-4 with a cosine to zero, batches of 40, 15,000 iterations, 256 pairs held out (they have 1024). Their pairs come from an adaptive RK45;
here from 64 evaluations of UniPC-3. A descent that has not gained in a quarter of its iterations ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from benchmarks.rivals.drawn import Drawn, DrawnSampler, solver_on, steps_of, tableau_of, unrolled
from benchmarks.rivals.levels import levels_of, times_at
from benchmarks.rivals.rival import Found, Needs, Note, Rival, _silent
from benchmarks.rivals.teacher import Cost, Teacher
from benchmarks.rivals.times import FLOW, LearnedTimes
from benchmarks.rivals.training import Descent, Family, descend
from torch import Tensor, nn

from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes


def flow_uniform(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Return the times ``[steps+1]`` that are uniform in the time of a rectified flow, ``s / (1 + s)``."""
    first, last = FLOW.of(levels_of(schedule)).tolist()
    inner = torch.linspace(first, last, steps + 1, dtype=torch.float64)[1:-1]
    return torch.cat([schedule.ends[:1], times_at(schedule, FLOW.level(inner)), schedule.ends[1:]])


class NonStationary(Family):
    """All solvers that are affine in the noise and the answers so far, on free times."""

    def __init__(self, schedule: NoiseSchedule, steps: int) -> None:
        super().__init__()
        self.schedule = schedule
        self.times = LearnedTimes(schedule, flow_uniform(schedule, steps), FLOW)
        nodes = Nodes.at(schedule, self.times.times().detach())
        start, answers = unrolled(*steps_of(solver_on("dpm-solver-pp-2m:steps=1", schedule, nodes.t)))
        scale = self._scale(nodes)
        self.a = nn.Parameter(start * nodes.sigma[0] / scale)
        self.b = nn.Parameter(answers / scale[:, None])

    @staticmethod
    def _scale(nodes: Nodes) -> Tensor:
        """Return the size of the states after each step, ``alpha + sigma``, in units of the flow's."""
        return (nodes.alpha + nodes.sigma)[1:]

    def drawn(self) -> Drawn:
        nodes = Nodes.at(self.schedule, self.times.times())
        scale = self._scale(nodes)
        return Drawn(tableau_of(nodes, self.a * scale / nodes.sigma[0], torch.tril(self.b) * scale[:, None]), self.times.plain(), "sample")


def log_error(distances: Tensor) -> Tensor:
    """Return the mean logarithm of mean square errors ``[B]``."""
    return torch.log(distances.clamp_min(1e-30)).mean()


@dataclass(frozen=True)
class BNS(Rival):
    """The hyper-parameters of bespoke non-stationary solvers.

    Attributes:
        batch, num, held_out: of the descent.
        rate: of Adam.
    """

    paper = "2403.01329"
    needs = Needs()
    iterations: int = 15_000
    batch: int = 40
    num: int = 520
    held_out: int = 256
    rate: float = 5e-4

    @property
    def descent(self) -> Descent:
        """How it descends."""
        return Descent(self.iterations, self.batch, self.num, self.held_out)

    def cost(self, nfe: int) -> Cost:
        return self.descent.cost(nfe)

    def fit(self, teacher: Teacher, nfe: int, note: Note = _silent) -> Found:
        family = NonStationary(teacher.schedule, nfe)
        optimizer = torch.optim.Adam([family.a, family.b, family.times.shares], lr=self.rate)
        curve = descend(family, teacher, self.descent, [optimizer], objective=log_error, note=note)
        return Found(DrawnSampler.of(family.drawn()), curve)
