"""The loop step by step: entered in the middle, edited on its way, with noise of one's own, and with gradients."""

import math
import re
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from tests.problems import ALL, WHOLE_REGISTRY, Tanh

import fewstep
from fewstep import ModelError, RectifiedFlow, Sampler, SolverError, TimeGrid, VPLinear, sample, seeded_noise, steps
from fewstep.sampling.loop import run

SCHEDULE = VPLinear()
SEEDS, SHAPE = [3, 1, 4], (2,)
KINDS = ("dpm-solver-pp-3m", "ipndm", "unipc-3", "heun", "dpm-solver-3s", "sde-dpm-solver-pp-2m", "ddim-eta-1", "v3-3-pseudo-same")
EDITABLE = ("ddim", "dpm-solver-pp-2m", "deis-3", "ipndm", "unipc-2:corrector=false")  # named in the refusal
MASK = torch.tensor([True, False])


def tableau(name, count=5):
    solver = ALL[name] if name in ALL else fewstep.make_solver(name)
    return Sampler.build(solver, TimeGrid.logsnr(SCHEDULE, count), SCHEDULE).tableau


def start(dtype=torch.float32):
    return seeded_noise(SEEDS, SHAPE).to(dtype)


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_resuming_anywhere_gives_the_samples_to_the_bit(name):
    table = tableau(name)
    whole = list(steps(Tanh(), table, start(), seeds=SEEDS))
    assert torch.equal(whole[-1].x_next, run(Tanh(), table, start(), seeds=SEEDS))
    for step in whole[:-1]:
        rest = list(steps(Tanh(), table, torch.zeros(3, 2), seeds=SEEDS, resume=(step.i + 1, step.state)))
        assert [one.i for one in rest] == list(range(step.i + 1, len(whole)))
        assert torch.equal(rest[-1].x_next, whole[-1].x_next) and torch.equal(rest[0].x, step.x_next)
    assert not list(steps(Tanh(), table, start(), seeds=SEEDS, resume=(len(whole), whole[-1].state)))


def test_a_state_that_is_not_finite_is_named_by_its_place_on_the_whole_grid():
    table, first = tableau("ddim"), next(steps(Tanh(), tableau("ddim"), start()))
    bad = Tanh(answer=lambda x0, call: x0 * math.nan if call == 2 else x0)
    with pytest.raises(ModelError, match=f"at evaluation 3 of 5, t = {table.nodes.t[2]:g}, sigma = {table.nodes.sigma[2]:g}"):
        list(steps(bad, table, start(), resume=(1, first.state)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_a_caller_gives_that_is_not_finite_is_not_blamed_on_the_network(bad):
    ruined = lambda x: torch.full_like(x, bad)  # noqa: E731
    for says, give in {
        "the start x has entries that are not finite .* at evaluation 1 of 5": {"x": ruined(start())},
        "the noise has entries that are not finite .* at evaluation 2 of 5": {
            "noise": lambda i: ruined(start()) if i == 1 else start(),
            "tableau": tableau("ddim-eta-0.5"),
        },
        "edit answered entries that are not finite .* at evaluation 3 of 5": {"edit": lambda step: ruined(step.x) if step.i == 2 else None},
    }.items():
        with pytest.raises(ModelError, match=says) as told:
            list(steps(Tanh(), **{"tableau": tableau("ddim"), "x": start()} | give))
        assert "network" not in str(told.value)


@pytest.mark.parametrize("element", [(3, 1), (1, 3), (5, 3, 2)])
def test_coefficients_of_samples_of_another_shape_are_refused(element):
    table = tableau("ddim")
    wide = replace(table, update=table.update.reshape(*table.update.shape[:3], *(1,) * len(element)).expand(-1, -1, -1, *element))
    with pytest.raises(SolverError, match=rf"coefficients for samples of shape {re.escape(str(element))}, which \(2,\) is not"):
        list(steps(Tanh(), wide, start()))


def test_evaluations_are_made_as_they_are_asked_for():
    denoiser = Tanh()
    loop = steps(denoiser, tableau("unipc-3"), start())
    assert not denoiser.calls
    for number in (1, 2, 3):
        assert next(loop).i == number - 1 and len(denoiser.calls) == number


# -- edit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDITABLE)
def test_a_projection_changes_the_sample(name):
    """One element is held, and the other, which must not know of it, is that of a run without."""
    table, seen, denoiser = tableau(name), [], Tanh()

    def project(step):
        seen.append(step)
        return torch.where(MASK, 0.25, step.x_next)

    ends = list(steps(denoiser, table, start(), edit=project))
    plain = run(Tanh(), table, start())
    assert bool((ends[-1].x_next[:, 0] == 0.25).all()) and float((plain[:, 0] - 0.25).abs().min()) > 1e-3
    assert torch.equal(ends[-1].x_next[:, 1], plain[:, 1])
    for before, after, call in zip(seen, ends, [*denoiser.calls[1:], None], strict=True):
        assert before.i == after.i and not torch.equal(before.x_next, after.x_next)  # it sees the step as the solver made it
        assert call is None or call[0] is after.x_next


def test_an_edit_is_felt_by_the_rest_of_the_run():
    table = tableau("dpm-solver-pp-2m")
    moved = run(Tanh(), table, start(), edit=lambda step: step.x_next + 1 if step.i == 1 else None)
    assert float((moved - run(Tanh(), table, start())).abs().min()) > 1e-3
    assert torch.equal(run(Tanh(), table, start(), edit=lambda step: None), run(Tanh(), table, start()))
    wide = list(steps(Tanh(), table, start(), edit=lambda step: step.x_next.double()))
    assert {step.x_next.dtype for step in wide} == {torch.float32}


@pytest.mark.parametrize("name", WHOLE_REGISTRY)
@pytest.mark.every(4, 2)
def test_solvers_that_an_edit_does_not_reach_are_refused(name):
    denoiser, table = Tanh(), tableau(name)
    if name.startswith(("unipc", "abm")) or name == "dpm-solver-v3":
        with pytest.raises(SolverError, match="an edit would be undone: use ddim, dpm-solver-pp-2m, .* or unipc-2:corrector=false"):
            list(steps(denoiser, table, start(), seeds=SEEDS, edit=lambda step: None))
        assert not denoiser.calls
    else:  # after the last stage of each step
        asked = list[int]()
        made = list(steps(denoiser, table, start(), seeds=SEEDS, edit=lambda step: asked.append(step.i)))
        ends = list(accumulate(WHOLE_REGISTRY[name].evaluations(5)))
        if name.startswith("seeds") or name == "sa-solver-pece":  # which carry on or evaluate every state that an edit made
            ends = list(range(1, ends[-1] + 1))
        if name == "restart":  # whose way back is of Heun's steps, too
            ends = list(range(2, ends[-1] + 1, 2))
        assert asked == [end - 1 for end in ends] and len(made) == ends[-1]


@pytest.mark.parametrize("name", ["heun", "dpm-solver-3s"])
def test_an_edit_moves_what_a_solver_of_several_stages_steps_from(name):
    """The rest of the run is one that begins at the edited state."""
    table = tableau(name)
    shift = lambda step: step.x_next + 1 if step.i < 3 else None  # noqa: E731 - after the first step
    edited = list(steps(Tanh(), table, start(), edit=shift))
    first = next(step for step, whole in zip(edited, table.whole_steps, strict=True) if whole)
    assert first.state.anchor is not None and torch.equal(first.state.anchor, first.x_next)
    fresh = table.start(first.x_next)._replace(history=first.state.history)
    rest = list(steps(Tanh(), table, start(), resume=(first.i + 1, fresh)))
    torch.testing.assert_close(rest[-1].x_next, edited[-1].x_next)


def test_an_edit_of_another_shape_is_refused():
    with pytest.raises(ModelError, match=r"edit answered shape \(3, 1\) for a state of shape \(3, 2\)"):
        run(Tanh(), tableau("ddim"), start(), edit=lambda step: step.x_next[:, :1])


# -- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sde-dpm-solver-pp-2m", "ddim-eta-0.5"])
def test_noise_by_evaluation_is_that_of_the_seeds(name):
    table, asked = tableau(name), []

    def noise(i):
        asked.append(i)
        return seeded_noise(SEEDS, SHAPE, stream=i + 1).double()  # the loop makes it the state's dtype

    ours = list(steps(Tanh(), table, start(), noise=noise))
    assert torch.equal(ours[-1].x_next, run(Tanh(), table, start(), seeds=SEEDS)) and ours[-1].x_next.dtype == torch.float32
    assert asked == [0, 1, 2, 3, 4]
    silent = list(steps(Tanh(), table, start(), noise=lambda i: torch.zeros(3, 2)))
    assert float((silent[-1].x_next - ours[-1].x_next).abs().min()) > 1e-3


def test_noise_is_not_drawn_for_a_solver_without():
    def noise(i):
        raise AssertionError("noise was drawn")

    assert len(list(steps(Tanh(), tableau("ddim"), start(), noise=noise))) == 5


# -- gradients --------------------------------------------------------------------------------------------------------


def test_the_loop_keeps_gradients_and_sample_does_not():
    x = start(torch.float64).requires_grad_()
    assert run(Tanh(), tableau("unipc-3"), x).requires_grad and not sample(Tanh(), tableau("unipc-3"), x).requires_grad
    assert torch.autograd.gradcheck(lambda x: run(Tanh(), tableau("unipc-3"), x), x)
    with torch.no_grad():
        assert not run(Tanh(), tableau("unipc-3"), x).requires_grad


def test_another_schedule_is_refused_before_an_evaluation():
    denoiser = Tanh(RectifiedFlow())
    with pytest.raises(ModelError, match="made for another noise schedule"):
        list(steps(denoiser, tableau("ddim"), start()))
    assert not denoiser.calls
