"""How well the error bound of a schedule ranks what first-order sampling really does, in every form, on the bundled models.

python benchmarks/schedule_bounds.py --out benchmarks/results/schedule_bounds.json

For 200 random schedules of 6 steps: Spearman's rank correlation between bound and measured RMSE, and the least ratio of the two (an
upper bound has at least 1). For the optimum of each form: its measured RMSE. For the paper's Monte-Carlo descent: its bound over that of
the global optimum, both estimated on the same fresh data. And the seconds that the optima for all numbers of steps up to 20 take.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from fewstep import TimeGrid, load_model, make_grid, make_solver, seeded_noise
from fewstep.core.denoiser import Cond
from fewstep.core.tableau import Nodes
from fewstep.data.images import load_images
from fewstep.learn.search.bound import Bound, descend_bound, monte_carlo_bound
from fewstep.learn.search.refine import SolverEndpointError
from fewstep.learn.teacher.gram import Gram, GramConfig, collect_gram, fine_grid
from fewstep.models.formats.folders import Model
from fewstep.models.generate import sample
from fewstep.models.problem import Problem
from fewstep.runtime.artifact import write_whole
from fewstep.sampling.noise import start_noise
from fewstep.sampling.reference import reference_sampler

STEPS, SCHEDULES, NOISES, LEVELS, TRAJECTORIES = 6, 200, 128, 128, 128
OPTIMA = (3, 5, 8, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = {name: study(load_model(name)) for name in ("digits-edm", "digits-ddpm")}
    results["monte_carlo"] = {str(n): monte_carlo(load_model("digits-edm"), n) for n in (4, 6)}
    write_whole(
        args.out, (json.dumps({"command": f"python benchmarks/schedule_bounds.py --out {args.out}", **results}, indent=1) + "\n").encode()
    )


def study(model: Model) -> dict[str, Any]:
    schedule = model.schedule
    gram = collect_gram(Problem(model), GramConfig(LEVELS, TRAJECTORIES, jacobian=True))
    assert gram is not None
    times = fine_grid(schedule, LEVELS).t
    error = problem(model)
    generator = torch.Generator().manual_seed(0)
    inner = [sorted((torch.randperm(gram.cells - 1, generator=generator)[: STEPS - 1] + 1).tolist()) for _ in range(SCHEDULES)]
    schedules = [[0, *levels, gram.cells] for levels in inner]
    measured = [error.rmse(TimeGrid(times[levels])) for levels in schedules]
    standard = {
        name: {str(n): error.rmse(make_grid(name, schedule, n)) for n in OPTIMA}
        for name in ("karras", "logsnr", "uniform", "quadratic", "angle")
    }
    forms = []
    begin = time.perf_counter()
    Bound(gram).best(20)
    seconds = time.perf_counter() - begin
    for amplification, total, local in product(("plain", "trace", "norm"), ("sum", "squares"), ("exact", "jensen")):
        bound = Bound(gram, amplification, total, local)  # pyright: ignore[reportArgumentType]
        values, best = [bound(levels) for levels in schedules], bound.best(max(OPTIMA))
        form = {
            "amplification": amplification,
            "total": total,
            "local": local,
            "rank_correlation": float(spearmanr(values, measured)[0]),
            "least_ratio": min(value / rmse for value, rmse in zip(values, measured, strict=True)),
            "rmse_of_optimum": {str(n): error.rmse(TimeGrid(times[best[n]])) for n in OPTIMA},
        }
        print(model.name, form)
        forms.append(form)
    return {"forms": forms, "standard": standard, "seconds_for_all_optima": seconds}


def problem(model: Model) -> SolverEndpointError:
    """First-order sampling from fresh noises, and their exact ends."""
    tight, seeds = reference_sampler(model.schedule), range(5_000_000, 5_000_000 + NOISES)
    exact, start = sample(model, tight, seeds=seeds), start_noise(tight.tableau.nodes, seeds, model.need_shape())
    return SolverEndpointError(model, make_solver("ddim"), start, exact, model.labels(seeds))


def monte_carlo(model: Model, steps: int) -> dict[str, float]:
    """The bound that the descent reaches, and that of the global optimum of the same functional: over diffused images."""
    images, schedule = load_images("digits"), model.schedule

    def draw(step: int, count: int = 32) -> tuple[torch.Tensor, torch.Tensor, Cond]:
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(len(images.x), (count,), generator=generator)
        assert images.labels is not None
        noise = seeded_noise(range(step * count, (step + 1) * count), model.need_shape(), stream=7)
        return images.dequantised(index, generator), noise, images.labels[index]

    begin = time.perf_counter()
    found = descend_bound(model, make_grid("karras", schedule, steps), draw, iterations=150)
    seconds = time.perf_counter() - begin
    grid = fine_grid(schedule, LEVELS)
    nodes = Nodes.at(schedule, grid.t)
    x0, noise, labels = draw(10_000, 256)
    with torch.no_grad():
        states = torch.stack([alpha * x0 + sigma * noise for alpha, sigma in zip(nodes.alpha.float(), nodes.sigma.float(), strict=True)])
        outputs = torch.stack([model(x, t, labels) for x, t in zip(states, nodes.t, strict=True)])
        best = Bound(Gram.of(nodes, states, outputs), local="jensen").best(steps)[steps]
        fresh = draw(20_000, 512)
        u = torch.rand(steps, 512, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        reached, optimum, start = (
            float(monte_carlo_bound(model, torch.exp(-schedule.lam(t)), *fresh, u))
            for t in (found.t, grid.t[best], make_grid("karras", schedule, steps).t)
        )
    row = {"start": start, "descent": reached, "global_optimum": optimum, "ratio": reached / optimum, "seconds": seconds}
    print(steps, row)
    return row


if __name__ == "__main__":
    main()
