"""A sampler of ours as a solver of PhysicsNeMo's protocol, and its solvers in our comparisons: by the protocol's text alone."""

import re
from typing import Protocol, runtime_checkable

import pytest
import torch

import fewstep
from fewstep import FewstepError, GridError, Model, RectifiedFlow, Sampler, SolverError, TimeGrid, VarianceExploding, VPLinear
from fewstep.integrations.physicsnemo import FewstepSolver, solver_function

EDM, VP = VarianceExploding(), VPLinear(0.1, 20.0)
SHAPE = (3, 4)


@runtime_checkable
class Solver(Protocol):  # as its documentation has it
    def step(self, x, t_cur, t_next): ...


class Euler:
    def __init__(self, denoiser):
        self.denoiser = denoiser

    def step(self, x, t_cur, t_next):
        return x + (t_next - t_cur).reshape(-1, 1, 1) * self.denoiser(x, t_cur)


class Midpoint(Euler):
    def step(self, x, t_cur, t_next):
        h = (t_next - t_cur).reshape(-1, 1, 1)
        return x + h * self.denoiser(x + 0.5 * h * self.denoiser(x, t_cur), (t_cur + t_next) / 2)


def sample(solver, x, time_steps):
    """The documented loop: times in the dtype of the state, one for each sample, the state detached between steps."""
    times = time_steps.to(x)
    for now, after in zip(times, times[1:], strict=False):
        x = solver.step(x, now.expand(len(x)), after.expand(len(x))).detach()
    return x


def x0_of(x, t):
    return torch.tanh(0.3 * x / (1 + torch.as_tensor(t).reshape(-1, 1, 1)))


class Scheduler:
    """A scheduler with the laws of its linear Gaussian ones: the right hand side is made of scores."""

    def __init__(self, law):
        self.law = law
        self.alpha, self.sigma = law.alpha, law.sigma

    def get_denoiser(self, x0_predictor):
        def derivative(function, t):
            with torch.enable_grad():
                t = t.detach().double().requires_grad_()
                value = function(t)
                return torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)

        def denoiser(x, t):
            alpha, sigma = self.alpha(t.double()), self.sigma(t.double())
            drift = derivative(self.alpha, t) / alpha
            diffusion = 2 * sigma * derivative(self.sigma, t) - 2 * sigma**2 * drift
            drift, diffusion, alpha, sigma = (value.reshape(-1, 1, 1) for value in (drift, diffusion, alpha, sigma))
            score = (alpha * x0_predictor(x, t) - x) / sigma**2
            return (drift * x - 0.5 * diffusion * score).to(x.dtype)

        return denoiser


@pytest.mark.parametrize("law", [EDM, VP], ids=["edm", "vp"])
@pytest.mark.parametrize("name", ["ddim", "unipc-2", "dpm-solver-pp-3m", "heun", "deis-3", "ddim:eta=1"])
@pytest.mark.parametrize("predicts", ["rhs", "x0"])
@pytest.mark.every(4, 2)
def test_it_makes_what_sample_makes(law, name, predicts):
    sampler = Sampler.build(name, "angle", law, nfe=6)
    scheduler = Scheduler(law)
    network = scheduler.get_denoiser(x0_of) if predicts == "rhs" else x0_of
    solver = FewstepSolver(sampler, network, predicts=predicts, scheduler=scheduler, seeds=range(2))
    assert isinstance(solver, Solver)
    model = Model(x0_of, law, "sample", shape=SHAPE)
    start = fewstep.start_noise(sampler.tableau.nodes, range(2), SHAPE)
    expected = fewstep.sample(model, sampler, start, seeds=range(2))
    for _ in range(2):  # it can be begun again
        made = sample(solver, start, solver.time_steps)
        assert float((made - expected).abs().max()) < 2e-4 * float(expected.abs().max())


def test_euler_is_ddim_on_the_same_times():
    sampler = Sampler.build("ddim", "karras", EDM, nfe=8)
    start = fewstep.start_noise(sampler.tableau.nodes, range(3), SHAPE).double()
    rhs = Scheduler(EDM).get_denoiser(x0_of)
    ours = sample(FewstepSolver(sampler, rhs), start, sampler.grid.t)
    torch.testing.assert_close(ours, sample(Euler(rhs), start, sampler.grid.t), rtol=1e-6, atol=1e-6)


def test_a_fitted_sampler_runs_there_in_half_precision():
    model = fewstep.load_model("digits-edm")
    sampler = Sampler.load(fewstep.models.zoo.WEIGHTS / "digits-edm" / "fitted" / "nfe-04")
    labels = torch.tensor([3, 8])
    start = fewstep.start_noise(sampler.tableau.nodes, range(2), model.shape)
    with torch.no_grad():
        expected = fewstep.sample(model, sampler, start, labels)
        solver = FewstepSolver(sampler, lambda x, t: model(x.float(), t[:1].double()[0], labels), predicts="x0")
        assert float((sample(solver, start, solver.time_steps) - expected).abs().max()) < 1e-4
        half = sample(solver, start.bfloat16(), solver.time_steps)
    assert half.dtype == torch.bfloat16 and float((half - expected).abs().max()) < 0.1


def test_a_change_of_the_state_is_taken_over():
    sampler = Sampler.build("dpm-solver-pp-2m", "karras", EDM, nfe=4)
    model, start = Model(x0_of, EDM, "sample", shape=SHAPE), torch.ones(2, *SHAPE)
    *_, last = fewstep.steps(model, sampler.tableau, start, edit=lambda step: step.x_next * 0.5)
    solver, x = FewstepSolver(sampler, x0_of, predicts="x0"), start
    for now, after in zip(solver.time_steps, solver.time_steps[1:], strict=False):
        x = solver.step(x, now.expand(2), after.expand(2))
        x *= 0.5  # in place
    torch.testing.assert_close(x, last.x_next, rtol=1e-5, atol=1e-6)
    corrected = FewstepSolver(Sampler.build("unipc-2", "karras", EDM, nfe=4), x0_of, predicts="x0")
    x = corrected.step(start, *corrected.time_steps[:2, None].expand(2, 2))
    with pytest.raises(SolverError, match="would be undone"):
        corrected.step(0.5 * x, *corrected.time_steps[1:3, None].expand(2, 2))


def test_what_is_not_its_own_is_refused():
    sampler = Sampler.build("ddim", "karras", EDM, nfe=4)
    solver, x = FewstepSolver(sampler, x0_of, predicts="x0"), torch.ones(2, *SHAPE)
    first, second, third = (time.expand(2) for time in solver.time_steps[:3])
    variance = type("VEScheduler", (), {"alpha": lambda _, t: torch.ones_like(t), "sigma": lambda _, t: t.sqrt()})()
    for error, ask, message in (
        (GridError, lambda: solver.step(x, second, third), "is not its step 0; pass time_steps=solver.time_steps"),
        (GridError, lambda: solver.step(x, first, third), "is not its step 0"),
        (GridError, lambda: solver.step(x, torch.stack([first[0], second[0]]), second), "from one time to another"),
        (GridError, lambda: FewstepSolver(sampler, x0_of, scheduler=variance), "the sigma of a VEScheduler is not that of this sampler"),
        (FewstepError, lambda: FewstepSolver(sampler, x0_of, predicts="score"), "got 'score'"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            ask()
    solver.step(x, first, second)
    with pytest.raises(GridError, match="is not its step 1"):
        solver.step(x, third, third)


def test_a_flow_from_pure_noise():
    sampler = Sampler.build("euler", TimeGrid(torch.tensor([1.0, 0.6, 0.3, 0.0])), RectifiedFlow())
    velocity = lambda x, t: x - x0_of(x, t)  # noqa: E731 - of some network
    start = fewstep.seeded_noise(range(2), SHAPE)
    ours = sample(FewstepSolver(sampler, velocity), start, sampler.grid.t)
    torch.testing.assert_close(ours, sample(Euler(velocity), start, sampler.grid.t))


@pytest.mark.slow
@pytest.mark.usefixtures("short_reference")
def test_their_solvers_are_compared():
    model = fewstep.load_model("digits-edm")
    table = fewstep.compare(model, ["euler", solver_function(lambda f: Flat(f), "their-euler")], nfe=[4], num=8)
    rows = {row.solver: row for row in table.rows}
    assert rows["their-euler"].rmse == pytest.approx(rows["euler"].rmse, rel=1e-3) and rows["their-euler"].nfe == 4


class Flat(Euler):
    def step(self, x, t_cur, t_next):
        return x + (t_next - t_cur).reshape(-1, 1, 1, 1) * self.denoiser(x, t_cur)


def test_their_solvers_report_to_callbacks():
    seen = []
    made = solver_function(Midpoint)(
        lambda x, sigma, scale: scale * x0_of(x, sigma),
        torch.ones(2, *SHAPE),
        torch.tensor([2.0, 1.0, 0.5]),
        {"scale": 0.5},
        lambda report: seen.append((report["i"], float(report["sigma"]))),
    )
    assert made.shape == (2, *SHAPE) and [i for i, _ in seen] == [0, 0, 1, 1] and solver_function(Midpoint).__name__ == "Midpoint"
