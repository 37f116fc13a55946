r"""Error spectra: how a denoiser's errors are coloured, measured on the model's own samples.

At each noise level the clean image has about the mean :math:`D` and a covariance that is about the same at each place,
:math:`C = F^* \operatorname{diag}(c_f) F`, with the power spectrum :math:`c_f = E|F(x_0 - D)|^2` of the errors. It needs no data, and is
measured once for a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.condition import part_of, repeated
from fewstep.core.denoiser import Cond, Denoiser, FlowMap, check_denoiser
from fewstep.core.domain import check_unbounded
from fewstep.core.prediction import aligned
from fewstep.core.tableau import Tableau
from fewstep.inverse.method import UNBOUNDED
from fewstep.inverse.steps import restored_grid
from fewstep.runtime.errors import ModelError
from fewstep.runtime.front_door import checked, is_count, whole
from fewstep.sampling.loop import run
from fewstep.sampling.noise import seeded_noise, start_noise
from fewstep.sampling.sampler import Sampler

__all__ = ["NFE", "NUM", "ErrorSpectra", "error_spectra", "frequency_weights"]

STREAM = 700  # of the rehearsal's noises
NUM, NFE = 128, 10  # samples, and levels as well as evaluations of a sample
DRAWING = "unipc-2"  # an ordinary solver, since the spectrum of its samples is what is measured


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
        """Return the spectrum ``[C, H, W/2 + 1]`` at a level; above the measured ones that of the last, below them it falls as ``s^2``."""
        log_level = math.log(max(level, 1e-30))
        x = min(max(log_level, float(self.log_levels[0])), float(self.log_levels[-1]))
        if log_level < x:  # where errors are those of the noise that is left
            return self.errors[0] * math.exp(2 * (log_level - x))
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
        weights = frequency_weights(self.images, self.width)
        weights[0, 0] = 1
        return float((self.images * weights).sum() / weights.sum() / len(self.images)) ** 0.5

    def transform(self, x: Tensor) -> Tensor:
        """Return the orthonormal Fourier transform of images ``[..., C, H, W]`` in the uncorrelated colours."""
        return torch.fft.rfft2(torch.einsum("dc,...chw->...dhw", self.colours.to(x), x), norm="ortho")

    def back(self, spectrum: Tensor, like: Tensor) -> Tensor:
        """Return the images ``[..., C, H, W]`` of a transform."""
        return torch.einsum("dc,...dhw->...chw", self.colours.to(like), torch.fft.irfft2(spectrum, s=like.shape[-2:], norm="ortho"))


@checked
@torch.no_grad()
def error_spectra(
    denoiser: Denoiser,
    shape: Sequence[int],
    cond: Cond = None,
    *,
    num: int = NUM,
    nfe: int = NFE,
    grid: str | None = None,
    rows: int = 1,
    seed: int = 0,
) -> ErrorSpectra:
    """Measure the spectra of a model's errors on its own samples, in about ``2 num nfe`` network evaluations.

    Args:
        denoiser: the model.
        shape: of one picture, ``(C, H, W)``.
        cond: the condition of the samples, of ``rows`` rows that are taken again and again.
        num: samples.
        nfe: evaluations of each, and noise levels.
        grid: the spacing of both; by default ``karras``, or ``angle`` for a noise law that begins at pure noise.
        rows: of the condition.
        seed: of the first sample.

    Raises:
        ModelError: no denoiser, a student, or no pictures ``(C, H, W)``.
    """
    check_denoiser(denoiser, "error_spectra")
    if isinstance(denoiser, FlowMap):
        raise ModelError("a student has no answers on the way whose errors could be measured: take its teacher")
    check_unbounded(denoiser, "error_spectra", UNBOUNDED)
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(map(is_count, shape)):
        raise ModelError(f"error spectra are those of pictures (C, H, W), got shape {shape!r}")
    if not is_count(num) or not is_count(nfe) or not is_count(rows) or num < 2 or nfe < 2:
        raise ModelError(f"error spectra take 2 samples or more, 2 levels or more and 1 row or more, got {num!r}, {nfe!r} and {rows!r}")
    seed = whole(seed, "seed", ModelError)
    spacing = restored_grid(denoiser.schedule) if grid is None else grid
    drawing, levels = (Sampler.build(solver, spacing, denoiser.schedule, nfe=nfe).tableau for solver in (DRAWING, "ddim"))
    return ErrorSpectra.measure(denoiser, drawing, levels, (rows, *shape), cond, num, seed)


def frequency_weights(spectrum: Tensor, width: int) -> Tensor:
    """Return how often each frequency of a real transform counts, ``[H, W/2 + 1]``; the mean, which no kernel changes, not at all."""
    weights = torch.full(spectrum.shape[-2:], 2.0, device=spectrum.device)
    weights[:, 0] = 1
    if width % 2 == 0:
        weights[:, -1] = 1
    weights[0, 0] = 0
    return weights


def _power(x: Tensor, colours: Tensor) -> Tensor:
    return torch.fft.rfft2(torch.einsum("dc,bchw->bdhw", colours, x), norm="ortho").abs().square()
