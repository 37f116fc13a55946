"""Reflected models: the mirrored denoiser, exact atoms by every kind of solver, guidance, sampling, and what cannot be right with one."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.problems import MEASURED, WALLS, reflected_model
from torch import Tensor

import fewstep
from fewstep import (
    Cube,
    FewstepError,
    Model,
    ModelError,
    ParallelConfig,
    RectifiedFlow,
    Sampler,
    SolverError,
    Splitting,
    classifier_free,
    classifier_guided,
    dynamic_threshold,
    parareal,
    sample,
    sample_split,
    static_threshold,
    steps,
)
from fewstep.core.prediction import Measured
from fewstep.integrations.exports import export
from fewstep.inverse.error_spectra import error_spectra
from fewstep.models.generate import default_grid
from fewstep.models.problem import Problem
from fewstep.models.reflected import Reflected
from fewstep.sampling.loop import run

CUBE = Cube()
CENTRES, MASSES, SPREAD = (-0.9, -0.4, 0.9), (0.5, 0.3, 0.2), 0.04
NULL = 3
FOLDED = 1e-6  # of float32 states up to 9


class Atoms:
    """Three atoms of a little spread and all their mirror images, exactly: the mean image that a state came from.

    The condition is an atom, or the null label for all of them.
    """

    schedule = WALLS

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        turns = 4.0 * torch.arange(-3, 4, dtype=x.dtype)
        centre = torch.tensor(CENTRES, dtype=x.dtype)[:, None]
        images, variance = torch.cat([centre + turns, 2 - centre + turns], 1), t**2 + SPREAD**2
        weight = torch.tensor(MASSES, dtype=x.dtype).log()[:, None].expand(images.shape)
        if cond is not None:
            wanted = (cond.reshape(-1, 1, 1) == torch.arange(3)[:, None]) | (cond.reshape(-1, 1, 1) == NULL)
            weight = torch.where(wanted, weight, -torch.inf)
        weight = weight.reshape(-1, images.numel()) - (x - images.flatten()).square() / (2 * variance)
        mean = (torch.softmax(weight, 1) * images.flatten()).sum(1, keepdim=True)
        return x + t**2 / variance * (mean - x)


EXACT = Reflected(Atoms())


def spread_evenly(count: int) -> Tensor:
    """Starts ``[count, 1]`` of the uniform law, which is that of the largest level."""
    return (2 * torch.arange(count, dtype=torch.float64)[:, None] + 1) / count - 1


def last(denoiser: Any, solver: str, nfe: int, x: Tensor, cond: Tensor | None = None, grid: str = "karras") -> tuple[Tensor, float]:
    """The samples, and the share of them that lay outside before the last fold."""
    states: list[Tensor] = []
    tableau = Sampler.build(solver, grid, WALLS, nfe=nfe).tableau
    made = run(denoiser, tableau, x, cond, observe=lambda step: states.append(step.x_next))
    assert torch.equal(made, CUBE.fold(states[-1])[0])
    return made, CUBE.outside(states[-1])


def shares(samples: Tensor) -> Tensor:
    nearest = (samples - torch.tensor(CENTRES, dtype=samples.dtype)).abs().argmin(1)
    return torch.stack([(nearest == k).double().mean() for k in range(3)])


@pytest.mark.parametrize(("nfe", "close"), [(25, 1e-3), pytest.param(100, 1e-4, marks=pytest.mark.slow)])
def test_the_masses_of_atoms_are_recovered(nfe: int, close: float) -> None:
    made, outside = last(EXACT, "unipc-2", nfe, spread_evenly(4000))
    assert (shares(made) - torch.tensor(MASSES, dtype=torch.float64)).abs().max() <= close and outside == 0


@pytest.mark.parametrize("scale", [2.0, 5.0, 15.0])
@pytest.mark.every(3)
def test_the_exact_guided_flow_stays_inside_at_any_scale(scale: float) -> None:
    guided = classifier_free(EXACT, scale, torch.tensor(NULL))
    made, outside = last(guided, "unipc-2", 200, spread_evenly(400), torch.zeros(400, dtype=torch.int64))
    assert outside == 0 and (made - CENTRES[0]).abs().max() < 0.2


@pytest.mark.slow
def test_solvers_have_their_order_on_a_mirrored_denoiser() -> None:
    x = spread_evenly(100)
    exact, _ = last(EXACT, "unipc-3", 600, x)
    for solver, least in (("ddim", 0.9), ("unipc-2", 1.8)):
        errors = [float((last(EXACT, solver, nfe, x)[0] - exact).abs().median()) for nfe in (100, 200)]
        assert math.log2(errors[0] / errors[1]) > least


def test_first_order_steps_may_fold_the_state_instead() -> None:
    x, tableau = spread_evenly(400), Sampler.build("ddim", "karras", WALLS, nfe=20).tableau
    folded = x
    for step in steps(Atoms(), tableau, x, edit=lambda step: CUBE.fold(step.x_next)[0]):
        folded = step.x_next
    torch.testing.assert_close(run(EXACT, tableau, x), folded, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mirrored_denoiser_has_the_symmetries_of_the_walls(dtype: torch.dtype) -> None:
    class Rough:
        schedule = WALLS

        def __call__(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
            return torch.sin(3 * x + t.to(x.dtype)) + 0.2 * x**2

    reflected, t = Reflected(Rough()), torch.tensor(0.7, dtype=torch.float64)
    x = 3 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    inside, tolerance = CUBE.fold(x)[0], 4 * FOLDED if dtype is torch.float32 else 1e-12
    torch.testing.assert_close(reflected(x + 4, t), reflected(x, t) + 4, rtol=0, atol=tolerance)
    torch.testing.assert_close(reflected(2 - x, t), 2 - reflected(x, t), rtol=0, atol=tolerance)
    assert torch.equal(reflected(inside, t), Rough()(inside, t))


def test_guidance_inside_and_outside_the_mirror_is_the_same() -> None:
    x = 3 * torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, cond = torch.tensor(0.4, dtype=torch.float64), torch.arange(50) % 3
    within = Reflected(classifier_free(Atoms(), 4.0, torch.tensor(NULL)))
    around = classifier_free(EXACT, 4.0, torch.tensor(NULL))
    torch.testing.assert_close(within(x, t, cond), around(x, t, cond), rtol=0, atol=1e-12)
    assert around.domain == CUBE  # type: ignore[attr-defined]


# -- models -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return reflected_model()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_samples_lie_in_the_cube_by_construction(model: Model, guidance: float) -> None:
    """Of an untrained network, too."""
    states: list[Tensor] = []
    made = sample(model, "unipc-2", nfe=5, seeds=range(6), guidance=guidance, observe=lambda step: states.append(step.x))
    assert float(made.abs().max()) <= 1 and float(states[0].abs().max()) <= 1
    again = sample(model, "unipc-2", nfe=5, seeds=range(3, 6), guidance=guidance)
    torch.testing.assert_close(again, made[3:], rtol=0, atol=1e-4)


def test_every_way_to_sample_folds(model: Model, tmp_path: Any) -> None:
    made = sample(model, "ddim", nfe=4, seeds=range(2))
    problem, tableau = Problem(model), Sampler.build("ddim", "karras", WALLS, nfe=4).tableau
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(run(problem.denoiser, tableau, problem.start([0, 1]), problem.cond([0, 1])), made, **close)
    in_parallel = sample(model, "ddim", nfe=4, seeds=range(2), parallel=ParallelConfig(tol=1e-6))
    torch.testing.assert_close(in_parallel, made, **close)
    fine, coarse = (Sampler.build("ddim", "karras", WALLS, nfe=nfe) for nfe in (4, 1))
    torch.testing.assert_close(parareal(model, fine, coarse, problem.start([0, 1]), problem.cond([0, 1]), tol=0), made, **close)
    free = sample(replace(model, domain=None), "ddim", nfe=4, grid="karras", seeds=range(2))
    assert float(free.abs().max()) > 1  # which is what they are kept from


def test_image_to_image_begins_and_ends_in_the_cube(model: Model) -> None:
    x0 = torch.rand(1, 8, 8) * 2 - 1
    made = sample(model, "ddim", nfe=3, seeds=range(2), x0=x0, strength=0.5)
    assert float(made.abs().max()) <= 1
    with pytest.raises(FewstepError, match=r"the images x0 lie in \[.*the cube is \[-1, 1\]"):
        sample(model, "ddim", nfe=3, seeds=range(2), x0=3 * x0, strength=0.5)
    with pytest.raises(FewstepError, match="the images to begin with lie in"):
        Problem(model).start([0], x0=3 * x0)


def test_the_grid_where_none_is_named(model: Model) -> None:
    assert default_grid(model) == default_grid(EXACT) == "karras" and default_grid(replace(model, domain=None)) == "angle"


def test_a_reflected_model_is_told_from_the_same_network_without_walls(model: Model) -> None:
    others = [replace(model, domain=None), replace(model, domain=Cube(-1.2, 1.2)), replace(model, prediction=Measured(MEASURED[1:]))]
    assert len({one.fingerprint for one in (model, *others)}) == 4
    assert model.fingerprint == reflected_model().fingerprint and "reflected in [-1, 1]" in repr(model)


def test_an_own_denoiser_is_sampled_from_a_start() -> None:
    made = sample(EXACT, "ddim", 9 * torch.randn(40, 1, dtype=torch.float64), nfe=10)
    assert float(made.abs().max()) <= 1


# -- what cannot be ------------------------------------------------------------------------------------------------------


def test_other_laws_and_no_cubes_are_refused(model: Model) -> None:
    for change, says in (
        ({"schedule": RectifiedFlow()}, "has a domain, whose walls stand still only where noise is added"),
        ({"domain": fewstep.Cube(0, 100)}, "too little to leave nothing of an image in a cube of edge 100: scale t_max .* as t_max=150"),
        ({"domain": (-1, 1)}, "domain is the cube that a reflected model was trained in"),
    ):
        with pytest.raises(ModelError, match=says):
            replace(model, **change)
    with pytest.raises(ModelError, match="is reflected already"):
        Reflected(EXACT)
    with pytest.raises(ModelError, match="has noise up to t_max=3, too little"):
        Reflected(Atoms(), fewstep.Cube(-5, 5))
    with pytest.raises(ModelError, match=r"is a fewstep.Cube, as fewstep.Cube\(-1, 1\)"):
        Reflected(Atoms(), (-1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(("times", "level"), [((80.0, 1.0, 0.01), "80"), ((3.0, 0.002, 0.001), "0.002")])
def test_levels_that_it_was_not_trained_at_are_refused(model: Model, times: Sequence[float], level: str) -> None:
    with pytest.raises(ModelError, match=f"of noise levels 0.01 to 3, and is asked at {level}: use a grid of its own"):
        sample(model, "ddim", grid=fewstep.TimeGrid(list(times)), seeds=range(2))


def test_what_knows_nothing_of_walls_is_refused(model: Model, tmp_path: Any) -> None:
    def log_prob(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return -x.flatten(1).square().sum(1)

    x, sampler = torch.zeros(2, 1, 8, 8), Sampler.build("ddim", "karras", WALLS, nfe=3)
    refused = {
        "its samples lie in the cube already": [lambda: static_threshold(model), lambda: dynamic_threshold(model.guided(2.0))],
        "use classifier-free guidance": [
            lambda: classifier_guided(model, log_prob, 1.0),
            lambda: sample_split(model, sampler, x, log_prob, 1.0, splitting=Splitting()),
        ],
        "leave rescale out": [lambda: classifier_free(model, 2.0, torch.tensor(3), rescale=0.5)],
        "take an ordinary model": [
            lambda: fewstep.restore(model, lambda image: image, x, 0.1),
            lambda: fewstep.measured(model, lambda image: image, x, 0.1),
            lambda: error_spectra(model, (1, 8, 8)),
            lambda: fewstep.deblur_blind(model, x, 0.1, (3, 3)),
        ],
        "make a sampler of it with fewstep fit": [
            lambda: fewstep.distill(model, "guided"),
            lambda: fewstep.distill(model, "flow-map", out=tmp_path / "map"),
            lambda: fewstep.finetune(model, nfe=4),
        ],
    }
    for says, calls in refused.items():
        for call in calls:
            with pytest.raises(ModelError, match=f"is not for a reflected model.*{says}"):
                call()
    assert not list(tmp_path.iterdir())


def test_a_sampler_that_was_made_for_it_does_not_leave_this_library(model: Model) -> None:
    sampler = Sampler.build("ddim", "karras", WALLS, nfe=3).with_card(**Problem(model).card())
    with pytest.raises(SolverError, match="would not fold into their cube: use fewstep.sample"):
        export(sampler, "sigmas")
