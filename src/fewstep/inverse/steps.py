"""The sampler whose evaluations, with those that a method makes, are the number asked for."""

from __future__ import annotations

import torch

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Solver
from fewstep.inverse.method import Method
from fewstep.models.carried import FITTED
from fewstep.models.generate import sampler_for
from fewstep.models.model import Model
from fewstep.runtime.errors import GridError, SolverError
from fewstep.runtime.front_door import is_count
from fewstep.sampling.sampler import Sampler
from fewstep.sampling.start import level_of

__all__ = ["restored_grid", "restored_steps"]


def restored_steps(
    model: Model,
    method: Method,
    solver: str | Solver | Sampler,
    nfe: int,
    grid: str | TimeGrid | None = None,
    guidance: float = 1.0,
    strength: float | None = None,
) -> Sampler:
    """Return the sampler whose evaluations, with those of a method, are ``nfe``.

    Args:
        model: what is sampled.
        method: what is done at each evaluation.
        solver: by name, or a sampler, whose own evaluations then have to fit.
        nfe: network evaluations per sample, in all.
        grid: as for `restore`.
        guidance: the guidance scale.
        strength: the share of noise to begin with; by default all.

    Raises:
        GridError: no step can begin there.
        SolverError: ``nfe`` is no multiple of what the method takes (and the nearest that are), or a solver that the method cannot run.
    """
    cost = method.cost[0]
    if not is_count(nfe):
        raise SolverError(f"nfe is the number of network evaluations per sample, a whole number, got {nfe!r}")
    if isinstance(solver, Sampler):
        if grid is not None:
            raise GridError("a sampler has a grid of its own: leave grid out")
        solver.tableau.check_asks("a restoration guides that one too")
        method.check(solver.tableau)
        if solver.nfe * cost != nfe:
            raise SolverError(f"this sampler with {type(method).__name__} takes {solver.nfe * cost} network evaluations, not {nfe}")
        return solver if strength is None else solver.from_level(level_of(strength))
    if nfe % cost:
        near = sorted({max(nfe // cost, 1) * cost, (nfe // cost + 1) * cost})
        raise SolverError(
            f"{type(method).__name__} takes {cost} network evaluations a step, so nfe is a multiple of {cost}, as "
            f"{' or '.join(map(str, near))}, not {nfe}"
        )
    spacing = restored_grid(model.schedule) if grid is None and solver != FITTED else grid
    made = sampler_for(model, solver, nfe=nfe // cost, guidance=guidance, grid=spacing, strength=strength)
    assert isinstance(made, Sampler)  # a tableau is what was given as one
    made.tableau.check_asks("a restoration guides that one too")
    method.check(made.tableau)
    return made


def restored_grid(schedule: NoiseSchedule) -> str:
    """Return the spacing where none is named: ``karras``, or ``angle`` where the law starts at pure noise, which has no finite level."""
    return "karras" if bool(torch.isfinite(schedule.lam(schedule.ends[0]))) else "angle"
