"""Samplers on networks that nobody here trained (see `foreign_networks`): hand-made, on optimised grids, and fitted.

    python -m benchmarks.foreign_study [--network hsc-32] [--nfe 5,8] [--num 1024] [--out benchmarks/results/foreign] [--plan]

Of each network ``OUT/NETWORK.json``. Every solver on every grid, DPM-Solver-v3 by calibrated statistics among them, is run on the first
noises alone (``screen`` there). Whatever has at most 1.5 times the least RMSE or the least mean error of these is then run on all
(``rows``), and so are optimised grids and samplers fitted from three seeds. All is done by the public functions: `calibrate`, `optimize`,
`fit` and `benchmark`. Each row is written when it is there, and a killed run continues by the same command; samples, samplers and
statistics stay in ``--work``. What is to be done, and what it costs, is said first; with ``--plan`` that is all.

A row has the columns of `fewstep bench`, the mean error, the 99th percentile and the share of samples that part (error above three times
the median). A fitted one has a verdict on the paired errors of the best hand-made sampler, for the RMSE and for the mean error each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.cifar10.study import GRIDS, SOLVERS
from benchmarks.foreign_networks import NETWORKS, STUDIED, load
from benchmarks.rivals.study import figures, seconds
from torch import Tensor

import fewstep
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.benchmark.run import benchmark
from fewstep.evaluate.metrics.confidence import compare_errors
from fewstep.evaluate.rows import Row, has_errors, picture_file, read_errors
from fewstep.learn.samplers.calibrate import CalibrationConfig
from fewstep.learn.samplers.fit import plan_fit
from fewstep.learn.samplers.fit_plan import FitConfig
from fewstep.learn.samplers.optimize_plan import OptimizeConfig
from fewstep.models.problem import Problem
from fewstep.runtime.artifact import read_json, write_whole
from fewstep.sampling.reference import REFERENCE_NFE
from fewstep.solvers import takes_statistics

COUNTS = (5, 8, 6, 4, 3, 10)
NUM, SCREEN, NEAR = 1024, 128, 1.5  # noises; those that rank every pair; how far from the least a pair is then run on all
BATCH = 64
SEEDS = (4_000_000, 5_000_000, 6_000_000)  # of fits
FIT = FitConfig(first=True)
OPTIMIZE, OPTIMIZED = OptimizeConfig(budget=10_000), ("unipc-2", "unipc-3", "dpm-solver-v3")
CALIBRATION = CalibrationConfig()
BY_HAND, OWN_GRID, FITTED = "by hand", "optimised grid", "fitted"  # kinds of rows
COLUMNS = ("solver", "nfe", "rmse", "rmse_ci", "error_median", "error_p95")
JVP = 4  # evaluations that a datum of a calibration takes at each level, about


class Study:
    """One network, and what is known of it.

    Args:
        name: of `foreign_networks.NETWORKS`.
        model: the network.
        counts: numbers of evaluations, in the order in which they are measured.
        num: noises of every row.
        out: the file of the rows.
        work: the folder of everything else.
        command: for the file.
    """

    def __init__(self, name: str, model: fewstep.Model, counts: Sequence[int], num: int, out: Path, work: Path, command: str) -> None:
        self.name, self.model, self.counts, self.num, self.out, self.work, self.command = name, model, counts, num, out, work, command
        self.said = ""
        self.whole = "rows" if num > SCREEN else "screen"  # where rows of all noises lie: among those of a few, if these are all

    @property
    def screen(self) -> int:
        """The noises that rank every pair."""
        return min(SCREEN, self.num)

    # -- the parts, each of which is there or is made -------------------------------------------------------------------

    @cached_property
    def statistics(self) -> Path:
        """The folder of the statistics, which are calibrated where they are not there."""
        fewstep.calibrate(self.model, out=self.work / "statistics", config=CALIBRATION)
        return self.work / "statistics"

    def screened(self, nfe: int) -> dict[str, list[str]]:
        """Run every pair on a few noises, and return the solvers that are run on all, by grid."""
        found = self._bench("screen", nfe, self.screen, SOLVERS.split(","), GRIDS.split(","))
        found = [row for row in found if row["kind"] == BY_HAND]
        least = {by: min(row[by] for row in found) for by in ("rmse", "mean_error")}
        near = [row for row in found if any(row[by] <= NEAR * value for by, value in least.items())]
        return {grid: [row["solver"] for row in near if row["grid"] == grid] for grid in dict.fromkeys(row["grid"] for row in near)}

    def by_hand(self, nfe: int) -> None:
        """Run the pairs that may be the best on all noises."""
        for grid, solvers in self.screened(nfe).items():
            self._bench(self.whole, nfe, self.num, solvers, [grid])

    def on_own_grids(self, nfe: int) -> None:
        """Run solvers on grids that are optimised for them."""
        folder = self.work / "optimized"
        for solver in OPTIMIZED:
            statistics = self.statistics if takes_statistics(solver) else None
            fewstep.optimize(self.model, solver, sorted(COUNTS), out=folder, config=OPTIMIZE, statistics=statistics)
        self._bench(self.whole, nfe, self.num, samplers=[folder])

    def fitted(self, nfe: int, seed: int) -> None:
        """Run a sampler that is fitted from a seed."""
        folder = self.work / f"fitted-{seed}"
        fewstep.fit(
            self.model, nfe, out=folder, config=replace(FIT, seed=seed), on_progress=lambda done, text: print(f"  {text}", flush=True)
        )
        self._bench(self.whole, nfe, self.num, samplers=[folder])

    def _bench(
        self, part: str, nfe: int, num: int, solvers: Sequence[str] = (), grids: Sequence[str] = (), samplers: Sequence[Path] = ()
    ) -> list[dict[str, Any]]:
        """Run rows of a benchmark that are not there yet, write the file anew, and return all rows of this part and ``nfe``."""
        config = BenchmarkConfig(
            solvers=tuple(solvers),
            grids=tuple(grids),
            nfe=(nfe,),
            num=num,
            batch=BATCH,
            statistics=self.statistics if solvers else None,
            samplers=tuple(samplers),
        )
        benchmark(self.model, config, self.work / part, command=self.command, on_progress=lambda done, text: self._write(text))
        return [row for row in self.rows(part) if row["nfe"] == nfe]

    # -- what is written ------------------------------------------------------------------------------------------------

    def rows(self, part: str) -> list[dict[str, Any]]:
        """Return the rows of a part that are there, with what is read from the errors of their samples."""
        found: list[dict[str, Any]] = []
        for row, errors in self._measured(part):
            kind = BY_HAND if row.grid in GRIDS.split(",") else FITTED if row.solver == FITTED else OWN_GRID
            about = {"kind": kind, "grid": row.grid if kind == BY_HAND else None}
            if kind == FITTED:
                about |= {"seed": int(row.grid.rpartition("-")[2]), **self._card(row)}
            found.append({**about, **{key: getattr(row, key) for key in COLUMNS}, **figures(errors)})
        return found

    def _measured(self, part: str) -> list[tuple[Row, Tensor]]:
        folder = self.work / part
        if not (folder / "results.json").exists():
            return []
        rows = [Row(**one) for one in read_json(folder / "results.json")["rows"]]
        files = [(row, picture_file(folder, row.key)) for row in rows if row.rmse is not None]
        return [(row, read_errors(path)) for row, path in files if has_errors(path)]

    def _card(self, row: Row) -> dict[str, Any]:
        """Return what the fit itself says: the stage that was chosen, errors of all stages on held-out noises, and its cost."""
        card = fewstep.Sampler.load(Path(row.grid) / f"nfe-{row.nfe:02d}").card
        cost = card["network_evaluations"] + card["trajectory_evaluations"]
        return {"chosen": card["chosen"], "stages": card["stages"], "evaluations": cost}

    def verdicts(self) -> list[dict[str, Any]]:
        """Compare each fitted sampler with the best hand-made one of as many evaluations, by the RMSE and by the mean error.

        A mean is the square of the RMS of square roots, so both verdicts are those of `compare_errors`.
        """
        found, measured, grids = list[dict[str, Any]](), self._measured(self.whole), GRIDS.split(",")
        for ours, errors in (pair for pair in measured if pair[0].solver == FITTED):
            theirs = [pair for pair in measured if pair[0].nfe == ours.nfe and pair[0].grid in grids]
            measures: dict[str, Callable[[Tensor], Tensor]] = {"rmse": lambda e: e.double(), "mean_error": lambda e: e.double().sqrt()}
            for by, of in measures.items():
                if theirs:
                    row, best = min(theirs, key=lambda pair: float(of(pair[1]).square().mean()))
                    values = [float(of(one).square().mean()) ** (0.5 if by == "rmse" else 1.0) for one in (errors, best)]
                    about = {"nfe": ours.nfe, "seed": int(ours.grid.rpartition("-")[2]), "by": by, "best": f"{row.solver} on {row.grid}"}
                    judged = compare_errors(of(errors), of(best)).verdict
                    found.append({**about, "fitted": values[0], "by_hand": values[1], "ratio": values[0] / values[1], "verdict": judged})
        return found

    def _say(self, text: str) -> None:
        if text and text != self.said:
            print(f"{self.name}: {text}", flush=True)
        self.said = text

    def _write(self, text: str) -> None:
        """Write the file as it stands, before the next row and after the last."""
        self._say(text)
        path, machine, reference = self.work / self.whole / "results.json", None, None
        if path.exists():
            results = read_json(path)
            machine, reference = results["machine"], results["reference"]
        whole = {
            "command": self.command,
            "network": self.name,
            "model": self.model.name,
            "num": self.num,
            "machine": machine,
            "reference": reference,
            "rows": self.rows(self.whole),
            "verdicts": self.verdicts(),
            "screen": {"num": self.screen, "rows": [row for row in self.rows("screen") if row["kind"] == BY_HAND]},
        }
        write_whole(self.out, (json.dumps(whole, indent=1) + "\n").encode())

    # -- what it costs --------------------------------------------------------------------------------------------------

    def plan(self) -> str:
        """Return what is to be done, by stages, in network evaluations of single samples and in hours of this processor."""
        pairs, every = len(SOLVERS.split(",")) * len(GRIDS.split(",")), sum(self.counts)
        reference = REFERENCE_NFE * self.num + REFERENCE_NFE // 2 * BATCH
        costs = {
            "statistics": CALIBRATION.num * (CALIBRATION.levels + 1) * JVP,
            f"{pairs} pairs on {self.screen} noises": self.screen * (pairs * every + 2 * REFERENCE_NFE),
            "exact trajectories": reference,
            "about 8 pairs on all": 8 * self.num * every,
            f"optimised grids of {', '.join(OPTIMIZED)}": len(OPTIMIZED) * ((OPTIMIZE.budget or 0) + self.num * every),
            f"fits from {len(SEEDS)} seeds": len(SEEDS) * sum(plan_fit(self.model, n, FIT).evaluations + self.num * n for n in self.counts),
        }
        each, _ = seconds(Problem(self.model))
        lines = [f"  {name}: {cost:,} evaluations, {cost * each / 3600:.1f} hours" for name, cost in costs.items()]
        total = sum(costs.values())
        return "\n".join(
            [
                f"{self.name}: {1e3 * each:.2f} ms of one processor for an evaluation",
                *lines,
                f"  together {total:,} evaluations, {total * each / 3600:.1f} hours, less what is there already",
            ]
        )

    def run(self) -> None:
        """Make whatever is not there yet: first what shows most, then the other seeds."""
        first, *others = SEEDS
        for nfe in self.counts:
            self.by_hand(nfe)
            self.fitted(nfe, first)
        for nfe in self.counts:
            self.on_own_grids(nfe)
        for nfe in self.counts:
            for seed in others:
                self.fitted(nfe, seed)
        for line in self.verdicts():
            print(json.dumps(line), flush=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="by default hsc-32 and ztf-32")
    parser.add_argument("--nfe", type=lambda text: [int(n) for n in text.split(",")], default=list(COUNTS))
    parser.add_argument("--num", type=int, default=NUM, help="noises of every row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/foreign"))
    parser.add_argument("--work", type=Path, default=Path("runs/foreign"))
    parser.add_argument("--plan", action="store_true", help="say what it would cost, and end")
    args = parser.parse_args(words)
    if not set(args.nfe) <= set(COUNTS):
        parser.error(f"samplers are made for {', '.join(map(str, sorted(COUNTS)))} evaluations, not {', '.join(map(str, args.nfe))}")
    command = "python -m benchmarks.foreign_study" + ("" if args.num == NUM else f" --num {args.num}")
    command += "" if args.out == parser.get_default("out") else f" --out {args.out}"
    for name in args.network or STUDIED:
        about = f"{command} --network {name}"
        study = Study(name, load(name), args.nfe, args.num, args.out / f"{name}.json", args.work / name, about)
        print(study.plan(), flush=True)
        if not args.plan:
            study.run()


if __name__ == "__main__":
    main()
