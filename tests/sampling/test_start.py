"""The start of image to image: one time for every solver, spacing and number of evaluations, and the image noised to it."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from tests.problems import WHOLE_REGISTRY, noise, statistics
from tests.sampling.test_tail import PrivateHeun

from fewstep import (
    DiscreteVP,
    DPMSolverV3,
    GaussianDenoiser,
    GridError,
    ModelError,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    VPCosine,
    VPLinear,
    load_model,
    make_grid,
    make_solver,
    sample,
    seeded_noise,
    start_noise,
)
from fewstep.core.spacings import GRIDS
from fewstep.core.tableau import Nodes
from fewstep.sampling.start import begin, level_of, noised, spacing_from

LAWS = {
    "vp": VPLinear(),
    "cosine": VPCosine(),
    "edm": VarianceExploding(),
    "flow": RectifiedFlow(),
    "shifted": RectifiedFlow(3.0),
    "table": DiscreteVP.linear(),
    "to-clean": DiscreteVP.scaled_linear().to_clean(),
    "zero-snr": DiscreteVP.scaled_linear().zero_terminal_snr(),
}
SPACINGS = [*GRIDS, "karras:rho=5", "angle:c=0.5:power=2", "leading:offset=2"]
DISCRETE = ("leading", "linspace", "trailing")
LEVEL = level_of(0.3)


def level_at(law, t):
    return float(torch.exp(-law.lam(torch.tensor(float(t), dtype=torch.float64))))


def has(law, spacing):
    """Whether a law has this spacing at all."""
    if law.times is not None:
        return True
    return spacing.split(":")[0] not in DISCRETE and not (spacing == "logsnr" and law.ends_clean)


# -- the time -------------------------------------------------------------------------------------------------------------------------


def test_a_strength_is_a_share_of_noise():
    assert [level_of(s) for s in (0.5, 0.75, 1, torch.tensor(0.5))] == [1.0, 3.0, math.inf, 1.0]
    for strength in (0.1, 0.3, 0.9):
        assert begin(RectifiedFlow(), level_of(strength)) == pytest.approx(strength, rel=1e-14)  # of a flow it is its sigma
        t = torch.tensor(begin(RectifiedFlow(3.0), level_of(strength)), dtype=torch.float64)
        assert float(RectifiedFlow(3.0).sigma(t)) == pytest.approx(strength, rel=1e-14)
    for strength in (0, -0.1, 1.1, math.nan, math.inf, "much", None, True, [0.5, 0.3]):
        with pytest.raises(GridError, match="strength is "):
            level_of(strength)


@pytest.mark.parametrize("name", LAWS)
def test_a_level_has_one_time(name):
    law = LAWS[name]
    t = begin(law, LEVEL)
    if law.times is None:
        assert level_at(law, t) == pytest.approx(LEVEL, rel=1e-12)
    else:
        angles = torch.atan(torch.exp(-law.lam(law.times)))
        assert t == float(law.times[(angles - math.atan(LEVEL)).abs().argmin()])
    assert begin(law, math.inf) == law.t_max and isinstance(t, float)
    high = level_at(law, law.t_max)
    if high < math.inf:
        assert begin(law, high) == begin(law, high * (1 + 1e-7)) == law.t_max  # a level that was float32
        with pytest.raises(GridError, match=r"no step begins at noise level .* \(strength .*\): this noise law has levels .* to "):
            begin(law, 2 * high)
    low = level_at(law, law.t_min)
    for level in [low] if law.times is None else [level_at(law, 0 if law.t_min < 0 else 1) * 0.99]:
        with pytest.raises(GridError, match="and 1 for its whole range|above 0, got 0"):
            begin(law, level)
    for level in (0, -1.0, "0.3", math.nan):
        with pytest.raises(GridError, match="level"):
            begin(law, level)


def test_the_last_time_of_a_table():
    ends, clean = DiscreteVP.linear(), DiscreteVP.linear().to_clean()
    assert begin(ends, level_at(ends, 1)) == 1 and begin(clean, level_at(clean, 0)) == 0
    assert spacing_from("karras", clean, 1, 0.0).t.tolist() == [0.0, -1.0]
    with pytest.raises(GridError, match="2 steps do not fit below time 0, where the network knows 1 times: use fewer steps, or a larger"):
        spacing_from("karras", clean, 2, 0.0)
    with pytest.raises(GridError, match="do not fit below time 3, where the network knows 3"):
        spacing_from("uniform", ends, 4, 3.0)
    with pytest.raises(GridError, match="unknown grid"):
        spacing_from("karas", clean, 1, 0.0)


COUNTS = range(1, 7)


def makes(solver, law, nfe):
    """Whether a solver can make exactly so many evaluations."""
    try:
        WHOLE_REGISTRY[solver].steps_on(LAWS[law], nfe)
    except SolverError:
        return False
    return True


def begins_at_the_level(name, spacing, solver, nfe):
    law = LAWS[name]
    sampler = Sampler.build(WHOLE_REGISTRY[solver], spacing, law, nfe=nfe, level=LEVEL)
    first, nodes = sampler.tableau.nodes, Nodes.at(law, torch.tensor([begin(law, LEVEL)], dtype=torch.float64))
    assert all(float(one[0]) == float(two) for one, two in zip(first, nodes, strict=True))
    assert sampler.nfe == first.evaluations == nfe and first.t.argmin() > sampler.begins[-1]
    assert bool((torch.diff(first.t[list(sampler.begins)]) < 0).all()) or sampler.solver.endswith("Churn")  # which raises levels
    assert law.times is None or bool(torch.isin(sampler.grid.t, law.times).all())


TABLES = [name for name, law in LAWS.items() if law.times is not None]
SHARE = -(-len(SPACINGS) // len(TABLES))  # of the spacings, for each table, so that every solver meets all of them
SHARES = [*((name, 1) for name in LAWS), *(pytest.param(name, SHARE, marks=pytest.mark.slow) for name in TABLES)]


@pytest.mark.parametrize(("name", "share"), SHARES)
def test_no_solver_spacing_or_number_of_evaluations_moves_the_start(name, share):
    """Every law meets every solver and spacing here, each solver all its numbers of evaluations, and by the slow tests every spacing."""
    spacings = [spacing for spacing in SPACINGS if has(LAWS[name], spacing)]
    first = list(LAWS).index(name) if share == 1 else share * TABLES.index(name)
    for i, solver in enumerate(WHOLE_REGISTRY):
        counts = [nfe for nfe in COUNTS if makes(solver, name, nfe)]
        for j in range(share):
            begins_at_the_level(name, spacings[(first + i + j) % len(spacings)], solver, counts[(first + i + j) % len(counts)])


@pytest.mark.release
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", LAWS)
def test_no_combination_moves_the_start(name, spacing):
    if has(LAWS[name], spacing):
        for solver, nfe in product(WHOLE_REGISTRY, COUNTS):
            if makes(solver, name, nfe):
                begins_at_the_level(name, spacing, solver, nfe)


@pytest.mark.parametrize("name", LAWS)
def test_a_spacing_that_a_law_does_not_have_is_refused(name):
    for spacing in SPACINGS:
        if not has(LAWS[name], spacing):
            with pytest.raises(GridError, match="spacing"):
                Sampler.build("ddim", spacing, LAWS[name], nfe=4, level=LEVEL)


@pytest.mark.parametrize("solver", WHOLE_REGISTRY)
@pytest.mark.every(4)
def test_exactly_so_many_evaluations_are_made(solver):
    law, calls = VPLinear(), []
    exact = GaussianDenoiser(law, torch.zeros(2), torch.tensor(0.5))

    class Counting:
        schedule = law

        def __call__(self, x, t, cond=None):
            calls.append(float(t))
            return exact(x, t)

    for nfe in (sum(WHOLE_REGISTRY[solver].evaluations(steps)) for steps in (3, 6)):
        calls.clear()
        sample(Counting(), WHOLE_REGISTRY[solver], nfe=nfe, seeds=range(3), x0=torch.zeros(3, 2), strength=0.3, grid="angle")
        assert len(calls) == nfe and calls[0] == begin(law, LEVEL)


def test_strength_one_changes_nothing():
    for name, law in LAWS.items():
        for spacing in GRIDS:
            if has(law, spacing) and not (spacing in ("karras", "logsnr") and law.starts_at_noise):
                one, two = (Sampler.build("unipc-2", spacing, law, nfe=5, level=level) for level in (None, math.inf))
                assert one.fingerprint == two.fingerprint, name
    fitted = load_model("digits-edm").fitted(6)
    assert fitted.from_level(math.inf) is fitted and fitted.from_level(80.0) is fitted  # its own start


def test_options_that_say_the_start_themselves_are_refused():
    with pytest.raises(GridError, match="says t_max=50"):
        Sampler.build("ddim", "angle:t_max=50", VarianceExploding(), nfe=4, level=1.0)
    ems = DPMSolverV3(statistics(), integrals="trapezoid")
    with pytest.raises(GridError, match="moves the time .*: use integrals=exact"):
        Sampler.build(ems, "angle", VPLinear(), nfe=4, level=LEVEL)


# -- grids of one's own ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAWS)
def test_a_grid_is_re_spread_with_its_density(name):
    law = LAWS[name]
    t = begin(law, LEVEL)
    for steps in (1, 2, 6):
        grid = make_grid("angle", law, steps)
        below = grid.below(law, t)
        assert below.steps == steps and float(below.t[0]) == t and float(below.t[-1]) == float(grid.t[-1])
        if law.times is None:  # a density that is uniform stays so
            torch.testing.assert_close(below.t, make_grid("angle", law, steps, t_max=t).t, rtol=1e-6, atol=1e-9)
        else:
            assert bool(torch.isin(below.t, law.times).all())
    assert grid.below(law, float(grid.t[0])) is grid
    for outside in (float(grid.t[-1]), law.t_max + 1, float(grid.t[-1]) - 1):
        with pytest.raises(GridError, match="this grid runs from noise level"):
            grid.below(law, outside)


def test_the_density_is_that_of_the_steps_in_the_angle():
    law = VarianceExploding()
    grid = make_grid("karras", law, 8)
    below = grid.below(law, 0.5)
    theta, angle = torch.atan(grid.t), torch.atan(below.t)
    place = torch.from_numpy(np.interp(-angle.numpy(), -theta.numpy(), range(9)))  # number of the step of each time
    torch.testing.assert_close(torch.diff(place), torch.full((8,), float(8 - place[0]) / 8, dtype=torch.float64))
    fractions = TimeGrid([700.5, 300.25, 20.5, -1.0]).below(DiscreteVP.linear(), 100.0)
    assert not torch.equal(fractions.t[1:-1], fractions.t[1:-1].round())  # times that were none of the table's stay between them
    with pytest.raises(GridError, match="fall more than once on the model's time"):
        make_grid("angle", DiscreteVP.linear(), 8).below(DiscreteVP.linear(), 4.0)


@pytest.mark.parametrize("solver", ["unipc-3", "heun", "dpm-solver-3s", "sde-dpm-solver-2m", "dpm-solver-v3"])
@pytest.mark.parametrize("law", [VPLinear(), DiscreteVP.scaled_linear().to_clean()], ids=["vp", "table"])
def test_a_sampler_goes_on_from_a_level(solver, law, tmp_path):
    nfe = 7 if law.ends_clean and solver in ("heun", "dpm-solver-3s") else 6
    whole = Sampler.build(WHOLE_REGISTRY[solver], "angle", law, nfe=nfe, card={"quality": 1.5})
    made = whole.from_level(LEVEL)
    expected = Sampler.build(WHOLE_REGISTRY[solver], whole.grid.below(law, begin(law, LEVEL)), law)
    assert made.fingerprint == expected.fingerprint and made.nfe == nfe and made.card == {"quality": 1.5, "from_level": LEVEL}
    given = {"statistics": statistics()} if solver == "dpm-solver-v3" else {}
    assert Sampler.load(whole.save(tmp_path)).from_level(LEVEL, **given).fingerprint == expected.fingerprint
    if given:
        with pytest.raises(SolverError, match="needs the statistics of its model"):
            Sampler.load(tmp_path).from_level(LEVEL)


def test_a_fitted_sampler_goes_on_with_its_parent():
    model = load_model("digits-edm")
    fitted = model.fitted(6)
    made, parent = fitted.with_card(name="fitted").from_level(LEVEL), make_solver(fitted.options["parent"])
    expected = Sampler.build(parent, fitted.grid.below(model.schedule, LEVEL), model.schedule)
    assert made.fingerprint == expected.fingerprint and made.nfe == 6
    assert made.card["model"] == model.fingerprint and made.name == fitted.options["parent"]


def test_samplers_that_cannot(tmp_path):
    sampler = Sampler.build("unipc-2", "angle", VPLinear(), nfe=6)
    with pytest.raises(SolverError, match="was stopped has no formulas .* take from_level before stopped"):
        sampler.stopped(4).from_level(1.0)
    with pytest.raises(GridError, match="this grid runs from noise level"):
        sampler.after(1.0).from_level(2.0)
    with pytest.raises(GridError, match="no step begins at noise level 1e-05"):
        sampler.from_level(1e-5)
    unknown = Sampler.load(Sampler.build(PrivateHeun(), "angle", VPLinear(), nfe=6).save(tmp_path))
    with pytest.raises(SolverError, match="none of unipc-2 can be put on"):
        unknown.from_level(1.0)


# -- the state ------------------------------------------------------------------------------------------------------------------------


def test_a_noised_image():
    law = VPLinear()
    nodes = Nodes.at(law, torch.tensor([begin(law, LEVEL), 0.001], dtype=torch.float64))
    x0 = noise(3, 2, 4)
    x = noised(x0, nodes, [7, 8, 9])
    torch.testing.assert_close(x, nodes.alpha[0] * x0 + nodes.sigma[0] * seeded_noise([7, 8, 9], (2, 4)))
    assert noised(x0.half(), nodes, torch.tensor([7, 8, 9])).dtype == torch.float32
    pure = Nodes.at(RectifiedFlow(), RectifiedFlow().ends)
    assert torch.equal(noised(x0.float(), pure, [7, 8, 9]), start_noise(pure, [7, 8, 9], (2, 4)))
    with pytest.raises(ModelError, match="2 seeds for 3 images"):
        noised(x0, nodes, [7, 8])


@pytest.mark.slow
@pytest.mark.parametrize("variance", [0.04, 0.25, 1.0])
def test_the_ode_contracts_what_differs_between_starts_as_it_does_of_gaussian_data(variance):
    """For data of variance c the ODE from level s multiplies a difference by (c / (c + s^2))^(1/2)."""
    law, level = VarianceExploding(1e-4, 80.0), level_of(0.5)
    denoiser = GaussianDenoiser(law, torch.zeros(3), torch.tensor(variance**0.5))
    one, two = noise(1, 3), 2 * noise(2, 3)[1:]
    ends = [sample(denoiser, "unipc-3", nfe=60, seeds=[5], x0=x0, strength=0.5, grid="karras") for x0 in (one, two)]
    torch.testing.assert_close(ends[1] - ends[0], (two - one) * math.sqrt(variance / (variance + level**2)), rtol=2e-4, atol=1e-5)


def test_sampling_from_the_model_s_range_is_sampling_from_noise():
    model = load_model("digits-edm")
    images = sample(model, "unipc-2", nfe=6, seeds=range(4))
    again = sample(model, "unipc-2", nfe=6, seeds=range(4), x0=images[0], strength=1)
    assert float((again - images).abs().max()) < 0.2 * float((images - images[0]).abs().max())  # 1/80 of an image is left
    flow = GaussianDenoiser(RectifiedFlow(), torch.zeros(2), torch.tensor(0.5))
    start = start_noise(Nodes.at(flow.schedule, flow.schedule.ends), [1, 2], (2,))
    for solver in ("unipc-2", Sampler.build("heun", "uniform", flow.schedule, nfe=7)):
        ask = {"nfe": 7, "seeds": [1, 2]}
        assert torch.equal(sample(flow, solver, start, **ask), sample(flow, solver, x0=torch.ones(2, 2), strength=1.0, **ask))
