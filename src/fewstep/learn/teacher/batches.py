"""A teacher's trajectories as data: batches to train on, held-out ones that measure a student, and each process's share of some noises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond
from fewstep.core.grid import TimeGrid
from fewstep.core.tableau import Nodes
from fewstep.learn.teacher.gram import Gram
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, TrajectorySolver, trajectories_of
from fewstep.models.problem import Problem
from fewstep.runtime.errors import ArtifactError
from fewstep.runtime.job import Job
from fewstep.runtime.process import share, sum_over_processes
from fewstep.sampling.noise import seeded_scales
from fewstep.solvers import make_solver

__all__ = ["Batch", "StoredBatch", "TeacherData", "stored_batches", "stored_gram"]

FIRST_FRESH = 2**40  # seeds of trajectories made while training; far from all others


class Batch(NamedTuple):
    """Data of one training step.

    Attributes:
        x: teacher states ``[b, T, *D]`` at the times of the grid, or images ``[b, *D]``.
        cond: class labels ``[b]``, or None.
        scale: guidance scales ``[b]``, float64, which stay on the CPU; None where all have one.
    """

    x: Tensor
    cond: Cond
    scale: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Move the batch."""
        return Batch(self.x.to(device), None if self.cond is None else self.cond.to(device), self.scale)


@dataclass(frozen=True)
class StoredBatch:
    """Some of the stored trajectories, at any times ``t [n]`` between their first and last; read when they are asked for."""

    trajectories: Trajectories
    places: range
    t: Tensor
    device: torch.device

    @property
    def cond(self) -> Cond:
        labels = self.trajectories.labels(list(self.places))
        return None if labels is None else labels.to(self.device)

    def state(self, i: int) -> Tensor:
        """Return the states ``[b, *D]`` at the time ``t[i]``, which counts from the end if ``i`` is negative."""
        return self.trajectories.state(list(self.places), self.t[i]).to(self.device)


def stored_batches(trajectories: Trajectories, rows: range, t: Tensor, size: int, device: torch.device) -> list[StoredBatch]:
    """Return this process's share of some trajectories, at the times ``t [n]``, in batches of ``size`` at most.

    Raises:
        FewstepError: there are more processes than trajectories.
    """
    mine = share(rows)
    return [StoredBatch(trajectories, mine[start : start + size], t, device) for start in range(0, len(mine), size)]


def stored_gram(trajectories: Trajectories, rows: range, size: int) -> Gram:
    """Average second moments along some trajectories, over all processes; the denoiser's outputs are those that their states imply.

    Raises:
        ArtifactError: their states are not finite.
    """
    nodes = Nodes.at(trajectories.schedule, trajectories.t)
    total = Gram.empty(torch.exp(-nodes.lam))
    for batch in stored_batches(trajectories, rows, trajectories.t, size, torch.device("cpu")):
        states = torch.stack([batch.state(k) for k in range(len(nodes.t))])
        if not bool(torch.isfinite(states).all()):
            raise ArtifactError(f"the trajectories in {trajectories.folder} are not finite: make them again")
        total.merge(Gram.along(nodes, states))
    count = sum_over_processes(torch.tensor(float(total.count)))
    return Gram(total.level, sum_over_processes(total.matrix * total.count) / count, total.slopes, int(count))


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
        self.trajectories.check(problem, config.scales)
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
        """Draw ``size`` training trajectories and return this process's share, on the CPU; the fresh ones among them are solved now."""
        made, rows = round(size * self.fresh), torch.tensor(share(range(size)))
        index = torch.randint(self.num, (size - made,), generator=generator)
        if not made:
            return self._stored(index[rows])
        seeds = torch.randint(FIRST_FRESH, 2 * FIRST_FRESH, (made,), generator=generator)
        mixed = torch.randperm(size, generator=generator)[rows]
        order = mixed.argsort()  # stored ones first
        old, new = mixed[order][mixed[order] < len(index)], mixed[order][mixed[order] >= len(index)] - len(index)
        parts = [self._stored(index[old])] if len(old) else []
        parts += [self._solved(seeds[new].tolist())] if len(new) else []
        back, labels = order.argsort(), [part.cond for part in parts if part.cond is not None]
        scales = [part.scale for part in parts if part.scale is not None]
        x = torch.cat([part.x for part in parts])[back]
        return Batch(x, torch.cat(labels)[back] if labels else None, torch.cat(scales)[back] if scales else None)

    def _stored(self, index: Tensor) -> Batch:
        return Batch(self.trajectories.states(index, at=self.places), self.trajectories.labels(index), self.trajectories.scale(index))

    def batches_held_out(self, size: int, *, shared: bool = False) -> Iterator[Batch]:
        """Yield the held-out trajectories, or this process's share of them, in order, on the problem's device."""
        held_out = range(self.num, self.num + self.held_out)
        for part in torch.tensor(share(held_out) if shared else held_out).split(size):
            yield self._stored(part).to(self.problem.device)

    def batches_trained_on(self, num: int, size: int = 256) -> Iterator[Batch]:
        """Yield the first ``num`` training trajectories in order, on the problem's device."""
        for part in torch.arange(min(num, self.num)).split(size):
            yield self._stored(part).to(self.problem.device)

    @cached_property
    def _solver(self) -> TrajectorySolver:
        return TrajectorySolver(self.problem.teacher, make_solver(self.config.solver), self.grid, self.config.nfe)

    def _solved(self, seeds: list[int]) -> Batch:
        """Solve the trajectories of these seeds at the times of the grid; states and labels on the CPU."""
        start, solver, scale = self.problem.start(seeds, self._solver.tableau.nodes), self._solver, None
        if self.config.scales is not None:
            scale = seeded_scales(seeds, self.config.scales)
            solver = solver.told(self.problem.teacher_at(scale))
        states = solver.run(start, self.problem.cond(seeds))
        return Batch(torch.cat([start[:, None].cpu(), states], 1), self.problem.labels(seeds), scale)
