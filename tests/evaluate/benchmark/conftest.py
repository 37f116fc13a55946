"""Settings of the tests of benchmarks."""

import pytest
from tests.conftest import shorten_reference


@pytest.fixture(autouse=True)
def _short_reference_unless_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of what is tested needs no reference of 128 steps; what does says so by ``@pytest.mark.full_reference``."""
    if request.node.get_closest_marker("full_reference") is None:
        shorten_reference(monkeypatch)
