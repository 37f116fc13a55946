r"""The geometry of a model's sampling trajectories, and what a sampler's last evaluations buy (Chen et al., arXiv 2305.19947).

In the scaled state :math:`z = x/\alpha` at the level :math:`s = \sigma/\alpha` a first-order step is a convex combination,
:math:`z(s') = (s'/s) z(s) + (1 - s'/s) D(z, s)`. So a trajectory has two curves: the sampling trajectory z, and the denoising trajectory D,
which is where the tangent of the first points, and which arrives earlier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.tableau import Tableau
from fewstep.runtime.errors import FewstepError, SolverError
from fewstep.runtime.front_door import checked
from fewstep.sampling.loop import Step, run
from fewstep.sampling.noise import seed_list
from fewstep.sampling.sampler import Sampler, tableau_of

__all__ = ["Geometry", "geometry", "stopping_error"]

DIMENSIONS = 8  # of the energies, at most


@dataclass(frozen=True)
class Geometry:
    """The geometry of B trajectories of N evaluations, per element of a state.

    Attributes:
        levels: noise levels ``sigma/alpha`` of the states, ``[N+1]``, float64; from pure noise on, the first is left out.
        deviation: distance of z from the chord from its start to its end, relative to the chord's length, ``[N+1, B]``.
        energy: share of the energy of z about its end in 1, 2, ... dimensions, ``[B, min(N, 8)]``.
        denoised_energy: the same of D.
        distance: RMS of z to its end, ``[N+1, B]``.
        denoised_distance: RMS of D to the end of z, ``[N, B]``.
        turning: length of the path of D over the distance of its ends, ``[B]``; 1 if it goes straight.
        change: RMS change of D from one evaluation to the next, ``[N-1, B]``.
    """

    levels: Tensor
    deviation: Tensor
    energy: Tensor
    denoised_energy: Tensor
    distance: Tensor
    denoised_distance: Tensor
    turning: Tensor
    change: Tensor

    def __repr__(self) -> str:
        count, turning = self.distance.shape[1], float(self.turning.mean())
        return f"Geometry({count} trajectories of {len(self.levels) - 1} evaluations, turning {turning:.2f})"

    def arrival(self, threshold: float) -> tuple[float, float]:
        """Return the levels below which D, and z, stay within ``threshold`` of the end: means over trajectories; nan if never."""
        return _arrival(self.levels[:-1], self.denoised_distance, threshold), _arrival(self.levels, self.distance, threshold)

    def summary(self) -> dict[str, float]:
        """Return the figures that describe a model, means over trajectories, by name."""
        found = {"deviation": float(self.deviation.amax(0).mean()), "turning": float(self.turning.mean())}
        found["deviation_level"] = float(self.levels[self.deviation.mean(1).argmax()])
        for name, energy in (("energy", self.energy), ("denoised_energy", self.denoised_energy)):
            found |= {f"{name}_{k + 1}": float(value) for k, value in enumerate(energy.mean(0)[:4])}
        for threshold in (0.2, 0.1, 0.05):
            denoised, sampled = self.arrival(threshold)
            found |= {f"denoised_arrival_{threshold:g}": denoised, f"arrival_{threshold:g}": sampled}
        return found

    def density(self) -> tuple[Tensor, Tensor]:
        """Return where the image is decided: levels ``[N-1]``, and the RMS change of D for a factor e in the level there ``[N-1]``."""
        lam = -torch.log(self.levels[:-1])
        return torch.exp(-(lam[1:] + lam[:-1]) / 2), self.change.square().mean(1).sqrt() / torch.diff(lam)


def _arrival(levels: Tensor, distance: Tensor, threshold: float) -> float:
    """Return the mean over trajectories of the highest level from which a distance ``[n, B]`` stays below a threshold."""
    near = (distance.flip(0) <= threshold).long().cumprod(0).sum(0)  # states at the end that are near, of each trajectory
    if not len(near) or bool((near == 0).any()):
        return math.nan
    return float(levels[len(levels) - near].double().mean())


@checked
@torch.no_grad()
def geometry(
    denoiser: Denoiser,
    sampler: Sampler | Tableau,
    x: Tensor,
    cond: Cond = None,
    *,
    seeds: Iterable[int] | Tensor | None = None,
    observe: Callable[[Step], None] | None = None,
) -> Geometry:
    """Run a sampler and measure the geometry of its trajectories from ``x [B, *D]``.

    All states are kept on the CPU: ``2 B N d`` numbers for samples of d. Measure with a sampler of many evaluations (`unipc-3`
    with 100): distances are to the end of the same run, and with few evaluations both are wrong together.

    Args:
        denoiser: the model.
        sampler: the sampler.
        x: the start.
        cond: the condition.
        seeds: for a sampler that adds noise, whose geometry is of one path of noises.
        observe: called with each `Step`.

    Raises:
        SolverError: fewer than 3 evaluations, which make no geometry; as `steps`.
        ModelError: as `steps`.
    """
    tableau = tableau_of(sampler)
    nodes = tableau.nodes
    if nodes.evaluations < 3:
        raise SolverError(f"{nodes.evaluations} evaluations are the line segments that they are: measure a geometry with 3 or more")
    kept_x, kept_x0 = list[Tensor](), list[Tensor]()

    def keep(step: Step) -> None:
        kept_x.append(step.x.cpu())
        kept_x0.append(step.x0.cpu())
        if observe is not None:
            observe(step)

    end = run(denoiser, tableau, x, cond, seeds=None if seeds is None else seed_list(seeds), observe=keep)
    first = int(nodes.alpha[0] == 0)  # z is infinite at pure noise
    z = torch.stack([*kept_x[first:], end.cpu()]).flatten(2)  # [N+1, B, d]
    z = z / nodes.alpha[first:, None, None].to(z.dtype)
    answers, root = torch.stack(kept_x0[first:]).flatten(2), z.shape[2] ** 0.5
    chord = (z[-1] - z[0]).double()
    unit, away = chord / chord.norm(dim=1, keepdim=True).clamp_min(1e-30), []
    for state in z:
        path = (state - z[0]).double()
        away.append((path - (path * unit).sum(1, keepdim=True) * unit).norm(dim=1))
    moved = torch.stack([(later - earlier).double().norm(dim=1) for earlier, later in zip(answers, answers[1:], strict=False)])
    return Geometry(
        levels=(nodes.sigma / nodes.alpha)[first:],
        deviation=torch.stack(away) / chord.norm(dim=1).clamp_min(1e-30),
        energy=_energies(z, z[-1]),
        denoised_energy=_energies(answers, z[-1]),
        distance=torch.stack([(state - z[-1]).double().norm(dim=1) for state in z]) / root,
        denoised_distance=torch.stack([(answer - z[-1]).double().norm(dim=1) for answer in answers]) / root,
        turning=moved.sum(0) / (answers[-1] - answers[0]).double().norm(dim=1).clamp_min(1e-30),
        change=moved / root,
    )


def _energies(path: Tensor, end: Tensor) -> Tensor:
    """Return the cumulative shares ``[B, min(n - 1, 8)]`` of squared singular values of paths ``[n, B, d]`` about their ends ``[B, d]``."""
    found = []
    for k in range(path.shape[1]):
        apart = (path[:, k] - end[k]).double()
        values = torch.linalg.eigvalsh(apart @ apart.T).flip(0).clamp_min(0)
        found.append((values.cumsum(0) / values.sum().clamp_min(1e-300))[: min(len(path) - 1, DIMENSIONS)])
    return torch.stack(found) if found else path.new_zeros(0, min(len(path) - 1, DIMENSIONS), dtype=torch.float64)


@checked
@torch.no_grad()
def stopping_error(
    denoiser: Denoiser,
    sampler: Sampler | Tableau,
    x: Tensor,
    reference: Tensor,
    cond: Cond = None,
    *,
    seeds: Iterable[int] | Tensor | None = None,
) -> Tensor:
    """Measure what a sampler's last evaluations buy: the RMSE to ``reference [B, *D]`` when it is stopped after each, ``[N+1]``.

    Entry ``k - 1`` is that of the denoiser's answer at evaluation ``k`` (`Tableau.stopped`); the last one that of the whole sampler.

    Raises:
        FewstepError: a reference of another shape.
        SolverError, ModelError: as `steps`.
    """
    tableau = tableau_of(sampler)
    if not isinstance(reference, Tensor) or reference.shape != x.shape:
        shape = tuple(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
        raise FewstepError(f"the reference is the exact end of each start, of shape {tuple(x.shape)}, got {shape}")
    if not bool(torch.isfinite(reference).all()):
        raise FewstepError("the reference is not finite: errors to it say nothing")
    errors = list[float]()

    def error(made: Tensor) -> float:
        return float((made.double() - reference.to(made.device).double()).square().mean().sqrt())

    listed = None if seeds is None else seed_list(seeds)
    end = run(denoiser, tableau, x, cond, seeds=listed, observe=lambda step: errors.append(error(step.x0)))
    return torch.tensor([*errors, error(end)], dtype=torch.float64)
