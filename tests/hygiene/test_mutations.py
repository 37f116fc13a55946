"""Damaged and hostile artifacts of every kind: each is read rightly or refused in one short message, soon, with nothing written elsewhere.

`FEWSTEP_MUTATIONS` says how many of each kind (`make test-release` asks for 200); what each does follows from its number.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from PIL import Image
from tests.evaluate.problems import UNET, tiny, tuned
from tests.hygiene.mutations import mutated
from tests.integrations.diffusers import tiny_pipelines
from tests.models.formats.conftest import edm_modules  # noqa: F401 - a fixture
from tests.models.formats.test_checkpoints import SONG, edm_pickle, song
from tests.problems import DSNO
from torch import nn

import fewstep
from fewstep import FewstepError, Sampler, VarianceExploding, load_model, make_solver
from fewstep.core.spacings import make_grid
from fewstep.core.statistics import ModelStatistics
from fewstep.data.images import load_images
from fewstep.evaluate.benchmark.plan import BenchmarkConfig
from fewstep.evaluate.benchmark.run import benchmark
from fewstep.evaluate.report.write import write_report
from fewstep.integrations.diffusers.pipeline_folders import is_pipeline, load_pipeline
from fewstep.integrations.diffusers.pipelines import from_pipeline, read_prompts
from fewstep.learn.networks import finetune as finetuning
from fewstep.learn.networks.loop import LoopConfig, LossCurve, check_checkpoint, run_loop
from fewstep.learn.teacher.gram import Gram
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, generate_trajectories
from fewstep.models.formats.checkpoints import convert, load_checkpoint
from fewstep.models.model import Model
from fewstep.runtime.accumulate import Part, Store, accumulate, seed_batches
from fewstep.sampling.grid_table import GridTable

MUTATIONS = int(os.environ.get("FEWSTEP_MUTATIONS", "60"))
SOON, SHORT = 5.0, 2000  # seconds, bytes
LAW = VarianceExploding(0.05, 20.0)
LEVELS = torch.tensor([20.0, 1.0, 0.05], dtype=torch.float64)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def _sampled(model: Model) -> None:
    """Take two steps, as one would with a model that was read without complaint."""
    fewstep.sample(model, "ddim", nfe=2, seeds=[0, 1])


def _use_sampler(folder: Path) -> None:
    sampler = Sampler.load(folder)
    repr(sampler)
    _sampled_by(sampler)


def _sampled_by(sampler: Sampler) -> None:
    network = fewstep.GaussianDenoiser(sampler.schedule, torch.zeros(1, 4, 4), torch.tensor(0.5))
    fewstep.sample(Model(lambda x, t: network(x, t), sampler.schedule, "sample", shape=(1, 4, 4)), sampler, seeds=[0])


def _use_grids(folder: Path) -> None:
    table = GridTable.load(folder)
    repr(table)
    table.grid(next(iter(table.grids)))


def _use_statistics(folder: Path) -> None:
    statistics = ModelStatistics.load(folder)
    repr(statistics)
    Sampler.build(make_solver("dpm-solver-v3", statistics=statistics), "logsnr", statistics.schedule, nfe=5)


def _use_model(folder: Path) -> None:
    _sampled(load_model(folder))


def _use_fitted(folder: Path) -> None:
    model = load_model(folder)
    fewstep.sample(model, seeds=[0])
    repr((model.tuned, model.carried.samplers, model.carried.grids, model.carried.statistics))


def _use_checkpoint(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        _sampled(load_checkpoint(path, trust=True))


def _use_trajectories(folder: Path) -> None:
    found = Trajectories.load(folder)
    repr(found)
    for index in (0, len(found) - 1):
        found[index]


def _use_results(folder: Path) -> None:
    write_report([folder], folder / "report")


def _use_images(folder: Path) -> None:
    load_images(folder / "set.npz" if (folder / "set.npz").is_file() else folder)


def _use_pipeline(folder: Path) -> None:
    if is_pipeline(folder):
        from_pipeline(load_pipeline(folder))
    else:
        load_model(folder)


def _use_prompts(folder: Path) -> None:
    read_prompts(folder / "prompts.txt")


def _trained(folder: Path, steps: int) -> None:
    """Train a tiny network for some steps, and stop as a killed run does."""

    def loss(network: nn.Module, batch: int, generator: torch.Generator) -> torch.Tensor:
        if generator.initial_seed() == steps * 4099:
            raise InterruptedError
        return network(torch.ones(batch, 2)).square().mean()

    torch.manual_seed(0)
    config = LoopConfig(4, 2, warmup=1, checkpoint_every=2)
    curve = LossCurve(folder / "curve.json", "mine")
    with suppress(InterruptedError):
        run_loop(nn.Linear(2, 1), loss, config, folder, identity="mine", observe=curve.add)


def _use_checkpoint_of_training(folder: Path) -> None:
    check_checkpoint(folder, "mine")
    _trained(folder, 4)


def _store(folder: Path) -> Store[Gram]:
    return Store(folder, "gram", "mine", Gram.empty(LEVELS), work="Gram matrix", again="run the command")


def _use_sums(folder: Path) -> None:
    batches = seed_batches(0, 8, 2)
    fresh = lambda seeds, count, note: Gram(LEVELS, torch.eye(5).double(), torch.ones(3, 2).double(), len(seeds))  # noqa: E731
    accumulate(batches, fresh, lambda: Gram.empty(LEVELS), _store(folder))


def _use_round(folder: Path) -> None:
    tuning = _tuning(folder)
    if tuning._resumed(nn.Linear(2, 1), folder, "mine") is None:
        _make_round(folder)


# -- one good artifact of each kind -------------------------------------------------------------------------------------


def _make_sampler(folder: Path) -> None:
    Sampler.build("unipc-2", "angle", LAW, nfe=4, card={"of": "toy", "rmse": [0.1, 0.2]}).save(folder)


def _make_grids(folder: Path) -> None:
    grids = {nfe: make_grid("angle", LAW, nfe) for nfe in (4, 8)}
    GridTable("ddim", "0" * 16, 1.0, LAW, grids, {"rows": [{"nfe": 4, "rmse": 0.1}]}).save(folder)


def _make_statistics(folder: Path) -> None:
    lam = torch.linspace(-3, 3, 13, dtype=torch.float64)
    values = torch.rand(3, 13, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    ModelStatistics(lam, *values, (3, 4, 4), LAW, "0" * 16).save(folder)


def _make_fitted(folder: Path) -> None:
    model = tuned(folder / "student", tiny(folder / "teacher"))
    Sampler.build("ddim", "angle", LAW, nfe=2, card={"model": model.fingerprint, "guidance": 1.0}).save(folder / "student/fitted/nfe-02")
    for path in sorted((folder / "student").iterdir()):
        shutil.move(path, folder)
    for name in ("student", "teacher"):
        shutil.rmtree(folder / name)


def _make_model(folder: Path) -> None:
    tiny(folder)


def _make_described(folder: Path) -> None:
    _make_pickle(folder.parent)
    convert(folder.parent / "edm.pkl", folder / "model", trust=True)
    for path in (folder / "model").iterdir():
        shutil.move(path, folder)
    (folder / "model").rmdir()


def _make_diffusers(folder: Path) -> None:
    shutil.copytree(
        load_model("digits-ddpm").folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("fitted*", "statistics*", "o*")
    )
    UNet2DModel(**UNET).save_pretrained(folder / "unet")


def _make_student(folder: Path) -> None:
    shutil.copytree(DSNO, folder, dirs_exist_ok=True)


def _make_pickle(folder: Path) -> None:
    edm_pickle(folder / "edm.pkl", "EDMPrecond", song(), "SongUNet", SONG, sigma_data=0.5)


def _make_file(folder: Path) -> None:
    _make_pickle(folder.parent)
    convert(folder.parent / "edm.pkl", folder / "model.safetensors", trust=True)


def _make_trajectories(folder: Path) -> None:
    model = load_model("digits-edm")
    toy = Model(
        model.network, model.schedule, model.prediction, shape=model.shape, time=model.time, call=model.call, classes=10, null_label=10
    )
    generate_trajectories(toy, make_grid("angle", toy.schedule, 2), folder, config=TrajectoryConfig(num=5, nfe=2, batch=2, solver="ddim"))


def _make_results(folder: Path) -> None:
    benchmark(load_model("digits-edm"), BenchmarkConfig(("ddim", "unipc-2"), ("angle",), (2, 3), num=4), folder)


def _make_npz(folder: Path) -> None:
    np.savez(folder / "set.npz", images=np.zeros((3, 4, 4, 3), np.uint8), labels=np.arange(3))


def _make_pictures(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "webp", "bmp", "gif", "tif"):
        Image.fromarray(pixels).save(folder / f"a.{suffix}")


def _make_pipeline(folder: Path) -> None:
    shutil.copytree(tiny_pipelines.make("dit", folder.parent / "pipelines"), folder, dirs_exist_ok=True)


def _make_prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a red cat\na blue square\n")


def _make_checkpoint_of_training(folder: Path) -> None:
    _trained(folder, 3)


def _make_sums(folder: Path) -> None:
    _store(folder).save(Part(Gram(LEVELS, torch.eye(5).double(), torch.ones(3, 2).double(), 4), [0, 1], "none"))


def _tuning(folder: Path) -> Any:  # noqa: ANN401 - as much of a tuning as rounds on disk need
    tuning = object.__new__(finetuning._Tuning)
    tuning.grid, tuning.config = make_grid("angle", LAW, 4), finetuning.FinetuneConfig(2)
    tuning.problem, tuning.work, tuning.job = SimpleNamespace(device="cpu"), SimpleNamespace(folder=folder), SimpleNamespace(rank=0)
    return tuning


def _make_round(folder: Path) -> None:
    times = _tuning(folder).grid.t[[0, 2, 4]].tolist()
    _tuning(folder)._store(nn.Linear(2, 1), folder, "mine", finetuning.Round(1, [20.0, 1.0, 0.05], 0.3, 0.2, 0.1, 0.1, times, 1.0))


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "sampler": (_make_sampler, _use_sampler),
    "grids": (_make_grids, _use_grids),
    "statistics": (_make_statistics, _use_statistics),
    "fitted": (_make_fitted, _use_fitted),
    "model": (_make_model, _use_model),
    "model-described": (_make_described, _use_model),
    "model-diffusers": (_make_diffusers, _use_model),
    "student": (_make_student, _use_model),
    "edm-pickle": (_make_pickle, _use_checkpoint),
    "single-file": (_make_file, _use_checkpoint),
    "trajectories": (_make_trajectories, _use_trajectories),
    "results": (_make_results, _use_results),
    "npz": (_make_npz, _use_images),
    "pictures": (_make_pictures, _use_images),
    "pipeline": (_make_pipeline, _use_pipeline),
    "prompts": (_make_prompts, _use_prompts),
    "checkpoint-of-training": (_make_checkpoint_of_training, _use_checkpoint_of_training),
    "sums": (_make_sums, _use_sums),
    "round": (_make_round, _use_round),
}


def _contents(folder: Path) -> set[tuple[str, float]]:
    return {(str(path), path.lstat().st_mtime) for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("edm_modules", "short_reference")
def test_every_mutation_is_read_or_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, use = KINDS[kind]
    (tmp_path / "base").mkdir()
    make(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    use(tmp_path / "whole")  # the artifact itself is good
    box = tmp_path / "box"
    box.mkdir()
    monkeypatch.chdir(box)
    before, faults, refused = _contents(tmp_path), list[str](), 0
    for number in range(MUTATIONS):
        said = f"{number}: {mutated(tmp_path / 'base', box / 'it', Random(f'{kind} {number}'))}"
        begin = time.monotonic()
        try:
            use(box / "it")
        except FewstepError as error:
            refused += 1
            if len(str(error).encode()) >= SHORT:
                faults.append(f"{said}: a message of {len(str(error).encode())} bytes")
        except BaseException as error:  # whatever gets through, a SystemExit too
            if isinstance(error, KeyboardInterrupt):
                raise
            faults.append(f"{said}: {type(error).__name__}: {str(error)[:300]}")
        if (seconds := time.monotonic() - begin) > SOON:
            faults.append(f"{said}: {seconds:.1f} s")
        shutil.rmtree(box / "it")
        if list(box.iterdir()):
            faults.append(f"{said}: wrote {sorted(path.name for path in box.iterdir())}")
            shutil.rmtree(box)
            box.mkdir()
    assert not faults, f"{len(faults)} of {MUTATIONS} mutations got through:\n" + "\n".join(faults)
    assert refused  # damage is seen at all
    assert {name for name, _ in _contents(tmp_path)} == {name for name, _ in before}
