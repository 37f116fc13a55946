"""Images from the three sources."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import FewstepError
from fewstep.data.images import load_images, read_picture
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
    for source, words in (
        ("floats.npz", r"float64, they should be uint8 .*round\(\)"),
        ("empty", "no pictures"),
        ("mixed", "one size"),
        ("none", "no images at"),
    ):
        with pytest.raises(FewstepError, match=words):
            load_images(tmp_path / source)


# -- what a picture shows -----------------------------------------------------------------------------------------------

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
COLOURS = np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def _saved(folder: Path, name: str, picture: Image.Image, **options: object) -> Path:
    picture.save(folder / name, **options)
    return folder / name


def test_sixteen_bits_are_read_by_their_upper_eight(tmp_path: Path) -> None:
    """Pillow's own conversion to 8 bits cuts above 255, and reads all but the darkest as white."""
    for name in ("ramp.png", "ramp.tif"):
        pixels = read_picture(_saved(tmp_path, name, Image.fromarray(RAMP)))
        assert pixels.dtype == np.uint8 and len(np.unique(pixels)) == 256
        np.testing.assert_array_equal(pixels, RAMP >> 8)


def test_sixteen_bits_of_colour_are_read_by_their_upper_eight(tmp_path: Path) -> None:
    wide = np.random.default_rng(2).integers(0, 65536, (2, 3, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0))
    (tmp_path / "wide.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    np.testing.assert_array_equal(read_picture(tmp_path / "wide.png"), wide >> 8)


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    few = Image.fromarray(COLOURS).quantize(24)
    np.testing.assert_array_equal(read_picture(_saved(tmp_path, "palette.png", few)), np.asarray(few.convert("RGB")))


def test_a_picture_is_turned_as_its_tag_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    file = _saved(tmp_path, "turned.png", Image.fromarray(COLOURS), exif=exif)
    np.testing.assert_array_equal(read_picture(file), np.rot90(COLOURS, -1))


def test_an_alpha_channel_that_hides_nothing_is_left_out(tmp_path: Path) -> None:
    opaque = Image.fromarray(COLOURS).convert("RGBA")
    np.testing.assert_array_equal(read_picture(_saved(tmp_path, "opaque.png", opaque)), COLOURS)
    grey = Image.fromarray(COLOURS[..., 0]).convert("LA")
    np.testing.assert_array_equal(read_picture(_saved(tmp_path, "grey.png", grey)), COLOURS[..., 0])
    assert set(np.unique(read_picture(_saved(tmp_path, "bits.png", Image.fromarray(COLOURS[..., 0] > 99))))) == {0, 255}


def _half_transparent(folder: Path) -> Path:
    picture = Image.fromarray(COLOURS).convert("RGBA")
    picture.putpixel((1, 1), (0, 0, 0, 254))
    return _saved(folder, "a.png", picture)


def _two_frames(folder: Path) -> Path:
    frames = [Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)]
    return _saved(folder, "a.gif", frames[0], save_all=True, append_images=frames[1:])


def _cut(folder: Path) -> Path:
    file = _saved(folder, "a.png", Image.fromarray(RAMP))
    file.write_bytes(file.read_bytes()[:-900])
    return file


def _bomb(folder: Path) -> Path:
    """Write a PNG of 20000 x 20000 pixels in a few bytes."""
    file = _saved(folder, "a.png", Image.new("1", (8, 8)))
    data = bytearray(file.read_bytes())
    data[16:24] = struct.pack(">II", 20000, 20000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    file.write_bytes(bytes(data))
    return file


def _fifo(folder: Path) -> Path:
    (folder / "a.png").symlink_to("/dev/zero")
    return folder / "a.png"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "transparent": (_half_transparent, "a.png has transparent pixels: lay it on a background first"),
    "palette": (lambda folder: _saved(folder, "a.gif", Image.fromarray(COLOURS).quantize(8), transparency=0), "has transparent pixels"),
    "cmyk": (lambda folder: _saved(folder, "a.jpg", Image.fromarray(COLOURS).convert("CMYK")), "a.jpg is in mode CMYK"),
    "lab": (lambda folder: _saved(folder, "a.tif", Image.new("LAB", (4, 4))), "is in mode LAB"),
    "float": (lambda folder: _saved(folder, "a.tif", Image.fromarray(COLOURS[..., 0].astype(np.float32))), "a.tif is in mode F"),
    "32-bit": (lambda folder: _saved(folder, "a.tif", Image.fromarray(COLOURS[..., 0].astype(np.int32))), "a.tif is in mode I"),
    "frames": (_two_frames, "has 2 pictures in one file"),
    "cut": (_cut, "is not a readable picture"),
    "bomb": (_bomb, "is not a readable picture: Image size .* exceeds limit"),
    "device": (_fifo, "a pipe or device"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_picture_of_uncertain_meaning_is_refused(tmp_path: Path, kind: str) -> None:
    make, says = REFUSED[kind]
    make(tmp_path)
    with pytest.raises(FewstepError, match=says):
        load_images(tmp_path)


SET = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": SET.transpose(0, 3, 1, 2)}, r"if those are \[n, C, H, W\], transpose them"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, "transpose them"),
        ({"images": SET.astype(np.float32) / 255}, "float32, they should be uint8"),
        ({"images": SET.astype(np.int64)}, "int64, they should be uint8"),
        ({"images": SET.astype(object)}, "not an npz archive of plain arrays"),
        ({"images": np.zeros((2, 8, 0), np.uint8)}, r"shape \(2, 8, 0\)"),
        ({"images": np.zeros((0, 8, 8), np.uint8)}, r"shape \(0, 8, 8\)"),
        ({"images": np.zeros(5, np.uint8)}, r"shape \(5,\)"),
        ({"images": SET, "labels": np.array([0, np.nan])}, "one whole number from 0 for each of the 2"),
        ({"images": SET, "labels": np.array([0, -1])}, "one whole number"),
        ({"images": SET, "labels": np.array([[0], [1]])}, "one whole number"),
        ({"images": SET, "labels": np.array([0, 2**63], np.uint64)}, "one whole number"),
        ({"images": SET, "labels": np.array(["a", "b"])}, "one whole number"),
        ({"images": SET, "labels": np.array([None, 1])}, "not an npz archive of plain arrays"),
        ({"pictures": SET}, "needs an array 'images' of uint8, it has pictures"),
    ],
)
def test_arrays_of_uncertain_meaning_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], says: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(FewstepError, match=says):
        load_images(tmp_path / "set.npz")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:200], lambda data: data[:60] + bytes(40) + data[100:], lambda data: b"", bytes.swapcase]
)
def test_a_damaged_archive_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    np.savez_compressed(tmp_path / "set.npz", images=np.random.default_rng(0).integers(0, 256, (2, 9, 9), dtype=np.uint8))
    (tmp_path / "set.npz").write_bytes(damage((tmp_path / "set.npz").read_bytes()))
    with pytest.raises(FewstepError, match="set.npz"):
        load_images(tmp_path / "set.npz")
