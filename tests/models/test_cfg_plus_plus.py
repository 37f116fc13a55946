"""CFG++ by its definition, on answers with and without a label that are plain to see."""

import math

import pytest
import torch
from tests.problems import noise

import fewstep
from fewstep import Model, ModelError, RectifiedFlow, Sampler, SolverError, TimeGrid, VarianceExploding, make_solver
from fewstep.models.cfg_plus_plus import cfg_plus_plus, plus_plus_scales

LEVELS = {VarianceExploding: [10.0, 3.0, 1.0, 0.4, 0.0], RectifiedFlow: [1.0, 0.8, 0.5, 0.2, 0.0]}
NULL = 2


def answer(x, t, cond):
    """An estimate that depends on the state, on the time and on the label."""
    t = torch.as_tensor(t).reshape(-1, 1)
    return torch.tanh(x) * (0.5 + 0.1 * cond[:, None]) + 0.2 * cond[:, None] * t / (1 + t)


def model(law):
    return Model(answer, law, "sample", shape=(2,), classes=2, null_label=NULL, dtype=torch.float64, identity="labels")


def comfyui(law, levels, x, labels, scale, xi, eta):
    """``sample_euler_ancestral_cfg_pp``, in ComfyUI's words; of a flow with ``alpha = 1 - sigma``."""
    null = torch.full_like(labels, NULL)
    for i, (now, then) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        alpha_s, alpha_t = (1.0, 1.0) if law is VarianceExploding else (1 - now, 1 - then)
        t = torch.tensor(now, dtype=torch.float64)
        uncond = answer(x, t, null)
        denoised = uncond + scale * (answer(x, t, labels) - uncond)
        d = (x - alpha_s * uncond) / now
        one, two = now / max(alpha_s, 1e-300), then / alpha_t
        up = min(two, eta * math.sqrt(two**2 * (1 - (two / one) ** 2)))
        x = alpha_t * denoised + alpha_t * math.sqrt(two**2 - up**2) * d + alpha_t * up * xi[i]
    return x


@pytest.mark.parametrize(("solver", "eta"), [("euler", 0.0), ("ddim", 0.0), ("euler-ancestral", 1.0), ("euler-ancestral:eta=0.4", 0.4)])
@pytest.mark.parametrize("law", LEVELS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("scale", [0.6, 1.0])
def test_the_steps_are_those_of_comfyui(solver, eta, law, scale):
    levels, labels = LEVELS[law], torch.tensor([0, 1, 1])
    schedule = law(t_min=levels[-1], t_max=levels[0])
    sampler = Sampler.build(make_solver(solver), TimeGrid(torch.tensor(levels, dtype=torch.float64)), schedule)
    x, xi = levels[0] * noise(3, 2), noise(4, 3, 2)
    denoiser = cfg_plus_plus(model(schedule).guided, scale, sampler.tableau)
    made = list(fewstep.steps(denoiser, sampler.tableau, x, labels, noise=lambda i: xi[i]))[-1].x_next
    torch.testing.assert_close(made, comfyui(law, levels, x, labels, scale, xi, eta), rtol=1e-11, atol=1e-11)


def test_the_scale_is_the_last_steps_own_and_grows_with_short_steps():
    law = VarianceExploding()
    short, long = (plus_plus_scales(Sampler.build("euler", "Karras", law, nfe=n).tableau, 0.6) for n in (20, 5))
    assert float(short[-1]) == pytest.approx(0.6) == float(long[-1]) and float(short[0]) > float(long[0]) > 0.6


def test_sample_takes_the_form():
    made = model(VarianceExploding())
    sampler = Sampler.build("euler", "karras", made.schedule, nfe=5)
    one, two = (fewstep.sample(made, sampler, seeds=range(3), guidance=0.6, guidance_form=form) for form in ("cfg", "cfg++"))
    by_hand = fewstep.sample(
        cfg_plus_plus(made.guided, 0.6, sampler.tableau),
        sampler,
        fewstep.start_noise(sampler.tableau.nodes, range(3), (2,)),
        made.labels(range(3)),
    )
    assert torch.equal(two, by_hand) and not torch.allclose(one, two)


@pytest.mark.parametrize("solver", ["heun", "dpm-solver-pp-2m", "unipc-2", "sde-dpm-solver-pp-2m"])
def test_other_samplers_are_refused(solver):
    with pytest.raises(SolverError, match="samplers of first order"):
        fewstep.sample(model(VarianceExploding()), solver, nfe=5 if solver != "heun" else 6, seeds=[0], guidance=0.6, guidance_form="cfg++")


def test_what_else_it_cannot_do_is_refused():
    made, law = model(VarianceExploding()), VarianceExploding()
    denoiser = cfg_plus_plus(made.guided, 0.6, Sampler.build("euler", "karras", law, nfe=5).tableau)
    with pytest.raises(ModelError, match="a scale for each evaluation"):
        denoiser(noise(2, 2), torch.tensor(3.21, dtype=torch.float64), torch.tensor([0, 1]))
    with pytest.raises(ModelError, match="leave it or parallel out"):
        fewstep.sample(made, "euler", nfe=5, seeds=[0], guidance_form="cfg++", parallel=fewstep.ParallelConfig())
    with pytest.raises(fewstep.FewstepError, match="guidance_form"):
        fewstep.sample(made, "euler", nfe=5, seeds=[0], guidance_form="cfg+")
