r"""Inversion: from an image to the noise that a sampler makes it of.

The sampling ODE has no direction, so a solver that runs up the noise levels leads from an image to about its noise (DDIM inversion, arXiv
2010.02502). What is wanted is the start ``z`` of one sampler ``S`` with its own errors, ``S(z) = x0``. With ``U`` the way up it is found by
defect correction,

    z_0 = U(x0),     z_{k+1} = z_k + U(x0) - U(S(z_k)),

which converges as fast as ``U`` undoes ``S``, and for any deterministic sampler: no step of it is inverted by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser, FlowMap, check_denoiser
from fewstep.core.domain import check_unbounded
from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import aligned
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes, Tableau, tabulate
from fewstep.models.generate import What, sampler_for
from fewstep.models.model import Model
from fewstep.models.networks.calls import check_evaluating
from fewstep.runtime.errors import ModelError, SolverError
from fewstep.runtime.front_door import checked, number, scale_of, whole
from fewstep.sampling.loop import check_start, run
from fewstep.sampling.sampler import Sampler
from fewstep.solvers.ddim import toward
from fewstep.solvers.dpm_solver_pp import DPMSolverPP

__all__ = ["invert"]


@checked
@torch.no_grad()
def invert(
    model: Model | Denoiser,
    what: What,
    x0: Tensor,
    cond: Cond = None,
    *,
    nfe: int | None = None,
    guidance: float | None = None,
    grid: str | TimeGrid | None = None,
    tolerance: float = 1e-3,
    corrections: int = 4,
) -> Tensor:
    """Return the start from which a sampler makes given images, so that `sample` with it gives them back.

    It takes as many evaluations as the sampler to run up the noise levels and as many to look at the round trip, and twice as many for each
    correction. An image that comes back within the tolerance is not corrected further.

    Args:
        model: a model, or any `Denoiser`; no student, which has no way up.
        what: the sampler, as for `sample`. It may add no noise.
        x0: images ``[B, *D]``, each as the sampler would make it.
        cond: what they are of, as for `sample`. A model with classes has to be told.
        nfe, guidance, grid: as for `sample`.
        tolerance: how far an image may come back from where it was, by RMSE.
        corrections: the most that are made.

    Returns:
        The starts ``[B, *D]`` at the sampler's first noise level, on the model's device.

    Raises:
        ModelError: a student, a reflected model, or no images; a model with classes without ``cond``.
        SolverError: a sampler that adds noise; an image that does not come back within the tolerance (how far it stays).
        GridError: as `sample`.

    Examples:
        >>> import fewstep
        >>> model = fewstep.load_model("digits-edm")
        >>> sampler = fewstep.Sampler.build("unipc-2", "karras", model.schedule, nfe=20)
        >>> images, labels = fewstep.sample(model, "unipc-2", nfe=8, seeds=[3]), model.labels([3])
        >>> start = fewstep.invert(model, sampler, images, labels)
        >>> bool((fewstep.sample(model, sampler, start, labels) - images).square().mean() < 1e-6)
        True
    """
    check_denoiser(model, "invert")
    check_unbounded(model, "invert", "its samples are folded, and a fold has many starts")
    if isinstance(model, Model):
        check_evaluating(model.network)
        model.need_trajectories()
    guidance = scale_of(guidance, model.default_guidance if isinstance(model, Model) else 1.0)
    tolerance, corrections = number(tolerance, "tolerance", SolverError), whole(corrections, "corrections", SolverError)
    if not 0 < tolerance < math.inf or corrections < 0:
        raise SolverError(f"a tolerance is a finite number above 0, and corrections are 0 or more, got {tolerance:g} and {corrections}")
    sampler = sampler_for(model, what, nfe=nfe, guidance=guidance, grid=grid)
    tableau = sampler.tableau if isinstance(sampler, Sampler) else sampler
    if tableau.stochastic:
        raise SolverError("a sampler that adds noise makes an image of many starts: name one that adds none, as unipc-2 or ddim")
    denoiser = model.guided(guidance) if isinstance(model, Model) else model
    assert not isinstance(denoiser, FlowMap)  # see above
    x0, cond = _asked(model, x0, cond)
    up, scale = _way_up(tableau, model.schedule)
    scale = aligned(scale, x0)
    first = x = run(denoiser, up, scale * x0, cond)
    for left in range(corrections, -1, -1):
        back = run(denoiser, tableau, x, cond)
        missed = (back - x0).flatten(1).square().mean(1).sqrt()
        far = ~(missed <= tolerance)  # what is not a number has not come back
        if not bool(far.any()):
            break
        if not left:
            raise SolverError(
                f"{int(far.sum())} of {len(x0)} images come back {float(missed.max()):.2g} from where they were (RMSE) after {corrections} "
                f"corrections, not within tolerance={tolerance:g}: use more evaluations, as nfe=20 on the grid karras, or allow more"
            )
        x = torch.where(far.reshape(-1, *(1,) * (x0.ndim - 1)), x + first - run(denoiser, up, scale * back, cond), x)
    return x


def _asked(model: Model | Denoiser, x0: Tensor, cond: Cond) -> tuple[Tensor, Cond]:
    """Return images and condition on the model's device.

    Raises:
        ModelError: they are no finite images, or a model with classes is not told what they are of.
    """
    check_start(x0, model.shape if isinstance(model, Model) else None)
    if not len(x0):
        raise ModelError("x0 has no images: pass one at least, [B, *D]")
    if not bool(torch.isfinite(x0).all()):
        raise ModelError("x0 has entries that are not finite (NaN or infinite): check where the images come from")
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    if not isinstance(model, Model):
        return x0, cond
    if cond is None and model.classes is not None:
        raise ModelError(f"{model.name} has classes, and an image's start depends on what it is of: pass cond=, one label for each")
    cond = model.condition(cond, len(x0))
    return x0.to(model.device), cond.to(model.device) if isinstance(cond, Tensor) else cond


def _way_up(tableau: Tableau, schedule: NoiseSchedule) -> tuple[Tableau, Tensor]:
    """Return the sampler from the least noise of a sampler's nodes to the most, and the scale ``[]`` that a clean image has there.

    Raises:
        SolverError: there is but one level with noise.
    """
    times = torch.unique(tableau.nodes.t.detach())
    noisy = times[schedule.sigma(times) > 0]
    if len(noisy) < 2:
        raise SolverError("this sampler makes one step to the clean image, which leaves nothing of its start: use more evaluations")
    clean = len(noisy) < len(times)  # the step to the clean image has no way back: its images begin at the level before
    scale = schedule.alpha(noisy[0]) if clean else torch.ones((), dtype=torch.float64)
    return tabulate(_Upward(lower_order_below=0), Nodes.at(schedule, noisy)), scale


@dataclass(frozen=True)
class _Upward(DPMSolverPP):
    """DPM-Solver++(2M) towards more noise; its formulas hold for steps of either sign, but for one to pure noise, ``alpha = 0``."""

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        if bool(nodes.alpha[i + 1] > 0):
            return super().update(nodes, i, anchor, x, history)
        x_t = toward(nodes, i, i + 1, nodes.sigma[i + 1], x, history[0])
        return x_t, x_t
