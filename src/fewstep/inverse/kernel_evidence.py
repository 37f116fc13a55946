r"""The evidence of a blur kernel: how probable the blurred images are under it, with the sharp ones integrated out.

At a noise level the clean image has about the mean :math:`D`, the denoiser's answer, and about a stationary covariance of spectrum
:math:`c_f`, which `ErrorSpectra` measures on the model's own samples. So of a blurred image :math:`y = k * x_0 + n` each frequency is

.. math:: Y_f \sim N(K_f D_f,\; v_f), \qquad v_f = a |K_f|^2 c_f + s_y^2, \tag{1}

with the contrast :math:`a` of each image. At pure noise, where :math:`D = 0` and :math:`c` is the spectrum of images, (1) is what the power
spectrum says of a kernel; at low noise it is the least squares of an M-step, with each frequency weighed by how well it is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.inverse.error_spectra import ErrorSpectra, frequency_weights
from fewstep.inverse.measurements import CircularBlur

__all__ = ["Observed", "ascend", "contrast", "evidence", "starting_kernels", "transfer"]

CALM = 4.0  # frequencies' worth of belief that a picture has the usual contrast
CENTRED = 25.0  # a centre of mass has a standard deviation of 0.2 pixels about the middle
CONTRASTS = 6  # rounds that find the contrasts
LEAST = 1e-3  # noise, over the standard deviation of images: below it a spectrum of floats says nothing
FLOOR = 1e-3  # of a kernel's element at the start of an ascent


@dataclass(frozen=True, eq=False)
class Observed:
    """Blurred images that share a kernel.

    Attributes:
        y: their transform, ``[P, C, H, W/2 + 1]``.
        noise: the standard deviation of their noise, positive.
        width: of the images in pixels.
    """

    y: Tensor
    noise: float
    width: int

    @property
    def weights(self) -> Tensor:
        """How often each frequency counts, ``[H, W/2 + 1]``."""
        return frequency_weights(self.y, self.width)

    @classmethod
    def of(cls, y: Tensor, noise: float, spectra: ErrorSpectra) -> Observed:
        """Transform the blurred images ``y [P, C, H, W]``."""
        return cls(spectra.transform(y), max(noise, LEAST * spectra.spread), y.shape[-1])


def transfer(kernel: Tensor, height: int, width: int) -> Tensor:
    """Return the Fourier transform ``[..., H, W/2 + 1]`` of kernels ``[..., h, w]``."""
    return CircularBlur(kernel).spectrum(torch.empty(1, 1, height, width, dtype=kernel.dtype, device=kernel.device)).squeeze(1)


def contrast(power: Tensor, gain: Tensor, noise: float, weights: Tensor) -> Tensor:
    r"""Find the contrast :math:`a` of each image for which its residual has the power that (1) expects, by expectation maximisation.

    Args:
        power: :math:`|Y - K D|^2`, ``[..., C, H, W/2 + 1]``.
        gain: :math:`|K|^2 c`, the same shape or what broadcasts to it.
        noise: the standard deviation of the measurement.
        weights: how often a frequency counts, ``[H, W/2 + 1]``.

    Returns:
        ``[..., 1, 1, 1]``.
    """
    a = torch.ones_like(power[..., :1, :1, :1])
    count = weights.sum() * power.shape[-3]
    for _ in range(CONTRASTS):
        v = a * gain + noise**2
        known = a * gain / v  # of the residual that is the image's
        second = a * (known * power / v + 1 - known)  # the posterior second moment of the error, over c
        a = ((second * weights).sum((-3, -2, -1), keepdim=True) + CALM) / (count + CALM)
    return a


def evidence(kernels: Tensor, seen: Observed, c: Tensor, answers: Tensor | None = None) -> Tensor:
    r"""Return :math:`-2 \log p(y \mid k)` of formula (1), up to a constant, ``[R]``: the smaller, the more probable.

    Args:
        kernels: ``[R, h, w]``.
        seen: the blurred images.
        c: the spectrum of the errors of the answers, ``[C, H, W/2 + 1]``.
        answers: the denoiser's, transformed, ``[S, P, C, H, W/2 + 1]``; None: nothing is known.
    """
    k = transfer(kernels, seen.y.shape[-2], seen.width)[:, None, None, None]
    left = seen.y[None, None] if answers is None else seen.y - k * answers
    power, weights = left.abs().square().expand(len(kernels), -1, -1, -1, -1, -1), seen.weights
    gain = k.abs().square() * c
    with torch.no_grad():
        a = contrast(power, gain, seen.noise, weights)
    v = a * gain + seen.noise**2
    fit = ((power / v + v.log()) * weights).sum((-3, -2, -1)).mean(1).sum(1)
    return fit + CENTRED * _off_middle(kernels)


def ascend(kernels: Tensor, negative: Callable[[Tensor], Tensor], steps: int, rate: float) -> Tensor:
    """Improve kernels ``[R, h, w]`` each by itself, by Adam on their logits, which keeps them on the simplex.

    Args:
        kernels: to begin at.
        negative: what is to become small, ``[R, h, w] -> [R]``.
        steps: gradients.
        rate: the first step in the logits; it falls linearly.
    """
    logits = (kernels + FLOOR).log().clone().requires_grad_()
    made = lambda: torch.softmax(logits.flatten(1), 1).reshape(kernels.shape)  # noqa: E731
    optimizer = torch.optim.Adam([logits], lr=rate, betas=(0.9, 0.95))
    with torch.enable_grad():
        for i in range(steps):
            optimizer.zero_grad()
            negative(made()).sum().backward()
            optimizer.param_groups[0]["lr"] = rate * (1 - i / steps) + 0.01
            optimizer.step()
    return made().detach()


def starting_kernels(h: int, w: int, random: int, seed: int) -> Tensor:
    """Return kernels to begin at, ``[R, h, w]``: Gaussians of four widths, lines in eight directions, and some at random."""
    y, x = torch.meshgrid(torch.arange(h) - h // 2.0, torch.arange(w) - w // 2.0, indexing="ij")
    size = max(h, w)
    found = [torch.exp(-(x**2 + y**2) / (2 * (part * size) ** 2)) for part in (0.07, 0.12, 0.18, 0.26)]
    for turn in range(8):
        across = x * math.sin(math.pi * turn / 8) - y * math.cos(math.pi * turn / 8)
        found.append(torch.exp(-(across**2) / (2 * 0.5**2)))
    generator = torch.Generator().manual_seed(seed)
    found += [torch.rand(h, w, generator=generator) ** 3 for _ in range(random)]
    kernels = torch.stack(found)
    return kernels / kernels.sum((-2, -1), keepdim=True)


def _off_middle(kernels: Tensor) -> Tensor:
    """Return the squared distance of the centre of mass from the middle, ``[R]``."""
    along = (torch.arange(n, device=kernels.device) - n // 2 for n in kernels.shape[-2:])
    rows, columns = along
    return (kernels.sum(2) * rows).sum(1) ** 2 + (kernels.sum(1) * columns).sum(1) ** 2
