"""Restorations that begin at an estimate: its formula, contraction, rehearsals, and refusals."""

import math

import pytest
import torch

import fewstep
from fewstep import GridError, ModelError, restore, seeded_noise
from fewstep.inverse.measurements import Average, CircularBlur, Mask, Nonlinear
from fewstep.inverse.start import choose_start, pseudo_inverse
from fewstep.sampling.loop import run
from fewstep.sampling.sampler import Sampler
from fewstep.sampling.start import level_of, noised

Y = torch.linspace(-1, 1, 16).reshape(1, 4, 4)


@pytest.fixture(scope="module")
def model() -> fewstep.Model:
    return fewstep.load_model("digits-edm")


def test_the_pseudo_inverse_is_the_mean_of_white_images() -> None:
    a, noise, spread = Average(2), 0.1, 0.5
    y = seeded_noise(range(2), (1, 2, 2))
    matrix = a(torch.eye(16).reshape(16, 1, 4, 4)).flatten(1).T
    wanted = spread**2 * matrix.T @ torch.linalg.solve(spread**2 * matrix @ matrix.T + noise**2 * torch.eye(4), y.flatten(1).T)
    torch.testing.assert_close(pseudo_inverse(a, y, noise, (1, 4, 4)).flatten(1), wanted.T)
    by_function = pseudo_inverse(Nonlinear(lambda x0: a(x0)), y, noise, (1, 4, 4))
    torch.testing.assert_close(by_function.flatten(1), wanted.T, rtol=1e-4, atol=1e-5)
    exact = pseudo_inverse(a, y, 0.0, (1, 4, 4))
    torch.testing.assert_close(a(exact), y)


@pytest.mark.slow
def test_what_a_start_leaves_falls_with_the_level(model: fewstep.Model) -> None:
    """A white difference of starts contracts: strictly, to less than a tenth from the top of the levels."""
    clean = fewstep.sample(model, "ddim", nfe=8, seeds=range(16))
    apart, cond, left = 0.1 * seeded_noise(range(16), (1, 8, 8), stream=5), torch.arange(16) % 10, list[float]()
    for level in (0.05, 0.2, 0.8, 3.2, 20.0):
        sampler = Sampler.build("ddim", "karras", model.schedule, nfe=10, level=level)
        ends = [run(model, sampler.tableau, noised(x0, sampler.tableau.nodes, range(16)), cond) for x0 in (clean, clean + apart)]
        left.append(float((ends[1] - ends[0]).square().mean().sqrt() / apart.square().mean().sqrt()))
    assert all(later < earlier for earlier, later in zip(left, left[1:], strict=False)) and left[-1] < 0.1, left


def test_a_restoration_from_an_estimate(model: fewstep.Model) -> None:
    """A start near the truth stays near it, from a low level more than from a high one; strength 1 is from noise."""
    truth = fewstep.sample(model, "ddim", nfe=8, seeds=[3])[0]
    y = Average(4)(truth[None])[0]
    off = [
        float((restore(model, Average(4), y, 0.05, strength=one, estimate=truth, seeds=range(3)).mean - truth).square().mean())
        for one in (0.2, 0.9)
    ]
    assert off[0] < off[1] < float((restore(model, Average(4), y, 0.05, seeds=range(3)).mean - truth).square().mean()) + 0.1
    one, two = (restore(model, Average(2), Y, 0.05, seeds=[0], strength=share).samples for share in (1, None))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    found = restore(model, Average(2), Y, 0.05, seeds=[0], strength=0.5)
    assert found.card["strength"] == 0.5 and found.card["evaluations"] == 10 and "noise levels 1 to" in found.card["sampler"]
    as_function = restore(
        model, Average(2), Y, 0.05, seeds=[0], strength=0.5, estimate=lambda y: pseudo_inverse(Average(2), y, 0.05, (1, 8, 8))
    )
    torch.testing.assert_close(found.samples, as_function.samples, rtol=0, atol=0)


def test_a_rehearsal_takes_the_best_of_two(model: fewstep.Model) -> None:
    choice = choose_start(model, CircularBlur(torch.ones(3, 3) / 9), 0.05, num=4, strengths=(0.1, 1.0))
    assert set(choice.errors) == {0.1, 1.0} and choice.errors[choice.strength] == min(choice.errors.values())
    assert choice.level == level_of(choice.strength) and (choice.num, choice.nfe) == (4, 10)


@pytest.mark.slow
def test_a_rehearsal_takes_the_best_of_what_it_tried(model: fewstep.Model) -> None:
    blur = CircularBlur(torch.ones(3, 3) / 9)
    choice = choose_start(model, blur, 0.05, num=8, strengths=(0.1, 0.5, 1.0))
    assert set(choice.errors) == {0.1, 0.5, 1.0} and choice.errors[choice.strength] == min(choice.errors.values())
    assert choice.level == level_of(choice.strength) and (choice.num, choice.nfe) == (8, 10)
    again = choose_start(model, blur, 0.05, num=8, strengths=(1.0, 0.5, 0.1))
    assert dict(again.errors) == dict(choice.errors)
    most_noise = choose_start(
        model, blur, 0.05, num=4, strengths=(0.1, 1.0), metric=lambda made, true: -(made - true).flatten(1).norm(dim=1)
    )
    assert most_noise.errors[most_noise.strength] <= 0
    few = torch.zeros(1, 8, 8)
    few[:, ::3, ::3] = 1
    assert choose_start(model, Mask(few), 0.05, num=16, strengths=(0.05, 0.7)).strength == 0.7  # that estimate is far from any image
    rehearsed = restore(model, Average(2), Y, 0.05, seeds=[0], strength="rehearse")
    assert rehearsed.card.get("strength", 1) in fewstep.inverse.start.STRENGTHS
    assert rehearsed.card["evaluations before"] == 16 * (20 + 10 * len(fewstep.inverse.start.STRENGTHS))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"strength": 0}, GridError, "above 0"),
        ({"strength": 1.5}, GridError, "at most 1"),
        ({"strength": "much"}, ModelError, "rehearse"),
        ({"strength": 1e-6}, GridError, "no step begins"),
        ({"estimate": torch.zeros(1, 8, 8)}, ModelError, "pass strength="),
        ({"strength": 0.5, "estimate": torch.zeros(1, 4, 4)}, ModelError, "images of shape"),
        ({"strength": 0.5, "estimate": torch.full((1, 8, 8), math.nan)}, ModelError, "not finite"),
        ({"strength": 0.5, "estimate": lambda y: y}, ModelError, "images of shape"),
        ({"strength": 0.5, "estimate": "zeros"}, ModelError, "a function"),
        ({"strength": "rehearse", "estimate": torch.zeros(1, 8, 8)}, ModelError, "as a function"),
        ({"strength": "rehearse", "seeds": [0, 1], "cond": torch.tensor([3, 7])}, ModelError, "several"),
        ({"strength": True}, GridError, "a number"),
    ],
)
def test_refusals(model: fewstep.Model, options: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        restore(model, Average(2), Y, 0.05, **options)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"num": 0}, ModelError, "from 1"),
        ({"strengths": ()}, GridError, "one strength or more"),
        ({"strengths": (0.0,)}, GridError, "above 0"),
        ({"metric": lambda made, true: made[:, 0, 0, 0] * math.nan}, fewstep.FewstepError, "finite number"),
        ({"metric": lambda made, true: made}, ModelError, "one number for each"),
        ({"metric": 3}, ModelError, "a function"),
        ({"strengths": 0.3}, GridError, "one strength or more"),
        ({"strengths": "abc"}, GridError, "one strength or more"),
        ({"strengths": ("x",)}, GridError, "a number"),
        ({"noise": None}, ModelError, "noise=0.05"),
        ({"nfe": 9}, fewstep.SolverError, "multiple of 2"),
    ],
)
@pytest.mark.every(5)
def test_refusals_of_rehearsals(model: fewstep.Model, options: dict, error: type[Exception], said: str) -> None:
    asked = {"noise": 0.05, "num": 2, **options}
    with pytest.raises(error, match=said):
        choose_start(model, Average(2), **asked)
