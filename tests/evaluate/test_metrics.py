"""Distances against their definitions."""

import numpy as np
import pytest
import scipy.linalg
import torch

from fewstep import FewstepError
from fewstep.evaluate.metrics import frechet_distance, load_features, rmse
from fewstep.models.data import load_images


def test_rmse() -> None:
    a, b = torch.zeros(2, 3), torch.full((2, 3), -2.0)
    assert rmse(a, b) == 2.0 and rmse(a, a) == 0.0


def test_frechet_distance_is_that_of_the_fitted_gaussians() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(300, 1, 2, 2) - 0.5, torch.rand(200, 1, 2, 2) * 0.7 - 0.2
    x, y = (v.flatten(1).double().numpy() for v in (a, b))
    covariances = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(
        sum(covariances) - 2 * scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    )
    assert frechet_distance(a, b, load_features("pixels", (1, 2, 2))) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(a, a, load_features("pixels", (1, 2, 2))) == pytest.approx(0, abs=1e-6)


def test_digits_features_tell_digits_from_noise() -> None:
    digits, features = load_images("digits").x, load_features("digits", (1, 8, 8))
    halves = frechet_distance(digits[::2], digits[1::2], features)
    assert frechet_distance(digits, torch.rand(500, 1, 8, 8) * 2 - 1, features) > 20 * halves


def test_refusals() -> None:
    with pytest.raises(FewstepError, match="use pixels"):
        load_features("digits", (3, 32, 32))
    with pytest.raises(FewstepError, match="did you mean pixels"):
        load_features("pixel", (1, 8, 8))
    with pytest.raises(FewstepError, match="finite"):
        frechet_distance(torch.zeros(4, 1, 2, 2), torch.full((4, 1, 2, 2), torch.nan), load_features("pixels", (1, 2, 2)))
