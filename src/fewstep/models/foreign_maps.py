r"""Flow maps that others have trained, as models to sample: networks that answer the mean velocity between two times.

Their trajectories are those of a rectified flow, ``z_u = (1 - u) x0 + u n``, and one call leads from any time of it to any other,

    z' = z + (tau' - tau) v(z, tau, tau'),

where ``tau`` is the network's own time: ``u`` itself, or ``1 - u`` where time runs to the data. Families differ in that, in the order of a
call's arguments, in whether it is told the other time or the duration, and in the unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.core.condition import check_batch
from fewstep.core.denoiser import Cond, FlowMap, check_jump
from fewstep.core.prediction import aligned
from fewstep.core.schedule import NoiseSchedule, RectifiedFlow
from fewstep.models.model import Model
from fewstep.models.networks.calls import answer_of, network_dtype, refusals, unwritten
from fewstep.runtime.errors import ModelError, SolverError, look_up
from fewstep.runtime.front_door import checked, number

__all__ = ["VELOCITY_FORMS", "VelocityForm", "VelocityMap", "flow_map_model"]

TIMES = "s, t"  # as errors call them
VelocityCall = Callable[[Any, Tensor, Tensor, Tensor, Cond], Any]  # (network, x [B, *D], from [B], to [B], cond) -> v [B, *D]


def state_first(network: Callable[..., Any], x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Any:  # noqa: ANN401 - a network's answer
    """Call ``network(x, s, t)``, or ``network(x, s, t, cond)`` when there is a condition."""
    return network(x, s, t) if cond is None else network(x, s, t, cond)


def times_first(network: Callable[..., Any], x: Tensor, s: Tensor, t: Tensor, cond: Cond) -> Any:  # noqa: ANN401 - a network's answer
    """Call ``network(s, t, x)``, or ``network(s, t, x, cond)`` when there is a condition."""
    return network(s, t, x) if cond is None else network(s, t, x, cond)


@dataclass(frozen=True)
class VelocityForm:
    """The convention of a family of flow maps.

    Attributes:
        call: how its networks are called, ``(network, x, from, to, cond) -> v``.
        to_data: whether their time is 0 at noise and 1 at the data, not the other way round.
        scale: the unit of the times that they are told, as 1000.
        duration: whether they are told the time between the two in the place of the second.
        about: where it comes from.

    Raises:
        ModelError: a call that is no function, a unit that is not positive, or a switch that is none.
    """

    call: VelocityCall
    to_data: bool = False
    scale: float = 1.0
    duration: bool = False
    about: str = ""

    def __post_init__(self) -> None:
        if not callable(self.call):
            raise ModelError(f"call is a function (network, x, from, to, cond) -> velocity, got {self.call!r}")
        if not 0 < number(self.scale, "scale", ModelError) < math.inf:
            raise ModelError(f"scale is the unit of the network's times, a positive number, as 1000, got {self.scale}")
        for name in ("to_data", "duration"):
            if not isinstance(getattr(self, name), bool):
                raise ModelError(f"{name} is True or False, got {getattr(self, name)!r}")


VELOCITY_FORMS = {
    "meanflow": VelocityForm(state_first, about="MeanFlow, arXiv 2505.13447"),
    "meanflow-duration": VelocityForm(state_first, duration=True, about="MeanFlow told t and t - r"),
    "self-distillation": VelocityForm(
        times_first, to_data=True, about="flow map matching and self-distillation, arXiv 2406.07505, 2505.18825"
    ),
    "diffusers": VelocityForm(state_first, scale=1000.0, about="diffusers' FlowMapEulerDiscreteScheduler, as AnyFlow"),
}


@dataclass(frozen=True, eq=False)
class VelocityMap(FlowMap):
    """The flow map of a network that answers mean velocities.

    Attributes:
        network: the module or function.
        form: its convention.
        law: the rectified flow whose trajectories it follows.
        dtype: the dtype that it computes in; by default its own.
    """

    network: Callable[..., Any] = field(repr=False)
    form: VelocityForm
    law: RectifiedFlow
    dtype: torch.dtype | None = None

    @property
    def called(self) -> object:
        return self.network

    @property
    def anywhere(self) -> bool:
        return True

    @property
    def schedule(self) -> NoiseSchedule:
        return self.law

    @property
    def definition(self) -> tuple[Any, ...]:
        return "mean velocity", *astuple(self.form)[:-1], str(self.dtype)

    def __call__(self, x: Tensor, s: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        check_batch(cond, len(x))
        s, t = check_jump(self, x, s, t)
        form, dtype = self.form, self.dtype or network_dtype(self.network, x.dtype)
        first, last = (1 - self.law.sigma(time) if form.to_data else self.law.sigma(time) for time in (s, t))
        kind = torch.promote_types(dtype, torch.float32)
        other = (last - first).abs() if form.duration else last
        here, there = ((form.scale * time).to(kind).to(x.device).expand(len(x)) for time in (first, other))
        with refusals(x), unwritten(x, TIMES):
            velocity = answer_of(form.call(self.network, x.to(dtype), here, there, cond), x, TIMES)
        return x + aligned(last - first, x) * velocity.to(x.dtype)

    def arithmetic(self, t: Tensor) -> float:
        return float(len(t) - 1)

    def check(self, t: Tensor) -> None:
        first, last = self.law.ends
        slack = 1e-9 * (first - last)
        if not bool(((t <= first + slack) & (t >= last - slack)).all()):
            raise SolverError(f"this flow map knows times from {first:g} to {last:g}, not {t[0]:g} to {t[-1]:g}: use a grid between them")


@checked
def flow_map_model(
    network: Callable[..., Any],
    kind: str | VelocityForm = "meanflow",
    *,
    shape: tuple[int, ...],
    shift: float = 1.0,
    call: VelocityCall | None = None,
    classes: int | None = None,
    dtype: torch.dtype | None = None,
    identity: str = "",
    name: str = "",
) -> Model:
    """Make a model of a flow map that others have trained, to sample in any number of jumps.

    The network answers the mean velocity ``v`` of a rectified flow between two times, and is called by the convention of its family:

    - ``meanflow`` (arXiv 2505.13447): ``network(x, t, r)`` with noise at time 1, ``z_r = z_t - (t - r) v``;
    - ``meanflow-duration``: the same, told ``t`` and ``t - r``;
    - ``self-distillation`` (arXiv 2406.07505, 2505.18825): ``network(s, t, x)`` with noise at time 0, ``X_st(x) = x + (t - s) v``;
    - ``diffusers``: ``network(x, t, r)`` with times up to 1000, as diffusers' ``FlowMapEulerDiscreteScheduler`` samples it.

    Args:
        network: the module or function; a condition, where there is one, is its last argument. Times are ``[B]``.
        kind: the convention, a key of `VELOCITY_FORMS`, or a `VelocityForm` of one's own.
        shape: the shape of one sample without the batch, ``(C, H, W)``.
        shift: of the times that a grid spaces, as diffusers' schedulers have it: ``uniform`` then has their noise levels.
        call: how to call the network, ``(network, x, from, to, cond) -> v [B, *D]``, where its arguments are others.
        classes: number of class labels, or None without; its guidance is in its weights.
        dtype: the floating dtype that it computes in; by default its own.
        identity: a word that stands for its weights and code, see `Model`.
        name: the model's name in tables and errors; by default the class of the network.

    Raises:
        ModelError: an unknown convention, a shift that is not positive, or values that a `Model` refuses.

    Examples:
        >>> import torch, fewstep
        >>> straight = lambda x, t, r: x / t[:, None]  # all data is 0: the velocity of n t is n
        >>> model = fewstep.flow_map_model(straight, "meanflow", shape=(3,))
        >>> fewstep.sample(model, nfe=1, seeds=range(2))
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """
    if not callable(network):
        raise ModelError(f"a flow map's network is a module or a function, got {type(network).__name__}")
    form = kind if isinstance(kind, VelocityForm) else look_up(kind, VELOCITY_FORMS, "convention of flow maps", ModelError)
    if call is not None:
        form = replace(form, call=call)
    law = RectifiedFlow(number(shift, "shift", ModelError))
    flow_map = VelocityMap(network, form, law, dtype)
    options = {"classes": classes, "dtype": dtype, "identity": identity, "name": name}
    return Model(network, law, "flow", shape=shape, flow_map=flow_map, **options)
