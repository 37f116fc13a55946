"""Run the ODE samplers of diffusers on the same model, the same noise and the same times, to compare this library's with.

A peer is one of diffusers' scheduler classes. Its own ``step`` does the arithmetic; it is only given the noise levels
``sigma/alpha`` to work at, by putting them where its tables are, so any grid and any noise law can be compared. Their Karras,
exponential and beta options are grids here.

Left out, and why:

- The Runge-Kutta start of ``PNDMScheduler`` (``skip_prk_steps=False``): it takes 12 evaluations before the method proper begins, half of
  them at timesteps half-way between those of the grid. ``pndm`` is the class without it, as the pipelines of Stable Diffusion use it.
- ``FlowMatchEulerDiscreteScheduler`` and ``FlowMatchHeunDiscreteScheduler``: they take the network's velocity in a flow's own time.
  On given levels the first is ``euler``; the second averages slopes in that time, so it is another method for every noise law.
- ``algorithm_type="dpmsolver"`` of the DPM-Solver classes: deprecated there.
- ``DDIMParallelScheduler``: the same step as ``ddim``. ``SASolverScheduler``, the ancestral, SDE, consistency, LCM and TCD classes: not
  solvers of the ODE.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import from_x0
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes
from fewstep.runtime.errors import FewstepError, SolverError, look_up
from fewstep.solvers import make_solver

__all__ = ["PEERS", "Peer", "peer_nodes", "peer_steps", "run_peer"]

LIBRARY = "diffusers"


@dataclass(frozen=True)
class Peer:
    """A scheduler class of diffusers and its use here.

    Args:
        scheduler: the name of the class.
        options: what it is made with, beside its defaults.
        exploding: its state is ``x/alpha``; that of the others is ``x/sqrt(alpha^2 + sigma^2)``, as for a variance-preserving law.
        to_clean: whether its formulas are finite in a step to ``sigma = 0``.
        prediction: as what its ``step`` takes the network's answer.
        places: the solver of this library that evaluates at the same times, if it is not that of the same name.
    """

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    exploding: bool = False
    to_clean: bool = True
    prediction: str = "sample"
    places: str | None = None


_EDM = {"prediction": "edm(0.5)", "exploding": True, "places": "euler"}
# Where this library has a solver of the name, its defaults are the same formulas with the same order at each step.
PEERS: dict[str, Peer] = {
    "ddim": Peer("DDIMScheduler", {"clip_sample": False}),
    "dpm-solver-pp-2m": Peer("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpm-solver-pp-3m": Peer("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc-2": Peer("UniPCMultistepScheduler", {"solver_order": 2}),
    "unipc-3": Peer("UniPCMultistepScheduler", {"solver_order": 3}),
    "deis-3": Peer("DEISMultistepScheduler", {"solver_order": 3}, to_clean=False),
    "heun": Peer("HeunDiscreteScheduler", exploding=True),
    "euler": Peer("EulerDiscreteScheduler", exploding=True),
    "ipndm": Peer("IPNDMScheduler", prediction="v"),
    "dpm-solver-2s": Peer("KDPM2DiscreteScheduler", {"prediction_type": "epsilon"}, exploding=True, prediction="epsilon"),
    "dpm-solver-pp-2s": Peer("DPMSolverSinglestepScheduler", {"solver_order": 2}, places="euler"),
    "dpm-solver-pp-3s": Peer("DPMSolverSinglestepScheduler", {"solver_order": 3}, places="euler"),
    "lms": Peer("LMSDiscreteScheduler", exploding=True),
    "pndm": Peer("PNDMScheduler", {"prediction_type": "epsilon", "skip_prk_steps": True}, prediction="epsilon"),
    "edm-euler": Peer("EDMEulerScheduler", {"prediction_type": "epsilon"}, **_EDM),
    "edm-dpm-solver-pp-2m": Peer("EDMDPMSolverMultistepScheduler", {"prediction_type": "epsilon", "solver_order": 2}, **_EDM),
    "edm-dpm-solver-pp-3m": Peer("EDMDPMSolverMultistepScheduler", {"prediction_type": "epsilon", "solver_order": 3}, **_EDM),
}


def peer_steps(name: str, nfe: int, *, to_clean: bool = False) -> int:
    """Return the grid intervals with which the peer makes exactly ``nfe`` evaluations; ``to_clean`` if the grid ends at ``sigma = 0``.

    Raises:
        SolverError: an unknown peer, or a number it cannot make: an odd one for Heun (an even one ``to_clean``), 2 for PNDM.
    """
    return make_solver(look_up(name, PEERS, "peer", SolverError).places or name).steps_for(nfe, to_clean=to_clean)


def peer_nodes(name: str, grid: TimeGrid, schedule: NoiseSchedule) -> Nodes:
    """Return where the peer evaluates on a grid ``[M+1]``: ``[N+1]``, the end last.

    Raises:
        SolverError: an unknown peer.
    """
    return make_solver(look_up(name, PEERS, "peer", SolverError).places or name).nodes(grid, schedule)


def run_peer(name: str, denoiser: Denoiser, grid: TimeGrid, x: Tensor, cond: Cond = None) -> Tensor:
    """Sample with another library's sampler from ``x [B, *D]`` at the grid's first time to its last. ``[B, *D]``.

    The state is kept in the dtype of ``x``, at least float32, and the levels in float64; diffusers' Euler and DPM-Solver
    round the state to float32 in every step themselves. The evaluations are made where this library's solver of the same
    name makes them. For Heun's method and DPM-Solver-2 (``KDPM2DiscreteScheduler``) that is a use diffusers does not know: their own
    grids end at ``sigma = 0`` with an Euler step, but given another last level they step there as anywhere else.

    Args:
        name: one of `PEERS`.
        denoiser: any model; the scheduler is given its answers ``x0``, converted to what its ``step`` takes.
        grid: any times of the denoiser's schedule with ``alpha > 0``.
        x: start.
        cond: handed to the denoiser unchanged.

    Raises:
        SolverError: an unknown peer, or a grid that its formulas have no finite numbers for.
        FewstepError: diffusers is not installed.
    """
    nodes = peer_nodes(name, grid, denoiser.schedule)
    peer = PEERS[name]
    if float(nodes.alpha[0]) == 0:
        raise SolverError(f"diffusers' {peer.scheduler} cannot start at alpha = 0 (t = {nodes.t[0]:g}): start the grid later")
    if float(nodes.sigma[-1]) == 0 and not peer.to_clean:
        raise SolverError(f"diffusers' {peer.scheduler} cannot step to sigma = 0 (t = {nodes.t[-1]:g}): end the grid earlier")
    scheduler = _scheduler(peer, nodes)
    scale = nodes.alpha if peer.exploding else torch.sqrt(nodes.alpha**2 + nodes.sigma**2)
    alpha, sigma = nodes.alpha / scale, nodes.sigma / scale  # of the scheduler's state
    state = x.to(torch.promote_types(x.dtype, torch.float32)) / scale[0]
    for i, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(state, timestep)  # some insist on it; the network is given its own scale
        x0 = denoiser(state * scale[i], nodes.t[i], cond).to(state.dtype)
        answer = x0 if peer.prediction == "sample" else from_x0(peer.prediction, x0, state, alpha[i], sigma[i])
        with _numpy_1():
            state = scheduler.step(answer, timestep, state).prev_sample
    return state * scale[-1]


@contextmanager
def _numpy_1() -> Iterator[None]:
    """Silence what numpy 2 deprecates in diffusers' ways of handing tensors to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _scheduler(peer: Peer, nodes: Nodes) -> Any:  # noqa: ANN401 - one of diffusers' classes, which is not always installed
    """Make the peer's scheduler with the levels of ``nodes [N+1]`` in its tables, to be stepped ``N`` times."""
    try:
        import diffusers
    except ImportError as error:
        raise FewstepError("comparing with diffusers needs it installed: pip install 'fewstep[diffusers]'") from error
    level = nodes.sigma / nodes.alpha
    if peer.scheduler == "PNDMScheduler" and nodes.evaluations > 1:
        level = torch.cat([level[:1], level[2:]])
    count = len(level) - 1
    with _numpy_1():
        scheduler = getattr(diffusers, peer.scheduler)(**_options(peer, count, to_clean=float(level[-1]) == 0))
        scheduler.set_timesteps(count)
    if peer.scheduler in ("DDIMScheduler", "PNDMScheduler"):  # timesteps N-1 .. 0 index the table, the step from 0 leads to the final one
        alphas_cumprod = 1 / (1 + level**2)
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = alphas_cumprod[:-1].flip(0), alphas_cumprod[-1]
        return scheduler
    if peer.scheduler == "IPNDMScheduler":  # its names for alpha and sigma
        norm = torch.sqrt(1 + level**2)
        scheduler.alphas, scheduler.betas = 1 / norm, level / norm
    elif peer.scheduler == "KDPM2DiscreteScheduler":  # at odd places: where the first half of a step leads, and where the second does
        odd = torch.arange(len(level)) % 2 == 1
        scheduler.sigmas = torch.where(odd, torch.cat([level[1:], level[-1:]]), level)
        scheduler.sigmas_interpol = level
    else:
        scheduler.sigmas = level
    scheduler.timesteps = nodes.t[:-1]
    scheduler.set_begin_index(0)  # count the steps: times may repeat
    return scheduler


def _options(peer: Peer, count: int, *, to_clean: bool) -> dict[str, Any]:
    """Return the options of a scheduler for ``count`` levels."""
    options: dict[str, Any] = {"num_train_timesteps": count, **peer.options}
    if peer.prediction == "sample":
        options["prediction_type"] = "sample"
    if "DPMSolver" in peer.scheduler:  # with "zero" the last step is of first order wherever it leads
        options["final_sigmas_type"] = "zero" if to_clean else "sigma_min"
    if peer.scheduler == "DPMSolverSinglestepScheduler":  # as it changes itself, with a warning, where whole steps do not fit
        options["lower_order_final"] = to_clean or count % options["solver_order"] != 0
    return options
