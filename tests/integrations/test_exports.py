"""Each program's list, read back by that program's own rule, is the levels of the sampler; what does not travel is refused."""

import inspect
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tests.apps.conftest import run

from fewstep import (
    DiscreteVP,
    GridError,
    Model,
    NoiseSchedule,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    VPLinear,
    sample,
)
from fewstep.integrations.exports import (
    COMFYUI,
    K_DIFFUSION,
    TARGETS,
    check_levels,
    export,
    saved_samplers,
    to_comfyui,
    to_diffusers,
    to_kdiffusion,
    to_sdcpp,
    to_sigmas,
    to_times,
    to_vllm_omni,
)
from fewstep.integrations.kdiffusion import Law, sample_fewstep, sigmas_for
from fewstep.models.zoo import WEIGHTS
from fewstep.runtime.errors import ArtifactError, FewstepError

FITTED = WEIGHTS / "digits-edm" / "fitted"
TABLE = DiscreteVP.scaled_linear().to_clean()  # Stable Diffusion's
EDM = VarianceExploding()
FLOW = RectifiedFlow(shift=3.0)
MAKERS = [1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031, 0.0]  # a list such as distilled flows come with


def made(schedule: NoiseSchedule, solver: str = "euler", grid: TimeGrid | str = "angle", nfe: int = 5) -> Sampler:
    return Sampler.build(solver, grid, schedule, nfe=nfe if isinstance(grid, str) else None)


def levels(sampler: Sampler, law: Law) -> list[float]:
    return sigmas_for(sampler, law=law).tolist()


# -- the rule of each program -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "law"), [(TABLE, "eps"), (EDM, "eps"), (FLOW, "flow")])
def test_sigmas(schedule, law):
    sampler = made(schedule, "unipc-2")
    done = to_sigmas(sampler)
    assert (done.law, done.solver, done.argument) == (law, "unipc-2", "sigmas") and "unipc-2" in done.use
    assert np.float32(done.text.split(", ")).tolist() == levels(sampler, law) == np.float32(done.values).tolist()
    if law == "eps":
        back = TimeGrid.from_sigmas(schedule, done.values)
        torch.testing.assert_close(schedule.sigma(back.t), schedule.sigma(sampler.grid.t), rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", [TABLE, EDM])
def test_kdiffusion(schedule):
    """``sigma/alpha``, a Python list; a 0 at its end where the sampler ends at the clean image."""
    sampler = made(schedule)
    done = to_kdiffusion(sampler)
    assert done.solver == "sample_euler" and torch.tensor(json.loads(done.text)).tolist() == levels(sampler, "eps")
    assert (done.values[-1] == 0) == (schedule is TABLE)
    with pytest.raises(GridError, match="start at pure noise"):
        to_kdiffusion(made(FLOW))


@pytest.mark.parametrize(("schedule", "law"), [(TABLE, "eps"), (FLOW, "flow"), (RectifiedFlow(), "flow")])
def test_comfyui(schedule, law):
    """Decimals, separated by whatever is no part of one: an exponent would be read as a number of its own."""
    sampler = made(schedule, grid=TimeGrid(torch.tensor([schedule.t_max, 0.5, 0.3e-5, schedule.t_clean], dtype=torch.float64)))
    done = to_comfyui(sampler)
    read = [float(word) for word in re.findall(r"[-+]?\d*\.?\d+", done.text)]
    assert torch.tensor(read).tolist() == levels(sampler, law) and done.solver == "euler" and done.law == law
    assert re.fullmatch(r"[\d., ]+", done.text)


def test_sdcpp():
    """Levels with commas between them; one step less than there are levels."""
    sampler = made(TABLE, "heun", nfe=7)
    done = to_sdcpp(sampler)
    assert torch.tensor([float(word) for word in done.text.split(",")]).tolist() == levels(sampler, "eps")
    assert f"--steps {sampler.grid.steps} --sampling-method heun --sigmas" in done.use and " " not in done.text
    assert to_sdcpp(made(FLOW)).values[0] == 1


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"shift": 7.5}, {"use_dynamic_shifting": True}])
@pytest.mark.parametrize("schedule", [RectifiedFlow(), FLOW])
def test_diffusers_flow(schedule, config):
    """``FlowMatchEulerDiscreteScheduler`` shifts what it is given, and appends the 0."""
    sampler = made(schedule)
    mu = 1.15 if config.get("use_dynamic_shifting") else None
    done = to_diffusers(sampler, config.get("shift") if mu is None else math.exp(mu))
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=json.loads(done.text), mu=mu)
    torch.testing.assert_close(scheduler.sigmas.double(), schedule.sigma(sampler.grid.t), rtol=1e-6, atol=0)
    assert len(done.values) == sampler.grid.steps and done.solver == "FlowMatchEulerDiscreteScheduler"


def test_diffusers_flow_without_its_shift():
    """The scheduler that is advised by default takes the levels to the last digit, whatever the pipeline's did."""
    sampler = made(FLOW)
    done = to_diffusers(sampler)
    (options,) = re.findall(r"config, (shift=.*?)\); pipe", done.use)
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02, use_karras_sigmas=True)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(theirs.config, **eval(f"dict({options})"))
    scheduler.set_timesteps(sigmas=json.loads(done.text), mu=1.15)  # a pipeline passes it still
    assert scheduler.sigmas.tolist() == levels(sampler, "flow")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, with numpy 2
def test_diffusers_table():
    theirs = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for grid in ("trailing", "angle"):
        sampler = made(TABLE, "ddim", grid)
        scheduler = EulerDiscreteScheduler(**theirs)
        done = to_diffusers(sampler)
        scheduler.set_timesteps(sigmas=json.loads(done.text))
        assert scheduler.sigmas.tolist() == levels(sampler, "eps") and done.solver == "EulerDiscreteScheduler"
        torch.testing.assert_close(scheduler.timesteps.double(), sampler.grid.t[:-1], atol=2e-2, rtol=0)  # by its own interpolation
    sampler = made(TABLE, "dpm-solver-pp-3m", "trailing", 8)
    done = to_diffusers(sampler)
    assert done.argument == "timesteps" and "solver_order=3" in done.use and "final_sigmas_type='zero'" in done.use
    scheduler = DPMSolverMultistepScheduler(**theirs, solver_order=3)
    scheduler.set_timesteps(timesteps=json.loads(done.text))
    assert scheduler.timesteps.tolist() == sampler.grid.t[:-1].tolist()
    torch.testing.assert_close(scheduler.sigmas, sigmas_for(sampler), rtol=1e-5, atol=0)  # of a table in float32
    assert "final_sigmas_type='sigma_min'" in to_diffusers(made(DiscreteVP.scaled_linear(), "dpm-solver-pp-2m", "linspace")).use
    between = TimeGrid(torch.tensor([900.5, 300.0, -1.0]))
    with pytest.raises(GridError, match=r"cuts times to whole numbers, and this sampler evaluates at 900\.5"):
        to_diffusers(made(TABLE, "dpm-solver-pp-2m", between))
    for option in ("third_order=corrected", "lower_order_below=6"):
        with pytest.raises(SolverError, match=f"diffusers has no solver that is dpm-solver-pp-3m:{option}"):
            to_diffusers(made(TABLE, f"dpm-solver-pp-3m:{option}", "trailing"))
    assert to_diffusers(made(TABLE, "dpm-solver-pp-2m", between), levels_only=True).argument == "sigmas"


def test_vllm_omni():
    """As diffusers' flow scheduler with a ``mu``, which a request cannot turn off."""
    sampler, mu = made(FLOW), 0.8
    done = to_vllm_omni(sampler, math.exp(mu))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=json.loads(done.text), mu=mu)
    torch.testing.assert_close(scheduler.sigmas.double(), FLOW.sigma(sampler.grid.t), rtol=1e-6, atol=0)
    assert f"num_inference_steps={sampler.grid.steps}" in done.use


@pytest.mark.parametrize("schedule", [RectifiedFlow(), FLOW])
def test_times(schedule):
    """Euler's method from noise at 0 to data at 1, at the list's times: what text-to-speech flows integrate."""
    sampler = made(schedule, nfe=6)
    done = to_times(sampler)
    times = torch.tensor(json.loads(done.text), dtype=torch.float64)
    assert done.argument == "times" and done.solver == "euler" and times[0] == 0 and times[-1] == 1 and bool((times.diff() > 0).all())
    velocity = lambda t, x: torch.tanh(x * (1 + t)) - x  # noqa: E731 - towards the data
    x = start = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for now, after in zip(times, times[1:], strict=False):
        x = x + (after - now) * velocity(now, x)
    network = lambda x, t: velocity(t.reshape(-1, 1, 1), x)  # noqa: E731
    model = Model(network, schedule, "reversed-flow", shape=(3, 4), time=schedule.alpha)
    torch.testing.assert_close(sample(model, sampler, start), x, rtol=1e-6, atol=1e-6)


def test_unipc_of_a_flow_stays():
    """Diffusers' UniPC takes a flow's sigmas, but tells its network other times: cut, and never that of pure noise."""
    theirs = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    if "sigmas" in inspect.signature(theirs.set_timesteps).parameters:  # not in diffusers 0.36
        theirs.set_timesteps(sigmas=np.array([1.0, 0.5625, 0.25]))  # a list is a TypeError
        assert theirs.timesteps.tolist() == [999, 562, 250]
    sampler = made(FLOW, "unipc-2")
    with pytest.raises(SolverError, match=r"cuts the times that its network is told .* 562 at 0.5625.*FewstepScheduler.from_sampler"):
        to_diffusers(sampler)
    assert to_diffusers(sampler, levels_only=True).solver is None


# -- a list is never altered --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sigmas", "comfyui", "sdcpp", "diffusers", "vllm-omni"])
def test_a_makers_list_comes_back_as_it_was(target):
    sampler = made(RectifiedFlow(), grid=TimeGrid(torch.tensor(MAKERS, dtype=torch.float64)))
    done = export(sampler, target, shift=1.0 if target == "vllm-omni" else None)
    whole = MAKERS[:-1] if target in ("diffusers", "vllm-omni") else MAKERS
    assert list(done.values) == whole
    assert [float(word) for word in re.findall(r"[\d.]+", done.text)] == whole


def test_a_makers_list_before_a_shift_comes_back_before_it():
    sampler = made(FLOW, grid=TimeGrid(torch.tensor(MAKERS, dtype=torch.float64)))
    assert list(to_diffusers(sampler, FLOW.shift).values) == MAKERS[:-1]


@pytest.mark.parametrize("schedule", [TABLE, EDM, VPLinear(), FLOW])
def test_explicit_sigmas_come_back_to_the_last_digit(schedule):
    draw = torch.Generator().manual_seed(1)
    for _ in range(50):
        given = torch.rand(8, generator=draw).mul(5).sub(3.5).exp().sort(descending=True).values  # float32, 0.03 to 4.5
        sampler = made(schedule, grid=TimeGrid.from_sigmas(schedule, [*given.tolist(), 0.0]))
        wanted = given.double() / (1 + given.double()) if schedule is FLOW else given
        assert np.float32(export(sampler, "sigmas").values).tolist() == [*wanted.float().tolist(), 0.0]


# -- the solvers that are named there -----------------------------------------------------------------------------------


def k_euler(model, x, sigmas):
    for s, t in zip(sigmas, sigmas[1:], strict=False):
        x = x + (x - model(x, s)) / s * (t - s)
    return x


def k_heun(model, x, sigmas):
    for s, t in zip(sigmas, sigmas[1:], strict=False):
        d = (x - model(x, s)) / s
        predicted = x + d * (t - s)
        x = predicted if t == 0 else x + (d + (predicted - model(predicted, t)) / t) / 2 * (t - s)
    return x


def k_dpmpp_2m(model, x, sigmas):
    old = last = None
    for s, t in zip(sigmas, sigmas[1:], strict=False):
        denoised, h = model(x, s), (s / t).log()
        mixed = denoised
        if old is not None and t != 0:
            r = (last / s).log() / h
            mixed = (1 + 1 / (2 * r)) * denoised - old / (2 * r)
        x, old, last = t / s * x - torch.expm1(-h) * mixed, denoised, s
    return x


@pytest.mark.parametrize(
    ("solver", "rule"),
    [
        ("euler", k_euler),
        ("ddim", k_euler),
        ("heun", k_heun),
        ("dpm-solver-pp-2m", k_dpmpp_2m),
        ("dpm-solver-pp-2m:lower_order_below=0", k_dpmpp_2m),
    ],
)
def test_k_diffusions_function_makes_the_same_samples(solver, rule):
    for schedule in (DiscreteVP.scaled_linear(), TABLE):
        sampler = made(schedule, solver, nfe=8 if solver != "heun" or schedule.t_min == 0 else 9)
        if solver == "dpm-solver-pp-2m" and schedule.t_min == 0:  # theirs is of second order to the end there
            with pytest.raises(SolverError, match="kdiffusion has no solver that is dpm-solver-pp-2m"):
                to_kdiffusion(sampler)
            continue
        done = to_kdiffusion(sampler)
        assert done.solver == rule.__name__.replace("k_", "sample_")
        sigmas = torch.tensor(done.values, dtype=torch.float64)
        x = sigmas[0] * torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 3, 2, 2)
        model = lambda x, sigma: torch.tanh(x / (1 + torch.as_tensor(sigma).reshape(-1, 1, 1, 1) ** 2))  # noqa: E731
        torch.testing.assert_close(rule(model, x, sigmas), sample_fewstep(model, x, sampler=sampler), rtol=1e-5, atol=1e-6)


def test_k_diffusions_ancestral_function_makes_the_same_samples():
    sampler = made(TABLE, "ddim:eta=1")
    assert to_kdiffusion(sampler).solver == "sample_euler_ancestral" and to_sdcpp(sampler).solver == "euler_a"
    sigmas = torch.tensor(to_kdiffusion(sampler).values, dtype=torch.float64)
    noise = lambda sigma, sigma_next: torch.cos(torch.arange(4.0, dtype=torch.float64) * float(sigma)).reshape(1, 1, 2, 2)  # noqa: E731
    model = lambda x, sigma: torch.tanh(x)  # noqa: E731
    start = x = sigmas[0] * torch.linspace(-1, 1, 4, dtype=torch.float64).reshape(1, 1, 2, 2)
    for s, t in zip(sigmas, sigmas[1:], strict=False):
        up = (t**2 * (s**2 - t**2) / s**2).sqrt()
        x = x + (x - model(x, s)) / s * ((t**2 - up**2).sqrt() - s) + up * noise(s, t)
    torch.testing.assert_close(x, sample_fewstep(model, start, sampler=sampler, noise_sampler=noise), rtol=1e-5, atol=1e-6)


NOISY = {spec: name for spec, name in COMFYUI.items() if spec not in ("euler", "ddim", "heun") and not spec.startswith("dpm-solver-pp-2m:")}


@pytest.mark.parametrize("spec", NOISY)
def test_a_sampler_that_adds_noise_has_its_own_name_there(spec):
    """The recurrences of these names are those of k-diffusion and ComfyUI in tests/solvers/test_stochastic.py."""
    sampler = made(TABLE, spec, nfe=7)
    theirs = made(TABLE, to_comfyui(sampler).solver, nfe=7)
    for one, two in zip(theirs.tableau.unrolled(), sampler.tableau.unrolled(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    assert theirs.tableau.nodes.t.tolist() == sampler.tableau.nodes.t.tolist() and sampler.tableau.stochastic
    if spec in K_DIFFUSION:
        assert to_kdiffusion(sampler).solver == f"sample_{to_comfyui(sampler).solver}"
    with pytest.raises(SolverError, match="comfyui has no solver that is"):  # ComfyUI's rule for flows is another
        to_comfyui(made(RectifiedFlow(), spec, nfe=7))


@pytest.mark.parametrize(
    "spec", ["euler-ancestral:eta=0.5", "dpm-solver-pp-sde:correlation=exact", "sde-dpm-solver-pp-2m:form=taylor", "sa-solver"]
)
def test_with_other_options_it_has_none(spec):
    with pytest.raises(SolverError, match="comfyui has no solver that is"):
        to_comfyui(made(TABLE, spec, nfe=7))


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sigmas", "comfyui", "kdiffusion", "sdcpp"])
def test_coefficients_of_a_fitted_sampler_do_not_travel(target):
    sampler = saved_samplers(FITTED / "nfe-04" / "sampler.json")[0]
    with pytest.raises(SolverError, match="the coefficients of a fitted sampler do not travel with a list of levels"):
        export(sampler, target)
    done = export(sampler, target, levels_only=True)
    assert done.solver is None and "does not travel" in done.use
    assert np.float32(done.values).tolist() == levels(sampler, "eps")


def test_what_cannot_be_given_is_refused():
    unipc, flow = made(TABLE, "unipc-2"), made(FLOW)
    late = made(RectifiedFlow(), grid=TimeGrid(torch.tensor([0.8, 0.5, 0.0])))
    short = made(RectifiedFlow(), grid=TimeGrid(torch.tensor([1.0, 0.5, 0.1])))
    for error, ask, message in (
        (FewstepError, lambda: export(flow, "a1111"), f"unknown target 'a1111': a list of levels is written for {', '.join(TARGETS)}"),
        (SolverError, lambda: export(unipc, "comfyui"), "comfyui has no solver that is unipc-2"),
        (SolverError, lambda: export(unipc, "diffusers"), "FewstepScheduler.from_sampler"),
        (SolverError, lambda: export(made(FLOW, "heun", nfe=7), "comfyui"), "no solver that is heun on these levels"),
        (GridError, lambda: export(flow, "comfyui", shift=3.0), "takes levels as they are"),
        (GridError, lambda: export(flow, "vllm-omni"), "say by what"),
        (GridError, lambda: export(flow, "vllm-omni", shift=0.0), "a shift is above 0"),
        (GridError, lambda: export(unipc, "vllm-omni", shift=1.0), "takes the sigmas of flows"),
        (GridError, lambda: export(short, "diffusers"), "appends a 0"),
        (GridError, lambda: export(made(TABLE), "times"), "times are those of a flow"),
        (GridError, lambda: export(late, "times"), "starts from noise at time 0, and this sampler at time 0.2"),
        (SolverError, lambda: export(made(FLOW, "unipc-2"), "times"), "times has no solver that is unipc-2"),
        (GridError, lambda: export(made(TABLE), "diffusers", shift=3.0), "only a flow's levels are shifted"),
        (GridError, lambda: export(made(EDM), "diffusers"), "have a table of times or a flow"),
        (ArtifactError, lambda: saved_samplers(Path("nowhere")), "no sampler in nowhere"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            ask()


def test_saved_samplers(tmp_path):
    sampler = made(TABLE)
    folder = sampler.save(tmp_path / "one")
    assert [one.fingerprint for one in saved_samplers(folder)] == [sampler.fingerprint]
    assert [one.nfe for one in saved_samplers(FITTED)] == list(range(3, 11))


# -- a maker's list --------------------------------------------------------------------------------------------------


def test_a_makers_list_is_not_altered(tmp_path, monkeypatch, capsys) -> None:
    flow, table = RectifiedFlow(), DiscreteVP.scaled_linear()
    for schedule, theirs in ((flow, [1.0, 0.75, 0.5, 0.25, 0.0]), (table, [14.6146, 2.9183, 0.9324, 0.3469, 0.0])):
        flowing = TimeGrid(torch.tensor(theirs, dtype=torch.float64))  # without a shift its time is its sigma
        sampler = Sampler.build("euler", flowing if schedule is flow else TimeGrid.from_sigmas(schedule, theirs), schedule)
        check_levels(sampler, theirs)
        check_levels(sampler, theirs[:-1])  # the end may be left out
        with pytest.raises(GridError, match=r"level 1 of the sampler is .*, in the maker's list .*: a distilled network is sampled at"):
            check_levels(sampler, [theirs[0], theirs[1] * 1.00001, *theirs[2:]])
        with pytest.raises(GridError, match="the maker's list has 3 levels, and the sampler evaluates 4 times"):
            check_levels(sampler, theirs[:3])
        with pytest.raises(GridError, match="a maker's list is one of noise levels"):
            check_levels(sampler, ["one", 0.5, 0.2, 0.1])
    folder = sampler.save(tmp_path / "sampler")
    listed = ",".join(map(str, theirs))
    assert run(monkeypatch, "export", folder, "--to", "comfyui", "--maker", listed) == 0
    assert run(monkeypatch, "export", folder, "--to", "comfyui", "--maker", listed.replace("2.9183", "2.9"), "--out", tmp_path / "no") == 2
    assert "level 1 of the sampler" in capsys.readouterr().err and not (tmp_path / "no").exists()
