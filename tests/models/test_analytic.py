"""The exact denoisers against what they are exact for."""

import pytest
import torch

from fewstep import DatasetDenoiser, GaussianDenoiser, MixtureDenoiser, ModelError, RectifiedFlow, VarianceExploding, VPLinear

ROUNDING = 1e-12  # float64, a handful of operations


def test_mixture_is_the_posterior_mean_by_quadrature() -> None:
    schedule = VPLinear()
    means, stds, weights = torch.tensor([[-1.0], [0.5]]).double(), torch.tensor([0.3, 0.6]).double(), torch.tensor([0.7, 0.3]).double()
    denoiser = MixtureDenoiser(schedule, means, stds, weights)
    t, x = torch.tensor(0.4, dtype=torch.float64), torch.tensor([[-0.7], [0.1], [2.0]]).double()
    x0 = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    prior = sum(w / s * torch.exp(-((x0 - m) ** 2) / (2 * s**2)) for w, m, s in zip(weights, means[:, 0], stds, strict=True))
    likelihood = torch.exp(-((x - schedule.alpha(t) * x0) ** 2) / (2 * schedule.sigma(t) ** 2))
    expected = (prior * likelihood * x0).sum(1) / (prior * likelihood).sum(1)
    torch.testing.assert_close(denoiser(x, t)[:, 0], expected, rtol=1e-9, atol=1e-9)


def test_one_time_per_sample_is_the_same_as_one_call_per_time() -> None:
    denoiser = MixtureDenoiser(VPLinear(), torch.randn(3, 1, 2, 2).double(), torch.tensor([0.1, 0.2, 0.3]).double())
    x, t = torch.randn(4, 1, 2, 2).double(), torch.tensor([0.1, 0.4, 0.7, 1.0]).double()
    each = torch.cat([denoiser(x[k : k + 1], t[k]) for k in range(4)])
    torch.testing.assert_close(denoiser(x, t), each, rtol=ROUNDING, atol=ROUNDING)


def test_gaussian_flow_solves_the_ode_of_its_denoiser() -> None:
    """Central difference of the closed solution against ``d(x/alpha)/d(sigma/alpha) = (z - D)/r`` at ``alpha = 1``."""
    denoiser = GaussianDenoiser(VarianceExploding(), torch.tensor([0.5, -1.0]).double(), torch.tensor([0.3, 2.0]).double())
    x, s, h = torch.randn(5, 2).double(), torch.tensor(1.5).double(), 1e-5
    slope = (denoiser.flow(x, s, s + h) - denoiser.flow(x, s, s - h)) / (2 * h)
    torch.testing.assert_close(slope, (x - denoiser(x, s)) / s, rtol=1e-8, atol=1e-8)


def test_data_set_denoiser_is_finite_and_right_at_both_ends() -> None:
    data = torch.randn(6, 1, 2, 2).double()
    denoiser = DatasetDenoiser(RectifiedFlow(), data, 0.1)
    start, end = torch.tensor(1.0).double(), torch.tensor(0.0).double()
    torch.testing.assert_close(denoiser(torch.randn(3, 1, 2, 2).double(), start), data.mean(0).expand(3, -1, -1, -1))
    torch.testing.assert_close(denoiser(data, end), data, rtol=ROUNDING, atol=ROUNDING)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ModelError, match="3 means need as many stds"):
        MixtureDenoiser(VPLinear(), torch.zeros(3, 2), torch.ones(2))
    with pytest.raises(ModelError, match="finite number of at least 0"):
        DatasetDenoiser(VPLinear(), torch.zeros(3, 2), -1.0)
