"""Measure how certain a number is: errors of single samples, intervals by resampling them, and a verdict on two samplers."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.runtime.errors import FewstepError

__all__ = [
    "PARTED",
    "ErrorComparison",
    "compare_errors",
    "half_subsets",
    "parted",
    "rms",
    "rmse_interval",
    "sample_errors",
    "subset_interval",
]

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0  # of every resampling, so that the same samples always give the same interval
BLOCK = 2**22  # numbers in memory at once
PARTED = 3  # medians: a sample with a larger error left its trajectory, unlike most
ROUNDING = 1e-4  # relative differences of RMSE below this are equal: what float32 arithmetic in another order can do


class ErrorComparison(NamedTuple):
    """The verdict on the first of two samplers, ``better``, ``worse`` or ``equal``; the difference of their RMSE and its interval."""

    verdict: Literal["better", "worse", "equal"]
    difference: float
    low: float
    high: float


def sample_errors(samples: Tensor, exact: Tensor) -> Tensor:
    """Return the root mean square of ``samples - exact`` over the elements of each sample, ``[B, *D] -> [B]`` float64."""
    return (samples.double() - exact.double()).square().flatten(1).mean(1).sqrt()


def rms(errors: Tensor) -> float:
    """Return the root mean square of errors ``[B]``: the RMSE, if they are those of `sample_errors`."""
    return float(errors.double().square().mean().sqrt())


def parted(errors: Tensor) -> float:
    """Return the share of samples that part from their trajectory: those with an error ``[B]`` above three times the median."""
    return float((errors > PARTED * errors.quantile(0.5)).double().mean())


def rmse_interval(errors: Tensor) -> list[float]:
    """Return the central 95 % of the RMSE over 1000 resamples of the samples, from their errors ``[B]`` (the percentile bootstrap of
    Efron, Annals of Statistics 7, 1979).
    """
    return _central(_resampled_means(errors.double().square()).sqrt())


def compare_errors(a_errors: Tensor, b_errors: Tensor) -> ErrorComparison:
    """Compare two samplers by their errors ``[B]`` on the same noises.

    Both are resampled together, so what a hard noise adds to both cancels. The interval is the central 95 % of
    ``RMSE(a) - RMSE(b)``; ``a`` is better where all of it lies below zero by more than rounding can explain, worse where all of it lies
    above.

    Raises:
        FewstepError: they are not of the same noises, or not finite.
    """
    if a_errors.ndim != 1 or a_errors.shape != b_errors.shape or len(a_errors) == 0:
        raise FewstepError(f"only errors on the same noises can be compared, got {tuple(a_errors.shape)} and {tuple(b_errors.shape)}")
    pair = torch.stack([a_errors, b_errors], 1).double()
    if not bool(torch.isfinite(pair).all()):
        raise FewstepError("errors that are not finite cannot be compared: that sampler has failed")
    means = _resampled_means(pair.square()).sqrt()
    low, high = _central(means[:, 0] - means[:, 1])
    difference, slack = rms(a_errors) - rms(b_errors), ROUNDING * rms(b_errors)
    verdict = "better" if high < -slack else "worse" if low > slack else "equal"
    return ErrorComparison(verdict, difference, low, high)


def half_subsets(count: int, subsets: int, labels: Tensor | None = None) -> Tensor:
    """Draw random halves of ``count`` items, ``[subsets, count // 2]``; always the same.

    With labels ``[count]`` each half has half of every label: samples requested in equal shares scatter less than random ones.
    """
    generator = torch.Generator().manual_seed(SEED)
    strata = torch.zeros(count, dtype=torch.float64) if labels is None else labels.cpu().double()
    halves = []
    for _ in range(subsets):
        pairs = (strata + torch.rand(count, generator=generator, dtype=torch.float64)).argsort()[: count // 2 * 2].reshape(-1, 2)
        one = torch.randint(2, (count // 2, 1), generator=generator)  # of each pair of neighbours in random order
        halves.append(pairs.gather(1, one)[:, 0])
    return torch.stack(halves)


def subset_interval(value: float, of_halves: Tensor) -> list[float]:
    """Return a 95 % interval of a distance from its values on random halves of the samples ``[S]``.

    A half of the samples, drawn without replacement, scatters about the mean of such halves as much as all the samples scatter about
    theirs (half-sampling; Politis and Romano, Annals of Statistics 22, 1994). So the interval is ``value`` minus the central 95 % of
    the halves' deviations from their own mean. That all halves are biased by their size, as Frechet distances are, does not matter;
    resampling with replacement, which repeats samples, would bias them more.
    """
    low, high = _central(of_halves.double() - of_halves.double().mean())
    return [value - high, value - low]


def _central(values: Tensor) -> list[float]:
    tail = (1 - LEVEL) / 2
    return torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()


def _resampled_means(values: Tensor) -> Tensor:
    """Return means over resamples with replacement of ``[B]`` or ``[B, K]``, ``[1000]`` or ``[1000, K]``; all columns by the same draws."""
    generator, count = torch.Generator().manual_seed(SEED), len(values)
    rows = max(1, BLOCK // values.numel())
    draws = (torch.randint(count, (min(rows, RESAMPLES - k), count), generator=generator) for k in range(0, RESAMPLES, rows))
    return torch.cat([values[index].mean(1) for index in draws])
