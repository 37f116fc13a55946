"""Operator splitting: orders, bounded kicks, calls, what it gains with a classifier, and refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.problems import ALL, DSNO, WHOLE_REGISTRY, mixture, noise

import fewstep
from fewstep import ModelError, RectifiedFlow, Sampler, SolverError, VarianceExploding, VPLinear, classifier_guided, make_grid, sample_split
from fewstep.core.tableau import Nodes
from fewstep.models.analytic import MixtureDenoiser
from fewstep.models.guidance import Wrapped
from fewstep.sampling.loop import Step, run
from fewstep.sampling.splitting import Splitting, _kept, kick_weights

LAW = VarianceExploding(t_min=0.05, t_max=10.0)
CLASS = torch.tensor([0, 0, 0, 1, 1, 1])
FORMS = [Splitting(), Splitting("strang"), Splitting("strang", "heun"), Splitting("lie", "heun")]


def log_normal(x: torch.Tensor, t: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    """Climb towards ``guide``, the more the nearer the image is."""
    return -0.5 * (x - guide).square().flatten(1).sum(1)


def pair() -> tuple[MixtureDenoiser, object]:
    """Six Gaussians in eight dimensions, and the exact classifier of two classes of three."""
    generator = torch.Generator().manual_seed(1)
    means, std = torch.randn(6, 8, generator=generator).double(), 0.4

    def log_prob(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        alpha, sigma = LAW.alpha(t), LAW.sigma(t)
        variance = alpha**2 * std**2 + sigma**2
        each = torch.log_softmax(-0.5 * (x[:, None] - alpha * means).square().sum(-1) / variance, 1)
        by_class = torch.stack([torch.logsumexp(each[:, k == CLASS], 1) for k in (0, 1)], 1)
        return by_class.gather(1, labels[:, None])[:, 0]

    return MixtureDenoiser(LAW, means, torch.full((6,), std).double()), log_prob


# -- order -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def errors():
    denoiser, log_prob = pair()
    labels, x = torch.arange(60) % 2, noise(60, 8) * 10
    joint = classifier_guided(denoiser, log_prob, 2.0)
    sampler = lambda name, steps: Sampler.build(name, make_grid("karras", LAW, steps, rho=3.0), LAW)  # noqa: E731
    exact = run(joint, sampler("heun", 640).tableau, x, labels)

    def median(name: str, steps: int, splitting: Splitting) -> float:
        made = sample_split(denoiser, sampler(name, steps), x, log_prob, 2.0, guide=labels, splitting=splitting)
        return float((made - exact).square().mean(1).sqrt().median())

    return median


@pytest.mark.parametrize(
    ("name", "splitting", "least", "most"),
    [
        ("dpm-solver-2s", Splitting("strang", "heun"), 1.9, 2.3),
        ("heun", Splitting("strang", "heun"), 1.9, 2.3),
        ("dpm-solver-2s", Splitting("strang", "heun", "frozen"), 1.9, 2.3),
        ("ddim", Splitting(), 0.8, 1.2),
        ("dpm-solver-pp-2m:form=taylor", Splitting(), 0.8, 1.2),
        ("dpm-solver-pp-2m:form=taylor", Splitting("strang"), 0.8, 1.5),  # a history sees the kicks: second order is lost
    ],
)
@pytest.mark.every(3)
def test_orders(errors, name, splitting, least, most):
    order = math.log2(errors(name, 80, splitting) / errors(name, 160, splitting))
    assert least <= order <= most


# -- the kicks ----------------------------------------------------------------------------------------------------------


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 0.999), st.sampled_from(FORMS), st.sampled_from(["ve", "vp", "flow"]))
@settings(max_examples=60, deadline=None)
def test_all_weights_are_between_0_and_1(level, ratio, splitting, law):
    s = torch.tensor([level, level * ratio], dtype=torch.float64)
    alpha = {"ve": torch.ones_like(s), "vp": (1 + s**2) ** -0.5, "flow": 1 / (1 + s)}[law]
    nodes = Nodes(s, alpha, alpha * s, -s.log())
    assert all(0 <= weight <= 1 for weight in kick_weights(nodes, 0, 1, splitting))


def test_weights_at_the_ends():
    flow = RectifiedFlow(t_max=1.0, t_min=0.0)
    nodes = Nodes.at(flow, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    assert kick_weights(nodes, 0, 1, Splitting()) == (0, 1) and kick_weights(nodes, 1, 2, Splitting()) == (0, 1)
    assert kick_weights(nodes, 0, 1, Splitting("strang")) == (0, 1) and kick_weights(nodes, 1, 2, Splitting("strang")) == (1, 1)
    for a, e in ((0, 1), (1, 2)):
        with pytest.raises(SolverError, match="the frozen kick is infinite from pure noise and to the clean image"):
            kick_weights(nodes, a, e, Splitting(form="frozen"))


def test_bounded_kicks_agree_with_frozen_ones_as_steps_shrink():
    def gap(h: float) -> float:
        s = torch.tensor([1.0, 1.0 - h], dtype=torch.float64)
        nodes, sums = Nodes(s, torch.ones_like(s), s, -s.log()), []
        for form in ("bounded", "frozen"):  # in units of a constant gradient: each weighs its sigma squared
            before, after = kick_weights(nodes, 0, 1, Splitting("strang", form=form))
            sums.append(before * s[0] ** 2 + after * s[1] ** 2)
        return abs(float(sums[0] - sums[1]))

    assert gap(0.05) / gap(0.025) > 6  # a difference of third order


def test_a_flow_from_pure_noise_to_the_clean_image_is_finite():
    flow = RectifiedFlow(t_max=1.0, t_min=0.0)
    sampler = Sampler.build("ddim", "angle", flow, nfe=4)
    for splitting in FORMS:
        made = sample_split(mixture(flow), sampler, noise(3, 2), log_normal, 2.0, guide=torch.ones(2), splitting=splitting)
        assert bool(torch.isfinite(made).all())


# -- what is called ------------------------------------------------------------------------------------------------------


def sampler(name: str, count: int = 6) -> Sampler:
    solver = ALL[name] if name in ALL else fewstep.make_solver(name)
    return Sampler.build(solver, fewstep.TimeGrid.logsnr(VPLinear(), count), VPLinear())


def test_without_guidance_it_is_the_sample_to_the_bit():
    for name in ("ddim", "heun", "ddim-eta-1", "ipndm"):
        made = sample_split(mixture(VPLinear()), sampler(name), noise(3, 2), log_normal, 0.0, guide=torch.ones(2), seeds=[1, 2, 3])
        assert torch.equal(made, run(mixture(VPLinear()), sampler(name).tableau, noise(3, 2), seeds=[1, 2, 3]))


@pytest.mark.parametrize(("splitting", "gradients"), [(FORMS[0], 6), (FORMS[1], 12), (FORMS[2], 24), (FORMS[3], 12)])
def test_calls(splitting, gradients):
    calls = {"D": 0, "log_prob": 0}

    def answer(x, t, cond):
        calls["D"] += 1
        return mixture(VPLinear())(x, t)

    def log_prob(x, t, guide):
        calls["log_prob"] += 1
        return log_normal(x, t, guide)

    sample_split(Wrapped(VPLinear(), answer), sampler("ddim"), noise(3, 2), log_prob, 1.0, guide=torch.ones(2), splitting=splitting)
    assert calls == {"D": 6, "log_prob": gradients}


def test_steps_show_where_the_denoiser_was_called_and_the_state_after_the_kick():
    seen, called, places = list[Step](), list[torch.Tensor](), list[torch.Tensor]()

    def answer(x, t, cond):
        called.append(x)
        return mixture(VPLinear())(x, t)

    def log_prob(x, t, guide):
        places.append(x.detach().clone())
        return log_normal(x, t, guide)

    denoiser = Wrapped(VPLinear(), answer)
    options = {"guide": torch.ones(2), "splitting": Splitting("strang"), "observe": seen.append}
    made = sample_split(denoiser, sampler("ddim"), noise(3, 2), log_prob, 1.0, **options)
    assert torch.equal(seen[-1].x_next, made) and len(places) == 12
    for k, step in enumerate(seen):
        assert torch.equal(step.x, called[k])
        if k < 5:
            assert torch.equal(step.x_next, places[2 * (k + 1)])  # where the next step's first half kick begins


def test_noise_is_part_of_the_model_and_the_kick_comes_after_it():
    options = {"guide": torch.ones(2), "seeds": [3, 1, 4]}
    made = sample_split(mixture(VPLinear()), sampler("ddim-eta-1"), noise(3, 2), log_normal, 1.0, **options)
    again = sample_split(mixture(VPLinear()), sampler("ddim-eta-1"), noise(3, 2), log_normal, 1.0, **options)
    assert torch.equal(made, again) and float((made - 1).square().mean()) < 0.5


@pytest.mark.parametrize(
    "name", ["ddim:eta=1", "sde-dpm-solver-pp-2m", "lcm", "dpm2-ancestral", "seeds-2", "heun-churn", "sa-solver", "restart"]
)
@pytest.mark.every(4)
def test_samplers_that_add_noise_are_guided_to_the_posterior(name):
    """Of a standard normal measured with noise. By the share of the state that the ODE keeps, its mean would come out at 0.65, not at 1."""
    law, y, variance, count = VPLinear(), 1.5, 0.5, 1500

    def log_likelihood(x, t, guide):
        alpha, sigma = law.alpha(t), law.sigma(t)
        total = alpha**2 + sigma**2
        return -((y - alpha * x[:, 0] / total) ** 2) / (2 * (sigma**2 / total + variance))

    prior = fewstep.GaussianDenoiser(law, torch.zeros(1, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    made = fewstep.Sampler.build(name, "angle", law, nfe=48)
    start = fewstep.start_noise(made.tableau.nodes, range(count), (1,)).double()
    found = sample_split(prior, made, start, log_likelihood, 1.0, seeds=range(count))
    assert float(found.mean()) == pytest.approx(y / (1 + variance), abs=0.07)
    assert name == "lcm" or float(found.var()) == pytest.approx(variance / (1 + variance), abs=0.06)  # its own keeps too little


def test_the_share_that_a_step_with_noise_keeps():
    """Of Euler ancestral it is ``sigma_down/sigma``, and an ODE's is left alone, to the bit."""
    law = VPLinear()
    tableau = fewstep.Sampler.build("euler-ancestral", "logsnr", law, nfe=6).tableau
    assert torch.allclose(torch.tensor([_kept(tableau)(i, i + 1) for i in range(6)]).double(), tableau.update[:, 1, 1], rtol=1e-6)
    assert _kept(sampler("ddim").tableau)(0, 1) is None
    with pytest.raises(SolverError, match="the frozen kick is that of the sampling ODE"):
        sample_split(mixture(law), tableau, noise(1, 2), log_normal, 1.0, splitting=Splitting(form="frozen"), seeds=[1])


@pytest.mark.parametrize("name", WHOLE_REGISTRY)
@pytest.mark.every(4)
def test_every_solver_runs_or_is_refused(name):
    table = sampler(name)
    ask = lambda: sample_split(mixture(VPLinear()), table, noise(3, 2), log_normal, 0.5, guide=torch.ones(2), seeds=[1, 2, 3])  # noqa: E731
    if table.tableau.whole_steps[-1]:
        assert bool(torch.isfinite(ask()).all())
    else:
        assert name in ("unipc-2", "unipc-3", "abm-3", "dpm-solver-v3")
        with pytest.raises(SolverError, match="corrector returns to the state before the last one, and would undo a kick: use ddim"):
            ask()


def test_unipc_without_its_corrector_runs():
    sample_split(mixture(VPLinear()), sampler("unipc-2:corrector=false"), noise(3, 2), log_normal, 0.5, guide=torch.ones(2))


def test_a_loss_of_the_clean_image_runs_through_the_network():
    denoiser = mixture(VPLinear())
    loss = lambda x, t, target: -4 * (denoiser(x, t) - target).square().sum(1)  # noqa: E731
    target = torch.tensor([0.8, 0.24], dtype=torch.float64)
    plain = run(denoiser, sampler("ddim", 12).tableau, noise(16, 2))
    made = sample_split(denoiser, sampler("ddim", 12), noise(16, 2), loss, 1.0, guide=target, splitting=Splitting("strang"))
    assert float((made - target).square().mean()) < 0.5 * float((plain - target).square().mean())


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"scale": math.inf}, ModelError, "the scale of guidance is a finite number, got inf"),
        ({"scale": "much"}, ModelError, "the scale of guidance is a number"),
        ({"log_prob": 3}, SolverError, "log_prob is a function"),
        ({"log_prob": None}, SolverError, "log_prob is a function, got a NoneType"),
        ({"observe": 3}, SolverError, "observe is a function"),
        ({"sampler": "ddim"}, SolverError, "a Sampler or a Tableau, not a str"),
        ({"splitting": "strang"}, SolverError, "splitting is a fewstep.Splitting, got 'strang'"),
        ({"log_prob": lambda x, t, c: x.sum()}, ModelError, r"one number for each of 3 samples, \[B\], got shape \(\)"),
        ({"log_prob": lambda x, t, c: 1.0}, ModelError, r"\[B\], got a float"),
        ({"log_prob": lambda x, t, c: torch.zeros(len(x))}, ModelError, "log_prob does not depend on x"),
        ({"log_prob": lambda x, t, c: torch.zeros(len(x), requires_grad=True)}, ModelError, "log_prob does not depend on x"),
        ({"log_prob": lambda x, t, c: x.sum(1) * math.nan}, ModelError, "gradient of log_prob is not finite at t = "),
        ({"sampler": sampler("ddim-eta-1")}, SolverError, "adds noise: pass seeds="),
        ({"x": 3}, ModelError, "x is the start"),
        ({"denoiser": mixture(RectifiedFlow())}, ModelError, "another noise schedule"),
        ({"denoiser": fewstep.load_model(DSNO).guided()}, ModelError, "cannot be split: guide its teacher"),
    ],
)
def test_what_cannot_be_is_refused(change, error, says):
    asked = {"denoiser": mixture(VPLinear()), "sampler": sampler("ddim"), "x": noise(3, 2), "log_prob": log_normal, "scale": 1.0}
    with pytest.raises(error, match=says):
        sample_split(**(asked | {"guide": torch.ones(2)} | change))


@pytest.mark.parametrize("options", [{"scheme": "li"}, {"kick": "rk4"}, {"form": "free"}])
def test_unknown_words_are_refused(options):
    with pytest.raises(SolverError, match="unknown .* of a splitting"):
        Splitting(**options)
