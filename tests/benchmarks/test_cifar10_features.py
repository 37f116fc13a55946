"""The CIFAR-10 feature network: it trains, continues, and serves as features of samples."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.cifar10 import features as module
from benchmarks.cifar10.features import PRESETS, CifarFeatures, FeaturesConfig, augmented, load_cifar_features, make

from fewstep import FewstepError
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.distances import frechet_distance
from fewstep.evaluate.metrics.quality import Quality

TINY = FeaturesConfig(8, (8, 16), 1, epochs=3, features=16, batch=16, lr=0.05, shift=1, classes=4)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four classes of noisy pictures of one colour each."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 160), ("test", 80)):
        labels = np.arange(n) % 4
        colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30]])[labels][:, None, None]
        images = (colours + rng.normal(0, 20, (n, 8, 8, 3))).clip(0, 255).astype(np.uint8)
        np.savez(tmp_path / f"cifar10-8-{split}.npz", images=images, labels=labels.astype(np.uint8))
    return tmp_path


@pytest.mark.slow
def test_what_is_trained_is_loaded_and_measures_samples(pictures: Path) -> None:
    config = replace(TINY, epochs=8)
    done = make(pictures, config, pictures / "f", "the command")
    assert done["accuracy"] > 0.9 and done["command"] == "the command" and done["test_images"] == 80
    assert sorted(path.name for path in (pictures / "f").iterdir()) == ["features.json", "features.safetensors"]
    network, test = load_cifar_features(pictures / "f"), load_images(pictures / "cifar10-8-test.npz")
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert test.labels is not None and float((network.labels(test.x) == test.labels).float().mean()) == done["accuracy"]
    assert network(test.x).shape == (80, network.num_features)
    row = Quality.of(test.x, network, torch.device("cpu")).measure(test.x[:40], test.labels[:40])
    assert row["fd_features"].startswith("CifarFeatures:") and row["labels"] > 0.9
    assert row["fd"] == pytest.approx(frechet_distance(test.x, test.x[:40], network))
    before = (pictures / "f" / "features.json").stat().st_mtime_ns
    assert make(pictures, config, pictures / "f", "another command") == json.loads((pictures / "f" / "features.json").read_text())
    assert (pictures / "f" / "features.json").stat().st_mtime_ns == before
    with pytest.raises(FewstepError, match="network of other options"):
        make(pictures, TINY, pictures / "f", "")


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_a_whole_one(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(pictures, TINY, pictures / "whole", "")
    real, batches = module.augmented, 0

    def mortal(*args: object) -> torch.Tensor:
        nonlocal batches
        batches += 1
        if batches == 15:  # in the second epoch of ten batches
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "augmented", mortal)
    with pytest.raises(KeyboardInterrupt):
        make(pictures, TINY, pictures / "cut", "")
    assert not (pictures / "cut" / "features.json").exists()
    with pytest.raises(FewstepError, match="belongs to another run"):
        make(pictures, replace(TINY, seed=1), pictures / "cut", "")
    make(pictures, TINY, pictures / "cut", "")
    assert batches == 15 + 20
    whole, cut = (load_cifar_features(pictures / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), cut.values(), strict=True))


def test_images_are_mirrored_and_moved() -> None:
    generator = torch.Generator().manual_seed(0)
    ramp = (torch.arange(8)[:, None] * 100.0 + torch.arange(8)).expand(200, 2, 8, 8)  # 100 row + column
    out = augmented(ramp, 2, generator)
    rows, columns = out[:, :, 2:6, 2:6] // 100, out[:, :, 2:6, 2:6] % 100
    assert out.shape == ramp.shape and torch.equal(out[:, 0], out[:, 1])
    moved = rows[:, 0, 0, 0] - 2
    assert set(moved.tolist()) == {-2, -1, 0, 1, 2}
    assert bool((rows.diff(dim=2) == 1).all())
    slopes = columns.diff(dim=3)[:, 0, 0, 0]
    assert set(slopes.tolist()) == {-1, 1} and 70 < int((slopes == 1).sum()) < 130
    plain = augmented(ramp, 0, generator)
    assert bool(((plain == ramp).flatten(1).all(1) | (plain == ramp.flip(-1)).flatten(1).all(1)).all())


def test_noise_below_half_a_level_is_not_seen() -> None:
    torch.manual_seed(0)
    network = CifarFeatures(TINY).eval()
    x = (torch.randint(0, 256, (4, 3, 8, 8)) + 0.5) / 128 - 1
    assert torch.equal(network(x), network(x + 0.4 / 128)) and not torch.equal(network(x), network(x + 1 / 128))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"benchmarks.cifar10.data --size 8"):
        make(tmp_path, TINY, tmp_path / "f", "")
    with pytest.raises(FewstepError, match=r"benchmarks.cifar10.features --out"):
        load_cifar_features(tmp_path)
    with pytest.raises(FewstepError, match=r"for shape \(3, 8, 8\), the samples have \(1, 8, 8\)"):
        CifarFeatures(TINY)(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_features_of_their_size(name: str) -> None:
    config = PRESETS[name]
    network = CifarFeatures(config).eval()
    x = torch.zeros(2, 3, config.size, config.size)
    assert network(x).shape == (2, config.features) and network.labels(x).shape == (2,)
