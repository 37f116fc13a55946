"""The correction by error spectra: formula (1) with a stationary covariance, in one network evaluation a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewstep.core.condition import part_of
from fewstep.core.denoiser import Cond, Denoiser
from fewstep.inverse.conjugate_gradients import conjugate_gradients
from fewstep.inverse.corrections import Correction
from fewstep.inverse.error_spectra import NFE, NUM, ErrorSpectra, error_spectra
from fewstep.inverse.jacobian import Estimate
from fewstep.inverse.measurements import Measurement
from fewstep.runtime.errors import ModelError
from fewstep.runtime.front_door import checked_class

__all__ = ["Spectral"]

CLOSE = 1e-5  # the residual of the equations to reach, relative to that of the data
FLOOR = 1e-3  # noise, over the root mean square of the errors: below it a spectrum of floats says nothing


@checked_class
@dataclass(frozen=True)
class Spectral(Correction):
    """Solve formula (1) with a covariance that is the same at each place: errors are smooth, as pictures are, rather than white.

    Its spectrum is measured on the model's own samples, `error_spectra`, before the first step if it is not passed. The equations are
    solved by conjugate gradients in which no network takes part, so a step takes one evaluation.

    Args:
        spectra: of the model; by default they are measured, in some 2500 evaluations of a single sample.
    """

    spectra: ErrorSpectra | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.spectra, ErrorSpectra | None):
            raise ModelError(f"spectra are those of error_spectra(model, shape), got a {type(self.spectra).__name__}")

    @property
    def cost(self) -> tuple[int, int]:
        return 1, 0

    @property
    def preparation(self) -> int:
        return 2 * NUM * NFE if self.spectra is None else 0

    def prepared(self, denoiser: Denoiser, shape: Sequence[int], cond: Cond) -> Spectral:
        if self.spectra is not None:
            return self
        first = None if cond is None else part_of(cond, slice(0, 1))
        if isinstance(cond, Tensor) and not bool((cond == cond[:1]).all()):
            raise ModelError(
                "spectral measures the model under one condition, and the samples have several: restore those of each by themselves, or "
                "pass method=Spectral(error_spectra(model, shape, cond))"
            )
        return replace(self, spectra=error_spectra(denoiser, shape, first))

    def correct(self, made: Estimate, a: Measurement, r: Tensor, noise: float) -> Tensor:
        spectra = self.spectra
        if spectra is None:
            raise ModelError("spectral needs the error spectra of its model: pass method=Spectral(error_spectra(model, shape))")
        if spectra.images.shape != torch.fft.rfft2(made.x0[0]).shape or spectra.width != made.x0.shape[-1]:
            raise ModelError(f"the error spectra are of pictures of another shape than {tuple(made.x0.shape[1:])}")
        c = torch.stack([spectra.at(float(level)) for level in made.level.flatten()]).to(made.x0)
        variance = max(noise, FLOOR * float(c.mean()) ** 0.5) ** 2

        def covariance(v: Tensor) -> Tensor:
            return spectra.back(c * spectra.transform(v), v)

        u = conjugate_gradients(lambda u: a(covariance(a.transpose(u))) + variance * u, r, close=CLOSE)
        return made.x0 + covariance(a.transpose(u))
