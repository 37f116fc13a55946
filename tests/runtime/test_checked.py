"""Arguments that a public function does not have, or cannot use, are refused with what to pass instead."""

import copy
import inspect
import json
import math
import pickle
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import pytest
import torch

from fewstep import FewstepError, ModelError, SolverError
from fewstep.runtime.front_door import check_fields, checked, checked_class, config_of, is_count, scale_of, whole, wholes


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


# -- values ------------------------------------------------------------------------------------------------------------


@checked_class
@dataclass(frozen=True)
class Settings:
    """One field of each kind that is checked, and one that is not."""

    num: int = 3
    rate: float = 0.5
    fast: bool = False
    word: str = "a"
    most: int | None = None
    inner: Canvas = field(default_factory=lambda: Canvas(1))

    def __post_init__(self) -> None:
        check_fields(self)


def test_whole_numbers_of_any_library_are_taken():
    assert [whole(value, "num") for value in (3, np.int64(3), torch.tensor(3))] == [3, 3, 3]
    for value in (5, np.int64(5), torch.tensor(5)):
        assert wholes(value, "nfe") == [5]
    for value in ([8, 5, 8], (8, 5), iter([8, 5]), np.array([8, 5]), torch.tensor([8, 5]), range(8, 2, -3)):
        assert wholes(value, "nfe") == [8, 5]


@pytest.mark.parametrize("value", [None, 2.0, math.nan, "2", True, [2.5], [None], [[2]], [2, "3"], torch.tensor([2.0])], ids=str)
def test_other_values_are_no_numbers_of_evaluations(value):
    with pytest.raises(SolverError, match=r"nfe is a whole number or a list of them, as \[5, 8\], got"):
        wholes(value, "nfe", SolverError)


def test_a_count_is_a_whole_number_of_at_least_1():
    assert all(map(is_count, (1, 5.0, np.int64(3), torch.tensor(2))))
    assert not any(map(is_count, (0, -3, 2.5, math.nan, math.inf, None, "5", "a", [5], torch.tensor([1, 2]))))


def test_a_scale_is_a_finite_number():
    assert [scale_of(value, 1.5) for value in (None, 2, 2.5, np.float32(2), torch.tensor(2.0))] == [1.5, 2, 2.5, 2, 2]
    for value in ("2", [2], math.nan, math.inf, torch.tensor([2.0, 3.0]), object()):
        with pytest.raises(ModelError, match="guidance is a scale, as 2.0, got"):
            scale_of(value, 1.0)


def test_a_configuration_is_one_of_its_kind():
    assert config_of(None, Settings) == Settings() and config_of(Settings(4), Settings).num == 4
    for value in ({}, [], False, 5, {"num": 4}, Canvas(1)):
        with pytest.raises(FewstepError, match=r"config is a Settings, as fewstep.Settings\(...\), got"):
            config_of(value, Settings)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *(({"num": value}, "num is a whole number") for value in (2.5, "3", None, True, math.nan)),
        *(({"rate": value}, "rate is a number") for value in ("0.5", None, True, math.nan)),
        *(({"fast": value}, "fast is True or False") for value in (1, "yes", None)),
        *(({"word": value}, "word is a word") for value in (1, None)),
        *(({"most": value}, "most is a whole number") for value in (2.5, "3")),
    ],
)
def test_a_field_of_another_type_is_refused(changes, says):
    with pytest.raises(FewstepError, match=f"Settings: {says}, got"):
        Settings(**changes)


def test_numbers_of_other_libraries_become_plain_ones():
    made = Settings(num=np.int64(4), rate=np.float32(0.25), most=np.int64(2))
    assert json.dumps([made.num, made.rate, made.most]) == "[4, 0.25, 2]"
    assert Settings(rate=math.inf).rate == math.inf
    assert Settings(rate=1).rate == 1.0 and isinstance(Settings(rate=1).rate, float)
