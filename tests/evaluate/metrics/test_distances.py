"""Distances against their definitions."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from fewstep import FewstepError
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.distances import (
    Gaussian,
    Kernel,
    features_of,
    frechet_distance,
    kernel_distance,
    load_features,
    precision_recall,
    rmse,
)
from fewstep.evaluate.metrics.quality import Quality, features_name

CPU = torch.device("cpu")
TORCHMETRICS = 1e-4  # it answers in float32


def images(count: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Digits with noise, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    digits = load_images("digits").x[torch.randperm(1797, generator=generator)[:count]]
    return (digits * scale + shift + 0.1 * torch.randn(digits.shape, generator=generator)).clamp(-1, 1)


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


@pytest.mark.filterwarnings("ignore:Metric .Kernel")  # that it keeps all features
@pytest.mark.parametrize("name", ["digits", "pixels"])
def test_distances_agree_with_torchmetrics(name: str) -> None:
    network, real, fake = load_features(name, (1, 8, 8)), images(400), images(400, 1, 0.9, 0.05)
    frechet, kernel = FrechetInceptionDistance(feature=network), KernelInceptionDistance(feature=network, subsets=1, subset_size=400)
    for metric in (frechet, kernel):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    with torch.random.fork_rng():  # it draws its subset, here all
        value, spread = kernel.compute()
    assert float(spread) == 0 or torch.isnan(spread)
    assert frechet_distance(real, fake, network) == pytest.approx(float(frechet.compute()), rel=TORCHMETRICS)
    assert kernel_distance(real, fake, network) == pytest.approx(float(value), rel=TORCHMETRICS)


def test_distances_agree_with_their_definitions() -> None:
    x, y = (features_of(one, load_features("digits", (1, 8, 8))) for one in (images(150), images(90, 1, 0.8)))
    covariances = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert Gaussian.of(x).distance(y) == pytest.approx(expected, rel=1e-6)  # sqrtm of a singular matrix is the worse of the two
    few = y[:20]  # fewer than features: a singular covariance
    root = scipy.linalg.sqrtm(covariances[0] @ np.cov(few.numpy().T) + 1e-14 * np.eye(32)).real
    expected = float((x.mean(0) - few.mean(0)).square().sum()) + np.trace(covariances[0] + np.cov(few.numpy().T) - 2 * root)
    assert Gaussian.of(x).distance(few) == pytest.approx(expected, rel=1e-4)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 32 + 1) ** 3

    def mmd(a: np.ndarray, b: np.ndarray) -> float:
        own = [np.mean([k(p[i], p[j]) for i in range(len(p)) for j in range(len(p)) if i != j]) for p in (a, b)]
        return own[0] + own[1] - 2 * np.mean([k(p, q) for p in a for q in b])

    a, b = x[:40].numpy(), y[:30].numpy()
    kernel, subsets = Kernel.of(x[:40]), torch.tensor([[0, 3, 5, 7], [2, 29, 11, 1]])
    assert kernel.distance(y[:30]) == pytest.approx(mmd(a, b), rel=1e-9)
    expected = [mmd(a, b[one]) for one in subsets.numpy()]
    assert kernel.distances(y[:30], subsets).tolist() == pytest.approx(expected, rel=1e-9)


def test_matrices_of_pairs_may_be_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (features_of(one, load_features("digits", (1, 8, 8))) for one in (images(50), images(40, 1, 0.8)))
    whole = Kernel.of(x).distance(y), precision_recall(x, y)
    monkeypatch.setattr("fewstep.evaluate.metrics.distances.BLOCK", 300)
    assert Kernel.of(x).distance(y) == pytest.approx(whole[0], rel=1e-12) and precision_recall(x, y) == whole[1]


@pytest.mark.slow
def test_precision_and_recall_are_those_of_a_search_through_all_pairs() -> None:
    x, y = (features_of(one, load_features("digits", (1, 8, 8))).numpy() for one in (images(80), images(60, 1, 0.7)))

    def inside(point: np.ndarray, others: np.ndarray) -> bool:
        for i, other in enumerate(others):
            radius = sorted(np.linalg.norm(other - others[j]) for j in range(len(others)) if j != i)[2]
            if np.linalg.norm(point - other) <= radius:
                return True
        return False

    expected = np.mean([inside(p, x) for p in y]), np.mean([inside(p, y) for p in x])
    assert precision_recall(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected[1] < 1
    same = torch.from_numpy(x)
    assert precision_recall(same, same) == (1, 1) and precision_recall(same, same + 100) == (0, 0)
    with pytest.raises(FewstepError, match="3 neighbours"):
        precision_recall(same, same[:3])


class Means(nn.Module):
    """Anybody's features."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3)), x.std((1, 2, 3))], 1) * self.scale

    def labels(self, x: Tensor) -> Tensor:
        return (x.mean((1, 2, 3)) > -0.5).long()


def test_any_network_gives_features_and_perhaps_labels() -> None:
    quality, fake = Quality.of(images(300), Means(), CPU), images(64, 1, 0.9)
    found = quality.measure(fake, Means().labels(fake))
    assert found["labels"] == 1.0 and found["fd_features"] == quality.name == features_name(Means())
    assert found["fd"] == frechet_distance(images(300), fake, Means())
    assert found["fd_ci"][0] <= found["fd"] <= found["fd_ci"][1] and found["kd_ci"][0] <= found["kd"] <= found["kd_ci"][1]
    other = Means()
    nn.init.constant_(other.scale, 2.0)
    assert features_name(other) != quality.name  # named by its weights
    assert Quality.of(images(50), "pixels", CPU).measure(fake, torch.zeros(64))["labels"] is None


def test_few_samples_have_no_intervals() -> None:
    quality = Quality.of(images(50), "digits", CPU)
    three, four = (quality.measure(images(count, 1), None) for count in (3, 4))
    assert three["fd"] > 0 and three["fd_ci"] is three["precision"] is three["labels"] is None
    assert four["fd_ci"] is not None and four["precision"] is not None


@pytest.mark.slow
def test_digits_know_their_labels() -> None:
    data, quality = load_images("digits"), Quality.of(images(50), "digits", CPU)
    assert data.labels is not None and quality.measure(data.x, data.labels)["labels"] > 0.97
    assert quality.measure(data.x, (data.labels + 1) % 10)["labels"] < 0.03


def test_networks_that_are_no_features_are_refused() -> None:
    with pytest.raises(FewstepError, match="Identity answered"):
        features_of(images(5), nn.Identity())

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) / 0

    with pytest.raises(FewstepError, match="not finite to finite images"):
        features_of(images(5), Broken())
    with pytest.raises(FewstepError, match="at least 2 a side, got 1"):
        frechet_distance(images(1), images(5), load_features("pixels", (1, 8, 8)))
    with pytest.raises(FewstepError, match="inception:PATH"):
        load_features("inception", (3, 32, 32))
    with pytest.raises(FewstepError, match="no Inception weights at nowhere.pth"):
        load_features("inception:nowhere.pth", (3, 32, 32))
    with pytest.raises(FewstepError, match="1 or 3 channels"):
        load_features("inception:nowhere.pth", (4, 32, 32))
