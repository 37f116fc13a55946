"""Samplers from the middle of their grid: the same solver on the rest of it, whether its formulas are in memory or only named."""

from dataclasses import dataclass, replace

import pytest
import torch
from tests.problems import ALL, WHOLE_REGISTRY, noise, statistics
from tests.problems import mixture as problem

import fewstep
from fewstep import Sampler, SolverError, TimeGrid, VPLinear, make_solver, sample
from fewstep.solvers import DPMSolverPP, Heun

SCHEDULE = VPLinear()
GRID = TimeGrid.angle(SCHEDULE, 6)
NAMED = {  # solvers with options, which a saved sampler has to name in full
    **WHOLE_REGISTRY,
    "unipc-3-bh1": make_solver("unipc-3:weights=bh1"),
    "unip-2": make_solver("unipc-2:corrector=false"),
    "ddim-eta": make_solver("ddim:eta=0.5"),
    "dpm-taylor": make_solver("dpm-solver-pp-2m:form=taylor"),
    "unipc-uncorrected": make_solver("unipc-2:uncorrected=[0, 1]"),
}


def rest(solver, begin, grid=GRID):
    return Sampler.build(solver, TimeGrid(grid.t[begin:]), SCHEDULE)


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "from disk"])
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.every(3, 2)
def test_a_tail_is_the_solver_on_the_rest_of_the_grid(name, saved, tmp_path):
    sampler = Sampler.build(NAMED[name], GRID, SCHEDULE, card={"quality": 1.5})
    whole = Sampler.load(sampler.save(tmp_path)) if saved else sampler
    given = {"statistics": statistics()} if saved and name == "dpm-solver-v3" else {}
    assert whole.stages == (2 if name == "restart" else NAMED[name].stages) and whole.tail(0) is whole  # where it steps down only
    for begin in (1, 5):
        tail, expected = whole.tail(whole.begins[begin], **given), rest(NAMED[name], begin)
        assert tail.tableau.fingerprint == expected.tableau.fingerprint and torch.equal(tail.grid.t, GRID.t[begin:])
        assert tail.card == {"quality": 1.5, "tail_from": whole.begins[begin]}
        assert name == "pndm" or tail.nfe == whole.nfe - whole.begins[begin]  # which warms up again
    again = whole.tail(whole.stages, **given)  # of a tail
    again = again.tail(again.begins[2], **given)
    assert again.tableau.fingerprint == rest(NAMED[name], 3).tableau.fingerprint


@pytest.mark.parametrize(("name", "slack"), [("dpm-solver-3s", 1e-12), ("unipc-3", 3e-3)])
def test_a_tail_ends_where_the_whole_ends(name, slack):
    """From a state of the whole run: exactly with a solver that remembers nothing, else but for its first steps."""
    sampler, denoiser, steps = Sampler.build(name, "logsnr", SCHEDULE, nfe=30), problem(SCHEDULE), []
    end = sample(denoiser, sampler, noise(8, 2), observe=steps.append)
    continued = sample(denoiser, sampler.tail(18), steps[18].x)
    assert float((continued - end).abs().max()) < slack < 1e-2 < float((steps[18].x - end).abs().max())


@pytest.mark.parametrize("name", ["unipc-2", "heun", "dpm-solver-3s"])
def test_after_a_noise_level(name):
    sampler = Sampler.build(WHOLE_REGISTRY[name], GRID, SCHEDULE)
    levels = torch.exp(-SCHEDULE.lam(GRID.t))
    for k in (1, 3, 5):
        for level in (float(levels[k]), float(levels[k]) * 1.0001, float(levels[k - 1]) * 0.9999):
            assert torch.equal(sampler.after(level).grid.t, GRID.t[k:])
    assert sampler.after(1e9) is sampler
    with pytest.raises(SolverError, match=f"no step of this sampler starts at noise level 0.0001 or below: .* {float(levels[5]):.3g}"):
        sampler.after(1e-4)


@pytest.mark.parametrize(
    ("solver", "grid", "stages"),
    [
        *((name, GRID, WHOLE_REGISTRY[name].stages) for name in ("ddim", "unipc-3", "heun", "dpm-solver-2s", "dpm-solver-3s")),
        *(
            (name, fewstep.make_grid("angle", fewstep.RectifiedFlow(), 3), WHOLE_REGISTRY[name].stages)
            for name in ("heun", "dpm-solver-3s")
        ),
        ("dpm-solver-3s", TimeGrid(GRID.t[:2]), 3),  # one step
    ],
)
def test_stages_are_counted_on_the_grid(solver, grid, stages):
    schedule = fewstep.RectifiedFlow() if float(grid.t[-1]) == 0 else SCHEDULE
    assert Sampler.build(solver, grid, schedule).stages == stages


def test_a_fitted_sampler_continues_with_its_parent():
    model = fewstep.load_model("digits-edm")
    fitted = model.fitted(6)
    tail, parent = fitted.tail(2), make_solver(fitted.options["parent"])
    expected = Sampler.build(parent, TimeGrid(fitted.grid.t[2:]), model.schedule)
    assert tail.tableau.fingerprint == expected.tableau.fingerprint and tail.card["model"] == model.fingerprint
    assert bool(sample(model, tail, seeds=range(2)).isfinite().all())


def test_statistics_are_asked_for_again(tmp_path):
    sampler = Sampler.load(Sampler.build(ALL["dpm-solver-v3"], GRID, SCHEDULE).save(tmp_path))
    with pytest.raises(SolverError, match="a part of a dpm-solver-v3 sampler needs the statistics of its model: pass statistics="):
        sampler.tail(2)
    with pytest.raises(SolverError, match="pass statistics="):
        sampler.after(1.0)
    assert sampler.after(1.0, statistics=statistics()).nfe < sampler.nfe


@pytest.mark.parametrize(
    ("name", "begin", "says"),
    [
        ("unipc-2", 6, "1 evaluation a step, 6 in all: begin at a multiple of 1 below that, not at evaluation 6"),
        ("unipc-2", -1, "not at evaluation -1"),
        ("heun", 3, "2 evaluations a step, 12 in all: begin at a multiple of 2 below that, not at evaluation 3"),
        ("dpm-solver-3s", 18, "not at evaluation 18"),
    ],
)
def test_a_tail_begins_with_a_step(name, begin, says):
    with pytest.raises(SolverError, match=says):
        Sampler.build(WHOLE_REGISTRY[name], GRID, SCHEDULE).tail(begin)


@dataclass(frozen=True)
class Private(DPMSolverPP):
    """A solver that a reader of its sampler does not have."""


@dataclass(frozen=True)
class PrivateHeun(Heun):
    """The same of two stages, which no hand-made solver can take the place of."""


def test_formulas_that_are_not_known_here(tmp_path):
    known, unknown = (Sampler.build(solver, GRID, SCHEDULE) for solver in (Private(), PrivateHeun()))
    assert known.tail(2).tableau.fingerprint == rest(Private(), 2).tableau.fingerprint  # in memory they are
    loaded = Sampler.load(known.save(tmp_path / "one"))
    assert loaded.tail(2).tableau.fingerprint == rest(make_solver("unipc-2"), 2).tableau.fingerprint
    named = replace(loaded, card={"name": "deis-3"})
    assert named.tail(2).tableau.fingerprint == rest(make_solver("deis-3"), 2).tableau.fingerprint
    with pytest.raises(SolverError, match="none of unipc-2 can be put on the rest of this sampler's times"):
        Sampler.load(unknown.save(tmp_path / "two")).tail(2)
