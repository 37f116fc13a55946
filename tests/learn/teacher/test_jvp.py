"""Derivatives through networks: right through attention and group normalisation, and by the first way that a network allows."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import _global_forward_pre_hooks

from fewstep import Model, ModelError, load_model
from fewstep.core.prediction import aligned
from fewstep.learn.teacher.jvp import JVP_METHODS, choose_jvp, differentiable
from fewstep.models.zoo import BUNDLED

DENOISERS = [name for name in BUNDLED if name != "digits-flow-map"]  # which answers for steps

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode of some PyTorch releases says so
F64 = torch.float64
FLOAT32 = 1e-4  # relative: hundreds of float32 operations, and the differences' own error; measured 1e-6 to 1e-5
COARSE = 0.03  # of a central difference over a twentieth of the noise level, the step that `difference` takes
STEP = 0.01  # of the noise level, and in lam: there fourth-order differences of a float64 network are right to 1e-5


@cache
def _problem(name: str) -> tuple[Model, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, Tensor]:
    """A bundled model, ``(X, lam) -> D``, and a state, a level and a direction in the middle of its range."""
    model = load_model(name)
    schedule, labels = model.schedule, model.labels(range(2))
    assert any("Attn" in type(module).__name__ for module in model.network.modules())

    def function(X: Tensor, lam: Tensor) -> Tensor:  # noqa: N803
        t = schedule.t_of_lam(lam)
        return model(X * aligned(schedule.alpha(t), X), t, labels)

    t = torch.tensor(0.5 if name == "digits-edm" else 64.5, dtype=F64)  # of the table: the middle of a segment
    lam = schedule.lam(t)
    X, v = torch.randn(2, 2, *model.shape, generator=torch.Generator().manual_seed(0))  # noqa: N806
    return model, function, X, lam, v


def _exactly(model: Model, function: Callable[[Tensor], Tensor], h: float) -> Tensor:
    """The derivative of a function of one number at 0: a fourth-order difference of the float64 network."""
    model.network.double()
    wide, narrow = (function(torch.tensor(k * h, dtype=F64)) - function(torch.tensor(-k * h, dtype=F64)) for k in (2.0, 1.0))
    model.network.float()
    return (8 * narrow - wide) / (12 * h)


def _off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.every(3)
def test_derivatives_in_the_state_are_right_through_attention(name: str) -> None:
    model, function, X, lam, v = _problem(name)  # noqa: N806
    exact = _exactly(model, lambda h: function(X.double() + h * v.double(), lam), STEP * float(torch.exp(-lam)))
    value = function(X, lam)
    for method, allowed in {"forward": FLOAT32, "reverse": FLOAT32, "difference": COARSE}.items():
        same, found = JVP_METHODS[method](function, (X, lam), (v, torch.zeros_like(lam)), float(torch.exp(-lam)))
        assert _off(found, exact) < allowed, method
        assert _off(same, value) < FLOAT32 and not found.requires_grad and not same.requires_grad


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.every(3)
def test_derivatives_in_the_noise_level_are_right(name: str) -> None:
    model, function, X, lam, v = _problem(name)  # noqa: N806
    still, one = torch.zeros_like(v), torch.ones_like(lam)
    h = STEP
    if name == "digits-ddpm":  # the angle is linear in t within a segment and bends between two: stay in its inner half
        ends = model.schedule.lam(torch.tensor([65.0, 64.0], dtype=F64))
        h = float(ends[1] - ends[0]) / 8
    exact = _exactly(model, lambda step: function(X.double(), lam + step), h)
    for method in ("forward", "reverse"):
        assert _off(JVP_METHODS[method](function, (X, lam), (still, one), 1.0)[1], exact) < FLOAT32, method


def test_all_three_ways_agree_along_a_trajectory() -> None:
    _, function, X, lam, _ = _problem("digits-edm")  # noqa: N806
    direction = (function(X, lam) - X, torch.ones_like(lam))
    found = {name: way(function, (X, lam), direction, float(torch.exp(-lam)))[1] for name, way in JVP_METHODS.items()}
    assert _off(found["reverse"], found["forward"]) < FLOAT32
    assert _off(found["difference"], found["forward"]) < COARSE


def test_the_context_leaves_nothing_behind() -> None:
    before, fused = dict(_global_forward_pre_hooks), torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(ZeroDivisionError), differentiable():
        assert len(_global_forward_pre_hooks) == len(before) + 1 and not torch.backends.cuda.flash_sdp_enabled()
        raise ZeroDivisionError
    assert dict(_global_forward_pre_hooks) == before and torch.backends.cuda.flash_sdp_enabled() == fused


# -- which way -------------------------------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """With derivatives of any order, but none in forward mode."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Opaque(Cube):
    """Without any derivative, and random."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.randn_like(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        raise RuntimeError("not to be differentiated")


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
LAM = torch.tensor(0.3, dtype=F64)
HERE = ((X, LAM), (torch.where(X.roll(1) > 0, 1.0, -1.0), torch.zeros_like(LAM)), 0.5)


@pytest.mark.parametrize(
    ("function", "way"),
    [
        (lambda x, lam: torch.sin(x) * lam, "forward"),
        (torch.no_grad()(lambda x, lam: torch.sin(x) * lam), "forward"),  # which forward mode does not mind
        (lambda x, lam: Cube.apply(x) * lam, "reverse"),
        (lambda x, lam: torch.sin(x.detach()) * lam, "difference"),  # both derivatives exist, and are zero
        (lambda x, lam: torch.from_numpy(x.detach().numpy() ** 2), "difference"),
    ],
    ids=["smooth", "no-grad", "no-forward-mode", "detached", "numpy"],
)
def test_the_first_way_that_works_is_taken(function: Callable, way: str) -> None:
    assert choose_jvp(function, *HERE) == way
    assert choose_jvp(function, *HERE, "difference") == "difference"


@pytest.mark.parametrize(
    ("function", "reasons"),
    [
        (lambda x, lam: x + torch.randn_like(x), ("differs from a central difference",) * 3),
        (lambda x, lam: torch.round(8 * x) / 8, ("differs from a central difference by 100 %",) * 3),
        (
            lambda x, lam: Opaque.apply(x),
            ("You must implement the jvp function", "not to be differentiated", "differs from a central difference"),
        ),
    ],
    ids=["random", "piecewise-constant", "raising"],
)
def test_what_has_no_derivative_is_refused_with_a_reason_for_each_way(function: Callable, reasons: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError) as refused:
        choose_jvp(function, *HERE)
    for way, reason in zip(JVP_METHODS, reasons, strict=True):
        assert f"{way}: {reason}" in str(refused.value)
    assert "deterministic" in str(refused.value)


def test_a_way_that_is_asked_for_is_taken_or_refused() -> None:
    with pytest.raises(ModelError, match="forward: You must implement the jvp function") as refused:
        choose_jvp(lambda x, lam: Cube.apply(x), *HERE, "forward")
    assert "reverse:" not in str(refused.value)
    with pytest.raises(ModelError, match="unknown way to differentiate 'forwardd'.*forward"):
        choose_jvp(lambda x, lam: x, *HERE, "forwardd")
