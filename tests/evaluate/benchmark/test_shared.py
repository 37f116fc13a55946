"""A benchmark that several processes share: the rows of one, whatever their number, and times that say how they were taken."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluate.problems import LAW, tiny
from tests.problems import toy
from tests.processes import as_rank, together
from torch import Tensor

from fewstep import FewstepError, compare
from fewstep.evaluate.benchmark import bench as module
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.benchmark.run import benchmark
from fewstep.runtime.process import process

CLOCK = {"seconds", "solver_seconds", "peak_memory", "processes", "threads"}
FEW = BenchmarkConfig(("ddim", "unipc-2"), ("angle",), (3, 4, 5), num=10, batch=4)
MORE = BenchmarkConfig(("ddim", "heun", "unipc-2"), ("angle", "karras"), (3, 4, 5), num=10, batch=4)


def timeless(results: dict[str, Any]) -> dict[str, Any]:
    rows = [{key: value for key, value in row.items() if key not in CLOCK} for row in results["rows"]]
    return {**results, "rows": rows, "machine": {**results["machine"], "threads": None}}


def saved(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_processes_make_the_rows_of_one_to_the_bit(tmp_path: Path, world: int) -> None:
    model, one = tiny(tmp_path / "model"), tmp_path / "one"
    whole = benchmark(model, FEW, one).results
    first, *others = together(world, lambda: benchmark(model, FEW, tmp_path / "many").results)
    assert timeless(first) == timeless(whole) and others == [first] * (world - 1)
    assert saved(tmp_path / "many") == saved(one) and len(saved(one)) == 7
    assert {(row["processes"], row["threads"]) for row in first["rows"]} == {(world, 1)}
    assert {row["processes"] for row in whole["rows"]} == {1}


@pytest.mark.slow
def test_another_number_of_processes_makes_the_other_rows(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    first, _ = together(2, lambda: benchmark(model, FEW, tmp_path / "out").results)
    compared = benchmark(model, MORE, tmp_path / "out")
    again = compared.results
    assert again["rows"][:6] == first["rows"] and len(again["rows"]) == 14  # with their old times
    assert [row["processes"] for row in again["rows"]] == [2] * 6 + [1] * 8
    third = together(3, lambda: benchmark(model, MORE, tmp_path / "out").results)
    assert [one["rows"] for one in third] == [again["rows"]] * 3
    threads = torch.get_num_threads()
    alone = f"8 rows by 1 process alone, with {threads} thread{'s' * (threads > 1)}"
    said = f"times: {alone}; 6 rows by 1 of 2 processes at work, with 1 thread; do not compare one kind with another"
    assert said in str(compared)


@pytest.mark.slow
def test_a_sampler_that_fails_in_one_process_is_a_row(tmp_path: Path) -> None:
    def failing(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None) -> Tensor:
        raise ValueError("not today")

    samplers = ["ddim", failing, "unipc-2"]
    found = together(2, lambda: compare(toy(LAW), samplers, nfe=[3], grid="angle", num=4, out=tmp_path / "out").results)
    rows = {row["solver"]: row["failed"] for row in found[0]["rows"]}
    assert rows == {"ddim": None, "failing": "ValueError: not today", "unipc-2": None} and found[0] == found[1]


def test_machines_of_different_kinds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.machine_of
    monkeypatch.setattr(module, "machine_of", lambda device: {**real(device), "processor": f"kind {process()[0]}"})
    model = tiny(tmp_path / "model")
    for said in together(2, lambda: benchmark(model, FEW, tmp_path / "out")):
        assert "rows are timed, and processes of this run are on different machines: processor kind 0 and kind 1; use machines" in said


def test_without_a_folder_there_is_nowhere_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 1, 2)
    with pytest.raises(FewstepError, match="several processes can only compare together with a folder to meet in: name one"):
        compare(toy(LAW), "ddim", nfe=3, num=4)
