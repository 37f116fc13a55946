"""Trajectories as a data set, and what is refused."""

import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from tests.learn.teacher.test_trajectories import SHAPE, made, mixture, toy
from torch.utils.data import DataLoader

from fewstep import (
    ArtifactError,
    FewstepError,
    VPLinear,
    seeded_noise,
)
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig
from fewstep.models.problem import Problem


def test_the_noise_is_not_stored_but_made_from_the_seed(tmp_path) -> None:
    found = made(tmp_path, seed=5)
    with safe_open(tmp_path / "shard-00000.safetensors", "pt") as file:
        assert file.get_tensor("x").shape == (8, 4, *SHAPE)
    assert found.seeds([0, -1]).tolist() == [5, 24]
    torch.testing.assert_close(found.states([0, -1])[:, 0], seeded_noise([5, 24], SHAPE) * 20, rtol=0, atol=0)


def test_some_times_are_read_alone(tmp_path) -> None:
    found = made(tmp_path, toy(classes=2))
    for index in (slice(None), [19, 3, 3, 0, -12], slice(18, 2, -5), torch.arange(20) % 3 == 0):
        whole = found.states(index)
        for at in ([0], [4], [2, 0], [3, 3, 1], range(5), [-1, -5]):
            some = found.states(index, at)
            assert some.dtype == torch.float32 and torch.equal(some, whole[:, list(at)])
    for at in ([5], [-6]):
        with pytest.raises(IndexError):
            found.states([0], at)
    start = found.states([0, 8], [0])
    for path in tmp_path.glob("shard-*"):
        path.unlink()
    assert torch.equal(Trajectories.load(tmp_path).states([0, 8], [0]), start)  # the noise is stored nowhere
    with pytest.raises(ArtifactError, match="missing"):
        Trajectories.load(tmp_path).states([0], [0, 1])


def test_random_access(tmp_path) -> None:
    found = made(tmp_path)
    whole = found.states(slice(None))
    order = [19, 3, 3, -20, 8]
    for index in (order, torch.tensor(order)):
        assert torch.equal(found.states(index), whole[order]) and found.seeds(index).tolist() == [19, 3, 3, 0, 8]
    assert torch.equal(found.states(slice(18, 2, -5)), whole[[18, 13, 8, 3]])
    assert torch.equal(found.states(torch.arange(20) % 7 == 1), whole[[1, 8, 15]])
    assert found.states([]).shape == (0, 5, *SHAPE) and found.labels([0]) is None
    assert found[-1]["seed"] == 19 and set(found[0]) == {"x", "seed"} and torch.equal(found[-1]["x"], whole[19])
    for bad in (20, -21):
        with pytest.raises(IndexError):
            found[bad]
    assert len(list(found)) == len(found) == 20  # iteration ends


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_shuffles_and_collates(tmp_path, workers: int) -> None:
    fresh = pickle.dumps(found := made(tmp_path, toy(classes=2)))
    whole, seen = found.states(slice(None)), []
    assert len(pickle.dumps(found)) == len(fresh)  # what it has read stays here
    found = pickle.loads(fresh)
    loader = DataLoader(found, 6, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(0))
    for batch in loader:
        assert torch.equal(batch["x"], whole[batch["seed"]]) and torch.equal(batch["label"], batch["seed"] % 2)
        seen += batch["seed"].tolist()
    assert sorted(seen) == list(range(20)) != seen


@pytest.mark.parametrize(("dtype", "rounding"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_the_bytes_lose_half_a_unit(tmp_path, dtype: str, rounding: float) -> None:
    whole, half = made(tmp_path / "whole"), made(tmp_path / "half", dtype=dtype)
    states = half.states(slice(None))
    assert states.dtype == torch.float32 and half[0]["x"].dtype == torch.float32
    torch.testing.assert_close(states, whole.states(slice(None)), rtol=rounding, atol=1e-6)
    assert not torch.equal(states, whole.states(slice(None))) and torch.equal(states[:, 0], whole.states(slice(None))[:, 0])


def test_another_teacher_is_told_apart(tmp_path) -> None:
    found, model = made(tmp_path, toy(classes=2)), toy(classes=2)
    found.check(Problem(model))
    other = replace(model, time=lambda t: 2 * t)
    for problem, says in [
        (Problem(other), f'of model "{model.fingerprint}", but they are used with model "{other.fingerprint}"'),
        (Problem(model, 2.0), "of guidance 1.0, but they are used with guidance 2.0"),
        (Problem(replace(model, shape=(3,))), r"of sample shape \[2, 2\], but they are used with sample shape \[3\]"),
        (Problem(toy(mixture(VPLinear()), classes=2)), "of schedule .*edm.* with schedule .*vp-linear"),
    ]:
        with pytest.raises(ArtifactError, match=says):
            found.check(problem)


REFUSED = [
    ({"num": 0}, "num is at least 1, got 0"),
    ({"nfe": 0}, "nfe is at least 1, got 0"),
    ({"batch": 0}, "batch is at least 1, got 0"),
    ({"guidance": float("nan")}, "guidance is a number, got nan"),
    ({"seed": -1}, "seeds must lie between 0 and 2.63, got -1"),
    ({"seed": 2**63 - 5}, "seeds must lie between"),
    ({"dtype": "float64"}, "unknown dtype of trajectories 'float64'"),
    ({"solver": "unipc"}, "unknown solver 'unipc': did you mean"),
    ({"solver": "ddim:eta=1"}, "ddim:eta=1 adds noise, and a trajectory is the solution of the ODE"),
    ({"solver": "dpm-solver-v3"}, "needs statistics of its model: let a solver like unipc-3"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_impossible_requests_are_refused(options: dict, says: str) -> None:
    with pytest.raises(FewstepError, match=says):
        TrajectoryConfig(**options)
