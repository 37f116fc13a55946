"""Reflected models in folders and files: version 4, the same to the bit, and refused by readers of the versions before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.problems import reflected_model

from fewstep import ArtifactError, Cube, Model, ModelError, load_model, sample
from fewstep.models.formats.checkpoints import load_checkpoint, save_single_file
from fewstep.models.formats.folders import ModelRecord, save_like
from fewstep.runtime.artifact import read_record


@pytest.fixture(scope="module")
def model() -> Model:
    return reflected_model()


def test_saved_and_loaded_it_is_the_same_to_the_bit(model: Model, tmp_path: Path) -> None:
    again = load_model(model.save(tmp_path / "model"))
    assert again.fingerprint == model.fingerprint and (again.domain, again.prediction) == (Cube(), model.prediction)
    assert (again.classes, again.null_label, again.schedule) == (3, 3, model.schedule)
    ours, theirs = (sample(one, "ddim", nfe=3, seeds=range(2), guidance=2) for one in (model, again))
    assert torch.equal(ours, theirs)
    save_like(again, again.network, tmp_path / "like")
    one = load_checkpoint(save_single_file(model, tmp_path / "one.safetensors"))
    assert load_model(tmp_path / "like").fingerprint == one.fingerprint == model.fingerprint


def test_readers_of_older_versions_refuse_it_by_its_number(model: Model, tmp_path: Path) -> None:
    file = model.save(tmp_path / "model") / "fewstep.json"
    assert json.loads(file.read_text())["version"] == 4
    with pytest.raises(ArtifactError, match="version 4"):
        read_record(file, ModelRecord)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "domain"),  # an ordinary model has none
        ({"domain": {"low": 1, "high": -1}}, "finite walls with low < high"),
        ({"domain": None}, "domain"),
        ({"preconditioning": [[0.0, 1.0]]}, "2 or more rows"),
        ({"preconditioning": None}, "belong together"),
        ({"prediction": "edm(0.5)"}, "belong together"),
        ({"schedule": {"law": "flow"}}, "walls stand still only where noise is added"),
    ],
)
def test_a_damaged_description_is_named(model: Model, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = model.save(tmp_path / "model")
    meta = json.loads((folder / "fewstep.json").read_text())
    (folder / "fewstep.json").write_text(json.dumps(meta | change))
    with pytest.raises((ArtifactError, ModelError), match=f"fewstep.json.*{says}"):
        load_model(folder)


def test_a_network_of_ones_own_is_refused_before_it_is_lost(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a reflected model is saved with a network of diffusers or of fewstep"):
        reflected_model(network=torch.nn.Identity(), call=None).save(tmp_path / "own")
    assert not (tmp_path / "own" / "fewstep.json").exists()
