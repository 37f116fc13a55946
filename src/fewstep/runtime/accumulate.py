"""One pass over many data: sums that add up over batches and processes, kept on disk so that a killed pass continues."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.runtime.artifact import check_writable, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError
from fewstep.runtime.process import process, wait_for_all

__all__ = ["Store", "Total", "accumulate", "seed_batches"]

SAVE_EVERY = 20.0  # seconds


class Total(Protocol):
    """What is accumulated: float64 sums or means over ``count`` data."""

    count: int

    def merge(self, other: Any, /) -> None:  # noqa: ANN401 - of this class
        """Take in another's data."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the count."""
        ...

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], count: int) -> Any:  # noqa: ANN401 - this class
        """The inverse of `tensors`."""
        ...


T = TypeVar("T", bound=Total)


def seed_batches(seed: int, num: int, batch: int) -> list[range]:
    """The seeds ``seed .. seed + num - 1``, batch by batch."""
    seeds = range(seed, seed + num)
    return [seeds[start : start + batch] for start in range(0, num, batch)]


def accumulate(
    batches: Sequence[range],
    fresh: Callable[[range, int, str], T],
    empty: Callable[[], T],
    store: Store[T] | None,
    *,
    note: Callable[[], str] = str,
    verb: str = "work",
) -> tuple[T, str] | None:
    """The total of ``fresh(seeds, data so far, note)`` over all batches, and the note, which was made before the first of them.

    With a ``store`` a killed pass continues and ends with the same numbers, and the processes of ``torchrun`` share the batches
    (all but the first get None).

    Raises:
        FewstepError: several processes and no store to meet in.
        ArtifactError: as `Store`.
    """
    rank, world = process()
    if world > 1 and store is None:
        raise FewstepError(f"several processes can only {verb} together with a folder to meet in: name one")
    mine = batches[rank::world]
    total, done, noted = (None if store is None else store.resume(len(mine))) or (empty(), 0, "")
    before = done
    noted = noted or note()
    saved = time.monotonic()
    try:
        for number, seeds in enumerate(mine[done:], done + 1):
            more = fresh(seeds, total.count, noted)
            more.merge(total)
            total, done = more, number  # at once: an interrupt finds the one or the other
            if store is not None and time.monotonic() - saved > SAVE_EVERY:
                store.save(total, done, noted)
                saved = time.monotonic()
    finally:
        if store is not None and done > before:
            store.save(total, done, noted)
    wait_for_all()
    if rank:
        return None
    for other in range(1, min(world, len(batches))):  # any more processes had nothing to do
        assert store is not None  # several processes have a folder
        total.merge(store.read(other)[0])
    return total, noted


class Store(Generic[T]):
    """The totals of each process on disk: whole at any time, and only ever continued by the work that began them.

    Args:
        name: of the files.
        identity: what the total depends on; a file with another is refused.
        kind: the class of the total.
        work, again: what it is called in errors, and what to do once more if a file is damaged.
    """

    def __init__(self, folder: Path, name: str, identity: str, kind: type[T], *, work: str, again: str) -> None:
        check_writable(folder)
        self.folder, self.name, self.kind, self.work, self.again = folder, name, kind, work, again
        self.identity = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def _path(self, rank: int) -> Path:
        return self.folder / f"{self.name}-{rank}-of-{process()[1]}.safetensors"

    def save(self, total: T, batches: int, note: str) -> None:
        """Keep the total of ``batches`` batches of this process."""
        about = {"identity": self.identity, "count": str(total.count), "batches": str(batches), "note": note}
        write_whole(self._path(process()[0]), lambda temporary: save_file(total.tensors(), temporary, about))

    def read(self, rank: int) -> tuple[T, int, str]:
        """The total of a process, the number of its batches in it, and the note."""
        path = self._path(rank)
        try:
            with safe_open(path, "pt") as file:
                about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            total: T = self.kind.restored(tensors, int(about["count"]))
            identity, batches, note = about["identity"], int(about["batches"]), about["note"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged ({error}): remove it and {self.again} again") from error
        if identity != self.identity:
            raise ArtifactError(
                f"{path} belongs to another {self.work} (model, data, guidance, levels, batch or seed): remove it, or use another folder"
            )
        return total, batches, note

    def resume(self, most: int) -> tuple[T, int, str] | None:
        """What this process had done, if anything."""
        path = self._path(process()[0])
        files = self.folder.glob(f"{self.name}-*-of-*.safetensors")
        others = [other for other in files if other.name.split("-of-")[1] != path.name.split("-of-")[1]]
        if others:
            raise ArtifactError(f"{others[0]} was made by another number of processes: use as many again, or remove it")
        if not path.exists():
            return None
        found = self.read(process()[0])
        if found[1] > most:
            raise ArtifactError(f"{path} holds {found[0].count} data already: ask for at least as many, or use another folder")
        return found
