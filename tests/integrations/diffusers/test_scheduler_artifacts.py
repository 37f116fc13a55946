"""Every solver of this library, saved samplers and statistics in a `FewstepScheduler`; and what it refuses, with a reason."""

import gc
import json
import math
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from tests.integrations.diffusers.test_scheduler import V, relative, run, tame, theirs_warn
from tests.problems import STOCHASTIC, statistics

from fewstep import (
    ArtifactError,
    DiscreteVP,
    FewstepError,
    GridError,
    ModelError,
    ModelStatistics,
    RectifiedFlow,
    Sampler,
    SolverError,
    VarianceExploding,
    load_model,
    make_grid,
    make_solver,
    sample,
    tabulate,
)
from fewstep.integrations.diffusers import FewstepScheduler
from fewstep.models.formats.diffusers_law import noise_law
from fewstep.sampling.loop import steps as each_step
from fewstep.solvers import SOLVERS, takes_statistics
from fewstep.solvers.aliases import ALIASES

SAME = 6e-5  # a few float32 steps by two ways, of which some subtract large numbers; measured 4e-5
BY_BETAS = 2e-4  # a law that comes back through float32 betas


def noise(*shape):
    return torch.randn(shape or (2, 3, 4, 4), generator=torch.Generator().manual_seed(0))


def saved(folder, solver="unipc-2", steps=(4, 6), law=None, **card):
    law = DiscreteVP.linear().to_clean() if law is None else law
    for count in steps:
        sampler = Sampler.build(make_solver(solver), make_grid("angle", law, count), law, card={"prediction": "v", **card})
        sampler.save(folder / f"nfe-{sampler.nfe:02d}")
    return folder


def ended(scheduler, steps=4):
    scheduler.set_timesteps(steps)
    return run(scheduler, noise(), tame)[0]


def statistics_of_digits():
    return load_model("digits-ddpm").folder / "statistics"


# -- beside fewstep.sample ------------------------------------------------------------------------------------------------------------


class Toy:
    """The network of `tame` in v prediction, as a denoiser."""

    def __init__(self, law):
        self.schedule, self.law = law.schedule, law

    def __call__(self, x, t, cond=None):
        a, s = self.schedule.alpha(t).to(x.dtype), self.schedule.sigma(t).to(x.dtype)
        return (a * x - s * tame(x, self.law.time(t).to(x.dtype))) / (a**2 + s**2)


NAMES = [  # without noise, which comes from a generator here, from seeds there: SDEs are compared with diffusers'
    *(name for name in SOLVERS if name not in STOCHASTIC),
    *(name for name in ALIASES if ALIASES[name].split(":")[0] not in STOCHASTIC and "sde" not in name.lower()),
    "dpm-solver-pp-3m:third_order=corrected",
]


@pytest.mark.parametrize(
    ("name", "grid"),
    [*((name, "angle") for name in NAMES), *product(("unipc-3", "heun", "dpm-solver-3s"), ("karras:rho=5", "trailing"))],
)
@pytest.mark.every(5, 2)
def test_every_solver_and_grid_is_the_one_of_sample(name, grid):
    bare = ALIASES.get(name, name)
    extra = {"statistics": statistics()} if takes_statistics(bare) else {}
    scheduler = after(**V, solver=name, grid=grid, **extra)
    law = noise_law(scheduler.config, to_clean=True)
    solver = make_solver(bare, **extra)
    tableau = tabulate(solver, solver.nodes(make_grid(grid, law.schedule, 5), law.schedule))
    assert relative(run(scheduler, noise(), tame)[0], sample(Toy(law), tableau, noise())) < SAME
    assert len(scheduler.timesteps) == tableau.nodes.evaluations and scheduler.order == solver.stages and scheduler.num_inference_steps == 5


@pytest.mark.parametrize("name", [name for name in SOLVERS if name in STOCHASTIC])
@pytest.mark.every(2)
def test_a_solver_that_adds_noise_takes_it_from_the_generator_row_by_row(name):
    scheduler = after(**V, solver=name, grid="angle")
    law = noise_law(scheduler.config, to_clean=True)
    solver = make_solver(name)
    tableau = tabulate(solver, solver.nodes(make_grid("angle", law.schedule, 5), law.schedule))
    draws = torch.Generator().manual_seed(1)
    made = list(each_step(Toy(law), tableau, noise(), noise=lambda i: torch.randn(noise().shape, generator=draws)))[-1].x_next
    assert relative(run(scheduler, noise(), tame, generator=torch.Generator().manual_seed(1))[0], made) < SAME
    assert scheduler.order == solver.stages and scheduler.config.algorithm_type.startswith("sde-")


# -- samplers -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["unipc-2", "heun", "dpm-solver-3s", "dpm-solver-pp-3m", "ddim"])
@pytest.mark.every(3)
def test_a_saved_sampler_gives_its_samples(solver, tmp_path):
    scheduler = FewstepScheduler.from_sampler(saved(tmp_path / "all", solver))
    by_name = FewstepScheduler(**V, solver=solver, grid="angle")
    for steps in (4, 6):
        assert relative(ended(scheduler, steps), ended(by_name, steps)) < BY_BETAS
        assert scheduler.order == by_name.order and relative(scheduler.timesteps.float(), by_name.timesteps.float()) < SAME
        assert scheduler.num_inference_steps == steps
    only = FewstepScheduler.from_sampler(saved(tmp_path / "one", solver, (4,)))
    only.set_timesteps()
    assert only.num_inference_steps == 4


def test_bundled_samplers_and_the_model_they_are_for():
    model = load_model("digits-ddpm")
    config = json.loads((model.folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = FewstepScheduler.from_sampler(model.folder / "fitted", config, final_sigmas_type="sigma_min")
    x = noise(2, 1, 8, 8)
    for steps in (3, 5):
        scheduler.set_timesteps(steps)
        with torch.no_grad():
            ours = run(scheduler, x, lambda x, t: model.network(x, t.expand(len(x)), return_dict=False)[0])[0]
            expected = sample(model, Sampler.load(model.folder / "fitted" / f"nfe-{steps:02d}"), x)
        assert relative(ours, expected) < SAME


def test_a_fitted_sampler_on_samples_of_another_shape_is_refused():
    model = load_model("digits-ddpm")
    scheduler = FewstepScheduler.from_sampler(model.folder / "fitted")
    scheduler.set_timesteps(4)
    x = torch.zeros(2, 1, 16, 16)
    with pytest.raises(SolverError, match=r"coefficients for samples of shape \(1, 8, 8\), which \(1, 16, 16\) is not"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_a_flow_sampler(tmp_path):
    folder = saved(tmp_path, steps=(4,), law=RectifiedFlow(3.0), prediction="flow")
    scheduler = FewstepScheduler.from_sampler(folder)
    by_name = FewstepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", grid="angle")
    assert relative(ended(scheduler), ended(by_name)) < SAME


def test_samplers_survive_memory_and_disk(tmp_path):
    scheduler = FewstepScheduler.from_sampler(saved(tmp_path / "all", "heun"))
    expected = ended(scheduler)
    assert torch.equal(ended(FewstepScheduler.from_config(scheduler.config)), expected)
    through = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    assert torch.equal(ended(FewstepScheduler.from_config(through.config)), expected)
    before = dict(scheduler.config)
    scheduler.save_pretrained(tmp_path / "saved")
    assert {key: scheduler.config[key] for key in before} == before
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    again = FewstepScheduler.from_pretrained(moved)
    assert torch.equal(ended(again), expected) and again.order == 2


@pytest.mark.slow
def test_statistics_survive_memory_and_disk(tmp_path):
    ems = statistics()
    scheduler = FewstepScheduler(**V, solver="dpm-solver-v3", statistics=ems)
    expected = ended(scheduler)
    assert relative(expected, ended(FewstepScheduler(**V, solver="unipc-2"))) > 1e-4
    assert torch.equal(ended(FewstepScheduler.from_config(scheduler.config)), expected)
    scheduler.save_pretrained(tmp_path / "saved")
    assert torch.equal(ended(FewstepScheduler.from_pretrained(tmp_path / "saved")), expected)
    folder = ems.save(tmp_path / "ems")
    for value in (folder, str(folder)):
        assert torch.equal(ended(FewstepScheduler(**V, solver="dpm-solver-v3", statistics=value)), expected)
    config = dict(FewstepScheduler(**V, solver="dpm-solver-v3", statistics=statistics(0.5)).config)
    gc.collect()
    with pytest.raises(ArtifactError, match="in memory that is gone: pass ModelStatistics or its folder again"):
        FewstepScheduler.from_config(config)


def test_statistics_of_the_bundled_model():
    ems = ModelStatistics.load(statistics_of_digits())
    by_path = FewstepScheduler(solver="dpm-solver-v3", statistics=statistics_of_digits(), final_sigmas_type="sigma_min")
    in_memory = FewstepScheduler(solver="dpm-solver-v3:gate=half", statistics=ems, final_sigmas_type="sigma_min")
    ends = []
    for scheduler in (by_path, in_memory):
        scheduler.set_timesteps(5)
        ends.append(run(scheduler, noise(2, 1, 8, 8), tame)[0])
    assert all(bool(end.isfinite().all()) for end in ends) and not torch.equal(*ends)


@pytest.mark.parametrize("kind", ["sampler", "statistics"])
def test_damaged_side_files_are_named(kind, tmp_path):
    if kind == "sampler":
        scheduler = FewstepScheduler.from_sampler(saved(tmp_path / "all"))
    else:
        scheduler = FewstepScheduler(**V, solver="dpm-solver-v3", statistics=statistics())
    scheduler.save_pretrained(tmp_path / "saved")
    path = next((tmp_path / "saved").rglob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 255
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        FewstepScheduler.from_pretrained(tmp_path / "saved")


def test_what_was_saved_here_before_is_not_read(tmp_path):
    """A folder is saved to again: with other samplers, and with none."""
    FewstepScheduler.from_sampler(saved(tmp_path / "a", "heun")).save_pretrained(tmp_path / "out")
    other = FewstepScheduler.from_sampler(saved(tmp_path / "b", "unipc-3", (5,)))
    other.save_pretrained(tmp_path / "out")
    again = FewstepScheduler.from_pretrained(tmp_path / "out")
    assert torch.equal(ended(again, 5), ended(other, 5)) and again.order == 1
    with pytest.raises(GridError, match="only of 5"):
        again.set_timesteps(4)
    FewstepScheduler(**V, solver="dpm-solver-v3", statistics=statistics()).save_pretrained(tmp_path / "out")
    FewstepScheduler(**V, solver="ddim").save_pretrained(tmp_path / "out")
    plain = FewstepScheduler.from_pretrained(tmp_path / "out")
    assert plain.config.sampler is None and plain.config.statistics is None
    assert torch.equal(ended(plain, 7), ended(FewstepScheduler(**V, solver="ddim"), 7))


def test_a_solver_that_is_asked_for_wins_over_samplers(tmp_path):
    scheduler = FewstepScheduler.from_sampler(saved(tmp_path))
    for asked in ({"solver": "ddim"}, {"solver_order": 3}):
        assert (
            relative(ended(FewstepScheduler.from_config(scheduler.config, **asked), 5), ended(FewstepScheduler(**V, **asked), 5)) < BY_BETAS
        )


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
@pytest.mark.parametrize("kind", ["sampler", "statistics", "solver"])
@pytest.mark.every(3)
def test_inside_a_pipeline(kind, tmp_path):
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    model = load_model("digits-ddpm")
    pipe = DiffusionPipeline.from_pretrained(model.folder)
    pipe.set_progress_bar_config(disable=True)
    config = {**pipe.scheduler.config, "final_sigmas_type": "sigma_min"}
    pipe.scheduler = {
        "sampler": lambda: FewstepScheduler.from_sampler(model.folder / "fitted", config),
        "statistics": lambda: FewstepScheduler.from_config(config, solver="dpm-solver-v3", statistics=statistics_of_digits()),
        "solver": lambda: FewstepScheduler.from_config(config, solver="heun", grid="angle"),
    }[kind]()
    ask = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    expected = pipe(**ask, generator=torch.Generator().manual_seed(0)).images
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["scheduler"] == ["fewstep.integrations.diffusers", "FewstepScheduler"]  # wherever its file may be, as older ones say
    again = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is FewstepScheduler
    np.testing.assert_array_equal(again(**ask, generator=torch.Generator().manual_seed(0)).images, expected)


# -- refusals -------------------------------------------------------------------------------------------------------------------------


def after(steps=5, **options):
    scheduler = FewstepScheduler(**options)
    scheduler.set_timesteps(steps)
    return scheduler


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
made, from_sampler, from_config = FewstepScheduler, FewstepScheduler.from_sampler, FewstepScheduler.from_config
REFUSED = {
    "solver": (lambda p: made(solver="unipc"), SolverError, "unknown solver 'unipc': did you mean .*unipc-"),
    "solver that is no name": (lambda p: made(solver=3), SolverError, "unknown solver '3'"),
    "solver option": (lambda p: made(solver="unipc-2:bogus=1"), SolverError, "bogus"),
    "grid": (lambda p: after(grid="karas"), GridError, "did you mean karras"),
    "order": (lambda p: made(solver_order=4), SolverError, "solver_order is 1, 2 or 3, got 4"),
    "order that is no number": (lambda p: made(solver_order="two"), SolverError, "solver_order is 1, 2 or 3, got two"),
    "order of an SDE": (lambda p: made(solver_order=3, algorithm_type="sde-dpmsolver++"), SolverError, "1 or 2, got 3: "),
    "algorithm": (lambda p: made(algorithm_type="dpm++"), SolverError, "did you mean.*dpmsolver"),
    "solver type": (lambda p: made(solver_type="mid"), SolverError, "did you mean midpoint"),
    "noise prediction": (lambda p: made(predict_x0=False), SolverError, "predict_x0=False"),
    "corrector": (lambda p: made(disable_corrector=["a"]), SolverError, "counted from 0"),
    "prediction": (lambda p: made(prediction_type="eps"), ModelError, "did you mean epsilon"),
    "end": (lambda p: after(final_sigmas_type="one"), GridError, "zero or sigma_min"),
    "spacing": (lambda p: after(timestep_spacing="trails"), GridError, "did you mean trailing"),
    "two levels": (lambda p: after(use_karras_sigmas=True, use_beta_sigmas=True), GridError, "karras and beta"),
    "levels upside down": (lambda p: after(use_karras_sigmas=True, sigma_min=5.0, sigma_max=1.0), GridError, "sigma_max down to a smaller"),
    "negative level": (lambda p: after(use_karras_sigmas=True, sigma_min=-1.0), GridError, "above 0"),
    "betas": (lambda p: made(trained_betas=[0.1, 2.0]), ModelError, "strictly decreasing"),
    "no betas": (lambda p: made(num_train_timesteps=1), ModelError, "at least 2"),
    "clip": (lambda p: after(lambda_min_clipped=100.0), GridError, "lambda_min_clipped = 100"),
    "quantile": (lambda p: made(thresholding=True, dynamic_thresholding_ratio=2.0), FewstepError, "wants a dynamic_thresholding_ratio"),
    "shift": (lambda p: after(**FLOW, flow_shift=0.0), ModelError, "needs a positive shift"),
    "time shift": (lambda p: made(**FLOW, use_dynamic_shifting=True, time_shift_type="cubic"), ModelError, "exponential or linear"),
    "mu": (lambda p: after(**FLOW, use_dynamic_shifting=True), ModelError, "pass mu to set_timesteps"),
    "no statistics": (lambda p: made(solver="dpm-solver-v3"), SolverError, "fewstep calibrate"),
    "statistics nowhere": (lambda p: made(solver="dpm-solver-v3", statistics=p / "no"), ArtifactError, "no"),
    "statistics of no kind": (lambda p: made(statistics=3), ArtifactError, "3 is no ModelStatistics"),
    "sampler nowhere": (lambda p: from_sampler(p / "no"), ArtifactError, "no sampler in .*sampler.json"),
    "sampler of no kind": (lambda p: made(sampler=3), ArtifactError, "3 is no SavedSamplers"),
    "number of a sampler": (lambda p: from_sampler(saved(p)).set_timesteps(5), GridError, "5 steps here, only of 4, 6"),
    "no number of several": (lambda p: from_sampler(saved(p)).set_timesteps(), GridError, "only of 4, 6"),
    "times of a sampler": (lambda p: from_sampler(saved(p)).set_timesteps(timesteps=[5]), GridError, "times of its own"),
    "law of a sampler": (lambda p: from_sampler(saved(p), {"beta_end": 0.03}).set_timesteps(4), ArtifactError, "another noise law"),
    "law of no pipeline": (lambda p: from_sampler(saved(p, law=VarianceExploding())), ArtifactError, "use fewstep.sample"),
    "card": (lambda p: from_sampler(saved(p, prediction=None)), ArtifactError, "what its network predicts"),
    "two laws": (lambda p: from_sampler(saved(saved(p), steps=(3,), law=RectifiedFlow())), ArtifactError, "different noise laws"),
    "two solvers": (lambda p: from_sampler(saved(saved(p), "heun", (9,))), ArtifactError, "those of one solver"),
    "a file": (lambda p: made().save_pretrained(saved(p, steps=(4,)) / "nfe-04" / "README.md"), ArtifactError, "is a file"),
    "no steps": (lambda p: after(0), GridError, "at least 1 step, got 0"),
    "half a step": (lambda p: after(2.5), GridError, "whole number, got 2.5"),
    "nothing": (lambda p: after(None), GridError, "one of num_inference_steps, timesteps or sigmas, got none"),
    "too much": (lambda p: made().set_timesteps(5, timesteps=[3]), GridError, "got num_inference_steps and timesteps"),
    "other numbers": (lambda p: made().set_timesteps(5, sigmas=[3.0, 1.0]), GridError, "5 steps were asked for with 2 sigmas"),
    "no times": (lambda p: made().set_timesteps(timesteps=[]), GridError, "timesteps lie between 0 and 999"),
    "times that grow": (lambda p: made().set_timesteps(timesteps=[1, 2]), GridError, "strictly decrease"),
    "times outside": (lambda p: made().set_timesteps(timesteps=[2000, 3]), GridError, "between 0 and 999"),
    "flow times outside": (lambda p: made(**FLOW).set_timesteps(timesteps=[2000, 3]), GridError, "between 0 and 1000"),
    "no sigmas": (lambda p: made().set_timesteps(sigmas=[]), GridError, "sigmas are empty"),
    "sigmas that grow": (lambda p: made().set_timesteps(sigmas=[1.0, 2.0]), GridError, "strictly decrease"),
    "no number": (lambda p: made().set_timesteps(sigmas=[math.nan, 1.0]), GridError, "not finite"),
    "flow sigmas outside": (lambda p: made(**FLOW).set_timesteps(sigmas=[2.0, 0.5]), GridError, "between 0 and 1"),
    "grid and sigmas": (lambda p: made(grid="angle").set_timesteps(sigmas=[2.0, 0.5]), GridError, "leave sigmas out"),
    "step before times": (lambda p: made().step(noise(), 1, noise()), FewstepError, "run set_timesteps before step"),
    "shapes": (lambda p: after().step(noise(2, 3, 4, 5), 999, noise()), FewstepError, r"\(2, 3, 4, 5\), but the sample has \(2, 3, 4, 4\)"),
    "begin inside a step": (lambda p: (s := after(solver="heun"), s.set_begin_index(3), run(s, noise(), tame, 3)), SolverError, "multiple"),
    "EDM": (lambda p: from_config(diffusers.EDMEulerScheduler().config), ModelError, "sigma_data has a state that grows"),
    "inverted": (lambda p: made(**{**FLOW, "invert_sigmas": True, "prediction_type": "sample"}), ModelError, "predicts its velocity"),
    "shifted table": (lambda p: made(snr_shift_scale=0.0), ModelError, "snr_shift_scale is above 0"),
    "continuous times": (
        lambda p: from_config(diffusers.EulerDiscreteScheduler(timestep_type="continuous").config), ModelError, "timestep_type="),
    "noise at every step": (
        lambda p: from_config(diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True).config), ModelError, "stochastic_"),
    "latent upscaler": (lambda p: made(prediction_type="original_sample"), ModelError, "latent upscaler"),
    "linear mu": (lambda p: (s := made(**FLOW, use_dynamic_shifting=True, time_shift_type="linear"), s.set_timesteps(4, mu=-1.0)),
                  ModelError, "above 0 where time_shift_type is linear"),
    "mu that is no number": (lambda p: (s := made(**FLOW, use_dynamic_shifting=True), s.set_timesteps(4, mu="high")), ModelError, "'high'"),
    "mu without end": (lambda p: (s := made(**FLOW, use_dynamic_shifting=True), s.set_timesteps(4, mu=1e9)), ModelError, "few units"),
    "mu that is nan": (lambda p: (s := made(**FLOW, use_dynamic_shifting=True), s.set_timesteps(4, mu=math.nan)), ModelError, "got nan"),
    "words as times": (lambda p: made().set_timesteps(timesteps=["five"]), GridError, "timesteps are numbers, got"),
    "words as sigmas": (lambda p: made(**FLOW, grid="angle").set_timesteps(sigmas="high"), GridError, "sigmas are numbers, got high"),
    "nothing among sigmas": (lambda p: made().set_timesteps(sigmas=[1.0, None]), GridError, "sigmas are numbers"),
    "a word as steps": (lambda p: made().set_timesteps("five"), GridError, "whole number, got five"),
    "endless steps": (lambda p: made().set_timesteps(math.inf), GridError, "whole number, got inf"),
    "fewer than no steps": (lambda p: made().set_timesteps(-3), GridError, "whole number, got -3"),
    "pairs of a table": (lambda p: made().set_timesteps(timesteps=[5, 3], sigmas=[2.0, 1.0]), GridError, "got timesteps and sigmas"),
    "unequal pairs": (lambda p: made(**FLOW).set_timesteps(timesteps=[5, 3], sigmas=[1.0]), GridError, "pairs, got 2 and 1"),
    "one end of a flow's levels": (lambda p: after(**FLOW, use_karras_sigmas=True, sigma_max=80.0), GridError, "give both or none"),
    "beyond pure noise": (
        lambda p: after(999, timestep_spacing="leading", steps_offset=1, rescale_betas_zero_snr=True), GridError, "beyond pure noise"),
}  # fmt: skip


CLASSES = {
    "LCMScheduler": "original_inference_steps",
    "TCDScheduler": "original_inference_steps",
    "FlowMatchLCMScheduler": "scale_factors",
    "HeliosScheduler": "stage_range",
    "HeliosDMDScheduler": "stage_range",
    "PiflowScheduler": "num_policy_substeps",
}


@theirs_warn
@pytest.mark.parametrize("name", [name for name in CLASSES if hasattr(diffusers, name)])  # older releases have not all of them
def test_schedulers_that_solve_no_ode(name, tmp_path):
    """By what only their configurations have; read from a file, by the name of their class."""
    theirs = getattr(diffusers, name)()
    with pytest.raises(ModelError, match=f"no ODE solver can stand in for a scheduler with {CLASSES[name]}"):
        FewstepScheduler.from_config(theirs.config)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"no ODE solver can stand in for {name}:"):
        FewstepScheduler.from_pretrained(tmp_path)


OTHER_STEPS = ("FlowMapEulerDiscreteScheduler", "RePaintScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler")


@pytest.mark.parametrize("name", [name for name in OTHER_STEPS if hasattr(diffusers, name)])
def test_schedulers_of_other_steps_are_refused_by_their_class(name, tmp_path):
    getattr(diffusers, name)().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"no ODE solver can stand in for {name}:"):
        FewstepScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["IPNDMScheduler", "ScoreSdeVeScheduler", "DDPMWuerstchenScheduler", "LTXEulerAncestralRFScheduler"])
def test_schedulers_whose_law_is_not_known(name):
    """Rather than this class's own betas by default."""
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    with pytest.raises(ModelError, match="no beta_schedule and is no flow known here"):
        FewstepScheduler.from_config(getattr(diffusers, name)().config)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.every(3)
def test_refusals_say_what_is_wrong(name, tmp_path):
    ask, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        ask(tmp_path)


def test_other_schedulers_keep_their_law():
    """Their defaults are not this class's: what was never written down is taken over too."""
    for name, options in {
        "EulerDiscreteScheduler": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        "SASolverScheduler": {"solver": "unipc-2"},
        "DDIMScheduler": {"timestep_spacing": "leading"},
        "DPMSolverMultistepScheduler": {"solver": "dpm-solver-pp-2m"},
        "DPMSolverSinglestepScheduler": {"solver": "dpm-solver-pp-2m:lower_order_below=0"},
        "UniPCMultistepScheduler": {"solver": "unipc-2"},
        "DEISMultistepScheduler": {"solver": "deis-3:steps=2"},
        "FlowMatchEulerDiscreteScheduler": {"use_flow_sigmas": True, "flow_shift": 1.0, "prediction_type": "flow_prediction"},
    }.items():
        made = FewstepScheduler.from_config(getattr(diffusers, name)().config)
        assert {key: made.config[key] for key in options} == options, name
    flow = FewstepScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert isinstance(flow._law.schedule, RectifiedFlow) and flow.config.flow_shift == 3.0


def test_the_usual_sigmas_of_a_flow_pipeline_only_say_how_many_steps() -> None:
    scheduler, plain = made(**FLOW, grid="angle"), made(**FLOW, grid="angle")
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])  # linspace(1, 1/4, 4), which many pipelines always pass
    plain.set_timesteps(4)
    assert torch.equal(scheduler.timesteps, plain.timesteps)
    with pytest.raises(GridError, match="leave sigmas out"):
        scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.25])
