"""A `Job`: one piece of long work in a folder, which nothing else may work in meanwhile.

Every learner and every benchmark opens one. It holds the folder and its lock, the device, this process's share and the progress.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import torch
from filelock import FileLock, Timeout

from fewstep.runtime.artifact import TEMPORARY, check_no_model, check_writable, named_path
from fewstep.runtime.errors import ArtifactError, FewstepError
from fewstep.runtime.process import computing_device, need_folder, process, wait_for_all

__all__ = ["Job", "Progress", "folder_of", "in_use"]

LOCK = ".lock"
DEPTH = 3  # folders below that of a job where it writes

Progress = Callable[[int, str], None]  # units done, a note


def folder_of(out: str | Path) -> Path:
    """Return the folder of a job.

    Raises:
        ArtifactError: something that names none.
    """
    if not isinstance(out, str | Path):
        raise ArtifactError(f"out is a folder, got {out!r}")
    return named_path(out)


def _silent(done: int, note: str) -> None:
    """Show nothing."""


@dataclass(frozen=True, eq=False)
class Job:
    """Long work in a folder, under a lock that ends with it, however it ends.

    Attributes:
        work: its name in errors, as ``fit``.
        folder: the folder of its files.
        device: the device that it computes on.
        on_progress: called with the units done and a note.
        command: the command line that began it, for cards; empty from Python.
        in_memory: whether the folder is a temporary one.
        rank, world: this process and how many there are.
    """

    work: str
    folder: Path
    device: torch.device
    on_progress: Progress
    command: str
    in_memory: bool
    rank: int
    world: int

    @classmethod
    @contextmanager
    def open(
        cls,
        work: str,
        out: str | Path | None = None,
        *,
        device: torch.device | str | None = None,
        on_progress: Progress | None = None,
        command: str = "",
        alone: bool = False,
        makes_model: bool = False,
    ) -> Generator[Job, None, None]:
        """Open a folder for one job, or a temporary folder without ``out``, which is removed at the end.

        The processes of ``torchrun`` share one job. Temporary files that killed runs left in the folder are removed first; a folder that
        the job made and left empty is removed last.

        Args:
            work: what errors call it.
            out: the folder; it need not exist.
            device: where to compute; by default the CPU.
            on_progress: called with the units done and a note.
            command: the command line, for cards.
            alone: whether the work cannot be shared by several processes.
            makes_model: whether the work makes a model of the folder, and sees for itself that it overwrites none.

        Raises:
            ArtifactError: another job works in the folder, it holds a model, or it cannot be written.
            FewstepError: a device that cannot be used, no function for the progress; several processes without a folder to meet in, or for
                work that one has to do alone.
        """
        rank, world = process()
        if alone and world > 1:
            raise FewstepError(f"{work} runs in one process: start it without torchrun")
        if on_progress is not None and not callable(on_progress):
            raise FewstepError(f"on_progress is a function of the units done and a note, got {on_progress!r}")
        facts = (computing_device(device or "cpu"), on_progress or _silent, command)
        if out is None:
            need_folder(work)
            with TemporaryDirectory(prefix="fewstep-") as folder:
                yield cls(work, Path(folder), *facts, in_memory=True, rank=rank, world=world)
            return
        folder = folder_of(out)
        check_writable(folder)
        if not makes_model:
            check_no_model(folder)
        with _locked(folder, rank):
            wait_for_all()  # the first process has the lock
            yield cls(work, folder, *facts, in_memory=False, rank=rank, world=world)

    @property
    def files(self) -> set[str]:
        """The names in its folder, without the lock's."""
        return _files(self.folder)

    @contextmanager
    def below(self, name: str, on_progress: Progress | None = None) -> Generator[Job, None, None]:
        """Open a folder below this job's for a part of the work that may also be a job by itself."""
        quiet = on_progress or _silent
        with Job.open(self.work, self.folder / name, device=self.device, on_progress=quiet, command=self.command) as part:
            yield replace(part, in_memory=self.in_memory)


@contextmanager
def _locked(folder: Path, rank: int) -> Generator[None, None, None]:
    """Hold the lock of a folder in the first process; the operating system ends it with the process, even a killed one."""
    if rank:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # the deepest first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise ArtifactError(f"another fewstep job is working in {folder}: wait until it ends, or use another folder") from None
    except NotImplementedError as error:
        (folder / LOCK).unlink(missing_ok=True)
        _remove_empty(made)
        raise ArtifactError(f"the file system of {folder} has no locks: choose a folder on another one") from error
    except OSError as error:
        _remove_empty(made)
        raise ArtifactError(f"cannot write {folder}: {error.strerror}; choose a folder that you may write to") from error
    try:
        _remove_leftovers(folder)
        yield
    finally:
        if made and not _files(folder):  # nothing came of it
            rmtree(folder, ignore_errors=True)
            lock.release()
            _remove_empty(made[1:])
        else:
            with suppress(OSError):  # on Windows, where an open file stays
                (folder / LOCK).unlink()  # while it is held: filelock does not take a lock on a file that is gone
            lock.release()


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of killed runs in a folder and below it, but for folders where another job works."""
    for place, below, names in os.walk(folder):
        here = Path(place)
        if here != folder and LOCK in names and in_use(here):
            below.clear()
            continue
        for name in [name for name in below if name.startswith(TEMPORARY)]:
            rmtree(here / name, ignore_errors=True)
            below.remove(name)
        if len(here.relative_to(folder).parts) == DEPTH:
            below.clear()
        for name in names:
            if name.startswith(TEMPORARY):
                with suppress(OSError):
                    (here / name).unlink()


def in_use(folder: Path) -> bool:
    """Return whether another job holds the lock of a folder."""
    try:
        FileLock(folder / LOCK, timeout=0).acquire().lock.release()
    except (Timeout, OSError):
        return True
    return False


def _files(folder: Path) -> set[str]:
    """Return the names in a folder but for the lock; none if someone has removed it."""
    return {path.name for path in folder.iterdir()} - {LOCK} if folder.exists() else set()


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the deepest first, up to one that someone else has put something into."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
