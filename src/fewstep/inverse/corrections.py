r"""Methods that correct the denoiser's answer by a measurement :math:`y = A x_0 + s_y n`.

Given a state, the clean image has the mean :math:`D` and the covariance :math:`C = (\sigma^2/\alpha) J` (Tweedie's formulas). Taken as
Gaussian, its mean given the measurement too is

.. math:: D' = D + C A^T (A C A^T + s_y^2 I)^{-1} (y - A D). \tag{1}

The methods differ in what stands for C. Each makes a denoiser of a denoiser, so any sampler runs it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.schedule import NoiseSchedule
from fewstep.inverse.conjugate_gradients import dot
from fewstep.inverse.jacobian import SIZE, Estimate, checked_size, estimate
from fewstep.inverse.measurements import Measurement
from fewstep.inverse.method import Asked, Data, Method, positive
from fewstep.runtime.errors import ModelError
from fewstep.runtime.front_door import check_fields, checked_class, is_count
from fewstep.sampling.loop import run

__all__ = ["Correction", "Measured", "Moments", "PiGDM", "Projection", "Proximal"]

SPREAD = 0.5  # the standard deviation of pictures in [-1, 1]
EXHAUSTED = 1e-10  # of a residual or a curvature: there is nothing left to solve


class Correction(Method):
    """A method that corrects the denoiser's answer, formula (1) with its own idea of C."""

    backward: bool = False  # whether products are made by back-propagation

    @abstractmethod
    def correct(self, made: Estimate, a: Measurement, r: Tensor, noise: float) -> Tensor:
        """Return the corrected answer ``D' [B, *D]``.

        Args:
            made: the answer, with products of its covariance.
            a: the linear operator (near the answer).
            r: the residual ``y - A D``, ``[B, *Y]``.
            noise: the standard deviation of the measurement.
        """

    def sample(self, denoiser: Denoiser, asked: Asked) -> Tensor:
        made = Measured(denoiser, asked.data, self)
        return run(made, asked.tableau, asked.x, asked.cond, seeds=asked.seeds, observe=asked.observe)


def _isotropic(level: Tensor, spread: float) -> Tensor:
    """Return the posterior variance of white Gaussian data of one standard deviation, ``r^2 = s^2 sd^2/(s^2 + sd^2)``."""
    return spread**2 / (1 + (spread / level) ** 2)


@checked_class
@dataclass(frozen=True)
class Projection(Correction):
    """Correct the answer as if its error were white: DDNM with noise (arXiv 2212.00490); without noise, a projection.

    Args:
        spread: the standard deviation of the data.
    """

    spread: float = SPREAD
    references = ("2212.00490",)

    def __post_init__(self) -> None:
        check_fields(self)
        positive(self.spread, "the spread of the data")

    @property
    def cost(self) -> tuple[int, int]:
        return 1, 0

    def correct(self, made: Estimate, a: Measurement, r: Tensor, noise: float) -> Tensor:
        r2 = _isotropic(made.level, self.spread)
        return made.x0 + r2 * a.lift(r, r2.flatten(), noise)


@checked_class
@dataclass(frozen=True)
class Proximal(Correction):
    """Take DiffPIR's proximal step (arXiv 2305.08891): white errors of variance ``s^2/weight``, however large. For comparison.

    Args:
        weight: the paper's lambda.
    """

    weight: float = 1.0
    references = ("2305.08891",)

    def __post_init__(self) -> None:
        check_fields(self)
        positive(self.weight, "the weight of the proximal step")

    @property
    def cost(self) -> tuple[int, int]:
        return 1, 0

    def correct(self, made: Estimate, a: Measurement, r: Tensor, noise: float) -> Tensor:
        r2 = made.level**2 / self.weight
        return made.x0 + r2 * a.lift(r, r2.flatten(), noise)


@checked_class
@dataclass(frozen=True)
class PiGDM(Correction):
    """Correct along the exact covariance, with a white one inside (Song et al., ICLR 2023).

    Args:
        backward: by back-propagation, as published; else by one more evaluation.
        size: of the difference's step in units of sigma.
    """

    backward: bool = True
    size: float = SIZE

    def __post_init__(self) -> None:
        check_fields(self)
        checked_size(self.size)

    @property
    def cost(self) -> tuple[int, int]:
        return (1, 1) if self.backward else (2, 0)

    def correct(self, made: Estimate, a: Measurement, r: Tensor, noise: float) -> Tensor:
        # C <= s^2 I whatever the data; a smaller guess would overshoot along smooth directions, whose variance is larger
        return made.x0 + made.covariance(a.lift(r, (made.level**2).flatten(), noise), self.size)


@checked_class
@dataclass(frozen=True)
class Moments(Correction):
    """Solve formula (1) with the exact covariance, by conjugate gradients of a few steps; the rest as `Projection`.

    Args:
        steps: of conjugate gradients; each is one more evaluation.
        spread: the standard deviation of the data, for what the steps leave.
        backward: make products by back-propagation instead.
        size: of the difference's step in units of sigma.
    """

    steps: int = 1
    spread: float = SPREAD
    backward: bool = False
    size: float = SIZE
    references = ("2405.13712",)

    def __post_init__(self) -> None:
        check_fields(self)
        if not is_count(self.steps):
            raise ModelError(f"steps of conjugate gradients are a whole number from 1, got {self.steps!r}: none is the method projection")
        positive(self.spread, "the spread of the data")
        checked_size(self.size)

    @property
    def cost(self) -> tuple[int, int]:
        return (1, self.steps) if self.backward else (1 + self.steps, 0)

    def correct(self, made: Estimate, a: Measurement, r: Tensor, noise: float) -> Tensor:
        x0, p, rho = made.x0, r, dot(r, r)
        least, curved = EXHAUSTED * rho, EXHAUSTED * made.level**2
        for _ in range(self.steps):
            q = made.covariance(a.transpose(p), self.size)  # C A^T p
            m = a(q) + noise**2 * p
            bend = dot(p, m)  # a network's Jacobian may have negative eigenvalues
            going = (rho > least) & (bend > _like(curved, p) * dot(p, p))
            step = torch.where(going, rho / torch.where(going, bend, 1.0), 0.0)
            x0, r = x0 + _like(step, q) * q, r - step * m
            after = dot(r, r)
            p, rho = r + torch.where(rho > 0, after / rho.clamp_min(torch.finfo(rho.dtype).tiny), 0.0) * p, after
        r2 = _isotropic(made.level, self.spread)
        return x0 + r2 * a.lift(r, r2.flatten(), noise)  # r, not y - A D', which holds the measurement's noise too


def _like(value: Tensor, like: Tensor) -> Tensor:
    """Return one number per sample, or one for all, to be multiplied with ``like [B, ...]``."""
    return value.reshape(-1, *(1,) * (like.ndim - 1))


class Measured:
    """A denoiser with a correction: ``D'`` of formula (1)."""

    def __init__(self, denoiser: Denoiser, data: Data, correction: Correction) -> None:
        self.denoiser, self.data, self.correction = denoiser, data, correction

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        made = estimate(self.denoiser, x, t, cond, backward=self.correction.backward)
        if not bool((made.alpha > 0).all()):  # pure noise says nothing of the image, and J is 0/0
            return made.x0
        r = self.data.residual(made.x0)
        a = self.data.measurement.at(made.x0, self.data.y.to(r), self.data.noise)
        x0 = self.correction.correct(made, a, r, self.data.noise)
        if not bool(torch.isfinite(x0).all()):
            what = "the model's answer" if not bool(torch.isfinite(made.x0).all()) else "the measurement's correction of it"
            raise ModelError(
                f"{what} is not finite at t = {float(t.flatten()[0]):g}, noise level {float(made.level.flatten()[0]):g}, where the "
                f"residual has rms {float(r.square().mean().sqrt()):g}: check the operator and y"
            )
        return x0
