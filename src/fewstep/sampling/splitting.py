r"""Operator splitting for guidance by a gradient: any sampler solves the model's part, and kicks between its steps add the guidance.

With :math:`z = x/\alpha` and :math:`s = \sigma/\alpha`, guidance of scale w by :math:`\log p(c | x, t)` makes the sampling ODE

.. math:: \frac{dz}{ds} = \frac{z - D(x, t)}{s} - \frac{G(x, t)}{s}, \qquad G = w \frac{\sigma^2}{\alpha} \nabla_x \log p(c | x, t).

A solver that takes :math:`D + G` as one answer extrapolates both (`classifier_guided`). Splitting (Wizadwongsa and Suwajanakorn, arXiv
2301.11558) leaves it :math:`D`. The paper's kick over a step from s to s', a gradient frozen while the level falls, has the weight
:math:`(s^2 - s'^2) / 2 s'^2` in units of :math:`G`, which few steps make hundreds. The kicks here are bounded, all weights in [0, 1]:

.. math:: x \mathrel{+}= \alpha' (1 - s'/s) G(x, t') \text{ after a step (Lie)}, \qquad
          x \mathrel{+}= \alpha \tau G, \; \tau = \frac{s - s'}{s + s'} \text{ before and after it (Strang)},

and agree with the frozen ones as steps shrink: Strang's two halves meet at the harmonic mean of s and s', where both weigh the same.

A step to :math:`x' = r x + (\alpha' - r \alpha) D`, which keeps the share r of the state, adds :math:`(\alpha' - r \alpha) G` where G is
part of the answer. So with :math:`r \alpha/\alpha'` in place of :math:`s'/s` the bounded kicks hold for any sampler: one that adds noise
keeps less of the state than the ODE's, and is guided more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser, FlowMap
from fewstep.core.domain import check_unbounded
from fewstep.core.tableau import Nodes, Tableau
from fewstep.runtime.errors import ModelError, SolverError, first_line, look_up
from fewstep.runtime.front_door import checked, checked_class, number
from fewstep.sampling.loop import Step, check_start, steps
from fewstep.sampling.sampler import Sampler, tableau_of

__all__ = ["LogProb", "Splitting", "kick_weights", "log_gradient", "sample_split"]

LogProb = Callable[[Tensor, Tensor, Any], Tensor]  # (x [B, *D], t [], guide) -> [B]

SCHEMES, KICKS, FORMS = ("lie", "strang"), ("euler", "heun"), ("bounded", "frozen")


@checked_class
@dataclass(frozen=True)
class Splitting:
    """Configure operator splitting.

    Args:
        scheme: ``lie``, a kick after each step and one gradient; ``strang``, half a kick before and after it, and two.
        kick: ``euler``; ``heun`` evaluates the gradient once more, at the kicked state, as second order needs.
        form: ``bounded``; ``frozen`` is the paper's kick, which is for many steps.

    Raises:
        SolverError: an unknown word.
    """

    scheme: str = "lie"
    kick: str = "euler"
    form: str = "bounded"

    def __post_init__(self) -> None:
        for name, known in (("scheme", SCHEMES), ("kick", KICKS), ("form", FORMS)):
            look_up(getattr(self, name), dict.fromkeys(known), f"{name} of a splitting", SolverError)


@checked
@torch.no_grad()
def sample_split(
    denoiser: Denoiser,
    sampler: Sampler | Tableau,
    x: Tensor,
    log_prob: LogProb,
    scale: float,
    cond: Cond = None,
    *,
    guide: Any = None,  # noqa: ANN401 - whatever log_prob takes
    splitting: Splitting | None = None,
    seeds: Iterable[int] | Tensor | None = None,
    observe: Callable[[Step], None] | None = None,
) -> Tensor:
    """Sample with guidance by a gradient, split from the model, from ``x [B, *D]``; return the samples ``[B, *D]``.

    Args:
        denoiser: the model.
        sampler: a sampler or tableau whose steps end where they are: of one step or several, without a corrector.
        x: the start.
        log_prob: what to climb, ``(x [B, *D], t [], guide) -> [B]``: a classifier's ``log p(guide | x, t)``, or a negative loss. For a loss
            of the clean image its gradient runs through the network: ``lambda x, t, y: -loss(denoiser(x, t), y)``.
        scale: of the guidance; 0 is none.
        cond: for the denoiser; with a classifier mostly its null label.
        guide: for ``log_prob``.
        splitting: how.
        seeds: one per sample, for samplers that add noise, which belongs to the model's part.
        observe: called with each `Step`: ``x`` is the state the denoiser was called at, ``x_next`` that after the step and its kick.

    Raises:
        SolverError: a sampler with a corrector, whose next step would undo a kick; the frozen kick at pure noise; as `steps`.
        ModelError: a scale that is not finite; a ``log_prob`` of another shape, that does not depend on ``x``, or whose gradient is not
            finite (at which step); as `steps`.
    """
    tableau = tableau_of(sampler)
    if isinstance(denoiser, FlowMap):
        raise ModelError("a student's jumps are made by one call each, and cannot be split: guide its teacher")
    check_unbounded(denoiser, "sample_split", "a gradient's kicks push through them; use classifier-free guidance")
    splitting = Splitting() if splitting is None else splitting
    if not isinstance(splitting, Splitting):
        raise SolverError(f"splitting is a fewstep.Splitting, got {str(splitting)[:80]!r}")
    for name, function in (("log_prob", log_prob), ("observe", observe)):
        if not callable(function) and (name, function) != ("observe", None):
            raise SolverError(f"{name} is a function, got a {type(function).__name__}")
    scale = number(scale, "the scale of guidance", ModelError)
    if not math.isfinite(scale):
        raise ModelError(f"the scale of guidance is a finite number, got {scale:g}")
    if not tableau.whole_steps[-1]:
        raise SolverError(
            "this sampler's corrector returns to the state before the last one, and would undo a kick: use ddim, dpm-solver-pp-2m, heun, "
            "unipc-2:corrector=false or a fitted sampler"
        )
    if tableau.stochastic and splitting.form == "frozen":
        raise SolverError("the frozen kick is that of the sampling ODE, and this sampler adds noise: use the bounded form")
    if tableau.stochastic and tableau.element:
        raise SolverError("this sampler adds noise and has numbers for each element, which no kick is known for: name a hand-made one")
    check_start(x)
    return _Split(tableau, log_prob, scale, guide, splitting).run(denoiser, x, cond, seeds, observe)


def kick_weights(nodes: Nodes, a: int, e: int, splitting: Splitting, kept: float | None = None) -> tuple[float, float]:
    """Return the weights of ``w sigma^2 grad log p`` that are added to the state before and after the step from node ``a`` to ``e``.

    That is ``alpha G``. All bounded ones lie in [0, 1]. At pure noise (``alpha = 0``) no guidance acts; the clean end has ``sigma = 0``.

    Args:
        nodes: of the sampler.
        a, e: where the step begins and ends.
        splitting: how.
        kept: the share ``r`` of the state that the step keeps; by default that of the ODE.

    Raises:
        SolverError: the frozen form at an infinite level, or at the clean end.
    """
    alpha, sigma = nodes.alpha, nodes.sigma
    kept = float(sigma[e] / sigma[a]) if kept is None else kept
    ratio = kept * float(alpha[a] / alpha[e])  # s'/s of the ODE
    if splitting.form == "bounded":
        lie, tau = 1 - ratio, (1 - ratio) / (1 + ratio)
        before, after = (0.0, lie) if splitting.scheme == "lie" else (tau, tau)
        return (before if alpha[a] > 0 else 0.0), after
    if not ratio > 0:
        raise SolverError("the frozen kick is infinite from pure noise and to the clean image: use the bounded form, or a grid within")
    if splitting.scheme == "lie":
        return 0.0, (1 / ratio**2 - 1) / 2  # (s^2 - s'^2) / 2 s'^2
    middle = 2 * ratio / (1 + ratio)  # m/s, the harmonic mean of s and s'
    return (1 - middle**2) / 2, ((middle / ratio) ** 2 - 1) / 2


def _kept(tableau: Tableau) -> Callable[[int, int], float | None]:
    """Return the share of the state that a step keeps, as a function of the nodes where it begins and ends; None of the ODE's."""
    if not tableau.stochastic:
        return lambda a, e: None  # noqa: ARG005 - sigma_e/sigma_a
    share: list[float] = [1.0, *tableau.unrolled().start.tolist()]  # of the start in each state
    return lambda a, e: share[e] / share[a] if share[e] else 0.0


class _Split:
    """One run: the kicks between the steps of a tableau."""

    def __init__(self, tableau: Tableau, log_prob: LogProb, scale: float, guide: Any, splitting: Splitting) -> None:  # noqa: ANN401
        self.tableau, self.log_prob, self.scale, self.guide, self.splitting = tableau, log_prob, scale, guide, splitting
        ends = [i + 1 for i, whole in enumerate(tableau.whole_steps) if whole]
        pairs = list(zip([0, *ends], ends, strict=False))
        kept = _kept(tableau)
        self.weights = {a: kick_weights(tableau.nodes, a, e, splitting, kept(a, e)) for a, e in pairs} if scale else {}  # by its begin
        self.begins = {e: a for a, e in pairs}  # where the step that ends here began

    def run(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, seeds: Iterable[int] | Tensor | None, observe: Callable[[Step], None] | None
    ) -> Tensor:
        shown = dict[int, Tensor]()  # the state after a step and its kick, before that of the next one

        def edit(step: Step) -> Tensor | None:
            e = step.i + 1
            shown[e] = self._kicked(step.x_next, e, self.weights[self.begins[e]][1]) if self.scale else step.x_next
            return self._before(shown[e], e)

        end = x
        for step in steps(denoiser, self.tableau, self._before(x, 0), cond, seeds=seeds, edit=edit if self.scale else None):
            end = shown.pop(step.i + 1, step.x_next)
            if observe is not None:
                observe(step._replace(state=step.state._replace(x=end)))
        return end

    def _before(self, x: Tensor, a: int) -> Tensor:
        """Return the state after the kick before the step that begins at node ``a``; there is none at the end."""
        return self._kicked(x, a, self.weights[a][0]) if a in self.weights else x

    def _kicked(self, x: Tensor, i: int, weight: float) -> Tensor:
        """Kick the states ``x [B, *D]`` at node ``i``: ``x + alpha weight G``, with one gradient or the mean of two (Heun)."""
        gain = weight * self.scale * float(self.tableau.nodes.sigma[i]) ** 2
        if not gain:
            return x
        slope = self._gradient(x, i)
        if self.splitting.kick == "heun":
            slope = (slope + self._gradient(x + gain * slope, i)) / 2
        return x + gain * slope

    def _gradient(self, x: Tensor, i: int) -> Tensor:
        return log_gradient(self.log_prob, x, self.tableau.nodes.t[i], self.guide)


def log_gradient(log_prob: LogProb, x: Tensor, t: Tensor, guide: Any = None) -> Tensor:  # noqa: ANN401
    """Return the gradient ``[B, *D]`` of ``log_prob`` by the states ``x [B, *D]``, with gradients on wherever it is called.

    Raises:
        ModelError: ``log_prob`` answers another shape than ``[B]`` or does not depend on ``x``, or the gradient is not finite (where).
    """
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()  # a function that writes into it does not write into the samples
        value = log_prob(leaf, t, guide)
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ModelError(f"log_prob answers one number for each of {len(x)} samples, [B], got {what}")
        if not value.is_floating_point():
            raise ModelError(f"log_prob answers real numbers, got {str(value.dtype).removeprefix('torch.')}")
        try:
            found = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
        except RuntimeError as error:
            raise ModelError(f"log_prob cannot be differentiated by x: {first_line(error)}") from error
    if found is None:
        raise ModelError("log_prob does not depend on x: it has no gradient to guide by (was it computed under torch.no_grad?)")
    if not bool(torch.isfinite(found).all()):
        raise ModelError(
            f"the gradient of log_prob is not finite at t = {float(t.flatten()[0]):g}: check it, or lower the scale of guidance"
        )
    return found
