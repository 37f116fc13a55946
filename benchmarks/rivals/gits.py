r"""GITS: times by dynamic programming over the deviations of a teacher's trajectory (Chen et al., arXiv 2405.11326).

Formula: a teacher of 60 iPNDM steps on EDM's levels gives states ``x_i`` and directions ``eps_i``. One Euler step from level ``i`` to ``j``
costs how much farther it ends from the chord ``x_T x_0`` than the trajectory is there, ``dev(x_i + (s_j - s_i) eps_i) - dev(x_j)``, a mean
over 256 warm-up samples. The times of ``N`` steps are the path of the least ``V_k(j) = min_i c_ji + gamma V_{k-1}(i)``, ``gamma = 1.15``;
iPNDM takes the steps.

No loss is descended and no gradient taken. Authors' numbers: their defaults for CIFAR-10, all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from benchmarks.rivals.drawn import Drawn, DrawnSampler, solver_on
from benchmarks.rivals.levels import levels_of, polynomial
from benchmarks.rivals.rival import Found, Needs, Note, Rival, _silent
from benchmarks.rivals.teacher import FIRST, Cost, Teacher
from torch import Tensor

from fewstep.core.tableau import Nodes
from fewstep.sampling.loop import steps


def deviation(z: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Return the distance of states ``z [B, d]`` from the chord through ``first`` and ``last [B, d]``, ``[B]``."""
    chord = first - last
    chord = chord / chord.norm(dim=1, keepdim=True)
    apart = z - last
    return (apart - (apart * chord).sum(1, keepdim=True) * chord).norm(dim=1)


def path(costs: Tensor, count: int, gamma: float) -> list[int]:
    """Return the levels ``[count+1]`` of the least discounted cost from the first to the last, in ``count`` steps.

    Args:
        costs: of a step from level ``i`` to ``j > i``, ``[T, T]``.
        count: steps.
        gamma: weight of what comes later, for each step.
    """
    last = len(costs) - 1
    later = torch.triu(torch.ones_like(costs, dtype=torch.bool), 1)
    to_end = torch.where(later, costs, torch.inf)
    value, chosen = to_end[:, last], list[Tensor]()
    for _ in range(count - 1):
        value, best = (to_end + gamma * value).min(1)
        chosen.append(best)
    found = [0]
    for best in reversed(chosen):
        found.append(int(best[found[-1]]))
    return [*found, last]


@dataclass(frozen=True)
class GITS(Rival):
    """GITS's hyper-parameters.

    Attributes:
        solver: of the student and of the teacher, by name.
        teacher_steps: of the teacher.
        num: warm-up samples.
        gamma: weight of later costs.
    """

    paper = "2405.11326"
    needs = Needs(backpropagation=False)
    solver: str = "ipndm"
    teacher_steps: int = 60
    num: int = 256
    gamma: float = 1.15

    def cost(self, nfe: int) -> Cost:
        return Cost(self.num * self.teacher_steps)

    def why_not(self, nfe: int) -> str:
        return f"its teacher has {self.teacher_steps} steps" if nfe > self.teacher_steps else ""

    @torch.no_grad()
    def fit(self, teacher: Teacher, nfe: int, note: Note = _silent) -> Found:
        levels_of(teacher.schedule)  # a law that it is not for is refused here
        t = polynomial(teacher.schedule, self.teacher_steps)
        total = torch.zeros(len(t), len(t), dtype=torch.float64)
        for begin in range(FIRST, FIRST + self.num, teacher.batch):
            seeds = range(begin, min(begin + teacher.batch, FIRST + self.num))
            total += self.costs(teacher, t, seeds) * len(seeds)
        chosen = t[torch.tensor(path(total / self.num, nfe, self.gamma))]
        return Found(DrawnSampler.of(Drawn(solver_on(self.solver, teacher.schedule, chosen))), [])

    def costs(self, teacher: Teacher, t: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return the mean cost ``[T, T]`` of an Euler step between any two of the times ``t [T]``, over some seeds."""
        nodes, states, directions = Nodes.at(teacher.schedule, t), list[Tensor](), list[Tensor]()
        (x, cond), level, end = teacher.start(seeds), torch.exp(-nodes.lam), None
        for step in steps(teacher.denoiser, solver_on(self.solver, teacher.schedule, t), x, cond):
            z = (step.x / nodes.alpha[step.i]).double().cpu().flatten(1)
            states.append(z)
            directions.append((z - step.x0.double().cpu().flatten(1)) / level[step.i])
            end = step.x_next
        assert end is not None  # there is a step
        states.append((end / nodes.alpha[-1]).double().cpu().flatten(1))
        own = [deviation(z, states[0], states[-1]).mean() for z in states]
        made = torch.zeros(len(t), len(t), dtype=torch.float64)
        for i, (z, direction) in enumerate(zip(states[:-1], directions, strict=True)):
            for j in range(i + 1, len(t)):
                made[i, j] = deviation(z + (level[j] - level[i]) * direction, states[0], states[-1]).mean() - own[j]
        return made
