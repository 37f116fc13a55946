r"""CFG++ (Chung et al., arXiv 2406.08070): the estimate of the image is guided, and the noise that is put back to it is not.

A first-order step to ``alpha_t x0 + sigma_d eps`` is ``r x + g x0`` with ``r = sigma_d/sigma_s`` and ``g = alpha_t - r alpha_s``. With
``x0`` guided, ``D = U + w (C - U)``, and ``eps`` that of the unconditional answer ``U``, it is

    alpha_t D + sigma_d (x - alpha_s U)/sigma_s = r x + g (U + w alpha_t/g (C - U))

so it is the same step with classifier-free guidance of scale ``w alpha_t/g``: another at each evaluation, and ``w`` itself at the last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser, FlowMap
from fewstep.core.tableau import Tableau
from fewstep.models.guidance import Wrapped, calls_of
from fewstep.runtime.errors import ModelError, SolverError
from fewstep.runtime.front_door import number

__all__ = ["cfg_plus_plus", "plus_plus_scales"]


def cfg_plus_plus(guided: Callable[[float], Denoiser | FlowMap], scale: float, tableau: Tableau) -> Denoiser:
    """Return the denoiser by which a sampler of first order takes the steps of CFG++ (Chung et al., arXiv 2406.08070, algorithm 1).

    With ``euler`` it is ComfyUI's ``euler_cfg_pp``, with ``euler-ancestral`` its ``euler_ancestral_cfg_pp``. `fewstep.sample` makes it of
    ``guidance_form="cfg++"``.

    Args:
        guided: the denoiser at a classifier-free guidance scale, as `Model.guided`.
        scale: that of CFG++, of which the paper takes some between 0 and 1.
        tableau: the sampler. The denoiser answers at its times alone.

    Raises:
        SolverError: the sampler is not of first order.
        ModelError: no number, a model that jumps, or one that cannot be guided by one of the scales of the steps.
    """
    times = tableau.nodes.t[:-1]
    made = [guided(one) for one in plus_plus_scales(tableau, scale).tolist()]
    denoisers = [one for one in made if not isinstance(one, FlowMap)]
    if len(denoisers) < len(made):
        raise ModelError("a student makes jumps of its own, and has no noise to put back: leave CFG++ out")

    def at(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        found = (times == t.detach().cpu().double()).nonzero() if not t.ndim else torch.empty(0)
        if not len(found):
            raise ModelError("CFG++ has a scale for each evaluation of its sampler, one after the other: sample with that one alone")
        return denoisers[int(found[0])](x, t, cond)

    return Wrapped(denoisers[0].schedule, at, max(map(calls_of, denoisers)), getattr(denoisers[0], "domain", None))


def plus_plus_scales(tableau: Tableau, scale: float) -> Tensor:
    """Return the classifier-free guidance scale ``[N]`` of each evaluation, ``scale alpha_t/g``, by which steps of first order are CFG++'s.

    Raises:
        SolverError: the sampler is not of first order.
        ModelError: the scale is no number.
    """
    scale, nodes, update = number(scale, "the scale of CFG++", ModelError), tableau.nodes, tableau.update
    plain = tableau.memory == 1 and not tableau.element and tableau.first is None and not bool(tableau.bias.any())
    if plain:
        r, g = update[:, 1, 1], update[:, 1, 2]
        leads = torch.isclose(r * nodes.alpha[:-1] + g, nodes.alpha[1:], rtol=1e-9, atol=1e-12).all()
        records = bool((tableau.record == torch.tensor([0.0, 1.0], dtype=torch.float64)).all())
        if bool(leads) and records and not bool(update[:, 1, 0].any()) and bool((g > 0).all()):
            return scale * nodes.alpha[1:] / g
    raise SolverError(
        "CFG++ is known here for samplers of first order, whose step keeps one answer: euler, ddim, euler-ancestral, ddpm, euler-churn, "
        "lcm. One of higher order remembers the answers with and without the condition apart"
    )
