"""Checkpoints of all kinds made into ours, and what is refused."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.models.formats.test_checkpoints import SONG, edm_pickle, sampled, song
from tests.models.formats.test_checkpoints_others import ADM_CONFIG, VE, VP, score_sde_file
from tests.models.networks.test_unets import ADM, NCSNpp, state_of
from tests.problems import DSNO

from fewstep import ArtifactError, Model, ModelError, load_model
from fewstep.models.formats.checkpoints import FORMATS, convert, load_checkpoint, save_single_file
from fewstep.runtime.job import Job


@pytest.fixture
def checkpoints(tmp_path: Path, edm_modules: None) -> dict[str, tuple[Path, dict]]:
    """One file of each format and how to load it."""
    torch.manual_seed(0)
    torch.save(state_of(ADM(), torch.tensor([0])), tmp_path / "adm.pt")
    ncsn = NCSNpp(inputs="residual", embedding="fourier")
    sigmas = torch.tensor([50.0, 0.01], dtype=torch.float64)
    options = {**SONG, "label_dim": 4}
    return {
        "edm": (edm_pickle(tmp_path / "edm.pkl", "EDMPrecond", song(options), "SongUNet", options, sigma_data=0.6), {"trust": True}),
        "vp": (edm_pickle(tmp_path / "vp.pkl", "VPPrecond", song(), "SongUNet", SONG, beta_d=19.9, beta_min=0.1), {"trust": True}),
        "score-sde": (score_sde_file(tmp_path / "ncsn.pth", ncsn, sigmas), {"config": VE}),
        "guided-diffusion": (tmp_path / "adm.pt", {"config": ADM_CONFIG}),
    }


def _same(one: Model, other: Model) -> None:
    for what in ("shape", "classes", "null_label", "fingerprint"):
        assert getattr(one, what) == getattr(other, what)
    assert one.schedule.to_config() == other.schedule.to_config()
    mine, theirs = one.network.state_dict(), other.network.state_dict()
    assert set(mine) == set(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert torch.equal(sampled(one), sampled(other))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm", "vp", "score-sde", "guided-diffusion"])
def test_converted_checkpoints_are_the_same_to_the_bit(tmp_path: Path, checkpoints: dict, name: str) -> None:
    path, options = checkpoints[name]
    model = load_checkpoint(path, **options)
    folder = convert(path, tmp_path / "new" / "folder", **options)
    assert {str(file.relative_to(folder.folder)) for file in folder.folder.rglob("*.*")} == {"fewstep.json", "unet/model.safetensors"}
    assert oct(folder.folder.stat().st_mode & 0o777) == oct(0o777 & ~_umask())
    convert(path, tmp_path / "one.safetensors", **options)
    save_single_file(folder, tmp_path / "two.safetensors")
    for other in (folder, load_model(tmp_path / "new" / "folder"), load_model(tmp_path / "one.safetensors")):
        _same(model, other)
    _same(model, load_checkpoint(tmp_path / "two.safetensors", format="safetensors"))
    convert(tmp_path / "two.safetensors", tmp_path / "again")  # what needs no trust and no config any more
    _same(model, load_model(tmp_path / "again"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("name", ["digits-edm", "digits-ddpm", "digits-edm-3step"])
@pytest.mark.every(3)
def test_a_unet_of_diffusers_as_a_single_file(tmp_path: Path, name: str) -> None:
    model = load_model(name)
    path = save_single_file(model, tmp_path / "digits.safetensors")
    _same(model, load_model(path))
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["fewstep"])
    assert said["network"]["class"] == "UNet2DModel" and not any(key.startswith("_") for key in said["network"]["options"])


def test_what_cannot_be_written_down(tmp_path: Path) -> None:
    model = load_model("digits-edm")
    own = Model(model.network, model.schedule, "edm(0.5)", time=lambda t: 3 * t, shape=model.shape, name="mine")
    function = Model(lambda x, t: x, model.schedule, "sample", shape=model.shape)
    for bad, path, says in [
        (own, "a.safetensors", "mine cannot be written down: its time is a function of your own"),
        (replace(model, time_dtype=torch.float64), "a.safetensors", "a description has no dtype and time_dtype"),
        (function, "a.safetensors", "its network is a function of your own"),
        (model, "a.bin", r"a single file is named \*.safetensors"),
        (load_model(DSNO), "a.safetensors", "is a student"),
    ]:
        with pytest.raises(ModelError, match=says):
            save_single_file(bad, tmp_path / path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        save_single_file(model, tmp_path / "file" / "a.safetensors")


def test_nothing_half_written_is_left(tmp_path: Path, checkpoints: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = checkpoints["vp"]
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError):
        convert(path, out / "a")  # not trusted
    (tmp_path / "cut.pkl").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="damaged"):
        convert(tmp_path / "cut.pkl", out / "a", **options)
    with pytest.raises(ArtifactError, match="is a file"):
        convert(path, path / "a", **options)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewstep.models.formats.folders.save_file", full)
    for name in ("a", "a.safetensors"):
        with pytest.raises(ArtifactError, match="No space left"):
            convert(path, out / name, **options)
    assert list(out.iterdir()) == []
    (out / "mine").write_text("")
    for there in (out, out / "mine"):
        with pytest.raises(ArtifactError, match=f"{there} is there already: name another"):
            convert(path, there, **options)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_conversion_is_the_only_job_in_its_folder(tmp_path: Path, checkpoints: dict) -> None:
    path, options = checkpoints["vp"]
    with Job.open("fit", tmp_path / "out"):
        for out in (tmp_path / "out", tmp_path / "out" / "a.safetensors"):
            with pytest.raises(ArtifactError, match=f"another fewstep job is working in {tmp_path / 'out'}: wait"):
                convert(path, out, **options)


def test_a_conversion_that_was_killed_between_its_files_is_made_whole(tmp_path: Path, checkpoints: dict) -> None:
    path, options = checkpoints["vp"]
    whole, out = convert(path, tmp_path / "whole", **options), tmp_path / "out"
    (out / ".fewstep-dead" / "unet").mkdir(parents=True)
    (out / ".lock").write_text("")
    shutil.copy(whole.folder / "fewstep.json", out)
    assert convert(path, out, **options).fingerprint == whole.fingerprint
    assert sorted(path.name for path in out.iterdir()) == ["fewstep.json", "unet"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "fewstep.json").write_text("{}")
    with pytest.raises(ArtifactError, match="mine is there already"):
        convert(path, tmp_path / "mine", **options)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["fewstep.json"]


@pytest.mark.slow
def test_damaged_single_files_and_folders(tmp_path: Path, checkpoints: dict) -> None:
    path, options = checkpoints["edm"]
    convert(path, tmp_path / "whole.safetensors", **options)
    weights, meta = load_file(tmp_path / "whole.safetensors"), None
    folder = convert(path, tmp_path / "folder", **options).folder
    meta = json.loads((folder / "fewstep.json").read_text())
    cut = tmp_path / "cut.safetensors"
    for length in (0, 4, 200, -1):
        cut.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:length])
        with pytest.raises(ModelError, match="cannot read .*cut.safetensors as safetensors.*fetch or make it again"):
            load_checkpoint(cut)

    def says(words: str, header: dict | str, tensors: dict | None = None) -> None:
        save_file(weights if tensors is None else tensors, cut, {"fewstep": header if isinstance(header, str) else json.dumps(header)})
        with pytest.raises(ModelError, match=words) as error:
            load_checkpoint(cut)
        assert "cut.safetensors" in str(error.value)

    says("damaged", "{")
    says("damaged: network: field required", {})
    for key in ("network", "schedule", "prediction", "time", "shape", "classes"):
        says(f"damaged: {key}: field required", {name: value for name, value in meta.items() if name != key})
    says("unknown prediction type", {**meta, "prediction": "noise"})
    says("unknown form of a network's time", {**meta, "time": {**meta["time"], "form": "lag"}})
    says("unknown network class", {**meta, "network": {"class": "os.system", "options": {}}})
    options = meta["network"]["options"]
    for change, words in [
        ({"shape": 0}, "damaged: shape: "),
        ({"shape": [3, 0, 8]}, "damaged: shape.1: "),
        ({"shape": [3, 1 << 39, 8]}, "more numbers than any network makes"),
        ({"classes": [10]}, "damaged: classes: "),
        ({"null_label": -1}, "damaged: null_label: "),
        ({"null_label": 10**400}, "damaged: a number of 401 digits"),
        ({"prediction": 3}, "damaged: prediction: "),
        ({"network": {"class": meta["network"]["class"]}}, "does not describe a model: KeyError"),
        ({"network": {**meta["network"], "options": {**options, "num_blocks": 10**9}}}, "too many blocks or levels"),
        ({"network": {**meta["network"], "options": {**options, "channel_mult": [1] * 10**4}}}, "too many blocks or levels"),
        ({"schedule": {**meta["schedule"], "t_max": -1.0}}, "t_clean <= t_min < t_max"),
        ({"time": {**meta["time"], "factor": "1"}}, "NetworkTime: factor is a number"),
        ({"time": {**meta["time"], "scale": math.inf}}, "which are not finite"),
        ({"time": {**meta["time"], "scale": math.nan}}, "NetworkTime: scale is a number, got nan"),
        ({"network": {"class": "UNet2DModel", "options": {"time_embedding_type": "x"}}}, "no UNet2DModel has the options"),
    ]:
        says(words, {**meta, **change})
    says("unknown noise schedule", {**meta, "schedule": {"law": "mine"}})
    says("the file lacks map_layer0.weight", meta, {key: value for key, value in weights.items() if key != "map_layer0.weight"})
    (folder / "unet" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="model.safetensors"):
        load_model(folder)


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file at .*nowhere.pkl: name a checkpoint"):
        load_checkpoint(tmp_path / "nowhere.pkl", trust=True)
    with pytest.raises(ModelError, match="is a folder, and a checkpoint is one file: name that, or give the folder to load_model"):
        load_checkpoint(tmp_path)
    for name, content in {"a.pt": {"weight": torch.ones(2)}, "b.pt": [1, 2], "c.pt": {1: 2}, "d.pt": {"a": 1}}.items():
        torch.save(content, tmp_path / name)
    for name, options, says in [
        ("a.pt", {}, f"does not show which format it has: pass format=, one of {', '.join(FORMATS)}"),
        ("a.pt", {"format": "score_sde"}, "unknown format 'score_sde': did you mean score-sde"),
        ("a.pt", {"format": "score-sde", "config": VP}, "the weights have weight, which no NCSN"),
        ("a.pt", {"format": "guided-diffusion", "config": ADM_CONFIG}, "no guided-diffusion U-Net"),
        ("a.pt", {"format": "safetensors"}, "does not show which format"),
        ("a.pt", {"format": "edm"}, "is a pickle"),
        ("b.pt", {}, "holds a list, not a mapping"),
        ("c.pt", {}, "holds a dict, not a mapping of names"),
        ("d.pt", {"format": "guided-diffusion"}, "is not a state dict"),
    ]:
        with pytest.raises(ModelError, match=says):
            load_checkpoint(tmp_path / name, **options)
    (tmp_path / "text.pth").write_text("not a file of torch's")
    with pytest.raises(ModelError, match="text.pth"):
        load_checkpoint(tmp_path / "text.pth")
    for name in ("digits-edm", tmp_path):
        with pytest.raises(ModelError, match="is no file: format and config are for checkpoint files"):
            load_model(name, format="edm")
