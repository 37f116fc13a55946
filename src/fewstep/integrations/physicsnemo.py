"""The solver protocol of PhysicsNeMo's diffusion samplers, by its methods alone: nothing of PhysicsNeMo is imported.

There a solver is an object with ``step(x [B, *D], t_cur [B], t_next [B]) -> x [B, *D]``, which holds its denoiser: the right hand side
``dx/dt`` of the ODE, called as ``denoiser(x [B, *D], t [B])`` (github.com/NVIDIA/physicsnemo, physicsnemo/diffusion/samplers). A
`FewstepSolver` is such an object for a sampler of this library, and `solver_function` makes a function of k-diffusion's signature of any
such object, which `fewstep.compare` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond
from fewstep.core.prediction import aligned
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import State
from fewstep.runtime.errors import FewstepError, GridError, SolverError
from fewstep.sampling.loop import steps
from fewstep.sampling.sampler import Sampler

__all__ = ["FewstepSolver", "StepSolver", "solver_function"]

SLACK = 1e-5  # relative: hosts keep their times in float32, or in the dtype of the state

Network = Callable[[Tensor, Tensor], Tensor]  # (x [B, *D], t [B]) -> [B, *D]


class StepSolver(Protocol):
    """The protocol: anything with this method is a solver there."""

    def step(self, x: Tensor, t_cur: Tensor, t_next: Tensor) -> Tensor:
        """Return the state ``[B, *D]`` at the times ``t_next [B]`` from ``x [B, *D]`` at ``t_cur [B]``."""
        ...


class FewstepSolver:
    """A sampler of this library as a solver of PhysicsNeMo's ``sample(..., time_steps=solver.time_steps, solver=solver)``.

    The states and times there are those of the sampler's noise law: `VarianceExploding` for its EDM and iDDPM schedulers, and for VP
    ``VPLinear(scheduler.beta_min, scheduler.beta_min + scheduler.beta_d)``. A trajectory runs through the sampler's own times from the
    first on; it can be begun again at any time.

    Args:
        sampler: saved, fitted or just made (`Sampler.build`).
        denoiser: called with the state ``[B, *D]`` and the times ``[B]``.
        predicts: what it answers: ``rhs``, the right hand side of the ODE as ``scheduler.get_denoiser()`` makes it, or ``x0``.
        scheduler: the noise scheduler there, whose ``alpha`` and ``sigma`` are held to the sampler's law.
        seeds: one for each sample, where the sampler adds noise.

    Raises:
        GridError: a scheduler of another noise law.
        FewstepError: another word for what the denoiser answers.

    Examples:
        >>> import torch, fewstep
        >>> from fewstep.integrations.physicsnemo import FewstepSolver
        >>> sampler = fewstep.Sampler.build("unipc-2", "karras", fewstep.VarianceExploding(), nfe=6)
        >>> solver = FewstepSolver(sampler, lambda x, t: x / (1 + t.reshape(-1, 1) ** 2), predicts="x0")
        >>> x = 80 * torch.ones(2, 3)
        >>> for t, after in zip(solver.time_steps, solver.time_steps[1:]):
        ...     x = solver.step(x, t.expand(2), after.expand(2))
    """

    def __init__(
        self,
        sampler: Sampler,
        denoiser: Network,
        *,
        predicts: Literal["rhs", "x0"] = "rhs",
        scheduler: Any = None,  # noqa: ANN401 - any object with alpha and sigma
        seeds: Sequence[int] | Tensor | None = None,
    ) -> None:
        if predicts not in ("rhs", "x0"):
            raise FewstepError(f"a denoiser answers rhs, the right hand side of the ODE, or x0, got {predicts!r}")
        sampler.tableau.check_asks("a denoiser of PhysicsNeMo takes its condition along, which is not known here")
        self.sampler, self.seeds = sampler, seeds
        self._denoiser = _Denoiser(sampler.schedule, denoiser, rhs=predicts == "rhs")
        if scheduler is not None:
            _check_law(sampler, scheduler)
        self._at, self._state, self._begins = 0, None, sampler.begins
        self._answer: Tensor | None = None

    @property
    def time_steps(self) -> Tensor:
        """The times ``[M+1]``, decreasing, float64: what PhysicsNeMo's ``sample`` takes as ``time_steps``."""
        return self.sampler.grid.t.detach().clone()

    def step(self, x: Tensor, t_cur: Tensor, t_next: Tensor) -> Tensor:
        """Take the sampler's step from ``t_cur [B]`` to ``t_next [B]``.

        Args:
            x: the state ``[B, *D]``, what the last step returned; changes that were made to it since are taken over.
            t_cur, t_next: two neighbouring times of `time_steps`, the same for all samples.

        Raises:
            GridError: times that are not the sampler's next.
            SolverError: a state that was changed, under a solver that steps from an earlier one.
        """
        times, now, then = self.time_steps.tolist(), _one_time(t_cur), _one_time(t_next)
        slack = max(SLACK, torch.finfo(t_cur.dtype).eps)
        begins = _same(now, times[0], slack)
        k = 0 if begins else self._at
        if k >= len(times) - 1 or not _same(now, times[k], slack) or not _same(then, times[k + 1], slack):
            raise GridError(
                f"this sampler goes from {times[0]:g} through its own times: a step from t = {now:g} to {then:g} is not its step {k}; pass "
                "time_steps=solver.time_steps"
            )
        resume = None if begins else (self._begins[k], self._entered(x))
        run = steps(self._denoiser, self.sampler.tableau, x, seeds=self.seeds, resume=resume)
        last = k == len(times) - 2
        made = list(run if last else islice(run, self._begins[k + 1] - self._begins[k]))
        self._state, self._at = made[-1].state, k + 1
        answer = self._state.x.to(x.dtype)
        self._answer = answer.clone() if answer is self._state.x else answer  # which a caller may change in place
        return self._answer

    def _entered(self, x: Tensor) -> State:
        """Return the state to go on from, with what a caller has changed: it is kept in at least float32 between steps."""
        state, known = self._state, self._answer
        if state is None or known is None or known.shape != x.shape:
            raise GridError("this trajectory was not begun here: step from the first of solver.time_steps on")
        apart = x.to(state.x.dtype) - state.x.to(x.dtype).to(state.x.dtype)
        if not bool(apart.any()):
            return state
        if state.anchor is not None:
            raise SolverError(
                "this solver steps from a state before the one that it evaluates (UniPC's corrector, Heun), so a change of the state would "
                "be undone: use ddim, dpm-solver-pp-2m, deis-3 or unipc-2:corrector=false"
            )
        return state._replace(x=state.x + apart)


class _Denoiser:
    """A network of the protocol as a `Denoiser`."""

    def __init__(self, schedule: NoiseSchedule, network: Network, *, rhs: bool) -> None:
        self.schedule, self.network, self.rhs = schedule, network, rhs

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:  # noqa: ARG002 - conditions are the network's own
        output = self.network(x, t.to(x.dtype).to(x.device).expand(len(x)))
        if not self.rhs:
            return output
        a, b = (aligned(value, x) for value in _x0_of_rhs(self.schedule, t))
        return a * x + b * output


def _x0_of_rhs(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``a, b []`` of ``x0 = a x + b dx/dt``, from ``x = alpha x0 + sigma eps`` and its derivative in time at fixed x0 and eps."""
    with torch.enable_grad():
        at = t.detach().double().requires_grad_()
        alpha, sigma = schedule.alpha(at), schedule.sigma(at)
        (sigma_dot,) = torch.autograd.grad(sigma, at)
        alpha_dot = torch.autograd.grad(alpha, at)[0] if alpha.requires_grad else torch.zeros_like(at)
    alpha, sigma = alpha.detach(), sigma.detach()
    below = sigma * alpha_dot - alpha * sigma_dot
    return -sigma_dot / below, sigma / below


def _check_law(sampler: Sampler, scheduler: Any) -> None:  # noqa: ANN401
    t = sampler.grid.t.detach()[:-1]
    for name in ("alpha", "sigma"):
        ours, theirs = getattr(sampler.schedule, name)(t), getattr(scheduler, name)(t)
        if not torch.allclose(ours, torch.as_tensor(theirs).double(), rtol=SLACK, atol=SLACK):
            raise GridError(
                f"the {name} of a {type(scheduler).__name__} is not that of this sampler's noise law, {str(sampler.schedule)[:80]}: make "
                "the sampler for its law"
            )


def _one_time(t: Tensor) -> float:
    if not t.numel() or bool((t != t.flatten()[0]).any()):
        raise GridError(f"the samples of a batch are stepped from one time to another, got {t.tolist()}")
    return float(t.flatten()[0])


def _same(one: float, other: float, slack: float) -> bool:
    return abs(one - other) <= slack * max(abs(one), abs(other))


def solver_function(make: Callable[[Network], StepSolver], name: str | None = None) -> Callable[..., Tensor]:
    """Return a function of k-diffusion's signature that steps with solvers of the protocol, for `fewstep.compare` and k-diffusion's hosts.

    Args:
        make: makes a solver of its denoiser, the right hand side ``(x - x0)/sigma`` of EDM's ODE, as the class ``EulerSolver`` does.
        name: how tables show it; by default that of ``make``.

    Examples:
        >>> import torch
        >>> from fewstep.integrations.physicsnemo import solver_function
        >>> class Euler:
        ...     def __init__(self, denoiser):
        ...         self.denoiser = denoiser
        ...     def step(self, x, t_cur, t_next):
        ...         return x + (t_next - t_cur).reshape(-1, 1) * self.denoiser(x, t_cur)
        >>> solver_function(Euler)(lambda x, sigma: 0 * x, torch.ones(2, 3), torch.tensor([2.0, 1.0, 0.0])).tolist()[0]
        [0.0, 0.0, 0.0]
    """

    def sample(
        model: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,  # noqa: ARG001 - no progress bar is shown
    ) -> Tensor:
        def right_hand_side(x: Tensor, t: Tensor) -> Tensor:
            denoised = model(x, t, **(extra_args or {}))
            if callback is not None:
                callback({"x": x, "i": at, "sigma": sigmas[at], "sigma_hat": sigmas[at], "denoised": denoised})
            return (x - denoised) / aligned(t, x)

        solver, levels = make(right_hand_side), torch.as_tensor(sigmas).to(x)
        for at in range(len(levels) - 1):  # noqa: B007 - callbacks are told it
            x = solver.step(x, levels[at].expand(len(x)), levels[at + 1].expand(len(x)))
        return x

    sample.__name__ = sample.__qualname__ = name or str(getattr(make, "__name__", "solver"))
    return sample
