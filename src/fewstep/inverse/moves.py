"""Methods that move the state by a measurement, between the steps of a sampler: DPS, and fast constrained sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.prediction import aligned
from fewstep.core.tableau import Tableau
from fewstep.inverse.jacobian import SIZE, Estimate, estimate
from fewstep.inverse.method import Data, Method, positive
from fewstep.models.guidance import Wrapped
from fewstep.runtime.errors import ModelError, SolverError
from fewstep.runtime.front_door import checked_class, is_count
from fewstep.sampling.loop import Step, steps

__all__ = ["DPS", "Constrained"]


@checked_class
@dataclass(frozen=True)
class DPS(Method):
    r"""Step down the gradient of the misfit after each step, :math:`x' \mathrel{-}= \zeta \nabla_x |y - A D(x)|` (arXiv 2209.14687).

    It wants hundreds of steps and back-propagation: for comparison.

    Args:
        zeta: the length of the step, on the scale of the clean image.
    """

    zeta: float = 1.0
    references = ("2209.14687",)

    def __post_init__(self) -> None:
        positive(self.zeta, "zeta")

    @property
    def cost(self) -> tuple[int, int]:
        return 1, 1

    def sample(
        self,
        denoiser: Denoiser,
        tableau: Tableau,
        x: Tensor,
        data: Data,
        cond: Cond,
        seeds: Iterable[int] | Tensor | None,
        observe: Callable[[Step], None] | None,
    ) -> Tensor:
        kept = list[Estimate]()  # the last answer, with its graph

        def answer(state: Tensor, t: Tensor, cond: Cond) -> Tensor:
            kept[:] = [estimate(denoiser, state, t, cond, backward=True)]
            return kept[0].x0

        def down(step: Step) -> Tensor:
            graph = kept[0].graph
            assert graph is not None
            with torch.enable_grad():
                misfit = data.residual(graph[0]).flatten(1).norm(dim=1).sum()
                (slope,) = torch.autograd.grad(misfit, graph[1])
            alpha = aligned(denoiser.schedule.alpha(tableau.nodes.t[step.i + 1]), x)
            return step.x_next - self.zeta * alpha * slope

        return _edited(Wrapped(denoiser.schedule, answer), tableau, x, cond, seeds, down, observe)


@checked_class
@dataclass(frozen=True)
class Constrained(Method):
    """Move the state before each evaluation until its answer fits the measurement: fast constrained sampling (arXiv 2410.18804).

    Each move goes along ``J e``, with ``e`` the way that the misfit wants the clean image to go, and has a fixed size in the maximum norm.

    Args:
        inner: moves before an evaluation, at most: each is two evaluations. A sample that fits to its noise moves no more.
        first, last: the sizes of the first and the last move, on the scale of the clean image.
        size: of the difference's step in units of sigma.
    """

    inner: int = 5
    first: float = 0.5
    last: float = 0.1
    size: float = SIZE
    references = ("2410.18804",)

    def __post_init__(self) -> None:
        if not is_count(self.inner):
            raise ModelError(f"inner is the number of moves, a whole number from 1, got {self.inner!r}")
        for name in ("first", "last", "size"):
            positive(getattr(self, name), name)

    @property
    def cost(self) -> tuple[int, int]:
        return 1 + 2 * self.inner, 0

    def sample(
        self,
        denoiser: Denoiser,
        tableau: Tableau,
        x: Tensor,
        data: Data,
        cond: Cond,
        seeds: Iterable[int] | Tensor | None,
        observe: Callable[[Step], None] | None,
    ) -> Tensor:
        times = tableau.nodes.t

        def edit(step: Step) -> Tensor | None:
            last = step.i + 1 == tableau.nodes.evaluations
            return None if last else self.move(denoiser, step.x_next, times[step.i + 1], cond, data)

        return _edited(denoiser, tableau, self.move(denoiser, x, times[0], cond, data), cond, seeds, edit, observe)

    def move(self, denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond, data: Data) -> Tensor:
        """Return the states ``x [B, *D]`` at time ``t``, moved."""
        if not float(denoiser.schedule.alpha(t)) > 0:
            return x
        for k in range(self.inner):
            made = estimate(denoiser, x, t, cond)
            r = data.residual(made.x0)
            open_ = (r.flatten(1).square().mean(1).sqrt() > data.noise).reshape(-1, *(1,) * (x.ndim - 1))
            if not bool(open_.any()):
                break
            e = data.measurement.at(made.x0, data.y, data.noise).transpose(r)
            way = made.covariance(e, self.size)
            largest = way.flatten(1).abs().amax(1).reshape(open_.shape)
            rate = self.first + (self.last - self.first) * k / max(self.inner - 1, 1)
            x = x + torch.where(open_ & (largest > 0), rate * made.alpha * way / largest.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
        return x


def _edited(
    denoiser: Denoiser,
    tableau: Tableau,
    x: Tensor,
    cond: Cond,
    seeds: Iterable[int] | Tensor | None,
    edit: Callable[[Step], Tensor | None],
    observe: Callable[[Step], None] | None,
) -> Tensor:
    end = x
    if tableau.nodes.evaluations != sum(tableau.whole_steps) or not tableau.whole_steps[-1]:
        raise SolverError("a method that moves the state is for solvers of one evaluation a step and without a memory: use ddim")
    for step in steps(denoiser, tableau, x, cond, seeds=seeds, edit=edit):
        end = step.x_next
        if observe is not None:
            observe(step)
    return end
