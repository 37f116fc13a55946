"""Tuning a network: it lands nearer to its teacher, its teacher stays as it is, and a killed run goes on to the same bits."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from fewstep import (
    ArtifactError,
    FewstepError,
    Model,
    ModelError,
    Sampler,
    TimeGrid,
    VarianceExploding,
    load_model,
    sample,
)
from fewstep.data.images import Images
from fewstep.learn.networks import finetune as module
from fewstep.learn.networks.finetune import FinetuneConfig, Round, finetune
from fewstep.learn.teacher.gram import GramConfig
from fewstep.learn.teacher.trajectories import Trajectories
from fewstep.models.formats.folders import save_ours
from fewstep.models.tuned import Tuned
from fewstep.sampling.grid_table import GridTable
from fewstep.sampling.noise import start_noise
from fewstep.sampling.reference import reference_sampler
from fewstep.solvers import DDIM

SHAPE = (1, 4, 4)
UNET = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (16,), "norm_num_groups": 4, "layers_per_block": 1}
UNET |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
TINY = FinetuneConfig(nfe=2, rounds=2, steps=30, batch=32, lr=3e-3, num=64, held_out=32, levels=8, teacher_nfe=16, enough=-1.0)
BRIEF = replace(TINY, rounds=1, steps=2, batch=4, num=8, held_out=2, teacher_nfe=8)
SHORT = replace(BRIEF, rounds=2, steps=5)
DECREASE = 0.95  # of the bound by 30 steps of training, at most; measured 0.46 in the first round and 0.85 in the second
ROUNDING = 1 + 1e-9  # two ways to the same float64 sum
FLOAT64 = 1e-10  # a few operations on numbers of order 1, relative
FRESH = range(64)  # seeds that no tuning sees


def few_levels(num: int) -> GramConfig:
    return GramConfig(levels=16, num=num // 8)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer noise levels to choose from, for speed."""
    monkeypatch.setattr(module, "GramConfig", few_levels)


def ours(folder: Path, classes: int | None = None, **options: object) -> Path:
    """A folder of ours with random weights; conditional ones have a null label."""
    torch.manual_seed(0)
    network = UNet2DModel(**UNET, num_class_embeds=None if classes is None else classes + 1, **options)
    save_ours(folder, network, "edm(0.5)", VarianceExploding(0.05, 20.0), SHAPE, classes)
    return folder


def theirs(folder: Path, classes: int | None = None) -> Path:
    """A diffusers folder with random weights."""
    torch.manual_seed(0)
    UNet2DModel(**UNET, num_class_embeds=classes).save_pretrained(folder / "unet")
    DDPMScheduler(num_train_timesteps=200, prediction_type="epsilon").save_pretrained(folder / "scheduler")
    return folder


def pictures(labels: bool = True, n: int = 20) -> Images:
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Images(x, torch.arange(n) % 2 if labels else None, 256, "made up")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def reached(history: list[Round]) -> list[dict[str, Any]]:
    """All but the clock."""
    return [{key: value for key, value in asdict(made).items() if key != "seconds"} for made in history]


def fresh_error(student: Model, grid: TimeGrid, teacher: Model, scale: float = 1.0) -> float:
    """RMSE of first-order steps to the teacher's tight trajectories, on noises that tuning has not seen."""
    schedule = teacher.denoiser.schedule
    exact, labels = reference_sampler(schedule, 48), teacher.labels(FRESH)
    x = start_noise(exact.tableau.nodes, FRESH, SHAPE)
    with torch.no_grad():
        end = sample(teacher.guided(scale), exact, x, labels)
        made = sample(student.denoiser, Sampler.build(DDIM(), grid, schedule), x, labels)
    return float((made - end).double().square().mean().sqrt())


class Spied:
    """What a run did: its networks as they were trained, and the notes of its observer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dropout: list[list[float]] = []
        self.notes: list[tuple[int, str]] = []
        real = module.run_loop

        def spy(network: nn.Module, *args: object, **options: object) -> nn.Module:
            self.dropout.append([part.p for part in network.modules() if isinstance(part, nn.Dropout)])
            return real(network, *args, **options)

        monkeypatch.setattr(module, "run_loop", spy)

    def __call__(self, done: int, note: str) -> None:
        self.notes.append((done, note))


# -- one tuned model, from every side --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A model with dropout, tuned."""
    folder = tmp_path_factory.mktemp("finetune")
    teacher = load_model(ours(folder / "teacher", dropout=0.3))
    before, weights = contents(folder / "teacher"), {key: value.clone() for key, value in teacher.denoiser.network.state_dict().items()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "GramConfig", few_levels)
        spied = Spied(monkeypatch)
        history = finetune(teacher, TINY, folder / "tuned", command="fewstep finetune it", observe=spied)
        yield SimpleNamespace(
            folder=folder / "tuned",
            teacher=teacher,
            before=before,
            weights=weights,
            history=history,
            spied=spied,
            student=load_model(folder / "tuned"),
        )


def test_each_round_lowers_the_bound(made: SimpleNamespace) -> None:
    assert [one.number for one in made.history] == [1, 2]
    for one in made.history:
        assert one.bound <= one.bound_trained * ROUNDING and one.bound_trained < DECREASE * one.bound_before
        assert len(one.noise_levels) == len(one.next_times) == TINY.nfe + 1
    assert made.history[1].bound_before == made.history[0].bound
    assert made.history[1].rmse < made.history[0].rmse


def test_fresh_noises_land_nearer_to_the_teacher(made: SimpleNamespace) -> None:
    grid = made.student.optimized("ddim", TINY.nfe)
    after, untuned = (fresh_error(model, grid, made.teacher) for model in (made.student, made.teacher))
    assert after < 0.6 * untuned  # measured 0.39
    assert after == pytest.approx(
        made.history[-1].rmse, rel=0.15
    )  # as measured on 32 other noises; the teacher's own steps are coarse here


def test_the_teacher_stays_as_it_is(made: SimpleNamespace) -> None:
    assert contents(made.teacher.folder) == made.before
    state = made.teacher.denoiser.network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in made.weights.items())
    assert not any(value.requires_grad for value in made.teacher.denoiser.network.parameters())
    assert made.student.fingerprint != made.teacher.fingerprint


def test_the_folder_says_what_it_is(made: SimpleNamespace) -> None:
    files = {path.name for path in made.folder.iterdir()}
    assert {"fewstep.json", "unet", "tuned.json", "sampler", "optimized", "history.json", "README.md"} <= files
    student, last = made.student, made.history[-1]
    assert student.tuned == Tuned(str(made.teacher.folder.resolve()), made.teacher.fingerprint, 1.0, "ddim", TINY.nfe, "mean")
    table, sampler = GridTable.load(made.folder / "optimized" / "ddim"), Sampler.load(made.folder / "sampler")
    assert (table.solver, table.model, table.guidance) == ("ddim", student.fingerprint, 1.0)
    assert table.grid(TINY.nfe).t.tolist() == sampler.grid.t.tolist() == last.next_times
    assert sampler.nfe == TINY.nfe and sampler.card["model"] == student.fingerprint and sampler.card["rmse"] == last.rmse
    assert json.loads((made.folder / "history.json").read_text()) == [asdict(one) for one in made.history]
    readme = (made.folder / "README.md").read_text()
    for said in ("fewstep finetune it", made.teacher.fingerprint, f"{last.rmse:.4f}", f"{last.bound:.4f}", "| teacher_nfe | 16 |"):
        assert said in readme
    assert not list(made.folder.rglob("checkpoint"))


def test_targets_are_exact_so_dropout_is_off(made: SimpleNamespace) -> None:
    assert len(made.spied.dropout) == 2 and all(rates and not any(rates) for rates in made.spied.dropout)
    assert any(part.p == 0.3 for part in made.teacher.denoiser.network.modules() if isinstance(part, nn.Dropout))


def test_progress_counts_the_steps_of_all_rounds(made: SimpleNamespace) -> None:
    counts = [done for done, _ in made.spied.notes]
    assert counts == sorted(counts) and counts[-1] == TINY.rounds * TINY.steps
    notes = [note for done, note in made.spied.notes if done == 0]
    assert any("for the levels" in note for note in notes) and any("96 teacher trajectories" in note for note in notes)


def test_what_measures_is_not_trained_on(made: SimpleNamespace) -> None:
    kept = Trajectories.load(made.folder / "work" / "trajectories")
    assert len(kept) == TINY.num + TINY.held_out and kept.seeds([0]).tolist() == [TINY.seed]
    grid, square = TimeGrid(torch.tensor(made.history[-1].next_times)), 0.0
    states = kept.states(range(TINY.num, TINY.num + TINY.held_out))
    with torch.no_grad():
        end = sample(made.student.denoiser, Sampler.build(DDIM(), grid, kept.schedule), states[:, 0])
    square = float((end - states[:, -1]).double().square().mean())
    assert square**0.5 == pytest.approx(made.history[-1].rmse, rel=1e-5)  # float32


def test_a_round_that_gains_too_little_is_the_last(tmp_path: Path) -> None:
    model = load_model(ours(tmp_path / "teacher"))
    assert len(finetune(model, replace(BRIEF, rounds=3, enough=0.9), tmp_path / "out")) == 1
    assert len(finetune(model, replace(TINY, rounds=3, steps=8, lr=1e-3, num=32, teacher_nfe=8), tmp_path / "more")) == 3


# -- killed and continued --------------------------------------------------------------------------------------------


def killed_at(words: str, count: int) -> Callable[[int, str], None]:
    """An observer that interrupts at the first note with these words from that many steps on."""

    def observe(done: int, note: str) -> None:
        if words in note and done >= count:
            raise KeyboardInterrupt

    return observe


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, made: SimpleNamespace) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """What a short run of two rounds leaves that nobody killed."""
    folder = tmp_path_factory.mktemp("whole") / "tuned"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "GramConfig", few_levels)
        history = finetune(made.teacher, SHORT, folder, command="fewstep finetune it")
    return contents(folder), reached(history)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        pytest.param("for the levels", 0, marks=pytest.mark.slow),
        ("teacher trajectories", 0),
        pytest.param("loss", 3, marks=pytest.mark.slow),
        pytest.param("loss", 5, marks=pytest.mark.slow),
        ("loss", 5 + 3),
    ],
)
def test_a_killed_run_continues_to_the_same_bits(
    tmp_path: Path, made: SimpleNamespace, whole: tuple[dict[str, bytes], list[dict[str, Any]]], words: str, count: int
) -> None:
    out = tmp_path / "tuned"
    with pytest.raises(KeyboardInterrupt):
        finetune(made.teacher, SHORT, out, command="fewstep finetune it", observe=killed_at(words, count))
    assert not (out / "tuned.json").exists() and (out / "work" / "round-1" / "round.json").exists() == (count > SHORT.steps)
    history = finetune(made.teacher, SHORT, out, command="fewstep finetune it")
    assert reached(history) == whole[1]
    mine = contents(out)
    assert mine.keys() == whole[0].keys()
    named = ("config.json", "history.json", "round.json", "gram-0-of-1.safetensors")  # folders, the clock, a header in any order
    assert all(mine[key] == whole[0][key] for key in mine if not key.endswith(named))


def test_a_continued_run_repeats_no_finished_round(tmp_path: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(made.teacher, BRIEF, tmp_path, observe=killed_at("loss", 1))
    finetune(made.teacher, BRIEF, tmp_path)
    (tmp_path / "tuned.json").unlink()  # as if killed while saving
    spied = Spied(monkeypatch)
    finetune(made.teacher, replace(BRIEF, rounds=2, half=True), tmp_path, observe=spied)  # more rounds of the same
    assert len(spied.dropout) == 1 and not any(spied.dropout[0])
    assert [note for done, note in spied.notes if "loss" in note][0].startswith("loss")


@pytest.fixture(scope="module", params=["loss", "nothing"])
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, made: SimpleNamespace) -> Path:
    """A run of two rounds, killed in the first or with the first done."""
    out = tmp_path_factory.mktemp("stopped") / request.param
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "GramConfig", few_levels)
        with pytest.raises(KeyboardInterrupt):
            finetune(made.teacher, replace(BRIEF, rounds=2), out, observe=killed_at("loss", 1 if request.param == "loss" else 3))
    return out


@pytest.mark.parametrize(
    "change", [{"lr": 1e-3}, {"steps": 3}, {"states": "teacher"}, {"nfe": 3}, {"levels": 7}, {"seed": 5}, {"teacher_nfe": 32}]
)
def test_another_configuration_in_the_same_folder_is_refused(made: SimpleNamespace, stopped: Path, change: dict[str, Any]) -> None:
    before = contents(stopped)
    with pytest.raises(ArtifactError, match=r"remove|another folder"):
        finetune(made.teacher, replace(BRIEF, rounds=2, **change), stopped)
    assert contents(stopped) == before


def test_another_model_in_the_same_folder_is_refused(tmp_path: Path, made: SimpleNamespace) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(made.teacher, BRIEF, tmp_path / "out", observe=killed_at("loss", 1))
    with pytest.raises(ArtifactError, match=r"remove it|another folder"):
        finetune(load_model(theirs(tmp_path / "other")), BRIEF, tmp_path / "out")


def test_half_weights_load_as_float32(tmp_path: Path, made: SimpleNamespace) -> None:
    whole, half = (finetune(made.teacher, replace(BRIEF, half=half), tmp_path / str(half)) for half in (False, True))
    assert reached(whole) == reached(half)
    sizes = [(tmp_path / str(half) / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size for half in (False, True)]
    assert sizes[1] < 0.7 * sizes[0]
    students = [load_model(tmp_path / str(half)) for half in (False, True)]
    assert {value.dtype for value in students[1].denoiser.network.parameters()} == {torch.float32}
    grid = students[1].optimized("ddim", 2)  # of its own fingerprint
    sampler = Sampler.build(DDIM(), grid, students[1].denoiser.schedule)
    x = start_noise(sampler.tableau.nodes, FRESH, SHAPE)
    with torch.no_grad():
        one, two = (sample(student.denoiser, sampler, x) for student in students)
    assert 0 < float((one - two).abs().max()) < 5e-3 * float(one.abs().max())  # float16 has 11 bits


def test_mistakes_are_named_before_any_work(tmp_path: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(module, "collect_gram", never)
    (tmp_path / "file").write_text("mine")
    adrift = replace(made.teacher, folder=None)
    analytic = replace(made.teacher, denoiser=replace(made.teacher.denoiser, network=lambda x, t: x))
    for error, says, model, config, out in [
        (FewstepError, "needs data|pass the data", made.teacher, replace(BRIEF, form="score"), tmp_path / "out"),
        (ModelError, "was not loaded from a folder", adrift, BRIEF, tmp_path / "out"),
        (ModelError, "was not loaded from a folder", analytic, BRIEF, tmp_path / "out"),
        (ArtifactError, "file is a file; choose a folder", made.teacher, BRIEF, tmp_path / "file"),
        (ArtifactError, "file is a file; choose a folder", made.teacher, BRIEF, tmp_path / "file" / "below"),
        (FewstepError, "already holds a tuned model: choose another folder", made.teacher, BRIEF, made.folder),
    ]:
        with pytest.raises(error, match=says):
            finetune(model, config, out)
        assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_guided_leaves_nothing(tmp_path: Path, made: SimpleNamespace) -> None:
    with pytest.raises(ModelError, match="cannot be guided"):
        finetune(made.teacher, replace(BRIEF, guidance=2.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_folder_of_this_machine_is_published(made: SimpleNamespace) -> None:
    assert str(made.folder.parent) not in (made.folder / "unet" / "config.json").read_text()
