r"""The cube that reflected diffusion lives in: noise is folded back at its walls, in training and in sampling.

A reflected path is the fold of a free one (Lou and Ermon, arXiv 2304.04740). So on the whole line the process is ordinary diffusion of the
*mirrored* data: each value together with its images in all walls. The denoiser of that process is the mean over these images; `mirror_mean`
is its kernel, for a single value.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.prediction import aligned
from fewstep.runtime.errors import FewstepError, ModelError
from fewstep.runtime.front_door import checked_class, number

__all__ = ["Cube", "check_unbounded", "domain_of", "mirror_mean"]

ROUNDING = 1e-6  # by which pixels may lie outside: that of a float32
IMAGES, COSINES = 3, 6  # terms of the two forms of the kernel; what they leave out is below exp(-44)
NEAR = 0.5  # of the edge: the noise level below which the sum over mirror images is taken, above it that over cosines


@checked_class
@dataclass(frozen=True)
class Cube:
    """The cube ``[low, high]^D``, in which all numbers of a sample lie.

    Attributes:
        low: of every number.
        high: of every number.

    Raises:
        ModelError: the two are not finite numbers with ``low < high``.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, number(getattr(self, name), f"{name} of a cube", ModelError))
        if not (self.low < self.high and math.isfinite(self.low) and math.isfinite(self.high)):
            raise ModelError(f"a cube has finite walls with low < high, as Cube(-1, 1), got {self.low:g} and {self.high:g}")

    @property
    def edge(self) -> float:
        """The distance of two opposite walls."""
        return self.high - self.low

    def fold(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fold states into the cube, as often as they have passed a wall.

        Args:
            x: states ``[*]``.

        Returns:
            The folded states ``[*]``, to the bit the same where they lie inside, and the derivative of the fold, +1 or -1, ``[*]``.
        """
        y = torch.remainder(x - self.low, 2 * self.edge)  # of the sign of the divisor
        mirrored, inside = y > self.edge, (x >= self.low) & (x <= self.high)
        folded = torch.where(mirrored, self.high + self.edge - y, self.low + y).clamp(self.low, self.high)
        one = torch.ones_like(x)
        return torch.where(inside, x, folded), torch.where(mirrored & ~inside, -one, one)

    def outside(self, x: Tensor) -> float:
        """Return the share of the numbers of ``x [*]`` that lie beyond a wall, by more than rounding."""
        beyond = (x < self.low - ROUNDING * self.edge) | (x > self.high + ROUNDING * self.edge)
        return float(beyond.double().mean())

    def check(self, x: Tensor, what: str) -> None:
        """Refuse images ``[*]`` that do not lie in the cube.

        Args:
            x: the images.
            what: the subject of the error, in the plural.

        Raises:
            FewstepError: they do not (where they lie).
        """
        least, most = (float(end) for end in x.aminmax())
        if not (self.low - ROUNDING <= least and most <= self.high + ROUNDING):
            raise FewstepError(f"{what} lie in [{least:.4g}, {most:.4g}], the cube is [{self.low:g}, {self.high:g}]: scale them")

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-able description, the arguments of the constructor."""
        return asdict(self)


def domain_of(denoiser: object) -> Cube | None:
    """Return the cube that the samples of a denoiser are folded into; None for an ordinary one."""
    found = getattr(denoiser, "domain", None)
    return found if isinstance(found, Cube) else None


def check_unbounded(denoiser: object, taker: str, why: str) -> None:
    """Refuse a reflected model, for what cannot be right with one.

    Args:
        denoiser: what was passed.
        taker: what it was passed to, the subject of the error.
        why: why that cannot be right, and what to do instead.

    Raises:
        ModelError: it is one.
    """
    if domain_of(denoiser) is not None:
        raise ModelError(f"{taker} is not for a reflected model, whose states are mirrored at the walls of a cube: {why}")


def mirror_mean(x: Tensor, x0: Tensor, sigma: Tensor, cube: Cube) -> Tensor:
    r"""Return the mean of the mirror images of ``x0`` that ``x`` came from, ``x + sigma^2 d/dx log p(x | x0)``, elementwise.

    It is the target of reflected score matching (arXiv 2304.04740, section 4.2) as a denoised image: given ``x``, its mean over the data is
    the reflected denoiser. With an edge of 2 and the origin at a wall (``y = x - low``), images are ``x0 + 4k`` and ``-x0 + 4k``, and

        near:  w = softmax(-(x - c)^2 / 2 sigma^2) over images c,                     D = sum w c
        far:   p = 1 + 2 sum_n exp(-(n pi/2)^2 sigma^2/2) cos(n pi/2 y) cos(n pi/2 y0),   D = x + sigma^2 p'/p

    are the same function. The first is taken below a noise level of half an edge, the second above; both are differentiable.

    Args:
        x: states in the cube, ``[B, *D]``.
        x0: clean images, ``[B, *D]``.
        sigma: noise levels above 0, ``[]`` or ``[B]``.
        cube: the walls.

    Returns:
        The means ``[B, *D]``: near ``x0`` at small ``sigma``, near ``x`` at large ones.
    """
    if sigma.ndim == 0:
        form = _near if float(sigma) < NEAR * cube.edge else _far
        return form(x, x0, aligned(sigma, x), cube)
    near, level = sigma.detach() < NEAR * cube.edge, aligned(sigma, x)
    if bool(near.all()) or not bool(near.any()):
        return (_near if bool(near.all()) else _far)(x, x0, level, cube)
    near = near.to(x.device)
    made = torch.empty_like(x)
    made[near] = _near(x[near], x0[near], level[near], cube)
    made[~near] = _far(x[~near], x0[~near], level[~near], cube)
    return made


def _near(x: Tensor, x0: Tensor, sigma: Tensor, cube: Cube, images: int = IMAGES) -> Tensor:
    """Return the mean over mirror images, of as many pairs of walls as that on either side."""
    turns = 2 * cube.edge * torch.arange(-images, images + 1, dtype=x.dtype, device=x.device)
    image = torch.cat([x0[..., None] + turns, 2 * cube.low - x0[..., None] + turns], -1)
    weight = torch.softmax(-((x[..., None] - image) / sigma[..., None]).square() / 2, -1)
    return (weight * image).sum(-1)


def _far(x: Tensor, x0: Tensor, sigma: Tensor, cube: Cube, cosines: int = COSINES) -> Tensor:
    """Return the mean by the eigenfunctions of the heat equation with walls, as many cosines."""
    density, slope = torch.ones_like(x), torch.zeros_like(x)
    for n in range(1, cosines + 1):
        omega = n * math.pi / cube.edge
        left = 2 * torch.exp(-((omega * sigma) ** 2) / 2) * torch.cos(omega * (x0 - cube.low))
        density = density + left * torch.cos(omega * (x - cube.low))
        slope = slope - left * omega * torch.sin(omega * (x - cube.low))
    return x + sigma**2 * slope / density
