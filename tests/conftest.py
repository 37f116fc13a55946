"""Settings of every test: problems are tiny, so threads only cost; hypothesis tries the same examples every time."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fewstep", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("fewstep")


SHORTER = 8


def shorten_reference(patch: pytest.MonkeyPatch) -> None:
    """Benchmarks measure against a trajectory of an eighth of the steps, where what is tested needs no better one."""
    from fewstep.sampling.reference import REFERENCE_NFE, reference_sampler

    def short(schedule, nfe: int = REFERENCE_NFE):
        return reference_sampler(schedule, nfe // SHORTER)

    patch.setattr("fewstep.evaluate.benchmark.run.reference_sampler", short)


@pytest.fixture
def short_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `shorten_reference`."""
    shorten_reference(monkeypatch)
