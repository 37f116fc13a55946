"""Fits that begin with another solver, sweeps over all steps, what they make, and what is refused."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from tests.learn.search.test_coefficients import (
    BATCHES,
    EDM,
    F64,
    LAWS,
    POOLS,
    ROUNDING,
    SHAPE,
    Given,
    mixture,
    moved,
    noise,
    solved,
    start,
    taught,
)
from torch import Tensor

from fewstep import (
    FewstepError,
    FitForm,
    ModelError,
    Nodes,
    NoiseSchedule,
    RectifiedFlow,
    Sampler,
    SolverError,
    Tableau,
    TimeGrid,
    make_grid,
    sample,
)
from fewstep.core import tableau as tableau_module
from fewstep.learn.search.coefficients import sweep, widened
from fewstep.learn.search.endpoint import EndpointError, per_sample_rmse
from fewstep.learn.search.sequence import fit_in_sequence
from fewstep.sampling import sampler as sampler_module
from fewstep.solvers import SOLVERS

USABLE = {
    "ddim": 1,
    "euler": 1,
    "dpm-solver-pp-2m": 2,
    "dpm-solver-pp-2m:form=taylor": 2,
    "unipc-2:corrector=false": 2,
    "dpm-solver-pp-3m": 3,
    "dpm-solver-pp-3m:third_order=corrected": 3,
    "unipc-3:corrector=false": 3,
    "exp-ab-2": 2,
    "exp-ab-3": 3,
    "exp-ab-4": 4,
}  # with the outputs that they read
SINGLESTEP = ("heun", "dpm-solver-2s", "dpm-solver-3s", "dpm-solver-fast", "heunpp2", "res-2s", "res-3s", "etdrk-4", "rho-rk-3", "rho-rk-4")
IN_NOISE = (
    *("dpm-solver-2m", "dpm-solver-3m", "sde-dpm-solver-2m", "deis-3", "ipndm", "ipndm-v", "lms", "rho-ab-3"),
    *("abm-3", "pndm", "gradient-estimation"),
)
NOISY = (
    *(
        "sde-dpm-solver-pp-2m",
        "sde-dpm-solver-pp-3m",
        "dpm-solver-pp-sde",
        "ddim:eta=1",
        "ddpm",
        "lcm",
        "euler-ancestral",
        "dpm2-ancestral",
    ),
    *("euler-churn", "dpm2-churn", "restart", "sa-solver-pece", "res-multistep-ancestral"),
    *("dpm-solver-pp-2s-ancestral", "heun-churn", "er-sde-1", "er-sde-2", "er-sde-3", "seeds-2", "seeds-3", "sa-solver"),
)
OTHERS = (*SINGLESTEP, *IN_NOISE, *NOISY, "unipc-2", "unipc-3")
REFUSED = "steps from where it evaluates, by at most {} outputs and without noise"


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.every(4)
def test_room_for_coefficients_changes_no_sample(law: str) -> None:
    assert {name.partition(":")[0] for name in (*USABLE, *OTHERS)} == set(SOLVERS) - {"dpm-solver-v3"}
    schedule = LAWS[law]
    denoiser, grid, x = mixture(schedule), make_grid("angle", schedule, 6), noise(schedule, 2)
    for name, needs in USABLE.items():
        parent = solved(schedule, grid, name)
        wanted = sample(denoiser, parent, x)
        for history, pool in [(1, "scalar"), (2, "element"), (3, "channel"), (5, "scalar"), (9, "channel"), (None, "element")]:
            form = FitForm(history, pool)
            if history is None or history >= needs:
                wide = widened(parent, form, SHAPE)
                assert wide.memory == min(history or 6, 6) and wide.update.shape[3:] == wide.bias.shape[2:] == form.shape(SHAPE)
                torch.testing.assert_close(sample(denoiser, wide, x), wanted, rtol=0, atol=ROUNDING)
            elif law != "flow":  # which starts and ends with steps of first order
                with pytest.raises(SolverError, match=REFUSED.format(history)):
                    widened(parent, form, SHAPE)


def test_a_parent_may_step_from_its_anchor_if_that_is_the_state() -> None:
    plain, x = solved(EDM, make_grid("angle", EDM, 4), "dpm-solver-pp-2m"), noise(EDM, 2)
    update = plain.update.clone()
    update[:, :, 0], update[:, :, 1] = 0.3 * plain.update[:, :, 1], 0.7 * plain.update[:, :, 1]
    anchored = Tableau(plain.nodes, plain.record, update, plain.bias, plain.noise)
    for parent in (plain, anchored):
        wide = widened(parent, FitForm(), SHAPE)
        assert not wide.update[:, 1, 0].any()
        torch.testing.assert_close(sample(mixture(EDM), wide, x), sample(mixture(EDM), anchored, x), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.every(2)
def test_other_parents_are_refused(name: str) -> None:
    for schedule, history in product((EDM, RectifiedFlow()), (2, None)):
        parent = solved(schedule, make_grid("angle", schedule, 6), name)
        with pytest.raises(SolverError, match=REFUSED.format(history or len(parent.update))):
            widened(parent, FitForm(history), SHAPE)


def test_the_refusal_names_parents_that_are_not_refused() -> None:
    grid = make_grid("angle", EDM, 6)
    with pytest.raises(SolverError) as error:
        widened(solved(EDM, grid, "unipc-2"), FitForm(), SHAPE)
    named = [name for name in (*SOLVERS, *USABLE) if name in str(error.value).replace(",", " ").replace(";", " ").split()]
    assert {"ddim", "dpm-solver-pp-2m"} <= set(named)
    for name in named:
        widened(solved(EDM, grid, name), FitForm(), SHAPE)


def test_a_parent_with_numbers_of_its_own_is_refused() -> None:
    """A bias, or a coefficient for each element: neither has a place in what follows."""
    plain = solved(EDM, make_grid("angle", EDM, 4), "ddim")
    biased = Tableau(plain.nodes, plain.record, plain.update, torch.full_like(plain.bias, 0.1), plain.noise)
    for parent in (biased, widened(plain, FitForm(pool="channel"), SHAPE)):
        with pytest.raises(SolverError, match=REFUSED.format(4)):
            widened(parent, FitForm(pool="scalar"), SHAPE)


# -- sweeps ----------------------------------------------------------------------------------------------------------


def problem(law: NoiseSchedule, form: FitForm, **options: int) -> tuple[Tableau, EndpointError]:
    denoiser, grid, lesson = taught(law, **options)
    fitted = fit_in_sequence(denoiser, start(law, grid, form), [lesson], form).tableau
    return fitted, EndpointError(denoiser, lesson.state(0), lesson.state(-1))


def split(ends: EndpointError, count: int) -> list[EndpointError]:
    parts = zip(ends.x.chunk(count), ends.exact.chunk(count), strict=True)
    return [EndpointError(ends.denoiser, x, exact) for x, exact in parts]


@pytest.mark.slow
@pytest.mark.parametrize(("law", "pool"), [("edm", "element"), ("vp", "scalar"), ("flow", "element"), ("table", "scalar")])
def test_a_sweep_brings_the_ends_nearer(law: str, pool: str) -> None:
    fitted, ends = problem(LAWS[law], FitForm(None, pool, bias=pool == "element"))
    gains = {}
    for schedule in (None, LAWS[law]):
        told = []
        found = sweep(split(ends, 2), fitted, schedule, iterations=3, observe=lambda i, value, told=told: told.append((i, value)))
        before, after = (per_sample_rmse(ends.run(tableau)[0]) for tableau in (fitted, found))
        c = before.median()
        first, last = (float((error**2 + c**2).sqrt().mean()) for error in (before, after))
        values = [first, *(value for _, value in told)]
        assert [i for i, _ in told] == [*range(1, len(told) + 1)] and values == sorted(values, reverse=True)
        assert values[-1] == pytest.approx(last, rel=1e-9) and last < 0.99 * first, (first, last)
        t, old = found.nodes.t, fitted.nodes.t
        assert torch.equal(t[[0, -1]], old[[0, -1]]) and torch.equal(found.bias, fitted.bias)
        for ours, theirs in zip(found.nodes, Nodes.at(LAWS[law], t), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(t, old) is (schedule is None) and bool((torch.diff(t) < 0).all())
        if law == "table":
            assert torch.equal(t, t.round())
        moves = found.update - fitted.update  # alike for all elements
        torch.testing.assert_close(moves.reshape(4, 2, 6, -1).std(-1, correction=0), torch.zeros(4, 2, 6, dtype=F64), rtol=0, atol=ROUNDING)
        gains[schedule is None] = last
    assert gains[False] < first


@pytest.mark.parametrize("law", ["flow", "table"])
@pytest.mark.every(2)
def test_batches_of_a_sweep_do_not_matter(law: str) -> None:
    fitted, ends = problem(LAWS[law], FitForm(2, "scalar"))
    one, many = (sweep(split(ends, count), fitted, LAWS[law], iterations=2) for count in (1, 4))
    assert moved(many, one) < BATCHES and moved(one, fitted) > 1e-4
    torch.testing.assert_close(one.nodes.t, many.nodes.t, rtol=0, atol=BATCHES)


@pytest.mark.parametrize("law", LAWS)
def test_a_sweep_of_one_step(law: str) -> None:
    """There is no level to move, whether the ends are finite or not."""
    fitted, ends = problem(LAWS[law], FitForm(pool="scalar"), steps=1)
    begun = widened(solved(LAWS[law], TimeGrid(fitted.nodes.t), "ddim"), FitForm(pool="scalar"), SHAPE)
    error = []
    for schedule in (None, LAWS[law]):
        found = sweep([ends], begun, schedule, iterations=2)
        assert torch.equal(found.nodes.t, begun.nodes.t)
        error.append(float(ends.run(found)[0].norm()))
    assert error[0] == error[1] < 0.99 * float(ends.run(begun)[0].norm())


@pytest.mark.parametrize("law", LAWS)
def test_what_has_no_error_is_given_back(law: str) -> None:
    denoiser, grid, x = mixture(LAWS[law]), make_grid("angle", LAWS[law], 3), noise(LAWS[law], 1)
    begun = start(LAWS[law], grid, FitForm(pool="scalar"))
    for schedule in (None, LAWS[law]):
        found = sweep([EndpointError(denoiser, x, sample(denoiser, begun, x))], begun, schedule, iterations=3)
        assert moved(found, begun) == 0 and torch.equal(found.nodes.t, begun.nodes.t)
    assert sweep([EndpointError(denoiser, x, x)], begun, None, iterations=0) is begun


# -- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_the_result_runs_without_a_solver(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, ends = problem(EDM, FitForm(3, pool, shrink=1e-3))
    swept, card = sweep([ends], fitted, EDM, iterations=1), {"of": "a mixture"}
    Sampler(swept, TimeGrid(swept.nodes.t), EDM, "fitted", {"pool": pool}, card).save(tmp_path)
    wanted = sample(ends.denoiser, swept, ends.x)
    monkeypatch.setattr("fewstep.solvers.SOLVERS", {})
    for module in (tableau_module, sampler_module):
        monkeypatch.setattr(module, "tabulate", lambda *_: pytest.fail("nothing is built from formulas"))
    loaded = Sampler.load(tmp_path)
    assert torch.equal(sample(ends.denoiser, loaded, ends.x), wanted) and loaded.nfe == 4
    assert loaded.tableau.update.shape == (4, 2, 5, *{"scalar": (), "channel": (2, 1, 1), "element": SHAPE}[pool])
    differ = loaded.tableau.update[:, 1, 1:3].reshape(8, -1).std(1, correction=0)
    assert bool((differ > 1e-6).all()) is (pool != "scalar")
    assert torch.equal(loaded.tableau.update[:, 0], torch.zeros_like(loaded.tableau.update[:, 0]))
    near = sample(ends.denoiser, loaded, ends.x.float())
    assert near.dtype is torch.float32 and float((near - wanted).abs().median()) < 1e-5  # a few lie between two means


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"pool": "pixel"}, "coefficients are pooled by element, channel or scalar, got 'pixel'"),
        ({"history": 0}, "history is at least 1, got 0"),
        ({"ridge": -1e-9}, "ridge lies between 0 and 1e6, got -1e-09"),
        ({"shrink": -1.0}, "shrink lies between 0 and 1e6, got -1"),
        ({"ridge": float("nan")}, "ridge is a number, got nan"),
        ({"shrink": float("inf")}, "shrink lies .* got inf"),
    ],
)
def test_forms_that_cannot_be_are_named(options: dict, said: str) -> None:
    with pytest.raises(FewstepError, match=said):
        FitForm(**options)


def test_forms_know_their_size() -> None:
    assert [FitForm(history).memory(5) for history in (None, 1, 5, 9)] == [5, 1, 5, 5]
    assert [FitForm(pool=pool).shape((3, 8, 8)) for pool in POOLS] == [(), (3, 1, 1), (3, 8, 8)]
    assert [FitForm(pool=pool).shape((7,)) for pool in POOLS] == [(), (7,), (7,)]


@pytest.mark.parametrize("pool, bias", [*product(POOLS, (True, False))])
def test_what_is_not_finite_is_named(pool: str, bias: bool) -> None:
    (denoiser, grid, lesson), form = taught(EDM), FitForm(None, pool, bias)
    begun = start(EDM, grid, form)
    with pytest.raises(FewstepError, match="a fit needs at least one batch of trajectories"):
        fit_in_sequence(denoiser, begun, [], form)
    said = "the states for evaluation {} of a fit are not finite: check the network and the trajectories"
    for bad, k in ((torch.nan, 2), (torch.inf, 0)):
        states = lesson.states.clone()
        states[k + 1, 3, 0, 1, 1] = bad
        with pytest.raises(FewstepError, match=said.format(k)):
            fit_in_sequence(denoiser, begun, [Given(states)], form)

        class Bad:
            schedule = EDM

            def __call__(self, x: Tensor, t: Tensor, cond: None = None, bad: float = bad, k: int = k) -> Tensor:
                return torch.where(t <= grid.t[k], bad, denoiser(x, t))

        with pytest.raises(FewstepError, match=said.format(k)):
            fit_in_sequence(Bad(), begun, [lesson], form)
        with pytest.raises(ModelError, match=f"not finite .* at evaluation {k + 1} of 4"):
            sweep([EndpointError(Bad(), lesson.state(0), lesson.state(-1))], begun, None, iterations=1)


# -- processes -------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
from fewstep import FitForm
from fewstep.runtime.process import process
from fewstep.learn.search.endpoint import EndpointError
from fewstep.learn.search.coefficients import sweep
from fewstep.learn.search.sequence import fit_in_sequence
from tests.learn.search.test_coefficients import EDM, start, taught

rank, world = process()
denoiser, grid, lesson = taught(EDM)
form = FitForm(pool="channel")
found = fit_in_sequence(denoiser, start(EDM, grid, form), lesson.split(4)[rank::world], form).tableau
parts = list(zip(lesson.state(0).chunk(4), lesson.state(-1).chunk(4)))
swept = sweep([EndpointError(denoiser, *part) for part in parts[rank::world]], found, EDM, iterations=2)
other = sweep([EndpointError(denoiser, *parts[rank])], found, EDM, iterations=2)
torch.save([found.update, found.bias, swept.update, swept.nodes.t, other.update, other.nodes.t], f"{sys.argv[1]}-{world}-{rank}")
"""


@pytest.mark.slow
def test_two_processes_fit_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    root = Path(__file__).parents[3]
    for count in ("1", "2"):
        command = [*torchrun, count, str(tmp_path / "script.py"), str(tmp_path / "made")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (torch.load(tmp_path / f"made-{name}") for name in ("1-0", "2-0", "2-1"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))
    for one, ours in zip(alone[:4], first[:4], strict=True):
        torch.testing.assert_close(ours, one, rtol=0, atol=BATCHES)
    assert not torch.equal(alone[4], first[4])  # of half of the noises
