"""Flow maps: a denoiser's first-order step is one, a map of one's own is sampled like any model, and only DDIM's steps are left to take."""

import pytest
import torch
from tests.problems import ALL, STOCHASTIC, WHOLE_REGISTRY, mixture, noise
from torch import nn
from torch.testing import assert_close

import fewstep
from fewstep import (
    DiscreteVP,
    FlowMap,
    GaussianDenoiser,
    ModelError,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    VPLinear,
    make_grid,
    sample,
)
from fewstep.models.flow_map import FirstOrderMap

LAWS = {
    "vp": VPLinear(),
    "edm": VarianceExploding(),
    "flow": RectifiedFlow(shift=3.0),  # from alpha = 0 to sigma = 0
    "zero-snr": DiscreteVP.scaled_linear().zero_terminal_snr().to_clean(),
}
MEAN, STD = torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64)


class Exact(FlowMap):
    """The whole trajectory of Gaussian data in closed form; it may know some times only."""

    def __init__(self, schedule, times=None):
        self.denoiser, self.times, self.calls = GaussianDenoiser(schedule, MEAN, STD), times, []

    @property
    def schedule(self):
        return self.denoiser.schedule

    @property
    def definition(self):
        return ("exact", self.times)

    def __call__(self, x, s, t, cond=None):
        self.calls.append((float(s), float(t), cond))
        return self.denoiser.flow(x, s, t).to(x.dtype)

    def check(self, t):
        if self.times is not None and not set(t.tolist()) <= set(self.times):
            raise SolverError(f"this map knows the times {self.times} only")


def student(flow_map, **options):
    return fewstep.Model(nn.Identity(), flow_map.schedule, "sample", shape=(2,), flow_map=flow_map, name="exact", **options)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.every(3, 2)
def test_a_denoisers_first_order_map_is_ddim(law, steps):
    schedule = LAWS[law]
    tableau = Sampler.build("ddim", make_grid("angle", schedule, steps), schedule).tableau
    x = noise(4, 2) * tableau.nodes.sigma[0]
    assert_close(sample(FirstOrderMap(mixture(schedule)), tableau, x), sample(mixture(schedule), tableau, x), rtol=1e-9, atol=1e-9)


def test_a_first_order_map_goes_from_any_time_to_any_other():
    flow_map, x = FirstOrderMap(mixture(LAWS["edm"])), noise(4, 2)
    s, t = torch.tensor([3.0, 0.7], dtype=torch.float64)
    assert_close(flow_map(x, s, t), t / s * x + (1 - t / s) * mixture(LAWS["edm"])(x, s))
    assert flow_map.schedule is LAWS["edm"]


@pytest.mark.parametrize("name", [*WHOLE_REGISTRY, "dpm-solver-pp-1", "dpm-solver-1m", "deis-1", "ipndm-1", "ddim-eta-1", "v3-1-true-none"])
@pytest.mark.every(5, 2)
def test_tableaux_that_are_not_of_first_order_are_refused(name):
    """Those that make DDIM's steps under another name are not."""
    schedule, flow_map = LAWS["vp"], Exact(LAWS["vp"])
    for steps in (1, 4):
        tableau = Sampler.build(ALL[name], make_grid("angle", schedule, steps), schedule).tableau
        ddim = Sampler.build("ddim", make_grid("angle", schedule, steps), schedule).tableau
        made, plain = tableau.unrolled(), ddim.unrolled()
        same = made.start.shape == plain.start.shape and not tableau.stochastic and tableau.nodes.evaluations == steps
        same = same and all(torch.allclose(one, two, rtol=1e-6) for one, two in zip(made, plain, strict=True))
        if same:
            assert len(sample(flow_map, tableau, noise(3, 2))) == 3
            continue
        with pytest.raises(SolverError, match="a flow map makes first-order steps alone: use the solver ddim"):
            sample(flow_map, tableau, noise(3, 2), seeds=range(3))
    assert (name in ("ddim", "euler", "dpm-solver-pp-1", "dpm-solver-1m", "deis-1", "ipndm-1")) <= same
    assert not (same and (name in STOCHASTIC or name in ("unipc-2", "heun", "deis-3")))


@pytest.mark.parametrize("nfe", [1, 3])
@pytest.mark.parametrize("law", ["vp", "edm"])
def test_a_map_of_ones_own_is_a_model(law, nfe):
    flow_map = Exact(LAWS[law])
    model = student(flow_map)
    images = sample(model, "ddim", nfe=nfe, seeds=range(4))
    start = fewstep.start_noise(Sampler.build("ddim", "angle", model.schedule, nfe=nfe).tableau.nodes, range(4), (2,))
    ends = torch.tensor([model.schedule.t_max, model.schedule.t_min], dtype=torch.float64)
    assert_close(images, flow_map.denoiser.flow(start, ends[0], ends[1]).float(), rtol=1e-4, atol=1e-4)
    assert len(flow_map.calls) == nfe and flow_map.calls[0][0] == model.schedule.t_max and flow_map.calls[-1][1] == model.schedule.t_min
    assert [one[1] for one in flow_map.calls[:-1]] == [two[0] for two in flow_map.calls[1:]]


def test_the_condition_reaches_it():
    flow_map = Exact(LAWS["vp"])
    labels = torch.tensor([1, 0])
    sample(student(flow_map, classes=2), "ddim", nfe=2, seeds=[3, 4], cond=labels)
    assert all(cond is labels for _, _, cond in flow_map.calls)


def test_its_definition_is_in_the_fingerprint():
    one, two, other = (student(Exact(LAWS["vp"], times)).fingerprint for times in (None, None, (1.0, 0.001)))
    assert one == two != other


def test_a_student_is_no_denoiser_and_has_no_guidance():
    model = student(Exact(LAWS["vp"], (1.0, 0.001)))
    assert "flow map" in repr(model) and model.guided(1.0) is model.flow_map and model.num_jumps == ()
    x, t = noise(2, 2), torch.tensor(0.5, dtype=torch.float64)
    for ask, says in (
        (lambda: model(x, t), "exact is a student, which has to know where a step leads: sample it by fewstep.sample"),
        (model.need_denoiser, "exact is a student, which is sampled as it is: name its teacher"),
        (lambda: model.guided(2.0), "its guidance is in its weights; use guidance 1"),
        (lambda: sample(model, "ddim", nfe=1, seeds=[1], guidance=2.0), "its guidance is in its weights"),
    ):
        with pytest.raises(ModelError, match=says):
            ask()


def test_times_that_it_does_not_know_are_refused_before_a_call():
    flow_map = Exact(LAWS["vp"], (1.0, 0.3, 0.001))
    assert sample(student(flow_map), "ddim", grid=TimeGrid([1.0, 0.3, 0.001]), seeds=[1]).shape == (1, 2)
    flow_map.calls.clear()
    with pytest.raises(SolverError, match="this map knows the times"):
        sample(student(flow_map), "ddim", nfe=2, seeds=[1])
    assert not flow_map.calls


def test_another_schedule_than_its_models_is_refused():
    model = fewstep.Model(nn.Identity(), VPLinear(beta_max=10.0), "sample", shape=(2,), flow_map=Exact(LAWS["vp"]))
    with pytest.raises(ModelError, match="another noise schedule"):
        sample(model, "ddim", nfe=2, seeds=[1])
