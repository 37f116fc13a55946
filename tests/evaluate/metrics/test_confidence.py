"""Intervals by resampling against what they estimate, and verdicts on two samplers."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep import FewstepError, VarianceExploding, make_grid, make_solver, sample
from fewstep.core.tableau import tabulate
from fewstep.evaluate.metrics.confidence import compare_errors, half_subsets, parted, rms, rmse_interval, sample_errors, subset_interval
from fewstep.evaluate.metrics.distances import Gaussian, rmse
from fewstep.models.analytic import MixtureDenoiser
from fewstep.sampling.noise import seeded_noise
from fewstep.sampling.reference import reference_sampler

LAW, SHAPE, COUNT = VarianceExploding(), (1, 2, 2), 1024


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_errors_of_samples_make_the_rmse() -> None:
    a, b = drawn(50, 1, 3, 3), drawn(50, 1, 3, 3, seed=1)
    errors = sample_errors(a, b)
    assert errors.shape == (50,) and float(errors[7]) == pytest.approx(float((a[7] - b[7]).norm()) / 3)
    assert rms(errors) == pytest.approx(rmse(a, b), rel=1e-12)


def test_samples_that_part_have_more_than_three_times_the_median() -> None:
    errors = torch.tensor([1.0, 0.5, 2.0, 3.0, 3.1, 1.0, 0.7, 9.0])  # the median is 1.5
    assert parted(errors) == 1 / 8 and parted(7 * errors) == 1 / 8
    assert parted(torch.zeros(4)) == 0


def test_the_interval_of_the_rmse_holds_it_nineteen_times_of_twenty() -> None:
    errors = drawn(200, 256).abs()
    intervals = torch.tensor([rmse_interval(one) for one in errors])
    held = ((intervals[:, 0] <= 1) & (intervals[:, 1] >= 1)).double().mean()
    assert 0.90 <= held <= 0.98  # 0.95 +- two standard deviations of 200 draws, less what 256 samples leave
    normal = 2 * 1.96 * 0.5 * 2**0.5 / 256**0.5  # the delta method's width
    assert float((intervals[:, 1] - intervals[:, 0]).mean()) == pytest.approx(normal, rel=0.05)


@pytest.mark.slow
def test_intervals_are_the_same_each_time_and_leave_the_global_generator_alone() -> None:
    errors, state = drawn(COUNT).abs(), torch.random.get_rng_state()
    first = rmse_interval(errors)
    assert rmse_interval(errors) == first and compare_errors(errors, errors.flip(0)) == compare_errors(errors, errors.flip(0))
    assert torch.equal(torch.random.get_rng_state(), state)
    many = drawn(20_000).abs()  # in blocks
    assert rmse_interval(many)[0] < rms(many) < rmse_interval(many)[1]


def test_halves_have_half_of_each_label() -> None:
    labels = torch.arange(100) % 5
    halves = half_subsets(100, 20, labels)
    assert halves.shape == (20, 50) and all(len(one.unique()) == 50 for one in halves)
    assert all(torch.equal(labels[one].bincount(), torch.full((5,), 10)) for one in halves)
    assert half_subsets(7, 3).shape == (3, 3) and not torch.equal(*half_subsets(100, 2))


@pytest.mark.parametrize("shift", [0.1, 0.4])
@pytest.mark.every(2)
def test_the_interval_of_a_frechet_distance_is_as_wide_as_it_scatters(shift: float) -> None:
    data = Gaussian.of(drawn(2000, 4))
    values, widths, held = [], [], []
    for seed in range(60):
        features = drawn(200, 4, seed=seed + 1) + shift
        values.append(data.distance(features))
        halves = torch.tensor([data.distance(features[index]) for index in half_subsets(200, 50)])
        low, high = subset_interval(values[-1], halves)
        widths.append(high - low)
        held.append((low, high))
    mean, spread = sum(values) / 60, float(torch.tensor(values).std())
    assert 0.8 < sum(widths) / 60 / (2 * 1.96 * spread) < 2.0  # too wide where the distance is nearly all bias (shift 0.1)
    assert sum(low <= mean <= high for low, high in held) >= 53


# -- verdicts -----------------------------------------------------------------------------------------------------------


def start() -> Tensor:
    return seeded_noise(range(COUNT), SHAPE).double() * 80


def mixture() -> MixtureDenoiser:
    return MixtureDenoiser(LAW, seeded_noise(range(2), SHAPE).double(), torch.full((2,), 0.3, dtype=torch.float64))


@functools.cache
def exact_ends() -> Tensor:
    return sample(mixture(), reference_sampler(LAW), start())


def ends(solver: str, steps: int, wrong: float = 0.0) -> Tensor:
    """Errors of a solver on a mixture of two; ``wrong`` is a relative error of the newest answer's weight in the last step but two."""
    method = make_solver(solver)
    tableau = tabulate(method, method.nodes(make_grid("karras", LAW, steps), LAW))
    update = tableau.update.clone()
    update[-3, 1, 2] *= 1 + wrong
    if torch.equal(tableau.update[:, 0], tableau.update[:, 1]):  # the anchor is the state
        update[-3, 0] = update[-3, 1]
    return sample_errors(sample(mixture(), replace(tableau, update=update), start()), exact_ends())


@pytest.mark.parametrize(("solver", "steps"), [("dpm-solver-pp-2m", 20), ("unipc-2", 40), ("unipc-3", 40)])
@pytest.mark.every(3)
def test_a_wrong_coefficient_is_caught_and_a_second_run_is_not(solver: str, steps: int) -> None:
    right = ends(solver, steps)
    assert compare_errors(ends(solver, steps), right) == ("equal", 0.0, 0.0, 0.0)
    wrong = compare_errors(ends(solver, steps, wrong=0.01), right)
    assert wrong.verdict == "worse" and 0 < wrong.low <= wrong.difference <= wrong.high
    assert compare_errors(right, ends(solver, steps, wrong=0.01)).verdict == "better"


def test_a_wrong_coefficient_of_a_coarse_solver_is_seen_even_where_it_happens_to_help() -> None:
    """DDIM's steps fall short of the image, so one that goes 1 % farther lands nearer: a verdict is on the result, not on the formula."""
    assert compare_errors(ends("ddim", 20, wrong=0.01), ends("ddim", 20)).verdict == "better"
    assert compare_errors(ends("ddim", 20, wrong=-0.01), ends("ddim", 20)).verdict == "worse"


def test_rounding_is_equal_and_pairing_sees_what_two_intervals_do_not() -> None:
    errors = drawn(COUNT).exp()
    assert compare_errors(errors * (1 + 1e-6), errors).verdict == "equal"
    better = errors * 0.98
    assert compare_errors(better, errors).verdict == "better" and rmse_interval(better)[1] > rmse_interval(errors)[0]
    assert compare_errors(errors, errors[torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))]).verdict == "equal"


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(FewstepError, match="same noises"):
        compare_errors(torch.ones(4), torch.ones(5))
    with pytest.raises(FewstepError, match="failed"):
        compare_errors(torch.ones(4), torch.full((4,), torch.nan))
