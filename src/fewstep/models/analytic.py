r"""Denoisers in closed form: for tests, for docs, and for anyone who wants a sampling problem without a network.

For data ``x0 ~ sum_k w_k N(mu_k, v_k)`` with independent elements the posterior mean at ``x = alpha x0 + sigma eps`` is

    E[x0 | x] = sum_k r_k(x) ( mu_k + alpha v_k / (alpha^2 v_k + sigma^2) (x - alpha mu_k) )

with ``r_k`` the posterior weights of the components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond
from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.errors import ModelError

__all__ = ["DatasetDenoiser", "GaussianDenoiser", "MixtureDenoiser"]


@dataclass(frozen=True, eq=False, repr=False)
class MixtureDenoiser:
    """The exact denoiser of a Gaussian mixture with independent elements.

    Args:
        schedule: the noise law.
        means: of the components, ``[k, *D]``.
        stds: standard deviations, ``[k]``, or ``[k, *D]`` per element; 0 is a point mass.
        weights: of the components, ``[k]``, positive; normalised here. Equal by default.

    Raises:
        ModelError: another number of stds or weights than of means.
    """

    schedule: NoiseSchedule
    means: Tensor
    stds: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.means)
        if len(self.stds) != count or (self.weights is not None and self.weights.shape != (count,)):
            raise ModelError(f"{count} means need as many stds and weights, got {tuple(self.stds.shape)} stds")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(means {tuple(self.means.shape)}, {type(self.schedule).__name__})"

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return ``E[x0 | x] [B, *D]`` in the dtype of ``x``.

        Args:
            x: states ``[B, *D]``.
            t: their time, ``[]`` or ``[B]``.
            cond: ignored.
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        column = (-1, 1, 1) if t.ndim else ()
        alpha, sigma = (v.to(x.dtype).to(x.device).reshape(column) for v in (alpha, sigma))
        means = self.means.to(x).flatten(1)  # [k, d]
        variance = self.stds.to(x).reshape(len(means), -1) ** 2  # [k, 1] or [k, d]
        residual = x.flatten(1)[:, None] - alpha * means  # [B, k, d]
        spread = alpha**2 * variance + sigma**2
        log_density = -0.5 * (residual**2 / spread + torch.log(spread)).sum(-1)
        if self.weights is not None:
            log_density = log_density + torch.log(self.weights.to(x))
        posterior = torch.softmax(log_density, dim=1)  # [B, k]
        component = means + alpha * variance / spread * residual
        return torch.einsum("bk,bkd->bd", posterior, component).reshape(x.shape)


class GaussianDenoiser(MixtureDenoiser):
    """The exact denoiser of the normal distribution ``N(mean, std^2)``; its sampling ODE has a closed solution.

    Args:
        schedule: the noise law.
        mean: of each element, ``[*D]``.
        std: standard deviation, ``[]`` or ``[*D]``.
    """

    def __init__(self, schedule: NoiseSchedule, mean: Tensor, std: Tensor) -> None:
        super().__init__(schedule, mean[None], torch.as_tensor(std)[None])

    def flow(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Return the exact solution ``[B, *D]`` of the sampling ODE from ``x [B, *D]`` at time ``s`` to time ``t``.

        The standardised state is constant along it.
        """

        def moments(time: Tensor) -> tuple[Tensor, Tensor]:
            alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
            return alpha * self.means[0], torch.sqrt(alpha**2 * self.stds[0] ** 2 + sigma**2)

        (mean_s, std_s), (mean_t, std_t) = moments(s), moments(t)
        return mean_t + std_t / std_s * (x - mean_s)


class DatasetDenoiser(MixtureDenoiser):
    """The exact denoiser of a data set, every point smoothed to a Gaussian.

    Args:
        schedule: the noise law.
        data: ``[n, *D]``.
        std: standard deviation of the Gaussians, at least 0.

    Raises:
        ModelError: a std that is negative or not finite.
    """

    def __init__(self, schedule: NoiseSchedule, data: Tensor, std: float) -> None:
        if not (std >= 0 and math.isfinite(std)):
            raise ModelError(f"std must be a finite number of at least 0, got {std}")
        super().__init__(schedule, data, torch.full((len(data),), float(std), dtype=data.dtype))
