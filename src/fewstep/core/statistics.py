r"""Empirical model statistics (EMS) of DPM-Solver-v3 (Zheng et al., arXiv 2310.13268): numbers ``l, s, b`` along ``lam``.

With ``X = x/alpha`` the sampling ODE is ``dX/dlam = D - X``. The solver moves a linear part ``l`` of the model to the exact side,

    F = (1 - l) X - D          (the paper's (sigma eps - l x) / alpha)

and expects what remains to change as ``dF/dlam = s F + b``. `fewstep.learn.samplers.calibrate` estimates the three; this file holds them,
integrates them, and sees that they are not used with another model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule, schedule_from_config
from fewstep.runtime.artifact import (
    ArtifactRecord,
    Count,
    Number,
    alike,
    check_no_model,
    load_artifact,
    named_path,
    save_artifact,
    tensor_of,
)
from fewstep.runtime.errors import ArtifactError, GridError
from fewstep.runtime.hub import Shared, header

__all__ = ["Integrals", "ModelStatistics", "Rule"]

Rule = Literal["exact", "trapezoid"]
Quadrature = tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # points lam [n], cumulative and whole integral

SLACK = 1e-6  # of a cell: how far outside the grid, or from one of its points, rounding may move a lam


@dataclass(frozen=True)
class StatisticsRecord(ArtifactRecord):
    """The fields of ``statistics.json``, see `ModelStatistics`."""

    FORMAT = "fewstep-statistics"

    model: str
    guidance: Number
    shape: list[Count]
    lam: tuple[Number, Number]
    schedule: dict[str, Any]
    card: dict[str, Any]


class Integrals(NamedTuple):
    """The integrals of one step from ``lam_s`` to ``lam_t``, each ``[*E]``; ``E(lam) = exp int_{lam_s}^{lam} (l + s)``."""

    l: Tensor  # int l
    s: Tensor  # int s
    beta: Tensor  # int e^{-int s} b
    drift: Tensor  # int E beta
    moments: tuple[Tensor, ...]  # int E (lam - lam_s)^k / k!


@dataclass(frozen=True, eq=False, repr=False)
class ModelStatistics(Shared):
    """The statistics ``l, s, b`` of a model, piecewise linear in ``lam``, together with the model that they belong to.

    Attributes:
        lam: a uniform grid ``[S+1]``, float64, increasing from the start of sampling to its end.
        l, s, b: values on the grid, ``[S+1, *E]`` float64; each ``*E`` broadcasts to ``shape`` and may be smaller (one number, or one per
            channel).
        shape: the shape ``*D`` of one sample.
        schedule: the noise law of the model.
        model: the model's fingerprint; empty where it is not known.
        guidance: the guidance scale that the statistics are for.
        card: provenance, plain JSON values.

    Raises:
        ArtifactError: shapes that do not fit, a grid that is not uniform and increasing, a number that is not finite (which).
    """

    lam: Tensor
    l: Tensor
    s: Tensor
    b: Tensor
    shape: tuple[int, ...]
    schedule: NoiseSchedule
    model: str = ""
    guidance: float = 1.0
    card: Mapping[str, Any] = field(default_factory=dict)
    kind = "statistics"

    def __post_init__(self) -> None:
        for name in ("lam", "l", "s", "b"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).detach().cpu().double())
        object.__setattr__(self, "shape", tuple(self.shape))
        steps = torch.diff(self.lam)
        if self.lam.ndim != 1 or len(steps) < 1 or not bool(torch.isfinite(self.lam).all()) or not bool((steps > 0).all()):
            raise ArtifactError(f"the lam of statistics must be at least 2 increasing finite numbers, got shape {tuple(self.lam.shape)}")
        if not torch.allclose(steps, self.step.expand_as(steps), rtol=1e-6, atol=0):
            raise ArtifactError("the lam of statistics must be uniform: estimate them on a uniform grid")
        for name in ("l", "s", "b"):
            value = getattr(self, name)
            fits = value.ndim == 1 + len(self.shape) and len(value) == len(self.lam)
            if not fits or any(e not in (1, d) for e, d in zip(value.shape[1:], self.shape, strict=True)):
                raise ArtifactError(
                    f"{name} of statistics has shape {tuple(value.shape)}: for {len(self.lam)} levels and samples of shape {self.shape} it "
                    f"should be [{len(self.lam)}, {', '.join(f'1 or {d}' for d in self.shape)}]"
                )
            bad = (~torch.isfinite(value)).nonzero()
            if len(bad):
                raise ArtifactError(f"{name} of statistics is not finite at level {int(bad[0][0])}, lam = {self.lam[bad[0][0]]:g}")

    def __repr__(self) -> str:
        ends = f"{float(self.lam[0]):.3g} to {float(self.lam[-1]):.3g}"
        return f"ModelStatistics({len(self.lam)} levels, lam {ends}, samples of {self.shape}, guidance {self.guidance:g})"

    # -- numbers ----------------------------------------------------------------------------------------------------

    @property
    def step(self) -> Tensor:
        """The width of a cell in ``lam``, ``[]``."""
        return (self.lam[-1] - self.lam[0]) / (len(self.lam) - 1)

    @property
    def element(self) -> tuple[int, ...]:
        """The shape ``*E`` that ``l``, ``s`` and ``b`` broadcast to together."""
        return tuple(torch.broadcast_shapes(*(value.shape[1:] for value in (self.l, self.s, self.b))))

    def at(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``l, s, b`` at ``lam [n]``, linear between the grid's points: each ``[n, *E]``."""
        where = (lam - self.lam[0]) / self.step
        index = where.detach().floor().long().clamp(0, len(self.lam) - 2)
        weight = (where - index).reshape(-1, *(1,) * len(self.shape))
        l, s, b = (torch.lerp(value[index], value[index + 1], weight) for value in (self.l, self.s, self.b))
        return l, s, b

    def covers(self, lam: Tensor) -> bool:
        """Return whether all finite ``lam [*]`` lie on the grid."""
        lam, slack = lam.detach()[torch.isfinite(lam.detach())], SLACK * self.step
        return bool(((lam >= self.lam[0] - slack) & (lam <= self.lam[-1] + slack)).all())

    def integrals(self, s: Tensor, t: Tensor, count: int, rule: Rule) -> Integrals:
        """Return all integrals of one step from ``lam = s`` to ``t`` (forwards or back).

        Args:
            s: start of the step in ``lam``, ``[]``.
            t: end of the step in ``lam``, ``[]``.
            count: number of moments.
            rule: ``exact`` integrates the piecewise linear statistics to rounding, between any two ``lam``; ``trapezoid`` is the rule of
                the authors' code, between points of the grid only.

        Raises:
            GridError: ``trapezoid``, and an end that is not a point of the grid.
        """
        lam, cumulative, whole = self._gauss(s, t) if rule == "exact" else self._trapezoid(s, t)
        l, s_, b = self.at(lam.flatten())
        l, s_, b = (value.reshape(*lam.shape, *value.shape[1:]) for value in (l, s_, b))
        r = (lam - s).reshape(*lam.shape, *(1,) * len(self.shape))
        int_s = cumulative(s_)
        E, drive = torch.exp(cumulative(l) + int_s), torch.exp(-int_s) * b  # noqa: N806
        moments = tuple(whole(E * r**k) / math.factorial(k) for k in range(count))
        return Integrals(whole(l), whole(s_), whole(drive), whole(E * cumulative(drive)), moments)

    def _gauss(self, s: Tensor, t: Tensor) -> Quadrature:
        """Return Gauss-Legendre points ``[c, q]`` in each cell, or part of one, between ``s`` and ``t``, and two integrals over them."""
        low, high = sorted((float(s.detach()), float(t.detach())))
        inside = self.lam[(self.lam > low + SLACK * self.step) & (self.lam < high - SLACK * self.step)]
        edges = torch.cat([s[None], inside if s <= t else inside.flip(0), t[None]])
        width = torch.diff(edges)
        lam = edges[:-1, None] + width[:, None] * _NODES

        def by_cell(f: Tensor) -> Tensor:
            return torch.einsum("c,q,cq...->c...", width, _WEIGHTS, f)

        def cumulative(f: Tensor) -> Tensor:
            before = torch.cumsum(by_cell(f), 0) - by_cell(f)
            return before[:, None] + torch.einsum("c,pq,cq...->cp...", width, _PARTIAL, f)

        return lam, cumulative, lambda f: by_cell(f).sum(0)

    def _trapezoid(self, s: Tensor, t: Tensor) -> Quadrature:
        """Return the grid's points ``[n]`` from ``s`` to ``t``, with their two integrals."""
        first, last = (int(i) for i in self.indices(torch.stack([s, t]), exactly=True))
        forwards = 1 if first <= last else -1
        lam = self.lam[list(range(first, last + forwards, forwards))]

        def cumulative(f: Tensor) -> Tensor:
            areas = (f[1:] + f[:-1]) / 2 * (forwards * self.step)
            return torch.cat([torch.zeros_like(f[:1]), torch.cumsum(areas, 0)])

        return lam, cumulative, lambda f: cumulative(f)[-1]

    # -- time grids -------------------------------------------------------------------------------------------------

    def indices(self, lam: Tensor, *, exactly: bool = False) -> Tensor:
        """Return the indices ``[n]`` of the grid's points nearest to ``lam [n]``, ties to the even one.

        Args:
            lam: levels.
            exactly: refuse levels between the points.

        Raises:
            GridError: ``exactly``, and a ``lam`` that is not a point of the grid.
        """
        where = (lam.detach() - self.lam[0]) / self.step
        index = where.round().clamp(0, len(self.lam) - 1)
        if exactly and bool(((where - index).abs() > SLACK).any()):
            raise GridError(f"trapezoid integrals need times on the statistics' own grid; snap the grid first, lam = {lam.tolist()}")
        return index.long()

    def grid(self, schedule: NoiseSchedule, indices: list[int] | Tensor) -> TimeGrid:
        """Return the time grid through these points of the statistics' grid, by increasing indices ``[M+1]``."""
        return TimeGrid(schedule.t_of_lam(self.lam[torch.as_tensor(indices)]))

    def snap(self, grid: TimeGrid, schedule: NoiseSchedule) -> TimeGrid:
        """Return a time grid with each time moved to the nearest point of the statistics' grid, as the authors do.

        Raises:
            GridError: two times fall on one point (use more levels or fewer steps).
        """
        lam = schedule.lam(grid.t)
        near = schedule.t_of_lam(self.lam[self.indices(lam)])
        return TimeGrid(torch.where(torch.isfinite(lam), near, grid.t))

    # -- whose ------------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the numbers and of the model, guidance and schedule that they belong to."""
        digest = hashlib.sha256(repr((self.model, self.guidance, self.shape, self.schedule.to_config())).encode())
        for value in (self.lam, self.l, self.s, self.b):
            digest.update(value.float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def check(self, *, model: str, guidance: float, schedule: NoiseSchedule, shape: tuple[int, ...]) -> None:
        """Refuse statistics that were made for another model, guidance scale, schedule or shape.

        Args:
            model: the fingerprint of the model.
            guidance: its guidance scale.
            schedule: its noise law.
            shape: the shape of its samples.

        Raises:
            ArtifactError: they differ; the message names both sides.
        """
        ours = {"model": self.model, "guidance": self.guidance, "sample shape": self.shape, "schedule": self.schedule.to_config()}
        theirs = {"model": model, "guidance": guidance, "sample shape": tuple(shape), "schedule": schedule.to_config()}
        for what, mine in ours.items():
            if not alike(mine, theirs[what]) and not (what == "model" and "" in (mine, model)):
                one, two = (json.dumps(side)[:200] for side in (mine, theirs[what]))
                raise ArtifactError(
                    f"these statistics were made for {what} {one}, but are used with {what} {two}: calibrate this model, or say that any "
                    f"statistics will do"
                )

    # -- disk -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``statistics.json``, ``statistics.safetensors`` (float32) and a ``README.md`` card, and return the folder.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        return self._write(named_path(folder), self._readme('load("path/to/this/folder")', ["statistics.png"]))

    def _write(self, folder: Path, readme: str) -> Path:
        check_no_model(folder)
        meta = {
            "model": self.model,
            "guidance": self.guidance,
            "shape": list(self.shape),
            "lam": [float(self.lam[0]), float(self.lam[-1])],
            "schedule": self.schedule.to_config(),
            "card": dict(self.card),
        }
        tensors = {name: getattr(self, name).float() for name in ("l", "s", "b")}
        return save_artifact(folder, "statistics", meta, tensors, readme)

    @classmethod
    def load(cls, folder: str | Path) -> ModelStatistics:
        """Load statistics that `save` wrote.

        Raises:
            ArtifactError: a file is missing, damaged, or of another version.
        """

        def build(meta: StatisticsRecord, tensors: dict[str, Tensor]) -> ModelStatistics:
            l, s, b = (tensor_of(tensors, name, [None] * (1 + len(meta.shape))) for name in ("l", "s", "b"))
            lam = torch.linspace(*meta.lam, len(l), dtype=torch.float64)
            return cls(lam, l, s, b, tuple(meta.shape), schedule_from_config(meta.schedule), meta.model, meta.guidance, meta.card)

        return load_artifact(folder, "statistics", StatisticsRecord, build)

    def _readme(self, load: str, pictures: Sequence[str] = ()) -> str:
        facts = "\n".join(f"- {key}: {value}" for key, value in self.card.items())
        told = "l, s and b along the noise level, as fewstep calibrate plots them"
        shown = "".join(f"\n![{told}]({name})\n" for name in pictures)
        return f"""{header(self.card, "model-statistics")}# Empirical model statistics for DPM-Solver-v3

- model fingerprint {self.model or "not known"}, guidance {self.guidance:g}, samples of shape {self.shape}
- {len(self.lam)} levels, lam from {self.lam[0]:.4g} to {self.lam[-1]:.4g}; l {tuple(self.l.shape[1:])}, s {tuple(self.s.shape[1:])}, \
b {tuple(self.b.shape[1:])}
{facts}
{shown}
```python
import fewstep

statistics = fewstep.ModelStatistics.{load}
solver = fewstep.make_solver("dpm-solver-v3", statistics=statistics)
```
"""


def _gauss_legendre(points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return nodes ``[q]``, weights ``[q]`` on [0, 1], and integrals ``[q, q]`` from 0 to each node of the polynomial through all."""
    roots, weights = np.polynomial.legendre.leggauss(points)
    nodes = (roots + 1) / 2
    powers = np.arange(points)
    partial = (nodes[:, None] ** (powers + 1) / (powers + 1)) @ np.linalg.inv(nodes[:, None] ** powers)
    return torch.from_numpy(nodes), torch.from_numpy(weights / 2), torch.from_numpy(partial)


_NODES, _WEIGHTS, _PARTIAL = _gauss_legendre(6)  # to rounding for cells of a few tenths
