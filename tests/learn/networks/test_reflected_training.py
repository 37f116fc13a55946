"""Reflected training: measured preconditioning, a loss whose mean is the kernel's, runs that resume, and learners on the result."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.problems import WALLS, reflected_model
from torch import Tensor

from fewstep import (
    CalibrationConfig,
    Cube,
    DPMSolverV3,
    FewstepError,
    Model,
    TimeGrid,
    TrajectoryConfig,
    calibrate,
    fit,
    generate_trajectories,
    load_model,
    sample,
)
from fewstep.core.domain import mirror_mean
from fewstep.core.prediction import Measured
from fewstep.data.images import Images, load_images
from fewstep.learn.networks.loop import LoopConfig, identity_of
from fewstep.learn.networks.preconditioning import LEVELS, measure_preconditioning
from fewstep.learn.networks.score_matching import score_matching
from fewstep.learn.networks.train import TrainConfig, train
from fewstep.learn.samplers.fit_plan import FitConfig

CUBE = Cube()
CONFIG = TrainConfig("reflected", True, channels=(16, 16))
LOOP = LoopConfig(steps=7, batch=8, checkpoint_every=3, warmup=2)
SPREAD = 0.05  # of a variance over 2000 pictures


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images("digits")


@pytest.fixture(scope="module")
def measured(digits: Images) -> Measured:
    return measure_preconditioning(digits, CUBE, WALLS)


@pytest.mark.slow
def test_measured_coefficients_give_targets_of_unit_variance_at_every_level(digits: Images, measured: Measured) -> None:
    draw = torch.Generator().manual_seed(7)
    for sigma in torch.tensor([0.01, 0.03, 0.11, 0.3, 0.55, 0.9, 1.4, 2.1, 2.93, 3.0], dtype=torch.float64):
        x0 = digits.dequantised(torch.randint(len(digits.x), (2000,), generator=draw), draw).double()
        x = CUBE.fold(x0 + sigma * torch.randn(x0.shape, generator=draw, dtype=torch.float64))[0]
        skip, out, scale = measured.at(sigma)
        target = (mirror_mean(x, x0, sigma, CUBE) - skip * x) / out
        assert float(target.var()) == pytest.approx(1, abs=SPREAD) and float((scale * x).square().mean()) == pytest.approx(1, abs=SPREAD)


@pytest.mark.slow
def test_at_the_ends_the_target_is_the_image_or_the_state(measured: Measured, digits: Images) -> None:
    (low, high), table = (measured.at(torch.tensor(end, dtype=torch.float64)) for end in (0.01, 3.0)), measured.table
    assert len(table) == LEVELS and float(high[0]) == pytest.approx(1, abs=1e-3) and float(high[1]) < 1e-3
    assert float(low[0]) == pytest.approx(1, abs=0.01) and float(low[1]) == pytest.approx(0.01, rel=0.05)
    assert measure_preconditioning(digits, CUBE, WALLS) == measured  # seeded


def test_images_that_a_cube_does_not_hold_are_refused(digits: Images, tmp_path: Path) -> None:
    far = replace(digits, x=digits.x * 2, name="far")
    for attempt in (lambda: measure_preconditioning(far, CUBE, WALLS), lambda: train(far, CONFIG, LOOP, tmp_path / "m", command="")):
        with pytest.raises(FewstepError, match=r"the images of far lie in \[-1.8.*the cube is \[-1, 1\]: scale them"):
            attempt()
    assert not (tmp_path / "m").exists()


def test_the_loss_is_that_of_the_folded_state_and_the_kernel(digits: Images, measured: Measured) -> None:
    class Perfect(torch.nn.Module):
        """Answers the target itself, which it knows from the seed of the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            sigma = torch.exp(4 * time)
            draw = torch.Generator().manual_seed(3)
            index = torch.randint(len(digits.x), (64,), generator=draw)
            x0 = digits.dequantised(index, draw)
            levels(64, draw)
            state = CUBE.fold(x0 + sigma.reshape(-1, 1, 1, 1) * torch.randn(x0.shape, generator=draw))[0]
            skip, out, scale = (value.float().reshape(-1, 1, 1, 1) for value in measured.at(sigma))
            torch.testing.assert_close(x, scale * state, rtol=0, atol=1e-4)
            return (mirror_mean(state, x0, sigma, CUBE) - skip * state) / out

    def levels(count: int, draw: torch.Generator) -> Tensor:
        return torch.exp(torch.randn(count, generator=draw) - 1).clamp(0.01, 1.0)

    network = Perfect()
    model = reflected_model(network=network, prediction=measured, call=None)
    loss = score_matching(model, digits, levels, conditional=False)
    assert float(loss(network, 64, torch.Generator().manual_seed(3)).detach()) < 1e-4


def test_levels_have_defaults_of_their_kind_and_old_checkpoints_stay_valid() -> None:
    assert CONFIG.levels == (-1.0, 1.1) and TrainConfig("edm").levels == (-0.6, 1.6)
    assert TrainConfig("reflected", p_mean=-0.6).levels == (-0.6, 1.1)
    assert "p_mean=-0.6, p_std=1.6" in identity_of(TrainConfig("flow-map")) and replace(TrainConfig("ddpm")) == TrainConfig("ddpm")


@pytest.mark.slow
@pytest.mark.parametrize("mean", [-6.0, 2.0])
def test_levels_that_are_all_at_a_wall_of_the_range_are_refused(mean: float) -> None:
    with pytest.raises(FewstepError, match=r"levels from 0.01 to 3, so p_mean lies between -4.61 and 1.1, got"):
        TrainConfig("reflected", p_mean=mean)


def test_a_trained_folder_is_a_reflected_model(digits: Images, tmp_path: Path) -> None:
    losses: list[float] = []
    loop = replace(LOOP, steps=24, lr=1e-2, batch=16)
    out = train(digits, CONFIG, loop, tmp_path / "m", command="fewstep train", observe=lambda step, value: losses.append(value))
    model = load_model(out)
    assert (model.domain, model.schedule, model.classes, model.null_label) == (CUBE, WALLS, 10, 10)
    assert sum(losses[-6:]) < sum(losses[:6]) and "| kind | reflected |" in (out / "README.md").read_text()
    assert float(sample(model, "unipc-2", nfe=4, guidance=4, seeds=range(2)).abs().max()) <= 1
    with pytest.raises(FewstepError, match="already holds a trained model"):
        train(digits, CONFIG, LOOP, out, command="")


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_a_whole_one(digits: Images, tmp_path: Path) -> None:
    def killed(step: int, value: float) -> None:
        if step == 5:
            raise RuntimeError

    train(digits, CONFIG, LOOP, tmp_path / "whole", command="")
    with pytest.raises(RuntimeError):
        train(digits, CONFIG, LOOP, tmp_path / "cut", command="", observe=killed)
    train(digits, CONFIG, LOOP, tmp_path / "cut", command="")
    assert load_model(tmp_path / "whole").fingerprint == load_model(tmp_path / "cut").fingerprint


# -- learners ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return reflected_model()


def test_trajectories_begin_in_the_cube_and_go_on_past_its_walls(model: Model, tmp_path: Path) -> None:
    made = generate_trajectories(model, TimeGrid.karras(WALLS, 4), tmp_path, config=TrajectoryConfig(num=6, nfe=8, batch=4))
    assert made is not None and made.domain == CUBE
    x = made.states([0, 5])
    assert float(x[:, 0].abs().max()) <= 1 and torch.equal(made.states([0, 5], at=[0, 2]), x[:, [0, 2]])
    assert made.states(slice(None))[:, 1:].abs().max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sampler_is_fitted_to_it(model: Model, guidance: float) -> None:
    config = FitConfig(num=16, held_out=8, noises=8, levels=12, iterations=0)
    sampler = fit(model, nfe=3, guidance=guidance, config=config)[3]
    assert sampler.card["domain"] == [-1, 1]
    exact = sample(model, "unipc-3", nfe=60, guidance=guidance, seeds=range(100, 116))
    ours, plain = (
        (sample(model, what, guidance=guidance, seeds=range(100, 116), **how) - exact).square().mean().sqrt()
        for what, how in ((sampler, {}), ("ddim", {"nfe": 3}))
    )
    assert ours < plain and float(sample(model, sampler, guidance=guidance, seeds=range(4)).abs().max()) <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_statistics_of_it_are_forward_derivatives(model: Model) -> None:
    statistics = calibrate(model, config=CalibrationConfig(levels=6, num=8))
    assert statistics is not None and statistics.card["derivatives"] == "forward"
    assert float(sample(model, DPMSolverV3(statistics), nfe=4, seeds=range(2)).abs().max()) <= 1
