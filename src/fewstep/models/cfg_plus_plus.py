r"""CFG++ (Chung et al., arXiv 2406.08070): the estimate of the image is guided, and the noise that is put back to it is not.

With ``U`` the answer without the condition, ``C`` the one with it, and ``D = U + w (C - U)``, a solver takes its step by ``U`` alone, past
answers included, and what guidance changes of the image is added to where the step leads:

    x' = step(x, U, U_before, ...) + k (D - U)

The history holds ``U`` alone, so this is an edit of the state between steps, of any solver whose steps begin at the state. The difference
is that of a step's last evaluation. Published are three gains ``k``, which are one for a step of first order:

* that of the image in ``x'``, ``k = alpha_t``, so that ``x' = alpha_t D + sigma_t eps(U)`` (algorithm 1 of the paper);
* with the newest answer guided in the line through the last two, too: ``k = alpha_t - sum_j a_j`` with the weights ``a_j`` of the older
  answers (the authors' DPM-Solver++(2M), and ComfyUI's ``dpmpp_2m_cfg_pp``);
* with the image guided in the state before the step: ``k = alpha_s r`` with the weight ``r`` of that state (ComfyUI's
  ``res_multistep_cfg_pp``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.prediction import aligned
from fewstep.core.tableau import Tableau
from fewstep.models.guidance import Wrapped
from fewstep.models.model import Model
from fewstep.runtime.errors import ModelError, SolverError
from fewstep.runtime.front_door import number
from fewstep.sampling.loop import Edit, Step
from fewstep.sampling.sampler import Sampler

__all__ = ["cfg_plus_plus", "check_plus_plus_scale", "plus_plus_gains"]


def cfg_plus_plus(model: Model, scale: float, sampler: Sampler | Tableau) -> tuple[Denoiser, Edit]:
    """Return the denoiser and the edit by which a sampler takes the steps of CFG++ (Chung et al., arXiv 2406.08070).

    They belong together, to one run of `steps` at a time: the denoiser answers without the condition, and the edit adds what guidance
    changes. `fewstep.sample` makes them of ``guidance_form="cfg++"``. With ``euler`` they are ComfyUI's ``euler_cfg_pp``, with
    ``euler-ancestral`` its ``euler_ancestral_cfg_pp``, with ``dpm-solver-pp-2m`` its ``dpmpp_2m_cfg_pp``, with ``exp-ab-2`` its
    ``res_multistep_cfg_pp``, and with ``gradient-estimation`` its ``gradient_estimation_cfg_pp``.

    Args:
        model: with a null label to guide away from.
        scale: that of CFG++, of which the paper takes some between 0 and 1. 0 is the model without its condition.
        sampler: hand-made. A tableau alone does not say which of the published forms is its solver's, so it keeps one answer.

    Raises:
        SolverError: a sampler whose steps the edit does not reach, or whose coefficients were made for guidance of another form.
        ModelError: no number; a model that cannot be guided, or is told its scale.
    """
    scale, gains = number(scale, "the scale of CFG++", ModelError), plus_plus_gains(sampler)
    both = model.both_answers()
    changes = list[Tensor]()  # D - U of the last evaluation

    def unconditional(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        null, wanted = both(x, t, cond)
        changes[:] = [scale * (wanted - null)]
        return null

    def lead(step: Step) -> Tensor:
        x = step.x_next
        return x + aligned(gains[step.i], x) * changes[0].to(x.dtype)

    return Wrapped(model.schedule, unconditional, calls=2, domain=model.domain), lead


def check_plus_plus_scale(scale: float | None) -> None:
    """Refuse a scale that was left out: a model's own is one of the usual guidance, many times too large here.

    Raises:
        ModelError: it was.
    """
    if scale is None:
        raise ModelError("CFG++ has scales of its own, between 0 and 1: name one, as guidance=0.6 (--guidance 0.6)")


def plus_plus_gains(sampler: Sampler | Tableau) -> Tensor:
    """Return the weight ``[N]`` of what guidance changes of the image in the state after each evaluation, see this module's formulas.

    Raises:
        SolverError: a sampler whose steps an edit does not reach, or whose coefficients were made for guidance of another form.
    """
    alone = isinstance(sampler, Tableau)
    tableau, name, solver = (sampler, "this tableau", "") if alone else (sampler.tableau, sampler.name, sampler.solver)
    made = solver in ("DPMSolverV3", "fitted") or tableau.first is not None or bool(tableau.element) or bool(tableau.bias.any())
    if made or (solver in ("", "stopped") and tableau.memory > 1):
        why = "was made for guidance of another form" if made else "does not say which solver's CFG++ it takes"
        raise SolverError(f"{name} {why}: name a hand-made solver, as euler, dpm-solver-pp-2m or exp-ab-2")
    ends = [i + 1 for i, whole in enumerate(tableau.whole_steps) if whole]
    count = tableau.nodes.evaluations
    steps = list(range(count)) if alone else list(sampler.begins)
    if ends != [*steps[1:], count]:
        raise SolverError(
            f"CFG++ adds to the state after each step of the grid, and {name} goes back to the state before (as a corrector does), or goes "
            "on from within a step: use euler, ddim, euler-ancestral, dpm-solver-pp-2m, exp-ab-2, gradient-estimation or deis-3"
        )
    return GAINS.get(solver, _of_image)(tableau)


def _of_image(tableau: Tableau) -> Tensor:
    return tableau.nodes.alpha[1:]


def _of_newest(tableau: Tableau) -> Tensor:
    return tableau.nodes.alpha[1:] - tableau.update[:, 1, 3:].sum(1)


def _of_state(tableau: Tableau) -> Tensor:
    looks_back = (tableau.update[:, 1, 3:] != 0).any(1)
    return torch.where(looks_back, tableau.nodes.alpha[:-1] * tableau.update[:, 1, 1], tableau.nodes.alpha[1:])


GAINS: dict[str, Callable[[Tableau], Tensor]] = {  # where a solver's published form is not the first; by its class
    "DPMSolverPP": _of_newest,
    "ExponentialAB": _of_state,
    "RESAncestral": _of_state,
}
