"""Statistics and time grids, whose they are, and how they are kept."""

import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import save as save_tensors
from tests.core.test_statistics import ROUND_OFF, SCHEDULE, SHAPE, STATISTICS, random_statistics

from fewstep import ArtifactError, DiscreteVP, GridError, RectifiedFlow, TimeGrid, VarianceExploding, VPLinear
from fewstep.core.statistics import ModelStatistics
from fewstep.solvers import DPMSolverV3


def test_covers_what_is_finite():
    inside = torch.tensor([-math.inf, -1.0, 0.0, 1.5, math.inf], dtype=torch.float64)
    assert STATISTICS.covers(inside)
    assert STATISTICS.covers(inside + 1e-9)
    assert not STATISTICS.covers(inside - 1e-3)
    assert not STATISTICS.covers(inside + 1e-3)


def test_indices_are_the_nearest_points():
    lam = torch.tensor([-1.0, -0.88, -0.87, 0.1, 1.5], dtype=torch.float64)
    assert STATISTICS.indices(lam).tolist() == [0, 0, 1, 4, 10]
    halves = torch.tensor([-0.875, -0.625, -0.375], dtype=torch.float64)
    assert STATISTICS.indices(halves).tolist() == [0, 2, 2]
    assert STATISTICS.indices(STATISTICS.lam, exactly=True).tolist() == list(range(11))
    with pytest.raises(GridError, match="lam = \\[-1.0, -0.88"):
        STATISTICS.indices(lam, exactly=True)


@pytest.mark.parametrize(
    "schedule", [SCHEDULE, VarianceExploding(), RectifiedFlow(), DiscreteVP.linear()], ids=["vp", "edm", "flow", "table"]
)
def test_a_grid_through_points(schedule):
    grid = STATISTICS.grid(schedule, [0, 3, 4, 10])
    torch.testing.assert_close(schedule.lam(grid.t), STATISTICS.lam[[0, 3, 4, 10]], rtol=ROUND_OFF, atol=ROUND_OFF)
    moved = TimeGrid(schedule.t_of_lam(torch.tensor([-0.95, -0.3, 0.1, 1.4], dtype=torch.float64)))
    assert torch.equal(STATISTICS.snap(moved, schedule).t, grid.t)
    assert torch.equal(STATISTICS.grid(schedule, torch.tensor([0, 3, 4, 10])).t, grid.t)
    with pytest.raises(GridError, match="appears twice"):
        STATISTICS.snap(TimeGrid(schedule.t_of_lam(torch.tensor([-0.95, 0.1, 0.05 + 0.06, 1.4], dtype=torch.float64))), schedule)


def test_a_trapezoid_solver_snaps_its_grid():
    lam = torch.tensor([-0.95, -0.3, 0.1, 1.4], dtype=torch.float64)
    moved, kept = (
        DPMSolverV3(STATISTICS, integrals=rule).nodes(TimeGrid(SCHEDULE.t_of_lam(lam)), SCHEDULE) for rule in ("trapezoid", "exact")
    )
    torch.testing.assert_close(moved.lam, STATISTICS.lam[[0, 3, 4, 10]], rtol=ROUND_OFF, atol=ROUND_OFF)
    torch.testing.assert_close(kept.lam, lam, rtol=ROUND_OFF, atol=ROUND_OFF)


# -- whose ----------------------------------------------------------------------------------------------------------------------------


def test_check_passes_what_belongs_together():
    STATISTICS.check(model="abc", guidance=2.0, schedule=VPLinear(), shape=SHAPE)
    STATISTICS.check(model="", guidance=2.0, schedule=VPLinear(), shape=SHAPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "xyz"}, 'made for model "abc", but are used with model "xyz": calibrate this model'),
        ({"guidance": 1.0}, "made for guidance 2.0, but are used with guidance 1.0"),
        ({"shape": (3, 2)}, "made for sample shape \\[2, 3\\], but are used with sample shape \\[3, 2\\]"),
        ({"schedule": VPLinear(beta_max=10.0)}, '"beta_max": 20.0.*, but are used with schedule .*"beta_max": 10.0'),
        ({"schedule": VarianceExploding()}, '"vp-linear".* but are used with schedule .*"edm"'),
    ],
)
def test_check_names_both_sides(change, message):
    with pytest.raises(ArtifactError, match=message):
        STATISTICS.check(**{"model": "abc", "guidance": 2.0, "schedule": VPLinear(), "shape": SHAPE, **change})


def test_fingerprints_tell_statistics_apart():
    same = random_statistics()
    others = [random_statistics(seed=1), random_statistics(levels=12), random_statistics(high=1.6)]
    others += [
        ModelStatistics(same.lam, same.l, same.s, same.b, SHAPE, *rest) for rest in ((SCHEDULE, "x"), (VPLinear(beta_min=0.2), "abc"))
    ]
    others += [ModelStatistics(same.lam, same.l, same.s, same.b, SHAPE, SCHEDULE, "abc", 1.0)]
    assert same.fingerprint == STATISTICS.fingerprint
    assert len({STATISTICS.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


# -- disk -----------------------------------------------------------------------------------------------------------------------------


def save(folder):
    return STATISTICS.save(folder / "statistics")


def edit(folder, **changes) -> None:
    """Other fields in ``statistics.json``; a field set to ``None`` goes."""
    meta = {**json.loads((folder / "statistics.json").read_text()), **changes}
    (folder / "statistics.json").write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))


@pytest.mark.parametrize("schedule", [VPLinear(beta_max=10.0), DiscreteVP.linear(10)], ids=["law", "table"])
def test_round_trip(tmp_path, schedule):
    statistics = ModelStatistics(STATISTICS.lam, STATISTICS.l, STATISTICS.s, STATISTICS.b, SHAPE, schedule, "abc", 2.0, {"rows": 7})
    folder = statistics.save(tmp_path / "a" / "statistics")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "statistics.json", "statistics.safetensors"]
    loaded = ModelStatistics.load(folder)
    torch.testing.assert_close(loaded.lam, statistics.lam, rtol=ROUND_OFF, atol=ROUND_OFF)
    for name in "lsb":
        assert torch.equal(getattr(loaded, name), getattr(statistics, name).float().double())
    loaded.check(model="abc", guidance=2.0, schedule=schedule, shape=SHAPE)
    assert (loaded.shape, loaded.card, loaded.fingerprint) == (SHAPE, {"rows": 7}, statistics.fingerprint)
    again = loaded.save(tmp_path / "b")
    assert (again / "statistics.safetensors").read_bytes() == (folder / "statistics.safetensors").read_bytes()
    text = (folder / "README.md").read_text()
    assert "guidance 2, samples of shape (2, 3)" in text
    assert "- 11 levels, lam from -1 to 1.5; l (2, 1), s (1, 1), b (1, 3)" in text
    assert "- rows: 7" in text


@pytest.mark.parametrize("name", ["statistics.json", "statistics.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = save(tmp_path)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"cannot read .*{name}: No such file"):
        ModelStatistics.load(folder)


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_truncated_tensor_file_is_refused(tmp_path, keep):
    path = save(tmp_path) / "statistics.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="is damaged: its checksum is not the one in statistics.json"):
        ModelStatistics.load(path.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "'fewstep-statistics' version 2; this fewstep reads 'fewstep-statistics' version 1"),
        ({"format": "fewstep-sampler"}, "is 'fewstep-sampler' version 1"),
        ({"lam": None}, "statistics.json is damaged: lam: field required"),
        ({"lam": [0.0]}, "statistics.json is damaged: lam.1: field required"),
        ({"lam": [1.0, 0.0]}, "at least 2 increasing"),
        ({"shape": [2, 4]}, "b of statistics has shape \\(11, 1, 3\\)"),
        ({"schedule": {"law": "unheard-of"}}, "not a whole statistics artifact: .*unknown noise schedule"),
        ({"card": 3}, "statistics.json is damaged: card: .*, got '3'"),
        ({"shape": 0}, "statistics.json is damaged: shape: "),
        ({"shape": [2, -3]}, "statistics.json is damaged: shape.1: "),
        ({"shape": [1 << 60, 3]}, "statistics.json is damaged: shape.0: "),
        ({"guidance": math.inf}, "statistics.json is damaged: guidance: "),
    ],
)
def test_other_json_is_refused(tmp_path, changes, message):
    folder = save(tmp_path)
    edit(folder, **changes)
    with pytest.raises(ArtifactError, match=message):
        ModelStatistics.load(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"l": torch.zeros(11, 1, 1), "s": torch.zeros(11, 1, 1)}, "not a whole statistics artifact: there is no tensor b"),
        ({name: torch.full((11, 1, 1), math.nan) for name in "lsb"}, "the tensor l has numbers that are not finite"),
        ({name: torch.zeros(()) for name in "lsb"}, r"the tensor l has shape \[\], not \[any, any, any\]"),
        ({name: torch.zeros(11, 1, 1, dtype=torch.int32) for name in "lsb"}, "the tensor l holds int32, not floating-point numbers"),
    ],
)
def test_other_tensors_are_refused(tmp_path, tensors, message):
    folder, data = save(tmp_path), save_tensors(tensors)
    (folder / "statistics.safetensors").write_bytes(data)
    edit(folder, sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ArtifactError, match=message):
        ModelStatistics.load(folder)


def test_a_card_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    statistics = ModelStatistics(STATISTICS.lam, STATISTICS.l, STATISTICS.s, STATISTICS.b, SHAPE, SCHEDULE, card={"rows": torch.ones(2)})
    with pytest.raises(ArtifactError, match="plain JSON values"):
        statistics.save(tmp_path / "statistics")
    assert list(tmp_path.iterdir()) == []
