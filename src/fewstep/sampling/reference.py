"""The tight trajectory that errors are measured against."""

from __future__ import annotations

import torch

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule
from fewstep.sampling.sampler import Sampler
from fewstep.solvers.unipc import UniPC

__all__ = ["REFERENCE_NFE", "reference_sampler"]

REFERENCE_NFE = 128


def reference_sampler(schedule: NoiseSchedule, nfe: int = REFERENCE_NFE) -> Sampler:
    """Return UniPC-3 with ``nfe`` evaluations on the Karras grid (the angle grid from ``alpha = 0``), its times not snapped."""
    from_signal = bool(schedule.alpha(torch.tensor(schedule.t_max, dtype=torch.float64)) > 0)
    grid = TimeGrid.karras(schedule, nfe) if from_signal else TimeGrid.angle(schedule, nfe)
    return Sampler.build(UniPC(steps=3), grid, schedule)
