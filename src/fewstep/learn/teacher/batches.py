"""A teacher's trajectories as training data: batches at the times of a grid, and the held-out ones that measure a student."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond
from fewstep.core.grid import TimeGrid
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, TrajectorySolver, trajectories_of
from fewstep.models.problem import Problem
from fewstep.runtime.errors import ArtifactError
from fewstep.runtime.job import Job
from fewstep.solvers import make_solver

__all__ = ["Batch", "TeacherData"]

FIRST_FRESH = 2**40  # seeds of trajectories made while training; far from all others


class Batch(NamedTuple):
    """Data of one training step.

    Attributes:
        x: teacher states ``[b, T, *D]`` at the times of the grid, or images ``[b, *D]``.
        cond: class labels ``[b]``, or None.
    """

    x: Tensor
    cond: Cond

    def to(self, device: torch.device) -> Batch:
        """Move the batch."""
        return Batch(self.x.to(device), None if self.cond is None else self.cond.to(device))


class TeacherData:
    """Training trajectories of a problem at the times of a grid, followed by held-out ones that measure a student.

    Args:
        problem: the teacher and its guidance.
        grid: the times, all of which must be stored.
        config: how the trajectories are made; its ``num`` counts both kinds.
        held_out: number of trajectories that training never sees.
        job: the job that makes them, in the folder ``trajectories`` below its own.
        given: stored trajectories to use instead.
        fresh: share of each batch that is not stored but solved while training.

    Raises:
        ArtifactError: the given trajectories are of another problem, too few, or lack times of the grid.
    """

    def __init__(
        self,
        problem: Problem,
        grid: TimeGrid,
        config: TrajectoryConfig,
        held_out: int,
        job: Job,
        *,
        given: Trajectories | None = None,
        fresh: float = 0.0,
    ) -> None:
        self.problem, self.grid, self.config, self.held_out, self.fresh = problem, grid, config, held_out, fresh
        self.num = config.num - held_out
        self.trajectories = self._made(job) if given is None else given
        self.trajectories.check(problem)
        folder = self.trajectories.folder
        if len(self.trajectories) < config.num:
            wanted = f"{self.num} and {held_out} held out"
            raise ArtifactError(f"{folder} has {len(self.trajectories)} trajectories, not {wanted}: ask for fewer")
        near = torch.isclose(grid.t[:, None], self.trajectories.t, rtol=1e-9, atol=1e-12)
        if not bool(near.any(1).all()):
            lacking = ", ".join(f"{t:.6g}" for t in grid.t[~near.any(1)].tolist())
            raise ArtifactError(f"the trajectories in {folder} were not stored at t = {lacking}: name a grid of theirs, or make them again")
        self.places: list[int] = near.double().argmax(1).tolist()

    def _made(self, job: Job) -> Trajectories:
        num = self.config.num
        with job.below("trajectories", lambda done, note: job.on_progress(0, f"{done} of {num} teacher trajectories")) as part:
            return trajectories_of(self.problem, self.grid, self.config, part)

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """Draw training trajectories, on the CPU; the fresh ones among them are solved now."""
        made = round(size * self.fresh)
        index = torch.randint(self.num, (size - made,), generator=generator)
        x, labels = self.trajectories.states(index, at=self.places), self.trajectories.labels(index)
        if not made:
            return Batch(x, labels)
        seeds = torch.randint(FIRST_FRESH, 2 * FIRST_FRESH, (made,), generator=generator).tolist()
        fresh, theirs = self._solved(seeds)
        mixed = torch.randperm(size, generator=generator)
        return Batch(torch.cat([x, fresh])[mixed], None if labels is None or theirs is None else torch.cat([labels, theirs])[mixed])

    def batches_held_out(self, size: int) -> Iterator[Batch]:
        """Yield the held-out trajectories, in order, on the problem's device."""
        for part in torch.arange(self.num, self.num + self.held_out).split(size):
            x, labels = self.trajectories.states(part, at=self.places), self.trajectories.labels(part)
            yield Batch(x, labels).to(self.problem.device)

    @cached_property
    def _solver(self) -> TrajectorySolver:
        return TrajectorySolver(self.problem.teacher, make_solver(self.config.solver), self.grid, self.config.nfe)

    def _solved(self, seeds: list[int]) -> tuple[Tensor, Tensor | None]:
        """Solve the trajectories of these seeds at the times of the grid; states and labels on the CPU."""
        start = self.problem.start(seeds, self._solver.tableau.nodes)
        states = self._solver.run(start, self.problem.cond(seeds))
        return torch.cat([start[:, None].cpu(), states], 1), self.problem.labels(seeds)
