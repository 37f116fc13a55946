"""Calibration: the statistics of denoisers known in closed form, one pass that keeps no data, resumption, and what it refuses."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.problems import LAW, names
from tests.processes import as_rank, together
from torch import Tensor

from fewstep import (
    ArtifactError,
    Denoiser,
    FewstepError,
    GaussianDenoiser,
    MixtureDenoiser,
    Sampler,
    VarianceExploding,
    VPLinear,
    make_grid,
    make_solver,
    sample,
    start_noise,
)
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.statistics import ModelStatistics
from fewstep.learn.samplers.calibrate import CalibrationConfig, States, collect
from fewstep.learn.teacher.moments import LARGEST_SLOPE, Moments
from fewstep.runtime import accumulate as module
from fewstep.runtime.job import Job, Progress
from fewstep.sampling.reference import reference_sampler

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode of some PyTorch releases says so

SHAPE = (3, 2, 2)
SMALL = CalibrationConfig(levels=4, num=32, batch=8)
F64 = torch.float64
FLOAT32 = 2e-5  # of a state's size: the network's own arithmetic
SIGMAS = 5.0  # standard errors of a Monte-Carlo mean
Statistics = tuple[Tensor, Tensor, Tensor]


def mixture(schedule: NoiseSchedule = LAW, dtype: torch.dtype = torch.float32) -> MixtureDenoiser:
    means = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)) * 0.6
    return MixtureDenoiser(schedule, means.to(dtype), torch.full((4,), 0.25, dtype=dtype))


def clean(seeds: Sequence[int]) -> tuple[Tensor, None]:
    """Seeded float64 images, as for `diffused`."""
    return torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=F64) * 0.7 for seed in seeds]), None


def trajectories(seeds: Sequence[int]) -> tuple[None, None]:
    return None, None


def stored(
    folder: Path,
    config: CalibrationConfig = SMALL,
    states: States = clean,
    *,
    denoiser: Denoiser | None = None,
    on_progress: Progress | None = None,
) -> tuple[Moments, str] | None:
    """A calibration in a folder."""
    with Job.open("calibrate", folder, on_progress=on_progress) as job:
        return collect(denoiser or mixture(), SHAPE, config, states, job=job)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All that calibration sees from now on, batch by batch: ``[S+1, 4, B, *D]``."""
    seen: list[Tensor] = []
    real = Moments.of.__func__

    def of(cls: type[Moments], batch: Iterable[Tensor], *others: Any) -> Moments:
        values = list(batch)
        seen.append(torch.stack(values).double())
        return real(cls, values, *others)

    monkeypatch.setattr(Moments, "of", classmethod(of))
    return seen


def gathered(
    monkeypatch: pytest.MonkeyPatch, denoiser: MixtureDenoiser, config: CalibrationConfig, states: States
) -> tuple[Moments, Tensor]:
    """The moments of a calibration, and the data ``[S+1, 4, N, *D]`` that they are of."""
    seen = recorded(monkeypatch)
    moments, _ = collect(denoiser, tuple(states([0])[0].shape[1:]) if states([0])[0] is not None else SHAPE, config, states)
    return moments, torch.cat(seen, 2)


def along(denoiser: MixtureDenoiser) -> Callable[[Tensor, Tensor], Tensor]:
    """``(X, lam) -> D`` in float64."""
    schedule = denoiser.schedule

    def function(X: Tensor, lam: Tensor) -> Tensor:  # noqa: N803
        t = schedule.t_of_lam(lam)
        return denoiser(X.double() * schedule.alpha(t), t)

    return function


def same(one: Statistics, two: Statistics, tolerance: float) -> bool:
    return all(torch.allclose(a.expand_as(b), b, rtol=tolerance, atol=tolerance) for a, b in zip(one, two, strict=True))


# -- against exact numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [50, pytest.param(400, marks=pytest.mark.slow)])
def test_an_independent_gaussian_is_found_without_error(levels: int) -> None:
    """``D = mean + c (X - mean)``, ``c = v/(v + e^(-2 lam))``: ``l = 1 - c``, and F is the constant ``(c - 1) mean``: ``s F + b = F'``."""
    mean, std = torch.linspace(-1, 1, 12, dtype=F64).reshape(SHAPE), torch.linspace(0.3, 0.9, 12, dtype=F64).reshape(SHAPE)
    config = CalibrationConfig(levels=levels, num=64)
    moments, method = collect(GaussianDenoiser(LAW, mean, std), SHAPE, config, clean)
    lam = config.lam(LAW)
    l, s, b = moments.fit(lam, "element")
    level = torch.exp(-2 * lam)[:, None, None, None]
    c = std**2 / (std**2 + level)
    torch.testing.assert_close(l, 1 - c, rtol=0, atol=1e-12)
    slope = 2 * c * (1 - c)
    # l' is a difference of l: its error h^2/6 l''' (h/2 l'' at the ends), |l'''| and |l''| below 1, times the size of a mean state
    h = float(lam[1] - lam[0])
    size = moments.mean[:, 0].abs()
    allowed = 1e-9 + size * torch.tensor([h / 2, *[h**2 / 6] * (len(lam) - 2), h / 2], dtype=F64)[:, None, None, None]
    assert method == "forward" and bool(((s * (c - 1) * mean + b - slope * mean).abs() <= allowed).all())
    assert float(s.abs().max()) <= LARGEST_SLOPE  # F does not vary: any slope would do, but it should stay a number


@pytest.mark.slow
def test_a_correlated_gaussian_has_the_closed_regression() -> None:
    r"""``D = m + A (X - m)`` with ``A = S (S + e^(-2 lam))^-1``, so ``F = (C - A) Y + (C - 1) m`` with ``C`` the diagonal of ``A``,
    and in ``F'`` the matrix is ``G = C' + C (A - 1) - A' - A (A - 1)``; the covariances of both are closed.
    """
    S = torch.tensor([[1.0, 0.6], [0.6, 0.7]], dtype=F64)  # noqa: N806
    m, root, one = torch.tensor([0.5, -0.3], dtype=F64), torch.linalg.cholesky(S), torch.eye(2, dtype=F64)

    class Correlated:
        schedule = LAW

        def __call__(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
            A = S @ torch.linalg.inv(S + t**2 * one)  # noqa: N806
            return m + (x - m) @ A.T

    def states(seeds: Sequence[int]) -> tuple[Tensor, None]:
        z = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=F64) for seed in seeds])
        return m + z @ root.T, None

    config = CalibrationConfig(levels=60, num=2048, batch=1024)
    found = collect(Correlated(), (2,), config, states)
    lam = config.lam(LAW)
    l, s, b = found[0].fit(lam, "element")
    for k in range(1, len(lam) - 1):
        level = torch.exp(-2 * lam[k])
        inverse = torch.linalg.inv(S + level * one)
        A, dA = S @ inverse, 2 * level * S @ inverse @ inverse  # noqa: N806
        C, dC = torch.diag(torch.diag(A)), torch.diag(torch.diag(dA))  # noqa: N806
        G = dC + C @ (A - one) - dA - A @ (A - one)  # noqa: N806
        spread = S + level * one
        var, cov = torch.diag((C - A) @ spread @ (C - A).T), torch.diag((C - A) @ spread @ G.T)
        left = torch.diag(G @ spread @ G.T) - cov**2 / var  # what the regression leaves unexplained
        off_diagonal = (A - C).norm() / 2**0.5
        drift = torch.diag(C - one) * m, torch.diag(dC) * m  # E F and E F'
        # standard errors at so many data; l' adds its own, as l is random: 1.5 times is enough for both here
        n = config.num
        assert bool(((l[k] - 1 + torch.diag(A)).abs() < SIGMAS * off_diagonal / n**0.5 + 1e-9).all())
        assert bool(((s[k] - cov / var).abs() < 1.5 * SIGMAS * (left / var / n).sqrt() + 0.02).all()), k
        assert bool(((s[k] * drift[0] + b[k] - drift[1]).abs() < 1.5 * SIGMAS * (left / n).sqrt() + 0.02).all()), k


@pytest.mark.parametrize(("schedule", "states"), [(LAW, trajectories), (VPLinear(), clean)], ids=["edm", "vp"])
@pytest.mark.every(2)
def test_l_of_a_mixture_is_the_mean_diagonal_of_its_jacobian(monkeypatch, schedule: NoiseSchedule, states: States) -> None:
    """Within the probes' own scatter, and not closer than that: a probe of dependent signs would show."""
    denoiser, config = mixture(schedule), CalibrationConfig(levels=6, num=256)
    moments, data = gathered(monkeypatch, denoiser, config, states)
    lam, function = config.lam(schedule), along(mixture(schedule, F64))
    l = moments.fit(lam, "element")[0]
    scores = []
    for k, level in enumerate(lam):
        jacobian = torch.func.vmap(torch.func.jacrev(lambda X, level=level: function(X[None], level)[0].flatten()))(data[k, 0])  # noqa: N803
        jacobian = jacobian.reshape(config.num, 12, 12)
        diagonal = jacobian.diagonal(dim1=1, dim2=2)
        scatter = ((jacobian**2).sum(2) - diagonal**2).mean(0) / config.num  # of a mean of v_i sum_j J_ij v_j
        off = 1 - l[k].flatten() - diagonal.mean(0)
        assert bool((off.abs() < SIGMAS * scatter.sqrt() + FLOAT32).all()), k
        scores.append(off / scatter.sqrt())
    assert 0.7 < float(torch.stack(scores[2:-2]).square().mean().sqrt()) < 1.3  # about 40 scores: 1 +- 0.12


def test_slopes_of_diffused_states_are_those_along_the_trajectory(monkeypatch) -> None:
    _, data = gathered(monkeypatch, mixture(dtype=F64), replace(SMALL, levels=6), clean)
    function, h = along(mixture(dtype=F64)), 1e-4
    x0 = torch.cat([clean([seed])[0] for seed in range(SMALL.num)])
    noise = (data[0, 0] - x0) / LAW.t_max
    assert 0.85 < float(noise.std()) < 1.15
    for k, lam in enumerate(torch.linspace(-np.log(LAW.t_max), -np.log(LAW.t_min), 7, dtype=F64)):
        X, D, dD, _ = data[k]  # noqa: N806
        torch.testing.assert_close(X, x0 + torch.exp(-lam) * noise, rtol=0, atol=1e-5)  # the same images and noise at every level
        torch.testing.assert_close(D, function(X, lam), rtol=0, atol=1e-9)
        exact = (function(X + h * (D - X), lam + h) - function(X - h * (D - X), lam - h)) / (2 * h)
        torch.testing.assert_close(dD, exact, rtol=0, atol=1e-5)  # h^2 times third derivatives


def test_own_trajectories_solve_the_sampling_ode(monkeypatch) -> None:
    mean, std = torch.linspace(-1, 1, 12).reshape(SHAPE), torch.linspace(0.3, 0.9, 12).reshape(SHAPE)
    denoiser, config = GaussianDenoiser(LAW, mean, std), replace(SMALL, levels=80, num=8)
    _, data = gathered(monkeypatch, denoiser, config, trajectories)
    lam, h = config.lam(LAW), float(torch.diff(config.lam(LAW))[0])
    for k, t in enumerate(LAW.t_of_lam(lam)):
        X, D, dD, _ = data[k]  # noqa: N806
        exact = denoiser.flow(data[0, 0].float(), torch.tensor(LAW.t_max, dtype=F64), t).double()
        torch.testing.assert_close(X, exact, rtol=1e-4, atol=1e-4)  # UniPC-3 on 80 steps, in float32
        c = std.double() ** 2 / (std.double() ** 2 + t**2)
        slope = 2 * c * (1 - c) * (X - mean) + c * (D - X)
        end = k in (0, len(lam) - 1)
        size = float((D - mean).abs().max()) + 1e-3  # D - mean is a constant times c/sqrt(1 - c + c v): derivatives below its size
        torch.testing.assert_close(dD, slope, rtol=0, atol=(h if end else h**2) * size + 1e-3)


@pytest.mark.parametrize("states", [clean, trajectories])
@pytest.mark.every(2)
def test_statistics_are_lines_fitted_to_the_data_themselves(monkeypatch, states: States) -> None:
    """All data at once, element by element, without any moments; other poolings are compared in ``test_moments``."""
    config = replace(SMALL, levels=12)
    moments, data = gathered(monkeypatch, mixture(), config, states)
    lam = config.lam(LAW)
    found = moments.fit(lam, "element")
    l, s, b = (value.flatten(1).numpy() for value in found)
    X, D, dD, vJv = data.flatten(3).permute(1, 0, 3, 2).numpy()  # noqa: N806 - each [S+1, 12, N]
    np.testing.assert_allclose(l, 1 - vJv.mean(-1), rtol=0, atol=1e-12)
    c, dl = 1 - l[..., None], np.gradient(l, lam.numpy(), axis=0)[..., None]
    F, dF = c * X - D, -dD + c * D - (c + dl) * X  # noqa: N806
    lines = np.array([[np.polyfit(F[k, e], dF[k, e], 1) for e in range(12)] for k in range(len(lam))])
    assert abs(lines[..., 0]).max() < LARGEST_SLOPE  # none is clipped, so all are compared
    np.testing.assert_allclose(s, lines[..., 0], rtol=1e-7, atol=1e-7)  # F is a small difference of large states
    np.testing.assert_allclose(b, lines[..., 1], rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_statistics_make_few_steps_better() -> None:
    """Against the same solver with ``l = 1, s = b = 0``, which is data prediction; measured 0.35 to 0.55 of its error."""
    schedule = VarianceExploding()
    denoiser, config, seeds = mixture(schedule), CalibrationConfig(levels=30, num=128), range(10_000, 10_128)
    lam = config.lam(schedule)
    l, s, b = collect(denoiser, SHAPE, config, trajectories)[0].fit(lam, "element")
    calibrated, plain = (ModelStatistics(lam, *numbers, SHAPE, schedule) for numbers in ((l, s, b), (torch.ones_like(l), 0 * s, 0 * b)))
    tight = reference_sampler(schedule)
    exact = sample(denoiser, tight, start_noise(tight.tableau.nodes, seeds, SHAPE))

    def error(statistics: ModelStatistics, steps: int) -> float:
        sampler = Sampler.build(make_solver("dpm-solver-v3", statistics=statistics), make_grid("karras", schedule, steps), schedule)
        found = sample(denoiser, sampler, start_noise(sampler.tableau.nodes, seeds, SHAPE))
        return float((found - exact).square().mean().sqrt())

    for steps in (5, 8):
        assert error(calibrated, steps) < 0.75 * error(plain, steps), steps


# -- one pass, in any pieces -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [clean, trajectories])
@pytest.mark.every(2)
def test_the_batch_does_not_matter(states: States) -> None:
    lam = SMALL.lam(LAW)
    denoiser = mixture(dtype=F64) if states is clean else mixture()
    whole, pieces = (collect(denoiser, SHAPE, replace(SMALL, batch=batch), states)[0].fit(lam, "element") for batch in (32, 5))
    assert same(pieces, whole, 1e-9 if states is clean else 1e-3)  # float32 products differ by batch, and s divides small differences


def test_data_are_let_go() -> None:
    alive: list[weakref.ref] = []
    most = 0

    def states(seeds: Sequence[int]) -> tuple[Tensor, None]:
        nonlocal most
        x0, _ = clean(seeds)
        alive.append(weakref.ref(x0))
        most = max(most, sum(ref() is not None for ref in alive))
        return x0, None

    collect(mixture(), SHAPE, replace(SMALL, num=80), states)
    assert len(alive) >= 10 and most <= 3  # one at work, one that a frame may still name, one for choosing the derivative


def test_the_file_of_moments_does_not_grow(tmp_path: Path) -> None:
    for num in (16, 64):
        stored(tmp_path / str(num), replace(SMALL, num=num))
    sizes = [(tmp_path / str(num) / "moments-0-of-1.safetensors").stat().st_size for num in (16, 64)]
    assert abs(sizes[1] - sizes[0]) <= 8  # a digit more in its header, padded to eight


def equal(one: Moments, two: Moments) -> bool:
    return one.count == two.count and torch.equal(one.mean, two.mean) and torch.equal(one.second, two.second)


@pytest.mark.parametrize("states", [clean, trajectories])
@pytest.mark.every(2)
def test_a_killed_run_visits_no_whole_batch_again(tmp_path: Path, states: States) -> None:
    whole, _ = collect(mixture(), SHAPE, SMALL, states)
    calls = 0

    def mortal(visited: int, note: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 13:  # in the middle of the third batch of four
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path, SMALL, states, on_progress=mortal)
    assert names(tmp_path) == {"moments-0-of-1.safetensors"}
    reported: list[int] = []
    resumed, _ = stored(tmp_path, SMALL, states, on_progress=lambda visited, note: reported.append(visited))
    assert equal(resumed, whole)
    assert reported == [*range(16 * 5 + 8, 32 * 5 + 1, 8), 32 * 5]


def test_moments_are_saved_now_and_then(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY", -1.0)
    written = []
    path = tmp_path / "moments-0-of-1.safetensors"
    stored(tmp_path, on_progress=lambda visited, note: written.append(path.exists()))
    assert written[:6] == [False] * 5 + [True]  # after the first batch of five levels


@pytest.mark.slow
def test_more_data_can_be_added(tmp_path: Path) -> None:
    at_once, _ = collect(mixture(), SHAPE, replace(SMALL, num=64), clean)
    stored(tmp_path)
    later, _ = stored(tmp_path, replace(SMALL, num=64))
    assert equal(later, at_once)
    with pytest.raises(ArtifactError, match="holds 64 data already: ask for at least as many"):
        stored(tmp_path)
    with pytest.raises(ArtifactError, match="belongs to another calibration"):  # its last batch is not whole
        stored(tmp_path, replace(SMALL, num=67))


class Never:
    """A denoiser that may not be asked."""

    schedule = LAW

    def __call__(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        pytest.fail("refused only after the work")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 5])  # there are four batches
def test_processes_share_the_work(monkeypatch, tmp_path: Path, world: int) -> None:
    one, _ = collect(mixture(), SHAPE, SMALL, clean)
    lam = SMALL.lam(LAW)
    for moments, _ in together(world, lambda: stored(tmp_path)):
        assert moments.count == 32 and same(moments.fit(lam, "element"), one.fit(lam, "element"), 1e-10)
    assert names(tmp_path) >= {f"moments-{rank}-of-{world}.safetensors" for rank in range(min(world, 4))}
    moments, _ = stored(tmp_path)  # one process reads what several have left
    assert same(moments.fit(lam, "element"), one.fit(lam, "element"), 1e-10)
    as_rank(monkeypatch, 0, world)
    with pytest.raises(FewstepError, match="only calibrate together with a folder"):
        collect(Never(), SHAPE, SMALL, clean)
