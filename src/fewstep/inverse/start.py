r"""Where a restoration begins: from an estimate at an intermediate noise level, rather than from noise.

Come-Closer-Diffuse-Faster (arXiv 2112.05146): start from :math:`x = \alpha \tilde x + \sigma n` at a level :math:`s_0`. For data of
variance c in a direction the sampling ODE multiplies a difference of starts by :math:`\sqrt{c/(c + s_0^2)}`, so errors of the estimate
that no image has (small c) are forgotten first. A high level forgets more of the estimate, and brings more of the sample's own spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, FlowMap
from fewstep.core.grid import TimeGrid
from fewstep.core.tableau import Solver
from fewstep.inverse.corrections import SPREAD
from fewstep.inverse.measurements import Measurement, checked_noise, measurement_of
from fewstep.inverse.method import Method
from fewstep.inverse.posterior import checked_prior, make_method, sample_posterior
from fewstep.inverse.steps import restored_steps
from fewstep.models.generate import sample
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_model, check_seeds
from fewstep.runtime.errors import FewstepError, GridError, ModelError
from fewstep.runtime.front_door import checked, is_count, number, scale_of
from fewstep.sampling.noise import seeded_noise
from fewstep.sampling.sampler import Sampler
from fewstep.sampling.start import level_of, noised

__all__ = ["ESTIMATE", "STRENGTHS", "Estimator", "StartChoice", "checked_estimate", "choose_start", "pseudo_inverse"]

STRENGTHS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)  # that a rehearsal tries
TEACHER, MEASURING, STREAM = 20, 41, 42  # evaluations of the images of a rehearsal; streams of its noises
ESTIMATE = "y [B, *Y] -> an estimate of the images [B, *D]"

Estimator = Callable[[Tensor], Tensor]


def pseudo_inverse(measurement: object, y: Tensor, noise: float, shape: Sequence[int], *, spread: float = SPREAD) -> Tensor:
    """Estimate the images ``[B, *D]`` by the regularised pseudo-inverse: the mean of white Gaussian images that fit ``y [B, *Y]``.

    Args:
        measurement: the operator; of a nonlinear one, its derivative at 0 counts.
        y: what was measured.
        noise: the standard deviation of its noise.
        shape: of an image, ``*D``.
        spread: the standard deviation of the images.
    """
    operator, nothing = measurement_of(measurement), y.new_zeros(len(y), *shape)
    r = y - operator(nothing)
    return spread**2 * operator.at(nothing, y, noise).lift(r, spread**2, noise)


@dataclass(frozen=True)
class StartChoice:
    """The strength to begin a restoration with, chosen by rehearsal.

    Attributes:
        strength: the best, ``sigma/(alpha + sigma)``; 1 is from noise.
        errors: the error of each strength that was tried, in the metric asked for.
        num: rehearsed images.
        nfe: network evaluations of each restoration.
        evaluations: of single samples that the rehearsal took in all.
    """

    strength: float
    errors: Mapping[float, float]
    num: int
    nfe: int
    evaluations: int = 0

    @property
    def level(self) -> float:
        """The noise level ``sigma/alpha``; infinite from noise."""
        return level_of(self.strength)


@checked
@torch.no_grad()
def choose_start(
    model: Model,
    measurement: object,
    noise: float | None = None,
    *,
    nfe: int = 10,
    method: str | Method = "moments",
    solver: str | Solver | Sampler = "ddim",
    grid: str | TimeGrid | None = None,
    guidance: float | None = None,
    cond: Cond = None,
    estimate: Estimator | None = None,
    strengths: Sequence[float] = STRENGTHS,
    num: int = 16,
    seed: int = 0,
    metric: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> StartChoice:
    """Choose the strength to begin restorations with, by rehearsing them on samples of the model itself: no data are needed.

    It costs the samples and ``len(strengths)`` restorations of each, once for each operator and noise.

    Args:
        model: the prior.
        measurement, noise: as for `restore`.
        nfe, method, solver, grid, guidance: of the restorations, as for `restore`.
        cond: a condition for each image; by default as for `restore`.
        estimate: ``y [B, *Y] -> [B, *D]``, as it will be made; by default `pseudo_inverse`.
        strengths: to try; 1 is from noise.
        num: images.
        seed: of the first.
        metric: ``(restored [B, *D], true) -> [B]``, less is better; by default the mean square error.

    Raises:
        ModelError: as `restore`; an estimate of another shape.
        GridError: a strength that is none.
    """
    check_model(model)
    chosen, scale, sy = make_method(method), scale_of(guidance, model.default_guidance), checked_noise(noise, measurement)
    checked_prior(model, chosen)
    if not is_count(num):
        raise ModelError(f"num is the number of images of the rehearsal, a whole number from 1, got {num!r}")
    check_seeds(seed, num)
    several = isinstance(strengths, Sequence) and not isinstance(strengths, str)
    tried = sorted({number(one, "a strength to try", GridError) for one in strengths}) if several else []
    if metric is not None and not callable(metric):
        raise ModelError(f"a metric is a function (restored [B, *D], true) -> [B], got a {type(metric).__name__}")
    if not tried:
        raise GridError("a rehearsal tries one strength or more, as strengths=(0.2, 0.5, 1.0)")
    problem, operator, seeds = Problem(model, scale, model.device), measurement_of(measurement), range(seed, seed + num)
    denoiser = problem.denoiser
    assert not isinstance(denoiser, FlowMap)  # a student is refused
    samplers = [restored_steps(model, chosen, solver, nfe, grid, scale, None if one == 1 else one) for one in tried]
    cond = problem.conditions(seeds, cond)
    ready = chosen.prepared(denoiser, problem.shape, cond)
    true = sample(model, "dpm-solver-pp-2m", nfe=TEACHER, seeds=seeds, cond=cond, guidance=scale)
    clean = operator(true)
    y = clean + sy * seeded_noise(seeds, clean.shape[1:], stream=MEASURING).to(clean)
    start, errors = checked_estimate(estimate, operator, y, sy, problem.shape), dict[float, float]()
    fresh = [_other(one) for one in seeds]  # the noises of the samples themselves would be those of the truth
    for one, sampler in zip(tried, samplers, strict=True):
        nodes = sampler.tableau.nodes
        x = problem.start(fresh, nodes) if one == 1 else noised(start, nodes, fresh)
        made = sample_posterior(denoiser, sampler, x, operator, y, sy, cond, method=ready, seeds=fresh)
        found = _square(made, true) if metric is None else metric(made, true)
        if not isinstance(found, Tensor) or found.shape != (num,):
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ModelError(f"a metric answers one number for each of {num} images, [B], got {what}")
        errors[one] = float(found.mean())
    if not all(map(math.isfinite, errors.values())):
        raise FewstepError(f"the metric of a rehearsal is a finite number for each image, [B], got {errors}")
    cost = num * (TEACHER + nfe * len(tried)) + chosen.preparation
    return StartChoice(min(errors, key=lambda one: errors[one]), errors, num, nfe, cost)


def checked_estimate(
    estimate: Estimator | Tensor | None, measurement: Measurement, y: Tensor, noise: float, shape: Sequence[int]
) -> Tensor:
    """Return an estimate ``[B, *D]`` of what was measured, ``y [B, *Y]``: as passed, by a function, or by the pseudo-inverse.

    Raises:
        ModelError: it has another shape, or is not finite.
    """
    if estimate is None:
        found = pseudo_inverse(measurement, y, noise, shape)
    elif isinstance(estimate, Tensor):
        found = estimate if estimate.ndim == len(shape) + 1 else estimate[None].expand(len(y), *estimate.shape)
    elif callable(estimate):
        found = estimate(y)
    else:
        raise ModelError(f"an estimate is images [*D], or a function {ESTIMATE}, got a {type(estimate).__name__}")
    if not isinstance(found, Tensor) or found.shape != (len(y), *shape) or not found.is_floating_point():
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ModelError(f"an estimate is images of shape {(len(y), *shape)}, got {what}")
    if not bool(torch.isfinite(found).all()):
        raise ModelError("the estimate has entries that are not finite")
    return found.to(y.device)


def _square(made: Tensor, true: Tensor) -> Tensor:
    return (made - true).square().flatten(1).mean(1)


def _other(seed: int) -> int:
    """Return a seed for a rehearsal's restoration, of which no sample of the model is made."""
    return int(seeded_noise([seed], (1,), stream=STREAM).view(torch.int32)) & 0x7FFFFFFF
