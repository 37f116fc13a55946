"""Blind deblurring: the M-step, the evidence of kernels, what a restoration gains on digits, and refusals."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewstep
from fewstep import FewstepError, ModelError, RectifiedFlow, VarianceExploding, seeded_noise
from fewstep.data.images import load_images
from fewstep.inverse.blind import BlindConfig, deblur_blind, deblur_known
from fewstep.inverse.error_spectra import error_spectra
from fewstep.inverse.kernel_evidence import Observed, ascend, evidence, starting_kernels
from fewstep.inverse.kernel_fit import fit_kernel, on_simplex, recentred
from fewstep.inverse.measurements import CircularBlur
from fewstep.models.analytic import GaussianDenoiser

SMALL = BlindConfig(nfe=6, final=4, candidates=2, random=2, start_steps=60, steps=20, rehearsal=32)
TINY = BlindConfig(nfe=3, final=2, candidates=1, random=1, start_steps=3, steps=2, rehearsal=8)


def gaussian(deviation: float, size: int = 3) -> torch.Tensor:
    at = torch.arange(size) - size // 2.0
    kernel = torch.exp(-(at[:, None] ** 2 + at**2) / (2 * deviation**2))
    return kernel / kernel.sum()


def random_kernel(size: int = 5) -> torch.Tensor:
    kernel = torch.rand(size, size, generator=torch.Generator().manual_seed(3)) ** 3
    return recentred(kernel / kernel.sum())


def blurred(x: torch.Tensor, kernel: torch.Tensor, noise: float = 0.02) -> torch.Tensor:
    return CircularBlur(kernel)(x) + noise * seeded_noise(range(len(x)), x.shape[1:], stream=5)


def psnr(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((10 * torch.log10(4 / (x - truth[:, None]).square().flatten(2).mean(2))).mean())


def white(law: fewstep.VPLinear | VarianceExploding | RectifiedFlow, shape: tuple[int, ...]) -> GaussianDenoiser:
    return GaussianDenoiser(law, torch.zeros(shape), torch.tensor(0.5))


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    return load_images("digits").x[:6]


@pytest.fixture(scope="module")
def model() -> fewstep.Model:
    return fewstep.load_model("digits-edm")


# -- the M-step ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_a_projection_on_the_simplex_is_the_nearest_point(values):
    v = torch.tensor(values, dtype=torch.float64)
    k = on_simplex(v)
    assert float(k.min()) >= 0 and float(k.sum()) == pytest.approx(1)
    moved = v - k  # of one length where k is positive, and no larger elsewhere: the conditions of Karush, Kuhn and Tucker
    assert torch.allclose(moved[k > 0], moved[k > 0][0]) and bool((moved <= moved[k > 0][0] + 1e-9).all())
    assert torch.allclose(on_simplex(k), k)


@pytest.mark.parametrize("kernel", [gaussian(0.9, 5), torch.eye(5) / 5, random_kernel()], ids=["gaussian", "motion", "random"])
def test_an_m_step_with_the_true_pictures_finds_the_kernel(kernel):
    x = torch.nn.functional.avg_pool2d(torch.randn(4, 3, 18, 18, generator=torch.Generator().manual_seed(0)), 3, 1)
    assert float((fit_kernel(x, blurred(x, kernel), 5) - kernel).abs().sum()) < 0.1


def test_an_m_step_is_held_to_where_it_began():
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    start = gaussian(0.7)
    assert torch.allclose(fit_kernel(x, x.roll(1, -1), 3, start=start, rho=1e6), start, atol=1e-4)


def test_a_kernel_is_recentred_within_its_support():
    kernel = torch.zeros(5, 5)
    kernel[1:4, 2:4] = 1 / 6
    away = kernel.roll((1, 1), (0, 1))
    assert torch.allclose(recentred(away), kernel) or torch.allclose(recentred(away), kernel.roll(-1, 1))
    full = torch.full((5, 5), 0.01) + torch.eye(5) * 0
    full[0] += 0.15
    assert torch.equal(recentred(full), full)  # a fifth of it would leave
    assert torch.allclose(recentred(recentred(away)), recentred(away))


# -- the evidence -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spectra(model):
    return error_spectra(model, (1, 8, 8), torch.tensor([model.null_label]), num=SMALL.rehearsal, nfe=SMALL.nfe)


@pytest.mark.slow
def test_the_evidence_knows_a_kernel_from_none_but_not_from_its_mirror_image(digits, spectra):
    kernel = recentred(torch.tensor([[0.5, 0.2, 0.0], [0.0, 0.2, 0.1], [0.0, 0.0, 0.0]]))
    seen = Observed.of(blurred(digits, kernel), 0.02, spectra)
    nothing = torch.zeros(3, 3)
    nothing[1, 1] = 1
    true, mirrored, none = evidence(torch.stack([kernel, kernel.flip(0, 1), nothing]), seen, spectra.images).tolist()
    assert true == pytest.approx(mirrored, rel=1e-4) and true < none - 100


def test_an_ascent_stays_on_the_simplex_and_improves(digits, spectra):
    seen = Observed.of(blurred(digits, gaussian(0.8)), 0.02, spectra)
    cost = lambda kernels: evidence(kernels, seen, spectra.images)  # noqa: E731
    start = starting_kernels(3, 3, 2, 0)
    found = ascend(start, cost, 20, 0.15)
    assert torch.allclose(found.sum((1, 2)), torch.ones(len(start))) and bool((cost(found) < cost(start) + 1).all())


def test_errors_of_white_images_have_the_posterior_variance():
    law = VarianceExploding(t_min=0.02, t_max=20.0)
    measured = error_spectra(white(law, (2, 6, 5)), (2, 6, 5), num=400)
    for level in (0.1, 0.5, 3.0):
        assert float(measured.at(level).mean()) == pytest.approx(level**2 * 0.25 / (level**2 + 0.25), rel=0.15)
    assert measured.spread == pytest.approx(0.5, rel=0.05)


# -- the restoration ----------------------------------------------------------------------------------------------------


def test_a_gaussian_blur_of_digits_is_undone(model, digits, spectra):
    kernel = gaussian(0.8)
    y, cond = blurred(digits, kernel), torch.full((6,), model.null_label)
    found = deblur_blind(model, y, 0.02, 3, samples=1, cond=cond, spectra=spectra, config=SMALL)
    known = deblur_known(model, y, 0.02, kernel, samples=1, cond=cond, spectra=spectra, config=SMALL)
    before, after, best = (psnr(x, digits) for x in (y[:, None], found.x, known))
    assert after > before + 1 and after - before > (best - before) / 2
    assert float((found.kernel - kernel).abs().sum()) < 0.3
    assert found.x.shape == (6, 1, 1, 8, 8) and found.rehearsal == 0 and len(found.history) > 2
    assert all(float(step.kernel.sum()) == pytest.approx(1, abs=1e-4) for step in found.history)


def test_pictures_without_a_blur_are_left_alone(model, digits, spectra):
    y = blurred(digits, torch.ones(1, 1))
    found = deblur_blind(model, y, 0.02, 3, samples=1, cond=torch.full((6,), model.null_label), spectra=spectra, config=SMALL)
    assert float(found.kernel[1, 1]) == 1 and found.history == () and found.evaluations == SMALL.final
    assert psnr(found.x, digits) > psnr(y[:, None], digits) - 0.2


@pytest.mark.slow
def test_slow_em_never_leaves_the_kernel_that_does_nothing(model, digits):
    y = blurred(digits, gaussian(0.8))
    found = deblur_blind(model, y, 0.02, 3, method="slow", samples=1, cond=torch.full((6,), model.null_label))
    assert float(found.kernel[1, 1]) > 0.8 and abs(psnr(found.x, digits) - psnr(y[:, None], digits)) < 1
    assert found.evaluations == 30


@pytest.mark.parametrize("method", ["evidence", "fast", "slow"])
@pytest.mark.every(3)
def test_seeds_decide_the_answer(method):
    denoiser, y = white(VarianceExploding(t_min=0.02, t_max=20.0), (1, 5, 5)), torch.randn(2, 1, 5, 5)
    run = lambda seeds: deblur_blind(denoiser, y, 0.1, 3, method=method, samples=2, seeds=seeds, config=TINY)  # noqa: E731
    one, two, other = run(range(4)), run(range(4)), run(range(4, 8))
    assert torch.equal(one.x, two.x) and torch.equal(one.kernel, two.kernel) and not torch.equal(one.x, other.x)


@pytest.mark.parametrize("law", [VarianceExploding(t_min=0.02, t_max=20.0), fewstep.VPLinear(), RectifiedFlow()], ids=["edm", "vp", "flow"])
@pytest.mark.parametrize("method", ["evidence", "fast", "slow"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.every(4, 2)
def test_any_law_size_and_noise(law, method, noise):
    shape = (3, 6, 7)
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = deblur_blind(white(law, shape), y, noise, (3, 5), method=method, samples=2, config=TINY)
    assert found.x.shape == (1, 2, *shape) and bool(torch.isfinite(found.x).all())
    assert found.kernel.shape == (3, 5) and float(found.kernel.sum()) == pytest.approx(1, abs=1e-4) and float(found.kernel.min()) >= 0


def test_progress_and_evaluations_are_counted():
    law, said, asked = VarianceExploding(t_min=0.02, t_max=20.0), [], []
    inner = white(law, (1, 9, 9))
    denoiser = fewstep.models.guidance.Wrapped(law, lambda x, t, cond: asked.append(len(x)) or inner(x, t, cond))
    x = torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    found = deblur_blind(
        denoiser, blurred(0.5 * x, gaussian(1.0)), 0.02, 3, samples=2, config=TINY, on_progress=lambda done, note: said.append((done, note))
    )
    assert sum(asked) == 2 * found.evaluations + found.rehearsal
    assert [done for done, _ in said] == list(range(len(said))) and len(said) == 3 and said[-1][1] == "the restoration"


# -- refusals -----------------------------------------------------------------------------------------------------------

Y = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kernel_size": 4}, "odd sides"),
        ({"kernel_size": 9}, "larger than images"),
        ({"kernel_size": 2.5}, "odd number of pixels"),
        ({"y": Y * math.nan}, "not finite"),
        ({"y": torch.zeros(2, 3, 8, 8)}, r"makes samples of shape \(1, 8, 8\)"),
        ({"y": torch.zeros(8, 8)}, r"\[P, C, H, W\]"),
        ({"y": [1.0]}, "a list"),
        ({"noise": -0.1}, "finite number from 0"),
        ({"noise": math.nan}, "is a number"),
        ({"samples": 0}, "from 1"),
        ({"seeds": range(3)}, "take 8 seeds, got 3"),
        ({"method": "fats"}, "method of blind deblurring"),
        ({"config": {"nfe": 5}}, "BlindConfig"),
        ({"on_progress": 1}, "on_progress"),
    ],
)
def test_what_cannot_be_is_refused(model, changes, says):
    asked = {"y": Y, "noise": 0.1, "kernel_size": 3, **changes}
    with pytest.raises(FewstepError, match=says):
        deblur_blind(model, asked.pop("y"), asked.pop("noise"), asked.pop("kernel_size"), **asked)


def test_a_student_is_no_prior(model):
    class Jump(fewstep.FlowMap):
        @property
        def schedule(self):
            return VarianceExploding(t_min=0.02, t_max=20.0)

        def __call__(self, x, s, t, cond=None):
            return x

    student: Any = Jump()
    with pytest.raises(ModelError, match="student"):
        deblur_blind(student, Y, 0.1, 3)


def test_spectra_of_other_pictures_are_refused(model, spectra):
    with pytest.raises(ModelError, match="another size"):
        deblur_blind(model, torch.zeros(1, 1, 16, 16), 0.1, 3, spectra=spectra, config=TINY)


@pytest.mark.parametrize("x0", [torch.zeros(2, 1, 8, 7), torch.zeros(3, 1, 8, 8), None])
def test_an_m_step_refuses_other_shapes(x0):
    with pytest.raises(ModelError, match="one shape"):
        fit_kernel(x0, Y, 3)
