"""Distilling an operator student: exact losses, a student that is nearer to its teacher, and runs that survive kills and full disks."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from fewstep import ArtifactError, FewstepError, Model, ModelError, Sampler, VarianceExploding, load_model, make_grid, sample
from fewstep.learn.networks import distill as module
from fewstep.learn.networks import loop
from fewstep.learn.networks.distill import DISTANCES, WEIGHTS, DistillConfig, Distilled, distill
from fewstep.learn.networks.loop import LoopConfig
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, generate_trajectories
from fewstep.models.formats.folders import save_ours
from fewstep.models.networks.operator import OperatorForm, OperatorStudent
from fewstep.models.networks.temporal_unet import Mixing
from fewstep.models.tuned import Tuned
from fewstep.sampling.grid_table import GridTable
from fewstep.solvers import DDIM

SHAPE, LAW = (1, 4, 4), VarianceExploding(0.05, 20.0)
UNET = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
UNET |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
TINY = DistillConfig(slots=2, steps=60, batch=16, lr=1e-2, ema=0.9, num=64, held_out=32, teacher_nfe=8)
BRIEF = replace(TINY, steps=4, batch=8)
NO_MIXING = Mixing("none")
SHORT = replace(TINY, steps=8, batch=8, num=32, held_out=16, dropout=0.2, form=OperatorForm(mixing=NO_MIXING))
ROUNDING = 1e-5  # float32 sums of some hundreds of numbers in another order, relative


def ours(folder: Path, classes: int | None = 2, **options: object) -> Path:
    """A folder of ours with random weights."""
    torch.manual_seed(0)
    network = UNet2DModel(**UNET, num_class_embeds=None if classes is None else classes + 1, **options)
    save_ours(folder, network, "edm(0.5)", LAW, SHAPE, classes)
    return folder


def theirs(folder: Path) -> Path:
    """A diffusers folder, unconditional, that predicts the noise."""
    torch.manual_seed(0)
    UNet2DModel(**UNET).save_pretrained(folder / "unet")
    DDPMScheduler(num_train_timesteps=200, prediction_type="epsilon").save_pretrained(folder / "scheduler")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rmse(gap: Tensor) -> float:
    return float(gap.double().square().mean().sqrt())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(ours(tmp_path_factory.mktemp("distill") / "teacher", dropout=0.3))


@pytest.fixture(scope="module")
def stored(teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    """96 trajectories at four times, of which the grid of two slots has every second."""
    config = TrajectoryConfig(96, TINY.teacher_nfe, seed=TINY.seed, batch=16)
    found = generate_trajectories(teacher, make_grid("angle", LAW, 4), config, tmp_path_factory.mktemp("stored") / "them")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def made(teacher: Model, stored: Trajectories, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Distilled]:
    out = tmp_path_factory.mktemp("made") / "student"
    done = distill(teacher, TINY, out, trajectories=stored, command="fewstep distill it")
    assert done is not None
    return out, done


def land(student: Model, passes: int, x: Tensor, labels: Tensor | None) -> Tensor:
    """Where a loaded student leads as everyone samples it."""
    with torch.no_grad():
        return sample(student.denoiser, Sampler.build(DDIM(), student.optimized("ddim", passes), student.denoiser.schedule), x, labels)


def check_measured(out: Path, done: Distilled, trajectories: Trajectories, config: DistillConfig, within: float = ROUNDING) -> Model:
    """The folder gives the errors back that were measured."""
    student, held_out = load_model(str(out)), range(config.num, config.num + config.held_out)
    x, labels = trajectories.states(held_out), trajectories.labels(held_out)
    assert student.passes == tuple(done.passes)
    for n, (times, error) in done.passes.items():
        assert student.optimized("ddim", n).t.tolist() == times and len(times) == n + 1
        assert rmse(land(student, n, x[:, 0], labels) - x[:, -1]) == pytest.approx(error, rel=within)
    return student


# -- losses ----------------------------------------------------------------------------------------------------------


def test_distances_by_hand() -> None:
    error = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 1.0], [2.0, -2.0]]])  # two samples, two slots
    # norms 5 and 1, 0 and sqrt(8), over sqrt(2); less 0.00054, unless the norm is 0
    by_hand = {"l1": [2.0, 1.0], "l2": [6.5, 2.0], "huber": [3 / 2**0.5 - 0.00054, 1 - 0.00027]}
    assert set(by_hand) == set(DISTANCES)
    for name, wanted in by_hand.items():
        torch.testing.assert_close(DISTANCES[name](error), torch.tensor(wanted), rtol=1e-6, atol=1e-6)


def test_weights_by_hand() -> None:
    snr = torch.tensor([0.05, 4.0, 100.0, torch.inf])
    by_hand = {"equal": [1.0, 1.0, 1.0, 1.0], "snr": [1.0, 4.0, 10.0, 10.0], "paper": [1.0, 4.0, 100.0, 1e4]}
    assert {name: weight(snr).tolist() for name, weight in WEIGHTS.items()} == by_hand


class Oracle(nn.Module):
    """The teacher's own states, moved by ``off`` network outputs in each slot; it knows the sample by its state."""

    def __init__(self, stored: Trajectories, grid: Tensor, off: Callable[[Tensor, Tensor], Tensor] | float = 0.0) -> None:
        super().__init__()
        self.one, self.grid, self.off, self.starts = nn.Parameter(torch.ones(())), grid, off, list[float]()
        self.states = stored.states(slice(0, TINY.num), [int((stored.t - t).abs().argmin()) for t in grid])

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, start: Tensor) -> Tensor:
        j = self.grid.tolist().index(float(start))
        self.starts += [float(start)] * len(x)
        which = torch.cdist(x.flatten(1), self.states[:, j].flatten(1)).argmin(1)
        assert t.tolist() == self.grid[j + 1 :].tolist() and torch.equal(cond, (TINY.seed + which) % 2)
        off = self.off(start, t) if callable(self.off) else torch.full_like(t, self.off)
        return self.one * (self.states[which][:, j + 1 :] + off.float().reshape(-1, 1, 1, 1))


def losses(teacher: Model, stored: Trajectories, oracle: Callable[[Tensor], Oracle], folder: Path, n: int = 1, **changes: object) -> list:
    """The losses of ``n`` batches, and the oracle."""
    features = lambda x: x.flatten(1)  # noqa: E731
    work = module._Distilling(teacher, replace(TINY, **changes), folder, torch.device("cpu"), lambda done, note: None, features)
    work.teach(stored, "")
    asked, loss = oracle(work.grid.t), work.loss(work.new_student())
    return [asked, *(loss(asked, 8, torch.Generator().manual_seed(k)) for k in range(n))]


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # what one unit of the network's output moves a state at t by
    "state": lambda s, t: torch.sqrt(1 + t**2),
    "skip": lambda s, t: torch.ones_like(t),
    "denoised": lambda s, t: (1 - t / s) * s * 0.5 / torch.sqrt(s**2 + 0.25),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_target_is_the_teachers_state_and_its_unit_the_networks_output(teacher, stored, tmp_path, output: str) -> None:
    form = OperatorForm(output, mixing=NO_MIXING)
    for loss in (*DISTANCES, "features"):
        _, *zeros = losses(teacher, stored, partial(Oracle, stored), tmp_path, 6, slots=4, form=form, loss=loss)
        assert [float(zero.detach()) for zero in zeros] == [0.0] * 6, loss
    tenth = partial(Oracle, stored, off=lambda s, t: 0.1 * OUTPUTS[output](s, t))
    for loss, wanted in {"l1": 0.1, "l2": 0.01, "huber": 0.1 - 0.00054}.items():
        oracle, *values = losses(teacher, stored, tenth, tmp_path, 12, slots=4, form=form, loss=loss)
        assert len(set(oracle.starts)) > 1
        torch.testing.assert_close(torch.stack(values).detach(), torch.full((12,), wanted), rtol=2e-3, atol=0)


def test_weights_are_those_of_the_slots_and_leave_the_size_alone(teacher, stored, tmp_path) -> None:
    form, last_off = OperatorForm("skip", mixing=NO_MIXING), lambda s, t: torch.tensor([0.0, 0.1])
    for weights, wanted in {"equal": 0.05, "snr": 0.1 * 10 / 11, "paper": 0.1 * 20 / 21}.items():  # alpha / sigma is 1 and 20
        changes = {"weights": weights, "form": form, "loss": "l1", "first": 1.0}
        _, value = losses(teacher, stored, partial(Oracle, stored, off=last_off), tmp_path, **changes)
        assert float(value.detach()) == pytest.approx(wanted, rel=1e-4)
        _, value = losses(teacher, stored, partial(Oracle, stored, off=0.1), tmp_path, **changes)
        assert float(value.detach()) == pytest.approx(0.1, rel=1e-4)


def test_each_step_of_training_starts_at_the_noise_and_anywhere(teacher, stored, tmp_path) -> None:
    form = OperatorForm(mixing=NO_MIXING)
    oracle, *_ = losses(teacher, stored, partial(Oracle, stored), tmp_path, 200, slots=4, form=form, first=0.25)
    share = {start: oracle.starts.count(start) / len(oracle.starts) for start in set(oracle.starts)}
    assert set(share) == set(oracle.grid[:-1].tolist()) and all(0.15 < one < 0.35 for one in share.values()), share
    for changes in ({"first": 1.0, "form": form}, {"first": 0.25, "form": replace(form, anywhere=False)}):
        oracle, *_ = losses(teacher, stored, partial(Oracle, stored), tmp_path, 20, slots=4, **changes)
        assert set(oracle.starts) == {20.0}


def test_features_are_of_pictures_of_unit_size_and_have_a_gradient(teacher, stored, tmp_path) -> None:
    tenth = partial(Oracle, stored, off=lambda s, t: 0.1 * torch.sqrt(1 + t**2))
    oracle, value = losses(teacher, stored, tenth, tmp_path, loss="features", first=1.0)
    assert float(value.detach()) == pytest.approx(0.01, rel=1e-4)
    value.backward()
    assert oracle.one.grad is not None and float(oracle.one.grad) != 0
    with pytest.raises(FewstepError, match="the loss features compares features of pictures: pass features="):
        distill(teacher, replace(BRIEF, loss="features"), tmp_path / "out", trajectories=stored)
    assert not (tmp_path / "out").exists()


# -- one student, from every side ------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_student_beats_the_untrained_one(teacher, stored, made) -> None:
    _, done = made
    assert [step for step, _ in done.curve] == list(range(1, TINY.steps + 1))
    begin, end = (sum(value for _, value in part) / 5 for part in (done.curve[:5], done.curve[-5:]))
    assert end < 0.6 * begin
    grid, x = make_grid("angle", LAW, 2).t, stored.states(range(64, 96), [0, 2, 4])
    untrained = OperatorStudent(replace(teacher.adapted, network=copy.deepcopy(teacher.adapted.network)), grid, TINY.form)
    with torch.no_grad():
        before = rmse(untrained(x[:, 0], grid[1:], stored.labels(range(64, 96)))[:, -1] - x[:, -1])
    assert done.passes[1][1] < 0.8 * before


def test_the_folder_gives_the_measured_errors_back(teacher, stored, made) -> None:
    out, done = made
    student = check_measured(out, done, stored, TINY)
    x = stored.states(range(64, 96), [0, 2, 4])
    with torch.no_grad():
        states = student.denoiser.network(x[:, 0], make_grid("angle", LAW, 2).t[1:], stored.labels(range(64, 96)))
    norms = [2**0.5, (1 + 0.05**2) ** 0.5]
    assert [rmse(states[:, k] - x[:, k + 1]) / norms[k] for k in (0, 1)] == pytest.approx(done.slots, rel=ROUNDING)
    assert student.is_operator and (student.classes, student.null_label) == (2, None) and student.fingerprint != teacher.fingerprint
    with pytest.raises(ModelError, match="its guidance is in its weights"):
        student.guided(2.0)


def test_the_folder_says_what_it_is(teacher, made) -> None:
    out, done = made
    history = json.loads((out / "history.json").read_text())
    wanted = json.loads(json.dumps({"config": asdict(TINY), **asdict(done)}))
    assert history == wanted and set(history["passes"]) == {"1", "2"} and set(history["arithmetic"]) == {"1", "2"}
    assert Tuned.load(out) == Tuned(str(teacher.folder.resolve()), teacher.fingerprint, 1.0, "ddim", 1, "operator")
    table = GridTable.load(out / "optimized" / "ddim")
    assert (table.model, table.solver, table.guidance) == (load_model(str(out)).fingerprint, "ddim", 1.0)
    readme = (out / "README.md").read_text()
    for said in ("fewstep distill it", teacher.fingerprint, f"{done.passes[1][1]:.4f}", f"{done.arithmetic[2]:.2f}"):
        assert said in readme
    assert not list(out.rglob("checkpoint*")) and not list(out.rglob(".*")) and not (out / "work" / "trajectories").exists()


def test_finished_folders_and_models_are_not_written_over(teacher, stored, made, tmp_path) -> None:
    before = contents(made[0])
    with pytest.raises(FewstepError, match="already holds a distilled model: choose another folder, or remove it"):
        distill(teacher, TINY, made[0], trajectories=stored)
    assert contents(made[0]) == before
    before = contents(ours(tmp_path / "model"))
    with pytest.raises(FewstepError, match="already holds a model, which would be lost"):
        distill(teacher, BRIEF, tmp_path / "model", trajectories=stored)
    assert contents(tmp_path / "model") == before


@pytest.mark.parametrize(
    ("form", "changes", "cheap"),
    [
        (OperatorForm(mixing=NO_MIXING), {"slots": 1}, True),  # knowledge distillation
        (OperatorForm("skip", "slot", mixing=NO_MIXING), {"weights": "paper", "half": True}, True),
        (OperatorForm("state", mixing=Mixing("one-way")), {"loss": "l1", "weights": "snr"}, False),
        (OperatorForm(mixing=Mixing("fft", places="inner", fan="inner"), anywhere=False), {"dropout": 0.2}, False),
    ],
)
def test_students_of_every_kind(teacher, stored, tmp_path, form: OperatorForm, changes: dict, cheap: bool) -> None:
    config = replace(BRIEF, form=form, **changes)
    done = distill(teacher, config, tmp_path / "out", trajectories=stored)
    assert done is not None and len(done.slots) == config.slots
    check_measured(tmp_path / "out", done, stored, config, 2e-3 if config.half else ROUNDING)
    assert list(done.passes) == ([1, 2] if form.anywhere and config.slots == 2 else [1])
    assert 1 <= done.arithmetic[1] < (1.02 if cheap else 3) and (2 not in done.arithmetic or done.arithmetic[2] > 1.99)
    if config.half:
        sizes = [(folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size for folder in (tmp_path / "out", teacher.folder)]
        assert sizes[0] < 0.7 * sizes[1]


def test_what_half_precision_trains_is_measured_as_it_is_sampled(teacher, stored, tmp_path) -> None:
    config = replace(BRIEF, steps=2, mixed_precision="bf16")
    done = distill(teacher, config, tmp_path / "out", trajectories=stored)
    assert done is not None
    check_measured(tmp_path / "out", done, stored, config)


def test_an_unconditional_model_that_predicts_noise(tmp_path) -> None:
    model, config = load_model(theirs(tmp_path / "theirs")), replace(BRIEF, steps=2, fresh=0.5)
    done = distill(model, config, tmp_path / "out")
    assert done is not None
    check_measured(tmp_path / "out", done, Trajectories.load(tmp_path / "out" / "work" / "trajectories"), config)


def test_a_guided_teacher_moves_into_the_weights(teacher, tmp_path) -> None:
    config = replace(BRIEF, steps=2, guidance=3.0, fresh=0.5, form=OperatorForm(mixing=NO_MIXING))
    done = distill(teacher, config, tmp_path / "out")
    assert done is not None and Tuned.load(tmp_path / "out").guidance == 3.0
    found = Trajectories.load(tmp_path / "out" / "work" / "trajectories")
    check_measured(tmp_path / "out", done, found, config)
    work = module._Distilling(teacher, config, tmp_path, torch.device("cpu"), lambda done, note: None, None)
    states, labels = work.solve(found.seeds(range(4)).tolist())  # what is solved while training is what would be stored
    torch.testing.assert_close(states, found.states(range(4)), rtol=1e-5, atol=1e-5)
    assert labels.tolist() == found.labels(range(4)).tolist()


@pytest.mark.parametrize(("fresh", "count"), [(0.5, 4), (1.0, 8)])
def test_fresh_trajectories_are_new_every_step(teacher, stored, tmp_path, monkeypatch, fresh: float, count: int) -> None:
    solved, real = [], module._Distilling.solve
    monkeypatch.setattr(module._Distilling, "solve", lambda work, seeds: solved.append(seeds) or real(work, seeds))
    done = distill(teacher, replace(BRIEF, fresh=fresh), tmp_path / "out", trajectories=stored)
    assert done is not None and [len(seeds) for seeds in solved] == [count] * BRIEF.steps
    seeds = sum(solved, [])
    assert len(set(seeds)) == len(seeds) and min(seeds) > TINY.seed + 10**9


def test_a_student_to_begin_with(teacher, stored, made, tmp_path) -> None:
    student, config = load_model(str(made[0])), replace(BRIEF, steps=1, batch=32, first=1.0, lr=1e-9)
    plain = distill(teacher, config, tmp_path / "plain", trajectories=stored)
    later = distill(teacher, config, tmp_path / "later", trajectories=stored, begin=student)
    assert plain is not None and later is not None and later.curve[0][1] < 0.8 * plain.curve[0][1]
    assert later.passes[1][1] == pytest.approx(made[1].passes[1][1], rel=1e-3)
    other = distill(teacher, replace(config, slots=4), tmp_path / "other", trajectories=stored, begin=student)
    assert other is not None and len(other.slots) == 4  # what fits is taken
    with pytest.raises(ModelError, match="is an operator student, which is sampled as it is: name its teacher"):
        distill(student, config, tmp_path / "bad")


def test_a_beginning_that_is_no_student_is_refused_before_long_work(teacher, tmp_path) -> None:
    with pytest.raises(ModelError, match="teacher is no operator student to begin with"):
        distill(teacher, BRIEF, tmp_path / "out", begin=teacher)
    assert not (tmp_path / "out").exists()


# -- kills, changed minds and damage ---------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """A checkpoint every 3 steps, and shards of 16 trajectories."""
    monkeypatch.setattr(module, "LoopConfig", partial(LoopConfig, checkpoint_every=3))
    monkeypatch.setattr(module, "TrajectoryConfig", partial(TrajectoryConfig, batch=16))


def reached(out: Path) -> dict[str, object]:
    """The weights and all that was measured but the clock; nothing of a checkpoint may be left."""
    assert sorted(path.name for path in (out / "work").iterdir()) == ["curve.json", "trajectories"]
    history = json.loads((out / "history.json").read_text())
    weights = {name: data for name, data in contents(out).items() if name.endswith(".safetensors")}
    return weights | {"history": {key: value for key, value in history.items() if key != "seconds"}}


@pytest.fixture(scope="module")
def whole(teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a run reaches that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "TrajectoryConfig", partial(TrajectoryConfig, batch=16))
        distill(teacher, SHORT, out)
    return reached(out)


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_an_interrupted_run_ends_where_the_other_does(teacher, whole, small_parts, tmp_path, step: int) -> None:
    def interrupt(done: int, note: str) -> None:
        if done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(teacher, SHORT, tmp_path, observe=interrupt)
    seen: list[int] = []
    distill(teacher, SHORT, tmp_path, observe=lambda done, note: seen.append(done))
    assert reached(tmp_path) == whole and {*seen} - {0, step} == {*range(step + 1, 9)}  # no step is done again


def test_an_interrupt_while_the_curve_is_written_loses_no_point(teacher, whole, small_parts, tmp_path) -> None:
    writes, real = [], loop.write_whole

    def interrupted(path: Path, content: bytes) -> None:
        writes.append(path.name)
        if writes.count("curve.json") == 5:
            raise KeyboardInterrupt
        real(path, content)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "write_whole", interrupted)
        distill(teacher, SHORT, tmp_path)
    distill(teacher, SHORT, tmp_path)
    assert reached(tmp_path) == whole


CHANGES = [{"lr": 1e-3}, {"steps": 9}, {"batch": 16}, {"loss": "l1"}, {"slots": 3}, {"seed": 1}, {"num": 48}, {"teacher_nfe": 4}]


def test_other_options_do_not_take_over_a_half_finished_run(teacher, stored, whole, small_parts, tmp_path) -> None:
    with pytest.raises(ZeroDivisionError):
        distill(teacher, SHORT, tmp_path, observe=lambda done, note: done == 5 and 1 / 0)
    before = contents(tmp_path)
    for change in [*CHANGES, {"trajectories": stored}]:
        given = {"trajectories": change.pop("trajectories")} if "trajectories" in change else {}
        with pytest.raises(ArtifactError, match=r"of another|to another run|from seed"):
            distill(teacher, replace(SHORT, **change), tmp_path, **given)
        assert contents(tmp_path) == before, change
    distill(teacher, SHORT, tmp_path)
    assert reached(tmp_path) == whole
