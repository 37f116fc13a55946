"""Flow maps of others, each against its published formula written out here."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.problems import noise
from torch import Tensor, nn
from torch.testing import assert_close

import fewstep
from fewstep import (
    FewstepError,
    GaussianDenoiser,
    Model,
    ModelError,
    RectifiedFlow,
    SolverError,
    flow_map_model,
    load_model,
    make_grid,
    sample,
)
from fewstep.models.flow_map import FirstOrderMap
from fewstep.models.foreign_maps import VELOCITY_FORMS, VelocityForm, VelocityMap, state_first

SHAPE = (3,)
WEIGHTS = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))


def bent(x: Tensor, one: Tensor, two: Tensor, labels: Tensor | None = None) -> Tensor:
    """Any function of a state, two numbers and a label that depends on each."""
    moved = torch.tanh(x @ WEIGHTS.to(x) + 0.7 * one[:, None] - 0.4 * two[:, None])
    return moved if labels is None else moved + 0.3 * labels[:, None].to(x)


class Net(nn.Module):
    """A network in any order of arguments; it remembers what it was told."""

    def __init__(self, order: str, scale: float = 1.0) -> None:
        super().__init__()
        self.order, self.scale, self.one = order, scale, nn.Parameter(torch.ones(()), requires_grad=False)
        self.told: list[tuple[float, float]] = []

    def forward(self, *inputs: Tensor) -> Tensor:
        x, one, two = (inputs[self.order.index(name)] for name in ("x", "1", "2"))
        self.told.append((float(one[0]), float(two[0])))
        assert one.shape == two.shape == (len(x),) and one.dtype == two.dtype == torch.float32
        return self.one * bent(x, one / self.scale, two / self.scale, *inputs[3:])


def levels(steps: int, shift: float = 1.0) -> list[float]:
    """Noise levels ``u`` of the default grid."""
    law = RectifiedFlow(shift)
    return law.sigma(make_grid("angle", law, steps).t).tolist()


def ones(x: Tensor, value: float) -> Tensor:
    return torch.full((len(x),), value)


# -- the published steps: (z, u, u', labels) -> z' ---------------------------------------------------------------------


def meanflow(z: Tensor, t: float, r: float, *labels: Tensor) -> Tensor:
    return z - (t - r) * bent(z, ones(z, t), ones(z, r), *labels)


def meanflow_duration(z: Tensor, t: float, r: float, *labels: Tensor) -> Tensor:
    return z - (t - r) * bent(z, ones(z, t), ones(z, t - r), *labels)


def self_distillation(x: Tensor, u: float, u_next: float, *labels: Tensor) -> Tensor:
    s, t = 1 - u, 1 - u_next
    return x + (t - s) * bent(x, ones(x, s), ones(x, t), *labels)


def flow_map_euler(z: Tensor, sigma: float, sigma_next: float, *labels: Tensor) -> Tensor:
    return z + (sigma_next - sigma) * bent(z, ones(z, sigma), ones(z, sigma_next), *labels)


STEPS: dict[str, tuple[Any, str, float]] = {
    "meanflow": (meanflow, "x12", 1.0),
    "meanflow-duration": (meanflow_duration, "x12", 1.0),
    "self-distillation": (self_distillation, "12x", 1.0),
    "diffusers": (flow_map_euler, "x12", 1000.0),
}


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("kind", VELOCITY_FORMS)
def test_each_is_its_published_formula(kind: str, steps: int) -> None:
    step, order, scale = STEPS[kind]
    model = flow_map_model(Net(order, scale), kind, shape=SHAPE)
    z = noise(4, *SHAPE).float()
    made = sample(model, "ddim", nfe=steps, seeds=range(4))
    for u, u_next in zip(levels(steps)[:-1], levels(steps)[1:], strict=True):
        z = step(z, u, u_next)
    assert_close(made, z, rtol=1e-6, atol=1e-6)
    assert len(model.network.told) == steps


@pytest.mark.parametrize("kind", VELOCITY_FORMS)
def test_conditions_are_passed_on(kind: str) -> None:
    step, order, scale = STEPS[kind]
    model = flow_map_model(Net(order + "c", scale), kind, shape=SHAPE, classes=5)
    labels = torch.tensor([4, 0, 2])
    z, (u, u_next) = noise(3, *SHAPE).float(), levels(1)
    assert_close(sample(model, "ddim", nfe=1, seeds=range(3), cond=labels), step(z, u, u_next, labels), rtol=1e-6, atol=1e-6)
    by_seed = sample(model, nfe=1, seeds=range(3))
    assert_close(by_seed, step(z, u, u_next, torch.arange(3)), rtol=1e-6, atol=1e-6)


def test_what_the_networks_are_told() -> None:
    told = {"meanflow": (1.0, 0.0), "meanflow-duration": (1.0, 1.0), "self-distillation": (0.0, 1.0), "diffusers": (1000.0, 0.0)}
    for kind, wanted in told.items():
        model = flow_map_model(Net(STEPS[kind][1]), kind, shape=SHAPE)
        sample(model, "ddim", nfe=1, seeds=[0])
        assert model.network.told == [wanted]


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_a_uniform_grid_is_diffusers_own_loop(shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "FlowMapEulerDiscreteScheduler"):
        pytest.skip("this diffusers has no flow maps")
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(4)
    net, z = Net("x12", 1000.0), noise(4, *SHAPE).float()
    made = sample(flow_map_model(net, "diffusers", shape=SHAPE, shift=shift), "ddim", nfe=4, seeds=range(4), grid="uniform")
    for i, t in enumerate(scheduler.timesteps):
        r = scheduler.sigmas[i + 1] * scheduler.config.num_train_timesteps
        velocity = net(z, t.expand(4).float(), r.expand(4).float())
        z = scheduler.step(velocity, t, z, r_timestep=r, return_dict=False)[0]
    assert_close(made, z, rtol=1e-6, atol=1e-6)


def test_an_exact_flow_map_of_each_family_makes_exact_samples() -> None:
    """Not the formulas but what they mean: mean velocities of Gaussian data lead to the data in one jump as in four."""
    law = RectifiedFlow()
    exact = GaussianDenoiser(law, torch.tensor([0.4, -0.3, 0.0], dtype=torch.float64), torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64))

    def velocity(x: Tensor, u: Tensor, u_next: Tensor) -> Tensor:
        return ((exact.flow(x.double(), u[0].double(), u_next[0].double()) - x) / (u_next - u)[0].double()).to(x.dtype)

    nets = {
        "meanflow": velocity,
        "meanflow-duration": lambda x, t, h: velocity(x, t, t - h),
        "self-distillation": lambda s, t, x: -velocity(x, 1 - s, 1 - t),
        "diffusers": lambda x, t, r: velocity(x, t / 1000, r / 1000),
    }
    start, (first, last) = noise(4, *SHAPE), law.ends
    for kind, net in nets.items():
        model = flow_map_model(net, kind, shape=SHAPE, identity="exact")
        for steps in (1, 4):
            assert_close(sample(model, nfe=steps, seeds=range(4)), exact.flow(start, first, last).float(), rtol=1e-4, atol=1e-5)


def test_a_call_and_a_convention_of_ones_own() -> None:
    def keyword(network: Any, x: Tensor, s: Tensor, t: Tensor, cond: Any) -> tuple[Tensor]:
        return (network(hidden=x, timestep=s, r_timestep=t),)

    def net(*, hidden: Tensor, timestep: Tensor, r_timestep: Tensor) -> Tensor:
        return bent(hidden, timestep, r_timestep)

    wanted = meanflow(noise(2, *SHAPE).float(), 1.0, 0.0)
    assert_close(sample(flow_map_model(net, shape=SHAPE, call=keyword), nfe=1, seeds=range(2)), wanted, rtol=1e-6, atol=1e-6)
    tens = VelocityForm(state_first, scale=10.0)
    assert_close(sample(flow_map_model(Net("x12", 10.0), tens, shape=SHAPE), nfe=1, seeds=range(2)), wanted, rtol=1e-6, atol=1e-6)


def test_half_precision_stays_in_the_network() -> None:
    net = Net("x12")
    net.one.data = net.one.data.bfloat16()
    seen = list[torch.dtype]()
    model = flow_map_model(net, shape=SHAPE, call=lambda net, x, s, t, cond: seen.append(x.dtype) or net(x, s, t))
    assert sample(model, nfe=2, seeds=range(2)).dtype == torch.float32 and seen == [torch.bfloat16] * 2


def test_conventions_and_calls_are_in_the_fingerprint() -> None:
    net = Net("x12")
    models = [flow_map_model(net, kind, shape=SHAPE) for kind in VELOCITY_FORMS]
    models += [flow_map_model(net, shape=SHAPE, shift=2.0), flow_map_model(net, shape=SHAPE, call=lambda net, x, s, t, cond: net(x, t, s))]
    found = [model.fingerprint for model in models]
    assert len(set(found)) == len(found) and flow_map_model(net, shape=SHAPE).fingerprint == found[0]


# -- sampled without a sampler's name ----------------------------------------------------------------------------------


def test_a_flow_map_without_passes_of_its_own_jumps_along_the_default_grid() -> None:
    model = flow_map_model(Net("x12"), shape=SHAPE, name="mine")
    for steps in (1, 3):
        assert torch.equal(sample(model, nfe=steps, seeds=range(2)), sample(model, "ddim", nfe=steps, seeds=range(2)))
    with pytest.raises(SolverError, match="say how to sample mine: pass nfe=, the number of its jumps, as nfe=1"):
        sample(model, seeds=range(2))
    assert isinstance(model.flow_map, fewstep.FlowMap) and "flow map" in repr(model) and model.num_jumps == ()


def test_one_that_does_not_know_those_times_is_still_refused() -> None:
    class Picky(FirstOrderMap):
        def check(self, t: Tensor) -> None:
            raise SolverError("it knows others")

    law = RectifiedFlow()
    denoiser = Model(nn.Identity(), law, "sample", shape=SHAPE)
    model = Model(nn.Identity(), law, "sample", shape=SHAPE, flow_map=Picky(denoiser), name="picky")
    with pytest.raises(SolverError, match="picky carries no sampler for 3 evaluations .*: name a grid of times that it knows, as in"):
        sample(model, nfe=3, seeds=[0])


MISTAKES: dict[str, tuple[Any, str]] = {
    "kind": (
        lambda: flow_map_model(Net("x12"), "meanflw", shape=SHAPE),
        "unknown convention of flow maps 'meanflw': did you mean meanflow",
    ),
    "network": (lambda: flow_map_model(5, shape=SHAPE), "a flow map's network is a module or a function, got int"),
    "shape": (lambda: flow_map_model(Net("x12"), shape=5), "shape is that of one sample without the batch"),
    "no shape": (lambda: flow_map_model(Net("x12")), "missing a required argument: 'shape'"),
    "shift": (lambda: flow_map_model(Net("x12"), shape=SHAPE, shift=-1.0), "a positive shift"),
    "call": (lambda: flow_map_model(Net("x12"), shape=SHAPE, call="net"), "call is a function .*, got 'net'"),
    "misspelt": (lambda: flow_map_model(Net("x12"), shape=SHAPE, shifted=2), "'shifted'; did you mean shift"),
    "guidance": (lambda: sample(flow_map_model(Net("x12"), shape=SHAPE), nfe=1, seeds=[0], guidance=2), "its guidance is in its weights"),
    "solver": (lambda: sample(flow_map_model(Net("x12"), shape=SHAPE), "unipc-2", nfe=4, seeds=[0]), "first-order steps alone: use"),
    "answer": (
        lambda: sample(flow_map_model(lambda x, s, t: x[:, :2], shape=SHAPE), nfe=1, seeds=[0]),
        r"the network answered shape \(1, 2\) to a state of shape \(1, 3\)",
    ),
    "arguments": (lambda: sample(flow_map_model(lambda x, t: x, shape=SHAPE), nfe=1, seeds=[0]), "the network refused a state of shape"),
    "denoiser": (lambda: fewstep.fit(flow_map_model(Net("x12"), shape=SHAPE), nfe=[2]), "Net is a student, which is sampled as it is"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_say_how_to_mend_them(mistake: str) -> None:
    ask, says = MISTAKES[mistake]
    with pytest.raises(FewstepError, match=says):
        ask()


def test_errors_of_models_are_model_errors() -> None:
    with pytest.raises(ModelError):
        flow_map_model(Net("x12"), "other", shape=SHAPE)


def test_a_flow_map_and_its_model_have_one_network() -> None:
    """Another network would be in the fingerprint and answer nothing."""
    model = flow_map_model(Net("x12"), shape=SHAPE)
    for change in (lambda: model.with_network(Net("x12")), lambda: replace(model, network=Net("x12"))):
        with pytest.raises(ModelError, match="has a flow map that calls another network, .* make the model anew"):
            change()
    other, flow_map = Net("x12"), model.flow_map
    assert isinstance(flow_map, VelocityMap)
    assert model.with_network(other, flow_map=replace(flow_map, network=other)).fingerprint != ""


@pytest.mark.parametrize("of", ["theirs", "ours", "first order"])
def test_a_jump_between_other_times_is_refused(of: str) -> None:
    """As `sample` refuses them: no answer is invented."""
    found, x = load_model("digits-flow-map"), torch.zeros(2, 1, 8, 8)
    teacher = load_model("digits-edm")
    flow_map = {
        "theirs": flow_map_model(lambda x, t, r: x, shape=(1, 8, 8)).flow_map,
        "ours": found.flow_map,
        "first order": FirstOrderMap(teacher),
    }[of]
    assert flow_map is not None
    cond, (high, low) = (None if of == "theirs" else torch.tensor([0, 1])), flow_map.schedule.ends
    middle, nan = (high + low) / 2, high * torch.nan
    for s, t, says in (
        (middle, high, "leads from s to a time t nearer to the image, not from"),
        (nan, low, "leads from s to a time t nearer to the image, not from nan"),
        (high, nan, "nearer to the image, not from .* to nan"),
        *(((2 * high, low, "knows times from"), (high, low - 1, "knows times from")) if of != "first order" else ()),
        (torch.stack([high, middle]), torch.stack([low, high]), "nearer to the image, not from"),
        (1.0, 0.5, "s is a time of the jump, .*, not a float: pass torch.tensor"),
        (high, torch.tensor(0), "t is a time of the jump, .*, not a int64"),
        (high.expand(3), low, "one for each of 2 samples, got shape \\(3,\\)"),
    ):
        with pytest.raises(FewstepError, match=says):
            flow_map(x, s, t, cond)
    assert_close(flow_map(x, high, torch.stack([low, low]), cond), flow_map(x, high, low, cond))


@pytest.mark.parametrize("network", [lambda x, t, r: {"v": x}, lambda x, t, r: x.mul_(2)], ids=["a dict", "in place"])
def test_a_network_that_has_to_be_called_otherwise_is_told_its_own_call(network: Any) -> None:
    with pytest.raises(ModelError, match=r"pass call=lambda net, x, s, t, cond: net\(x(.clone\(\))?, s, t\)"):
        sample(flow_map_model(network, shape=SHAPE), nfe=1, seeds=[0])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"call": 3}, "call is a function"),
        ({"scale": 0.0}, "scale is the unit of the network's times, a positive number, as 1000, got 0"),
        ({"scale": float("nan")}, "scale is a number"),
        ({"to_data": "no"}, "to_data is True or False, got 'no'"),
        ({"duration": 1}, "duration is True or False, got 1"),
    ],
)
def test_a_convention_is_checked_when_it_is_made(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        VelocityForm(**{"call": state_first, **wrong})
