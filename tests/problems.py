"""The solvers, the toy models and the tools that tests share."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import Cube, Model, Tableau, VarianceExploding, advance, make_solver, seeded_noise
from fewstep.core.prediction import Measured
from fewstep.core.schedule import NoiseSchedule, VPLinear
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Solver
from fewstep.models.analytic import GaussianDenoiser, MixtureDenoiser
from fewstep.models.formats.folders import save_ours
from fewstep.models.guided import GuidedForm, guided_model
from fewstep.models.networks.calls import edm_time, unet_call
from fewstep.solvers import (
    ABM,
    DDIM,
    DDPM,
    DEIS,
    ERSDE,
    ETDRK4,
    IPNDM,
    LMS,
    PNDM,
    RES2S,
    RES3S,
    SEEDS2,
    SOLVERS,
    DPM2Ancestral,
    DPM2Churn,
    DPMSolverFast,
    DPMSolverM,
    DPMSolverPP,
    DPMSolverPP2SAncestral,
    DPMSolverPPSDE,
    DPMSolverV3,
    EulerAncestral,
    EulerChurn,
    ExponentialAB,
    GradientEstimation,
    Heun,
    HeunChurn,
    RESAncestral,
    Restart,
    SASolver,
    SASolverPECE,
    SDEDPMSolverPP2M,
    SDEDPMSolverPP3M,
    UniPC,
    takes_statistics,
)
from fewstep.solvers.stencil import NEVER

DSNO = str(Path(__file__).parents[1] / "assets" / "digits-dsno")  # an operator student of the repository
ATTENTION_UNET = {  # of two levels, the lower one with attention
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}
WALLS = VarianceExploding(t_min=0.01, t_max=3.0)  # of reflected models
MEASURED = [[math.log(0.01), 1.0, 0.01, 1.25], [math.log(0.5), 1.1, 0.4, 1.5], [math.log(3.0), 1.0, 0.001, 1.7]]  # coefficients of one
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
    **{name: make_solver(name) for name in ("ddpm", "lcm", "euler-ancestral", "dpm2-ancestral", "dpm-solver-pp-2s-ancestral")},
    **{name: make_solver(name) for name in ("dpm-solver-pp-sde", "sde-dpm-solver-pp-3m", "heun-churn", "seeds-2", "seeds-3", "sa-solver")},
    **{name: make_solver(name) for name in ("er-sde-1", "er-sde-2", "er-sde-3")},
    "sde-dpm-solver-pp-2m-eta-0.5": SDEDPMSolverPP2M(eta=0.5),
    "sde-dpm-solver-pp-3m-corrected": SDEDPMSolverPP3M(third_order="corrected", eta=0.5),
    "ddpm-large": DDPM(variance="large"),
    **{f"euler-ancestral-{eta}-flow": EulerAncestral(eta, law="flow") for eta in (0.5, 1.0)},
    "dpm2-ancestral-0.5": DPM2Ancestral(0.5),
    "res-multistep-ancestral-flow": RESAncestral(0.5, law="flow"),
    "dpm2-ancestral-flow": DPM2Ancestral(law="flow"),
    "dpm-solver-pp-2s-ancestral-flow": DPMSolverPP2SAncestral(0.7, law="flow"),
    "dpm-solver-pp-sde-exact": DPMSolverPPSDE(correlation="exact"),
    "dpm-solver-pp-sde-third": DPMSolverPPSDE(r=1 / 3, eta=0.5),
    **{name: make_solver(name) for name in ("euler-churn", "dpm2-churn", "sa-solver-pece", "restart", "res-multistep-ancestral")},
    "heun-churn-5": HeunChurn(s_churn=5.0, s_noise=1.0),
    "euler-churn-5": EulerChurn(s_churn=5.0, s_noise=1.0),
    "dpm2-churn-5": DPM2Churn(s_churn=5.0, s_noise=1.0, s_tmax=2.0),
    "er-sde-3-sde": ERSDE(steps=3, scale="sde"),
    "seeds-2-phi2": SEEDS2(eta=0.5, form="phi2"),
    "exp-heun-sde": SEEDS2(c2=1.0, form="phi2"),
    "sa-solver-3-4": SASolver(predictor=3, corrector=4),
    "sa-solver-3-simple": SASolver(predictor=3, corrector=2, tau=0.8, form="simple"),
    "sa-solver-pece-3-4": SASolverPECE(predictor=3, corrector=4, tau=0.8),
    "restart-32": Restart(restart_steps=32, restarts=2, restart_min=0.2, restart_max=1.0),
    "sa-solver-2-uncorrected": SASolver(predictor=2, corrector=0, tau_min=0.2, tau_max=1.0),
}
ODE: dict[str, Solver] = {
    **{name: make_solver(name) for name in SOLVERS if name not in STOCHASTIC and not takes_statistics(name)},
    "dpm-solver-v3": DPMSolverV3(statistics()),
    "dpm-solver-pp-1": DPMSolverPP(steps=1),
    "dpm-solver-pp-2m-taylor": DPMSolverPP(steps=2, form="taylor"),
    "dpm-solver-pp-3m-taylor": DPMSolverPP(steps=3, form="taylor"),
    "dpm-solver-pp-3m-corrected": DPMSolverPP(steps=3, third_order="corrected"),
    "dpm-solver-pp-3m-corrected-taylor": DPMSolverPP(steps=3, form="taylor", third_order="corrected"),
    "heun-flow": Heun(law="flow"),
    "dpm-solver-1m": DPMSolverM(steps=1),
    "dpm-solver-2m-taylor": DPMSolverM(steps=2, form="taylor"),
    "dpm-solver-3m-corrected": DPMSolverM(steps=3, third_order="corrected"),
    **{f"unipc-{p}-{weights}": UniPC(p, weights) for p, weights in product((1, 2, 3), ("bh1", "bh2", "exact"))},
    **{f"unip-{p}-{weights}": UniPC(p, weights, corrector=False) for p, weights in product((2, 3), ("bh1", "bh2", "exact"))},
    **{f"deis-{p}": DEIS(steps=p) for p in (1, 2, 4)},
    **{f"ipndm-{p}": IPNDM(steps=p) for p in (1, 2, 3)},
    **{f"lms-{p}": LMS(steps=p) for p in (1, 2, 3)},
    **{f"ipndm-v-{p}-published": LMS(steps=p, weights="published") for p in (2, 3)},
    **{f"abm-{p}": ABM(steps=p) for p in (1, 2, 4)},
    "exp-ab-1": ExponentialAB(steps=1),
    "etdrk-2": RES2S(c2=1.0),
    "res-3s-thirds": RES3S(c2=1 / 3, c3=2 / 3),
    "etdrk-4-krogstad": ETDRK4(form="krogstad"),
    "gradient-estimation-1.5": GradientEstimation(gamma=1.5),
    "pndm-runge-kutta": PNDM(warm_up="runge-kutta"),
    **{f"dpm-solver-fast-{rest}": DPMSolverFast(remainder=rest) for rest in (1, 2)},
}
TIMED = ("pndm-runge-kutta",)  # it evaluates at places that depend on the time of the noise law
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


class Tanh:
    """An elementwise denoiser, so that a sample cannot know its batch: ``x0 = tanh(x alpha)``. It remembers its calls.

    ``answer`` may change an estimate, given it and the number of the call from 1 on.
    """

    def __init__(self, schedule: NoiseSchedule | None = None, answer: Callable[[torch.Tensor, int], torch.Tensor] = lambda x0, call: x0):
        self.schedule, self.answer, self.calls = schedule or VPLinear(), answer, []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
        self.calls.append((x, t, cond))
        return self.answer(torch.tanh(x * self.schedule.alpha(t).to(x.dtype)), len(self.calls))


def reflected_model(**changes: Any) -> Model:
    """A small class-conditional network of random weights in the cube, as ``fewstep train --kind reflected`` makes it."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(**ATTENTION_UNET, num_class_embeds=4).eval().requires_grad_(False)
    facts = {"network": network, "schedule": WALLS, "prediction": Measured(MEASURED), "time": edm_time, "call": unet_call}
    facts |= {"shape": (1, 8, 8), "classes": 3, "null_label": 3, "domain": Cube(), "name": "tiny"}
    return Model(**{**facts, **changes})


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations in which any two levels of any two factors meet, far fewer than the full product.

    Greedy: each combination is the one with the most pairs that have not met yet.
    """
    sizes = [range(len(levels)) for levels in factors]
    left = {(a, i, b, j) for a, b in combinations(range(len(factors)), 2) for i in sizes[a] for j in sizes[b]}
    rows: list[tuple[int, ...]] = []
    while left:
        a, i, b, j = min(left)
        row: list[int | None] = [None] * len(factors)
        row[a], row[b] = i, j
        for k in (k for k in range(len(factors)) if row[k] is None):
            met = [m for m in range(len(factors)) if row[m] is not None]
            gains = [sum(((m, row[m], k, v) if m < k else (k, v, m, row[m])) in left for m in met) for v in sizes[k]]
            row[k] = gains.index(max(gains))
        left -= {(m, row[m], n, row[n]) for m, n in combinations(range(len(factors)), 2)}
        rows.append(tuple(row))
    return [tuple(levels[v] for levels, v in zip(factors, row, strict=True)) for row in rows]


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


# -- toy models ------------------------------------------------------------------------------------------------------

LAW = VarianceExploding(0.05, 20.0)  # noise levels of toys: few, so that few steps do


class Counted:
    """An analytic denoiser as a network, which counts its samples and calls, and can stop at a call or fail from one on."""

    def __init__(self, denoiser: MixtureDenoiser, stop: int = -1, bad: int = -1) -> None:
        self.denoiser, self.stop, self.bad, self.calls, self.samples, self.times = denoiser, stop, bad, 0, 0, set[float]()

    def __call__(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        self.calls, self.samples = self.calls + 1, self.samples + len(x)
        self.times.add(float(t[0]))
        if self.calls == self.stop:
            raise KeyboardInterrupt
        answer = self.denoiser(x, t[0].double()) * (torch.nan if 0 <= self.bad <= self.calls else 1)
        return answer if label is None else answer + (label.float() - 2)[:, None, None] / 10  # class 2 stands for none


def toy(schedule: NoiseSchedule = LAW, *, classes: int | None = None, **options: int) -> Model:
    """A mixture in four dimensions as a `Model`, whose network is `Counted`; with classes it can be guided."""
    means = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.8
    network = Counted(MixtureDenoiser(schedule, means, torch.full((4,), 0.25)), **options)
    return Model(network, schedule, "sample", shape=(2, 2), classes=classes, null_label=classes, name="toy", identity="toy")


UNET = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (16,), "norm_num_groups": 4, "layers_per_block": 1}
UNET |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}


def tiny_folder(folder: Path, classes: int | None = None, *, seed: int = 0, **options: object) -> Path:
    """A folder of ours with random weights, of samples ``(1, 4, 4)``; conditional ones have a null label."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(seed)
    network = UNet2DModel(**{**UNET, **options}, num_class_embeds=None if classes is None else classes + 1)
    save_ours(folder, network, "edm(0.5)", LAW, (1, 4, 4), classes)
    return folder


def told_model(teacher: Model, form: GuidedForm | None = None, seed: int | None = 0) -> Model:
    """A copy of a teacher that is told its guidance scale, by random weights of a seed; a new one without."""
    network = copy.deepcopy(teacher.network)
    made = guided_model(replace(teacher, network=network, folder=None), form or GuidedForm())
    if seed is not None:
        torch.manual_seed(seed)
        for weight in made.network.embeddings.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    made.network.eval().requires_grad_(False)
    return replace(made, name="told")


def frozen(told: Model, scale: float) -> Model:
    """A plain model that answers what one that is told its scale answers at one."""
    return replace(told, call=replace(told.call, scale=scale), scales=None)


def diffusers_folder(folder: Path, classes: int | None = None, **options: object) -> Path:
    """A diffusers folder with random weights that predicts the noise; it has no null label."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    torch.manual_seed(0)
    UNet2DModel(**{**UNET, **options}, num_class_embeds=classes).save_pretrained(folder / "unet")
    DDPMScheduler(num_train_timesteps=200, prediction_type="epsilon").save_pretrained(folder / "scheduler")
    return folder


def count_arithmetic_once(patch: pytest.MonkeyPatch) -> None:
    """Operations of a student depend on its shapes alone: those of one are counted once for all that are alike."""
    from fewstep.models.networks.operator import OperatorStudent

    real, known = OperatorStudent.arithmetic, dict[str, float]()

    def arithmetic(student: OperatorStudent, passes: Sequence[float] | torch.Tensor) -> float:
        key = repr((student.form, student.times.tolist(), torch.as_tensor(passes).tolist(), sorted(student.operator.unet.config.items())))
        if key not in known:
            known[key] = real(student, passes)
        return known[key]

    patch.setattr(OperatorStudent, "arithmetic", arithmetic)


def names(folder: Path) -> set[str]:
    """What lies in a folder, but its lock."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but locks; of safetensors the header is sorted, since its order is nobody's."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            data = path.read_bytes()
            if path.suffix == ".safetensors" and len(data) > 8:
                size = 8 + int.from_bytes(data[:8], "little")
                data = json.dumps(json.loads(data[8:size]), sort_keys=True).encode() + data[size:]
            found[str(path.relative_to(folder))] = data
    return found
