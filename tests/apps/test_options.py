"""Options made of a config dataclass: names, types, defaults, texts, and the config that comes of what was typed."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from fewstep.apps import cli
from fewstep.apps.options import Fields, FieldsOf, Flag, Typed, documented, expanded
from fewstep.runtime.errors import FewstepError


@dataclass(frozen=True)
class Inner:
    """What is inside.

    Args:
        kind: ``one`` of `several`.
    """

    kind: str = "plain"
    wide: bool = True


@dataclass(frozen=True)
class Config:
    """Everything that can be typed.

    Args:
        num: how many,
            on two lines.
        low, high: ends of a range.
        mode: slow, or ``fast``.

    Raises:
        FewstepError: mode: not this one.

    Attributes:
        sizes: of the levels.
    """

    num: int = 3
    low: float = -1.5
    high: float | None = None
    mode: Literal["fast", "slow"] = "slow"
    quiet: bool = False
    sizes: tuple[int, ...] = (8, 16)
    marks: tuple[float, ...] | None = None
    names: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    data: str | object | None = None
    inner: Inner = field(default_factory=lambda: Inner("own"))
    held_out: int = 7

    def __post_init__(self) -> None:
        if self.num < 0:
            raise FewstepError(f"num is at least 0, got {self.num}")


def app_of(verb: Callable[..., None]) -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(expanded(verb))
    return app


def typed(fields: Fields, *words: object, kind: Any = Config) -> Any:
    """The config that a verb gets when these words are typed."""
    got = []

    def verb(first: str, *, config: object, last: int = 5) -> None:
        """Do."""
        assert (first, last) == ("x", 5)
        got.append(config)

    verb.__annotations__["config"] = Annotated[kind, fields]
    result = CliRunner().invoke(app_of(verb), ["x", *map(str, words)])
    if isinstance(result.exception, FewstepError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return got[0]


def options(fields: Fields, kind: Any = Config) -> dict[str, Any]:
    """The options by the field that they are for, as click has them."""

    def verb(*, config: object) -> None:
        """Do."""

    verb.__annotations__["config"] = Annotated[kind, fields]
    return {option.name.removeprefix("config__"): option for option in get_command(app_of(verb)).params if option.name != "help"}


def test_nothing_typed_is_the_default() -> None:
    assert typed(Fields()) == Config()


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (("--num", 4, "--held-out", 2), {"num": 4, "held_out": 2}),
        (("--low", -3, "--high", "inf"), {"low": -3.0, "high": float("inf")}),
        (("--mode", "fast"), {"mode": "fast"}),
        (("--quiet",), {"quiet": True}),
        (("--no-quiet",), {}),
        (("--sizes", "1,2,3"), {"sizes": (1, 2, 3)}),
        (("--sizes", "none"), {"sizes": ()}),
        (("--marks", "1,0.5"), {"marks": (1.0, 0.5)}),
        (("--marks", "none"), {"marks": ()}),
        (("--names", "a, b,"), {"names": ("a", "b")}),
        (("--folders", "a,b/c"), {"folders": (Path("a"), Path("b/c"))}),
        (("--data", "7"), {"data": "7"}),
        (("--kind", "k"), {"inner": Inner("k")}),
        (("--no-wide", "--num", 4), {"inner": Inner("own", False), "num": 4}),
    ],
)
def test_what_is_typed_is_in_the_config(words: tuple[object, ...], changed: dict[str, object]) -> None:
    assert typed(Fields(), *words) == dataclasses.replace(Config(), **changed)


def test_nested_defaults_are_those_of_the_outer_field() -> None:
    assert options(Fields())["inner__kind"].default == "own"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--mode", "quick"), "--mode is fast or slow, got 'quick'"),
        (("--sizes", "1,x"), "--sizes wants whole numbers separated by commas, got '1,x'"),
        (("--sizes", ""), "--sizes wants whole numbers separated by commas, got ''"),
        (("--marks", "1;2"), "--marks wants numbers separated by commas, got '1;2'"),
        (("--num", -1), "num is at least 0, got -1"),
    ],
)
def test_mistakes(words: tuple[object, ...], says: str) -> None:
    with pytest.raises(FewstepError, match=f"^{says}$"):
        typed(Fields(), *words)


def test_a_word_is_checked_under_the_name_of_its_option() -> None:
    for names in (("--pace", "-p"), ("-p", "--pace")):
        with pytest.raises(FewstepError, match="^--pace is fast or slow, got 'quick'$"):
            typed(Fields({"mode": Flag(*names)}), "-p", "quick")


def test_flags_rename_and_say_defaults_and_texts() -> None:
    flags = {
        "num": Flag("--number", "-n", more="Count them."),
        "low": Flag(default=2.5, help="Own words."),
        "inner.wide": Flag("--wide/--narrow", default=False),
        "sizes": Flag(default=(4,)),
    }
    fields = Fields(flags)
    assert typed(fields) == Config(low=2.5, inner=Inner("own", False), sizes=(4,))
    assert typed(fields, "-n", 9, "--wide").num == typed(fields, "--number", 9).num == 9
    assert typed(fields, "--wide").inner.wide and not typed(fields, "--narrow").inner.wide
    shown = options(fields)
    assert shown["num"].opts == ["--number", "-n"] and shown["num"].help == "How many, on two lines. Count them."
    assert shown["low"].help == "Own words." and shown["low"].default == 2.5
    assert shown["inner__wide"].secondary_opts == ["--narrow"]


def test_texts_are_those_of_the_docstrings() -> None:
    assert documented(Config) == {
        "num": "how many, on two lines.",
        "low": "ends of a range.",
        "high": "ends of a range.",
        "mode": "slow, or fast.",
        "sizes": "of the levels.",
    }
    shown = options(Fields())
    assert shown["inner__kind"].help == "One of several."
    assert shown["high"].help == "Ends of a range." and shown["held_out"].help is None
    assert shown["mode"].help == "slow, or fast."  # a value is not capitalised
    assert (shown["mode"].metavar, shown["sizes"].default) == ("fast|slow", "8,16")


def test_fields_that_are_left_out_keep_their_defaults_and_have_no_option() -> None:
    fields = Fields(leave_out=("num", "inner.wide"))
    assert typed(fields, "--kind", "k") == Config(inner=Inner("k"))
    assert options(fields).keys() == options(Fields()).keys() - {"num", "inner__wide"}
    assert not {"inner__kind", "inner__wide"} & options(Fields(leave_out=("inner",))).keys()


def test_a_default_of_nested_fields_that_are_left_out_stays() -> None:
    assert typed(Fields(leave_out=("inner.kind",)), "--no-wide").inner == Inner("own", wide=False)


def test_a_config_that_the_verb_completes() -> None:
    @dataclass
    class Needy:
        """Wants more."""

        first: tuple[str, ...]
        second: int = 2

    made = typed(Fields(leave_out=("first",)), "--second", 3, kind=partial[Needy])
    assert isinstance(made, partial) and made(first=("a",)) == Needy(("a",), 3)
    required = options(Fields(), kind=Needy)
    assert required["first"].required and not required["second"].required
    result = CliRunner().invoke(app_of(_needs(Needy)), [])
    assert result.exit_code == 2 and "--first" in result.output


def _needs(kind: type) -> Callable[..., None]:
    def verb(*, config: object) -> None:
        """Do."""

    verb.__annotations__["config"] = Annotated[kind, Fields()]
    return verb


@dataclass(frozen=True)
class Steps:
    """Begin at a step."""

    start: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.start, int | None):
            raise FewstepError(f"start is a whole number, got {self.start}")


@dataclass(frozen=True)
class Level:
    """Begin at a level."""

    start: float | None = None


@dataclass(frozen=True)
class Word:
    """Begin with a word."""

    start: str = "here"


def several(config: str, kinds: dict[str, type], *words: object) -> Any:
    """One of several configs, when these words are typed."""
    got = []

    def verb(*, config: Typed) -> None:
        """Do."""
        got.append(config)

    verb.__annotations__["config"] = Annotated[Typed, FieldsOf(kinds)]
    result = CliRunner().invoke(app_of(verb), [*map(str, words)])
    assert result.exit_code == 0, result.output
    return got[0].config(config, "--method")


@pytest.mark.parametrize("kinds", [{"steps": Steps, "level": Level}, {"level": Level, "steps": Steps}])
def test_an_option_of_whole_numbers_for_one_config_and_of_any_for_another(kinds: dict[str, type]) -> None:
    assert several("level", kinds, "--start", "2.5") == Level(2.5) and several("level", kinds) == Level()
    made = several("steps", kinds, "--start", "8")
    assert made == Steps(8) and isinstance(made.start, int)
    with pytest.raises(FewstepError, match=r"start is a whole number, got 2\.5"):
        several("steps", kinds, "--start", "2.5")


def test_an_option_of_a_number_and_a_word_is_a_fault_of_the_program() -> None:
    with pytest.raises(TypeError, match="no option can be made of config__start, which is of the types"):
        several("level", {"level": Level, "word": Word})


@pytest.mark.parametrize(
    "fields",
    [Fields({"nun": Flag("--n")}), Fields(leave_out=("inner.kin",)), Fields({"kind": Flag()})],
    ids=("misspelt", "nested", "left out"),
)
def test_a_flag_for_no_field_is_a_fault_of_the_program(fields: Fields) -> None:
    with pytest.raises(TypeError, match="Config has no field"):
        options(fields)


def test_a_field_that_cannot_be_typed_is_a_fault_of_the_program() -> None:
    @dataclass
    class Odd:
        """Odd."""

        thing: dict[str, int] | None = None

    with pytest.raises(TypeError, match="no option can be made of thing"):
        options(Fields(), kind=Odd)
    assert not options(Fields(leave_out=("thing",)), kind=Odd)


# -- the verbs themselves --------------------------------------------------------------------------------------------


VERBS = get_command(cli.app).commands  # type: ignore[attr-defined]


def test_every_verb_has_its_file() -> None:
    folder = Path(inspect.getfile(cli)).parent / "commands"
    benches = {"bench_restoration", "bench_stochastic"}  # of bench --task and bench --stochastic
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} - benches == set(VERBS)
    assert all(inspect.getfile(verb) == str(folder / f"{verb.__name__}.py") for verb in cli.VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_is_and_no_two_are_one(verb: str) -> None:
    options = [option for option in VERBS[verb].params if option.name != "help"]
    assert not [option.opts for option in options if not option.help]
    names = [name for option in options for name in (*option.opts, *option.secondary_opts)]
    assert len(names) == len(set(names))
    assert not [option.opts for option in options if "`" in option.help or option.help[-1] not in ".)"]


@pytest.mark.slow
def test_the_command_line_starts_without_the_libraries_that_only_work_needs() -> None:
    heavy = ("accelerate", "diffusers", "gradio", "huggingface_hub", "jinja2", "matplotlib", "scipy", "sklearn", "torchmetrics")
    heavy += ("transformers",)
    program = f"import sys, fewstep.apps.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
