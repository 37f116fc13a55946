"""One pass over many data, in any pieces: what is stored, what is continued, and what is refused; see also ``test_calibrate``."""

from pathlib import Path

import pytest
import torch
from tests.processes import as_rank, together
from torch import Tensor

from fewstep import ArtifactError, FewstepError
from fewstep.runtime import accumulate as module
from fewstep.runtime.accumulate import Part, Store, accumulate, seed_batches


class Sum:
    """Of whole numbers, so that equal means equal."""

    def __init__(self, total: Tensor, count: int) -> None:
        self.total, self.count = total, count

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], count: int) -> "Sum":
        return cls(tensors["total"], count)

    def tensors(self) -> dict[str, Tensor]:
        return {"total": self.total}

    def merge(self, other: "Sum") -> None:
        self.total, self.count = self.total + other.total, self.count + other.count


BATCHES = seed_batches(10, 23, 5)


def store(folder: Path, identity: str = "mine", name: str = "sum") -> Store[Sum]:
    return Store(folder, name, identity, Sum(torch.zeros(2, dtype=torch.float64), 0), work="sum", again="add it up")


def summed(target: Store[Sum] | None, *, stop: int = -1, batches: list[range] = BATCHES, note: str = "noted") -> tuple[Sum | None, list]:
    """The total, and which batches were visited with what; ``stop`` interrupts at a batch."""
    visited = []

    def fresh(seeds: range, count: int, noted: str) -> Sum:
        if len(visited) == stop:
            raise KeyboardInterrupt
        visited.append((seeds, count, noted))
        return Sum(torch.tensor([len(seeds), sum(seeds)], dtype=torch.float64), len(seeds))

    try:
        found = accumulate(batches, fresh, lambda: Sum(torch.zeros(2, dtype=torch.float64), 0), target, note=lambda: note, verb="add")
    except KeyboardInterrupt:
        return None, visited
    return (None if found is None else found[0]), visited


def exact(total: Sum | None, seeds: range = range(10, 33)) -> bool:
    return total is not None and total.count == len(seeds) and total.total.tolist() == [len(seeds), sum(seeds)]


def test_batches_are_the_seeds_in_order() -> None:
    assert [len(batch) for batch in BATCHES] == [5, 5, 5, 5, 3]
    assert [seed for batch in BATCHES for seed in batch] == list(range(10, 33))


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_a_killed_pass_continues(tmp_path: Path, stop: int) -> None:
    assert summed(store(tmp_path), stop=stop)[0] is None
    assert [path.name for path in tmp_path.iterdir()] == ["sum-0-of-1.safetensors"] * bool(stop)
    total, visited = summed(store(tmp_path), note="another")
    assert exact(total) and [seeds for seeds, *_ in visited] == BATCHES[stop:]
    assert [count for _, count, _ in visited] == [5 * n for n in range(stop, 5)]
    assert {note for *_, note in visited} == {"noted" if stop else "another"}  # the note of the work that began it
    total, visited = summed(store(tmp_path))
    assert exact(total) and visited == []  # a finished one is only read


def test_without_a_store_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    total, visited = summed(None)
    assert exact(total) and len(visited) == 5 and list(tmp_path.iterdir()) == []


def test_a_kill_between_two_saves_loses_only_what_came_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the machine: without the save that an interrupt still makes."""
    monkeypatch.setattr(module, "SAVE_EVERY", -1.0)
    target, saves = store(tmp_path), []
    real = target.save

    def save(part: Part[Sum]) -> None:
        if len(saves) < 2:
            real(part)
        saves.append(len(part.places))

    monkeypatch.setattr(target, "save", save)
    summed(target, stop=4)
    assert saves == [1, 2, 3, 4, 4]
    total, visited = summed(store(tmp_path))
    assert exact(total) and [seeds for seeds, *_ in visited] == BATCHES[2:]


@pytest.mark.parametrize("world", [2, 7])  # there are five batches
@pytest.mark.every(2)
def test_processes_make_what_one_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    for found in (together(world, lambda: summed(store(tmp_path))), together(world, lambda: summed(store(tmp_path)))):
        assert all(exact(total) for total, _ in found)  # all of them get it
        every = [seeds for _, visited in found for seeds, *_ in visited]
        if found[0][1]:
            assert sorted(every, key=lambda seeds: seeds.start) == BATCHES and [seeds for seeds, *_ in found[1][1]] == BATCHES[1::world]
    assert every == []  # a finished one is only read
    as_rank(monkeypatch, 0, world)
    with pytest.raises(FewstepError, match="several processes can only add together with a folder to meet in: name one"):
        summed(None)


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2), (3, 2, 4), (2, 1, 2, 1)])
@pytest.mark.every(4)
def test_another_number_of_processes_makes_the_rest(tmp_path: Path, worlds: tuple[int, ...]) -> None:
    """Each run but the last is killed after some batches; what is done is not done again, whoever did it."""
    batches, stops = seed_batches(10, 203, 5), (5, 2, 1)
    done = list[range]()
    for number, world in enumerate(worlds):
        last = number == len(worlds) - 1
        work = lambda number=number, last=last: summed(store(tmp_path), batches=batches, stop=-1 if last else stops[number])  # noqa: E731
        found = together(world, work) if world > 1 else [work()]
        done += [seeds for _, visited in found for seeds, *_ in visited]
        assert last or all(total is None for total, _ in found)
    assert all(exact(total, range(10, 213)) for total, _ in found)
    assert sorted(done, key=lambda seeds: seeds.start) == batches
    total, visited = summed(store(tmp_path), batches=batches)
    assert exact(total, range(10, 213)) and visited == []
    assert exact(store(tmp_path).total(len(batches)), range(10, 213))


def test_a_file_with_the_batches_of_another_is_refused(tmp_path: Path) -> None:
    summed(store(tmp_path))
    (tmp_path / "sum-0-of-2.safetensors").write_bytes((tmp_path / "sum-0-of-1.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="holds 23 data already: ask for at least as many"):  # its batches would be 0, 2, ..., 8
        summed(store(tmp_path))
    with pytest.raises(ArtifactError, match=r"sum-0-of-2.safetensors is damaged \(another file holds some of its batches\)"):
        summed(store(tmp_path), batches=seed_batches(10, 50, 5))
    (tmp_path / "sum-0-of-2.safetensors").rename(tmp_path / "sum-2-of-2.safetensors")  # there is no such rank
    (tmp_path / "sum-all-of-us.safetensors").write_text("mine")
    assert exact(summed(store(tmp_path))[0])


def test_only_the_same_work_is_continued(tmp_path: Path) -> None:
    summed(store(tmp_path), stop=3)
    before = (tmp_path / "sum-0-of-1.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match=r"sum-0-of-1.safetensors belongs to another sum \(model, .*\): remove it, or use another"):
        summed(store(tmp_path, identity="yours"))
    with pytest.raises(ArtifactError, match="holds 15 data already: ask for at least as many"):
        summed(store(tmp_path), batches=BATCHES[:2])
    assert (tmp_path / "sum-0-of-1.safetensors").read_bytes() == before
    assert exact(summed(store(tmp_path, identity="yours", name="other"))[0])  # beside it
    assert exact(summed(store(tmp_path), batches=seed_batches(10, 40, 5))[0], range(10, 50))  # more were added


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    summed(store(tmp_path))
    path = tmp_path / "sum-0-of-1.safetensors"
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged in (whole[:-1], whole[:20], b"", whole.replace(b'"about"', b'"other"'), whole.replace(b"[2]", b"[1]"), flipped):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"sum-0-of-1.safetensors is damaged \(.*\): remove it and add it up again"):
            summed(store(tmp_path))
    for old, new, says in [
        (b'count\\"', b'cuont\\"', "count: field required"),
        (b": 23,", b": -2,", "count: input should be greater than or equal to 1"),
        (b": 23,", b": {},", "count: input should be a valid integer"),
    ]:
        damaged = whole.replace(old, new)
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=f"sum-0-of-1.safetensors is damaged.*{says}"):
            summed(store(tmp_path))
    path.unlink()
    assert exact(summed(store(tmp_path))[0])


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="cannot write .*: .*file is a file; choose a folder"):
        store(tmp_path / "file" / "below")
