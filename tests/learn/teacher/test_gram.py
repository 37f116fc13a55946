"""The Gram matrix: cell means without quadrature, local errors of two solvers as they are, and one pass in any pieces."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.learn.teacher import problems
from tests.learn.teacher.problems import LAW, calls
from tests.processes import as_rank, together
from torch import Tensor

from fewstep import (
    ArtifactError,
    DiscreteVP,
    FewstepError,
    GaussianDenoiser,
    GridError,
    MixtureDenoiser,
    Model,
    ModelError,
    Nodes,
    RectifiedFlow,
    VarianceExploding,
    VPLinear,
    seeded_noise,
)
from fewstep.core.schedule import NoiseSchedule
from fewstep.learn.search.bound import Bound
from fewstep.learn.teacher.gram import FINITE, PROBE, Gram, GramConfig, collect_gram, fine_grid, solve
from fewstep.models.problem import Problem
from fewstep.runtime.job import Job, Progress

F64 = torch.float64
SHAPE = (2, 3)
SMALL = GramConfig(levels=8, num=12, batch=4, seed=5)
FLOAT32 = 2e-5  # of the data's size: the network's and the states' own arithmetic
ROUNDING = 1e-12  # of the data's variance: moments in float64
MEAN, STD = torch.linspace(-1, 1, 6, dtype=F64).reshape(SHAPE), torch.linspace(0.1, 1.5, 6, dtype=F64).reshape(SHAPE)
TABLE = DiscreteVP.linear(100)


def mixture(schedule: NoiseSchedule = LAW) -> MixtureDenoiser:
    return problems.mixture(SHAPE, schedule, F64)


def toy(denoiser: MixtureDenoiser | None = None, **options: Any) -> Model:
    return problems.toy(denoiser or mixture(), **options)


def gathered(
    model: Model, config: GramConfig = SMALL, folder: Path | None = None, guidance: float = 1.0, on_progress: Progress | None = None
) -> Gram:
    problem = Problem(model, guidance)
    if folder is None:
        return collect_gram(problem, config)
    with Job.open("make a Gram matrix", folder, on_progress=on_progress) as here:
        return collect_gram(problem, config, here)


def trajectories(schedule: NoiseSchedule, cells: int, num: int = 16) -> tuple[Nodes, Tensor, Tensor]:
    """Of the mixture, in float64: nodes, states and outputs."""
    denoiser, nodes = mixture(schedule), Nodes.at(schedule, fine_grid(schedule, cells).t)
    start = nodes.sigma[0] * torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=F64)
    states, outputs = zip(*solve(denoiser, nodes, start, None), strict=True)
    return nodes, torch.stack(states), torch.stack(outputs)


def same(one: Gram, two: Gram, tolerance: float = ROUNDING) -> bool:
    pairs = zip(one.tensors().values(), two.tensors().values(), strict=True)
    return one.count == two.count and all(torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True) for a, b in pairs)


# -- what is in it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LAW, VPLinear()], ids=["edm", "vp"])
def test_cell_means_are_the_integrals_over_the_inverse_level(schedule: NoiseSchedule) -> None:
    """Of a Gaussian, whose trajectories and outputs are closed; the integral by Gauss's rule at 12 points."""
    denoiser, nodes = GaussianDenoiser(schedule, MEAN, STD), Nodes.at(schedule, fine_grid(schedule, 12).t)
    start = nodes.sigma[0] * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=F64)

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.stack([denoiser.flow(start, nodes.t[0], time) for time in t])
        return x, torch.stack([denoiser(state, time) for state, time in zip(x, t, strict=True)])

    (x, outputs), means = at(nodes.t), []
    places, weights = (torch.from_numpy(values) / 2 for values in np.polynomial.legendre.leggauss(12))
    for v, w in (1 / torch.exp(-nodes.lam)).unfold(0, 2, 1):
        _, inside = at(schedule.t_of_lam(torch.log((v + w) / 2 + (w - v) * places)))
        means.append(torch.einsum("n,n...->...", weights, inside))
    pictures = torch.cat([outputs, torch.stack(means)]).flatten(1)
    gram = Gram.of(nodes, x, outputs)
    assert gram.cells == 12 and gram.count == 3 and bool(gram.slopes.isnan().all())
    torch.testing.assert_close(gram.matrix, pictures @ pictures.T / 18, rtol=0, atol=1e-9)  # t_of_lam
    torch.testing.assert_close(gram.D, outputs.flatten(1) @ outputs.flatten(1).T / 18, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("schedule", [LAW, VPLinear(), RectifiedFlow(), TABLE], ids=["edm", "vp", "flow", "table"])
def test_shares_make_the_mean_between_any_two_levels(schedule: NoiseSchedule) -> None:
    """``z_k = r z_j + (1 - r) Dbar_jk`` with the mean of the cells' means."""
    nodes, x, outputs = trajectories(schedule, 8)
    gram = Gram.of(nodes, x, outputs)
    shares, ratio, level = gram.shares(), gram.ratio(), gram.level
    cells = [(x[k] / nodes.alpha[k] - level[k] * x[k - 1] / nodes.sigma[k - 1]) / (1 - level[k] / level[k - 1]) for k in range(1, len(x))]
    for j in range(gram.cells + 1):
        for k in range(gram.cells + 1):
            if j >= k:
                assert not shares[j, k].any() and ratio[j, k] == 1
                continue
            r = float(level[k] / level[j])
            mean = torch.einsum("m,m...->...", shares[j, k], torch.stack(cells))
            assert float(shares[j, k].sum()) == pytest.approx(1, abs=ROUNDING) and bool((shares[j, k] >= 0).all()) and ratio[j, k] == r
            came = level[k] * x[j] / nodes.sigma[j] + (1 - r) * mean  # r z_j, finite at alpha = 0
            torch.testing.assert_close(came, x[k] / nodes.alpha[k], rtol=0, atol=1e-10 * float(x[j].abs().max()))


@pytest.mark.parametrize("schedule", [LAW, VPLinear(), RectifiedFlow(), TABLE], ids=["edm", "vp", "flow", "table"])
def test_local_errors_are_those_of_the_formulas(schedule: NoiseSchedule) -> None:
    """DDIM and DPM-Solver++ 2M from the stored states, one step of each between all levels, in units of the clean image."""
    nodes, x, outputs = trajectories(schedule, 7)
    bound, count = Bound(Gram.of(nodes, x, outputs)), len(x)
    assert bool(torch.isfinite(bound.first_order).eq(torch.ones(count, count).triu(1) > 0).all())
    lam, compared = nodes.lam, 0

    def error(j: int, k: int, answer: Tensor) -> float:
        step = nodes.sigma[k] / nodes.sigma[j] * x[j] - nodes.alpha[k] * torch.expm1(lam[j] - lam[k]) * answer
        return float(((step - x[k]) / nodes.alpha[k]).square().mean())

    for k in range(count):
        for j in range(k):
            # squares, since they are differences of moments: at rounding of these, or at 1e-9 of themselves
            assert float(bound.first_order[j, k] ** 2) == pytest.approx(error(j, k, outputs[j]), rel=1e-9, abs=ROUNDING)
            for i in range(j):
                r = (lam[j] - lam[i]) / (lam[k] - lam[j])
                line = bool(torch.isfinite(lam[[i, k]]).all())  # else there is none, and the step is of first order
                answer = (1 + 1 / (2 * r)) * outputs[j] - 1 / (2 * r) * outputs[i] if line else outputs[j]
                size = max(1.0, float(1 / r)) ** 2 if line else 1.0
                assert float(bound.second_order[i, j, k] ** 2) == pytest.approx(error(j, k, answer), rel=1e-9, abs=size * ROUNDING)
                compared += 1
    assert compared == count * (count - 1) * (count - 2) / 6
    ordered = torch.arange(count)[:, None] < torch.arange(count)
    assert torch.equal(torch.isfinite(bound.second_order), ordered[:, :, None] & ordered[None])


def test_infinite_and_clean_ends_are_finite_edges() -> None:
    nodes, x, outputs = trajectories(RectifiedFlow(), 10)
    gram = Gram.of(nodes, x, outputs)
    assert gram.level[0] == torch.inf and gram.level[-1] == 0
    gram.slopes = torch.rand(gram.cells + 1, 2, dtype=F64)
    for amplification in ("plain", "trace", "norm"):
        for total in ("sum", "squares"):
            for bound in (Bound(gram, amplification, total), Bound(gram, amplification, total, "jensen")):
                assert all(0 < bound(path) < 10 for path in bound.best(6).values())
                assert all(len(set(path)) == steps + 1 for steps, path in bound.best_pairs(6).items())


@pytest.mark.slow
def test_slopes_are_trace_and_norm_of_the_jacobian() -> None:
    """``J = diag(c)``: for signs ``v``, ``<v, J v>`` is the trace and ``|J v|^2`` the Frobenius norm, whatever the signs."""
    for schedule in (LAW, VPLinear(), TABLE, RectifiedFlow()):
        gram = gathered(toy(GaussianDenoiser(schedule, MEAN, STD)), replace(SMALL, jacobian=True))
        c = (STD**2 / (STD**2 + gram.level[:, None, None] ** 2)).flatten(1)
        torch.testing.assert_close(gram.slopes, torch.stack([c.mean(1), (c**2).mean(1)], 1), rtol=0, atol=FLOAT32)


def test_slopes_of_a_mixture_are_those_of_its_jacobian_at_the_states() -> None:
    gram = gathered(toy(), replace(SMALL, jacobian=True, num=4))
    denoiser, nodes = mixture(), Nodes.at(LAW, fine_grid(LAW, 8).t)
    start = seeded_noise(range(5, 9), SHAPE).double() * LAW.t_max
    v = torch.where(seeded_noise(range(5, 9), SHAPE, stream=PROBE) > 0, 1.0, -1.0).double()
    for k, (state, _) in enumerate(solve(denoiser, nodes, start, None)):
        Jv = torch.func.jvp(lambda z, k=k: denoiser(z, nodes.t[k]), (state,), (v,))[1]  # noqa: N806
        expected = torch.stack([(v * Jv).mean(), Jv.square().mean()])
        torch.testing.assert_close(gram.slopes[k], expected, rtol=1e-3, atol=FLOAT32)  # steep where the components part


# -- the levels ------------------------------------------------------------------------------------------------------


def test_levels_are_uniform_in_lam() -> None:
    for schedule in (LAW, VarianceExploding(), VPLinear()):
        grid = fine_grid(schedule, 16)
        gaps = torch.diff(schedule.lam(grid.t))
        assert grid.steps == 16 and grid.t[0] == schedule.t_max and grid.t[-1] == schedule.t_min
        torch.testing.assert_close(gaps, gaps.mean().expand(16), rtol=1e-9, atol=0)
    for schedule in (RectifiedFlow(), RectifiedFlow(3.0)):
        lam = schedule.lam(fine_grid(schedule, 16).t)
        assert lam[0] == -torch.inf and lam[-1] == torch.inf
        torch.testing.assert_close(lam[1:-1], torch.linspace(-FINITE, FINITE, 17, dtype=F64))
    far = VarianceExploding(1e-5, 20.0)  # cleaner than exp(-7)
    lam = far.lam(fine_grid(far, 16).t)
    assert float(lam[-2]) == pytest.approx(FINITE) and float(lam[-1]) == pytest.approx(-float(torch.log(torch.tensor(1e-5))))


def test_levels_of_a_discrete_model_are_its_own_times() -> None:
    for schedule in (TABLE, DiscreteVP.scaled_linear(), DiscreteVP.linear(30), TABLE.zero_terminal_snr()):
        for cells in (8, 128):
            t = fine_grid(schedule, cells).t
            assert torch.equal(t, t.round()) and t[0] == schedule.t_max and t[-1] == schedule.t_min
            assert bool((torch.diff(t) <= -1).all()) and len(t) <= cells + 3
    assert fine_grid(DiscreteVP.linear(30), 128).steps < 30


# -- one pass, in any pieces -----------------------------------------------------------------------------------------


def test_batches_add_up_to_the_whole() -> None:
    nodes, x, outputs = trajectories(LAW, 8, num=12)
    slopes = torch.rand(3, 9, 2, dtype=F64)
    whole = Gram.of(nodes, x, outputs, torch.einsum("n,nkc->kc", torch.tensor([5, 1, 6], dtype=F64) / 12, slopes))
    batches = list(zip(x.split([5, 1, 6], 1), outputs.split([5, 1, 6], 1), slopes, strict=True))
    for order in (batches, batches[::-1]):
        total = Gram.empty(whole.level)
        for batch in order:
            total.merge(Gram.of(nodes, *batch))
        total.merge(Gram.empty(whole.level))  # of no data
        assert same(total, whole)
    assert same(Gram.restored(whole.tensors(), 12), whole)
    other = trajectories(LAW, 9, num=2)
    with pytest.raises(GridError, match=r"different levels \(9 and 10\) cannot be merged"):
        whole.merge(Gram.of(*other))


def test_the_batch_does_not_matter() -> None:
    config = replace(SMALL, jacobian=True)
    assert same(gathered(toy(), config), gathered(toy(), replace(config, batch=12)), FLOAT32)  # float32 sums may differ by batch
    assert bool(gathered(toy()).slopes.isnan().all())


@pytest.mark.slow
def test_a_killed_pass_continues_to_the_same_numbers(tmp_path: Path) -> None:
    config = replace(SMALL, jacobian=True)
    whole = gathered(model := toy(), config)
    once, shown = calls(model), []
    with pytest.raises(KeyboardInterrupt):
        gathered(toy(stop=once - 3), config, tmp_path)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["gram-0-of-1.safetensors"]
    resumed = gathered(model := toy(), config, tmp_path, on_progress=lambda done, note: shown.append((done, note)))
    assert same(resumed, whole, 0) and shown == [(12, "9 levels"), (12, "")]
    assert calls(model) < once / 2
    gathered(idle := toy(), config, tmp_path)
    assert calls(idle) == 0  # a finished one is only read
    more = gathered(model := toy(), replace(config, num=16), tmp_path)
    assert same(more, gathered(toy(), replace(config, num=16)), 0) and calls(model) < once / 2


@pytest.mark.slow
def test_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = gathered(toy())
    first, second = together(2, lambda: gathered(toy(), folder=tmp_path))
    assert same(first, one) and same(first, second, 0)
    assert same(gathered(idle := toy(), folder=tmp_path), first, 0) and calls(idle) == 0  # one process reads what two have left
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(FewstepError, match="only make a Gram matrix together with a folder"):
        gathered(toy())


def test_other_work_is_not_mixed_in(tmp_path: Path) -> None:
    model = toy(classes=2)
    gathered(model, folder=tmp_path)
    others = [replace(SMALL, levels=9), replace(SMALL, seed=6), replace(SMALL, batch=6), replace(SMALL, jacobian=True)]
    requests = [(model, config, 1.0) for config in others] + [(toy(mixture(VPLinear())), SMALL, 1.0), (model, SMALL, 2.0)]
    for other, config, guidance in requests:
        with pytest.raises(ArtifactError, match="belongs to another Gram matrix .*: remove it, or use another folder"):
            gathered(other, config, tmp_path, guidance)
    (tmp_path / "gram-0-of-1.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="is damaged .*: remove it and run the command again"):
        gathered(model, folder=tmp_path)


def test_guidance_and_labels_reach_the_network() -> None:
    """A label moves every answer by a tenth of its distance to the null class."""
    one = replace(SMALL, num=1, batch=1, seed=4)  # of class 0
    at = mixture()(seeded_noise([4], SHAPE).double() * LAW.t_max, torch.tensor(LAW.t_max, dtype=F64))
    for model, guidance, moved in ((toy(), 1.0, 0.0), (toy(classes=2), 1.0, -0.2), (toy(classes=2), 2.0, -0.4)):
        gram = gathered(model, one, guidance=guidance)
        assert float(gram.D[0, 0]) == pytest.approx(float((at + moved).square().mean()), abs=FLOAT32)


@pytest.mark.parametrize("bad", [1, 5, 9])
def test_a_network_that_is_not_finite_is_named(bad: int, tmp_path: Path) -> None:
    level = float(torch.exp(-LAW.lam(fine_grid(LAW, 8).t))[bad - 1])
    with pytest.raises(ModelError, match=rf"not finite at noise level {level:.4g}, t = .*: check its weights and dtype"):
        gathered(toy(bad=bad), folder=tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("options", [{"levels": 3}, {"num": 0}, {"batch": 0}, {"seed": -1}])
def test_impossible_requests_are_refused(options: dict) -> None:
    ((name, value),) = options.items()
    with pytest.raises(FewstepError, match=rf"{name} is at least \d, got {value}"):
        GramConfig(**options)
