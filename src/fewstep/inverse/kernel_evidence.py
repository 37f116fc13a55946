r"""The evidence of a blur kernel: how probable the blurred images are under it, with the sharp ones integrated out.

At a noise level the clean image has about the mean :math:`D`, the denoiser's answer, and about a stationary covariance of spectrum
:math:`c_f`, which `ErrorSpectra` measures on the model's own samples. So of a blurred image :math:`y = k * x_0 + n` each frequency is

.. math:: Y_f \sim N(K_f D_f,\; v_f), \qquad v_f = a |K_f|^2 c_f + s_y^2, \tag{1}

with the contrast :math:`a` of each image. At pure noise, where :math:`D = 0` and :math:`c` is the spectrum of images, (1) is what the power
spectrum says of a kernel; at low noise it is the least squares of an M-step, with each frequency weighed by how well it is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.condition import part_of, repeated
from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.prediction import aligned
from fewstep.core.tableau import Tableau
from fewstep.inverse.measurements import CircularBlur
from fewstep.sampling.loop import run
from fewstep.sampling.noise import seeded_noise, start_noise

__all__ = ["ErrorSpectra", "Observed", "ascend", "contrast", "evidence", "starting_kernels", "transfer"]

STREAM = 700  # of the rehearsal's noises
CALM = 4.0  # frequencies' worth of belief that a picture has the usual contrast
CENTRED = 25.0  # a centre of mass has a standard deviation of 0.2 pixels about the middle
CONTRASTS = 6  # rounds that find the contrasts
LEAST = 1e-3  # noise, over the standard deviation of images: below it a spectrum of floats says nothing
FLOOR = 1e-3  # of a kernel's element at the start of an ascent


@dataclass(frozen=True, eq=False)
class ErrorSpectra:
    r"""The power spectra of a denoiser's errors at some noise levels, for colours that are uncorrelated.

    Attributes:
        colours: the rotation of the channels, ``[C, C]``.
        log_levels: the logarithms of the levels ``sigma/alpha``, ascending, ``[L]``.
        errors: :math:`E|F(x_0 - D)|^2`, ``[L, C, H, W/2 + 1]``.
        images: :math:`E|F x_0|^2`, ``[C, H, W/2 + 1]``.
        width: of the images in pixels, which a transform of real numbers leaves open.
        evaluations: of the network, that a measurement of them took.
    """

    colours: Tensor
    log_levels: Tensor
    errors: Tensor
    images: Tensor
    width: int
    evaluations: int

    @classmethod
    def measure(
        cls, denoiser: Denoiser, drawing: Tableau, tableau: Tableau, shape: Sequence[int], cond: Cond, count: int, seed: int = 0
    ) -> ErrorSpectra:
        """Rehearse on the model's own samples: draw ``count``, add the noise of each of the tableau's levels, and denoise.

        Args:
            denoiser: the model.
            drawing: of the samples; an ordinary solver, since their spectrum is what is measured.
            tableau: has the levels.
            shape: of a sample, ``*D``.
            cond: of a batch of ``shape[0]``, whose rows are taken again and again.
            count: samples.
            seed: of the first.
        """
        batch, size = shape[0], tuple(shape[1:])
        cond = part_of(repeated(cond, -(-count // batch)), slice(0, count))
        seeds = range(seed, seed + count)
        x0 = run(denoiser, drawing, start_noise(tableau.nodes, seeds, size), cond, seeds=list(seeds))
        _, colours = torch.linalg.eigh(torch.cov(x0.transpose(0, 1).flatten(1)).reshape(size[0], size[0]))
        nodes, errors, kept = tableau.nodes, list[Tensor](), list[float]()
        for i in range(nodes.evaluations - 1, -1, -1):
            level = float(nodes.sigma[i] / nodes.alpha[i])
            if math.isfinite(level) and level > 0:
                noise = seeded_noise(seeds, size, stream=STREAM + i).to(x0)
                answer = denoiser(aligned(nodes.alpha[i], x0) * x0 + aligned(nodes.sigma[i], x0) * noise, nodes.t[i], cond).to(x0)
                errors.append(_power(x0 - answer, colours.T).mean(0))
                kept.append(math.log(level))
        used = drawing.nodes.evaluations + len(kept)
        return cls(colours.T.contiguous(), torch.tensor(kept), torch.stack(errors), _power(x0, colours.T).mean(0), size[-1], used)

    def at(self, level: float) -> Tensor:
        """Return the spectrum ``[C, H, W/2 + 1]`` at a level; beyond the measured ones that of the last."""
        x = min(max(math.log(max(level, 1e-30)), float(self.log_levels[0])), float(self.log_levels[-1]))
        i = int(torch.searchsorted(self.log_levels, x, right=True).clamp(1, max(len(self.log_levels) - 1, 1))) - 1
        if len(self.log_levels) == 1:
            return self.errors[0]
        low, high = float(self.log_levels[i]), float(self.log_levels[i + 1])
        part = (x - low) / (high - low)
        tiny = torch.finfo(self.errors.dtype).tiny
        return torch.exp((1 - part) * self.errors[i].clamp_min(tiny).log() + part * self.errors[i + 1].clamp_min(tiny).log())

    @property
    def spread(self) -> float:
        """The root mean square of images."""
        weights = _weights(self.images, self.width)
        weights[0, 0] = 1
        return float((self.images * weights).sum() / weights.sum() / len(self.images)) ** 0.5

    def transform(self, x: Tensor) -> Tensor:
        """Return the orthonormal Fourier transform of images ``[..., C, H, W]`` in the uncorrelated colours."""
        return torch.fft.rfft2(torch.einsum("dc,...chw->...dhw", self.colours.to(x), x), norm="ortho")

    def back(self, spectrum: Tensor, like: Tensor) -> Tensor:
        """Return the images ``[..., C, H, W]`` of a transform."""
        return torch.einsum("dc,...dhw->...chw", self.colours.to(like), torch.fft.irfft2(spectrum, s=like.shape[-2:], norm="ortho"))


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
        return _weights(self.y, self.width)

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


def _weights(spectrum: Tensor, width: int) -> Tensor:
    """Return how often each frequency of a real transform counts, ``[H, W/2 + 1]``; the mean, which no kernel changes, not at all."""
    weights = torch.full(spectrum.shape[-2:], 2.0, device=spectrum.device)
    weights[:, 0] = 1
    if width % 2 == 0:
        weights[:, -1] = 1
    weights[0, 0] = 0
    return weights


def _power(x: Tensor, colours: Tensor) -> Tensor:
    return torch.fft.rfft2(torch.einsum("dc,bchw->bdhw", colours, x), norm="ortho").abs().square()
