"""Misspelt, missing and doubled arguments of a public function are refused with what to pass instead."""

import copy
import inspect
import pickle
from dataclasses import KW_ONLY, dataclass

import pytest

from fewstep import FewstepError
from fewstep.runtime.front_door import checked, checked_class


@checked
def paint(canvas, colour="red", *, brush: int = 3):
    """Paint."""
    if colour == "none":
        raise TypeError("from inside")
    return canvas, colour, brush


class Painter:
    @classmethod
    @checked
    def hire(cls, name, *, wage=1):
        return cls, name, wage


@checked_class
@dataclass(frozen=True)
class Canvas:
    width: int
    _: KW_ONLY
    height: int = 2


def test_a_right_call_is_the_functions_own():
    assert paint("wall", "blue", brush=1) == ("wall", "blue", 1)
    assert Painter.hire("Anna", wage=2) == (Painter, "Anna", 2)
    assert (paint.__name__, paint.__doc__) == ("paint", "Paint.")
    assert list(inspect.signature(paint).parameters) == ["canvas", "colour", "brush"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: paint("wall", brsh=1), "paint: got an unexpected keyword argument 'brsh'; did you mean brush?"),
        (lambda: paint("wall", thickness=1), "'thickness'; known: brush, canvas, colour"),
        (lambda: paint(), "paint: missing a required argument: 'canvas'; it takes canvas, colour, brush"),
        (lambda: paint("wall", "red", 3), "paint: too many positional arguments; it takes canvas, colour, brush"),
        (lambda: paint("wall", canvas="door"), "paint: multiple values for argument 'canvas'; it takes"),
        (lambda: Painter.hire(wages=3, name="Anna"), "hire: got an unexpected keyword argument 'wages'; did you mean wage"),
        (lambda: Canvas(), "Canvas: missing a required argument: 'width'; it takes width, height"),
        (lambda: Canvas(1, 2), "Canvas: too many positional arguments; it takes width, height"),
        (lambda: Canvas(1, hight=2), "Canvas: got an unexpected keyword argument 'hight'; did you mean height"),
    ],
)
def test_a_wrong_call_says_what_to_pass(call, says):
    with pytest.raises(FewstepError) as error:
        call()
    assert says in str(error.value) and error.value.__suppress_context__


def test_errors_from_inside_stay_what_they_are():
    with pytest.raises(TypeError, match="from inside"):
        paint("wall", "none")


def test_a_checked_class_is_copied_and_pickled():
    canvas = Canvas(3, height=4)
    assert copy.deepcopy(canvas) == canvas == pickle.loads(pickle.dumps(canvas)) and (canvas.width, canvas.height) == (3, 4)
