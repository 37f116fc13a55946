"""What a tuned model's folder says of itself: kept, optional, and never half-believed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep import ArtifactError
from fewstep.models.tuned import Tuned

TUNED = Tuned("digits-edm", "0123456789abcdef", 2.0, "ddim", 3, "mean")


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    TUNED.save(tmp_path / "model")
    assert Tuned.load(tmp_path / "model") == TUNED
    meta = json.loads((tmp_path / "model" / "tuned.json").read_text())
    assert (meta["format"], meta["version"], meta["teacher"], meta["nfe"]) == ("fewstep-tuned", 1, "digits-edm", 3)
    replace(TUNED, nfe=4).save(tmp_path / "model")
    assert Tuned.load(tmp_path / "model").nfe == 4
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["tuned.json"]  # nothing half-written beside it


def test_a_teacher_beside_it_moves_with_it(tmp_path: Path) -> None:
    here, there = tmp_path.resolve() / "here", tmp_path.resolve() / "there"
    replace(TUNED, teacher=str(here / "teacher")).save(here / "model")
    assert json.loads((here / "model" / "tuned.json").read_text())["teacher"] == "../teacher"
    here.rename(there)
    assert Tuned.load(there / "model") == replace(TUNED, teacher=str(there / "teacher"))


def test_a_teacher_elsewhere_stays_where_it_is(tmp_path: Path) -> None:
    elsewhere = replace(TUNED, teacher=str(tmp_path.resolve() / "others" / "teacher"))
    elsewhere.save(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "moved")
    assert Tuned.load(tmp_path / "moved") == elsewhere


def test_a_model_that_was_not_tuned_has_none(tmp_path: Path) -> None:
    assert Tuned.load(tmp_path) is None


@pytest.mark.parametrize("change", [{"version": 2}, {"version": None}, {"format": "fewstep-model"}])
def test_another_version_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    TUNED.save(tmp_path)
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(
        ArtifactError, match="this fewstep reads 'fewstep-tuned' version 1: use the version of fewstep that wrote it, or make it again"
    ):
        Tuned.load(tmp_path)


@pytest.mark.parametrize("damage", ["lacks", "adds", "cut", "list"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    TUNED.save(tmp_path)
    path = tmp_path / "tuned.json"
    text = path.read_text()
    meta = json.loads(text)
    damaged = {"cut": text[:40], "list": "[]", "adds": json.dumps({**meta, "extra": 1})}
    damaged["lacks"] = json.dumps({key: value for key, value in meta.items() if key != "fingerprint"})
    path.write_text(damaged[damage])
    with pytest.raises(ArtifactError, match=r"tuned\.json (is damaged|should hold a JSON object)"):
        Tuned.load(tmp_path)
