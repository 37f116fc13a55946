"""Trajectories that tests of fits share."""

import pytest
from tests.problems import LAW, toy

from fewstep import FitConfig, Trajectories, TrajectoryConfig, generate_trajectories
from fewstep.learn.teacher.gram import fine_grid


@pytest.fixture(scope="package")
def given(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    """48 trajectories of the toy on 16 levels, as a fit would make them."""
    config = TrajectoryConfig(48, 16, seed=FitConfig().seed, batch=16)
    return generate_trajectories(toy(), fine_grid(LAW, 16), tmp_path_factory.mktemp("given"), config=config)
