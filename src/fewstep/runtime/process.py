"""The processes of ``torchrun``: which one this is, of how many, on which device, and what they do together."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewstep.runtime.errors import FewstepError, first_line

__all__ = [
    "computing_device",
    "default_device",
    "from_first",
    "gather",
    "lost_another",
    "need_folder",
    "process",
    "share",
    "sum_over_processes",
    "usable_device",
    "wait_for_all",
]

LONGEST_WAIT = timedelta(days=7)  # of a process for the others, which may have more to do; one that has ended is noticed at once

T = TypeVar("T")


def default_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU. Each process of a machine has a GPU of its own, as long as there are enough."""
    if torch.cuda.is_available():
        return torch.device("cuda" if process()[1] == 1 else f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(device: torch.device | str) -> torch.device:
    """Return a device that this PyTorch has; ``meta``, on which tensors have shapes alone, is one.

    Raises:
        FewstepError: there is no such device, or this PyTorch cannot use it.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise FewstepError(f"device {device!r} cannot be used here: {first_line(error)}") from None
    return found


def computing_device(device: torch.device | str) -> torch.device:
    """Return a `usable_device` that holds numbers, as a model needs that is moved there.

    Raises:
        FewstepError: it is none, or ``meta``, where a model would lose its weights.
    """
    found = usable_device(device)
    if found.type == "meta":
        raise FewstepError(f"device {device!r} cannot be used here: nothing has a value there; name one that computes, as cpu")
    return found


def process() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as ``torchrun`` sets them; 0 and 1 without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def need_folder(verb: str) -> None:
    """Refuse several processes for work without a folder.

    Raises:
        FewstepError: there are several.
    """
    if process()[1] > 1:
        raise FewstepError(f"several processes can only {verb} together with a folder to meet in: name one")


def share(rows: range) -> range:
    """Return this process's share of some noises: every ``world``-th, so that the shares differ by one at most.

    Raises:
        FewstepError: there are more processes than noises.
    """
    rank, world = process()
    if len(rows) < world:
        raise FewstepError(f"{world} processes cannot share {len(rows)} noises: use fewer processes")
    return rows[rank::world]


def wait_for_all() -> None:
    """Wait until every process is here."""
    if process()[1] > 1:
        torch.distributed.barrier(_group())


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum of every process's ``value``, a tensor on the CPU (all-reduce); the same to the bit in all of them."""
    if process()[1] > 1:
        value = value.clone()
        torch.distributed.all_reduce(value, group=_group())
    return value


def gather(value: T) -> list[T]:
    """Return every process's ``value`` in the order of their ranks, in all of them (all-gather)."""
    if process()[1] == 1:
        return [value]
    found: list[Any] = [None] * process()[1]
    torch.distributed.all_gather_object(found, value, group=_group())
    return found


def from_first(value: T) -> T:
    """Return the first process's ``value`` in all of them (broadcast).

    A decision that follows from files is made once: on a network's disk another machine may see them later.
    """
    found: list[Any] = [value]
    if process()[1] > 1:
        torch.distributed.broadcast_object_list(found, src=0, group=_group())
    return found[0]


def lost_another(error: RuntimeError) -> bool:
    """Return whether an error says that another process of this run has ended, as gloo and NCCL tell it."""
    known = isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))
    return process()[1] > 1 and known


@cache
def _group() -> torch.distributed.ProcessGroup:
    """Return the group that all processes are in; they meet at the first call. See docs/decisions/0040."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        atexit.register(_part)
    made: Any = torch.distributed.new_group(timeout=LONGEST_WAIT, backend="gloo")
    return made


def _part() -> None:
    """Leave the process group at exit: a process that exits while threads of the group still run is aborted now and then."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
