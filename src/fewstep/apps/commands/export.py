"""``fewstep export``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fewstep.apps.console import print_json
from fewstep.apps.options import NUMBERS, AsJson, numbers
from fewstep.integrations.exports import TARGETS, check_levels, saved_samplers
from fewstep.integrations.exports import export as exported
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import GridError, counted

__all__ = ["export"]


def export(
    sampler: Annotated[Path, typer.Argument(help="Of a saved sampler: a folder, or one of nfe-NN.")],
    *,
    to: Annotated[str, typer.Option(help=f"The program that takes the list: {', '.join(TARGETS)}.")] = "sigmas",
    nfe: Annotated[int | None, typer.Option(help="Of several samplers, the one of so many evaluations.")] = None,
    shift: Annotated[
        float | None, typer.Option(help="Of the scheduler there that shifts what it is given, for diffusers (default 1) and vllm-omni.")
    ] = None,
    levels_only: Annotated[
        bool, typer.Option("--levels-only", help="The levels alone, though the solver or its coefficients do not travel with them.")
    ] = False,
    maker: Annotated[
        str | None,
        typer.Option(metavar=NUMBERS, help="The levels that a distilled checkpoint was made for; a sampler with others is refused."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A file for the list; by default it is printed.")] = None,
    json: AsJson = False,
) -> None:
    """Write the noise levels of a saved sampler for another program.

    The list goes to stdout, one line for each sampler, and how to use it to stderr.
    """
    samplers = saved_samplers(sampler)
    found = [one for one in samplers if nfe in (None, one.nfe)]
    if not found:
        raise GridError(f"no sampler of {nfe} evaluations in {sampler}, only of {', '.join(str(one.nfe) for one in samplers)}")
    if maker is not None:
        for one in found:
            check_levels(one, numbers(maker, "--maker"))
    made = [(one, exported(one, to, shift=shift, levels_only=levels_only)) for one in found]
    if out is not None:
        write_whole(out, "".join(f"{export.text}\n" for _, export in made).encode())
    if json:
        print_json([{"nfe": one.nfe, "sampler": one.name, **asdict(export), "out": out} for one, export in made])
        return
    for one, export in made:
        typer.echo(f"{one.name}, {counted(one.nfe, 'evaluation')}: {export.use}", err=True)
        if out is None:
            typer.echo(export.text)
    if out is not None:
        typer.echo(f"list: {out}")
