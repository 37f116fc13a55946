r"""EPD-Solver: several evaluations inside each step, side by side (Zhu et al., arXiv 2507.14797).

Formula, in ``dx/ds = d(x, s) = (x - D(x, s)) / s``: from ``s_n`` Euler steps lead to ``s_k = s_n^{1-r_k} s_{n+1}^{r_k}``, ``k <= K``, and

    x_{n+1} = x_n + (s_{n+1} - s_n) sum_k w_k c_k d_k,      d_k = (x_k - D(x_k, a_k s_k)) / s_k,      w on a simplex.

``r, w, c, a`` are numbers of each step, the same for all images. The ``K`` evaluations do not depend on each other, so a machine with room
makes them at once, and the authors count them as one; here each counts. A sampler of ``M`` steps then has ``(1 + K) M`` evaluations, one
fewer where the first direction is ``x / sqrt(1 + s^2)`` for nothing (AFS).

Loss: ``|x_{n+1} - y_{n+1}|^2`` to a teacher's state, one step after the other.

Authors' numbers: 10,000 noises, DPM-Solver-2 with three levels inserted as teacher, ``c`` and ``a`` within 5 percent of 1. Assumed: two
points, batches of 128 and Adam at 5e-3 as AMED-Solver's, on which theirs is built, EDM's levels, each step begun at the teacher's state,
points at first at one third and two thirds of the way. ``exact=64`` follows exact trajectories instead of their teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from benchmarks.rivals.amed import check_law
from benchmarks.rivals.drawn import Drawn, DrawnSampler, analytical_first, run_drawn, tableau_of
from benchmarks.rivals.rival import Found, Needs, Note, Rival, _silent
from benchmarks.rivals.stepwise import Along, learn_steps
from benchmarks.rivals.teacher import Cost, Teacher
from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.core.first_answer import FirstAnswer
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes


class Ensemble(nn.Module):
    """The numbers of all steps: where the points lie, their weights, and two scales.

    Args:
        schedule: the noise law.
        t: the times of the steps, ``[M+1]``.
        points: in each.
        scale: how far from 1 the scales may be.
        first: the first answer, if it is foreseen.
    """

    def __init__(self, schedule: NoiseSchedule, t: Tensor, points: int, scale: float, first: FirstAnswer | None) -> None:
        super().__init__()
        self.schedule, self.t, self.scale, self.first, self.points = schedule, t, scale, first, points
        steps = len(t) - 1
        place = torch.arange(1, points + 1, dtype=torch.float64) / (points + 1)
        self.place = nn.Parameter(torch.logit(place).repeat(steps, 1))
        self.weight = nn.Parameter(torch.zeros(steps, points, dtype=torch.float64))
        self.direction = nn.Parameter(torch.zeros(steps, points, dtype=torch.float64))
        self.time = nn.Parameter(torch.zeros(steps, points, dtype=torch.float64))

    def drawn(self, begin: int = 0, end: int | None = None) -> Drawn:
        """Return the steps from ``begin`` to ``end`` as one solver; by default all of them."""
        end = len(self.t) - 1 if end is None else end
        rows = (1 + self.points) * (end - begin)
        units, states, levels, told = torch.eye(1 + rows, dtype=torch.float64), list[Tensor](), list[Tensor](), list[Tensor]()
        x = units[0]
        for k in range(begin, end):
            s, t = self.t[k], self.t[k + 1]
            place = torch.sigmoid(self.place[k])
            inner = s ** (1 - place) * t**place
            asked = 1 + len(levels)  # of the evaluation at the step's beginning, among the units
            direction, total = (x - units[asked]) / s, torch.zeros_like(x)
            weights = torch.softmax(self.weight[k], 0) * (1 + self.scale * torch.tanh(self.direction[k]))
            points = [x + (level - s) * direction for level in inner]
            for j, (point, level) in enumerate(zip(points, inner, strict=True)):
                total = total + weights[j] * (point - units[asked + 1 + j]) / level
            levels += [s, *inner]
            told += [s, *(inner * (1 + self.scale * torch.tanh(self.time[k])))]
            x = x + (t - s) * total
            states += [*points, x]
        made = torch.stack(states)
        nodes = Nodes.at(self.schedule, torch.stack([*levels, self.t[end]]))
        first = self.first if begin == 0 else None
        return Drawn(tableau_of(nodes, made[:, 0], made[:, 1:], first), tuple(told), "sample")


@dataclass(frozen=True)
class EPD(Rival):
    """EPD-Solver's hyper-parameters.

    Attributes:
        points: evaluations side by side in each step.
        scale: how far from 1 the scales of directions and told levels may be.
        spacing, solver, inserted, batch, rate, from_teacher, exact: see `Along`.
    """

    paper = "2507.14797"
    needs = Needs()
    iterations: int = 79
    points: int = 2
    scale: float = 0.05
    spacing: str = "polynomial"
    solver: str = "dpm-solver-2s"
    inserted: int = 3
    batch: int = 128
    rate: float = 5e-3
    from_teacher: bool = True
    exact: int | None = None

    def steps(self, nfe: int) -> int:
        """Return the steps of a sampler of ``nfe`` evaluations, one of which may be foreseen."""
        return (nfe + 1) // (1 + self.points)

    def why_not(self, nfe: int) -> str:
        steps = self.steps(nfe)
        if steps and (1 + self.points) * steps - nfe in (0, 1):
            return ""
        return f"{self.points} points in each step make a multiple of {1 + self.points} evaluations, or one fewer, not {nfe}"

    @property
    def along(self) -> Along:
        """What it follows."""
        return Along(self.spacing, self.solver, self.inserted, self.iterations, self.batch, self.rate, self.from_teacher, self.exact)

    def cost(self, nfe: int) -> Cost:
        return self.along.cost(self.steps(nfe), 1, self.points)

    def ensemble(self, teacher: Teacher, nfe: int) -> Ensemble:
        """Return the steps as they are before anything is learned."""
        check_law(teacher.schedule)
        steps = self.steps(nfe)
        t = self.along.times(teacher.schedule, steps)
        first = analytical_first(teacher.problem, t[0]) if (1 + self.points) * steps > nfe else None
        return Ensemble(teacher.schedule, t, self.points, self.scale, first)

    def fit(self, teacher: Teacher, nfe: int, note: Note = _silent) -> Found:
        ensemble = self.ensemble(teacher, nfe)

        def step(k: int, x: Tensor, cond: Cond, memory: None) -> tuple[Tensor, None]:
            return run_drawn(teacher.denoiser, ensemble.drawn(k, k + 1), x, cond), memory

        curve = learn_steps(teacher, self.along, ensemble.t, step, ensemble, note)
        return Found(DrawnSampler.of(ensemble.drawn()), curve)
