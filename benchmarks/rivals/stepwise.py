"""Learn one step after the other along a teacher's trajectory: the loop of AMED-Solver and of EPD-Solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.rivals.levels import SPACINGS
from benchmarks.rivals.rival import Note, Point
from benchmarks.rivals.teacher import FIRST, Cost, Teacher
from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Tableau, tabulate
from fewstep.runtime.errors import SolverError, look_up
from fewstep.solvers import make_solver

Step = Callable[[int, Tensor, Cond, Any], tuple[Tensor, Any]]  # its number, state, condition, memory -> next state, memory


@dataclass(frozen=True)
class Along:
    """What a student follows, and how long.

    Attributes:
        spacing: of the student's levels, a key of `SPACINGS`.
        solver: of the teacher, by name.
        inserted: levels between two of the student's at which the teacher makes a step too.
        exact: evaluations of exact trajectories to follow in place of the teacher's; None for the teacher's.
        iterations: batches of fresh noises, each of which takes one step of the optimiser for each step of the student.
        batch: noises of each.
        rate: of Adam.
        from_teacher: whether each step begins at the teacher's state, and not where the student is.
    """

    spacing: str
    solver: str
    inserted: int
    iterations: int
    batch: int
    rate: float
    from_teacher: bool
    exact: int | None = None

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        """Return the student's times ``[steps+1]``."""
        return look_up(self.spacing, SPACINGS, "spacing", SolverError)(schedule, steps)

    def teacher(self, schedule: NoiseSchedule, steps: int) -> tuple[Tableau, list[int]]:
        """Return the teacher's tableau, and the evaluations at which it stands at a level of the student's, without the first."""
        t = self.times(schedule, steps * (self.inserted + 1))
        solver = make_solver(self.solver)
        tableau = tabulate(solver, solver.nodes(TimeGrid(t), schedule))
        return tableau, list(tableau.nodes.begins(t))[:: self.inserted + 1][1:]

    def cost(self, steps: int, evaluations: int, gradients: int) -> Cost:
        """Return the network evaluations.

        Args:
            steps: of the student.
            evaluations: of one of its steps without gradients.
            gradients: of one of its steps with a gradient through the network.
        """
        noises = self.iterations * self.batch
        each = make_solver(self.solver).stages * steps * (self.inserted + 1) if self.exact is None else self.exact
        return Cost(noises * (each + steps * evaluations), noises * steps * gradients)


def learn_steps(teacher: Teacher, along: Along, t: Tensor, step: Step, numbers: nn.Module, note: Note = lambda text: None) -> list[Point]:
    """Learn the numbers of a student's steps and return the loss curve: the mean square errors of its steps, summed.

    Args:
        teacher: the model.
        along: what is followed.
        t: the student's times ``[M+1]``.
        step: one of its steps.
        numbers: what is learned.
        note: called with a line now and then.
    """
    optimizer, curve, count = torch.optim.Adam(numbers.parameters(), lr=along.rate), list[Point](), len(t) - 1
    for i, (x, cond, states) in enumerate(_batches(teacher, along, t), 1):
        total, memory = 0.0, None
        for k in range(count):
            optimizer.zero_grad(set_to_none=True)
            made, memory = step(k, x, cond, memory)
            error = (made - states[k + 1]).square().flatten(1)
            error.sum(1).mean().backward()
            for weight in numbers.parameters():
                if weight.grad is not None:
                    weight.grad.nan_to_num_(0.0, 1e5, -1e5)
            optimizer.step()
            total += float(error.detach().mean())
            x = states[k + 1] if along.from_teacher else made.detach()
        curve.append(Point(i, total))
        if i % max(1, along.iterations // 10) == 0:
            note(f"iteration {i} of {along.iterations}: {total:.4g}")
        if not math.isfinite(total):
            break
    return curve


def _batches(teacher: Teacher, along: Along, t: Tensor) -> Iterator[tuple[Tensor, Cond, Sequence[Tensor]]]:
    """Yield fresh noises, their conditions and the states to follow, at the times ``t [M+1]``."""
    tableau, begins = along.teacher(teacher.schedule, len(t) - 1)
    for k in range(along.iterations):
        x, cond = teacher.start(range(FIRST + k * along.batch, FIRST + (k + 1) * along.batch))
        states = [x, *teacher.states(x, cond, tableau, begins)] if along.exact is None else teacher.exact_states(x, cond, t, along.exact)
        yield x, cond, states
