r"""Tune a network for the few first-order steps that it will take (few-step schedule optimisation, Huang, arXiv 2412.10786, phase 2).

The error bound of a schedule is lowest over the weights where ``D_theta(z_i; s_i) = Dbar_i``, the mean of the teacher's output over each
step: then its first-order steps are exact. No quadrature is needed, since ``(1 - r_i) Dbar_i = z_{i-1} - r_i z_i`` for the teacher's
states, so the loss of a step, weighted by ``(1 - r_i)^2``, is how far it lands from the teacher,

    | r_i z_i + (1 - r_i) D_theta(z_i; s_i) - z_{i-1} |^2.

``z_i`` is the teacher's state, or where the student itself has come to: then it learns to come back. The paper's own form goes on with
denoising score matching, at the scheduled levels only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import aligned
from fewstep.core.tableau import Nodes
from fewstep.data.images import Images
from fewstep.learn.networks.objectives.objective import Networks, Objective
from fewstep.learn.networks.score_matching import score_matching
from fewstep.learn.teacher.batches import Batch, TeacherData
from fewstep.learn.teacher.gram import Gram
from fewstep.models.formats.folders import save_like
from fewstep.models.model import Model
from fewstep.models.problem import Problem
from fewstep.runtime.process import gather, sum_over_processes
from fewstep.sampling.loop import run
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import DDIM

__all__ = ["LandingObjective", "ScoreObjective", "StepsObjective"]


class StepsObjective(Objective):
    """A copy of the teacher's network, tuned for the first-order steps of a schedule.

    Attributes:
        problem: the teacher and its guidance.
        grid: the times at which its trajectories are stored.
        index: the places of the schedule's times among them.
    """

    def __init__(self, problem: Problem, grid: TimeGrid, index: list[int]) -> None:
        self.problem, self.grid, self.index = problem, grid, index

    def student(self) -> nn.Module:
        network: Any = copy.deepcopy(self.problem.model.network)
        return network

    @torch.no_grad()
    def gram(self, student: nn.Module, data: TeacherData) -> Gram:
        """Average the Gram matrix of the student's outputs over the teacher's held-out states, which the processes share."""
        student.eval()
        nodes, model = Nodes.at(self.problem.schedule, self.grid.t), self.model(student)
        total = Gram.empty(torch.exp(-nodes.lam))
        for batch in data.batches_held_out(128, shared=True):
            x = batch.x.transpose(0, 1)
            outputs = torch.stack([model(state, t, batch.cond) for state, t in zip(x, nodes.t, strict=True)])
            total.merge(Gram.of(nodes, x, outputs))
        first, *others = gather(total)
        for other in others:
            first.merge(other)
        return first

    @torch.no_grad()
    def finish(self, student: nn.Module, data: TeacherData) -> dict[str, Any]:
        """Measure ``rmse``, the student's error to its teacher's endpoints, of which the processes share the noises."""
        student.eval()
        sampler, square = Sampler.build(DDIM(), TimeGrid(self.grid.t[self.index]), self.problem.schedule), 0.0
        for x, cond, _ in data.batches_held_out(128, shared=True):
            ends = run(self.model(student), sampler.tableau, x[:, 0], cond)
            square += float((ends - x[:, -1]).double().square().mean() * len(x))
        return {"rmse": (float(sum_over_processes(torch.tensor(square, dtype=torch.float64))) / data.held_out) ** 0.5}

    def model(self, student: nn.Module) -> Model:
        return self.problem.model.with_network(student)

    def save(self, student: nn.Module, folder: Path) -> None:
        save_like(self.problem.model, student, folder)


class LandingObjective(StepsObjective):
    """The squared distance to the teacher after each step of the schedule, summed over the steps.

    Args:
        own_states: whether a step starts where the student itself has come to, or at the teacher's state.
    """

    def __init__(self, problem: Problem, grid: TimeGrid, index: list[int], *, own_states: bool) -> None:
        super().__init__(problem, grid, index)
        self.own_states = own_states
        self.nodes = Nodes.at(problem.schedule, grid.t[index])
        self.ratio, self.gain = self.nodes.first_order()

    def student(self) -> nn.Module:
        network = super().student()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # its targets are exact: noise would only blur them
        return network

    def loss(self, networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
        denoiser, states = self.model(networks.student), batch.x[:, self.index]
        here, total = states[:, 0], torch.zeros((), device=states.device)
        for i in range(len(self.ratio)):
            answer = denoiser(here, self.nodes.t[i], batch.cond)
            there = aligned(self.ratio[i], here) * here + aligned(self.gain[i], here) * answer
            total = total + ((there - states[:, i + 1]) / aligned(self.nodes.alpha[i + 1], here)).square().mean()
            here = there.detach() if self.own_states else states[:, i + 1]
        return total


class ScoreObjective(StepsObjective):
    """Denoising score matching at the levels of the schedule: the paper's own form, which needs images."""

    def __init__(self, problem: Problem, grid: TimeGrid, index: list[int], images: Images) -> None:
        super().__init__(problem, grid, index)
        model, t = problem.model, grid.t[index]
        draw: Callable[[int, torch.Generator], Tensor] = lambda b, g: t[torch.randint(len(t) - 1, (b,), generator=g)].float()  # noqa: E731
        self.matching = score_matching(model, images, draw, conditional=model.classes is not None, null=model.null_label)

    def batch(self, data: TeacherData, size: int, generator: torch.Generator) -> Batch:
        """Draw nothing: score matching draws its own images, of the whole batch."""
        return Batch(torch.empty(size, 0), None)

    def loss(self, networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
        return self.matching(networks.student, len(batch.x), generator)
