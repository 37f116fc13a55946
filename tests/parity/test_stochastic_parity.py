"""Diffusers' stochastic schedulers with the same noises give the same samples.

Their ``step`` runs on their own levels, with the answers of an analytic network; ours on a law of the same levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import diffusers
import pytest
import torch
from tests.problems import mixture, noise
from torch import Tensor

from fewstep import DiscreteVP, TimeGrid, VarianceExploding, make_solver, steps, tabulate

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # theirs, of new numpy
SAME = 1e-5  # relative: their levels and coefficients are float32
DENOISER = mixture(VarianceExploding())


def ours(spec: str, levels: Tensor, z: Tensor, xi: list[Tensor]) -> Tensor:
    """Our samples ``x/alpha`` from ``z``, on a discrete law's levels or any others."""
    law = VarianceExploding(t_min=float(levels[-1]), t_max=float(levels[0]))
    solver = make_solver(spec)
    return list(steps(DENOISER, tabulate(solver, solver.nodes(TimeGrid(levels), law)), z, noise=lambda i: xi[i]))[-1].x_next


def theirs(
    scheduler: Any, x: Tensor, levels: Callable[[Any, int], float], scaled: bool, draw: Callable[[int], Tensor], patch: Any
) -> Tensor:
    """Their samples: ``levels`` says the noise level of a call, ``scaled`` whether their state is ``x/alpha``; ``draw`` their noise."""
    drawn = []

    def randn_tensor(shape: Any, **unused: Any) -> Tensor:
        drawn.append(call)
        return draw(call)

    patch.setattr(import_module(type(scheduler).__module__), "randn_tensor", randn_tensor, raising=False)
    for call, t in enumerate(scheduler.timesteps):
        level = levels(scheduler, call)
        z = x if scaled else x * math.sqrt(1 + level**2)
        eps = (z - DENOISER(z, torch.tensor(level, dtype=torch.float64))) / level
        x = scheduler.step(eps, t, x, return_dict=False)[0]
    return x


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


def in_sigma(scheduler: Any, call: int) -> float:
    """The level of a call of a scheduler whose state is ``x/alpha``: by how it scales the network's input."""
    return math.sqrt(float(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), scheduler.timesteps[call])) ** -2 - 1)


@pytest.mark.parametrize("spec", ["EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
@pytest.mark.parametrize("count", [4, 10])
def test_ancestral_schedulers(spec: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = getattr(diffusers, spec)()
    scheduler.set_timesteps(count)
    levels = torch.unique_consecutive(scheduler.sigmas.double())
    xi, z = [noise(40, 4, 2)[j] for j in range(40)], levels[0] * noise(4, 2)
    end = theirs(scheduler, z, in_sigma, scaled=True, draw=lambda call: xi[call], patch=monkeypatch)
    assert relative(ours(spec, levels, z, xi), end) < SAME


@pytest.mark.parametrize("count", [4, 10])
def test_dpm_solver_sde_scheduler(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its noise is a Brownian motion over sigma: that of the whole step holds that of its first stage."""
    pytest.importorskip("torchsde")
    scheduler = diffusers.DPMSolverSDEScheduler()
    scheduler.set_timesteps(count)
    levels = torch.unique_consecutive(scheduler.sigmas.double())
    xi, z, calls = [noise(40, 4, 2)[j] for j in range(40)], levels[0] * noise(4, 2), iter(range(40))

    def sampler(now: Tensor, then: Tensor) -> Tensor:
        call, now, then = next(calls), float(now), float(then)
        if call % 2 == 0:
            return xi[call]
        middle = math.sqrt(now * then)
        return (math.sqrt(now - middle) * xi[call - 1] + math.sqrt(middle - then) * xi[call]) / math.sqrt(now - then)

    scheduler.noise_sampler = sampler

    def level(scheduler: Any, call: int) -> float:
        k = call // 2
        return float(levels[k]) if call % 2 == 0 else math.sqrt(float(levels[k]) * float(levels[k + 1]))

    end = theirs(scheduler, z, level, scaled=True, draw=lambda call: xi[call], patch=monkeypatch)
    assert relative(ours("DPMSolverSDEScheduler", levels, z, xi), end) < SAME


def in_time(scheduler: Any, call: int) -> float:
    bar = float(scheduler.alphas_cumprod[int(scheduler.timesteps[call])])
    return math.sqrt((1 - bar) / bar)


def to_clean(scheduler: Any) -> Tensor:
    return torch.tensor([*(in_time(scheduler, call) for call in range(len(scheduler.timesteps))), 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("scheduler", "spec"),
    [
        (diffusers.DDPMScheduler(clip_sample=False), "DDPMScheduler"),
        (diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_large"), "ddpm:variance=large"),
        (diffusers.LCMScheduler(), "LCMScheduler"),
    ],
    ids=["ddpm", "ddpm-large", "lcm"],
)
def test_ddpm_and_lcm(scheduler: Any, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LCM's boundary condition, by which an answer at time 0 would be the state itself, is 1e-5 and less of the state at its times."""
    scheduler.set_timesteps(4 if spec == "LCMScheduler" else 10)
    levels = to_clean(scheduler)
    xi, x = [noise(40, 4, 2)[j] for j in range(40)], noise(4, 2)
    end = theirs(scheduler, x, in_time, scaled=False, draw=lambda call: xi[call], patch=monkeypatch)
    assert relative(ours(spec, levels, x * math.sqrt(1 + float(levels[0]) ** 2), xi), end) < SAME


@pytest.mark.parametrize(("predictor", "corrector"), [(2, 2), (3, 3), (1, 2)])
@pytest.mark.parametrize("tau", [0.0, 0.8])
def test_sa_solver(predictor: int, corrector: int, tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.SASolverScheduler(predictor_order=predictor, corrector_order=corrector, tau_func=lambda t: torch.tensor(tau))
    scheduler.set_timesteps(10)
    levels = scheduler.sigmas.double()
    xi, x = [noise(40, 4, 2)[j] for j in range(40)], noise(4, 2)
    end = theirs(scheduler, x, lambda s, call: float(levels[call]), scaled=False, draw=lambda call: xi[call], patch=monkeypatch)
    made = ours(
        f"sa-solver:predictor={predictor}:corrector={corrector}:tau={tau}:form=simple",
        levels,
        x * math.sqrt(1 + float(levels[0]) ** 2),
        xi,
    )
    assert relative(made / math.sqrt(1 + float(levels[-1]) ** 2), end) < SAME


def test_levels_of_a_discrete_law_are_those() -> None:
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(10)
    law = DiscreteVP.from_alphas_cumprod(scheduler.alphas_cumprod)
    torch.testing.assert_close(torch.exp(-law.lam(scheduler.timesteps.double())), to_clean(scheduler)[:-1], rtol=1e-6, atol=0)
