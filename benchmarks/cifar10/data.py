"""CIFAR-10 from the shared data folder, as the arrays that ``fewstep train --data`` and ``load_images`` read.

    python -m benchmarks.cifar10.data --size 16 --out runs/cifar10

writes ``cifar10-16-train.npz`` and ``cifar10-16-test.npz``: ``images`` uint8 ``[n, H, W, 3]``, ``labels`` uint8 ``[n]``, class ``i % 10``
at place ``i``, so every prefix of a multiple of ten is balanced. Files that are there already and of the same source are left alone.

The pictures are not the lossless originals: the shared files hold them re-encoded as JPEG of quality 75, so Frechet distances
to them are comparable with one another and with no published figure. Of 16x16, each pixel is the mean of 2x2 of theirs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import FewstepError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
FILES = {"train": "cifar10_train_50k.npz", "test": "cifar10_test_10k.npz"}
KEYS = ("jpeg_header", "jpeg_body", "body_len", "labels", "decoded_sha256")
END = b"\xff\xd9"  # of every JPEG; the files leave it out, as they do the header that all share


def decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[n, H, W, 3]`` and labels ``[n]`` of a shared file; warns if this JPEG decoder differs from the one of its checksum.

    Raises:
        FewstepError: it is not there (what to put where), or is no such file.
    """
    if not path.is_file():
        raise FewstepError(f"no {path.name} in {path.parent}: put the shared CIFAR-10 files there, or say where they are with --data")
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            arrays = {key: file[key] for key in KEYS}
        header, body = arrays["jpeg_header"].tobytes(), arrays["jpeg_body"].tobytes()
        lengths = arrays["body_len"].astype(np.int64)
        ends = np.cumsum(lengths)
        if len(lengths) != len(arrays["labels"]) or int(ends[-1]) != len(body):
            raise ValueError(f"{len(arrays['labels'])} labels, {len(lengths)} pictures of {int(ends[-1])} bytes in {len(body)}")
        images = np.stack([_picture(header + body[end - length : end] + END) for length, end in zip(lengths, ends, strict=True)])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise FewstepError(f"{path} is not a file of JPEGs without headers, with {', '.join(KEYS)}: {error}") from error
    if hashlib.sha256(images.tobytes()).hexdigest() != str(arrays["decoded_sha256"]):
        warnings.warn(f"{path.name} decodes otherwise than where its checksum was taken: another libjpeg, or damage", stacklevel=2)
    return images, arrays["labels"]


def _picture(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as picture:
        return np.asarray(picture)


def box(images: np.ndarray, size: int) -> np.ndarray:
    """Images uint8 ``[n, H, W, C]`` made smaller, each pixel the rounded mean of those in its place.

    Raises:
        FewstepError: their height or width is no multiple of ``size``.
    """
    n, height, width, channels = images.shape
    if size < 1 or height % size or width % size:
        raise FewstepError(f"pictures of {height}x{width} cannot be averaged to {size}x{size}: name a size that divides both")
    blocks = images.reshape(n, size, height // size, size, width // size, channels)
    return np.concatenate([np.rint(part.mean((2, 4), dtype=np.float32)) for part in np.array_split(blocks, max(1, n // 4096))]).astype(
        np.uint8
    )


def prepare(shared: Path, out: Path, size: int = 32) -> dict[str, Path]:
    """Write both splits where they are missing or of another source; the paths by split.

    Raises:
        FewstepError: as `decode` and `box`.
    """
    written = {}
    for split, name in FILES.items():
        source, written[split] = shared / name, out / f"cifar10-{size}-{split}.npz"
        if written[split].is_file() and (not source.is_file() or _source(written[split]) == _checksum(source)):
            continue
        images, labels = decode(source)
        smaller, checksum = box(images, size), np.array(_checksum(source))
        write_whole(written[split], lambda path, x=smaller, y=labels, source=checksum: np.savez(path, images=x, labels=y, source=source))
    return written


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _source(path: Path) -> str | None:
    """The checksum of what a file was made from; None if it does not say."""
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            return str(file["source"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="the folder with the shared CIFAR-10 files")
    parser.add_argument("--size", type=int, default=32, help="height and width of the pictures: 32, or what divides it")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "cifar10")
    args = parser.parse_args()
    try:
        for split, path in prepare(args.data, args.out, args.size).items():
            print(f"{split}: {path}")
    except FewstepError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
