"""Methods that move the state by a measurement, between the steps of a sampler: DPS, and fast constrained sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.tableau import Tableau
from fewstep.inverse.jacobian import SIZE, Estimate, checked_size, estimate
from fewstep.inverse.method import Asked, Data, Method, positive
from fewstep.models.guidance import Wrapped
from fewstep.runtime.errors import ModelError, SolverError
from fewstep.runtime.front_door import check_fields, checked_class, is_count
from fewstep.sampling.loop import Step, run

__all__ = ["DPS", "Constrained", "Move"]


class Move(Method):
    """A method that moves the state between the steps of a sampler, which then may not read the steps before."""

    def check(self, tableau: Tableau) -> None:
        if tableau.nodes.evaluations != sum(tableau.whole_steps) or tableau.memory > 1:
            raise SolverError(
                f"{type(self).__name__} moves the state, so its solver makes one evaluation a step and reads no other: use ddim"
            )


@checked_class
@dataclass(frozen=True)
class DPS(Move):
    r"""Step down the gradient of the misfit after each step, :math:`x' \mathrel{-}= \zeta \nabla_x |y - A D(x)|` (arXiv 2209.14687).

    It wants hundreds of steps and back-propagation: for comparison.

    Args:
        zeta: the length of the step, on the scale of the state, as published.
    """

    zeta: float = 1.0
    references = ("2209.14687",)

    def __post_init__(self) -> None:
        check_fields(self)
        positive(self.zeta, "zeta")

    @property
    def cost(self) -> tuple[int, int]:
        return 1, 1

    def sample(self, denoiser: Denoiser, asked: Asked) -> Tensor:
        kept = list[Estimate]()  # the last answer, with its graph

        def answer(state: Tensor, t: Tensor, cond: Cond) -> Tensor:
            kept[:] = [estimate(denoiser, state, t, cond, backward=True)]
            return kept[0].x0

        def down(step: Step) -> Tensor:
            graph = kept[0].graph
            assert graph is not None
            with torch.enable_grad():
                misfit = asked.data.residual(graph[0]).flatten(1).norm(dim=1).sum()
                (slope,) = torch.autograd.grad(misfit, graph[1])
            return step.x_next - self.zeta * slope

        return _edited(Wrapped(denoiser.schedule, answer), asked, down)


@checked_class
@dataclass(frozen=True)
class Constrained(Move):
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
        check_fields(self)
        if not is_count(self.inner):
            raise ModelError(f"inner is the number of moves, a whole number from 1, got {self.inner!r}")
        checked_size(self.size)
        for name in ("first", "last"):
            positive(getattr(self, name), name)

    @property
    def cost(self) -> tuple[int, int]:
        return 1 + 2 * self.inner, 0

    def sample(self, denoiser: Denoiser, asked: Asked) -> Tensor:
        times, data = asked.tableau.nodes.t, asked.data

        def edit(step: Step) -> Tensor | None:
            last = step.i + 1 == asked.tableau.nodes.evaluations
            return None if last else self.move(denoiser, step.x_next, times[step.i + 1], asked.cond, data)

        moved = asked._replace(x=self.move(denoiser, asked.x, times[0], asked.cond, data))
        return _edited(denoiser, moved, edit)

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


def _edited(denoiser: Denoiser, asked: Asked, edit: Callable[[Step], Tensor | None]) -> Tensor:
    """Run a sampler whose steps are edited."""
    return run(denoiser, asked.tableau, asked.x, asked.cond, seeds=asked.seeds, edit=edit, observe=asked.observe)
