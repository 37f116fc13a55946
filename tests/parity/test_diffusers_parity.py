"""The same samples as diffusers' schedulers, digit for digit but for rounding, and where those deviate from the plain formula.

Two comparisons: their ``step`` on our levels (`run_peer`), and theirs as their users run them against ours with named options.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tests.problems import pairwise
from torch import Tensor, nn

from fewstep import (
    DiscreteVP,
    FewstepError,
    Model,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    load_model,
    make_solver,
    sample,
    seeded_noise,
    start_noise,
)
from fewstep.evaluate.benchmark.peers import PEERS, peer_steps, run_peer
from fewstep.models.analytic import MixtureDenoiser
from fewstep.models.networks.calls import unet_call
from fewstep.solvers import SOLVERS

STEPS = (5, 8, 10, 20)  # on both sides of 15, where diffusers changes its order rule
RUNS = [(torch.float32, (5, 20)), pytest.param(torch.float32, (8, 10), marks=pytest.mark.slow), (torch.float64, (8, 10))]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over largest value; infinite where a value is not finite."""
    difference = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
    return difference if math.isfinite(difference) else math.inf


# -- their step, our levels ---------------------------------------------------------------------------------------------

GRIDS = {
    "edm": (VarianceExploding(), TimeGrid.karras),
    "discrete": (DiscreteVP.linear(), TimeGrid.linspace),
    "flow": (RectifiedFlow(), lambda schedule, steps: TimeGrid.uniform(schedule, steps, t_max=0.999, t_min=0.001)),
}
ROUNDS_TO_FLOAT32 = {"dpm-solver-pp-2m", "dpm-solver-pp-3m", "euler", "edm-euler"}  # what their step does to the state
SAME = {name: name.removeprefix("edm-") for name in PEERS if name.removeprefix("edm-") in SOLVERS}  # those that this library has too


def mixture(schedule: Any) -> MixtureDenoiser:
    means = seeded_noise(range(6), (1, 4, 4)).double()
    return MixtureDenoiser(schedule, means, torch.full((6,), 0.2, dtype=torch.float64))


@pytest.mark.parametrize(("name", "law", "steps", "ends_clean"), pairwise(list(SAME), list(GRIDS), STEPS, (False, True)))
@pytest.mark.every(5)
def test_a_peer_on_our_levels_gives_our_samples(name: str, law: str, steps: int, ends_clean: bool) -> None:
    schedule, spacing = GRIDS[law]
    denoiser, grid = mixture(schedule), spacing(schedule, steps)
    grid = grid.to_clean(schedule) if ends_clean else grid
    sampler = Sampler.build(make_solver(SAME[name]), grid, schedule)
    x = start_noise(sampler.tableau.nodes, range(100, 104), (1, 4, 4)).double()
    if ends_clean and not PEERS[name].to_clean:
        with pytest.raises(SolverError, match="sigma = 0"):
            run_peer(name, denoiser, grid, x)
        return
    theirs = run_peer(name, denoiser, grid, x)
    assert theirs.dtype == torch.float64
    assert relative(sample(denoiser, sampler, x), theirs) < (1e-5 if name in ROUNDS_TO_FLOAT32 else 1e-10)
    assert peer_steps(name, sampler.nfe, to_clean=ends_clean) == steps


def test_a_peer_makes_the_evaluations_it_is_said_to_make() -> None:
    schedule, spacing = GRIDS["edm"]
    exact, times = mixture(schedule), []

    class Counted:
        schedule = exact.schedule

        def __call__(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            times.append(float(t))
            assert cond == "condition"
            return exact(x, t)

    for name in PEERS:
        times.clear()
        x = run_peer(name, Counted(), spacing(schedule, peer_steps(name, 6)), torch.zeros(1, 1, 4, 4), "condition")
        assert len(times) == 6 and times[0] == schedule.t_max and x.dtype == torch.float32


def test_a_peer_names_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = RectifiedFlow()
    denoiser, x = mixture(schedule), torch.zeros(1, 1, 4, 4)
    with pytest.raises(SolverError, match="did you mean unipc-"):
        run_peer("unipc", denoiser, TimeGrid.uniform(schedule, 5, t_max=0.9), x)
    with pytest.raises(SolverError, match="did you mean heun"):
        peer_steps("heunn", 4)
    with pytest.raises(SolverError, match="use 4 or 6"):
        peer_steps("heun", 5)
    with pytest.raises(SolverError, match="alpha = 0"):
        run_peer("ddim", denoiser, TimeGrid.uniform(schedule, 5), x)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(FewstepError, match="pip install"):
        run_peer("ddim", denoiser, TimeGrid.uniform(schedule, 5, t_max=0.9), x)


# -- as their users run them --------------------------------------------------------------------------------------------


class TinyUNet(nn.Module):
    """A ``UNet2DModel`` with random weights, added to the answer for normal data so that samples stay of size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(16,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=8,
            add_attention=False,
        )

    def forward(self, x: Tensor, time: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        u = time.to(x.dtype).reshape(-1, 1, 1, 1) / 1000
        sigma = torch.sqrt(-torch.expm1(-0.1 * u - 9.95 * u**2))
        return (sigma * x + self.unet(x, time, return_dict=False)[0],)


@pytest.fixture(scope="module")
def ddpm_unet() -> nn.Module:
    """An epsilon network for 1000 linear betas on 1x8x8 images, called as diffusers' ``UNet2DModel`` is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyUNet().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained_unet() -> nn.Module:
    """The network of the bundled model, read once."""
    return load_model("digits-ddpm").network


@dataclass(frozen=True)
class Case:
    """A scheduler as diffusers' users make it, and the solver, grid, time and start that say the same here."""

    scheduler: str
    options: dict[str, Any]
    solver: str
    grid: Callable[[DiscreteVP, int, Any], TimeGrid]  # from the schedule, the steps, and the scheduler after set_timesteps
    solver_options: dict[str, Any] = field(default_factory=dict)
    time: Callable[[Any], Callable[[Tensor], Tensor]] | None = None  # the network's time where it is not the schedule's
    start: str = "unit"  # unit: the noise itself, as if sigma_T were 1; sigma: sigma_T times the noise, as `start_noise` has it


def linspace(end: str) -> Callable[[DiscreteVP, int, Any], TimeGrid]:
    if end == "zero":
        return lambda schedule, steps, _: TimeGrid.linspace(schedule, steps).to_clean(schedule)
    return lambda schedule, steps, _: TimeGrid.linspace(schedule, steps)


def own_times(schedule: DiscreteVP, steps: int, scheduler: Any) -> TimeGrid:
    """The scheduler's timesteps and then the clean image."""
    return TimeGrid([*scheduler.timesteps.tolist(), schedule.t_clean])


def own_sigmas(schedule: DiscreteVP, steps: int, scheduler: Any) -> TimeGrid:
    """The scheduler's noise levels (Heun's holds each inner one twice)."""
    return TimeGrid.from_sigmas(schedule, torch.unique_consecutive(scheduler.sigmas.double()))


def stepped(end: float) -> Callable[[DiscreteVP, int, Any], TimeGrid]:
    """PNDM's steps, whose starts its timesteps repeat, and then the time ``end``."""
    return lambda schedule, steps, scheduler: TimeGrid([*scheduler._timesteps[::-1].tolist(), end])


def interpolated(scale: Callable[[np.ndarray], np.ndarray], rounded: bool = False) -> Callable[[Any], Callable[[Tensor], Tensor]]:
    """The network's time at a level between two of the table's: linear in a ``scale`` of ``sigma/alpha``.

    Ours is linear in ``arctan(sigma/alpha)``, so the same level has another fractional time.
    """

    def of(scheduler: Any) -> Callable[[Tensor], Tensor]:
        schedule = DiscreteVP.from_alphas_cumprod(scheduler.alphas_cumprod)
        table = scale(torch.exp(-schedule.lam(schedule.times[1:])).numpy())

        def time(t: Tensor) -> Tensor:
            value = np.interp(scale(torch.exp(-schedule.lam(t)).numpy()), table, np.arange(len(table)))
            return torch.as_tensor(value.round() if rounded else value, dtype=torch.float64)

        return time

    return of


def dpm(order: int, grid: Any, solver_options: dict[str, Any] | None = None, **options: Any) -> Case:
    options["solver_order"] = order
    return Case("DPMSolverMultistepScheduler", options, f"dpm-solver-pp-{order}m", grid, solver_options or {})


def unipc(order: int, grid: Any, solver_options: dict[str, Any] | None = None, **options: Any) -> Case:
    options["solver_order"] = order
    return Case("UniPCMultistepScheduler", options, f"unipc-{order}", grid, solver_options or {})


def exploding(scheduler: str, solver: str, spacing: str) -> Case:
    """Euler or Heun: the start is ``sigma_T`` times the noise for linspace and trailing, the noise itself for leading (offset 1)."""
    options = {"timestep_spacing": spacing, "beta_start": 1e-4, "beta_end": 0.02, "steps_offset": int(spacing == "leading")}
    time = interpolated(lambda level: level) if spacing == "linspace" else None
    return Case(scheduler, options, solver, own_sigmas, {}, time, "unit" if spacing == "leading" else "sigma")


def halved(scheduler: str, spacing: str) -> Case:
    """A method with a stage half-way in the logarithm of the level."""
    return replace(exploding(scheduler, scheduler, spacing), time=interpolated(np.log))


DDIM = {"clip_sample": False}  # the default clips x0 to [-1, 1]
NEVER = {"lower_order_below": 0}
CASES = {
    # DDIM steps by T // steps from each timestep, whatever the next one is: only spacings with that stride (leading, and
    # trailing where steps divides T) are the method on a grid. With linspace the network is told another time than the state has.
    "ddim-leading": Case(
        "DDIMScheduler", DDIM, "ddim", lambda schedule, steps, _: TimeGrid.leading(schedule, steps, offset=0, t_min=schedule.t_clean)
    ),
    "ddim-leading-offset": Case("DDIMScheduler", {**DDIM, "steps_offset": 1}, "ddim", own_times),
    # set_alpha_to_one=False ends at time 0: with offset 0 the last step goes from 0 to 0, an evaluation that changes nothing.
    "ddim-leading-offset-to-time-0": Case(
        "DDIMScheduler",
        {**DDIM, "steps_offset": 1, "set_alpha_to_one": False},
        "ddim",
        lambda schedule, steps, _: TimeGrid.leading(schedule, steps),
    ),
    "ddim-leading-to-time-0-wasted-last": Case(
        "DDIMScheduler", {**DDIM, "set_alpha_to_one": False}, "ddim", lambda schedule, steps, scheduler: TimeGrid(scheduler.timesteps)
    ),
    "ddim-trailing": Case(
        "DDIMScheduler",
        {**DDIM, "timestep_spacing": "trailing"},
        "ddim",
        lambda schedule, steps, _: TimeGrid.trailing(schedule, steps).to_clean(schedule),
    ),
    # DPM-Solver++: times rounded to integers; the last orders lowered below 15 steps; a last step to sigma = 0 is always Euler's.
    "dpm2-zero": dpm(2, linspace("zero")),
    "dpm2-zero-keep-order": dpm(2, linspace("zero"), NEVER, lower_order_final=False),
    "dpm2-sigma-min": dpm(2, linspace("sigma_min"), final_sigmas_type="sigma_min"),
    "dpm2-sigma-min-keep-order": dpm(2, linspace("sigma_min"), NEVER, final_sigmas_type="sigma_min", lower_order_final=False),
    "dpm2-taylor": dpm(2, linspace("zero"), {"form": "taylor"}, solver_type="heun"),
    "dpm3-zero": dpm(3, linspace("zero")),
    "dpm3-zero-keep-order": dpm(3, linspace("zero"), NEVER, lower_order_final=False),
    "dpm3-sigma-min": dpm(3, linspace("sigma_min"), final_sigmas_type="sigma_min"),
    "dpm3-sigma-min-keep-order": dpm(3, linspace("sigma_min"), NEVER, final_sigmas_type="sigma_min", lower_order_final=False),
    "dpm2-trailing": dpm(2, lambda s, steps, _: TimeGrid.trailing(s, steps).to_clean(s), timestep_spacing="trailing"),
    # Their leading is DDIM's of one step more without its last time, so it is given by its times.
    "dpm2-leading": dpm(2, own_times, timestep_spacing="leading", steps_offset=1),
    # Karras levels are exact, but the network is told the nearest integer time.
    "dpm2-karras": Case(
        "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpm-solver-pp-2m", own_sigmas, time=interpolated(np.log, rounded=True)
    ),
    # UniPC lowers the last orders whatever the number of steps. To sigma = 0 without that, or with bh1, theirs is not finite.
    "unipc2-zero": unipc(2, linspace("zero")),
    "unipc2-sigma-min": unipc(2, linspace("sigma_min"), final_sigmas_type="sigma_min"),
    "unipc2-sigma-min-keep-order": unipc(2, linspace("sigma_min"), NEVER, final_sigmas_type="sigma_min", lower_order_final=False),
    "unipc2-bh1": unipc(2, linspace("sigma_min"), {"weights": "bh1"}, final_sigmas_type="sigma_min", solver_type="bh1"),
    "unipc3-zero": unipc(3, linspace("zero")),
    "unipc3-sigma-min-keep-order": unipc(3, linspace("sigma_min"), NEVER, final_sigmas_type="sigma_min", lower_order_final=False),
    # DEIS always ends at time 0, never at sigma = 0; orders lowered below 15 steps.
    "deis3": Case("DEISMultistepScheduler", {"solver_order": 3}, "deis-3", linspace("sigma_min")),
    "deis3-keep-order": Case(
        "DEISMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, "deis-3", linspace("sigma_min"), NEVER
    ),
    # Euler and Heun: linspace has fractional times, at which sigma/alpha (float32) is interpolated linearly.
    **{f"euler-{spacing}": exploding("EulerDiscreteScheduler", "euler", spacing) for spacing in ("linspace", "leading", "trailing")},
    **{f"heun-{spacing}": exploding("HeunDiscreteScheduler", "heun", spacing) for spacing in ("linspace", "leading", "trailing")},
    # LMS extrapolates with its full order to sigma = 0.
    **{f"lms-{spacing}": exploding("LMSDiscreteScheduler", "lms", spacing) for spacing in ("linspace", "leading", "trailing")},
    # KDPM2 tells the network a time that is linear in the logarithm of the level.
    **{f"kdpm2-{spacing}": halved("KDPM2DiscreteScheduler", spacing) for spacing in ("leading", "trailing")},
    # PNDM ends at time 0 unless told otherwise. Its Runge-Kutta start halves a stride of whole timesteps, which must be even.
    "pndm": Case("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, "pndm", stepped(0)),
    "pndm-zero": Case("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": True}, "pndm", stepped(-1)),
    "pndm-runge-kutta": Case("PNDMScheduler", {"steps_offset": 1}, "PNDMScheduler", stepped(0)),
    "pndm-runge-kutta-zero": Case("PNDMScheduler", {"steps_offset": 1, "set_alpha_to_one": True}, "PNDMScheduler", stepped(-1)),
}
# In float32 the two round differently: every step by about 1e-7 of the sample, which a third-order polynomial amplifies where the
# grid's last step is long (to 7e-6 where its order is kept), and DEIS, whose coefficients diffusers takes from differences of large
# float32 numbers, by 4e-6 to 6e-6 in 20 steps. In float64 what remains is the rounding to float32 of diffusers' levels, and of the
# state in its DPM-Solver's and Euler's steps.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}
HALF_WAY = 5e-6  # in float64: KDPM2's levels and times half-way in a step stay float32; measured 1.3e-6
TRAINED_TOLERANCE = {torch.float32: 1e-5, torch.float64: 3e-6}


def theirs(case: Case, network: nn.Module, noise: Tensor, steps: int, *, widen: bool = False) -> tuple[Any, Tensor]:
    """The scheduler after its run, and its sample, by the loop of diffusers' pipelines.

    For float64 noise, or if asked to, the scheduler's tables are widened, so that its coefficients are computed in float64.
    """
    scheduler = getattr(diffusers, case.scheduler)(**case.options)
    scheduler.set_timesteps(steps)
    for table in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if (widen or noise.dtype == torch.float64) and hasattr(scheduler, table):
            setattr(scheduler, table, getattr(scheduler, table).double())
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = unet_call(network, scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x).prev_sample
    return scheduler, x


def ours(case: Case, network: nn.Module, noise: Tensor, steps: int, scheduler: Any, other: dict[str, Any] | None = None) -> Tensor:
    """The same by `fewstep.sample`."""
    schedule = DiscreteVP.from_alphas_cumprod(scheduler.alphas_cumprod)
    time = {} if case.time is None else {"time": case.time(scheduler)}
    denoiser = Model(network, schedule, "epsilon", call=unet_call, **time)
    solver = make_solver(case.solver, **{**case.solver_options, **(other or {})})
    sampler = Sampler.build(solver, case.grid(schedule, steps, scheduler), schedule)
    x = noise if case.start == "unit" else noise * float(sampler.tableau.nodes.sigma[0])
    return sample(denoiser, sampler, x)


# What numpy 2 says to diffusers' code. Anything else is still an error.
quiet = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning", "ignore:__array_wrap__ must:DeprecationWarning")


@quiet
@pytest.mark.parametrize(("dtype", "counts"), RUNS, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.every(11, 3)
def test_diffusers_as_its_users_run_it(name: str, dtype: torch.dtype, counts: tuple[int, ...], ddpm_unet: nn.Module) -> None:
    network, noise = ddpm_unet.to(dtype), seeded_noise([0], (1, 8, 8)).to(dtype)
    for steps in counts:
        if "runge-kutta" in name and 1000 // steps % 2:
            continue
        scheduler, expected = theirs(CASES[name], network, noise, steps)
        tolerance = max(TOLERANCE[dtype], HALF_WAY) if name.startswith("kdpm2") else TOLERANCE[dtype]
        assert relative(ours(CASES[name], network, noise, steps, scheduler), expected) < tolerance


@quiet
@pytest.mark.parametrize(
    "name", ["ddim-leading", "dpm2-zero", "dpm2-sigma-min", "dpm3-zero", "unipc2-zero", "deis3", "euler-linspace", "heun-linspace"]
)
@pytest.mark.parametrize(("dtype", "counts"), [(torch.float32, (20,)), (torch.float64, (8,))], ids=str)
@pytest.mark.slow
def test_the_same_on_the_bundled_trained_model(name: str, dtype: torch.dtype, counts: tuple[int, ...], trained_unet: nn.Module) -> None:
    """A trained network amplifies what rounding remains: DEIS's (see TOLERANCE) to 2e-5 in 20 steps, so its tables are widened."""
    network, noise = trained_unet.to(dtype), seeded_noise([0, 1], (1, 8, 8)).to(dtype)
    for steps in counts:
        scheduler, expected = theirs(CASES[name], network, noise, steps, widen=name == "deis3")
        assert relative(ours(CASES[name], network, noise, steps, scheduler), expected) < TRAINED_TOLERANCE[dtype]


@quiet
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("dpm2-sigma-min", {"lower_order_below": 0}),
        ("dpm2-zero", {"form": "taylor"}),
        ("dpm3-zero", {"third_order": "corrected"}),
        ("unipc2-zero", {"weights": "exact"}),
        ("unipc2-zero", {"corrector": False}),
        ("deis3", {"lower_order_below": 0}),
        ("deis3", {"steps": 2}),
        ("lms-leading", {"euler_at_clean": True}),
        ("pndm", {"warm_up": "runge-kutta"}),
    ],
)
@pytest.mark.every(4)
def test_any_other_option_is_seen(name: str, other: dict[str, Any], ddpm_unet: nn.Module) -> None:
    """The network is not so tame that every formula would agree."""
    network, noise = ddpm_unet.float(), seeded_noise([0], (1, 8, 8))
    scheduler, expected = theirs(CASES[name], network, noise, 8)
    assert relative(ours(CASES[name], network, noise, 8, scheduler, other), expected) > 1e-4


@quiet
@pytest.mark.parametrize("steps", STEPS)
def test_the_sde_solver_with_the_same_noises(steps: int, ddpm_unet: nn.Module) -> None:
    network, noise, seeds = ddpm_unet.double(), seeded_noise([3], (1, 8, 8)).double(), [3]
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(steps)
    x = noise
    for i, t in enumerate(scheduler.timesteps):
        draw = seeded_noise(seeds, (1, 8, 8), stream=i + 1).double()
        x = scheduler.step(unet_call(network, x, t), t, x, variance_noise=draw).prev_sample
    schedule = DiscreteVP.from_alphas_cumprod(scheduler.alphas_cumprod)
    sampler = Sampler.build(make_solver("sde-dpm-solver-pp-2m"), TimeGrid.linspace(schedule, steps).to_clean(schedule), schedule)
    result = sample(Model(network, schedule, "epsilon", call=unet_call), sampler, noise, seeds=seeds)
    assert relative(result, x) < TOLERANCE[torch.float32]


@quiet
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_eta_and_the_same_noises(eta: float, ddpm_unet: nn.Module) -> None:
    network, noise, seeds, steps = ddpm_unet.double(), seeded_noise([3], (1, 8, 8)).double(), [3], 10
    scheduler = diffusers.DDIMScheduler(**DDIM)
    scheduler.set_timesteps(steps)
    x = noise
    for i, t in enumerate(scheduler.timesteps):
        draw = seeded_noise(seeds, (1, 8, 8), stream=i + 1).double()
        x = scheduler.step(unet_call(network, x, t), t, x, eta=eta, variance_noise=draw).prev_sample
    schedule = DiscreteVP.from_alphas_cumprod(scheduler.alphas_cumprod)
    sampler = Sampler.build(make_solver("ddim", eta=eta), own_times(schedule, steps, scheduler), schedule)
    result = sample(Model(network, schedule, "epsilon", call=unet_call), sampler, noise, seeds=seeds)
    assert relative(result, x) < TOLERANCE[torch.float32]
