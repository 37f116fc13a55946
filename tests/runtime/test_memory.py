"""The memory of the machine is what the system says."""

from pathlib import Path

import pytest

from fewstep.runtime.memory import available_memory


def test_available_memory_is_that_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = available_memory()
    assert found is None or 2**24 < found < 2**50
    monkeypatch.setattr(Path, "read_text", lambda path: "MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert available_memory() == 2**21
    monkeypatch.setattr(Path, "read_text", lambda path: "nothing")
    assert available_memory() is None or available_memory() > 2**24  # what there is in all
