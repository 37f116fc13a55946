"""Functions and classes named as ``module:function``: from the name to what it names, and back."""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tests import own_networks

from fewstep import FewstepError
from fewstep.runtime.entry import Entry, imported, named

PLACE = "tests.own_networks"


def again(entry: Entry) -> Callable[..., Any]:
    """What the entry imports after it has been in a JSON file."""
    return Entry(**json.loads(json.dumps(asdict(entry)))).function()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (own_networks.stacked, f"{PLACE}:stacked"),
        (own_networks.TableNet, f"{PLACE}:TableNet"),
        (own_networks.TableNet.forward, f"{PLACE}:TableNet.forward"),
        (Path, "pathlib:Path"),
    ],
)
def test_a_name_leads_back_to_its_function(function: Callable[..., Any], name: str) -> None:
    entry = named(function, "build")
    assert entry == Entry(name, {}) and again(entry) is function and imported(name) is function


def test_arguments_come_back_as_they_were() -> None:
    options = {"width": 3, "sides": (1, (2, 3)), "names": ["a", ("b",)], "more": {"x": None, "y": (True, 0.5)}}
    found = again(named(functools.partial(own_networks.TableNet, **options), "build"))
    assert isinstance(found, functools.partial) and found.func is own_networks.TableNet and found.keywords == options


@pytest.mark.parametrize("value", [{1: 2}, {"tuple": [1]}, {1, 2}, b"bytes", 1j, float("inf"), object(), [object()], Path(".")])
def test_arguments_that_would_come_back_otherwise_are_refused(value: object) -> None:
    with pytest.raises(FewstepError, match=r"^build: its argument sides is "):
        named(functools.partial(own_networks.TableNet, sides=value), "build")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda: None, "build is a lambda, which has no name to import it by: write it as a function or class at the top of a module"),
        (5, "build is an object of the class int, which has no name"),
        (functools.partial(own_networks.stacked, 3), "arguments that have no names: give them as keywords"),
        (own_networks.Tied().forward, f"build is not what {PLACE}:Tied.forward is now"),
    ],
)
def test_what_has_no_name_is_refused(function: object, says: str) -> None:
    with pytest.raises(FewstepError, match=says):
        named(function, "build")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own", "names no function: say module:function"),
        (f"{PLACE}:TableNet.gone", f"cannot import {PLACE}:TableNet.gone: AttributeError"),
        (f"{PLACE}:LAW.t_max", "is not a function but a float"),
    ],
)
def test_names_that_lead_nowhere_are_refused(name: str, says: str) -> None:
    with pytest.raises(FewstepError, match=says):
        imported(name)
