"""``torchrun`` and plain processes, for real: several make the result of one, a killed one ends the others, and another number goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.apps.test_cli import run
from tests.problems import tiny_folder
from tests.processes import free_port

from fewstep import Sampler

pytestmark = pytest.mark.slow
MINUTE = 60
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        words: its options, so small that it takes seconds.
        begun: whether a run in a folder is on its way.
        numbers: what a run has made there.
        tolerance: of these numbers: rounding, and what a search makes of it where the batches are others.
        world: processes to share it.
        victim: the one that is killed.
    """

    words: tuple[Any, ...]
    begun: Callable[[Path], bool]
    numbers: Callable[[Path], dict[str, Any]]
    tolerance: float
    world: int
    victim: int


def of_schedules(out: Path) -> dict[str, Any]:
    return {path.parent.name: Sampler.load(path.parent).grid.t for path in out.glob("unipc-2/nfe-*/sampler.json")}


def of_network(out: Path) -> dict[str, Any]:
    rounds = json.loads((out / "history.json").read_text())
    weights = load_file(next((out / "unet").glob("*.safetensors")))
    return weights | {str(one["number"]): torch.tensor([one["rmse"], one["bound"], *one["next_times"]]) for one in rounds}


def of_rows(out: Path) -> dict[str, Any]:
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {f"{row['solver']} {row['grid']} {row['nfe']}": torch.tensor([row["rmse"], row["error_p95"], *row["rmse_ci"]]) for row in rows}


def has_rows(out: Path) -> bool:
    table = out / "results.json"
    return table.exists() and len(json.loads(table.read_text())["rows"]) >= 4


VERBS = {
    "optimize": Verb(
        ("--nfe", "3,4", "--levels", 12, "-n", 16, "--noises", 32, "--held-out", 64, "--batch", 8, "--iterations", 3),
        lambda out: (out / "unipc-2" / "nfe-03" / "sampler.json").exists(),
        of_schedules,
        2e-3,
        4,
        2,
    ),
    "finetune": Verb(
        ("--nfe", 2, "--rounds", 1, "--steps", 250, "--batch", 8, "-n", 64, "--held-out", 16, "--teacher-nfe", 8, "--levels", 8),
        lambda out: (out / "work" / "round-1" / "checkpoint" / "loop.json").exists(),
        of_network,
        1e-4,
        2,
        0,
    ),
    "bench": Verb(
        ("--solver", "ddim,unipc-2,deis-3", "--grid", "angle,karras", "--nfe", "3,4,5", "-n", 128, "--batch", 32),
        has_rows,
        of_rows,
        1e-6,
        4,
        1,
    ),
}


def line(world: int, *words: object) -> list[str]:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world)
    return [sys.executable, *map(str, (*torchrun, "-m", "fewstep", *words))]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **more}


def workers(launcher: int) -> dict[int, int]:
    """The processes that a launcher has started, by rank."""
    found = dict[int, int]()
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        words = Path(f"/proc/{child}/environ").read_text().split("\0")
        found |= {int(word.removeprefix("RANK=")): int(child) for word in words if word.startswith("RANK=")}
    return found


def close(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "toy", 2, block_out_channels=(8,))


@pytest.fixture(scope="module", params=VERBS)
def verb(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(verb: str, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, verb, toy, *VERBS[verb].words, "--out", out) == 0
    return VERBS[verb].numbers(out)


SEVERAL = [pytest.param(*case, marks=() if case == ("bench", 2) else pytest.mark.release) for case in product(VERBS, (2, 4))]


@pytest.mark.parametrize(("verb", "world"), SEVERAL, indirect=["verb"])
def test_several_processes_make_the_result_of_one(verb: str, toy: Path, whole: dict[str, Any], tmp_path: Path, world: int) -> None:
    words = (verb, toy, *VERBS[verb].words, "--out", tmp_path / "out")
    done = subprocess.run(line(world, *words), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("next: ") == 1  # the first process alone says what was made
    close(VERBS[verb].numbers(tmp_path / "out"), whole, VERBS[verb].tolerance)


def test_a_killed_process_ends_the_others_and_one_goes_on(
    verb: str, toy: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, out = VERBS[verb], tmp_path / "out"
    words = (verb, toy, *kind.words, "--out", out)
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(line(kind.world, *words), env=environment(), stdout=log, stderr=log)
        begin = time.monotonic()
        while not kind.begun(out):
            assert launcher.poll() is None and time.monotonic() - begin < 240, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)
        others = workers(launcher.pid)
        os.kill(others.pop(kind.victim), signal.SIGKILL)
        assert launcher.wait(MINUTE) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in others.values())
    said = [text for text in (tmp_path / "log").read_text().splitlines() if text.startswith("fewstep: ")]
    assert said and all(text.endswith("run the same command to continue") for text in said)
    assert run(monkeypatch, *words) == 0
    close(kind.numbers(out), whole, kind.tolerance)


def test_without_a_launcher_too_the_others_end(toy: Path, tmp_path: Path) -> None:
    """Plain processes, as a cluster's own launcher starts them: nobody tells them that one is gone."""
    kind, port, out = VERBS["bench"], str(free_port()), tmp_path / "out"
    words = [sys.executable, "-m", "fewstep", "bench", *map(str, (toy, *kind.words)), "--out", str(out)]
    started = []
    for rank in range(3):
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        given = environment(**{key: str(value) for key, value in about.items()})
        started.append(subprocess.Popen(words, env=given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    begin = time.monotonic()
    while not has_rows(out):
        assert all(one.poll() is None for one in started) and time.monotonic() - begin < 240
        time.sleep(0.02)
    started[0].kill()
    for one in started[1:]:
        _, said = one.communicate(timeout=MINUTE)
        assert one.returncode == 1 and "another process of this run has ended (see above for why); run the same command to continue" in said
    started[0].communicate()


def test_the_recipe_for_a_cluster_runs_on_this_machine(toy: Path, tmp_path: Path) -> None:
    """As the guide has it, but for the cluster, the machines, and what is made."""
    pytest.importorskip("submitit")
    (recipe,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "many-machines.md").read_text(encoding="utf-8"), re.S)
    words = ", ".join(repr(str(word)) for word in ("bench", toy, "--solver", "ddim,unipc-2", "--grid", "angle", "--nfe", 3, "-n", 8))
    for old, new in {
        'folder="/shared/jobs"': f'folder={str(tmp_path / "jobs")!r}, cluster="local"',
        "nodes=2, tasks_per_node=4, gpus_per_node=4, timeout_min=600": "nodes=1, tasks_per_node=2, timeout_min=5",
        '"optimize", "digits-edm", "--nfe", "5,8"': words,
        "/shared/grids": str(tmp_path / "out"),
    }.items():
        assert recipe.count(old) == 1
        recipe = recipe.replace(old, new)
    (tmp_path / "recipe.py").write_text(recipe)
    done = subprocess.run([sys.executable, "recipe.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {row["processes"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]} == {2}
