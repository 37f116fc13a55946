"""A first answer is learned: the means and the linear map that there are, nothing that is chance, and none from too few."""

import pytest
import torch
from torch import Tensor

from fewstep import FewstepError
from fewstep.core.first_answer import from_waves, waves
from fewstep.learn.search.foresee import Foreseeing, learn_first_answer

SHAPE, NUM = (2, 4, 3), 600


def answers(classes: int, gain: float, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    z, left = torch.randn(2, NUM, *SHAPE, generator=draws)
    mean, response = torch.randn(classes, *SHAPE, generator=draws), gain * torch.randn(12, 2, 2, generator=draws)
    labels = torch.arange(NUM) % classes
    made = mean[labels] + from_waves(torch.einsum("fcd,bdf->bcf", response, waves(z)), SHAPE) + noise * left
    return z, made, labels, mean, response


@pytest.mark.parametrize("classes", [None, 3])
def test_it_finds_means_and_matrices(classes: int | None) -> None:
    z, made, labels, mean, response = answers(classes or 1, 0.3, 1e-3)
    found = learn_first_answer(z.split(128), made.split(128), labels.split(128), classes)
    assert found.labelled == (classes is not None)
    torch.testing.assert_close(found.mean, mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.response, response, rtol=1e-3, atol=1e-3)
    assert float((found(z, labels if classes else None) - made).square().mean().sqrt()) < 1.1e-3


def test_what_is_chance_is_shrunk() -> None:
    z, made, labels, _, _ = answers(2, 0.0, 1.0)
    found = learn_first_answer([z], [made], [labels], 2)
    plain = torch.einsum("bcf,bdf->fcd", waves(made), waves(z)) / NUM  # what least squares finds, about
    assert float(found.response.square().sum()) < 0.5 * float(plain.square().sum())


def test_too_few_answers_are_refused() -> None:
    z, made, labels, _, _ = answers(3, 0.3, 0.1)
    for count, classes, says in ((20, 3, "each of 3 classes, got 20 in all, and 6 of one"), (600, 4, "and 0 of one")):
        with pytest.raises(FewstepError, match=says):
            learn_first_answer([z[:count]], [made[:count]], [labels[:count]], classes)


def test_only_its_time_is_foreseen() -> None:
    z, made, labels, _, _ = answers(2, 0.3, 0.1)
    first = learn_first_answer([z], [made], [labels], 2)
    foreseeing = Foreseeing(lambda x, t, cond=None: 7 * x, first, 80.0, 80.0)  # type: ignore[arg-type]
    at = lambda t: foreseeing(80 * z[:3], torch.tensor(t, dtype=torch.float64), labels[:3])  # noqa: E731
    torch.testing.assert_close(at(80.0), first(z[:3], labels[:3]))
    torch.testing.assert_close(at(79.0), 7 * (80 * z[:3]))
