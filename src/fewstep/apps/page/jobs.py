"""Long work of the page: commands of fewstep, each in a process and a folder of its own, which go on while nobody looks.

A job is a command line. What it makes lies in ``OUT/fit-1``, as if it had been typed; its words and its progress in ``OUT/.page/fit-1``.
So a job that was stopped, or killed with the page, continues where the same command continues: after the last whole part of its work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from threading import Lock, Thread
from typing import Any

from fewstep.apps.console import watched
from fewstep.runtime.artifact import Whole, held_to, read_file, write_whole
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.job import in_use

__all__ = ["JobState", "Jobs"]

PAGE, JOB, STATE, LOG = ".page", "job.json", "state.json", "log.txt"
NAME = re.compile(r"[a-z]+-[1-9][0-9]{0,5}")
AT_ONCE = 2  # jobs that run at a time
EVERY = 0.2  # seconds between two notes of progress
SETTLE = 5.0  # seconds within which a process that was asked to end cleans up
PRELOADED = ["fewstep.apps.cli", "diffusers.models.unets.unet_2d"]  # what any job imports; what is not installed is passed over
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


@dataclass(frozen=True)
class JobState:
    """How a job goes.

    Attributes:
        state: ``running``, ``done``, ``stopped`` or ``failed``.
        title: what it does.
        done, total: units of its work.
        note: which one it is at.
        why: of one that failed, the error in words.
        seconds: that it has run, since it was last begun.
    """

    state: str = "running"
    title: str = ""
    done: Whole = 0
    total: Whole = 0
    note: str = ""
    why: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class _Command:
    """The fields of ``job.json``."""

    words: list[str]


class Jobs:
    """The jobs below one folder.

    Args:
        out: the folder of the page.
        method: how their processes are started.
    """

    def __init__(self, out: Path, method: str = METHOD) -> None:
        self.out, self._method = out, method
        self._context: Any = multiprocessing.get_context(method)
        self._processes: dict[str, Any] = {}
        self._starts: dict[str, Thread] = {}  # a first job waits until the library is imported, and its caller does not
        self._lock = Lock()

    def prepare(self) -> None:
        """Import the library once in the process that jobs are forked from, so that the first one does not wait for it."""
        if self._method == "forkserver":
            from multiprocessing.forkserver import ensure_running

            self._context.set_forkserver_preload(PRELOADED)
            ensure_running()

    def names(self, verb: str) -> list[str]:
        """Return the jobs of a verb, the last one first."""
        found = [path.name for path in (self.out / PAGE).glob(f"{verb}-*") if NAME.fullmatch(path.name) and (path / JOB).is_file()]
        return sorted(found, key=lambda name: -int(name.rpartition("-")[2]))

    def folder(self, name: str) -> Path:
        """Return where a job writes.

        Raises:
            FewstepError: there is no such job.
        """
        self._place(name)
        return self.out / name

    def words(self, name: str) -> list[str]:
        """Return the command line of a job, without ``fewstep``."""
        place = self._place(name)
        return held_to(read_file(place / JOB), _Command, place / JOB).words

    def command(self, name: str) -> str:
        """Return the command line of a job, as it is typed."""
        return shlex.join(["fewstep", *self.words(name)])

    def new(self, verb: str) -> Path:
        """Make the folder of a new job, as ``OUT/fit-1``, which `begin` fills; there may be files of the page in it."""
        number = 1 + max((int(name.rpartition("-")[2]) for name in self.names(verb)), default=0)
        while True:
            folder = self.out / f"{verb}-{number}"
            try:
                (self.out / PAGE / folder.name).mkdir(parents=True)
            except FileExistsError:  # another tab was quicker
                number += 1
                continue
            if not folder.exists():  # one that was typed
                return folder
            number += 1

    def begin(self, folder: Path, *words: object) -> str:
        """Run ``fewstep WORDS --out FOLDER`` in the background, and return the name of the job.

        Args:
            folder: from `new`.
            words: the verb and its options.

        Raises:
            FewstepError: as many jobs run already as may; nothing is left of this one.
        """
        name, place = folder.name, self._place(folder.name, begun=False)
        command = _Command([*map(str, words), "--out", str(folder)])
        try:
            write_whole(place / JOB, json.dumps(asdict(command)).encode())
            self.resume(name)
        except (FewstepError, OSError):
            rmtree(place)
            raise
        return name

    def resume(self, name: str) -> None:
        """Run the command of a job again, which continues what is there.

        Raises:
            FewstepError: it is running, or as many jobs run already as may.
        """
        place, words = self._place(name), self.words(name)
        with self._lock:
            if self.state(name).state == "running" and (place / STATE).exists():
                raise FewstepError(f"{name} is running: stop it first")
            busy = [other for other in {*self._starts, *self._processes} if self._is_at_work(other)]
            if len(busy) >= AT_ONCE:
                raise FewstepError(f"{' and '.join(busy)} are running, and no more than {AT_ONCE} run at a time: stop one, or wait")
            _write(place, JobState(title="starting"))
            self._starts[name] = Thread(target=self._start, args=(name, str(place.resolve()), words, str(Path.cwd())), daemon=True)
            self._starts[name].start()

    def _start(self, name: str, *args: Any) -> None:  # noqa: ANN401 - of `_run`
        process = self._context.Process(target=_run, args=args, daemon=True, name=name)
        process.start()
        self._processes[name] = process

    def _is_at_work(self, name: str) -> bool:
        start, process = self._starts.get(name), self._processes.get(name)
        return (start is not None and start.is_alive()) or (process is not None and process.is_alive())

    def stop(self, name: str) -> None:
        """End a job as an interrupt does: what is half made is removed, and what is whole stays.

        Raises:
            FewstepError: it is not running, or another page runs it.
        """
        if name in self._starts:
            self._starts[name].join()
        process = self._processes.get(name)
        if process is None or not process.is_alive():
            where = "another fewstep runs it, which has to stop it" if self.state(name).state == "running" else "it is not running"
            raise FewstepError(f"{name}: {where}")
        process.terminate()
        process.join(SETTLE)

    def state(self, name: str) -> JobState:
        """Return how a job goes. One that ended without a word, as a killed one, is stopped."""
        place = self._place(name)
        known = held_to(read_file(place / STATE), JobState, place / STATE) if (place / STATE).exists() else JobState()
        if known.state != "running" or self._is_at_work(name) or in_use_now(self.out / name):
            return known
        known = held_to(read_file(place / STATE), JobState, place / STATE) if (place / STATE).exists() else known  # its last word
        if known.state != "running":
            return known
        process = self._processes.get(name)
        mute = process is not None and (process.exitcode or 0) > 0  # a signal is below 0
        how, why = (
            ("failed", f"it could not write how it ended: see that the disk is not full, and {place / LOG}") if mute else ("stopped", "")
        )
        return JobState(how, known.title, known.done, known.total, known.note, why, known.seconds)

    def close(self) -> None:
        """End all jobs, as `stop` does."""
        for start in self._starts.values():
            start.join(SETTLE)
        for process in self._processes.values():
            if process.is_alive():
                process.terminate()
        for process in self._processes.values():
            process.join(SETTLE)

    def _place(self, name: str, begun: bool = True) -> Path:
        """Return the folder of the page's own files about a job."""
        place = self.out / PAGE / str(name)
        if not NAME.fullmatch(str(name)) or not (place / JOB if begun else place).exists():
            raise FewstepError(f"there is no job {str(name)[:40]!r} in {self.out}: choose one of the list")
        return place


def in_use_now(folder: Path) -> bool:
    """Return whether a job works in a folder, which need not exist."""
    return (folder / ".lock").exists() and in_use(folder)


def _write(place: Path, state: JobState) -> None:
    write_whole(place / STATE, json.dumps(asdict(state)).encode())


def _run(place: str, words: Sequence[str], here: str) -> None:
    """Run a command line in this process, and write how it goes."""
    from fewstep.apps.cli import main

    os.chdir(here)
    folder, begin, last = Path(place), time.monotonic(), 0.0
    state = JobState(title="starting")
    log = (folder / LOG).open("w", encoding="utf-8", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    sys.argv = ["fewstep", *words]

    def watch(title: str, done: int, total: int, note: str) -> None:
        nonlocal state, last
        now = time.monotonic()
        changed = (title, done) != (state.title, state.done)
        state = JobState("running", title, done, total, note, "", now - begin)
        if changed or now - last > EVERY:
            last = now
            _write(folder, state)

    code: Any = 1
    try:
        with watched(watch):
            main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    log.flush()
    how = {0: "done", 130: "stopped", 143: "stopped"}.get(code, "failed")
    why = _reason(folder / LOG, code) if how == "failed" else ""
    done = state.total if how == "done" else state.done
    _write(folder, JobState(how, state.title, done, state.total, state.note, why, time.monotonic() - begin))


def _reason(log: Path, code: object) -> str:
    """Return the error that a command printed last, in one line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("fewstep: ") for line in lines if line.startswith("fewstep: ")]
    if code == 2 and (said or lines):
        return said[-1] if said else lines[-1]
    return f"the program failed: {lines[-1] if lines else code}; {log} has all of it"
