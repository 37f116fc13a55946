"""Derivatives of a network along a direction, by whatever the network allows: forward mode, two reverse passes, or differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

from fewstep.runtime.errors import ModelError, first_line, look_up

__all__ = ["JVP_METHODS", "Derivative", "choose_jvp", "differentiable"]

Function = Callable[[Tensor, Tensor], Tensor]  # (x [B, *D], lam []) -> [B, *D]
Pair = tuple[Tensor, Tensor]
Derivative = Callable[[Function, Pair, Pair, float], Pair]  # (function, point, direction, scale) -> (value, derivative)
JVPMethod = Literal["auto", "forward", "reverse", "difference"]

AGREEMENT = 0.1  # relative: what a derivative may differ from a difference by before it is taken to be wrong
DIFFERENCE = 0.05  # of the scale on which the function bends
ROUND_OFF = 1e-3  # of the state's size: a smaller step would be lost in float32


@contextmanager
def differentiable() -> Iterator[None]:
    """Give attention and group normalisation of any network forward-mode derivatives, within the context.

    PyTorch's fused attention kernels have none, and the kernel of GroupNorm needs contiguous inputs.
    """

    def contiguous(module: nn.Module, inputs: Any) -> Any:  # noqa: ANN401 - whatever a module is called with
        if not isinstance(module, nn.GroupNorm):
            return None
        return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in inputs)

    handle = register_module_forward_pre_hook(contiguous)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # PyTorch's own use: as an error it would refuse this
            yield
    finally:
        handle.remove()


def _forward(function: Function, point: Pair, direction: Pair, scale: float) -> Pair:
    """Differentiate in forward mode: one pass with dual numbers."""
    with torch.no_grad(), differentiable():
        value, derivative = torch.func.jvp(function, point, direction)[:2]
    return value, derivative


def _reverse(function: Function, point: Pair, direction: Pair, scale: float) -> Pair:
    """Differentiate by two reverse passes: ``u -> J^T u`` is linear, so its gradient along the direction is ``J`` times the direction."""
    with torch.enable_grad(), differentiable():
        x, lam = (value.detach().clone().requires_grad_() for value in point)
        value = function(x, lam)
        dual = torch.zeros_like(value, requires_grad=True)
        pulled_x, pulled_lam = torch.autograd.grad(value, (x, lam), dual, create_graph=True, materialize_grads=True)
        along = (pulled_x * direction[0]).sum() + (pulled_lam * direction[1]).sum()
        (derivative,) = torch.autograd.grad(along, dual, materialize_grads=True)
    return value.detach(), derivative


@torch.no_grad()
def _difference(function: Function, point: Pair, direction: Pair, scale: float) -> Pair:
    """Take a central difference, with a step in proportion to ``scale`` but above the rounding of the state."""
    size = float(direction[0].square().mean().sqrt().clamp_min(1e-12))
    h = max(DIFFERENCE * scale, ROUND_OFF * float(point[0].square().mean().sqrt())) / size
    ahead, behind = (function(point[0] + step * direction[0], point[1] + step * direction[1]) for step in (h, -h))
    return function(*point), (ahead - behind) / (2 * h)


JVP_METHODS: dict[str, Derivative] = {"forward": _forward, "reverse": _reverse, "difference": _difference}


def choose_jvp(function: Function, point: Pair, direction: Pair, scale: float, method: str = "auto") -> str:
    """Return the first of `JVP_METHODS` whose derivative of this function agrees with a central difference.

    Args:
        function: ``(x [B, *D], lam []) -> [B, *D]``.
        point: where to differentiate, ``(x, lam)``.
        direction: the direction to differentiate along, likewise.
        scale: the size of a change of ``x`` over which the function bends.
        method: the only one to try, or ``auto`` for all of them.

    Raises:
        ModelError: none works; the message says why for each.
    """
    if method != "auto":
        look_up(method, JVP_METHODS, "way to differentiate", ModelError)
    reasons = {}
    try:
        expected = _difference(function, point, direction, scale)[1]
    except Exception as error:
        raise ModelError(f"the network cannot be evaluated: {str(error) or type(error).__name__}") from error
    if not bool(torch.isfinite(expected).all()):
        raise ModelError(f"the network is not finite (NaN or infinite) at noise level {scale:.4g}: check its weights and dtype")
    for name in JVP_METHODS if method == "auto" else (method,):
        try:
            # a difference is judged by one of another step, which a network that is not smooth or not deterministic does not pass
            found = JVP_METHODS[name](function, point, direction, scale / 2 if name == "difference" else scale)[1]
        except Exception as error:  # whatever a network's own code raises when it cannot be differentiated
            reasons[name] = first_line(error)
            continue
        off = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
        if off <= AGREEMENT:
            return name
        reasons[name] = f"differs from a central difference by {100 * off:.0f} %"
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ModelError(f"the network cannot be differentiated ({why}): see that it is deterministic and has no in-place or no-grad parts")
