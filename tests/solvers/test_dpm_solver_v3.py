"""What only DPM-Solver-v3 has: statistics, which decide what its steps are exact for, gates, and the authors' settings."""

import functools
import math
from dataclasses import replace
from itertools import pairwise as neighbours

import pytest
import torch
from tests.problems import ANY_STATISTICS, SOME_STATISTICS, mixture, noise, pairwise, statistics

from fewstep import (
    ArtifactError,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    VPLinear,
    make_grid,
    make_solver,
    sample,
    tabulate,
)
from fewstep.core.statistics import ModelStatistics
from fewstep.models.analytic import GaussianDenoiser
from fewstep.solvers import DPMSolverV3, takes_statistics
from fewstep.solvers.dpm_solver_v3 import PUBLISHED, published
from fewstep.solvers.stencil import NEVER

CELL = 0.1  # of constant statistics
KINKS = 1e-6  # statistics are linear between levels 0.001 apart, states up to 200; measured 4e-7
ORDER_SLACK = 0.2  # how far from its limit a slope may still be; measured 0.1
SAME_SUMS = 1e-12  # the same few terms in another order
MEAN, STD = torch.tensor([0.4, -0.7], dtype=torch.float64), torch.tensor([0.5, 0.9], dtype=torch.float64)


@functools.cache
def gaussian_statistics(forced: float) -> ModelStatistics:
    """Of the data ``N(MEAN, STD^2)``, for which ``F' = s F + b`` holds exactly, ``forced`` of it by ``b`` and the rest by ``s``.

    There ``D = c X + (1 - c) m`` with ``c = v^2 / (v^2 + e^{-2 lam})``; with ``l = 1 - c`` is ``F = (c - 1) m`` and ``F' = -2 c F``.
    """
    lam = torch.linspace(-6, 7, 13001, dtype=torch.float64)
    c = STD**2 / (STD**2 + torch.exp(-2 * lam[:, None]))
    return ModelStatistics(lam, 1 - c, (forced - 1) * 2 * c, forced * 2 * c * (1 - c) * MEAN, (2,), VPLinear())


@pytest.mark.parametrize(
    ("name", "forced", "schedule"), pairwise(list(SOME_STATISTICS), [0.0, 1.0, 0.3], [VPLinear(), VarianceExploding()])
)
@pytest.mark.every(9)
def test_exact_for_the_model_of_its_statistics(name, forced, schedule):
    """One step or many: nothing is left to approximate, whatever the order."""
    solver, denoiser = replace(ANY_STATISTICS[name], statistics=gaussian_statistics(forced)), GaussianDenoiser(schedule, MEAN, STD)
    for steps in (1, 2, 5):
        nodes = solver.nodes(TimeGrid.logsnr(schedule, steps), schedule)
        start = nodes.sigma[0] * noise(4, 2)
        error = sample(denoiser, tabulate(solver, nodes), start) - denoiser.flow(start, nodes.t[0], nodes.t[-1])
        assert float(error.abs().max()) < KINKS


@pytest.mark.parametrize("name", SOME_STATISTICS)
@pytest.mark.every(2)
def test_it_converges_from_end_to_end(name):
    """With first-order steps at both ends, so of order 2 at most, and statistics of another model.

    They have ``l = 1`` towards noise, as those of every model. With any other ``l`` the part ``(1 - l) x/alpha`` of ``F`` is infinite
    there, and no number of steps helps.
    """
    schedule, solver, errors = RectifiedFlow(), replace(ANY_STATISTICS[name], statistics=gaussian_statistics(0.3)), []
    denoiser, start = GaussianDenoiser(schedule, MEAN.flip(0), STD.flip(0)), noise(8, 2)
    for steps in (16, 32):
        tableau = tabulate(solver, solver.nodes(TimeGrid.angle(schedule, steps), schedule))
        error = sample(denoiser, tableau, start) - denoiser.flow(start, tableau.nodes.t[0], tableau.nodes.t[-1])
        errors.append(float(error.square().mean().sqrt()))
    assert math.log2(errors[0] / errors[1]) > min(solver.order, 2) - ORDER_SLACK


@pytest.mark.parametrize("name", ["v3-1-true-none", "v3-3-true-true"])
def test_trapezoid_tends_to_exact(name):
    """On the same times, points of the statistics' grid, with ever more levels."""
    schedule, differences = VPLinear(), []
    for levels in (61, 121, 241):
        lam = torch.linspace(-3, 3, levels, dtype=torch.float64)
        waves = (0.4 * torch.sin(f * lam + 1)[:, None] for f in (0.9, 0.7, 1.1))
        owned = ModelStatistics(lam, *waves, (2,), schedule)
        grid = owned.grid(schedule, torch.arange(0, levels, levels // 6))
        exact, trapezoid = (
            tabulate(solver, solver.nodes(grid, schedule)).update
            for solver in (replace(ANY_STATISTICS[name], statistics=owned, integrals=rule) for rule in ("exact", "trapezoid"))
        )
        differences.append(float((exact - trapezoid).abs().max()))
    assert min(math.log2(a / b) for a, b in neighbours(differences)) > 2 - ORDER_SLACK


# -- gates ----------------------------------------------------------------------------------------------------------------------------


def not_at_the_end(part: float) -> bool:
    return part > 0.3


def corrected(**options) -> list[bool]:
    """At which evaluations the state that a step led to is replaced: where the old anchor is read. No step led to the first."""
    solver, schedule = DPMSolverV3(statistics(), **options), VPLinear(t_max=0.8)
    nodes = solver.nodes(TimeGrid.uniform(schedule, 8, t_min=0.01), schedule)
    return [False, *(bool(row != 0) for row in tabulate(solver, nodes).update[1:, 0, 0, 0])]


def test_gates():
    """Times are 1, 0.88, 0.75, 0.63, 0.51, 0.38, ... of the first."""
    assert corrected(corrector="none") == [False] * 8
    assert corrected(gate="always") == [False] + [True] * 7
    assert corrected(gate="half") == [False] * 5 + [True] * 3
    assert corrected(gate="half-as-coded") == [False] + [True] * 4 + [False] * 3
    assert corrected(gate=lambda part: 0.6 < part < 0.8) == [False, False, True, True, False, False, False, False]


def test_same_corrects_from_the_second_step():
    assert corrected(corrector="same") == [False, False] + [True] * 6
    assert corrected(steps=1, corrector="same") == [False] * 8  # its only point is the new one


# -- shapes ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrals", ["exact", "trapezoid"])
def test_shared_statistics_are_those_of_every_element(integrals):
    """One number for all, one per channel, and both written out for every element, of states [B, C, H, W]."""
    shape, schedule = (3, 2, 4), VPLinear()
    lam = torch.linspace(-5.5, 5.5, 221, dtype=torch.float64)
    wave = torch.sin(lam[:, None] + torch.arange(3)).reshape(-1, 3, 1, 1)
    shared = ModelStatistics(lam, 0.4 + 0.2 * wave, -0.3 + 0.2 * wave[:, :1], 0.3 * wave, shape, schedule)
    written = ModelStatistics(lam, *(getattr(shared, name).expand(-1, *shape) for name in "lsb"), shape, schedule)
    assert (shared.element, written.element) == ((3, 1, 1), shape)
    ends = []
    for owned in (shared, written):
        solver = DPMSolverV3(owned, 3, integrals=integrals)
        sampler = Sampler.build(solver, TimeGrid.logsnr(schedule, 6), schedule)
        assert sampler.tableau.record.shape == (6, 2, *owned.element)
        assert sampler.tableau.update.shape == (6, 2, 6, *owned.element)
        ends.append(sample(GaussianDenoiser(schedule, torch.ones(shape), torch.tensor(0.5)), sampler, noise(5, *shape)))
    torch.testing.assert_close(ends[0], ends[1], rtol=SAME_SUMS, atol=SAME_SUMS)


# -- the artifact ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"steps": 3}, {"integrals": "trapezoid", "predictor": "pseudo", "corrector": "same"}, {"gate": not_at_the_end}]
)
def test_a_sampler_is_saved_with_its_bias_and_runs_alone(tmp_path, options):
    schedule = VPLinear()
    solver = DPMSolverV3(statistics(0.5, 0.2, -0.3), **options)
    sampler = Sampler.build(solver, TimeGrid.logsnr(schedule, 5), schedule, card={"command": "fewstep"})
    loaded = Sampler.load(sampler.save(tmp_path / "sampler"))
    assert bool((loaded.tableau.bias != 0).any())
    assert loaded.options == dict(sampler.options)
    assert loaded.options["statistics"] == solver.statistics.fingerprint
    start = noise(3, 2)
    assert torch.equal(sample(mixture(schedule), loaded, start), sample(mixture(schedule), sampler, start))


# -- made by name, and refused --------------------------------------------------------------------------------------------------------


def test_it_wants_statistics(tmp_path):
    owned = statistics(0.5, 0.2, -0.3)
    assert takes_statistics("dpm-solver-v3:steps=3")
    assert not takes_statistics("unipc-3")
    with pytest.raises(SolverError, match="dpm-solver-v3 needs statistics of its model: make them with 'fewstep calibrate'"):
        make_solver("dpm-solver-v3", steps=3)
    assert make_solver("dpm-solver-v3:steps=2", statistics=owned, corrector="same") == DPMSolverV3(owned, 2, corrector="same")
    folder = owned.save(tmp_path / "statistics")
    for path in (folder, str(folder)):
        assert make_solver("dpm-solver-v3", statistics=path).statistics.fingerprint == owned.fingerprint
    with pytest.raises(ArtifactError, match=r"cannot read .*statistics\.json"):
        DPMSolverV3(tmp_path)


def test_a_gate_of_ones_own_by_name():
    owned = statistics()
    solver = make_solver("dpm-solver-v3", statistics=owned, gate=not_at_the_end)
    assert solver == DPMSolverV3(owned, gate=not_at_the_end)


@pytest.mark.parametrize("value", [None, {}, 3])
def test_what_is_no_statistics_is_refused(value):
    with pytest.raises(SolverError, match="needs .*tatistics"):
        DPMSolverV3(value)


def test_solvers_with_other_statistics_are_others():
    owned = statistics()
    assert DPMSolverV3(owned) == DPMSolverV3(owned)
    assert DPMSolverV3(owned) != DPMSolverV3(statistics())


@pytest.mark.parametrize("integrals", ["exact", "trapezoid"])
def test_a_grid_outside_the_statistics_names_both_ranges(integrals):
    schedule = VarianceExploding()
    lam = torch.linspace(-math.log(5), -math.log(0.1), 61, dtype=torch.float64)
    solver = DPMSolverV3(ModelStatistics(lam, *torch.zeros(3, 61, 1), (1,), schedule), integrals=integrals)
    inside = TimeGrid.logsnr(schedule, 3, t_max=5.0, t_min=0.1)
    assert solver.nodes(inside, schedule).evaluations == 3
    with pytest.raises(SolverError, match=r"cover noise levels 0\.1 to 5, the grid runs from 80 to 0\.1: calibrate that range"):
        solver.nodes(TimeGrid.logsnr(schedule, 3, t_min=0.1), schedule)
    with pytest.raises(SolverError, match=r"cover noise levels 0\.1 to 5, the grid runs from 5 to 0\.05"):
        solver.nodes(TimeGrid.logsnr(schedule, 3, t_max=5.0, t_min=0.05), schedule)


@pytest.mark.parametrize("integrals", ["exact", "trapezoid"])
def test_the_ends_of_the_process_stay_where_they_are(integrals):
    """No statistics reach them, and none are needed there."""
    schedule, solver = RectifiedFlow(), DPMSolverV3(statistics(), 3, integrals=integrals)
    sampler = Sampler.build(solver, TimeGrid.angle(schedule, 6), schedule)
    assert torch.equal(sampler.tableau.nodes.t[[0, -1]], sampler.grid.t[[0, -1]])
    torch.testing.assert_close(sampler.tableau.nodes.t, sampler.grid.t, rtol=0, atol=CELL / 2 / 4)  # dt/dlam is at most 1/4
    assert torch.isfinite(sample(mixture(schedule), sampler, noise(2, 2))).all()


# -- the authors' settings ------------------------------------------------------------------------------------------------------------

CALIBRATED = {"cifar10-edm": VarianceExploding()}  # the others are VP


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.every(2)
def test_every_published_setting_builds(name):
    schedule = CALIBRATED.get(name, VPLinear())
    for row in PUBLISHED[name]:
        assert published(name, row.most) is row
        ends = schedule.lam(torch.tensor([schedule.t_max, row.t_min], dtype=torch.float64))
        lam = torch.linspace(float(ends[0]), float(ends[1]), 1201, dtype=torch.float64)
        owned = ModelStatistics(lam, *torch.zeros(3, 1201, 1), (1,), schedule)
        solver = make_solver("dpm-solver-v3", statistics=owned, **row.options)
        assert Sampler.build(solver, make_grid(row.grid, schedule, row.most, t_min=row.t_min), schedule).nfe == row.most


@pytest.mark.parametrize(
    ("name", "nfe", "t_min", "options"),
    [
        ("cifar10-scoresde", 5, 1e-3, {"steps": 3, "predictor": "pseudo", "corrector": "same", "lower_order_below": NEVER}),
        ("cifar10-scoresde", 8, 1e-3, {"steps": 3, "corrector": "same"}),
        ("cifar10-scoresde", 10, 1e-3, {"steps": 3, "corrector": "none"}),
        ("cifar10-scoresde", 12, 1e-4, {"steps": 3, "corrector": "same"}),
        ("cifar10-edm", 5, 0.002, {"steps": 3, "predictor": "pseudo", "corrector": "same"}),
        ("cifar10-edm", 6, 0.002, {"steps": 3, "corrector": "same"}),
        ("cifar10-edm", 8, 0.002, {"steps": 3, "corrector": "none"}),
        ("lsun-bedroom-latent", 8, 1e-3, {"steps": 3, "corrector": "pseudo"}),
        ("imagenet-256-guided", 8, 1e-3, {"steps": 2, "corrector": "pseudo"}),
        ("stable-diffusion-1.5", 8, 1e-3, {"steps": 2, "corrector": "pseudo"}),
        ("stable-diffusion-7.5", 8, 1e-3, {"steps": 2, "corrector": "none"}),
    ],
)
def test_published_settings_are_the_authors(name, nfe, t_min, options):
    row = published(name, nfe)
    assert row.t_min == t_min
    assert row.grid == ("logsnr" if name.startswith("cifar10") else "uniform")
    owned = statistics()
    assert DPMSolverV3(owned, **row.options) == DPMSolverV3(owned, **{"predictor": "true", "integrals": "trapezoid", **options})


def test_what_was_not_published_is_refused():
    with pytest.raises(SolverError, match="cifar10-edm was published with up to 25 evaluations, not 26"):
        published("cifar10-edm", 26)
    with pytest.raises(SolverError, match="unknown published setting 'cifar10': did you mean cifar10-"):
        published("cifar10", 5)


def test_a_value_that_json_would_read_is_a_word_where_words_are_wanted() -> None:
    solver = make_solver("dpm-solver-v3:corrector=true:predictor=true", statistics=statistics())
    assert (solver.corrector, solver.predictor) == ("true", "true")
    with pytest.raises(SolverError, match="corrector none, same, pseudo, true; got"):
        make_solver("dpm-solver-v3:corrector=false", statistics=statistics())
    assert make_solver("unipc-2:corrector=false").corrector is False
