"""Samplers that add noise beside samplers that do not, at equal evaluations, by the distance of their samples to the data.

    python -m benchmarks.noise_study [--model digits-edm,digits-ddpm] [--nfe 5,10] [--solver ...] [--list]

runs ``fewstep bench --stochastic`` for each model and number of evaluations, few evaluations first, and writes the rows to
``benchmarks/results/noise/MODEL``. Rows that are there already are not run again, so a study that was killed, or run in part, goes on by
the same command. ``--list`` says what would be run and what it costs. Each model is sampled on the grid that suits the solvers of its ODE
best (docs/results/digits.md, docs/results/cifar10.md), so that noise is compared with the best there is without.

The pictures of ``cifar10-16`` are those of ``python -m benchmarks.cifar10.data --size 16 --out runs/cifar10``, its features those of
``benchmarks.cifar10``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = Path("benchmarks/results/noise")
PLAIN = ("ddim", "dpm-solver-pp-2m", "unipc-2")
NOISY = ("ddim:eta=0.5", "ddim:eta=1", "sde-dpm-solver-pp-2m", "sde-dpm-solver-pp-3m", "er-sde-3", "sa-solver", "seeds-2")
NOISY += ("heun-churn:s_churn=2",)
NFE, PATHS = (5, 10, 20, 50), 2


@dataclass(frozen=True)
class Problem:
    """One model of the study.

    Attributes:
        model: as `fewstep bench` takes it.
        grid: on which all solvers are compared.
        num: samples of each path.
        options: further ones.
    """

    model: str
    grid: str
    num: int
    options: Sequence[str] = ()

    def samples(self, solvers: Sequence[str]) -> int:
        """Return how many samples the rows of some solvers have with one number of evaluations, at most."""
        return self.num * sum(PATHS if solver in NOISY else 1 for solver in solvers)

    def command(self, name: str, nfe: int, solvers: Sequence[str]) -> list[str]:
        """Return the command that makes the rows of some solvers with so many evaluations."""
        what = ["--solver", ",".join(solvers), "--grid", self.grid, "--nfe", str(nfe)]
        how = ["--num", str(self.num), "--paths", str(PATHS), *self.options]
        return ["fewstep", "bench", self.model, "--stochastic", *what, *how, "--out", str(OUT / name)]


PROBLEMS = {
    "digits-edm": Problem("digits-edm", "angle", 1024),
    "digits-ddpm": Problem("digits-ddpm", "quadratic", 1024),
    "cifar10-16": Problem(
        "assets/cifar10-16",
        "karras",
        512,
        ("--data", "runs/cifar10/cifar10-16-test.npz", "--features", "benchmarks.cifar10.features:network"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=",".join(PROBLEMS), help="some of them")
    parser.add_argument("--nfe", default=",".join(map(str, NFE)), help="some numbers of evaluations")
    parser.add_argument("--solver", default=",".join([*PLAIN, *NOISY]), help="some solvers, of which one or more add noise")
    parser.add_argument("--list", action="store_true", help="say what there is to run")
    args = parser.parse_args()
    names, counts = args.model.split(","), [int(word) for word in args.nfe.split(",")]
    solvers = args.solver.split(",")
    for kind, asked, known in (("model", names, PROBLEMS), ("solver", solvers, (*PLAIN, *NOISY))):
        if strange := [name for name in asked if name not in known]:
            parser.error(f"no {kind} {', '.join(strange)}: there are {', '.join(known)}")
    os.chdir(ROOT)
    for nfe in counts:
        for name in names:
            problem = PROBLEMS[name]
            command = problem.command(name, nfe, solvers)
            if args.list:
                print(f"{shlex.join(command)}: at most {problem.samples(solvers) * nfe:,} network evaluations")
                continue
            try:
                subprocess.run([sys.executable, "-m", *command], check=True)
            except subprocess.CalledProcessError as error:
                sys.exit(f"{name} with {nfe} ended with status {error.returncode}; mend it and run the same command again")
            except KeyboardInterrupt:
                sys.exit("interrupted; run the same command to continue")


if __name__ == "__main__":
    main()
