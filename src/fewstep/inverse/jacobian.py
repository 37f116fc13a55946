r"""Products of a denoiser's Jacobian :math:`J = \partial D/\partial x` with images: by one more evaluation, or by back-propagation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.prediction import aligned
from fewstep.runtime.errors import ModelError, first_line
from fewstep.runtime.front_door import checked, number

__all__ = ["ROUGH", "SIZE", "Estimate", "checked_size", "estimate", "jacobian_product"]

SIZE = 0.01  # of a step in units of sigma, the scale on which a denoiser bends
SMALLEST = 1e-4
ROUGH = 0.1  # the same where a network computes in 16 bits, whose difference would drown


@checked
def jacobian_product(denoiser: Denoiser, x: Tensor, t: Tensor, v: Tensor, x0: Tensor, cond: Cond = None, *, size: float = SIZE) -> Tensor:
    r"""Return :math:`J v \approx (D(x + h v) - D(x))/h`, ``[B, *D]``, with :math:`h = \text{size} \cdot \sigma/\mathrm{rms}(v)` per sample.

    The Jacobian of an exact denoiser is symmetric, so this is :math:`J^T v` too, without back-propagation. Networks are not quite
    symmetric.

    Args:
        denoiser: the model.
        x: states ``[B, *D]``.
        t: their time, ``[]`` or ``[B]``.
        v: the images that the Jacobian is applied to, ``[B, *D]``.
        x0: the denoiser's answer at ``x``, ``[B, *D]``.
        cond: the condition of the answer.
        size: of the step, in units of ``sigma``; 0.1 for a network of 16 bits.

    Raises:
        ModelError: a size out of range.
    """
    size = checked_size(size)
    rms = v.flatten(1).square().mean(1).sqrt().reshape(-1, *(1,) * (v.ndim - 1))
    h = size * aligned(denoiser.schedule.sigma(t), x) / rms.clamp_min(torch.finfo(v.dtype).tiny)
    h = torch.where(rms > 0, h, 1.0)
    return (denoiser(x + h * v, t, cond).to(x0.dtype) - x0) / h


def checked_size(size: float) -> float:
    """Return the size of a difference's step.

    Raises:
        ModelError: it is no number from 1e-4, below which rounding is all that is seen, to 1.
    """
    value = number(size, "the size of a step", ModelError)
    if not SMALLEST <= value <= 1:
        raise ModelError(f"the size of a difference's step is a part of sigma, from {SMALLEST:g} to 1, as {SIZE}, got {value:g}")
    return value


class Estimate(NamedTuple):
    """A denoiser's answer at a state, with the products of its Jacobian there.

    Attributes:
        denoiser, x, t, cond: what was asked.
        x0: the answer, ``[B, *D]``.
        alpha, sigma: of the state, in its dtype, to be multiplied with it.
        graph: the answer and the state with their graph, for back-propagation; None without.
    """

    denoiser: Denoiser
    x: Tensor
    t: Tensor
    cond: Cond
    x0: Tensor
    alpha: Tensor
    sigma: Tensor
    graph: tuple[Tensor, Tensor] | None

    @property
    def level(self) -> Tensor:
        """The noise level ``s = sigma/alpha``, infinite at pure noise."""
        return self.sigma / self.alpha

    def covariance(self, v: Tensor, size: float = SIZE) -> Tensor:
        r"""Apply the covariance of the clean image given the state, :math:`C v = \sigma^2/\alpha\, J v` (Tweedie's second moment)."""
        if self.graph is None:
            product = jacobian_product(self.denoiser, self.x, self.t, v, self.x0, self.cond, size=size)
        else:
            product = torch.autograd.grad(*self.graph, v, retain_graph=True)[0]
        return self.sigma**2 / self.alpha * product


def estimate(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond = None, *, backward: bool = False) -> Estimate:
    """Ask a denoiser at the states ``x [B, *D]``.

    Args:
        denoiser: the model.
        x: the states.
        t: their time, ``[]`` or ``[B]``.
        cond: the condition.
        backward: keep the graph of the answer, so that products are made by back-propagation.

    Raises:
        ModelError: a denoiser that cannot be differentiated by its state.
    """
    alpha, sigma = (aligned(of(t), x) for of in (denoiser.schedule.alpha, denoiser.schedule.sigma))
    if not backward:
        return Estimate(denoiser, x, t, cond, denoiser(x, t, cond).to(x.dtype), alpha, sigma, None)
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        try:
            x0 = denoiser(leaf, t, cond).to(x.dtype)
        except RuntimeError as error:
            raise ModelError(f"the model cannot be differentiated by its state: {first_line(error)}") from error
    if not x0.requires_grad:
        raise ModelError("the model's answer has no gradient by its state: was it computed under torch.no_grad or inference_mode?")
    return Estimate(denoiser, x, t, cond, x0.detach(), alpha, sigma, (x0, leaf))
