"""Figures of restorations against values worked out by hand, and the coverage of an exact posterior."""

import importlib.util

import pytest
import torch
from torch import nn

from fewstep import ModelError, Sampler, VarianceExploding, sample_posterior, seeded_noise
from fewstep.evaluate.metrics.restoration import check_ssim, coverage, feature_distance, mean_and_error, misfit, psnr, ssim
from fewstep.inverse.measurements import Average
from fewstep.models.analytic import GaussianDenoiser
from fewstep.runtime.errors import FewstepError

TRUTH = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5


def test_psnr_counts_what_is_shown() -> None:
    assert psnr(TRUTH + 0.2, TRUTH).tolist() == pytest.approx([20.0] * 3, abs=1e-4)
    assert psnr(TRUTH, TRUTH).tolist() == [pytest.approx(106.02, abs=0.01)] * 3
    white = torch.ones(1, 1, 4, 4)
    assert float(psnr(white * 7, white)) > 100  # brighter than white is white


def test_ssim_is_of_the_whole_picture() -> None:
    assert ssim(TRUTH, TRUTH).tolist() == pytest.approx([1.0] * 3)
    corner = TRUTH.clone()
    corner[..., 0, 0] += 0.5  # which the usual window would leave out of 8 x 8 pixels
    assert ((ssim(corner, TRUTH) < 0.999) & (ssim(corner, TRUTH) > 0.7)).all()
    assert ssim(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)).shape == (1,)


def test_ssim_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.evaluate.metrics.restoration.find_spec", lambda name: None)
    with pytest.raises(FewstepError, match=r"pip install 'fewstep\[report\]'"):
        check_ssim()
    assert importlib.util.find_spec("torchmetrics") is not None


def test_misfit_is_in_units_of_the_noise() -> None:
    y = Average(2)(TRUTH) + 0.1
    assert misfit(TRUTH, Average(2), y, 0.05).tolist() == pytest.approx([2.0] * 3, rel=1e-5)
    assert misfit(TRUTH, Average(2), y, 0.0).tolist() == pytest.approx([0.1] * 3, rel=1e-5)


def test_distance_in_features_is_relative_to_another_picture() -> None:
    network = nn.Flatten()
    assert feature_distance(TRUTH, TRUTH, network) == 0
    assert feature_distance(TRUTH.roll(-1, 0), TRUTH, network) == pytest.approx(1)
    assert feature_distance((TRUTH + TRUTH.roll(-1, 0)) / 2, TRUTH, network) == pytest.approx(0.5)
    with pytest.raises(FewstepError, match="all alike"):
        feature_distance(TRUTH[:1], TRUTH[:1], network)


def test_a_mean_has_a_standard_error() -> None:
    assert mean_and_error(torch.tensor([1.0, 3.0, 5.0])) == (3.0, pytest.approx(2 / 3**0.5))
    assert mean_and_error(torch.tensor([4.0])) == (4.0, 0.0)


def test_an_exact_posterior_covers_the_truth() -> None:
    """19 samples of each of 64 truths of a Gaussian prior, by a method that is exact there."""
    shape, std, noise, pictures, each = (1, 4, 4), 0.5, 0.1, 64, 19
    prior = GaussianDenoiser(VarianceExploding(), torch.zeros(shape), torch.full(shape, std))
    truth, a = std * seeded_noise(range(pictures), shape), Average(2)
    y = (a(truth) + noise * seeded_noise(range(pictures), (1, 2, 2), stream=1)).repeat(each, 1, 1, 1)
    sampler = Sampler.build("unipc-3", "karras", prior.schedule, nfe=20)
    start = seeded_noise(range(pictures * each), shape, stream=2) * sampler.tableau.nodes.sigma[0].float()
    x = sample_posterior(prior, sampler, start, a, y, noise, method="moments").reshape(each, pictures, *shape)
    shares = [coverage(x * scale, truth) for scale in (0.5, 1, 2)]
    assert shares[0] < 0.85 < shares[1] < 0.95 < shares[2]
    known = torch.cat([x, 0.002 * torch.randn(each, pictures, 1, 4, 4)], 2)  # elements that are known do not count
    assert coverage(known, torch.cat([truth, torch.ones(pictures, 1, 4, 4)], 1)) == coverage(x, truth)
    assert coverage(torch.zeros_like(x), truth) is None
    with pytest.raises(ModelError, match="at least 19 samples"):
        coverage(x[:18], truth)
