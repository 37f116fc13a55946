"""Configurations that models are published with: each steps as the scheduler that it was written by, and there is a way back to that."""

import pickle
import subprocess
import sys
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.cogview4.pipeline_cogview4 import retrieve_timesteps
from tests.integrations.diffusers.test_scheduler import relative, run, tame, theirs_warn, timeless, unipc_of_flows
from tests.problems import statistics

from fewstep import Sampler, TimeGrid, make_solver
from fewstep.integrations.diffusers import FewstepScheduler

SAME = 2e-5  # float32 tables and steps of diffusers beside ours
LEVELS = 1e-6
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def noise(seed=0, count=2):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def beside(theirs, network, *asked, solver=None, **named):
    """Ours made from their configuration; both after `set_timesteps` with these arguments, and the ends of their loops."""
    ours = FewstepScheduler.from_config(theirs.config, **({} if solver is None else {"solver": solver}))
    for one in (ours, theirs):
        one.set_timesteps(*asked, **named)
    return ours, run(ours, noise(), network)[0], run(theirs, noise(), network)[0]


# -- flows ----------------------------------------------------------------------------------------------------------------------------


def test_karras_levels_of_a_flow_lie_between_the_ends_of_its_configuration():
    """Those of Cosmos Predict 2.5."""
    scheduler = FewstepScheduler(**FLOW, use_karras_sigmas=True, sigma_min=0.01, sigma_max=200.0)
    scheduler.set_timesteps(5)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.995, 0.979, 0.877, 0.360, 0.0099, 0.0]), rtol=0, atol=6e-4)


@theirs_warn
@unipc_of_flows
@pytest.mark.parametrize("steps", [2, 5, 35])
@pytest.mark.parametrize(
    "ends", [{"sigma_min": 0.01, "sigma_max": 200.0}, {"sigma_min": 0.1, "sigma_max": 5.0}, {"sigma_max": 80.0}, {}], ids=str
)
@pytest.mark.every(3, 2)
def test_karras_levels_of_a_flow_are_those_of_unipc(ends, steps):
    theirs = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0, use_karras_sigmas=True, **ends)
    ours, end, their_end = beside(theirs, timeless, steps)
    assert relative(ours.sigmas, theirs.sigmas) < LEVELS
    assert float((ours.timesteps - theirs.timesteps).abs().max()) <= 1  # theirs are cut to whole numbers
    assert relative(end, their_end) < 10 * SAME


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_shifts_by_the_size_of_the_picture(kind, mu):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    ours, end, their_end = beside(theirs, tame, sigmas=np.linspace(1, 1 / 6, 6), mu=mu, solver="euler")
    assert relative(ours.sigmas, theirs.sigmas) < LEVELS and relative(end, their_end) < SAME


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc-2", "dpm-solver-3s"])
def test_timesteps_beside_sigmas(solver):
    """CogView4 and GLM-Image: the network is told the times before the shift."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    times = np.linspace(1000, 1.0, 6).astype(np.int64).astype(np.float32)
    ours = FewstepScheduler.from_config(theirs.config, solver=solver)
    for one in (ours, theirs):
        retrieve_timesteps(one, 6, "cpu", times.copy(), times / 1000, mu=2.5)
    levels = ours.sigmas[:-1][:: ours.order] if ours.order > 1 else ours.sigmas[:-1]
    assert relative(levels, theirs.sigmas[:-1]) < LEVELS and ours.num_inference_steps == 6
    assert ours.timesteps[:: ours.order].tolist() == theirs.timesteps.tolist() == times.tolist()
    assert bool((torch.diff(ours.timesteps) <= 0).all())  # those within a step lie between
    if solver == "euler":
        assert relative(run(ours, noise(), tame)[0], run(theirs, noise(), tame)[0]) < SAME
    picture = ours.scale_noise(noise(), ours.timesteps[2 * ours.order :][:1], noise(1))  # at the level of that time
    assert relative(picture, theirs.scale_noise(noise(), theirs.timesteps[2:3], noise(1))) < SAME


SHIFTS = [round(0.01 * k, 2) for k in range(101, 10001)]


@pytest.mark.slow
def test_flows_that_start_above_1_by_a_rounding():
    """79 of the shifts of two decimals give 1 + 1e-7 in float32."""
    first = {shift: float(np.float32(shift) * np.float32(1) / (1 + np.float32(shift - 1) * np.float32(1))) for shift in SHIFTS}
    above = {shift: level for shift, level in first.items() if level > 1}
    assert len(above) == 79
    for shift, level in above.items():
        scheduler, exact = (FewstepScheduler(**FLOW, flow_shift=shift) for _ in range(2))
        exact.set_timesteps(sigmas=[1.0, 0.5])
        for asked in ({"sigmas": [level, 0.5]}, {"timesteps": [1000 * level, float(exact.timesteps[1])]}):
            scheduler.set_timesteps(**asked)
            assert relative(scheduler.sigmas, exact.sigmas) < LEVELS and scheduler.timesteps[0] == 1000
        assert torch.equal(scheduler.scale_noise(noise(), torch.tensor([1000 * level]), noise(1)), noise(1))


@pytest.mark.parametrize("given", [{"sigmas": np.linspace(1, 0.1, 6)}, {"num_inference_steps": 5}], ids=["sigmas", "steps"])
def test_a_flow_whose_time_runs_to_the_data(given):
    """Mochi and LongCat: times rise to 1000, and the network answers image minus noise."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    if "sigmas" in given:
        ours, end, their_end = beside(theirs, tame, **given, solver="euler")
        assert float((ours.sigmas - theirs.sigmas).abs().max()) < LEVELS and float((ours.timesteps - theirs.timesteps).abs().max()) < 1e-3
        assert relative(end, their_end) < SAME
    ours = FewstepScheduler.from_config(theirs.config)
    forward = FewstepScheduler(**FLOW)
    for one in (ours, forward):
        one.set_timesteps(**given)
    assert float((ours.timesteps + forward.timesteps - 1000).abs().max()) < 1e-3
    same = run(ours, noise(), lambda x, t: -tame(x, 1000 - t))[0]
    assert relative(same, run(forward, noise(), tame)[0]) < SAME
    assert (
        relative(ours.scale_noise(noise(), ours.timesteps[2:3], noise(1)), forward.scale_noise(noise(), forward.timesteps[2:3], noise(1)))
        < SAME
    )


def test_a_saved_sampler_of_such_a_flow(tmp_path):
    ours = FewstepScheduler(**FLOW, invert_sigmas=True, solver="unipc-2")
    law = ours._law.schedule
    Sampler.build(make_solver("unipc-2"), TimeGrid([1.0, 0.7, 0.3, 0.0]), law, card={"prediction": "reversed-flow"}).save(tmp_path)
    loaded = FewstepScheduler.from_sampler(tmp_path)
    loaded.set_timesteps(3)
    ours.set_timesteps(sigmas=[1.0, 0.7, 0.3])
    assert relative(run(loaded, noise(), tame)[0], run(ours, noise(), tame)[0]) < SAME


# -- tables of betas ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no_signal", [True, False])
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_a_table_of_shifted_noise(scale, no_signal):
    """CogVideoX-2b has a scale of 3, CogVideoX-5b one of 1."""
    options = {**SD, "snr_shift_scale": scale, "rescale_betas_zero_snr": no_signal, "prediction_type": "v_prediction"}
    theirs = diffusers.CogVideoXDDIMScheduler(**options, timestep_spacing="trailing", clip_sample=False)
    ours, end, their_end = beside(theirs, tame, 10, solver="ddim")
    torch.testing.assert_close(ours.alphas_cumprod.double(), theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cumprod(1 - ours.betas.double(), 0), theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist() and relative(end, their_end) < SAME
    assert FewstepScheduler.from_config(ours.config).config.snr_shift_scale == scale


@theirs_warn
@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("named", [True, False])
def test_a_deis_configuration_ends_where_deis_does(steps, named, tmp_path):
    """At the last time of the table, read from memory or from a file."""
    theirs = diffusers.DEISMultistepScheduler(solver_order=3, timestep_spacing="leading")
    theirs.save_pretrained(tmp_path)
    ours = FewstepScheduler.from_pretrained(tmp_path) if named else FewstepScheduler.from_config(theirs.config)
    for one in (ours, theirs):
        one.set_timesteps(steps)
    assert relative(ours.sigmas, theirs.sigmas) < SAME and float(ours.sigmas[-1]) > 0
    assert relative(run(ours, noise(), tame)[0], run(theirs, noise(), tame)[0]) < 10 * SAME
    assert FewstepScheduler.from_config(ours.config).config.final_sigmas_type == "sigma_min"
    assert FewstepScheduler.from_config(theirs.config, final_sigmas_type="zero").config.to_clean is True


# -- the way back ---------------------------------------------------------------------------------------------------------------------

RANDOM = ("sde-dpm-solver-2m", "sde-dpm-solver-pp-2m", "ddim:eta=1")
SOLVERS = ("deis-3", "dpm-solver-2m", "dpm-solver-3m", *RANDOM, "dpm-solver-pp-3m", "unipc-3", "heun")


@theirs_warn
@pytest.mark.parametrize("law", [SD, {**FLOW, "flow_shift": 3.0}], ids=["betas", "flow"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.every(4)
def test_back_to_the_classes_of_diffusers(solver, law):
    start = FewstepScheduler(**law, solver=solver)
    for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"):
        kind = getattr(diffusers, name)
        if solver in RANDOM and ("DEIS" in name or solver == "sde-dpm-solver-2m" and "Singlestep" in name):
            continue  # diffusers' classes have no such algorithm
        there = kind.from_config(start.config)
        there.set_timesteps(6)
        back = FewstepScheduler.from_config(there.config)
        for one in (start, back):
            one.set_timesteps(6)
        assert back.config.solver == solver and torch.equal(back.sigmas, start.sigmas) and float(back.sigmas[-1]) == 0, name


IN_MULTISTEP = {
    "dpm-solver-2m": "dpmsolver",
    "dpm-solver-3m": "dpmsolver",
    "sde-dpm-solver-2m": "sde-dpmsolver",
    "sde-dpm-solver-pp-2m": "sde-dpmsolver++",
    "sde-dpm-solver-pp-2m:form=taylor": "sde-dpmsolver++",
    "dpm-solver-pp-2m": "dpmsolver++",
    "dpm-solver-pp-3m": "dpmsolver++",
    "ddim": "dpmsolver++",
    "ddim:eta=1": "sde-dpmsolver++",
}


@theirs_warn
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", IN_MULTISTEP)
@pytest.mark.every(4, 2)
def test_a_solver_that_multistep_has_is_itself_there(solver, end):
    """In noise prediction there is no step to the clean image, so it ends at the last noise level there."""
    start = FewstepScheduler(**SD, solver=solver, final_sigmas_type=end)
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(start.config)
    clean = end == "zero" and theirs.config.algorithm_type.endswith("++")
    assert (theirs.config.algorithm_type, theirs.config.final_sigmas_type) == (IN_MULTISTEP[solver], "zero" if clean else "sigma_min")
    ours = start if clean == (end == "zero") else FewstepScheduler.from_config(start.config, final_sigmas_type="sigma_min")
    for one in (ours, theirs):
        one.set_timesteps(6)
    ends = [run(one, noise(), tame, generator=torch.manual_seed(1))[0] for one in (ours, theirs)]
    assert relative(*ends) < SAME


@theirs_warn
@pytest.mark.parametrize("solver", ["dpm-solver-2m", "dpm-solver-3m", "sde-dpm-solver-2m"])
def test_noise_prediction_on_a_flow_is_refused_by_multistep(solver):
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(FewstepScheduler(**FLOW, solver=solver).config)
    theirs.set_timesteps(6)
    with pytest.raises(ValueError, match="prediction_type given as flow_prediction"):
        run(theirs, noise(), tame)


@theirs_warn
@pytest.mark.parametrize(
    ("solver", "end"),
    [*product(("unipc-2", "unipc-3", "unipc-3:uncorrected=[0, 2]"), ("zero", "sigma_min")), ("unipc-2:weights=bh1", "sigma_min")],
)
def test_unipc_is_itself_in_unipc(solver, end):
    """But for bh1 with a step to the clean image, of which diffusers makes NaN: its weight is a step without end there."""
    start = FewstepScheduler(**SD, solver=solver, final_sigmas_type=end)
    theirs = diffusers.UniPCMultistepScheduler.from_config(start.config)
    for one in (start, theirs):
        one.set_timesteps(6)
    assert relative(run(start, noise(), tame)[0], run(theirs, noise(), tame)[0]) < SAME


@theirs_warn
def test_deis_is_itself_in_deis_alone():
    """The classes of DPM-Solver say themselves that they run DPM-Solver++ for it, of its order."""
    start = FewstepScheduler(**SD, solver="deis-3", final_sigmas_type="sigma_min")
    theirs = diffusers.DEISMultistepScheduler.from_config(start.config)
    for one in (start, theirs):
        one.set_timesteps(6)
    assert relative(run(start, noise(), tame)[0], run(theirs, noise(), tame)[0]) < SAME
    for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"):
        there = getattr(diffusers, name).from_config(start.config)
        assert (there.config.algorithm_type, there.config.solver_order, there.config.final_sigmas_type) == ("dpmsolver++", 3, "sigma_min")


@theirs_warn
@pytest.mark.parametrize(
    ("solver", "algorithm"),
    [("dpm-solver-2m", "dpmsolver"), ("dpm-solver-3m", "dpmsolver"), ("sde-dpm-solver-pp-2m", "sde-dpmsolver++"), ("ddim", "dpmsolver++")],
)
def test_singlestep_runs_the_same_formulas_in_another_order(solver, algorithm):
    """It has steps of several evaluations rather than a memory of earlier steps; of order 1 the two are one."""
    start = FewstepScheduler(**SD, solver=solver, final_sigmas_type="sigma_min")
    theirs = diffusers.DPMSolverSinglestepScheduler.from_config(start.config)
    for one in (start, theirs):
        one.set_timesteps(6)
    assert theirs.config.algorithm_type == algorithm and theirs.timesteps.tolist() == start.timesteps.tolist()
    ends = [run(one, noise(), tame, generator=torch.manual_seed(1))[0] for one in (start, theirs)]
    assert bool(ends[1].isfinite().all()) and (relative(*ends) < SAME) == (solver == "ddim")


@pytest.mark.parametrize("solver", ["sde-dpm-solver-2m", "sde-dpm-solver-pp-2m", "ddim:eta=1"])
@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "SASolverScheduler", "DPMSolverSinglestepScheduler"])
def test_a_class_without_the_algorithm_says_so(solver, name):
    """Rather than run a solver without noise in its place."""
    config = FewstepScheduler(**SD, solver=solver).config
    if "Singlestep" in name and solver != "sde-dpm-solver-2m":
        assert getattr(diffusers, name).from_config(config).config.algorithm_type == "sde-dpmsolver++"
        return
    with pytest.raises(NotImplementedError, match=f"sde-dpmsolver.* is not implemented for .*{name}"):
        getattr(diffusers, name).from_config(config)


@theirs_warn
@pytest.mark.parametrize("solver", ["unipc-2", "dpm-solver-pp-2m", "heun", "deis-3", "dpm-solver-2m", "dpm-solver-3m", *RANDOM])
def test_to_sa_solver(solver):
    """Another algorithm, on the same law and times; most names of algorithms it calls by other words."""
    start = FewstepScheduler(**SD, solver=solver, timestep_spacing="trailing")
    other_word = start.config.algorithm_type != "dpmsolver++"
    if other_word:
        with pytest.raises(NotImplementedError, match=r"is not implemented for .*SASolverScheduler"):
            diffusers.SASolverScheduler.from_config(start.config)
    there = diffusers.SASolverScheduler.from_config(start.config, **({"algorithm_type": "data_prediction"} if other_word else {}))
    for one in (start, there):
        one.set_timesteps(6)
    assert there.timesteps.tolist() == start.timesteps[:: start.order].tolist()
    assert relative(there.sigmas[:-1], start.sigmas[:-1][:: start.order]) < SAME and float(there.sigmas[-1]) > 0  # it has but one end
    assert bool(run(there, noise(), tame, generator=torch.manual_seed(1))[0].isfinite().all())
    assert FewstepScheduler.from_config(there.config).config.solver == solver


def test_the_end_that_is_asked_for_now_wins():
    clean = FewstepScheduler(solver="dpm-solver-2m")
    assert (clean.config.to_clean, clean.config.final_sigmas_type) == (True, "sigma_min")
    assert FewstepScheduler.from_config(clean.config).config == clean.config
    for options, last in (
        ({"final_sigmas_type": "sigma_min"}, 0.01),
        ({"final_sigmas_type": "zero"}, 0.0),
        ({"solver": "unipc-2"}, 0.0),
        ({}, 0.0),
    ):
        made = FewstepScheduler.from_config(clean.config, **options)
        made.set_timesteps(4)
        assert float(made.sigmas[-1]) == pytest.approx(last, abs=1e-4), options
    assert FewstepScheduler.from_config(clean.config, solver="unipc-2").config.final_sigmas_type == "zero"


# -- pickles --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("solver", ["unipc-3", "heun", "deis-3", "dpm-solver-3s", "ddim:eta=1"])
def test_a_pickle_in_the_middle_of_a_loop(solver, together):
    scheduler, x = FewstepScheduler(solver=solver), noise()
    scheduler.set_timesteps(6)
    for k, t in enumerate(scheduler.timesteps[:3]):
        x = scheduler.step(tame(x, t), t, x, variance_noise=noise(k)).prev_sample
    twin, y = pickle.loads(pickle.dumps((scheduler, x))) if together else (pickle.loads(pickle.dumps(scheduler)), x)
    for k, (t, u) in enumerate(zip(scheduler.timesteps[3:], twin.timesteps[3:], strict=True)):
        x = scheduler.step(tame(x, t), t, x, variance_noise=noise(10 + k)).prev_sample
        y = twin.step(tame(y, u), u, y, variance_noise=noise(10 + k)).prev_sample
    assert torch.equal(x, y)


LOAD = """
import pickle, sys
from fewstep.integrations.diffusers import FewstepScheduler
scheduler = pickle.load(sys.stdin.buffer)
again = FewstepScheduler.from_config(scheduler.config)
again.set_timesteps(5)
print(again._sampler.fingerprint)
"""


@pytest.mark.slow
def test_statistics_in_memory_reach_another_process():
    scheduler = FewstepScheduler(solver="dpm-solver-v3", statistics=statistics(), prediction_type="v_prediction")
    done = subprocess.run([sys.executable, "-c", LOAD], input=pickle.dumps(scheduler), capture_output=True, check=True)
    scheduler.set_timesteps(5)
    assert done.stdout.decode().strip() == scheduler._sampler.fingerprint
