"""Settings of every test: problems are tiny, so threads only cost; hypothesis tries the same examples every time."""

import gc
from collections import Counter
from collections.abc import Generator

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fewstep", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("fewstep")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import all tests without a look for garbage, of which imports make none, and never look at what they made again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked ``every(n, m=1)`` every n-th runs by default, the others with the slow tests.

    With ``m`` every m-th of the others is slow, and the rest runs before a release alone.
    """
    seen = Counter[str]()
    for item in items:
        marker = item.get_closest_marker("every")
        if marker is not None:
            test = item.nodeid.split("[")[0]
            n, m = (*marker.args, 1)[:2]
            whole, rest = divmod(seen[test], n)
            if rest:
                item.add_marker(pytest.mark.slow)
            if rest and (whole * (n - 1) + rest - 1) % m:
                item.add_marker(pytest.mark.release)
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
