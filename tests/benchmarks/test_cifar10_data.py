"""The CIFAR-10 loader, on a small file made like the shared one."""

import hashlib
import io
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from benchmarks.cifar10.data import BINARY, END, FILES, box, decode, main, prepare
from PIL import Image

from fewstep import FewstepError
from fewstep.data.images import load_images


def shared_file(path: Path, n: int = 20, size: int = 32, **other: object) -> np.ndarray:
    """Write a file of n JPEGs without their common header; what they decode to."""
    rng = np.random.default_rng(n)
    files = []
    for _ in range(n):
        buffer = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=75)
        files.append(buffer.getvalue())
    header = next(k for k in range(len(files[0])) if len({file[: k + 1] for file in files}) > 1)
    bodies = [file[header : -len(END)] for file in files]
    images = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    arrays = {
        "jpeg_header": np.frombuffer(files[0][:header], np.uint8),
        "jpeg_body": np.frombuffer(b"".join(bodies), np.uint8),
        "body_len": np.array([len(body) for body in bodies], np.uint16),
        "labels": (np.arange(n) % 10).astype(np.uint8),
        "decoded_sha256": np.array(hashlib.sha256(images.tobytes()).hexdigest()),
    }
    np.savez(path, **{key: value for key, value in {**arrays, **other}.items() if value is not None})
    return images


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    for n, name in zip((20, 10), FILES.values(), strict=True):
        shared_file(folder / name, n)
    return folder


def test_what_was_encoded_is_decoded(tmp_path: Path) -> None:
    expected = shared_file(tmp_path / "x.npz", 12)
    images, labels = decode(tmp_path / "x.npz")
    np.testing.assert_array_equal(images, expected)
    assert images.dtype == np.uint8 and labels.tolist() == [*range(10), 0, 1]


def test_the_files_are_what_load_images_reads(tmp_path: Path, shared: Path) -> None:
    paths = prepare(shared, tmp_path / "out", 16)
    train = load_images(paths["train"])
    assert train.x.shape == (20, 3, 16, 16) and train.name == "cifar10-16-train" and train.levels == 256
    assert train.labels is not None and train.labels.tolist() == [*range(10), *range(10)]
    assert load_images(paths["test"]).x.shape == (10, 3, 16, 16)
    whole = decode(shared / FILES["train"])[0]
    means = (train.x.permute(0, 2, 3, 1).numpy() + 1) * 128 - 0.5
    np.testing.assert_allclose(means, whole.reshape(20, 16, 2, 16, 2, 3).mean((2, 4)), atol=0.5001)
    np.testing.assert_array_equal(box(whole, 32), whole)


def test_what_is_up_to_date_is_left_alone(tmp_path: Path, shared: Path) -> None:
    paths = prepare(shared, tmp_path / "out")
    before = {split: path.stat().st_mtime_ns for split, path in paths.items()}
    prepare(shared, tmp_path / "out")
    assert {split: path.stat().st_mtime_ns for split, path in paths.items()} == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cifar10-32-test.npz", "cifar10-32-train.npz"]
    shared_file(shared / FILES["test"], 30)
    paths["train"].write_bytes(b"half of a file")
    prepare(shared, tmp_path / "out")
    assert len(load_images(paths["test"]).x) == 30 and len(load_images(paths["train"]).x) == 20
    for name in FILES.values():
        (shared / name).unlink()
    assert prepare(shared, tmp_path / "out") == paths  # made before, elsewhere


def test_another_decoder_is_told_of(tmp_path: Path) -> None:
    shared_file(tmp_path / "x.npz", decoded_sha256=np.array("0" * 64))
    with pytest.warns(UserWarning, match="decodes otherwise"):
        decode(tmp_path / "x.npz")
    shared_file(tmp_path / "x.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(tmp_path / "x.npz")


@pytest.mark.parametrize("wrong", [{"labels": None}, {"labels": np.zeros(3, np.uint8)}, {"jpeg_header": np.zeros(9, np.uint8)}])
def test_a_file_of_something_else_is_refused(tmp_path: Path, wrong: dict) -> None:
    shared_file(tmp_path / "x.npz", **wrong)
    with pytest.raises(FewstepError, match="not a file of JPEGs without headers"):
        decode(tmp_path / "x.npz")
    (tmp_path / "y.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(FewstepError, match="not a file of JPEGs without headers"):
        decode(tmp_path / "y.npz")


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(FewstepError, match="cannot be averaged to 20x20"):
        box(np.zeros((1, 32, 32, 3), np.uint8), 20)


def binary_version(folder: Path) -> dict[str, np.ndarray]:
    """Write files of the binary version, 20 pictures each in any order of classes; their records by name."""
    folder.mkdir()
    rng, written = np.random.default_rng(0), dict[str, np.ndarray]()
    for name in (*BINARY["train"], *BINARY["test"]):
        labels = rng.permutation(np.arange(20) % 10)[:, None]
        written[name] = np.concatenate([labels, rng.integers(0, 256, (20, 3072))], 1).astype(np.uint8)
        (folder / name).write_bytes(written[name].tobytes())
    return written


def test_the_binary_version_is_read_class_by_class(tmp_path: Path) -> None:
    records = binary_version(tmp_path / "bin")
    made = prepare(tmp_path / "bin", tmp_path / "out")
    for split, names in BINARY.items():
        rows = np.concatenate([records[name] for name in names])
        with np.load(made[split]) as file:
            images, labels = file["images"], file["labels"]
        assert labels.tolist() == [place % 10 for place in range(len(rows))]
        assert len(images) == len(rows) and images.shape[1:] == (32, 32, 3)
        fourth = rows[rows[:, 0] == 3][1]  # the second picture of class 3 lies at place 13
        assert np.array_equal(images[13], fourth[1:].reshape(3, 32, 32).transpose(1, 2, 0))
    before = made["test"].stat().st_mtime_ns
    prepare(tmp_path / "bin", tmp_path / "out")
    assert made["test"].stat().st_mtime_ns == before
    (tmp_path / "bin" / "test_batch.bin").write_bytes(records["data_batch_1.bin"].tobytes())
    prepare(tmp_path / "bin", tmp_path / "out")
    assert made["test"].stat().st_mtime_ns != before


@pytest.mark.parametrize("content", [b"", b"\x01" * 3000, b"\x0b" * 3073])
def test_what_is_no_binary_version_is_refused(tmp_path: Path, content: bytes) -> None:
    binary_version(tmp_path / "bin")
    (tmp_path / "bin" / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(FewstepError, match="data_batch_3.bin is no file of CIFAR-10's binary version"):
        prepare(tmp_path / "bin", tmp_path / "out")
    (tmp_path / "bin" / "data_batch_3.bin").write_bytes((b"\x01" + bytes(3072)) * 3)
    with pytest.raises(FewstepError, match="classes of"):
        prepare(tmp_path / "bin", tmp_path / "out")


def test_missing_data_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["data", "--data", str(tmp_path / "none"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: no cifar10_train_50k.npz in .*--data"):
        main()
