"""From images to the noise that a sampler makes them of: the round trip, its cost, and what has no way back."""

import pytest
import torch
from tests.problems import DSNO, Tanh, mixture, noise, toy

import fewstep
from fewstep import (
    Cube,
    DiscreteVP,
    ModelError,
    RectifiedFlow,
    Sampler,
    SolverError,
    VarianceExploding,
    VPLinear,
    invert,
    load_model,
    make_solver,
    sample,
)
from fewstep.models.invert import _way_up

LAWS = [
    VPLinear(),
    VarianceExploding(0.01, 20.0),
    RectifiedFlow(),
    DiscreteVP.scaled_linear(),
    DiscreteVP.scaled_linear().zero_terminal_snr(),
]
SOLVERS = ["unipc-2", "dpm-solver-pp-2m", "ddim", "heun", "deis-3", "dpm-solver-2s"]


def missed(one, two):
    return float((one - two).flatten(1).square().mean(1).sqrt().max())


@pytest.mark.parametrize("law", LAWS, ids=["vp", "ve", "flow", "discrete", "zero-snr"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.every(2)
def test_the_start_is_the_one_that_the_sampler_made_the_images_of(solver, law):
    """The round trip closes far below the way up's own error, and so the start is found."""
    denoiser, nfe = mixture(law), 30 + (make_solver(solver).stages == 2 and law.ends_clean)
    sampler = Sampler.build(solver, "karras" if float(law.alpha(torch.tensor(law.t_max))) else "angle", law, nfe=nfe)
    start = fewstep.start_noise(sampler.tableau.nodes, range(4), (2,)).double()
    images = sample(denoiser, sampler, start)
    found = invert(denoiser, sampler, images, tolerance=1e-7, corrections=20)
    assert missed(sample(denoiser, sampler, found), images) <= 1e-7
    assert missed(found, start) <= 1e-2 * float(sampler.tableau.nodes.sigma[0])


def test_images_that_no_sampler_made_come_back_too():
    law = VarianceExploding(0.01, 20.0)
    sampler, images = Sampler.build("unipc-2", "karras", law, nfe=20), noise(3, 2)
    found = invert(mixture(law), sampler, images)
    assert missed(sample(mixture(law), sampler, found), images) <= 1e-3


def test_the_way_up_undoes_the_ode_by_order_2():
    law, errors = VPLinear(), []
    grids = [fewstep.make_grid("logsnr", law, n) for n in (20, 40, 80)]
    for grid in grids:
        tableau = Sampler.build("dpm-solver-pp-2m:lower_order_below=0", grid, law).tableau
        up, scale = _way_up(tableau, law)
        assert float(scale) == 1 and torch.equal(up.nodes.t, tableau.nodes.t.flip(0))
        x = noise(4, 2)
        there = list(fewstep.steps(mixture(law), tableau, x))[-1].x_next
        errors.append(missed(list(fewstep.steps(mixture(law), up, there))[-1].x_next, x))
    assert errors[0] / errors[1] > 2.8 and errors[1] / errors[2] > 2.8


def test_the_evaluations_are_those_that_it_says():
    """Up and back, and both again for each correction; no more where the images are back."""
    law = VarianceExploding(0.01, 20.0)
    sampler, images = Sampler.build("unipc-2", "karras", law, nfe=20), noise(3, 2).float()
    for tolerance, corrections in ((10.0, 0), (1e-2, 1)):
        denoiser = Tanh(law)
        first = list(fewstep.steps(denoiser, _way_up(sampler.tableau, law)[0], images))[-1].x_next
        apart = missed(sample(denoiser, sampler, first), images)
        assert (apart > tolerance) == bool(corrections)
        denoiser = Tanh(law)
        invert(denoiser, sampler, images, tolerance=tolerance)
        assert len(denoiser.calls) == 40 * (1 + corrections)


def test_an_image_does_not_know_the_others():
    law = VarianceExploding(0.01, 20.0)
    sampler, images = Sampler.build("unipc-2", "karras", law, nfe=16), torch.cat([noise(1, 2), 3 * noise(3, 2)])
    together = invert(mixture(law), sampler, images)
    for k in range(4):
        assert torch.equal(invert(mixture(law), sampler, images[k : k + 1]), together[k : k + 1])


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_round_trip_of_a_bundled_model(guidance):
    """20 evaluations up and 20 back, and 40 for each of at most two corrections."""
    model = load_model("digits-edm")
    sampler = Sampler.build("unipc-2", "karras", model.schedule, nfe=20)
    labels = model.labels([3, 4])
    images = sample(model, "unipc-2", nfe=10, seeds=[3, 4], guidance=guidance)
    found = invert(model, sampler, images, labels, guidance=guidance, corrections=2)
    assert found.shape == images.shape
    assert missed(sample(model, sampler, found, labels, guidance=guidance), images) <= 1e-3


@pytest.mark.slow
def test_the_round_trip_to_the_clean_image_of_a_table_of_times():
    model = load_model("digits-ddpm")
    images = sample(model, "unipc-2", nfe=10, seeds=[3])
    found = invert(model, "unipc-2", images, nfe=30, grid="logsnr", corrections=2)
    assert missed(sample(model, "unipc-2", found, nfe=30, grid="logsnr"), images) <= 1e-3


def test_what_does_not_come_back_is_said():
    law = VarianceExploding(0.01, 20.0)
    with pytest.raises(SolverError, match=r"3 of 3 images come back .* after 1 corrections, not within tolerance=1e-06: use more"):
        invert(mixture(law), "ddim", noise(3, 2), nfe=3, tolerance=1e-6, corrections=1)
    with pytest.raises(SolverError, match="one step to the clean image, which leaves nothing of its start"):
        invert(mixture(VarianceExploding(0.0, 20.0)), "ddim", noise(1, 2), grid=fewstep.TimeGrid([20.0, 0.0]))


@pytest.mark.parametrize("solver", ["ddim:eta=1", "euler-ancestral", "sa-solver"])
def test_samplers_that_add_noise_are_refused(solver):
    with pytest.raises(SolverError, match="adds noise makes an image of many starts: name one that adds none"):
        invert(mixture(VPLinear()), solver, noise(2, 2), nfe=5)


def test_models_and_images_without_a_way_back_are_refused():
    made, images = toy(classes=2), torch.zeros(2, 2, 2)
    with pytest.raises(ModelError, match="is a student, which is sampled as it is: name its teacher"):
        invert(load_model(DSNO), "ddim", torch.zeros(1, 1, 8, 8), nfe=1)
    with pytest.raises(ModelError, match="toy has classes, .* pass cond="):
        invert(made, "ddim", images, nfe=4)
    with pytest.raises(ModelError, match="toy has labels 0 to 1"):
        invert(made, "ddim", images, torch.tensor([0, 7]), nfe=4)
    with pytest.raises(ModelError, match="not finite"):
        invert(made, "ddim", torch.full((2, 2, 2), torch.nan), torch.tensor([0, 1]), nfe=4)
    with pytest.raises(ModelError, match="invert is not for a reflected model"):
        reflected = fewstep.Model(lambda x, t: x, VarianceExploding(0.01, 3.0), "sample", shape=(2,), domain=Cube(-1, 1), identity="x")
        invert(reflected, "ddim", noise(1, 2), nfe=4)
    with pytest.raises(ModelError, match="x0 has no images: pass one at least"):
        invert(made, "ddim", images[:0], torch.zeros(0, dtype=torch.int64), nfe=4)
    for wrong in ({"tolerance": 0.0}, {"tolerance": float("inf")}, {"corrections": -1}):
        with pytest.raises(SolverError, match="a tolerance is a finite number above 0, and corrections are 0 or more"):
            invert(made, "ddim", images, torch.tensor([0, 1]), nfe=4, **wrong)
