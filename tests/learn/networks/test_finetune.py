"""Tuning a network: it lands nearer to its teacher, its teacher stays as it is, and a killed run repeats no round."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.problems import contents, tiny_folder
from torch import nn

from fewstep import (
    ArtifactError,
    FewstepError,
    FinetuneConfig,
    Model,
    ModelError,
    Sampler,
    TimeGrid,
    Trajectories,
    finetune,
    load_model,
    sample,
)
from fewstep.data.images import Images
from fewstep.learn.networks import finetune as module
from fewstep.learn.networks import trainer
from fewstep.learn.networks.finetune import Round
from fewstep.learn.teacher.gram import GramConfig
from fewstep.models.tuned import Tuned
from fewstep.sampling.grid_table import GridTable
from fewstep.sampling.reference import reference_sampler
from fewstep.solvers import DDIM

SHAPE = (1, 4, 4)
TINY = FinetuneConfig(nfe=2, rounds=2, steps=20, batch=32, lr=3e-3, num=64, held_out=32, levels=8, teacher_nfe=16, enough=-1.0)
BRIEF = replace(TINY, rounds=1, steps=2, batch=4, num=8, held_out=2, teacher_nfe=8)
SHORT = replace(BRIEF, rounds=2, steps=5)
DECREASE = 0.95  # of the bound by 20 steps of training, at most; measured 0.48 in the first round and 0.82 in the second
ROUNDING = 1 + 1e-9  # two ways to the same float64 sum
FLOAT64 = 1e-10  # a few operations on numbers of order 1, relative
FRESH = range(48)  # seeds that no tuning sees


def few_levels(num: int) -> GramConfig:
    return GramConfig(levels=16, num=num // 8)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer noise levels to choose from, for speed."""
    monkeypatch.setattr(module, "GramConfig", few_levels)


def pictures(labels: bool = True, n: int = 20) -> Images:
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Images(x, torch.arange(n) % 2 if labels else None, 256, "made up")


def rounds(tuned: Model) -> list[Round]:
    return [Round(**one) for one in tuned.card["history"]]


def fresh_error(student: Model, grid: TimeGrid, teacher: Model, scale: float = 1.0) -> float:
    """RMSE of first-order steps to the teacher's tight trajectories, on noises that tuning has not seen."""
    schedule = teacher.schedule
    end = sample(teacher, reference_sampler(schedule, 32), seeds=FRESH, guidance=scale)
    made = sample(student, Sampler.build(DDIM(), grid, schedule), seeds=FRESH)
    return float((made - end).double().square().mean().sqrt())


class Spied:
    """What a run did: its networks as they were trained, and its notes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dropout: list[list[float]] = []
        self.notes: list[tuple[int, str]] = []
        real = trainer.run_loop

        def spy(network: nn.Module, *args: object, **options: object) -> nn.Module:
            self.dropout.append([part.p for part in network.modules() if isinstance(part, nn.Dropout)])
            return real(network, *args, **options)

        monkeypatch.setattr(trainer, "run_loop", spy)

    def __call__(self, done: int, note: str) -> None:
        self.notes.append((done, note))


# -- one tuned model, from every side --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A model with dropout, tuned."""
    folder = tmp_path_factory.mktemp("finetune")
    teacher = load_model(tiny_folder(folder / "teacher", dropout=0.3))
    before, weights = contents(folder / "teacher"), {key: value.clone() for key, value in teacher.network.state_dict().items()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "GramConfig", few_levels)
        spied = Spied(monkeypatch)
        tuned = finetune(teacher, config=TINY, out=folder / "tuned", command="fewstep finetune it", on_progress=spied)
        yield SimpleNamespace(
            folder=folder / "tuned",
            teacher=teacher,
            before=before,
            weights=weights,
            history=rounds(tuned),
            spied=spied,
            student=load_model(folder / "tuned"),
        )


@pytest.mark.slow
def test_each_round_lowers_the_bound(made: SimpleNamespace) -> None:
    assert [one.number for one in made.history] == [1, 2]
    for one in made.history:
        assert one.bound <= one.bound_trained * ROUNDING and one.bound_trained < DECREASE * one.bound_before
        assert len(one.noise_levels) == len(one.next_times) == TINY.nfe + 1
    assert made.history[1].bound_before == made.history[0].bound
    assert made.history[1].rmse < made.history[0].rmse


@pytest.mark.slow
def test_fresh_noises_land_nearer_to_the_teacher(made: SimpleNamespace) -> None:
    grid = made.student.optimized("ddim", TINY.nfe)
    after, untuned = (fresh_error(model, grid, made.teacher) for model in (made.student, made.teacher))
    assert after < 0.6 * untuned  # measured 0.45
    assert after == pytest.approx(
        made.history[-1].rmse, rel=0.15
    )  # as measured on 32 other noises; the teacher's own steps are coarse here


def test_the_teacher_stays_as_it_is(made: SimpleNamespace) -> None:
    assert contents(made.teacher.folder) == made.before
    state = made.teacher.network.state_dict()
    assert all(torch.equal(state[key], value) for key, value in made.weights.items())
    assert not any(value.requires_grad for value in made.teacher.network.parameters())
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
    assert str(made.folder.parent) not in (made.folder / "unet" / "config.json").read_text()  # no folder of this machine is published


def test_targets_are_exact_so_dropout_is_off(made: SimpleNamespace) -> None:
    assert len(made.spied.dropout) == 2 and all(rates and not any(rates) for rates in made.spied.dropout)
    assert any(part.p == 0.3 for part in made.teacher.network.modules() if isinstance(part, nn.Dropout))


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
    end = sample(made.student, Sampler.build(DDIM(), grid, kept.schedule), states[:, 0])
    square = float((end - states[:, -1]).double().square().mean())
    assert square**0.5 == pytest.approx(made.history[-1].rmse, rel=1e-5)  # float32


@pytest.mark.slow
def test_a_round_that_gains_too_little_is_the_last(made: SimpleNamespace) -> None:
    assert len(rounds(finetune(made.teacher, config=replace(BRIEF, rounds=3, enough=0.9)))) == 1
    assert len(rounds(finetune(made.teacher, config=replace(BRIEF, rounds=3, steps=8, batch=32, num=32, held_out=32, lr=1e-3)))) == 3


def test_the_number_of_evaluations_is_an_argument_too(made: SimpleNamespace) -> None:
    tuned = finetune(made.teacher, 3, config=BRIEF)
    assert tuned.tuned.nfe == 3 and tuned.optimized("ddim", 3).steps == 3
    assert bool(torch.isfinite(sample(tuned, seeds=range(2))).all())  # by what it carries


# -- killed and continued --------------------------------------------------------------------------------------------


def killed_at(words: str, count: int) -> Callable[[int, str], None]:
    """Interrupts at the first note with these words from that many steps on."""

    def on_progress(done: int, note: str) -> None:
        if words in note and done >= count:
            raise KeyboardInterrupt

    return on_progress


@pytest.mark.slow
def test_a_continued_run_repeats_no_finished_round(tmp_path: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(made.teacher, config=BRIEF, out=tmp_path, on_progress=killed_at("loss", 1))
    finetune(made.teacher, config=BRIEF, out=tmp_path)
    (tmp_path / "tuned.json").unlink()  # as if killed while saving
    spied = Spied(monkeypatch)
    finetune(made.teacher, config=replace(BRIEF, rounds=2, half=True), out=tmp_path, on_progress=spied)  # more rounds of the same
    assert len(spied.dropout) == 1 and not any(spied.dropout[0])
    assert [note for done, note in spied.notes if "loss" in note][0].startswith("loss")


@pytest.fixture(scope="module", params=["loss", "nothing"])
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, made: SimpleNamespace) -> Path:
    """A run of two rounds, killed in the first or with the first done."""
    out = tmp_path_factory.mktemp("stopped") / request.param
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "GramConfig", few_levels)
        with pytest.raises(KeyboardInterrupt):
            on_progress = killed_at("loss", 1 if request.param == "loss" else 3)
            finetune(made.teacher, config=replace(BRIEF, rounds=2), out=out, on_progress=on_progress)
    return out


@pytest.mark.slow
def test_another_configuration_in_the_same_folder_is_refused(made: SimpleNamespace, stopped: Path) -> None:
    before = contents(stopped)
    for change in ({"lr": 1e-3}, {"steps": 3}, {"states": "teacher"}, {"nfe": 3}, {"levels": 7}, {"seed": 5}, {"teacher_nfe": 32}):
        with pytest.raises(ArtifactError, match=r"remove|another folder"):
            finetune(made.teacher, config=replace(BRIEF, rounds=2, **change), out=stopped)
        assert contents(stopped) == before, change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bound": "0.1"}, "round.json is damaged: bound: input should be a valid number, got '0.1'"),
        ({"next_times": [80.0, 1.0, 0.002]}, "round-1 is damaged .*: remove it and run the same command again"),
        ({"next_times": []}, "round-1 is damaged .*next_times.*: remove it and run the same command again"),
        ({"sha256": ""}, "round-1 is damaged .*checksum.*: remove it and run the same command again"),
    ],
)
@pytest.mark.every(4)
def test_a_damaged_round_is_named(tmp_path: Path, made: SimpleNamespace, change: dict, says: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(made.teacher, config=replace(BRIEF, rounds=2), out=tmp_path, on_progress=killed_at("loss", 3))
    path = tmp_path / "work" / "round-1" / "round.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match=says):
        finetune(made.teacher, config=replace(BRIEF, rounds=2), out=tmp_path)


@pytest.mark.slow
def test_half_weights_load_as_float32(tmp_path: Path, made: SimpleNamespace) -> None:
    whole, half = (finetune(made.teacher, config=replace(BRIEF, half=half), out=tmp_path / str(half)) for half in (False, True))
    assert [replace(one, seconds=0) for one in rounds(whole)] == [replace(one, seconds=0) for one in rounds(half)]
    sizes = [(tmp_path / str(half) / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size for half in (False, True)]
    assert sizes[1] < 0.7 * sizes[0]
    assert {value.dtype for value in half.network.parameters()} == {torch.float32}
    one, two = (sample(student, seeds=FRESH) for student in (whole, half))  # on the grids of their own fingerprints
    assert 0 < float((one - two).abs().max()) < 5e-3 * float(one.abs().max())  # float16 has 11 bits


def test_mistakes_are_named_before_any_work(tmp_path: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(module, "collect_gram", never)
    adrift = replace(made.teacher, folder=None, call=lambda net, x, t, cond: net(x, t, return_dict=False)[0])
    function = replace(made.teacher, network=lambda x, t: x)
    for error, says, model, config, out in [
        (FewstepError, "pass the data that the model was trained on", made.teacher, replace(BRIEF, form="score"), tmp_path / "out"),
        (
            ModelError,
            "cannot be saved: .*; or leave out=... away to keep the student in memory",
            adrift,
            BRIEF,
            tmp_path / "out",
        ),
        (ModelError, "is a function, which cannot be trained", function, BRIEF, tmp_path / "out"),
        (FewstepError, "already holds a finished student: choose another folder", made.teacher, BRIEF, made.folder),
        (FewstepError, "already holds a model, which would be lost", made.teacher, BRIEF, made.teacher.folder),
    ]:
        with pytest.raises(error, match=says):
            finetune(model, config=config, out=out)
        assert not (tmp_path / "out").exists()
    assert contents(made.teacher.folder) == made.before


def test_a_model_that_cannot_be_guided_leaves_nothing(tmp_path: Path, made: SimpleNamespace) -> None:
    with pytest.raises(ModelError, match="cannot be guided"):
        finetune(made.teacher, guidance=2.0, config=BRIEF, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
