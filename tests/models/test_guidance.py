"""Guidance and thresholding by their definitions, on denoisers whose answers are plain to see."""

import math

import pytest
import torch
from torch import Tensor

from fewstep import (
    MixtureDenoiser,
    ModelError,
    VarianceExploding,
    VPLinear,
    classifier_free,
    classifier_guided,
    dynamic_threshold,
    static_threshold,
)

SCHEDULE = VarianceExploding()


class ByLabel:
    """Answers ``label`` everywhere, plus a tenth of the state; counts the samples it is shown."""

    schedule = SCHEDULE

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.seen += len(x)
        assert cond is not None
        return cond.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1)) + 0.1 * x


X, T, LABELS = torch.randn(3, 1, 4, 4).double(), torch.tensor(2.0).double(), torch.tensor([1, 2, 3])


def test_classifier_free_extrapolates_from_the_null_label() -> None:
    guided = classifier_free(ByLabel(), 2.5, torch.tensor(-1))
    expected = (-1 + 2.5 * (LABELS + 1)).double().reshape(3, 1, 1, 1) + 0.1 * X
    torch.testing.assert_close(guided(X, T, LABELS), expected)


def test_scale_one_and_levels_outside_the_interval_cost_one_evaluation() -> None:
    for scale, interval in ((1.0, (0.0, math.inf)), (3.0, (0.1, 1.0))):
        inner = ByLabel()
        torch.testing.assert_close(
            classifier_free(inner, scale, torch.tensor(-1), interval=interval)(X, T, LABELS), ByLabel()(X, T, LABELS)
        )
        assert inner.seen == len(X)


def test_the_interval_holds_per_sample_when_times_differ() -> None:
    guided = classifier_free(ByLabel(), 3.0, torch.tensor(0), interval=(1.0, 10.0))
    t = torch.tensor([0.5, 2.0, 20.0]).double()
    expected = (torch.tensor([1.0, 6.0, 3.0]).double()).reshape(3, 1, 1, 1) + 0.1 * X
    torch.testing.assert_close(guided(X, t, LABELS), expected)


def test_full_rescale_restores_the_standard_deviation_of_the_conditional_answer() -> None:
    inner = ByLabel()
    inner.__class__ = type("Noisy", (ByLabel,), {"__call__": lambda self, x, t, cond=None: x * cond.reshape(-1, 1, 1, 1)})
    plain, rescaled = (classifier_free(inner, 4.0, torch.tensor(0), rescale=r)(X, T, LABELS) for r in (0.0, 1.0))
    wanted = (X * LABELS.reshape(-1, 1, 1, 1)).std((1, 2, 3))
    torch.testing.assert_close(rescaled.std((1, 2, 3)), wanted)
    assert bool((plain.std((1, 2, 3)) > 2 * wanted).all())


def test_conditions_may_be_dictionaries() -> None:
    class Dictionary:
        schedule = SCHEDULE

        def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
            assert cond is not None
            return ByLabel()(x, t, cond["label"])

    guided = classifier_free(Dictionary(), 2.0, {"label": torch.tensor(0), "option": 3})
    torch.testing.assert_close(guided(X, T, {"label": LABELS, "option": 3}), 2.0 * LABELS.double().reshape(3, 1, 1, 1) + 0.1 * X)


def test_exact_classifier_gradient_turns_the_mixture_into_its_component() -> None:
    schedule = VPLinear()
    means, stds = torch.tensor([[-1.0, 0.0], [1.0, 0.5]]).double(), torch.tensor([0.4, 0.4]).double()
    mixture = MixtureDenoiser(schedule, means, stds)
    component = MixtureDenoiser(schedule, means[1:], stds[1:])

    def log_prob(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        variance = (schedule.alpha(t) * stds[0]) ** 2 + schedule.sigma(t) ** 2
        logits = -((x[:, None] - schedule.alpha(t) * means) ** 2).sum(-1) / (2 * variance)
        return torch.log_softmax(logits, 1).gather(1, cond[:, None])[:, 0]

    x, t = torch.randn(5, 2).double(), torch.tensor(0.5).double()
    guided = classifier_guided(mixture, log_prob, 1.0)(x, t, torch.ones(5, dtype=torch.long))
    torch.testing.assert_close(guided, component(x, t), rtol=1e-10, atol=1e-10)


def test_thresholds() -> None:
    wide = classifier_free(ByLabel(), 1.0, torch.tensor(0))
    assert float(static_threshold(wide, 1.5)(X, T, LABELS).abs().max()) <= 1.5
    x0, clipped = wide(X, T, LABELS), dynamic_threshold(wide, 1.0)(X, T, LABELS)
    largest = x0.flatten(1).abs().amax(1).reshape(3, 1, 1, 1).clamp_min(1.0)
    torch.testing.assert_close(clipped, x0 / largest)
    small = static_threshold(wide, 0.5)
    torch.testing.assert_close(dynamic_threshold(small)(X, T, LABELS), small(X, T, LABELS))  # within the bound: left alone


@pytest.mark.parametrize(
    "make",
    [
        lambda: classifier_free(ByLabel(), 2.0, torch.tensor(0), rescale=2.0),
        lambda: classifier_free(ByLabel(), 2.0, torch.tensor(0), interval=(1.0, 1.0)),
        lambda: classifier_free(ByLabel(), 2.0, torch.tensor(0))(X, T, None),
        lambda: classifier_free(ByLabel(), 2.0, None)(X, T, LABELS),
        lambda: classifier_free(ByLabel(), 2.0, torch.zeros(2))(X, T, LABELS),
        lambda: classifier_free(ByLabel(), 2.0, {"other": 0})(X, T, {"label": LABELS}),
        lambda: static_threshold(ByLabel(), 0.0),
        lambda: dynamic_threshold(ByLabel(), 1.5),
    ],
)
def test_nonsense_is_refused(make: object) -> None:
    with pytest.raises(ModelError):
        make()
