"""Which process this is, and what several of them do together."""

import os
import signal
import time

import pytest
import torch
from tests.processes import as_rank, together

from fewstep import FewstepError
from fewstep.runtime.process import (
    computing_device,
    default_device,
    from_first,
    gather,
    lost_another,
    process,
    share,
    sum_over_processes,
    wait_for_all,
)


def test_one_process_unless_torchrun_says_otherwise(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert process() == (0, 1)
    wait_for_all()
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert process() == (2, 4)


@pytest.mark.parametrize(("cuda", "mps", "device"), [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_accelerator_if_there_is_one(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert default_device() == torch.device(device)


@pytest.mark.parametrize(("count", "local", "device"), [(4, "1", "cuda:1"), (2, "5", "cuda:1"), (1, "3", "cuda:0")])
def test_every_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch, count, local, device):
    """By its local rank; one after the other again where there are fewer, and the only one where a process sees no other."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    as_rank(monkeypatch, 6, 8)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert default_device() == torch.device(device)


@pytest.mark.parametrize("device", ["meta", torch.device("meta"), "nowhere", "cuda:-2", 1.5])
def test_a_device_that_computes_nothing_is_refused(device):
    with pytest.raises(FewstepError, match="cannot be used here"):
        computing_device(device)


def test_shares_are_disjoint_and_cover_all(monkeypatch):
    rows, shares = range(100, 111), []
    for rank in range(4):
        as_rank(monkeypatch, rank, 4)
        shares.append(share(rows))
        with pytest.raises(FewstepError, match="4 processes cannot share 3 noises: use fewer processes"):
            share(range(3))
    assert sorted(row for part in shares for row in part) == list(rows) and [len(part) for part in shares] == [3, 3, 3, 2]


def test_processes_tell_each_other():
    def work():
        rank, _ = process()
        wait_for_all()
        total = sum_over_processes(torch.tensor([1.0, rank]))
        return total.tolist(), gather({"rank": rank}), from_first(f"I am {rank}")

    assert together(3, work) == [([3.0, 3.0], [{"rank": 0}, {"rank": 1}, {"rank": 2}], "I am 0")] * 3
    assert (gather(5), from_first(5)) == ([5], 5) and not torch.distributed.is_initialized()


MEETINGS = {
    "barrier": wait_for_all,
    "sum": lambda: sum_over_processes(torch.ones(2)),
    "gather": lambda: gather(1),
    "broadcast": lambda: from_first(1),
}


@pytest.mark.parametrize("ended", [0, 1])
@pytest.mark.parametrize("meeting", MEETINGS)
@pytest.mark.every(4)
def test_a_process_that_has_ended_is_noticed_by_those_that_wait(meeting, ended):
    """Within seconds, though they would wait for days for one that is at work."""

    def work():
        wait_for_all()
        if process()[0] == ended:
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        try:
            MEETINGS[meeting]()
            wait_for_all()  # a broadcast may not wait for anybody
        except RuntimeError as error:
            return lost_another(error), time.monotonic() - begin
        return False, 0.0

    for rank, found in enumerate(together(3, work)):
        if rank != ended:
            lost, seconds = found
            assert lost and seconds < 30
