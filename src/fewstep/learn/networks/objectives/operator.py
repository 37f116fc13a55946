r"""Distil a model into an operator that maps noise to its whole trajectory (DSNO, Zheng et al., arXiv 2211.13449).

The trajectories pair each noise with its own solution, so training is regression: with ``output_k`` the answer of slot ``k`` and
``target_k`` the one that would land on the teacher's state,

    mean_k  weight_k  distance(output_k, target_k),

in the network's own output, where all targets have one size. It starts at the noise, or at any time of the trajectory (then the slots are
those below), so that a student may go on from where it has come to: one stored trajectory teaches all its ``(s, t)``. One slot is plain
knowledge distillation; several that do not meet are several such tasks on one network.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.core.tableau import Nodes
from fewstep.learn.networks.objectives.config import StudentConfig
from fewstep.learn.networks.objectives.distances import DISTANCES
from fewstep.learn.networks.objectives.objective import Networks, StudentObjective
from fewstep.learn.teacher.batches import Batch, TeacherData
from fewstep.models.formats.folders import as_student, imports_code, save_like
from fewstep.models.model import Model
from fewstep.models.networks.operator import OperatorForm, OperatorStudent
from fewstep.models.problem import Problem
from fewstep.runtime.errors import FewstepError, look_up
from fewstep.runtime.front_door import at_least, checked_class
from fewstep.runtime.process import process, share, sum_over_processes

__all__ = ["WEIGHTS", "DistillConfig", "OperatorObjective"]


# alpha/sigma of the slots [T] -> weight [T]
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "equal": torch.ones_like,
    "snr": lambda snr: snr.clamp(1, 10),
    "paper": lambda snr: snr.clamp(1, 1e4),
}
SLOTS = 4


@checked_class
@dataclass(frozen=True)
class DistillConfig(StudentConfig):
    """Configure the distillation of an operator student, by the methods dsno, slots and kd.

    Args:
        slots: times below the start that one pass answers for; by default 4, and 1 of the method kd.
        grid: the spacing of the slots, or optimized: the model's own for ddim. ``angle`` is uniform in DSNO's time, ``angle:power=2`` is
            quadratic.
        form: the student's architecture and output.
        loss: huber, l1, l2, or features, which compares features of pictures.
        weights: weights of the slots: equal, snr (alpha/sigma, from 1 to 10) or paper (to 10000: little but the last slot is left).
        first: share of each batch that starts at the noise, where the student starts anywhere.

    Raises:
        FewstepError: a number out of range, or an unknown word.
    """

    slots: int | None = None
    grid: str = "angle"
    form: OperatorForm = field(default_factory=OperatorForm)
    loss: str = "huber"
    weights: str = "equal"
    first: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, num_slots=1)
        if not 0 < self.first <= 1:
            raise FewstepError(f"first lies in (0, 1], got {self.first}")
        look_up(self.loss, {**DISTANCES, "features": None}, "loss", FewstepError)
        look_up(self.weights, WEIGHTS, "weights of the slots", FewstepError)

    @property
    def num_slots(self) -> int:
        """The number of times below the start that one pass answers for."""
        return SLOTS if self.slots is None else self.slots


class OperatorObjective(StudentObjective):
    """Regression of an operator student onto its teacher's trajectories.

    Args:
        problem: the teacher and its guidance.
        config: how to distil.
        features: network of the loss ``features``, from pictures ``[B, *D]`` to ``[B, F]``.

    Raises:
        FewstepError: the loss ``features`` without any.
        ModelError: a network that operators cannot be made of.
    """

    kind = "operator"

    def __init__(self, problem: Problem, config: DistillConfig, features: Callable[[Tensor], Tensor] | None = None) -> None:
        if config.loss == "features" and features is None:
            raise FewstepError("the loss features compares features of pictures: pass features=, a network from pictures [B, *D] to [B, F]")
        self.problem, self.config, self.features = problem, config, features
        self.grid = problem.model.trajectory_grid(config.grid, config.num_slots, problem.guidance)
        self.nodes = Nodes.at(problem.schedule, self.grid.t)
        self.weight = WEIGHTS[config.weights](torch.exp(self.nodes.lam))
        _ = self._at_noise(config.batch)
        self.form = self.student()  # what cannot be made is refused before long work; knows the scale of each slot's output

    def student(self) -> OperatorStudent:
        teacher = self.problem.model.with_network(self.copied())
        return OperatorStudent(teacher, self.grid.t, self.config.form).to(self.problem.device)

    def take_over(self, student: nn.Module, begin: Model) -> None:
        """Begin with the weights of another operator of the same teacher and guidance, those of its temporal layers where they fit.

        Raises:
            ModelError: it is of another (which).
        """
        if isinstance(begin.network, OperatorStudent):
            self.check_teacher(begin, self.problem.guidance)
        super().take_over(student, begin)

    def loss(self, networks: Networks, batch: Batch, generator: torch.Generator) -> Tensor:
        x, cond, student = batch.x, batch.cond, networks.student
        at_noise = self._at_noise(int(sum_over_processes(torch.tensor(len(x)))))
        total = at_noise / len(x) * self._from(student, x[:at_noise], None if cond is None else cond[:at_noise], 0)
        if at_noise < len(x):  # both in each step: one or the other in turn would shake the weights
            j = int(torch.randint(1, self.config.num_slots, (), generator=generator))
            rest = self._from(student, x[at_noise:], None if cond is None else cond[at_noise:], j)
            total = total + (1 - at_noise / len(x)) * rest
        return total

    def _at_noise(self, size: int) -> int:
        """Return how many of this process's samples start at the noise: those among the first of the whole batch.

        Raises:
            FewstepError: there are more processes than samples of a kind.
        """
        config, rows = self.config, share(range(size))
        if not (config.form.anywhere and config.num_slots > 1):
            return len(rows)
        first = max(1, round(size * config.first))
        mine = sum(row < first for row in rows)
        if process()[1] > 1 and (mine == 0 or mine == len(rows) and first < size):
            raise FewstepError(
                f"{process()[1]} processes cannot share a batch of {size}, of which {first} start at the noise: use fewer processes, or a "
                "larger batch"
            )
        return mine

    def _from(self, student: nn.Module, x: Tensor, cond: Cond, j: int) -> Tensor:
        """Return the loss of the slots below the time ``t_j``, from the trajectories ``x [b, M+1, *D]``."""
        t, later = self.grid.t, slice(j + 1, None)
        states = student(x[:, j], t[later], cond, t[j])
        of_slot = (self.weight[later] / self.weight[later].mean()).to(x.dtype).to(x.device)
        if self.config.loss == "features":
            return (of_slot * self._feature_distance(states, x[:, later], later)).mean()
        scale = self.form.coefficients(t[j], t[later])[1].to(x.dtype).to(x.device)
        error = (states - x[:, later]) / scale.reshape(-1, *(1,) * (x.ndim - 2))
        return (of_slot * DISTANCES[self.config.loss](error)).mean()

    def _feature_distance(self, states: Tensor, wanted: Tensor, slots: slice) -> Tensor:
        """Return the mean square distance of features ``[T]``, of the states scaled to unit size."""
        assert self.features is not None  # checked at the beginning
        norm = torch.sqrt(self.nodes.alpha[slots] ** 2 + self.nodes.sigma[slots] ** 2).to(states.dtype).to(states.device)
        norm = norm.reshape(-1, *(1,) * (states.ndim - 2))
        ours, theirs = (self.features((x / norm).flatten(0, 1)) for x in (states, wanted))
        return (ours - theirs).square().unflatten(0, (len(states), -1)).flatten(2).mean((0, 2))

    @torch.no_grad()
    def finish(self, student: nn.Module, data: TeacherData) -> dict[str, Any]:
        """Measure the student on held-out trajectories.

        Returns:
            ``slots``: RMSE of the states in each slot of one pass from the noise, over ``sqrt(alpha^2 + sigma^2)``; ``passes``: for each
            number of passes the best times to go through, and the RMSE to the teacher's endpoints; ``arithmetic``: for each number of
            passes their operations, in evaluations of the teacher.
        """
        assert isinstance(student, OperatorStudent)
        slots, t = self.config.num_slots, self.grid.t
        most = slots if self.config.form.anywhere else 1
        counts = [n for n in range(most) if slots <= 7 or n <= 2 or n == slots - 1]  # inner times: all 64 paths, or some
        paths = [(0, *inner, slots) for n in counts for inner in itertools.combinations(range(1, slots), n)]
        slot_error, path_error = torch.zeros(slots, dtype=torch.float64), torch.zeros(len(paths), dtype=torch.float64)
        for x, cond, _ in data.batches_held_out(256):
            share = len(x) / data.held_out
            slot_error += (student(x[:, 0], t[1:], cond) - x[:, 1:]).double().cpu().square().mean((0, *range(2, x.ndim))) * share
            for k, path in enumerate(paths):
                here = x[:, 0]
                for i, j in itertools.pairwise(path):
                    here = student.jump(here, t[i], t[j], cond)
                path_error[k] += (here - x[:, -1]).double().square().mean().cpu() * share
        passes: dict[int, tuple[list[float], float]] = {}
        for path, error in sorted(zip(paths, path_error.sqrt().tolist(), strict=True), key=lambda one: one[1]):
            passes.setdefault(len(path) - 1, (t[list(path)].tolist(), error))
        passes = {n: passes[n] for n in sorted(passes)}
        size = torch.sqrt(self.nodes.alpha[1:] ** 2 + self.nodes.sigma[1:] ** 2)
        arithmetic = {n: student.arithmetic(times) for n, (times, _) in passes.items()}
        return {"slots": (slot_error.sqrt() / size).tolist(), "passes": passes, "arithmetic": arithmetic}

    def network(self, student: nn.Module) -> nn.Module:
        assert isinstance(student, OperatorStudent)
        return student.operator.network

    def facts(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "sequential evaluations": list(figures["passes"]),
            "arithmetic, in evaluations of the teacher": [round(cost, 2) for cost in figures["arithmetic"].values()],
            "RMSE to the teacher on trajectories held out": [round(error, 4) for _, error in figures["passes"].values()],
        }

    def describe(self, student: nn.Module, facts: Mapping[str, Any]) -> None:
        assert isinstance(student, OperatorStudent)
        student.card.update(facts)

    def model(self, student: nn.Module) -> Model:
        assert isinstance(student, OperatorStudent)
        return as_student(self.problem.model, student)

    def save(self, student: nn.Module, folder: Path) -> None:
        assert isinstance(student, OperatorStudent)
        student.save(folder, trust=imports_code(self.problem.model))
        save_like(self.problem.model, student.operator.network, folder)
