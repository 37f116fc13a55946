r"""The equations that a flow map satisfies, each as a target to regress on (after Boffi, Albergo and Vanden-Eijnden, arXiv 2406.07505).

With ``rho_ab = e^(lam_a - lam_b)``, the ratio of the noise levels of two times, and ``g`` the mean of ``D`` along the way, exactly

    Lagrangian   g_st + (1 - rho_st) dg_st/dlam_t  =  D(X_st(x), t)
    Eulerian     rho_st (D(x, s) - g_st) + (1 - rho_st) dg_st/dlam_s  =  0,    d/dlam_s along the ODE, d xb/dlam = D - xb
    semigroup    (1 - rho_st) g_st(x)  =  (rho_vt - rho_st) g_sv(x) + (1 - rho_vt) g_vt(X_sv(x)),    v between s and t.

The last is a convex combination, so nothing is divided by anything small. A target is a function from a `Step` to what the student answers
and what it should answer, the latter without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.between import between
from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.prediction import aligned
from fewstep.core.schedule import NoiseSchedule
from fewstep.learn.teacher.jvp import Derivative, differentiable
from fewstep.models.networks.extra_embedding import LEVELS

__all__ = ["TARGETS", "Pairs", "Step", "Target", "composed", "jump", "short_mean"]

Mean = Callable[[Tensor, Tensor, Tensor, Cond], Tensor]  # (x [B, *D], s [B], t [B], cond) -> g [B, *D]
LOWEST = -7.0  # log(alpha/sigma) below which a state is taken for one of this level where derivatives are taken: it is noise to 0.1 %


@dataclass(frozen=True)
class Pairs:
    """A batch of pairs of times, and what is known of the trajectories there.

    Attributes:
        x: states ``[B, *D]`` at ``s``.
        s, v, t: times ``[B]`` float64, ``v`` between the others or one of them.
        cond: the condition.
        x_v, x_t: states of the same trajectories; None where only ``x`` is known.
        x0: the images that ``x`` are noised; None where they are not known.
        scale: the guidance scale of each ``[B]``, float64; None where all have one.
    """

    x: Tensor
    s: Tensor
    v: Tensor
    t: Tensor
    cond: Cond
    x_v: Tensor | None = None
    x_t: Tensor | None = None
    x0: Tensor | None = None
    scale: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """A target's inputs: the pairs, and the networks.

    Attributes:
        pairs: of this batch.
        schedule: the noise law.
        student: the student's mean, with gradients.
        averaged: the mean by the averaged weights.
        teacher: the teacher's denoiser.
        derivative: how to differentiate the averaged student.
        teacher_at: the teacher at the guidance scales ``[b]`` of some of the pairs, where they have their own.
    """

    pairs: Pairs
    schedule: NoiseSchedule
    student: Mean
    averaged: Mean
    teacher: Denoiser
    derivative: Derivative | None = None
    teacher_at: Callable[[Tensor], Denoiser] | None = None

    def answer(self) -> Tensor:
        """Return the student's own ``g_st(x)``."""
        pairs = self.pairs
        return self.student(pairs.x, pairs.s, pairs.t, pairs.cond)

    def teacher_of(self, chosen: Tensor) -> Denoiser:
        """Return the teacher of those pairs where ``chosen [B]`` says so, each at its own guidance scale."""
        scale = self.pairs.scale
        return self.teacher if scale is None or self.teacher_at is None else self.teacher_at(scale[chosen])


Target = Callable[[Step], tuple[Tensor, Tensor]]


def ratio(schedule: NoiseSchedule, a: Tensor, b: Tensor) -> Tensor:
    """Return ``rho_ab``, the noise level ``sigma/alpha`` at ``b`` over that at ``a``: 1 where they are one time. ``[*] -> [*]``."""
    return torch.where(a == b, torch.ones_like(a), torch.exp(schedule.lam(a) - schedule.lam(b)))


def jump(schedule: NoiseSchedule, x: Tensor, g: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return the states ``X_st [B, *D]`` that the mean ``g`` leads to from ``x`` at ``s``; ``x`` itself where ``s`` is ``t``."""
    gain = schedule.alpha(t) * (1 - ratio(schedule, s, t))
    return aligned(schedule.sigma(t) / schedule.sigma(s), x) * x + aligned(gain, x) * g


def composed(schedule: NoiseSchedule, g_sv: Tensor, g_vt: Tensor, s: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Return the mean over ``s`` to ``t`` of those over its two parts, by the semigroup equation."""
    weight = (1 - ratio(schedule, v, t)) / (1 - ratio(schedule, s, t))
    return torch.lerp(g_sv, g_vt, aligned(weight, g_sv))


def landed(schedule: NoiseSchedule, x: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Return the mean that leads from ``x`` at ``s`` to ``x_t`` at ``t``, in float64: neighbouring states are nearly one."""
    gain = schedule.alpha(t) * (1 - ratio(schedule, s, t))
    wide, wide_t = x.double(), x_t.double()
    return ((wide_t - aligned(schedule.sigma(t) / schedule.sigma(s), wide) * wide) / aligned(gain, wide)).to(x.dtype)


def short_mean(denoiser: Denoiser, x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Return the mean over a short step from ``s`` to ``t`` by the midpoint rule, two evaluations; its error is of second order."""
    middle = between(denoiser.schedule, s, t, 0.5)
    return denoiser(jump(denoiser.schedule, x, denoiser(x, s, cond), s, middle), middle, cond)


# -- targets ------------------------------------------------------------------------------------------------------------


def trajectory(step: Step) -> tuple[Tensor, Tensor]:
    """Regress on a stored trajectory itself: the one exact target."""
    pairs = step.pairs
    assert pairs.x_t is not None  # the objective sees to it
    return step.answer(), landed(step.schedule, pairs.x, pairs.x_t, pairs.s, pairs.t)


def lagrangian(step: Step) -> tuple[Tensor, Tensor]:
    """Go to ``v``, just before ``t``, by the averaged student, and on by the teacher: the Lagrangian equation over a short step."""
    pairs, schedule = step.pairs, step.schedule
    with torch.no_grad():
        g_sv = step.averaged(pairs.x, pairs.s, pairs.v, pairs.cond)
        there = jump(schedule, pairs.x, g_sv, pairs.s, pairs.v)
        target = composed(schedule, g_sv, short_mean(step.teacher, there, pairs.v, pairs.t, pairs.cond), pairs.s, pairs.v, pairs.t)
    return step.answer(), target


def eulerian(step: Step) -> tuple[Tensor, Tensor]:
    """Go to ``v``, just after ``s``, by the trajectory or the teacher, and on by the averaged student; to the image it is consistency."""
    pairs, schedule = step.pairs, step.schedule
    with torch.no_grad():
        if pairs.x_v is None:
            g_sv = short_mean(step.teacher, pairs.x, pairs.s, pairs.v, pairs.cond)
            there = jump(schedule, pairs.x, g_sv, pairs.s, pairs.v)
        else:
            g_sv, there = landed(schedule, pairs.x, pairs.x_v, pairs.s, pairs.v), pairs.x_v
        target = composed(schedule, g_sv, step.averaged(there, pairs.v, pairs.t, pairs.cond), pairs.s, pairs.v, pairs.t)
    return step.answer(), target


def semigroup(step: Step) -> tuple[Tensor, Tensor]:
    """Go to ``v`` in the middle and on, both by the averaged student; neighbouring times, where ``v`` is ``s``, by what is exact."""
    pairs, schedule = step.pairs, step.schedule
    with torch.no_grad():
        g_sv = step.averaged(pairs.x, pairs.s, pairs.v, pairs.cond)
        there = jump(schedule, pairs.x, g_sv, pairs.s, pairs.v)
        target = composed(schedule, g_sv, step.averaged(there, pairs.v, pairs.t, pairs.cond), pairs.s, pairs.v, pairs.t)
        near = pairs.v == pairs.s
        if bool(near.any()):
            rows = near.nonzero()[:, 0].to(pairs.x.device)
            x, s, t = pairs.x[rows], pairs.s[near], pairs.t[near]
            cond = None if pairs.cond is None else pairs.cond[rows]
            if pairs.x_t is None:
                target[rows] = short_mean(step.teacher_of(near), x, s, t, cond)
            else:
                target[rows] = landed(schedule, x, pairs.x_t[rows], s, t)
    return step.answer(), target


def lagrangian_jvp(step: Step) -> tuple[Tensor, Tensor]:
    """Hold the Lagrangian equation itself, with a derivative in the target time through which gradients go."""
    pairs, schedule = step.pairs, step.schedule
    lam = schedule.lam(pairs.t).clamp(LOWEST, LEVELS)  # beyond, a student is told no more of a level; the clean image has no derivative
    t = schedule.t_of_lam(lam)

    def mean(lam: Tensor) -> Tensor:
        return step.student(pairs.x, pairs.s, schedule.t_of_lam(lam), pairs.cond)

    with differentiable():
        answer, slope = torch.func.jvp(mean, (lam,), (torch.ones_like(lam),))[:2]
    with torch.no_grad():
        target = step.teacher(jump(schedule, pairs.x, answer.detach(), pairs.s, t), t, pairs.cond)
    return answer + aligned(1 - ratio(schedule, pairs.s, t), answer) * slope, target


def eulerian_jvp(step: Step) -> tuple[Tensor, Tensor]:
    """Hold the Eulerian equation itself, solved for ``g`` with a damping of ``rho``, along the teacher's direction."""
    with torch.no_grad():
        x0 = step.teacher(step.pairs.x, step.pairs.s, step.pairs.cond)
    return _eulerian_jvp(step, x0)


def matching(step: Step) -> tuple[Tensor, Tensor]:
    """Hold the Eulerian equation along the image itself, whose mean is ``D``: the equation is linear in it, so data alone will do."""
    assert step.pairs.x0 is not None  # the objective sees to it
    return _eulerian_jvp(step, step.pairs.x0)


def _eulerian_jvp(step: Step, x0: Tensor) -> tuple[Tensor, Tensor]:
    pairs, schedule = step.pairs, step.schedule
    lam, rho = schedule.lam(pairs.s).clamp_min(LOWEST), ratio(schedule, pairs.s, pairs.t)
    s = schedule.t_of_lam(lam)
    scaled = pairs.x / aligned(schedule.alpha(s), pairs.x)

    def mean(scaled: Tensor, lam: Tensor) -> Tensor:
        s = schedule.t_of_lam(lam)
        return step.averaged(scaled * aligned(schedule.alpha(s), scaled), s, pairs.t, pairs.cond)

    assert step.derivative is not None  # the objective chooses one
    level = float(torch.exp(-lam).median())
    g, slope = step.derivative(mean, (scaled, lam), (x0 - scaled, torch.ones_like(lam)), level)
    with torch.no_grad():
        target = torch.lerp(g + slope, x0, aligned(rho, g))
    return step.answer(), target


TARGETS: dict[str, Target] = {
    "trajectory": trajectory,
    "lagrangian": lagrangian,
    "eulerian": eulerian,
    "semigroup": semigroup,
    "lagrangian-jvp": lagrangian_jvp,
    "eulerian-jvp": eulerian_jvp,
    "matching": matching,
}
