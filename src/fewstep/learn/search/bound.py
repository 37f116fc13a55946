r"""Phase 1 of few-step schedule optimisation (Huang, arXiv 2412.10786): the noise levels at which a sampler should evaluate.

The first-order step ``z_{i-1} = r_i z_i + (1 - r_i) D(z_i; s_i)``, ``r_i = s_{i-1}/s_i``, unrolls to a convex combination of the start and
of all outputs, and its error obeys ``e_{i-1} = r_i e_i + (1 - r_i) [D(z_i + e_i) - D(z_i)] + d_i`` with the local error
``d_i = (1 - r_i) (D(z_i; s_i) - Dbar_i)``, ``Dbar_i`` the mean of ``D`` over ``1/s`` inside the step. So

    |e_0| <= sum_i A_{i-1} |d_i|,        A_k = prod_{j<=k} (r_j + (1 - r_j) L(s_j)).

`Bound` has all ``|d_i|`` between any two levels of a `Gram` matrix; the best schedule of ``N`` steps is a shortest path of ``N`` edges,
found exactly for all ``N`` at once. `descend_bound` is the paper's own way: Monte Carlo over data and a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.condition import repeated
from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import add_noise
from fewstep.learn.teacher.gram import Gram
from fewstep.runtime.errors import FewstepError, GridError, look_up

__all__ = ["AMPLIFICATIONS", "Bound", "convex_weights", "descend_bound", "monte_carlo_bound"]

SMALLEST_GAIN = 1e-9  # no error vanishes, so that an infinite one stays infinite


def convex_weights(level: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``s_0/s_N`` and ``w [N]``, the weights of the start and of the outputs in a first-order sample; together they sum to 1.

    Args:
        level: ``sigma/alpha [N+1]``, decreasing.
    """
    return level[-1] / level[0], level[-1] * (1 / level[1:] - 1 / level[:-1])


def _plain(r: Tensor, slopes: Tensor) -> Tensor:
    """Take ``L = 1``: the denoiser brings no two states further apart."""
    return torch.ones_like(r)


def _trace(r: Tensor, slopes: Tensor) -> Tensor:
    """Take ``L = trace J / dim``: how the denoiser scales a random error along itself."""
    return r + (1 - r) * slopes[:, :1]


def _norm(r: Tensor, slopes: Tensor) -> Tensor:
    """Take ``|r v + (1 - r) J v|`` of random ``v``: how the whole step scales a random error."""
    trace, square = slopes[:, :1], slopes[:, 1:]
    return (r**2 + 2 * r * (1 - r) * trace + (1 - r) ** 2 * square).sqrt()


AMPLIFICATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"plain": _plain, "trace": _trace, "norm": _norm}


@dataclass(frozen=True, eq=False)
class Bound:
    """The error bound of every schedule on the levels of a Gram matrix.

    Args:
        amplification: a key of `AMPLIFICATIONS`; all but ``plain`` need a matrix made with ``jacobian=True``.
        total: how local errors add up: ``sum`` as in the bound, or ``squares``, as if they were independent.
        local: ``exact``, the local error itself, or ``jensen``, the paper's bound of it by ``E |D(z_i) - D(z(s))|^2`` inside the step.

    Raises:
        FewstepError: an unknown option, or an amplification without slopes.
    """

    gram: Gram
    amplification: str = "plain"
    total: Literal["sum", "squares"] = "sum"
    local: Literal["exact", "jensen"] = "exact"
    gain: Tensor = field(init=False, repr=False)  # [K+1, K+1] of the step j -> k

    def __post_init__(self) -> None:
        form = look_up(self.amplification, AMPLIFICATIONS, "form of the amplification", FewstepError)
        if self.total not in ("sum", "squares") or self.local not in ("exact", "jensen"):
            raise FewstepError(f"a bound has total sum or squares and local exact or jensen, got {self.total!r} and {self.local!r}")
        if self.amplification != "plain" and bool(self.gram.slopes.isnan().any()):
            raise FewstepError(f"amplification {self.amplification!r} needs a Gram matrix made with jacobian=True")
        gain = form(self.gram.ratio(), self.gram.slopes).clamp_min(SMALLEST_GAIN)
        object.__setattr__(self, "gain", gain)

    @cached_property
    def first_order(self) -> Tensor:
        """The local error ``|d_jk|`` of a first-order step from level ``j`` to ``k``, ``[K+1, K+1]``; infinite unless ``j < k``."""
        gram = self.gram
        D = gram.D  # noqa: N806
        square = D.diagonal()[:, None]
        if self.local == "exact":
            square = square - 2 * self._means[1].diagonal(dim1=0, dim2=2).T + self._means[0]
        else:
            gap = square - 2 * D + D.diagonal()  # E|D_j - D_k|^2
            square = torch.einsum("jkm,jm->jk", gram.shares(), (gap[:, :-1] + gap[:, 1:]) / 2)
        return self._error(square, gram.ratio())

    @cached_property
    def second_order(self) -> Tensor:
        """The local error ``|d_ijk|`` of a two-step method (as DPM-Solver++ 2M) from ``j`` to ``k`` after ``i``, ``[K+1, K+1, K+1]``."""
        gram = self.gram
        D, lam = gram.D, -torch.log(gram.level)  # noqa: N806
        i, j, k = lam[:, None, None], lam[None, :, None], lam[None, None, :]
        slope = (k - j) / (2 * (j - i))  # D_j + slope (D_j - D_i) stands for Dbar_jk
        slope = torch.where(torch.isfinite(slope) & (slope > 0), slope, 0.0)  # from alpha = 0 there is no line
        norm, inner = self._means  # [j, k], [j, k, i]
        own, past, cross = D.diagonal()[None, :, None], D.diagonal()[:, None, None], D[:, :, None]
        square = norm[None] - 2 * (1 + slope) * inner.diagonal(dim1=0, dim2=2).T[None] + 2 * slope * inner.permute(2, 0, 1)
        square = square + (1 + slope) ** 2 * own - 2 * slope * (1 + slope) * cross + slope**2 * past
        error = self._error(square, gram.ratio()[None])
        ordered = torch.ones_like(D, dtype=torch.bool).triu(1)
        return torch.where(ordered[:, :, None], error, torch.inf)

    @cached_property
    def _means(self) -> tuple[Tensor, Tensor]:
        """The moments ``E|Dbar_jk|^2 [j, k]`` and ``E<Dbar_jk, D_i> [j, k, i]``."""
        gram, shares = self.gram, self.gram.shares()
        size = gram.cells + 1
        cross, cells = gram.matrix[size:, :size], gram.matrix[size:, size:]
        return torch.einsum("jkm,jkm->jk", shares @ cells, shares), shares @ cross

    def _error(self, square: Tensor, ratio: Tensor) -> Tensor:
        forward = torch.ones(ratio.shape[-2:], dtype=torch.bool).triu(1)
        return torch.where(forward, (1 - ratio) * square.clamp_min(0).sqrt(), torch.inf)

    # -- one schedule -----------------------------------------------------------------------------------------------

    def __call__(self, indices: Sequence[int]) -> float:
        """Return the bound of the first-order schedule that visits these levels, first to last.

        Raises:
            GridError: they do not increase from the first level to the last.
        """
        steps = self.steps(indices)
        error = 0.0
        for (j, k), d in zip(_pairs(indices), steps.tolist(), strict=True):
            error = self._add(error, float(self.gain[j, k]), d)
        return error

    def steps(self, indices: Sequence[int]) -> Tensor:
        """Return the local errors ``|d|`` of a schedule's steps, ``[N]``."""
        K = self.gram.cells  # noqa: N806
        if indices[0] != 0 or indices[-1] != K or any(b <= a for a, b in _pairs(indices)):
            raise GridError(f"a schedule on these levels runs from 0 up to {K} with no level twice, got {list(indices)}")
        return torch.stack([self.first_order[j, k] for j, k in _pairs(indices)])

    def _add(self, error: Any, gain: Any, local: Any) -> Any:  # noqa: ANN401 - numbers or tensors
        return gain * error + local if self.total == "sum" else ((gain * error) ** 2 + local**2) ** 0.5

    # -- the best ones ----------------------------------------------------------------------------------------------

    def best(self, most: int) -> dict[int, list[int]]:
        """Find the schedules with the least bound for a first-order step, as level indices, for every ``N`` up to ``most``.

        The bound after a step grows with the bound before it, so the best path to a level in ``n`` steps extends the best path to another
        in ``n - 1``: the minimum is global.

        Args:
            most: the largest ``N``.

        Raises:
            GridError: there are fewer than ``most`` cells between the levels.
        """
        self._check(most)
        error, came = self.first_order[0], []
        found = {1: [0, self.gram.cells]}
        for n in range(2, most + 1):
            error, before = self._add(error[:, None], self.gain, self.first_order).min(0)
            came.append(before)
            path = [self.gram.cells]
            for step in reversed(came):
                path.append(int(step[path[-1]]))
            found[n] = [0, *reversed(path)]
        return found

    def best_pairs(self, most: int, *, last_first_order: bool = True) -> dict[int, list[int]]:
        """Find the schedules with the least bound for a two-step method, for every ``N`` up to ``most``.

        A step depends on the level before it, so the state of the dynamic program is a pair of levels. Errors are those of `best`.

        Args:
            most: the largest ``N``.
            last_first_order: the last step is of first order, as solvers have it on grids of few steps.
        """
        self._check(most)
        K = self.gram.cells  # noqa: N806
        gain, first, second = self.gain, self.first_order, self.second_order
        error = torch.full_like(first, torch.inf)  # [previous, current]
        error[0] = first[0]
        came: list[Tensor] = []
        found = {1: [0, K]}
        for n in range(2, most + 1):
            ends = first[:, K] if last_first_order else second[:, :, K]
            final = self._add(error, gain[:, K], ends)
            i, j = divmod(int(final.argmin()), K + 1)
            path = [K, j, i]
            for step in reversed(came):
                path.append(int(step[path[-1], path[-2]]))
            found[n] = path[::-1]
            error, before = self._add(error[:, :, None], gain[None], second).min(0)
            came.append(before)
        return found

    def _check(self, most: int) -> None:
        if not 1 <= most <= self.gram.cells:
            raise GridError(
                f"a schedule of {most} steps needs at least as many cells between levels, there are {self.gram.cells}: "
                f"use more levels, or fewer steps"
            )


def _pairs(indices: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(indices[:-1], indices[1:], strict=True))


# -- the paper's own way --------------------------------------------------------------------------------------------

Draw = Callable[[int], tuple[Tensor, Tensor, Cond]]  # step -> clean images [B, *D], noise [B, *D], conditions


def monte_carlo_bound(denoiser: Denoiser, level: Tensor, x0: Tensor, noise: Tensor, cond: Cond, u: Tensor) -> Tensor:
    """Estimate the bound with ``A = 1`` and Jensen's inequality at diffused images that share their noise; differentiable in ``level``.

    Args:
        denoiser: the model.
        level: ``sigma/alpha [N+1]``, decreasing, finite and positive.
        x0: clean images ``[B, *D]``.
        noise: standard normal ``[B, *D]``.
        cond: conditions of the images.
        u: uniform in (0, 1), ``[N, B]``: the place inside each step, in ``1/s``.
    """
    at = level[:-1, None].expand_as(u)
    inside = 1 / (1 / at + u * (1 / level[1:, None] - 1 / at))
    start, middle = (_denoise(denoiser, s, x0, noise, cond) for s in (at, inside))
    gap = (start - middle).square().flatten(2).mean((1, 2))
    return ((1 - level[1:] / level[:-1]) * gap.sqrt()).sum()


def _denoise(denoiser: Denoiser, level: Tensor, x0: Tensor, noise: Tensor, cond: Cond) -> Tensor:
    """Return ``D(x0 + s n; s)`` at ``level [N, B]``, from one call: ``[N, B, *D]``."""
    schedule, (steps, batch) = denoiser.schedule, level.shape
    t = schedule.t_of_lam(-torch.log(level)).flatten()
    x0, noise = (v.expand(steps, *v.shape).flatten(0, 1) for v in (x0, noise))
    x = add_noise(x0, noise, schedule.alpha(t), schedule.sigma(t))
    return denoiser(x, t, repeated(cond, steps)).reshape(steps, batch, *x0.shape[1:])


def descend_bound(
    denoiser: Denoiser,
    start: TimeGrid,
    draw: Draw,
    *,
    iterations: int = 200,
    lr: float = 0.05,
    observe: Callable[[int, float], None] | None = None,
) -> TimeGrid:
    """Descend the Monte-Carlo bound in the increments of ``log s``, a softmax of free numbers between fixed ends: the paper's phase 1.

    Args:
        denoiser: the model.
        start: the schedule to begin with; its ends stay.
        draw: images, noise and conditions for an iteration, given its number.
        iterations: number of steps of Adam; the schedule is averaged over the second half.
        lr: learning rate of the first, which falls linearly to 0.
        observe: called after each iteration with its number and bound.

    Raises:
        GridError: a level of ``start`` is infinite or zero.
    """
    schedule = denoiser.schedule
    lam = schedule.lam(start.t)
    if not bool(torch.isfinite(lam).all()):
        raise GridError("the Monte-Carlo bound needs 0 < sigma/alpha < infinity at all times: set t_max and t_min")
    theta = torch.log(torch.diff(lam)).requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=lr, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    averaged = torch.zeros_like(lam)
    for step in range(iterations):
        optimiser.param_groups[0]["lr"] = lr * (1 - step / iterations)
        x0, noise, cond = draw(step)
        u = torch.rand(start.steps, len(x0), generator=generator, dtype=torch.float64)
        value = monte_carlo_bound(denoiser, torch.exp(-_levels(lam, theta)), x0, noise, cond, u)
        (theta.grad,) = torch.autograd.grad(value, theta)
        optimiser.step()
        averaged = averaged + _levels(lam, theta.detach()) * (step >= iterations // 2) / (iterations - iterations // 2)
        if observe is not None:
            observe(step + 1, float(value.detach()))
    return TimeGrid(torch.cat([start.t[:1], schedule.t_of_lam(averaged[1:-1]), start.t[-1:]]))


def _levels(lam: Tensor, theta: Tensor) -> Tensor:
    return lam[0] + (lam[-1] - lam[0]) * torch.cat([torch.zeros_like(lam[:1]), torch.softmax(theta, 0).cumsum(0)])
