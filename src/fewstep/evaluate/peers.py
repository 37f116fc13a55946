"""Other libraries' samplers on the same model, the same noise and the same times: what this library's numbers are compared with.

A peer is one of diffusers' scheduler classes. Its own ``step`` does the arithmetic; it is only told at which noise levels
``sigma/alpha`` to work, by putting them where its tables are, so any grid and any noise law can be compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.core.errors import FewstepError, SolverError, look_up
from fewstep.core.grid import TimeGrid
from fewstep.core.sampling import Cond, Denoiser
from fewstep.core.tableau import Nodes
from fewstep.solvers import make_solver

__all__ = ["PEERS", "Peer", "peer_steps", "run_peer"]


@dataclass(frozen=True)
class Peer:
    """A scheduler class of diffusers and how it is used.

    Args:
        scheduler: the name of the class.
        options: what it is made with, beside its defaults.
        exploding: its state is ``x/alpha``; that of the others is ``x/sqrt(alpha^2 + sigma^2)``, as for a variance-preserving law.
        to_clean: whether its formulas are finite in a step to ``sigma = 0``.
    """

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    exploding: bool = False
    to_clean: bool = True


# The names are those of this library's solvers, whose defaults are the same formulas with the same order at each step.
PEERS: dict[str, Peer] = {
    "ddim": Peer("DDIMScheduler", {"clip_sample": False}),
    "dpm-solver-pp-2m": Peer("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpm-solver-pp-3m": Peer("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc-2": Peer("UniPCMultistepScheduler", {"solver_order": 2}),
    "unipc-3": Peer("UniPCMultistepScheduler", {"solver_order": 3}),
    "deis-3": Peer("DEISMultistepScheduler", {"solver_order": 3}, to_clean=False),
    "heun": Peer("HeunDiscreteScheduler", exploding=True),
    "euler": Peer("EulerDiscreteScheduler", exploding=True),
}


def peer_steps(name: str, nfe: int, *, to_clean: bool = False) -> int:
    """Grid intervals with which the peer makes exactly ``nfe`` evaluations; ``to_clean`` if the grid ends at ``sigma = 0``.

    Raises:
        SolverError: an unknown peer, or a number it cannot make: an odd one for Heun (an even one ``to_clean``).
    """
    look_up(name, PEERS, "peer", SolverError)
    return make_solver(name).steps_for(nfe, to_clean=to_clean)


def run_peer(name: str, denoiser: Denoiser, grid: TimeGrid, x: Tensor, cond: Cond = None) -> Tensor:
    """Sample with another library's sampler from ``x [B, *D]`` at the grid's first time to its last. ``[B, *D]``.

    The state is kept in the dtype of ``x``, at least float32, and the levels in float64; diffusers' Euler and DPM-Solver
    round the state to float32 in every step themselves. The evaluations are made where this library's solver of the same
    name makes them. For Heun's method that is a use diffusers does not know: its own grids end at ``sigma = 0`` with an Euler
    step, but if the last level is given twice it evaluates there as anywhere else.

    Args:
        name: one of `PEERS`.
        denoiser: any model; the scheduler is told its answers ``x0``.
        grid: any times of the denoiser's schedule with ``alpha > 0``.
        x: start.
        cond: handed to the denoiser unchanged.

    Raises:
        SolverError: an unknown peer, or a grid that its formulas have no finite numbers for.
        FewstepError: diffusers is not installed.
    """
    peer = look_up(name, PEERS, "peer", SolverError)
    nodes = make_solver(name).nodes(grid, denoiser.schedule)
    if float(nodes.alpha[0]) == 0:
        raise SolverError(f"diffusers' {peer.scheduler} cannot start at alpha = 0 (t = {nodes.t[0]:g}): start the grid later")
    if float(nodes.sigma[-1]) == 0 and not peer.to_clean:
        raise SolverError(f"diffusers' {peer.scheduler} cannot step to sigma = 0 (t = {nodes.t[-1]:g}): end the grid earlier")
    scheduler = _scheduler(peer, nodes)
    norm = torch.sqrt(nodes.alpha**2 + nodes.sigma**2)
    first, last = (nodes.alpha[[0, -1]] if peer.exploding else norm[[0, -1]]).unbind()
    state = x.to(torch.promote_types(x.dtype, torch.float32)) / first
    for i, timestep in enumerate(scheduler.timesteps):
        variance_preserving = scheduler.scale_model_input(state, timestep)
        x0 = denoiser(variance_preserving * norm[i], nodes.t[i], cond)
        with _numpy_1():
            state = scheduler.step(x0.to(state.dtype), timestep, state).prev_sample
    return state * last


@contextmanager
def _numpy_1() -> Iterator[None]:
    """For diffusers' code that hands tensors to numpy in ways that numpy 2 deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _scheduler(peer: Peer, nodes: Nodes) -> Any:  # noqa: ANN401 - one of diffusers' classes, which is not always installed
    """The peer's scheduler with the levels of ``nodes [N+1]`` in its tables, to be stepped ``N`` times."""
    try:
        import diffusers
    except ImportError as error:
        raise FewstepError("comparing with diffusers needs it installed: pip install 'fewstep[diffusers]'") from error
    count, level = nodes.evaluations, nodes.sigma / nodes.alpha
    options = {"num_train_timesteps": count, "prediction_type": "sample", **peer.options}
    if peer.scheduler == "DPMSolverMultistepScheduler":  # with "zero" its last step is of first order wherever it leads
        options["final_sigmas_type"] = "zero" if float(level[-1]) == 0 else "sigma_min"
    with _numpy_1():
        scheduler = getattr(diffusers, peer.scheduler)(**options)
        scheduler.set_timesteps(count)
    if peer.scheduler == "DDIMScheduler":  # its timesteps N-1 .. 0 index its table, and the step from 0 leads to the final one
        alphas_cumprod = 1 / (1 + level**2)
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = alphas_cumprod[:-1].flip(0), alphas_cumprod[-1]
    else:
        scheduler.sigmas, scheduler.timesteps = level, nodes.t[:-1]
        scheduler.set_begin_index(0)  # count the steps: times may repeat
    return scheduler
