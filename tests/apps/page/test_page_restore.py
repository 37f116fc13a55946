"""The tab *Restore*: a picture is measured and restored as typed; uploads that are no picture of the size are refused in words."""

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import FewstepError, restore
from fewstep.apps.measured import measured_picture
from fewstep.apps.page.models import Models
from fewstep.apps.page.restore import HOLE, WAYS, RestoreRequest, begin_restore, canvas_of, mask_of, picture_of, shown_of, uploaded
from fewstep.apps.page.workshop import Workshop

PAINTED = "0" * 24 + "1" * 8 + "0" * 32


def png(width: int, height: int) -> bytes:
    """A small file that says it is a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (png(60_000, 60_000), "not a readable picture"),
        (pickle.dumps(print), "not a readable picture"),
        (b"<svg onload=alert(1)>", "not a readable picture"),
        (b"", "not a readable picture|empty"),
    ],
    ids=["a bomb", "a pickle", "a drawing with a script", "nothing"],
)
def test_a_hostile_upload_is_refused(content: bytes, says: str, models: Models, tmp_path: Path) -> None:
    (tmp_path / "upload.png").write_bytes(content)
    with pytest.raises(FewstepError, match=says):
        picture_of(models, "digits-edm", tmp_path / "upload.png", 0)


def test_an_upload_lies_below_the_folder_of_the_page(shop: Workshop) -> None:
    inside = shop.out / ".page" / "uploads" / "a.png"
    assert uploaded(shop.out, str(inside)) == inside.resolve() and uploaded(shop.out, None) is None
    for path in ("/etc/passwd", f"{shop.out}/../a.png", {"path": "/etc/passwd"}):
        with pytest.raises(FewstepError, match="no upload"):
            uploaded(shop.out, path)


def test_a_picture_of_another_size_is_refused_and_one_of_the_size_is_read(models: Models, tmp_path: Path) -> None:
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    with pytest.raises(FewstepError, match="8 x 9 in grey"):
        picture_of(models, "digits-edm", tmp_path / "wide.png", 0)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "right.png")
    assert picture_of(models, "digits-edm", tmp_path / "right.png", 0).shape == (1, 8, 8)
    with pytest.raises(FewstepError, match="scans 0 to 1796"):
        picture_of(models, "digits-edm", None, 5000)


@pytest.mark.parametrize(
    ("painted", "says"),
    [("0" * 64, "paint the pixels"), ("1" * 64, "all is painted"), ("1", "paint it again"), ("x" * 64, "paint it again")],
)
def test_a_mask_is_painted(painted: str, says: str) -> None:
    assert mask_of(PAINTED, 8, 8).sum() == 8 and bool(mask_of(PAINTED, 8, 8)[3].all())
    with pytest.raises(FewstepError, match=says):
        mask_of(painted, 8, 8)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_restored_is_what_was_measured(way: str, shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.apps.cli.main", lambda: None)
    x0 = picture_of(shop.models, "digits-edm", None, 7)
    job = begin_restore(shop, RestoreRequest("digits-edm", way, mask_of(PAINTED, 8, 8), noise=0.1, num=3, nfe=4), x0)
    verb, name, picture, *options = shop.jobs.words(job)
    typed = dict(zip(options[::2], options[1::2], strict=True))
    files = {key: None if typed.get(f"--{key}") is None else Path(typed[f"--{key}"]) for key in ("mask", "kernel")}
    factor, noise = (int(typed["--factor"]) if "--factor" in typed else None), float(typed.get("--noise", 0))
    found = measured_picture(typed["--task"], Path(picture), shop.models.open(name), factor=factor, noise=noise, **files)
    assert verb == "restore" and found.noise == (0.0 if way == HOLE else 0.1) and typed["-n"] == "3"
    clean = found.measurement(x0[None])[0]
    assert float((found.y - clean).abs().max()) < (0.01 if way == HOLE else 0.5)
    assert shown_of(shop, job) == ""
    made = restore(shop.models.open("digits-edm"), found.measurement, found.y, found.noise, seeds=range(3), nfe=4)
    made.save(shop.out / job)
    text = shown_of(shop, job)
    assert all(f"<b>{word}</b>" in text for word in ("true picture", "measured", "mean", "uncertainty", "samples"))


@pytest.mark.parametrize(
    "wrong",
    [{"way": "eaten"}, {"num": 0}, {"nfe": 1000}, {"noise": -1.0}, {"noise": float("nan")}, {"sd": 0.0}, {"sd": float("inf")}],
    ids=str,
)
def test_numbers_out_of_range(wrong: dict) -> None:
    with pytest.raises(FewstepError):
        RestoreRequest(**{"model": "digits-edm", "way": HOLE, **wrong})


def test_the_canvas_has_a_letter_for_each_pixel(models: Models) -> None:
    value = canvas_of(models, "digits-edm", torch.zeros(1, 8, 8))
    assert (value["width"], value["height"], value["mask"]) == (8, 8, "0" * 64)
