"""Pooling: channels are dimension 1 of the state, for statistics and for coefficients alike."""

import pytest
import torch

from fewstep.core.pooling import pooled_shape, shared_axes
from fewstep.learn.search.coefficients import FitForm
from fewstep.learn.teacher.moments import Moments

STATES = {
    "pictures": ((3, 4, 5), (3, 1, 1)),
    "sound": ((2, 6), (2, 1)),
    "video": ((3, 2, 4, 5), (3, 1, 1, 1)),
    "tokens": ((6, 2), (6, 1)),
    "vectors": ((7,), (7,)),
}


@pytest.mark.parametrize("kind", STATES)
def test_calibration_and_fit_share_numbers_alike(kind: str) -> None:
    sample, channels = STATES[kind]
    data = torch.randn(4, 4, 9, *sample, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = Moments.of(data, 4, sample)
    for pool, shape in {"element": sample, "channel": channels, "scalar": ()}.items():
        assert pooled_shape(pool, sample) == FitForm(pool=pool).shape(sample) == shape
        for value in moments.fit(torch.linspace(0, 1, 4, dtype=torch.float64), pool):
            assert (
                torch.broadcast_shapes(value.shape[1:], shape) == tuple(value.shape[1:]) and value[0].numel() == torch.Size(shape).numel()
            )


def test_axes_that_share_are_those_after_the_first() -> None:
    assert [shared_axes("channel", n) for n in (1, 2, 4)] == [(), (-1,), (-3, -2, -1)]
    assert shared_axes("element", 3) == () and shared_axes("scalar", 2) == (-2, -1)
