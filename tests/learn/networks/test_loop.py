"""The training loop: it learns, resumes exactly after a kill, and leaves nothing half-written."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tests.processes import as_rank, together
from torch import Tensor, nn

from fewstep import ArtifactError, FewstepError
from fewstep.learn.networks.loop import LoopConfig, LossCurve, forget_checkpoint, run_loop
from fewstep.runtime.process import share

CONFIG = LoopConfig(steps=30, batch=8, lr=0.05, warmup=5, checkpoint_every=10, ema=0.9)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))


def loss(net: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(batch, 2, generator=generator)
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


class KilledError(Exception):
    """Stands for a kill signal."""


def killed_at(step: int):
    calls = 0

    def mortal(net: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > step:
            raise KilledError
        return loss(net, batch, generator)

    return mortal


def test_killed_and_resumed_ends_where_uninterrupted_does(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []
    fresh = network()
    torch.manual_seed(1)  # the state of the generator before does not matter
    whole = run_loop(fresh, loss, CONFIG, tmp_path / "whole", observe=lambda step, value: seen.append((step, value)))
    with pytest.raises(KilledError):
        run_loop(network(), killed_at(17), CONFIG, tmp_path / "cut")
    resumed = run_loop(network(), loss, CONFIG, tmp_path / "cut")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert seen[-1][0] == CONFIG.steps and seen[-1][1] < 0.3 * seen[0][1]


def test_an_interrupt_is_checkpointed_at_its_step(tmp_path: Path) -> None:
    def interrupted(net: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
        if generator.initial_seed() == 13 * 4099:  # step 13
            raise KeyboardInterrupt
        return loss(net, batch, generator)

    with pytest.raises(KeyboardInterrupt):
        run_loop(network(), interrupted, CONFIG, tmp_path)
    assert '"step": 13' in (tmp_path / "checkpoint" / "loop.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        run_loop(network(), killed_at(12), CONFIG, tmp_path)
    with pytest.raises(ArtifactError, match="belongs to another run"):
        run_loop(network(), loss, LoopConfig(steps=31, batch=8), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not finite at step 1"):
        run_loop(network(), lambda net, batch, generator: loss(net, batch, generator) * torch.inf, CONFIG, tmp_path)


LONG = replace(CONFIG, steps=200, checkpoint_every=25, warmup=20)  # reports every 2 steps


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses that a run reports which nobody stops."""
    seen: dict[int, float] = {}
    run_loop(network(), loss, LONG, tmp_path_factory.mktemp("long"), observe=seen.__setitem__)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("step", "kind"), [(101, KilledError), (25, KeyboardInterrupt), (200, KeyboardInterrupt)])
def test_a_resumed_run_reports_the_losses_of_the_other(
    tmp_path: Path, reports: dict[int, float], step: int, kind: type[BaseException]
) -> None:
    seen: dict[int, float] = {}

    def stopped(net: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
        if generator.initial_seed() == step * 4099:
            raise kind
        return loss(net, batch, generator)

    def observe(done: int, value: float) -> None:
        if done == step == LONG.steps:
            raise kind  # before the report is taken
        seen[done] = value

    with pytest.raises(kind):
        run_loop(network(), stopped, LONG, tmp_path, observe=observe)
    run_loop(network(), loss, LONG, tmp_path, observe=seen.__setitem__)
    assert seen == reports and len(reports) == 100


def test_nothing_of_a_checkpoint_is_left_when_it_is_forgotten(tmp_path: Path) -> None:
    for name in ("checkpoint", "checkpoint.new", "checkpoint.old", "trajectories"):
        (tmp_path / name).mkdir()
    forget_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["trajectories"]


class Convolution(nn.Module):
    """Of pictures, as `torch.compile` and the layout in memory matter for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x, self.body[0](x)
        return self.body(x)


def picture_loss(net: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(batch, 2, 6, 6, generator=generator)
    return (net(x).float() - x.mean(1, keepdim=True)).square().mean()


def test_a_layout_in_memory_changes_rounding_alone(tmp_path: Path) -> None:
    plain = run_loop(Convolution(), picture_loss, CONFIG, tmp_path / "a")
    other = run_loop(Convolution(), picture_loss, replace(CONFIG, channels_last=True), tmp_path / "b")
    assert other.seen[1].is_contiguous(memory_format=torch.channels_last) and not plain.seen[1].is_contiguous(
        memory_format=torch.channels_last
    )
    for a, b in zip(plain.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert b.is_contiguous()


def test_a_compiled_network_is_trained_and_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, compiled = nn.Module.compile, []

    def compile(net: nn.Module) -> None:  # without code generation, which takes long
        compiled.append(net)
        real(net, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile)
    plain = run_loop(network(), loss, CONFIG, tmp_path / "plain")
    assert not compiled
    with pytest.raises(KilledError):
        run_loop(network(), killed_at(17), replace(CONFIG, compile=True), tmp_path / "cut")
    made = run_loop(network(), loss, replace(CONFIG, compile=True), tmp_path / "cut")
    assert len(compiled) == 2 and compiled[1] is made and made._compiled_call_impl is None
    for (name, a), (other, b) in zip(plain.state_dict().items(), made.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)


def test_a_precision_that_the_machine_has_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FewstepError, match="no training in fp16 on this machine"):
        run_loop(network(), loss, replace(CONFIG, mixed_precision="fp16"), tmp_path)


@pytest.mark.parametrize("options", [{"warmup": -1}, {"checkpoint_every": 0}])
def test_loops_that_cannot_be_are_refused(options: dict) -> None:
    with pytest.raises(FewstepError, match=rf"{next(iter(options))} is at least \d, got {next(iter(options.values()))}"):
        LoopConfig(5, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weight_decay": -1.0}, "weight_decay is a finite number, not negative, got -1.0"),
        ({"weight_decay": float("inf")}, "weight_decay is a finite number"),
        ({"clip": -1.0}, "clip, the norm at which gradients are clipped, is above 0, got -1.0"),
        ({"clip": 0.0}, "clip, .*, got 0.0: inf clips none"),
    ],
)
def test_numbers_that_would_turn_or_stop_the_gradient_are_refused(options: dict, says: str) -> None:
    with pytest.raises(FewstepError, match=says):
        LoopConfig(5, **options)
    assert LoopConfig(5, clip=float("inf")).clip == float("inf")


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("checkpoint/loop.json", '{"step": "3", "identity": "x"}', "loop.json is damaged: step: input should be a valid integer, got '3'"),
        ("checkpoint/loop.json", '{"step": 3}', "loop.json is damaged: identity: field required"),
        ("checkpoint/loop.json", '{"step": 3', "loop.json is damaged: invalid JSON: .* column 10; fetch or make it again"),
        ("checkpoint/loop.json", None, "checkpoint is damaged .*31 of 30 steps are done.*: remove it and run the same command again"),
        ("checkpoint/optimizer.bin", "x", "checkpoint is damaged .*: remove it and run the same command again"),
        ("checkpoint/model.safetensors", "x", "checkpoint is damaged .*: remove it and run the same command again"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, file: str, change: str | None, says: str) -> None:
    with pytest.raises(KilledError):
        run_loop(network(), killed_at(17), CONFIG, tmp_path)
    path = tmp_path / file
    path.write_text(path.read_text().replace('"step": 10', '"step": 31') if change is None else change)
    with pytest.raises(ArtifactError, match=says):
        run_loop(network(), loss, CONFIG, tmp_path)


def test_a_pipe_in_a_checkpoint_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        run_loop(network(), killed_at(17), CONFIG, tmp_path)
    path = tmp_path / "checkpoint" / "optimizer.bin"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match=r"checkpoint is damaged .*optimizer.bin: it is a pipe or device, not a file"):
        run_loop(network(), loss, CONFIG, tmp_path)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("file", ["custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_a_checkpoint_runs_nothing(tmp_path: Path, file: str) -> None:
    with pytest.raises(KilledError):
        run_loop(network(), killed_at(17), CONFIG, tmp_path)
    torch.save(Hostile(tmp_path / "ran"), tmp_path / "checkpoint" / file)
    with suppress(
        ArtifactError
    ):  # accelerate passes over what it does not know, and over states of generators, which this loop has no need of
        run_loop(network(), loss, CONFIG, tmp_path)
    assert not (tmp_path / "ran").exists()
    if file.startswith("custom"):
        with pytest.raises(ArtifactError, match="checkpoint is damaged .*: remove it and run the same command again"):
            run_loop(network(), loss, CONFIG, tmp_path)


@pytest.mark.parametrize("loss", ['[[1, "x"]]', "[[-1, 0.5]]", "[[1, NaN]]", "0"])
def test_a_damaged_loss_curve_is_named(tmp_path: Path, loss: str) -> None:
    (tmp_path / "curve.json").write_text(f'{{"identity": "mine", "seconds": 1.0, "loss": {loss}}}')
    with pytest.raises(ArtifactError, match="curve.json is damaged: loss"):
        LossCurve(tmp_path / "curve.json", "mine")


# -- several processes ------------------------------------------------------------------------------------------------


def plain() -> nn.Module:
    """A network without dropout, which draws otherwise in each process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def shared_loss(net: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(batch, 2, generator=generator).double()[list(share(range(batch)))]
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def trained(folder: Path, steps: int = 10**9) -> tuple[dict[str, Tensor], list[tuple[int, float]]]:
    """Weights and losses; a run may be killed after some steps."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a fork is another process than the tests before it
    left, seen = iter(range(steps)), list[tuple[int, float]]()

    def mortal(net: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
        if next(left, None) is None:
            raise KilledError
        return shared_loss(net, batch, generator)

    made = run_loop(plain(), mortal, CONFIG, folder, observe=lambda step, value: seen.append((step, value)))
    return made.state_dict(), seen


@pytest.mark.parametrize("world", [2, 3])  # of a batch of 8
@pytest.mark.every(2)
def test_processes_make_the_steps_of_one(tmp_path: Path, world: int) -> None:
    weights, losses = trained(tmp_path / "one")
    first, *others = together(world, lambda: trained(tmp_path / "many"))
    for name, value in weights.items():
        torch.testing.assert_close(first[0][name], value, rtol=0, atol=1e-12)
        assert all(torch.equal(other[name], first[0][name]) for other, _ in others)
    assert [step for step, _ in first[1]] == [step for step, _ in losses] and all(seen == [] for _, seen in others)
    assert [value for _, value in first[1]] == pytest.approx([value for _, value in losses], rel=1e-6)  # summed in float32


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(2, 1), (1, 3)])
def test_another_number_of_processes_continues(tmp_path: Path, worlds: tuple[int, int]) -> None:
    weights, _ = trained(tmp_path / "one")
    assert together(worlds[0], lambda: trained(tmp_path / "cut", 17)) == ["KilledError: "] * worlds[0]
    for made, _ in together(worlds[1], lambda: trained(tmp_path / "cut")):
        for name, value in weights.items():
            torch.testing.assert_close(made[name], value, rtol=0, atol=1e-12)


def test_processes_that_accelerate_does_not_see_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without LOCAL_RANK: each would train alone on its share. Here an earlier run has settled that there is one."""
    run_loop(network(), loss, replace(CONFIG, steps=1), tmp_path / "before")
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(FewstepError, match="2 processes were started, and accelerate knows of 1: start them with torchrun, or set LOCAL"):
        run_loop(network(), loss, CONFIG, tmp_path / "after")


def test_more_processes_than_samples_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, 9)
    with pytest.raises(FewstepError, match="9 processes cannot share 8 noises: use fewer processes"):
        run_loop(network(), loss, CONFIG, tmp_path)
