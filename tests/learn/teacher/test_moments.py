"""Moments: the same in any pieces and order, and fits that are the least squares of all data at once, however elements are pooled."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.core.pooling import shared_axes
from fewstep.learn.teacher.moments import LARGEST_SLOPE, POOLS, SECOND, Moments

SHAPE, LEVELS, COUNT = (3, 2, 2), 5, 40
LAM = torch.linspace(-1.0, 1.5, LEVELS, dtype=torch.float64)
ROUNDING = 1e-9  # relative: sums of float64 in another order, some of which cancel


def synthetic(noise: float) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Data ``[S+1, 4, N, *D]`` made from known ``l, s, b [S+1, *D]``: ``F' = s F + b`` up to noise."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(LEVELS, *size, *SHAPE, generator=generator, dtype=torch.float64)

    probes, s, b = 0.5 + 0.1 * normal(COUNT), normal(), normal()
    l = 1 - probes.mean(1)
    dl = torch.from_numpy(np.gradient(l.numpy(), LAM.numpy(), axis=0))
    X, F = 3 * normal(COUNT) + normal(1), normal(COUNT) + normal(1)  # noqa: N806
    D = (1 - l)[:, None] * X - F  # noqa: N806
    dF = s[:, None] * F + b[:, None] + noise * normal(COUNT)  # noqa: N806
    dD = (1 - l)[:, None] * D - (1 - l + dl)[:, None] * X - dF  # noqa: N806
    return torch.stack([X, D, dD, probes], 1), (l, s, b)


def streamed(data: Tensor, batches: int | list[int]) -> Moments:
    total = Moments(LEVELS, SHAPE)
    for part in data.split(batches, 2):
        total.merge(Moments.of(part, LEVELS, SHAPE))
    return total


def groups(pool: str) -> np.ndarray:
    """For each element the number of its group ``[12]``."""
    number = torch.arange(12).reshape(SHAPE)
    shared = {"element": (), "channel": (-2, -1), "scalar": (-3, -2, -1)}[pool]
    return (number.amin(shared, keepdim=True) if shared else number).expand(SHAPE).flatten().numpy()


def regressed(data: Tensor, pool: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``l, s, b [S+1, 12]`` by plain least squares on all data at once, with one column for each ``b``."""
    group, group_b = (groups(word) for word in POOLS[pool])
    X, D, dD, vJv = data.flatten(3).numpy().swapaxes(0, 1)  # noqa: N806 - [S+1, N, 12]
    l = 1 - np.stack([vJv[:, :, group == g].mean((1, 2)) for g in group], 1)
    c, dl = 1 - l[:, None], np.gradient(l, LAM.numpy(), axis=0)[:, None]
    F, dF = c * X - D, -dD + c * D - (c + dl) * X  # noqa: N806
    s, b = np.zeros_like(l), np.zeros_like(l)
    for k in range(LEVELS):
        for g in np.unique(group):
            inside = np.flatnonzero(group == g)
            columns = np.unique(group_b[inside])
            which = np.repeat(group_b[inside], F.shape[1])  # of each row: element by element
            design = np.column_stack([F[k][:, inside].T.ravel(), which[:, None] == columns])
            slope, *drifts = np.linalg.lstsq(design, dF[k][:, inside].T.ravel(), rcond=None)[0]
            s[k, inside], b[k, inside] = slope, np.array(drifts)[np.searchsorted(columns, group_b[inside])]
    return l, s, b


@pytest.mark.parametrize("pool", POOLS)
def test_every_pooling_is_the_regression_on_all_data_at_once(pool: str) -> None:
    data, _ = synthetic(noise=0.3)
    found, exact = streamed(data, 7).fit(LAM, pool), regressed(data, pool)
    assert abs(exact[1]).max() < LARGEST_SLOPE  # none is clipped, so all are compared
    for value, expected in zip(found, exact, strict=True):
        np.testing.assert_allclose(value.expand(LEVELS, *SHAPE).flatten(1), expected, rtol=ROUNDING, atol=ROUNDING)
    sizes = [{"element": SHAPE, "channel": (3, 1, 1), "scalar": (1, 1, 1)}[word] for word in pool.split("/")]
    assert [tuple(value.shape[1:]) for value in found] == [sizes[0], sizes[0], sizes[-1]]


@pytest.mark.parametrize("pool", ["channel", "scalar", "scalar/channel"])
def test_pooled_moments_are_enough_where_numbers_are_shared(pool: str) -> None:
    """They give the statistics of all elements' moments, with as many numbers as the finest of them has."""
    data, _ = synthetic(noise=0.3)
    axes = shared_axes(POOLS[pool][1], len(SHAPE))
    size = [1 if axis in axes else SHAPE[axis] for axis in range(-len(SHAPE), 0)]
    made = Moments(LEVELS, size)
    for part in data.split(7, 2):
        made.merge(Moments.of(part, LEVELS, size, axes))
    assert made.mean.shape[2:] == tuple(size)
    for ours, theirs in zip(made.fit(LAM, pool), streamed(data, 7).fit(LAM, pool), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=ROUNDING, atol=ROUNDING)


def test_known_statistics_are_recovered() -> None:
    data, exact = synthetic(noise=0.0)
    assert float(exact[1].abs().max()) < LARGEST_SLOPE
    for value, expected in zip(streamed(data, 8).fit(LAM, "element"), exact, strict=True):
        torch.testing.assert_close(value, expected, rtol=ROUNDING, atol=ROUNDING)


def test_samples_without_channels_are_pooled_by_element() -> None:
    data, _ = synthetic(noise=0.3)
    flat = Moments.of(data.flatten(3), LEVELS, (12,))
    for one, two in zip(flat.fit(LAM, "channel"), flat.fit(LAM, "element"), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert [tuple(value.shape[1:]) for value in flat.fit(LAM, "scalar")] == [(1,)] * 3


def test_data_that_do_not_vary_have_finite_statistics() -> None:
    """F is constant where a denoiser is linear: any slope would do, but it should be a number, and F' should come out right."""
    data, _ = synthetic(noise=0.3)
    data[:] = data.mean(2, keepdim=True)
    l, s, b = streamed(data, 8).fit(LAM, "element")
    X, D, dD, _ = data.mean(2).unbind(1)  # noqa: N806
    dl = torch.from_numpy(np.gradient(l.numpy(), LAM.numpy(), axis=0))
    torch.testing.assert_close(s * ((1 - l) * X - D) + b, -dD + (1 - l) * D - (1 - l + dl) * X, rtol=ROUNDING, atol=ROUNDING)
    assert float(s.abs().max()) <= LARGEST_SLOPE


def test_merging_is_associative_and_keeps_no_data() -> None:
    data = synthetic(noise=0.3)[0] + 100  # far from zero: centred moments do not cancel
    off = data - data.mean(2, keepdim=True)
    left = streamed(data, [1, 5, 11, 3, 20])
    right = Moments(LEVELS, SHAPE)
    for part in reversed(data.split([1, 5, 11, 3, 20], 2)):
        pair = Moments.of(part, LEVELS, SHAPE)
        pair.merge(right)
        right = pair
    for total in (left, right):
        assert total.count == COUNT and total.mean.shape == (LEVELS, 4, *SHAPE) and total.second.shape == (LEVELS, 5, *SHAPE)
        torch.testing.assert_close(total.mean, data.mean(2), rtol=1e-13, atol=0)
        for j, (one, two) in enumerate(SECOND):
            torch.testing.assert_close(total.second[:, j], (off[:, one] * off[:, two]).sum(1), rtol=ROUNDING, atol=ROUNDING)
