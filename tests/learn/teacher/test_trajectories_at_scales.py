"""Trajectories at guidance scales of their own: drawn by the seed, solved as alone, stored without them, and told apart from others."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.problems import LAW, toy

from fewstep import (
    ArtifactError,
    FewstepError,
    Model,
    ModelError,
    ParallelConfig,
    Trajectories,
    TrajectoryConfig,
    generate_trajectories,
    make_grid,
)
from fewstep.learn.teacher.batches import TeacherData
from fewstep.learn.teacher.trajectories import teacher_grid
from fewstep.models.problem import Problem
from fewstep.runtime.job import Job
from fewstep.sampling.noise import seeded_scales

GRID = make_grid("angle", LAW, 3)
SCALES = (1.0, 4.0)
CONFIG = TrajectoryConfig(num=10, nfe=6, batch=4, seed=20, scales=SCALES)


def made(folder: Path, model: Model | None = None, config: TrajectoryConfig = CONFIG, **options: Any) -> Trajectories:
    found = generate_trajectories(model or toy(classes=2), GRID, folder, config=config, **options)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    return made(tmp_path_factory.mktemp("scales") / "them")


def test_scales_are_uniform_and_belong_to_the_seed() -> None:
    scales = seeded_scales(range(2000), (1.0, 5.0))
    assert scales.dtype == torch.float64 and torch.equal(seeded_scales([1999, 3], (1.0, 5.0)), scales[[1999, 3]])
    places = ((scales - 1) / 4).sort().values
    torch.testing.assert_close(places, (torch.arange(2000) + 0.5).double() / 2000, rtol=0, atol=0.04)  # 1.36 / sqrt(2000) is 0.03


def test_each_is_that_of_its_own_scale_alone(stored: Trajectories, tmp_path: Path) -> None:
    scales = stored.scale(range(10))
    assert torch.equal(scales, seeded_scales(range(20, 30), SCALES)) and stored.scales == SCALES
    for k in (0, 5, 9):
        alone = made(tmp_path / str(k), config=TrajectoryConfig(num=1, nfe=6, batch=1, seed=20 + k, guidance=float(scales[k])))
        torch.testing.assert_close(stored.states([k])[0], alone.states([0])[0], rtol=1e-5, atol=1e-5)
        assert alone.scale([0]) is None
    assert "guidance: 1 to 4, each its own" in (stored.folder / "README.md").read_text()
    assert stored.card["teacher_error"] > 0


def test_a_killed_run_continues_to_the_same_bits(stored: Trajectories, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, toy(classes=2, stop=9))
    assert torch.equal(made(tmp_path).states(range(10)), stored.states(range(10)))
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path, stored.folder)]
    assert manifests[0] == manifests[1] and manifests[0]["scales"] == [1.0, 4.0]


def test_those_of_one_scale_are_described_as_ever(tmp_path: Path) -> None:
    """So that folders of versions before are read; they go on where the steps are the same."""
    config = TrajectoryConfig(num=4, nfe=6, batch=4, guidance=2.0)
    meta = json.loads((made(tmp_path, config=config).folder / "manifest.json").read_text())
    problem = Problem(toy(classes=2), 2.0)
    about = {name: value for name, value in asdict(config).items() if name not in ("num", "scales")} | {
        "nfe": meta["nfe"],
        "guidance": 2.0,
        "times": GRID.t.tolist(),
        "shape": [2, 2],
        "classes": 2,
        "schedule": LAW.to_config(),
        "model": problem.fingerprint,
    }
    asked = about | {"fine": teacher_grid(LAW, GRID, 6).t.tolist()}
    assert meta["identity"] == hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16] and "scales" not in meta


@pytest.mark.parametrize("fresh", [0.0, 0.5, 1.0])
def test_batches_have_the_scale_of_each_row(stored: Trajectories, fresh: float) -> None:
    problem = Problem(toy(classes=2))
    with Job.open("distill") as job:
        data = TeacherData(problem, GRID, CONFIG, 4, job, given=stored, fresh=fresh)
    batch = data.draw(6, torch.Generator().manual_seed(0))
    assert batch.scale is not None and batch.scale.dtype == torch.float64 and len(batch.scale.unique()) > 2
    for row in range(6):  # each is a solution at its scale: its last step lands where one at that scale does
        x, cond = batch.x[row : row + 1], batch.cond[row : row + 1]
        again = data._solver.told(problem.teacher_at(float(batch.scale[row]))).run(x[:, 0], cond)
        torch.testing.assert_close(again, x[:, 1:], rtol=1e-4, atol=1e-4)
    held_out = list(data.batches_held_out(3))
    assert torch.equal(torch.cat([one.scale for one in held_out]), stored.scale(range(6, 10)))
    assert torch.equal(next(data.batches_trained_on(6)).scale, stored.scale(range(6)))


def test_mistakes_are_named(stored: Trajectories, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"one guidance, or scales of their own, not 2 and \(1.0, 4.0\): leave one out"):
        TrajectoryConfig(scales=SCALES, guidance=2.0)
    with pytest.raises(FewstepError, match="one guidance, or scales of their own"):
        made(tmp_path / "out", guidance=2.0)
    with pytest.raises(FewstepError, match="range from one of at least 0 to a larger one"):
        TrajectoryConfig(scales=(4.0, 1.0))
    with pytest.raises(ModelError, match="toy cannot be guided"):
        made(tmp_path / "out", toy())
    with pytest.raises(FewstepError, match="are solved step after step: leave parallel out"):
        made(tmp_path / "out", parallel=ParallelConfig())
    with pytest.raises(ArtifactError, match=r"has trajectories of guidance \[1.0, 4.0\], but they are used with guidance 1.0"):
        stored.check(Problem(toy(classes=2)))
    with pytest.raises(ArtifactError, match=r"guidance \[1.0, 4.0\], but they are used with guidance \[1.0, 3.0\]"):
        stored.check(Problem(toy(classes=2)), (1.0, 3.0))
    assert not (tmp_path / "out").exists()
