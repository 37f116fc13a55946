"""Posterior samples: exact for a Gaussian prior, the products of Jacobians, what methods cost, and what is refused."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

import fewstep
from fewstep import (
    FewstepError,
    ModelError,
    RectifiedFlow,
    Sampler,
    SolverError,
    VarianceExploding,
    VPLinear,
    measured,
    sample_posterior,
    seeded_noise,
)
from fewstep.core.schedule import NoiseSchedule
from fewstep.inverse.corrections import Moments, Projection
from fewstep.inverse.error_spectra import error_spectra
from fewstep.inverse.jacobian import estimate, jacobian_product
from fewstep.inverse.measurements import Average, CircularBlur, Clip, Mask, Measurement, Nonlinear
from fewstep.inverse.posterior import METHODS, make_method
from fewstep.inverse.restore import sample_interval
from fewstep.inverse.spectral import Spectral
from fewstep.models.analytic import GaussianDenoiser, MixtureDenoiser

SHAPE, STD, NOISE = (1, 4, 4), 0.5, 0.1
LAWS: dict[str, NoiseSchedule] = {"EDM": VarianceExploding(), "VP": VPLinear(), "flow": RectifiedFlow(t_min=1e-3)}
CORRECTIONS = ["projection", "proximal", "pigdm", "pigdm:backward=false", "moments", "moments:steps=3", "moments:backward=true"]


def gaussian(schedule: NoiseSchedule) -> GaussianDenoiser:
    return GaussianDenoiser(schedule, torch.zeros(SHAPE), torch.full(SHAPE, STD))


def exact(a: Average, y: torch.Tensor, noise: float = NOISE) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean ``[n]`` and covariance ``[n, n]`` of the posterior under the Gaussian prior."""
    n = 16
    matrix = a(torch.eye(n).reshape(n, *SHAPE)).flatten(1).T.double()
    inverse = torch.linalg.inv(STD**2 * matrix @ matrix.T + noise**2 * torch.eye(len(matrix), dtype=torch.float64))
    gain = STD**2 * matrix.T @ inverse
    return gain @ y.flatten().double(), STD**2 * (torch.eye(n, dtype=torch.float64) - gain @ matrix)


class Counted:
    """A denoiser that counts what it is asked for."""

    def __init__(self, denoiser: fewstep.Denoiser) -> None:
        self.denoiser, self.calls, self.with_graph = denoiser, 0, 0

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: object = None) -> torch.Tensor:
        self.calls, self.with_graph = self.calls + 1, self.with_graph + x.requires_grad
        return self.denoiser(x, t, cond)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("method", ["projection", "moments", "moments:steps=2"])
@pytest.mark.every(4)
def test_a_gaussian_prior_has_its_exact_posterior(law: str, method: str) -> None:
    """Mean within 3 standard errors in the mean over elements and 4.5 in each; covariance within 5 %."""
    a, count, prior = Average(2), 20000, gaussian(LAWS[law])
    y = a(STD * seeded_noise([7], SHAPE))[0] + NOISE * seeded_noise([8], (1, 2, 2))[0]
    mean, cov = exact(a, y)
    sampler = Sampler.build("unipc-3", "karras" if law == "EDM" else "angle", prior.schedule, nfe=40)
    start = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0)) * sampler.tableau.nodes.sigma[0].float()
    x = sample_posterior(prior, sampler, start, a, y, NOISE, method=method).flatten(1).double()
    z = (x.mean(0) - mean) / (cov.diagonal() / count).sqrt()
    assert float(z.square().mean().sqrt()) < 3 and float(z.abs().max()) < 4.5
    assert float((torch.cov(x.T) - cov).norm() / cov.norm()) < 0.05


@pytest.mark.slow
def test_intervals_of_the_exact_posterior_hold_the_truth() -> None:
    """The truth lies in the 90 % interval of 19 samples 90 times of 100, over truths, noises and samples."""
    a, count, prior = Average(2), 19, gaussian(LAWS["EDM"])
    sampler = Sampler.build("unipc-3", "karras", prior.schedule, nfe=20)
    held = []
    for seed in range(60):
        truth = STD * seeded_noise([1000 + seed], SHAPE)
        y = a(truth)[0] + NOISE * seeded_noise([2000 + seed], (1, 2, 2))[0]
        x = fewstep.start_noise(sampler.tableau.nodes, range(seed * count, (seed + 1) * count), SHAPE)
        low, high = sample_interval(sample_posterior(prior, sampler, x, a, y, NOISE))
        held.append((truth >= low) & (truth <= high))
    assert 0.85 < float(torch.stack(held).float().mean()) < 0.95


def test_an_interval_has_its_probability_for_any_number_of_samples() -> None:
    x = torch.rand(41, 20000, generator=torch.Generator().manual_seed(0))
    for count in (19, 25, 40):
        low, high = sample_interval(x[1 : count + 1])
        assert float(((x[0] > low) & (x[0] < high)).float().mean()) == pytest.approx(0.9, abs=0.01)
    with pytest.raises(ModelError, match="at least 19 samples"):
        sample_interval(x[:18])


@pytest.mark.parametrize("law", ["EDM", "VP"])
def test_without_noise_the_last_answer_explains_the_measurement(law: str) -> None:
    a, prior = Mask((seeded_noise([1], SHAPE)[0] > 0).float()), gaussian(LAWS[law])
    y = a(STD * seeded_noise([7], SHAPE))[0]
    for method in ("projection", "moments"):
        answers = list[torch.Tensor]()
        sampler = Sampler.build("ddim", "karras", prior.schedule, nfe=5)
        x = fewstep.start_noise(sampler.tableau.nodes, range(3), SHAPE)
        sample_posterior(prior, sampler, x, a, y, 0.0, method=method, observe=lambda step, answers=answers: answers.append(step.x0))
        torch.testing.assert_close(a(answers[-1]), y.expand(3, *y.shape), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "law"), list(product(CORRECTIONS, LAWS)))
@pytest.mark.every(4, 2)
def test_an_answer_that_fits_is_left_alone(method: str, law: str) -> None:
    prior, a = gaussian(LAWS[law]), Average(2)
    t, x = torch.tensor(0.5, dtype=torch.float64), seeded_noise(range(2), SHAPE)
    plain = prior(x, t)
    torch.testing.assert_close(measured(prior, a, a(plain), NOISE, method=method)(x, t), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", CORRECTIONS)
def test_corrections_do_not_see_the_scale_of_the_state(method: str) -> None:
    """The same image and level under another law are the same problem."""
    a, level, answers = Average(2), 0.7, list[torch.Tensor]()
    y = a(STD * seeded_noise([7], SHAPE))[0]
    for law in LAWS.values():
        t = law.t_of_lam(-torch.tensor(level, dtype=torch.float64).log())
        x = seeded_noise(range(2), SHAPE) * float(law.alpha(t))
        answers.append(measured(gaussian(law), a, y, NOISE, method=method)(x, t))
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=2e-4, atol=2e-4)


def test_moments_solve_the_formula_exactly_once_there_are_enough_steps() -> None:
    """Against (1) written out with the Jacobian of a mixture, which is no multiple of the identity."""
    prior = MixtureDenoiser(LAWS["EDM"], torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)]), torch.tensor([0.4, 0.7]))
    a, t = Average(2), torch.tensor(0.8, dtype=torch.float64)
    x = seeded_noise([3], SHAPE).double()
    y = a(torch.full((1, *SHAPE), 0.8, dtype=torch.float64))[0]
    jacobian = torch.autograd.functional.jacobian(lambda x: prior(x, t), x).reshape(16, 16)
    cov, plain = 0.8**2 * jacobian, prior(x, t)
    matrix = a(torch.eye(16, dtype=torch.float64).reshape(16, *SHAPE)).flatten(1).T
    u = torch.linalg.solve(matrix @ cov @ matrix.T + NOISE**2 * torch.eye(4), (y - a(plain)[0]).flatten())
    wanted = plain + (cov @ matrix.T @ u).reshape(plain.shape)
    found = measured(prior, a, y, NOISE, method=Moments(steps=4, size=1e-4))(x, t)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_product_of_an_exact_denoiser_is_symmetric() -> None:
    prior = MixtureDenoiser(LAWS["EDM"], torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)]), torch.tensor([0.4, 0.7]))
    x, v = seeded_noise([3], SHAPE).double(), seeded_noise([4], SHAPE).double()
    for level in (0.05, 0.3, 1.0, 5.0):
        t = torch.tensor(level, dtype=torch.float64)
        x0, transposed = torch.autograd.functional.vjp(lambda x, t=t: prior(x, t), x, v)
        _, forward = torch.autograd.functional.jvp(lambda x, t=t: prior(x, t), x, v)
        torch.testing.assert_close(transposed, forward, rtol=1e-12, atol=1e-12)
        by_difference = jacobian_product(prior, x, t, v, x0, size=1e-3)
        assert float((by_difference - forward).norm() / forward.norm()) < 1e-3


@pytest.mark.parametrize("name", ["digits-edm", "digits-ddpm"])
@pytest.mark.every(2)
def test_products_of_networks_by_one_evaluation(name: str) -> None:
    model = fewstep.load_model(name)
    double = replace(model, network=fewstep.load_model(name).network.double(), dtype=torch.float64)
    smooth = torch.nn.functional.avg_pool2d(seeded_noise(range(4), model.need_shape()), 3, 1, 1)
    cond = None if model.classes is None else torch.full((4,), 3)
    for level in (0.05, 0.3, 1.0, 5.0):
        t = model.schedule.t_of_lam(-torch.tensor(level, dtype=torch.float64).log())
        alpha, sigma = float(model.schedule.alpha(t)), float(model.schedule.sigma(t))
        x = alpha * 0.5 * smooth + sigma * seeded_noise(range(4), model.need_shape(), stream=1)
        h = 1e-4 * sigma
        with torch.no_grad():
            wanted = (double(x.double() + h * smooth, t, cond) - double(x.double() - h * smooth, t, cond)) / (2 * h)
            found = jacobian_product(model, x, t, smooth, model(x, t, cond), cond)
        assert float((found - wanted).norm() / wanted.norm()) < 0.04, level


@pytest.mark.parametrize(
    ("method", "calls", "backward"),
    [
        ("projection", 5, 0),
        ("proximal", 5, 0),
        ("pigdm", 5, 5),
        ("pigdm:backward=false", 10, 0),
        ("moments", 10, 0),
        ("moments:steps=2", 15, 0),
        ("moments:backward=true", 5, 5),
        ("dps", 5, 5),
        ("constrained:inner=2", 25, 0),
    ],
)
@pytest.mark.every(3)
def test_methods_cost_what_they_say(method: str, calls: int, backward: int) -> None:
    model = fewstep.load_model("digits-edm")
    counted = Counted(model)
    sampler = Sampler.build("ddim", "karras", model.schedule, nfe=5)
    x, a = fewstep.start_noise(sampler.tableau.nodes, range(2), (1, 8, 8)), Average(2)
    sample_posterior(counted, sampler, x, a, torch.zeros(1, 4, 4), 1e-4, torch.full((2,), 3), method=method)
    assert (counted.calls, counted.with_graph) == (calls, backward)
    cost = make_method(method).cost
    assert (cost[0] * 5, cost[1] * 5) == (calls, backward)


def error_of(method: str, a: Measurement, x0: torch.Tensor, noise: float, nfe: int, solver: str = "ddim") -> float:
    model = fewstep.load_model("digits-edm")
    sampler = Sampler.build(solver, "karras", model.schedule, nfe=nfe)
    seeds = range(len(x0))
    clean = a(x0)
    y = clean + noise * seeded_noise(seeds, clean.shape[1:], stream=9)
    x = fewstep.start_noise(sampler.tableau.nodes, seeds, x0.shape[1:])
    cond = torch.full((len(x0),), model.null_label or 0)
    return float((sample_posterior(model, sampler, x, a, y, noise, cond, method=method, seeds=seeds) - x0).square().mean())


@pytest.mark.slow
def test_the_covariance_of_the_model_says_more_than_a_white_one() -> None:
    from fewstep.data.images import load_images

    x0, mask = load_images("digits").x[:32], torch.ones(1, 8, 8)
    mask[:, 2:6, 2:6] = 0
    for a, noise in ((Average(2), 0.05), (Mask(mask), 0.02)):
        assert error_of("moments", a, x0, noise, 5) < 0.9 * error_of("projection", a, x0, noise, 5)


@pytest.mark.slow
def test_every_method_restores_digits() -> None:
    """All methods find the digits; moments in 10 evaluations do better than projection in 40 where a part is unknown."""
    from fewstep.data.images import load_images

    x0 = load_images("digits").x[:48]
    mask, most = torch.ones(1, 8, 8), 0.35 * float(x0.square().mean())
    mask[:, 2:6, 2:6] = 0
    for a, noise in ((Average(2), 0.05), (Mask(mask), 0.02), (CircularBlur(torch.ones(3, 3) / 9), 0.05)):
        errors = {method: error_of(method, a, x0, noise, 5) for method in ("projection", "moments", "constrained")}
        errors["dps"] = error_of("dps", a, x0, noise, 40, "ddim:eta=1") / 1.2
        errors["pigdm"] = error_of("pigdm", a, x0, noise, 24, "ddim:eta=1") / 1.2
        assert max(errors.values()) < most, (type(a).__name__, errors)
        if not isinstance(a, CircularBlur):
            assert errors["moments"] < error_of("projection", a, x0, noise, 40, "ddim:eta=1")
    camera = Clip()
    assert error_of("moments", camera, x0, 0.05, 5) < 0.5 * float((camera(x0) / 2 - x0).square().mean())
    assert error_of("constrained", camera, x0, 0.05, 5) < float((camera(x0) / 2 - x0).square().mean())


def test_a_function_stands_for_the_operator_of_its_derivative() -> None:
    prior, a = gaussian(LAWS["EDM"]), Average(2)
    t, x = torch.tensor(0.7, dtype=torch.float64), seeded_noise(range(2), SHAPE)
    y = torch.ones(1, 2, 2)
    for method in CORRECTIONS:
        by_function = measured(prior, Nonlinear(lambda x0: a(x0)), y, NOISE, method=method)(x, t)
        torch.testing.assert_close(by_function, measured(prior, a, y, NOISE, method=method)(x, t), rtol=1e-5, atol=1e-5)


def test_pure_noise_is_not_corrected() -> None:
    prior = gaussian(RectifiedFlow())
    x, t = seeded_noise(range(2), SHAPE), torch.tensor(1.0, dtype=torch.float64)
    answer = measured(prior, Average(2), torch.ones(1, 2, 2), NOISE)(x, t)
    torch.testing.assert_close(answer, prior(x, t))


def asked(prior: GaussianDenoiser, operator: object) -> torch.Tensor:
    return measured(prior, operator, torch.zeros(SHAPE), 0.1)(torch.zeros(2, *SHAPE), torch.tensor(1.0))


def sampled(prior: GaussianDenoiser, solver: str, **options: Any) -> torch.Tensor:
    sampler = Sampler.build(solver, "karras", prior.schedule, nfe=4)
    return sample_posterior(prior, sampler, torch.ones(1, *SHAPE), Average(2), torch.zeros(1, 2, 2), 0.1, **options)


def half() -> fewstep.Model:
    return replace(fewstep.load_model("digits-edm"), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (
            lambda p: measured(p, Average(2), torch.zeros(1, 4, 4), 0.1)(torch.zeros(2, *SHAPE), torch.tensor(1.0)),
            ModelError,
            "y has shape",
        ),
        (
            lambda p: measured(p, Average(2), torch.zeros(3, 1, 2, 2), 0.1)(torch.zeros(2, *SHAPE), torch.tensor(1.0)),
            ModelError,
            "each sample",
        ),
        (lambda p: measured(p, Average(2), torch.zeros(1, 2, 2)), ModelError, "noise=0.05"),
        (lambda p: measured(p, Average(2), torch.zeros(1, 2, 2), -1), ModelError, "from 0"),
        (lambda p: measured(p, Average(2), torch.full((1, 2, 2), float("nan")), 0.1), ModelError, "not finite"),
        (lambda p: measured(p, Average(2), [1.0], 0.1), ModelError, "a tensor"),
        (lambda p: measured(p, "average", torch.zeros(1, 2, 2), 0.1), ModelError, "a str"),
        (lambda p: measured(p, Average(2), torch.zeros(1, 2, 2), 0.1, method="ddrm"), ModelError, "moments"),
        (lambda p: measured(p, Average(2), torch.zeros(1, 2, 2), 0.1, method="projection:steps=2"), ModelError, "no option steps"),
        (lambda p: measured(p, Average(2), torch.zeros(1, 2, 2), 0.1, method="moments:steps=0"), ModelError, "from 1"),
        (lambda p: measured(p, Average(2), torch.zeros(1, 2, 2), 0.1, method="moments:spread=-1"), ModelError, "positive"),
        (lambda p: measured(p, Average(2), torch.zeros(1, 2, 2), 0.1, method="dps"), ModelError, "sample_posterior"),
        (lambda p: measured(p, Average(2), torch.zeros(1, 2, 2), 0.1, method="pigdm:backward=False"), FewstepError, "True or False"),
        (lambda p: measured(p, Average(2), torch.zeros(1, 2, 2), 0.1, method=Moments(backward="no")), FewstepError, "True or False"),
        (lambda p: measured(p, Average(2), torch.zeros(1, 2, 2), 0.1, method="moments:size=1e-9"), ModelError, "0.0001 to 1"),
        (lambda p: asked(p, lambda x0: None), ModelError, "a NoneType"),
        (lambda p: asked(p, lambda x0: x0.sum()), ModelError, r"keeps the batch"),
        (lambda p: asked(p, lambda x0: torch.round(x0)), ModelError, "slope 0"),
        (lambda p: error_spectra(p, SHAPE, rows=0), ModelError, "1 row"),
        (lambda p: error_spectra(p, SHAPE, seed="x"), ModelError, "seed is a whole number"),
        (lambda p: error_spectra(p, 8), ModelError, "C, H, W"),
        (lambda p: measured("digits-edm", Average(2), torch.zeros(1, 2, 2), 0.1), ModelError, "load it first"),
        (lambda p: measured(half(), Average(2), torch.zeros(1, 4, 4), 0.1), ModelError, "size=0.1"),
        (
            lambda p: jacobian_product(p, torch.zeros(1, *SHAPE), torch.tensor(1.0), torch.zeros(1, *SHAPE), None, size=0),
            ModelError,
            "from 0.0001 to 1",
        ),
        (lambda p: sampled(p, "unipc-2", method="dps"), SolverError, "use ddim"),
        (lambda p: sampled(p, "dpm-solver-pp-2m", method="constrained"), SolverError, "use ddim"),
        (lambda p: sampled(p, "ddim", seeds=[1, 2]), ModelError, "2 seeds for 1 starts"),
        (lambda p: sampled(p, "ddim", observe=3), ModelError, "called with each Step"),
    ],
)
@pytest.mark.every(2)
def test_refusals(make, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make(gaussian(LAWS["EDM"]))


def test_16_bits_take_a_longer_difference_or_back_propagation() -> None:
    for method in ("moments:size=0.1", "moments:backward=true", "projection"):
        measured(half(), Average(2), torch.zeros(1, 4, 4), 0.1, method=method)


def test_a_correction_that_is_not_finite_says_where() -> None:
    broken = Nonlinear(lambda x0: x0 / 0)
    with pytest.raises(ModelError, match="noise level 0.7"):
        measured(gaussian(LAWS["EDM"]), broken, torch.ones(SHAPE), 0.1)(torch.ones(1, *SHAPE), torch.tensor(0.7, dtype=torch.float64))


def test_names_make_methods() -> None:
    assert make_method("projection") == Projection()
    assert make_method("moments:steps=2:spread=0.3") == Moments(2, 0.3)
    assert all(isinstance(make_method(name), kind) for name, kind in METHODS.items())
    assert estimate(gaussian(LAWS["EDM"]), torch.ones(1, *SHAPE), torch.tensor(1.0)).graph is None


def test_the_correction_by_spectra_is_exact_for_stationary_images() -> None:
    """Of white Gaussian images the errors are white, so formula (1) is met up to the chance of the measured spectrum."""
    prior = GaussianDenoiser(LAWS["EDM"], torch.zeros(2, 6, 6), torch.full((2, 6, 6), STD))
    method = Spectral(error_spectra(prior, (2, 6, 6), num=2000, nfe=12))
    a, t = Average(2), torch.tensor(0.7, dtype=torch.float64)
    x, y = seeded_noise(range(4), (2, 6, 6)), 0.5 * seeded_noise([9], (2, 3, 3))[0]
    wanted = measured(prior, a, y, NOISE, method=Projection(spread=STD))(x, t)
    found = measured(prior, a, y, NOISE, method=method)(x, t)
    assert float((found - wanted).norm() / (wanted - prior(x, t)).norm()) < 0.05
    exact = measured(prior, a, y, 0.0, method=method)(x, t)
    torch.testing.assert_close(a(exact), y.expand(4, 2, 3, 3), rtol=0, atol=1e-3)
    each = measured(prior, a, y, NOISE, method=method)(x, t.expand(4))
    torch.testing.assert_close(each, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.every(3)
def test_more_steps_bring_the_spread_of_the_posterior(law: str) -> None:
    """With each correction, whose guess of the covariance has to fall with the level below the measured ones too."""
    prior = GaussianDenoiser(LAWS[law], torch.zeros(1, 8, 8), torch.full((1, 8, 8), STD))
    mask = torch.zeros(1, 8, 8)
    mask[:, ::2] = 1
    sampler = Sampler.build("ddim", "karras" if law != "flow" else "angle", prior.schedule, nfe=48)
    x = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * sampler.tableau.nodes.sigma[0].float()
    exact = (1 / STD**2 + 1 / NOISE**2) ** -0.5
    for method in ("projection", "moments", Spectral(error_spectra(prior, (1, 8, 8), num=400))):
        made = sample_posterior(prior, sampler, x, Mask(mask), torch.zeros(1, 8, 8), NOISE, method=method)
        assert float(made.std(0)[mask > 0].mean()) / exact == pytest.approx(0.92, abs=0.06), method


@pytest.mark.slow
def test_spectra_are_measured_where_none_are_passed() -> None:
    model = fewstep.load_model("digits-edm")
    a, cond = Average(2), torch.full((2,), 3)
    sampler = Sampler.build("ddim", "karras", model.schedule, nfe=3)
    x = fewstep.start_noise(sampler.tableau.nodes, range(2), (1, 8, 8))
    found = sample_posterior(model, sampler, x, a, torch.zeros(1, 4, 4), 0.05, cond, method="spectral")
    passed = Spectral(error_spectra(model, (1, 8, 8), torch.tensor([3])))
    torch.testing.assert_close(sample_posterior(model, sampler, x, a, torch.zeros(1, 4, 4), 0.05, cond, method=passed), found)
    with pytest.raises(ModelError, match="another shape"):
        measured(model, a, torch.zeros(1, 6, 6), 0.05, method=passed)(torch.zeros(1, 1, 12, 12), torch.tensor(1.0), torch.tensor([3]))


def test_spectra_that_cannot_be_are_refused() -> None:
    model, a, y = fewstep.load_model("digits-edm"), Average(2), torch.zeros(1, 4, 4)
    sampler = Sampler.build("ddim", "karras", model.schedule, nfe=3)
    x = fewstep.start_noise(sampler.tableau.nodes, range(2), (1, 8, 8))
    with pytest.raises(ModelError, match="pass method=Spectral"):
        measured(model, a, y, 0.05, method="spectral")
    with pytest.raises(ModelError, match="got a str"):
        Spectral("white")
    with pytest.raises(ModelError, match="have several"):
        sample_posterior(model, sampler, x, a, y, 0.05, torch.tensor([3, 7]), method="spectral")
    with pytest.raises(ModelError, match=r"pictures \(C, H, W\)"):
        error_spectra(model, (8,))
