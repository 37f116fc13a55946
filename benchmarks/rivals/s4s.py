r"""S4S and S4S-Alt: learn the coefficients of a linear multistep solver, and its times in turn (Frankel et al., arXiv 2502.17423).

Formula: ``x_t = (sigma_t/sigma_s) x_s + alpha_t (1 - e^{-h}) sum_{k<K} c_k D_{s-k}`` with free ``c [N, K]``; ``K = 3``, from DPM-Solver++
3M. S4S has a schedule that is given; S4S-Alt learns times (as LD3 does) and coefficients in turn.

Loss: the relaxed objective, ``min |Psi(x') - Phi(x_T)|^2`` over ``x'`` in a ball around ``x_T``.

Assumed, since the authors published no code: Adam at 5e-3 with a cosine to zero for coefficients and times, 700 pairs and 100 held out,
batches of 20, 1000 iterations, EDM's levels for S4S, eight rounds of the alternation, a ball as LD3's. Theirs is a distance of LPIPS in
pixel space and L2 in latent space; here it is L2. The teacher takes 64 evaluations, so that its own error is no floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from benchmarks.rivals.drawn import Drawn, DrawnSampler, solver_on, steps_of, tableau_of, unrolled
from benchmarks.rivals.levels import polynomial
from benchmarks.rivals.rival import Found, Needs, Note, Rival, _silent
from benchmarks.rivals.teacher import Cost, Teacher
from benchmarks.rivals.times import LearnedTimes
from benchmarks.rivals.training import Descent, Family, descend
from torch import Tensor, nn

from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes

PARENT = "dpm-solver-pp-3m"  # whose last steps are of lower order on few steps, as in its own code


class Multistep(Family):
    """A linear multistep solver with free coefficients on times that may move."""

    def __init__(self, schedule: NoiseSchedule, t: Tensor, *, move: bool) -> None:
        super().__init__()
        self.schedule, self.move = schedule, move
        self.times = LearnedTimes(schedule, t)
        ratio, weights = steps_of(solver_on(PARENT, schedule, t))
        _, gain = Nodes.at(schedule, t).first_order()
        self.coefficients = nn.Parameter((weights / gain[:, None]).clone())
        self.start = t

    def drawn(self) -> Drawn:
        nodes = Nodes.at(self.schedule, self.times.times() if self.move else self.start)
        ratio, gain = nodes.first_order()
        return Drawn(tableau_of(nodes, *unrolled(ratio, gain[:, None] * self.coefficients)), self.times.told() if self.move else None)


@dataclass(frozen=True)
class S4S(Rival):
    """S4S's hyper-parameters.

    Attributes:
        alternations: rounds of coefficients and times; 0 for coefficients alone.
        batch, num, held_out: of the descent.
        rate: of Adam.
        radius: of the ball, per number of a sample.
    """

    paper = "2502.17423"
    needs = Needs()
    iterations: int = 1000
    alternations: int = 0
    batch: int = 20
    num: int = 700
    held_out: int = 100
    rate: float = 5e-3
    radius: float = 1e-5

    def descent(self, dim: int) -> Descent:
        """Return how coefficients for samples with ``dim`` numbers are descended."""
        return Descent(self.iterations, self.batch, self.num, self.held_out, radius=self.radius * dim)

    def cost(self, nfe: int) -> Cost:
        return self.descent(1).cost(nfe)

    def fit(self, teacher: Teacher, nfe: int, note: Note = _silent) -> Found:
        family = Multistep(teacher.schedule, polynomial(teacher.schedule, nfe), move=bool(self.alternations))
        numbers = torch.optim.Adam([family.coefficients], lr=self.rate)
        times = torch.optim.Adam([family.times.shares, family.times.shifts], lr=self.rate)
        span = max(1, self.iterations // (2 * self.alternations)) if self.alternations else self.iterations + 1
        descent = self.descent(math.prod(teacher.problem.shape))
        curve = descend(family, teacher, descent, [numbers, times], active=lambda i: [(numbers, times)[(i - 1) // span % 2]], note=note)
        return Found(DrawnSampler.of(family.drawn()), curve)
