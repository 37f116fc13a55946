"""What a step moves through memory beside the network: bytes of the kernel, eager and compiled, against the least there can be.

    python benchmarks/kernel_traffic.py --out benchmarks/results/kernel_traffic.json

Every operation of `advance` on tensors of the state's size is seen and counted: what it reads and what it writes, and how many new
tensors it makes. The compiled kernel's bytes are those of the code that the compiler made. The least is one reading of everything that
the step needs and one writing of what it makes. Times are medians over rounds that take turns, as ratios. The last rows compile the whole
sampling loop, with the network of a bundled model in it, and measure what share of the making of trajectories their writing is.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import Sampler, advance, load_model, make_grid, make_solver, sample
from fewstep.core.tableau import Row, State
from fewstep.learn.teacher import trajectories
from fewstep.sampling.noise import start_noise

SHAPE = (16, 3, 256, 256)
SOLVERS = ("ddim", "dpm-solver-pp-2m", "dpm-solver-pp-3m", "unipc-2", "unipc-3", "ipndm")
STEPS, LAST = 8, 5  # a step in the middle, with all its history


class Traffic(TorchDispatchMode):
    """Counts the bytes of tensors of one size that operations read and write, and the new ones that they make."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.bytes, self.made = numel, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        answer = func(*args, **(kwargs or {}))
        read = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, Tensor) and one.numel() == self.numel]
        written = [
            one for one in (answer if isinstance(answer, tuple) else (answer,)) if isinstance(one, Tensor) and one.numel() == self.numel
        ]
        self.bytes += sum(one.nbytes for one in [*read, *written])
        self.made += sum(all(one is not other for other in read) for one in written)
        return answer


def least(row: Row, state: State) -> int:
    """Bytes of one reading of what a step needs, ``x0`` among it, and one writing of what it makes."""
    basis = [state.anchor, state.x, *([state.x] if state.history else []), *state.history[:-1]]
    needed = {0, 1} if row.record is not None else {1}  # x and x0, which make the newest of the history
    for coefficients in (row.x, row.anchor or ()):
        needed |= {k if k != 2 else 1 for k, c in enumerate(coefficients) if c is not None and basis[k] is not None}
        needed |= {0} if coefficients and coefficients[1] is not None else set()
    made = 1 + (row.anchor is not None) + (row.record is not None)
    return (len(needed) + made) * state.x.nbytes


def traffic(name: str, rounds: int) -> dict[str, Any]:
    """One solver's step."""
    model = load_model("digits-ddpm")
    solver, law = make_solver(name), model.schedule
    tableau = Sampler.build(solver, make_grid("logsnr", law, solver.steps_on(law, STEPS)), law).tableau
    state = tableau.start(torch.randn(SHAPE))
    rows = tableau.rows(state.x)
    for row in rows[:LAST]:
        state = advance(row, state, torch.randn(SHAPE))
    x0 = torch.randn(SHAPE)
    row = rows[LAST]
    with Traffic(x0.numel()) as seen:
        advance(row, state, x0)
    torch._dynamo.reset()
    compiled = torch.compile(advance, fullgraph=True)
    with inductor.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(compiled, row, state, x0)
    moved = arguments(code) * x0.nbytes
    eager_time, compiled_time = _turns([lambda: advance(row, state, x0), lambda: compiled(row, state, x0)], rounds)
    minimum = least(row, state)
    return {
        "solver": name,
        "shape": SHAPE,
        "megabytes": {"least": minimum / 1e6, "eager": seen.bytes / 1e6, "compiled": moved / 1e6},
        "eager_to_least": seen.bytes / minimum,
        "compiled_to_least": moved / minimum,
        "new_tensors": seen.made,
        "time_compiled_to_eager": compiled_time / eager_time,
    }


def arguments(code: str) -> int:
    """How often the loops that a compiler made pass over a tensor of the state's size: each reads or writes its arguments once."""
    size = re.escape(str(SHAPE))
    large = set(re.findall(rf"assert_size_stride\((\w+), {size}", code)) | set(re.findall(rf"(\w+) = empty_strided_cpu\({size}", code))
    calls = re.findall(r"^ +cpp_fused_\w+\(([^)]*)\)", code, re.MULTILINE)
    return sum(argument in large for call in calls for argument in call.split(", "))


def loop(rounds: int, batch: int = 64, steps: int = 5) -> dict[str, Any]:
    """A whole sampling run of a bundled model: as it is, and compiled with its network."""
    model, solver = load_model("digits-edm"), make_solver("unipc-3")
    law = model.schedule
    sampler = Sampler.build(solver, make_grid("karras", law, steps), law)
    seeds = list(range(batch))
    x, labels = start_noise(sampler.tableau.nodes, seeds, model.shape), model.labels(seeds)

    def run() -> Tensor:
        return sample(model, sampler, x, labels)

    compiled = torch.compile(run)
    begin = time.perf_counter()
    difference = float((compiled() - run()).abs().max())
    seconds = time.perf_counter() - begin
    eager_time, compiled_time = _turns([run, compiled], rounds)
    name = f"whole loop of {model.name}, unipc-3, {steps} evaluations of {batch}"
    return {"loop": name, "difference": difference, "compiling_s": seconds, "time_compiled_to_eager": compiled_time / eager_time}


def writing(num: int = 128) -> dict[str, Any]:
    """The share of the time of ``fewstep trajectories`` in which it writes: what could be gained by writing beside the network's work."""
    spent, write = 0.0, trajectories.write_whole

    def timed(*args: Any) -> None:  # noqa: ANN401
        nonlocal spent
        begin = time.perf_counter()
        write(*args)
        spent += time.perf_counter() - begin

    model = load_model("digits-edm")
    grid = make_grid("karras", model.schedule, 16)
    with TemporaryDirectory() as folder, mock.patch.object(trajectories, "write_whole", timed):
        begin = time.perf_counter()
        trajectories.generate_trajectories(model, grid, Path(folder) / "made", config=trajectories.TrajectoryConfig(num=num, batch=num))
        whole = time.perf_counter() - begin
    return {"writing": f"{num} trajectories of {model.name}", "share_of_time": spent / whole}


def _turns(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each; they take turns, after two rounds to warm up."""
    found: list[list[float]] = [[] for _ in functions]
    for k in range(rounds + 2):
        for times, function in zip(found, functions, strict=True):
            begin = time.perf_counter()
            function()
            if k > 1:
                times.append(time.perf_counter() - begin)
    return [statistics.median(times) for times in found]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for name in SOLVERS:
        rows.append(traffic(name, args.rounds))
        line = "{solver}: eager {eager_to_least:.2f}, compiled {compiled_to_least:.2f} of the least bytes, {new_tensors} new tensors, "
        print((line + "time compiled : eager {time_compiled_to_eager:.2f}").format(**rows[-1]))
    rows.append(loop(max(5, args.rounds // 3)))
    print("{loop}: time compiled : eager {time_compiled_to_eager:.2f}, largest difference {difference:.1e}".format(**rows[-1]))
    rows.append(writing())
    print("writing {writing}: {share_of_time:.5f} of the time".format(**rows[-1]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
        made = {"command": "python benchmarks/kernel_traffic.py", "machine": machine, "rows": rows}
        args.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
