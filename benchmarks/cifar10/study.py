"""The whole study on CIFAR-10, from the pictures to the tables: a list of commands, each of which continues where it was killed.

    python -m benchmarks.cifar10.study --preset cpu [--data cifar-10-batches-bin] [--until "standard grids"] [--list]

A stage that is done is not run again, so a killed study continues by the same command. The teacher, the feature network and what is made
for the teacher (statistics, grids, samplers) lie in ``assets/cifar10-SIZE``, the network tuned for few steps beside it, rows in
``benchmarks/results/cifar10-SIZE``, everything else in ``--work``. To train the teacher again, remove its folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.cifar10.data import SHARED

from fewstep.runtime.artifact import read_json, write_whole

ROOT = Path(__file__).parents[2]
TWO = "dpm-solver-v3:steps=2:predictor=true"  # of two past evaluations; the default has three, as the authors take for CIFAR-10
SOLVERS = f"ddim,dpm-solver-pp-2m,dpm-solver-pp-3m,unipc-2,unipc-3,deis-3,ipndm,{TWO},dpm-solver-v3"
GRIDS = "karras,logsnr,angle,uniform,quadratic"
OPTIMIZED = f"ddim,dpm-solver-pp-2m,unipc-2,{TWO},dpm-solver-v3"
VARIANTS = ":steps=1 :steps=2:predictor=true :predictor=true :corrector=none :corrector=same :corrector=true"  # of DPM-Solver-v3
OWN = "4,5,6,8,10"  # evaluations of optimised grids and fitted samplers
FEW = "1,2,3"  # below these, beside the passes of a student
GUIDED = "5,8"  # of fitted samplers at guidance 2
CALLS = "4"  # of one more: as many network calls as 8 evaluations of a guided student
SCALES = (1, 2, 4)  # at which that is measured
TOLD = "5,8,10"  # evaluations of samplers fitted to it, which are as many calls
TUNED = "4"  # of phase 2
SLOTS, PASSES = "--grid angle --slots 16", "1,2,3,4,6,8"  # of the flow map
ONE = "--grid angle --slots 1"  # of the student of one pass
NETWORK = "--kind edm --conditional --flip --p-mean=-1.2 --p-std 1.2 --lr 0.001 --mixed-precision bf16"


@dataclass(frozen=True)
class Preset:
    """What depends on the machine; everything else is the same.

    Args:
        size: of the pictures.
        train, processes: options of ``fewstep train``, and how many processes train and solve together.
        features: the preset of the feature network.
        num, quality: noises of every row, and of the teacher's own quality.
        nfe: of the rows on standard grids.
        calibrate: options of the statistics; ``pooling``: of those that are compared, as levels, data, pooling.
        optimize, fit, finetune: options of these commands; None leaves one out.
        trajectories: that the flow map learns from; ``pairs``: of noise and end alone, those of the student of one pass.
        distill: options of the training of both; ``guided``: of a guided student's.
        tag: of the folders, if it is no study to be kept.
    """

    size: int
    train: str
    processes: int
    num: int
    quality: int
    nfe: str
    calibrate: str
    pooling: Sequence[tuple[int, int, str]]
    optimize: str | None
    fit: str | None
    finetune: str | None
    trajectories: int
    pairs: int
    distill: str
    guided: str
    features: str
    tag: str = ""


PRESETS = {
    "cpu": Preset(
        size=16,
        train="--channels 32,64,96 --attention 8 --dropout 0 --steps 10000 --batch 128 --warmup 500 --ema 0.9995 "
        "--checkpoint-every 250 --compile",
        processes=2,
        num=512,
        quality=2048,
        nfe="4,5,6,8,10,20",
        calibrate="--levels 60 --num 256",
        pooling=[(30, 64, "element"), (30, 256, "element"), (30, 256, "scalar"), (30, 256, "channel"), (60, 256, "element")],
        optimize="--num 128 --noises 128 --held-out 512",
        fit="--held-out 256",
        finetune="--rounds 2 --half",
        trajectories=65536,
        pairs=98304,
        distill="--steps 7000 --half",
        guided="--steps 4000 --half",
        features="cpu",
    ),
    "gpu": Preset(
        size=32,
        train="--channels 128,128,128 --attention 16 --layers 2 --dropout 0.1 --steps 100000 --batch 512 --warmup 1000 --ema 0.9998 "
        "--checkpoint-every 1000 --compile --channels-last",
        processes=1,
        num=10240,
        quality=10240,
        nfe="4,5,6,8,10,20",
        calibrate="--levels 120 --num 2048",
        pooling=[(30, 256, "element"), (120, 256, "element"), (120, 2048, "element"), (120, 2048, "scalar"), (120, 2048, "channel")],
        optimize="",
        fit="-n 4096 --held-out 1024",
        finetune="--rounds 3 --steps 2000 --half",
        trajectories=262144,
        pairs=524288,
        distill="--steps 20000 --batch 512 --half",
        guided="--steps 20000 --batch 512 --half",
        features="gpu",
    ),
    "smoke": Preset(  # everything once, in minutes, with a network that has learned nothing
        size=16,
        train="--channels 16,16 --attention none --steps 20 --batch 16 --warmup 5 --ema 0.5",
        processes=1,
        num=12,
        quality=32,
        nfe="4,5,6,8,10,20",
        calibrate="--levels 4 --num 4",
        pooling=[(4, 4, "scalar")],
        optimize="--levels 16 --num 8 --noises 8 --held-out 8",
        fit="-n 16 --held-out 8 --iterations 0",
        finetune="--rounds 1 --steps 2",
        trajectories=16,
        pairs=16,
        distill="--steps 2 --batch 4 --held-out 8",
        guided="--steps 2 --batch 4 --held-out 8",
        features="smoke",
        tag="-smoke",
    ),
}


@dataclass(frozen=True)
class Stage:
    """A command of the study. It is done when ``made`` is there; one without it finds out itself what is missing."""

    name: str
    command: Sequence[str]
    made: Path | None = None
    after: Callable[[], None] | None = None


def stages(preset: Preset, shared: Path, work: Path, docs: Path) -> Iterator[Stage]:
    """All of them, in order."""
    label, python = f"cifar10-{preset.size}{preset.tag}", [sys.executable, "-m"]
    teacher, rows, fewstep = Path("assets") / label, Path("benchmarks/results") / label, [*python, "fewstep"]
    train, test = (str(work / f"cifar10-{preset.size}-{split}.npz") for split in ("train", "test"))
    weights = teacher / "features"

    yield Stage("data", [*python, "benchmarks.cifar10.data", "--data", str(shared), "--size", str(preset.size), "--out", str(work)])
    together = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(preset.processes), "-m"] if preset.processes > 1 else []
    side_by_side = [*python, *together, "fewstep"]
    learn = [*side_by_side, "train", "--data", train, *NETWORK.split(), *preset.train.split()]
    yield Stage("teacher", [*learn, "--out", str(teacher)], teacher / "fewstep.json")
    learn = [*python, "benchmarks.cifar10.features", "--preset", preset.features, "--data", str(work)]
    yield Stage("features", [*learn, "--out", str(weights)], weights / "features.json")
    judge = [*python, "benchmarks.cifar10.teacher", str(teacher), "--work", str(work), "--num", str(preset.quality)]
    picture = str(docs / f"{label}-teacher.png")
    yield Stage("quality", [*judge, "--out", str(rows / "teacher.json"), "--picture", picture], rows / "teacher.json")

    def calibrated(name: str, folder: Path, *options: str) -> Stage:
        return Stage(name, [*fewstep, "calibrate", str(teacher), *options, "--out", str(folder)], folder / "statistics.json")

    features = ["--features", f"benchmarks.cifar10.features:{'smoke' if preset.tag else 'network'}"]
    compared = ["--data", test, *features, "--num", str(preset.num)]
    bench, kept = [*fewstep, "bench", str(teacher), *compared], ["--out", str(rows / "standard")]
    yield calibrated("statistics", teacher / "statistics", *preset.calibrate.split())
    yield Stage("standard grids", [*bench, "--solver", SOLVERS, "--grid", GRIDS, "--nfe", preset.nfe, *kept])
    if preset.fit is not None:
        made, wanted = work / f"{label}-fitted", teacher / "fitted"
        options = ["--nfe", OWN, *preset.fit.split(), "--out", str(made)]
        yield Stage("fitted samplers", [*fewstep, "fit", str(teacher), *options], wanted, partial(keep_samplers, made, wanted))
    if preset.optimize is not None:
        made, wanted = work / f"{label}-optimized", teacher / "optimized"
        options = ["--solver", OPTIMIZED, "--nfe", OWN, *preset.optimize.split(), "--out", str(made)]
        yield Stage("optimised grids", [*fewstep, "optimize", str(teacher), *options], wanted, partial(keep_grids, made, wanted))
    yield Stage("rows of these", [*bench, "--solver", f"{OPTIMIZED},fitted", "--grid", "optimized", "--nfe", OWN, *kept])
    theirs = ["--solver", "unipc-2", "--grid", "karras,angle", "--nfe", "5,8,10", "--peers", "diffusers"]
    yield Stage("diffusers", [*bench, *theirs, *kept])

    folders = {work / f"{label}-statistics-{levels}-{num}-{pool}": (levels, num, pool) for levels, num, pool in preset.pooling}
    for folder, (levels, num, pool) in folders.items():
        yield calibrated(f"statistics {levels}, {num}, {pool}", folder, "--levels", str(levels), "--num", str(num), "--pool", pool)
    names = ",".join(f"dpm-solver-v3:statistics={folder}" for folder in folders)
    yield Stage("pooling", [*bench, "--solver", names, "--grid", "angle", "--nfe", "5,6,8,10", "--out", str(rows / "pooling")])

    names = ",".join(f"dpm-solver-v3{variant}" for variant in ["", *VARIANTS.split()])
    yield Stage("variants", [*bench, "--solver", names, "--grid", "karras,logsnr,angle", "--nfe", "5,6,8", "--out", str(rows / "variants")])

    if preset.finetune is not None:
        made = Path("assets") / f"{label}-tuned-{TUNED}"
        options = ["--nfe", TUNED, *preset.finetune.split(), "--out", str(made)]
        yield Stage("phase 2", [*fewstep, "finetune", str(teacher), *options], made / "tuned.json")
        yield Stage("its row", [*fewstep, "bench", str(made), *compared, "--out", str(rows / "tuned")])
    stored, made = work / f"{label}-trajectories", Path("assets") / f"{label}-flow-map"
    solve = [*side_by_side, "trajectories", str(teacher), *SLOTS.split(), "--nfe", "24", "--seed", "6000000"]
    yield Stage("trajectories", [*solve, "-n", str(preset.trajectories + 512), "--out", str(stored)], made / "tuned.json")
    learn = [*side_by_side, "distill", str(teacher), "--method", "flow-map", "--trajectories", str(stored), *SLOTS.split(), "--own", "0.5"]
    learn += ["-n", str(preset.trajectories), *preset.distill.split(), "--out", str(made)]
    yield Stage("flow map", learn, made / "tuned.json")
    yield Stage("its rows", [*fewstep, "bench", str(made), *compared, "--nfe", PASSES, "--out", str(rows / "student")])
    stored, made = work / f"{label}-pairs", Path("assets") / f"{label}-kd"
    solve = [*side_by_side, "trajectories", str(teacher), *ONE.split(), "--nfe", "24", "--seed", "6000000"]
    yield Stage("pairs", [*solve, "-n", str(preset.pairs + 512), "--out", str(stored)], made / "tuned.json")
    learn = [*side_by_side, "distill", str(teacher), "--method", "kd", "--trajectories", str(stored), *ONE.split()]
    learn += ["-n", str(preset.pairs), *preset.distill.split(), "--out", str(made)]
    yield Stage("one pass", learn, made / "tuned.json")
    yield Stage("its row of one pass", [*fewstep, "bench", str(made), *compared, "--out", str(rows / "kd")])
    few = ["--out", str(rows / "few")]
    yield Stage("fewer evaluations", [*bench, "--solver", SOLVERS, "--grid", GRIDS, "--nfe", FEW, *few])
    if preset.fit is not None:
        made, wanted = work / f"{label}-fitted-few", teacher / "fitted-few"
        options = ["--nfe", FEW.removeprefix("1,"), *preset.fit.split(), "--out", str(made)]
        yield Stage("fitted for fewer", [*fewstep, "fit", str(teacher), *options], wanted, partial(keep_samplers, made, wanted))
        yield Stage("rows of these few", [*bench, "--solver", "fitted", "--grid", "optimized", "--nfe", FEW.removeprefix("1,"), *few])

    guided, kept = ["--guidance", "2"], ["--out", str(rows / "guidance-2")]
    yield calibrated("statistics at guidance 2", teacher / "statistics-guidance-2", *preset.calibrate.split(), *guided)
    yield Stage("guidance 2", [*bench, *guided, "--solver", SOLVERS, "--grid", "karras,logsnr,angle", "--nfe", "5,6,8,10", *kept])
    if preset.fit is not None:
        made, wanted = work / f"{label}-fitted-guidance-2", teacher / "fitted-guidance-2"
        options = ["--nfe", GUIDED, *preset.fit.split(), *guided, "--out", str(made)]
        yield Stage("fitted at guidance 2", [*fewstep, "fit", str(teacher), *options], wanted, partial(keep_samplers, made, wanted))
        yield Stage("rows of that", [*bench, *guided, "--solver", "fitted", "--grid", "optimized", "--nfe", GUIDED, *kept])
        made, wanted = work / f"{label}-fitted-guidance-2-calls", teacher / "fitted-guidance-2-calls"
        options = ["--nfe", CALLS, *preset.fit.split(), *guided, "--out", str(made)]
        yield Stage("fitted for fewer calls", [*fewstep, "fit", str(teacher), *options], wanted, partial(keep_samplers, made, wanted))
        fewer = ["--out", str(rows / "guidance-2-calls")]
        yield Stage("row of that", [*bench, *guided, "--solver", "fitted", "--grid", "optimized", "--nfe", CALLS, *fewer])
    made = Path("assets") / f"{label}-guided"
    learn = [*side_by_side, "distill", str(teacher), "--method", "guided", *preset.guided.split(), "--out", str(made)]
    yield Stage("guided student", learn, made / "tuned.json")
    for scale in SCALES:
        asked = ["--guidance", str(scale), "--solver", "unipc-2", "--grid", "karras,logsnr", "--nfe", "5,8,10,20"]
        written = ["--out", str(rows / f"guided-{scale}")]
        yield Stage(f"its rows at guidance {scale}", [*fewstep, "bench", str(made), *compared, *asked, *written])
    if preset.fit is not None:
        student, kept = made, ["--out", str(rows / "guided-2")]
        made, wanted = work / f"{label}-guided-fitted", student / "fitted-guidance-2"
        options = ["--nfe", TOLD, *preset.fit.split(), *guided, "--out", str(made)]
        yield Stage("fitted to the guided student", [*fewstep, "fit", str(student), *options], wanted, partial(keep_samplers, made, wanted))
        told = ["--solver", "fitted", "--grid", "optimized", "--nfe", TOLD]
        yield Stage("rows of these samplers", [*fewstep, "bench", str(student), *compared, *guided, *told, *kept])
    yield Stage("tables", [*python, "benchmarks.cifar10.tables", str(rows), "--docs", str(docs)])


def keep_grids(made: Path, wanted: Path) -> None:
    """Copy optimised grids to the teacher's folder, where ``--grid optimized`` finds them."""
    _copied({path.parent.name: path.parent for path in made.rglob("grids.json")}, wanted, "nfe-*", "*.png")


def keep_samplers(made: Path, wanted: Path) -> None:
    """Copy fitted samplers to the teacher's folder, where ``--solver fitted`` finds them."""
    _copied({path.parent.name: path.parent for path in made.glob("nfe-*/sampler.json")}, wanted)


def _copied(folders: dict[str, Path], wanted: Path, *but: str) -> None:
    temporary = wanted.with_name(f".{wanted.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, folder in folders.items():
        shutil.copytree(folder, temporary / name, ignore=shutil.ignore_patterns(*but))
    temporary.rename(wanted)


def run(stage: Stage, log: Path) -> None:
    """Run one stage, and note its command and how long it took, together with runs of it that were killed."""
    command = shlex.join(typed(stage.command))
    print(f"\n{stage.name}: {command}", flush=True)
    known = read_json(log) if log.is_file() else {}
    last = known.get(stage.name, {"seconds": 0.0, "whole": False})
    begin, whole = time.monotonic(), False
    try:
        subprocess.run(stage.command, check=True)
        if stage.after is not None:
            stage.after()
        whole = True
    finally:
        seconds = time.monotonic() - begin  # of one that was whole already only looking
        seconds = max(seconds, last["seconds"]) if last["whole"] else seconds + last["seconds"]
        known = read_json(log) if log.is_file() else {}  # another study may have run in between
        known[stage.name] = {"command": command, "seconds": seconds, "whole": whole or last["whole"]}
        write_whole(log, (json.dumps(known, indent=1) + "\n").encode())


def typed(command: Sequence[str]) -> list[str]:
    """A command as one would type it."""
    words = ["python" if word == sys.executable else word for word in command]
    return ["fewstep", *words[3:]] if words[:3] == ["python", "-m", "fewstep"] else words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--data", type=Path, default=SHARED, help="the folder of the pictures, see benchmarks/cifar10/data.py")
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--docs", type=Path, help="the folder of results/cifar10.md and of its pictures: docs, or --work if not to be kept")
    parser.add_argument("--until", help="the last stage to run, by name")
    parser.add_argument("--list", action="store_true", help="say what there is to run")
    args = parser.parse_args()
    shared = Path(os.path.relpath(args.data, ROOT))
    os.chdir(ROOT)
    preset = PRESETS[args.preset]
    planned = list(stages(preset, shared, args.work, args.docs or (args.work if preset.tag else Path("docs"))))
    if args.until is not None and args.until not in [stage.name for stage in planned]:
        parser.error(f"no stage {args.until!r}: there are {', '.join(stage.name for stage in planned)}")
    for stage in planned:
        if args.list:
            print(f"{stage.name}: {shlex.join(typed(stage.command))}")
        elif stage.made is None or not stage.made.exists():
            try:
                run(stage, Path("benchmarks/results") / f"cifar10-{preset.size}{preset.tag}" / "stages.json")
            except subprocess.CalledProcessError as error:
                sys.exit(f"error: {stage.name} ended with status {error.returncode}; mend it and run the same command again")
            except KeyboardInterrupt:
                sys.exit("interrupted; run the same command to continue")
        if stage.name == args.until:
            break


if __name__ == "__main__":
    main()
