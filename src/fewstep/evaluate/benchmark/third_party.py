"""Run third-party samplers: Python functions with the signature of k-diffusion's samplers.

    f(model, x, sigmas, extra_args=None, callback=None, disable=None) -> x

``x [B, *D]`` is the state ``x/alpha`` (variance exploding) at ``sigmas[0]``; ``sigmas [M+1]`` are the grid's noise levels, the last one 0
if the grid ends clean; ``model(x, sigma)`` with ``sigma [B]`` or ``[]`` is the denoised image. The function returns the state at the last
level.
"""

from __future__ import annotations

import hashlib
import inspect
import marshal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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

__all__ = ["SIGNATURE", "ThirdPartySampler", "run_third_party"]

SIGNATURE = "f(model, x, sigmas, extra_args=None, callback=None, disable=None)"
STREAM = 2**62  # beyond the seeds that starts are drawn from, one by one
SAME_LEVEL = 1e-6  # relative: a level of the grid that was rounded to float32


@dataclass(frozen=True)
class ThirdPartySampler:
    """A sampler of another library.

    Attributes:
        module: the ``library`` of its rows.
        name: the ``solver`` of its rows.
        function: the sampler itself.
        fingerprint: a hash of its source; None where it has none.
    """

    module: str
    name: str
    function: Callable[..., Any]
    fingerprint: str | None

    @classmethod
    def load(cls, entry: str) -> ThirdPartySampler:
        """Import the function ``module:function``; modules in the working directory are found too.

        Raises:
            FewstepError: the module cannot be imported, or has no such function (and why).
        """
        module, _, name = entry.partition(":")
        if module in ("fewstep", "diffusers"):
            raise FewstepError(f"{entry!r} names no sampler: say module:function, as my_samplers:sample_euler")
        function = imported(entry)
        return cls(module, name, function, _hashed(_source(function, module)))

    @classmethod
    def of(cls, function: Callable[..., Any]) -> ThirdPartySampler:
        """Wrap a function object.

        Raises:
            FewstepError: it cannot be called with the arguments of `SIGNATURE`.
        """
        bare = _bare(function)
        module, name = str(getattr(bare, "__module__", None) or "__main__"), str(getattr(bare, "__name__", type(bare).__name__))
        try:
            inspect.signature(function).bind(None, None, None, extra_args={}, callback=None, disable=True)
        except TypeError as error:
            raise FewstepError(
                f"{name} cannot be called as a sampler ({error}): give it the signature of k-diffusion's, {SIGNATURE}"
            ) from None
        except ValueError:  # a function without a signature, written in C
            pass
        if getattr(sys.modules.get(module), name, None) is function:
            return cls(module, name, function, _hashed(_source(function, module)))
        return cls(module, name.strip("<>"), function, _hashed(_source(bare, module), *_contents(function, bare)))


def _bare(function: Callable[..., Any]) -> Any:  # noqa: ANN401 - a function, or the class of an object that can be called
    """Return what was written down as source: the function of a partial or method, the class of a callable object."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    return function if hasattr(function, "__name__") else type(function)


def _source(function: Any, module: str) -> bytes | None:  # noqa: ANN401
    """Return the source file of a function; None where there is none."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # not written in Python
        path = getattr(sys.modules.get(module), "__file__", None)
    return None if path is None or not Path(path).is_file() else Path(path).read_bytes()


def _contents(function: Callable[..., Any], bare: Any) -> list[bytes]:  # noqa: ANN401
    """Return what tells functions of one source file apart: the code, the variables it closes over and the arguments it is bound to.

    An object that shows its address is another one in every process, so its rows are run again: more often than needed, never too seldom.
    """
    code, cells = getattr(bare, "__code__", None), getattr(bare, "__closure__", None) or ()
    bound = [getattr(cell, "cell_contents", None) for cell in cells]
    bound += [getattr(function, name, None) for name in ("args", "keywords", "__self__", "__dict__")]
    return [b"" if code is None else marshal.dumps(code), *(repr(value).encode() for value in bound)]


def _hashed(source: bytes | None, *contents: bytes) -> str | None:
    if source is None and not any(contents):
        return None
    return hashlib.sha256(b"".join([source or b"", *contents])).hexdigest()[:16]


class _Denoised:
    """A denoiser as k-diffusion's samplers call a model."""

    def __init__(self, denoiser: Denoiser, nodes: Nodes, cond: Cond) -> None:
        self.denoiser, self.nodes, self.cond = denoiser, nodes, cond
        self.level = nodes.sigma / nodes.alpha

    def __call__(self, x: Tensor, sigma: Tensor | float, **_: object) -> Tensor:
        """Return the denoised image ``[B, *D]`` for the state ``x [B, *D]`` at ``sigma [B]`` or ``[]``."""
        levels = torch.as_tensor(sigma).detach().double().cpu().reshape(-1)
        times = torch.stack([self._time(level) for level in levels.unique()])
        t = times[0] if len(times) == 1 else times[levels.unique(return_inverse=True)[1]]
        alpha = self.denoiser.schedule.alpha(t)
        return self.denoiser((aligned(alpha.to(x.device), x) * x).to(x.dtype), t, self.cond)

    def _time(self, level: Tensor) -> Tensor:
        """Return the time of a noise level: the grid's own where it has that level, exactly."""
        nearest = int((self.level - level).abs().argmin())
        if bool((self.level[nearest] - level).abs() <= SAME_LEVEL * self.level[nearest]):
            return self.nodes.t[nearest]
        if not float(level) > 0:
            raise FewstepError(f"the model was asked for a denoised image at sigma = {float(level):g}")
        return self.denoiser.schedule.t_of_lam(-torch.log(level))


def run_third_party(sampler: ThirdPartySampler, denoiser: Denoiser, grid: TimeGrid, x: Tensor, cond: Cond, seeds: Sequence[int]) -> Tensor:
    """Sample from ``x [B, *D]`` at the grid's first time to its last. ``[B, *D]``.

    Random numbers from torch's own generators follow from the first seed, and are none of those that a start is drawn from.

    Raises:
        SolverError: the grid begins at ``alpha = 0``, where ``x/alpha`` is infinite.
        FewstepError: it answers something that is no tensor of the shape of ``x``, or tries to end the program.
        Exception: whatever it raises itself.
    """
    nodes = Nodes.at(denoiser.schedule, grid.t)
    if float(nodes.alpha[0]) == 0:
        raise SolverError(f"{sampler.module}:{sampler.name} cannot start at alpha = 0 (t = {nodes.t[0]:g}): start the grid later")
    state = x.to(torch.promote_types(x.dtype, torch.float32)) / nodes.alpha[0]
    model = _Denoised(denoiser, nodes, cond)
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(STREAM + seeds[0])
        try:
            made = sampler.function(model, state, model.level.to(state.dtype).to(state.device), extra_args={}, callback=None, disable=True)
        except SystemExit as end:
            raise FewstepError(f"{sampler.module}:{sampler.name} tried to end the program (SystemExit: {end})") from end
    if not isinstance(made, Tensor) or made.shape != x.shape:
        what = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        raise FewstepError(f"{sampler.module}:{sampler.name} answered {what} to a state of shape {tuple(x.shape)}")
    return made.to(state.dtype) * nodes.alpha[-1]
