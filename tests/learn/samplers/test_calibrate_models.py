"""Calibration of whole models: networks, labels, guidance, images, folders, and what is refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.learn.samplers.test_calibrate import F64, FLOAT32, SHAPE, SMALL, clean, mixture, recorded, stored, trajectories
from tests.problems import LAW, names
from torch import Tensor

from fewstep import (
    ArtifactError,
    FewstepError,
    MixtureDenoiser,
    Model,
    ModelError,
    RectifiedFlow,
    Sampler,
    VarianceExploding,
    make_grid,
    make_solver,
    sample,
    start_noise,
)
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.statistics import ModelStatistics
from fewstep.data.images import Images
from fewstep.learn.samplers.calibrate import FINITE, CalibrationConfig, States, calibrate, diffused

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode of some PyTorch releases says so


def toy(schedule: NoiseSchedule = LAW) -> Model:
    """A mixture as a loaded model."""
    denoiser = mixture(schedule)
    return Model(lambda x, t: denoiser(x, t), schedule, "sample", shape=SHAPE, name="toy")


def conditional() -> Model:
    """Two classes, each with a Gaussian of its own, and both together as the null class."""
    means, stds = mixture().means[:2], torch.tensor([0.25, 0.4])
    one, two, both = MixtureDenoiser(LAW, means[:1], stds[:1]), MixtureDenoiser(LAW, means[1:], stds[1:]), MixtureDenoiser(LAW, means, stds)

    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        answers = torch.stack([one(x, t), two(x, t), both(x, t)])
        return answers[label, torch.arange(len(x))]

    return Model(network, LAW, "sample", shape=SHAPE, classes=2, null_label=2, name="toy")


def pictures(count: int = 40, *, low: float = -1.0, high: float = 1.0, shape: Sequence[int] = SHAPE, labels: bool = True) -> Images:
    x = low + (high - low) * torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    return Images(x, torch.arange(count) % 2 if labels else None, 256, "pictures")


def test_states_are_images_of_their_seeds_with_their_labels() -> None:
    images = pictures()
    states = diffused(images, SHAPE, conditional=True)
    x0, labels = states(range(64))
    gap = (x0[:, None] - images.x[None]).abs().amax((2, 3, 4))
    nearest, index = gap.min(1)
    assert float(nearest.max()) <= 1 / 256 + 1e-6 and float(nearest.max()) > 0  # dequantised within its cell
    assert len(set(index.tolist())) > 20 and torch.equal(labels, index % 2)
    torch.testing.assert_close(states([5, 9])[0], x0[[5, 9]], rtol=0, atol=0)  # by seed, whatever the batch
    assert diffused(images, SHAPE)(range(2))[1] is None


def test_statistics_are_saved_with_what_they_are_of(tmp_path: Path) -> None:
    model, images = toy(), pictures()
    made = calibrate(model, out=tmp_path, config=replace(SMALL, seed=3), images=images, command="fewstep calibrate toy")
    loaded = ModelStatistics.load(tmp_path)
    assert loaded.fingerprint == ModelStatistics.load(tmp_path).fingerprint and loaded.model == model.fingerprint
    torch.testing.assert_close(loaded.l, made.l, rtol=1e-6, atol=1e-6)
    assert loaded.card == {
        "of": "toy",
        "states": "pictures, 40 images, diffused",
        "data": 32,
        "pool": "element",
        "seed": 3,
        "derivatives": "forward",
        "denoiser": "as sampled",
        "command": "fewstep calibrate toy",
    }
    assert calibrate(model, config=SMALL).card["states"] == "own trajectories"
    assert names(tmp_path) == {"moments-0-of-1.safetensors", "statistics.json", "statistics.safetensors", "README.md"}
    loaded.check(model=model.fingerprint, guidance=1.0, schedule=LAW, shape=SHAPE)


def test_a_flow_gets_a_finite_range(monkeypatch) -> None:
    flow = RectifiedFlow()
    lam = SMALL.lam(flow)
    torch.testing.assert_close(lam[[0, -1]], torch.tensor(FINITE, dtype=F64))
    made = calibrate(toy(flow), config=SMALL)
    assert bool(torch.isfinite(made.l).all() & torch.isfinite(made.b).all())
    assert float(made.l[0].mean()) > 0.99 and float(made.l[-1].mean()) < 0.01  # all noise, no noise
    sampler = Sampler.build(make_solver("dpm-solver-v3", statistics=made), make_grid("angle", flow, 6), flow)
    assert bool(torch.isfinite(sample(mixture(flow), sampler, start_noise(sampler.tableau.nodes, range(4), SHAPE))).all())


def test_the_range_of_times_can_be_narrowed() -> None:
    lam = replace(SMALL, t_max=5.0, t_min=0.5).lam(LAW)
    torch.testing.assert_close(lam, -torch.log(torch.tensor([5.0, 5 * 0.1**0.25, 5 * 0.1**0.5, 5 * 0.1**0.75, 0.5], dtype=F64)))
    with pytest.raises(FewstepError, match="from t_max down to a smaller t_min"):
        replace(SMALL, t_max=0.5, t_min=5.0).lam(LAW)
    with pytest.raises(FewstepError, match=rf"times run from {LAW.t_max:g} down to 0: statistics from 500 to"):
        replace(SMALL, t_max=500.0).lam(LAW)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"levels": 1}, "levels is at least 2, got 1"),
        ({"num": 1}, "num is at least 2, got 1"),
        ({"batch": 0}, "batch is at least 1, got 0"),
        ({"seed": -1}, "seed is at least 0, got -1"),
        ({"pool": "pixel"}, "unknown pooling 'pixel': known are element, channel"),
    ],
)
def test_impossible_calibrations_are_refused(options: dict, says: str) -> None:
    with pytest.raises(FewstepError, match=says):
        CalibrationConfig(**options)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (pictures(shape=(1, 2, 2)), r"shape \(1, 2, 2\), the model wants \(3, 2, 2\): resize"),
        (pictures(low=0.0), r"around 0, as in \[-1, 1\]"),
        (pictures(low=0.0, high=255.0), r"around 0, as in \[-1, 1\]"),
        (pictures(low=-128.0, high=127.0), r"around 0, as in \[-1, 1\]"),
        (replace(pictures(), x=torch.full((2, *SHAPE), torch.nan)), r"around 0, as in \[-1, 1\]"),
        (pictures(labels=False), "class-conditional and pictures has no labels: use the model's own"),
        (replace(pictures(), labels=torch.full((40,), 3)), "label.* 0 to 1"),
    ],
    ids=["shape", "0-to-1", "bytes", "signed-bytes", "nan", "no-labels", "other-labels"],
)
def test_images_that_do_not_fit_are_refused(tmp_path: Path, images: Images, says: str) -> None:
    with pytest.raises(FewstepError, match=says):
        calibrate(conditional(), out=tmp_path / "out", config=SMALL, images=images)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("states", [clean, trajectories])
@pytest.mark.parametrize("k", [0, 3, 4])
def test_a_network_that_is_not_finite_is_named_with_its_level(tmp_path: Path, states: States, k: int) -> None:
    level, denoiser = float(torch.exp(-SMALL.lam(LAW)[k])), mixture()

    class Sick:
        schedule = LAW

        def __call__(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
            return denoiser(x, t) * (torch.nan if abs(float(t) / level - 1) < 1e-3 else 1)

    with pytest.raises(ModelError, match=f"not finite at noise level {level:.4g}, t = .* seeds 0 to 7: check its weights and dtype"):
        stored(tmp_path / "out", SMALL, states, denoiser=Sick())
    assert not (tmp_path / "out").exists()


def test_a_network_that_is_never_finite_is_not_said_to_be_rough() -> None:
    model = toy()
    with pytest.raises(ModelError, match="not finite.*check its weights and dtype"):
        calibrate(replace(model, network=lambda x, t: x * torch.nan), config=SMALL)


def test_a_network_without_a_derivative_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = toy()
    rough = replace(model, network=lambda x, t: torch.round(x * 8) / 8)
    with pytest.raises(ModelError, match="forward: .*; reverse: .*; difference: "):
        calibrate(rough, out=tmp_path / "out", config=SMALL)
    with pytest.raises(ModelError, match="cannot be guided"):
        calibrate(model, out=tmp_path / "out", config=SMALL, guidance=2.0)
    with pytest.raises(ModelError, match="unknown way to differentiate"):
        calibrate(model, out=tmp_path / "out", config=replace(SMALL, jvp="forwardd"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["reverse", "difference"])
@pytest.mark.every(2)
def test_the_way_to_differentiate_can_be_chosen(method: str) -> None:
    forward, other = (calibrate(toy(), config=replace(SMALL, jvp=jvp), images=pictures()) for jvp in ("forward", method))
    assert other.card["derivatives"] == method
    torch.testing.assert_close(other.l, forward.l, rtol=0, atol=1e-4 if method == "reverse" else 0.02)  # steps of a 20th of the level


@pytest.mark.parametrize(
    "changes",
    [{"levels": 5}, {"batch": 16}, {"seed": 1}, {"t_min": 0.1}, {"jvp": "reverse"}],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.every(3)
def test_moments_of_another_calibration_are_not_continued(tmp_path: Path, changes: dict) -> None:
    stored(tmp_path)
    before = (tmp_path / "moments-0-of-1.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match="belongs to another calibration.*remove it, or use another folder"):
        stored(tmp_path, replace(SMALL, **changes))
    assert (tmp_path / "moments-0-of-1.safetensors").read_bytes() == before


def test_moments_of_another_guidance_or_data_are_not_continued(tmp_path: Path) -> None:
    model, images = conditional(), pictures()
    calibrate(model, out=tmp_path, config=SMALL, images=images)
    others = [
        {},
        {"images": images, "guidance": 2.0},
        {"images": images, "guidance": 2.0, "unguided": True},
        {"images": replace(images, x=images.x * 0.9)},
    ]
    for other in others:
        with pytest.raises(ArtifactError, match="belongs to another calibration"):
            calibrate(model, out=tmp_path, config=SMALL, **other)
    other = replace(model, schedule=VarianceExploding(0.05, 21.0))
    with pytest.raises(ArtifactError, match="belongs to another calibration"):
        calibrate(other, out=tmp_path, config=SMALL, images=images)


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_damaged_moments_are_named(tmp_path: Path, damage: str) -> None:
    stored(tmp_path)
    path = tmp_path / "moments-0-of-1.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] if damage == "cut" else whole.replace(b'"about"', b'"other"'))
    with pytest.raises(ArtifactError, match=r"moments-0-of-1.safetensors is damaged .*: remove it and calibrate again"):
        stored(tmp_path)


@pytest.mark.slow
def test_guidance_and_the_network_without_it_have_their_own_statistics(tmp_path: Path) -> None:
    model, images, config = conditional(), pictures(), replace(SMALL, num=16)
    plain, guided, unguided = (
        calibrate(model, out=tmp_path / name, config=config, images=images, **options)
        for name, options in {"1": {}, "3": {"guidance": 3.0}, "u": {"guidance": 3.0, "unguided": True}}.items()
    )
    # l is 1 - diagonal: that of an extrapolation is the extrapolation of those, at the same states
    zero = calibrate(model, config=config, images=images, guidance=0.0)
    torch.testing.assert_close(guided.l, zero.l + 3 * (plain.l - zero.l), rtol=0, atol=1e-4)
    assert float((guided.l - plain.l).abs().max()) > 0.02
    assert [s.guidance for s in (plain, guided, unguided)] == [1.0, 3.0, 3.0]
    assert [s.card["denoiser"] for s in (plain, guided, unguided)] == ["as sampled", "as sampled", "unguided"]
    for name in "lsb":  # diffused images are the same states for both
        torch.testing.assert_close(getattr(unguided, name), getattr(plain, name), rtol=0, atol=0)
    assert ModelStatistics.load(tmp_path / "u").card["denoiser"] == "unguided"


def test_unguided_statistics_are_measured_on_guided_trajectories(monkeypatch) -> None:
    seen, model = recorded(monkeypatch), conditional()
    for options in ({}, {"guidance": 3.0}, {"guidance": 3.0, "unguided": True}):
        calibrate(model, config=replace(SMALL, num=8), **options)
    plain, guided, unguided = seen
    torch.testing.assert_close(unguided[:, 0], guided[:, 0], rtol=0, atol=FLOAT32)  # states of the guided sampler
    assert float((unguided[-1, 0] - plain[-1, 0]).abs().max()) > 0.1
    X, D, *_ = unguided[1]  # noqa: N806 - at noise level 4.5, where the classes differ
    denoised = model(X.float(), LAW.t_of_lam(SMALL.lam(LAW)[1]), model.labels(range(8))).double()
    torch.testing.assert_close(D, denoised, rtol=0, atol=FLOAT32)  # but the denoiser without guidance
    assert float((guided[1, 1] - D).abs().max()) > 0.1


def test_large_samples_share_their_statistics_and_their_moments(tmp_path: Path) -> None:
    """By default; another pooling has to be measured."""
    network = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(network.weight, 0.3)
    model = Model(lambda x, t: x.tanh() * network.weight.mean(), LAW, "sample", shape=(2, 100, 100), name="large", identity="large")
    config = CalibrationConfig(levels=3, num=4, batch=2)
    made = calibrate(model, out=tmp_path, config=config)
    assert made.card["pool"] == "scalar" and all(one.shape[1:] == (1, 1, 1) for one in (made.l, made.s, made.b))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) < 20_000
    with pytest.raises(ArtifactError, match="belongs to another calibration"):
        calibrate(model, out=tmp_path, config=replace(config, pool="channel"))
    by_channel = calibrate(model, config=replace(config, pool="channel"))
    assert by_channel.l.shape[1:] == (2, 1, 1)
    torch.testing.assert_close(by_channel.l.mean(1, keepdim=True), made.l, rtol=1e-6, atol=1e-6)


def test_another_pooling_of_a_finished_folder_is_free(tmp_path: Path) -> None:
    model, visits = toy(), []
    network = model.network

    def counted(x: Tensor, t: Tensor) -> Tensor:
        visits.append(len(x))
        return network(x, t)

    model = replace(model, network=counted)
    first = calibrate(model, out=tmp_path, config=SMALL)
    assert sum(visits) > 32 * 5
    visits.clear()
    again = calibrate(model, out=tmp_path, config=replace(SMALL, pool="scalar/element"))
    assert visits == []
    assert again.l.shape[1:] == (1, 1, 1) and again.b.shape[1:] == SHAPE and again.card["pool"] == "scalar/element"
    assert again.card["derivatives"] == first.card["derivatives"] == "forward"
    torch.testing.assert_close(again.l.flatten(), first.l.mean((1, 2, 3)))
