r"""One Brownian path for each seed, whatever the steps: noise as a function of an interval of noise levels.

At ``eta = 1`` the reverse-time SDE of any noise law is driven by a Brownian motion ``B(q)`` whose time is the signal-to-noise ratio
``q = alpha^2/sigma^2`` (stochastic localisation; Montanari, arXiv 2305.10690): between two levels it adds

    sigma_t/q_t^{1/2} (B(q_t) - B(q_s)) = sigma_t sqrt(1 - e^{-2h}) xi,    xi = (B(q_t) - B(q_s)) / sqrt(q_t - q_s)

so ``xi`` is standard normal, and those of intervals side by side are independent. With ``u = alpha^2/(alpha^2 + sigma^2)``, the process
``X(u) = (1 - u) B(u/(1 - u))`` is a Brownian bridge from pure noise, ``u = 0``, to the clean image, ``u = 1``, where it is 0. It is
drawn by dyadic refinement (Levy's construction) in the angle ``theta = arctan(sigma/alpha)``, where ``u = cos^2 theta``: each midpoint by
a stream of its own, so that a point of the path does not depend on which others were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.tableau import Tableau
from fewstep.runtime.errors import SolverError, look_up
from fewstep.sampling.noise import seeded_noise

__all__ = ["BrownianPath", "NoisePath", "noise_of"]

NoisePath = Literal["steps", "brownian"]

DEPTH = 24  # refinements: angles are rounded to pi/2 / 2^24, which is 1e-7
STREAMS = 2**40  # where the streams of the midpoints begin, beyond those of any other noise of a seed


class BrownianPath:
    """The Brownian paths of some seeds, as the noise of any sampler on any grid.

    The midpoints on the way to the last point are kept, `DEPTH` states in float64.

    Args:
        seeds: one whole number per sample.
        shape: of one sample, ``*D``.

    Examples:
        >>> import math
        >>> from fewstep.sampling.brownian import BrownianPath
        >>> path = BrownianPath([5], (1000,))
        >>> whole, one, two = path.between(1.2, 0.4), path.between(1.2, 0.8), path.between(0.8, 0.4)
        >>> span = lambda s, t: math.tan(t) ** -2 - math.tan(s) ** -2
        >>> parts = math.sqrt(span(1.2, 0.8)) * one + math.sqrt(span(0.8, 0.4)) * two
        >>> bool(((math.sqrt(span(1.2, 0.4)) * whole - parts).abs() < 1e-6).all())
        True
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self.seeds, self.shape = list(seeds), tuple(shape)
        zero = torch.zeros(len(self.seeds), *self.shape, dtype=torch.float64)
        self._known = {0: zero, 2**DEPTH: zero}  # the ends, and the midpoints on the way to the last point

    def between(self, s: float, t: float) -> Tensor:
        """Return the standard normal noise ``[B, *D]``, float64, of the interval from angle ``s`` down to ``t``.

        Raises:
            SolverError: ``t`` is not below ``s``, or by less than the path resolves.
        """
        first, last = (_lattice(angle) for angle in (s, t))
        if not first > last > 0:
            raise SolverError(
                f"a Brownian path goes from noise to the image, in steps of at least {_angle(1):.1g} in arctan(sigma/alpha), not from "
                f"{s:.9g} to {t:.9g}: a sampler that raises the noise again (churn) has path='steps' alone"
            )
        s, t = _angle(first), _angle(last)
        at_s, at_t = self._at(first), self._at(last)
        return (at_t * math.sin(s) ** 2 - at_s * math.sin(t) ** 2) / (math.sin(s) * math.sin(t) * math.sqrt(_drop(t, s)))

    def of(self, tableau: Tableau, i: int) -> Tensor:
        """Return the noise ``[B, *D]`` of row ``i`` of a tableau, float64: that of its `Tableau.noise_intervals`; 0 where it adds none."""
        if not bool(tableau.noise[i]):
            return torch.zeros(len(self.seeds), *self.shape, dtype=torch.float64)
        nodes = tableau.nodes
        s, t = (math.atan2(float(nodes.sigma[k]), float(nodes.alpha[k])) for k in tableau.noise_intervals[i])
        return self.between(s, t)

    def _at(self, point: int) -> Tensor:
        """Return the bridge ``X [B, *D]`` at a point of the lattice."""
        low, high, way = 0, 2**DEPTH, {}
        while point not in (low, high):
            middle = (low + high) // 2
            if middle not in self._known:
                self._known[middle] = self._middle(low, middle, high)
            way[middle] = self._known[middle]
            low, high = (middle, high) if point > middle else (low, middle)
            if point == middle:
                break
        self._known = {0: self._known[0], 2**DEPTH: self._known[2**DEPTH]} | way
        return self._known[point]

    def _middle(self, low: int, middle: int, high: int) -> Tensor:
        a, m, b = (_angle(point) for point in (low, middle, high))
        left, right, whole = _drop(a, m), _drop(m, b), _drop(a, b)  # of u
        mean = (self._known[low] * right + self._known[high] * left) / whole
        level = 2**DEPTH // (high - low)  # the heap's number of this midpoint: 1; 2, 3; 4 ... 7; ...
        drawn = seeded_noise(self.seeds, self.shape, stream=STREAMS + level + low // (high - low))
        return mean + math.sqrt(left * right / whole) * drawn


def noise_of(tableau: Tableau, seeds: Sequence[int], shape: Sequence[int], path: NoisePath = "steps") -> Callable[[int], Tensor]:
    """Return the noise that the seeds give each row of a tableau, ``i -> standard normal [B, *D]``.

    Args:
        tableau: the sampler's.
        seeds: one whole number per sample.
        shape: of one sample, ``*D``.
        path: ``steps`` draws stream ``i + 1`` of each seed for row ``i``, whatever the grid; ``brownian`` the increments of one
            `BrownianPath` for each seed, so that a finer grid refines the same sample.

    Raises:
        SolverError: another path.
    """

    def by_step(i: int) -> Tensor:
        return seeded_noise(seeds, shape, stream=i + 1)

    if look_up(path, {"steps": False, "brownian": tableau.stochastic}, "path", SolverError):
        drawn = BrownianPath(seeds, shape)
        return lambda i: drawn.of(tableau, i)
    return by_step


def _lattice(angle: float) -> int:
    return round(angle / (math.pi / 2) * 2**DEPTH)


def _angle(point: int) -> float:
    return math.pi / 2 * point / 2**DEPTH


def _drop(low: float, high: float) -> float:
    """Return ``u(low) - u(high)``, without cancellation: ``cos^2 a - cos^2 b = sin(b - a) sin(b + a)``."""
    return math.sin(high - low) * math.sin(high + low)
