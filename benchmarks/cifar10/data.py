"""CIFAR-10 from a folder, as the arrays that ``fewstep train --data`` and ``load_images`` read.

    python -m benchmarks.cifar10.data --data cifar-10-batches-bin --size 16 --out runs/cifar10

reads the binary version of CIFAR-10 (``cifar-10-binary.tar.gz`` of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked), or the files
that the study of this project was made from, and writes ``cifar10-16-train.npz`` and ``cifar10-16-test.npz``: ``images`` uint8
``[n, H, W, 3]``, ``labels`` uint8 ``[n]``, class ``i % 10`` at place ``i``, so every prefix of a multiple of ten is balanced. Files that
are there already and of the same source are left alone.

The project's own files do not hold the lossless originals, but pictures re-encoded as JPEG of quality 75, so Frechet distances to them
are comparable with one another and with no published figure; from the binary version they come out a little otherwise. Of 16x16, each
pixel is the mean of 2x2.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import FewstepError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
FILES = {"train": "cifar10_train_50k.npz", "test": "cifar10_test_10k.npz"}
BINARY = {
    "train": [f"data_batch_{k}.bin" for k in range(1, 6)],
    "test": ["test_batch.bin"],
}  # a label and 3 x 32 x 32 bytes for each picture
CLASSES, PIXELS = 10, (3, 32, 32)
KEYS = ("jpeg_header", "jpeg_body", "body_len", "labels", "decoded_sha256")
END = b"\xff\xd9"  # of every JPEG; the files leave it out, as they do the header that all share


def decode(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[n, H, W, 3]`` and labels ``[n]`` of a shared file; warns if this JPEG decoder differs from the one of its checksum.

    Raises:
        FewstepError: it is not there (what to put where), or is no such file.
    """
    if not path.is_file():
        raise FewstepError(
            f"no {path.name} in {path.parent}, nor {BINARY['test'][0]}: unpack cifar-10-binary.tar.gz, and name its folder with --data"
        )
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


def binary(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[n, 32, 32, 3]`` and labels ``[n]`` of files of the binary version, class ``i % 10`` at place ``i``.

    Raises:
        FewstepError: no such file, or classes of several sizes.
    """
    record = 1 + math.prod(PIXELS)
    read = [path.read_bytes() for path in paths]
    for path, content in zip(paths, read, strict=True):
        if not content or len(content) % record or max(content[::record]) >= CLASSES:
            raise FewstepError(f"{path} is no file of CIFAR-10's binary version: {len(content)} bytes, of records of {record}")
    rows = np.frombuffer(b"".join(read), dtype=np.uint8).reshape(-1, record)
    places = [np.flatnonzero(rows[:, 0] == label) for label in range(CLASSES)]
    if len({len(place) for place in places}) > 1:
        raise FewstepError(f"{paths[0].parent} has classes of {sorted(len(place) for place in places)} pictures: unpack the archive again")
    rows = rows[np.stack(places, 1).reshape(-1)]
    return rows[:, 1:].reshape(-1, *PIXELS).transpose(0, 2, 3, 1).copy(), rows[:, 0].copy()


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
        FewstepError: as `decode`, `binary` and `box`.
    """
    written = {}
    for split, name in FILES.items():
        sources, written[split] = [shared / name], out / f"cifar10-{size}-{split}.npz"
        if not sources[0].is_file() and all((shared / part).is_file() for part in BINARY[split]):
            sources = [shared / part for part in BINARY[split]]
        if written[split].is_file() and (not sources[0].is_file() or _source(written[split]) == _checksum(sources)):
            continue
        images, labels = binary(sources) if sources[0].suffix == ".bin" else decode(sources[0])
        smaller, checksum = box(images, size), np.array(_checksum(sources))
        write_whole(written[split], lambda path, x=smaller, y=labels, source=checksum: np.savez(path, images=x, labels=y, source=source))
    return written


def _checksum(paths: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _source(path: Path) -> str | None:
    """The checksum of what a file was made from; None if it does not say."""
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            return str(file["source"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="the folder of the binary version, or of this project's files")
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
