"""One pass over many data: sums that add up over batches and processes, stored on disk so that a killed pass continues."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.runtime.artifact import Count, Whole, check_file, check_writable, digest_of, held_to, tensor_of, write_whole
from fewstep.runtime.errors import ArtifactError
from fewstep.runtime.process import from_first, gather, need_folder, process

__all__ = ["Part", "Store", "Total", "accumulate", "seed_batches"]

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


@dataclass(frozen=True)  # Python 3.10 has no generic NamedTuple
class Part(Generic[T]):
    """The total of some batches, those at ``places`` in their list, and the note of the pass."""

    total: T
    places: list[int]
    note: str


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
) -> tuple[T, str]:
    """Merge the totals of all batches, and return the result with the note of the pass.

    The processes of ``torchrun`` share the batches, and all of them get the result. With a ``store`` a killed pass continues. In as many
    processes it ends with the same numbers; in more or fewer, they differ by the rounding of sums.

    Args:
        batches: the seeds of each batch.
        fresh: makes the total of one batch, from its seeds, the number of data that this process has merged before, and the note.
        empty: makes a total of no data.
        store: where the totals are stored; None to have them in memory alone.
        note: makes a note before the first batch, which is stored with the totals and read back by a pass that continues.
        verb: the name of the pass in errors, as in "several processes can only calibrate together".

    Raises:
        FewstepError: several processes and no store to meet in.
        ArtifactError: see `Store`.
    """
    rank, world = process()
    if store is None:
        need_folder(verb)
    parts = {} if store is None else from_first(store.parts(len(batches)) if rank == 0 else {})
    begun = parts.pop((world, rank), None) or Part(empty(), [], next((one.note for one in parts.values()), "") or note())
    total, done, noted = begun.total, begun.places, begun.note
    before, mine = len(done), _share(len(batches), {(world, rank): done} | {key: one.places for key, one in parts.items()})
    saved = time.monotonic()
    try:
        for place in mine:
            more = fresh(batches[place], total.count, noted)
            more.merge(total)
            total, done = more, [*done, place]  # at once: an interrupt finds the one or the other
            if store is not None and time.monotonic() - saved > SAVE_EVERY:
                store.save(Part(total, done, noted))
                saved = time.monotonic()
    finally:
        if store is not None and len(done) > before:
            store.save(Part(total, done, noted))
    made = gather(Part(total, done, noted))  # not by files, which another machine may see later
    return _merged(parts | {(world, other): one for other, one in enumerate(made)})


Stored = Mapping[tuple[int, int], Part[T]]  # by the number of processes that there were, and the rank of the one that made it


def _share(count: int, done: Mapping[tuple[int, int], Sequence[int]]) -> list[int]:
    """Return the places of this process's batches among those that are not done."""
    (rank, world), every = process(), {place for places in done.values() for place in places}
    left = [place for place in range(count) if place not in every]
    if all(number == world for number, _ in done):
        return [place for place in left if place % world == rank]  # those that it had when it was killed
    return left[rank::world]


def _merged(parts: Stored[T]) -> tuple[T, str]:
    """Merge the totals of all processes, in an order of their own."""
    first, *others = [part for _, part in sorted(parts.items()) if part.places] or list(parts.values())
    for other in others:
        first.total.merge(other.total)
    return first.total, first.note


@dataclass(frozen=True)
class _Header:
    """The fields of ``about`` in a file's header: the pass, the data and batches in it, the note, and the checksum of its tensors.

    ``places`` are those of its batches; None for the first of every so many, as the ranks share them.
    """

    identity: str
    count: Count
    batches: Count
    note: str
    sha256: str
    places: list[Whole] | None = None


class Store(Generic[T]):
    """The totals of each process on disk: whole at any time, and only ever continued by the pass that began them.

    A file belongs to a rank among a number of processes, and says which batches are in it; another number of processes leaves it as it is
    and makes the others.

    Args:
        folder: where the files are written.
        name: the beginning of their names.
        identity: everything that the total depends on; a file with another identity is refused.
        empty: a total of no data, whose class, and shapes of tensors, those of the files are.
        work: the name of the total in errors, as in "belongs to another Gram matrix".
        again: the advice after a damaged file, as in "remove it and run the command again".

    Raises:
        ArtifactError: the folder cannot be written; later, a file is damaged or of another identity, or holds more than is asked for.
    """

    def __init__(self, folder: Path, name: str, identity: str, empty: T, *, work: str, again: str) -> None:
        check_writable(folder)
        self.folder, self.name, self.empty, self.work, self.again = folder, name, empty, work, again
        self.identity = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def save(self, part: Part[T]) -> None:
        """Write what this process has made."""
        (rank, world), tensors = process(), part.total.tensors()
        places = None if part.places == _regular(rank, world, len(part.places)) else part.places
        about = _Header(self.identity, part.total.count, len(part.places), part.note, digest_of(tensors), places)
        text = json.dumps(asdict(about))
        path = self.folder / f"{self.name}-{rank}-of-{world}.safetensors"
        write_whole(path, lambda temporary: save_file(tensors, temporary, {"about": text}))

    def total(self, most: int) -> T:
        """Return the total of all files, of ``most`` batches or fewer.

        Raises:
            ArtifactError: there is none.
        """
        parts = self.parts(most)
        if not parts:
            raise ArtifactError(f"{self.folder} holds no {self.work}: there is no {self.name}-0-of-1.safetensors nor of more processes")
        return _merged(parts)[0]

    def parts(self, most: int) -> dict[tuple[int, int], Part[T]]:
        """Return what all processes have stored, by their number and rank; ``most`` is the number of batches that there are."""
        found, seen = dict[tuple[int, int], Part[T]](), set[int]()
        for path in sorted(self.folder.glob(f"{self.name}-*-of-*.safetensors")):
            named = re.fullmatch(r"(\d{1,9})-of-(\d{1,9})", path.stem.removeprefix(f"{self.name}-"))
            rank, world = (1, 0) if named is None else map(int, named.groups())
            if rank >= world:
                continue  # somebody else's
            part = self._read(path, rank, world, most)
            if not seen.isdisjoint(part.places):
                raise self._damaged(path, "another file holds some of its batches")
            seen.update(part.places)
            found[world, rank] = part
        return found

    def _read(self, path: Path, rank: int, world: int, most: int) -> Part[T]:
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
        if about.places is not None and len(set(about.places)) != about.batches:
            raise self._damaged(path, f"it names {len(set(about.places))} of its {about.batches} batches")
        if (rank + (about.batches - 1) * world if about.places is None else max(about.places)) >= most:
            raise ArtifactError(f"{path} holds {about.count} data already: ask for at least as many, or use another folder")
        places = _regular(rank, world, about.batches) if about.places is None else about.places
        return Part(self.empty.restored(tensors, about.count), places, about.note)

    def _damaged(self, path: Path, why: object) -> ArtifactError:
        return ArtifactError(f"{path} is damaged ({why}): remove it and {self.again} again")


def _regular(rank: int, world: int, count: int) -> list[int]:
    """Return the places of the first ``count`` batches of a rank."""
    return list(range(rank, rank + count * world, world))
