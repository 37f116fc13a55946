"""``fewstep restore``: its tasks, its files, killed runs, and refusals of one line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.apps.conftest import counted, run
from tests.problems import DSNO

from fewstep import Restoration
from fewstep.data.images import load_images
from fewstep.inverse.blind import BlindConfig

KERNEL = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32) / 16


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digit, small, a mask, a kernel, and what does not fit."""
    folder = tmp_path_factory.mktemp("files")
    digit = ((load_images("digits").x[7, 0] + 1) * 127.5).round().byte().numpy()
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 2:5] = 255
    for name, pixels in {
        "digit": digit,
        "other": digit[::-1].copy(),
        "small": digit.reshape(4, 2, 4, 2).mean((1, 3)).astype(np.uint8),
        "mask": mask,
        "black": 0 * mask,
        "white": 0 * mask + 255,
        "grey": 0 * mask + 100,
        "wide": np.zeros((8, 9), np.uint8),
        "colour": np.arange(192, dtype=np.uint8).reshape(8, 8, 3),
        "kernel": (KERNEL * 1023).astype(np.uint8),
        "even": np.ones((4, 4), np.uint8),
        "large": np.ones((9, 9), np.uint8),
    }.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    np.save(folder / "kernel.npy", KERNEL)
    np.save(folder / "cube.npy", np.ones((3, 3, 3), np.float32))
    (folder / "broken.npy").write_bytes(b"no array")
    return folder


TASKS = {
    "inpaint": ("digit", "--mask", "mask.png"),
    "upscale": ("small", "--factor", 2, "--noise", 0.05),
    "deblur": ("digit", "--kernel", "kernel.npy", "--noise", 0.05),
    "denoise": ("digit", "--noise", 0.3),
}


def typed(files: Path, task: str, picture: str, *words: object) -> tuple[object, ...]:
    there = [files / word if isinstance(word, str) and (files / word).exists() else word for word in words]
    return ("restore", "digits-edm", files / f"{picture}.png", "--task", task, *there)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.every(3)
def test_tasks(monkeypatch, capsys, tmp_path: Path, files: Path, task: str) -> None:
    assert run(monkeypatch, *typed(files, task, *TASKS[task]), "-n", 3, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "3 samples of 10 network evaluations: 5 steps of ddim with moments" in said and "not one answer" in said
    found = Restoration.load(tmp_path)
    assert found.samples.shape == (3, 1, 8, 8) and found.card["command"].startswith("fewstep restore digits-edm")
    assert {"overview.png", "mean.png", "spread.png", "README.md", "restoration.json"} <= {path.name for path in tmp_path.iterdir()}
    if task == "inpaint":
        known = torch.from_numpy(np.array(Image.open(files / "mask.png"))) == 0
        digit = load_images("digits").x[7, 0]
        assert float((found.samples[:, 0, known] - digit[known]).abs().max()) < 0.03
        assert float(found.spread[0, known].mean()) < 0.1 * float(found.spread[0, ~known].mean())


def test_options_reach_the_samples(monkeypatch, capsys, tmp_path: Path, files: Path) -> None:
    words = ("--method", "moments:steps=2", "--nfe", 12, "--solver", "ddim:eta=1", "--grid", "angle", "--label", 3, "--guidance", 2)
    words = (*words, "-n", 2, "--seed", 5, "--batch", 1, "--singles", "--json", "--out", tmp_path)
    assert run(monkeypatch, *typed(files, "upscale", *TASKS["upscale"]), *words) == 0
    told = json.loads(capsys.readouterr().out)
    card = told["card"]
    assert card["seeds"] == [5, 6] and card["evaluations"] == 12 and card["guidance"] == 2 and "steps=2" in card["method"]
    assert "eta=1" in card["sampler"] and sorted(path.name for path in (tmp_path / "singles").iterdir()) == ["000005.png", "000006.png"]


def test_a_kernel_may_be_a_picture(monkeypatch, capsys, tmp_path: Path, files: Path) -> None:
    for name in ("kernel.npy", "kernel.png"):
        words = typed(files, "deblur", "digit", "--kernel", name, "--noise", 0.05)
        assert run(monkeypatch, *words, "-n", 1, "--out", tmp_path / name) == 0
    one, two = (Restoration.load(tmp_path / name).samples for name in ("kernel.npy", "kernel.png"))
    torch.testing.assert_close(one, two, rtol=0, atol=0.1)


@pytest.mark.slow
def test_a_killed_run_continues(monkeypatch, capsys, tmp_path: Path, files: Path) -> None:
    words = (*typed(files, "inpaint", *TASKS["inpaint"]), "-n", 4, "--batch", 2)
    with pytest.MonkeyPatch.context() as patch:
        counted(patch, stop=15)
        assert run(monkeypatch, *words, "--out", tmp_path / "killed") == 130
    assert not (tmp_path / "killed" / "restoration.json").exists()
    assert run(monkeypatch, *words, "--out", tmp_path / "killed") == 0
    assert run(monkeypatch, *words, "--out", tmp_path / "whole") == 0
    one, two = (Restoration.load(tmp_path / name) for name in ("killed", "whole"))
    torch.testing.assert_close(one.samples, two.samples, rtol=0, atol=0)
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        assert run(monkeypatch, *words, "--out", tmp_path / "whole") == 0
    assert not calls


def blind_words(files: Path, *pictures: str) -> tuple[object, ...]:
    there = [files / f"{name}.png" for name in pictures]
    return ("restore", "digits-edm", *there, "--task", "blind-deblur", "--kernel-size", 3, "--noise", 0.05, "-n", 2)


@pytest.mark.slow
def test_a_kernel_that_nobody_knows(monkeypatch, capsys, tmp_path: Path, files: Path) -> None:
    small = BlindConfig(nfe=3, final=2, candidates=1, random=0, start_steps=5, steps=5, rehearsal=8)
    for module in ("apps.blind", "apps.commands.restore"):
        monkeypatch.setattr(f"fewstep.{module}.BlindConfig", lambda: small)
    assert run(monkeypatch, *blind_words(files, "digit"), "--out", tmp_path / "one") == 0
    said = capsys.readouterr().out
    assert "1 pictures that share a kernel of 3 x 3" in said and "not one answer" in said
    kernel = np.load(tmp_path / "one" / "kernel.npy")
    assert kernel.shape == (3, 3) and float(kernel.sum()) == pytest.approx(1) and kernel.min() >= 0
    assert Restoration.load(tmp_path / "one").samples.shape == (2, 1, 8, 8)
    assert run(monkeypatch, *blind_words(files, "digit", "other"), "--json", "--out", tmp_path / "two") == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 2
    assert Restoration.load(tmp_path / "two" / "other").samples.shape == (2, 1, 8, 8)
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        assert run(monkeypatch, *blind_words(files, "digit"), "--out", tmp_path / "one") == 0
    assert not calls
    assert run(monkeypatch, *blind_words(files, "other"), "--out", tmp_path / "one") == 2
    assert "samples of another command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--kernel-size", 4), "odd"),
        (("--kernel-size", 9), "9 x 9"),
        (("--noise", -1), "noise"),
        (("--nfe", 20), "takes no --nfe"),
        (("--mask", "mask.png"), "takes no --mask"),
        (("--method", "dps"), "takes no --method"),
        (("--singles",), "takes no --singles"),
    ],
)
@pytest.mark.every(3)
def test_refusals_of_blind_deblurring(monkeypatch, capsys, tmp_path: Path, files: Path, words: tuple[object, ...], says: str) -> None:
    assert run(monkeypatch, *blind_words(files, "digit"), *words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("fewstep: ") and says in error[-1], error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "words", "says"),
    [
        ("inpaint", ("digit",), "inpaint needs --mask"),
        ("inpaint", ("digit", "--mask", "wide.png"), "9 x 8 pixels, and the pictures have 8 x 8"),
        ("inpaint", ("digit", "--mask", "grey.png"), "grey pixels"),
        ("inpaint", ("digit", "--mask", "black.png"), "nothing is left to fill in"),
        ("inpaint", ("digit", "--mask", "white.png"), "nothing of the picture is known"),
        ("inpaint", ("digit", "--mask", "mask.png", "--factor", 2), "inpaint takes no --factor"),
        ("inpaint", ("wide", "--mask", "mask.png"), "8 x 9 in grey, and the model's samples are 8 x 8 in grey"),
        ("inpaint", ("colour", "--mask", "mask.png"), "8 x 8 in RGB, and the model's samples are 8 x 8 in grey"),
        ("inpaint", ("nothing", "--mask", "mask.png"), "nothing.png"),
        ("upscale", ("small", "--factor", 2), "upscale needs --noise"),
        ("upscale", ("digit", "--factor", 2, "--noise", 0.05), "with a factor of 2 takes pictures of 4 x 4"),
        ("upscale", ("small", "--factor", 3, "--noise", 0.05), "no multiples of 3"),
        ("upscale", ("small", "--factor", 0, "--noise", 0.05), "a whole number from 1"),
        ("deblur", ("digit", "--kernel", "even.png", "--noise", 0.05), "odd sides"),
        ("deblur", ("digit", "--kernel", "large.png", "--noise", 0.05), "larger than"),
        ("deblur", ("digit", "--kernel", "black.png", "--noise", 0.05), "odd sides"),
        ("deblur", ("digit", "--kernel", "cube.npy", "--noise", 0.05), r"\[h, w\]"),
        ("deblur", ("digit", "--kernel", "broken.npy", "--noise", 0.05), "not a readable array"),
        ("deblur", ("digit", "--kernel", "kernel.npy", "--noise", -1), "from 0"),
        ("denoise", ("digit", "--noise", "nan"), "number"),
        ("colorize", ("digit",), "no colours to find"),
        ("sharpen", ("digit",), "unknown task"),
        ("denoise", ("digit", "--noise", 0.3, "--kernel-size", 3), "takes no --kernel-size"),
        ("denoise", ("digit", "digit.png", "--noise", 0.3), "one picture at a time"),
        ("denoise", ("digit", "--noise", 0.3, "--strength", 2), "at most 1"),
        ("denoise", ("digit", "--noise", 0.3, "--strength", "much"), "--strength is one number"),
        ("denoise", ("digit", "--noise", 0.3, "--strength", "0.3,0.4"), "--strength is one number"),
        ("denoise", ("digit", "--noise", 0.3, "--guidance", 2), "pass cond="),
        ("blind_deblur", ("digit", "--noise", 0.3, "--kernel-size", 3), "did you mean blind-deblur"),
        ("blind-deblur", ("digit", "--noise", 0.3), "needs --kernel-size"),
        ("denoise", ("digit", "--noise", 0.3, "--nfe", 9), "as 8 or 10, not 9"),
        ("denoise", ("digit", "--noise", 0.3, "--method", "best"), "unknown method"),
        ("denoise", ("digit", "--noise", 0.3, "--samples", 0), "at least 1"),
        ("denoise", ("digit", "--noise", 0.3, "--label", 10), "labels 0 to 9"),
        ("denoise", ("digit", "--noise", 0.3, "--solver", "unipc-2", "--method", "dps", "--nfe", 4), "use ddim"),
    ],
)
@pytest.mark.every(3)
def test_refusals(monkeypatch, capsys, tmp_path: Path, files: Path, task: str, words: tuple[object, ...], says: str) -> None:
    assert run(monkeypatch, *typed(files, task, *words), "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("fewstep: ") and re.search(says, error[-1]), error
    assert not (tmp_path / "out").exists()


def test_what_was_there_is_not_replaced(monkeypatch, capsys, tmp_path: Path, files: Path) -> None:
    picture = tmp_path / "mean.png"
    picture.write_bytes((files / "digit.png").read_bytes())
    before = picture.read_bytes()
    assert run(monkeypatch, "restore", "digits-edm", picture, "--task", "denoise", "--noise", 0.3, "-n", 1, "--out", tmp_path) == 2
    assert "holds mean.png" in capsys.readouterr().err and picture.read_bytes() == before


@pytest.mark.slow
def test_what_comes_before_the_samples_is_said(monkeypatch, capsys, tmp_path: Path, files: Path) -> None:
    words = ("--noise", 0.3, "-n", 1, "--nfe", 4, "--method", "spectral", "--out", tmp_path)
    assert run(monkeypatch, *typed(files, "denoise", "digit", *words)) == 0
    assert "before them 2560 evaluations" in capsys.readouterr().out
    assert Restoration.load(tmp_path).card["evaluations before"] == 2560


def test_a_student_is_refused(monkeypatch, capsys, tmp_path: Path, files: Path) -> None:
    picture, words = files / "digit.png", ("--task", "denoise", "--noise", 0.3, "--out", tmp_path / "out")
    assert run(monkeypatch, "restore", DSNO, picture, *words) == 2
    assert "student" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
