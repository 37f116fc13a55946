"""Files that are whole or not there, and what can be said before any is written."""

import json
import os
from dataclasses import dataclass

import pytest

from fewstep import ArtifactError, FewstepError, ModelStatistics, Sampler, load_model
from fewstep.data.images import load_images
from fewstep.learn.teacher.trajectories import Trajectories
from fewstep.models.formats.checkpoints import load_checkpoint
from fewstep.runtime.artifact import (
    Count,
    Number,
    Record,
    Whole,
    check_writable,
    parse_json,
    parse_record,
    read_file,
    read_json,
    read_record,
    write_whole,
)
from fewstep.runtime.job import folder_of


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("a bug"), KeyboardInterrupt()])
def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "data.bin"
    write_whole(path, b"old")

    def half(temporary):
        temporary.write_bytes(b"ne")
        raise error

    with pytest.raises(ArtifactError if isinstance(error, OSError) else type(error)):
        write_whole(path, half)
    assert [file.name for file in tmp_path.iterdir()] == ["data.bin"]
    assert path.read_bytes() == b"old"


def test_a_written_file_has_ordinary_permissions(tmp_path):
    write_whole(tmp_path / "ours", b"x")
    (tmp_path / "theirs").write_bytes(b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_read_json_reads_an_object(tmp_path):
    write_whole(tmp_path / "a.json", b'{"b": [1, null]}')
    assert read_json(tmp_path / "a.json") == {"b": [1, None]}
    with pytest.raises(ArtifactError, match="cannot read"):
        read_json(tmp_path)


def test_a_folder_that_does_not_exist_yet_is_writable(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(ArtifactError, match=f"cannot write {folder}: .*file is a file; choose a folder"):
            check_writable(folder)


def test_a_folder_without_permission_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a superuser may write anywhere
    with pytest.raises(ArtifactError, match="may not be written to; choose a folder"):
        check_writable(tmp_path / "a")


# -- hostile files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyRecord(Record):
    FORMAT = "fewstep-toy"

    count: Count
    level: Number
    seed: Whole
    sides: list[Count]
    name: str | None


TOY = {"format": "fewstep-toy", "version": 1, "count": 3, "level": 1, "seed": 0, "sides": [2, 3], "name": None}


def test_a_record_has_the_values_of_its_file(tmp_path):
    write_whole(tmp_path / "toy.json", json.dumps(TOY).encode())
    found = read_record(tmp_path / "toy.json", ToyRecord)
    assert found == ToyRecord("fewstep-toy", 1, 3, 1.0, 0, [2, 3], None) and isinstance(found.level, float)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": "3"}, "count: input should be a valid integer"),
        ({"count": 3.0}, "count: "),
        ({"count": True}, "count: "),
        ({"count": 0}, "count: input should be greater than or equal to 1, got '0'"),
        ({"count": 1 << 50}, "count: "),
        ({"seed": 1 << 63}, "seed: input should be less than"),
        ({"level": float("nan")}, "level: "),
        ({"level": float("inf")}, "level: "),
        ({"level": "1"}, "level: "),
        ({"level": 10**400}, "a number of 401 digits"),
        ({"sides": 3}, "sides: "),
        ({"sides": [2, -1]}, "sides.1: "),
        ({"name": 3}, "name: "),
        ({"name": "x" * 10**6}, None),
        ({"names": "x"}, "names: unexpected keyword argument"),
        ({"version": 2}, "is 'fewstep-toy' version 2; this fewstep reads 'fewstep-toy' version 1"),
        ({"format": ["x"]}, "version 1; this fewstep reads"),
    ],
)
def test_a_field_of_another_type_is_named(change, says):
    text = json.dumps({**TOY, **change})
    if says is None:
        assert parse_record(text, ToyRecord, "toy.json").name == change["name"]
        return
    with pytest.raises(ArtifactError, match=f"toy.json .*{says}"):
        parse_record(text, ToyRecord, "toy.json")


@pytest.mark.parametrize("depth", [65, 500, 100_000])
def test_deep_json_is_refused(depth):
    for text in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
        with pytest.raises(ArtifactError, match="deep.json is damaged"):
            parse_json(text, "deep.json")


def test_json_of_half_a_character_or_broken_text_is_refused():
    with pytest.raises(ArtifactError, match="a.json is damaged"):
        parse_json(b"\xff\xfe{", "a.json")
    with pytest.raises(ArtifactError) as error:
        parse_record(json.dumps({**TOY, "name": "\ud800", "count": "\udfff"}), ToyRecord, "toy.json")
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize("read", [read_file, read_json, lambda path: Sampler.load(path.parent), lambda path: load_checkpoint(path)])
def test_a_pipe_or_a_device_is_refused_before_it_is_opened(tmp_path, read):
    """An open of the pipe would wait for a writer for ever; a read of the device would never end."""
    os.mkfifo(tmp_path / "sampler.json")
    with pytest.raises(FewstepError, match="a pipe or device|no file at"):
        read(tmp_path / "sampler.json")
    (tmp_path / "sampler.json").unlink()
    (tmp_path / "sampler.json").symlink_to("/dev/zero")
    with pytest.raises(FewstepError, match="a pipe or device|no file at"):
        read(tmp_path / "sampler.json")


def test_a_file_of_a_terabyte_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: no block on the disk
    with pytest.raises(ArtifactError, match="more than any such file needs"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a" * 5000, "a" * 300, "a/" * 2500, "a\0b", "é" * 200])
@pytest.mark.parametrize("use", [load_model, Sampler.load, ModelStatistics.load, load_images, Trajectories.load, folder_of, read_json])
@pytest.mark.every(3)
def test_a_path_that_no_file_can_have_is_refused(use, name):
    with pytest.raises(FewstepError, match="no file or folder can be named"):
        use(name)


@pytest.mark.parametrize("use", [load_model, Sampler.load, load_images, Trajectories.load, folder_of])
def test_an_empty_path_is_not_the_working_folder(use):
    with pytest.raises(FewstepError, match="named by its path, got ''"):
        use("")


def test_a_message_has_less_than_two_kilobytes():
    for text in ("x" * 10**7, "é" * 10**6, "\ud800" * 10**6):
        error = ArtifactError(f"begin {text} end")
        assert len(str(error).encode()) < 2000
        assert str(error).startswith("begin ") and str(error).endswith(" end") and " [...] " in str(error)
    assert str(ArtifactError("short")) == "short"
