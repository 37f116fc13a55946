"""What tuning minimises, against sums written out here."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.learn.networks.test_finetune import DECREASE, FLOAT64, SHAPE, TINY, coarse, rounds  # noqa: F401 - a fixture of every test is among them
from tests.problems import tiny_folder
from torch import Tensor, nn

from fewstep import GaussianDenoiser, Model, TimeGrid, VarianceExploding, VPLinear, finetune, load_model
from fewstep.core.schedule import NoiseSchedule
from fewstep.learn.networks.objectives.objective import Networks
from fewstep.learn.networks.objectives.steps import LandingObjective
from fewstep.learn.teacher.batches import Batch
from fewstep.models.problem import Problem

# -- the loss --------------------------------------------------------------------------------------------------------

EXACT = {"ve": VarianceExploding(0.05, 20.0), "vp": VPLinear()}


class Means(nn.Module):
    """Answers the exact mean of a Gaussian denoiser's output over the step that begins at ``t``, moved by ``shift``."""

    def __init__(self, exact: GaussianDenoiser, t: Tensor, shift: float) -> None:
        super().__init__()
        self.exact, self.t = exact, t
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))  # it also makes the network one of float64

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        i = int((self.t - time[0]).abs().argmin())
        schedule = self.exact.schedule
        alpha, level = schedule.alpha(self.t[i : i + 2]), torch.exp(-schedule.lam(self.t[i : i + 2]))
        r = level[1] / level[0]
        z, after = x / alpha[0], self.exact.flow(x, self.t[i], self.t[i + 1]) / alpha[1]
        return (after - r * z) / (1 - r) + self.shift


@pytest.mark.parametrize("law", EXACT)
def test_the_loss_is_the_distance_to_the_teacher_after_each_step(law: str) -> None:
    schedule: NoiseSchedule = EXACT[law]
    exact = GaussianDenoiser(
        schedule, torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(SHAPE), torch.tensor(0.5, dtype=torch.float64)
    )
    grid, index = TimeGrid.angle(schedule, 6), [0, 2, 3, 6]
    t, moved = grid.t[index], 0.1
    x = schedule.sigma(grid.t[0]) * torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = torch.stack([x, *(exact.flow(x, grid.t[0], time) for time in grid.t[1:])], 1)

    def loss(states_of: str, shift: float) -> float:
        problem = Problem(Model(network := Means(exact, t, shift), schedule, "sample", shape=SHAPE))
        objective = LandingObjective(problem, grid, index, own_states=states_of == "own")
        return float(objective.loss(Networks(network), Batch(states, None), torch.Generator()).detach())

    scale = float(states[:, -1].square().mean())
    for states_of in ("own", "teacher"):
        assert loss(states_of, 0.0) < FLOAT64 * scale
    level = torch.exp(-schedule.lam(t)).tolist()
    spread = [(0.25 + s**2) ** 0.5 for s in level]  # of z = x/alpha
    error, own, apart = 0.0, 0.0, 0.0
    for i in range(3):
        r = level[i + 1] / level[i]
        error = spread[i + 1] / spread[i] * error + (1 - r) * moved  # the exact step is an affine map with this slope
        own, apart = own + error**2, apart + ((1 - r) * moved) ** 2
    assert loss("own", moved) == pytest.approx(own, rel=1e-8) and own != pytest.approx(apart, rel=0.1)
    assert loss("teacher", moved) == pytest.approx(apart, rel=1e-8)  # of sums of float64 that cancel by 1e-8 or so


@pytest.mark.slow
def test_states_of_the_teacher(tmp_path: Path) -> None:
    model = load_model(tiny_folder(tmp_path / "teacher"))
    (one,) = rounds(finetune(model, config=replace(TINY, rounds=1, states="teacher")))
    assert one.bound_trained < DECREASE * one.bound_before
