r"""Guidance and thresholding: functions from a denoiser to a denoiser, so they compose and no solver knows of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.core.condition import with_null
from fewstep.core.denoiser import Cond, Denoiser, check_denoiser
from fewstep.core.domain import Cube, check_unbounded, domain_of
from fewstep.core.prediction import aligned
from fewstep.core.schedule import NoiseSchedule
from fewstep.models.networks.scaled_call import each_scale
from fewstep.runtime.errors import FewstepError, ModelError
from fewstep.runtime.front_door import number
from fewstep.sampling.splitting import log_gradient

__all__ = [
    "Wrapped",
    "both_answers",
    "calls_of",
    "classifier_free",
    "classifier_guided",
    "default_scale",
    "dynamic_threshold",
    "scale_range",
    "static_threshold",
    "thresholded",
]

INSIDE = "its samples lie in the cube already; leave the threshold out"
LARGEST = torch.finfo(torch.float32).max  # the scale that states of float32 can be multiplied by


@dataclass(frozen=True, eq=False)
class Wrapped:
    """A denoiser made of a function and a schedule.

    Attributes:
        schedule: the noise law.
        function: ``(x, t, cond) -> x0``.
        calls: of the network for one sample in an evaluation.
        domain: the cube that samples of a reflected model are folded into, else None.
    """

    schedule: NoiseSchedule
    function: Callable[[Tensor, Tensor, Cond], Tensor] = field(repr=False)
    calls: int = 1
    domain: Cube | None = None

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return self.function(x, t, cond)


def calls_of(denoiser: object) -> int:
    """Return how many calls of its network a denoiser makes for one sample in an evaluation: 2 with guidance by two answers, else 1."""
    found = getattr(denoiser, "calls", 1)
    return found if isinstance(found, int) else 1


def both_answers(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond, uncond: Cond) -> tuple[Tensor, Tensor]:
    """Return the answers ``[B, *D]`` without a condition and with it, from one call on a doubled batch."""
    null, wanted = denoiser(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t, with_null(uncond, cond, len(x))).chunk(2)
    return null, wanted


def scale_range(scales: Any) -> tuple[float, float]:  # noqa: ANN401
    """Return the least and the largest of a range of guidance scales, plain numbers.

    Raises:
        FewstepError: they are no range of scales of at least 0.
    """
    if not isinstance(scales, Sequence) or isinstance(scales, str) or len(scales) != 2:
        raise FewstepError(f"scales are the least and the largest guidance scale, as (1.0, 4.0), got {scales!r}")
    low, high = (number(scale, "a guidance scale") for scale in scales)
    if not 0 <= low < high < math.inf:
        raise FewstepError(f"guidance scales range from one of at least 0 to a larger one, as 1 to 4, got {low:g} to {high:g}")
    return low, high


def default_scale(scales: tuple[float, float] | None) -> float:
    """Return the guidance scale of calls that name none: 1, or of a model that is told its scale the nearest to it that it knows."""
    return 1.0 if scales is None else min(max(1.0, scales[0]), scales[1])


def classifier_free(
    denoiser: Denoiser, scale: float | Tensor, uncond: Cond, *, interval: tuple[float, float] = (0.0, math.inf), rescale: float = 0.0
) -> Denoiser:
    r"""Return a denoiser with classifier-free guidance, ``x0 = uncond + scale (cond - uncond)`` (Ho and Salimans, arXiv 2207.12598).

    Both come from one call on a doubled batch. Scale 1 is the conditional model at its own cost, scale 0 the unconditional one. One guided
    evaluation counts as one network evaluation in every ``nfe`` of this library.

    Args:
        denoiser: the conditional model.
        scale: guidance scale, or one for each sample of a batch ``[B]``.
        uncond: the null condition, of the form of the condition: a label, a tensor for one sample, or a tuple, list, dict or dataclass of
            those, broadcast to the batch. A condition of texts has a text.
        interval: noise levels ``sigma/alpha`` within which to guide; outside it the scale is 1 (Kynkaanniemi et al., arXiv 2404.07724).
        rescale: 0..1, how far the standard deviation per sample is moved back to that of ``cond`` (Lin et al., arXiv 2305.08891, eq. 16).

    Raises:
        ModelError: a rescale outside [0, 1], an empty interval, a rescale of a reflected model, or a call whose condition has no
            counterpart in ``uncond``.
    """
    check_denoiser(denoiser, "classifier_free")
    if getattr(denoiser, "scales", None) is not None:
        raise ModelError(
            "this model is told its guidance scale, and answers by one call: use model.guided(scale); an interval, or rescale, which needs "
            "the answers with and without the condition, is for its teacher"
        )
    each, rescale = isinstance(scale, Tensor) and scale.ndim == 1, number(rescale, "rescale", ModelError)
    if isinstance(scale, Tensor) and (not scale.numel() or scale.is_complex()):
        raise ModelError(f"guidance is a scale, or one for each sample [B], not {scale}")
    scale = scale if each else number(scale, "the scale of guidance", ModelError)
    largest = float(torch.as_tensor(scale).abs().max()) if each else abs(float(scale))
    if not isinstance(interval, Sequence) or len(interval) != 2:
        raise ModelError(f"the interval of guidance is a pair of noise levels, as (0.2, 5.0), got {interval!r}")
    interval = (number(interval[0], "the interval's low end", ModelError), number(interval[1], "the interval's high end", ModelError))
    if not largest <= LARGEST or not 0 <= rescale <= 1 or not interval[0] < interval[1]:
        raise ModelError(f"guidance wants a finite scale, rescale in [0, 1] and interval (low, high), got {scale}, {rescale}, {interval}")
    if rescale:
        check_unbounded(denoiser, "rescale", "its answers are mirror images, with another deviation than a picture; leave rescale out")

    def guided(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if cond is None:
            raise ModelError("guidance needs a condition: pass cond to sample")
        level = torch.exp(-denoiser.schedule.lam(t.detach())).reshape(-1)
        active = (level >= interval[0]) & (level <= interval[1])
        if (not each and scale == 1) or not bool(active.any()):
            return denoiser(x, t, cond)
        null, wanted = both_answers(denoiser, x, t, cond, uncond)
        x0 = torch.lerp(null, wanted, aligned(each_scale(scale, len(x)), wanted) if isinstance(scale, Tensor) else scale)
        if rescale:
            dims = tuple(range(1, x0.ndim))
            ratio = wanted.std(dims, correction=0, keepdim=True) / x0.std(dims, correction=0, keepdim=True).clamp_min(1e-12)
            x0 = torch.lerp(x0, x0 * ratio, rescale)
        inside = active.to(x.device).reshape((-1,) + (1,) * (x.ndim - 1))
        return torch.where(inside, x0, wanted)

    return Wrapped(denoiser.schedule, guided, calls=2 * calls_of(denoiser), domain=domain_of(denoiser))


def classifier_guided(denoiser: Denoiser, log_prob: Callable[[Tensor, Tensor, Cond], Tensor], scale: float) -> Denoiser:
    r"""Return a denoiser guided by a classifier, ``x0 + scale sigma^2/alpha grad_x log p(cond | x, t)`` (arXiv 2105.05233).

    It is the guided score of Dhariwal and Nichol as an ``x0``.

    Args:
        denoiser: the model.
        log_prob: ``(x [B, *D], t, cond) -> [B]``. At ``alpha = 0`` the state knows nothing of the class and no guidance is added.
        scale: guidance scale.

    Raises:
        ModelError: something that is no denoiser, function or number; later, a ``log_prob`` without a finite gradient for each sample.
    """
    check_denoiser(denoiser, "classifier_guided")
    check_unbounded(denoiser, "classifier_guided", "a classifier's gradient pushes through them; use classifier-free guidance")
    scale = number(scale, "the scale of guidance", ModelError)
    if not callable(log_prob) or not math.isfinite(scale):
        raise ModelError(f"a classifier is a function (x, t, cond) -> log p(cond | x, t) [B], at a finite scale, got {log_prob}, {scale}")

    def guided(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x0 = denoiser(x, t, cond)
        alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
        gradient = log_gradient(log_prob, x, t, cond)
        gain = torch.where(alpha > 0, scale * sigma**2 / alpha, torch.zeros_like(alpha))
        return x0 + aligned(gain, x) * gradient

    return Wrapped(denoiser.schedule, guided, calls_of(denoiser))


def static_threshold(denoiser: Denoiser, bound: float = 1.0) -> Denoiser:
    """Return a denoiser whose ``x0`` is clipped to ``[-bound, bound]``.

    Raises:
        ModelError: the bound is not positive.
    """
    check_denoiser(denoiser, "static_threshold")
    check_unbounded(denoiser, "static_threshold", INSIDE)
    bound = number(bound, "the bound of a threshold", ModelError)
    if not bound > 0:
        raise ModelError(f"the bound of a threshold must be positive, got {bound}")
    return Wrapped(denoiser.schedule, lambda x, t, cond: denoiser(x, t, cond).clamp(-bound, bound), calls_of(denoiser))


def dynamic_threshold(denoiser: Denoiser, quantile: float = 0.995, *, bound: float = 1.0, most: float = math.inf) -> Denoiser:
    """Return a denoiser with dynamic thresholding (Imagen, arXiv 2205.11487, section 2.3).

    The ``x0`` of each sample is clipped at its own quantile of absolute values, and scaled back to ``bound`` where that is larger.

    Args:
        denoiser: the model.
        quantile: in (0, 1].
        bound: the range of the data.
        most: upper limit of the quantile's value.

    Raises:
        ModelError: numbers out of range.
    """
    check_denoiser(denoiser, "dynamic_threshold")
    check_unbounded(denoiser, "dynamic_threshold", INSIDE)
    quantile, bound, most = (number(value, "a threshold", ModelError) for value in (quantile, bound, most))
    if not 0 < quantile <= 1 or not 0 < bound <= most:
        raise ModelError(f"dynamic thresholding wants 0 < quantile <= 1 and 0 < bound <= most, got {quantile}, {bound}, {most}")

    def clipped(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return thresholded(denoiser(x, t, cond), quantile, bound, most)

    return Wrapped(denoiser.schedule, clipped, calls_of(denoiser))


def thresholded(x0: Tensor, quantile: float, bound: float = 1.0, most: float = math.inf) -> Tensor:
    """Return an answer ``x0 [B, *D]`` after dynamic thresholding, see `dynamic_threshold`."""
    limit = torch.quantile(x0.flatten(1).abs().float(), quantile, dim=1).clamp(bound, most).to(x0.dtype)
    limit = limit.reshape((-1,) + (1,) * (x0.ndim - 1))
    return x0.clamp(-limit, limit) * (bound / limit)
