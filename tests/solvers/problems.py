"""The solvers and the problems that the tests of this folder share."""

from dataclasses import fields, replace
from itertools import product

import torch

from fewstep import Tableau, advance, make_solver, seeded_noise
from fewstep.core.schedule import NoiseSchedule, VPLinear
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Solver
from fewstep.models.analytic import GaussianDenoiser, MixtureDenoiser
from fewstep.solvers import DDIM, DEIS, IPNDM, SOLVERS, DPMSolverM, DPMSolverPP, DPMSolverV3, SDEDPMSolverPP2M, UniPC, takes_statistics
from fewstep.solvers.stencil import NEVER

LAM = (-8.0, 14.0)  # covers every grid of these tests


def statistics(l: float = 1.0, s: float = 0.0, b: float = 0.0) -> ModelStatistics:
    """Constant statistics, shared by all elements. By default those of data prediction, where DPM-Solver-v3 is a method of its own only
    in its pseudo derivatives.
    """
    lam = torch.linspace(*LAM, 221, dtype=torch.float64)
    return ModelStatistics(lam, *(torch.full((len(lam), 1), value, dtype=torch.float64) for value in (l, s, b)), (1,), VPLinear())


def any_statistics() -> ModelStatistics:
    """Smooth statistics of two elements that belong to no model.

    They are linear between levels, and the kinks there end what can be seen of order 4: errors below the square of the distance.
    """
    lam = torch.linspace(*LAM, 22001, dtype=torch.float64)
    waves = (torch.stack([torch.sin(f * lam + e) for e in (0.3, 2.0)], 1) for f in (0.9, 0.7, 1.1))
    l, s, b = (mean + 0.3 * wave for mean, wave in zip((0.5, 0.3, -0.2), waves, strict=True))
    return ModelStatistics(lam, l, s, b, (2,), VPLinear())


STOCHASTIC: dict[str, Solver] = {
    "sde-dpm-solver-pp-2m": make_solver("sde-dpm-solver-pp-2m"),
    "sde-dpm-solver-pp-2m-taylor": SDEDPMSolverPP2M(form="taylor"),
    "sde-dpm-solver-2m": make_solver("sde-dpm-solver-2m"),
    "sde-dpm-solver-1m": DPMSolverM(steps=1, sde=True),
    "ddim-eta-0.5": DDIM(eta=0.5),
    "ddim-eta-1": DDIM(eta=1.0),
}
ODE: dict[str, Solver] = {
    **{name: make_solver(name) for name in SOLVERS if name not in STOCHASTIC and not takes_statistics(name)},
    "dpm-solver-v3": DPMSolverV3(statistics()),
    "dpm-solver-pp-1": DPMSolverPP(steps=1),
    "dpm-solver-pp-2m-taylor": DPMSolverPP(steps=2, form="taylor"),
    "dpm-solver-pp-3m-taylor": DPMSolverPP(steps=3, form="taylor"),
    "dpm-solver-pp-3m-corrected": DPMSolverPP(steps=3, third_order="corrected"),
    "dpm-solver-pp-3m-corrected-taylor": DPMSolverPP(steps=3, form="taylor", third_order="corrected"),
    "dpm-solver-1m": DPMSolverM(steps=1),
    "dpm-solver-2m-taylor": DPMSolverM(steps=2, form="taylor"),
    "dpm-solver-3m-corrected": DPMSolverM(steps=3, third_order="corrected"),
    **{f"unipc-{p}-{weights}": UniPC(p, weights) for p, weights in product((1, 2, 3), ("bh1", "bh2", "exact"))},
    **{f"unip-{p}-{weights}": UniPC(p, weights, corrector=False) for p, weights in product((2, 3), ("bh1", "bh2", "exact"))},
    **{f"deis-{p}": DEIS(steps=p) for p in (1, 2, 4)},
    **{f"ipndm-{p}": IPNDM(steps=p) for p in (1, 2, 3)},
}
_ANY = any_statistics()
ANY_STATISTICS: dict[str, Solver] = {  # every variant, since the order of accuracy is the same for any statistics
    f"v3-{p}-{predictor}-{corrector}": DPMSolverV3(_ANY, p, predictor, corrector)
    for p, predictor, corrector in product((1, 2, 3), ("true", "pseudo"), ("none", "same", "pseudo", "true"))
}
SOME_STATISTICS = {  # each corrector once, for tests in which the variants have little of their own
    name: ANY_STATISTICS[name] for name in ("v3-1-true-none", "v3-2-true-true", "v3-3-pseudo-same", "v3-3-true-pseudo")
}
ALL = {**ODE, **SOME_STATISTICS, **STOCHASTIC}
WHOLE_REGISTRY = {name: ALL[name] for name in SOLVERS}


def never_lowered(solver: Solver) -> Solver:
    """The solver with its full order up to the end of every grid."""
    lowers = "lower_order_below" in {field.name for field in fields(solver)}
    return replace(solver, lower_order_below=NEVER) if lowers else solver


def mixture(schedule: NoiseSchedule) -> MixtureDenoiser:
    """Three overlapping Gaussians in the plane: curved trajectories, smooth enough for high orders to show at a few dozen steps."""
    means = torch.tensor([[0.8, 0.24], [-0.64, 0.48], [0.08, -0.88]], dtype=torch.float64)
    stds = torch.tensor([0.5, 0.7, 0.6], dtype=torch.float64)
    return MixtureDenoiser(schedule, means, stds, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


def karras_levels(steps: int, high: float, low: float) -> torch.Tensor:
    """Noise levels ``[steps+1]`` of unequal, smoothly varying steps; those of ``steps`` are among those of ``2 steps``."""
    return torch.linspace(high ** (1 / 7), low ** (1 / 7), steps + 1, dtype=torch.float64) ** 7


def noise(count: int, *shape: int) -> torch.Tensor:
    """Standard normal ``[count, *shape]`` in float64."""
    return seeded_noise(range(count), shape).double()


def moments(tableau: Tableau, denoiser: GaussianDenoiser, mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact mean and standard deviation ``[1]`` of the samples from a start of ``mean, std [1]``, for Gaussian data.

    Then samples are affine in the start and in the noise of every step: the variance is the sum of the squared responses to each.
    """
    evaluations = tableau.nodes.evaluations
    x = mean.repeat(evaluations + 2, 1)  # sample 0 sees no noise at all, sample 1 the start's, sample i + 2 that of step i
    x[1] += std
    impulses = torch.eye(evaluations + 2, dtype=torch.float64)[:, 2:, None]
    state = tableau.start(x)
    for i, row in enumerate(tableau.rows(x)):
        state = advance(row, state, denoiser(state.x, tableau.nodes.t[i]), impulses[:, i])
    return state.x[0], (state.x[1:] - state.x[0]).norm(dim=0)
