"""What the commands share: the application they belong to, their common options, and how words are read."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.runtime.artifact import read_json
from fewstep.runtime.errors import FewstepError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ModelName = Annotated[str, typer.Argument(help="A bundled model (see 'fewstep models') or a folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
StatisticsFolder = Annotated[Path | None, typer.Option("--statistics", help="For dpm-solver-v3: a folder of fewstep calibrate.")]
AnyStatistics = Annotated[bool, typer.Option("--any-statistics", help="Use the statistics though they are of another model or guidance.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")]
Prompts = Annotated[Path | None, typer.Option(help="Of a text-to-image pipeline's folder: a text file with one prompt on each line.")]


def checked(word: str, words: tuple[str, ...], option: str) -> Any:  # noqa: ANN401 - one of the words
    """A word that is one of a few."""
    if word not in words:
        raise FewstepError(f"{option} is {' or '.join(words)}, got {word!r}")
    return word


def words(text: str | None) -> tuple[str, ...] | None:
    """Names separated by commas."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def integers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise FewstepError(f"{option} wants whole numbers separated by commas, got {text!r}") from None


def json_object(text: str, option: str) -> dict[str, Any]:
    """A JSON object, or the file that holds one."""
    if not text.lstrip().startswith("{"):
        return read_json(Path(text))
    try:
        return json.loads(text)
    except ValueError as error:
        raise FewstepError(f"{option} wants a JSON object, {error}: got {text!r}") from None


def command() -> str:
    """This command line, as a reader would type it."""
    return shlex.join(["fewstep", *sys.argv[1:]])
