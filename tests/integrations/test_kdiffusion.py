"""k-diffusion's convention: the same samples as ours, from its models, its states and its callbacks."""

import math

import pytest
import torch
from tests.problems import ALL, STOCHASTIC, WHOLE_REGISTRY, mixture, statistics

from fewstep import (
    ArtifactError,
    DiscreteVP,
    GridError,
    ModelError,
    ModelStatistics,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    VPLinear,
    load_model,
    make_grid,
    make_solver,
    sample,
    seeded_noise,
    start_noise,
    tabulate,
)
from fewstep.integrations.kdiffusion import sample_fewstep, sigmas_for

SAME = 1e-6  # ours and theirs, in float64: the network's time goes through its level and back
FLOAT32_RUN = 1e-5  # a few float32 steps
HALF_RUN = 2e-2  # a network that sees bfloat16 states
SIGMAS = [14.6, 6.0, 2.5, 1.0, 0.3, 0.0]
LAWS = {
    "edm": VarianceExploding(t_max=20.0),
    "vp": VPLinear(),
    "table": DiscreteVP.linear(),
    "flow": RectifiedFlow(shift=3.0),
}


def network(denoiser, law="eps", calls=None):
    """One of our denoisers as k-diffusion has them: for a host's state and sigma, whatever its own noise law."""
    schedule = denoiser.schedule

    def model(x, sigma, gain=1.0):
        if calls is not None:
            calls.append((x, sigma))
        level = sigma.double()[0]
        lam = -torch.log(level) if law == "eps" else torch.log1p(-level) - torch.log(level)
        t = schedule.t_of_lam(lam)
        alpha, spread = schedule.alpha(t), schedule.sigma(t)
        scale = alpha if law == "eps" else alpha + spread
        return gain * denoiser(scale.to(x.dtype) * x, t)

    return model


def start(sigma=SIGMAS[0], count=3, dtype=torch.float64):
    return (sigma * seeded_noise(range(count), (2,))).to(dtype)


def adds_noise(solver):
    grid, schedule = TimeGrid(torch.tensor(SIGMAS)), VarianceExploding()
    return tabulate(solver, solver.nodes(grid, schedule)).stochastic


def relative(one, two):
    return float((one - two).abs().max() / two.abs().max())


# -- the same samples as fewstep.sample -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.every(7, 2)
def test_every_solver_is_the_one_of_sample(name):
    schedule, solver = VarianceExploding(), ALL[name]
    sampler = Sampler.build(solver, TimeGrid(torch.tensor(SIGMAS)), schedule)
    expected = sample(mixture(schedule), sampler, start(), seeds=[4, 5, 6])
    seeds = [4, 5, 6] if adds_noise(solver) else None
    ours = sample_fewstep(network(mixture(schedule)), start(), torch.tensor(SIGMAS), solver=solver, seeds=seeds)
    assert relative(ours, expected) < SAME


@pytest.mark.parametrize("host", ["eps", "flow"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["unipc-3", "heun", "dpm-solver-2s", "sde-dpm-solver-pp-2m"])
@pytest.mark.every(5, 2)
def test_a_saved_sampler_runs_in_its_own_space(name, law, host, tmp_path):
    schedule = LAWS[law]
    ends = {"t_max": 0.95} if law == "flow" else {}
    sampler = Sampler.build(WHOLE_REGISTRY[name], make_grid("angle", schedule, 4, **ends), schedule)
    nodes = sampler.tableau.nodes
    x = start_noise(nodes, range(3), (2,)).double()
    expected = sample(mixture(schedule), sampler, x, seeds=range(3))
    scale = nodes.alpha if host == "eps" else nodes.alpha + nodes.sigma
    folder = sampler.save(tmp_path / "sampler")
    seeds = range(3) if adds_noise(WHOLE_REGISTRY[name]) else None
    for sigmas in (None, sigmas_for(folder, law=host)):
        ours = sample_fewstep(network(mixture(schedule), host), x / scale[0], sigmas, sampler=str(folder), law=host, seeds=seeds)
        assert relative(scale[-1] * ours, expected) < SAME


def test_pure_noise_has_no_sigma_but_a_flow_level():
    """From ``alpha = 0`` to the clean image."""
    schedule = RectifiedFlow(shift=3.0)
    sampler = Sampler.build(make_solver("unipc-2"), make_grid("uniform", schedule, 4), schedule)
    x = start(1.0)
    assert sigmas_for(sampler, law="flow").tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    model = network(mixture(schedule), "flow")
    sigmas = torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64)
    for ours in (sample_fewstep(model, x, sampler=sampler, law="flow"), sample_fewstep(model, x, sigmas, law="flow")):
        assert relative(ours, sample(mixture(schedule), sampler, x)) < SAME
    for ask in (lambda: sample_fewstep(model, x, sampler=sampler), lambda: sigmas_for(sampler)):
        with pytest.raises(GridError, match="pure noise"):
            ask()


@pytest.mark.parametrize("gate", ["always", "half"])
@pytest.mark.every(2)
def test_statistics_of_a_discrete_model_drive_v3(gate):
    """They live along lam, and the half of a time range is that of their own law."""
    model = load_model("digits-ddpm")
    ems = ModelStatistics.load(model.folder / "statistics")
    schedule = model.schedule
    solver = make_solver("dpm-solver-v3", statistics=ems, gate=gate)
    sampler = Sampler.build(solver, make_grid("angle", schedule, 5), schedule)
    nodes = sampler.tableau.nodes
    x = start_noise(nodes, range(2), model.shape)
    with torch.no_grad():
        expected = sample(model, sampler, x)
        sigmas = torch.exp(-nodes.lam)
        kwargs = {"solver": f"dpm-solver-v3:gate={gate}", "statistics": model.folder / "statistics"}
        ours = sample_fewstep(network(model), x / nodes.alpha[0].float(), sigmas, **kwargs)
    assert relative(nodes.alpha[-1] * ours, expected) < FLOAT32_RUN


def test_the_bundled_fitted_sampler_runs_on_ve_states():
    model = load_model("digits-ddpm")
    sampler = Sampler.load(model.folder / "fitted" / "nfe-04")
    nodes = sampler.tableau.nodes
    x = start_noise(nodes, range(2), model.shape)
    with torch.no_grad():
        expected = sample(model, sampler, x)
        ours = sample_fewstep(network(model), x / nodes.alpha[0].float(), sampler=model.folder / "fitted" / "nfe-04")
    assert relative(nodes.alpha[-1] * ours, expected) < FLOAT32_RUN


# -- levels ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([5.0, 2.0, 2.0, 0.0], r"2 \(at index 1\) appears twice"),
        ([5.0, 2.0, 3.0, 0.0], r"2 \(at index 1\) is followed by the larger 3"),
        ([5.0, math.nan, 0.0], "time 1 of the grid is not finite"),
        ([5.0, 1.0, -1.0], "between 0 and infinity"),
    ],
)
def test_bad_sigmas_are_named(sigmas, message):
    with pytest.raises(GridError, match=message):
        sample_fewstep(network(mixture(VarianceExploding())), start(), torch.tensor(sigmas))


def test_flow_levels_end_at_one():
    with pytest.raises(GridError, match="between 0 and 1 under the law flow"):
        sample_fewstep(network(mixture(RectifiedFlow())), start(), [14.0, 0.0], law="flow")
    with pytest.raises(GridError, match="unknown law 'vp'"):
        sample_fewstep(network(mixture(RectifiedFlow())), start(), [14.0, 0.0], law="vp")


@pytest.mark.parametrize("sigmas", [[], [3.0]])
def test_no_interval_is_no_step(sigmas):
    x = start()
    assert sample_fewstep(None, x, torch.tensor(sigmas)) is x


def test_sigmas_are_wanted_without_a_sampler():
    with pytest.raises(GridError, match="only a saved sampler has its own"):
        sample_fewstep(None, start())


def test_a_sampler_holds_its_ends():
    sampler = Sampler.build(make_solver("ddim"), TimeGrid(torch.tensor(SIGMAS)), VarianceExploding())
    model = network(mixture(VarianceExploding()))
    ours = sample_fewstep(model, start(), [14.6, 0.0], sampler=sampler)
    assert torch.equal(ours, sample_fewstep(model, start(), torch.tensor(SIGMAS), sampler=sampler))
    for sigmas, message in (
        ([10.0, 1.0, 0.0], r"starts at sigma = 14\.6, but the sigmas given start at 10: use sigmas_for\(sampler\)"),
        ([14.6, 1.0, 0.03], "ends at sigma = 0, but the sigmas given end at 0.03"),
        ([14.6], "takes the sigmas of its start and its end"),
    ):
        with pytest.raises(GridError, match=message):
            sample_fewstep(model, start(), torch.tensor(sigmas), sampler=sampler)


def test_times_that_a_solver_moves_are_refused():
    """Trapezoid integrals put all times on the statistics' own grid: the state given is not at that level."""
    with pytest.raises(GridError, match="with these options the solver starts at"):
        sample_fewstep(None, start(), [14.6, 1.0, 0.3], solver=make_solver("dpm-solver-v3", statistics=statistics(), integrals="trapezoid"))


# -- callbacks, evaluations, noise, progress ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "intervals"),
    [
        ("unipc-2", [0, 1, 2, 3, 4]),
        ("heun", [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        ("dpm-solver-2s", [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        ("dpm-solver-3s", [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]),
    ],
)
def test_callbacks_and_evaluations_follow_the_solver(name, intervals):
    seen, calls = [], []
    model = network(mixture(VarianceExploding()), calls=calls)
    sample_fewstep(model, start(), torch.tensor(SIGMAS), {"gain": 1.0}, seen.append, solver=name)
    assert [entry["i"] for entry in seen] == intervals
    for entry, (x, sigma) in zip(seen, calls, strict=True):
        assert set(entry) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert entry["x"] is x
        assert entry["sigma"].shape == () and entry["sigma"].dtype == torch.float32
        assert sigma.shape == (3,) and sigma.dtype == x.dtype
        assert float(entry["sigma"]) == float(entry["sigma_hat"]) == pytest.approx(float(sigma[0]))
    if name == "unipc-2":
        assert [float(sigma[0]) for _, sigma in calls] == pytest.approx(SIGMAS[:-1])


def test_one_interval_to_the_clean_image():
    seen = []
    sample_fewstep(network(mixture(VarianceExploding())), start(), [14.6, 0.0], callback=seen.append, solver="dpm-solver-3s")
    assert [entry["i"] for entry in seen] == [0]


def test_extra_args_reach_the_model():
    def model(x, sigma, cond, cond_scale):
        return cond["shift"] * cond_scale + 0 * x

    extra = {"cond": {"shift": torch.tensor([1.0, 2.0])}, "cond_scale": 2.0}
    assert sample_fewstep(model, start(), SIGMAS, extra)[0].tolist() == pytest.approx([2.0, 4.0])


ONCE = [  # noise in each step, between the levels of the grid
    name for name, solver in STOCHASTIC.items() if solver.stages == 1 and name != "sa-solver-2-uncorrected" and "churn" not in name
]


def asked_by(name):
    """The samples, and what a noise sampler was asked."""
    asked = []

    def noise_sampler(sigma, sigma_next):
        asked.append((float(sigma), float(sigma_next)))
        return seeded_noise([4, 5, 6], (2,), stream=len(asked))

    model = network(mixture(VarianceExploding()))
    return sample_fewstep(model, start(), SIGMAS, solver=STOCHASTIC[name], noise_sampler=noise_sampler), asked


@pytest.mark.parametrize("name", ONCE)
def test_a_noise_sampler_is_asked_between_levels(name):
    made, asked = asked_by(name)
    assert [sigma for pair in asked for sigma in pair] == pytest.approx(
        [s for pair in zip(SIGMAS[:4], SIGMAS[1:5], strict=True) for s in pair]
    )
    model = network(mixture(VarianceExploding()))
    assert torch.equal(made, sample_fewstep(model, start(), SIGMAS, solver=STOCHASTIC[name], seeds=[4, 5, 6]))


@pytest.mark.parametrize("name", ["dpm2-ancestral", "dpm-solver-pp-2s-ancestral-flow"])
def test_noise_of_a_whole_step_is_asked_for_as_such(name):
    assert asked_by(name)[1] == [pytest.approx(pair) for pair in zip(SIGMAS[:4], SIGMAS[1:5], strict=True)]


@pytest.mark.parametrize(("name", "stages"), [("dpm-solver-pp-sde", 2), ("seeds-2", 2), ("seeds-3", 3)])
def test_noises_within_a_step_are_asked_for_side_by_side(name, stages):
    asked = asked_by(name)[1]
    assert [sigma for sigma, _ in asked[::stages]] == pytest.approx(SIGMAS[:4]) and len(asked) == 4 * stages
    assert [end for _, end in asked[:-1]] == pytest.approx([begin for begin, _ in asked[1:]])


def test_noise_is_asked_for():
    model = network(mixture(VarianceExploding()))
    kwargs = {"solver": "sde-dpm-solver-pp-2m"}
    for more, message in (
        ({}, "pass seeds=, one for each sample, or noise_sampler="),
        ({"seeds": [1, 2, 3], "noise_sampler": lambda s, t: start()}, "and not both"),
        ({"seeds": [1]}, "1 seeds for 3 samples"),
        ({"noise_sampler": lambda s, t: torch.zeros(2)}, r"the noise sampler answered shape \(2,\)"),
    ):
        with pytest.raises(SolverError, match=message):
            sample_fewstep(model, start(), SIGMAS, **kwargs, **more)


@pytest.mark.parametrize(("disable", "shows"), [(None, False), (True, False), (False, True)])
def test_progress_is_shown_when_asked_for(disable, shows, capsys):
    sample_fewstep(network(mixture(VarianceExploding())), start(), SIGMAS, None, None, disable)
    captured = capsys.readouterr()
    assert ("sampling" in captured.err) == shows
    assert captured.out == ""


# -- dtypes, gradients, devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_models_alone(dtype):
    calls = []
    x = start(dtype=dtype)
    ours = sample_fewstep(network(mixture(VarianceExploding()), calls=calls), x, torch.tensor(SIGMAS))
    assert ours.dtype == dtype
    assert {(one.dtype, two.dtype) for one, two in calls} == {(dtype, dtype)}
    expected = sample_fewstep(network(mixture(VarianceExploding())), x.float(), torch.tensor(SIGMAS))
    assert relative(ours.float(), expected) < HALF_RUN


@pytest.mark.parametrize("name", [*WHOLE_REGISTRY, "ddim-eta-0.5", "ddim-eta-1"])
@pytest.mark.every(5, 2)
def test_gradients_exist_and_are_right(name):
    """To the start and to every level but the last, where it is 0 rather than NaN."""
    model = network(mixture(VarianceExploding()))
    options = {"solver": ALL[name], "seeds": [1, 2, 3] if adds_noise(ALL[name]) else None}
    levels = sigmas_for("karras", 5, 0.1, 8.0).double()

    def total(sigmas, x):
        return sample_fewstep(model, x, sigmas, **options).square().sum()

    sigmas, x = levels.clone().requires_grad_(), start(8.0).requires_grad_()
    total(sigmas, x).backward()
    assert bool(torch.isfinite(x.grad).all()) and bool((x.grad != 0).any())
    assert bool(torch.isfinite(sigmas.grad).all())
    assert sigmas.grad[-1] == 0
    for k in (1, 4):
        step = 1e-5 * torch.eye(6, dtype=torch.float64)[k]
        slope = (total(levels + step, start(8.0)) - total(levels - step, start(8.0))) / 2e-5
        assert float(sigmas.grad[k]) == pytest.approx(float(slope), rel=1e-4, abs=1e-6)


def test_gradients_through_the_space_of_statistics_and_flow():
    ems = statistics()
    sigmas = torch.tensor(SIGMAS, dtype=torch.float64, requires_grad=True)
    solver = make_solver("dpm-solver-v3", statistics=ems, steps=3)
    sample_fewstep(network(mixture(VPLinear())), start(), sigmas, solver=solver).sum().backward()
    flow = torch.tensor([1.0, 0.8, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    sample_fewstep(network(mixture(RectifiedFlow()), "flow"), start(1.0), flow, law="flow").sum().backward()
    assert bool(torch.isfinite(sigmas.grad).all()) and bool(torch.isfinite(flow.grad).all())
    assert flow.grad[0] == flow.grad[-1] == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes(mode):
    with mode():
        ours = sample_fewstep(network(mixture(VarianceExploding())), start(), torch.tensor(SIGMAS))
    assert not ours.requires_grad
    assert torch.equal(ours, sample_fewstep(network(mixture(VarianceExploding())), start(), torch.tensor(SIGMAS)))


def test_the_given_tensors_are_left_alone():
    x, sigmas = start(), torch.tensor(SIGMAS)
    before, levels = x.clone(), sigmas.clone()
    sample_fewstep(network(mixture(VarianceExploding())), x, sigmas)
    assert torch.equal(x, before) and torch.equal(sigmas, levels)


def test_integer_and_listed_sigmas():
    model = network(mixture(VarianceExploding()))
    seen = []
    ours = sample_fewstep(model, start(8.0), torch.tensor([8, 2, 0]), callback=seen.append)
    assert seen[0]["sigma"].dtype == torch.float32
    assert torch.equal(ours, sample_fewstep(model, start(8.0), [8.0, 2.0, 0.0]))


# -- what a model or an artifact may do wrong -----------------------------------------------------------------------------------------


def test_wrong_answers_are_refused():
    with pytest.raises(ModelError, match=r"answered shape \(3, 1\) to a state of shape \(3, 2\)"):
        sample_fewstep(lambda x, sigma: x[:, :1], start(), SIGMAS)
    with pytest.raises(ModelError, match="not finite .* at evaluation 3 of 5, t = 2.5, sigma = 2.5"):
        sample_fewstep(lambda x, sigma: x * (math.nan if sigma[0] < 3 else 0.1), start(), SIGMAS)


def test_wrong_shapes_are_refused():
    ems = ModelStatistics.load(load_model("digits-ddpm").folder / "statistics")
    with pytest.raises(ArtifactError, match=r"for samples of shape \(1, 8, 8\), not \(2,\)"):
        sample_fewstep(None, start(), SIGMAS, solver="dpm-solver-v3", statistics=ems)
    with pytest.raises(SolverError, match=r"samples of shape \(1, 8, 8\), which \(2,\) is not"):
        sample_fewstep(None, start(), sampler=load_model("digits-ddpm").folder / "fitted" / "nfe-04")


def test_wrong_partners_are_refused(tmp_path):
    sampler = Sampler.build(make_solver("ddim"), TimeGrid(torch.tensor(SIGMAS)), VarianceExploding())
    for kwargs, message in (
        ({"statistics": statistics()}, "takes no statistics"),
        ({"statistics": statistics(), "sampler": sampler}, "not both"),
        ({"solver": "unipx"}, "did you mean .*unipc-"),
        ({"solver": "dpm-solver-v3"}, "needs statistics"),
    ):
        with pytest.raises(SolverError, match=message):
            sample_fewstep(None, start(), SIGMAS, **kwargs)
    with pytest.raises(ArtifactError, match="cannot read"):
        sample_fewstep(None, start(), sampler=tmp_path)


def test_dpm_solver_pp_is_that_of_k_diffusion():
    """Its formula for 2M, written out: first order at the start and into a last 0, whatever the number of steps."""
    model, levels = network(mixture(VarianceExploding())), torch.tensor(SIGMAS, dtype=torch.float64)
    x, before = start(), None
    for i, (s, t) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        denoised = model(x, s * torch.ones(3))
        towards = denoised
        if i > 0 and t > 0:
            ratio = torch.log(levels[i - 1] / s) / torch.log(s / t)
            towards = (1 + 1 / (2 * ratio)) * denoised - before / (2 * ratio)
        x, before = t / s * x + (1 - t / s) * towards, denoised
    ours = sample_fewstep(model, start(), levels, solver="dpm-solver-pp-2m:lower_order_below=0")
    assert relative(ours, x) < SAME


def test_a_sampler_of_a_reflected_model_is_refused():
    law = VarianceExploding(t_min=0.01, t_max=3.0)
    sampler = Sampler.build("ddim", "karras", law, nfe=3).with_card(domain=[-1.0, 1.0])
    with pytest.raises(SolverError, match="of a reflected model, whose samples the host would not fold"):
        sample_fewstep(lambda x, sigma: x, torch.zeros(1, 2), sampler=sampler)
