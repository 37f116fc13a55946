"""Options of the verbs: those that several share, and those that are the fields of a config dataclass.

A verb that takes ``config: Annotated[FitConfig, Fields(...)]`` has an option for every field of `FitConfig`, with the field's name, type
and default, and the text of the class' docstring as its help. So a new field of a config is a new option, and nothing else has to be
written.
"""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from fewstep.runtime.artifact import named_path, parse_json, read_json
from fewstep.runtime.errors import ArtifactError, FewstepError
from fewstep.sampling.parallel import ParallelConfig

__all__ = [
    "ANY_STATISTICS",
    "INTEGERS",
    "NAMES",
    "NUM",
    "NUMBERS",
    "STATISTICS",
    "AnyStatistics",
    "AsJson",
    "Fields",
    "FieldsOf",
    "Flag",
    "Guidance",
    "InParallel",
    "Memory",
    "ModelName",
    "StatisticsFolder",
    "TeacherGuidance",
    "Tolerance",
    "Trust",
    "Typed",
    "Window",
    "checked",
    "command",
    "documented",
    "expanded",
    "integers",
    "json_object",
    "numbers",
    "parallel_config",
    "words",
]

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A bundled model (see 'fewstep models'), a folder, a checkpoint file, a diffusers id on the hub, or module:function, "
        "a function of your own that returns a fewstep.Model.",
    ),
]
Trust = Annotated[bool, typer.Option("--trust", help="Import, and run, the code that the model's folder names; or read its pickle.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
STATISTICS = "For dpm-solver-v3: a folder of fewstep calibrate."
ANY_STATISTICS = "Use the statistics though they are of another model or guidance."
StatisticsFolder = Annotated[Path | None, typer.Option("--statistics", help=STATISTICS)]
AnyStatistics = Annotated[bool, typer.Option("--any-statistics", help=ANY_STATISTICS)]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is none. Default: the model's own, mostly 1.")]
TeacherGuidance = Annotated[
    float | None,
    typer.Option("--guidance", help="The teacher's guidance scale; its student is sampled without. Default: the model's own."),
]
InParallel = Annotated[
    bool,
    typer.Option("--parallel", help="Evaluate several steps at once: the same samples to a tolerance, in fewer calls of larger batches."),
]
Window = Annotated[int | None, typer.Option(help="In parallel: steps at once. Default: 8.")]
Tolerance = Annotated[float | None, typer.Option("--tol", help="In parallel: tolerance, relative to a state's size. Default: 0.001.")]
Memory = Annotated[int | None, typer.Option(help="In parallel: rounds that Anderson mixing combines; 1 is none. Default: 1.")]

PLAIN = (bool, int, float, str, Path)
INTEGERS, NUMBERS, NAMES = "<int,...>", "<float,...>", "<str,...>"  # how lists are shown in help


# -- how words are read ----------------------------------------------------------------------------------------------


def checked(word: str, words: tuple[str, ...], option: str) -> Any:  # noqa: ANN401 - one of the words
    """Return a word that is one of a few.

    Raises:
        FewstepError: it is another one.
    """
    if word not in words:
        raise FewstepError(f"{option} is {' or '.join(words)}, got {word!r}")
    return word


def words(text: str | None) -> tuple[str, ...] | None:
    """Read names separated by commas."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def parallel_config(wanted: bool, *, devices: str | None = None, **typed: Any) -> ParallelConfig | None:  # noqa: ANN401
    """Return how to sample in parallel, or None.

    Raises:
        FewstepError: options of it without ``--parallel``.
        SolverError: a number out of range.
    """
    named: dict[str, Any] = {name: value for name, value in typed.items() if value is not None}
    named |= {} if devices is None else {"devices": tuple(part.strip() for part in devices.split(","))}
    if named and not wanted:
        options = [f"--{name}" for name in named]
        raise FewstepError(f"{' and '.join(options)} {'is' if len(options) == 1 else 'are'} for sampling in parallel: say --parallel too")
    return ParallelConfig(**named) if wanted else None


def integers(text: str, option: str) -> tuple[int, ...]:
    """Read whole numbers separated by commas.

    Raises:
        FewstepError: there is something else between the commas.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise FewstepError(f"{option} wants whole numbers separated by commas, got {text!r}") from None


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Read numbers separated by commas.

    Raises:
        FewstepError: there is something else between the commas.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise FewstepError(f"{option} wants numbers separated by commas, got {text!r}") from None


def json_object(text: str, option: str) -> dict[str, Any]:
    """Read a JSON object, or the file that holds one.

    Raises:
        FewstepError: it is none.
    """
    if not text.lstrip().startswith("{"):
        return read_json(named_path(text))
    try:
        return parse_json(text, option)
    except ArtifactError as error:
        raise FewstepError(f"{option} wants a JSON object, got {text!r}: {error}") from None


def command() -> str:
    """Return this command line, as a reader would type it."""
    return shlex.join(["fewstep", *sys.argv[1:]])


# -- a dataclass as options ------------------------------------------------------------------------------------------


@dataclass(frozen=True, init=False)
class Flag:
    """How a field is shown where its own name, default and docstring are not enough.

    Args:
        names: of the option, as ``"--num", "-n"``, or ``"--anywhere/--one-pass"`` for a switch; by default that of the field.
        default: by default that of the field.
        help: by default the text of the field in the docstring of its class.
        more: a sentence after that text.
    """

    names: tuple[str, ...]
    default: Any
    help: str | None
    more: str

    def __init__(self, *names: str, default: Any = MISSING, help: str | None = None, more: str = "") -> None:  # noqa: ANN401
        for name, value in {"names": names, "default": default, "help": help, "more": more}.items():
            object.__setattr__(self, name, value)


NUM = Flag("--num", "-n", more="Under torchrun say -n.")  # which takes --num for an abbreviation of an option of its own


class Typed:
    """The options of several configs that were typed, of which one is made: the metadata is `FieldsOf`.

    Attributes:
        options: of each config, by its key.
        values: what was typed, by the path of the field.
    """

    def __init__(self, options: Mapping[str, _Options], values: Mapping[str, Any]) -> None:
        self.options, self.values = options, dict(values)

    def config(self, key: str, option: str) -> Any:  # noqa: ANN401 - a config
        """Make the config of a key.

        Args:
            key: which.
            option: the option that chose it, for the error.

        Raises:
            FewstepError: an option was typed that this config does not have (and which do).
        """
        own = self.options[key]
        for path in self.values:
            if path not in own.readers:
                having = ", ".join(other for other, options in self.options.items() if path in options.readers)
                name = next(options.called[path] for options in self.options.values() if path in options.readers)
                raise FewstepError(f"{name} is an option of {option} {having}, not of {key}: leave it out")
        return own.config(**own.chosen({path: own.readers[path](value) for path, value in self.values.items()}))


@dataclass(frozen=True)
class FieldsOf:
    """Metadata of a verb's parameter that is one of several configs: ``Annotated[Typed, FieldsOf(...)]``.

    A field is one option for all configs that have it; its help names them and their defaults, where they are not all alike.

    Args:
        configs: the classes, by what chooses between them.
        flags, leave_out: as of `Fields`; of those configs that have such a field.
    """

    configs: Mapping[str, type]
    flags: Mapping[str, Flag] | None = None
    leave_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fields:
    """Metadata of a verb's parameter that is a config: ``Annotated[FitConfig, Fields(...)]``.

    A config whose left-out fields have no default is annotated ``partial[Config]``: the verb calls it with those.

    Args:
        flags: how some fields are shown, by name; a field of a nested dataclass by its path, as ``"form.pool"``.
        leave_out: fields that the verb sets itself.
    """

    flags: Mapping[str, Flag] | None = None
    leave_out: tuple[str, ...] = ()


def expanded(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb that takes, in place of each config, one option for each of its fields, as typer reads them from the signature.

    Raises:
        TypeError: a flag or left-out field that the config does not have, or a field that no option can be made of.
    """
    parameters, builders = list[inspect.Parameter](), dict[str, Callable[[dict[str, Any]], Any]]()
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        hint = parameter.annotation
        shown = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Fields)), None)
        several = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, FieldsOf)), None)
        if several is not None:
            made, builders[parameter.name] = _of_several(parameter.name, several)
            parameters += made
            continue
        if shown is None:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=_with_paths(hint)))
            continue
        options = _Options(parameter.name, hint.__origin__, shown)
        parameters += options.parameters
        builders[parameter.name] = options.build

    own = set(inspect.signature(verb).parameters)

    def call(**given: Any) -> None:  # noqa: ANN401 - as typed
        built = {name: build(given) for name, build in builders.items()}
        verb(**{name: given[name] for name in given if name in own}, **built)

    whole: Any = call
    whole.__name__, whole.__doc__ = verb.__name__, verb.__doc__
    whole.__signature__ = inspect.Signature(parameters)
    whole.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return whole


def _with_paths(hint: Any) -> Any:  # noqa: ANN401 - the annotation of a parameter
    """Return the annotation of an option or argument, read by `named_path` if it is a path: typer would take an empty one for ``.``."""
    kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if Path not in (kind, *get_args(kind)):
        return hint
    shown = copy(marks[0])
    shown.parser, shown.metavar = named_path, shown.metavar or "PATH"
    return Annotated[kind, shown]


class _Options:
    """The options of one config of a verb.

    Attributes:
        parameters: one for each option, as typer wants them.
    """

    def __init__(self, prefix: str, kind: Any, shown: Fields) -> None:  # noqa: ANN401 - a dataclass, or a partial of one
        self.partial = get_origin(kind) is partial
        self.config: type = get_args(kind)[0] if self.partial else kind
        self.prefix, self.leave_out, self.flags = prefix, shown.leave_out, dict(shown.flags or {})
        self.readers, self.called = dict[str, Callable[[Any], Any]](), dict[str, str]()
        self.parameters = list(self._parameters(self.config, ""))
        unknown = (set(self.flags) | set(self.leave_out)) - set(_paths(self.config))
        if unknown:
            raise TypeError(f"{self.config.__name__} has no field {', '.join(sorted(unknown))}")

    def _parameters(self, config: Any, within: str) -> Iterator[inspect.Parameter]:  # noqa: ANN401 - a dataclass, or one with defaults
        texts, hints = documented(config), get_type_hints(config if isinstance(config, type) else type(config))
        nested = dict[str, Any]()
        for field in fields(config):
            path, default = within + field.name, _default(config, field)
            if path in self.leave_out:
                continue
            if is_dataclass(default):
                nested[path] = default
            else:
                yield self._parameter(path, field.name, default, hints[field.name], texts.get(field.name, ""))
        for path, default in nested.items():
            yield from self._parameters(default, f"{path}.")

    def _parameter(self, path: str, name: str, default: Any, hint: Any, text: str) -> inspect.Parameter:  # noqa: ANN401 - a type
        flag = self.flags.get(path, Flag())
        long = f"--{name.replace('_', '-')}"
        names = flag.names or ((f"{long}/--no-{long[2:]}",) if hint is bool else (long,))
        default = default if flag.default is MISSING else flag.default
        called = next(name for name in names if name.startswith("--")).split("/")[0]
        kind, metavar, self.readers[path] = _read_as(hint, called, path)
        self.called[path] = called
        if text.split(" ")[0].rstrip(",:") not in (default, *get_args(hint)):  # a value is shown as it is typed
            text = text[:1].upper() + text[1:]
        help = " ".join(filter(None, (text if flag.help is None else flag.help, flag.more)))
        option: Any = typer.Option(*names, help=help or None, metavar=metavar)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        empty = inspect.Parameter.empty if default is MISSING else shown
        annotation = _with_paths(Annotated[kind | None if default is None else kind, option])
        return inspect.Parameter(self._name(path), inspect.Parameter.KEYWORD_ONLY, default=empty, annotation=annotation)

    def _name(self, path: str) -> str:
        return f"{self.prefix}__{path.replace('.', '__')}"

    def build(self, given: dict[str, Any]) -> Any:  # noqa: ANN401 - a config
        """Make the config of the words that were typed."""
        typed = {path: given[self._name(path)] for path in self.readers}
        values = {path: None if value is None else self.readers[path](value) for path, value in typed.items()}
        chosen = self._chosen(self.config, "", values)
        return partial(self.config, **chosen) if self.partial else self.config(**chosen)

    def chosen(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the config for some of its fields, by their paths."""
        return self._chosen(self.config, "", values)

    def _chosen(self, config: Any, within: str, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - as above
        chosen = dict[str, Any]()
        for field in fields(config):
            path, default = within + field.name, _default(config, field)
            if path in values:
                chosen[field.name] = values[path]
            elif is_dataclass(default) and not isinstance(default, type) and any(key.startswith(f"{path}.") for key in values):
                chosen[field.name] = replace(default, **self._chosen(default, f"{path}.", values))
        return chosen


def _of_several(prefix: str, shown: FieldsOf) -> tuple[list[inspect.Parameter], Callable[[dict[str, Any]], Typed]]:
    """Return the options of several configs, and a function that notes which were typed."""
    options = dict[str, _Options]()
    for key, config in shown.configs.items():
        paths = set(_paths(config))
        flags = {path: flag for path, flag in (shown.flags or {}).items() if path in paths}
        options[key] = _Options(prefix, config, Fields(flags, tuple(path for path in shown.leave_out if path in paths)))
    having = dict[str, dict[str, inspect.Parameter]]()
    for key, one in options.items():
        for parameter in one.parameters:
            having.setdefault(parameter.name, {})[key] = parameter
    made = [_shared(found, list(options)) for found in having.values()]

    def note(given: dict[str, Any]) -> Typed:
        paths = {one._name(path): path for one in options.values() for path in one.readers}  # noqa: SLF001 - of this file
        return Typed(options, {path: given[name] for name, path in paths.items() if given[name] is not None})

    return made, note


def _shared(found: Mapping[str, inspect.Parameter], keys: Sequence[str]) -> inspect.Parameter:
    """Return the option of a field that some configs have: without a default, since each has its own, which the help says."""
    first = next(iter(found.values()))
    kind, *marks = get_args(first.annotation)
    kinds = [get_args(parameter.annotation)[0] for parameter in found.values()]
    plain = {one for each in kinds for one in (get_args(each) or (each,)) if one is not type(None)}
    if len(plain) > 1:  # whole numbers for one, any for another
        if plain != {int, float}:
            raise TypeError(f"no option can be made of {first.name}, which is of the types {', '.join(sorted(map(str, plain)))}")
        kind = float
    option = copy(marks[0])
    groups = dict[str, list[str]]()
    for key, parameter in found.items():
        groups.setdefault("none" if parameter.default is None else str(parameter.default), []).append(key)
    everywhere = len(found) == len(keys)
    if len(groups) == 1 and everywhere:
        note = f"Default: {next(iter(groups))}."
    elif len(groups) == 1:
        note = f"Of {', '.join(found)}; default: {next(iter(groups))}."
    else:
        each = [f"{value} of {', '.join(group)}" for value, group in groups.items()]
        note = f"Default: {'; '.join(each)}."
    option.help = " ".join(filter(None, (option.help, note)))
    optional = kind if first.default is None else kind | None
    return first.replace(annotation=Annotated[optional, option], default=None)


def _paths(config: Any, within: str = "") -> Iterator[str]:  # noqa: ANN401 - a dataclass, or one with defaults
    """Yield the names of all fields, those of nested dataclasses by their paths."""
    for field in fields(config):
        yield within + field.name
        if is_dataclass(default := _default(config, field)):
            yield from _paths(default, f"{within}{field.name}.")


def _default(config: Any, field: Field[Any]) -> Any:  # noqa: ANN401 - of any type, or MISSING
    """Return the default of a field: its value where ``config`` is no class but a nested default."""
    if not isinstance(config, type):
        return getattr(config, field.name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def _read_as(hint: Any, option: str, path: str) -> tuple[Any, str | None, Callable[[Any], Any]]:  # noqa: ANN401 - types
    """Return the type that an option has for typer, how its value is shown in help, and how a field's value is made of it."""
    members = [one for one in get_args(hint) if one is not type(None)]
    if get_origin(hint) is Literal:
        return str, "|".join(members), lambda word: checked(word, tuple(members), option)
    if get_origin(hint) is tuple:
        part = _plain_of(members[0], path)
        if part is int:
            return str, INTEGERS, lambda text: () if text == "none" else integers(text, option)
        if part is float:
            return str, NUMBERS, lambda text: () if text == "none" else numbers(text, option)
        return str, NAMES, lambda text: tuple(map(named_path if part is Path else part, words(text) or ()))
    if within := [one for one in members if get_origin(one) in (tuple, Literal)]:
        return _read_as(within[0], option, path)
    plain = _plain_of(hint, path)
    return plain, None, _as_whole if plain is int else lambda value: value


def _as_whole(value: Any) -> Any:  # noqa: ANN401 - a number
    """Return a whole number of an option that takes others for another config (see `_shared`); others stay, for the config to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _plain_of(hint: Any, path: str) -> Any:  # noqa: ANN401 - types
    """Return the type among those of a union that can be typed."""
    plain = [one for one in (get_args(hint) or (hint,)) if one in PLAIN]
    if len(plain) != 1:
        raise TypeError(f"no option can be made of {path}: {hint}")
    return plain[0]


def documented(config: object) -> dict[str, str]:
    """Return the text of each field in the ``Args`` and ``Attributes`` of a dataclass' docstring and its bases', without marks of code.

    An entry may be for several names, ``steps, batch: ...``, and go on in lines that are further in.
    """
    found, names, within = dict[str, list[str]](), list[str](), False
    kind = config if isinstance(config, type) else type(config)
    texts = [inspect.cleandoc(one.__doc__ or "") for one in reversed(kind.__mro__) if is_dataclass(one)]
    for line in "\n\n".join(texts).splitlines():
        if line and not line.startswith(" "):
            within, names = line in ("Args:", "Attributes:"), []
        elif within and (entry := re.match(r"    (\w+(?:, \w+)*): +(.*)", line)):
            names = entry[1].split(", ")
            found.update((name, [entry[2]]) for name in names)
        elif within and line.strip():
            for name in names:
                found[name].append(line.strip())
    return {name: " ".join(text).replace("`", "") for name, text in found.items()}
