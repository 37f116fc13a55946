"""``fewstep ui``."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from fewstep.apps.console import console
from fewstep.apps.options import Trust
from fewstep.evaluate.report.template import check_packages
from fewstep.runtime.artifact import check_writable
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.process import process

__all__ = ["ui"]


def ui(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A model to have on the page beside the bundled ones: a folder, or module:function."),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the page: what it makes, and all that it may read.")] = Path("runs/ui"),
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="By default the first from 7860 on that is free.")] = None,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
    share: Annotated[
        bool, typer.Option("--share", help="Also make a public link through gradio's servers: others can then use it.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Show a page to play with: sample, compare, fit, inspect and restore in the browser.

    It answers this machine alone, and needs no network. What runs in the background ends with it; a stopped job continues when you like.
    """
    check_writable(out)
    if find_spec("gradio") is None:
        raise FewstepError("the page needs gradio: pip install 'fewstep[ui]'")
    check_packages()
    if process()[1] > 1:
        raise FewstepError("the page is the work of one process: run it without torchrun")
    from fewstep.apps.page.jobs import Jobs
    from fewstep.apps.page.models import Models
    from fewstep.apps.page.page import serve
    from fewstep.apps.page.workshop import Workshop

    out.mkdir(parents=True, exist_ok=True)
    jobs = Jobs(out)
    page = serve(Workshop(out, Models(out, model, trust=trust), jobs), port=port, share=share, show=show)
    jobs.prepare()
    console.print(f"page: {page.local_url}")
    if page.share_url:
        console.print(f"public: {page.share_url}")
    console.print("end it by Ctrl+C")
    try:
        while True:
            time.sleep(3600)
    finally:
        page.close()
        jobs.close()
