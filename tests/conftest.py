"""Settings of every test: problems are tiny, so threads only cost; hypothesis tries the same examples every time."""

from collections import Counter

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fewstep", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("fewstep")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked ``every(n)`` every n-th runs by default, the others with the slow tests."""
    seen = Counter[str]()
    for item in items:
        marker = item.get_closest_marker("every")
        if marker is not None:
            test = item.nodeid.split("[")[0]
            if seen[test] % marker.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


SHORTER = 8


def shorten_reference(patch: pytest.MonkeyPatch) -> None:
    """Benchmarks measure against a trajectory of an eighth of the steps, where what is tested needs no better one."""
    from fewstep.sampling.reference import REFERENCE_NFE, reference_sampler

    def short(schedule, nfe: int = REFERENCE_NFE):
        return reference_sampler(schedule, nfe // SHORTER)

    patch.setattr("fewstep.evaluate.benchmark.exact.reference_sampler", short)


@pytest.fixture
def short_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `shorten_reference`."""
    shorten_reference(monkeypatch)
