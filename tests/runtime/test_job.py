"""A job: one at a time in a folder, a lock that ends with the process, and nothing left behind where nothing was made."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from fewstep import ArtifactError, FewstepError
from fewstep.apps import cli
from fewstep.runtime import job as module
from fewstep.runtime.artifact import MODEL_FILES, write_whole
from fewstep.runtime.job import Job


def in_use(folder: Path) -> AbstractContextManager[object]:
    text = f"another fewstep job is working in {folder}: wait until it ends, or use another folder"
    return pytest.raises(ArtifactError, match=re.escape(text))


def refused(folder: Path) -> None:
    with in_use(folder), Job.open("fit", folder):
        pytest.fail("opened twice")


def free(folder: Path) -> None:
    with Job.open("fit", folder):
        pass


# -- one job in a folder ---------------------------------------------------------------------------------------------


def test_a_second_job_in_a_folder_is_refused(tmp_path: Path) -> None:
    with Job.open("fit", tmp_path / "out") as job:
        (job.folder / "shard").write_text("mine")
        refused(tmp_path / "out")
        with Job.open("optimize", tmp_path / "beside"):
            refused(tmp_path / "beside" / ".." / "out")  # the same by another name
        refused(tmp_path / "out")  # the refused ones have not freed it
        assert (job.folder / "shard").read_text() == "mine"
    free(tmp_path / "out")
    assert (tmp_path / "out" / "shard").read_text() == "mine"


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_job_that_fails_frees_its_folder(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), Job.open("fit", tmp_path / "out") as job:
        (job.folder / "half").write_text("mine")
        raise error
    assert (tmp_path / "out" / "half").exists()
    free(tmp_path / "out")


def elsewhere(folder: Path, opened: Callable[[], None]) -> int:
    """Open a job in another process that waits to be killed; return its number once ``opened`` was called there."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            with Job.open("fit", folder):
                opened()
                os.write(writer, b"1")
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read(1) == b"1", "the other process could not open the folder"
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the other process only opens a folder
@pytest.mark.parametrize("made", [True, False])
def test_the_lock_ends_with_a_killed_process(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "out"
    child = elsewhere(folder, lambda: (folder / "shard").write_text("theirs") if made else None)
    try:
        refused(folder)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with Job.open("fit", folder) as job:  # not even a moment later
        assert (job.folder / "shard").exists() is made
        refused(folder)


# -- what it leaves behind -------------------------------------------------------------------------------------------


def test_an_empty_folder_disappears_with_the_parents_that_were_made_for_it(tmp_path: Path) -> None:
    free(tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), Job.open("fit", tmp_path / "a" / "b") as job:
        assert job.folder.is_dir()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with Job.open("fit", tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "mine").write_text("another's")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "mine"]


def test_a_folder_with_files_or_of_another_stays(tmp_path: Path) -> None:
    with Job.open("fit", tmp_path / "a" / "b") as job:
        (job.folder / "made").write_text("mine")
    assert (tmp_path / "a" / "b" / "made").exists()
    for name in ("below", "inside/deeper"):
        with Job.open("fit", tmp_path / "folders") as job:
            (job.folder / name).mkdir(parents=True)
        assert (tmp_path / "folders" / name).is_dir()
    (tmp_path / "theirs").mkdir()
    free(tmp_path / "theirs")
    assert (tmp_path / "theirs").is_dir()


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Job.open("fit", "a/b"):
        refused(Path("a/b"))
        refused(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    with Job.open("fit", "."):
        refused(tmp_path)


def test_a_folder_that_was_removed_meanwhile_is_no_error(tmp_path: Path) -> None:
    with Job.open("fit", tmp_path / "a" / "b"):
        shutil.rmtree(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# -- in memory, and parts --------------------------------------------------------------------------------------------


def test_a_job_without_a_folder_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Job.open("fit") as one, Job.open("fit") as two:
        assert one.in_memory and one.folder.is_dir() and one.folder != two.folder
        (one.folder / "file").write_text("mine")
        with one.below("trajectories") as part:
            assert part.in_memory and part.folder == one.folder / "trajectories"
    assert not one.folder.exists() and not two.folder.exists() and list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), Job.open("fit") as job:
        raise KeyboardInterrupt
    assert not job.folder.exists()


def test_a_job_says_where_it_computes_and_how_far_it_is(tmp_path: Path) -> None:
    shown = []
    with Job.open("fit", tmp_path, device="cpu:0", on_progress=lambda *now: shown.append(now), command="fewstep fit") as job:
        job.on_progress(3, "of 4")
        assert (job.work, job.folder, job.device, job.command, job.in_memory) == (
            "fit",
            tmp_path,
            torch.device("cpu:0"),
            "fewstep fit",
            False,
        )
        assert (job.rank, job.world) == (0, 1)
    with Job.open("fit", str(tmp_path)) as job:
        job.on_progress(1, "nobody listens")
        assert job.device == torch.device("cpu") and job.command == "" and job.folder == tmp_path
    assert shown == [(3, "of 4")]


def test_a_part_is_a_job_of_its_own(tmp_path: Path) -> None:
    shown, mine = [], []
    with Job.open("fit", tmp_path / "out", device="cpu:0", on_progress=lambda *now: shown.append(now), command="fewstep fit") as job:
        with job.below("a") as part:
            part.on_progress(1, "is not the whole's progress")
            assert (part.work, part.folder, part.device, part.command) == ("fit", job.folder / "a", job.device, "fewstep fit")
            assert not part.in_memory
            refused(part.folder)
        assert not part.folder.exists()
        with job.below("b", lambda *now: mine.append(now)) as part:
            part.on_progress(2, "shown")
            (part.folder / "file").write_text("mine")
        free(part.folder)
        refused(job.folder)
    assert mine == [(2, "shown")] and shown == [] and (tmp_path / "out" / "b" / "file").exists()
    with Job.open("make trajectories", part.folder), Job.open("fit", tmp_path / "out") as job, in_use(part.folder), job.below("b"):
        pytest.fail("another job works there")


# -- several processes -----------------------------------------------------------------------------------------------


def test_the_processes_of_torchrun_share_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first holds the lock and removes what is empty; here they open it one after the other."""
    met = []
    monkeypatch.setattr(module, "wait_for_all", lambda: met.append(os.environ["RANK"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with Job.open("fit", tmp_path / "a" / "out") as first:
        monkeypatch.setenv("RANK", "1")
        with Job.open("fit", first.folder) as second:
            assert ((first.rank, first.world), (second.rank, second.world)) == ((0, 2), (1, 2)) and met == ["0", "1"]
        assert first.folder.is_dir()
        monkeypatch.setenv("RANK", "0")
        refused(first.folder)
        assert met == ["0", "1"]  # the refused one has met nobody
    assert list(tmp_path.iterdir()) == []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with (
            pytest.raises(FewstepError, match="several processes can only fit together with a folder to meet in: name one"),
            Job.open("fit"),
        ):
            pytest.fail("nowhere to meet")
        alone = Job.open("convert", tmp_path / "a", alone=True)
        with pytest.raises(FewstepError, match="convert runs in one process: start it without torchrun"), alone:
            pytest.fail("not alone")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with Job.open("convert", tmp_path / "a", alone=True):
        refused(tmp_path / "a")


SCRIPT = """
import sys
import time
from pathlib import Path
from fewstep.runtime.job import Job
from fewstep.runtime.process import wait_for_all

with Job.open("fit", Path(sys.argv[1])) as job:
    (job.folder / f"{job.rank} of {job.world}").write_text("")
    with job.below("part") as part:
        (part.folder / f"{part.rank} of {part.world}").write_text("")
    wait_for_all()
"""


@pytest.mark.slow
def test_two_real_processes_share_a_job(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "script.py"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with Job.open("fit", tmp_path / "out"):
        assert (
            "another fewstep job is working in"
            in subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment).stderr
        )
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in (tmp_path / "out", tmp_path / "out" / "part"):
        assert {path.name for path in folder.glob("* of *")} == {"0 of 2", "1 of 2"}
    free(tmp_path / "out")


# -- folders that cannot be used -------------------------------------------------------------------------------------


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactError, match=f"cannot write {folder}: .*file is a file; choose a folder"), Job.open("fit", folder):
            pytest.fail("opened a file")
    (tmp_path / "odd" / ".lock").mkdir(parents=True)
    with (
        pytest.raises(ArtifactError, match="cannot write .*odd: .*; choose a folder that you may write to"),
        Job.open("fit", tmp_path / "odd"),
    ):
        pytest.fail("no lock there")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)  # a superuser may write anywhere
        with pytest.raises(ArtifactError, match="may not be written to; choose a folder"), Job.open("fit", tmp_path / "a"):
            pytest.fail("not ours")

    def acquire(self: FileLock) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(FileLock, "acquire", acquire)  # what only trying tells
    with (
        pytest.raises(ArtifactError, match="cannot write .*: Read-only file system; choose a folder"),
        Job.open("fit", tmp_path / "a" / "b"),
    ):
        pytest.fail("not ours")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(self: FileLock) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    refusal = pytest.raises(ArtifactError, match="the file system of .* has no locks: choose a folder on another")
    with refusal, Job.open("fit", tmp_path / "a"):
        pytest.fail("nothing would keep a second job out")
    assert list(tmp_path.iterdir()) == []


# -- what killed runs left -------------------------------------------------------------------------------------------


def test_no_lock_stays_after_a_job(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Job.open("fit", tmp_path / "out") as job:
        assert (job.folder / ".lock").exists()
        refused(job.folder)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed there")
def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job opens the lock's file, another ends and removes it, and the first must not hold what nobody else can see."""
    with Job.open("fit", tmp_path):
        late = os.open(tmp_path / ".lock", os.O_RDWR)
    real, opened = os.open, []

    def open_late(path: object, *options: int, **more: int) -> int:
        if str(path).endswith(".lock") and not opened:
            opened.append(path)
            return late
        return real(path, *options, **more)

    monkeypatch.setattr(os, "open", open_late)
    lock = FileLock(tmp_path / ".lock", timeout=0)
    try:
        lock.acquire()
    except module.Timeout:
        assert opened and not lock.is_locked
    else:
        assert (tmp_path / ".lock").exists()  # it tried again, and holds the file that others see
        refused(tmp_path)
        lock.release()


def test_temporary_files_of_killed_runs_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    left = [out / ".fewstep-abc.npz", out / "part" / ".fewstep-x.json", out / "a" / "b" / "c" / ".fewstep-y"]
    kept = [
        out / "samples.npz",
        out / ".gitkeep",
        out / "busy" / ".fewstep-z",
        out / "a" / "b" / "c" / "d" / ".fewstep-deep",
        tmp_path / ".fewstep-w",
    ]
    for path in (*left, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    with Job.open("fit", out / "busy") as busy:
        (busy.folder / ".fewstep-z").write_text("being written")
        with Job.open("fit", out):
            assert not any(path.exists() for path in left)
        assert all(path.exists() for path in kept)


def test_temporary_folders_of_killed_runs_are_removed(tmp_path: Path) -> None:
    for folder in (tmp_path / ".fewstep-a" / "unet", tmp_path / "part" / ".fewstep-b"):
        folder.mkdir(parents=True)
        (folder / "half").write_text("")
    (tmp_path / "part" / "whole").write_text("")
    free(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["part", "part/whole"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent")
def test_a_terminated_run_cleans_up_as_an_interrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def half(temporary: Path) -> None:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal came to nothing")

    def verb() -> None:
        with Job.open("fit", tmp_path / "a" / "out") as job:
            write_whole(job.folder / "file", half)

    monkeypatch.setattr(cli, "app", verb)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 143 and capsys.readouterr().err == "fewstep: terminated; run the same command to continue\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent")
def test_a_terminated_run_is_said_to_be_one_whoever_raised_the_interrupt_anew(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def verb() -> None:
        try:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                raise KeyboardInterrupt from None
        except KeyboardInterrupt:
            sys.exit(130)

    monkeypatch.setattr(cli, "app", verb)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 143 and capsys.readouterr().err == "fewstep: terminated; run the same command to continue\n"


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_models_folder_is_no_place_for_other_work(tmp_path: Path, name: str) -> None:
    """Its card would be overwritten; a folder below it is right."""
    (tmp_path / name).write_text("weights")
    with pytest.raises(ArtifactError, match="already holds a model, whose card would be lost: choose another folder, or one below it"):
        free(tmp_path)
    free(tmp_path / "fitted")
    with Job.open("distill", tmp_path, makes_model=True):
        pass
