"""Which process this is, of how many, and on which device."""

from __future__ import annotations

import os

import torch

__all__ = ["default_device", "process", "wait_for_all"]


def default_device() -> torch.device:
    """The accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def process() -> tuple[int, int]:
    """This process and how many there are, as ``torchrun`` sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def wait_for_all() -> None:
    """Until every process is here."""
    if process()[1] > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
