"""Anybody's sampler beside the others: a Python function with the signature of k-diffusion's samplers, named ``module:function``.

    f(model, x, sigmas, extra_args=None, callback=None, disable=None) -> x

``x [B, *D]`` is the state ``x/alpha`` (variance exploding) at ``sigmas[0]``; ``sigmas [M+1]`` are the grid's noise levels, the last one 0
if the grid ends clean; ``model(x, sigma)`` with ``sigma [B]`` or ``[]`` is the denoised image. What comes back is the state at the last
level.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import aligned
from fewstep.core.tableau import Nodes
from fewstep.runtime.entry import imported
from fewstep.runtime.errors import FewstepError, SolverError

__all__ = ["Guest", "load_third_party", "run_third_party"]

SAME_LEVEL = 1e-6  # relative: a level of the grid that was rounded to float32


@dataclass(frozen=True)
class Guest:
    """A sampler of another library: its row's ``library`` is the module, its ``solver`` the function."""

    module: str
    name: str
    function: Callable[..., Any]
    fingerprint: str | None  # of the function's source file


def load_third_party(entry: str) -> Guest:
    """The function that ``module:function`` names; modules in the working directory are found too.

    Raises:
        FewstepError: the module cannot be imported, or has no such function (and why).
    """
    module, _, name = entry.partition(":")
    if module in ("fewstep", "diffusers"):
        raise FewstepError(f"{entry!r} names no sampler: say module:function, as my_samplers:sample_euler")
    function = imported(entry)
    return Guest(module, name, function, _source_fingerprint(function, module))


def _source_fingerprint(function: Callable[..., Any], module: str) -> str | None:
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # not written in Python
        path = getattr(sys.modules[module], "__file__", None)
    if path is None or not Path(path).is_file():
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


class _Denoised:
    """The denoiser as k-diffusion's samplers call a model."""

    def __init__(self, denoiser: Denoiser, nodes: Nodes, cond: Cond) -> None:
        self.denoiser, self.nodes, self.cond = denoiser, nodes, cond
        self.level = nodes.sigma / nodes.alpha

    def __call__(self, x: Tensor, sigma: Tensor | float, **_: object) -> Tensor:
        """The denoised image ``[B, *D]`` for the state ``x [B, *D]`` at ``sigma [B]`` or ``[]``."""
        levels = torch.as_tensor(sigma).detach().double().cpu().reshape(-1)
        times = torch.stack([self._time(level) for level in levels.unique()])
        t = times[0] if len(times) == 1 else times[levels.unique(return_inverse=True)[1]]
        alpha = self.denoiser.schedule.alpha(t)
        return self.denoiser((aligned(alpha.to(x.device), x) * x).to(x.dtype), t, self.cond)

    def _time(self, level: Tensor) -> Tensor:
        nearest = int((self.level - level).abs().argmin())
        if bool((self.level[nearest] - level).abs() <= SAME_LEVEL * self.level[nearest]):
            return self.nodes.t[nearest]
        if not float(level) > 0:
            raise FewstepError(f"the model was asked for a denoised image at sigma = {float(level):g}")
        return self.denoiser.schedule.t_of_lam(-torch.log(level))


def run_third_party(sampler: Guest, denoiser: Denoiser, grid: TimeGrid, x: Tensor, cond: Cond, seeds: Sequence[int]) -> Tensor:
    """Sample from ``x [B, *D]`` at the grid's first time to its last. ``[B, *D]``.

    Whatever it draws from torch's own generators follows from the first seed.

    Raises:
        SolverError: the grid begins at ``alpha = 0``, where ``x/alpha`` is infinite.
        FewstepError: it answers something that is no tensor of the shape of ``x``.
        Exception: whatever it raises itself.
    """
    nodes = Nodes.at(denoiser.schedule, grid.t)
    if float(nodes.alpha[0]) == 0:
        raise SolverError(f"{sampler.module}:{sampler.name} cannot start at alpha = 0 (t = {nodes.t[0]:g}): start the grid later")
    state = x.to(torch.promote_types(x.dtype, torch.float32)) / nodes.alpha[0]
    model = _Denoised(denoiser, nodes, cond)
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seeds[0])
        made = sampler.function(model, state, model.level.to(state.dtype).to(state.device), extra_args={}, callback=None, disable=True)
    if not isinstance(made, Tensor) or made.shape != x.shape:
        what = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        raise FewstepError(f"{sampler.module}:{sampler.name} answered {what} to a state of shape {tuple(x.shape)}")
    return made.to(state.dtype) * nodes.alpha[-1]
