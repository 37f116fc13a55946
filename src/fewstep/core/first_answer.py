r"""The answer to pure noise, foreseen: what a denoiser says at the start of a trajectory, without a call of the network.

There hardly anything of a picture is in the state. So the answer is about the mean picture of its condition, and what little the state adds
is nearly linear. Of Gaussian data with mean ``m_c`` and covariance ``S`` it is exactly

    D(x_T) = m_c + alpha S (alpha^2 S + sigma^2)^-1 (x_T - alpha m_c),

and the covariance of pictures is nearly diagonal in a cosine basis, but for a small matrix over the channels at each frequency. Hence

    D(x_T) ~ m_c + B' W B (x_T / sigma),      B the orthonormal cosine transform over the image axes, W_f [C, C] at frequency f.

A sampler of ``N + 1`` rows whose first answer is foreseen costs ``N`` evaluations. (A mean alone is the "analytical first step" of
AMED-Solver, arXiv 2312.00094.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond
from fewstep.runtime.errors import ModelError

__all__ = ["FirstAnswer", "from_waves", "waves"]


def waves(x: Tensor) -> Tensor:
    """Return the cosine transform of ``x [B, C, *S]`` over its image axes, flat: ``[B, C, F]``."""
    for axis in range(2, x.ndim):
        x = torch.movedim(torch.movedim(x, axis, -1) @ _cosines(x.shape[axis], x).T, -1, axis)
    return x.flatten(2) if x.ndim > 2 else x[:, :, None]


def from_waves(z: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return what has the cosine transform ``z [B, C, F]``: samples ``[B, *shape]``, the inverse of `waves`."""
    x = z.reshape(len(z), *shape)
    for axis in range(2, x.ndim):
        x = torch.movedim(torch.movedim(x, axis, -1) @ _cosines(x.shape[axis], x), -1, axis)
    return x


def _cosines(size: int, like: Tensor) -> Tensor:
    """Return the orthonormal DCT-II matrix ``[size, size]``, a row for each frequency."""
    k, j = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi * (j + 0.5) * k / size) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows.to(like.dtype).to(like.device)


@dataclass(frozen=True, eq=False, repr=False)
class FirstAnswer:
    """A denoiser's answer to pure noise, by the label of each sample and a linear map of its noise.

    Attributes:
        mean: the mean picture of each class, ``[classes, *D]``; of a model without classes of all, ``[1, *D]``.
        response: the matrix over the channels at each frequency, ``[F, C, C]``.
        labelled: whether the condition is a label, the row of ``mean``.
        labels: those of all samples, ``[B]``, where the condition does not say them, see `at`.
    """

    mean: Tensor
    response: Tensor
    labelled: bool
    labels: Tensor | None = None

    def __repr__(self) -> str:
        return f"FirstAnswer({f'{len(self.mean)} classes' if self.labelled else 'no condition'}, samples of {tuple(self.mean.shape[1:])})"

    def __call__(self, noise: Tensor, cond: Cond = None) -> Tensor:
        """Return the answers ``[B, *D]`` to the states ``x_T = sigma noise``.

        Args:
            noise: ``[B, *D]``.
            cond: labels ``[B]``, or None where there are no classes.

        Raises:
            ModelError: noise of another shape than the samples that it was made of, or a condition that it does not know.
        """
        shape = tuple(self.mean.shape[1:])
        if noise.shape[1:] != shape:
            raise ModelError(f"the first answer of this sampler is foreseen for samples of {shape}, not {tuple(noise.shape[1:])}: fit anew")
        mean, response = (part.to(noise.dtype).to(noise.device) for part in (self.mean, self.response))
        moved = torch.einsum("fcd,bdf->bcf", response, waves(noise))
        return mean[self._rows(cond, len(noise)).to(noise.device)] + from_waves(moved, shape)

    def at(self, labels: Tensor | None) -> FirstAnswer:
        """Return the answer to samples of these labels ``[B]``, where the network takes its condition in a form of its own."""
        return replace(self, labels=labels)

    def _rows(self, cond: Cond, count: int) -> Tensor:
        """Return the row of ``mean`` for each sample."""
        cond = cond if self.labels is None else self.labels
        if not self.labelled:
            if cond is not None and not (isinstance(cond, Mapping) and not cond):
                raise ModelError(
                    "the first answer of this sampler is foreseen, for samples without a condition: leave the condition out, or fit a "
                    "sampler without first"
                )
            return torch.zeros(count, dtype=torch.int64)
        whole = isinstance(cond, Tensor) and not cond.is_floating_point() and not cond.is_complex() and cond.shape == (count,)
        if not whole or not bool(((cond >= 0) & (cond < len(self.mean))).all()):
            shown = str(cond.tolist())[:60] if isinstance(cond, Tensor) and cond.numel() < 20 else f"a {type(cond).__name__}"
            raise ModelError(
                f"the first answer of this sampler is foreseen, by labels 0 to {len(self.mean) - 1}, one for each of {count} samples, got "
                f"{shown}: use those, or fit a sampler without first"
            )
        return cond
