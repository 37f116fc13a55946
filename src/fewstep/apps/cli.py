"""The command line: the verbs put together, and the exit codes."""

from __future__ import annotations

import signal
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from fewstep.apps.commands.bench import bench
from fewstep.apps.commands.calibrate import calibrate
from fewstep.apps.commands.convert import convert
from fewstep.apps.commands.demo import demo
from fewstep.apps.commands.distill import distill
from fewstep.apps.commands.export import export
from fewstep.apps.commands.finetune import finetune
from fewstep.apps.commands.fit import fit
from fewstep.apps.commands.inspect import inspect
from fewstep.apps.commands.models import models
from fewstep.apps.commands.optimize import optimize
from fewstep.apps.commands.push import push
from fewstep.apps.commands.report import report
from fewstep.apps.commands.restore import restore
from fewstep.apps.commands.sample import sample
from fewstep.apps.commands.train import train
from fewstep.apps.commands.trajectories import trajectories
from fewstep.apps.commands.ui import ui
from fewstep.apps.options import expanded
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.process import lost_another

__all__ = ["VERBS", "main"]

VERBS = (
    models,
    sample,
    restore,
    bench,
    report,
    inspect,
    fit,
    calibrate,
    optimize,
    finetune,
    trajectories,
    distill,
    train,
    convert,
    export,
    push,
    demo,
    ui,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
for verb in VERBS:
    app.command()(expanded(verb))


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fewstep {version('fewstep')}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Sample any diffusion or flow model in a few steps."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as an interrupt does: what it leaves half made is removed on the way out."""


def _terminate(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: a second would stop the cleaning up
    raise _Terminated


def main() -> Any:  # noqa: ANN401
    """Run the command line, and exit with 0 when it is done.

    Else with 2 for bad input (one line on stderr; of a misspelt option also where its help is), 1 where another process of the run has
    ended, 130 when interrupted, 143 when terminated.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except FewstepError as error:
        typer.echo(f"fewstep: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # of the machine: a full disk, a closed pipe, a folder that went
        typer.echo(f"fewstep: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", err=True)
        sys.exit(2)
    except RuntimeError as error:
        if not lost_another(error):
            raise
        typer.echo("fewstep: another process of this run has ended (see above for why); run the same command to continue", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:  # typer turns an interrupt into an exit with 130
        if isinstance(end, SystemExit) and end.code != 130:
            raise
        terminated = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # see `_terminate`; others may have raised it anew
        typer.echo(f"fewstep: {'terminated' if terminated else 'interrupted'}; run the same command to continue", err=True)
        sys.exit(143 if terminated else 130)
    finally:
        signal.signal(signal.SIGTERM, before)
