r"""OSS: the best times of DDIM by dynamic programming along the student's own states (Pei et al., arXiv 2503.21774).

Formula: a teacher of 200 first-order steps gives states ``x_j``. The student's state at level ``j`` after ``k`` steps is the one of the
first-order steps ``z_i^{k-1} -> j`` that ends nearest to ``x_j``, over all ``i``; the path to the last level is the schedule of ``N`` steps
of this sample.

No loss is descended and no gradient taken: ``200 (1 + N)`` evaluations for each sample. Authors' numbers: 200 teacher steps.

Assumed: 16 samples and the median of their schedules (their code has a median for several samples, their text-to-image searches few), a
schedule whose times coincide moved apart by a level; the teacher's levels are EDM's; exactly ``N`` steps, where theirs may repeat a level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from benchmarks.rivals.drawn import Drawn, DrawnSampler, solver_on
from benchmarks.rivals.levels import levels_of, polynomial
from benchmarks.rivals.rival import Found, Needs, Note, Rival, _silent
from benchmarks.rivals.teacher import FIRST, Cost, Teacher
from torch import Tensor

from fewstep.core.condition import repeated
from fewstep.core.denoiser import Cond
from fewstep.core.tableau import Nodes
from fewstep.sampling.loop import steps

FIRST_ORDER = "dpm-solver-pp-2m:steps=1"


def apart(places: Tensor, last: int) -> list[int]:
    """Return increasing levels from 0 to ``last`` near some ``[N+1]``, each at least one after the one before."""
    found = [0]
    count = len(places) - 1
    for k, place in enumerate(places.tolist()[1:-1], 1):
        found.append(min(max(int(place), found[-1] + 1), last - (count - k)))
    return [*found, last]


@dataclass(frozen=True)
class OSS(Rival):
    """OSS's hyper-parameters.

    Attributes:
        teacher_steps: of the teacher.
        num: samples whose schedules the median is taken of.
    """

    paper = "2503.21774"
    needs = Needs(backpropagation=False)
    teacher_steps: int = 200
    num: int = 16

    def cost(self, nfe: int) -> Cost:
        return Cost(self.num * (self.teacher_steps + 1 + (nfe - 1) * self.teacher_steps))

    def why_not(self, nfe: int) -> str:
        return f"its teacher has {self.teacher_steps} steps" if nfe > self.teacher_steps else ""

    @torch.no_grad()
    def fit(self, teacher: Teacher, nfe: int, note: Note = _silent) -> Found:
        levels_of(teacher.schedule)  # a law that it is not for is refused here
        t = polynomial(teacher.schedule, self.teacher_steps)
        x, cond = teacher.start(range(FIRST, FIRST + self.num))
        places = self.schedules(teacher, t, x, cond, nfe)
        chosen = t[torch.tensor(apart(places.double().quantile(0.5, dim=0).round(), self.teacher_steps))]
        return Found(DrawnSampler.of(Drawn(solver_on(FIRST_ORDER, teacher.schedule, chosen))), [])

    def schedules(self, teacher: Teacher, t: Tensor, x: Tensor, cond: Cond, nfe: int) -> Tensor:
        """Return the levels ``[B, nfe+1]`` of each sample's best schedule among the times ``t [T]``."""
        nodes, last, count = Nodes.at(teacher.schedule, t), self.teacher_steps, len(x)
        exact = [x]
        for step in steps(teacher.denoiser, solver_on(FIRST_ORDER, teacher.schedule, t), x, cond):
            exact.append(step.x_next)
        targets, here = torch.stack(exact), x.expand(last + 1, *x.shape).clone()  # [T, B, *D]; at first the start alone counts
        found, reached = list[Tensor](), torch.zeros(last + 1, dtype=torch.bool)
        reached[0] = True
        for _ in range(nfe):
            best = torch.full((last + 1, count), torch.inf, dtype=torch.float64)
            origin, there = torch.zeros(last + 1, count, dtype=torch.int64), here.clone()
            answers = self._answers(teacher, nodes, here, cond, reached)
            for i in (i for i in range(last) if bool(reached[i])):
                ratio, gain = nodes.first_order(i, slice(i + 1, None))
                shape = (-1, *[1] * x.ndim)
                made = ratio.reshape(shape).to(x) * here[i] + gain.reshape(shape).to(x) * answers[i]
                error = (made - targets[i + 1 :]).double().square().flatten(2).mean(2).cpu()
                closer = error < best[i + 1 :]
                best[i + 1 :] = torch.where(closer, error, best[i + 1 :])
                origin[i + 1 :] = torch.where(closer, i, origin[i + 1 :])
                there[i + 1 :] = torch.where(closer.reshape(*closer.shape, *[1] * (x.ndim - 1)).to(x.device), made, there[i + 1 :])
            found.append(origin)
            here, reached = there, torch.isfinite(best).all(1)
        place, made = torch.full((count,), last), [torch.full((count,), last)]
        for origin in reversed(found):
            place = origin[place, torch.arange(count)]
            made.append(place)
        return torch.stack(made[::-1], 1)

    def _answers(self, teacher: Teacher, nodes: Nodes, here: Tensor, cond: Cond, reached: Tensor) -> Tensor:
        """Return the denoiser's answers at the states of all levels that can be reached, ``[T-1, B, *D]``."""
        made = torch.zeros_like(here[:-1])
        places = reached[:-1].nonzero().flatten()
        each = max(1, teacher.batch // here.shape[1])
        for part in places.split(each):
            x, t = here[part].flatten(0, 1), nodes.t[part].repeat_interleave(here.shape[1])
            made[part] = teacher.denoiser(x, t, None if cond is None else repeated(cond, len(part))).unflatten(0, (len(part), -1))
        return made
