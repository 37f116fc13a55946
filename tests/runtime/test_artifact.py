"""Files that are whole or not there, and what can be said before any is written."""

import os

import pytest

from fewstep import ArtifactError
from fewstep.runtime.artifact import check_writable, read_json, write_whole


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
