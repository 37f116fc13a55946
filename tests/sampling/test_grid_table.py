"""The artifact of optimised time grids: written and read bit for bit, and what is said when it cannot be."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep import ArtifactError, DiscreteVP, GridError, NoiseSchedule, RectifiedFlow, TimeGrid, VarianceExploding, VPLinear, make_grid
from fewstep.sampling.grid_table import GridTable

LAW = VarianceExploding(0.05, 20.0)


def table(schedule: NoiseSchedule = LAW) -> GridTable:
    """Grids of 5, 7 and 12 evaluations, given in no order, whose times have all their digits."""
    grids = {nfe: make_grid("angle", schedule, nfe) for nfe in (12, 5, 7)}
    return GridTable("unipc-3:corrector=false", "0123456789abcdef", 1.5, schedule, grids, {"of": "toy", "rows": [{"nfe": 5, "rmse": 0.1}]})


@pytest.mark.parametrize("schedule", [LAW, VPLinear(), RectifiedFlow(3.0), DiscreteVP.linear(50)], ids=lambda law: type(law).__name__)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path, schedule: NoiseSchedule) -> None:
    saved = table(schedule)
    assert saved.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    loaded = GridTable.load(tmp_path / "new" / "folder")
    assert list(loaded.grids) == [5, 7, 12]
    for nfe, grid in saved.grids.items():
        assert loaded.grid(nfe).t.dtype == torch.float64 and torch.equal(loaded.grid(nfe).t, grid.t)
    for name in ("solver", "model", "guidance", "card"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert loaded.schedule.to_config() == schedule.to_config()
    before = (tmp_path / "new" / "folder" / "grids.json").read_bytes()
    loaded.save(tmp_path)
    assert (tmp_path / "grids.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["grids.json"]


@pytest.mark.parametrize("nfe", [4, 13])
def test_a_grid_that_is_missing_is_named_with_those_that_exist(nfe: int) -> None:
    says = rf"no optimized grid of {nfe} evaluations for unipc-3:corrector=false here, only of 5, 7, 12: run"
    with pytest.raises(GridError, match=says):
        table().grid(nfe)


@pytest.mark.parametrize(("nfe", "nearest"), [(6, 7), (8, 7), (10, 12)])  # as ratios
def test_between_two_numbers_the_nearer_grid_is_stretched(nfe: int, nearest: int) -> None:
    found, parent = table().grid(nfe), table().grids[nearest]
    assert found.steps == nfe and torch.equal(found.t[[0, -1]], parent.t[[0, -1]])
    u, v = torch.linspace(0, nearest, nfe + 1), torch.arange(nearest + 1)
    expected = np.interp(u.numpy(), v.numpy(), -LAW.lam(parent.t).numpy())
    torch.testing.assert_close(-LAW.lam(found.t), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)  # float32 abscissae


def test_a_solver_of_several_evaluations_a_step_has_no_grids_in_between() -> None:
    two_stage = GridTable("heun", "", 1.0, LAW, {nfe: make_grid("angle", LAW, nfe // 2) for nfe in (4, 8)})
    with pytest.raises(GridError, match="no optimized grid of 6 evaluations for heun here"):
        two_stage.grid(6)


DAMAGE = {
    "no-times": lambda meta: {key: value for key, value in meta.items() if key != "times"},
    "no-card": lambda meta: {key: value for key, value in meta.items() if key != "card"},
    "rising": lambda meta: {**meta, "times": {"2": [0.1, 0.2, 0.3]}},
    "one-time": lambda meta: {**meta, "times": {"5": [1.0]}},
    "words": lambda meta: {**meta, "times": {"5": ["a", "b"]}},
    "not-a-number": lambda meta: {**meta, "times": {"five": [2.0, 1.0]}},
    "list": lambda meta: {**meta, "times": [[2.0, 1.0]]},
    "law": lambda meta: {**meta, "schedule": {"law": "edmm"}},
    "no-theta": lambda meta: {**meta, "schedule": {"law": "discrete-vp"}},
    "field": lambda meta: {**meta, "schedule": {"law": "edm", "t_mid": 1.0}},
    "guidance": lambda meta: {**meta, "guidance": "two"},
    "no-evaluations": lambda meta: {**meta, "times": {"0": [2.0, 1.0]}},
    "infinite": lambda meta: {**meta, "times": {"5": [math.inf, 1.0]}},
    "long-number": lambda meta: {**meta, "guidance": 10**400},
    "deep": lambda meta: {**meta, "card": functools.reduce(lambda inner, _: [inner], range(200), 1)},
    "too-much": lambda meta: {**meta, "solvr": "ddim"},
    "bool": lambda meta: {**meta, "guidance": True},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = table().save(tmp_path) / "grids.json"
    path.write_text(json.dumps(DAMAGE[damage](json.loads(path.read_text()))))
    with pytest.raises(ArtifactError, match=r"grids.json is damaged: .+; fetch or make it again"):
        GridTable.load(tmp_path)


def test_files_that_are_no_table_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read .*grids.json: No such file"):
        GridTable.load(tmp_path)
    path = table().save(tmp_path) / "grids.json"
    meta, text = json.loads(path.read_text()), path.read_text()
    for content, says in [
        (text[: len(text) // 2], "grids.json is damaged"),
        ("[]", "should hold a JSON object, not a list"),
        (json.dumps({**meta, "version": 2}), "is 'fewstep-grids' version 2; this fewstep reads 'fewstep-grids' version 1"),
        (json.dumps({**meta, "format": "fewstep-sampler"}), "is 'fewstep-sampler' version 1; this"),
        ("{}", "is None version None; this"),
    ]:
        path.write_text(content)
        with pytest.raises(ArtifactError, match=says):
            GridTable.load(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="cannot write .*grids.json: .*; choose a folder"):
        table().save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_table_saved_again_replaces_the_other(tmp_path: Path) -> None:
    table().save(tmp_path)
    two = TimeGrid(torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64))
    GridTable("ddim", "m", 1.0, LAW, {2: two}).save(tmp_path)
    loaded = GridTable.load(tmp_path)
    assert list(loaded.grids) == [2] and loaded.card == {} and torch.equal(loaded.grid(2).t, two.t)
