r"""LD3: learn the times of a given solver (Tong et al., arXiv 2405.15506).

Formula: the solver's own, on times ``t(theta)`` whose log-SNR are ``lam_T + (lam_0 - lam_T) cumsum(softmax(theta))``; the network is told
times of its own, ``lam_i + delta_i``, and its noise is used at ``lam_i``.

Loss: soft teacher forcing, ``min |Psi_theta(x') - Phi(x_T)|^2`` over ``x'`` with ``|x' - x_T| <= r sigma_T``.

Authors' numbers (their configuration for CIFAR-10): UniPC of order 3 with ``bh1`` from uniform log-SNR, 50 pairs to learn from and 50 held
out, batches of 2, seven rounds over the pairs of which the first two move the times alone, RMSprop 0.005 with momentum 0.9 for the times,
SGD 0.1 for the shifts, gradients clipped to 1, rates times 0.8 on a plateau, shifts within half of the smallest step.

Assumed: the radius is 1e-5 per number of a sample (their logs say 0.03072 for 3072 numbers), and a start moves by half a radius at a time
(their rate is set by a function we do not have). Held-out starts do not move. Theirs is a distance of LPIPS in pixel space and L2 in latent
space; here it is L2. The teacher takes 64 evaluations, not 20, so that its own error is no floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from benchmarks.rivals.drawn import Drawn, DrawnSampler, solver_on
from benchmarks.rivals.rival import Found, Needs, Note, Rival, _silent
from benchmarks.rivals.teacher import Cost, Teacher
from benchmarks.rivals.times import LearnedTimes
from benchmarks.rivals.training import Descent, Family, descend

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule


class TimesOf(Family):
    """A solver by name on learned times."""

    def __init__(self, schedule: NoiseSchedule, solver: str, nfe: int) -> None:
        super().__init__()
        self.schedule, self.solver = schedule, solver
        self.times = LearnedTimes(schedule, TimeGrid.logsnr(schedule, nfe).t)

    def drawn(self) -> Drawn:
        return Drawn(solver_on(self.solver, self.schedule, self.times.times()), self.times.told())


@dataclass(frozen=True)
class LD3(Rival):
    """LD3's hyper-parameters.

    Attributes:
        solver: whose times are learned, by name.
        batch, num, held_out: of the descent.
        rounds: share of the iterations in which the shifts stay zero.
        radius: of the ball, per number of a sample.
    """

    paper = "2405.15506"
    needs = Needs()
    iterations: int = 175
    solver: str = "unipc-3:weights=bh1"
    batch: int = 2
    num: int = 50
    held_out: int = 50
    rounds: float = 2 / 7
    radius: float = 1e-5

    def descent(self, dim: int) -> Descent:
        """Return how times of samples with ``dim`` numbers are descended."""
        radius = self.radius * dim
        return Descent(self.iterations, self.batch, self.num, self.held_out, radius=radius, clip=1.0, plateau=0.8)

    def cost(self, nfe: int) -> Cost:
        return self.descent(1).cost(nfe)

    def fit(self, teacher: Teacher, nfe: int, note: Note = _silent) -> Found:
        family = TimesOf(teacher.schedule, self.solver, nfe)
        levels = torch.optim.RMSprop([family.times.shares], lr=0.005, momentum=0.9)
        shifts = torch.optim.SGD([family.times.shifts], lr=0.1)
        alone = self.rounds * self.iterations
        descent = self.descent(math.prod(teacher.problem.shape))
        curve = descend(
            family, teacher, descent, [levels, shifts], active=lambda i: [levels] if i <= alone else [levels, shifts], note=note
        )
        return Found(DrawnSampler.of(family.drawn()), curve)
