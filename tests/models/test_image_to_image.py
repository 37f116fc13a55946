"""Image to image by `fewstep.sample` and `generate_to`: the noised image at the first call, batches, in parallel, refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.problems import DSNO, names, toy
from torch import nn

from fewstep import (
    DiscreteVP,
    FlowMap,
    GaussianDenoiser,
    GridError,
    Model,
    ModelError,
    ParallelConfig,
    RectifiedFlow,
    Sampler,
    SolverError,
    VPLinear,
    load_model,
    make_grid,
    sample,
    seeded_noise,
)
from fewstep.models.generate import generate_to, sampler_for
from fewstep.models.problem import Problem
from fewstep.runtime.errors import ArtifactError
from fewstep.sampling.start import begin, level_of, noised

EDM, PLAIN = load_model("digits-edm"), toy()
IMAGES = torch.linspace(-1, 1, 8).reshape(2, 2, 2)
SEEDS = [11, 12]
DENOISER = GaussianDenoiser(VPLinear(), torch.zeros(2), torch.tensor(1.0))


def asked(what="ddim", of=PLAIN, x0=IMAGES, strength=0.3, seeds=SEEDS, **options):
    return sample(of, what, **{"nfe": 4, "seeds": seeds, "x0": x0, "strength": strength, **options})


@pytest.mark.parametrize("grid", [None, "karras:rho=5", make_grid("quadratic", PLAIN.schedule, 4)])
@pytest.mark.parametrize("what", ["ddim", "unipc-2", "heun", "sde-dpm-solver-2m", "dpm-solver-2s"])
@pytest.mark.every(2)
def test_the_first_call_sees_the_noised_image(what, grid):
    stages = 2 if what in ("heun", "dpm-solver-2s") else 1
    seen = []
    asked(what, grid=grid, nfe=4 * stages, observe=seen.append)
    level = level_of(0.3)
    t = torch.tensor(begin(PLAIN.schedule, level), dtype=torch.float64)
    assert len(seen) == 4 * stages and float(seen[0].t) == float(t) == level
    torch.testing.assert_close(seen[0].x, IMAGES + level * seeded_noise(SEEDS, (2, 2)))


@pytest.mark.parametrize("kind", [RectifiedFlow(3.0), DiscreteVP.scaled_linear(), DiscreteVP.scaled_linear().zero_terminal_snr()])
def test_other_laws(kind):
    model, seen = toy(kind), []
    asked(of=model, observe=seen.append)
    t = torch.tensor(begin(kind, level_of(0.3)), dtype=torch.float64)
    expected = kind.alpha(t).float() * IMAGES + kind.sigma(t).float() * seeded_noise(SEEDS, (2, 2))
    assert len(seen) == 4
    torch.testing.assert_close(seen[0].x, expected)


def test_a_sample_does_not_know_its_batch():
    both = asked()
    one = asked(x0=IMAGES[1:], seeds=SEEDS[1:])
    torch.testing.assert_close(one, both[1:])
    assert torch.equal(asked(x0=IMAGES[0]), asked(x0=IMAGES[:1].expand(2, -1, -1)))
    assert asked(x0=IMAGES.half()).dtype == torch.float32 and asked(x0=IMAGES.double()).dtype == torch.float64


def test_the_labels_are_those_of_the_seeds():
    model = toy(classes=2)
    assert not torch.equal(asked(of=model, seeds=[0, 1]), asked(of=model, seeds=[0, 1], cond=torch.tensor([1, 0])))


def test_a_bare_denoiser_knows_the_shape_by_its_images():
    made = sample(DENOISER, "unipc-2", nfe=5, seeds=[1, 2, 3], x0=torch.ones(3, 2), strength=0.5)
    assert made.shape == (3, 2)


def test_a_carried_or_fitted_sampler_goes_on_with_its_parent():
    x0 = torch.zeros(1, 8, 8)
    for what, grid in (("fitted", None), (None, None), ("unipc-2", "optimized"), (EDM.fitted(6), None)):
        seen = []
        made = sample(EDM, what, nfe=6, seeds=range(2), x0=x0, strength=0.3, grid=grid, observe=seen.append)
        assert len(seen) == 6 and float(seen[0].t) == level_of(0.3) and bool(made.isfinite().all())
    built = sampler_for(EDM, EDM.fitted(6), strength=0.3)
    assert isinstance(built, Sampler) and built.fingerprint == EDM.fitted(6).from_level(level_of(0.3)).fingerprint
    assert sampler_for(EDM, EDM.fitted(6), strength=1).fingerprint == EDM.fitted(6).fingerprint


def test_in_parallel():
    one = asked("unipc-2", nfe=8)
    torch.testing.assert_close(asked("unipc-2", nfe=8, parallel=ParallelConfig(tol=1e-6)), one, rtol=1e-4, atol=1e-4)


def test_strength_decides_how_much_stays():
    image = sample(EDM, "unipc-2", nfe=8, seeds=[3])[0]
    moved = [
        float((sample(EDM, "unipc-2", nfe=6, seeds=range(8), x0=image, strength=s) - image).square().mean().sqrt())
        for s in (0.1, 0.3, 0.6, 1.0)
    ]
    assert moved == sorted(moved) and moved[0] < 0.15 < moved[-1]


REFUSED = {
    "a start beside": (lambda: asked(x=IMAGES), ModelError, "x is the start itself, noise included: leave it out for image to image"),
    "a start beside a strength": (lambda: asked(x=IMAGES, x0=None), ModelError, "x is the start itself"),
    "no images": (lambda: asked(x0=None), ModelError, "a strength says how much noise images get: pass x0="),
    "no strength": (lambda: asked(strength=None), ModelError, "x0 are images to begin with: pass strength=, .* as strength=0.5"),
    "no seeds": (lambda: asked(seeds=None), ModelError, r"say which noise the images get: pass seeds=, .* seeds=range\(4\)"),
    "other seeds": (lambda: asked(seeds=[1, 2, 3]), ModelError, "3 seeds for 2 images: pass one for each, or a single image without"),
    "a batch of one": (lambda: asked(x0=IMAGES[:1]), ModelError, "2 seeds for 1 images"),
    "another size": (lambda: asked(x0=torch.zeros(2, 3, 2)), ModelError, r"clean images, \[B, 2, 2\], got shape \(2, 3, 2\)"),
    "more channels": (lambda: asked(x0=torch.zeros(2, 3, 2, 2)), ModelError, r"clean images, \[B, 2, 2\], got shape \(2, 3, 2, 2\)"),
    "one number": (lambda: asked(x0=torch.tensor(0.5)), ModelError, r"got shape \(\)"),
    "an array": (lambda: asked(x0=np.zeros((2, 2, 2))), ModelError, "a dense tensor .* in floating point, got ndarray"),
    "pixels": (lambda: asked(x0=torch.zeros(2, 2, 2, dtype=torch.uint8)), ModelError, "in floating point, got uint8"),
    "sparse images": (lambda: asked(x0=IMAGES.to_sparse()), ModelError, "a dense tensor"),
    "not finite": (lambda: asked(x0=IMAGES / 0), ModelError, "x0 has entries that are not finite"),
    "a strength of none": (lambda: asked(strength=0), GridError, "strength is the share of noise"),
    "a strength above all": (lambda: asked(strength=2), GridError, "above 0 and at most 1, got 2"),
    "a word": (lambda: asked(strength="strong"), GridError, "strength is a number"),
    "a level that is not there": (
        lambda: asked(strength=0.01),
        GridError,
        "no step begins at .* strengths above 0.04762 to 0.95",
    ),
    "a tableau": (
        lambda: asked(Sampler.build("ddim", "angle", PLAIN.schedule, nfe=4).tableau),
        SolverError,
        "numbers for its own levels alone, and begins nowhere else: pass a Sampler, or a solver's name",
    ),
    "a student": (
        lambda: asked(None, of=load_model(DSNO), x0=torch.zeros(1, 8, 8)),
        ModelError,
        "this student's jumps start at pure noise",
    ),
    "no shape": (lambda: asked(of=replace(PLAIN, shape=None), x0=IMAGES[0, 0, 0]), ModelError, r"clean images, \[B, \*D\], got shape \(\)"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.every(2)
def test_refused(case):
    ask, kind, says = REFUSED[case]
    with pytest.raises(kind, match=says):
        ask()


def test_a_network_of_whole_times_is_asked_at_those():
    asked_at = []

    class Net(nn.Module):
        def forward(self, x, t):
            asked_at.append(t)
            return torch.zeros_like(x)

    model = Model(Net().eval(), DiscreteVP.linear(), "epsilon", shape=(2, 2), time_dtype=torch.int64)
    for grid in ("uniform", "angle", "leading", "trailing", "karras"):
        asked(of=model, grid=grid)
    firsts = {int(t.flatten()[0]) for t in asked_at[::4]}
    assert firsts == {int(begin(model.schedule, level_of(0.3)))} and all(t.dtype == torch.int64 for t in asked_at)


# -- into a folder --------------------------------------------------------------------------------------------------------------------


def test_into_a_folder(tmp_path):
    problem, seeds = Problem(PLAIN), range(5)
    sampler = sampler_for(PLAIN, "unipc-2", nfe=4, strength=0.3)
    made = generate_to(tmp_path, problem, sampler, seeds, x0=IMAGES[0], batch=2)
    assert made is not None
    expected = sample(PLAIN, "unipc-2", nfe=4, seeds=seeds, x0=IMAGES[0], strength=0.3)
    torch.testing.assert_close(made[0], expected)
    again = generate_to(tmp_path, problem, sampler, seeds, x0=IMAGES[0], batch=2)
    assert again is not None and torch.equal(again[0], made[0])
    others = [(sampler, IMAGES[1]), (sampler, None), (sampler_for(PLAIN, "unipc-2", nfe=4, strength=0.4), IMAGES[0])]
    before = names(tmp_path)
    for other, image in others:
        with pytest.raises(ArtifactError, match="of another command"):
            generate_to(tmp_path, problem, other, seeds, x0=image, batch=2)
    assert names(tmp_path) == before


class ExactFlow(FlowMap):
    """The flow map of Gaussian data, which is known."""

    anywhere = True

    def __init__(self, exact: GaussianDenoiser) -> None:
        self.exact = exact

    @property
    def schedule(self):
        return self.exact.schedule

    def __call__(self, x, s, t, cond=None):
        return self.exact.flow(x, s, t)


@pytest.mark.parametrize("nfe", [1, 3])
def test_a_flow_map_that_starts_anywhere_begins_with_a_noised_image(nfe: int) -> None:
    exact = GaussianDenoiser(VPLinear(), torch.zeros(1, 2, 2, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    model = Model(torch.nn.Identity(), exact.schedule, "sample", shape=(1, 2, 2), flow_map=ExactFlow(exact))
    x0, seeds = torch.full((3, 1, 2, 2), 0.4, dtype=torch.float64), [5, 6, 7]
    made = sample(model, "ddim", nfe=nfe, seeds=seeds, x0=x0, strength=0.4)
    nodes = Sampler.build("ddim", "angle", exact.schedule, nfe=nfe, level=level_of(0.4)).tableau.nodes
    start = noised(x0, nodes, seeds)
    torch.testing.assert_close(made.double(), exact.flow(start.double(), nodes.t[0], nodes.t[-1]), rtol=1e-5, atol=1e-5)
