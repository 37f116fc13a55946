"""Images from the three sources."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import FewstepError
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.features import load_digits_features


def test_digits_and_their_dequantisation() -> None:
    digits = load_images("digits")
    assert digits.x.shape == (1797, 1, 8, 8) and digits.labels is not None and set(digits.labels.tolist()) == set(range(10))
    assert float(digits.x.min()) == pytest.approx(-1 + 1 / 17) and float(digits.x.max()) == pytest.approx(1 - 1 / 17)
    index = torch.arange(64)
    noisy = digits.dequantised(index, torch.Generator().manual_seed(0))
    assert float((noisy - digits.x[index]).abs().max()) <= 1 / 17 + 1e-6  # float32
    features = load_digits_features()
    torch.testing.assert_close(features(noisy), features(digits.x[index]))  # they round to the same grey values


def test_npz_and_folders(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=pictures, labels=np.array([0, 1, 0, 1]))
    for k, picture in enumerate(pictures):
        (tmp_path / "folder" / str(k % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "folder" / str(k % 2) / f"{k}.png")
    from_npz, from_folder = load_images(tmp_path / "set.npz"), load_images(tmp_path / "folder")
    assert from_npz.x.shape == (4, 3, 6, 6) and from_folder.labels is not None and from_folder.labels.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(from_folder.x, from_npz.x[[0, 2, 1, 3]])


def test_unusable_sources_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 4, 4)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for size in (4, 5):
        Image.new("L", (size, size)).save(tmp_path / "mixed" / f"{size}.png")
    for source, words in (("floats.npz", "uint8"), ("empty", "no pictures"), ("mixed", "one size"), ("none", "no images at")):
        with pytest.raises(FewstepError, match=words):
            load_images(tmp_path / source)
