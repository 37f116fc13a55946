r"""The mathematics of a distribution matching step: EM distillation (Xie et al., arXiv 2405.16852), of which DMD is the case ``K = 1``.

A generator ``x0 = g(z)``, noised, is ``q(x, z) = N(z; 0, I) N(x; alpha g(z), sigma^2 I)``. With the teacher ``D_p = E_p[x0 | x]``, the
denoiser ``D_q`` of the generator's own samples (the *fake*) and ``d = D_p - D_q``, the scores of the posterior
``rho(x, z) = p(x) q(z | x)`` in the variables of ``x = alpha g(z) + sigma e`` are

    d/de log rho = (alpha/sigma) d - e,           d/dz log rho = (alpha/sigma)^2 J_g(z)^T d - z.

At little noise the posterior of ``z`` is as narrow as ``sigma/alpha`` over ``J_g``, so a step in ``z`` is `resolved` by the level.

``K`` steps of Langevin dynamics from a sample of ``q`` are the E-step; the M-step regresses ``g(z_K)`` onto ``g(z_K) + (sigma/alpha) e_K``.
The start and the injected noise in ``e_K`` carry no information, and their sum is known, so the drift's part alone may be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.prediction import add_noise, aligned

__all__ = ["LEAST_RATIO", "Direction", "direction", "langevin", "matching_loss", "resolved"]

LEAST_RATIO = 0.02  # of sigma/alpha, by which drifts are divided
LARGEST_PULL = 1.0  # of an element of z by the teacher, in twice the deviation of the noise of its step
LEAST_GAP = 1e-3  # of the distance by which a row is divided

At = Callable[[Tensor], Tensor]  # x [B, *D] -> x0 [B, *D], at the row's own noise level and condition


class Direction(NamedTuple):
    """The direction in which samples of a generator are to move.

    Attributes:
        z: noises ``[B, *D]`` of the samples, where the E-step has led them.
        move: ``[B, *D]``, on the scale of ``D_p - D_q``.
        weight: of each row, ``[B]``: ``1 / mean |D_p(x) - g(z)|`` at the start (arXiv 2311.18828, eq. 8), which knows the noise ``e``;
            where that is not cancelled, ``sqrt(1 + r^2) / r`` of the level ``r = sigma/alpha``, which does not.
    """

    z: Tensor
    move: Tensor
    weight: Tensor


def langevin(
    e: Tensor, z: Tensor, d: Tensor, ratio: Tensor, pulled: Tensor | None, step_e: float, step_z: float | Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Take one step of Langevin dynamics in ``(e, z)`` towards the posterior of a generator and noised data (arXiv 2405.16852).

    Args:
        e, z: the noise that is added, and that the generator is given, ``[B, *D]`` each.
        d: ``D_p - D_q`` at ``x = alpha g(z) + sigma e``, ``[B, *D]``.
        ratio: ``sigma/alpha``, ``[B, 1, ...]``, positive.
        pulled: ``J_g(z)^T d``, ``[B, *D]``; None leaves ``z`` where it is.
        step_e, step_z: the sizes of the two steps; that in ``z`` of each row, ``[B, 1, ...]``, or of all.
        noise: standard normal, ``[2, B, *D]``.
    """
    moved = e + step_e**2 / 2 * (d / ratio - e) + step_e * noise[0]
    if pulled is None:
        return moved, z
    pull = (step_z * pulled / ratio.square()).clamp(-LARGEST_PULL, LARGEST_PULL)
    return moved, z + step_z / 2 * (pull - step_z * z) + step_z * noise[1]


def resolved(step_z: float, ratio: Tensor) -> Tensor:
    """Return the size of a step in ``z`` at levels ``r = sigma/alpha [B, 1, ...]``: ``step_z r / sqrt(1 + r^2)``.

    The drift of ``z`` then changes by ``step_z^2 |J_g|^2 / 2`` of a change of ``z`` at most, at any level. Of one size for all levels it
    would leave the posterior at little noise: ``z`` crosses to where the generator makes another sample than ``e`` was led for.
    """
    return step_z * ratio / torch.sqrt(1 + ratio.square())


def direction(
    teacher: At,
    fake: At,
    generator: Callable[[Tensor], Tensor],
    z: Tensor,
    e: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    step_e: float,
    step_z: float = 0.0,
    cancel: bool = True,
    made: Tensor | None = None,
) -> Direction:
    """Return the direction of the M-step after ``K`` steps of the E-step at one noise level for each row (arXiv 2405.16852).

    With ``cancel`` only the drift's part of ``e_K`` is kept. Then one step that leaves ``z`` gives ``D_p - D_q`` at ``alpha g + sigma e``
    to the bit, for any ``step_e``: the direction of DMD (arXiv 2311.18828) and VSD (arXiv 2305.16213).

    Args:
        teacher, fake: the denoisers at the levels and conditions of the rows, ``x [B, *D] -> x0 [B, *D]``; no gradient is taken of them.
        generator: ``z [B, *D] -> x0 [B, *D]``, differentiable where ``step_z`` is not 0.
        z, e: standard normal, ``[B, *D]`` each: a sample of ``q``.
        noise: standard normal, ``[K, 2, B, *D]``: what the Langevin steps inject.
        alpha, sigma: of the rows, ``[B]``.
        step_e, step_z: sizes of the Langevin steps, that in ``z`` where much noise is, see `resolved`; ``step_z`` 0 leaves ``z`` where it
            is and takes no derivative.
        cancel: drop the part of the start and of the injected noise, which is known.
        made: ``g(z)``, if it is known already.
    """
    ratio = aligned(sigma / alpha, z).clamp_min(LEAST_RATIO)
    decay, moved, weight = 1 - step_e**2 / 2, torch.zeros_like(e), (torch.sqrt(1 + ratio.square()) / ratio).flatten()
    for k, injected in enumerate(noise):
        pulled = None
        if step_z:
            z = z.detach().requires_grad_(True)
            with torch.enable_grad():
                x0 = generator(z)
        else:
            x0 = made if made is not None else generator(z)
        with torch.no_grad():
            x = add_noise(x0.detach(), e, alpha, sigma)
            wanted = teacher(x)
            d = wanted - fake(x)
            if k == 0 and cancel:
                weight = 1 / (wanted - x0.detach()).abs().flatten(1).mean(1).clamp_min(LEAST_GAP)
        if step_z:
            (pulled,) = torch.autograd.grad(x0, z, d)
        with torch.no_grad():
            moved = decay * moved + d  # the drift's part of e, times (sigma/alpha) (2/step_e^2)
            e, z = langevin(e, z.detach(), d, ratio, pulled, step_e, resolved(step_z, ratio), injected)
        if not step_z:
            made = x0
    steps = len(noise)
    return Direction(z.detach(), (moved if cancel else 2 / step_e**2 * ratio * e) / steps, weight)


def matching_loss(x0: Tensor, found: Direction, eta: float = 0.25) -> Tensor:
    """Return the loss ``[]`` whose gradient moves samples ``x0 = g(z) [B, *D]`` along a direction: ``|g - sg[g + eta w c]|^2 / eta``.

    The gradient does not depend on ``eta``. It is the mean over rows and elements.
    """
    target = (x0 + eta * aligned(found.weight, x0) * found.move).detach()
    return (x0 - target).square().mean() / eta
