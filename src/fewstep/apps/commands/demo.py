"""``fewstep demo``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from fewstep.apps.commands.bench import NFE, run_bench
from fewstep.apps.console import console, next_command, print_json
from fewstep.apps.options import AsJson, command
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.models.carried import FITTED, OPTIMIZED
from fewstep.models.zoo import load_model
from fewstep.runtime.process import process

__all__ = ["demo"]

MODEL = "digits-edm"
HAND_MADE = ("ddim", "heun", "dpm-solver-pp-2m", "dpm-solver-pp-3m", "unipc-2", "deis-3", "ipndm", "dpm-solver-v3")
ITS_OWN = ("ddim", "dpm-solver-pp-2m", "unipc-2", "dpm-solver-v3", FITTED)


def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
    num: Annotated[int, typer.Option("--num", "-n", help="How many noises.")] = 512,
    json: AsJson = False,
) -> None:
    """Run the benchmark of the README on a bundled model.

    It is sampled by the field's solvers and by samplers of its own at 5 to 10 evaluations; a table and pictures show the result.
    """
    model = load_model(MODEL)
    run_bench(model, BenchmarkConfig(HAND_MADE, ("karras", "angle"), NFE, num=num), out, command())
    shown = all(map(find_spec, ("jinja2", "matplotlib")))
    compared = run_bench(model, BenchmarkConfig(ITS_OWN, (OPTIMIZED,), NFE, num=num), out, command(), report=shown)
    if process()[0]:
        return
    if json:
        print_json(compared.results)
        return
    console.print(str(compared))
    console.print(f"rows: {out / 'results.json'}\npictures, rows solvers, columns evaluations, same seeds: {out / 'pictures.png'}")
    page = out / "report.html"
    console.print(f"report: {page}" if page.exists() else "report: none: pip install 'fewstep[report]'")
    console.print(next_command("sample", MODEL, "--solver", FITTED, "--nfe", 6, "--out", "runs/sample"))
