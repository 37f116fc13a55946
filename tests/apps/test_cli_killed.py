"""Every verb that works for long, killed in the middle of a write: the same command ends it, as if nothing had been."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest
from safetensors.torch import load_file
from tests.apps.conftest import run
from tests.apps.test_cli_distill import at, in_a_fork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("short_reference"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked"),
]

VERBS: dict[str, tuple[int, tuple[object, ...]]] = {  # after how many files
    "sample": (2, ("--nfe", 2, "-n", 8, "--batch", 2, "--npz")),
    "bench": (3, ("--solver", "ddim,unipc-2", "--grid", "angle", "--nfe", "2,3", "-n", 4)),
    "calibrate": (2, ("-n", 8, "--batch", 4, "--levels", 4)),
    "optimize": (5, ("--nfe", 2, "-n", 8, "--levels", 4, "--noises", 8, "--held-out", 8)),
    "fit": (6, ("--nfe", "1,2", "-n", 8, "--held-out", 8, "--noises", 8, "--levels", 4)),
    "trajectories": (3, ("-n", 8, "--batch", 2, "--slots", 2, "--nfe", 4)),
    "finetune": (6, ("--nfe", 2, "--rounds", 2, "--steps", 2, "-n", 8, "--held-out", 4, "--batch", 4, "--levels", 4, "--teacher-nfe", 4)),
    "distill": (5, ("--slots", 2, "--steps", 4, "-n", 8, "--held-out", 4, "--batch", 4, "--teacher-nfe", 4)),
    "train": (1, ("--steps", 3, "--batch", 2, "--channels", "16,16", "--checkpoint-every", 1)),
}
COSTS = ("seconds", "solver_seconds", "peak_memory")


def plain(value: object) -> object:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if key not in COSTS}
    return [plain(one) for one in value] if isinstance(value, list) else value


def contents(folder: Path) -> Iterator[tuple[str, object]]:
    """What the files hold that hold numbers."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            yield name, {key: str(value.tolist()) for key, value in load_file(path).items()}
        else:
            yield name, plain(json.loads(path.read_text())) if path.suffix == ".json" else None


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_that_was_killed_in_the_middle_of_a_write_is_made_whole(verb: str, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    (count, words), out = VERBS[verb], tmp_path / "out"
    words = (verb, *(() if verb == "train" else (tiny,)), *words, "--out", out)
    assert run(monkeypatch, *words) == 0
    whole = dict(contents(out))
    rmtree(out)
    assert in_a_fork(lambda patch: patch.setattr(Path, "replace", at(count, Path.replace)), *words) == -signal.SIGKILL
    assert list(out.rglob(".fewstep-*"))
    assert run(monkeypatch, *words) == 0
    cut = dict(contents(out))
    assert cut.keys() == whole.keys() and [name for name in cut if cut[name] != whole[name]] == []
    assert not list(out.rglob(".*"))
