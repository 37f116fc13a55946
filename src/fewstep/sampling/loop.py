"""The one sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Tableau, advance
from fewstep.runtime.errors import ModelError, SolverError
from fewstep.sampling.noise import seeded_noise
from fewstep.sampling.sampler import Sampler

__all__ = ["Aimable", "FiniteCheck", "Step", "aimed", "sample"]


@runtime_checkable
class Aimable(Protocol):
    """A denoiser that has to know its steps."""

    def aimed(self, tableau: Tableau) -> Denoiser: ...


def aimed(denoiser: Denoiser, tableau: Tableau) -> Denoiser:
    """The denoiser for the steps of one sampler: itself, unless it has to know them."""
    return denoiser.aimed(tableau) if isinstance(denoiser, Aimable) else denoiser


class Step(NamedTuple):
    """What `sample` shows an observer after each evaluation."""

    i: int  # evaluation, 0 .. N-1
    t: Tensor  # [] its time
    x: Tensor  # [B, *D] the state it was evaluated at
    x0: Tensor  # [B, *D] the denoiser's answer
    x_next: Tensor  # [B, *D] where the next evaluation happens; the sample itself after the last


def sample(
    denoiser: Denoiser,
    sampler: Sampler | Tableau,
    x: Tensor,
    cond: Cond = None,
    *,
    seeds: Sequence[int] | Tensor | None = None,
    observe: Callable[[Step], None] | None = None,
) -> Tensor:
    """Run a sampler from ``x [B, *D]`` at its first time to its last.

    The state is kept in at least float32; the denoiser is called with it once per row of the tableau, at a float64 ``t []``.
    Gradients flow through everything; wrap the call in ``torch.no_grad()`` when none are wanted.

    Args:
        denoiser: the model; its schedule must be the sampler's.
        sampler: a `Sampler`, or a bare `Tableau`.
        x: start, see `start_noise`.
        cond: handed to the denoiser unchanged.
        seeds: one per sample, for samplers that add noise.
        observe: called after every evaluation.

    Raises:
        ModelError: the denoiser's schedule is another, its output has another shape, or is not finite (which evaluation).
        SolverError: a stochastic sampler without seeds.
    """
    tableau = sampler.tableau if isinstance(sampler, Sampler) else sampler
    nodes = tableau.nodes
    _check_schedule(nodes, denoiser.schedule)
    denoiser = aimed(denoiser, tableau)
    if tableau.stochastic and (seeds is None or len(seeds) != len(x)):
        raise SolverError(f"this sampler adds noise: pass seeds=, one for each of the {len(x)} samples")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    state, finite = tableau.start(x), FiniteCheck()
    for i, row in enumerate(tableau.rows(x)):
        x0 = denoiser(state.x, nodes.t[i], cond)
        if x0.shape != x.shape:
            raise ModelError(f"the denoiser answered shape {tuple(x0.shape)} to a state of shape {tuple(x.shape)}")
        x0 = x0.to(x.dtype)
        finite.note(x0)
        noise = None
        if row.noise is not None and seeds is not None:
            noise = seeded_noise(seeds, x.shape[1:], stream=i + 1).to(x.dtype).to(x.device)
        before, state = state, advance(row, state, x0, noise)
        if observe is not None:
            observe(Step(i, nodes.t[i], before.x, x0, state.x))
    finite.done(lambda i: f"t = {nodes.t[i]:g}, sigma = {nodes.sigma[i]:g}")
    return state.x


class FiniteCheck:
    """Whether all answers of a network were finite: noted after each, looked at once at the end, so that no step waits for the device."""

    def __init__(self) -> None:
        self.extremes: list[Tensor] = []

    def note(self, answer: Tensor) -> None:
        """An answer ``[B, *D]``. Its least and greatest value are kept: that reads it once, where ``isfinite`` writes three copies."""
        if answer.numel():
            self.extremes.append(torch.stack(answer.detach().aminmax()))

    def done(self, place: Callable[[int], str]) -> None:
        """See that all were finite; ``place`` says where evaluation ``i`` was made.

        Raises:
            ModelError: one was not (the first).
        """
        if not self.extremes:
            return
        bad = (~torch.isfinite(torch.stack(self.extremes)).all(1)).nonzero()
        if len(bad):
            i = int(bad[0])
            raise ModelError(
                f"the network's output is not finite (NaN or infinite) at evaluation {i + 1} of {len(self.extremes)}, {place(i)}: "
                f"check its weights and dtype, or clip its inputs"
            )


def _check_schedule(nodes: Nodes, schedule: NoiseSchedule) -> None:
    t = nodes.t.detach()
    for name, ours, theirs in (("alpha", nodes.alpha, schedule.alpha(t)), ("sigma", nodes.sigma, schedule.sigma(t))):
        wrong = (~torch.isclose(ours.detach(), theirs, rtol=1e-6, atol=1e-9)).nonzero()
        if len(wrong):
            i = int(wrong[0])
            raise ModelError(
                f"the sampler was made for another noise schedule: at t = {t[i]:g} it has {name} = {ours[i]:g}, the model {theirs[i]:g}"
            )
