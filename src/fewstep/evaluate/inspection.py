"""Inspect a model: measure its trajectories, the samplers that suit it, and what the last evaluations of the present one buy."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.denoiser import FlowMap
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.spacings import GRIDS, make_grid
from fewstep.evaluate.diagnostics import Geometry, geometry, stopping_error
from fewstep.models.carried import FITTED, OPTIMIZED
from fewstep.models.generate import solver_for
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_seeds
from fewstep.runtime.errors import ArtifactError, FewstepError, GridError, ModelError, SolverError
from fewstep.sampling.loop import Step, run
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import UniPC

__all__ = ["CANDIDATES", "Inspection", "Pick", "check_inspected", "inspect_model", "inspection_cost", "reference_of"]

CANDIDATES = ("unipc-2", "unipc-3", "dpm-solver-pp-2m", "dpm-solver-pp-3m", "deis-3", "ipndm", "ddim", "dpm-solver-v3")
REFERENCE = 100  # evaluations of the trajectories that are measured
FEW, FINAL = 8, 8  # noises that rank all pairs; pairs that all noises rank again
PICTURES, MOMENTS = 6, 9  # seeds and levels that are shown
IDLE = 1.05  # times the whole sampler's error, up to which evaluations left out were idle


@dataclass(frozen=True)
class Pick:
    """A solver on a grid and its RMSE to the exact ends."""

    solver: str
    grid: str
    error: float


@dataclass(frozen=True)
class Inspection:
    """The figures of a model that was inspected.

    Attributes:
        model: its name.
        guidance: the scale it was inspected at.
        nfe: evaluations that samplers were tried with.
        num: noises.
        geometry: of its trajectories.
        present: the sampler in use.
        levels: noise levels that it evaluates at, ``[N]``.
        stops: its RMSE when it is stopped after each evaluation, ``[N+1]``, see `stopping_error`.
        picks: solvers on grids, the best first; those that the model carries, as ``fitted`` on ``optimized``, among them.
        pictures: the denoised image along the way, ``[levels, seeds, *D]``, and the levels; None where samples are no pictures.
    """

    model: str
    guidance: float
    nfe: int
    num: int
    geometry: Geometry
    present: Sampler
    levels: list[float]
    stops: list[float]
    picks: list[Pick]
    pictures: tuple[Tensor, list[float]] | None = field(repr=False)

    @property
    def best(self) -> Pick:
        """The best solver by hand."""
        return next(one for one in self.picks if one.solver != FITTED)

    @property
    def idle(self) -> int:
        """The evaluations at the end of the present sampler without which its error is at most 5 % larger; 0 of one that adds noise."""
        if self.present.tableau.stochastic:
            return 0
        before = self.stops[-3::-1]  # stopped after N-1, N-2, ... evaluations
        return next((k for k, error in enumerate(before) if not error <= IDLE * self.stops[-1]), len(before))

    def decided(self) -> tuple[float, float]:
        """Return the levels between which 80 % of the change of the denoised image happens, the higher first."""
        levels, density = self.geometry.density()
        share = (density * torch.diff(-torch.log(self.geometry.levels[:-1]))).cumsum(0)
        share = share / share[-1].clamp_min(1e-30)
        return float(levels[int((share >= 0.1).nonzero()[0])]), float(levels[int((share >= 0.9).nonzero()[0])])

    def evaluations_within(self, levels: list[float]) -> int:
        """Return how many evaluations at ``levels`` lie where the image is decided."""
        high, low = self.decided()
        return sum(low <= level <= high for level in levels)

    def facts(self) -> dict[str, Any]:
        """Return all figures as plain values, for JSON."""
        levels, density = self.geometry.density()
        high, low = self.decided()
        return {
            "model": self.model,
            "guidance": self.guidance,
            "nfe": self.nfe,
            "num": self.num,
            "geometry": self.geometry.summary(),
            "decided": {"from": high, "to": low},
            "density": {"level": levels.tolist(), "change": density.tolist()},
            "picks": [asdict(one) for one in self.picks],
            "present": {"sampler": repr(self.present), "levels": self.levels, "rmse_when_stopped": self.stops, "idle": self.idle},
        }


def reference_of(schedule: NoiseSchedule, nfe: int = REFERENCE) -> Sampler:
    """Return the sampler of the trajectories to measure: UniPC-3 on ``karras``, ``uniform`` for a table, ``angle`` from pure noise."""
    start = torch.tensor(schedule.t_max, dtype=torch.float64)
    name = "angle" if not bool(schedule.alpha(start) > 0) else "karras" if schedule.times is None else "uniform"
    return Sampler.build(UniPC(steps=3), make_grid(name, schedule, nfe), schedule)


def inspection_cost(num: int, nfe: int) -> int:
    """Return the network evaluations that an inspection takes, at most."""
    return num * (REFERENCE + (2 + FINAL) * nfe) + min(FEW, num) * nfe * len(CANDIDATES) * len(GRIDS)


def check_inspected(model: Model, num: int, seed: int) -> None:
    """Refuse what cannot be inspected.

    Raises:
        ModelError: a reflected model; a student or a tuned network, whose own trajectories are not what it was made for.
        FewstepError: fewer than two noises, seeds that are none.
    """
    if model.flow_map is not None:
        raise ModelError(f"{model.name} is a student, which makes few jumps and has no trajectory in between: inspect its teacher")
    model.need_unbounded(
        "an inspection", "what its network answers on the way is a mean of mirror images, not the image so far; use fewstep bench"
    )
    model.need_trajectories()
    if num < 2:
        raise FewstepError(f"an inspection takes 2 noises or more, got {num}")
    check_seeds(seed, num)


def inspect_model(
    problem: Problem,
    sampler: Sampler,
    *,
    num: int = 32,
    seed: int = 0,
    on_progress: Callable[[int, str], None] | None = None,
) -> Inspection:
    """Inspect a model with the sampler that is in use.

    Args:
        problem: the model and its guidance.
        sampler: the one in use; others are tried with as many evaluations.
        num: noises; a few of them rank all pairs of solvers and grids, all of them the best.
        seed: of the first.
        on_progress: called with the network evaluations so far and a note.

    Raises:
        ModelError, FewstepError: see `check_inspected`.
        SolverError: a sampler of fewer than 3 evaluations has no end to inspect.
    """
    check_inspected(problem.model, num, seed)
    assert not isinstance(problem.denoiser, FlowMap)  # it is no student
    nfe, note = sampler.nfe, on_progress or (lambda done, text: None)
    seeds, reference, shown = range(seed, seed + num), reference_of(problem.schedule), list[_Moment]()
    ends = list[Tensor]()

    def watch(step: Step) -> None:
        level = float(torch.exp(-reference.tableau.nodes.lam[step.i]))
        shown.append(_Moment(level, step.x0[:PICTURES].cpu()))
        ends[:] = [step.x_next]
        note((step.i + 1) * num, "trajectories")

    found = geometry(problem.teacher, reference, problem.start(seeds, reference.tableau.nodes), problem.cond(seeds), observe=watch)
    exact = ends[0]
    note(num * REFERENCE, "the sampler in use")
    start, nodes = problem.start(seeds, sampler.tableau.nodes), sampler.tableau.nodes
    stops = stopping_error(problem.denoiser, sampler, start, exact, problem.cond(seeds), seeds=seeds)
    note(num * (REFERENCE + nfe), "solvers and grids")
    picks = _picks(problem, seeds, exact, nfe, lambda tried: note(num * (REFERENCE + nfe) + tried, "solvers and grids"))
    levels = torch.exp(-nodes.lam[:-1]).tolist()
    return Inspection(problem.name, problem.guidance, nfe, num, found, sampler, levels, stops.tolist(), picks, _pictures(shown, exact))


class _Moment(NamedTuple):
    """The denoised images of some seeds at a noise level."""

    level: float
    images: Tensor


def _pictures(shown: list[_Moment], exact: Tensor) -> tuple[Tensor, list[float]] | None:
    """Return the denoised images at levels that are evenly spaced in how far the image has come, and at the end."""
    if exact.ndim != 4 or exact.shape[1] not in (1, 3):
        return None
    end = exact[:PICTURES].cpu()
    apart = torch.stack([(one.images - end).float().square().mean().sqrt() for one in shown])
    reached = torch.cummin(apart, 0).values / apart[0].clamp_min(1e-30)
    goals = (reached <= goal + 1e-6 for goal in torch.linspace(1, 0.1, MOMENTS - 1).tolist())
    places = [int(there.nonzero()[0]) for there in goals if bool(there.any())]
    kept = [shown[place] for place in dict.fromkeys(places)]
    return torch.stack([*(one.images for one in kept), end]), [*(one.level for one in kept), 0.0]


def _picks(problem: Problem, seeds: range, exact: Tensor, nfe: int, note: Callable[[int], None]) -> list[Pick]:
    """Rank all pairs of a solver and a grid on a few noises, and the best of them, with what the model carries, on all."""
    model, tried, tableaus = problem.model, 0, dict[tuple[str, str], Sampler]()

    def error(sampler: Sampler, some: range) -> float:
        nonlocal tried
        start = problem.start(some, sampler.tableau.nodes)
        end = run(problem.denoiser, sampler.tableau, start, problem.cond(some), seeds=list(some))
        tried += nfe * len(some)
        note(tried)
        value = float((end - exact[: len(some)]).double().square().mean().sqrt())
        return value if math.isfinite(value) else math.inf

    for name in CANDIDATES:
        for grid in GRIDS:
            with suppress(GridError, SolverError):  # no statistics, a grid that wants a table, coinciding times
                made = Sampler.build(solver_for(name, model, guidance=problem.guidance), grid, problem.schedule, nfe=nfe)
                if (float(made.grid.t[0]), float(made.grid.t[-1])) == (problem.schedule.t_max, problem.schedule.t_min):
                    tableaus[name, grid] = made
    if not tableaus:
        raise SolverError(f"no standard grid of {problem.name} has {nfe} steps: inspect it with fewer evaluations")
    few = seeds[: min(FEW, len(seeds))]
    with torch.no_grad():
        ranked = sorted(tableaus, key={pair: error(made, few) for pair, made in tableaus.items()}.__getitem__)
        found = [Pick(*pair, error(tableaus[pair], seeds)) for pair in ranked[:FINAL]]
        with suppress(SolverError, GridError, ArtifactError):
            found.append(Pick(FITTED, OPTIMIZED, error(model.fitted(nfe, problem.guidance), seeds)))
    return sorted(found, key=lambda one: one.error)
