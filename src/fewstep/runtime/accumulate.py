"""One pass over many data: sums that add up over batches and processes, stored on disk so that a killed pass continues."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.runtime.artifact import Count, check_file, check_writable, digest_of, held_to, tensor_of, write_whole
from fewstep.runtime.errors import ArtifactError, FewstepError
from fewstep.runtime.process import process, wait_for_all

__all__ = ["Store", "Total", "accumulate", "seed_batches"]

SAVE_EVERY = 20.0  # seconds


class Total(Protocol):
    """Something to accumulate: float64 sums or means over ``count`` data."""

    count: int

    def merge(self, other: Any, /) -> None:  # noqa: ANN401 - of this class
        """Merge the data of another total."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return everything except `count`, for serialisation."""
        ...

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], count: int) -> Any:  # noqa: ANN401 - this class
        """Rebuild a total from its `tensors`."""
        ...


T = TypeVar("T", bound=Total)


def seed_batches(seed: int, num: int, batch: int) -> list[range]:
    """Split the seeds ``seed .. seed + num - 1`` into batches, in order."""
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
    """Merge the totals of all batches, and return the result with the note of the pass.

    With a ``store`` a killed pass continues and ends with the same numbers, and the processes of ``torchrun`` share the batches
    (all but the first get None).

    Args:
        batches: the seeds of each batch.
        fresh: makes the total of one batch, from its seeds, the number of data merged before, and the note.
        empty: makes a total of no data.
        store: where the totals are stored; None to have them in memory alone.
        note: makes a note before the first batch, which is stored with the totals and read back by a pass that continues.
        verb: the name of the pass in errors, as in "several processes can only calibrate together".

    Raises:
        FewstepError: several processes and no store to meet in.
        ArtifactError: see `Store`.
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


@dataclass(frozen=True)
class _Header:
    """The fields of ``about`` in a file's header: the pass, the data and batches in it, the note, and the checksum of its tensors."""

    identity: str
    count: Count
    batches: Count
    note: str
    sha256: str


class Store(Generic[T]):
    """The totals of each process on disk: whole at any time, and only ever continued by the pass that began them.

    Args:
        folder: where the files are written.
        name: the beginning of their names.
        identity: everything that the total depends on; a file with another identity is refused.
        empty: a total of no data, whose class, and shapes of tensors, those of the files are.
        work: the name of the total in errors, as in "belongs to another Gram matrix".
        again: the advice after a damaged file, as in "remove it and run the command again".

    Raises:
        ArtifactError: the folder cannot be written; later, a file is damaged, of another identity or of another number of processes.
    """

    def __init__(self, folder: Path, name: str, identity: str, empty: T, *, work: str, again: str) -> None:
        check_writable(folder)
        self.folder, self.name, self.empty, self.work, self.again = folder, name, empty, work, again
        self.identity = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def _path(self, rank: int) -> Path:
        return self.folder / f"{self.name}-{rank}-of-{process()[1]}.safetensors"

    def save(self, total: T, batches: int, note: str) -> None:
        """Write the total of this process's first ``batches`` batches."""
        tensors = total.tensors()
        about = json.dumps(asdict(_Header(self.identity, total.count, batches, note, digest_of(tensors))))
        write_whole(self._path(process()[0]), lambda temporary: save_file(tensors, temporary, {"about": about}))

    def read(self, rank: int) -> tuple[T, int, str]:
        """Return the total of a process, the number of its batches in it, and the note."""
        path = self._path(rank)
        try:
            check_file(path)
            with safe_open(path, "pt") as file:
                text, tensors = file.metadata()["about"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, KeyError, TypeError, ArtifactError) as error:
            raise self._damaged(path, error) from error
        about = held_to(text, _Header, path)
        if about.identity != self.identity:
            raise ArtifactError(
                f"{path} belongs to another {self.work} (model, data, guidance, levels, batch or seed): remove it, or use another folder"
            )
        try:
            for name, like in self.empty.tensors().items():
                tensor_of(tensors, name, like.shape, finite=False, dtype=like.dtype)
        except ArtifactError as error:
            raise self._damaged(path, error) from error
        if digest_of(tensors) != about.sha256:
            raise self._damaged(path, "its checksum is another")
        return self.empty.restored(tensors, about.count), about.batches, about.note

    def _damaged(self, path: Path, why: object) -> ArtifactError:
        return ArtifactError(f"{path} is damaged ({why}): remove it and {self.again} again")

    def resume(self, most: int) -> tuple[T, int, str] | None:
        """Return the total, number of batches and note that this process has stored; None if it has none."""
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
