"""Batches of a teacher's trajectories: what is drawn, what is held out, and what is solved while training."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.learn.teacher import problems
from tests.learn.teacher.problems import calls
from tests.learn.teacher.test_trajectories import GRID, SHAPE, made, toy
from tests.processes import as_rank

from fewstep import ArtifactError, Model, TimeGrid, VPLinear
from fewstep.learn.teacher import batches as module
from fewstep.learn.teacher.batches import TeacherData
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig
from fewstep.models.problem import Problem
from fewstep.runtime.job import Job

CONFIG = TrajectoryConfig(num=20, nfe=16, solver="ddim", batch=8)
PART = TimeGrid(GRID.t[[0, 2, 4]])  # times that the stored ones have between others


@contextmanager
def taught(folder: Path, model: Model | None = None, grid: TimeGrid = GRID, guidance: float = 1.0, **options) -> Iterator[TeacherData]:
    with Job.open("distill", folder, on_progress=options.pop("on_progress", None)) as job:
        yield TeacherData(Problem(model or toy(classes=2), guidance), grid, CONFIG, 6, job, **options)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_batches_are_of_the_first_and_the_last_are_held_out(tmp_path: Path) -> None:
    given = made(tmp_path / "given", toy(classes=2))
    with taught(tmp_path / "work", given=given, grid=PART) as data:
        seen, draws = set(), generator()
        states = given.states(slice(None))[:, [0, 2, 4]]
        for _ in range(12):
            batch = data.draw(8, draws)
            assert batch.x.shape == (8, 3, *SHAPE) and batch.x.dtype == torch.float32
            where = [int((states - x).abs().flatten(1).amax(1).argmin()) for x in batch.x]
            assert torch.equal(batch.x, states[where]) and torch.equal(batch.cond, given.labels(where))
            seen |= set(where)
        assert seen == set(range(14))
        held_out = list(data.batches_held_out(4))
        assert [len(batch.x) for batch in held_out] == [4, 2]
        assert torch.equal(torch.cat([batch.x for batch in held_out]), states[14:])
        assert torch.equal(torch.cat([batch.cond for batch in held_out]), given.labels(slice(14, None)))
        again = data.draw(8, generator())
        assert torch.equal(again.x, data.draw(8, generator()).x)


def test_they_are_made_in_the_jobs_folder_once(tmp_path: Path) -> None:
    shown = []
    with taught(tmp_path, model := toy(classes=2), on_progress=lambda *now: shown.append(now), guidance=2.0) as data:
        once = data.draw(8, generator()).x
    assert calls(model) > 16 and shown[-1] == (0, "20 of 20 teacher trajectories")
    assert Trajectories.load(tmp_path / "trajectories").guidance == 2.0  # the problem's, not the configuration's
    with taught(tmp_path, model := toy(classes=2), guidance=2.0) as data:
        assert calls(model) == 0 and torch.equal(data.draw(8, generator()).x, once)


@pytest.mark.parametrize("classes", [2, None])
def test_some_may_be_solved_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int | None) -> None:
    """By the same solver, from seeds that nothing else has, mixed in among the stored ones."""
    given, places = made(tmp_path / "given", model := toy(classes=classes)), set()
    whole, labels = given.states(slice(None)), given.labels(slice(None))
    with taught(tmp_path / "work", model, given=given, fresh=0.25) as data:
        draws = generator()
        for _ in range(8):
            batch = data.draw(8, draws)
            fresh = [place for place, x in enumerate(batch.x) if not bool((whole == x).flatten(1).all(1).any())]
            assert len(fresh) == 2 and bool(torch.isfinite(batch.x).all()) and (batch.cond is None) == (classes is None)
            places |= set(fresh)
    assert len(places) > 4
    monkeypatch.setattr(module, "FIRST_FRESH", 8)  # seeds 8 to 15, which are stored
    with taught(tmp_path / "work", model, given=given, fresh=1.0) as data:
        batch, seen = data.draw(16, generator()), set()
        for k, x in enumerate(batch.x):
            where = int((whole - x).abs().flatten(1).amax(1).argmin())
            torch.testing.assert_close(x, whole[where], rtol=1e-5, atol=1e-5)
            assert labels is None or batch.cond[k] == labels[where]
            seen.add(where)
    assert seen <= set(range(8, 16)) and len(seen) > 4


def test_what_cannot_be_learned_from_is_refused(tmp_path: Path) -> None:
    given, few = made(tmp_path / "given", toy(classes=2)), made(tmp_path / "few", toy(classes=2), num=16)
    vp = problems.toy(problems.mixture(SHAPE, VPLinear()), classes=2)
    other = TimeGrid(torch.tensor([20.0, 3.0, 0.05], dtype=torch.float64))
    for says, options in [
        ("has 16 trajectories, not 14 and 6 held out: ask for fewer", {"given": few}),
        ("were not stored at t = 3: name a grid of theirs, or make them again", {"given": given, "grid": other}),
        ("of guidance 1.0, but they are used with guidance 2.0", {"given": given, "guidance": 2.0}),
        ("of schedule .*, but they are used with", {"given": given, "model": vp}),
    ]:
        with pytest.raises(ArtifactError, match=says), taught(tmp_path / "work", **options):
            pytest.fail("learned from others")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("fresh", [0.0, 0.25, 1.0])
def test_processes_share_what_one_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: float) -> None:
    with taught(tmp_path / "work", given=made(tmp_path / "given", toy(classes=2)), fresh=fresh) as data:
        whole, held_out = data.draw(11, generator()), torch.cat([batch.x for batch in data.batches_held_out(4)])
        for rank in range(3):
            as_rank(monkeypatch, rank, 3)
            part, theirs = data.draw(11, generator()), torch.cat([batch.x for batch in data.batches_held_out(4, shared=True)])
            torch.testing.assert_close(part.x, whole.x[rank::3], rtol=1e-6, atol=1e-6)
            assert torch.equal(part.cond, whole.cond[rank::3]) and torch.equal(theirs, held_out[rank::3])
