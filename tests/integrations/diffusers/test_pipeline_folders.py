"""Folders that hold pipelines: which do, and that nothing which lies in one runs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fewstep import ArtifactError, ModelError, load_model
from fewstep.integrations.diffusers.pipeline_folders import is_pipeline, load_pipeline


def test_folders_of_pipelines(folder, tmp_path):
    assert is_pipeline(folder("sd")) and not is_pipeline(load_model("digits-ddpm").folder) and not is_pipeline(tmp_path)
    assert load_pipeline(folder("sd3")).text_encoder_3 is None
    with pytest.raises(ArtifactError, match="model_index.json"):
        load_pipeline(tmp_path)


# -- what lies in a folder must not run -----------------------------------------------------------------------------------------------

EVIL = "from pathlib import Path\nPath(__file__).with_name('sprung').touch()\nclass Evil: pass\n"


@pytest.fixture
def shipped(tmp_path):
    """A copy of a whole pipeline's folder, and a function that changes its ``model_index.json``."""
    folder = tmp_path / "pipeline"
    shutil.copytree(load_model("digits-ddpm").folder, folder)

    def change(**entries):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, **entries}))
        return folder

    return change


@pytest.mark.parametrize(
    "entry", [["evil", "Evil"], ["os", "system"], ["diffusers", ["evil", "Evil"]], ["evil"], [None, "Evil"], ["a.b", "C"]]
)
def test_classes_of_other_libraries_are_refused(shipped, monkeypatch, entry):
    folder = shipped(unet=entry)
    for place in (folder, folder / "unet"):
        (place / "evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(ModelError, match="model_index.json was refused, and nothing of it has run: its unet is "):
        load_pipeline(folder)
    assert not list(folder.rglob("sprung"))


@pytest.mark.parametrize("library", ["diffusers", "ddpm"])
def test_code_that_lies_in_the_folder_under_the_name_of_a_library_is_refused(shipped, library):
    folder = shipped(unet=[library, "UNet2DModel"])
    (folder / "unet" / f"{library}.py").write_text(EVIL.replace("Evil", "UNet2DModel"))
    with pytest.raises(ModelError, match="its unet is of the library"):
        load_pipeline(folder)
    assert not list(folder.rglob("sprung"))


@pytest.mark.parametrize("name", [["evil", "Evil"], None, 3])
def test_a_pipeline_class_of_its_own_is_refused(shipped, name):
    folder = shipped(_class_name=name)
    (folder / "evil.py").write_text(EVIL)
    with pytest.raises(ModelError, match="its pipeline is .*, not the name of a class of diffusers"):
        load_pipeline(folder)
    assert not list(folder.rglob("sprung"))


@pytest.mark.parametrize("config", ["config.json", "tokenizer_config.json"])
def test_a_config_that_names_code_is_refused(shipped, config):
    folder = shipped(text_encoder=["transformers", "AutoModel"])
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / config).write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil"}}))
    (folder / "text_encoder" / "evil.py").write_text(EVIL)
    with pytest.raises(ModelError, match="names code of its own"):
        load_pipeline(folder)
    assert not list(folder.rglob("sprung"))


def test_weights_that_are_a_pickle_are_refused(shipped):
    folder = shipped()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ModelError, match="cannot load"):
        load_pipeline(folder)
