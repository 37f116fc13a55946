"""What the tests of models share."""

import sys
import types

import pytest


def _reconstruct_persistent_obj(meta: dict) -> object:
    raise AssertionError("EDM's own code must never run")


@pytest.fixture
def edm_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """EDM's module of persistent objects, for the time of writing one."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    function = types.FunctionType(_reconstruct_persistent_obj.__code__, globals(), "_reconstruct_persistent_obj")
    function.__module__, function.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = package.persistence = function
    for name, value in (("torch_utils", package), ("torch_utils.persistence", module)):
        monkeypatch.setitem(sys.modules, name, value)
