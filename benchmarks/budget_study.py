"""What a budget buys: samplers of 5 and 8 evaluations fitted with 1000 to 150,000 network evaluations, on five problems and three seeds.

python benchmarks/budget_study.py --out benchmarks/results/budget_study.json --picture docs/budget.png

A row is one fit: its budget, what it spent, and the errors of its samplers over 256 noises that no fit has seen, beside the best of all
hand-made samplers on the same noises (chosen on other ones). ``gain`` is the logarithm of the ratio of mean errors; ``share`` that of the
mean gain of the largest budget. Rows that are there are not made again. The Stable Diffusion is that of ``pipeline_study.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pipeline_study
import torch
from torch import Tensor

import fewstep
from fewstep.core.spacings import GRIDS, make_grid
from fewstep.core.tableau import Nodes, Tableau, tabulate
from fewstep.learn.search.endpoint import EndpointError, per_sample_rmse
from fewstep.learn.teacher.gram import fine_grid, solve
from fewstep.models.problem import Problem
from fewstep.runtime.artifact import write_whole
from fewstep.runtime.errors import FewstepError

BUDGETS, COUNTS, SEEDS, NUM, LEVELS, BATCH = (1000, 3000, 10_000, 150_000), [5, 8], range(3), 256, 100, 64
FIRST, RANKING, STRIDE = 9_000_000, 8_000_000, 100_000  # seeds of the noises, of those that rank hand-made samplers; between fits
PROBLEMS = {
    "digits-edm": ("digits-edm", 1.0),
    "digits-ddpm": ("digits-ddpm", 1.0),
    "CIFAR-10 16x16": ("assets/cifar10-16", 1.0),
    "CIFAR-10 16x16, guidance 2": ("assets/cifar10-16", 2.0),
    "small Stable Diffusion": ("runs/pipeline/model", pipeline_study.GUIDANCE),
}


def model_of(source: str) -> fewstep.Model:
    if source.startswith("runs"):
        return fewstep.from_pipeline(pipeline_study.pipeline(Path(source)), pipeline_study.PROMPTS)
    return fewstep.load_model(source)


class Held:
    """Noises that no fit has seen, with their exact ends."""

    def __init__(self, problem: Problem, first: int, num: int) -> None:
        nodes = Nodes.at(problem.schedule, fine_grid(problem.schedule, LEVELS).t)
        self.batches = []
        for begin in range(first, first + num, BATCH):
            seeds = range(begin, min(begin + BATCH, first + num))
            x, cond, end = problem.start(seeds, nodes), problem.cond(seeds), torch.empty(0)
            for end, _ in solve(problem.teacher, nodes, x, cond):  # noqa: B007
                pass
            self.batches.append(EndpointError(problem.teacher, x, end, cond))

    def errors(self, tableau: Tableau) -> Tensor:
        return torch.cat([per_sample_rmse(batch.run(tableau)[0]) for batch in self.batches])


def hand_made(problem: Problem, nfe: int) -> Iterator[tuple[str, Tableau]]:
    """Yield all pairs of a solver and a standard grid that use exactly ``nfe`` evaluations."""
    statistics = problem.model.statistics(problem.guidance)
    solvers = {
        name: fewstep.make_solver(name) for name in ("dpm-solver-pp-2m", "dpm-solver-pp-3m", "unipc-2", "unipc-3", "ipndm", "deis-3")
    }
    if statistics is not None:
        solvers["dpm-solver-v3"] = fewstep.make_solver("dpm-solver-v3", statistics=statistics)
    for name, solver in solvers.items():
        for spacing in GRIDS:
            with suppress(FewstepError):
                grid = make_grid(spacing, problem.schedule, solver.steps_on(problem.schedule, nfe))
                if float(grid.t[0]) == problem.schedule.t_max:
                    yield f"{name} on {spacing}", tabulate(solver, solver.nodes(grid, problem.schedule))


def figures(errors: Tensor) -> list[float]:
    return [float(errors.mean()), float(errors.square().mean().sqrt())]


def wanted() -> Iterator[tuple[str, int | None, int]]:
    """Yield the problems, budgets and seeds in the order in which they say most; no budget for hand-made samplers."""
    yield from ((name, None, 0) for name in PROBLEMS)
    for seed in SEEDS:
        yield from ((name, budget, seed) for budget in BUDGETS for name in PROBLEMS)


def row_of(problem: Problem, held: Held, budget: int | None, seed: int) -> dict[str, Any]:
    if budget is None:
        few, found = Held(problem, RANKING, BATCH), {}
        for nfe in COUNTS:
            pairs = dict(hand_made(problem, nfe))
            best = min(pairs, key=lambda name: float(few.errors(pairs[name]).mean()))
            found[str(nfe)] = {"sampler": best, "errors": figures(held.errors(pairs[best]))}
        return {"samplers": found}
    begin = time.perf_counter()
    config = fewstep.FitConfig(budget=budget, seed=fewstep.FitConfig().seed + STRIDE * seed)
    made = fewstep.fit(problem.model, COUNTS, guidance=problem.guidance, config=config)
    seconds = time.perf_counter() - begin
    cards = {nfe: made[nfe].card for nfe in COUNTS}
    spent = sum(card["network_evaluations"] for card in cards.values()) + cards[COUNTS[0]]["trajectory_evaluations"]
    found = {str(nfe): {"sampler": cards[nfe]["chosen"], "errors": figures(held.errors(made[nfe].tableau))} for nfe in COUNTS}
    return {"spent": spent, "seconds": seconds, "samplers": found}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each problem, number of evaluations and budget the mean errors over seeds, the gain, and its share of the largest's."""
    found = []
    for name in PROBLEMS:
        mine = [row for row in rows if row["problem"] == name]
        rival = next((row for row in mine if row["budget"] is None), None)
        if rival is None:
            continue
        for nfe in map(str, COUNTS):
            best, gains = rival["samplers"][nfe], dict[int, list[float]]()
            for budget in BUDGETS:
                errors = [row["samplers"][nfe]["errors"] for row in mine if row["budget"] == budget]
                if not errors:
                    continue
                gains[budget] = [sum(math.log(best["errors"][k] / one[k]) for one in errors) / len(errors) for k in (0, 1)]
                means = [sum(one[k] for one in errors) / len(errors) for k in (0, 1)]
                about = {"problem": name, "nfe": int(nfe), "budget": budget, "seeds": len(errors), "hand_made": best["sampler"]}
                found.append({**about, "rival": best["errors"], "errors": means, "gain": gains[budget]})
            for row in found:
                if (row["problem"], row["nfe"]) == (name, int(nfe)) and BUDGETS[-1] in gains:
                    row["share"] = [one / whole for one, whole in zip(row["gain"], gains[BUDGETS[-1]], strict=True)]
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["problem"] for row in rows))
    figure = Figure(figsize=(3.0 * len(names), 3.2), layout="constrained")
    for place, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for nfe, colour in zip(COUNTS, ("#1f77b4", "#d95f02"), strict=True):
            mine = [row for row in rows if (row["problem"], row["nfe"]) == (name, nfe)]
            place.plot([row["budget"] for row in mine], [row["errors"][0] for row in mine], "o-", color=colour, label=f"{nfe} evaluations")
            place.axhline(mine[0]["rival"][0], color=colour, linestyle=":", linewidth=1)
        place.set(xscale="log", yscale="log", title=name, xlabel="network evaluations of the fit")
        place.title.set_size(9)
    first = figure.axes[0]
    first.set_ylabel("mean error of a sample")
    first.legend(frameon=False, fontsize=8, title="dotted: best by hand", title_fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--only", nargs="*", help="problems by name")
    parser.add_argument("--most", type=int, default=BUDGETS[-1], help="the largest budget")
    args = parser.parse_args()
    stored = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    rows: list[dict[str, Any]] = stored["rows"]
    problems, held = dict[str, Problem](), dict[str, Held]()
    for name, budget, seed in wanted():
        key = {"problem": name, "budget": budget, "seed": seed}
        there = any(all(row[part] == value for part, value in key.items()) for row in rows)
        if there or (args.only and name not in args.only) or (budget or 0) > args.most:
            continue
        if name not in problems:
            source, guidance = PROBLEMS[name]
            problems[name] = Problem(model_of(source), guidance, torch.device("cpu"))
            held[name] = Held(problems[name], FIRST, NUM)
        row = {**key, **row_of(problems[name], held[name], budget, seed)}
        rows = [*rows, row]
        whole = {"command": "python benchmarks/budget_study.py", "num": NUM, "summary": summary(rows), "rows": rows}
        write_whole(args.out, (json.dumps(whole, indent=1) + "\n").encode())
        print(json.dumps(row), flush=True)  # noqa: T201
    if args.picture:
        draw(summary(rows), args.picture)


if __name__ == "__main__":
    main()
