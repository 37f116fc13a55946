"""Several processes of one test: real ones, that meet as those of ``torchrun`` do."""

import os
import pickle
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

from fewstep.runtime.process import process

T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def together(world: int, work: Callable[[], T]) -> list[T]:
    """What ``work`` returns in each of so many forks of this process, in the order of their ranks.

    An exception in one of them ends it, and comes back as what it said; None of one that was killed.
    """
    port, pipes, children = str(free_port()), [os.pipe() for _ in range(world)], []
    for rank in range(world):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads
            child = os.fork()
        if not child:
            _be(rank, world, port, work, pipes[rank][1])
        children.append(child)
    for _, end in pipes:
        os.close(end)
    found = []
    for (end, _), child in zip(pipes, children, strict=True):
        with os.fdopen(end, "rb") as pipe:
            data = pipe.read()
        os.waitpid(child, 0)
        found.append(pickle.loads(data) if data else None)
    return found


def _be(rank: int, world: int, port: str, work: Callable[[], Any], end: int) -> None:
    """Be one of the processes, and never return."""
    answer: Any = None
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        torch.set_num_threads(1)  # the threads of the parent are not here
        answer = work()
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        answer = f"{type(error).__name__}: {error}"
    finally:
        with os.fdopen(end, "wb") as pipe:
            pipe.write(pickle.dumps(answer))
        os._exit(0)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    """Be one of several processes for what only asks which one this is."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert process() == (rank, world)
