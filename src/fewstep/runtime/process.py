"""The processes of ``torchrun``: which one this is, of how many, on which device, and what they do together."""

from __future__ import annotations

import atexit
import os

import torch
from torch import Tensor

from fewstep.runtime.errors import FewstepError, first_line

__all__ = ["default_device", "lost_another", "process", "sum_over_processes", "usable_device", "wait_for_all"]


def default_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(device: torch.device | str) -> torch.device:
    """Return a device that this process can compute on.

    Raises:
        FewstepError: there is no such device, or this PyTorch cannot use it.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise FewstepError(f"device {device!r} cannot be used here: {first_line(error)}") from None
    return found


def process() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as ``torchrun`` sets them; 0 and 1 without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def wait_for_all() -> None:
    """Wait until every process is here."""
    if process()[1] > 1:
        _meet()
        torch.distributed.barrier()


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum of every process's ``value``, a tensor on the CPU (all-reduce); the same to the bit in all of them."""
    if process()[1] > 1:
        _meet()
        value = value.clone()
        torch.distributed.all_reduce(value)
    return value


def lost_another(error: RuntimeError) -> bool:
    """Return whether an error says that another process of this run has ended, as gloo and NCCL tell it."""
    known = isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))
    return process()[1] > 1 and known


def _meet() -> None:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        atexit.register(_part)


def _part() -> None:
    """Leave the process group at exit: a process that exits while threads of the group still run is aborted now and then."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
