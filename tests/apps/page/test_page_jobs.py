"""Jobs: they run in processes of their own, say how they go, stop as an interrupt does, continue, and outlive the page that began them."""

import errno
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep import FewstepError
from fewstep.apps.console import progress
from fewstep.apps.page import jobs as module
from fewstep.apps.page import shown
from fewstep.apps.page.jobs import Jobs, JobState
from fewstep.apps.page.workshop import Workshop
from fewstep.runtime.job import Job

LONGEST = 120.0  # seconds that a machine under load may take


def until(seen: Callable[[], bool]) -> None:
    end = time.monotonic() + LONGEST
    while not seen():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def finished(jobs: Jobs, name: str) -> JobState:
    until(lambda: jobs.state(name).state != "running")
    return jobs.state(name)


def working(folder: Path, parts: int = 3, *, forever: bool = True) -> Callable[[], None]:
    """A command that makes files one by one and then waits, in the place of `fewstep.apps.cli.main`."""

    def main() -> None:
        try:
            with Job.open("work", folder), progress("making parts", parts) as report:
                for part in range(parts):
                    report(part, f"part {part}")
                    (folder / f"part-{part}").write_text("whole")
                    while forever and part == 1 and not (folder / "go").exists():
                        time.sleep(0.01)
                report(parts)
        except KeyboardInterrupt:
            raise SystemExit(143) from None

    return main


@pytest.fixture
def begun(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> str:
    """A job that has made two parts of three, and waits."""
    import signal

    from fewstep.apps import cli

    folder = shop.jobs.new("fit")
    work = working(folder)

    def main() -> None:
        signal.signal(signal.SIGTERM, cli._terminate)
        work()

    monkeypatch.setattr("fewstep.apps.cli.main", main)
    name = shop.jobs.begin(folder, "fit", "digits-edm", "--nfe", 3)
    until(lambda: (folder / "part-1").exists())
    return name


@pytest.mark.slow
def test_a_job_is_a_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    jobs.prepare()
    name = jobs.begin(jobs.new("sample"), "sample", "digits-edm", "--nfe", 3, "-n", 2)
    assert name == "sample-1" and jobs.command(name).endswith(f"digits-edm --nfe 3 -n 2 --out {tmp_path / name}")
    state = finished(jobs, name)
    assert (state.state, state.done, state.total, state.why) == ("done", 2, 2, "")
    assert (jobs.folder(name) / "grid.png").exists()


def test_an_error_is_a_sentence(shop: Workshop) -> None:
    name = shop.jobs.begin(shop.jobs.new("fit"), "fit", "no-such-model", "--nfe", 3)
    state = finished(shop.jobs, name)
    assert state.state == "failed" and state.why.startswith("no model 'no-such-model'")
    assert "Traceback" not in shown.progress(name, state, "")


def test_a_crash_names_the_log(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.apps.cli.main", lambda: 1 / 0)
    state = finished(shop.jobs, shop.jobs.begin(shop.jobs.new("fit"), "fit"))
    assert state.state == "failed" and "ZeroDivisionError" in state.why and "log.txt" in state.why


def test_a_full_disk_is_no_stop(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(place: Path, state: JobState) -> None:
        if state.title != "starting" or state.state != "running":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(place, state)

    write = module._write
    monkeypatch.setattr(module, "_write", full)
    monkeypatch.setattr("fewstep.apps.cli.main", lambda: None)
    name = shop.jobs.begin(shop.jobs.new("fit"), "fit")
    shop.jobs._starts[name].join()
    shop.jobs._processes[name].join()
    state = shop.jobs.state(name)
    assert state.state == "failed" and "the disk is not full" in state.why
    monkeypatch.setattr(module, "_write", write)
    shop.jobs.resume(name)
    assert finished(shop.jobs, name).state == "done"


def test_stop_and_continue(shop: Workshop, begun: str) -> None:
    state = shop.jobs.state(begun)
    assert (state.state, state.title, state.done, state.total, state.note) == ("running", "making parts", 1, 3, "part 1")
    with pytest.raises(FewstepError, match="is running: stop it first"):
        shop.jobs.resume(begun)
    shop.jobs.stop(begun)
    assert shop.jobs.state(begun).state == "stopped" and not (shop.jobs.folder(begun) / "part-2").exists()
    with pytest.raises(FewstepError, match="is not running"):
        shop.jobs.stop(begun)
    (shop.jobs.folder(begun) / "go").touch()
    shop.jobs.resume(begun)
    assert finished(shop.jobs, begun).state == "done" and (shop.jobs.folder(begun) / "part-2").exists()


def test_another_page_sees_it_run_and_leaves_it_alone(shop: Workshop, begun: str) -> None:
    other = Jobs(shop.out, "fork")
    assert other.names("fit") == [begun] and other.state(begun).state == "running"
    with pytest.raises(FewstepError, match="another fewstep runs it"):
        other.stop(begun)
    shop.jobs._processes[begun].kill()
    shop.jobs._processes[begun].join()
    assert other.state(begun).state == "stopped"


def test_two_tabs_have_two_jobs_and_no_third(shop: Workshop, begun: str) -> None:
    (shop.out / "fit-2").mkdir()  # someone typed a command
    second = shop.jobs.begin(shop.jobs.new("fit"), "fit")
    assert second == "fit-3"
    with pytest.raises(FewstepError, match=f"no more than {module.AT_ONCE} run at a time"):
        shop.jobs.begin(shop.jobs.new("fit"), "fit")
    assert shop.jobs.names("fit") == [second, begun] and not (shop.out / ".page" / "fit-4").exists()
    shop.jobs.stop(second)
    assert shop.jobs.state(begun).state == "running"


@pytest.mark.parametrize("name", ["../../etc", "fit-1/../..", "fit-99", "", "fit-01", ".page"])
def test_a_name_from_outside_is_no_job(shop: Workshop, name: str) -> None:
    for act in (shop.jobs.state, shop.jobs.folder, shop.jobs.words, shop.jobs.resume, shop.jobs.stop):
        with pytest.raises(FewstepError, match="no job|not running"):
            act(name)
