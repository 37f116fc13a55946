"""CFG++ by its definition, on answers with and without a label that are plain to see."""

import math

import pytest
import torch
from tests.problems import mixture, noise

import fewstep
from fewstep import Model, ModelError, RectifiedFlow, Sampler, SolverError, TimeGrid, VarianceExploding, VPLinear, make_solver
from fewstep.models.cfg_plus_plus import cfg_plus_plus, plus_plus_gains

LEVELS = {VarianceExploding: [10.0, 3.0, 1.0, 0.4, 0.0], RectifiedFlow: [1.0, 0.8, 0.5, 0.2, 0.0]}
NULL = 2
SAME = 1e-11


def answer(x, t, cond):
    """An estimate that depends on the state, on the time and on the label."""
    t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1)
    return torch.tanh(x) * (0.5 + 0.1 * cond[:, None]) + 0.2 * cond[:, None] * t / (1 + t)


def model(law, network=answer):
    return Model(network, law, "sample", shape=(2,), classes=2, null_label=NULL, dtype=torch.float64, identity="labels")


def made_by(solver, law, grid, x, labels, scale, xi=None):
    sampler = Sampler.build(make_solver(solver), grid, law)
    denoiser, edit = cfg_plus_plus(model(law), scale, sampler)
    given = {} if xi is None else {"noise": lambda i: xi[i]}
    return list(fewstep.steps(denoiser, sampler.tableau, x, labels, edit=edit, **given))[-1].x_next


def both(x, level, labels, scale):
    """The answers ``D`` and ``U``."""
    uncond = answer(x, level, torch.full_like(labels, NULL))
    return uncond + scale * (answer(x, level, labels) - uncond), uncond


def euler(law, levels, x, labels, scale, xi, eta):
    """``sample_euler_ancestral_cfg_pp``, in ComfyUI's words; of a flow with ``alpha = 1 - sigma``."""
    for i, (now, then) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        alpha_s, alpha_t = (1.0, 1.0) if law is VarianceExploding else (1 - now, 1 - then)
        denoised, uncond = both(x, now, labels, scale)
        d = (x - alpha_s * uncond) / now
        one, two = now / max(alpha_s, 1e-300), then / alpha_t
        up = min(two, eta * math.sqrt(two**2 * (1 - (two / one) ** 2)))
        x = alpha_t * denoised + alpha_t * math.sqrt(two**2 - up**2) * d + alpha_t * up * xi[i]
    return x


def dpmpp_2m(levels, x, labels, scale, xi):
    """The authors' ``dpm++_2m_cfg++``, which ComfyUI took over: the newest answer of the line through two is guided."""
    before = None
    for i, (now, then) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        denoised, uncond = both(x, now, labels, scale)
        if before is None or then == 0:
            x = denoised + then * (x - uncond) / now
        else:
            h, last = math.log(now / then), math.log(levels[i - 1] / now)
            x = denoised - math.exp(-h) * uncond + (1 - math.exp(-h)) * h / (2 * last) * (denoised - before) + math.exp(-h) * x
        before = uncond
    return x


def res(levels, x, labels, scale, xi, eta=0.0):
    """ComfyUI's ``res_multistep_cfg_pp`` and its ancestral form: the state before the step has the guided image."""
    before = before_down = None
    for i, (now, then) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        denoised, uncond = both(x, now, labels, scale)
        up = min(then, eta * math.sqrt(then**2 * (1 - (then / now) ** 2)))
        down = math.sqrt(then**2 - up**2)
        if down == 0 or before is None:
            x = denoised + down * (x - uncond) / now
        else:
            h = math.log(now / down)
            c2 = math.log(before_down / levels[i - 1]) / h
            phi1 = (1 - math.exp(-h)) / h
            phi2 = (1 - phi1) / h
            x = math.exp(-h) * (x + denoised - uncond) + h * ((phi1 - phi2 / c2) * uncond + phi2 / c2 * before)
        x = x + up * xi[i]
        before, before_down = uncond, down
    return x


def gradient_estimation(levels, x, labels, scale, xi, gamma=2.0):
    """ComfyUI's ``gradient_estimation_cfg_pp``."""
    before = None
    for now, then in zip(levels[:-1], levels[1:], strict=True):
        denoised, uncond = both(x, now, labels, scale)
        d = (x - uncond) / now
        x = denoised + then * d
        if then and before is not None:
            x = x + (gamma - 1) * (d - before) * (then - now)
        before = d
    return x


def dpmpp_2s(levels, x, labels, scale, xi, eta=1.0):
    """The authors' ``dpm++_2s_a_cfg++``: both stages without the condition, and the second one's difference."""
    for i, (now, then) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        denoised, uncond = both(x, now, labels, scale)
        up = min(then, eta * math.sqrt(then**2 * (1 - (then / now) ** 2)))
        down = math.sqrt(then**2 - up**2)
        if down == 0:
            x = denoised
            continue
        middle, h = math.sqrt(now * down), math.log(now / down)
        x_2 = middle / now * x + (1 - math.exp(-h / 2)) * uncond
        denoised, uncond = both(x_2, middle, labels, scale)
        x = denoised - math.exp(-h) * uncond + down / now * x + up * xi[2 * i + 1]
    return x


THEIRS = {
    "dpm-solver-pp-2m": dpmpp_2m,
    "exp-ab-2": res,
    "res-multistep-ancestral": lambda *given: res(*given, eta=1.0),
    "res-multistep-ancestral:eta=0.4": lambda *given: res(*given, eta=0.4),
    "gradient-estimation": gradient_estimation,
    "gradient-estimation:gamma=1.3": lambda *given: gradient_estimation(*given, gamma=1.3),
    "dpm-solver-pp-2s-ancestral": dpmpp_2s,
    "dpm-solver-pp-2s-ancestral:eta=0.4": lambda *given: dpmpp_2s(*given, eta=0.4),
}


@pytest.mark.parametrize(("solver", "eta"), [("euler", 0.0), ("ddim", 0.0), ("euler-ancestral", 1.0), ("euler-ancestral:eta=0.4", 0.4)])
@pytest.mark.parametrize("law", LEVELS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("scale", [0.6, 1.0])
def test_the_steps_of_first_order_are_those_of_comfyui(solver, eta, law, scale):
    levels, labels = LEVELS[law], torch.tensor([0, 1, 1])
    grid = TimeGrid(torch.tensor(levels, dtype=torch.float64))
    x, xi = levels[0] * noise(3, 2), noise(4, 3, 2)
    made = made_by(solver, law(t_min=levels[-1], t_max=levels[0]), grid, x, labels, scale, xi)
    torch.testing.assert_close(made, euler(law, levels, x, labels, scale, xi, eta), rtol=SAME, atol=SAME)


@pytest.mark.parametrize("scale", [0.6, 1.7])
@pytest.mark.parametrize("solver", THEIRS)
def test_the_steps_of_higher_order_are_the_published_ones(solver, scale):
    levels, labels = [10.0, 5.5, 3.0, 1.0, 0.4, 0.0], torch.tensor([0, 1, 1])
    grid = TimeGrid(torch.tensor(levels, dtype=torch.float64))
    x, xi = levels[0] * noise(3, 2), noise(10, 3, 2)
    made = made_by(solver, VarianceExploding(t_min=0.0, t_max=10.0), grid, x, labels, scale, xi)
    torch.testing.assert_close(made, THEIRS[solver](levels, x, labels, scale, xi), rtol=SAME, atol=SAME)


@pytest.mark.parametrize(
    "solver", ["euler", "dpm-solver-pp-2m", "exp-ab-3", "gradient-estimation", "deis-3", "sde-dpm-solver-pp-2m", "heun"]
)
@pytest.mark.parametrize("law", [VPLinear(), RectifiedFlow()], ids=["vp", "flow"])
def test_all_noise_laws_take_the_same_steps(solver, law):
    """A state of another law is ``alpha`` times that of the same level, on a network that is told the level alone."""
    grid = TimeGrid(torch.linspace(0.9, 0.1, 6, dtype=torch.float64))
    levels = law.sigma(grid.t) / law.alpha(grid.t)
    plain = VarianceExploding(t_min=float(levels[-1]), t_max=float(levels[0]))

    def of_level(x, t, cond):
        return answer(x / law.alpha(t).reshape(-1, 1), law.sigma(t) / law.alpha(t), cond)

    x, xi, labels = float(levels[0]) * noise(3, 2), noise(12, 3, 2), torch.tensor([0, 1, 1])
    expected = made_by(solver, plain, TimeGrid(levels), x, labels, 0.7, xi)
    sampler = Sampler.build(make_solver(solver), grid, law)
    denoiser, edit = cfg_plus_plus(model(law, of_level), 0.7, sampler)
    start = law.alpha(grid.t[0]) * x
    made = list(fewstep.steps(denoiser, sampler.tableau, start, labels, noise=lambda i: xi[i], edit=edit))[-1].x_next
    torch.testing.assert_close(made / law.alpha(grid.t[-1]), expected, rtol=1e-9, atol=1e-9)


EVERY = [
    "euler",
    "ddim:eta=0.5",
    "dpm-solver-pp-2m",
    "dpm-solver-pp-3m",
    "exp-ab-4",
    "deis-3",
    "ipndm",
    "lms",
    "heun",
    "res-3s",
    "lcm",
    "er-sde-2",
]


@pytest.mark.parametrize("solver", EVERY)
def test_where_guidance_changes_nothing_the_step_is_the_solvers(solver):
    """At scale 0 it is that of the model without its condition, and at any scale where both answers are alike."""
    law, labels = VarianceExploding(t_min=0.0, t_max=10.0), torch.tensor([0, 1])
    grid = TimeGrid(torch.tensor([10.0, 3.0, 1.0, 0.4, 0.0], dtype=torch.float64))
    x, xi, null = 10 * noise(2, 2), noise(16, 2, 2), torch.full_like(labels, NULL)
    tableau = Sampler.build(make_solver(solver), grid, law).tableau
    plain = list(fewstep.steps(model(law), tableau, x, null, noise=lambda i: xi[i]))[-1].x_next
    for cond, scale in ((labels, 0.0), (null, 3.0)):
        torch.testing.assert_close(made_by(solver, law, grid, x, cond, scale, xi), plain, rtol=SAME, atol=SAME)


@pytest.mark.parametrize(
    "solver", ["euler", "dpm-solver-pp-2m", "dpm-solver-pp-3m", "exp-ab-4", "deis-3", "heun", "res-3s", "lcm", "er-sde-2"]
)
def test_a_point_for_each_label_is_reached_exactly(solver):
    """At scale 1 a last step of first order leads to the answer with the condition, whatever the noise was."""
    law, labels = VarianceExploding(t_min=0.0, t_max=10.0), torch.tensor([0, 1])
    points = torch.tensor([[1.0, -1.0], [0.3, 2.0], [5.0, 5.0]], dtype=torch.float64)
    sampler = Sampler.build(make_solver(solver), TimeGrid(torch.tensor([10.0, 3.0, 1.0, 0.4, 0.0], dtype=torch.float64)), law)
    denoiser, edit = cfg_plus_plus(model(law, lambda x, t, cond: points[cond]), 1.0, sampler)
    ends = list(fewstep.steps(denoiser, sampler.tableau, 10 * noise(2, 2), labels, seeds=[1, 2], edit=edit))
    torch.testing.assert_close(ends[-1].x_next, points[labels], rtol=1e-9, atol=1e-9)


def test_sample_takes_the_form():
    made = model(VarianceExploding())
    for solver in ("euler", "dpm-solver-pp-2m"):
        sampler = Sampler.build(solver, "karras", made.schedule, nfe=5)
        one, two = (fewstep.sample(made, sampler, seeds=range(3), guidance=0.6, guidance_form=form) for form in ("cfg", "cfg++"))
        denoiser, edit = cfg_plus_plus(made, 0.6, sampler)
        start = fewstep.start_noise(sampler.tableau.nodes, range(3), (2,))
        by_hand = list(fewstep.steps(denoiser, sampler.tableau, start, made.labels(range(3)), edit=edit))[-1].x_next
        assert torch.equal(two, by_hand) and not torch.allclose(one, two)
    euler = Sampler.build("euler", "karras", made.schedule, nfe=5)
    alone, whole = (fewstep.sample(made, what, seeds=[0], guidance=0.6, guidance_form="cfg++") for what in (euler.tableau, euler))
    assert torch.equal(alone, whole)


def test_one_evaluation_is_one_call_on_a_doubled_batch():
    calls = []

    def counted(x, t, cond):
        calls.append(len(x))
        return answer(x, t, cond)

    fewstep.sample(model(VarianceExploding(), counted), "dpm-solver-pp-2m", nfe=5, seeds=[0, 1], guidance=0.6, guidance_form="cfg++")
    assert calls == [4] * 5


@pytest.mark.parametrize("solver", ["unipc-2", "abm-3", "seeds-2", "sa-solver-pece", "restart"])
def test_samplers_whose_steps_the_edit_does_not_reach_are_refused(solver):
    law = VarianceExploding(t_min=0.0, t_max=10.0)
    sampler = Sampler.build(make_solver(solver), TimeGrid(torch.tensor([10.0, 3.0, 1.0, 0.4, 0.1, 0.0], dtype=torch.float64)), law)
    with pytest.raises(SolverError, match="CFG.. adds to the state after each step of the grid"):
        plus_plus_gains(sampler)


def test_what_else_it_cannot_do_is_refused():
    made, law = model(VarianceExploding()), VarianceExploding()
    two = Sampler.build("dpm-solver-pp-2m", "karras", law, nfe=5)
    with pytest.raises(SolverError, match="does not say which solver's CFG"):
        fewstep.sample(made, two.tableau, seeds=[0], guidance=0.6, guidance_form="cfg++")
    with pytest.raises(SolverError, match="stopped after 4 does not say"):
        plus_plus_gains(two.stopped(4))
    with pytest.raises(ModelError, match="leave it or parallel out"):
        fewstep.sample(made, "euler", nfe=5, seeds=[0], guidance_form="cfg++", parallel=fewstep.ParallelConfig())
    with pytest.raises(ModelError, match="for a Model"):
        fewstep.sample(mixture(law), "euler", noise(1, 2), nfe=5, guidance_form="cfg++")
    with pytest.raises(ModelError, match="not class-conditional with a null label; use guidance 1 of the usual form"):
        plain = Model(answer, law, "sample", shape=(2,), classes=2, identity="x")
        fewstep.sample(plain, "euler", nfe=5, seeds=[0], guidance=1, guidance_form="cfg++")
    with pytest.raises(ModelError, match="scales of its own, between 0 and 1: name one, as guidance=0.6 \\(--guidance 0.6\\)"):
        fewstep.sample(made, "euler", nfe=5, seeds=[0], guidance_form="cfg++")
    with pytest.raises(ModelError, match="the scale of CFG"):
        cfg_plus_plus(made, "much", two)
    with pytest.raises(fewstep.FewstepError, match="guidance_form"):
        fewstep.sample(made, "euler", nfe=5, seeds=[0], guidance_form="cfg+")
