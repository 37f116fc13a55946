"""``fewstep sample --from``: the picture's own samples, resumed or in parallel or guided, and refusals that write nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.apps.conftest import run
from tests.problems import DSNO, contents

import fewstep
from fewstep.data.images import read_image
from fewstep.evaluate.pictures import save_singles
from fewstep.integrations.diffusers.pipelines import PipelineModel
from fewstep.models.zoo import load_model

EDM = load_model("digits-edm")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A digit as ``--singles`` writes it: its grey in RGB."""
    return Path(save_singles(fewstep.sample(EDM, "unipc-2", nfe=8, seeds=[3]), tmp_path / "singles", range(3, 4))) / "000003.png"


def samples(folder: Path) -> torch.Tensor:
    with np.load(folder / "samples.npz") as file:
        return torch.from_numpy(file["x"])


@pytest.mark.slow
def test_samples_are_those_of_python_and_resume(picture: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("sample", "digits-edm", "--from", picture, "--nfe", 6, "-n", 5, "--batch", 2, "--npz", "--out", out)
    assert run(monkeypatch, *words, "--strength", 0.3, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["nfe"] == 6 and "noise levels 0.429 to 0.002" in told["sampler"]
    x0 = read_image(picture, (1, 8, 8))
    expected = fewstep.sample(EDM, "unipc-2", nfe=6, grid="angle", seeds=range(5), x0=x0, strength=0.3)
    torch.testing.assert_close(samples(out), expected, rtol=1e-5, atol=1e-5)
    before = contents(out)
    assert run(monkeypatch, *words, "--strength", 0.3) == 0 and contents(out).keys() == before.keys()
    for other in (("--strength", 0.4), ("--strength", 1)):
        assert run(monkeypatch, *words, *other) == 2
        assert "holds the samples of another command" in capsys.readouterr().err
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(picture)
    assert run(monkeypatch, *words, "--strength", 0.3) == 2 and "another command" in capsys.readouterr().err
    assert run(monkeypatch, *words[:2], *words[4:]) == 2 and contents(out).keys() == before.keys()


@pytest.mark.parametrize(
    "words",
    [
        ("digits-edm", "--solver", "fitted", "--nfe", 6),
        ("digits-edm", "--solver", "heun", "--nfe", 6, "--grid", "karras:rho=5"),
        ("digits-edm", "--grid", "optimized", "--nfe", 5),
        ("digits-edm", "--parallel", "--nfe", 8),
        ("digits-ddpm", "--classifier", "digits", "--label", 3),
        ("digits-ddpm", "--classifier", "digits", "--label", 3, "--split", "joint"),
        ("digits-ddpm", "--grid", "leading", "--guidance", 1),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
@pytest.mark.every(3)
def test_with_other_options(words, picture: Path, monkeypatch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "sample", *words, "--from", picture, "--strength", 0.1, "-n", 3, "--npz", "--out", out) == 0
    assert float((samples(out) - read_image(picture, (1, 8, 8))).square().mean().sqrt()) < 0.3  # near the picture


def test_a_saved_sampler(picture: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    EDM.fitted(6).save(tmp_path / "fitted")
    words = ("sample", "digits-edm", "--sampler", tmp_path / "fitted", "--from", picture, "--strength", 0.3, "-n", 2, "--json")
    assert run(monkeypatch, *words, "--out", tmp_path / "out") == 0
    assert json.loads(capsys.readouterr().out)["nfe"] == 6


COLOURED = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("digits-edm", "--from", "DIGIT"), "--from begins with a picture: say --strength"),
        (("digits-edm", "--strength", 0.3), "--strength says how much noise a picture gets: say --from PICTURE"),
        (("digits-edm", "--from", "DIGIT", "--strength", 0), "above 0 and at most 1, got 0"),
        (("digits-edm", "--from", "DIGIT", "--strength", 0.001), "no step begins at noise level 0.001001"),
        (("digits-edm", "--from", "DIGIT", "--strength", 0.3, "--times", "1,0.1"), "say where sampling begins: leave --strength out"),
        (("digits-edm", "--from", "DIGIT", "--strength", 0.3, "--sigmas", "1,0.1"), "say where sampling begins: leave --strength out"),
        ((DSNO, "--from", "DIGIT", "--strength", 0.3), "digits-dsno is a student, whose jumps start at pure noise"),
        (("digits-edm", "--from", "LARGE", "--strength", 0.3), "is 16 x 8 in grey, and the model's samples are 8 x 8 in grey"),
        (("digits-edm", "--from", "COLOURED", "--strength", 0.3), "is 8 x 8 in RGB, and the model's samples are 8 x 8 in grey"),
        (("digits-edm", "--from", "nowhere.png", "--strength", 0.3), "nowhere.png"),
        (("flat:model", "--from", "DIGIT", "--strength", 0.3), "samples are of shape (2,), which are no pictures"),
        (("latent:model", "--from", "DIGIT", "--strength", 0.3), "samples latents of a pipeline, and a picture is none: put a Fewstep"),
    ],
)
@pytest.mark.every(3)
def test_what_cannot_be_is_refused_in_one_line(words, says, picture: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((16, 8), np.uint8)).save(tmp_path / "large.png")
    Image.fromarray(COLOURED).save(tmp_path / "coloured.png")
    files = {"DIGIT": picture, "LARGE": tmp_path / "large.png", "COLOURED": tmp_path / "coloured.png"}
    law = fewstep.VPLinear()
    made = {"flat": fewstep.Model(_zero, law, "sample", shape=(2,)), "latent": PipelineModel(_zero, law, "sample", shape=(1, 8, 8))}
    monkeypatch.setattr("fewstep.apps.commands.sample.open_model", lambda name, trust: made.get(name.split(":")[0]) or load_model(name))
    assert run(monkeypatch, "sample", *(files.get(word, word) for word in words), "-n", 2, "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert says in told and len([line for line in told.splitlines() if line.startswith("fewstep:")]) == 1
    assert not (tmp_path / "out").exists()


def _zero(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def test_latents_of_a_folder_are_refused(picture: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    folder = EDM.folder
    assert folder is not None
    (tmp_path / "ldm").mkdir()
    for file in Path(folder).rglob("*"):
        if file.is_file():
            target = tmp_path / "ldm" / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    (tmp_path / "ldm" / "model_index.json").write_text(
        json.dumps({"unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"]})
    )
    words = ("sample", tmp_path / "ldm", "--from", picture, "--strength", 0.3, "--out", tmp_path / "out")
    assert run(monkeypatch, *words) == 2 and "samples latents" in capsys.readouterr().err
