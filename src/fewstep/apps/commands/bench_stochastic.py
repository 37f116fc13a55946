"""``fewstep bench --stochastic``: compare samplers that add noise with samplers that do not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.apps.console import console, print_json, progress, show_table
from fewstep.apps.models import guidance_of, made_for, open_model
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.report.stochastic_page import write_stochastic
from fewstep.evaluate.stochastic.rows import NoiseRow
from fewstep.evaluate.stochastic.run import StochasticBench, StochasticBenchConfig
from fewstep.evaluate.stochastic.verdict import Contest, contests, ranked_rows
from fewstep.models.carried import FITTED
from fewstep.models.problem import Problem
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.process import default_device, process
from fewstep.solvers import takes_statistics

__all__ = ["bench_noise", "needs_statistics"]

SOLVERS = ("ddim", "dpm-solver-pp-2m", "unipc-2", "ddim:eta=1", "sde-dpm-solver-pp-2m", "er-sde-3", "seeds-2", "sa-solver", "heun-churn")
GRIDS, NFE = ("karras", "angle"), (5, 10, 20)
HEADINGS = ("nfe", "solver", "grid", "paths", "distance", "±", "95 %", "precision", "recall", "labels", "spread")
WORDS = {"noise": "noise is better", "no noise": "no noise is better", "not apart": "not apart", None: "not compared"}


def bench_noise(
    model: str,
    rest: partial[BenchmarkConfig],
    typed: Mapping[str, Any],
    out: Path,
    command: str,
    *,
    guidance: float | None,
    report: bool,
    trust: bool,
    json: bool,
) -> None:
    """Run a benchmark of stochastic samplers as it was typed, and show its rows.

    Args:
        model: as typed.
        rest: the fields of a benchmark that have options of their own.
        typed: further fields of `StochasticBenchConfig`; one that is None was not typed.
        out: the folder.
        command: the command line.
        guidance: as typed.
        report: whether to write the page.
        trust: see `open_model`.
        json: whether to print the results for machines.

    Raises:
        FewstepError: as `StochasticBench`; nothing is written then.
    """
    given = {name: value for name, value in typed.items() if value is not None}
    alone = bool(rest.keywords["samplers"]) and not rest.keywords["peers"] and not {"solvers", "grids"} & set(given)
    opened = open_model(model, trust=trust)
    default = dict(
        zip(("solvers", "grids", "nfe"), ((), (), ()) if alone else made_for(opened, alone=True) or (SOLVERS, GRIDS, NFE), strict=True)
    )
    config = StochasticBenchConfig(**{**rest.keywords, **default, **given, "guidance": guidance_of(opened, guidance)})
    needs_statistics(config)
    bench = StochasticBench.of(Problem(opened, config.guidance, default_device()), config)
    first, planned = process()[0] == 0, len(bench.entries) - len(bench.skipped)
    if first and not json:
        console.print(
            f"{opened.name}: {planned} rows, {config.num} noises, {config.paths} noise paths: at most {bench.cost:,} network evaluations"
        )
        for why in dict.fromkeys(bench.skipped.values()):
            console.print(f"no row: {why}")
    with progress(f"benchmark of {opened.name}", len(bench.entries)) as on_progress:
        results = bench.run(out, command=command, on_progress=on_progress)
    if not first:
        return
    page = write_stochastic(results, out) if report else None
    if json:
        print_json(results)
        return
    rows = [NoiseRow(**row) for row in results["rows"]]
    data, num = results["data"], results["problem"]["num"]
    title = (
        f"{opened.name}: Frechet distance (± over noise paths) of {num} samples to {data['num']} images, in the features {data['features']}"
    )
    show_table(
        f"{title} (two halves of the data: {data['fd_halves']:.2f})",
        HEADINGS,
        [_cells(row) for row in ranked_rows(rows)],
        left=("solver", "grid"),
    )
    for row in rows:
        if row.failed is not None:
            console.print(f"{row.solver} on {row.grid} with {row.nfe} failed: {row.failed}")
    for one in contests(rows):
        console.print(_line(one))
    for each in sorted({row.calls // row.nfe for row in rows if row.calls is not None} - {1}):
        console.print(f"each evaluation is {each} calls of the network")
    console.print(f"rows: {out / 'results.json'}")
    console.print("report: the same command with --report" if page is None else f"report: {page}")


def needs_statistics(config: BenchmarkConfig) -> None:
    """Refuse statistics where no solver takes them.

    Raises:
        FewstepError: there are.
    """
    asked = [flag for flag, given in (("--statistics", config.statistics), ("--any-statistics", config.any_statistics)) if given]
    if asked and not any(takes_statistics(one) for one in config.solvers if one != FITTED):
        raise FewstepError(f"none of {', '.join(config.solvers) or 'these samplers'} takes statistics: leave {' and '.join(asked)} out")


def _cells(row: NoiseRow) -> list[str]:
    """Return a row as the console's table shows it."""

    def shown(value: float | None, pattern: str = "{:.2f}") -> str:
        return "" if value is None else pattern.format(value)

    interval = "" if row.fd_ci is None else f"{row.fd_ci[0]:.2f}-{row.fd_ci[1]:.2f}"
    names = [f"{row.nfe}", row.solver, row.grid, f"{row.paths}" if row.stochastic else "none"]
    figures = [shown(row.fd), shown(row.fd_spread), interval, shown(row.precision), shown(row.recall), shown(row.labels, "{:.3f}")]
    return [*names, *figures, shown(row.spread, "{:.3f}")]


def _line(one: Contest) -> str:
    """Say in a line which kind of sampler is closer to the data with so many evaluations."""
    kinds = {"with noise": one.stochastic, "without": one.deterministic}
    named = ", ".join(f"{kind} {row.solver} {row.fd:.2f}" for kind, row in kinds.items() if row is not None and row.fd is not None)
    return f"with {one.nfe} evaluations: {WORDS[one.verdict]} ({named})"
