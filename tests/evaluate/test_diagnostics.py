"""The geometry of trajectories, samplers that are stopped, and what their last evaluations buy."""

import math

import pytest
import torch
from tests.problems import ALL, mixture, noise

import fewstep
from fewstep import FewstepError, ModelError, RectifiedFlow, Sampler, SolverError, VarianceExploding, VPLinear, load_model
from fewstep.data.images import load_images
from fewstep.evaluate.diagnostics import geometry, stopping_error
from fewstep.evaluate.inspection import reference_of
from fewstep.models.analytic import DatasetDenoiser, GaussianDenoiser, MixtureDenoiser
from fewstep.sampling.loop import run, steps
from fewstep.sampling.noise import start_noise

LAW = VarianceExploding(t_min=0.02, t_max=80.0)


def vp(name: str, count: int = 6) -> Sampler:
    solver = ALL[name] if name in ALL else fewstep.make_solver(name)
    return Sampler.build(solver, fewstep.TimeGrid.logsnr(VPLinear(), count), VPLinear())


# -- facts of exact denoisers -------------------------------------------------------------------------------------------


def test_the_denoiser_of_points_is_a_mean_shift():
    points, z, s = noise(5, 3), noise(4, 3), torch.tensor(0.7, dtype=torch.float64)
    weights = torch.softmax(-(z[:, None] - points).square().sum(-1) / (2 * s**2), 1)
    answer = MixtureDenoiser(LAW, points, torch.zeros(5, dtype=torch.float64))(z, s)
    torch.testing.assert_close(answer, weights @ points, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "nfe"), [(4, 12), pytest.param(32, 30, marks=pytest.mark.slow)])
def test_every_step_goes_uphill(count, nfe):
    """At a fixed level the denoised image, and the Euler point, are likelier than the state."""
    scans = load_images("digits").x.double().flatten(1)
    denoiser = DatasetDenoiser(LAW, scans, 0.1)

    def log_density(z: torch.Tensor, s: float) -> torch.Tensor:
        return torch.logsumexp(-0.5 * (z[:, None] - scans).square().sum(-1) / (0.01 + s**2), 1)

    sampler = Sampler.build("ddim", "karras", LAW, nfe=nfe)
    for step in steps(denoiser, sampler.tableau, 80 * noise(count, 64)):
        s, end = float(step.t), float(sampler.tableau.nodes.t[step.i + 1])
        for point in (step.x0, end / s * step.x + (1 - end / s) * step.x0):
            assert bool((log_density(point, s) >= log_density(step.x, s) - 1e-9).all())


def test_a_gaussian_is_straight():
    std = torch.tensor(0.5, dtype=torch.float64)
    found = geometry(
        GaussianDenoiser(LAW, torch.zeros(8, dtype=torch.float64), std), Sampler.build("ddim", "karras", LAW, nfe=10), noise(3, 8)
    )
    assert float(found.deviation.max()) < 1e-12 and float(1 - found.energy[:, 0].min()) < 1e-12
    torch.testing.assert_close(found.turning, torch.ones(3).double(), rtol=0, atol=1e-12)


# -- geometry of networks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edm():
    model = load_model("digits-edm")
    sampler = Sampler.build("unipc-3", "karras", model.schedule, nfe=100)
    return geometry(model, sampler, start_noise(sampler.tableau.nodes, range(8), model.shape), model.labels(range(8)))


@pytest.mark.slow
def test_the_geometry_of_a_trained_network(edm):
    summary = edm.summary()
    assert summary["deviation"] < 0.005 and summary["energy_1"] > 0.9998 and 0.95 < summary["denoised_energy_1"] < 0.999
    denoised, sampled = edm.arrival(0.05)
    assert denoised > 2.5 * sampled and 1.1 < summary["turning"] < 1.6
    levels, density = edm.density()
    assert 1 < float(levels[density.argmax()]) < 4 and len(levels) == len(density) == 99
    assert math.isnan(edm.arrival(1e-12)[0]) and "8 trajectories of 100 evaluations" in repr(edm)


@pytest.mark.slow
def test_it_does_not_depend_on_the_batch(edm):
    model = load_model("digits-edm")
    sampler = Sampler.build("unipc-3", "karras", model.schedule, nfe=100)
    alone = geometry(model, sampler, start_noise(sampler.tableau.nodes, [3], model.shape), model.labels([3]))
    for name in ("deviation", "distance", "denoised_distance", "change"):
        torch.testing.assert_close(getattr(alone, name)[:, 0], getattr(edm, name)[:, 3], rtol=2e-3, atol=2e-5)  # float32, another batch


def test_of_an_exact_denoiser_it_is_the_same_to_round_off_in_any_batch():
    sampler = vp("unipc-2", 20)
    together, alone = (geometry(mixture(VPLinear()), sampler, x) for x in (noise(5, 2), noise(5, 2)[2:3]))
    for name in ("deviation", "distance", "denoised_distance", "change"):
        torch.testing.assert_close(getattr(alone, name)[:, 0], getattr(together, name)[:, 2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alone.turning[0], together.turning[2], rtol=1e-9, atol=0)


def test_from_pure_noise_the_first_level_is_left_out():
    flow = RectifiedFlow(t_max=1.0, t_min=0.0)
    found = geometry(mixture(flow), Sampler.build("ddim", "angle", flow, nfe=8), noise(4, 2))
    assert len(found.levels) == 8 and bool(torch.isfinite(found.levels).all()) and float(found.levels[-1]) == 0
    assert all(bool(torch.isfinite(getattr(found, name)).all()) for name in ("deviation", "energy", "distance", "turning"))


def test_the_sampler_whose_trajectories_are_measured():
    table, flow = load_model("digits-ddpm").schedule, RectifiedFlow(t_max=1.0, t_min=0.0)
    for law, name in ((LAW, "karras"), (table, "uniform"), (flow, "angle")):
        assert torch.equal(reference_of(law, 20).grid.t, fewstep.make_grid(name, law, 20).t)


def test_too_few_evaluations_and_other_mistakes():
    with pytest.raises(SolverError, match="2 evaluations are the line segments that they are"):
        geometry(mixture(VPLinear()), vp("ddim", 2), noise(2, 2))
    with pytest.raises(SolverError, match="a Sampler or a Tableau, not a str"):
        geometry(mixture(VPLinear()), "ddim", noise(2, 2))
    with pytest.raises(FewstepError, match=r"of shape \(2, 2\), got \(3, 2\)"):
        stopping_error(mixture(VPLinear()), vp("ddim"), noise(2, 2), noise(3, 2))
    with pytest.raises(FewstepError, match="the reference is not finite"):
        stopping_error(mixture(VPLinear()), vp("ddim"), noise(2, 2), noise(2, 2) * math.nan)
    with pytest.raises(ModelError, match="not finite"):
        geometry(mixture(VPLinear()), vp("ddim"), noise(2, 2) * math.nan)


# -- stopped early -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.every(9, 2)
def test_a_stopped_sampler_returns_the_last_answer(name, tmp_path):
    sampler, x = vp(name), noise(3, 2)
    answers = [step.x0 for step in steps(mixture(VPLinear()), sampler.tableau, x, seeds=[1, 2, 3])]
    for count in range(1, len(answers) + 1):
        stopped = sampler.tableau.stopped(count, VPLinear())
        made = run(mixture(VPLinear()), stopped, x, seeds=[1, 2, 3])
        torch.testing.assert_close(made, answers[count - 1], rtol=1e-6, atol=1e-9)
        assert stopped.nodes.evaluations == count and float(stopped.nodes.sigma[-1]) == 0
    short = sampler.stopped(2)
    loaded = Sampler.load(short.save(tmp_path / "stopped"))
    assert loaded.nfe == 2 and loaded.name == f"{sampler.name} stopped after 2" and loaded.fingerprint == short.fingerprint


def test_a_table_ends_at_its_clean_time():
    model = load_model("digits-ddpm")
    stopped = Sampler.build("unipc-2", "uniform", model.schedule, nfe=6).stopped(4)
    assert float(stopped.grid.t[-1]) == model.schedule.t_clean == -1


@pytest.mark.parametrize("count", [0, 7, 1.5, "two"])
def test_other_numbers_of_evaluations_are_refused(count):
    with pytest.raises(SolverError, match="stop after"):
        vp("ddim").stopped(count)


@pytest.mark.slow
def test_what_the_last_evaluations_buy():
    """On karras the last one is idle, on angle none is."""
    model = load_model("digits-edm")
    reference = reference_of(model.schedule)
    x, labels = start_noise(reference.tableau.nodes, range(8), model.shape), model.labels(range(8))
    with torch.no_grad():
        exact = run(model, reference.tableau, x, labels)
    karras, angle = (
        stopping_error(model, Sampler.build("unipc-2", grid, model.schedule, nfe=10), x, exact, labels) for grid in ("karras", "angle")
    )
    assert len(karras) == 11 and karras[8] <= 1.1 * karras[-1] and angle[8] > 1.4 * angle[-1]
    one = run(model, Sampler.build("unipc-2", "angle", model.schedule, nfe=10).stopped(9).tableau, x, labels)
    assert float((one - exact).double().square().mean().sqrt()) == pytest.approx(float(angle[8]), rel=1e-4)
