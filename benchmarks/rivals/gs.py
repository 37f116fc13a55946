r"""GS and GAS: learn what a solver lacks, from DPM-Solver++ on, and a critic against it (Oganov et al., arXiv 2510.17699).

Formula: the step of DPM-Solver++ 3M on times that move, plus free corrections of all its weights and of those of all earlier states and
answers: ``x_{i+1} = (r_i + a_i0) x_i + sum_{k>=1} a_ik x_{i-k} + sum_k (w_ik(t) + c_ik) D_{i-k}``, all corrections zero at first. The times
come of a stick that is broken in the time of a variance-preserving law, uniform at first; the network is told ``t_i + delta_i`` there, and
its noise is used at ``t_i``.

Loss: ``|Psi(x_T) - Phi(x_T)|^2`` (GS), plus a relativistic critic with both gradient penalties (GAS, the loss of R3GAN, arXiv 2501.05441).

Authors' numbers: 1400 pairs to learn from, Adam, gradients clipped to 1, a running average of the numbers, an order equal to the steps.
Assumed, since their configurations were not at hand: rate 5e-3 with a cosine to zero, batches of 24, 3000 iterations, decay 0.999 of the
average, weight 0.1 of the critic's term, a critic of three convolutions with penalty 1 at 2e-4, taught on the samples of the same batch.
Their corrections act on divided differences of the last three answers, here on the answers themselves: the same solvers, another metric of
the descent. They compare by LPIPS in pixel space; here by L2. Their teacher is UniPC, here of 64 evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from benchmarks.rivals.drawn import Drawn, DrawnSampler, solver_on, steps_of, tableau_of, unrolled
from benchmarks.rivals.levels import EPSILON, level_at_vp_time, times_at
from benchmarks.rivals.rival import Found, Needs, Note, Rival, _silent
from benchmarks.rivals.teacher import Cost, Pairs, Teacher
from benchmarks.rivals.training import Descent, Family, descend
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, softplus

from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.errors import SolverError

PARENT = "dpm-solver-pp-3m:lower_order_below=0"


class Generalized(Family):
    """DPM-Solver++ 3M with corrections of everything."""

    def __init__(self, schedule: NoiseSchedule, steps: int) -> None:
        super().__init__()
        self.schedule, self.steps, self.ends = schedule, steps, schedule.ends
        left = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]  # of the stick, before each piece is broken off
        self.pieces = nn.Parameter(torch.logit(left[1:] / left[:-1]))
        self.told = nn.Parameter(torch.zeros(steps, dtype=torch.float64))
        self.of_states = nn.Parameter(torch.zeros(steps, steps, dtype=torch.float64))
        self.of_answers = nn.Parameter(torch.zeros(steps, steps, dtype=torch.float64))

    def vp_times(self) -> Tensor:
        """Return the first ``N`` times of the variance-preserving law, from 1 down."""
        left = torch.cumprod(torch.sigmoid(self.pieces), 0)
        return torch.cat([torch.ones(1, dtype=torch.float64), EPSILON + (1 - EPSILON) * left])

    def drawn(self) -> Drawn:
        u = self.vp_times()
        t = torch.cat([self.ends[:1], times_at(self.schedule, level_at_vp_time(self.schedule, u[1:])), self.ends[1:]])
        told = times_at(self.schedule, level_at_vp_time(self.schedule, (u + self.told).clamp(EPSILON / 10, 1)))
        tableau = solver_on(PARENT, self.schedule, t)
        ratio, weights = steps_of(tableau)
        known = min(weights.shape[1], self.steps)
        whole = torch.cat([weights[:, :known], torch.zeros(self.steps, self.steps - known, dtype=torch.float64)], 1) + self.of_answers
        start, answers = unrolled(ratio + self.of_states[:, 0], whole, self.of_states[:, 1:])
        return Drawn(tableau_of(tableau.nodes, start, answers), tuple(told))


class Critic(nn.Module):
    """A small critic of pictures ``[B, C, H, W] -> [B]``."""

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        sizes = [channels, width, 2 * width, 2 * width]
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.layers = nn.ModuleList(nn.Conv2d(one, two, 3, stride=1 + (k > 0), padding=1) for k, (one, two) in enumerate(pairs))
        self.last = nn.Linear(2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = leaky_relu(layer(x), 0.2)
        return self.last(x.mean((2, 3))).squeeze(1)


class Against:
    """The critic's term of the loss, with the critic's own step before it.

    Args:
        channels: of the pictures.
        weight: of the term.
        penalty: of the critic's gradients at real and at made pictures.
        rate: of the critic's Adam.
    """

    def __init__(self, channels: int, weight: float, penalty: float, rate: float) -> None:
        generator = torch.random.get_rng_state()
        torch.manual_seed(0)
        self.critic = Critic(channels)
        torch.random.set_rng_state(generator)
        self.weight, self.penalty = weight, penalty
        self.optimizer = torch.optim.Adam(self.critic.parameters(), lr=rate, betas=(0.0, 0.99))

    def __call__(self, made: Tensor, pairs: Pairs) -> Tensor:
        with torch.enable_grad():
            real, fake = (x.detach().requires_grad_() for x in (pairs.ends, made))
            on_real, on_fake = self.critic(real), self.critic(fake)
            slopes = torch.autograd.grad(on_real.sum() + on_fake.sum(), [real, fake], create_graph=True)
            penalty = sum(slope.square().flatten(1).sum(1).mean() for slope in slopes)
            loss = softplus(on_fake - on_real).mean() + 0.5 * self.penalty * penalty
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        return self.weight * softplus(self.critic(pairs.ends).detach() - self.critic(made)).mean()


@dataclass(frozen=True)
class GS(Rival):
    """The hyper-parameters of the generalized solver.

    Attributes:
        batch, num, held_out: of the descent.
        rate: of Adam.
        average: decay of the running average.
    """

    paper = "2510.17699"
    needs = Needs()
    iterations: int = 3000
    batch: int = 24
    num: int = 1400
    held_out: int = 100
    rate: float = 5e-3
    average: float = 0.999

    @property
    def descent(self) -> Descent:
        """How it descends."""
        return Descent(self.iterations, self.batch, self.num, self.held_out, clip=1.0, average=self.average, told_first=True)

    def cost(self, nfe: int) -> Cost:
        return self.descent.cost(nfe)

    def against(self, shape: tuple[int, ...]) -> Against | None:
        """Return the critic's term for samples of a shape; None without a critic."""
        return None

    def fit(self, teacher: Teacher, nfe: int, note: Note = _silent) -> Found:
        family = Generalized(teacher.schedule, nfe)
        optimizer = torch.optim.Adam(family.parameters(), lr=self.rate)
        curve = descend(family, teacher, self.descent, [optimizer], extra=self.against(teacher.problem.shape), note=note)
        return Found(DrawnSampler.of(family.drawn()), curve)


@dataclass(frozen=True)
class GAS(GS):
    """The hyper-parameters of the generalized adversarial solver.

    Attributes:
        weight, penalty, critic_rate: see `Against`.
    """

    needs = Needs(critic=True)
    weight: float = 0.1
    penalty: float = 1.0
    critic_rate: float = 2e-4

    def against(self, shape: tuple[int, ...]) -> Against:
        if len(shape) != 3:
            raise SolverError(f"the critic sees pictures (C, H, W), not samples of shape {shape}: use GS")
        return Against(shape[0], self.weight, self.penalty, self.critic_rate)
